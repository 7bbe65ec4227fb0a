"""Ablations: their arms, results, files and failures."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import xml.dom.minidom
from collections.abc import Callable, Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.fake_arms import FACTS, Fakes, ready
from helpers.runs import exit_status
from PIL import Image

from hf_fasttrain import load_recipe
from hf_fasttrain.study import ablate as study
from hf_fasttrain.study.ablate import Ablation, Plan, measure_arms, plan_arms
from hf_fasttrain.study.ablate_full import train_all
from hf_fasttrain.study.ablate_report import print_ablation, row_cells, to_markdown, write_ablation
from hf_fasttrain.study.bench import Arm, ArmFailed, Bench
from hf_fasttrain.study.techniques import NAMES, Hardware, build_arms, select_techniques, techniques
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.terminal import Terminal

CPU = Hardware(gpu=False, bf16=True, compiler=True)
GPU = Hardware(gpu=True, bf16=True, compiler=True)
PLAN = Plan(rounds=6, turn_seconds=1.0)


def settings_of(arm: Arm) -> dict[str, str]:
    return dict(override.partition("=")[::2] for override in arm.overrides)


def by_name(items: Sequence[Any]) -> dict[str, Any]:
    return {technique.name: technique for technique in items}


def test_every_technique_has_its_name() -> None:
    assert [technique.name for technique in techniques(ready(), CPU)] == list(NAMES)


def test_accumulation_is_an_arm_with_larger_steps_and_one_with_smaller_micro_batches() -> None:
    """The study's recipes have steps of 256 in two micro-batches of 128."""
    values = {**FACTS, "train.batch_size": 256, "accelerate.gradient_accumulation_steps": 2}
    message = ready(settings=values, micro_batch_size=128)
    arms = {p.arm.name: settings_of(p.arm) for p in build_arms(techniques(message, CPU))}
    baseline = arms["baseline"]
    assert (baseline["train.batch_size"], baseline["accelerate.micro_batch_size"]) == ("128", "null")
    larger = arms["+ GA: steps of 2 x 128"]
    assert (larger["train.batch_size"], larger["accelerate.micro_batch_size"]) == ("256", "128")
    smaller = arms["+ GA: steps of 128 in micro-batches of 64"]
    assert (smaller["train.batch_size"], smaller["accelerate.micro_batch_size"]) == ("128", "64")
    assert arms["everything"]["train.batch_size"] == "256"


def test_the_baseline_is_plain_and_each_arm_differs_in_one_thing() -> None:
    every = techniques(ready(), CPU)
    plans = build_arms(every)
    base = settings_of(plans[0].arm)
    single = [plan for plan in build_arms(select_techniques(every, ["amp_bf16"], [])) if plan.kind == "baseline"]
    assert settings_of(single[0].arm) == {"accelerate.mixed_precision": "no"}  # nothing else is changed
    expected = {
        "accelerate.mixed_precision": "no",
        "accelerate.channels_last": "false",
        "accelerate.compile": "false",
        "accelerate.matmul_precision": "highest",
        "data.pin_memory": "false",
        "data.workers": "0",
        "data.decoder": "pillow",
        "data.cache": "none",
    }
    assert {key: base[key] for key in expected} == expected
    assert settings_of(plans[1].arm) == base
    (everything,) = (settings_of(plan.arm) for plan in plans if plan.kind == "everything")
    for plan in plans:
        if plan.technique is None or plan.arm.not_applicable:
            continue
        against = base if plan.kind == "alone" else everything
        changed = {key for key, value in settings_of(plan.arm).items() if value != against[key]}
        assert changed == set(plan.technique.on) & changed
        assert changed, plan.arm.name


def test_techniques_that_cannot_matter_are_not_applicable() -> None:
    on_cpu = by_name(techniques(ready(is_jpeg=False, num_images=40), CPU))
    assert on_cpu["pinned_memory"].not_applicable == "no GPU"
    assert on_cpu["amp_fp16"].not_applicable == "no GPU"
    assert on_cpu["decoder"].not_applicable == "no image of a sample is a JPEG"
    assert on_cpu["ga_larger_step"].not_applicable == "there are only 40 training images"
    on_gpu = by_name(techniques(ready(), GPU))
    assert not any(technique.not_applicable for technique in on_gpu.values())
    assert not on_gpu["amp_fp16"].in_everything  # bf16 is
    old = by_name(techniques(ready(), GPU._replace(bf16=False, compiler=False)))
    assert old["amp_bf16"].not_applicable == "the GPU has no bf16"
    assert old["amp_fp16"].in_everything
    assert old["compile"].not_applicable == "torch.compile finds no C++ compiler here"
    tiny = by_name(techniques(ready(micro_batch_size=2), CPU))
    assert tiny["ga_pieces"].not_applicable == "steps of 2 images can't be split"
    one_step = by_name(techniques(ready(steps=32), CPU))
    assert one_step["cache"].not_applicable == "each image is read once"
    removed = [plan.technique.name for plan in build_arms(list(on_cpu.values())) if plan.kind == "removed"]
    assert "pinned_memory" not in removed


