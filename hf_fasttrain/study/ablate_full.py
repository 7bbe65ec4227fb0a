"""`ablate --full`: trains every arm to the end with several seeds; accuracy, F1, training time, time to accuracy."""

from __future__ import annotations

import os
import signal
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from hf_fasttrain.run_folder.file_names import METRICS_FILE, RESULT_FILE
from hf_fasttrain.run_folder.metrics_file import read_metrics
from hf_fasttrain.run_folder.schemas import ResultFile, read_if_sound
from hf_fasttrain.study.ablate import Ablation, FullTraining, Row
from hf_fasttrain.study.bench import Note

UNPUBLISHED = ("log.report=false", "hub=null")  # of the arms
Train = Callable[[Sequence[str], Path], str]  # (overrides, log file) -> error message, or an empty one


def train_all(
    ablation: Ablation, recipe_file: str, folder: Path, seeds: int, note: Note, train: Train | None = None
) -> tuple[Ablation, bool]:
    """Train every arm to the end, once for each seed, and return the ablation with accuracy and time.

    Trainings that an earlier call has finished in `folder` are not repeated. Ctrl-C keeps the finished trainings.
    """
    train = train or (lambda overrides, log: _train(recipe_file, overrides, log))
    runs: dict[str, list[Path]] = {}
    is_complete = True
    try:
        for seed in range(seeds):
            for number, row in enumerate(ablation.rows):
                if row.status == "n/a" or row.kind == "again":
                    continue
                note(f"training {row.name}, seed {seed + 1} of {seeds}")
                run = folder / "runs" / f"{number:02d}-seed{seed}"
                error = _train_once(train, [*ablation.overrides, *row.overrides, f"seed={seed}"], run)
                if error:
                    note(f"{row.name}: {error}")
                else:
                    runs.setdefault(row.name, []).append(run)
    except KeyboardInterrupt:
        is_complete = False
    results = {name: [EndedTraining.read(run) for run in folders] for name, folders in runs.items()}
    base = results.get(ablation.rows[0].name, [])
    finals = [ended.accuracy_curve[-1][1] for ended in base if ended.accuracy_curve]
    target = min(finals) if finals else None
    rows = [_with_full(row, results.get(row.name, []), base, target) for row in ablation.rows]
    return ablation.model_copy(update={"rows": rows, "target_accuracy": target}), is_complete


def _train_once(train: Train, overrides: Sequence[str], run: Path) -> str:
    """Train in a run folder, or resume there; return an error message, or an empty one."""
    if (run / RESULT_FILE).exists():
        return ""
    resume = ["--resume"] if run.exists() else []
    return train([*overrides, f"output_dir={run}", *resume], run.with_suffix(".log"))


def _train(recipe_file: str, overrides: Sequence[str], log: Path) -> str:
    """Run the training program; on Ctrl-C or SIGTERM, stop it by SIGTERM and wait until it has saved."""
    log.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "hf_fasttrain", "train", recipe_file, *overrides, *UNPUBLISHED]
    # Without stored tunings, as the arms were measured.
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
    """The figures of a finished training."""

    train_seconds: float
    metrics: dict[str, float]  # of the test split if there is one, else of the last evaluation
    accuracy_curve: list[tuple[float, float]]  # (training seconds, accuracy) of each evaluation

    @classmethod
    def read(cls, run: Path) -> EndedTraining:
        """Read a run folder."""
        result = read_if_sound(run / RESULT_FILE, ResultFile)
        lines = [line for line in read_metrics(run / METRICS_FILE) if line["kind"] == "evaluation"]
        split = lines[0].get("split") if lines else None
        accuracy_curve = [
            (line["train_seconds"], line["accuracy"])
            for line in lines
            if line.get("split") == split and "accuracy" in line
        ]
        return cls(
            float(result["train_seconds"]), result.get("test_metrics") or result.get("metrics") or {}, accuracy_curve
        )

    def seconds_to(self, accuracy: float) -> float | None:
        """Return the training seconds until the first evaluation that reached an accuracy; None if none did."""
        return next((seconds for seconds, reached in self.accuracy_curve if reached >= accuracy), None)


def _with_full(row: Row, ended: list[EndedTraining], base: list[EndedTraining], target: float | None) -> Row:
    if not ended:
        return row
    seconds = [each.train_seconds for each in ended]
    accuracies = [each.metrics["accuracy"] for each in ended if "accuracy" in each.metrics]
    f1 = [each.metrics["f1_macro"] for each in ended if "f1_macro" in each.metrics]
    times = [each.seconds_to(target) for each in ended] if target is not None else []
    reached = [value for value in times if value is not None]
    full = FullTraining(
        seeds=len(ended),
        accuracy=statistics.mean(accuracies) if accuracies else None,
        accuracy_std=_spread(accuracies),
        f1_macro=statistics.mean(f1) if f1 else None,
        train_seconds=statistics.mean(seconds),
        train_seconds_std=_spread(seconds) or 0.0,
        seconds_to_target=statistics.mean(reached) if reached else None,
        seeds_at_target=len(reached),
        speed_up=statistics.mean(each.train_seconds for each in base) / statistics.mean(seconds) if base else None,
    )
    return row.model_copy(update={"full": full})


def _spread(values: Sequence[float]) -> float | None:
    """Return the standard deviation, None for fewer than two values."""
    return statistics.stdev(values) if len(values) > 1 else None
