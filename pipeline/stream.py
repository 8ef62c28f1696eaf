"""The model's own forward, taken apart: what runs before the blocks, each block by itself, what runs after.

Nothing is built by hand. The parent model runs with its blocks replaced by pass-through functions that record the
arguments each is given (masks and rotary tables differ by block in many families), so a block is later called
exactly as its model would call it. Weights outside the blocks are read when the forward reaches the module that
owns them, and dropped afterwards.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from pipeline.errors import UnsupportedCheckpoint
from pipeline.lazy_weights import Maker, made_on_demand
from pipeline.skeleton import Skeleton, TensorSource

Forward = Callable[..., torch.Tensor]


@dataclass(frozen=True, slots=True, kw_only=True)
class Arguments:
    """What the model passes to a block beside the hidden states."""

    positional: tuple[Any, ...]
    named: Mapping[str, Any]


class _AllBlocksSeen(Exception):
    """Ends a forward after the last block, where nothing after it is wanted."""


class Stream:
    """Runs a skeleton's parts on batches of hidden_BTD (B sequences, T tokens, D features)."""

    def __init__(self, skeleton: Skeleton, source: TensorSource) -> None:
        self._skeleton = skeleton
        self._source = source
        self._arguments: dict[tuple[int, int], list[Arguments]] = {}

    @property
    def device(self) -> torch.device:
        """Where blocks run."""
        return self._skeleton.device

    @property
    def num_features(self) -> int:
        """D, the width of the hidden states."""
        width: int = self._skeleton.model.config.hidden_size
        return width

    @torch.no_grad()
    def embed(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        """Return boundary 0, the hidden_BTD that enters the first block. Call inside `outside_weights`.

        Raises UnsupportedCheckpoint for families whose blocks are given arguments that depend on the tokens:
        those cannot be replayed from hidden states alone.
        """
        seen, arguments = self._run_to_last_block(input_ids=tokens_BT.to(self._skeleton.device))
        expected = self._arguments_for(*tokens_BT.shape)
        if not all(_same(a, b) for a, b in zip(arguments, expected, strict=True)):
            raise UnsupportedCheckpoint(
                f"{self._skeleton.model.config.model_type} passes its blocks arguments that depend on the tokens "
                "beside the hidden states; such models cannot be pruned so far"
            )
        return seen

    def run_block(
        self, index: int, hidden_BTD: torch.Tensor, weights: Mapping[str, Maker] | None = None
    ) -> torch.Tensor:
        """Run one block, which must be loaded; `weights` (stored parameter name -> maker) replace its own."""
        block = self._skeleton.blocks[index]
        arguments = self._arguments_for(*hidden_BTD.shape[:2])[index]
        with made_on_demand(block, weights or {}):
            output = block(hidden_BTD, *arguments.positional, **arguments.named)
        hidden: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return hidden

    @torch.no_grad()
    def logits(self, hidden_BTD: torch.Tensor) -> torch.Tensor:
        """Return logits_BTV from the hidden states after the last block. Call inside `outside_weights`.

        What comes after the blocks (norm, head) works token by token, so any slice of tokens may be given.
        """
        forwards: list[Forward] = [_pass_through] * self._skeleton.num_blocks
        forwards[-1] = lambda hidden_states, *args, **kwargs: hidden_BTD
        with self._blocks_replaced(forwards):
            output = self._skeleton.model(inputs_embeds=self._blank(*hidden_BTD.shape[:2]), use_cache=False)
        logits: torch.Tensor = output.logits
        return logits

    @contextmanager
    def outside_weights(self) -> Iterator[None]:
        """Read weights outside the blocks as the forward reaches them; drop them at the end.

        Contexts nest: an inner one neither reads nor drops what an outer one has read.
        """
        skeleton = self._skeleton
        with ExitStack() as stack:

            def load(path: str, module: nn.Module, inputs: Any) -> None:
                own = [name for name, parameter in module.named_parameters(recurse=False) if parameter.is_meta]
                skeleton.fill(module, {name: skeleton.stored_name[f"{path}.{name}"] for name in own}, self._source)
                stack.callback(skeleton.release, module, own)

            for path, module in skeleton.model.named_modules():
                has_weights = any(True for _ in module.parameters(recurse=False))
                if has_weights and not path.startswith(f"{skeleton.block_prefix}."):
                    stack.callback(module.register_forward_pre_hook(partial(load, path)).remove)
            yield

    @torch.no_grad()
    def _arguments_for(self, num_sequences: int, num_tokens: int) -> list[Arguments]:
        """Return each block's arguments for batches of this shape, recorded once from a forward of blanks."""
        shape = (num_sequences, num_tokens)
        if shape not in self._arguments:
            with self.outside_weights():
                self._arguments[shape] = self._run_to_last_block(inputs_embeds=self._blank(*shape))[1]
        return self._arguments[shape]

    def _blank(self, num_sequences: int, num_tokens: int) -> torch.Tensor:
        width = self._skeleton.model.get_input_embeddings().embedding_dim
        return torch.zeros(num_sequences, num_tokens, width, dtype=self._skeleton.dtype, device=self._skeleton.device)

    def _run_to_last_block(self, **inputs: torch.Tensor) -> tuple[torch.Tensor, list[Arguments]]:
        recorded: list[Arguments] = []
        entered: list[torch.Tensor] = []

        def record(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            entered[:] = entered or [hidden_states]
            recorded.append(Arguments(positional=args, named=kwargs))
            if len(recorded) == self._skeleton.num_blocks:
                raise _AllBlocksSeen
            return hidden_states

        with self._blocks_replaced([record] * self._skeleton.num_blocks):
            try:
                self._skeleton.model(**inputs, use_cache=False)
            except _AllBlocksSeen:
                return entered[0], recorded
        raise UnsupportedCheckpoint(
            f"{self._skeleton.model.config.model_type} ran only {len(recorded)} of its {self._skeleton.num_blocks} "
            "blocks in one forward; it cannot be pruned block by block"
        )

    @contextmanager
    def _blocks_replaced(self, forwards: Sequence[Forward]) -> Iterator[None]:
        for block, forward in zip(self._skeleton.blocks, forwards, strict=True):
            block.forward = forward
        try:
            yield
        finally:
            for block in self._skeleton.blocks:
                del block.forward


def _pass_through(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


def _same(left: Any, right: Any) -> bool:
    """Compare recorded arguments by value."""
    if isinstance(left, Arguments) and isinstance(right, Arguments):
        return _same(left.positional, right.positional) and _same(dict(left.named), dict(right.named))
    if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
        return left.shape == right.shape and torch.equal(left, right)
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_same(left[key], right[key]) for key in left)
    if isinstance(left, list | tuple) and isinstance(right, list | tuple):
        return len(left) == len(right) and all(_same(a, b) for a, b in zip(left, right, strict=True))
    return type(left) is type(right) and (left is right or not isinstance(left, int | float | str) or left == right)
