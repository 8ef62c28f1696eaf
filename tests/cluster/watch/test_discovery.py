"""Models in directories: what they are called, when they count as new, and when they are left to settle."""

import os
from pathlib import Path

import pytest

from cluster.watch.discovery import in_directory, look_at
from tests.cluster.watch.watching import copied

NOW = 2_000_000_000.0


def dated(directory: Path, seconds: float) -> Path:
    for path in directory.iterdir():
        os.utime(path, (seconds, seconds))
    return directory


def test_each_subdirectory_with_a_config_is_a_model(tiny: Path, tmp_path: Path) -> None:
    dated(copied(tiny, tmp_path / "b"), NOW - 100)
    dated(copied(tiny, tmp_path / "a"), NOW - 100)
    (tmp_path / "no-model").mkdir()
    (tmp_path / "file").write_bytes(b"")
    shown = list(in_directory(tmp_path, 60, NOW, []))
    assert [found.name for found in shown] == ["a", "b"]
    assert shown[0].origin == str(tmp_path / "a")
    assert shown[0].num_bytes == sum(path.stat().st_size for path in tiny.glob("*.safetensors")) == shown[0].disk_bytes
    assert shown[0].facts == {"licence": None, "architectures": ["LlamaForCausalLM"], "changed": NOW - 100}


def test_a_model_that_has_just_changed_is_left_to_settle(tiny: Path, tmp_path: Path) -> None:
    model = dated(copied(tiny, tmp_path / "a"), NOW - 59)
    assert list(in_directory(tmp_path, 60, NOW, [])) == []
    assert len(list(in_directory(tmp_path, 60, NOW + 1, []))) == 1
    dated(model, NOW + 86_400)  # by a clock that was set back since
    assert len(list(in_directory(tmp_path, 60, NOW, []))) == 1


def test_a_revision_changes_with_any_file_and_with_nothing_else(tiny: Path, tmp_path: Path) -> None:
    model = dated(copied(tiny, tmp_path / "a"), NOW)
    first = look_at(model)[0].revision
    assert look_at(model)[0].revision == first
    shard = sorted(model.glob("*.safetensors"))[0]
    os.utime(shard, (NOW, NOW + 1))
    second = look_at(model)[0].revision
    shard.write_bytes(shard.read_bytes() + b"x")
    os.utime(shard, (NOW, NOW + 1))
    assert len({first, second, look_at(model)[0].revision}) == 3


def test_a_licence_is_read_from_the_card_and_a_broken_config_has_no_architecture(tiny: Path, tmp_path: Path) -> None:
    model = copied(tiny, tmp_path / "a")
    (model / "README.md").write_text("---\nlicense: mit\n---\n# a model\n")
    assert look_at(model)[0].facts["licence"] == "mit"
    (model / "README.md").write_text("---\nlicense: [\n---\n")
    (model / "config.json").write_text("{")
    facts = look_at(model)[0].facts
    assert (facts["licence"], facts["architectures"]) == (None, [])


def test_a_card_that_nests_without_end_has_no_licence(tiny: Path, tmp_path: Path) -> None:
    model = copied(tiny, tmp_path / "a")
    (model / "README.md").write_text(f"---\nlicense: {'[' * 5_000}\n---\n")
    assert look_at(model)[0].facts["licence"] is None


def test_what_cannot_be_read_or_named_is_told_and_does_not_stop_the_others(
    tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dated(copied(tiny, tmp_path / "z"), NOW - 100)
    os.mkdir(os.fsencode(tmp_path) + b"/caf\xe9")
    (tmp_path / "lost+found").mkdir()
    is_file = Path.is_file

    def refuse(path: Path) -> bool:  # as the system does where the watcher is not root
        if path.parent.name == "lost+found":
            raise PermissionError(13, "Permission denied", str(path))
        return is_file(path)

    monkeypatch.setattr(Path, "is_file", refuse)
    problems: list[str] = []
    assert [found.name for found in in_directory(tmp_path, 60, NOW, problems)] == ["z"]
    assert len(problems) == 2
    assert "caf\\udce9' is passed over: 'utf-8' codec can't encode" in problems[0]
    assert "lost+found' is passed over: [Errno 13] Permission denied" in problems[1]
