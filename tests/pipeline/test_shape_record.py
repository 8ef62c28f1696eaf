"""What is measured to choose a shape is kept at once, and what an earlier session chose is held against it."""

import json
from pathlib import Path

import pytest

from pipeline.errors import ConfigChanged, RunDirectoryError
from pipeline.shape import Shape
from pipeline.shape_record import ShapeRecord, listed, num_kept

SETTINGS = {"step": "shortgpt", "blocks": 1}


def never() -> list[float]:
    raise AssertionError("measured twice")


def test_every_measurement_is_durable_as_soon_as_it_is_made(tmp_path: Path) -> None:
    record = ShapeRecord(tmp_path, SETTINGS)
    third = 1 / 3
    assert record.measure(listed([]), lambda: [third, 2.0]) == [third, 2.0]
    assert record.measure(listed({11, 4}), lambda: [0.1]) == [0.1]
    assert list(json.loads((tmp_path / "shape.json").read_text())["measured"]) == ["", "4 11"]
    again = ShapeRecord(tmp_path, SETTINGS)
    assert again.measure(listed([]), never) == [third, 2.0]
    assert again.measure(listed({4, 11}), never) == [0.1]
    assert num_kept(tmp_path) is None


def test_a_choice_is_kept_and_agrees_with_itself(tmp_path: Path) -> None:
    shape = Shape(kept=(0, 2))
    ShapeRecord(tmp_path, SETTINGS).settle(shape, [1])
    assert num_kept(tmp_path) == 2
    ShapeRecord(tmp_path, SETTINGS).settle(shape, [1])
    with pytest.raises(RunDirectoryError, match=r"keeps the blocks \[0, 2\], and its own figures say \[0, 1\]: it was"):
        ShapeRecord(tmp_path, SETTINGS).settle(Shape(kept=(0, 1)), [2])


def test_other_settings_are_refused_by_name(tmp_path: Path) -> None:
    ShapeRecord(tmp_path, SETTINGS).settle(Shape(kept=(0,)), [])
    with pytest.raises(ConfigChanged, match=r"shape\.json was found with other settings, .*: blocks 1, now 2; go back"):
        ShapeRecord(tmp_path, {**SETTINGS, "blocks": 2})


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"settings": {}, "measured": {"": "x"}}', '{"settings": {}}'])
def test_what_no_run_has_written_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "shape.json").write_text(content)
    with pytest.raises(RunDirectoryError, match=r"shape\.json is not what a run has written .*; restore it, or remove"):
        ShapeRecord(tmp_path, SETTINGS)
    assert num_kept(tmp_path) is None
