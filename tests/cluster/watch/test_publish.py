"""Publishing: whole or not at all, once, to a directory and to the hub."""

import os
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from cluster.watch.config import PublishConfig
from cluster.watch.publish import DirectoryPublisher, HubPublisher, open_publisher, sparsity_label
from pipeline.errors import ConfigError, HubError, StorageError
from pipeline.sparsity import parse_sparsity
from tests.cluster.watch.releases import found
from tests.hub_server import HubServer, Trouble
from tests.integration.support import digests

CARD = "---\nlicense: mit\n---\n# a card\n"


@pytest.fixture
def publisher(api: HfApi) -> HubPublisher:
    return HubPublisher("me/{name}-{sparsity}", "50pct", api, private=True)


def names(files: dict[str, str]) -> set[str]:
    return set(files)


def test_a_directory_appears_with_all_files_and_the_card(tiny: Path, tmp_path: Path) -> None:
    publisher = DirectoryPublisher(tmp_path / "out")
    assert publisher.find(found()) == ""
    place = Path(publisher.publish(found(), tiny, CARD))
    assert place == tmp_path / "out" / "acme--tiny" / ("1" * 12) == Path(publisher.find(found()))
    there = digests(place)
    assert (place / "README.md").read_text() == CARD
    assert {name: there[name] for name in names(digests(tiny))} == digests(tiny)


def test_a_directory_that_is_there_is_left_as_it_is(tiny: Path, tmp_path: Path) -> None:
    publisher = DirectoryPublisher(tmp_path)
    place = Path(publisher.publish(found(), tiny, CARD))
    before = digests(place)
    assert publisher.publish(found(), tiny, "another card") == str(place)
    assert digests(place) == before


def test_what_a_killed_publisher_left_behind_is_cleared_away(tiny: Path, tmp_path: Path) -> None:
    aside = tmp_path / "acme--tiny" / f".{'1' * 12}.0badcafe"
    aside.mkdir(parents=True)
    (aside / "half").write_bytes(b"a half")
    place = Path(DirectoryPublisher(tmp_path).publish(found(), tiny, CARD))
    assert list(place.parent.iterdir()) == [place]


