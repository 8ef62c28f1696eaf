"""The hub through its own client: what a revision holds, files held against their hashes, nothing else fetched."""

import json
import os
import shutil
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from cluster.watch import hub as access
from pipeline.checkpoint import Checkpoint
from pipeline.errors import CheckpointError, HubError
from tests.cluster.watch.conftest import TOKEN
from tests.hub_server import HubServer, Trouble
from tests.integration.support import digests


@pytest.fixture
def model(tiny: Path, tmp_path: Path) -> Path:
    """A copy of the tiny checkpoint, with files beside it that are not to be fetched."""
    copy = tmp_path / "model"
    shutil.copytree(tiny, copy)
    for name in ("pytorch_model.bin", "modeling_tiny.py", "consolidated.safetensors", "picture.png"):
        (copy / name).write_bytes(b"not wanted")
    return copy


def test_an_organisations_models_come_with_their_commits_over_all_pages(hub: HubServer, api: HfApi, tiny: Path) -> None:
    commits = {name: hub.push(name, tiny) for name in ("acme/a", "acme/b", "acme/c", "other/d")}
    assert dict(access.models_of(api, "acme")) == {name: commits[name] for name in ("acme/a", "acme/b", "acme/c")}


def test_a_release_is_described_at_its_commit(hub: HubServer, api: HfApi, model: Path) -> None:
    commit = hub.push("acme/tiny", model, licence="mit")
    hub.push("acme/tiny", model)
    found = access.describe(api, "acme/tiny", commit)
    weights = sum(path.stat().st_size for path in model.glob("model*.safetensors"))
    assert (found.revision, found.num_bytes, found.disk_bytes) == (commit, weights, 2 * weights)
    assert found.facts["licence"] == "mit"
    assert found.facts["architectures"] == ["LlamaForCausalLM"]
    assert json.loads(json.dumps(found.facts)) == found.facts


def test_only_the_models_own_weights_and_what_describes_them_are_fetched(
    hub: HubServer, api: HfApi, model: Path, tmp_path: Path
) -> None:
    found = access.describe(api, "acme/tiny", hub.push("acme/tiny", model))
    access.fetch_described(found, tmp_path / "source")
    access.fetch_weights(found, tmp_path / "source")
    wanted = {path.name for path in model.glob("model-*.safetensors")} | {path.name for path in model.glob("*.json")}
    assert hub.fetched() == wanted
    copied = {name: digest for name, digest in digests(tmp_path / "source").items() if not name.startswith(".cache")}
    assert copied == {name: digest for name, digest in digests(model).items() if name in wanted}


def test_the_token_goes_to_the_hub_and_to_nobody_else(hub: HubServer, api: HfApi, model: Path, tmp_path: Path) -> None:
    found = access.describe(api, "acme/tiny", hub.push("acme/tiny", model))
    access.fetch_weights(found, _described(found, tmp_path))
    told = {request.authorization for request in hub.requests if not request.path.startswith("/cdn/")}
    assert told == {f"Bearer {TOKEN}"}
    assert {request.authorization for request in hub.requests if request.path.startswith("/cdn/")} == {None}


def _described(found: access.Found, tmp_path: Path) -> Path:
    access.fetch_described(found, tmp_path / "source")
    return tmp_path / "source"


def test_a_shell_has_every_header_and_no_weight(hub: HubServer, api: HfApi, model: Path, tmp_path: Path) -> None:
    found = access.describe(api, "acme/tiny", hub.push("acme/tiny", model))
    source = _described(found, tmp_path)
    access.write_shell(api, found, source, tmp_path / "shell")
    shell, whole = Checkpoint.open(tmp_path / "shell"), Checkpoint.open(_own_weights(model, tmp_path))
    assert shell.tensors.keys() == whole.tensors.keys()
    for name, entry in whole.tensors.items():
        assert (shell.tensors[name].shape, shell.tensors[name].dtype) == (entry.shape, entry.dtype)
    assert {request.range for request in hub.requests if request.path.startswith("/cdn/")} == {"bytes=0-100000"}
    assert not list(source.glob("*.safetensors"))


