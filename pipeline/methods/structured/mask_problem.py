"""What a linear's output loses when some of its input features go, and the rest may be rescaled to make up for it.

Feature j of a linear with the weight W carries `a_j = vec(x_j w_j^T)` to the output: its column of W times its inputs
over all tokens. A mask m on the features gives the output `A m`, and the dense output is `A 1`, so the squared error is

    E(m) = (m - 1)^T G (m - 1)    with    G = A^T A = (W^T W) o (X^T X),

the elementwise product of two matrices of which the second is a Gram statistic. Everything structured pruning asks is
in G: how large a feature is (its diagonal), how well others can stand in for it, and which mask is best (Kwon et al.,
2204.09656, section 4.3, from whom "mask tuning" has its name). A head is several features under one entry of the mask:
its part of G is summed over them.

G is made anew whenever it is needed, some rows at a time: for thousands of features it is the largest thing there is.
In float64. Shapes: O = out features, D = in features, U = units (neurons or heads, each `unit_size` features that lie
together: D = U unit_size).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from pipeline.methods.factorise import factor_in_place, solve_factored, with_damping_enough

SLAB_NUMEL = 1 << 20
"""Entries of G made at once: 8 MB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MaskProblem:
    """A linear that reads from units which may go, and the inner products of its inputs."""

    weight_OD: torch.Tensor
    """Of any float dtype."""

    gram_DD: torch.Tensor
    """Inner products of all pairs of its input features over all tokens."""

    unit_size: int = 1
    """Features that share an entry of the mask: 1 for neurons, the size of a head for heads."""

    @property
    def num_units(self) -> int:
        """U."""
        return self.weight_OD.shape[1] // self.unit_size

    def coupling(self) -> torch.Tensor:
        """Return G, float64 [U, U]."""
        coupling_UU = self.gram_DD.new_empty(self.num_units, self.num_units, dtype=torch.float64)
        for units, slab_RU in self._slabs():
            coupling_UU[units] = slab_RU
        return coupling_UU

    def sizes(self) -> torch.Tensor:
        """Return the diagonal of G, float64 [U]: the squared size of what each unit alone carries to the output."""
        if self.unit_size > 1:
            return torch.cat([slab_RU[:, units].diagonal() for units, slab_RU in self._slabs()])
        norm_D: torch.Tensor = torch.linalg.vector_norm(self.weight_OD, dim=0, dtype=torch.float64)
        return norm_D.square() * self.gram_DD.diagonal().double()

    def ridge(self, damping: float) -> float:
        """Return what a damping adds to the diagonal of G: that multiple of its mean, or of 1 where G is zero."""
        return damping * (self.sizes().mean().item() or 1.0)

    def factor(self, damping: float) -> tuple[torch.Tensor, float]:
        """Return the lower factor of G + ridge I [U, U], and the damping, raised where rounding made that necessary.

        Beside it only W is held in float64 meanwhile. Raises NumericsError where no damping helps.
        """
        return with_damping_enough(lambda d: factor_in_place(self.coupling(), self.ridge(d)), damping, self.sizes())

    def inverse(self, damping: float) -> tuple[torch.Tensor, float]:
        """Return (G + ridge I)^-1 [U, U], and the damping, as `factor` does."""
        lower_UU, used = self.factor(damping)
        return torch.cholesky_inverse(lower_UU, out=lower_UU), used

    def only(self, keep_U: torch.Tensor) -> "MaskProblem":
        """Return the problem of the units that are kept, as if there were no others."""
        features = keep_U.repeat_interleave(self.unit_size).nonzero()[:, 0]
        return MaskProblem(
            weight_OD=self.weight_OD[:, features],
            gram_DD=self.gram_DD[features[:, None], features],
            unit_size=self.unit_size,
        )

    def tuned(self, keep_U: torch.Tensor, damping: float) -> torch.Tensor:
        """Return the mask with the least error of those that are 0 where `keep_U` is False, float64 [U].

        damping: ridge that ties its entries to 1, as a multiple of the mean size of the kept units. Raises
        NumericsError where no damping helps.
        """
        missing_K1 = self.times((~keep_U).double()[:, None])[keep_U]
        lower_KK, _ = self.only(keep_U).factor(damping)
        mask_U = torch.zeros(len(keep_U), dtype=torch.float64, device=keep_U.device)
        mask_U[keep_U] = 1 + solve_factored(lower_KK, missing_K1)[:, 0]
        return mask_U

    def times(self, vector_UV: torch.Tensor) -> torch.Tensor:
        """Return G times some vectors, float64 [U, V]."""
        return torch.cat([slab_RU @ vector_UV for _, slab_RU in self._slabs()])

    def error(self, mask_U: torch.Tensor) -> float:
        """Return the squared error of the output under a mask, relative to the squared output; 0 where there is none.

        With the Gram matrix of other tokens this is the error on those.
        """
        missing_U = 1 - mask_U.double()
        both_U2 = torch.stack([missing_U, torch.ones_like(missing_U)], dim=1)
        error, power = (both_U2 * self.times(both_U2)).sum(dim=0).tolist()
        return error / power if power > 0 else 0.0

    def _slabs(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Yield some rows of G at a time, with the units they are of."""
        size, num_units = self.unit_size, self.num_units
        weight_OD = self.weight_OD.double()
        at_once = max(1, SLAB_NUMEL // (weight_OD.shape[1] * size))
        for start in range(0, num_units, at_once):
            units = slice(start, min(start + at_once, num_units))
            features = slice(units.start * size, units.stop * size)
            slab_RD = (weight_OD[:, features].T @ weight_OD).mul_(self.gram_DD[features])
            yield units, slab_RD if size == 1 else slab_RD.view(-1, size, num_units, size).sum(dim=(1, 3))
