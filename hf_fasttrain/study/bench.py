"""The measuring instrument: arms of an experiment, each a training in a process of its own, run in turns.

Every round gives each arm one turn, in an order of its own: a machine that becomes slower harms all alike. What a turn
gives is the seconds of an image; rounds are compared in pairs.

Two processes that do the same differ by some 2 % as long as they live, by where their memory happens to lie. `collect`
therefore gives each turn a process of its own, and its intervals hold; `tune` and `doctor`, which have less time, keep
arms alive. An arm that waits for its next turn stands still, loader processes included (SIGSTOP), so that it loads
nothing ahead and disturbs nobody.
"""

from __future__ import annotations

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

Tell = Callable[[str], None]


class ArmFailed(Exception):
    """An arm can't be measured; its text says why, and `out_of_memory` whether it may have lacked memory."""

    def __init__(self, text: str, *, out_of_memory: bool = False) -> None:
        super().__init__(text)
        self.out_of_memory = out_of_memory


@dataclass(frozen=True)
class Arm:
    """One side of an experiment: a name, and what it sets in the recipe."""

    name: str
    overrides: tuple[str, ...] = ()
    not_applicable: str = ""  # why it can't make a difference here


class Running(Protocol):
    """A training that waits for its next turn."""

    ready: Ready

    def turn(self, turn: Turn, limit_seconds: float | None = None) -> Report:
        """Run a turn; ArmFailed if it can't, or is not over within the limit."""
        ...

    def close(self) -> None:
        """End it."""
        ...


Start = Callable[[Arm, ArmOptions, float | None], Running]  # an arm, how it differs, seconds that it may take


@dataclass
class Measurement:
    """What is known of an arm after its turns."""

    arm: Arm
    ready: Ready | None = None
    failed: str = ""
    compile_seconds: float = 0.0  # of the first step, beyond an ordinary one's
    start_seconds: float = 0.0  # until it could begin
    first_pass_seconds: float | None = None  # of an image, from the loader, before its pixels are kept
    rounds: dict[int, float] = field(default_factory=dict)  # round -> seconds of an image
    waits: list[float] = field(default_factory=list)  # share of each turn lost by waiting for data
    losses: list[float] = field(default_factory=list)  # of the first steps, one by one, until it is started anew
    device_bytes: int = 0
    host_bytes: int = 0
    lives: int = 0  # how often it was started

    @property
    def is_measured(self) -> bool:
        """Whether there is a figure."""
        return bool(self.rounds) and not self.failed

    @property
    def images_per_second(self) -> Estimate:
        """Images a second, with the interval of its median over rounds."""
        return estimate([1 / seconds for seconds in self.rounds.values()])

    @property
    def seconds_per_image(self) -> float:
        """Median seconds of an image."""
        return statistics.median(self.rounds.values())

    @property
    def wait_fraction(self) -> float:
        """Median share of time lost by waiting for data."""
        return statistics.median(self.waits) if self.waits else 0.0

    def speed_up(self, baseline: Measurement) -> Estimate:
        """How many times as fast as the baseline, from the rounds that both have."""
        both = [number for number in self.rounds if number in baseline.rounds]
        return paired_ratio([baseline.rounds[n] for n in both], [self.rounds[n] for n in both])

    def add(self, number: int, report: Report) -> None:
        """Add a round's turn."""
        self.rounds[number] = report.seconds / max(1, report.images)
        self.waits.append(min(1.0, report.wait_seconds / max(report.seconds, 1e-9)))
        if self.lives == 1:
            self.losses += report.losses
        self._remember(report)

    def warm(self, report: Report) -> None:
        """Add a turn that is not measured: the first."""
        first, *others = report.step_seconds
        if others:
            self.compile_seconds = max(0.0, first - statistics.median(others))
        self.first_pass_seconds = report.fill_seconds
        self.losses += report.losses
        self._remember(report)

    def forecast(self, seconds_per_image: float) -> float:
        """Return the seconds of the recipe's whole training at a pace, compiling and the first pass included.

        Without evaluation and saving, as `train_seconds` of result.json.
        """
        ready = self.ready
        assert ready is not None
        images = ready.steps / ready.steps_per_epoch * ready.num_images
        first = min(images, ready.num_images) if ready.keeps_pixels else 0.0
        filling = first * max(self.first_pass_seconds or 0.0, seconds_per_image)
        shapes = 1 + ready.short_last_step  # each is compiled
        compiling = self.compile_seconds * shapes if ready.settings["accelerate.compile"] else 0.0
        return filling + (images - first) * seconds_per_image + compiling

    def _remember(self, report: Report) -> None:
        self.device_bytes = max(self.device_bytes, report.device_bytes)
        self.host_bytes = max(self.host_bytes, report.host_bytes)


