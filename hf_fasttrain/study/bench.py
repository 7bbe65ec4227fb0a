"""The benchmark of a study: arms of an experiment, each a training in its own process, run in turns.

In every round each arm has one turn, in random order, so that a machine that slows down affects all alike. A turn
measures seconds per image; arms are compared in pairs of the same round.

Two identical processes differ by some 2 % for their whole lives, depending on where their memory lies. So `collect`
uses a new process for each turn, and its intervals hold; `tune` and `doctor`, which have less time, keep arms alive.
Between turns an arm is suspended (SIGSTOP) with its loader processes, so that it prefetches nothing and disturbs no
other arm.
"""

from __future__ import annotations

import math
import random
import signal
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from hf_fasttrain.study.intervals import Estimate, estimate, paired_ratio
from hf_fasttrain.study.messages import ArmOptions, Ready, Report, Turn
from hf_fasttrain.utils.signals import signal_handler

Note = Callable[[str], None]


class ArmFailed(Exception):
    """An arm can't be measured; `out_of_memory` says whether lack of memory may be the reason."""

    def __init__(self, text: str, *, out_of_memory: bool = False) -> None:
        super().__init__(text)
        self.out_of_memory = out_of_memory


@dataclass(frozen=True)
class Arm:
    """A variant of an experiment: a name, and overrides of the recipe."""

    name: str
    overrides: tuple[str, ...] = ()
    not_applicable: str = ""  # why it makes no difference here


class Running(Protocol):
    """A training that can run turns."""

    ready: Ready

    def turn(self, turn: Turn, limit_seconds: float | None = None) -> Report:
        """Run a turn; ArmFailed if it fails or exceeds the limit."""
        ...

    def close(self) -> None:
        """End the training."""
        ...


Start = Callable[[Arm, ArmOptions, float | None], Running]  # (arm, options, time limit in seconds)


@dataclass
class Measurement:
    """The measurements of an arm."""

    arm: Arm
    ready: Ready | None = None
    failed: str = ""
    compile_seconds: float = 0.0  # of the first step, beyond an ordinary step's
    start_seconds: float = 0.0  # including its first steps
    first_pass_seconds: float | None = None  # per image, of the loader while it fills the cache
    rounds: dict[int, float] = field(default_factory=dict)  # round -> seconds per image
    waits: list[float] = field(default_factory=list)  # share of each turn spent waiting for data
    losses: list[float] = field(default_factory=list)  # of the first steps, until the arm is restarted
    device_bytes: int = 0
    host_bytes: int = 0
    num_starts: int = 0

    @property
    def is_measured(self) -> bool:
        """Whether it has measured rounds and did not fail."""
        return bool(self.rounds) and not self.failed

    @property
    def images_per_second(self) -> Estimate:
        """Median images per second over rounds, with its interval."""
        return estimate([1 / seconds for seconds in self.rounds.values()])

    @property
    def seconds_per_image(self) -> float:
        """Median seconds per image."""
        return statistics.median(self.rounds.values())

    @property
    def wait_fraction(self) -> float:
        """Median share of time spent waiting for data."""
        return statistics.median(self.waits) if self.waits else 0.0

    def speed_up(self, baseline: Measurement, since: int = 0) -> Estimate:
        """Return the speed-up over the baseline, from the rounds that both have from `since` on (all if none is)."""
        both = [number for number in self.rounds if number in baseline.rounds]
        both = [number for number in both if number >= since] or both
        return paired_ratio([baseline.rounds[n] for n in both], [self.rounds[n] for n in both])

    def add(self, number: int, report: Report) -> None:
        """Add the turn of round `number`."""
        self.rounds[number] = report.seconds / max(1, report.images)
        self.waits.append(min(1.0, report.wait_seconds / max(report.seconds, 1e-9)))
        if self.num_starts == 1:
            self.losses += report.losses
        self._add_memory(report)

    def warm(self, report: Report) -> None:
        """Add the first turn, which is not measured."""
        first, *others = report.step_seconds
        if others:
            self.compile_seconds = max(0.0, first - statistics.median(others))
        self.first_pass_seconds = report.fill_seconds
        self.losses += report.losses
        self._add_memory(report)

    def forecast(self, seconds_per_image: float) -> float:
        """Return the seconds of the recipe's whole training at a speed, compiling and the first pass included.

        Without evaluation and saving, as `train_seconds` of result.json.
        """
        ready = self.ready
        assert ready is not None
        images = ready.steps / ready.steps_per_epoch * ready.num_images
        first = min(images, ready.num_images) if ready.keeps_pixels else 0.0
        filling = first * max(self.first_pass_seconds or 0.0, seconds_per_image)
        shapes = 1 + ready.short_last_step  # each is compiled separately
        compiling = self.compile_seconds * shapes if ready.settings["accelerate.compile"] else 0.0
        return filling + (images - first) * seconds_per_image + compiling

    def _add_memory(self, report: Report) -> None:
        self.device_bytes = max(self.device_bytes, report.device_bytes)
        self.host_bytes = max(self.host_bytes, report.host_bytes)


