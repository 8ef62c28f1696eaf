"""A hub on this machine, and the hub's own client pointed at it."""

import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub.constants
import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import disable_progress_bars

from cluster.watch.hub import new_api
from tests.cluster.watch.releases import Clock
from tests.hub_server import HubServer
from tests.tiny import save_tiny, some_text

TOKEN = "hf_ThisIsTheSecretOfTheTests"


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint; the text beside it calibrates and evaluates."""
    base = tmp_path_factory.mktemp("tiny")
    save_tiny("llama", base / "tiny")
    (base / "text.txt").write_text(some_text(2_000), encoding="utf-8")
    return base / "tiny"


@pytest.fixture
def text(tiny: Path) -> Path:
    return tiny.parent / "text.txt"


@pytest.fixture
def clock() -> Clock:
    """A clock that stands still until a test sets it, at the time that the hub's commits are of."""
    return Clock(time.time())


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that knows one token, which the client finds in its environment."""
    disable_progress_bars()
    with HubServer(TOKEN) as server:
        constants = huggingface_hub.constants
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", server.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        # The client's own waits between its tries: real, but short.
        quick = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 100), time=time.time)
        monkeypatch.setattr("huggingface_hub.utils._http.time", quick)
        monkeypatch.setattr("huggingface_hub.file_download.time", quick)
        warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)  # the client's own upload
        yield server


@pytest.fixture
def api(hub: HubServer) -> HfApi:
    return new_api()
