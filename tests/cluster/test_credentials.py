"""The token of a cluster is found where Ray looks for it, and secrets stay out of what a cluster stores."""

from pathlib import Path

import pytest

from cluster.credentials import Token, ray_token, refuse_secrets
from pipeline.errors import ConfigError


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text("standard\n")
    return tmp_path


def value_of(token: Token | None) -> str | None:
    return token and token.value


def test_the_environment_wins_over_a_named_file_and_that_over_the_standard_one(home: Path) -> None:
    named = home / "named"
    named.write_text(" named ")
    path = {"RAY_AUTH_TOKEN_PATH": str(named)}
    assert value_of(ray_token({"RAY_AUTH_TOKEN": "direct", **path}, home)) == "direct"
    assert value_of(ray_token(path, home)) == "named"
    assert value_of(ray_token({}, home)) == "standard"
    assert ray_token({}, home / "elsewhere") is None


@pytest.mark.parametrize("mode", ["token", "TOKEN", ""])
def test_a_token_is_used_unless_the_user_has_switched_tokens_off(mode: str, home: Path) -> None:
    assert value_of(ray_token({"RAY_AUTH_MODE": mode}, home)) == "standard"
    assert ray_token({"RAY_AUTH_MODE": "Disabled"}, home) is None


def test_a_named_file_that_cannot_be_read_is_not_passed_over(home: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"cannot read the token in /nowhere: No such file.*; put the cluster's token"
    ):
        ray_token({"RAY_AUTH_TOKEN_PATH": "/nowhere"}, home)
    (home / "binary").write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"cannot read the token in .*/binary: it is not text"):
        ray_token({"RAY_AUTH_TOKEN_PATH": str(home / "binary")}, home)


def test_an_empty_file_is_said_to_be_empty(home: Path) -> None:
    (home / ".ray" / "auth_token").write_text("\n")
    with pytest.raises(ConfigError, match=r"the token file .*auth_token is empty; put the cluster's token into"):
        ray_token({}, home)


def test_no_representation_of_a_token_shows_it(home: Path) -> None:
    assert "standard" not in repr(ray_token({}, home / "x" / ".."))


def test_settings_that_hold_a_secret_are_refused_without_showing_it() -> None:
    with pytest.raises(ConfigError, match=r"the settings hold the value of HF_TOKEN") as caught:
        refuse_secrets("model: {hub: org/name?token=hf_abcdefgh}", {"HF_TOKEN": "hf_abcdefgh"})
    assert "hf_abcdefgh" not in caught.value.message
    refuse_secrets("model: {hub: org/name}", {"HF_TOKEN": "hf_abcdefgh", "RAY_AUTH_TOKEN": "org"})


def test_settings_that_hold_a_token_of_the_hub_from_anywhere_are_refused() -> None:
    token = "hf_" + "aB3" * 11
    with pytest.raises(ConfigError, match=r"the settings hold what looks like a token of the Hugging Face") as caught:
        refuse_secrets(f"model: {{hub: org/name?token={token}}}", {})
    assert token not in caught.value.message