def test_techniques_are_chosen_by_name() -> None:
    every = techniques(ready(), CPU)
    assert [t.name for t in select_techniques(every, ["cache", "amp_bf16"], [])] == ["amp_bf16", "cache"]
    assert "compile" not in [t.name for t in select_techniques(every, [], ["compile"])]
    with pytest.raises(RunError, match=r"unknown technique 'chanels_last'.*Did you mean 'channels_last'"):
        select_techniques(every, ["chanels_last"], [])
    with pytest.raises(RunError, match="no technique is left"):
        select_techniques(every, ["cache"], ["cache"])


def speed(settings: dict[str, str]) -> float:
    """Return seconds per image: bf16 is twice as fast, channels_last 1.25 times, compilation fails."""
    if settings.get("accelerate.compile") == "true":
        raise ArmFailed("BackendCompilerFailed: no compiler | here")
    seconds = 0.02
    if settings.get("accelerate.mixed_precision") == "bf16":
        seconds /= 2
    if settings.get("accelerate.channels_last") == "true":
        seconds /= 1.25
    return seconds


def measured(tmp_path: Path, fakes: Fakes | None = None, overrides: Sequence[str] = ()) -> tuple[Ablation, bool]:
    path = tmp_path / "small.yaml"
    path.write_text("model: {name: test_resnet}\ndata: {dataset: digits}\ntrain: {duration: 2 steps, batch_size: 16}\n")
    recipe, fakes = load_recipe(path, overrides), fakes or Fakes(speed)
    arms = plan_arms(fakes, PLAN, CPU)
    with Bench(fakes, clock=fakes.clock) as bench:
        result, complete = measure_arms(arms, bench, PLAN, lambda text: None)
    return study.describe(recipe, arms, result, PLAN, command="hf-fasttrain ablate small", complete=complete), complete


def test_the_results_are_those_of_the_arms(tmp_path: Path) -> None:
    ablation, complete = measured(tmp_path)
    rows = {row.name: row for row in ablation.rows}
    assert complete
    assert rows["baseline"].images_per_second.median == pytest.approx(50)
    assert rows["+ AMP: bf16"].speed_up.median == pytest.approx(2)
    assert rows["+ channels_last"].speed_up.median == pytest.approx(1.25)
    assert rows["baseline, again"].speed_up.median == pytest.approx(1)
    assert rows["+ AMP: bf16"].speed_up.confidence >= 0.95
    failed, invalid = rows["+ torch.compile"], rows["+ PM: pinned memory"]
    assert (failed.status, failed.images_per_second) == ("failed", None)
    assert "no compiler" in failed.reason
    assert (invalid.status, invalid.images_per_second) == ("n/a", None)
    assert rows["everything"].status == "failed"  # it compiles
    assert rows["everything - torch.compile"].speed_up.median == pytest.approx(2.5)
    assert rows["+ GA: steps of 2 x 32"].note.startswith("the same micro-batch with a larger step")


def test_a_recipe_that_cant_run_here_is_one_message(tmp_path: Path) -> None:
    def speed(settings: dict[str, str]) -> float:
        raise ArmFailed("accelerate.mixed_precision: fp16 needs a GPU, and there is none")

    with pytest.raises(RunError, match=r"could not be measured here: .*fp16 needs a GPU"):
        measured(tmp_path, Fakes(speed))


def test_ctrl_c_keeps_what_was_measured(tmp_path: Path) -> None:
    fakes = Fakes(speed)

    def before(arm: Arm) -> None:
        if fakes.clock.now > 200:
            raise KeyboardInterrupt

    fakes.before_turn = before
    ablation, complete = measured(tmp_path, fakes)
    assert not complete
    assert any(row.images_per_second for row in ablation.rows)
    assert any(note.startswith("Stopped by Ctrl-C") for note in ablation.notes)
    assert fakes.alive == 0
    write_ablation(ablation, tmp_path)


