"""README, docs and examples: every command and snippet runs to its end, links resolve, the key table is up to date."""

from __future__ import annotations

import importlib.util
import inspect
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import typer
from helpers.hub_server import Hub
from helpers.processes import reset_accelerate, run_processes
from PIL import Image
from sklearn.datasets import load_digits

from hf_fasttrain import Trainer
from hf_fasttrain.cli import main
from hf_fasttrain.cli.app import app, with_command
from hf_fasttrain.recipe.load import load_recipe, output_dir
from hf_fasttrain.study import doctor, tune
from hf_fasttrain.study.messages import Turn

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"))
    if "example_card" not in path.parts  # written by `push`; tests of the hub run its snippets
)
# Parameters of Trainer that recipes alone pass on.
NOT_DOCUMENTED = {"export", "learnt", "recipe_text", "launched", "bad_images", "log"}

# Commands that are not run, by their beginning, and why.
NOT_RUN = {
    "pip install": "needs a network; .ci/run installs the project in a fresh environment",
    "pre-commit install": "changes the checkout",
    "ruff": "a check of the project, not a part of it",
    "mypy": "a check of the project, not a part of it",
    "pytest": "this is it",
    "accelerate launch --config_file accelerate_configs/multi_gpu.yaml": "needs several GPUs",
    "python benchmarks/": "takes minutes; test_benchmarks.py imports each one, and gpu.py is dry-run there",
    "python tests/kill_and_resume.py": "takes minutes",
    "hf-fasttrain ablate resnet50 data.dataset=CIFAR10": "a measurement of minutes on a data set that is not here",
    "hf-fasttrain ablate efficientnet data.dataset=FLOWERS": "a measurement of minutes on a data set that is not here",
    "hf-fasttrain ablate vit data.dataset=FLOWERS": "a measurement of minutes on a data set that is not here",
    "hf-fasttrain predict runs/mine ": "a run and a module of one's own: tests/test_own_runs.py has them",
    "hf-fasttrain evaluate runs/mine ": "a run and a module of one's own: tests/test_own_runs.py has them",
}
# What makes a command short: these replace the command's own values.
SMALL = {
    "model.name": "test_resnet",
    "model.pretrained": "false",
    "model.drop_path": "0",
    "optimizer.backbone_lr_scale": "1",
    "data.image_size": "32",
    "data.workers": "0",
    "train.duration": "2 steps",
    "train.batch_size": "16",
    "log.report": "false",
}
TRAINED = {"runs/quickstart": "recipes/quickstart.yaml", "runs/finetune": "recipes/finetune.yaml"}
LAUNCHERS = ("accelerate launch -m hf_fasttrain ", "-m hf_fasttrain ", "hf-fasttrain ")


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(text.count("\n", 0, match.start()) + 1, match[1], match[2]) for match in found]


def commands_of(text: str) -> list[str]:
    """Return the commands of a shell block, without comments; those joined by && are several."""
    lines = text.replace("\\\n", " ").splitlines()
    bare = (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines)
    return [command.strip() for line in bare if line for command in line.split("&&")]


def reason_not_to_run(command: str) -> str | None:
    """Return why a command of the pages is not run; None for one that is."""
    return next((reason for start, reason in NOT_RUN.items() if command.startswith(start)), None)


@dataclass
class Workspace:
    """A folder as a user has it: a checkout's recipes, some photos, and the runs of the commands so far."""

    folder: Path
    capture: pytest.CaptureFixture[str]
    printed: dict[str, str] = field(default_factory=dict)  # by command: a command of several pages is run once

    def run(self, command: str) -> str:
        """Run a command to its end, with small figures, and return what it prints."""
        if command not in self.printed:
            self.printed[command] = self._run(command)
        return self.printed[command]

    def _run(self, command: str) -> str:
        processes = 1
        if command.startswith("torchrun --nproc_per_node 2 "):
            command, processes = command.removeprefix("torchrun --nproc_per_node 2 "), 2
        launcher = next((start for start in LAUNCHERS if command.startswith(start)), None)
        assert launcher, f"neither run nor listed in NOT_RUN: {command}"
        arguments = small(with_command(shlex.split(command.removeprefix(launcher))))
        self._prepare(command, arguments)
        self.capture.readouterr()
        if processes > 1 or "--onnx" in arguments:  # after torch's ONNX export no fork could train
            run_processes(call, arguments, num_processes=processes)
        else:
            call(arguments)
        said = self.capture.readouterr()
        return said.out + said.err

    def _prepare(self, command: str, arguments: Sequence[str]) -> None:
        """See to the runs that a command reads, and take away the one that it would write."""
        for run, recipe in TRAINED.items():
            if run in command and not (self.folder / run).exists():
                self.run(f"hf-fasttrain {recipe}")
        if arguments[0] == "train" and "--resume" not in arguments:
            recipe = load_recipe(arguments[1], [text for text in arguments[2:] if "=" in text])
            shutil.rmtree(output_dir(recipe), ignore_errors=True)


