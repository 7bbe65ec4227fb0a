"""Profiles a training and suggests faster settings, in half a minute (a minute if steps take seconds)."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.study import tune_space as space
from hf_fasttrain.study.arm_process import Starter, require_one_process
from hf_fasttrain.study.bench import Arm, ArmFailed, Bench, Measurement, Note
from hf_fasttrain.study.doctor_diagnosis import (
    LOADER_BOUND,
    PHASE_NAMES,
    STAGE_NAMES,
    Diagnosis,
    best_advice,
    split_loading,
    split_step,
)
from hf_fasttrain.study.messages import ArmOptions, Ready, Report, Turn, to_arm_request
from hf_fasttrain.study.stopwatch import PHASES, STAGES
from hf_fasttrain.study.techniques import Hardware, settings
from hf_fasttrain.study.tune_space import Config
from hf_fasttrain.utils.environment import free_memory_bytes, num_cores
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.format import format_bytes, format_duration, format_images_rate, format_percent, format_rate

PROFILE_TURN = Turn(min_steps=3, seconds=2.0)
PART_TURN = Turn(min_steps=2, seconds=1.0)
TRIAL_TURN = Turn(min_steps=2, seconds=0.7)  # the first step after a suspension is slower
MIN_ROUNDS, MAX_ROUNDS = 4, 9
TRACED_STEPS = 3
AS_TRAINED = ArmOptions(stored_tuning=True)
ROUNDING = "changes rounding: `hf-fasttrain tune` compares it with fp32"


class Doctor:
    """Profiles a training within about `seconds`."""

    def __init__(
        self,
        start: Starter,
        hardware: Hardware,
        cores: int,
        *,
        seconds: float,
        note: Note,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.start, self.hardware, self.cores, self.note = start, hardware, cores, note
        self.clock, self.until = clock, clock() + seconds

    def examine(self, trace: Path | None = None) -> Diagnosis:
        """Profile the training, measure its parts alone, and try faster settings; RunError if it can't run here."""
        try:
            self.note("profiling the training")
            profile, ready = self._profile(trace)
            self.note("measuring the loader and the model separately")
            loader, compute = self._halves()
        except ArmFailed as failed:
            raise RunError(f"this recipe could not be profiled here: {failed}") from None
        waiting = min(1.0, profile.wait_seconds / profile.seconds)
        baseline, tried, notes = self._try(self._ideas(ready, waiting))
        step_seconds, phases = split_step(profile)
        return Diagnosis(
            ready=ready,
            images_per_second=baseline.images_per_second,
            step_seconds=step_seconds,
            images_per_step=profile.images / len(profile.step_seconds),
            phases=phases,
            stages=split_loading(profile),
            loader_alone=_rate(loader),
            compute_alone=_rate(compute),
            wait_fraction=waiting,
            device_bytes=baseline.device_bytes if self.hardware.gpu else 0,
            host_bytes=baseline.host_bytes,
            total_seconds=baseline.forecast(baseline.seconds_per_image),
            tried=tuple(tried),
            advice=tuple(best_advice(baseline, tried, notes)),
        )

    def _profile(self, trace: Path | None) -> tuple[Report, Ready]:
        running = self.start(Arm("profiled"), replace(AS_TRAINED, profiled=True))
        try:
            running.turn(Turn(min_steps=3, seconds=1.0, drain=True))
            report = running.turn(PROFILE_TURN)
            if trace is not None:
                self.note(f"a trace of {TRACED_STEPS} steps")
                running.trace(trace.absolute(), TRACED_STEPS)
        finally:
            running.close()
        return report, running.ready

    def _halves(self) -> tuple[Report, Report]:
        running = self.start(Arm("halves"), AS_TRAINED)
        try:
            return running.request("loader", PART_TURN), running.request("compute", PART_TURN)
        finally:
            running.close()

    def _ideas(self, ready: Ready, waiting: float) -> list[tuple[dict[str, Any], str]]:
        """Return (overrides, note) of changes that might help, the likeliest first."""
        config = space.first_config(ready)
        loading = self._loading_ideas(config, ready)
        computing = self._computing_ideas(config, ready)
        return [*loading, *computing] if waiting >= LOADER_BOUND else [*computing, *loading]

    def _loading_ideas(self, config: Config, ready: Ready) -> list[tuple[dict[str, Any], str]]:
        ideas: list[tuple[dict[str, Any], str]] = []
        if config["data.cache"] == "none" and ready.steps > ready.steps_per_epoch:
            ideas.append(({"data.cache": "memory"}, "from the second epoch on"))
        workers = int(config["data.workers"])
        if workers < 2 * self.cores:
            ideas.append(({"data.workers": max(1, 2 * workers)}, ""))
        if ready.settings["data.decoder"] == "pillow" and ready.is_jpeg:
            ideas.append(({"data.decoder": "simplejpeg"}, ""))
        if self.hardware.gpu and not config["data.pin_memory"]:
            ideas.append(({"data.pin_memory": True}, ""))
        return ideas

    def _computing_ideas(self, config: Config, ready: Ready) -> list[tuple[dict[str, Any], str]]:
        ideas: list[tuple[dict[str, Any], str]] = []
        if config["accelerate.mixed_precision"] == "no":
            ideas.append(({"accelerate.mixed_precision": "bf16" if self.hardware.bf16 else "fp16"}, ROUNDING))
        ideas.append(({"accelerate.channels_last": not config["accelerate.channels_last"]}, ""))
        if config["accelerate.micro_batch_size"] is not None and space.whole_fits(ready):
            unsplit = {"accelerate.gradient_accumulation_steps": 1, "accelerate.micro_batch_size": None}
            ideas.append((unsplit, "changes batch-norm statistics" if ready.has_batch_norm else ""))
        return ideas

    def _try(self, ideas: list[tuple[dict[str, Any], str]]) -> tuple[Measurement, list[Measurement], dict[str, str]]:
        """Measure the training as it is and as many ideas as time allows, at least two."""
        baseline = Measurement(Arm("as it is"))
        notes: dict[str, str] = {}
        tried: list[Measurement] = []
        rng = random.Random(0)
        with Bench(self.start, options=AS_TRAINED, free_bytes=free_memory_bytes, warm_seconds=0.5) as bench:
            start_time = self.clock()
            if not bench.warm_up(baseline):
                raise RunError(f"this recipe could not be profiled here: {baseline.failed}")
            cost = self.clock() - start_time  # of starting an arm and its later turns
            for change, note in ideas:
                if len(tried) >= 2 and self.clock() + cost * 1.5 * (len(tried) + 1) > self.until:
                    break
                arm = Arm(" ".join(settings(change)), settings(change))
                measurement = Measurement(arm)
                self.note(f"trying {arm.name}")
                bench.warm_up(measurement)
                tried.append(measurement)
                notes[arm.name] = note
            for number in range(MAX_ROUNDS):
                if number >= MIN_ROUNDS and self.clock() > self.until:
                    break
                for measurement in rng.sample([baseline, *tried], 1 + len(tried)):
                    if not measurement.failed:
                        _turn(bench, measurement, number)
        if not baseline.is_measured:
            raise RunError(f"this recipe could not be profiled here: {baseline.failed}")
        return baseline, tried, notes


