"""Asking the sources: every release they show, judged by the filters and remembered."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import HfApi, metadata_load

from cluster.watch import hub
from cluster.watch.config import SourceConfig, WatchConfig
from cluster.watch.filters import refusal, refused_name
from cluster.watch.lifecycle import Found
from cluster.watch.state import State
from pipeline.errors import SecateurError
from pipeline.progress import Say, StopAsked


def discover(config: WatchConfig, state: State, api: HfApi, say: Say, stop_asked: StopAsked) -> None:
    """Ask every source and remember what it shows; a source that fails is noted, and does not stop the others.

    Once a stop is asked for, no further model is asked about: the next look does that.
    """
    for source in config.sources:
        problems: list[str] = []
        try:
            for found in _shown_by(source, config, state, api, problems):
                if stop_asked():
                    return
                why = refusal(found, config.filters, config.limits.disk, state.clock())
                release = state.note(found, why)
                if release is not None:
                    say(f"{release.label}: {'skipped: ' + why if why else 'found'}")
        except (SecateurError, OSError) as error:
            problems.append(hub.redacted(str(error)))
        for problem in problems:
            say(f"source {source.label}: {problem}")
        state.checked(source.label, "; ".join(problems))


def _shown_by(
    source: SourceConfig, config: WatchConfig, state: State, api: HfApi, problems: list[str]
) -> Iterator[Found]:
    if source.directory is not None:
        yield from in_directory(source.directory, config.settle, state.clock(), problems)
        return
    if source.model is not None:
        heads: list[tuple[str, str | None]] = [(source.model, hub.head_of(api, source.model, source.revision))]
    else:
        heads = hub.models_of(api, source.organisation or "")
    for name, head in heads:
        if refused_name(name, config.filters):
            continue  # not worth a question, nor a row
        try:
            yield _described(api, state, name, head or hub.head_of(api, name, "main"))
        except SecateurError as error:
            problems.append(error.message)


def _described(api: HfApi, state: State, name: str, commit: str) -> Found:
    """Return what a commit holds; a commit never changes, so the hub is asked once."""
    known = state.knows(name, commit)
    return known.found if known is not None else hub.describe(api, name, commit)


def in_directory(directory: Path, settle: float, now: float, problems: list[str]) -> Iterator[Found]:
    """Yield the models in a directory of models, but for those that changed less than `settle` seconds ago.

    A file dated in the future counts by how far off it is, so that a clock set back does not hold it for ever. What
    cannot be read, or remembered by its name, joins the `problems`, and does not stop the others.
    """
    for path in sorted(directory.iterdir()):
        try:
            path.name.encode()
            if not (path / "config.json").is_file():
                continue
            found, newest = look_at(path)
        except FileNotFoundError:  # removed while we look
            continue
        except (OSError, UnicodeError) as error:
            problems.append(f"{str(path)!r} is passed over: {error}")
            continue
        if abs(now - newest) >= settle:
            yield found


def look_at(path: Path) -> tuple[Found, float]:
    """Return a model directory as a release, and when it was last changed.

    Its revision is a hash of config.json and of every file's name, size and time: copying a model there anew makes a
    new release.
    """
    stats = {file.name: file.stat() for file in sorted(path.iterdir()) if file.is_file()}
    config = (path / "config.json").read_bytes()
    seen = {name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()}
    digest = hashlib.sha256(config + json.dumps(seen).encode())
    num_bytes = sum(stat.st_size for name, stat in stats.items() if name.endswith(".safetensors"))
    newest = max(stat.st_mtime for stat in stats.values())
    facts = {"licence": _licence(path), "architectures": _architectures(config), "changed": newest}
    found = Found(
        name=path.name, revision=digest.hexdigest()[:40], origin=str(path), num_bytes=num_bytes,
        disk_bytes=num_bytes, facts=facts,
    )  # fmt: skip
    return found, newest


def _architectures(config: bytes) -> list[str]:
    """Return the architectures that a config.json names; a broken one is for the pruning to complain of."""
    with suppress(ValueError, RecursionError):
        content: Any = json.loads(config)
        if isinstance(content, dict) and isinstance(content.get("architectures"), list):
            return [str(name) for name in content["architectures"]]
    return []


def _licence(path: Path) -> str | None:
    """Return the licence that a model's card states."""
    with suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        licence = (metadata_load(path / "README.md") or {}).get("license")
        return licence if isinstance(licence, str) else None
    return None
