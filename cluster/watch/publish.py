"""Publishing a release: whole or not at all, and once, wherever the publisher was killed.

Each place carries the release's mark: a directory in its name, a repository in the title of the commit. Whoever is to
publish looks for the mark first, so what was published and not yet noted is found, and not published again.
"""

import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Protocol

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import RepositoryNotFoundError

from cluster.watch.config import PublishConfig
from cluster.watch.hub import hub_errors
from cluster.watch.lifecycle import Found
from pipeline.checkpoint import INDEX_NAME
from pipeline.durable import fsync_directory, write_atomically
from pipeline.errors import ConfigError, StorageError
from pipeline.sparsity import SemiStructured, Sparsity

CARD = "README.md"
_MARK = "secateur: "


class Publisher(Protocol):
    """A place for good models."""

    def find(self, found: Found) -> str:
        """Return where a release was published; empty where it was not."""

    def publish(self, found: Found, model: Path, card: str) -> str:
        """Put a model directory there with its card, unless it is there; return where. Raises SecateurError."""


def open_publisher(config: PublishConfig, sparsity: Sparsity, api: HfApi) -> Publisher:
    """Return the place that is configured."""
    if config.directory is not None:
        return DirectoryPublisher(config.directory)
    assert config.repository is not None
    return HubPublisher(config.repository, sparsity_label(sparsity), api, private=config.private)


def sparsity_label(sparsity: Sparsity) -> str:
    """Return a sparsity as part of a name: 50pct, 2of4."""
    if isinstance(sparsity, SemiStructured):
        return f"{sparsity.keep}of{sparsity.group}"
    return f"{100 * sparsity.ratio:g}pct"


class DirectoryPublisher:
    """Publishes to DIRECTORY/NAME/REVISION, which appears at once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def find(self, found: Found) -> str:
        """Return the directory, if it is there: it never is before it is whole."""
        place = self._place(found)
        return str(place) if place.is_dir() else ""

    def publish(self, found: Found, model: Path, card: str) -> str:
        """Copy (or link, within one file system) beside the place, then rename."""
        place = self._place(found)
        if place.is_dir():
            return str(place)
        try:
            place.parent.mkdir(parents=True, exist_ok=True)
            for leftover in place.parent.glob(f".{place.name}.*"):
                shutil.rmtree(leftover)
            aside = place.with_name(f".{place.name}.{secrets.token_hex(4)}")
            shutil.copytree(model, aside, copy_function=_link_or_copy)
            write_atomically(aside / CARD, card.encode())
            fsync_directory(aside)
            aside.rename(place)
            fsync_directory(place.parent)
        except OSError as error:
            raise StorageError(f"cannot publish to {place}: {error.strerror or error}") from error
        return str(place)

    def _place(self, found: Found) -> Path:
        return self._directory / found.name.replace("/", "--") / found.revision[:12]


class HubPublisher:
    """Publishes to a repository, each release as one commit."""

    def __init__(self, repository: str, sparsity: str, api: HfApi, *, private: bool) -> None:
        self._template, self._sparsity, self._api, self._private = repository, sparsity, api, private

    def find(self, found: Found) -> str:
        """Return the commit whose title is the release's."""
        commit = self._commits(found).get(_title(found))
        return f"{self._name(found)}@{commit}" if commit else ""

    def publish(self, found: Found, model: Path, card: str) -> str:
        """Make the repository if need be, and one commit of all files, on top of the one that was looked at.

        The commit names its parent, so the hub refuses it where somebody else has committed meanwhile. Raises
        ConfigError where the repository is that of another organisation's model.
        """
        name = self._name(found)
        with hub_errors(f"making the repository {name}"):
            self._api.create_repo(name, private=self._private, exist_ok=True)
        with hub_errors(f"asking what is in {name}"):
            info = self._api.model_info(name)  # before looking for the commit: what comes after has another parent
        commits = self._commits(found)
        if _title(found) in commits:
            return f"{name}@{commits[_title(found)]}"
        others = [title for title in commits if title.startswith(_MARK) and not title.startswith(_mark(found.name))]
        if others:
            raise ConfigError(
                f"{name} holds another model of the same name ({others[0]}), which this one would take the place of; "
                "watch them by two files whose `publish.repository` differ"
            )
        files = {path.relative_to(model).as_posix(): path for path in sorted(model.rglob("*")) if path.is_file()}
        old = [file.rfilename for file in info.siblings or [] if _is_weights(file.rfilename)]
        with hub_errors(f"publishing {found.name} to {name}"):
            commit = self._api.create_commit(
                name,
                [
                    *(CommitOperationDelete(file, is_folder=False) for file in old if file not in files),
                    *(CommitOperationAdd(file, path) for file, path in files.items()),
                    CommitOperationAdd(CARD, card.encode()),
                ],
                commit_message=_title(found),
                parent_commit=info.sha,
            )
        return f"{name}@{commit.oid}"

    def _commits(self, found: Found) -> dict[str, str]:
        """Return the newest commit of each title; none where there is no repository."""
        name = self._name(found)
        with hub_errors(f"looking for {found.name} in {name}"):
            try:
                return {commit.title: commit.commit_id for commit in reversed(self._api.list_repo_commits(name))}
            except RepositoryNotFoundError:
                return {}

    def _name(self, found: Found) -> str:
        return self._template.format(name=found.name.rpartition("/")[2], sparsity=self._sparsity)


def _title(found: Found) -> str:
    return f"{_mark(found.name)}{found.revision}"


def _mark(name: str) -> str:
    return f"{_MARK}{name}@"


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors") or name == INDEX_NAME


def _link_or_copy(source: str, target: str) -> None:
    with suppress(OSError):  # another file system, or one without links
        os.link(source, target)
        return
    shutil.copyfile(source, target)
    with Path(target).open("rb") as file:
        os.fsync(file.fileno())