def call(arguments: list[str]) -> None:
    """Run the command line in this process; it must succeed."""
    reset_accelerate()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code in (0, None), arguments


def small(arguments: list[str]) -> list[str]:
    """Return a command with small figures."""
    verb = arguments[0]
    if verb not in ("train", "check", "doctor", "tune", "ablate"):
        return arguments
    kept = [text for text in arguments if text.split("=")[0] not in SMALL]
    resumed = "--resume" in arguments and any(text.startswith("train.duration=") for text in arguments)
    figures = {**SMALL, "train.duration": "4 steps"} if resumed else SMALL
    values = [f"{key}={value}" for key, value in figures.items()]
    options = {
        "doctor": ["--seconds", "1"],
        "tune": ["--budget", "60s"],
        "ablate": ["--rounds", "1", "--seconds", "0.1", "--only", "channels_last"],
    }
    return [*kept, *options.get(verb, []), *values]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the checkout's recipes and photos: 8 of each of three digits, 4 to evaluate."""
    folder = tmp_path_factory.mktemp("docs")
    for name in ("recipes", "accelerate_configs", "examples"):
        (folder / name).symlink_to(ROOT / name)
    pixels, labels = load_digits(return_X_y=True)
    for digit in range(3):
        for number, row in enumerate(pixels[labels == digit][:12]):
            target = folder / "path/to/photos" / ("train" if number < 8 else "validation") / f"digit_{digit}"
            target.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray((row.reshape(8, 8) * 15).astype(np.uint8)).resize((40, 40))
            image.convert("RGB").save(target / f"{number}.jpg")
    return folder


@pytest.fixture(scope="module")
def printed() -> dict[str, str]:
    """Return what the commands of all pages have printed so far."""
    return {}


@pytest.fixture
def workspace(
    folder: Path,
    printed: dict[str, str],
    hub: Hub,
    forked_arms: None,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> Workspace:
    """Return the folder as the current one, with a Hub on loopback and studies that take no time."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_FASTTRAIN_CACHE", str(folder / "cache"))
    shorten_studies(monkeypatch)
    return Workspace(folder, capfd, printed)


def shorten_studies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let studies take short turns, and end their searches as soon as they have begun."""
    turn = Turn(2, 0.1)
    for module, names in ((doctor, ("PROFILE_TURN", "PART_TURN", "TRIAL_TURN")), (tune, ("TURN",))):
        for name in names:
            monkeypatch.setattr(module, name, turn)
    monkeypatch.setattr(doctor, "MIN_ROUNDS", 1)
    monkeypatch.setattr(tune, "UNTIL", dict.fromkeys(tune.UNTIL, 0.0))


def run_python(text: str) -> None:
    """Run a program with small figures."""
    values = ", ".join(repr(f"{key}={value}") for key, value in SMALL.items())
    for run in re.findall(r"runs/\w+", text):
        shutil.rmtree(run, ignore_errors=True)
    reset_accelerate()
    exec(compile(text.replace("overrides=[", f"overrides=[{values}, "), "snippet", "exec"), {"__name__": "__main__"})


def run_yaml(text: str, workspace: Workspace) -> None:
    """Train a whole recipe; see that a part of one is valid in another."""
    if "model:" in text:
        path = Path(f"recipe_{abs(hash(text))}.yaml")
        path.write_text(text)
        workspace.run(f"hf-fasttrain {path}")
        return
    overrides = [line.split("#")[0].strip().replace(": ", "=", 1) for line in text.splitlines()]
    load_recipe("quickstart", overrides)


def require_output(expected: str, printed: str, where: str) -> None:
    """See that lines that a page shows were printed, in order; numbers may differ, and ... stands for anything."""
    position = 0
    for line in expected.splitlines():
        words = re.escape(re.sub(r"\d[\d,.]*", "0", " ".join(line.split())))
        pattern = words.replace(re.escape("..."), ".*").replace("0", r"\d[\d,.]*").replace(r"\ ", r"\s+")
        found = re.compile(pattern).search(printed, position)
        assert found, f"{where}: not printed: {line}\n{printed}"
        position = found.end()


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_snippet_runs_to_its_end(page: Path, workspace: Workspace) -> None:
    said = ""
    for block in blocks_of(page):
        where = f"{page}:{block.line}"
        if block.language == "bash":
            commands = [command for command in commands_of(block.text) if not reason_not_to_run(command)]
            said = "".join(map(workspace.run, commands))
        elif block.language == "python":
            run_python(block.text)
        elif block.language == "yaml":
            run_yaml(block.text, workspace)
        elif block.language == "text" and page != Path("docs/architecture.md"):
            require_output(block.text, said, where)
        else:
            assert block.language == "text", f"{where}: a block of {block.language or 'no language'} is not run"


def test_what_is_not_run_is_in_a_page() -> None:
    commands = [
        c for page in PAGES for block in blocks_of(page) if block.language == "bash" for c in commands_of(block.text)
    ]
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in commands), f"no page has {start}"


