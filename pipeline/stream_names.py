"""The two streams of hidden states that run through a model while it is pruned."""

from typing import Literal

StreamName = Literal["pruned", "dense"]
"""Made by the pruned blocks so far, or by the dense blocks."""
