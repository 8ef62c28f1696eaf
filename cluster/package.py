"""Our own code and one job's settings, as directories that a cluster can be given; nothing else of this machine goes.

code/pipeline/…  code/cluster/…      the packages as they are installed here, sources only
code/secateur-0.1.0.dist-info/       what they are called, their version, and what they need
settings/job.yaml                    the resolved configuration; the job's working directory
settings/pins.txt                    the versions of what they need that are installed here
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from pathlib import Path
from shutil import copyfile

from packaging.requirements import Requirement
from packaging.version import Version

import pipeline
from pipeline.errors import ConfigError

DISTRIBUTION = "secateur"
SETTINGS, PINS = "job.yaml", "pins.txt"


@dataclass(frozen=True, slots=True, kw_only=True)
class Package:
    """What is sent to the cluster, on this machine's disk until it is sent."""

    modules: tuple[Path, ...]
    """Directories that become importable, each by its name."""

    settings: Path
    """The directory in which the job begins."""

    pins: tuple[str, ...]
    """`name==version` of everything needed, as installed here."""


def stage(directory: Path, settings_text: str) -> Package:
    """Write the package of one job into an empty directory; raises ConfigError where our own metadata is missing.

    `settings_text`: the configuration as YAML.
    """
    found = own_distribution()
    code, settings = directory / "code", directory / "settings"
    roots = {"pipeline": Path(pipeline.__file__ or "").parent, "cluster": Path(__file__).parent}
    for name, root in roots.items():
        for source in sorted(root.rglob("*.py")):  # only sources: whatever else lies in a checkout stays where it is
            target = code / name / source.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            copyfile(source, target)
    information = code / f"{DISTRIBUTION}-{found.version}.dist-info"
    information.mkdir()
    # A checkout that was installed has the same text under setuptools' name for it, and may come first.
    metadata = found.read_text("METADATA") or found.read_text("PKG-INFO") or ""
    (information / "METADATA").write_text(metadata, encoding="utf-8")
    pins = pinned(requirements(found))
    settings.mkdir()
    (settings / SETTINGS).write_text(settings_text, encoding="utf-8")
    (settings / PINS).write_text("".join(f"{pin}\n" for pin in pins), encoding="utf-8")
    return Package(modules=(*(code / name for name in roots), information), settings=settings, pins=pins)


def own_distribution() -> Distribution:
    """Return what is installed under our name; raises ConfigError where nothing is."""
    try:
        return distribution(DISTRIBUTION)
    except PackageNotFoundError:
        raise ConfigError(
            f"{DISTRIBUTION} is not installed here, so what a job needs is not known; pip install it "
            "(pip install --editable . in a checkout)"
        ) from None


def requirements(found: Distribution) -> list[Requirement]:
    """Return what running on a cluster needs, by the metadata of a distribution."""
    every = map(Requirement, found.requires or [])
    extras = ("", "cluster")
    return [r for r in every if r.marker is None or any(r.marker.evaluate({"extra": extra}) for extra in extras)]


def pinned(needed: Sequence[Requirement]) -> tuple[str, ...]:
    """Return requirements as the versions installed here, less what names a build, such as +cpu."""
    return tuple(f"{r.name}=={Version(version(r.name)).public}" for r in needed)


def unmet(needed: Sequence[Requirement]) -> list[str]:
    """Say, one a line, what of the requirements this machine lacks or has in a version that will not do."""
    problems = []
    for requirement in needed:
        try:
            installed = version(requirement.name)
        except PackageNotFoundError:
            problems.append(f"{requirement.name}{requirement.specifier}: not installed")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            problems.append(f"{requirement.name}{requirement.specifier}: {installed} is installed")
    return problems


def departures(pins: Sequence[str]) -> list[str]:
    """Say which versions installed here are not those that were pinned where the job was submitted."""
    pairs = [(pin.partition("==")[0], pin.partition("==")[2]) for pin in pins]
    found = {name: Version(version(name)).public for name, _ in pairs}
    return [f"{name} {found[name]} (there {pinned_})" for name, pinned_ in pairs if found[name] != pinned_]
