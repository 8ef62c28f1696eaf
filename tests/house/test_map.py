"""What the README and the example configs say is there, is there: the map, the commands, the settings."""

import re
from pathlib import Path
from textwrap import dedent

import pytest
from typer.main import get_command

from cluster.cli import app
from cluster.watch.config import WatchConfig, load_watch_config
from pipeline.config import RunConfig, load_config

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "configs" / "manifests"
"""Not configurations of a run, but what other schedulers take: see test_manifests.py."""

CONFIGS = sorted(path.relative_to(ROOT) for path in (ROOT / "configs").rglob("*.y*ml") if MANIFESTS not in path.parents)


def code_blocks() -> list[str]:
    """The README's fenced blocks, without their fences."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [dedent(block) for block in re.findall(r"^ *```[^\n]*\n(.*?)^ *```", text, re.DOTALL | re.MULTILINE)]


def read_map(block: str) -> dict[str, str]:
    """Each file and directory of a drawn tree with its caption; depth is told by indentation.

    pipeline/              a directory, with or without a caption
      errors.py            a file
      methods/             a directory in it
    cluster/
    └── cli.py console.py  branches may be drawn, and one line may name several files
    """
    captions: dict[str, str] = {}
    above: list[tuple[int, str]] = []
    for line in filter(str.strip, block.splitlines()):
        depth = len(line) - len(line.lstrip(" │├└─"))
        above = [entry for entry in above if entry[0] < depth]
        directory = above[-1][1] if above else ""
        names, caption = split_names(line[depth:])
        captions |= {directory + name: caption for name in names}
        above += [(depth, directory + name) for name in names if name.endswith("/")]
    return captions


def split_names(entry: str) -> tuple[list[str], str]:
    """`a.py b.py   what they do` -> `[a.py, b.py]`, `what they do`."""
    words = entry.split()
    count = next((i for i, word in enumerate(words) if not word.endswith((".py", "/"))), len(words))
    return words[:count], " ".join(words[count:])


def mentioned_commands() -> set[str]:
    """What follows `secateur` where a command begins, in the README's code blocks."""
    pattern = re.compile(r"(?:^|&&|;|\|)[ \t]*(?:\$ )?secateur[ \t]+([a-z][a-z-]*)", re.MULTILINE)
    return {name for block in code_blocks() for name in pattern.findall(block)}


def commands() -> set[str]:
    group = get_command(app)
    return set(group.list_commands(group.make_context("secateur", [], resilient_parsing=True)))


def rooms() -> set[str]:
    """What the map has to show: the modules of the two packages, and the packages within them as a whole."""
    paths = [path for top in ("pipeline", "cluster") for path in (ROOT / top).iterdir()]
    modules = {path.relative_to(ROOT).as_posix() for path in paths if path.suffix == ".py"}
    packages = {path.relative_to(ROOT).as_posix() + "/" for path in paths if (path / "__init__.py").exists()}
    return {name for name in modules | packages if not name.endswith("/__init__.py")}


def test_a_map_is_read_as_it_is_drawn() -> None:
    assert read_map((read_map.__doc__ or "").partition("\n\n")[2]) == {
        "pipeline/": "a directory, with or without a caption",
        "pipeline/errors.py": "a file",
        "pipeline/methods/": "a directory in it",
        "cluster/": "",
        "cluster/cli.py": "branches may be drawn, and one line may name several files",
        "cluster/console.py": "branches may be drawn, and one line may name several files",
    }


def test_the_map_of_the_house_names_every_file_and_says_what_it_is_for() -> None:
    (block,) = [block for block in code_blocks() if block.startswith("pipeline/")]
    drawn = {name: caption for name, caption in read_map(block).items() if re.match(r"(pipeline|cluster)/.", name)}
    assert drawn.keys() == rooms()
    assert [name for name, caption in drawn.items() if not caption] == []


def test_the_readme_names_commands_that_exist() -> None:
    mentioned = mentioned_commands()
    assert len(mentioned) >= 3
    assert mentioned - commands() == set()


def test_there_are_configs_to_start_from() -> None:
    assert len(CONFIGS) >= 3


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_a_config_loads(path: Path) -> None:
    if path.parent.name == "watch":
        assert isinstance(load_watch_config(ROOT / path), WatchConfig)
    else:
        assert isinstance(load_config(ROOT / path), RunConfig)


@pytest.mark.parametrize("path", CONFIGS, ids=str)
def test_a_config_opens_with_its_purpose_and_the_exact_command(path: Path) -> None:
    opening = re.match(r"(?:#.*\n)*", (ROOT / path).read_text(encoding="utf-8"))
    assert opening is not None
    lines = [line.lstrip("# ").rstrip() for line in opening[0].splitlines()]
    called = [re.findall(r"secateur ([a-z-]+)", line) for line in lines if str(path) in line]
    assert any(called), f"no line of the opening comment runs {path}"
    assert {name for names in called for name in names} <= commands()
    assert any(len(line.split()) >= 4 and "secateur " not in line for line in lines), "no line tells its purpose"