def _turn(bench: Bench, measurement: Measurement, number: int) -> None:
    with contextlib.suppress(ArmFailed):  # recorded in the measurement
        bench.turn(measurement, number, TRIAL_TURN)


def _rate(report: Report) -> float:
    return report.images / report.seconds


def doctor(recipe: Recipe, machine: Hardware, *, seconds: float, note: Note, trace: Path | None = None) -> Diagnosis:
    """Profile a recipe's training on this machine; RunError if it can't run."""
    require_one_process()
    if trace is not None and not trace.absolute().parent.is_dir():
        raise RunError(f"--trace {trace}: {trace.absolute().parent} is not a folder; give another file")
    if trace is not None and not os.access(trace.absolute().parent, os.W_OK):
        raise RunError(f"--trace {trace}: can't be written; give another file")
    with Starter(to_arm_request(recipe), on_gpu=machine.gpu) as start:
        return Doctor(start, machine, num_cores(), seconds=seconds, note=note).examine(trace)


def print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    """Print the tables, the verdict and the advice."""
    step = Table(title=f"a step of {diagnosis.images_per_step:.0f} images", title_justify="left")
    for name in ("phase", "ms", "share"):
        step.add_column(name, justify="left" if name == "phase" else "right")
    for phase in PHASES:
        seconds = diagnosis.phases[phase]
        step.add_row(PHASE_NAMES[phase], f"{1000 * seconds:.1f}", format_percent(seconds / diagnosis.step_seconds, 0))
    step.add_row("together", f"{1000 * diagnosis.step_seconds:.1f}", "")
    console.print(step)
    loader = Table(title=f"the loader's work, {diagnosis.workers} workers", title_justify="left")
    for name in ("stage", "ms of a worker per image", "share"):
        loader.add_column(name, justify="left" if name == "stage" else "right")
    total = max(sum(diagnosis.stages.values()), 1e-12)
    for stage in STAGES:
        seconds = diagnosis.stages[stage]
        loader.add_row(STAGE_NAMES[stage], f"{1000 * seconds:.3f}", format_percent(seconds / total, 0))
    console.print(loader)
    for line in lines(diagnosis):
        console.print(line, markup=False)


def lines(diagnosis: Diagnosis) -> list[str]:
    """Return verdict, forecast, memory and advice as sentences."""
    rate, cached = diagnosis.images_per_second, diagnosis.ready.keeps_pixels
    memory = f"{format_bytes(diagnosis.host_bytes)} of the host"
    if diagnosis.device_bytes:
        memory = f"{format_bytes(diagnosis.device_bytes)} of the GPU, {memory}"
    sentences = [
        # The study itself sets data.cache_dir.
        *(f"note: {note}" for note in diagnosis.ready.notes if not note.startswith("data.cache_dir")),
        diagnosis.verdict,
        f"As configured: {format_images_rate(rate.median)} ({format_rate(rate.low)} - {format_rate(rate.high)}); an "
        f"epoch takes {format_duration(diagnosis.epoch_seconds)}{' once images are cached' if cached else ''}, the "
        f"whole training {format_duration(diagnosis.total_seconds)}, without evaluation. Memory: {memory}.",
    ]
    for advice in diagnosis.advice:
        note = f" ({advice.note})" if advice.note else ""
        seconds = diagnosis.ready.num_images / advice.images_per_second
        sentences.append(
            f"Measured: {advice.text}{note}: {format_images_rate(advice.images_per_second)}, {advice.speed_up} times "
            f"as fast, an epoch takes {format_duration(seconds)}."
        )
    for measurement in diagnosis.tried:
        if all(measurement.arm.overrides != advice.overrides for advice in diagnosis.advice):
            outcome = measurement.failed or format_images_rate(measurement.images_per_second.median)
            sentences.append(f"Tried without gain: {measurement.arm.name}: {outcome}")
    return sentences
