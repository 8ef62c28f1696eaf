"""Where neurons are in a block, for every family that is known."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pipeline.anatomy import Cut, kept_as_text, kept_from_text, mlp_of
from pipeline.errors import ConfigError
from tests.tiny import FAMILIES

KEEP_U = torch.tensor([True, False, True, True])


def test_a_fused_matrix_loses_the_rows_of_a_neuron_in_each_of_its_parts() -> None:
    fused_OD, mlp = torch.arange(8.0)[:, None].expand(8, 3), mlp_of(FAMILIES["phi3"])
    assert mlp.left("mlp.gate_up_proj.weight", fused_OD, KEEP_U)[:, 0].tolist() == [0, 2, 3, 4, 6, 7]


def test_rows_and_biases_of_makers_and_columns_of_the_reader_go() -> None:
    mlp, matrix_UD, vector_U = mlp_of(FAMILIES["llama"]), torch.arange(12.0).view(4, 3), torch.arange(4.0)
    assert torch.equal(mlp.left("mlp.up_proj.weight", matrix_UD, KEEP_U), matrix_UD[[0, 2, 3]])
    assert mlp.left("mlp.gate_proj.bias", vector_U, KEEP_U).tolist() == [0, 2, 3]
    assert torch.equal(mlp.left("mlp.down_proj.weight", matrix_UD.T, KEEP_U), matrix_UD.T[:, [0, 2, 3]])


@pytest.mark.parametrize("own", ["mlp.down_proj.bias", "self_attn.o_proj.weight", "input_layernorm.weight"])
def test_what_neurons_are_no_matter_to_stays_as_it_is(own: str) -> None:
    tensor = torch.zeros(4, 4)
    assert mlp_of(FAMILIES["llama"]).left(own, tensor, KEEP_U) is tensor


def test_new_values_take_the_place_of_what_is_left_of_the_reader_alone() -> None:
    folded_OK = torch.ones(3, 3)
    cut = Cut(mlp=mlp_of(FAMILIES["llama"]), keep_U=KEEP_U, folded_OK=folded_OK)
    assert cut.left("mlp.down_proj.weight", torch.zeros(3, 4)) is folded_OK
    assert not cut.left("mlp.up_proj.weight", torch.zeros(4, 3)).any()


@pytest.mark.parametrize("family", ["opt", "gpt2", "gpt-neox"])
def test_a_family_that_is_not_known_is_refused_and_those_that_are_named(family: str) -> None:
    with pytest.raises(ConfigError, match=r"blocks of .* only from those of gemma, gemma2, .*whole blocks alone"):
        mlp_of(FAMILIES[family])


@given(st.lists(st.booleans(), min_size=1, max_size=70))
def test_kept_neurons_survive_being_written_down(kept: list[bool]) -> None:
    keep_U = torch.tensor(kept)
    text = kept_as_text(keep_U)
    assert torch.equal(kept_from_text(text, len(kept)), keep_U)
    assert int(text, 16).bit_count() == sum(kept)
