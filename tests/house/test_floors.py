"""Imports point downward only: each module stands on a floor, and leans on its own floor and those below."""

import ast
import re
import subprocess
import sys
import tomllib
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

FLOORS = {
    0: "pipeline: allocation_config anatomy attention block_widths budget cluster_config devices durable errors header "
    "heap human lazy_weights memory_config meter numerics peers progress records shard_names sparsity stream_names",
    1: "pipeline: allocation head_config methods sequence_norms shards statistics",
    2: "pipeline: calibration checkpoint config hub ledger own_text paging recipe shape shape_record sharing shelf "
    "sources",
    3: "pipeline: activations head_count linears narrower order silencing skeleton splits width zeros",
    4: "pipeline: assemble begun block_writer cutting importance inputs memory outliers planning prunable prune_block "
    "remains sampler self_calibration stage stream survey transaction uneven weights workbench",
    5: "pipeline: allocate choose_blocks choose_shape demo_model doctor evaluate greedy_search job looking report run "
    "try_splits verify without_each",
    6: "cluster: cli_shared console credentials job_shape jobs messages package topology",
    7: "cluster: cost_model depot expectation failures follow forecast replicas schedule shelves state submit trace "
    "watch worker",
    8: "cluster: choice coordinator policy",
    9: "cluster: actors handoff job_client metrics ray_cluster ray_runtime",
    10: "cluster: job run",
    11: "cluster: cli cli_jobs cli_watch",
    12: "cluster: entry",
}
"""A module may import from its own floor, without a cycle, and from the floors with smaller numbers.

A package on a floor stands there with everything in it.
"""

OWNED_ALONE = ("deepspeed", "datasets", "gguf", "prodigyopt", "accelerate", "apscheduler", "lm_eval", "jinja2")
"""Heavy libraries: each is imported by one file, the one that knows how it behaves."""

KNOW_RAY = ("actors", "handoff", "job_client", "metrics", "ray_cluster", "ray_runtime")
"""The files of `cluster` that may import ray; what decides is not among them."""

PACKAGES_WITH_CODE = {Path("pipeline/methods/__init__.py")}
"""The table of methods; every other `__init__.py` is a docstring."""


def _floor_of_listed() -> dict[str, int]:
    listed: dict[str, int] = {}
    for floor, line in FLOORS.items():
        package, names = line.split(": ")
        listed |= {f"{package}.{name}": floor for name in names.split()}
    return listed


FLOOR_OF = _floor_of_listed()


def source_files() -> list[Path]:
    """Every file of the two packages, relative to the root."""
    files = [path for package in ("pipeline", "cluster") for path in (ROOT / package).rglob("*.py")]
    return sorted(path.relative_to(ROOT) for path in files)


def module_name(path: Path) -> str:
    """The dotted name; a package goes by its directory."""
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in source_files()}


def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"), filename=str(path))


def imported_names(path: Path) -> set[str]:
    """All that a file imports, anywhere in it: `from a import b` gives `a.b`, whatever `b` is."""
    names = set()
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            package = path.parent.parts
            base = ".".join(package[: len(package) + 1 - node.level]) if node.level else ""
            origin = ".".join(part for part in (base, node.module) if part)
            names |= {f"{origin}.{alias.name}" for alias in node.names}
    return names


def imported_modules(path: Path) -> set[str]:
    """The modules of this house that a file imports."""
    candidates = imported_names(path)
    candidates |= {name.rpartition(".")[0] for name in candidates - MODULES.keys()}
    return candidates & MODULES.keys() - {module_name(path), "pipeline", "cluster"}


def importers(library: str) -> set[str]:
    return {str(path) for path in source_files() if library in {n.partition(".")[0] for n in imported_names(path)}}


def listed_as(module: str) -> str:
    """The table's entry for a module: itself, or the package that stands there as a whole."""
    return ".".join(module.split(".")[:2])


def test_the_table_of_floors_names_exactly_the_modules_there_are() -> None:
    found = {listed_as(module) for module in MODULES} - {"pipeline", "cluster"}
    assert not found - FLOOR_OF.keys(), "add them to FLOORS in tests/house/test_floors.py, as low as their imports let"
    assert not FLOOR_OF.keys() - found, "these are gone: take them out of FLOORS in tests/house/test_floors.py"


@pytest.mark.parametrize("module", sorted(MODULES))
def test_a_module_imports_from_its_own_floor_and_below(module: str) -> None:
    floor = FLOOR_OF.get(listed_as(module), -1)
    listed = {name: FLOOR_OF.get(listed_as(name), -1) for name in imported_modules(MODULES[module])}
    assert {name: above for name, above in listed.items() if above > floor} == {}, f"{module} is on floor {floor}"


def test_no_imports_go_in_a_circle() -> None:
    # `from pipeline.methods import besa` leans on besa, not on the table of all methods.
    graph = {module: imported_modules(path) for module, path in MODULES.items()}
    order = list(TopologicalSorter(graph).static_order())  # CycleError names the circle
    assert order.index("pipeline.errors") < order.index("pipeline.ledger")


def test_the_pipeline_knows_nothing_of_the_cluster() -> None:
    for library in ("cluster", "ray"):
        assert [path for path in importers(library) if path.startswith("pipeline/")] == [], library


def test_the_pipeline_imports_without_ray_and_deepspeed() -> None:
    names = [name for name in MODULES if name.startswith("pipeline")]
    code = "import importlib, sys\nsys.modules['ray'] = sys.modules['deepspeed'] = None\n"
    code += f"for name in {names}: importlib.import_module(name)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "pipeline.ledger" in names


@pytest.mark.parametrize("library", OWNED_ALONE)
def test_a_heavy_library_has_one_owner(library: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = any(re.match(rf"{library}\b", requirement) for requirement in project["dependencies"])
    assert int(needed) <= len(importers(library)) <= 1, importers(library)


def test_what_is_installed_is_all_of_it() -> None:
    tools = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    packages = {".".join(path.parent.parts) for path in source_files() if path.name == "__init__.py"}
    assert set(tools["setuptools"]["packages"]) == packages


def test_what_decides_knows_nothing_of_ray() -> None:
    assert importers("ray") == {f"cluster/{name}.py" for name in KNOW_RAY}


def test_only_the_command_line_reads_options() -> None:
    assert {Path(path).stem.partition("_")[0] for path in importers("typer")} == {"cli"}


def test_only_the_command_line_draws() -> None:
    assert {path.partition("/")[0] for path in importers("rich")} == {"cluster"}


def test_packages_hold_a_docstring_and_nothing_else() -> None:
    packages = [path for path in source_files() if path.name == "__init__.py" and path not in PACKAGES_WITH_CODE]
    assert len(packages) >= 2
    for path in packages:
        tree = tree_of(path)
        assert ast.get_docstring(tree), path
        assert len(tree.body) == 1, path
