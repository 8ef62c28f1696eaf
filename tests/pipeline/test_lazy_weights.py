"""Weights made on demand give the bits of weights put in place beforehand, and none of them stays."""

import weakref
from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.func import functional_call
from transformers.pytorch_utils import Conv1D

from pipeline.lazy_weights import made_on_demand
from pipeline.methods.row_sparsity import MaskedWeight, pruned_counts
from pipeline.sparsity import row_ranks


class Net(nn.Module):
    """Two linears of two kinds with a nonlinearity between; the first has a bias, the second is stored transposed."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.up = nn.Linear(12, 40, dtype=dtype)
        self.down = Conv1D(12, 40).to(dtype)
        self.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


Making = Callable[[torch.Tensor], torch.Tensor]


class Masks:
    """Masked weights of both linears, made from shares as BESA makes them; remembers every weight it has made."""

    def __init__(self, net: Net) -> None:
        self.shares = [torch.full((rows, 101), 1 / 101, requires_grad=True) for rows in (40, 12)]
        self.weights = [net.up.weight.data, net.down.weight.data.T]
        self.made: list[weakref.ref[torch.Tensor]] = []
        self.most_alive = 0

    def make(self, which: int) -> torch.Tensor:
        share, weight_OD = self.shares[which], self.weights[which]
        counts_O = pruned_counts(torch.full((len(weight_OD),), 0.4), weight_OD.shape[1])
        made = MaskedWeight.apply(share, weight_OD, row_ranks(weight_OD.abs().float()), counts_O)
        self.made.append(weakref.ref(made))
        self.most_alive = max(self.most_alive, self.num_alive)
        return made

    @property
    def num_alive(self) -> int:
        return sum(made() is not None for made in self.made)

    def up(self) -> torch.Tensor:
        return self.make(0)

    def down(self) -> torch.Tensor:
        return self.make(1).T


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def net(request: pytest.FixtureRequest) -> Net:
    torch.manual_seed(0)
    return Net(request.param)


def inputs(net: Net) -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 5, 12).to(net.up.weight.dtype)


def test_outputs_and_gradients_are_those_of_weights_formed_beforehand(net: Net) -> None:
    before, lazy = Masks(net), Masks(net)
    expected = functional_call(net, {"up.weight": before.up(), "down.weight": before.down()}, (inputs(net),))
    with made_on_demand(net, {"up.weight": lazy.up, "down.weight": lazy.down}):
        output = net(inputs(net))
    assert torch.equal(output, expected)
    torch.autograd.backward([output.square().sum(), expected.square().sum()])
    for share, expected_share in zip(lazy.shares, before.shares, strict=True):
        assert share.grad is not None
        assert expected_share.grad is not None
        assert share.grad.any()
        assert torch.equal(share.grad, expected_share.grad)


def test_one_made_weight_at_a_time_is_alive(net: Net) -> None:
    masks = Masks(net)
    with made_on_demand(net, {"up.weight": masks.up, "down.weight": masks.down}):
        output = net(inputs(net))
    assert (len(masks.made), masks.num_alive) == (2, 0)
    torch.autograd.backward(output.square().sum())
    assert len(masks.made) == 3  # `down` once more; the inputs of `up` need no gradient, so its weight does not either
    assert (masks.most_alive, masks.num_alive) == (1, 0)


def test_afterwards_the_module_has_its_own_weights_and_forward(net: Net) -> None:
    weight, masks = net.up.weight, Masks(net)
    expected = net(inputs(net))
    with made_on_demand(net, {"up.weight": masks.up}):
        assert not torch.equal(net(inputs(net)), expected)
        assert net.up.weight is weight
    assert torch.equal(net(inputs(net)), expected)
    assert "forward" not in vars(net.up)


def test_a_forward_that_fails_leaves_the_module_as_it_was(net: Net) -> None:
    weight, masks = net.up.weight, Masks(net)
    with (
        pytest.raises(RuntimeError, match="shapes cannot be multiplied"),
        made_on_demand(net, {"up.weight": masks.up}),
    ):
        net(torch.zeros(1, 5, 7, dtype=weight.dtype))
    assert net.up.weight is weight
    assert "forward" not in vars(net.up)


def test_hooks_of_the_module_run_once(net: Net) -> None:
    seen: list[nn.Module] = []
    net.up.register_forward_pre_hook(lambda module, inputs: seen.append(module))
    with made_on_demand(net, {"up.weight": Masks(net).up}):
        net(inputs(net))
    assert seen == [net.up]
