"""The `memory` section: sizes with units, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.config import load_config, parse_config, resolved
from pipeline.errors import ConfigError
from pipeline.memory_config import MemoryConfig


def test_without_a_section_there_are_no_ceilings() -> None:
    memory = MemoryConfig()
    assert (memory.device, memory.host, memory.spool_limit, memory.spool) == (None, None, None, None)
    assert (memory.activations, memory.io) == ("auto", "auto")


def test_sizes_are_read_with_their_units_from_a_file_and_from_overrides(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: /m\noutput: /o\nmemory: {device: 20 GiB, host: 1000}\n")
    memory = load_config(path, ["memory.host=6GiB", "memory.spool_limit=500 MB"]).memory
    assert (memory.device, memory.host, memory.spool_limit) == (20 << 30, 6 << 30, 500_000_000)


def test_the_spool_is_the_same_wherever_a_run_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    config = parse_config({"model": "/m", "output": "/o", "memory": {"spool": "s"}}, "the test")
    assert resolved(config)["memory"] == {"spool": f"{tmp_path}/s", "activations": "auto", "io": "auto"}


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"spol": "/s"}, "memory.spol: unknown key; did you mean 'spool'?"),
        ({"host": 0}, "memory.host: Input should be greater than 0 (got 0)"),
        ({"device": "20 GiBB"}, "memory.device: could not interpret byte unit: GiBB (got '20 GiBB')"),
        ({"activations": "ram"}, "memory.activations"),
        ({"io": "mmap"}, "memory.io: Input should be 'auto', 'aio' or 'threads' (got 'mmap')"),
    ],
)
def test_each_problem_is_told_with_its_key_path(section: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parse_config({"model": "/m", "output": "/o", "memory": section}, "the test")
    assert refused.value.message.splitlines()[1].strip().startswith(problem)


@pytest.mark.parametrize(
    ("section", "is_managed"),
    [({}, False), ({"activations": "disk"}, False), ({"host": "6GiB"}, True), ({"spool": "/s"}, True)],
)
def test_memory_is_managed_where_more_is_said_than_a_tier(section: dict[str, Any], is_managed: bool) -> None:
    assert MemoryConfig.model_validate(section).is_managed == is_managed
