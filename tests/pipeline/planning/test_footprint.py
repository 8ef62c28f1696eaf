"""What phases hold: LLaMA-2-70B's sizes, where they lie, and how choices move them."""

from dataclasses import replace

import pytest
import torch

from pipeline.budget import Place
from pipeline.memory_config import Tier
from pipeline.methods.besa import Besa
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.structured.narrowing import Comp
from pipeline.methods.wanda import Wanda
from pipeline.planning.footprint import READ_BUFFERS, Choice, footprint
from pipeline.planning.held import Phase
from pipeline.planning.scale import Scale
from pipeline.recipe import Recipe
from pipeline.sparsity import SLAB_NUMEL
from tests.scales import LLAMA_70B, F, scale_70b

BASELINE = 500_000_000
BLOCK = 2 * (LLAMA_70B.num_weights + 2 * 8192)
BOUNDARY = 2**32


def phases_of(scale: Scale, tier: Tier = "host", *, fused: bool = False, ahead: int = 0) -> dict[str, Phase]:
    found = footprint(scale, Choice(tier=tier, fused=fused, ahead=ahead), BASELINE)
    return {phase.name: phase for phase in found}


def held(phase: Phase, what: str) -> tuple[Place, int]:
    (found,) = [entry for entry in phase.held if entry.what == what]
    return found.place, found.num_bytes


def test_every_phase_has_the_process_and_the_hidden_states() -> None:
    phases = phases_of(scale_70b(Wanda()))
    assert list(phases) == ["embed", "read", "collect", "prune", "commit", "propagate"]
    for phase in phases.values():
        assert held(phase, "interpreter and libraries") == ("host", BASELINE)
        assert held(phase, "hidden states") == ("host", BOUNDARY)


def test_a_survey_keeps_one_boundary_a_block_its_input_norms_and_the_scores_of_some_rows() -> None:
    phases = phases_of(replace(scale_70b(Besa()), surveys=True), ahead=1)
    assert list(phases)[-1] == "survey"
    assert "survey" not in phases_of(scale_70b(Besa()))
    survey = phases["survey"]
    assert held(survey, "hidden states") == ("host", BOUNDARY)
    assert held(survey, "weights") == ("device", BLOCK)
    assert held(survey, "statistics") == ("device", 8 * (3 * 8192 + 28672))
    assert held(survey, "work of counting outliers") == ("device", 20 * SLAB_NUMEL)
    assert survey.bytes_in("device") < phases["prune"].bytes_in("device")


@pytest.mark.parametrize(
    ("tier", "place"), [("device", "device"), ("pinned", "host"), ("host", "host"), ("disk", "spool")]
)
def test_hidden_states_lie_where_their_tier_is(tier: Tier, place: Place) -> None:
    assert held(phases_of(scale_70b(Wanda()), tier)["collect"], "hidden states") == (place, BOUNDARY)


def test_a_block_step_keeps_a_second_boundary() -> None:
    assert held(phases_of(scale_70b(Besa()))["prune"], "hidden states") == ("host", 2 * BOUNDARY)


def test_the_spool_pads_sequences_and_moves_four_batches_of_each_boundary_at_once() -> None:
    work = replace(LLAMA_70B, num_tokens=3, hidden=100, batch=2)  # 600 bytes a sequence, padded to 4096
    phase = phases_of(scale_70b(Besa(), work=work), "disk")["collect"]
    assert held(phase, "hidden states") == ("spool", 2 * 128 * 4096)
    assert held(phase, "buffers of the spool") == ("host", 2 * 4 * 2 * 4096)


def test_on_a_gpu_weights_are_on_the_device_and_come_through_host_memory_as_stored() -> None:
    phases = phases_of(replace(scale_70b(Wanda()), stored=torch.float32), ahead=1)
    assert held(phases["prune"], "weights") == ("device", BLOCK)
    assert held(phases["prune"], "the block's weights as stored") == ("host", 2 * BLOCK)


def test_on_a_cpu_all_is_in_host_memory_and_the_next_block_is_read_as_it_will_run() -> None:
    phases = phases_of(replace(scale_70b(Wanda(), unified=True), stored=torch.float32), ahead=1)
    assert {entry.place for phase in phases.values() for entry in phase.held} == {"host"}
    assert held(phases["prune"], "the next block's weights") == ("host", BLOCK)


