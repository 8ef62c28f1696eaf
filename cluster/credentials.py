"""The token a Ray cluster asks for, found where Ray's own tools look for it; and secrets kept out of stored jobs.

Ray's job server takes a bearer token where it was started with token authentication. It is looked for in Ray's order:
`RAY_AUTH_TOKEN`, the file that `RAY_AUTH_TOKEN_PATH` names, `~/.ray/auth_token`. Only `RAY_AUTH_MODE=disabled`, which a
user sets for themselves, keeps it back.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.errors import ConfigError

TOKEN_FILE = Path(".ray", "auth_token")
"""The standard file, in the home directory."""

WAY_OUT = (
    f"put the cluster's token into RAY_AUTH_TOKEN, or into the file ~/{TOKEN_FILE} or the one that "
    "RAY_AUTH_TOKEN_PATH names (`ray get-auth-token` prints it where the cluster was started)"
)

SECRETS = ("RAY_AUTH_TOKEN", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")
"""Variables of the environment whose values may not be stored with a job."""

_HUB_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{30,}")
_THERE = "the job finds tokens in the environment or the standard cache of the cluster's own machines"

SHORTEST_SECRET = 8
"""Characters; a shorter value may be in any text by chance."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Token:
    """A token, which no representation shows, and where it was found."""

    value: str = field(repr=False)
    origin: str


def ray_token(environment: Mapping[str, str], home: Path) -> Token | None:
    """Return the token for Ray clusters; None where there is none, or where the user has switched tokens off.

    Raises ConfigError where a file that was named cannot be read: falling back to another token would hide a mistake.
    """
    if environment.get("RAY_AUTH_MODE", "token").lower() == "disabled":
        return None
    if value := environment.get("RAY_AUTH_TOKEN", "").strip():
        return Token(value=value, origin="RAY_AUTH_TOKEN")
    if named := environment.get("RAY_AUTH_TOKEN_PATH"):
        return Token(value=_token_in(Path(named)), origin=f"the file {named} (RAY_AUTH_TOKEN_PATH)")
    standard = home / TOKEN_FILE
    return Token(value=_token_in(standard), origin=f"the file {standard}") if standard.is_file() else None


def refuse_secrets(text: str, environment: Mapping[str, str]) -> None:
    """Raise ConfigError where settings that are stored with a job hold a token of this environment, or of the hub."""
    for name in SECRETS:
        value = environment.get(name, "").strip()
        if len(value) >= SHORTEST_SECRET and value in text:
            raise ConfigError(
                f"the settings hold the value of {name}, and the cluster keeps and shows a job's settings; take it "
                f"out: {_THERE}"
            )
    if _HUB_TOKEN.search(text):
        raise ConfigError(f"the settings hold what looks like a token of the Hugging Face hub; take it out: {_THERE}")


def _token_in(path: Path) -> str:
    try:
        value = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not text"
        raise ConfigError(f"cannot read the token in {path}: {reason}; {WAY_OUT}") from None
    if not value:
        raise ConfigError(f"the token file {path} is empty; {WAY_OUT}")
    return value
