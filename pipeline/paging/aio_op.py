"""DeepSpeed's asynchronous disk I/O (libaio) as a compiled library: found, built and loaded.

Importing deepspeed would say things on standard output and bring its engines along; a run needs two
libraries of it. So `build`, in a process of its own, has DeepSpeed compile them, and keeps them under the names of
the versions and the processor that they were made for; a run loads these and never imports deepspeed. They are
built as for a machine without CUDA, in need of no CUDA toolkit: the buffers are host memory in either case.
"""

import ctypes
import hashlib
import importlib.util
import mmap
import os
import platform
import subprocess
import sys
import tempfile
import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import torch

from pipeline.errors import SecateurError, StorageError

LIBRARIES = ("pin_memory", "async_io")
"""In the order of loading: the second looks for a symbol of the first."""

BLOCK_BYTES = 1 << 20
"""What the op asks the kernel for at once."""

QUEUE_DEPTH = 32
"""Blocks of one transfer in flight."""

LOCK_ON_FAULT = 1
"""A flag of mlock2."""

NEEDS = "it needs a C++ compiler, ninja (pip install 'secateur[paging]') and libaio's headers (Debian: libaio-dev)"

COMPILE = "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load(verbose=False)"


def is_installed() -> bool:
    """Tell whether the package deepspeed is here."""
    try:
        return bool(version("deepspeed"))
    except PackageNotFoundError:
        return False


def is_built() -> bool:
    """Tell whether the op has been built for this deepspeed, torch, Python and processor; builds nothing."""
    return is_installed() and all(_library(name).exists() for name in LIBRARIES)


def build() -> None:
    """Build the op, unless it is built; takes minutes. Raises SecateurError, with the compiler's last words."""
    if not is_installed():
        raise SecateurError("DeepSpeed is not installed: pip install 'secateur[paging]'")
    if is_built():
        return
    directory = _directory()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
        bin_directory = str(Path(sys.executable).parent)  # where pip puts ninja, also where nobody activated the venv
        environment = os.environ | {
            "TORCH_EXTENSIONS_DIR": scratch,
            "DS_ACCELERATOR": "cpu",
            "PATH": bin_directory + os.pathsep + os.environ.get("PATH", os.defpath),
        }
        command = [sys.executable, "-c", COMPILE]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            last = "\n".join((done.stdout + done.stderr).strip().splitlines()[-12:])
            raise SecateurError(f"DeepSpeed's aio cannot be built: {NEEDS}. The builder's last words:\n{last}")
        whole = Path(scratch) / "whole"
        whole.mkdir()
        for name in LIBRARIES:
            (Path(scratch) / name / f"{name}.so").rename(whole / f"{name}.so")
        with suppress(OSError):  # another process has built it meanwhile
            whole.rename(directory)


def _directory() -> Path:
    """Return where the libraries of this deepspeed, torch, Python and processor are kept."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "secateur"
    versions = f"deepspeed-{version('deepspeed')}-torch-{torch.__version__}-{sys.implementation.cache_tag}"
    return base / f"aio-{versions}-{platform.machine()}-{_processor()}"


def _processor() -> str:
    """Return a digest of the instructions this processor has: the op is compiled for them."""
    about = Path("/proc/cpuinfo")
    lines = about.read_text().splitlines() if about.exists() else []
    return hashlib.sha256(next((n for n in lines if n.startswith(("flags", "Features"))), "").encode()).hexdigest()[:12]


def _library(name: str) -> Path:
    return _directory() / f"{name}.so"


class Op(NamedTuple):
    """The loaded libraries. A handle of the op: `pread`, `async_pwrite` and `wait`."""

    new_handle: Callable[[int, int, bool, bool, int], Any]
    pins: Any
    libaio: ctypes.CDLL


@cache
def load() -> Op:
    """Load the built op; a library can be loaded once in a process."""
    ctypes.CDLL(str(_library("pin_memory")), mode=ctypes.RTLD_GLOBAL)
    modules = {name: _module(name) for name in LIBRARIES}
    return Op(
        new_handle=modules["async_io"].aio_handle,
        pins=modules["pin_memory"].pin_handle(),
        libaio=ctypes.CDLL(str(_library("async_io"))),
    )


def _module(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, _library(name))
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def new_handle() -> Any:
    """Return a handle: one thread of the op's own, for one transfer at a time."""
    return load().new_handle(BLOCK_BYTES, QUEUE_DEPTH, False, True, 1)


def require_contexts(num_handles: int) -> None:
    """Raise StorageError unless the kernel has the I/O contexts of so many handles: the op does not look.

    Asked for as one, and given back.
    """
    context, library, num_events = ctypes.c_void_p(), load().libaio, 2 * QUEUE_DEPTH * num_handles
    code = library.io_queue_init(num_events, ctypes.byref(context))
    if code != 0:
        raise StorageError(
            f"the kernel refuses a queue of {num_events:,} asynchronous requests ({os.strerror(-code)}); raise "
            "fs.aio-max-nr, allow io_setup in the sandbox, or set memory.io to threads"
        )
    library.io_queue_release(context)


def locked_buffer(num_bytes: int) -> torch.Tensor:
    """Return uint8 [num_bytes] of the op's own locked memory, given back when the last tensor that shares it goes."""
    require_lockable(num_bytes)
    pins = load().pins
    locked = pins.new_cpu_locked_tensor(num_bytes, torch.empty(0, dtype=torch.uint8))
    # The op's tensor does not own its memory: a view that outlives it would read what is no longer there.
    owner = (ctypes.c_uint8 * num_bytes).from_address(locked.data_ptr())
    weakref.finalize(owner, pins.free_cpu_locked_tensor, locked).atexit = False
    return torch.frombuffer(owner, dtype=torch.uint8)


def require_lockable(num_bytes: int) -> None:
    """Raise StorageError unless the process may lock as much more memory: the op would end the process.

    Asked with pages that are locked when they are touched, and touching none.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    memory = mmap.mmap(-1, num_bytes)
    pages = (ctypes.c_uint8 * num_bytes).from_buffer(memory)
    if libc.mlock2(ctypes.byref(pages), ctypes.c_size_t(num_bytes), LOCK_ON_FAULT) != 0:
        raise StorageError(
            f"aio needs memory that stays in place, and the system refuses to lock {num_bytes:,} bytes "
            f"({os.strerror(ctypes.get_errno())}); raise `ulimit -l`, or set memory.io to threads"
        )


@contextmanager
def no_word_of_wear() -> Iterator[None]:
    """Have the op think that it has warned of wear on disks already.

    On its first write it would import deepspeed.utils, and all of deepspeed with it, to log that. It asks that
    module whether it has been said; so for this time there are modules of that name, and they say yes.
    """
    names = ("deepspeed", "deepspeed.utils")
    before = {name for name in names if name in sys.modules}
    for name in names:
        sys.modules.setdefault(name, types.ModuleType(name))
    sys.modules["deepspeed.utils"].__dict__["_deepspeed_nvme_write_warning_emitted"] = True
    try:
        yield
    finally:
        for name in set(names) - before:
            del sys.modules[name]
