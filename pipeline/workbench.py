"""One block on the bench: its dense weights, its streams and statistics, and what the steps have made of it so far."""

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import nn

from pipeline.activations import Boundary
from pipeline.anatomy import Cut
from pipeline.lazy_weights import Maker
from pipeline.linears import Collector, Linear
from pipeline.methods.step import NOTHING, MiniBatch, PrunedLinear
from pipeline.peers import Peers
from pipeline.statistics import AnyStatistic, Gathered, Statistic
from pipeline.stream import Stream
from pipeline.stream_names import StreamName


class Workbench:
    """A block and its streams, as block steps see them (the protocol `BlockView`).

    What the steps make is laid down in `so_far` (linears) and `tuned` (other parameters) as the recipe goes on.
    """

    def __init__(
        self,
        stream: Stream,
        block: nn.Module,
        index: int,
        linears: Sequence[Linear],
        collector: Collector,
        inputs: Boundary,
        targets: Mapping[StreamName, Boundary],
        peers: Peers,
    ) -> None:
        self._stream, self._index = stream, index
        self._linears = {linear.name: linear for linear in linears}
        self.weights: dict[str, torch.Tensor]
        self.others: dict[str, torch.Tensor]
        self._collector, self._inputs, self._targets = collector, inputs, targets
        self._lay_out(block)
        self.so_far: dict[str, PrunedLinear] = {}
        self.tuned: dict[str, torch.Tensor] = {}
        self.cut: Cut | None = None
        self.peers = peers

    def _lay_out(self, block: nn.Module) -> None:
        self._block = block
        self.weights = {linear.name: linear.weight(block) for linear in self._linears.values()}
        self.others = {name: p.data for name, p in block.named_parameters() if p.ndim == 1}

    def let_go(self) -> None:
        """Hold on to no weights of a block that is about to be replaced."""
        self.weights, self.others = {}, {}

    def replace(self, block: nn.Module, reader: str, keep_D: torch.Tensor) -> None:
        """Go on with what is left of the block: the steps to come see a smaller dense one.

        reader: the linear that has lost input features; keep_D: those that are left, bool. Their statistics are what
        they were, exactly: what makes up for the others is in the weights that read them, not in these inputs.
        """
        self._lay_out(block)
        self.gathered(reader).narrow(keep_D.nonzero()[:, 0].to(self._device))

    @property
    def num_replicas(self) -> int:
        """Replicas that work on this block, each with its own part of the sequences."""
        return self.peers.size

    @property
    def num_sequences(self) -> int:
        """Sequences at hand."""
        return self._inputs.num_sequences

    def num_mini_batches(self, size: int) -> int:
        """Return how many updates a pass over the calibration has, with `size` sequences of every replica in each."""
        return -(-int(self._shares().max()) // size)

    def mini_batches(self, size: int, order: Sequence[int] | None = None) -> list[MiniBatch]:
        """Return those updates in the order that their numbers stand in `order`; all, as they come, where it is None.

        The sequences are about to be read, in this order.
        """
        counts = self._shares()
        updates = []
        for start in range(0, int(counts.max()), size):
            parts = (counts - start).clamp(0, size)
            here = int(parts[self.peers.rank])
            updates.append(MiniBatch(here=slice(start, start + here), weight=here / parts.sum().item()))
        if order is not None:
            updates = [updates[number] for number in order]
        coming = [update.here for update in updates if update.weight > 0]
        for boundary in (self._inputs, *self._targets.values()):
            boundary.expect(coming)
        return updates

    def sum(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors (gradients), in place, by their sums over all replicas."""
        self.peers.sum(tensors)

    def from_the_first(self, tensor: torch.Tensor) -> None:
        """Replace a contiguous tensor, in place, by what the first replica has of it."""
        self.peers.broadcast(tensor, 0)

    def _shares(self) -> torch.Tensor:
        """How many sequences each replica has."""
        counts = torch.zeros(self.peers.size, dtype=torch.float64, device=self._device)
        counts[self.peers.rank] = self._inputs.num_sequences
        self.peers.sum([counts])
        return counts

    @property
    def _device(self) -> torch.device:
        return next(iter(self.weights.values())).device

    def groups(self) -> list[list[Linear]]:
        """Return the linears grouped by the input they share."""
        return self._collector.groups()

    def gathered(self, name: str) -> Gathered:
        """Return the statistics of a linear's inputs."""
        return self._collector.gathered(name)

    def statistic(self, name: str, kind: type[AnyStatistic]) -> AnyStatistic:
        """Return a statistic of a linear's inputs."""
        return self.gathered(name).of(kind)

    def collect_again(
        self, group: Sequence[Linear], kinds: Sequence[type[Statistic]], batch: int, num_sequences: int | None = None
    ) -> Gathered:
        """Gather statistics of an input anew, of the first sequences or all, with the block as it is by now."""
        collector, makers = Collector(group, kinds), self._pruned_so_far()
        for _, hidden_BTD in self._inputs.stream(batch, self._device, num_sequences):
            with torch.no_grad(), collector.watching(self._block, to_the_end=False):
                self._stream.run_block(self._index, hidden_BTD, makers)
        collector.sum_over(self.peers)
        collector.check_finite()
        return collector.gathered(group[0].name)

    def output(
        self, weights: Mapping[str, Maker], sequences: slice, others: Mapping[str, torch.Tensor] = NOTHING
    ) -> torch.Tensor:
        """Run the block on the pruned stream with other weights, each made when its linear runs."""
        stored = self._as_others({**self.tuned, **others})
        stored |= {self._linears[n].parameter: partial(_stored, self._linears[n], w) for n, w in weights.items()}
        return self._stream.run_block(self._index, self._inputs.read(sequences, self._device), stored)

    def target(self, sequences: slice, stream: StreamName) -> torch.Tensor:
        """Return the hidden_BTD that the pruned block is to reproduce."""
        return self._targets[stream].read(sequences, self._device)

    def _as_others(self, values: Mapping[str, torch.Tensor]) -> dict[str, Maker]:
        """What makes other parameters, in the dtype in which the block has them."""
        return {name: partial(_copy, value, self.others[name].dtype) for name, value in values.items()}

    def _pruned_so_far(self) -> dict[str, Maker]:
        """What makes the stored weight of every linear that is pruned already."""
        makers = self._as_others(self.tuned)
        for name, pruned in self.so_far.items():
            kept = self.weights[name] if pruned.weight_OD is None else pruned.weight_OD
            makers[self._linears[name].parameter] = partial(
                _stored, self._linears[name], partial(torch.mul, kept, pruned.keep_OD)
            )
        return makers


def _stored(linear: Linear, make: Maker) -> torch.Tensor:
    return linear.to_stored(make())


def _copy(value: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A parameter that is no matrix costs nothing to keep; a copy, for what is made is memory of its own."""
    return value.to(dtype, copy=True)
