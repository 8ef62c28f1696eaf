"""Steps that make a model smaller as others have published it, through the machinery of `comp`.

flap       neurons whose inputs to the next linear vary least, their mean kept as a bias
"""

from pipeline.methods.structured.narrowing import Narrowing, NeuronMetric, Recovery


class Flap(Narrowing):
    """Removes neurons that vary least, weighed by the weights that read them (FLAP: An et al., 2312.11983).

    What they gave on average becomes a bias, so the model needs a family that can have it: llama or granite. Every
    block loses as many; in FLAP's own search heads and neurons of all blocks compete.
    """

    method = "flap"

    neuron_metric: NeuronMetric = "flap"
    """By what neurons are judged; see comp."""

    recovery: Recovery = "bias"
    """What makes up for them; see comp."""
