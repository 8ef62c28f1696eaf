"""Models on the Hugging Face hub: what there is, what a revision holds, and its files, each checked by its hash.

Only safetensors and what describes them is ever fetched, and always at a commit, never at a branch. The token, where
one is needed, is found by the hub's own client in the environment or its cache: it passes through no value of ours, and
is taken out of every message should the hub or a library repeat it.
"""

import glob
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, get_token, snapshot_download
from huggingface_hub.errors import SafetensorsParsingError
from huggingface_hub.hf_api import ModelInfo, RepoSibling

from cluster.watch.lifecycle import Found
from pipeline.checkpoint import INDEX_NAME, SINGLE_NAME
from pipeline.durable import fsync_directory
from pipeline.errors import CheckpointError, HubError, SecateurError
from pipeline.hub import ALLOWED

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_NUM_DOWNLOADS = 4
_PIECE = 8 << 20


def redacted(text: str) -> str:
    """Return a message without the hub's token, whatever put it there."""
    token = get_token()
    return _TOKEN.sub("(token)", text.replace(token, "(token)") if token else text)


@contextmanager
def hub_errors(doing: str) -> Iterator[None]:
    """Turn whatever the hub's client raises into a HubError that says what was being done.

    The client lets errors of its HTTP library, of the system and of its own through, and which library that is changes
    from version to version: so all are caught here, and here only.
    """
    try:
        yield
    except SecateurError:
        raise
    except Exception as error:
        lines = [line for line in str(error).splitlines() if line.strip()] or [""]
        cause = f" ({error.__cause__})" if error.__cause__ is not None else ""
        raise HubError(
            redacted(f"the hub failed us while {doing}: {type(error).__name__}: {lines[0]}{cause}")
        ) from None


def new_api() -> HfApi:
    """Return the hub's client, which finds address and token by itself."""
    return HfApi(library_name="secateur")


def models_of(api: HfApi, organisation: str) -> list[tuple[str, str | None]]:
    """Return names and newest commits of an organisation's models, the newest first; raises HubError."""
    with hub_errors(f"listing the models of {organisation}"):
        listed = api.list_models(author=organisation, sort="last_modified", expand=["sha", "lastModified"])
        return [(model.id, model.sha) for model in listed]


def head_of(api: HfApi, name: str, revision: str) -> str:
    """Return the commit that a branch is at; raises HubError."""
    with hub_errors(f"asking for {name}"):
        sha = api.model_info(name, revision=revision, expand=["sha"]).sha
    if sha is None:
        raise HubError(f"the hub names no commit for {name} at {revision}; is HF_ENDPOINT a hub?")
    return sha


def describe(api: HfApi, name: str, commit: str) -> Found:
    """Return what a commit of a model holds; raises HubError.

    A commit becomes part of paths, so it has to look like one.
    """
    if not _COMMIT.fullmatch(commit):
        raise HubError(f"the hub calls {commit!r} a commit of {name}, which is none; is HF_ENDPOINT a hub?")
    with hub_errors(f"asking what {name} holds"):  # what it answers too: the model's owner has written some of it
        return _found_in(name, commit, api.model_info(name, revision=commit, files_metadata=True))


def _found_in(name: str, commit: str, info: ModelInfo) -> Found:
    siblings = [file for file in info.siblings or [] if _is_wanted(file.rfilename)]
    files = {file.rfilename: {"size": file.size, **_digest(file)} for file in siblings}
    weights = [file for file in siblings if file.rfilename.endswith(".safetensors")]
    chosen = [file for file in weights if file.rfilename.startswith("model")] or weights
    num_bytes = sum(file.size or 0 for file in chosen)
    facts: dict[str, Any] = {
        "licence": _licence(info),
        "architectures": list((info.config or {}).get("architectures") or []),
        "changed": info.last_modified.timestamp() if info.last_modified else None,
        "files": files,
    }
    return Found(name=name, revision=commit, origin="hub", num_bytes=num_bytes, disk_bytes=2 * num_bytes, facts=facts)


def fetch_described(found: Found, directory: Path) -> None:
    """Fetch all of a release but its weights."""
    names = [name for name in found.facts["files"] if not name.endswith(".safetensors")]
    _fetch(found, names, directory)


def fetch_weights(found: Found, directory: Path) -> None:
    """Fetch the weights that the index names, beside what describes them, and hold every file against its hash."""
    _fetch(found, weight_files(found, directory), directory)


