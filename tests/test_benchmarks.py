"""Every benchmark can be imported and overrides only existing methods; gpu.py runs with tiny models on the CPU."""

from __future__ import annotations

import ast
import importlib
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import in_child
from torch import Tensor, nn

from hf_fasttrain.train.log import RunLog
from hf_fasttrain.utils.errors import Stopped

ROOT = Path(__file__).parent.parent
PROGRAMS = sorted([*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "docs").glob("*.py")])


def imported(name: str) -> Any:
    """Return a benchmark, or a program of the docs, as a module; call it in a child, since it changes `sys`."""
    sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "docs")]
    return importlib.import_module(name)


def wrong_overrides(source: str, names: dict[str, Any]) -> list[str]:
    """Return private methods of the package's subclasses that no base class has, as Class.method.

    Subclasses must have no other private methods: an override that is no longer called would not be detected.
    `names`: the program's globals; classes in functions are checked too.
    """
    tree = ast.parse(source)
    known = dict(names)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "hf_fasttrain":
            module = importlib.import_module(node.module)
            known |= {alias.asname or alias.name: getattr(module, alias.name) for alias in node.names}
    wrong = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and (bases := [base for base in map(resolver(known), node.bases) if base]):
            private = [part.name for part in node.body if isinstance(part, ast.FunctionDef) and is_private(part.name)]
            wrong += [f"{node.name}.{name}" for name in private if not any(hasattr(base, name) for base in bases)]
    return wrong


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def resolver(known: dict[str, Any]) -> Callable[[ast.expr], Any]:
    """Return a function from a base class in the source to the class, None if it is not from the package."""

    def find(base: ast.expr) -> Any:
        if isinstance(base, ast.Attribute):
            return getattr(find(base.value), base.attr, None)
        return known.get(base.id) if isinstance(base, ast.Name) else None

    def resolve(base: ast.expr) -> Any:
        value = find(base)
        is_ours = isinstance(value, type) and any(cls.__module__.startswith("hf_fasttrain") for cls in value.__mro__)
        return value if is_ours else None

    return resolve


def test_every_program_can_be_imported_and_overrides_existing_private_methods() -> None:
    def work() -> dict[str, list[str]]:
        wrong = {}
        for path in PROGRAMS:
            module = imported(path.stem)
            assert module.__file__ == str(path)
            wrong[path.stem] = wrong_overrides(path.read_text(encoding="utf-8"), vars(module))
        return wrong

    wrong = in_child(work)
    assert len(wrong) > 20
    assert {name: methods for name, methods in wrong.items() if methods} == {}


def test_an_override_of_a_missing_private_method_is_detected() -> None:
    planted = """
from hf_fasttrain import Trainer
import hf_fasttrain.train.throughput as clock

class Race(Trainer):
    def _make_steps(self): ...
    def _should_stop(self): ...
    def helper(self): ...

def start():
    from hf_fasttrain.train.log import RunLog as Log

    class Quiet(Log):
        def _whisper(self): ...

    class Clock(clock.Throughput):
        def _lost(self): ...
        def _new_lap(self): ...

class Own:
    def _anything(self): ...
"""
    import hf_fasttrain.train.throughput

    overrides = wrong_overrides(planted, {"clock": hf_fasttrain.train.throughput})
    assert sorted(overrides) == ["Clock._lost", "Quiet._whisper", "Race._should_stop"]


def dry_run(folder: Path, *arguments: str) -> dict[str, dict[str, Any]]:
    """Return the rows of a dry run of gpu.py by their names."""

    def run() -> int:
        status: int = imported("gpu").main(["--dry-run", "--json", str(folder / "rows.json"), *arguments])
        return status

    assert in_child(run) == 0
    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))["rows"]
    return {row["row"]: row for row in rows}