def test_fusing_holds_two_blocks_and_a_third_where_it_is_read_meanwhile() -> None:
    for ahead in (1, 2):
        phases = phases_of(scale_70b(Wanda(), unified=True), "disk", fused=True, ahead=ahead)
        assert "propagate" not in phases
        assert held(phases["fused"], "weights of both blocks") == ("host", 2 * BLOCK)
        third = [entry.num_bytes for entry in phases["fused"].held if entry.what == "the next block's weights"]
        assert third == [BLOCK] * (ahead - 1)


def test_gram_matrices_of_a_70b_block_take_four_gigabytes() -> None:
    phases = phases_of(scale_70b(SparseGPT()))
    assert held(phases["collect"], "statistics") == ("device", 4 * (3 * 8192**2 + 28672**2))
    assert held(phases["collect"], "inputs in float32") == ("device", 4 * 2048 * 28672)
    assert held(phases["commit"], "masks and new weights") == ("device", 3 * LLAMA_70B.num_weights)


def test_on_a_gpu_squares_are_summed_in_slabs_of_float64() -> None:
    what = "inputs in float64, and their squares"
    assert held(phases_of(scale_70b(Wanda()))["collect"], what) == ("device", 16 << 24)
    short = scale_70b(Wanda(), work=replace(LLAMA_70B, num_tokens=8))
    assert held(phases_of(short)["collect"], what) == ("device", 16 * 8 * 28672)


def test_a_recipe_of_two_steps_holds_what_the_first_has_made_beside_the_second() -> None:
    both, alone = (phases_of(scale_70b(*steps))["prune"] for steps in ((Besa(), SparseGPT()), (SparseGPT(),)))
    added = held(both, "work of sparsegpt")[1] - held(alone, "work of sparsegpt")[1]
    assert added == LLAMA_70B.num_weights  # its masks


def test_a_cut_of_a_70b_block_holds_one_matrix_of_its_neurons_pairs_beside_the_statistic() -> None:
    scale = replace(scale_70b(Wanda()), recipe=Recipe(steps=(Wanda(),), shape=Comp()))
    phases = phases_of(scale)
    pairs, readers = F**2, 8192 * F
    assert held(phases["collect"], "statistics") == ("device", 4 * pairs + 8 * (3 * 8192 + F))
    assert held(phases["prune"], "work of comp") == ("device", 8 * (pairs + 2 * readers + 3 * (1 << 20)))
    assert held(phases["commit"], "masks and new weights")[1] == scale.work.num_weights


def test_an_evaluation_holds_a_block_and_its_windows_or_the_head_and_its_logits() -> None:
    scale = replace(scale_70b(Wanda()), windows=(24, 512))
    phase = phases_of(scale)["evaluate"]
    assert held(phase, "hidden states") == ("host", 24 * 512 * 8192 * 2)
    assert held(phase, "weights and activations")[1] > BLOCK
    vocabulary = replace(scale, vocab_size=10**6, outside_numel=10**6 * 8192)
    assert held(phases_of(vocabulary)["evaluate"], "head and logits") == ("device", 2 * 10**6 * 8192 + 128 * 10**6 * 10)


@pytest.mark.parametrize("scale", [scale_70b(Wanda()), scale_70b(Besa(), unified=True)])
def test_freed_memory_that_is_kept_stays_below_64_mebibytes(scale: Scale) -> None:
    for phase in phases_of(scale).values():
        assert held(phase, "freed memory that is kept") == ("host", 64 << 20)


@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("ahead", [0, 1])
def test_what_weights_come_through_is_held_from_the_first_block_to_the_last(unified: bool, ahead: int) -> None:
    phases = phases_of(replace(scale_70b(Wanda()), unified=unified), ahead=ahead)
    for name in ("read", "collect", "prune", "commit", "propagate"):
        assert held(phases[name], "buffers for reading weights") == ("host", READ_BUFFERS)
        if not unified:
            assert held(phases[name], "the block's weights as stored") == ("host", BLOCK)