class Bench:
    """Runs the arms of an experiment; a context manager that ends their processes.

    `free_bytes` returns the available memory. If it is too little for another arm, the least recently used ones are
    ended, and restarted when it is their turn. `free_share` returns how much of the cores other programs leave.
    """

    def __init__(
        self,
        start: Start,
        *,
        options: ArmOptions = ArmOptions(),  # noqa: B008 - frozen
        clock: Callable[[], float] = time.monotonic,
        free_bytes: Callable[[], int] | None = None,
        free_share: Callable[[], float] | None = None,
        warm_seconds: float = 1.0,
        warm_enough: float = math.inf,
    ) -> None:
        self.start, self.options, self.clock = start, options, clock
        self.free_bytes, self.free_share = free_bytes, free_share
        self.warm_turn = Turn(min_steps=3, seconds=warm_seconds, drain=True, enough=warm_enough)
        self.free_shares: list[float] = []  # of the machine, before each turn
        self._running: dict[str, tuple[Running, Measurement]] = {}  # least recently used first

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End all arms; ignores Ctrl-C meanwhile, which would leave suspended processes behind."""
        with signal_handler(signal.SIGINT, signal.SIG_IGN):
            for name in list(self._running):
                self.end(name)

    def end(self, name: str) -> None:
        """End an arm."""
        running = self._running.pop(name, None)
        if running is not None:
            running[0].close()

    def warm_up(self, measurement: Measurement, limit_seconds: float | None = None) -> bool:
        """Start an arm and run its first steps; return whether it can be measured."""
        start_time = self.clock()
        try:
            self._start(measurement, limit_seconds)
        except ArmFailed as failed:
            measurement.failed, measurement.start_seconds = str(failed), self.clock() - start_time
            self.end(measurement.arm.name)
        return not measurement.failed

    def _start(self, measurement: Measurement, limit_seconds: float | None) -> None:
        self._make_room(measurement)
        start_time = self.clock()
        try:
            self._first_turn(measurement, limit_seconds)
        except ArmFailed as failed:
            self.end(measurement.arm.name)
            if not self._freed_memory(failed):
                raise
            self._first_turn(measurement, limit_seconds)
        measurement.start_seconds = self.clock() - start_time

    def _freed_memory(self, failed: ArmFailed) -> bool:
        """If an arm ran out of memory, end all others; return whether there were any, so that it can be retried."""
        if not self._running or not failed.out_of_memory:
            return False
        self.close()
        return True

    def _first_turn(self, measurement: Measurement, limit_seconds: float | None) -> None:
        before = self.clock()
        running = self.start(measurement.arm, self.options, limit_seconds)
        remaining = None if limit_seconds is None else max(0.1, limit_seconds - (self.clock() - before))
        self.adopt(running, measurement, remaining)

    def adopt(self, running: Running, measurement: Measurement, limit_seconds: float | None = None) -> None:
        """Take over a training that was started, and run its first turn, which is not measured."""
        self._running[measurement.arm.name] = running, measurement
        measurement.ready = running.ready
        report = running.turn(self.warm_turn, limit_seconds)
        measurement.num_starts += 1
        if not measurement.rounds:
            measurement.warm(report)

    def _make_room(self, measurement: Measurement) -> None:
        """End the least recently used arms until there is memory for one more."""
        if self.free_bytes is None:
            return
        sizes = [m.host_bytes for _, m in self._running.values() if m.host_bytes]
        needed = 1.5 * max([measurement.host_bytes, *sizes])
        while self._running and self.free_bytes() < needed:
            self.end(next(iter(self._running)))

    def turn(self, measurement: Measurement, number: int, turn: Turn, limit_seconds: float | None = None) -> Report:
        """Run a turn of an arm and add it as round `number`; raises, and records, ArmFailed if it fails."""
        try:
            report = self._turn(measurement, turn, limit_seconds)
        except ArmFailed as failed:
            self.end(measurement.arm.name)
            if not self._freed_memory(failed):
                measurement.failed = str(failed)
                raise
            report = self._turn(measurement, turn, limit_seconds)
        measurement.add(number, report)
        return report

    def _turn(self, measurement: Measurement, turn: Turn, limit_seconds: float | None) -> Report:
        name = measurement.arm.name
        if name not in self._running:
            self._start(measurement, limit_seconds)
        if self.free_share is not None:  # while all arms are suspended
            self.free_shares.append(self.free_share())
        running, _ = self._running[name] = self._running.pop(name)
        return running.turn(turn, limit_seconds)


def measure(
    arms: Sequence[Arm], bench: Bench, *, rounds: int, turn: Turn, note: Note, seed: int = 0
) -> list[Measurement]:
    """Return the measurements of arms after `rounds` rounds; `failed` has the reason for those without.

    Ctrl-C is left to the caller, who must close `bench`.
    """
    measurements = [Measurement(arm, failed=arm.not_applicable) for arm in arms]
    collect(measurements, bench, rounds=rounds, turn=turn, note=note, seed=seed)
    return measurements


def collect(
    measurements: Sequence[Measurement], bench: Bench, *, rounds: int, turn: Turn, note: Note, seed: int = 0
) -> None:
    """Fill the measurements round by round, with a new process for each turn."""
    rng = random.Random(seed)
    for number in range(rounds):
        active = [measurement for measurement in measurements if not measurement.failed]
        rng.shuffle(active)
        for measurement in active:
            note(f"round {number + 1} of {rounds}: {measurement.arm.name}")
            try:
                bench.turn(measurement, number, turn)
            except ArmFailed as failed:
                note(f"{measurement.arm.name}: {failed}")
            bench.end(measurement.arm.name)
