"""Chooses the engine that moves bytes to and from the disk, or says why one cannot be used."""

from pathlib import Path
from typing import Literal

import torch

from pipeline.errors import ConfigError, StorageError
from pipeline.paging.aio import AioPager, is_built, is_installed
from pipeline.paging.pager import Pager, ThreadPager

Engine = Literal["auto", "aio", "threads"]

INSTALL = "pip install 'secateur[paging]'"
BUILD = "secateur doctor --build, which takes some minutes, once (Debian: apt-get install libaio-dev before)"


def open_pager(asked: Engine, directory: Path, *, pinned: bool | None = None) -> Pager:
    """Open the engine asked for; `auto`: aio if it is built and works in `directory`, else threads.

    `directory` exists. `pinned`: page-lock buffers for a CUDA device; by default where there is one. Builds nothing.
    Raises ConfigError where `aio` is asked for and cannot be used.
    """
    is_pinned = torch.cuda.is_available() if pinned is None else pinned
    if asked != "threads":
        try:
            return _open_aio(directory, is_pinned)
        except StorageError as error:
            if asked == "aio":
                raise ConfigError(
                    f"memory.io: aio cannot be used: {error.message}. Or set memory.io to auto or threads"
                ) from error
    return ThreadPager(pinned=is_pinned)


def why_not_aio(directory: Path) -> str:
    """Return why DeepSpeed's aio cannot be used in an existing directory, with the way out; empty where it can."""
    try:
        _open_aio(directory, pinned=False).close()
    except StorageError as error:
        return error.message
    return ""


def _open_aio(directory: Path, pinned: bool) -> AioPager:
    if not is_installed():
        raise StorageError(f"DeepSpeed is not installed: {INSTALL}, then {BUILD}")
    if not is_built():
        raise StorageError(f"DeepSpeed's aio is not built: {BUILD}")
    return AioPager(directory, pinned=pinned)
