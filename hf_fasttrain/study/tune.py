"""Searches the fastest machine settings of a recipe by measuring, within a time budget."""

from __future__ import annotations

import math
import random
import re
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.study import tune_space as space
from hf_fasttrain.study.arm_process import Starter, require_one_process
from hf_fasttrain.study.bench import Arm, ArmFailed, Bench, Measurement, Note, Start
from hf_fasttrain.study.intervals import Estimate
from hf_fasttrain.study.load import free_share, is_busy, rough_note
from hf_fasttrain.study.messages import Ready, Turn, to_arm_request
from hf_fasttrain.study.techniques import Hardware
from hf_fasttrain.study.tune_guard import IMAGES, NUM_STEPS, LossCurve, Verdict, compare, loss_curve
from hf_fasttrain.study.tune_space import Config
from hf_fasttrain.utils.environment import free_memory_bytes, num_cores
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.format import format_duration, format_percent

MIN_BUDGET = 20.0  # seconds
MIN_SPEED_UP = 1.03  # least speed-up of a setting to be chosen: identical processes differ by some 2 %
SPARE = 0.06  # share of the budget reserved for the end
MAX_OVERRUN = 1.1  # share of the budget that the last rounds may reach
TURN = Turn(min_steps=2, seconds=0.6)
# The share of the budget at which each block of the search must end.
UNTIL = {"precision": 0.38, "layout": 0.50, "micro-batch": 0.61, "loader": 0.70, "cache": 0.75, "pinned memory": 0.78}


@dataclass
class Candidate:
    """Settings and their measurement."""

    config: Config
    measurement: Measurement
    reference: Measurement  # takes part in every round; others are compared with it within rounds

    def speed_up(self, since: int = 0) -> Estimate:
        """Return the speed-up over the reference, in the rounds from `since` (in all if there are none)."""
        return self.measurement.speed_up(self.reference, since)

    @property
    def images_per_second(self) -> float:
        """Images/s while the reference has its median speed: a machine that changes its speed favours nobody."""
        return self.speed_up().median / self.reference.seconds_per_image

    def forecast(self, since: int = 0) -> float:
        """Return the seconds of the recipe's whole training, by the rounds from `since`."""
        return self.measurement.forecast(self.reference.seconds_per_image / self.speed_up(since).median)


@dataclass
class TuneResult:
    """The result of a search."""

    best: Candidate
    baseline: Candidate | None  # None: the settings of the recipe don't fit into memory
    ready: Ready
    gpu: bool
    tried: list[Candidate]
    guards: dict[str, Verdict]  # by precision, named by its difference from fp32
    speed_up: Estimate | None = None  # over the baseline, measured side by side at the end
    skipped: list[str] = field(default_factory=list)  # for lack of time
    seconds: float = 0.0
    complete: bool = True  # False after Ctrl-C
    rough: str = ""  # a note if other programs used the machine meanwhile


