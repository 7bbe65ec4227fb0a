"""Profiles a training and suggests faster settings, in about a minute."""

from __future__ import annotations

import contextlib
import os
import random
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

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
from hf_fasttrain.study.load import free_share, rough_note
from hf_fasttrain.study.messages import ArmOptions, Ready, Report, Turn, to_arm_request
from hf_fasttrain.study.stopwatch import PHASES, STAGES
from hf_fasttrain.study.techniques import Hardware, settings
from hf_fasttrain.study.tune_space import Config
from hf_fasttrain.utils.environment import free_memory_bytes, num_cores
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.format import (
    format_bytes,
    format_count,
    format_duration,
    format_images_rate,
    format_percent,
    format_rate,
)
from hf_fasttrain.utils.terminal import Terminal, build_table

ENOUGH = 4.0  # seconds after which a turn ends with any number of steps
PROFILE_TURN = Turn(min_steps=3, seconds=2.0, enough=ENOUGH)
PART_TURN = Turn(min_steps=2, seconds=1.0, enough=ENOUGH)
TRIAL_TURN = Turn(min_steps=2, seconds=0.7, enough=ENOUGH)  # the first step after a suspension is slower
MIN_ROUNDS, MAX_ROUNDS = 4, 9
TRACED_STEPS = 3
AS_TRAINED = ArmOptions(stored_tuning=True)
ROUNDING = "changes rounding: `hf-fasttrain tune RECIPE` compares it with fp32"


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
        free_share: Callable[[], float] | None = None,
    ) -> None:
        self.start, self.hardware, self.cores, self.note = start, hardware, cores, note
        self.free_share = free_share
        self.clock, self.until = clock, clock() + seconds

    def examine(self, trace: Path | None = None) -> Diagnosis:
        """Profile the training, measure its parts alone, and try faster settings; RunError if it can't run here."""
        baseline = Measurement(Arm("as it is"))
        with Bench(
            self.start,
            options=AS_TRAINED,
            clock=self.clock,
            free_bytes=free_memory_bytes,
            free_share=self.free_share,
            warm_seconds=0.5,
            warm_enough=ENOUGH,
        ) as bench:
            try:
                loader, compute, profile = self._profile(bench, baseline, trace)
            except ArmFailed as failed:
                raise RunError(f"this recipe could not be profiled here: {failed}") from None
            assert baseline.ready is not None
            waiting = min(1.0, profile.wait_seconds / profile.seconds)
            ideas = self._ideas(baseline.ready, waiting)
            tried = self._try(bench, baseline, [idea for idea, _ in ideas])
            rough = rough_note(bench.free_shares)
        # The profile in the time of all rounds: others may have slowed down the machine in the one or the other.
        scale = baseline.seconds_per_image / baseline.rounds[0]
        step_seconds, phases = split_step(profile)
        notes = {_name(change): note for change, note in ideas}
        names = {measurement.arm.name for measurement in tried}
        return Diagnosis(
            ready=baseline.ready,
            images_per_second=baseline.images_per_second,
            step_seconds=scale * step_seconds,
            images_per_step=profile.images / len(profile.step_seconds),
            phases={phase: scale * seconds for phase, seconds in phases.items()},
            stages={stage: scale * seconds for stage, seconds in split_loading(profile).items()},
            loader_alone=_rate(loader) / scale,
            compute_alone=_rate(compute) / scale,
            wait_fraction=waiting,
            device_bytes=baseline.device_bytes if self.hardware.gpu else 0,
            host_bytes=baseline.host_bytes,
            total_seconds=baseline.forecast(baseline.seconds_per_image),
            tried=tuple(tried),
            advice=tuple(best_advice(baseline, tried, notes)),
            baseline=baseline,
            not_tried=tuple(name for name in notes if name not in names),
            rough=rough,
        )

    def _profile(self, bench: Bench, baseline: Measurement, trace: Path | None) -> tuple[Report, Report, Report]:
        """Return reports of the loader alone, of the model alone and of the training as it is, all of one process."""
        self.note("starting the training")
        start_time = self.clock()
        running = self.start(baseline.arm, replace(AS_TRAINED, profiled=True))
        try:
            self.note("measuring the loader and the model separately")
            loader, compute = running.request("loader", PART_TURN), running.request("compute", PART_TURN)
        except BaseException:
            running.close()
            raise
        self.note("profiling the training")
        bench.adopt(running, baseline)
        baseline.start_seconds = self.clock() - start_time
        profile = bench.turn(baseline, 0, PROFILE_TURN)
        if trace is not None:
            self.note(f"a trace of {TRACED_STEPS} steps")
            running.trace(trace.absolute(), TRACED_STEPS)
        return loader, compute, profile

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
        if not self.hardware.gpu and self.cores > 1 and config["accelerate.cpu_threads"] != 1:
            ideas.append(({"accelerate.cpu_threads": 1}, "changes rounding"))
        if config["accelerate.mixed_precision"] == "no":
            ideas.append(({"accelerate.mixed_precision": "bf16" if self.hardware.bf16 else "fp16"}, ROUNDING))
        ideas.append(({"accelerate.channels_last": not config["accelerate.channels_last"]}, ""))
        if config["accelerate.micro_batch_size"] is not None and space.whole_fits(ready):
            unsplit = {"accelerate.gradient_accumulation_steps": 1, "accelerate.micro_batch_size": None}
            ideas.append((unsplit, "changes batch-norm statistics" if ready.has_batch_norm else ""))
        return ideas

    def _try(self, bench: Bench, baseline: Measurement, changes: list[dict[str, Any]]) -> list[Measurement]:
        """Measure as many changes as time allows, in rounds with the training as it is."""
        tried: list[Measurement] = []
        rng = random.Random(0)
        # An arm costs its start and first steps, and a turn in each round.
        turn = max(TRIAL_TURN.seconds, min(TRIAL_TURN.enough, TRIAL_TURN.min_steps * self._step_seconds(baseline)))
        cost = baseline.start_seconds
        for change in changes:
            left = self.until - self.clock() - MIN_ROUNDS * turn * (2 + len(tried))
            if left < cost:
                break
            measurement = Measurement(Arm(_name(change), settings(change)))
            self.note(f"trying {measurement.arm.name}")
            bench.warm_up(measurement, max(1.0, left))
            cost = max(measurement.start_seconds, 1e-3)
            tried.append(measurement)
        for number in range(1, MAX_ROUNDS + 1):
            turns = 1 + len([measurement for measurement in tried if not measurement.failed])
            is_over = self.clock() + turns * turn > self.until
            if is_over and (number > MIN_ROUNDS or turns == 1 or self.clock() > self.until + turns * turn):
                break
            for measurement in rng.sample([baseline, *tried], 1 + len(tried)):
                if not measurement.failed:
                    _turn(bench, measurement, number)
        if not baseline.is_measured:
            raise RunError(f"this recipe could not be profiled here: {baseline.failed}")
        return tried

    def _step_seconds(self, baseline: Measurement) -> float:
        assert baseline.ready is not None
        return baseline.seconds_per_image * int(baseline.ready.settings["train.batch_size"])


