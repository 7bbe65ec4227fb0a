"""Which packages a machine lacks for this project's GPU tests, and their installation from a folder of wheels.

    python benchmarks/gpu_packages.py [FOLDER]

Only what is missing, or has a version that does not do, is installed; into a folder of its own, without the network.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import os
import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterable
from email.parser import Parser
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name, parse_wheel_filename

ROOT = Path(__file__).resolve().parent.parent
MISSING = "missing"
TESTING = ("pytest>=8,<10",)


def needed() -> list[Requirement]:
    """Return what the project and its tests require."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(text) for text in (*project["dependencies"], *TESTING)]


def requirements_of(wheel: Path) -> list[Requirement]:
    """Return what a wheel requires here, without its extras."""
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        about = Parser().parsestr(archive.read(name).decode())
    return _applying(about.get_all("Requires-Dist") or [])


def _applying(texts: Iterable[str]) -> list[Requirement]:
    found = []
    for text in texts:
        try:
            requirement = Requirement(text)
        except InvalidRequirement:
            continue
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            found.append(requirement)
    return found


@functools.cache
def theirs(name: str) -> tuple[Requirement, ...]:
    """Return what a package that is installed requires here, without its extras."""
    return tuple(_applying(importlib.metadata.requires(name) or []))


def version_of(name: str) -> str | None:
    """Return the version of a package that is installed, None if it is not."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def lacking(requirements: Iterable[Requirement]) -> dict[str, str]:
    """Return name -> what there is of the packages that don't satisfy requirements."""
    found = dict[str, str]()
    for requirement in requirements:
        version = version_of(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            found[canonicalize_name(requirement.name)] = f"{version or MISSING}, wanted is {requirement}"
    return found


def lacking_with_theirs(requirements: list[Requirement]) -> dict[str, str]:
    """Return what is lacking of requirements, and of those of the packages that they name."""
    lacks, seen, left = dict[str, str](), set[str](), list(requirements)
    while left:
        requirement = left.pop()
        lacks |= lacking([requirement])
        name = canonicalize_name(requirement.name)
        if name not in seen and version_of(name) is not None:
            seen.add(name)
            left += theirs(name)
    return lacks


def wheels_to_install(folder: Path) -> list[Path]:
    """Return the wheels of a folder that are needed here: what is lacking, and what that requires."""
    by_name = {parse_wheel_filename(path.name)[0]: path for path in sorted(folder.glob("*.whl"))}
    requirements, chosen = needed(), dict[str, Path]()
    while True:
        lacks = lacking_with_theirs(requirements)
        new = {str(name): path for name, path in by_name.items() if name in lacks and name not in chosen}
        if not new:
            return list(chosen.values())
        chosen |= new
        requirements += [requirement for path in new.values() for requirement in requirements_of(path)]


def install_missing(folder: Path | None, site: Path) -> dict[str, str]:
    """Install from a folder of wheels what is lacking, for this process and those that it starts; say what was found.

    Returns what is missing still. Another version than is wanted is only told: it may do.
    """
    lacks = lacking_with_theirs(needed())
    print(f"packages: {len(lacks)} are missing or have another version than is wanted")
    _print(lacks)
    if folder is not None:
        wheels = wheels_to_install(folder)
        _install(wheels, site)
        print(f"installed from the folder of wheels: {', '.join(path.name for path in wheels) or 'nothing'}")
        if wheels:
            lacks = lacking_with_theirs(needed())
            print(f"packages: {len(lacks)} now")
            _print(lacks)
    missing = {name: what for name, what in lacks.items() if what.startswith(MISSING)}
    if missing:
        print("fetch them with benchmarks/gpu_wheels.sh FOLDER where there is a network, and give --wheels FOLDER")
    return missing


def _print(lacks: dict[str, str]) -> None:
    for name, what in sorted(lacks.items()):
        print(f"  {name}: {what}")


def _install(wheels: list[Path], site: Path) -> None:
    if not wheels:
        return
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    pip += ["--no-cache-dir", "--disable-pip-version-check", "--upgrade", "--target", str(site)]
    subprocess.run([*pip, *map(str, wheels)], check=True)
    sys.path.insert(0, str(site))
    importlib.invalidate_caches()
    theirs.cache_clear()
    os.environ["PYTHONPATH"] = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)


if __name__ == "__main__":
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        sys.exit(1 if install_missing(Path(sys.argv[1]) if len(sys.argv) > 1 else None, Path(place)) else 0)
