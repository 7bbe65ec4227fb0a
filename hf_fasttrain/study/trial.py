"""Runs a recipe's training a few steps at a time, with the trainer's real loop and not a copy of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from hf_fasttrain.data.loading.device_cache import DevicePrefetcher
from hf_fasttrain.data.loading.loader import MicroBatches, Step, TrainLoader
from hf_fasttrain.data.loading.prefetch import num_slots
from hf_fasttrain.data.loading.sampler import SamplingPlan, StepPlan
from hf_fasttrain.data.pixels.decode import is_jpeg
from hf_fasttrain.data.source.dataset import Split
from hf_fasttrain.from_recipe.cache_plan import estimated_bytes
from hf_fasttrain.from_recipe.parts import Parts, build_parts
from hf_fasttrain.from_recipe.trainer import assemble
from hf_fasttrain.from_recipe.tunings import Presets
from hf_fasttrain.recipe.load import with_values
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.study.messages import NO_END, ArmOptions, ArmRequest, Ready, Report, Turn
from hf_fasttrain.study.stopwatch import Stopwatch, watch_compute, watch_loader
from hf_fasttrain.train.callbacks import StepReport
from hf_fasttrain.train.schedule import constant
from hf_fasttrain.train.step_loss import At
from hf_fasttrain.train.trainer import Trainer
from hf_fasttrain.utils.environment import peak_memory_bytes
from hf_fasttrain.utils.private_apis import dropout_class, set_first_loss_scale

SAMPLE_IMAGES = 256  # of a pass, if images are cached
TIMED_STEPS = 4  # of a first pass, minimum
GUARD_SCALE = 2.0**10  # fp16's loss scale, for a first gradient


@dataclass(frozen=True)
class Passes(SamplingPlan):
    """Repeats the first `period` steps of a sampling plan, so that the cache is soon full."""

    period: int = 1

    def plan(self, step: int) -> StepPlan:
        """Return the plan of a step; the epoch, which randomness depends on, is the number of passes."""
        passes, within = divmod(step, self.period)
        plan = super().plan(within)
        keys = tuple(replace(key, epoch=passes) for key in plan.micro_batches)
        return replace(plan, step=step, epoch=passes, micro_batches=keys)


class _GradientWriter(Trainer):
    """A trainer that writes the gradient of its first update to a file, (P,) float32."""

    gradient_to: Path | None = None

    def train_step(self, step: Step) -> Tensor:
        """Train on a step; see `Trainer`."""
        loss = self.step.gradients(step)
        if self.gradient_to is not None:
            flat = [p.grad.detach().float().flatten().cpu() for p in self.step.parameters if p.grad is not None]
            np.save(self.gradient_to, torch.cat(flat).numpy())
            self.gradient_to = None
        self.step.update()
        return loss


class Trial:
    """A training that is built and runs in turns."""

    def __init__(self, recipe_request: ArmRequest, options: ArmOptions = ArmOptions()) -> None:  # noqa: B008 - frozen
        recipe = without_growth(recipe_request.load())
        self.parts = parts = build_parts(recipe, presets=None if options.stored_tuning else Presets())
        kind = Trainer if options.gradient_to is None else _GradientWriter
        self.trainer = assemble(parts, None, kind, callbacks=[self])
        self.trainer.probe = None  # steps are measured, whatever the head
        self.trainer.retry.is_on = False  # that micro-batches do not fit is a result
        self.turn: Turn | None = None
        self._is_started = False  # whether the clock of the turn runs
        self._profiler: torch.profiler.profile | None = None
        self._trace = ""
        self.device, self.loader = self.trainer.device, self.trainer.train_loader
        self.stopwatch: Stopwatch | None = None
        keeps = parts.settings.all()["data.cache"].value != "none" and self._has_room(parts)
        self.ready = Ready(
            device=str(self.device),
            settings={key: setting.value for key, setting in parts.settings.all().items()},
            notes=(*parts.settings.notes, *parts.settings.weight_notes),
            steps=self.trainer.num_steps,
            steps_per_epoch=parts.sampling_plan.steps_per_epoch,
            short_last_step=not parts.sampling_plan.drop_last
            and parts.sampling_plan.num_images % parts.sampling_plan.batch_size > 0,
            num_images=parts.sampling_plan.num_images,
            period=self._loop(parts.sampling_plan, keeps),
            keeps_pixels=keeps,
            has_batch_norm=bool(self.trainer.step.norms),
            is_jpeg=_has_jpegs(parts.source.train),
            micro_batch_size=parts.sampling_plan.micro_batch_size,
        )
        self._prepare(options)

    def _has_room(self, parts: Parts) -> bool:
        """Return whether all pixels fit into the cache: with only some of them, a short pass would look too fast."""
        cache = self.loader.prefetcher.images.images.cache
        need = estimated_bytes(parts.source.train, self.loader.prefetcher.images.images.preparation)
        if cache is None or need <= cache.budget:
            return True
        parts.settings.note("not all pixels would be kept here: measured as if none were")
        return False

    def _loop(self, sampling_plan: SamplingPlan, keeps: bool) -> int:
        """Repeat full steps only, and few of them if images are cached; return how many."""
        full, period = max(1, sampling_plan.num_images // sampling_plan.batch_size), 0
        if keeps:
            period = max(self._steps_ahead + TIMED_STEPS, -(-SAMPLE_IMAGES // sampling_plan.batch_size))
        fields = {name: getattr(sampling_plan, name) for name in SamplingPlan.__dataclass_fields__}
        passes = Passes(**fields, period=min(full, period) if keeps else full)
        self.loader.sampling_plan = passes
        if isinstance(
            self.loader.prefetcher, DevicePrefetcher
        ):  # it loads until all images are on the device: restrict them to those of the passes
            keys = (key for step in range(passes.period) for key in passes.plan(step).micro_batches)
            self.loader.prefetcher.is_loaded[:] = True
            self.loader.prefetcher.is_loaded[np.unique(np.concatenate([key.indices for key in keys]))] = False
        return passes.period

    @property
    def _steps_ahead(self) -> int:
        """Steps whose batches workers may have prefetched."""
        sampling_plan, workers = self.loader.sampling_plan, self.loader.prefetcher.workers
        ahead = num_slots(workers, sampling_plan.micro_batch_size) if workers else 0
        return -(-ahead * sampling_plan.micro_batch_size // sampling_plan.batch_size)

    def _prepare(self, options: ArmOptions) -> None:
        trainer = self.trainer
        trainer.num_steps = trainer.evaluate_every = trainer.checkpoint_every = NO_END
        last, schedule = self.ready.steps - 1, trainer.schedule
        trainer.schedule = constant if options.full_lr else lambda step: schedule(min(step, last))
        if options.without_dropout:
            _without_dropout(trainer.raw_model)
        if options.profiled:
            self.stopwatch = Stopwatch(self.device)
            watch_compute(trainer, self.stopwatch)
            watch_loader(self.loader.prefetcher, self.stopwatch)
        if isinstance(trainer, _GradientWriter):
            trainer.gradient_to = Path(str(options.gradient_to))
            if trainer.accelerator.scaler is not None:
                set_first_loss_scale(trainer.accelerator.scaler, GUARD_SCALE)  # the default may overflow

    def trace_next(self, path: str) -> None:
        """Profile the next turn with torch's profiler, and write its trace."""
        self._trace = path

    def run(self, next_turn: Callable[[Report | None], Turn | None]) -> None:
        """Train in turns until `next_turn(report of the last turn)` returns None."""
        self.turn, self._is_started = next_turn(None), False
        if self.turn is None:
            return
        with self.trainer.running():
            for step in self.trainer.iterate():
                self.count(step)
                if self._is_over():
                    report = self._report()
                    with self.trainer.throughput.stopped():
                        turn = next_turn(report)
                        if turn is None:
                            break
                        self.begin(turn)
        self.turn = None

    def before_step(self, trainer: Trainer, at: At) -> None:
        """Start the clock of the first turn at its first step."""
        if self.turn is not None and not self._is_started:
            self.begin(self.turn)

    def begin(self, turn: Turn) -> None:
        """Start the clock of a turn."""
        self.turn, self._images, self._losses, self._is_started = turn, 0, list[Tensor](), True
        self._fill_seconds: float | None = None
        if self.stopwatch is not None:
            self.stopwatch.reset()
        self._wait_before = self.loader.wait_seconds
        if self._trace:
            self._profiler = torch.profiler.profile()
            self._profiler.start()
        self._start_time = time.perf_counter()
        self._last = self._mark()
        self._steps: list[tuple[Any, Any]] = []  # times before and after each

    def _mark(self) -> Any:
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def count(self, step: StepReport) -> None:
        """Count a step; if the turn drains, discard prefetched batches after its first step."""
        assert self.turn is not None
        self._count(step.num_images)
        self._losses.append(step.loss)
        if self.turn.drain and len(self._steps) == 1:
            self._drain()
            self._last = self._mark()

    def _is_over(self) -> bool:
        """Return whether the turn is over."""
        assert self.turn is not None
        done, seconds = len(self._losses), time.perf_counter() - self._start_time
        if done < self.turn.min_steps and seconds < self.turn.enough:
            return False
        return done >= self.turn.max_steps or seconds >= self.turn.seconds

    def _count(self, num_images: int) -> None:
        before, self._last = self._last, self._mark()
        self._steps.append((before, self._last))
        self._images += num_images

    def _report(self) -> Report:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        seconds = time.perf_counter() - self._start_time
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler.export_chrome_trace(self._trace)
            self._profiler, self._trace = None, ""
        if self.device.type == "cuda":
            steps = tuple(before.elapsed_time(after) / 1000 for before, after in self._steps)
        else:
            steps = tuple(after - before for before, after in self._steps)
        watch = self.stopwatch
        report = Report(
            seconds=seconds,
            images=self._images,
            step_seconds=steps,
            wait_seconds=self.loader.wait_seconds - self._wait_before,
            losses=tuple(torch.stack(self._losses).float().tolist()),
            device_bytes=peak_memory_bytes(self.device),
            fill_seconds=self._fill_seconds,
            phases=watch.phases() if watch else {},
            stages=watch.stages() if watch else {},
            stage_images=watch.stage_images() if watch else 0,
        )
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        return report

    def _drain(self) -> None:
        """Discard batches: the first pass, if pixels are cached, and those that workers have prefetched.

        While the first step was compiled they have filled their queue, which would hide their real speed.
        """
        skip = self.trainer.upcoming.skip
        if self.ready.keeps_pixels and self.ready.period > 1:
            images, start_time = 0, time.perf_counter()
            for number in range(1, self.ready.period):
                if number == self._steps_ahead:  # earlier ones were loaded while the first step was compiled
                    images, start_time = 0, time.perf_counter()
                images += skip(1)
            self._fill_seconds = (time.perf_counter() - start_time) / images
        workers = self.loader.prefetcher.workers
        for _ in range(num_slots(workers, self.loader.sampling_plan.micro_batch_size) if workers else 0):
            before = time.perf_counter()
            skip(1)
            if time.perf_counter() - before > 0.01:  # it was not prefetched
                break

    def loader_alone(self, turn: Turn) -> Report:
        """Read the training's batches without training on them."""
        first = self.loader.prefetcher.workers + 1  # workers start during these
        if self.ready.keeps_pixels:
            first = max(first, self.ready.period)
        self.begin(turn)
        steps = self.loader.steps(0, NO_END)
        for number, step in enumerate(steps, start=1 - first):
            for _ in step.micro_batches:
                pass
            if number <= 0:
                self.begin(turn)
                continue
            self._count(step.num_images)
            seconds = time.perf_counter() - self._start_time
            if (number >= turn.min_steps and seconds >= turn.seconds) or seconds >= turn.enough:
                break
        steps.close()
        self._losses = [torch.zeros(())]
        report, self.turn = self._report(), None
        return report

    def compute_alone(self, turn: Turn) -> Report:
        """Train on the images of one step repeatedly."""
        (step,) = self.loader.steps(0, 1)
        batches = [(images.clone(), targets.clone()) for images, targets in step.micro_batches]
        trainer = self.trainer
        trainer.train_loader = _Repeated(step, batches, self.loader)
        reports: list[Report] = []

        def next_turn(report: Report | None) -> Turn | None:
            if report is not None:
                reports.append(report)
            return [Turn(min_steps=2, enough=turn.enough), turn, None][len(reports)]

        try:
            self.run(next_turn)
        finally:
            trainer.train_loader = self.loader
        return reports[-1]


