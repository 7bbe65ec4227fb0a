"""Measures the speed-up of each technique on this machine: alone, and as the only one missing."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, ValidationError

from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.study import intervals
from hf_fasttrain.study.arm_process import Starter, require_one_process
from hf_fasttrain.study.bench import Arm, ArmFailed, Bench, Measurement, Note, Start, collect
from hf_fasttrain.study.messages import ArmOptions, Turn, to_arm_request
from hf_fasttrain.study.techniques import Hardware, PlannedArm, build_arms, hardware, select_techniques, techniques
from hf_fasttrain.utils.environment import describe_machine, describe_versions, free_memory_bytes
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.files import read_text, reason
from hf_fasttrain.utils.validation import first_mistake

FORMAT = 1


class _JsonModel(BaseModel):
    """A part of ablation.json."""

    model_config = ConfigDict(extra="forbid")


class Interval(_JsonModel):
    """A median over rounds and its interval."""

    median: float
    low: float
    high: float
    confidence: float  # probability that the interval holds the true median


class FullTraining(_JsonModel):
    """Trainings to the end, one for each seed: means and standard deviations."""

    seeds: int
    accuracy: float | None  # None: evaluate.metrics does not have it
    accuracy_std: float | None
    f1_macro: float | None
    train_seconds: float
    train_seconds_std: float
    seconds_to_target: float | None  # mean training time until the target accuracy, of the seeds that reached it
    seeds_at_target: int
    speed_up: float | None  # mean train_seconds of the baseline / of this arm


class Row(_JsonModel):
    """One arm."""

    name: str
    kind: Literal["baseline", "again", "alone", "everything", "removed"]
    technique: str | None
    overrides: list[str]
    status: Literal["measured", "failed", "n/a"]
    reason: str = ""  # why it was not measured
    note: str = ""
    images_per_second: Interval | None = None
    speed_up: Interval | None = None  # over the baseline, of the same rounds
    wait_fraction: float | None = None
    first_step_seconds: float | None = None  # beyond an ordinary step's: compilation
    device_bytes: int | None = None  # peak allocated on the GPU
    host_bytes: int | None = None  # of the training process and its loader processes
    seconds_per_image: list[float] = []  # of each round
    losses: list[float] = []  # of the first steps
    full: FullTraining | None = None


class Ablation(_JsonModel):
    """All of ablation.json."""

    format: int = FORMAT
    recipe: str
    overrides: list[str]
    command: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    rounds: int
    turn_seconds: float
    target_accuracy: float | None = None  # of the baseline's worst seed, on the evaluation split
    notes: list[str]
    rows: list[Row]


@dataclass(frozen=True)
class Plan:
    """The settings of an ablation."""

    rounds: int = 6
    turn_seconds: float = 2.0
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


def ablate(recipe: Recipe, plan: Plan, *, command: str, note: Note) -> tuple[Ablation, bool]:
    """Return the ablation of a recipe, and whether it is complete: Ctrl-C stops it and keeps what was measured.

    Raises RunError for a recipe that can't run here.
    """
    require_one_process()
    machine = hardware()
    with Starter(to_arm_request(recipe), on_gpu=machine.gpu) as start:
        arms = plan_arms(start, plan, machine)
        with Bench(start, free_bytes=free_memory_bytes, warm_seconds=min(1.0, plan.turn_seconds)) as bench:
            measurements, complete = measure_arms(arms, bench, plan, note)
    return describe(recipe, arms, measurements, plan, command=command, complete=complete), complete


def plan_arms(start: Start, plan: Plan, machine: Hardware) -> list[PlannedArm]:
    """Return the arms of the recipe that `start` runs; RunError if it can't run here."""
    try:
        running = start(Arm("as the recipe says"), ArmOptions(), None)
    except ArmFailed as failed:
        raise RunError(f"this recipe could not be measured here: {failed}") from None
    running.close()
    return build_arms(select_techniques(techniques(running.ready, machine), plan.only, plan.without))


def measure_arms(arms: Sequence[PlannedArm], bench: Bench, plan: Plan, note: Note) -> tuple[list[Measurement], bool]:
    """Return the measurements, and whether they are complete (no Ctrl-C)."""
    measurements = [Measurement(each.arm, failed=each.arm.not_applicable) for each in arms]
    try:
        turn = Turn(min_steps=2, seconds=plan.turn_seconds)
        collect(measurements, bench, rounds=plan.rounds, turn=turn, note=note)
    except KeyboardInterrupt:
        return measurements, False
    return measurements, True


