"""What a verification allows to rounding, on the shapes of LLaMA-2-70B; the rest of it is seen in integration."""

import pytest

from pipeline.allocation import Outliers, by_outliers
from pipeline.methods.besa import Besa
from pipeline.methods.pattern_mix import nearest_mix
from pipeline.methods.step import Step
from pipeline.methods.wanda import Wanda
from pipeline.sparsity import SemiStructured, Sparsity, Unstructured
from pipeline.verify import num_pruned_within

TWO_OF_FOUR, THREE_OF_EIGHT = SemiStructured(keep=2, group=4), SemiStructured(keep=3, group=8)
LLAMA = {
    "self_attn.q_proj": (8192, 8192), "self_attn.k_proj": (1024, 8192), "self_attn.v_proj": (1024, 8192),
    "self_attn.o_proj": (8192, 8192), "mlp.gate_proj": (28672, 8192), "mlp.up_proj": (28672, 8192),
    "mlp.down_proj": (8192, 28672),
}  # fmt: skip
BLOCKS = [LLAMA] * 80
SIZES = [rows * columns for rows, columns in LLAMA.values()]
MODEL = 80 * sum(SIZES)
OF_LINEARS, OF_ROWS = Besa(mix=True, granularity="linear"), Besa(mix=True)


def allows(num_pruned: int, asked: Sparsity, step: Step, *, outliers: bool = False) -> bool:
    least, most = num_pruned_within(asked, step, BLOCKS, by_outliers=outliers)
    return least <= num_pruned <= most


def pruned_by_rows(ratio: float) -> int:
    """Weights that go of a block where every row is rounded down."""
    return sum(rows * Unstructured(ratio=ratio).num_pruned(columns) for rows, columns in LLAMA.values())


def pruned_by_mix() -> int:
    """Weights that go of a block whose k and v spare more than others: with nothing that makes up for so little."""
    kept = nearest_mix([0.5, 0.75, 0.75, 0.5, 0.5, 0.5, 0.5], SIZES, TWO_OF_FOUR)
    assert kept == [2, 1, 1, 2, 2, 2, 2]
    return sum((4 - keep) * size // 4 for keep, size in zip(kept, SIZES, strict=True))


def test_what_mixes_of_linears_fall_short_by_adds_up_over_the_blocks() -> None:
    assert 80 * pruned_by_mix() - MODEL // 2 > sum(SIZES) // 4  # more than a weight of every group of a block
    assert allows(80 * pruned_by_mix(), TWO_OF_FOUR, OF_LINEARS)


def test_a_real_shortfall_is_none_that_a_mix_explains() -> None:
    assert not allows(80 * pruned_by_mix() + sum(SIZES) // 4, TWO_OF_FOUR, OF_LINEARS)
    assert not allows(MODEL // 2 - 1, TWO_OF_FOUR, OF_LINEARS)
    assert not allows(79 * pruned_by_mix(), TWO_OF_FOUR, OF_LINEARS)


@pytest.mark.parametrize("asked", [TWO_OF_FOUR, THREE_OF_EIGHT], ids=str)
def test_a_mix_of_rows_may_miss_less_than_a_row_of_the_widest_linear_a_block(asked: SemiStructured) -> None:
    exact, row = asked.num_pruned(MODEL), 28672 // asked.group
    assert allows(exact, asked, OF_ROWS)
    assert allows(exact + 80 * (row - 1), asked, OF_ROWS)
    assert not allows(exact + 80 * row, asked, OF_ROWS)
    assert not allows(exact - 1, asked, OF_ROWS)


def test_a_pattern_everywhere_is_met_to_the_weight() -> None:
    assert num_pruned_within(TWO_OF_FOUR, Wanda(), BLOCKS) == (MODEL // 2, MODEL // 2)


@pytest.mark.parametrize("ratio", [0.29, 0.3, 0.5, 0.7])
@pytest.mark.parametrize("step", [Wanda(), Besa()], ids=["wanda", "besa"])
def test_a_fraction_may_be_missed_by_a_weight_a_row_and_no_more(ratio: float, step: Step) -> None:
    asked, num_rows = Unstructured(ratio=ratio), 80 * sum(rows for rows, _ in LLAMA.values())
    assert allows(80 * pruned_by_rows(ratio), asked, step)
    assert allows(asked.num_pruned(MODEL), asked, step)
    assert not allows(asked.num_pruned(MODEL) + 1, asked, step)
    assert not allows(asked.num_pruned(MODEL) - num_rows - 1, asked, step)


FOUND = [Outliers(num_outliers=block * block, num_weights=sum(SIZES)) for block in range(80)]


def test_fractions_by_outliers_come_out_a_little_below_what_is_asked() -> None:
    asked = Unstructured(ratio=0.7)
    allocation = by_outliers(asked, FOUND, 0.08)
    shares = [allocation.of(block) for block in range(80)]
    num_pruned = sum(pruned_by_rows(share.ratio) for share in shares)
    assert num_pruned < asked.num_pruned(MODEL)
    assert allows(num_pruned, asked, Wanda(), outliers=True)
    assert not allows(num_pruned - MODEL // 1000, asked, Wanda(), outliers=True)


def test_patterns_by_outliers_may_miss_less_than_a_weight_of_every_group_of_a_block() -> None:
    uneven = [Outliers(num_outliers=1 + block * block, num_weights=800 * (1 + block % 3)) for block in range(9)]
    shapes = [{"only": (8, block.num_weights // 8)} for block in uneven]
    allocation = by_outliers(THREE_OF_EIGHT, uneven, 0.2)
    num_pruned = sum(allocation.of(n).num_pruned(block.num_weights) for n, block in enumerate(uneven))
    least, most = num_pruned_within(THREE_OF_EIGHT, Wanda(), shapes, by_outliers=True)
    assert (least, most) == (9000, 9000 + 300)
    assert least <= num_pruned <= most
