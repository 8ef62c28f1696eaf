"""The methods as their papers write them, in float64 and without a trick: what `pipeline` is held against.

Slow and plain on purpose: Python's own stable sort, a new matrix inverse for every column, soft masks written out.
Nothing here is taken from `pipeline`, so an agreement of the two means something.

Shapes: O = out features (rows), D = in features (columns), T = tokens, P = candidate sparsities, G = groups of rows,
C = channels, R = columns still to come.
"""

from collections.abc import Callable, Sequence
from math import inf

import numpy
import torch

# ------------------------------------------------------------------------------------------------- choosing by rank


def ascending(scores: Sequence[float]) -> list[int]:
    """Return positions from the lowest score to the highest; equal scores stay in their order."""
    return sorted(range(len(scores)), key=lambda position: scores[position])


def keep_in_list(scores: Sequence[float], num_pruned: int) -> list[bool]:
    """Return which entries stay when the first `num_pruned` of the ascending order go."""
    dropped = set(ascending(scores)[:num_pruned])
    return [position not in dropped for position in range(len(scores))]


def keep_in_rows(score_OD: torch.Tensor, num_pruned: int) -> torch.Tensor:
    """Drop the `num_pruned` lowest of every row."""
    return torch.tensor([keep_in_list(row, num_pruned) for row in score_OD.tolist()])


def keep_in_matrix(score_OD: torch.Tensor, num_pruned: int) -> torch.Tensor:
    """Drop the `num_pruned` lowest of all entries; equal ones go row by row."""
    return torch.tensor(keep_in_list(score_OD.flatten().tolist(), num_pruned)).reshape(score_OD.shape)


def keep_in_groups(score_OD: torch.Tensor, keep: int, group: int) -> torch.Tensor:
    """Keep the `keep` highest of every `group` consecutive entries of every row."""
    parts = [keep_in_rows(part, group - keep) for part in torch.split(score_OD, group, dim=1)]
    return torch.cat(parts, dim=1)


def ranks_in_rows(score_OD: torch.Tensor) -> torch.Tensor:
    """Return the place of every weight in its row's ascending order, 0 for the lowest."""
    return torch.tensor([[ascending(row).index(column) for column in range(len(row))] for row in score_OD.tolist()])


# ------------------------------------------------------------------------------------------------ Wanda, layer errors


def wanda_scores(weight_OD: torch.Tensor, x_TD: torch.Tensor) -> torch.Tensor:
    """Return |W_ij| * ||X_j||_2 (Sun et al., equation 1)."""
    return weight_OD.double().abs() * x_TD.double().square().sum(dim=0).sqrt()


def output_error(weight_OD: torch.Tensor, pruned_OD: torch.Tensor, x_TD: torch.Tensor) -> float:
    """Return ||X W^T - X W'^T||_F^2, what layer-wise pruning wants small."""
    return float((x_TD.double() @ (weight_OD.double() - pruned_OD.double()).T).square().sum())


# -------------------------------------------------------------------------------------------------- brain surgeon


def damped_hessian(gram_DD: torch.Tensor, damping: float) -> torch.Tensor:
    """Return H + damping * mean(diag H) * I; features that were never active get 1 on the diagonal."""
    hessian_DD = gram_DD.double().clone()
    level = damping * hessian_DD.diagonal().mean()
    for j in range(len(hessian_DD)):
        hessian_DD[j, j] = hessian_DD[j, j] + level if hessian_DD[j, j] != 0 else 1.0
    return hessian_DD


Choice = Callable[[int, torch.Tensor], torch.Tensor | None]
"""Asked before column j with the cost_OR of removing each weight from there on: keep masks from j on, or None."""


def brain_surgeon(
    weight_OD: torch.Tensor, hessian_DD: torch.Tensor, choose: Choice
) -> tuple[torch.Tensor, torch.Tensor]:
    """Optimal-brain-surgeon sweep with the columns taken from left to right; returns weights and keep mask.

    Removing w_j costs w_j^2 / [H^-1]_jj and changes the other weights by -w_j / [H^-1]_jj * [H^-1]_j: . Columns left
    of j are settled, so H is restricted to the columns from j on and inverted anew (Frantar and Alistarh, eq. 3, 4).
    """
    weight_OD = weight_OD.double().clone()
    keep_OD = torch.ones_like(weight_OD, dtype=torch.bool)
    num_columns = weight_OD.shape[1]
    inverse_row_of = [torch.linalg.inv(hessian_DD[j:, j:])[0] for j in range(num_columns)]
    own_D = torch.stack([inverse_row[0] for inverse_row in inverse_row_of])
    for j in range(num_columns):
        chosen = choose(j, weight_OD[:, j:].square() / own_D[j:])
        if chosen is not None:
            keep_OD[:, j : j + chosen.shape[1]] = chosen
        removed_O = torch.where(keep_OD[:, j], 0.0, weight_OD[:, j])
        weight_OD[:, j:] -= torch.outer(removed_O / own_D[j], inverse_row_of[j])
        weight_OD[~keep_OD[:, j], j] = 0
    return weight_OD, keep_OD


