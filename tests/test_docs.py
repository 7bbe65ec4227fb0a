"""README, docs and examples: every command and snippet runs, links resolve, the key table is up to date."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import json
import operator
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
import transformers
import typer
from helpers.hub_server import Hub
from helpers.processes import reset_accelerate, run_processes
from PIL import Image
from ruamel.yaml import YAML
from sklearn.datasets import load_digits

from hf_fasttrain import Callback, Trainer
from hf_fasttrain.cli import main
from hf_fasttrain.cli.app import app, with_command
from hf_fasttrain.from_recipe.custom import RecipeOptions
from hf_fasttrain.recipe.load import load_recipe, output_dir
from hf_fasttrain.recipe.validate import all_keys
from hf_fasttrain.study import doctor, init_forecast, tune
from hf_fasttrain.study.messages import Turn
from hf_fasttrain.train.step_loss import At

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"))
    if "example_card" not in path.parts  # written by `push`; tests of the hub run its snippets
)
# Pages whose snippets use the names of earlier ones; on other pages each snippet runs alone.
CONTINUED = {Path("docs/your-loop.md")}
# Parameters of Trainer that only recipes use.
NOT_DOCUMENTED = {"export", "learnt", "recipe_text", "launched", "bad_images", "log"}

# Commands that are not run, by their first words, and the reason.
NOT_RUN = {
    "pip install": "needs a network; .ci/run installs the project in a fresh environment",
    "pre-commit install": "changes the checkout",
    "ruff": "a check of the project, not a part of it",
    "mypy": "a check of the project, not a part of it",
    "pytest": "this is it",
    "accelerate launch --config_file accelerate_configs/multi_gpu.yaml": "needs several GPUs",
    "python benchmarks/": "takes minutes; test_benchmarks.py imports each one, and gpu.py is dry-run there",
    "python tests/kill_and_resume.py": "takes minutes",
    "hf-fasttrain ablate resnet50 data.dataset=CIFAR10": "a measurement of minutes on a dataset that is not here",
    "hf-fasttrain ablate efficientnet data.dataset=FLOWERS": "a measurement of minutes on a dataset that is not here",
    "hf-fasttrain ablate vit data.dataset=FLOWERS": "a measurement of minutes on a dataset that is not here",
    "hf-fasttrain predict runs/mine ": "a run of a custom model: tests/test_custom_model_runs.py has them",
    "hf-fasttrain evaluate runs/mine ": "a run of a custom model: tests/test_custom_model_runs.py has them",
}
# Overrides that make a command short.
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
TRAINED = {
    "runs/quickstart": "recipes/quickstart.yaml",
    "runs/finetune": "recipes/finetune.yaml",
    "runs/photos": "photos.yaml",
}
LAUNCHERS = ("accelerate launch -m hf_fasttrain ", "-m hf_fasttrain ", "hf-fasttrain ")


class Block(NamedTuple):
    """A fenced block of a page."""

    line: int
    language: str
    text: str


def blocks_of(page: Path) -> list[Block]:
    """Return the fenced blocks of a page, in order."""
    text = (ROOT / page).read_text(encoding="utf-8")
    matches = re.finditer(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [Block(text.count("\n", 0, match.start()) + 1, match[1], match[2]) for match in matches]


def commands_of(text: str) -> list[str]:
    """Return the commands of a shell block, without comments; && separates commands."""
    lines = text.replace("\\\n", " ").splitlines()
    bare = (re.sub(r"(^|\s)#.*", "", line).strip() for line in lines)
    return [command.strip() for line in bare if line for command in line.split("&&")]


def reason_not_to_run(command: str) -> str | None:
    """Return why a command of the pages is not run, None if it is run."""
    return next((reason for start, reason in NOT_RUN.items() if command.startswith(start)), None)


@dataclass
class Workspace:
    """A user's folder: a checkout's recipes, some photos, and the runs of earlier commands."""

    folder: Path
    capture: pytest.CaptureFixture[str]
    printed: dict[str, str] = field(default_factory=dict)  # by command: a command of several pages is run once

    def run(self, command: str) -> str:
        """Run a command with small settings and return its output."""
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
        captured = self.capture.readouterr()
        return captured.out + captured.err

    def _prepare(self, command: str, arguments: Sequence[str]) -> None:
        """Create the runs and the recipe that a command reads, and remove the run that it would write."""
        if arguments[1:2] == ["photos.yaml"] and not (self.folder / "photos.yaml").exists():
            self.run("hf-fasttrain init path/to/photos")
        for run, recipe in TRAINED.items():
            if run in command and not (self.folder / run).exists():
                self.run(f"hf-fasttrain {recipe}")
        if arguments[0] == "crossval":
            shutil.rmtree("runs/quickstart_crossval", ignore_errors=True)
        if arguments[0] in ("train", "probe") and "--resume" not in arguments:
            recipe = load_recipe(arguments[1], [text for text in arguments[2:] if "=" in text])
            shutil.rmtree(output_dir(recipe), ignore_errors=True)


def call(arguments: list[str]) -> None:
    """Run the command line in this process; it must succeed."""
    reset_accelerate()
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code in (0, None), arguments


def small(arguments: list[str]) -> list[str]:
    """Return a command with small settings."""
    command = arguments[0]
    if command == "init":
        return [*arguments, "--model", SMALL["model.name"]]
    if command not in ("train", "probe", "check", "mislabeled", "crossval", "doctor", "tune", "ablate"):
        return arguments
    if "--models" in arguments:
        arguments[arguments.index("--models") + 1] = "test_resnet,test_vit"
    kept = [text for text in arguments if text.split("=")[0] not in SMALL]
    resumed = "--resume" in arguments and any(text.startswith("train.duration=") for text in arguments)
    settings = {**SMALL, "train.duration": "4 steps"} if resumed else SMALL
    values = [f"{key}={value}" for key, value in settings.items()]
    options = {
        "doctor": ["--seconds", "1"],
        "tune": ["--budget", "60s"],
        "ablate": ["--rounds", "1", "--seconds", "0.1", "--only", "channels_last"],
    }
    return [*kept, *options.get(command, []), *values]


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
    """Return the output of all commands so far."""
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
    """Return the current folder, with a Hub on loopback and short studies."""
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_FASTTRAIN_CACHE", str(folder / "cache"))
    shorten_studies(monkeypatch)
    return Workspace(folder, capfd, printed)


def shorten_studies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make studies take short turns and end their searches at once."""
    turn = Turn(2, 0.1)
    turns = {doctor: ("PROFILE_TURN", "PART_TURN", "TRIAL_TURN"), tune: ("TURN",)}
    turns[init_forecast] = ("WARM_TURN", "MEASURED_TURN")
    for module, names in turns.items():
        for name in names:
            monkeypatch.setattr(module, name, turn)
    monkeypatch.setattr(doctor, "MIN_ROUNDS", 1)
    monkeypatch.setattr(tune, "UNTIL", dict.fromkeys(tune.UNTIL, 0.0))


