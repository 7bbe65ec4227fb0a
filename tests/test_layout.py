"""The layout: imports run in one direction and have no side effects; wheel and test run are complete."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
import zipfile
from collections import Counter
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import conftest
import pytest

import hf_fasttrain

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_fasttrain"
# A file may import from its folder and from folders to the left.
ORDER = [
    *("before_torch", "utils", "run_folder", "recipe", "data", "models", "train", "report", "export", "hub"),
    *("from_recipe", "prediction", "inference", "study", "cli", "__main__"),
]
KNOW_THE_RECIPE = {"recipe", "from_recipe", "inference", "study", "cli"}
LAZY_IMPORTS = {  # imported inside functions: a trainer's methods that use what is built on trainers
    ("train.trainer", "from_recipe.trainer"),
    ("train.trainer", "hub.push"),
    ("train.trainer", "report.callback"),
}


@cache
def modules() -> dict[str, Path]:
    """Return the package's files by dotted name, without the package's own name."""
    paths = sorted(PACKAGE.rglob("*.py"))
    names = (".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in paths)
    return {name.removesuffix(".__init__"): path for name, path in zip(names, paths, strict=True)}


def imports(path: Path) -> set[str]:
    """Return the package's modules that a file imports, anywhere in it, but for type checking."""
    imported: set[str] = set()
    tree = ast.parse(path.read_text())
    checked = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    ignored = {id(inner) for node in checked for inner in ast.walk(node)}
    for node in ast.walk(tree):
        module = (node.module or "") if isinstance(node, ast.ImportFrom) and id(node) not in ignored else ""
        if module.partition(".")[0] == "hf_fasttrain":
            base = module.removeprefix("hf_fasttrain").removeprefix(".")
            names = {f"{base}.{alias.name}".removeprefix(".") for alias in node.names}
            imported |= {name if name in modules() else base for name in names}
    return imported - {"", "__init__"}


@cache
def edges() -> set[tuple[str, str]]:
    """Return (module, imported module), without LAZY_IMPORTS."""
    known = {name: path for name, path in modules().items() if name not in ("", "__init__")}
    return {(name, other) for name, path in known.items() for other in imports(path)} - LAZY_IMPORTS


def folder(name: str) -> str:
    return name.partition(".")[0]


def test_imports_follow_the_order_of_folders() -> None:
    wrong = [pair for pair in edges() if ORDER.index(folder(pair[1])) > ORDER.index(folder(pair[0]))]
    crossing = Counter((folder(name), folder(other)) for name, other in edges() if folder(name) != folder(other))
    beyond_utils = sum(number for (_, other), number in crossing.items() if other != "utils")
    print(f"{sum(crossing.values())} imports cross folders, {beyond_utils} of them not into utils")
    assert not wrong, sorted(wrong)


def test_imports_against_the_order_are_lazy() -> None:
    for name, other in LAZY_IMPORTS:
        tree = ast.parse(modules()[name].read_text())
        at_top = [node.module for node in tree.body if isinstance(node, ast.ImportFrom)]
        assert other in imports(modules()[name])
        assert f"hf_fasttrain.{other}" not in at_top


def test_there_are_no_import_cycles() -> None:
    below = {name: {other for one, other in edges() if one == name} - {name} for name in modules()}
    visited: set[str] = set()
    while len(visited) < len(below):
        free = {name for name, needed in below.items() if name not in visited and needed <= visited}
        assert free, f"a circle among {sorted(set(below) - visited)}"
        visited |= free


def test_only_some_folders_know_the_recipe() -> None:
    importers = {(name, other) for name, other in edges() if folder(other) == "recipe"}
    wrong = sorted((name, other) for name, other in importers if folder(name) not in KNOW_THE_RECIPE)
    assert not wrong


def test_only_the_expected_modules_are_at_the_top() -> None:
    expected = {"__init__", "__main__", "before_torch", "inference", "prediction"}
    assert {path.stem for path in PACKAGE.glob("*.py")} == expected
    assert (PACKAGE / "utils/__init__.py").read_text() == ""


def test_files_are_short() -> None:
    too_long = {
        str(path.relative_to(ROOT)) for path in PACKAGE.rglob("*.py") if len(path.read_text().splitlines()) > 420
    }
    assert not too_long


@pytest.mark.parametrize("name", ["benchmarks", "examples", "docs", "tests"])
def test_programs_import_existing_modules(name: str) -> None:
    for path in (ROOT / name).rglob("*.py"):
        missing = {module for module in imports(path) if module not in modules()}
        assert not missing, f"{path.name} imports {missing}"


def tracked(*paths: str) -> list[str]:
    """Return the files that git knows under some paths."""
    process = subprocess.run(["git", "-C", ROOT, "ls-files", *paths], capture_output=True, text=True, check=False)
    if process.returncode != 0:
        pytest.skip("not a git checkout")
    return [name for name in process.stdout.splitlines() if (ROOT / name).is_file()]


