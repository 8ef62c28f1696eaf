"""Boundaries: read and written batch by batch, and filled by another thread while they are read."""

from threading import Event, Thread

import pytest
import torch

from pipeline.activations import ArrivingBoundary, Boundary, batches
from pipeline.errors import NumericsError

CPU = torch.device("cpu")
SHAPE = (5, 3, 2)
HIDDEN_NTD = torch.arange(30.0).view(SHAPE)


def filled() -> Boundary:
    boundary = Boundary(SHAPE, torch.float32)
    boundary.hidden_NTD.copy_(HIDDEN_NTD)
    return boundary


def test_sequences_are_split_into_batches_of_at_most_the_size() -> None:
    assert list(batches(5, 2)) == [slice(0, 2), slice(2, 4), slice(4, 5)]


def test_a_copy_is_independent() -> None:
    original = filled()
    copy = Boundary.copy_of(original)
    copy.hidden_NTD.zero_()
    assert torch.equal(original.hidden_NTD, HIDDEN_NTD)


def test_what_is_not_finite_is_not_written() -> None:
    boundary = filled()
    with pytest.raises(NumericsError, match="hidden states after block 3 hold NaN or Inf"):
        boundary.write(slice(0, 1), torch.full((1, 3, 2), torch.inf), "block 3")
    assert torch.equal(boundary.hidden_NTD, HIDDEN_NTD)


def test_a_reader_waits_for_the_sequences_it_wants_and_no_others() -> None:
    boundary, done, read = ArrivingBoundary(SHAPE, torch.float32), Event(), []

    def reader() -> None:
        read.append(boundary.read(slice(2, 4), CPU).clone())
        done.set()

    thread = Thread(target=reader)
    thread.start()
    boundary.put(slice(0, 2), HIDDEN_NTD[0:2])
    assert boundary.has_begun
    assert not done.wait(0.05)
    boundary.put(slice(2, 4), HIDDEN_NTD[2:4])
    thread.join(10)
    assert torch.equal(read[0], HIDDEN_NTD[2:4])
    assert not boundary.complete
    boundary.put(slice(4, 5), HIDDEN_NTD[4:5])
    boundary.wait()
    assert boundary.complete
    assert torch.equal(Boundary.copy_of(boundary).hidden_NTD, HIDDEN_NTD)


def test_a_batch_that_comes_again_does_not_replace_what_was_made_of_it() -> None:
    boundary = ArrivingBoundary(SHAPE, torch.float32)
    assert not boundary.has_begun
    boundary.put(slice(0, 2), HIDDEN_NTD[0:2])
    boundary.write(slice(0, 2), -HIDDEN_NTD[0:2], "a block")
    boundary.put(slice(0, 2), HIDDEN_NTD[0:2])
    assert torch.equal(boundary.read(slice(0, 2), CPU), -HIDDEN_NTD[0:2])
