"""The house: imports run one way, and importing does nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import hf_fasttrain

PACKAGE = Path(hf_fasttrain.__file__).parent
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in PACKAGE.rglob("*.py")
}
COMMANDS = (
    *("train", "check", "evaluate", "predict", "push", "export", "report", "ablate", "tune", "doctor", "schema"),
    *("recipes", "cache"),
)
# Who stands above whom; a module imports only from levels below its own (or beside it, without a circle).
LEVELS = [
    {"errors", "duration", "format", "before_torch", "private_apis"},
    {"remote", "library_errors"},
    {"files", "tensor_tree", "processes", "process_memory", "runlock"},
    {
        "recipe",
        "shipped",
        "data",
        "data.order",
        "data.jpeg",
        "data.damage",
        "data.decode",
        "data.records",
        "data.metadata",
    },
    {"schedule", "environment", "result", "pace", "loss", "optim", "ema", "out_of_memory", "stop", "side_effects"},
    {"predictions", "gallery"},
    {"data.classes", "data.columns"},
    {"data.label_column", "data.tables"},
    {"data.labels"},
    {"contradictions", "data.resize", "data.operations", "data.cache", "data.deaths"},
    {"metrics", "runlog", "checkpoint", "tracking", "data.workers"},
    {"saving", "run_weights"},
    {"head", "weights", "pretrained", "transformers_model"},
    {"recipe_check", "data.source", "data.augment", "model", "model_folder", "evaluation", "state"},
    {"memory_forecast"},
    {"recipe_file", "data.batch", "data.prepare", "data.scan", "data.fingerprint", "data.measured"},
    {"data.images"},
    {"data.feed"},
    {"data.device", "data.loader"},
    {"data.user_loader"},
    {"callbacks", "steps", "gradients", "update", "unused_parameters", "early_stopping", "final"},
    {"resolved", "trainer"},
    {"accelerator", "runfolder"},
    {"tunings"},
    {"auto"},
    {"kept", "model_from", "source_from"},
    {"cache_plan"},
    {"loaders", "report_pictures"},
    {"micro_batch"},
    {"assemble"},
    {"build", "serve", "memory_report"},
    {"study", "study.statistics", "study.stopwatch", "study.turns"},
    {"study.trial"},
    {"study.measure"},
    {"study.techniques", "study.processes"},
    {"study.space", "study.guard", "study.diagnosis"},
    {"study.ablate", "study.tune"},
    {"study.ablation_files", "study.full", "study.tuned_recipe"},
    {"study.doctor"},
    {"cli.arguments", "cli.terminal", "cli.version"},
    {"cli.check_images"},
    {f"cli.{command}" for command in COMMANDS},
    {"cli.app"},
    {"cli"},
    {"__main__"},
]
RECIPE_MODULES = {"recipe", "recipe_check", "recipe_file", "contradictions", "resolved", "accelerator", "shipped"}
STUDY = {name for name in MODULES if name.startswith("study")}
DOORS_UP = {("trainer", "build"), ("trainer", "publish.hub"), ("trainer", "publish.at_end")}  # imported inside methods
CLI = {name for name in MODULES if name.startswith("cli")}
ABOVE_PUBLISH = {"trainer", "assemble", "build"} | CLI
PUBLISH = {name for name in MODULES if name.startswith("publish")}


def imports(path: Path) -> set[str]:
    """Return the package's modules that a file imports, anywhere in it, but for type checking."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            for inner in ast.walk(node):
                inner.module = None if isinstance(inner, ast.ImportFrom) else getattr(inner, "module", None)
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("hf_fasttrain"):
            base = node.module.removeprefix("hf_fasttrain").removeprefix(".")
            for alias in node.names:
                name = f"{base}.{alias.name}".removeprefix(".")
                found.add(name if name in MODULES else base)
    return found - {""}


def level(name: str) -> int:
    return next(number for number, names in enumerate(LEVELS) if name in names)


def test_every_module_has_its_level() -> None:
    assert set(MODULES) - PUBLISH - {"", "__init__"} == set().union(*LEVELS)


@pytest.mark.parametrize("name", sorted(set(MODULES) - PUBLISH - {"", "__init__"}))
def test_imports_run_one_way(name: str) -> None:
    for imported in imports(MODULES[name]):
        if (name, imported) in DOORS_UP or imported.startswith("publish"):
            assert name in ABOVE_PUBLISH
            continue
        assert level(imported) <= level(name), f"{name} imports {imported}"