def run_python(text: str, names: dict[str, Any]) -> None:
    """Run a program with small settings; `names` are its globals."""
    values = ", ".join(repr(f"{key}={value}") for key, value in SMALL.items())
    for run in re.findall(r"runs/\w+", text) if "restore()" not in text else ():
        shutil.rmtree(run, ignore_errors=True)
    reset_accelerate()
    exec(compile(text.replace("overrides=[", f"overrides=[{values}, "), "snippet", "exec"), names)


def run_yaml(text: str, workspace: Workspace) -> None:
    """Train a complete recipe; check that a fragment is valid within another."""
    if "model:" in text:
        path = Path(f"recipe_{abs(hash(text))}.yaml")
        path.write_text(text)
        workspace.run(f"hf-fasttrain {path}")
        return
    overrides = [line.split("#")[0].strip().replace(": ", "=", 1) for line in text.splitlines()]
    load_recipe("quickstart", overrides)


def require_output(expected: str, printed: str, location: str) -> None:
    """Require that the lines on a page were printed in this order; numbers may differ, and ... matches anything."""
    position = 0
    for line in expected.splitlines():
        words = re.escape(re.sub(r"\d[\d,.]*", "0", " ".join(line.split())))
        pattern = words.replace(re.escape("..."), ".*").replace("0", r"\d[\d,.]*").replace(r"\ ", r"\s+")
        result = re.compile(pattern).search(printed, position)
        assert result, f"{location}: not printed: {line}\n{printed}"
        position = result.end()


@pytest.mark.parametrize("page", PAGES, ids=str)
def test_every_snippet_runs(page: Path, workspace: Workspace) -> None:
    printed, names = "", {"__name__": "__main__"}
    for block in blocks_of(page):
        location = f"{page}:{block.line}"
        if block.language == "bash":
            commands = [command for command in commands_of(block.text) if not reason_not_to_run(command)]
            printed = "".join(map(workspace.run, commands))
        elif block.language == "python":
            run_python(block.text, names if page in CONTINUED else {"__name__": "__main__"})
        elif block.language == "yaml":
            run_yaml(block.text, workspace)
        elif block.language == "text" and page != Path("docs/architecture.md"):
            require_output(block.text, printed, location)
        else:
            assert block.language == "text", f"{location}: a block of {block.language or 'no language'} is not run"