def test_gpu_sections_run_and_save_their_measurements(tmp_path: Path) -> None:
    rows = dry_run(tmp_path, "--sections", "copy,train,ga,amp,pm", "--models", "test_resnet", "--quick")
    assert {row["status"] for row in rows.values()} == {"ok"}, rows
    assert [row["section"] for row in rows.values()] == ["copy", "train", "ga", "amp", "pm"]

    sides = rows["train test_resnet bf16 channels_last"]["sides"]
    assert set(sides) == {"fit", "bare", "timm"}
    losses = [side["first_loss"] for side in sides.values()]
    assert max(losses) - min(losses) < 1e-3
    for name, side in sides.items():
        assert len(side["windows"]) == 2
        assert side["images_per_second"]["least"] > 0
        assert ("fit_to_this" in side) == (name != "fit")
    assert sides["bare"]["fit_to_this"]["most"] == pytest.approx(
        max(theirs / mine for mine, theirs in zip(sides["fit"]["windows"], sides["bare"]["windows"], strict=True))
    )

    arms = rows["ga test_resnet"]["arms"]
    assert {(arm["micro_batches"], arm["batches"]) for arm in arms.values()} == {(1, 1), (4, 1), (4, 4)}
    assert arms["baseline"]["to_baseline"] == {"median": 1, "least": 1, "most": 1}
    assert set(rows["amp test_resnet"]["arms"]) == {"baseline", "bf16"}
    assert set(rows["amp test_resnet"]["not_run"]) == {"fp16"}
    assert set(rows["pm test_resnet"]["not_run"]) == {"pinned"}


def test_a_window_of_fit_covers_everything_between_its_steps_except_turns_of_others() -> None:
    def work() -> tuple[list[float], float, list[tuple[int, str]]]:
        sides = imported("gpu_sides")
        bench = sides.Bench(torch.device("cpu"), (), 8, 2, windows=2, window_seconds=0.0, log_every=2)
        fit, turns = sides.Fit(), []

        def others(window: int, when: str) -> None:
            turns.append((window, when))
            time.sleep(0.2)

        loader = sides.TimedBatches(bench, iter(lambda: (0, 0), None), fit, number=4, windows=2)
        loader.others = others
        number = sum(time.sleep(0.005) is None for _ in loader)
        assert number == len(loader)
        return fit.windows, fit.step_seconds, turns

    windows, step_seconds, turns = in_child(work)
    assert [4 * 0.005 <= seconds < 0.15 for seconds in windows] == [True, True]
    assert step_seconds >= 0.005
    assert turns == [(0, "before"), (0, "after"), (1, "before"), (1, "after")]


def test_sides_that_compute_different_things_fail() -> None:
    def work() -> str:
        measure = imported("gpu_measure")
        measure.require_same({"fit": 6.90, "bare": 6.95}, within=0.01)
        for losses in ({"fit": 6.9, "bare": 7.2}, {"fit": float("nan"), "bare": 6.9}):
            with pytest.raises(RuntimeError, match="do not compute the same"):
                measure.require_same(losses, within=0.01)
        return "looked"

    assert in_child(work) == "looked"


def test_the_race_ends_with_the_evaluation_that_reaches_its_goal(tmp_path: Path) -> None:
    (row,) = dry_run(tmp_path, "--sections", "cifar10").values()
    assert row["status"] == "ok"
    assert [seen["step"] for seen in row["evaluations"]] == [2]  # every 2 steps
    assert (row["steps"], row["of_steps"]) == (2, 6)
    assert row["accuracy"] == row["evaluations"][0]["accuracy"] >= row["goal"] == 0
    assert 0 < row["seconds_to_goal"] <= row["train_seconds"]


def test_a_race_that_misses_its_goal_trains_to_the_end_or_to_its_deadline() -> None:
    def work() -> tuple[dict[str, Any], dict[str, Any]]:
        gpu = imported("gpu")
        missed: dict[str, Any] = {}
        gpu.race("digits", [*gpu.DIGITS, *gpu.DRY_RACE], 1.01, 600.0, missed)
        late: dict[str, Any] = {}
        gpu.race("digits", [*gpu.DIGITS, *gpu.DRY_RACE], 0.0, 0.0, late)
        return missed, late

    missed, late = in_child(work)
    assert [seen["step"] for seen in missed["evaluations"]] == [2, 4, 6]
    assert missed["status"] == "101% not reached: training ended"
    assert missed["accuracy"] == missed["evaluations"][-1]["accuracy"]
    assert (late["evaluations"], late["steps"], late["accuracy"]) == ([], 0, None)
    assert late["status"] == "0% not reached: out of time"


class Interrupting:
    """An evaluation loader that sends itself a stop signal."""

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        os.kill(os.getpid(), signal.SIGTERM)
        for _ in range(3):
            yield torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])