def options_of(arguments: Sequence[str]) -> set[str]:
    """Return the options of a command."""
    command: Any = typer.main.get_command(app)
    for name in with_command(list(arguments)):
        command = getattr(command, "commands", {}).get(name, command)
    return {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_commands_and_options_in_the_text_exist(page: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for match in re.finditer(
        r"(?:`|^)((?:hf-fasttrain|python (?:benchmarks|tests|docs|examples)/)[^`\n]*)", text, re.MULTILINE
    ):
        program, *words = shlex.split(match[1], comments=True)
        given = {word.split("=")[0] for word in words if word.startswith("--")}
        if program == "python":
            source = (ROOT / words[0]).read_text()
            assert not {option for option in given if f'"{option}"' not in source}, match[1]
        elif words and words[0].startswith("RECIPE"):
            assert given <= options_of(["train"])
        elif words:
            assert given <= options_of(words), match[1]


def slugs_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text(encoding="utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page.parent / name).resolve() if name else ROOT / page
        assert path.exists(), f"{page}: {target}"
        assert not anchor or anchor in slugs_of(path), f"{page}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_files_in_the_text_exist(page: Path) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    named = re.findall(r"`((?:hf_fasttrain|tests|benchmarks|docs|recipes|examples|accelerate_configs)/[\w./-]*)", text)
    for name in named:
        assert (ROOT / name).exists(), f"{page}: {name}"


def test_the_key_table_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "docs/make_recipe_table.py", "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def example(name: str) -> dict[str, Any]:
    """Return an example's names, in a process that has just started."""
    reset_accelerate()
    path = ROOT / "examples" / name
    program: dict[str, Any] = {"__name__": "example"}
    exec(compile(path.read_text(), str(path), "exec"), program)
    return program


def test_a_users_model_trains(workspace: Workspace) -> None:
    example("own_model.py")["main"]("runs/own_model", "2 epochs")
    assert float(re.findall(r"accuracy (\S+) after 46 steps", workspace.capture.readouterr().out)[0]) > 0.5


def test_callbacks_are_called(workspace: Workspace) -> None:
    overrides = [f"{key}={value}" for key, value in SMALL.items()] + [
        "output_dir=runs/callbacks",
        "evaluate.every=5 steps",
    ]
    program = example("callbacks.py")
    program["main"]([*overrides, "train.duration=10 steps"])
    assert re.search(r"largest gradient norm \d+\.\d+ at step 10", workspace.capture.readouterr().out)
    assert [row.split(",")[0] for row in Path("evaluations.csv").read_text().splitlines()] == ["step", "5", "10"]
    momentum, optimizer = program["CycleMomentum"](), SimpleNamespace(param_groups=[{"betas": (0.9, 0.999)}])
    betas = []
    for step in (0, 30, 100):
        momentum.before_step(SimpleNamespace(num_steps=100, optimizer=optimizer), step)
        betas.append(optimizer.param_groups[0]["betas"])
    assert np.allclose(betas, [(0.95, 0.999), (0.85, 0.999), (0.95, 0.999)])


def test_albumentations_is_used_where_it_is_installed(workspace: Workspace) -> None:
    overrides = [f"{key}={value}" for key, value in SMALL.items()]
    example("with_albumentations.py")["main"]([*overrides, "output_dir=runs/albumentations"])
    installed = importlib.util.find_spec("albumentations") is not None
    expected = (
        "accuracy .* after 2 steps" if installed else "albumentations is not installed: pip install albumentations"
    )
    assert re.search(expected, workspace.capture.readouterr().out)


def test_every_example_has_its_test() -> None:
    assert {path.name for path in (ROOT / "examples").iterdir() if path.is_file()} == {
        "callbacks.py", "own_model.py", "tune_then_train.sh", "with_albumentations.py",
    }  # fmt: skip


def test_the_documented_parameters_are_those_of_the_trainer() -> None:
    table = (ROOT / "docs/python-api.md").read_text().split("| parameter | meaning |")[1].split("\n\n")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1] if row else "")}
    known = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert named <= known
    assert known - named <= NOT_DOCUMENTED


def test_tune_then_train_gives_commands_that_run(workspace: Workspace) -> None:
    """bash runs the script; what it would start is written down, and started here."""
    stub = workspace.folder / "bin/hf-fasttrain"
    stub.parent.mkdir()
    stub.write_text(
        f'#!{sys.executable}\nimport json, sys\nopen("calls", "a").write(json.dumps(sys.argv[1:]) + "\\n")\n'
    )
    stub.chmod(0o755)
    script = ["bash", str(ROOT / "examples/tune_then_train.sh"), "recipes/quickstart.yaml"]
    subprocess.run(script, check=True, env={**os.environ, "PATH": f"{stub.parent}:{os.environ['PATH']}"})
    calls = [json.loads(line) for line in Path("calls").read_text().splitlines()]
    assert [arguments[0] for arguments in calls] == ["tune", "quickstart.tuned.yaml"]
    for arguments in calls:
        workspace.run(shlex.join(["hf-fasttrain", *arguments]))
    assert "done: " in workspace.printed["hf-fasttrain quickstart.tuned.yaml"]