def test_the_wheel_contains_every_file(tmp_path: Path) -> None:
    """A folder whose name a tool ignores (build, runs) would be missing without an error."""
    from hatchling.builders.wheel import WheelBuilder

    wheel = next(iter(WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])))
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    recipes = {name.replace("recipes/", "hf_fasttrain/recipe/shipped/", 1) for name in tracked("recipes")}
    assert names == set(tracked("hf_fasttrain")) | recipes


def test_each_folder_of_tests_is_collected(request: pytest.FixtureRequest, collected_files: set[Path]) -> None:
    """In the folders of this run, every test file is collected."""
    folders = [(request.config.invocation_params.dir / argument).resolve() for argument in request.config.args]
    names = [name for name in tracked("tests") if Path(name).name.startswith("test_") and "/gpu/" not in name]
    files = {ROOT / name for name in names}
    expected = {path for path in files if any(path.is_relative_to(folder) for folder in folders)}
    assert expected == {path for path in collected_files if any(path.is_relative_to(folder) for folder in folders)}
    assert expected


def test_importing_is_without_side_effects() -> None:
    """Importing every module changes no random state, starts no device and prints nothing."""
    code = (
        "import importlib, sys, torch, numpy as np\n"
        "import accelerate, datasets, timm, transformers, huggingface_hub  # what others do is theirs\n"
        "before = torch.get_rng_state().clone(), str(np.random.get_state()), torch.get_num_threads()\n"
        f"for name in {sorted(n for n in modules() if n and n != '__main__')!r}:\n"
        "    importlib.import_module('hf_fasttrain.' + name)\n"
        "assert torch.equal(before[0], torch.get_rng_state()) and before[1:] == (str(np.random.get_state()), "
        "torch.get_num_threads())\n"
        "from accelerate.state import PartialState\n"
        "assert PartialState._shared_state == {} and not torch.cuda.is_initialized()\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert process.stdout == ""


def test_all_that_is_printed_is_cleaned_in_one_place() -> None:
    printing = {"utils.printing": {"print"}}
    for name, path in modules().items():
        calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
        called = {node.func.id for node in calls if isinstance(node.func, ast.Name)}
        assert called & {"print", "Console"} <= printing.get(name, set()), name
        assert "rich.table" not in path.read_text() or name == "utils.terminal", name


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["quickstart", "modle.name=x"], ["recipes"]])
def test_quick_answers_do_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom hf_fasttrain.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'accelerate', 'datasets', 'timm', 'transformers', 'evaluate', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    start = time.perf_counter()
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr
    assert time.perf_counter() - start < 30  # not a benchmark: fails only if something heavy is imported


def test_the_upload_process_does_not_import_torch() -> None:
    code = "import sys, hf_fasttrain.hub.worker\nassert not {'torch', 'numpy'} & set(sys.modules)"
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert process.returncode == 0, process.stderr


def session(*arguments: str, **options: Any) -> Any:
    """Return the settings of a session of tests, as far as `pytest_cmdline_main` looks at them."""
    defaults = {"numprocesses": None, "dist": "no", "usepdb": False, "capture": "fd"}
    option, place = SimpleNamespace(**{**defaults, **options}), SimpleNamespace(dir=ROOT)
    return SimpleNamespace(option=option, args=arguments, invocation_params=place)


@pytest.mark.parametrize(
    ("config", "processes", "dist"),
    [
        (session("tests"), 2, "worksteal"),
        (session("tests/train", "tests/data"), 2, "worksteal"),
        (session("tests/test_layout.py"), None, "no"),
        (session("tests/train", "tests/test_layout.py::test_public_names"), None, "no"),
        (session("tests", numprocesses=0), 0, "no"),
        (session("tests", numprocesses=4), 4, "worksteal"),
        (session("tests", numprocesses=4, dist="loadfile"), 4, "loadfile"),
        (session("tests", usepdb=True), None, "no"),
        (session("tests", capture="no"), None, "no"),
    ],
)
def test_folders_of_tests_run_in_two_processes_and_files_in_one(config: Any, processes: int | None, dist: str) -> None:
    conftest.pytest_cmdline_main(config)
    assert (config.option.numprocesses, config.option.dist) == (processes, dist)


def test_processes_of_a_session_start_none_and_pytest_xdist_may_be_missing() -> None:
    one_of_two, without = session("tests"), session("tests")
    one_of_two.workerinput = {}
    del without.option.numprocesses
    for each in (one_of_two, without):
        conftest.pytest_cmdline_main(each)
        assert each.option.dist == "no"


def test_public_names() -> None:
    for name in hf_fasttrain.__all__:
        assert getattr(hf_fasttrain, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'Trainr'"):
        hf_fasttrain.Trainr  # noqa: B018