# ---------------------------------------------------------------------------------------------------------- BESA


def keep_probability(share_GP: torch.Tensor, rank_OD: torch.Tensor, stretch: int | None = None) -> torch.Tensor:
    """Return K_rj = 1 - sum_i s_ri [rank_rj < floor(S p_i)] with p_i = i / (P - 1), written out for every weight.

    Ranks count within the S columns of a stretch: the whole row, or an N:M group.
    """
    num_steps, width = share_GP.shape[1] - 1, stretch or rank_OD.shape[1]
    share_OP = share_GP.expand(len(rank_OD), -1)
    pruned_OD = torch.zeros(rank_OD.shape, dtype=share_GP.dtype)
    for i in range(num_steps + 1):
        pruned_OD = pruned_OD + share_OP[:, i : i + 1] * (rank_OD < i * width // num_steps)
    return 1 - pruned_OD


def straight_through_weight(
    share_GP: torch.Tensor,
    weight_OD: torch.Tensor,
    rank_OD: torch.Tensor,
    num_pruned_G: torch.Tensor,
    stretch: int | None = None,
) -> torch.Tensor:
    """Return W * M, where M has the value of the hard mask and the gradient of K (BESA, released code)."""
    soft_OD = keep_probability(share_GP, rank_OD, stretch)
    hard_OD = (rank_OD >= num_pruned_G[:, None]).to(soft_OD.dtype)
    return weight_OD * (hard_OD + soft_OD - soft_OD.detach())


def relative_error(output_BTC: torch.Tensor, target_BTC: torch.Tensor) -> float:
    """Return the mean over channels of the squared error over the squared norm; a silent channel counts as 0."""
    output, target = (numpy.asarray(x.tolist(), dtype=numpy.float64) for x in (output_BTC, target_BTC))
    ratios = []
    for c in range(target.shape[-1]):
        norm = (target[..., c] ** 2).sum()
        ratios.append(((output[..., c] - target[..., c]) ** 2).sum() / norm if norm > 0 else 0.0)
    return float(numpy.mean(ratios))


# ------------------------------------------------------------------------------------------------ ADMM, least squares


def power_hessian(gram_DD: torch.Tensor, damping: float) -> torch.Tensor:
    """Return G with `damping` times its own diagonal added to it: a ridge in units of each feature's power."""
    gram_DD = gram_DD.double()
    return gram_DD + damping * torch.diag(gram_DD.diagonal())


def squared_error(weight_OD: torch.Tensor, dense_OD: torch.Tensor, hessian_DD: torch.Tensor) -> torch.Tensor:
    """Return (w - b) H (w - b)^T of every row, float64 [O]."""
    change_OD = weight_OD.double() - dense_OD.double()
    return ((change_OD @ hessian_DD) * change_OD).sum(dim=1)


def fitted_rows(dense_OD: torch.Tensor, keep_OD: torch.Tensor, hessian_DD: torch.Tensor) -> torch.Tensor:
    """Return the weights of least squared error under a mask: one least-squares problem a row, over what it keeps.

    With H = L L^T, the error of a row is |L^T (w - b)|^2.
    """
    root_DD = torch.linalg.cholesky(hessian_DD).T
    fitted_OD = torch.zeros_like(dense_OD, dtype=torch.float64)
    for row, keep_D in enumerate(keep_OD):
        aim_D1 = (root_DD @ dense_OD[row].double())[:, None]
        fitted_OD[row, keep_D] = torch.linalg.lstsq(root_DD[:, keep_D], aim_D1).solution[:, 0]
    return fitted_OD


Masking = Callable[[int, torch.Tensor], torch.Tensor]
"""Asked at every step, counted from 0, for the keep_OD of these scores."""


def admm(
    dense_OD: torch.Tensor, gram_DD: torch.Tensor, damping: float, choose: Masking, num_steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """ADMM of Boža with its three variables written out, rho = 1; returns the sparse copy and its mask.

    Transposed against the paper: a row here is a column there.
    """
    norm_D = gram_DD.double().diagonal().sqrt()
    scaled_DD = gram_DD.double() / torch.outer(norm_D, norm_D) + damping * torch.eye(len(norm_D), dtype=torch.float64)
    inverse_DD = torch.linalg.inv(scaled_DD + torch.eye(len(norm_D), dtype=torch.float64))
    weight_OD = dense_OD.double() * norm_D
    product_OD = weight_OD @ scaled_DD
    multiplier_OD = torch.zeros_like(weight_OD)
    for step in range(num_steps):
        keep_OD = choose(step, (weight_OD + multiplier_OD).abs())
        copy_OD = torch.where(keep_OD, weight_OD + multiplier_OD, 0.0)
        multiplier_OD = multiplier_OD + weight_OD - copy_OD
        weight_OD = (product_OD + copy_OD - multiplier_OD) @ inverse_DD
    return torch.where(keep_OD, weight_OD + multiplier_OD, 0.0) / norm_D, keep_OD


def alps(
    dense_OD: torch.Tensor, gram_DD: torch.Tensor, damping: float, choose: Masking, num_steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """ADMM of ALPS (algorithm 1) with the multiplier in its own units; returns the sparse copy and its mask."""
    norm_D = gram_DD.double().diagonal().sqrt()
    one_DD = torch.eye(len(norm_D), dtype=torch.float64)
    scaled_DD = gram_DD.double() / torch.outer(norm_D, norm_D) + damping * one_DD
    start_OD, rho = dense_OD.double() * norm_D, 0.1
    multiplier_OD = torch.zeros_like(start_OD)
    keep_OD = before_OD = choose(0, start_OD.abs())
    copy_OD = torch.where(keep_OD, start_OD, 0.0)
    for step in range(1, num_steps + 1):
        inverse_DD = torch.linalg.inv(scaled_DD + rho * one_DD)
        weight_OD = (start_OD @ scaled_DD - multiplier_OD + rho * copy_OD) @ inverse_DD
        moved_OD = weight_OD + multiplier_OD / rho
        keep_OD = choose(step, moved_OD.abs())
        copy_OD = torch.where(keep_OD, moved_OD, 0.0)
        multiplier_OD = multiplier_OD + rho * (weight_OD - copy_OD)
        if step % 3 == 0:
            changed = int((keep_OD != before_OD).sum())
            if changed == 0:
                break
            share = changed / int(keep_OD.sum())
            rho *= 1.3 if share > 0.1 else 1.2 if share > 0.005 else 1.1
            before_OD = keep_OD
    return copy_OD / norm_D, keep_OD


# ------------------------------------------------------------------------------------------------------------- DSnoT


def dsnot_row(
    dense: Sequence[float],
    present: Sequence[float],
    keep: Sequence[bool],
    x_TD: torch.Tensor,
    *,
    cycles: int,
    tolerance: float,
    overshoot: bool,
    group: int | None = None,
) -> list[bool]:
    """Swap one row's weights as Zhang et al. do; present: kept weights as they are; group: that of an N:M pattern."""
    exact_TD, columns = x_TD.double(), range(len(dense))
    mean, norm = exact_TD.mean(dim=0).tolist(), exact_TD.square().sum(dim=0).sqrt().tolist()
    variance = exact_TD.var(dim=0, correction=0).tolist()
    value = [present[j] if keep[j] else dense[j] for j in columns]
    error = first = sum((dense[j] - (present[j] if keep[j] else 0)) * mean[j] for j in columns)
    may_grow, may_go = {j for j in columns if not keep[j]}, {j for j in columns if keep[j]}
    for _ in range(cycles):
        if abs(error) <= tolerance:
            break
        growing = [j for j in may_grow if value[j] * mean[j] * error > 0]
        if not growing:
            break
        grown = max(growing, key=lambda j: abs(value[j] * mean[j]) / (variance[j] or 1e-300))
        inside = [j for j in may_go if group is not None and j // group == grown // group]
        going = [j for j in may_go if value[j] * mean[j] * error < 0] if group is None else inside
        if not going:
            break
        gone = min(going, key=lambda j: abs(value[j]) * norm[j])
        after = error - value[grown] * mean[grown] + value[gone] * mean[gone]
        if not overshoot and after * first <= 0:
            break
        error = after
        may_grow.remove(grown)
        may_go.remove(gone)
    return [j in may_go or not (keep[j] or j in may_grow) for j in columns]


def squared_error_row(
    dense: Sequence[float],
    present: Sequence[float],
    keep: Sequence[bool],
    gram_DD: torch.Tensor,
    *,
    cycles: int,
    least_gain: float,
    group: int,
) -> list[bool]:
    """Swap one row's weights, each time what most lowers d G d^T, found by trying: first who grows, then who goes."""
    dense_D, columns = torch.tensor(dense, dtype=torch.float64), range(len(dense))
    present_D = torch.tensor([present[j] if keep[j] else dense[j] for j in columns], dtype=torch.float64)

    def error(kept: set[int]) -> float:
        missing_D = dense_D - present_D * torch.tensor([j in kept for j in columns])
        return float(missing_D @ gram_DD.double() @ missing_D)

    kept = {j for j in columns if keep[j]}
    now = first = error(kept)
    for _ in range(cycles):
        alone = {j: error(kept ^ {j}) for j in columns}
        partners = {
            g: min((alone[p] for p in kept if p // group == g), default=inf) for g in range(len(dense) // group)
        }
        able = [j for j in columns if j not in kept and partners[j // group] < inf]
        if not able:
            break
        grown = min(able, key=lambda j: alone[j] + partners[j // group])
        after = {p: error(kept ^ {grown, p}) for p in kept if p // group == grown // group}
        gone = min(after, key=lambda p: after[p])
        if now - after[gone] <= least_gain * first:
            break
        kept, now = kept ^ {grown, gone}, after[gone]
    return [j in kept for j in columns]
