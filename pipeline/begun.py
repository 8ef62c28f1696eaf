"""A block that has been read, and is being looked at before it is pruned."""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

from torch import nn

from pipeline.cutting import Cutting
from pipeline.linears import Collector, Linear, find_linears
from pipeline.meter import Stopwatch
from pipeline.order import Order, check_divides, linears_to_prune


@dataclass(frozen=True, slots=True, kw_only=True)
class Begun:
    """A block that has been read, and of which statistics are gathered."""

    index: int
    block: nn.Module
    linears: Sequence[Linear]
    collector: Collector
    cutting: Cutting | None
    neurons: Collector
    """Of the inputs of the linears that read neurons, and heads, where some of these are to go."""

    watch: Stopwatch

    @classmethod
    def of(cls, index: int, block: nn.Module, order: Order, cutting: Cutting | None, watch: Stopwatch) -> "Begun":
        """Find what is to be pruned of a block; raises ConfigError where it cannot be pruned as is asked."""
        masks, everything = bool(order.recipe.steps), find_linears(block) if cutting else []
        linears = linears_to_prune(block, order.skip) if masks else everything
        check_divides(linears, block, order.allocation.of(index), {} if cutting is None else cutting.columns_left)
        return cls(
            index=index, block=block, linears=linears, collector=Collector(linears, order.recipe.statistics),
            cutting=cutting, neurons=Collector([], ()) if cutting is None else cutting.collector(block), watch=watch,
        )  # fmt: skip

    @property
    def looks_at_all(self) -> bool:
        """Whether all sequences are to run through the block, for what is gathered of them."""
        return self.cutting is not None or self.collector.gathers

    @contextmanager
    def watching(self, sequences: slice, *, to_the_end: bool) -> Iterator[None]:
        """Gather from the forward of some sequences inside the context, abandoned early where nobody needs its end."""
        with ExitStack() as stack:
            if self.cutting is not None:  # its hook comes first: the other's may end the forward
                stack.enter_context(
                    self.neurons.watching(
                        self.block, to_the_end or self.collector.gathers, self.cutting.num_fitted_of(sequences)
                    )
                )
            stack.enter_context(self.collector.watching(self.block, to_the_end))
            yield
