"""The compiled op: found by its versions, built on request alone, locked memory asked for first."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.errors import SecateurError, StorageError
from pipeline.paging import aio_op
from tests.pipeline.paging.engines import needs_aio

WITH_DEEPSPEED = pytest.mark.skipif(not aio_op.is_installed(), reason="needs DeepSpeed: pip install 'secateur[paging]'")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of built libraries."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(aio_op, "version", lambda name: "0.19.8")
    return tmp_path


def builder(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Have the builder's process do something else."""
    monkeypatch.setattr(aio_op, "COMPILE", code)


WRITES_LIBRARIES = """
import os, pathlib
assert os.environ["DS_ACCELERATOR"] == "cpu"
for name in ("pin_memory", "async_io"):
    directory = pathlib.Path(os.environ["TORCH_EXTENSIONS_DIR"], name)
    directory.mkdir()
    (directory / f"{name}.so").write_text("compiled")
print("not to be heard")
"""


def test_what_is_built_is_found_and_not_built_again(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    builder(monkeypatch, WRITES_LIBRARIES)
    assert not aio_op.is_built()
    aio_op.build()
    assert aio_op.is_built()
    builder(monkeypatch, "raise SystemExit(1)")
    aio_op.build()
    [directory] = (cache / "secateur").iterdir()
    assert sorted(path.name for path in directory.iterdir()) == ["async_io.so", "pin_memory.so"]
    assert capfd.readouterr() == ("", "")


def test_what_was_built_for_another_version_does_not_count(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    builder(monkeypatch, WRITES_LIBRARIES)
    aio_op.build()
    monkeypatch.setattr("torch.__version__", "2.0.0")
    assert not aio_op.is_built()


def test_a_build_that_fails_shows_the_last_words_and_what_it_needs(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    builder(monkeypatch, "raise SystemExit('fatal error: libaio.h: No such file or directory')")
    with pytest.raises(SecateurError, match=r"cannot be built: it needs .*libaio-dev[\s\S]*libaio.h: No such file"):
        aio_op.build()
    assert not aio_op.is_built()
    assert list((cache / "secateur").iterdir()) == []


def test_without_deepspeed_nothing_is_built(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> str:
        raise aio_op.PackageNotFoundError(name)

    monkeypatch.setattr(aio_op, "version", missing)
    assert not aio_op.is_installed()
    assert not aio_op.is_built()
    with pytest.raises(SecateurError, match=r"DeepSpeed is not installed: pip install 'secateur\[paging\]'"):
        aio_op.build()


@WITH_DEEPSPEED
def test_the_builder_that_is_called_exists() -> None:
    statement = aio_op.COMPILE.partition(";")[0]
    environment = os.environ | {"DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, "-c", statement], env=environment, capture_output=True, check=False)
    assert done.returncode == 0, done.stderr


def test_memory_that_may_not_be_locked_is_refused_with_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoLocks:
        def __init__(self, name: str | None, use_errno: bool) -> None:
            pass

        def mlock2(self, *_: object) -> int:
            ctypes.set_errno(12)
            return -1

    aio_op.require_lockable(4096)
    monkeypatch.setattr(ctypes, "CDLL", NoLocks)
    with pytest.raises(
        StorageError, match=r"refuses to lock 8,192 bytes \(Cannot allocate memory\); raise `ulimit -l`"
    ):
        aio_op.require_lockable(8192)


@needs_aio
def test_more_requests_than_the_kernel_takes_are_refused_with_numbers() -> None:
    aio_op.require_contexts(1)
    refused = r"refuses a queue of 64,000,000 asynchronous requests \(.*\); raise fs\.aio-max-nr"
    with pytest.raises(StorageError, match=refused):
        aio_op.require_contexts(1_000_000)