def test_there_is_no_circle() -> None:
    graph = {name: {i for i in imports(path) if (name, i) not in DOORS_UP} for name, path in MODULES.items()}
    done: set[str] = set()
    while len(done) < len(graph):
        free = {name for name, below in graph.items() if name not in done and below <= done}
        assert free, f"a circle among {sorted(set(graph) - done)}"
        done |= free


def test_only_build_and_above_know_the_recipe() -> None:
    allowed = (
        RECIPE_MODULES
        | STUDY
        | {"tunings", "auto", "model_from", "source_from", "kept", "loaders", "cache_plan", "assemble"}
    )
    allowed |= {"micro_batch", "memory_report", "report_pictures"}
    allowed |= {"build", "serve"} | CLI
    for name, path in MODULES.items():
        if name not in allowed:
            known = imports(path) & {"recipe", "recipe_file", "resolved"}
            assert not known, f"{name} imports {known}"


def test_publish_reads_run_folders_only() -> None:
    for name in PUBLISH:
        assert not imports(MODULES[name]) & ({"build", "assemble", "trainer", "accelerator"} | CLI)


SWITCHES = re.compile(
    r"torch\.(set_num_threads|set_float32|use_deterministic|backends\.[\w.]+ = )|_dynamo import config"
)
LAUNCHERS = re.compile(r"""["'](ACCELERATE_\w+|TORCHELASTIC_\w+|(LOCAL_)?(RANK|WORLD_SIZE)|OMP_NUM_THREADS)["']""")


def test_one_file_reads_what_launchers_export_and_sets_what_all_of_torch_shares() -> None:
    """Elsewhere only for a moment, in a process of one's own, and before torch is there."""
    found = {name for name, path in MODULES.items() if SWITCHES.search(path.read_text())}
    assert found == {"accelerator", "environment", "data.workers", "private_apis", "unused_parameters"}
    found = {name for name, path in MODULES.items() if LAUNCHERS.search(path.read_text())}
    assert found == {"accelerator", "before_torch"}


ASKED_OF_ACCELERATE = re.compile(
    r"is_main_process|is_local_main_process|accelerator\.(local_)?process_index|PartialState|gather_object|wait_for_everyone"
)


def test_one_file_asks_which_process_this_is() -> None:
    found = {name for name, path in MODULES.items() if ASKED_OF_ACCELERATE.search(path.read_text())}
    assert found == {"processes"}


def test_only_cli_and_runlog_write_to_the_terminal() -> None:
    for name, path in MODULES.items():
        calls = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        printing = [call for call in calls if isinstance(call.func, ast.Name) and call.func.id == "print"]
        assert not printing or name in CLI


def test_importing_is_without_side_effects() -> None:
    """Importing every module changes no random state, starts no device and prints nothing."""
    code = (
        "import importlib, sys, torch, numpy as np\n"
        "import accelerate, datasets, timm, transformers, huggingface_hub  # what others do is theirs\n"
        "before = torch.get_rng_state().clone(), str(np.random.get_state()), torch.get_num_threads()\n"
        f"for name in {sorted(n for n in MODULES if n and n != '__main__')!r}:\n"
        "    importlib.import_module('hf_fasttrain.' + name)\n"
        "assert torch.equal(before[0], torch.get_rng_state()) and before[1:] == (str(np.random.get_state()), "
        "torch.get_num_threads())\n"
        "from accelerate.state import PartialState\n"
        "assert PartialState._shared_state == {} and not torch.cuda.is_initialized()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["quickstart", "modle.name=x"], ["recipes"]])
def test_quick_answers_do_not_import_torch(arguments: list[str]) -> None:
    code = (
        "import sys\nfrom hf_fasttrain.cli import main\n"
        f"try:\n    main({arguments!r})\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'accelerate', 'datasets', 'timm', 'transformers', 'evaluate', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    began = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert time.perf_counter() - began < 30  # not a benchmark: it only fails if something heavy is done


def test_a_command_has_its_file() -> None:
    from hf_fasttrain.cli.app import COMMANDS as CALLED
    from hf_fasttrain.cli.app import GROUPS

    assert {command.__name__ for command in CALLED} | set(GROUPS) == set(COMMANDS)
    for command in CALLED:
        assert command.__module__ == f"hf_fasttrain.cli.{command.__name__}"


def test_public_names() -> None:
    for name in hf_fasttrain.__all__:
        assert getattr(hf_fasttrain, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'Trainr'"):
        hf_fasttrain.Trainr  # noqa: B018
