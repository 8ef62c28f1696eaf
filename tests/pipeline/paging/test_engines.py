"""The choice of an engine: what was asked for, or the best that works, or a reason and a way out."""

from contextlib import closing
from pathlib import Path

import pytest

from pipeline.errors import ConfigError, StorageError
from pipeline.paging import engines
from pipeline.paging.engines import Engine, open_pager, why_not_aio
from tests.pipeline.paging.engines import needs_aio


@needs_aio
@pytest.mark.parametrize(("asked", "found"), [("auto", "aio"), ("aio", "aio"), ("threads", "threads")])
def test_auto_is_aio_where_it_works(asked: Engine, found: str, tmp_path: Path) -> None:
    with closing(open_pager(asked, tmp_path)) as pager:
        assert pager.name == found
    assert why_not_aio(tmp_path) == ""
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("installed", "built", "works", "reason"),
    [
        (False, False, False, r"DeepSpeed is not installed: pip install 'secateur\[paging\]'"),
        (True, False, False, "DeepSpeed's aio is not built: secateur doctor --build, which takes some minutes"),
        (True, True, False, "no direct I/O there"),
    ],
)
def test_auto_is_threads_where_aio_does_not_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, installed: bool, built: bool, works: bool, reason: str
) -> None:
    def refused(directory: Path, *, pinned: bool) -> None:
        raise StorageError("no direct I/O there")

    monkeypatch.setattr(engines, "is_installed", lambda: installed)
    monkeypatch.setattr(engines, "is_built", lambda: built)
    monkeypatch.setattr(engines, "AioPager", refused)
    with closing(open_pager("auto", tmp_path)) as pager:
        assert pager.name == "threads"
    with pytest.raises(
        ConfigError, match=f"memory.io: aio cannot be used: {reason}.* set memory.io to auto or threads"
    ):
        open_pager("aio", tmp_path)
    assert why_not_aio(tmp_path)
