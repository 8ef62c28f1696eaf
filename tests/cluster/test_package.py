"""What is sent to a cluster is our code as installed, and nothing else; what it needs is pinned and looked for."""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cluster import package
from cluster.package import PINS, SETTINGS, departures, own_distribution, pinned, requirements, stage, unmet
from pipeline.errors import ConfigError

ROOT = Path(__file__).parents[2]


def test_the_package_is_every_source_file_and_the_metadata(tmp_path: Path) -> None:
    staged = stage(tmp_path, "model: x\n")
    sources = {path.relative_to(ROOT) for name in ("pipeline", "cluster") for path in (ROOT / name).rglob("*.py")}
    information = f"secateur-{metadata.version('secateur')}.dist-info"
    found = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert found == {Path("code") / path for path in sources} | {
        Path("code") / information / "METADATA",
        Path("settings") / SETTINGS,
        Path("settings") / PINS,
    }
    assert [path.name for path in staged.modules] == ["pipeline", "cluster", information]
    assert all((tmp_path / "code" / path).read_bytes() == (ROOT / path).read_bytes() for path in sources)
    assert (staged.settings / SETTINGS).read_text() == "model: x\n"
    assert (staged.settings / PINS).read_text().split() == list(staged.pins)


def test_staged_code_is_imported_and_knows_its_version(tmp_path: Path) -> None:
    staged = stage(tmp_path, "")
    code = "import cluster.package as p, pipeline; print(p.__file__, pipeline.__file__, p.own_distribution().version)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=staged.settings, capture_output=True, text=True, check=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "code")},
    )  # fmt: skip
    root = tmp_path / "code"
    assert done.stdout.split() == [
        str(root / "cluster" / "package.py"), str(root / "pipeline" / "__init__.py"), own_distribution().version,
    ]  # fmt: skip


def test_without_our_metadata_a_job_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(package, "DISTRIBUTION", "secateur-that-is-not-there")
    with pytest.raises(ConfigError, match=r"secateur-that-is-not-there is not installed here, so what a job needs"):
        stage(tmp_path, "")


def test_what_a_cluster_needs_is_what_all_need_and_what_clusters_do(tmp_path: Path) -> None:
    information = tmp_path / "some-1.dist-info"
    information.mkdir()
    needs = ["torch>=2.6", 'ray>=2; extra == "cluster"', 'pytest; extra == "dev"', 'pywin32; os_name == "nt"']
    lines = ["Metadata-Version: 2.1", "Name: some", "Version: 1", *(f"Requires-Dist: {need}" for need in needs)]
    (information / "METADATA").write_text("\n".join(lines))
    found = requirements(metadata.PathDistribution(information))
    assert [requirement.name for requirement in found] == ["torch", "ray"]


def test_a_pin_is_the_version_installed_here_whatever_its_build() -> None:
    (torch,) = pinned([Requirement("torch>=2")])
    assert torch == f"torch=={metadata.version('torch').partition('+')[0]}"
    assert unmet([Requirement(torch)]) == []
    assert departures([torch]) == []


def test_all_that_is_missing_or_too_old_is_said() -> None:
    needed = map(Requirement, ["pyyaml>=1", "pydantic>=99", "no-such-thing>=2"])
    have = metadata.version("pydantic")
    assert unmet(list(needed)) == [f"pydantic>=99: {have} is installed", "no-such-thing>=2: not installed"]


def test_versions_that_differ_from_the_pins_are_named() -> None:
    have = metadata.version("pydantic")
    assert departures([f"pydantic=={have}", "typer==0.0.1"]) == [f"typer {metadata.version('typer')} (there 0.0.1)"]
