"""Counts of what pruning takes: against figures worked out by hand for LLaMA-2-70B, and against each other."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from pipeline.checkpoint import Checkpoint
from pipeline.methods.admm import Admm
from pipeline.methods.alps import Alps
from pipeline.methods.besa import Besa
from pipeline.methods.magnitude import Magnitude
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.step import Step
from pipeline.methods.structured.narrowing import Comp, WandaSp
from pipeline.methods.wanda import Wanda
from pipeline.planning.methods_work import SELECTION_TRAFFIC, count_prune, count_recipe
from pipeline.planning.work import (
    Count,
    Pruning,
    count_again,
    count_collect,
    count_commit,
    count_propagate,
    count_read,
    likely_groups,
    shapes_of,
    statistics_bytes,
)
from pipeline.recipe import Recipe
from pipeline.skeleton import Skeleton
from pipeline.statistics import Gram
from tests.scales import LLAMA_70B, NARROW_70B, D, F, K
from tests.tiny import save_tiny

H = 6144
"""Features of the 48 query heads that are left of 64 where a quarter goes."""


def recipe(*steps: Step) -> Recipe:
    return Recipe(steps=steps)


def test_counts_add_up_field_by_field() -> None:
    one, other = Count(gemm=1.0, memory=4.0, weights_read=3), Count(gemm=2.0, gram=8.0, weights_read=5)
    assert one + other == Count(gemm=3.0, gram=8.0, memory=4.0, weights_read=8)
    assert (one + other).flops == 11.0


def test_a_pass_of_a_70b_block_is_457_teraflop_and_collecting_for_statistics_leaves_the_last_linear_out() -> None:
    forward = count_propagate(LLAMA_70B)
    assert LLAMA_70B.num_weights == 855_638_016
    assert forward.gemm == pytest.approx(457e12, rel=0.01)
    last = 2 * LLAMA_70B.all_tokens * D * F
    assert count_collect(LLAMA_70B, recipe(Wanda())).gemm == pytest.approx(forward.gemm - last)


def test_a_boundary_is_read_once_to_collect_and_read_and_written_once_to_propagate() -> None:
    boundary = LLAMA_70B.boundary_bytes
    assert boundary == 2**32
    collect, propagate = count_collect(LLAMA_70B, recipe(Wanda())), count_propagate(LLAMA_70B)
    assert (collect.hidden_read, collect.hidden_written) == (boundary, 0)
    assert (propagate.hidden_read, propagate.hidden_written) == (boundary, boundary)


def test_targets_cost_a_boundary_written_and_the_dense_stream_another_pass() -> None:
    boundary = LLAMA_70B.boundary_bytes
    pruned = count_collect(LLAMA_70B, recipe(Besa()))
    dense = count_collect(LLAMA_70B, recipe(Besa(target="dense")))
    assert (pruned.hidden_read, pruned.hidden_written) == (boundary, boundary)
    assert (dense.hidden_read, dense.hidden_written) == (2 * boundary, boundary)
    assert dense.gemm - pruned.gemm == pytest.approx(LLAMA_70B.collect_flops)


def test_without_statistics_only_the_first_sequence_is_collected() -> None:
    collect = count_collect(LLAMA_70B, recipe(Magnitude()))
    assert collect.gemm == pytest.approx(LLAMA_70B.forward_flops / 128)
    assert collect.hidden_read == LLAMA_70B.boundary_bytes / 128


def test_gram_matrices_take_a_product_of_all_pairs_of_features() -> None:
    pairs = 3 * D**2 + F**2
    assert count_collect(LLAMA_70B, recipe(SparseGPT())).gram == pytest.approx(2 * LLAMA_70B.all_tokens * pairs)
    assert statistics_bytes(LLAMA_70B, recipe(SparseGPT())) == 4 * pairs
    assert statistics_bytes(LLAMA_70B, recipe(Wanda())) == 8 * (3 * D + F)
    assert statistics_bytes(LLAMA_70B, recipe(Besa(), SparseGPT())) == 4 * pairs + 8 * (3 * D + F)
    assert statistics_bytes(LLAMA_70B, recipe(Magnitude())) == 0


def test_neurons_take_one_gram_matrix_whatever_the_steps_after_them_take() -> None:
    alone, then = Recipe(steps=(), shape=Comp()), Recipe(steps=(SparseGPT(),), shape=Comp())
    assert statistics_bytes(LLAMA_70B, alone) == 4 * F**2
    assert statistics_bytes(LLAMA_70B, then) == 4 * (3 * D**2 + 2 * F**2)
    fitted = 7 / 8 * LLAMA_70B.all_tokens  # the others are held out
    assert count_collect(LLAMA_70B, alone).gram == pytest.approx(2 * fitted * F**2)
    by_score = Recipe(steps=(), shape=WandaSp())
    assert statistics_bytes(LLAMA_70B, by_score) == 8 * F
    assert count_collect(LLAMA_70B, by_score).gemm == pytest.approx(LLAMA_70B.collect_flops)


def test_a_cut_is_factorised_by_every_replica_and_judged_on_the_sequences_held_out() -> None:
    names = ("none", "mask", "lstsq", "bias")
    none, mask, lstsq, bias = (count_prune(NARROW_70B, Comp.model_validate({"recovery": name})) for name in names)
    assert none.repeated.double_factor == bias.repeated.double_factor == pytest.approx(4 / 3 * F**3)
    assert none.repeated.double == pytest.approx(2 * D * F**2 + 2 * F**2 * (F - K))
    for mended in (mask, lstsq):  # one for each of four dampings
        assert mended.repeated.double_factor == pytest.approx(4 / 3 * F**3 + 4 * K**3 / 3)
    assert mask.repeated.double - none.repeated.double == pytest.approx(4 * 2 * D * (F**2 + K**2))
    assert lstsq.repeated.double - none.repeated.double == pytest.approx(4 * 2 * D * K * F)
    assert none.shared == Count()
    assert mask.shared.gemm == pytest.approx(6 / 8 * LLAMA_70B.forward_flops)  # five masks, and none
    assert bias.shared.gemm == pytest.approx(2 / 8 * LLAMA_70B.forward_flops)
    assert count_prune(NARROW_70B, WandaSp()) == count_prune(LLAMA_70B, Comp()) == Pruning()


def test_what_comes_after_a_cut_is_counted_at_the_width_that_is_left() -> None:
    kept = sum(rows * columns for group in NARROW_70B.cut.groups for rows, columns in group)
    assert LLAMA_70B.num_weights - kept == 3 * D * (F - K)
    assert (LLAMA_70B.cut, NARROW_70B.cut.cut) == (LLAMA_70B, NARROW_70B.cut)
    comp, sparsegpt = Comp(), SparseGPT()
    then = Recipe(steps=(sparsegpt,), shape=comp)
    assert count_read(NARROW_70B) == count_read(LLAMA_70B)
    assert count_collect(NARROW_70B, then) == count_collect(LLAMA_70B, then)
    assert count_propagate(NARROW_70B.cut).gemm == pytest.approx(
        LLAMA_70B.forward_flops - 2 * LLAMA_70B.all_tokens * 3 * D * (F - K)
    )
    assert count_commit(NARROW_70B, then).weights_written == 2 * kept
    assert count_recipe(NARROW_70B, then) == [count_prune(NARROW_70B, comp), count_prune(NARROW_70B.cut, sparsegpt)]
    assert count_recipe(NARROW_70B, then)[1].pieces[-1].factor == pytest.approx(4 / 3 * K**3)
    anew = replace(then, within_block="sequential")
    assert count_again(NARROW_70B, anew).gram == pytest.approx(2 * LLAMA_70B.all_tokens * (2 * D**2 + K**2))


def test_what_a_cut_leaves_is_read_again_as_other_weights_are_and_blocks_that_stay_whole_are_copied() -> None:
    alone, whole = Recipe(steps=(), shape=Comp()), count_read(LLAMA_70B).weights_read
    assert count_commit(NARROW_70B, alone).weights_read == 0
    assert count_commit(replace(NARROW_70B, stored_bytes=4), alone).weights_read == 2 * whole
    assert count_commit(LLAMA_70B, alone).weights_read == whole


def test_heads_that_go_are_looked_at_beside_the_neurons_and_before_them_where_statistics_are_gathered_anew() -> None:
    without, heads = (Recipe(steps=(), shape=Comp(heads=part)) for part in (0.0, 0.25))
    fitted = 7 / 8  # the others are held out
    before, after = count_collect(LLAMA_70B, without), count_collect(LLAMA_70B, heads)
    assert after.gram - before.gram == pytest.approx(2 * fitted * LLAMA_70B.all_tokens * D**2)
    assert statistics_bytes(LLAMA_70B, heads) - statistics_bytes(LLAMA_70B, without) == Gram.bytes_of(D)
    assert count_again(LLAMA_70B, heads) == Count()
    again = count_again(LLAMA_70B, replace(heads, within_block="sequential"))
    assert again == Count(gemm=fitted * LLAMA_70B.collect_flops, hidden_read=LLAMA_70B.boundary_bytes * 7 // 8)


@pytest.mark.parametrize(("recovery", "products"), [("mask", 4 * (D**2 + H**2)), ("lstsq", 4 * D * H)])
def test_what_heads_take_beside_neurons_is_products_and_as_many_runs(recovery: str, products: int) -> None:
    query, key = (H, D), (H // 8, D)
    fewer = replace(NARROW_70B, left=((query, key, key), ((D, H),), ((K, D), (K, D)), ((D, K),)))
    options = {"recovery": recovery}
    neurons, both = (count_prune(fewer, Comp.model_validate(options | {"heads": part})) for part in (0.0, 0.25))
    assert both.shared == neurons.shared.times(2)
    assert both.repeated.double - neurons.repeated.double == pytest.approx(2 * D * (D**2 + products))
    factors = both.repeated.double_factor - neurons.repeated.double_factor
    assert factors == pytest.approx(4 * H**3 / 3 if recovery == "lstsq" else 0.0, abs=1.0)


def test_sparsegpt_is_pieces_of_which_the_widest_input_is_the_largest() -> None:
    pruning = count_prune(LLAMA_70B, SparseGPT())
    assert len(pruning.pieces) == 4
    assert max(pruning.pieces, key=lambda piece: piece.flops) == pruning.pieces[-1]
    assert pruning.pieces[-1].factor == pytest.approx(4 / 3 * F**3)
    assert pruning.whole.columns == 3 * D + D + 2 * D + F
    assert pruning.solved_bytes == 3 * LLAMA_70B.num_weights


def test_admm_multiplies_every_row_as_often_as_it_is_asked_and_alps_inverts_for_every_linear() -> None:
    admm, longer = (count_prune(LLAMA_70B, Admm(refining=n)) for n in (5, 25))
    assert longer.whole.gram - admm.whole.gram == pytest.approx(
        20 * 2 * sum(rows * columns**2 for group in LLAMA_70B.groups for rows, columns in group)
    )
    assert admm.pieces[-1].factor == pytest.approx(4 / 3 * F**3)
    assert admm.solved_bytes == 3 * LLAMA_70B.num_weights
    alps = count_prune(LLAMA_70B, Alps(limit=6))
    assert alps.pieces[0].factor == pytest.approx(3 * 3 * 4 / 3 * D**3)


@pytest.mark.parametrize("step", [Wanda(), Magnitude()])
def test_a_method_without_a_count_of_its_own_selects_among_all_weights(step: Step) -> None:
    pruning = count_prune(LLAMA_70B, step)
    assert pruning.whole == pruning.shared == Count(memory=SELECTION_TRAFFIC * LLAMA_70B.num_weights)


def test_besa_takes_three_passes_an_epoch_and_reads_inputs_and_targets_in_each() -> None:
    once, twice = count_prune(LLAMA_70B, Besa()), count_prune(LLAMA_70B, Besa(epochs=2, batch=4))
    assert once.shared.gemm == pytest.approx(3 * LLAMA_70B.forward_flops)
    assert twice.shared.gemm == pytest.approx(6 * LLAMA_70B.forward_flops)
    assert (once.num_updates, twice.num_updates) == (128, 64)
    assert twice.shared.hidden_read == 4 * LLAMA_70B.boundary_bytes
    assert once.gradient_bytes == 4 * 101 * LLAMA_70B.num_rows
    assert count_prune(LLAMA_70B, Besa(granularity="linear")).gradient_bytes == 4 * 101 * 7


@pytest.mark.parametrize(
    ("step", "dtype_bytes", "stored_bytes", "is_read"),
    [(Wanda(), 2, 2, False), (Wanda(), 4, 2, False), (Wanda(), 2, 4, True), (SparseGPT(), 2, 4, False)],
)
def test_kept_weights_are_read_again_only_where_blocks_run_in_a_narrower_dtype(
    step: Step, dtype_bytes: int, stored_bytes: int, is_read: bool
) -> None:
    work = replace(LLAMA_70B, dtype_bytes=dtype_bytes, stored_bytes=stored_bytes)
    size = work.num_weights * stored_bytes
    assert count_read(work).weights_read == size
    assert count_commit(work, recipe(step)) == Count(weights_read=size if is_read else 0, weights_written=size)


def test_linears_are_grouped_by_the_input_they_share(tmp_path: Path) -> None:
    save_tiny("llama", tmp_path)
    skeleton = Skeleton(Checkpoint.open(tmp_path), torch.device("cpu"), torch.float32)
    groups = likely_groups(skeleton.blocks[0], ["mlp.up*"], 32)
    names = [[linear.name.rpartition(".")[2] for linear in group] for group in groups]
    assert names == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj"], ["down_proj"]]
    assert shapes_of(skeleton.blocks[0], groups) == (
        ((32, 32), (16, 32), (16, 32)), ((32, 32),), ((48, 32),), ((32, 48),)
    )  # fmt: skip
