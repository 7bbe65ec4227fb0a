"""An ablation's arms trained to the end: accuracy, F1, training time, time to an accuracy, over several seeds."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_fasttrain.study.ablate import Ablation, FullTraining, Row
from hf_fasttrain.study.bench import Tell
from hf_fasttrain.utils.files import read_json, read_lines

UNPUBLISHED = ("log.report=false", "hub=null")  # of the arms
Train = Callable[[Sequence[str], Path], str]  # overrides and log file to what went wrong, or nothing


def train_all(
    ablation: Ablation, recipe_file: str, folder: Path, seeds: int, tell: Tell, train: Train | None = None
) -> tuple[Ablation, bool]:
    """Train every arm to the end, once for each seed, and return the ablation with accuracy and time.

    Trainings that an earlier call has finished in `folder` are read, not made again. Ctrl-C ends it with what is there.
    """
    train = train or (lambda overrides, log: _train(recipe_file, overrides, log))
    runs: dict[str, list[Path]] = {}
    whole = True
    try:
        for seed in range(seeds):
            for number, row in enumerate(ablation.rows):
                if row.status == "n/a" or row.kind == "again":
                    continue
                tell(f"training {row.name}, seed {seed + 1} of {seeds}")
                run = folder / "runs" / f"{number:02d}-seed{seed}"
                wrong = _train_once(train, [*ablation.overrides, *row.overrides, f"seed={seed}"], run)
                if wrong:
                    tell(f"{row.name}: {wrong}")
                else:
                    runs.setdefault(row.name, []).append(run)
    except KeyboardInterrupt:
        whole = False
    results = {name: [EndedTraining.read(run) for run in own] for name, own in runs.items()}
    base = results.get(ablation.rows[0].name, [])
    finals = [ended.course[-1][1] for ended in base if ended.course]
    target = min(finals) if finals else None
    rows = [_with_full(row, results.get(row.name, []), base, target) for row in ablation.rows]
    return ablation.model_copy(update={"rows": rows, "target_accuracy": target}), whole


def _train_once(train: Train, overrides: Sequence[str], run: Path) -> str:
    """Train in a run folder, or go on there; return what went wrong, or nothing."""
    if (run / "result.json").exists():
        return ""
    resume = ["--resume"] if run.exists() else []
    return train([*overrides, f"output_dir={run}", *resume], run.with_suffix(".log"))


def _train(recipe_file: str, overrides: Sequence[str], log: Path) -> str:
    """Run the training program; Ctrl-C, and SIGTERM, are passed on to it, and its saving is waited for."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "hf_fasttrain", "train", recipe_file, *overrides, *UNPUBLISHED]
    # As the arms were measured: without what `tune` has stored.
    environment = {**os.environ, "HF_FASTTRAIN_TUNINGS": str(log.parent / "no-tunings")}
    with log.open("ab") as file:
        training = subprocess.Popen(command, stdout=file, stderr=file, env=environment, start_new_session=True)
        try:
            status = training.wait()
        except KeyboardInterrupt:
            training.send_signal(signal.SIGTERM)
            training.wait()
            raise
    if status == 0:
        return ""
    lines = log.read_text(errors="replace").strip().splitlines()
    return f"exit status {status}: {lines[-1] if lines else ''}"


@dataclass(frozen=True)
class EndedTraining:
    """A training that came to its end."""

    train_seconds: float
    metrics: dict[str, float]  # of the test split where there is one, else of the last evaluation
    course: list[tuple[float, float]]  # seconds of training and accuracy of each evaluation of the evaluation split

    @classmethod
    def read(cls, run: Path) -> EndedTraining:
        """Return a run folder's."""
        result = read_json(run / "result.json")
        lines = [line for line in read_lines(run / "metrics.jsonl") if line.get("kind") == "evaluation"]
        split = lines[0].get("split") if lines else None
        course = [
            (line["train_seconds"], line["accuracy"])
            for line in lines
            if line.get("split") == split and "accuracy" in line
        ]
        return cls(float(result["train_seconds"]), result.get("test_metrics") or result.get("metrics") or {}, course)

    def seconds_to(self, accuracy: float) -> float | None:
        """Return the seconds of training at the first evaluation that came to an accuracy."""
        return next((seconds for seconds, reached in self.course if reached >= accuracy), None)


def _with_full(row: Row, ended: list[EndedTraining], base: list[EndedTraining], target: float | None) -> Row:
    if not ended:
        return row
    seconds = [each.train_seconds for each in ended]
    accuracies = [each.metrics["accuracy"] for each in ended if "accuracy" in each.metrics]
    f1 = [each.metrics["f1_macro"] for each in ended if "f1_macro" in each.metrics]
    until = [each.seconds_to(target) for each in ended] if target is not None else []
    there = [value for value in until if value is not None]
    full = FullTraining(
        seeds=len(ended),
        accuracy=statistics.mean(accuracies) if accuracies else None,
        accuracy_std=_spread(accuracies),
        f1_macro=statistics.mean(f1) if f1 else None,
        train_seconds=statistics.mean(seconds),
        train_seconds_std=_spread(seconds) or 0.0,
        seconds_to_target=statistics.mean(there) if there else None,
        seeds_at_target=len(there),
        speed_up=statistics.mean(each.train_seconds for each in base) / statistics.mean(seconds) if base else None,
    )
    return row.model_copy(update={"full": full})


def _spread(values: Sequence[float]) -> float | None:
    """Return the standard deviation, None where there are no two values."""
    return statistics.stdev(values) if len(values) > 1 else None