def _own_weights(model: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "own"
    shutil.copytree(model, copy, ignore=shutil.ignore_patterns("consolidated*"))
    return copy


def test_a_download_that_breaks_off_goes_on_where_it_was(
    hub: HubServer, api: HfApi, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1_000)
    found = access.describe(api, "acme/tiny", hub.push("acme/tiny", model))
    source = _described(found, tmp_path)
    hub.trouble = Trouble(seed=0, share=0.6, kinds=("cut",), only="GET /cdn/")
    for _ in range(20):
        try:
            access.fetch_weights(found, source)
            break
        except HubError:
            continue
    assert hub.trouble.suffered
    assert digests(source)["model-00001-of-00007.safetensors"] == digests(model)["model-00001-of-00007.safetensors"]
    ranges = {request.range for request in hub.requests if request.path.startswith("/cdn/") and request.range}
    assert any(not asked.startswith("bytes=0-") for asked in ranges)


def test_a_hub_that_falls_silent_is_asked_again(hub: HubServer, api: HfApi, model: Path, tmp_path: Path) -> None:
    found = access.describe(api, "acme/tiny", hub.push("acme/tiny", model))
    source = _described(found, tmp_path)
    hub.trouble = Trouble(seed=3, kinds=("hang",), only="GET /cdn/", hang_seconds=1.5)  # the client waits for 1 s
    access.fetch_weights(found, source)
    assert hub.trouble.suffered
    assert digests(source)["model-00001-of-00007.safetensors"] == digests(model)["model-00001-of-00007.safetensors"]


def test_a_file_that_arrives_damaged_is_fetched_again(hub: HubServer, api: HfApi, model: Path, tmp_path: Path) -> None:
    commit = hub.push("acme/tiny", model)
    found = access.describe(api, "acme/tiny", commit)
    source = _described(found, tmp_path)
    sha256 = found.facts["files"]["model-00001-of-00007.safetensors"]["sha256"]
    content = hub.blobs[sha256]
    served = hub.repositories["acme/tiny"].commits[0].files
    hub.blobs[sha256] = content[:-1] + bytes([content[-1] ^ 1])
    with pytest.raises(HubError, match=r"model-00001-of-00007.safetensors of acme/tiny arrived damaged: its sha256"):
        access.fetch_weights(found, source)
    hub.blobs[sha256] = content
    access.fetch_weights(found, source)
    assert (source / "model-00001-of-00007.safetensors").read_bytes() == served["model-00001-of-00007.safetensors"]


def test_a_small_file_is_held_against_its_name_in_git(hub: HubServer, api: HfApi, model: Path, tmp_path: Path) -> None:
    found = access.describe(api, "acme/tiny", hub.push("acme/tiny", model))
    files = dict(found.facts["files"])
    files["config.json"] = {**files["config.json"], "git": "0" * 40}
    with pytest.raises(HubError, match=r"config\.json of acme/tiny arrived damaged: its git hash is another"):
        access.fetch_described(
            access.Found(name="acme/tiny", revision=found.revision, origin="hub", num_bytes=1, disk_bytes=1,
                         facts={"files": files}), tmp_path / "source",
        )  # fmt: skip


@pytest.mark.parametrize(
    ("content", "fact"),
    [(b"{", "is no index of tensors"), (b"{}", "is no index of tensors"), (None, "has 7 safetensors files and no")],
)
def test_an_index_that_says_nothing_is_refused(
    content: bytes | None, fact: str, hub: HubServer, api: HfApi, tiny: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny, copy)
    index = copy / "model.safetensors.index.json"
    index.unlink()
    if content is not None:
        index.write_bytes(content)
    found = access.describe(api, "acme/tiny", hub.push("acme/tiny", copy))
    source = _described(found, tmp_path)
    with pytest.raises(CheckpointError, match=fact):
        access.weight_files(found, source)


def test_an_index_that_names_files_which_are_not_there_is_refused(
    hub: HubServer, api: HfApi, tiny: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny, copy)
    (copy / "model-00001-of-00007.safetensors").unlink()
    found = access.describe(api, "acme/tiny", hub.push("acme/tiny", copy))
    with pytest.raises(CheckpointError, match="lacks 1 shards that its index names: model-00001"):
        access.weight_files(found, _described(found, tmp_path))


def test_a_corrupt_header_is_the_releases_fault_not_the_networks(
    hub: HubServer, api: HfApi, tiny: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(tiny, copy)
    shard = copy / "model-00002-of-00007.safetensors"
    shard.write_bytes(shard.read_bytes()[:8] + b"#" * 200)
    found = access.describe(api, "acme/tiny", hub.push("acme/tiny", copy))
    with pytest.raises(CheckpointError, match=r"model-00002-of-00007.safetensors of acme/tiny is no safetensors file"):
        access.write_shell(api, found, _described(found, tmp_path), tmp_path / "shell")


def test_what_the_hub_refuses_is_said_without_the_token(hub: HubServer, api: HfApi) -> None:
    with pytest.raises(HubError, match="the hub failed us while asking for acme/none: RepositoryNotFoundError") as none:
        access.head_of(api, "acme/none", "main")
    assert TOKEN not in none.value.message


def test_a_token_is_taken_out_of_any_message(hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    assert access.redacted(f"Bearer {TOKEN}, or hf_AnotherOne123") == "Bearer (token), or (token)"
    monkeypatch.setenv("HF_TOKEN", "an old kind of token")
    assert access.redacted("sent an old kind of token") == "sent (token)"


def test_a_config_that_its_owner_has_written_amiss_is_the_hubs_error_and_no_crash(
    hub: HubServer, api: HfApi, tiny: Path, tmp_path: Path
) -> None:
    copy = Path(shutil.copytree(tiny, tmp_path / "amiss"))
    (copy / "config.json").write_text('{"architectures": 5}')
    with pytest.raises(HubError, match="while asking what acme/tiny holds: TypeError"):
        access.describe(api, "acme/tiny", hub.push("acme/tiny", copy))


def test_a_commit_that_is_a_path_is_refused(hub: HubServer, api: HfApi) -> None:
    with pytest.raises(HubError, match=r"the hub calls '\.\./\.\./etc' a commit of acme/tiny, which is none"):
        access.describe(api, "acme/tiny", "../../etc")
    assert hub.requests == []


def test_what_was_fetched_is_on_the_disk_before_that_is_said(
    hub: HubServer, api: HfApi, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = access.describe(api, "acme/tiny", hub.push("acme/tiny", model))
    synced: set[int] = set()
    monkeypatch.setattr(os, "fsync", lambda fd: synced.add(os.fstat(fd).st_ino))
    access.fetch_weights(found, _described(found, tmp_path))
    source = tmp_path / "source"
    shards = list(source.glob("*.safetensors"))
    assert shards
    assert {path.stat().st_ino for path in [source, *shards]} <= synced