def test_a_race_that_a_signal_stops_while_evaluating_has_no_evaluation() -> None:
    def work() -> list[Any]:
        model = nn.Sequential(nn.Flatten(), nn.Linear(48, 2))
        batch = torch.zeros(2, 3, 4, 4), torch.tensor([0, 1])
        gpu_race, seen = imported("gpu_race"), []
        trainer = gpu_race.RaceTrainer(
            model,
            [batch],
            torch.optim.SGD(model.parameters(), 0.1),
            eval_loader=Interrupting(),
            num_classes=2,
            log=RunLog(None, show=False),
            callbacks=[runner := gpu_race.Race(0.0, seen)],
        )
        with pytest.raises(Stopped):
            gpu_race.run_until(trainer, runner, float("inf"))
        return seen

    assert in_child(work) == []


def test_a_row_that_runs_out_of_time_keeps_its_results() -> None:
    def work() -> list[list[dict[str, Any]]]:
        gpu, written = imported("gpu"), []

        def measure(row: dict[str, Any]) -> None:
            row["seen"] = 1
            try:
                time.sleep(30)
            except Exception:  # noqa: BLE001 - as code on the way may do
                row["swallowed"] = True

        def fail(row: dict[str, Any]) -> None:
            raise ValueError("one\ntwo")

        budget = gpu.Budget(60, lambda rows: written.append([dict(row) for row in rows]), {"copy": 0.0, "race": 99.0})
        budget.run(gpu.Task("copy", "fails", "copy", fail))
        budget.run(gpu.Task("cifar10", "long", "race", measure))
        budget.ends = time.monotonic() + 0.5
        budget.run(gpu.Task("copy", "late", "copy", measure))
        return written

    written = in_child(work)
    assert [len(rows) for rows in written] == [1, 2, 3]  # after each row
    failed, long, late = written[-1]
    assert failed["status"] == "failed: ValueError: one"
    assert long == {"section": "cifar10", "row": "long", "status": "not run: budget"}
    assert (late["seen"], late["status"], "swallowed" in late) == (1, "stopped: budget", False)
    assert late["wall_seconds"] < 5


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [
        ([1.0, 1.1, 2.0, 11.0], 1.0),  # the first step is within the noise
        ([1.0, 2.0, 11.0, 101.0], 1.0),
        ([1.0, 1.0, 1.1, 31.0], 2.08),  # quadratic, and only the largest shows it: at least this steep
        ([1.0, 2.0, 4.2, 11.0], 0.51),
        ([1.0, 0.9, 1.2, 1.1], None),
    ],
)
def test_the_exponent_of_growth_is_that_above_the_baseline(seconds: list[float], expected: float | None) -> None:
    def check() -> None:
        growth = imported("growth")
        sizes = [100, 1_100, 10_100, 100_100]
        rows = [{"size": size, "seconds": time, "megabytes": 500.0} for size, time in zip(sizes, seconds, strict=True)]
        assert growth.exponent(rows, "megabytes") is None
        found = growth.exponent(rows, "seconds")
        assert found == (None if expected is None else pytest.approx(expected, abs=0.01))
        steep = expected is not None and expected > growth.LIMIT
        text = f"push: seconds grow with exponent {expected}, the limit is 1.1"
        assert growth.too_steep({"push": rows}) == ([text] if steep else [])

    in_child(check)


def test_growth_exits_with_status_1_and_names_what_grows_too_fast(capfd: pytest.CaptureFixture[str]) -> None:
    def check() -> None:
        growth = imported("growth")
        growth.measure = lambda name, size: {"size": size, "seconds": size**2 / 1e6, "megabytes": 50.0}
        sys.argv = ["growth.py", "--only", "push"]
        assert growth.main() == 1
        busy = {size: [size / 1e4, size / 1e4] for size in (100, 2_000, 20_000)} | {200_000: [40.0, 20.0]}
        growth.measure = lambda name, size: {"size": size, "seconds": busy[size].pop(0), "megabytes": 50.0}
        assert growth.main() == 0

    in_child(check)
    printed = capfd.readouterr().out
    assert "push: seconds grow with exponent 2.00, the limit is 1.1" in printed
    assert printed.count("push: measured once more") == 2