def _name(change: dict[str, Any]) -> str:
    return " ".join(settings(change))


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
        options: dict[str, Any] = {"seconds": seconds, "note": note, "free_share": free_share}
        return Doctor(start, machine, num_cores(), **options).examine(trace)


def print_diagnosis(terminal: Terminal, diagnosis: Diagnosis) -> None:
    """Print the tables, the verdict and the advice."""
    phases = [(PHASE_NAMES[name], diagnosis.phases[name]) for name in PHASES]
    rows = [(name, f"{1000 * took:.1f}", format_percent(took / diagnosis.step_seconds, 0)) for name, took in phases]
    rows.append(("together", f"{1000 * diagnosis.step_seconds:.1f}", ""))
    title = f"a step of {diagnosis.images_per_step:.0f} images"
    terminal.print(build_table(("phase", "ms", "share"), rows, title=title, right=(1, 2)))
    total = max(sum(diagnosis.stages.values()), 1e-12)
    stages = [(STAGE_NAMES[name], diagnosis.stages[name]) for name in STAGES]
    rows = [(name, f"{1000 * took:.3f}", format_percent(took / total, 0)) for name, took in stages]
    title = f"the loader's work, {format_count(diagnosis.workers, 'worker')}"
    terminal.print(build_table(("stage", "ms of a worker per image", "share"), rows, title=title, right=(1, 2)))
    for line in lines(diagnosis):
        terminal.print(line)


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
            sentences.append(f"Tried without clear gain: {measurement.arm.name}: {_outcome(measurement, diagnosis)}")
    if diagnosis.not_tried:
        started = format_duration(diagnosis.baseline.start_seconds)
        sentences.append(
            f"Not tried for lack of time (--seconds; the start and the first steps took {started}): "
            f"{'; '.join(diagnosis.not_tried)}"
        )
    return [*sentences, *filter(None, [diagnosis.rough])]


def _outcome(measurement: Measurement, diagnosis: Diagnosis) -> str:
    if not measurement.is_measured:
        return measurement.failed or "not measured"
    speed_up = diagnosis.speed_up_of(measurement)
    return f"{format_images_rate(diagnosis.images_per_second.median * speed_up.median)}, {speed_up} times as fast"
