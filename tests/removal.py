"""Structured pruning as its formulas say it, in float64 and by brute force: what the closed forms are held against.

Nothing here is taken from `pipeline`. Shapes: T = tokens, O = out features, D = in features, U = units.
"""

from collections.abc import Sequence

import torch


def carried(weight_OD: torch.Tensor, x_TD: torch.Tensor, unit_size: int = 1) -> torch.Tensor:
    """What each unit carries to the output, as columns: A [T O, U], so that the output under a mask is A m."""
    a_TOD = x_TD.double()[:, None, :] * weight_OD.double()[None]
    return a_TOD.flatten(0, 1).view(-1, a_TOD.shape[2] // unit_size, unit_size).sum(dim=2)


def least_error(a_NU: torch.Tensor, gone: Sequence[int], ridge: float = 0.0) -> float:
    """The least squared error of A m with m = 0 where units are gone, and `ridge` times (m - 1)^2 added."""
    mask_U = best_mask(a_NU, gone, ridge)
    return float((a_NU @ (mask_U - 1)).square().sum() + ridge * (mask_U - 1).square().sum())


def best_mask(a_NU: torch.Tensor, gone: Sequence[int], ridge: float = 0.0) -> torch.Tensor:
    """The mask of that error, by an orthogonal factorisation of A itself."""
    num_units = a_NU.shape[1]
    left = [unit for unit in range(num_units) if unit not in set(gone)]
    root = ridge**0.5 * torch.eye(num_units, dtype=torch.float64)
    stacked = torch.cat([a_NU, root])
    target = stacked.sum(dim=1, keepdim=True)
    solved = torch.linalg.lstsq(stacked[:, left], target).solution[:, 0]
    mask_U = torch.zeros(num_units, dtype=torch.float64)
    mask_U[left] = solved
    return mask_U


def rises(a_NU: torch.Tensor, gone: Sequence[int] = (), ridge: float = 0.0) -> torch.Tensor:
    """How much the least error rises when each unit goes too; infinite for those that are gone."""
    before = least_error(a_NU, gone, ridge)
    found = [
        float("inf") if unit in gone else least_error(a_NU, [*gone, unit], ridge) - before
        for unit in range(a_NU.shape[1])
    ]
    return torch.tensor(found, dtype=torch.float64)


def removed_in_rounds(a_NU: torch.Tensor, counts: Sequence[int], ridge: float = 0.0) -> list[int]:
    """The units that go when each round takes the lowest rises, found anew by brute force before it."""
    gone: list[int] = []
    for count in counts:
        gone += rises(a_NU, gone, ridge).argsort(stable=True)[:count].tolist()
    return gone
