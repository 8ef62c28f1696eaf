"""Who tells whether a way to make up for neurons or heads does any good: sequences that it was not worked out from.

The block is run without them, mended in that way, and its outputs are held against the dense block's.
Shapes: O = out features of the linear that reads the units, D = its in features, K = those that are kept.
"""

from dataclasses import dataclass
from functools import partial

import torch

from pipeline.errors import ConfigError
from pipeline.methods.step import BlockView
from pipeline.statistics import relative_error

NONE_HELD_OUT = (
    "a recovery is judged on sequences held out, and with one sequence of calibration (or one on each replica) there "
    "is none to hold out; set calibration.sequences to 2 at least for every replica, or `recovery: none`"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Mended:
    """One way to make up for units that are gone."""

    folded_OK: torch.Tensor | None
    """float64; None: the columns that are left stay as they are."""

    bias_O: torch.Tensor | None = None
    """float64; None: the reader's bias stays as it is."""

    damping: float = 0.0

    @property
    def figures(self) -> dict[str, float]:
        """What is to be recorded of it."""
        damping = {} if self.folded_OK is None else {"recovery_damping": self.damping}
        return {"recovered": float(self.folded_OK is not None or self.bias_O is not None), **damping}


class Judge:
    """Runs a block without some neurons or heads on the sequences held out of all replicas."""

    def __init__(self, block: BlockView, reader: str, num_fitted: int, keep_D: torch.Tensor) -> None:
        """reader: the linear that reads the units; num_fitted: sequences, from the first on, that are not held out."""
        self._block, self._reader, self._keep_D = block, reader, keep_D
        self._held_out = range(num_fitted, block.num_sequences)
        self._device = keep_D.device
        self.errors: list[float] = []
        """Of every recovery so far."""

    def error(self, mended: Mended) -> float:
        """Return the mean relative error of the block's outputs over the sequences held out.

        Raises ConfigError where there is none.
        """
        total_2 = torch.zeros(2, dtype=torch.float64, device=self._device)
        biases = {} if mended.bias_O is None else {f"{self._reader}.bias": mended.bias_O}
        for number in self._held_out:
            here = slice(number, number + 1)
            output = self._block.output({self._reader: partial(self._weight, mended)}, here, biases)
            total_2[0] += relative_error(output, self._block.target(here, "pruned")).double()
            total_2[1] += 1
        self._block.sum([total_2])
        error, count = total_2.tolist()
        if count == 0:
            raise ConfigError(NONE_HELD_OUT)
        self.errors.append(error / count)
        return self.errors[-1]

    def _weight(self, mended: Mended) -> torch.Tensor:
        """The reader at its full shape, zero where units are gone."""
        dense_OD = self._block.weights[self._reader]
        if mended.folded_OK is None:
            return dense_OD * self._keep_D
        made_OD = torch.zeros_like(dense_OD)
        made_OD[:, self._keep_D] = mended.folded_OK.to(dense_OD.dtype)
        return made_OD