@dataclass(frozen=True)
class _Repeated:
    """A loader that repeats one step, whose images are on the device."""

    step: Step
    batches: list[tuple[Tensor, Tensor]]
    loader: TrainLoader
    wait_seconds: float = 0.0

    @property
    def steps_per_epoch(self) -> int:
        return self.loader.steps_per_epoch

    @property
    def micro_batch_size(self) -> int:
        return self.loader.micro_batch_size

    def image_indices(self, step: int) -> np.ndarray:
        return self.loader.image_indices(step)

    def steps(self, start: int, stop: int) -> Iterator[Step]:
        for index in range(start, stop):
            yield replace(self.step, index=index, micro_batches=MicroBatches(iter(self.batches), self.batches.__iter__))


def without_growth(recipe: Recipe) -> Recipe:
    """Return the recipe at its full image size: progressive resizing would change the measured work."""
    return with_values(recipe, {"augment.progressive": None}) if recipe.augment.progressive else recipe


def _without_dropout(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, dropout_class()):
            module.p = 0.0
        elif isinstance(getattr(module, "drop_prob", None), float):  # drop-path of timm and transformers
            setattr(module, "drop_prob", 0.0)  # noqa: B010 - no attribute that nn.Module declares


def _has_jpegs(split: Split) -> bool:
    """Return whether any of a sample of the images is a JPEG."""
    sampled = np.linspace(0, len(split) - 1, min(len(split), 16), dtype=np.int64)
    return any(is_jpeg(record) for record in split.records(sampled))
