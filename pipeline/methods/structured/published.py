"""Steps that make a model smaller as others have published it, through the machinery of `comp`.

    flap       neurons that vary least go, and their mean is kept as a bias
    two_ssp    neurons of small activations go, and whole attentions that the model misses least are silenced

Where something differs from what the authors do, the step says so.
"""

from typing import Literal

from pydantic import Field

from pipeline.methods.structured.narrowing import Narrowing, NeuronMetric, Recovery


class Flap(Narrowing):
    """Removes neurons that vary least, weighed by the weights that read them (FLAP: An et al., 2312.11983).

    What they gave on average becomes a bias, so the model needs a family that can have it: llama or granite. Every
    block loses as many, unless widths are per block; in FLAP's own search heads and neurons of all blocks compete.
    """

    method = "flap"

    neuron_metric: NeuronMetric = "flap"
    """By what neurons are judged; see comp."""

    recovery: Recovery = "bias"
    """What makes up for them; see comp."""


class TwoSsp(Narrowing):
    """Removes neurons of small activations, and silences attentions that the model misses least (2SSP, 2501.17771).

    Of L blocks `L s^(p_mlp / (alpha p_attention))` attentions go, rounded, where a part s of all parameters is to go;
    neurons make up the rest. An attention that goes is silenced: its output projection becomes zero, so that stock
    loaders still read the model. It does nothing then, but its parameters are as many as before: reports count them as
    idle, not as gone. Attentions are chosen before neurons go, where the authors choose them after. The errors of
    blocks that are reported are those that the neurons make.
    """

    method = "two_ssp"

    depth_fraction: float = Field(default=0.0, ge=0, le=0)
    """No whole blocks go."""

    heads: float = Field(default=0.0, ge=0, le=0)
    """No single heads go: attentions are silenced whole."""

    widths: Literal["uniform"] = "uniform"
    """All blocks keep as many neurons."""

    neuron_metric: NeuronMetric = "two_ssp"
    """By what neurons are judged; see comp."""

    recovery: Recovery = "none"
    """What makes up for them; see comp."""

    alpha: float = Field(default=1.5, gt=0)
    """How much of what goes is attention: the larger, the more."""
