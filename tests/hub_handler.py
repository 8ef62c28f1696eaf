"""The requests that the hub's client makes, answered as the hub answers them."""

import hashlib
import json
import re
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from tests.hub_server import (
    Fault,
    HubServer,
    Repository,
    Request,
    applied,
    git_name,
    info_of,
    is_large,
    tree_of,
)

PAGE = 2
"""Models a page of a listing: few, so that there are pages."""


class _Refused(Exception):
    """A request that the hub does not grant: a status, and the hub's word for why."""


class HubHandler(BaseHTTPRequestHandler):
    """One connection of a client."""

    hub: HubServer
    protocol_version = "HTTP/1.1"
    timeout = 30

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""

    def _answer(self) -> None:
        """Find what is asked for, and let it go wrong where it is to."""
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self._chunks()
        path = unquote(urlsplit(self.path).path)
        self.query = parse_qs(urlsplit(self.path).query)
        authorization = self.headers.get("Authorization")
        self.hub.requests.append(Request(self.command, path, authorization, self.headers.get("Range")))
        self.fault: Fault | None = self.hub.trouble.draw(f"{self.command} {path}") if self.hub.trouble else None
        if self.fault == "hang" and self.hub.trouble:
            time.sleep(self.hub.trouble.hang_seconds)
            self.close_connection = True
            return
        if self.fault == "error":
            self._send(503, b"overloaded")
            return
        try:
            self._route(path)
        except _Refused as refused:
            status, code = refused.args
            self._send(status, json.dumps({"error": code}).encode(), {"X-Error-Code": code, "X-Error-Message": code})
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self, path: str) -> None:
        for method, pattern, handle in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in method.split("|"):
                self.hub.begins(f"{self.command} {path}")
                with self.hub.lock:
                    handle(self, *match.groups())
                return
        raise _Refused(404, "EntryNotFound")

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.hub.ends(f"{self.command} {unquote(urlsplit(self.path).path)}")
        if self.fault == "lost":
            self.close_connection = True
            return
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fault == "cut":
            self.wfile.write(content[: len(content) // 2])
            self.close_connection = True
            return
        self.wfile.write(content)

    def _json(self, content: Any, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _repository(self, name: str) -> Repository:
        repository = self.hub.repositories.get(name)
        if repository is None or (repository.private and not self._is_known()):
            raise _Refused(404, "RepoNotFound")
        return repository

    def _is_known(self) -> bool:
        return self.hub.token is None or self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def _may_write(self) -> None:
        if not self._is_known():
            raise _Refused(401, "Unauthorized")

    def _models(self) -> None:
        author, start = self.query["author"][0], int(self.query.get("start", ["0"])[0])
        names = sorted(name for name in self.hub.repositories if name.startswith(f"{author}/"))
        page = [
            {"id": name, "sha": repository.commits[-1].sha}
            for name in names[start : start + PAGE]
            for repository in [self.hub.repositories[name]]
        ]
        more = start + PAGE < len(names)
        link = f'<{self.hub.address}/api/models?author={author}&start={start + PAGE}>; rel="next"'
        self._json(page, {"Link": link} if more else None)

    def _info(self, name: str, revision: str = "main") -> None:
        repository = self._repository(name)
        commit = repository.at(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound")
        self._json(info_of(name, repository, commit, with_files="blobs" in self.query))

    def _tree(self, name: str, revision: str) -> None:
        commit = self._repository(name).at(revision)
        if commit is None:
            raise _Refused(404, "RevisionNotFound")
        self._json(tree_of(commit))

    def _commits(self, name: str, revision: str) -> None:
        commits = reversed(self._repository(name).commits)
        listed = [
            {
                "id": c.sha,
                "title": c.title,
                "message": "",
                "date": c.date.strftime("%Y-%m-%dT%H:%M:%S.000Z"),
                "authors": [],
            }
            for c in commits
        ]
        self._json(listed)

    def _resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._repository(name).at(revision)
        if commit is None or path not in commit.files:
            raise _Refused(404, "EntryNotFound")
        content = commit.files[path]
        headers = {"X-Repo-Commit": commit.sha, "Accept-Ranges": "bytes"}
        if is_large(path, len(content)):
            sha256 = hashlib.sha256(content).hexdigest()
            linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(len(content))}
            self._send(302, b"", {**headers, **linked, "Location": f"{self.hub.cdn}/cdn/{sha256}"})
            return
        self._content(content, {**headers, "ETag": f'"{git_name(content)}"'})

    def _cdn(self, sha256: str) -> None:
        self._content(self.hub.blobs[sha256], {"ETag": f'"{sha256}"'})

    def _content(self, content: bytes, headers: dict[str, str]) -> None:
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if match is None:
            self._send(200, content, headers)
            return
        first, last = int(match[1]), min(int(match[2] or len(content)), len(content) - 1)
        if first > last:
            self._send(416, b"", {"Content-Range": f"bytes */{len(content)}"})
            return
        headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
        self._send(206, content[first : last + 1], headers)

    def _create(self) -> None:
        self._may_write()
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            self._send(409, json.dumps({"url": f"{self.hub.address}/{name}", "error": "exists"}).encode())
            return
        repository = Repository(private=asked.get("visibility") == "private" or bool(asked.get("private")), commits=[])
        self.hub.commit(repository, "initial commit", {".gitattributes": b""})
        self.hub.repositories[name] = repository
        self._json({"url": f"{self.hub.address}/{name}"})

    def _validate(self) -> None:
        self._json({"errors": [], "warnings": []})

    def _preupload(self, name: str, revision: str) -> None:
        self._may_write()
        head = self._repository(name).commits[-1]
        files = []
        for file in json.loads(self.body)["files"]:
            path, large = file["path"], is_large(file["path"], file["size"])
            content = head.files.get(path)
            known = hashlib.sha256(content).hexdigest() if large and content else git_name(content) if content else None
            mode = "lfs" if large else "regular"
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self._json({"files": files})

    def _batch(self, name: str) -> None:
        self._may_write()
        objects: list[dict[str, Any]] = []
        for wanted in json.loads(self.body)["objects"]:
            entry = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.blobs:
                entry["actions"] = {"upload": {"href": f"{self.hub.address}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(entry)
        self._json({"transfer": "basic", "objects": objects})

    def _put(self, sha256: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != sha256:
            raise _Refused(400, "BadDigest")
        self.hub.blobs[sha256] = self.body
        self._send(200, b"")

    def _commit(self, name: str, revision: str) -> None:
        self._may_write()
        repository = self._repository(name)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        parent = header.get("parentCommit")
        if parent is not None and parent != repository.commits[-1].sha:
            raise _Refused(412, "PreconditionFailed")
        sha = self.hub.commit(repository, header["summary"], applied(self.hub, repository.commits[-1], lines[1:]))
        self._json({"commitUrl": f"{self.hub.address}/{name}/commit/{sha}", "commitOid": sha})


_NAME, _REVISION = r"([\w.-]+/[\w.-]+)", r"([\w.-]+)"
_ROUTES: list[tuple[str, str, Callable[..., None]]] = [
    ("GET", "/api/models", HubHandler._models),
    ("POST", "/api/repos/create", HubHandler._create),
    ("POST", "/api/validate-yaml", HubHandler._validate),
    ("GET", f"/api/models/{_NAME}", HubHandler._info),
    ("GET", f"/api/models/{_NAME}/revision/{_REVISION}", HubHandler._info),
    ("GET", f"/api/models/{_NAME}/tree/{_REVISION}", HubHandler._tree),
    ("GET", f"/api/models/{_NAME}/commits/{_REVISION}", HubHandler._commits),
    ("POST", f"/api/models/{_NAME}/preupload/{_REVISION}", HubHandler._preupload),
    ("POST", f"/api/models/{_NAME}/commit/{_REVISION}", HubHandler._commit),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", HubHandler._batch),
    ("PUT", "/lfs/([0-9a-f]+)", HubHandler._put),
    ("HEAD|GET", "/cdn/([0-9a-f]+)", HubHandler._cdn),
    ("HEAD|GET", f"/{_NAME}/resolve/{_REVISION}/(.+)", HubHandler._resolve),
]