class Bench:
    """Holds the running arms of an experiment; leaves no process behind.

    `free_bytes` tells how much memory is left. Where it does not do for one arm more, those that waited longest are
    ended, and begin anew when it is their turn.
    """

    def __init__(
        self,
        start: Start,
        *,
        options: ArmOptions = ArmOptions(),  # noqa: B008 - frozen
        clock: Callable[[], float] = time.monotonic,
        free_bytes: Callable[[], int] | None = None,
        warm_seconds: float = 1.0,
    ) -> None:
        self.start, self.options, self.clock = start, options, clock
        self.free_bytes, self.warm_seconds = free_bytes, warm_seconds
        self._running: dict[str, tuple[Running, Measurement]] = {}  # in the order of their last turns

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """End all arms; Ctrl-C must wait for it, or processes that stand still would be left."""
        with signal_handler(signal.SIGINT, signal.SIG_IGN):
            for name in list(self._running):
                self.end(name)

    def end(self, name: str) -> None:
        """End an arm."""
        running = self._running.pop(name, None)
        if running is not None:
            running[0].close()

    def warm_up(self, measurement: Measurement, limit_seconds: float | None = None) -> bool:
        """Start an arm and make its first steps; return whether it can be measured."""
        began = self.clock()
        try:
            self._start(measurement, limit_seconds)
        except ArmFailed as failed:
            measurement.failed, measurement.start_seconds = str(failed), self.clock() - began
            self.end(measurement.arm.name)
        return not measurement.failed

    def _start(self, measurement: Measurement, limit_seconds: float | None) -> None:
        self._make_room(measurement)
        began = self.clock()
        try:
            self._first_turn(measurement, limit_seconds)
        except ArmFailed as failed:
            self.end(measurement.arm.name)
            if not self._alone_may_do(failed):
                raise
            self._first_turn(measurement, limit_seconds)
        measurement.start_seconds = self.clock() - began

    def _alone_may_do(self, failed: ArmFailed) -> bool:
        """End the others if they may have taken the memory that an arm lacked; return whether there were any."""
        if not self._running or not failed.out_of_memory:
            return False
        self.close()
        return True

    def _first_turn(self, measurement: Measurement, limit_seconds: float | None) -> None:
        name, before = measurement.arm.name, self.clock()
        running = self.start(measurement.arm, self.options, limit_seconds)
        self._running[name] = running, measurement
        measurement.ready = running.ready
        left = None if limit_seconds is None else max(0.1, limit_seconds - (self.clock() - before))
        report = running.turn(Turn(min_steps=3, seconds=self.warm_seconds, drain=True), left)
        measurement.lives += 1
        if not measurement.rounds:
            measurement.warm(report)

    def _make_room(self, measurement: Measurement) -> None:
        """End the arms that waited longest until there is memory for one more."""
        if self.free_bytes is None:
            return
        sizes = [m.host_bytes for _, m in self._running.values() if m.host_bytes]
        needed = 1.5 * max([measurement.host_bytes, *sizes])
        while self._running and self.free_bytes() < needed:
            self.end(next(iter(self._running)))

    def turn(self, measurement: Measurement, number: int, turn: Turn, limit_seconds: float | None = None) -> Report:
        """Give an arm a turn and add what it gives as round `number`; ArmFailed, and kept in mind, if it can't."""
        try:
            report = self._turn(measurement, turn, limit_seconds)
        except ArmFailed as failed:
            self.end(measurement.arm.name)
            if not self._alone_may_do(failed):
                measurement.failed = str(failed)
                raise
            report = self._turn(measurement, turn, limit_seconds)
        measurement.add(number, report)
        return report

    def _turn(self, measurement: Measurement, turn: Turn, limit_seconds: float | None) -> Report:
        name = measurement.arm.name
        if name not in self._running:
            self._start(measurement, limit_seconds)
        running, _ = self._running[name] = self._running.pop(name)
        return running.turn(turn, limit_seconds)


def measure(
    arms: Sequence[Arm], bench: Bench, *, rounds: int, turn: Turn, tell: Tell, seed: int = 0
) -> list[Measurement]:
    """Return the measurements of arms after `rounds` rounds; one that fails, or is not applicable, says so.

    Ctrl-C is the caller's to meet: `bench` must be closed.
    """
    measurements = [Measurement(arm, failed=arm.not_applicable) for arm in arms]
    collect(measurements, bench, rounds=rounds, turn=turn, tell=tell, seed=seed)
    return measurements


def collect(
    measurements: Sequence[Measurement], bench: Bench, *, rounds: int, turn: Turn, tell: Tell, seed: int = 0
) -> None:
    """Fill the measurements round by round, each turn in a process of its own."""
    rng = random.Random(seed)
    for number in range(rounds):
        going = [measurement for measurement in measurements if not measurement.failed]
        rng.shuffle(going)
        for measurement in going:
            tell(f"round {number + 1} of {rounds}: {measurement.arm.name}")
            try:
                bench.turn(measurement, number, turn)
            except ArmFailed as failed:
                tell(f"{measurement.arm.name}: {failed}")
            bench.end(measurement.arm.name)
