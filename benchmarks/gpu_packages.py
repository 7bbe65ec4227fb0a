"""Finds the packages that a machine lacks for this project's GPU tests, and installs them from a folder of wheels.

    python benchmarks/gpu_packages.py [FOLDER]

Only packages that are missing or have an unsuitable version are installed, into a separate folder, without a network.
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
    """Return the requirements of the project and its tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return [Requirement(text) for text in (*project["dependencies"], *TESTING)]


def requirements_of(wheel: Path) -> list[Requirement]:
    """Return a wheel's requirements on this machine, without its extras."""
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
    """Return an installed package's requirements on this machine, without its extras."""
    return tuple(_applying(importlib.metadata.requires(name) or []))


def version_of(name: str) -> str | None:
    """Return the version of a package that is installed, None if it is not."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def lacking(requirements: Iterable[Requirement]) -> dict[str, str]:
    """Return name -> installed version of the packages that do not satisfy requirements."""
    missing = dict[str, str]()
    for requirement in requirements:
        version = version_of(requirement.name)
        if version is None or not requirement.specifier.contains(version, prereleases=True):
            missing[canonicalize_name(requirement.name)] = f"{version or MISSING}, required: {requirement}"
    return missing


def lacking_with_theirs(requirements: list[Requirement]) -> dict[str, str]:
    """Return the unsatisfied requirements, including those of the packages named in them."""
    missing, seen, left = dict[str, str](), set[str](), list(requirements)
    while left:
        requirement = left.pop()
        missing |= lacking([requirement])
        name = canonicalize_name(requirement.name)
        if name not in seen and version_of(name) is not None:
            seen.add(name)
            left += theirs(name)
    return missing


def wheels_to_install(folder: Path) -> list[Path]:
    """Return the wheels of a folder that are needed here: the missing packages and their requirements."""
    by_name = {parse_wheel_filename(path.name)[0]: path for path in sorted(folder.glob("*.whl"))}
    requirements, chosen = needed(), dict[str, Path]()
    while True:
        missing = lacking_with_theirs(requirements)
        new = {str(name): path for name, path in by_name.items() if name in missing and name not in chosen}
        if not new:
            return list(chosen.values())
        chosen |= new
        requirements += [requirement for path in new.values() for requirement in requirements_of(path)]


def install_missing(folder: Path | None, site: Path) -> dict[str, str]:
    """Install missing packages from a folder of wheels, for this process and its children; print a report.

    Returns the packages that are still missing. Unsuitable versions are only reported: they may work.
    """
    problems = lacking_with_theirs(needed())
    print(f"packages: {len(problems)} are missing or have an unsuitable version")
    _print(problems)
    if folder is not None:
        wheels = wheels_to_install(folder)
        _install(wheels, site)
        print(f"installed from the folder of wheels: {', '.join(path.name for path in wheels) or 'nothing'}")
        if wheels:
            problems = lacking_with_theirs(needed())
            print(f"packages: {len(problems)} remain")
            _print(problems)
    missing = {name: problem for name, problem in problems.items() if problem.startswith(MISSING)}
    if missing:
        print(
            "on a machine with a network, download them with benchmarks/gpu_wheels.sh FOLDER; then pass --wheels FOLDER"
        )
    return missing


def _print(missing: dict[str, str]) -> None:
    for name, problem in sorted(missing.items()):
        print(f"  {name}: {problem}")


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
