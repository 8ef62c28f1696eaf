"""How other methods judge neurons and heads, for comparisons through the same machinery.

Scores are of the input features of the linears that write to the hidden states (`down_proj`, `o_proj`); a head's is
made of those of its features. Block influence (ShortGPT) and greedy removal (SLEB) are in `depth`.

    Wanda-sp   column means of Wanda's scores; every block loses the same; no recovery
    FLAP       An et al. (2312.11983): a feature that hardly varies can be replaced by its mean, so what counts is
               its variance; heads and neurons of all blocks compete; recovery by a bias
    2SSP       Sandri et al. (2501.17771): neurons by the norm of their activations, and whole attentions by greedy
               removal, with a rule for how much of each

Shapes: O = out features, D = in features, U = units, S = sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import torch

from pipeline.errors import ConfigError
from pipeline.methods.structured.widths import MOST


def wanda_sp(weight_OD: torch.Tensor, squares_D: torch.Tensor, unit_size: int = 1) -> torch.Tensor:
    """Return the mean over rows of |W_ij| ||x_j||, summed over a unit's features, float64 [U].

    squares_D: sums of squares of the inputs over all tokens; their scale changes no ranking. FASP's score of a column
    (2501.09412), a sum over rows, ranks alike.
    """
    score_D = weight_OD.double().abs().mean(dim=0) * squares_D.double().sqrt()
    return score_D.view(-1, unit_size).sum(dim=1)


def fluctuation(weight_OD: torch.Tensor, variance_D: torch.Tensor) -> torch.Tensor:
    """Return FLAP's Var(x_j) ||w_j||^2, float64 [D]."""
    return weight_OD.double().square().sum(dim=0) * variance_D.double()


def flap_of_units(weight_OD: torch.Tensor, variance_D: torch.Tensor, unit_size: int = 1) -> torch.Tensor:
    """Return FLAP's score of neurons, or of units of several features (heads), float64 [U]: the mean of squares."""
    score_D = fluctuation(weight_OD, variance_D)
    return score_D if unit_size == 1 else score_D.square().view(-1, unit_size).mean(dim=1)


def standardised(score_D: torch.Tensor) -> torch.Tensor:
    """Return scores less their mean, over their standard deviation; zeros where all are equal."""
    difference_D = score_D - score_D.mean()
    deviation = difference_D.square().sum().div(max(1, len(score_D) - 1)).sqrt()
    return difference_D / deviation if deviation > 0 else torch.zeros_like(score_D)


@dataclass(frozen=True, slots=True, kw_only=True)
class Pool:
    """The scores of units of one kind, block by block, [blocks, U]."""

    score_BU: torch.Tensor
    unit_numel: int
    """Parameters that go with a unit."""


def flap_pools(
    heads: Sequence[torch.Tensor], neurons: Sequence[torch.Tensor], head_size: int, head_numel: int, neuron_numel: int
) -> list[Pool]:
    """Return FLAP's scores so that heads and neurons of all blocks can compete: standardised within each block.

    heads, neurons: `fluctuation` of each block's inputs of o_proj and down_proj. Those of heads are squared before,
    and averaged over a unit's `head_size` features after.
    """
    by_head = torch.stack([standardised(s.square()).view(-1, head_size).mean(dim=1) for s in heads])
    by_neuron = torch.stack([standardised(score) for score in neurons])
    return [
        Pool(score_BU=by_head, unit_numel=head_numel),
        Pool(score_BU=by_neuron, unit_numel=neuron_numel),
    ]


def keep_of_pools(pools: Sequence[Pool], ratio: float) -> list[torch.Tensor]:
    """Return which units stay, bool [blocks, U] by pool, so that about `ratio` of all their parameters go.

    Units stay in the order of their scores until what stays is nearest to what should. The best of every block and
    kind stays whatever its score: a block without it cannot be stored.
    """
    secured = [p.score_BU.scatter(1, p.score_BU.argmax(dim=1, keepdim=True), torch.inf).flatten() for p in pools]
    order = torch.cat(secured).argsort(descending=True, stable=True)
    numel = torch.cat([torch.full_like(s, p.unit_numel) for s, p in zip(secured, pools, strict=True)])
    kept = numel[order].cumsum(dim=0)
    num_kept = int((kept - (1 - ratio) * kept[-1]).abs().argmin()) + 1
    num_kept = max(num_kept, int(torch.cat(secured).isinf().count_nonzero()))
    keep = torch.zeros_like(order, dtype=torch.bool).index_fill_(0, order[:num_kept], value=True)
    parts = torch.split(keep, [len(score) for score in secured])
    return [part.view_as(pool.score_BU) for part, pool in zip(parts, pools, strict=True)]


def two_ssp_split(
    ratio: Fraction, *, num_blocks: int, mlp_numel: int, attention_numel: int, alpha: float = 1.5
) -> tuple[int, Fraction]:
    """Return how many attentions go, and the share of their neurons that all blocks lose.

    `N = round(L s^(p_mlp / (alpha p_attention)))` for L blocks and the ratio s; neurons make up the rest. Raises
    ConfigError where they cannot.
    """
    num_attentions = round(num_blocks * float(ratio) ** (mlp_numel / attention_numel / alpha))
    rest = ratio * num_blocks * (mlp_numel + attention_numel) - num_attentions * attention_numel
    share = max(Fraction(0), rest / (num_blocks * mlp_numel))
    if share > MOST:
        raise ConfigError(
            f"2SSP's split of {float(ratio):.1%} over {num_blocks} blocks takes {num_attentions} attentions and "
            f"{float(share):.1%} of all neurons, above the most a block may lose, {float(MOST):.0%}; remove less, or "
            "silence more attentions (a larger `alpha`)"
        )
    return num_attentions, share