class Links(HTMLParser):
    """Collects the links of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        links = [v for k, v in attrs if k in ("src", "href") and v and not v.startswith("#")]
        self.found += [*links, *([tag] if tag in ("script", "link", "iframe") else [])]


def test_all_files_are_written_and_open_offline(tmp_path: Path) -> None:
    ablation, _ = measured(tmp_path)
    folder = tmp_path / "out"
    study.require_new(folder)
    write_ablation(ablation, folder)
    assert {path.name for path in folder.iterdir()} == {
        f"ablation.{kind}" for kind in ("json", "md", "png", "svg", "html")
    }
    reloaded = study.load_ablation(folder / "ablation.json")
    assert reloaded == ablation
    assert Image.open(folder / "ablation.png").size[0] > 1000
    xml.dom.minidom.parse(str(folder / "ablation.svg"))
    page = (folder / "ablation.html").read_text()
    links = Links()
    links.feed(page)
    assert links.found == []
    assert "url(http" not in page
    assert "<svg" in page
    assert "+ AMP: bf16" in page
    with pytest.raises(RunError, match="holds an ablation already"):
        study.require_new(folder)


def test_the_json_has_its_schema(tmp_path: Path) -> None:
    ablation, _ = measured(tmp_path)
    values = json.loads(ablation.model_dump_json())
    assert values["format"] == 1
    assert {"machine", "versions", "date", "command", "rounds", "rows"} <= set(values)
    with pytest.raises(ValueError, match="images_per_sec"):
        Ablation.model_validate({**values, "images_per_sec": 1})
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(RunError, match=r"x\.json: is not an ablation"):
        study.load_ablation(tmp_path / "x.json")


def test_the_markdown_is_one_table(tmp_path: Path) -> None:
    ablation, _ = measured(tmp_path)
    lines = [line for line in to_markdown(ablation).splitlines() if line.startswith("|")]
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in lines}
    assert bars == {7}  # a | in an error's text starts no column
    assert len(lines) == 2 + len(ablation.rows)
    console = Terminal(width=160, record=True, file=(tmp_path / "x").open("w"))
    print_ablation(console, ablation)
    assert "2.00 (2.00 - 2.00)" in console.export_text()


def test_texts_in_the_page_are_escaped(tmp_path: Path) -> None:
    ablation, _ = measured(tmp_path)
    row = replace_row(ablation, 0, name="<script>alert(1)</script>")
    write_ablation(row, tmp_path)
    assert "<script" not in (tmp_path / "ablation.html").read_text()
    assert "<script" not in (tmp_path / "ablation.svg").read_text()


def replace_row(ablation: Ablation, number: int, **changes: Any) -> Ablation:
    rows = list(ablation.rows)
    rows[number] = rows[number].model_copy(update=changes)
    return ablation.model_copy(update={"rows": rows})


def test_a_folder_that_cant_be_created_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match="can't be created"):
        study.require_new(tmp_path / "file" / "out")


def test_files_that_cant_be_written_are_one_message(tmp_path: Path) -> None:
    ablation, _ = measured(tmp_path)
    with pytest.raises(RunError, match="not everything could be written"):
        write_ablation(ablation, tmp_path / "missing")


def write_run(run: Path, accuracies: list[float], seconds: float) -> None:
    run.mkdir(parents=True)
    metrics = {"accuracy": accuracies[-1], "f1_macro": accuracies[-1] - 0.1}
    (run / "result.json").write_text(json.dumps({"metrics": metrics, "test_metrics": None, "train_seconds": seconds}))
    per_training = seconds / len(accuracies)
    lines = [
        {
            "kind": "evaluation",
            "step": step,
            "split": "validation",
            "accuracy": value,
            "train_seconds": per_training * step,
        }
        for step, value in enumerate(accuracies, 1)
    ]
    lines.append({**lines[-1], "split": "test", "accuracy": 1.0, "train_seconds": 0.1})
    (run / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))


def fake_training(calls: list[list[str]]) -> Callable[[Sequence[str], Path], str]:
    def train(overrides: Sequence[str], log: Path) -> str:
        values = dict(override.partition("=")[::2] for override in overrides)
        calls.append(list(overrides))
        if values.get("accelerate.channels_last") == "true":
            return "exit status 2: error: it was too much"
        fast = values["accelerate.mixed_precision"] == "bf16"
        seed = int(values["seed"])
        final = 0.9 + 0.02 * seed
        write_run(Path(values["output_dir"]), [0.5, 0.95 if fast else 0.7, final], 30.0 if fast else 60.0)
        return ""

    return train


def test_full_trains_every_arm_with_every_seed(tmp_path: Path) -> None:
    ablation, _ = measured(tmp_path)
    calls: list[list[str]] = []
    messages: list[str] = []
    result, complete = train_all(ablation, "small.yaml", tmp_path, 2, messages.append, fake_training(calls))
    rows = {row.name: row for row in result.rows}
    assert complete
    assert result.target_accuracy == pytest.approx(0.90)  # its least successful seed's
    base, fast = rows["baseline"].full, rows["+ AMP: bf16"].full
    assert base.accuracy == pytest.approx(0.91)
    assert base.accuracy_std == pytest.approx(0.01414, abs=1e-4)
    assert base.f1_macro == pytest.approx(0.81)
    assert (base.seconds_to_target, base.seeds_at_target) == (pytest.approx(60), 2)
    assert fast.speed_up == pytest.approx(2)
    assert fast.seconds_to_target == pytest.approx(20)
    assert rows["+ channels_last"].full is None
    assert any("it was too much" in text for text in messages)
    assert rows["+ PM: pinned memory"].full is None
    number = len(calls)
    train_all(ablation, "small.yaml", tmp_path, 2, messages.append, fake_training(calls))
    later_calls = calls[number:]
    assert all("accelerate.channels_last=true" in call for call in later_calls)  # the others are read
    assert row_cells(rows["baseline"], full=True)[-1] == "1 min 00 s (2 of 2 seeds)"
    write_ablation(result, tmp_path)
    assert "0.9100 +- 0.0141" in (tmp_path / "ablation.md").read_text()


def test_full_works_without_accuracy(tmp_path: Path) -> None:
    ablation, _ = measured(tmp_path)

    def train(overrides: Sequence[str], log: Path) -> str:
        run = Path(dict(override.partition("=")[::2] for override in overrides)["output_dir"])
        run.mkdir(parents=True)
        (run / "result.json").write_text(json.dumps({"metrics": {"loss": 0.3}, "train_seconds": 10.0}))
        return ""

    result, _ = train_all(ablation, "small.yaml", tmp_path, 1, lambda text: None, train)
    training = result.rows[0].full
    assert (training.accuracy, training.accuracy_std, training.f1_macro, training.seeds_at_target) == (
        None,
        None,
        None,
        0,
    )
    write_ablation(result, tmp_path)
    assert study.load_ablation(tmp_path / "ablation.json") == result


def test_full_keeps_finished_trainings_after_ctrl_c(tmp_path: Path) -> None:
    ablation, _ = measured(tmp_path)
    calls: list[list[str]] = []
    train = fake_training(calls)

    def interrupted_training(overrides: Sequence[str], log: Path) -> str:
        if len(calls) == 1:
            raise KeyboardInterrupt
        return train(overrides, log)

    result, complete = train_all(ablation, "small.yaml", tmp_path, 1, lambda text: None, interrupted_training)
    assert not complete
    assert result.rows[0].full is not None


def test_an_earlier_ablation_continues_only_for_the_same_recipe(tmp_path: Path) -> None:
    ablation, _ = measured(tmp_path)
    write_ablation(ablation, tmp_path)
    recipe = load_recipe(tmp_path / "small.yaml")
    assert study.load_earlier(tmp_path, recipe) == ablation
    assert study.load_earlier(tmp_path / "new", recipe) is None
    with pytest.raises(RunError, match="holds an ablation of another recipe or with other overrides"):
        study.load_earlier(tmp_path, load_recipe(tmp_path / "small.yaml", ["seed=3"]))


def test_the_command_line_runs_a_complete_ablation(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    """Real arms and complete trainings by the real command."""
    recipe, folder = write_recipe(), tmp_path / "out"
    command = [sys.executable, "-m", "hf_fasttrain", "ablate", str(recipe), "--only", "channels_last,pinned_memory"]
    command += ["--rounds", "2", "--seconds", "0.1", "--full", "--seeds", "1", "--output", str(folder)]
    process = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    ablation = study.load_ablation(folder / "ablation.json")
    rows = {row.name: row for row in ablation.rows}
    assert list(rows) == ["baseline", "baseline, again", "+ PM: pinned memory", "+ channels_last"]
    assert rows["+ PM: pinned memory"].status == "n/a"
    assert rows["+ channels_last"].speed_up is not None
    assert 0 <= rows["+ channels_last"].full.accuracy <= 1
    assert rows["baseline"].full.seeds == 1
    assert "no GPU" in process.stdout
    assert "Traceback" not in process.stderr
    assert "leaked" not in process.stderr


def test_ctrl_c_on_the_command_line_keeps_what_was_measured(
    tmp_path: Path, write_recipe: Callable[..., Path], forked_arms: None
) -> None:
    folder = tmp_path / "out"
    command = ["ablate", str(write_recipe()), "--only", "channels_last"]
    command += ["--rounds", "99", "--seconds", "0.1", "--output", str(folder)]
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        sys.stdout = sys.stderr = os.fdopen(writing, "w", buffering=1)
        os._exit(exit_status(command))
    os.close(writing)
    with os.fdopen(reading) as printed:
        next(line for line in printed if "round 2 of 99" in line)
        while not (arms := psutil.Process(child).children(recursive=True)):
            time.sleep(0.01)
        os.kill(child, signal.SIGINT)
        rest = printed.read()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 130, rest
    assert "Traceback" not in rest
    ablation = study.load_ablation(folder / "ablation.json")
    assert ablation.rows[0].images_per_second is not None
    assert any(note.startswith("Stopped by Ctrl-C") for note in ablation.notes)
    psutil.wait_procs(arms, timeout=100)
    assert not any(arm.is_running() for arm in arms)