def test_files_of_another_file_system_are_copied(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    place = Path(DirectoryPublisher(tmp_path).publish(found(), tiny, CARD))
    assert {name: digests(place)[name] for name in digests(tiny)} == digests(tiny)


def test_a_place_that_cannot_be_written_is_named(tiny: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match=f"cannot publish to {tmp_path}/file/acme--tiny/1{{12}}: Not a directory"):
        DirectoryPublisher(tmp_path / "file").publish(found(), tiny, CARD)


def test_a_repository_is_made_private_and_gets_one_commit(publisher: HubPublisher, hub: HubServer, tiny: Path) -> None:
    assert publisher.find(found()) == ""
    location = publisher.publish(found(), tiny, CARD)
    repository = hub.repositories["me/tiny-50pct"]
    assert repository.private
    assert location == f"me/tiny-50pct@{repository.commits[-1].sha}" == publisher.find(found())
    assert repository.commits[-1].title == f"secateur: acme/tiny@{'1' * 40}"
    files = {path.name: path.read_bytes() for path in tiny.iterdir()}
    assert repository.commits[-1].files == {**files, "README.md": CARD.encode(), ".gitattributes": b""}


def test_a_release_is_committed_once_however_often_it_is_published(
    publisher: HubPublisher, hub: HubServer, tiny: Path
) -> None:
    first = publisher.publish(found(), tiny, CARD)
    publisher.publish(found(revision="2" * 40), tiny, "another card")
    assert publisher.publish(found(), tiny, CARD) == first
    assert [title[-1] for title in hub.titles("me/tiny-50pct")] == ["1", "2"]


def test_shards_of_the_release_before_are_taken_away(publisher: HubPublisher, hub: HubServer, tiny: Path) -> None:
    publisher.publish(found(), tiny, CARD)
    head = hub.files_at_head("me/tiny-50pct")
    hub.commit(hub.repositories["me/tiny-50pct"], "by hand", {**head, "model-00009-of-00009.safetensors": b"old"})
    publisher.publish(found(revision="2" * 40), tiny, "another card")
    assert "model-00009-of-00009.safetensors" not in hub.files_at_head("me/tiny-50pct")


def test_a_commit_whose_answer_was_lost_is_found_and_not_made_again(
    publisher: HubPublisher, hub: HubServer, tiny: Path
) -> None:
    hub.trouble = Trouble(seed=0, share=1.0, kinds=("lost",), only="POST .*/commit/")
    with pytest.raises(HubError, match="the hub failed us while publishing acme/tiny to me/tiny-50pct"):
        publisher.publish(found(), tiny, CARD)
    hub.trouble = None
    assert publisher.publish(found(), tiny, CARD).startswith("me/tiny-50pct@")
    assert len(hub.titles("me/tiny-50pct")) == 1


def test_a_commit_on_top_of_somebody_elses_is_refused_and_tried_again(
    publisher: HubPublisher, hub: HubServer, tiny: Path, api: HfApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    publisher.publish(found(), tiny, CARD)
    repository = hub.repositories["me/tiny-50pct"]
    original = HubPublisher._commits

    def look_early(self: HubPublisher, release: object) -> dict[str, str]:
        there = original(self, release)  # type: ignore[arg-type]
        hub.commit(repository, "by hand", repository.commits[-1].files)
        return there

    monkeypatch.setattr(HubPublisher, "_commits", look_early)
    with pytest.raises(HubError, match="412"):
        publisher.publish(found(revision="2" * 40), tiny, "another card")
    assert len(hub.titles("me/tiny-50pct")) == 1
    monkeypatch.setattr(HubPublisher, "_commits", original)
    publisher.publish(found(revision="2" * 40), tiny, "another card")
    assert len(hub.titles("me/tiny-50pct")) == 2


def test_another_organisations_model_of_the_same_name_does_not_take_its_place(
    publisher: HubPublisher, hub: HubServer, tiny: Path
) -> None:
    publisher.publish(found(), tiny, CARD)
    with pytest.raises(
        ConfigError, match=r"me/tiny-50pct holds another model of the same name \(secateur: acme/tiny@1"
    ):
        publisher.publish(found(name="other/tiny"), tiny, CARD)
    assert len(hub.titles("me/tiny-50pct")) == 1


def test_with_every_third_request_failing_a_commit_is_whole_and_there_is_one(
    publisher: HubPublisher, hub: HubServer, tiny: Path
) -> None:
    for seed in range(5):
        revision = f"{seed + 1}" * 40
        hub.trouble = Trouble(seed=seed)
        for _ in range(100):
            try:
                publisher.publish(found(revision=revision), tiny, f"card {seed}")
                break
            except HubError:
                continue
        assert [title[-1] for title in hub.titles("me/tiny-50pct")].count(str(seed + 1)) == 1
        files = hub.files_at_head("me/tiny-50pct")
        assert names({name: "" for name in files}) >= {path.name for path in tiny.iterdir()}


@pytest.mark.parametrize(("sparsity", "label"), [(0.5, "50pct"), (0.333, "33.3pct"), ("2:4", "2of4")])
def test_a_sparsity_can_stand_in_a_name(sparsity: float | str, label: str) -> None:
    assert sparsity_label(parse_sparsity(sparsity)) == label


def test_the_place_is_the_configured_one(api: HfApi, tmp_path: Path) -> None:
    half = parse_sparsity(0.5)
    assert isinstance(open_publisher(PublishConfig(directory=tmp_path), half, api), DirectoryPublisher)
    assert isinstance(open_publisher(PublishConfig(repository="me/{name}"), half, api), HubPublisher)
