"""The `prune.allocation` setting: its spellings, how it is written down, and what is refused."""

from pathlib import Path
from typing import Any

import pytest

from pipeline.allocation_config import AllocationConfig, OwlConfig
from pipeline.config import RunConfig, load_config, parse_config, resolved
from pipeline.errors import ConfigError


def parsed(allocation: Any) -> RunConfig:
    return parse_config({"model": "/m", "output": "/o", "prune": {"allocation": allocation}}, "the test")


def test_blocks_are_pruned_alike_unless_told_otherwise() -> None:
    assert parse_config({"model": "/m", "output": "/o"}, "the test").prune.allocation == AllocationConfig()
    assert not parsed("uniform").prune.allocation.needs_survey


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("owl", OwlConfig()),
        ({"owl": None}, OwlConfig()),
        ({"owl": {"spread": 0.04}}, OwlConfig(spread=0.04)),
        ({"owl": {"threshold": 3}}, OwlConfig(threshold=3)),
    ],
)
def test_owl_is_named_with_or_without_options(written: Any, meant: OwlConfig) -> None:
    allocation = parsed(written).prune.allocation
    assert allocation == AllocationConfig(owl=meant)
    assert allocation.needs_survey


@pytest.mark.parametrize("written", ["uniform", "owl", {"owl": {"spread": 0.1}}])
def test_a_resolved_configuration_means_the_same(written: Any) -> None:
    config = parsed(written)
    assert parse_config(resolved(config), "the run directory") == config
    assert resolved(parsed("uniform"))["prune"]["allocation"] == "uniform"


def test_options_can_be_overridden_from_the_command_line(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("model: /m\noutput: /o\n")
    assert load_config(path, ["prune.allocation.owl.spread=0.1"]).prune.allocation.owl == OwlConfig(spread=0.1)
    assert load_config(path, ["prune.allocation=owl"]).prune.allocation.owl == OwlConfig()


@pytest.mark.parametrize(
    ("written", "problem"),
    [
        ("fair", "prune.allocation: an allocation is uniform, owl or {owl: {options}}, not 'fair'"),
        (3, "prune.allocation: an allocation is uniform, owl or {owl: {options}}, not 3"),
        ({"oul": {}}, "prune.allocation.oul: unknown key; did you mean 'owl'?"),
        ({"owl": {"spred": 1}}, "prune.allocation.owl.spred: unknown key; did you mean 'spread'?"),
        (
            {"owl": {"spread": 0.6}},
            "prune.allocation.owl.spread: the spread is 0.6; twice as much lies between the block that loses most and "
            "the one that loses least, so it is above 0 and at most 0.5 (for no spread: allocation: uniform)",
        ),
        ({"owl": {"spread": 0}}, "prune.allocation.owl.spread: the spread is 0; twice as much"),
        ({"owl": {"threshold": 0}}, "prune.allocation.owl.threshold: Input should be greater than 0 (got 0)"),
    ],
)
def test_what_is_no_allocation_is_refused(written: Any, problem: str) -> None:
    with pytest.raises(ConfigError) as refused:
        parsed(written)
    assert problem in refused.value.message