def test_snippets_listed_as_not_run_exist() -> None:
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
        options = {word.split("=")[0] for word in words if word.startswith("--")}
        if program == "python":
            source = (ROOT / words[0]).read_text()
            if "helpers.fuzzing import" in source:  # which defines the options of all fuzzers
                source += (ROOT / "tests/helpers/fuzzing.py").read_text()
            assert not {option for option in options if f'"{option}"' not in source}, match[1]
        elif words and words[0].startswith(("RECIPE", "RUN")):
            assert options <= options_of(["train"])
        elif words:
            assert options <= options_of(words), match[1]


def slugs_of(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as on GitHub."""
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
    names = re.findall(r"`((?:hf_fasttrain|tests|benchmarks|docs|recipes|examples|accelerate_configs)/[\w./-]*)", text)
    for name in names:
        assert (ROOT / name).exists(), f"{page}: {name}"


@pytest.mark.parametrize("script", ["make_recipe_table.py", "make_coming_from.py"])
def test_generated_tables_are_up_to_date(script: str) -> None:
    process = subprocess.run([sys.executable, ROOT / "docs" / script, "--check"], capture_output=True, text=True)
    assert process.returncode == 0, process.stderr


def names_of_others() -> dict[str, Any]:
    """Return the data from which docs/coming-from.md is generated."""
    table: dict[str, Any] = YAML(typ="safe").load(ROOT / "docs/coming_from.yaml")
    return table


def as_list(value: Any) -> list[str]:
    return value if isinstance(value, list) else [value] if value else []


def is_key(name: str) -> bool:
    """Return whether a recipe key or section of this name exists."""
    return any(key == name or key.startswith(f"{name}.") for key in all_keys())


def has_python_name(name: str) -> bool:
    """Return whether the Python API has a name, such as Trainer(loss=), trainer.final or Callback.after_save."""
    call = re.fullmatch(r"Trainer(\.\w+)?\((\w+)=?\)", name)
    if call:
        function: Any = getattr(Trainer, call[1][1:]) if call[1] else Trainer
        return call[2] in {*inspect.signature(function).parameters, *(RecipeOptions.__annotations__ if call[1] else ())}
    model = torch.nn.Linear(2, 2)
    batches = [(torch.zeros(2, 2), torch.zeros(2, dtype=torch.long))]
    trainer = Trainer(model, batches, torch.optim.SGD(model.parameters(), lr=0.1), output_dir="runs/names")
    start: Any = {"trainer": trainer, "Trainer": Trainer, "Callback": Callback}.get(name.split(".")[0])
    module, _, last = name.rpartition(".")
    try:
        operator.attrgetter(name.partition(".")[2] or "__class__")(start) if start else getattr(
            importlib.import_module(module), last
        )
    except (AttributeError, ModuleNotFoundError, ValueError):
        return False
    return True


def test_our_names_in_coming_from_exist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    table = names_of_others()
    python = set(table["python_of"].values())
    assert all(map(is_key, table["python_of"]))
    for row in (row for source in table["sources"] for row in source["rows"]):
        keys = as_list(row.get("to"))
        assert not [key for key in keys if not is_key(key.partition("=")[0])], row
        load_recipe("quickstart", [key for key in keys if "=" in key])
        python |= set(as_list(row.get("python")))
        assert keys or row.get("python") or row.get("note") or row.get("instead"), f"says nothing: {row}"
    page = (ROOT / "docs/coming-from.md").read_text(encoding="utf-8")
    sections = {key.split(".")[0] for key in all_keys()}
    for text in re.findall(r"`([^`]+)`", re.sub(r"^\| [^|]*\|", "|", page, flags=re.MULTILINE)):
        key = re.match(r"(\w+)\.[\w.]+\w", text)
        if key and key[1] in sections - {"log"}:
            assert is_key(key[0]), text
        elif re.match(r"(T|t)rainer\b|Callback", text):
            python.add(re.sub(r"\(.{2,}\w\(.*|\(\)$", "", text))
    assert not [name for name in sorted(python) if not has_python_name(name)]
    assert not has_python_name("Trainer(epochs=)")
    assert not has_python_name("trainer.epochs")
    assert not is_key("train.epochs")


def test_each_name_of_another_library_is_in_one_row() -> None:
    for source in names_of_others()["sources"]:
        theirs = Counter(name for row in source["rows"] for name in as_list(row["from"]))
        assert max(theirs.values()) == 1, theirs.most_common(3)
        if "fields_of" in source:
            if not transformers.__version__.startswith(source["fields_of"]):
                pytest.skip(f"the table is of transformers {source['fields_of']}")
            assert {field.name for field in fields(transformers.TrainingArguments)} <= theirs.keys()


def example(name: str) -> dict[str, Any]:
    """Return an example's globals, in a process reset to its start."""
    reset_accelerate()
    path = ROOT / "examples" / name
    program: dict[str, Any] = {"__name__": "example"}
    exec(compile(path.read_text(), str(path), "exec"), program)
    return program


def test_a_users_model_trains(workspace: Workspace) -> None:
    example("own_model.py")["main"]("runs/own_model", "2 epochs")
    assert float(re.findall(r"accuracy (\S+) after 46 steps", workspace.capture.readouterr().out)[0]) > 0.5


def test_a_loss_with_weights_is_resumed(workspace: Workspace) -> None:
    main = example("own_loss.py")["main"]
    main("runs/own_loss", "1 epoch")
    _, resumed = main("runs/own_loss", "2 epochs")
    result, uninterrupted = main("runs/own_loss_whole", "2 epochs")
    assert torch.equal(resumed.centres, uninterrupted.centres)
    assert result.metrics["accuracy"] > 0.5
    logged = [json.loads(line) for line in Path("runs/own_loss/metrics.jsonl").read_text().splitlines()]
    assert 0 < [line["angle"] for line in logged if line["kind"] == "train"][-1] < np.pi / 2


def test_two_passes_do_not_depend_on_accumulation(workspace: Workspace) -> None:
    """As in a plain loop: the gradients of the complete batch, at its weights and at the perturbed ones."""
    program = example("two_passes.py")
    split, unsplit = (program["main"](number, "1 epoch").state_dict() for number in ("4", "1"))
    for name, weight in unsplit.items():
        assert torch.allclose(split[name], weight, atol=1e-5), name
    model, batches = program["make_model"](), iter(program["loaders"]()[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for images, labels in batches:
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        before = [p.detach().clone() for p in model.parameters()]
        with torch.no_grad():
            for p in model.parameters():
                assert p.grad is not None
                p += 0.05 * p.grad / norm
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        with torch.no_grad():
            for p, weight in zip(model.parameters(), before, strict=True):
                p.copy_(weight)
        optimizer.step()
        optimizer.zero_grad()
    for name, weight in model.state_dict().items():
        assert torch.allclose(unsplit[name], weight, atol=1e-5), name


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
        momentum.before_step(SimpleNamespace(optimizer=optimizer), At(step, step, 0, 100))
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


def test_the_backbone_is_unfrozen_after_an_epoch(workspace: Workspace) -> None:
    """Also after resuming, when it is already unfrozen."""
    small = [f"{key}={value}" for key, value in {**SMALL, "data.dataset": "digits", "train.batch_size": "256"}.items()]
    Trainer.from_recipe("finetune", [*small, "output_dir=runs/first"]).fit()  # weights to start from
    small += ["output_dir=runs/unfreeze", "model.pretrained=runs/first/model"]
    program = example("unfreeze.py")
    result = program["main"]([*small, "train.duration=10 steps"])
    assert result.steps == 10
    assert re.search(r"step 8: \d+ more parameters are trained", workspace.capture.readouterr().out)
    trainer = Trainer.from_recipe(
        "finetune",
        ["model.freeze_backbone=true", *small, "train.duration=12 steps"],
        callbacks=[program["Unfreeze"]()],
        resume=True,
    )
    assert len(trainer.optimizer.param_groups) == 4
    assert trainer.fit().steps == 12
    assert "more parameters" not in workspace.capture.readouterr().out


def test_every_example_has_its_test() -> None:
    assert {path.name for path in (ROOT / "examples").iterdir() if path.is_file()} == {
        "callbacks.py", "own_loss.py", "own_model.py", "tune_then_train.sh", "two_passes.py", "unfreeze.py",
        "with_albumentations.py",
    }  # fmt: skip


def test_the_documented_parameters_are_those_of_the_trainer() -> None:
    table = (ROOT / "docs/python-api.md").read_text().split("| parameter | meaning |")[1].split("\n\n")[0]
    names = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1] if row else "")}
    known = set(inspect.signature(Trainer.__init__).parameters) - {"self"}
    assert names <= known
    assert known - names <= NOT_DOCUMENTED


def test_tune_then_train_gives_commands_that_run(workspace: Workspace) -> None:
    """bash runs the script with a fake command that records its arguments; the commands are run here."""
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
