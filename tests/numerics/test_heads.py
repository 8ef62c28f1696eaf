"""Heads that share keys and values: a smaller attention computes what the dense one does without those heads."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from pipeline.attention import HeadLayout, HeadUnit, KeptHeads
from pipeline.methods.structured.mask_problem import MaskProblem
from pipeline.methods.structured.selection import Rounds, Selection, select
from tests import removal
from tests.correlated import distance, inputs, normal

LAYOUT = HeadLayout(num_heads=6, num_groups=3, head_dim=4)
UNITS = pytest.mark.parametrize("unit", ["group", "query"])
HIDDEN = 10


def select_heads(
    weight_OD: torch.Tensor, gram_DD: torch.Tensor, unit: HeadUnit, how: Rounds
) -> tuple[MaskProblem, Selection, KeptHeads]:
    """One unit of every pool goes."""
    problem = MaskProblem(weight_OD=weight_OD, gram_DD=gram_DD, unit_size=LAYOUT.unit_size(unit))
    selection = select(problem, 1, how, LAYOUT.num_pools(unit))
    return problem, selection, LAYOUT.kept(selection.keep_U, unit)


class Attention:
    """Grouped-query attention by its definition: query head h uses the keys and values of group h // (H / G)."""

    def __init__(self, layout: HeadLayout, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, o: torch.Tensor) -> None:
        self.layout, self.q, self.k, self.v, self.o = layout, q, k, v, o

    def heads(self, hidden_TD: torch.Tensor) -> torch.Tensor:
        """Outputs of the query heads side by side: the inputs of o."""
        layout = self.layout
        q_HTd, k_GTd, v_GTd = (
            (hidden_TD @ weight.T).view(len(hidden_TD), -1, layout.head_dim).transpose(0, 1)
            for weight in (self.q, self.k, self.v)
        )
        outputs = [
            scaled_dot_product_attention(
                q_HTd[h], k_GTd[h // layout.heads_per_group], v_GTd[h // layout.heads_per_group], is_causal=True
            )
            for h in range(layout.num_heads)
        ]
        return torch.cat(outputs, dim=1)

    def cut(self, kept: KeptHeads) -> "Attention":
        rows, shared = kept.query_features, kept.key_features
        return Attention(kept.remaining, self.q[rows], self.k[shared], self.v[shared], self.o[:, rows])


def attention() -> Attention:
    wide, narrow = LAYOUT.num_heads * LAYOUT.head_dim, LAYOUT.num_groups * LAYOUT.head_dim
    shapes = [(wide, HIDDEN), (narrow, HIDDEN), (narrow, HIDDEN), (HIDDEN, wide)]
    return Attention(LAYOUT, *(normal(*shape, seed=i).double() for i, shape in enumerate(shapes)))


@UNITS
def test_the_smaller_attention_is_the_dense_one_without_those_heads(unit: HeadUnit) -> None:
    dense, hidden_TD = attention(), inputs(HIDDEN, 12).double()
    heads_TD = dense.heads(hidden_TD)
    how = Rounds(mask_var_max=float("inf"))
    problem, selection, kept = select_heads(dense.o, heads_TD.T @ heads_TD, unit, how)
    size = problem.unit_size
    expected_TD = (heads_TD * selection.keep_U.repeat_interleave(size)) @ dense.o.T
    smaller = dense.cut(kept)
    assert distance(smaller.heads(hidden_TD) @ smaller.o.T, expected_TD) < 1e-12
    assert smaller.q.shape[0] < dense.q.shape[0]
    assert len(smaller.k) == (8 if unit == "group" else 12)


@UNITS
def test_heads_are_judged_by_what_removing_them_and_tuning_the_rest_costs(unit: HeadUnit) -> None:
    weight_OD, x_TD = normal(HIDDEN, 24), inputs(24, 60)
    how = Rounds(mask_var_max=float("inf"))
    problem, selection, _ = select_heads(weight_OD, x_TD.double().T @ x_TD.double(), unit, how)
    rises = removal.rises(removal.carried(weight_OD, x_TD, problem.unit_size), ridge=problem.ridge(0.01))
    lowest = rises.view(1 if unit == "group" else LAYOUT.num_groups, -1).argmin(dim=1)
    assert (~selection.keep_U.view(len(lowest), -1)).int().argmax(dim=1).tolist() == lowest.tolist()


@pytest.mark.parametrize(("unit", "left"), [("group", (4, 2)), ("query", (3, 3))])
def test_groups_stay_of_one_size(unit: HeadUnit, left: tuple[int, int]) -> None:
    _, _, kept = select_heads(normal(HIDDEN, 24), torch.eye(24), unit, Rounds())
    assert (kept.remaining.num_heads, kept.remaining.num_groups) == left
    assert kept.remaining == LAYOUT.without(1, unit)
    by_group = kept.keep_H.view(LAYOUT.num_groups, -1).sum(dim=1)
    assert len(by_group[kept.keep_G].unique()) == 1


def test_features_follow_their_heads() -> None:
    kept = LAYOUT.kept(torch.tensor([True, False, True]), "group")
    assert kept.keep_H.tolist() == [True, True, False, False, True, True]
    assert kept.key_features.nonzero()[:, 0].tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert kept.query_features.nonzero()[:, 0].tolist() == [*range(8), *range(16, 24)]
