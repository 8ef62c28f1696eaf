"""A hub on this machine: enough of the real one's interface for its own client to list, read, fetch and publish.

    with HubServer() as hub:
        commit = hub.push("acme/tiny", directory)       a new revision
        hub.trouble = Trouble(seed=0, share=1 / 3)      from now on a third of all requests goes wrong

Large files are stored by their sha256 and served from another path, as the real hub does; downloads keep to ranges.
"""

import base64
import hashlib
import json
import random
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

Fault = Literal["error", "hang", "cut", "lost"]
"""A status 503; silence; half an answer; an answer that is lost when all is done."""


@dataclass(slots=True)
class Trouble:
    """Which requests go wrong, and how."""

    seed: int
    share: float = 1 / 3
    kinds: tuple[Fault, ...] = ("error", "cut", "lost")
    only: str = ""
    """A regular expression that a request's `METHOD path` must match to go wrong."""

    hang_seconds: float = 0.5
    suffered: list[str] = field(default_factory=list)
    """What went wrong so far."""

    _random: random.Random = field(init=False)

    def __post_init__(self) -> None:
        self._random = random.Random(self.seed)

    def draw(self, request: str) -> Fault | None:
        """Say what is to go wrong with a request."""
        if not re.search(self.only, request) or self._random.random() >= self.share:
            return None
        kind = self._random.choice(self.kinds)
        self.suffered.append(f"{kind} {request}")
        return kind


@dataclass(frozen=True, slots=True)
class Commit:
    """One commit of a repository."""

    sha: str
    title: str
    files: Mapping[str, bytes]
    date: datetime
    licence: str | None = None


@dataclass(slots=True)
class Repository:
    """All commits of a model, the newest last."""

    private: bool
    commits: list[Commit]

    def at(self, revision: str) -> Commit | None:
        """Return a commit by its name, or the head."""
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit.sha == revision), None)


@dataclass(frozen=True, slots=True)
class Request:
    """What a client asked."""

    method: str
    path: str
    authorization: str | None
    range: str | None


def is_large(path: str, size: int) -> bool:
    """Whether the hub keeps a file outside git."""
    return path.endswith(".safetensors") or size > 1_000_000


def git_name(content: bytes) -> str:
    """Return a file's name in git."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """Serves repositories over HTTP, while the `with` block runs."""

    def __init__(self, token: str | None = None) -> None:
        """`token`: needed to write, and to read what is private."""
        from tests.hub_handler import HubHandler

        self.token = token
        self.repositories: dict[str, Repository] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[Request] = []
        self.trouble: Trouble | None = None
        self.begins: Callable[[str], None] = lambda request: None
        self.ends: Callable[[str], None] = lambda request: None
        """Called with `METHOD path` before a request is carried out, and after that, before it is answered."""

        self.lock = threading.RLock()
        self._count = 0
        handler = type("Handler", (HubHandler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        self.cdn = self.address.replace("127.0.0.1", "localhost")  # another host, so without the token
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()

    def push(self, name: str, directory: Path, licence: str | None = "apache-2.0", age_seconds: float = 0.0) -> str:
        """Put a directory's files into a repository as a new commit; return its name."""
        files = {path.name: path.read_bytes() for path in sorted(directory.iterdir()) if path.is_file()}
        with self.lock:
            repository = self.repositories.setdefault(name, Repository(private=False, commits=[]))
            return self.commit(repository, "a release", files, age_seconds, licence)

    def commit(
        self, repository: Repository, title: str, files: Mapping[str, bytes], age_seconds: float = 0.0,
        licence: str | None = None,
    ) -> str:  # fmt: skip
        """Add a commit; its large files can be fetched by their hash."""
        self._count += 1
        digest = hashlib.sha1(f"{self._count} {title}".encode())
        for path, content in sorted(files.items()):
            digest.update(path.encode() + content)
            self.blobs[hashlib.sha256(content).hexdigest()] = content
        date = datetime.fromtimestamp(time.time() - age_seconds, UTC)
        repository.commits.append(Commit(digest.hexdigest(), title, dict(files), date, licence))
        return repository.commits[-1].sha

    def titles(self, name: str) -> list[str]:
        """Return the titles of a repository's commits that are of a release, the oldest first."""
        commits = self.repositories[name].commits if name in self.repositories else []
        return [commit.title for commit in commits if commit.title.startswith("secateur: ")]

    def files_at_head(self, name: str) -> dict[str, bytes]:
        """Return the files of a repository as its last commit has them."""
        return dict(self.repositories[name].commits[-1].files)

    def fetched(self) -> set[str]:
        """Return the names of all files that anybody asked for."""
        paths = [request.path for request in self.requests]
        return {match[1] for path in paths if (match := re.search(r"/resolve/[^/]+/(.+)$", path))}


def info_of(name: str, repository: Repository, commit: Commit, with_files: bool) -> dict[str, Any]:
    """Return what the hub says of a model at a commit."""
    config = json.loads(commit.files.get("config.json", b"{}"))
    siblings = [
        {"rfilename": path, **(_metadata(path, content) if with_files else {})}
        for path, content in commit.files.items()
    ]
    kept = {key: config[key] for key in ("architectures", "model_type") if key in config}
    tags = [f"license:{commit.licence}"] if commit.licence else []
    return {
        "id": name, "modelId": name, "sha": commit.sha, "private": repository.private, "tags": tags, "config": kept,
        "lastModified": commit.date.strftime("%Y-%m-%dT%H:%M:%S.000Z"), "siblings": siblings,
    }  # fmt: skip


def tree_of(commit: Commit) -> list[dict[str, Any]]:
    """Return the files of a commit as the hub lists them."""
    entries = []
    for path, content in commit.files.items():
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": git_name(content)}
        if is_large(path, len(content)):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 130}
        entries.append(entry)
    return entries


def _metadata(path: str, content: bytes) -> dict[str, Any]:
    found: dict[str, Any] = {"size": len(content), "blobId": git_name(content)}
    if is_large(path, len(content)):
        sha256 = hashlib.sha256(content).hexdigest()
        found["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 130}
    return found


def applied(hub: HubServer, commit: Commit, lines: list[dict[str, Any]]) -> dict[str, bytes]:
    """Return a commit's files after the operations of a new one."""
    files = dict(commit.files)
    for line in lines:
        value = line["value"]
        if line["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif line["key"] == "lfsFile":
            files[value["path"]] = hub.blobs[value["oid"]]
        elif line["key"] == "deletedFile":
            del files[value["path"]]
    return files