def parse_budget(text: str) -> float:
    """Return the seconds of ``3m``, ``90s``, ``1h`` or ``180``; RunError if it is invalid or too short."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(s|m|h|)\s*", text)
    if match is None:
        raise RunError(f"--budget {text}: must be a time such as 3m, 90s or 1h")
    seconds = float(match[1]) * {"s": 1, "": 1, "m": 60, "h": 3600}[match[2]]
    if seconds < MIN_BUDGET:
        raise RunError(f"--budget {text}: too short to measure anything; give at least {MIN_BUDGET:.0f}s")
    return seconds


class Tuner:
    """A search block by block; each block is a successive halving around the best settings so far."""

    def __init__(
        self,
        start: Start,
        budget: float,
        hardware: Hardware,
        cores: int,
        *,
        note: Note,
        clock: Callable[[], float] = time.monotonic,
        free_bytes: Callable[[], int] | None = None,
        free_share: Callable[[], float] | None = None,
    ) -> None:
        self.start, self.budget, self.hardware, self.cores = start, budget, hardware, cores
        self.note, self.clock = note, clock
        self.bench = Bench(start, clock=clock, free_bytes=free_bytes, free_share=free_share, warm_seconds=0.5)
        self.reference: Candidate | None = None  # the recipe's own settings, or the first that fit into memory
        self.start_time = clock()
        self.tried: list[Candidate] = []
        self.guards: dict[str, Verdict] = {}
        self.skipped: list[str] = []
        self._fp32: LossCurve | None = None
        self._round = 0
        self._rng = random.Random(0)

    @property
    def elapsed(self) -> float:
        """Seconds since the search started."""
        return self.clock() - self.start_time

    def left(self, share: float = 1.0) -> float:
        """Return the seconds until a share of the budget is used up, without the reserve for the end."""
        return self.budget * min(share, 1 - SPARE) - self.elapsed

    def run(self) -> TuneResult:
        """Search until everything was tried or time is up; after Ctrl-C, return the best so far.

        Raises RunError if the recipe can't run here, or the budget is too short to measure its own settings.
        """
        complete, speed_up = True, None
        with self.bench:
            self.baseline, self.ready = self._first()
            self.best = self.baseline or self._fitting()
            self.reference, self.base = self.best, self.best.config
            try:
                self._search()
                speed_up = self._final()
            except KeyboardInterrupt:
                complete = False
        return TuneResult(
            self.best,
            self.baseline,
            self.ready,
            self.hardware.gpu,
            self.tried,
            self.guards,
            speed_up,
            self.skipped,
            self.elapsed,
            complete,
            rough_note(self.bench.free_shares),
        )

    def _first(self) -> tuple[Candidate | None, Ready]:
        """Measure the settings of the recipe."""
        self.note("the recipe's own settings")
        measurement = Measurement(Arm("as it is"))
        fine = self.bench.warm_up(measurement, self.left())
        if measurement.ready is None:
            raise self._not_measured(measurement)
        config = space.first_config(measurement.ready)
        candidate = Candidate(config, measurement, measurement)
        self.tried.append(candidate)
        if fine and self.left() > 0:
            self._turns([candidate])
        if measurement.is_measured and self.left() > 0:
            return candidate, measurement.ready
        if "memory" in measurement.failed:
            return None, measurement.ready
        raise self._not_measured(measurement)

    def _not_measured(self, measurement: Measurement) -> RunError:
        """Return the error for a recipe whose settings can't be measured, or not within the budget."""
        if measurement.failed and "not done" not in measurement.failed:
            return RunError(f"this recipe could not be measured here: {measurement.failed}")
        took, share = format_duration(self.elapsed), self.bench.free_share() if self.bench.free_share else 1.0
        free = f"; other programs leave {format_percent(share, 0)} of the cores now: repeat it on an idle machine"
        return RunError(
            f"--budget {self.budget:.0f}s: the recipe's own first steps took {took}; give at least "
            f"{math.ceil(8 * self.elapsed / 60)}m{free if is_busy([share]) else ''}"
        )

    def _fitting(self) -> Candidate:
        """Return the first smaller micro-batch that fits into memory."""
        for config in space.micro_batches(self.tried[0].config, self.ready):
            candidate = self._candidate(config, self.tried[0].config)
            if self._warm(candidate, 1.0):
                self._turns([candidate])
            if candidate.measurement.is_measured:
                return candidate
        raise RunError(f"this recipe could not be measured here: {self.tried[0].measurement.failed}")

    def _search(self) -> None:
        others = space.precisions(self.best.config, self.hardware)
        ranked = self._race("precision", others)
        self.best = self._guarded(ranked)
        runners_up = [candidate.config for candidate in ranked]
        self._improve("layout", [c for one in self._closest(ranked) for c in space.layouts(one.config)])
        self._improve("micro-batch", space.micro_batches(self.best.config, self.ready))
        self._improve("loader", space.loaders(self.best.config, self.hardware, self.cores))
        self._improve("cache", space.caches(self.best.config, self.ready))
        self._improve("pinned memory", space.pinning(self.best.config, self.hardware))
        self._compile(runners_up)

    def _closest(self, ranked: Sequence[Candidate]) -> list[Candidate]:
        """Return the best candidate, and others that might win with another layout."""
        near = [c for c in ranked if c is not self.best and c.forecast() < 1.5 * self.best.forecast()]
        return [self.best, *(c for c in near if self._is_good(c.config))]

    def _improve(self, block: str, configs: list[Config]) -> None:
        """Race the settings of a block against the best so far."""
        if configs:
            self.best = self._guarded(self._race(block, configs))

    def _race(self, block: str, configs: list[Config]) -> list[Candidate]:
        """Rank the settings of a block and the best so far by successive halving, the fastest first."""
        until, since = UNTIL[block], self._round
        racing = [self.best]
        for config in configs:
            candidate = self._candidate(config, self.base)
            if candidate is not self.best and self._warm(candidate, until, block):
                racing.append(candidate)
        dropped: list[Candidate] = []
        racing = self._turns(racing)
        while self.left(until) > 0 and len(racing) > 1:
            ranked = sorted(racing, key=lambda candidate: candidate.forecast(since))
            keep = max(2, math.ceil(len(ranked) / 2))
            for candidate in ranked[keep:]:
                self.bench.end(candidate.measurement.arm.name)
                dropped.append(candidate)
            racing = ranked[:keep]
            if len(racing) <= 2 and self._round - since >= 4:
                break
            racing = self._turns(racing)
        ranked = sorted(racing, key=lambda candidate: candidate.forecast(since))
        if self.best in ranked and not self._is_surely_better(ranked[0], since):
            ranked.remove(self.best)
            ranked.insert(0, self.best)
        return [*ranked, *sorted((c for c in dropped if c.measurement.is_measured), key=Candidate.forecast)]

    def _is_surely_better(self, candidate: Candidate, since: int) -> bool:
        """Return whether a candidate beats the best so far by more than noise: by MIN_SPEED_UP, and in every round."""
        best, rounds = self.best.measurement.rounds, candidate.measurement.rounds
        both = [number for number in rounds if number >= since and number in best]
        each_time = all(rounds[number] < best[number] for number in both)
        return each_time and candidate.forecast(since) * MIN_SPEED_UP < self.best.forecast(since)

    def _candidate(self, config: Config, base: Config) -> Candidate:
        """Return the candidate of a config, with its earlier measurements if it has any."""
        for candidate in self.tried:
            if candidate.config == config:
                return candidate
        measurement = Measurement(Arm(space.difference(config, base), space.overrides_of(config)))
        reference = self.reference.measurement if self.reference else measurement
        return Candidate(config, measurement, reference)

    def _warm(self, candidate: Candidate, until: float, block: str = "", limit: float | None = None) -> bool:
        """Start a candidate if there is time for it; return whether it can be measured."""
        measurement = candidate.measurement
        if measurement.rounds or measurement.failed:
            return not measurement.failed
        cost = self._usual_cost()
        if limit is None and self.left(until) < cost:
            self.skipped.append(f"{block}: {measurement.arm.name}")
            return False
        self.note(f"{block}: {measurement.arm.name}")
        self.tried.append(candidate)
        fine = self.bench.warm_up(measurement, max(1.0, limit or min(self.left(), 4 * cost + 5)))
        if measurement.failed:
            self.note(f"{measurement.arm.name}: {measurement.failed}")
        return fine

    def _usual_cost(self) -> float:
        """Return the median seconds of starting a candidate so far."""
        starts = [c.measurement.start_seconds for c in self.tried[1:] if c.measurement.start_seconds]
        return statistics.median(starts or [self.tried[0].measurement.start_seconds])

    def _turns(self, candidates: Sequence[Candidate]) -> list[Candidate]:
        """Run a turn of each candidate and of the reference in random order; return the candidates measured."""
        reference = [self.reference] if self.reference and self.reference not in candidates else []
        order = [candidate for candidate in [*candidates, *reference] if not candidate.measurement.failed]
        self._rng.shuffle(order)
        for candidate in order:
            try:
                limit = max(self.left(), 10 + 5 * self._usual_cost())  # in case one hangs
                self.bench.turn(candidate.measurement, self._round, TURN, limit)
            except ArmFailed as failed:
                self.note(f"{candidate.measurement.arm.name}: {failed}")
        self._round += 1
        return [candidate for candidate in candidates if candidate.measurement.is_measured]

    def _guarded(self, ranked: Sequence[Candidate]) -> Candidate:
        """Return the best candidate whose precision trains like fp32."""
        for candidate in ranked:
            if candidate is self.best or self._is_good(candidate.config):
                return candidate
        return self.best

    def _is_good(self, config: Config) -> bool:
        if space.is_plain(config) or space.math_of(config) == space.math_of(self.base):
            return True
        plain, name = space.precisions(config, self.hardware)[0], space.precision_name(config, self.hardware.gpu)
        if name not in self.guards:
            verdict = self._judge(name, config, plain)
            if verdict is None:
                return False
            self.guards[name] = verdict
            self.note(f"{name}: {verdict}{'' if verdict.is_good else ': not used'}")
        return self.guards[name].is_good

    def _judge(self, name: str, config: Config, plain: Config) -> Verdict | None:
        """Compare a precision with fp32; None if that is not possible, so that it is not used."""
        images = max(2, min(IMAGES, self.ready.num_images, int(self.ready.settings["train.batch_size"])))
        eager = {"accelerate.compile": False, "accelerate.micro_batch_size": None, "data.cache": "none"}
        seconds_per_image = (self.baseline or self.best).measurement.seconds_per_image
        num_curves = 1 if self._fp32 is not None else 2
        if self.left() < num_curves * (self._usual_cost() + NUM_STEPS * images * seconds_per_image):
            self.skipped.append(f"precision {name}: no time to compare it with fp32")
            return None
        self.note(f"comparing {name} with fp32: first gradient, {NUM_STEPS} steps at full lr")
        try:
            if self._fp32 is None:
                self._fp32 = self._loss_curve({**plain, **eager}, images)
            return compare(self._loss_curve({**config, **eager}, images), self._fp32)
        except ArmFailed as failed:
            self.note(f"{name} is not used: it could not be compared with fp32: {failed}")
            self.skipped.append(f"precision {name}: not compared with fp32")
            return None

    def _loss_curve(self, config: Config, images: int) -> LossCurve:
        return loss_curve(self.start, space.overrides_of(config), images, max(1.0, self.left()))

    def _compile(self, runners_up: list[Config]) -> None:
        """Try torch.compile, which takes long, in the remaining time, if it could pay off."""
        usable = (config for config in runners_up if self._is_good(config))
        configs = space.compiled(self.best.config, usable, self.hardware)
        saving = self.best.forecast() / 3  # if it were 1.5 times as fast
        cost = 4 * self._usual_cost() + 20
        for number, config in enumerate(configs):
            candidate, since = self._candidate(config, self.base), self._round
            if self.left() < cost or saving < cost:
                why = "the training is too short to pay for it" if saving < cost else ""
                self.skipped += [
                    f"compile: {space.difference(c, self.base)}{f' ({why})' if why else ''}" for c in configs[number:]
                ]
                return
            start_time = self.clock()
            if not self._warm(candidate, 1.0, "compile", limit=self.left()):
                continue
            cost = self.clock() - start_time
            for _ in range(3):
                self._turns([self.best, candidate])
            if candidate.measurement.is_measured and self._is_surely_better(candidate, since):
                self.best = candidate

    def _final(self) -> Estimate | None:
        """Measure the best settings beside the recipe's in the remaining time, with three rounds or more."""
        if self.baseline is None or self.best is self.baseline:
            return None
        since, cost = self._round, 2 * self._usual_cost()
        while (number := self._round - since) < 9:
            if self.left() < 0 and (number >= 3 or self.elapsed + cost > MAX_OVERRUN * self.budget):
                break
            start_time = self.clock()
            self.bench.close()  # new processes for each round: these are the figures that are reported
            self.note(f"the best beside the recipe's own: round {self._round - since + 1}")
            self._turns([self.baseline, self.best])
            if self.best.measurement.failed or self.baseline.measurement.failed:
                return None
            cost = self.clock() - start_time
        if self._round == since:
            return None
        speed_up = self.best.speed_up(since)
        if speed_up.median < MIN_SPEED_UP and speed_up.low < 1:  # the gain was noise, or may be
            self.best = self.baseline
            return None
        return speed_up


def tune(recipe: Recipe, budget: float, machine: Hardware, *, note: Note) -> TuneResult:
    """Search the fastest settings of a recipe for `budget` seconds; see `Tuner.run`."""
    require_one_process()
    with Starter(to_arm_request(recipe), on_gpu=machine.gpu) as start:
        tuner = Tuner(
            start, budget, machine, num_cores(), note=note, free_bytes=free_memory_bytes, free_share=free_share
        )
        return tuner.run()
