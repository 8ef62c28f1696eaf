"""Where the neurons of a block are: which rows make them and which columns read them, family by family.

A neuron of an MLP is a row of each linear that makes it (gate and up, with their biases) and a column of the one that
leads back to the hidden states (down). Taking neurons out leaves a smaller block of the same architecture, which the
family's own class runs. Families store them differently (phi3 has gate and up in one matrix), so each is named here;
the others are refused. Heads of the attention are in `attention`.
"""

from dataclasses import dataclass
from typing import Any

import torch

from pipeline.attention import HeadCut
from pipeline.errors import ConfigError

WIDTH_KEY = "intermediate_size"
"""What config.json calls the number of neurons, in every family that is known here."""

BIAS_KEY = "mlp_bias"
"""What it calls biases of the linears of an MLP, in the families that can have them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mlp:
    """The linears of a block that make its neurons and read them, by their names within the block. U = neurons."""

    makers: tuple[str, ...]
    """Linears whose rows make them."""

    num_parts: int
    """How many runs of U rows each of them has."""

    reader: str
    """The linear whose columns read them."""

    def touches(self, own: str) -> bool:
        """Tell whether a parameter (its name within the block) becomes smaller where neurons go."""
        return own.rpartition(".")[0] in self.makers or own == f"{self.reader}.weight"

    def left(self, own: str, tensor: torch.Tensor, keep_U: torch.Tensor) -> torch.Tensor:
        """Return what is left of a block's parameter, itself where neurons are no matter to it, else a copy."""
        if not self.touches(own):
            return tensor
        kept = keep_U.nonzero()[:, 0].to(tensor.device)
        if own == f"{self.reader}.weight":
            return tensor[:, kept]
        return tensor[torch.cat([part * len(keep_U) + kept for part in range(self.num_parts)])]


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """What has been taken out of a block."""

    mlp: Mlp
    keep_U: torch.Tensor
    """Neurons, bool, True = kept; on the CPU."""

    folded_OK: torch.Tensor | None = None
    """New values of what is left of the reader, in the dtype it is stored in; None where they are the source's."""

    num_removed: int = 0
    """Parameters that are gone."""

    heads: HeadCut | None = None
    """What has been taken out of its attention, if anything."""

    def touches(self, own: str) -> bool:
        """Tell whether a parameter (its name within the block) has become smaller."""
        return self.mlp.touches(own) or (self.heads is not None and self.heads.touches(own))

    def folds(self, own: str) -> bool:
        """Tell whether a parameter has new values as well."""
        if self.heads is not None and self.heads.folds(own):
            return True
        return self.folded_OK is not None and own == f"{self.mlp.reader}.weight"

    def left(self, own: str, tensor: torch.Tensor) -> torch.Tensor:
        """Return what is to be stored of a parameter of the source."""
        if self.heads is not None and self.heads.touches(own):
            return self.heads.left(own, tensor)
        if self.folded_OK is not None and self.folds(own):
            return self.folded_OK
        return self.mlp.left(own, tensor, self.keep_U)


GATED = Mlp(makers=("mlp.gate_proj", "mlp.up_proj"), num_parts=1, reader="mlp.down_proj")
FUSED = Mlp(makers=("mlp.gate_up_proj",), num_parts=2, reader="mlp.down_proj")

_GATED_FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "olmo2")

MLPS = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "granite", "olmo2"), GATED
    ),
    "phi3": FUSED,
}
"""The MLP of a block by the `model_type` of its family."""


def mlp_of(config: Any) -> Mlp:
    """Return where the neurons of a model's blocks are, by transformers' configuration of it.

    Raises ConfigError for families that are not known here.
    """
    if config.model_type not in MLPS:
        raise ConfigError(
            f"no neurons can be removed from blocks of {config.model_type} so far, only from those of "
            f"{', '.join(sorted(MLPS))}; remove whole blocks alone, or prune without changing shapes (besa, wanda, …)"
        )
    return MLPS[config.model_type]


def kept_as_text(keep_U: torch.Tensor) -> str:
    """Return which neurons are kept as hexadecimal, a bit each, the first one the highest of the first digit."""
    digits = "".join("1" if kept else "0" for kept in keep_U.tolist())
    padded = digits.ljust(-(-len(digits) // 4) * 4, "0")
    return "".join(f"{int(padded[start : start + 4], 2):x}" for start in range(0, len(padded), 4))


def kept_from_text(text: str, num_neurons: int) -> torch.Tensor:
    """Return keep_U as it was before `kept_as_text`."""
    bits = "".join(f"{int(digit, 16):04b}" for digit in text)
    return torch.tensor([bit == "1" for bit in bits[:num_neurons]])
