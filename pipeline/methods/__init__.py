"""Every pruning method by its name in a recipe. A new method is one file here and one line in this table."""

from pipeline.methods.admm import Admm
from pipeline.methods.alps import Alps
from pipeline.methods.besa import Besa
from pipeline.methods.dsnot import Dsnot
from pipeline.methods.magnitude import Magnitude
from pipeline.methods.reconstruct import Reconstruct
from pipeline.methods.sparsegpt import SparseGPT
from pipeline.methods.step import Step
from pipeline.methods.structured.narrowing import Comp, WandaSp
from pipeline.methods.structured.published import Flap, TwoSsp
from pipeline.methods.structured.shape_step import ShortGpt, Sleb
from pipeline.methods.wanda import Wanda

METHODS: dict[str, type[Step]] = {
    "magnitude": Magnitude,
    "wanda": Wanda,
    "sparsegpt": SparseGPT,
    "besa": Besa,
    "reconstruct": Reconstruct,
    "admm": Admm,
    "alps": Alps,
    "dsnot": Dsnot,
    "comp": Comp,
    "wanda_sp": WandaSp,
    "flap": Flap,
    "two_ssp": TwoSsp,
    "shortgpt": ShortGpt,
    "sleb": Sleb,
}