def describe(
    recipe: Recipe,
    arms: Sequence[PlannedArm],
    measurements: Sequence[Measurement],
    plan: Plan,
    *,
    command: str,
    complete: bool,
) -> Ablation:
    """Return the ablation as a record."""
    baseline = measurements[0]
    ready = next((m.ready for m in measurements if m.ready), None)
    device = torch.device(ready.device if ready else "cpu")
    notes = [
        "Images a second are of training steps with their loader, after the first steps; with a cache, of the passes "
        "over the data after the first.",
        "Speed-ups compare turns of the same round; the interval holds the true median with the stated confidence.",
    ]
    if recipe.augment.progressive:
        notes.append("Measured at the full image size, without augment.progressive.")
    if not complete:
        notes.append("Stopped by Ctrl-C, before all rounds were finished.")
    arm_notes = [note for measurement in measurements if measurement.ready for note in measurement.ready.notes]
    notes += sorted({note for note in arm_notes if note.startswith("not all pixels")})
    rounds = max((len(m.rounds) for m in measurements), default=0)
    rows = [_row(each, m, baseline, gpu=device.type == "cuda") for each, m in zip(arms, measurements, strict=True)]
    return Ablation(
        recipe=recipe.source.name,
        overrides=list(recipe.source.overrides),
        command=command,
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        machine=describe_machine(device, 1),
        versions=describe_versions(),
        rounds=rounds,
        turn_seconds=plan.turn_seconds,
        notes=notes,
        rows=rows,
    )


def _row(planned: PlannedArm, measurement: Measurement, baseline: Measurement, *, gpu: bool) -> Row:
    technique, applicable = planned.technique, not planned.arm.not_applicable
    row = Row(
        name=planned.arm.name,
        kind=planned.kind,
        technique=technique.name if technique else None,
        overrides=list(planned.arm.overrides),
        status="measured" if measurement.is_measured else "failed" if applicable else "n/a",
        reason=measurement.failed or ("" if measurement.is_measured else "not measured"),
        note=technique.note if technique and planned.kind == "alone" else "",
    )
    if not measurement.is_measured:
        return row
    is_paired = bool(set(measurement.rounds) & set(baseline.rounds))
    return row.model_copy(
        update={
            "images_per_second": _interval(measurement.images_per_second),
            "speed_up": _interval(measurement.speed_up(baseline)) if is_paired else None,
            "wait_fraction": measurement.wait_fraction,
            "first_step_seconds": measurement.compile_seconds,
            "device_bytes": measurement.device_bytes if gpu else None,
            "host_bytes": measurement.host_bytes,
            "seconds_per_image": list(measurement.rounds.values()),
            "losses": measurement.losses,
        }
    )


def _interval(estimate: intervals.Estimate) -> Interval:
    return Interval(**vars(estimate))


def default_folder(recipe: Recipe) -> Path:
    """Return the default output folder: a new one for each ablation."""
    return Path("ablations") / f"{recipe.source.name}-{time.strftime('%Y%m%d-%H%M%S')}"


def load_earlier(folder: Path, recipe: Recipe) -> Ablation | None:
    """Return the ablation of the same recipe and overrides in a folder, to be continued; None if there is none."""
    path = folder / "ablation.json"
    if not path.exists():
        return None
    ablation = load_ablation(path)
    if (ablation.recipe, ablation.overrides) != (recipe.source.name, list(recipe.source.overrides)):
        raise RunError(f"{folder}: holds an ablation of another recipe or with other overrides; give another --output")
    return ablation


def require_new(folder: Path) -> None:
    """Raise RunError if the folder holds an ablation or can't be created."""
    if (folder / "ablation.json").exists():
        raise RunError(f"{folder}: holds an ablation already; give another --output")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(f"{folder}: can't be created: {error.strerror}; give another --output") from None


def load_ablation(path: Path) -> Ablation:
    """Load an ablation from ablation.json; RunError if the file is invalid."""
    try:
        return Ablation.model_validate_json(read_text(path))
    except ValidationError as error:
        raise RunError(f"{path}: is not an ablation: {first_mistake(error)}") from None
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: is not an ablation: {reason(error)}") from None
