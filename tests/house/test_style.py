"""The rules on the wall that a machine can hold: sizes, docstrings, and what is not to be written."""

import ast
import importlib.util
import re
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
MOST_LINES = 300
MOST_FUNCTION_LINES = 60

ALLOWED_DEFAULTS: dict[str, str] = {}
"""`getattr` with a default that stays, as `path: call` in the words of `ast.unparse`, and why."""


def files(*packages: str) -> list[Path]:
    found = [path for package in packages for path in sorted((ROOT / package).rglob("*.py"))]
    assert found
    return found


PRODUCT = files("pipeline", "cluster")
EVERYTHING = files("pipeline", "cluster", "tests")


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def shown(path: Path, node: ast.AST | None = None) -> str:
    place = str(path.relative_to(ROOT))
    return f"{place}:{node.lineno}" if isinstance(node, ast.expr | ast.stmt | ast.keyword) else place


def function_lengths() -> dict[str, int]:
    """Lines of each function and method, from `def` to its last line, docstring and all."""
    lengths: dict[str, int] = {}
    for path in PRODUCT:
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert node.end_lineno is not None
                lengths[f"{shown(path, node)} {node.name}"] = node.end_lineno - node.lineno + 1
    return lengths


def offenders(paths: list[Path], is_offence: Callable[[ast.AST], bool]) -> list[str]:
    return [shown(path, node) for path in paths for node in ast.walk(tree_of(path)) if is_offence(node)]


def test_no_file_is_longer_than_a_few_screens() -> None:
    lengths = {shown(path): len(path.read_text(encoding="utf-8").splitlines()) for path in EVERYTHING}
    assert {path: length for path, length in lengths.items() if length > MOST_LINES} == {}


def test_no_function_is_longer_than_a_screen() -> None:
    too_long = {name: length for name, length in function_lengths().items() if length > MOST_FUNCTION_LINES}
    assert too_long == {}


def test_most_functions_are_short() -> None:
    lengths = list(function_lengths().values())
    assert statistics.median(lengths) <= 12
    assert statistics.quantiles(lengths, n=10)[-1] <= 35


def test_every_module_opens_with_a_docstring() -> None:
    assert [shown(path) for path in EVERYTHING if not ast.get_docstring(tree_of(path))] == []


def test_only_the_command_line_prints() -> None:
    def prints(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"

    assert offenders([path for path in EVERYTHING if ROOT / "cluster" not in path.parents], prints) == []


def test_no_default_hides_a_typo_in_an_attribute() -> None:
    found = {
        f"{shown(path)}: {ast.unparse(call)}"
        for path in PRODUCT
        for call in ast.walk(tree_of(path))
        if isinstance(call, ast.Call) and ast.unparse(call.func) == "getattr" and len(call.args) == 3
    }
    assert found == set(ALLOWED_DEFAULTS), (
        "read the attribute itself, or add the call to ALLOWED_DEFAULTS with a reason"
    )


def test_no_device_is_taken_for_granted() -> None:
    def moves_to_cuda(node: ast.AST) -> bool:
        return isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "cuda"

    assert offenders(PRODUCT, moves_to_cuda) == []


def test_nothing_that_runs_code_when_read_is_read_or_written() -> None:
    def unpickles(node: ast.AST) -> bool:
        if isinstance(node, ast.Import):
            return any(alias.name.partition(".")[0] in {"pickle", "cloudpickle", "dill"} for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            return node.module in {"pickle", "cloudpickle", "dill"} or bool(names & {"torch.load", "torch.save"})
        return isinstance(node, ast.Attribute) and ast.unparse(node) in {"torch.load", "torch.save"}

    assert offenders(PRODUCT, unpickles) == []


def test_no_code_of_a_checkpoint_is_trusted() -> None:
    def trusts(node: ast.AST) -> bool:
        return isinstance(node, ast.keyword) and node.arg == "trust_remote_code" and ast.unparse(node.value) == "True"

    assert offenders(PRODUCT, trusts) == []


def test_nothing_is_left_for_later() -> None:
    note = re.compile(r"\b(TO[D]O|FIX[M]E)\b")
    assert [shown(path) for path in EVERYTHING if note.search(path.read_text(encoding="utf-8"))] == []


@pytest.mark.parametrize(
    ("tool", "arguments"),
    [
        ("ruff", "check pipeline cluster tests"),
        ("ruff", "format --check pipeline cluster tests"),
        ("mypy", ""),  # what it looks at is said in pyproject.toml
    ],
)
def test_the_tools_find_nothing(tool: str, arguments: str) -> None:
    if importlib.util.find_spec(tool) is None:
        pytest.skip(f"{tool} is not installed: pip install -e '.[dev]'")
    command = [sys.executable, "-m", tool, *arguments.split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
