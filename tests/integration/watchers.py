"""Watchers in processes of their own, to be killed."""

import time
import warnings
from multiprocessing.connection import Connection
from types import SimpleNamespace
from typing import Any

import huggingface_hub.constants
import torch
from huggingface_hub.utils import disable_progress_bars

from tests.cluster.watch.watching import Watch


def watch_until_all_is_published(
    reports: Connection, plain: dict[str, Any], address: str, cache: str, num_releases: int, clock_error: float
) -> None:
    """Look and work again and again, with a clock that is wrong, until so many releases are published."""
    torch.set_num_threads(1)
    _use_hub(address, cache)
    watch = Watch(plain, lambda: time.time() + clock_error)
    reports.send("begun")
    while list(watch.statuses().values()) != ["published"] * num_releases:
        watch.once()


def _use_hub(address: str, cache: str) -> None:
    """Point the hub's client at a hub, and have it wait less between its tries."""
    disable_progress_bars()
    warnings.simplefilter("ignore")
    constants = huggingface_hub.constants
    constants.ENDPOINT = address
    constants.HUGGINGFACE_CO_URL_TEMPLATE = address + "/{repo_id}/resolve/{revision}/{filename}"
    constants.HF_HUB_CACHE, constants.HF_HUB_DISABLE_XET, constants.HF_HUB_DOWNLOAD_TIMEOUT = cache, True, 1
    constants.HF_HUB_OFFLINE = False
    quick: Any = SimpleNamespace(sleep=lambda seconds: time.sleep(seconds / 100), time=time.time)
    huggingface_hub.utils._http.time = quick
    huggingface_hub.file_download.time = quick
