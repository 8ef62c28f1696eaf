"""A job in numbers: what adds up, and what cannot be one."""

from dataclasses import replace

import pytest

from cluster.job_shape import BlockCost, JobShape, shape_from_measured

BLOCK = BlockCost(read=1, collect=2, prune=3, commit=4, propagate=5, dense_forward=6, weight_bytes=7)
JOB = JobShape(blocks=(BLOCK, BLOCK), num_sequences=10, batch=4, boundary_bytes=80)


def test_a_block_takes_all_phases_of_its_transaction() -> None:
    assert BLOCK.seconds == 15


def test_one_worker_never_propagates_the_last_block() -> None:
    assert JOB.seconds_alone == 15 + 10


def test_the_last_batch_may_be_a_small_one() -> None:
    assert JOB.num_batches == 3


def test_a_measured_job_has_the_same_phases_in_every_block_and_runs_dense_blocks_as_fast_as_pruned_ones() -> None:
    phases = {"read": 0.1, "collect": 0.2, "prune": 0.3, "commit": 0.4, "propagate": 0.5}
    job = shape_from_measured(
        phases, num_blocks=3, num_sequences=16, batch=4, weight_bytes=9, boundary_bytes=64, num_boundaries=2
    )
    assert job.blocks == (BlockCost(**phases, dense_forward=0.5, weight_bytes=9),) * 3
    assert (job.num_sequences, job.batch, job.boundary_bytes, job.num_boundaries) == (16, 4, 64, 2)
    assert not job.needs_dense_stream
    assert job.seconds_alone == pytest.approx(3 * 1.5 - 0.5)


def test_a_job_without_blocks_or_sequences_or_with_half_a_share_too_many_cannot_be_made() -> None:
    with pytest.raises(AssertionError):
        replace(JOB, blocks=())
    with pytest.raises(AssertionError):
        replace(JOB, num_sequences=0)
    with pytest.raises(AssertionError):
        replace(JOB, replicated=1.5)