def weight_files(found: Found, directory: Path) -> list[str]:
    """Return the files that hold the model's weights; raises CheckpointError where none do."""
    there = [name for name in found.facts["files"] if name.endswith(".safetensors")]
    if SINGLE_NAME in there:
        return [SINGLE_NAME]
    if not (directory / INDEX_NAME).is_file():
        if len(there) == 1:
            return there
        raise CheckpointError(f"{found.name} has {len(there)} safetensors files and no {INDEX_NAME}: which are it?")
    try:
        named = set(json.loads((directory / INDEX_NAME).read_bytes())["weight_map"].values())
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{INDEX_NAME} of {found.name} is no index of tensors: {error!r}") from None
    missing = named - set(there)
    if missing:
        raise CheckpointError(
            f"{found.name} lacks {len(missing)} shards that its index names: {min(map(str, missing))}"
        )
    return sorted(named)


def write_shell(api: HfApi, found: Found, described: Path, shell: Path) -> None:
    """Make a model directory with every header and no weight, which can be planned with as if it were whole.

    Its shards are as long as the real ones and take no room: nothing is in them but their header.
    """
    shutil.rmtree(shell, ignore_errors=True)
    shutil.copytree(described, shell, ignore=shutil.ignore_patterns(".cache", "*.safetensors"))
    for name in weight_files(found, described):
        with hub_errors(f"reading the header of {name} of {found.name}"):
            try:
                read = api.parse_safetensors_file_metadata(found.name, name, revision=found.revision)
            except SafetensorsParsingError as error:
                raise CheckpointError(f"{name} of {found.name} is no safetensors file: {error}") from None
        entries = {
            tensor: {"dtype": info.dtype, "shape": info.shape, "data_offsets": list(info.data_offsets)}
            for tensor, info in read.tensors.items()
        }
        header = json.dumps(entries).encode()
        end = max((info.data_offsets[1] for info in read.tensors.values()), default=0)
        with (shell / name).open("wb") as file:
            file.write(len(header).to_bytes(8, "little") + header)
            file.truncate(8 + len(header) + end)


def _fetch(found: Found, names: list[str], directory: Path) -> None:
    """Download files at the release's commit, going on where a download broke off; raises HubError."""
    if not names:
        return
    with hub_errors(f"fetching {found.name}"):
        snapshot_download(
            found.name, revision=found.revision, local_dir=directory, max_workers=_NUM_DOWNLOADS,
            allow_patterns=[glob.escape(name) for name in names], library_name="secateur",
        )  # fmt: skip
    for name in names:
        problem = _difference(directory / name, found.facts["files"][name])
        if problem:
            (directory / name).unlink(missing_ok=True)
            shutil.rmtree(directory / ".cache", ignore_errors=True)  # which remembers the file as good
            raise HubError(f"{name} of {found.name} arrived damaged: {problem}. It is fetched again")
    _make_durable(directory, names)


def _make_durable(directory: Path, names: list[str]) -> None:
    """Write files through to the disk: the state, which is about to say that they are there, survives a power cut."""
    for name in names:
        with (directory / name).open("rb") as file:
            os.fsync(file.fileno())
    fsync_directory(directory)


def _difference(path: Path, wanted: Mapping[str, Any]) -> str:
    """Say how a file differs from what the hub says of it; empty where it does not."""
    if not path.is_file():
        return "it is not there"
    size = path.stat().st_size
    if wanted["size"] is not None and size != wanted["size"]:
        return f"{size:,} bytes of {wanted['size']:,}"
    kind = "sha256" if "sha256" in wanted else "git"
    if kind in wanted and _hash(path, kind, size) != wanted[kind]:
        return f"its {kind} hash is another"
    return ""


def _hash(path: Path, kind: str, size: int) -> str:
    """Return the sha256 of a large file, or a small one's name in git."""
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(f"blob {size}\0".encode(), usedforsecurity=False)
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            digest.update(piece)
    return digest.hexdigest()


def _is_wanted(name: str) -> bool:
    return "/" not in name and any(fnmatchcase(name, pattern) for pattern in ALLOWED)


def _digest(file: RepoSibling) -> dict[str, str]:
    if file.lfs is not None:
        return {"sha256": file.lfs.sha256}
    return {"git": file.blob_id} if file.blob_id else {}


def _licence(info: ModelInfo) -> str | None:
    """Return the licence that a model's card or its tags state."""
    stated = info.card_data.get("license") if info.card_data is not None else None
    tagged = [tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")]
    return stated if isinstance(stated, str) else next(iter(tagged), None)
