"""Computes verdict, forecast and advice of `doctor` from measurements."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from hf_fasttrain.study.bench import Measurement
from hf_fasttrain.study.intervals import Estimate
from hf_fasttrain.study.messages import Ready, Report
from hf_fasttrain.study.stopwatch import PHASES
from hf_fasttrain.utils.format import format_percent, format_rate

LOADER_BOUND = 0.1  # share of time from which the loader is called the bottleneck
CONTENTION = 0.85  # of the speed of the slower half alone: below it, the halves slow each other down
MIN_SPEED_UP = 1.03  # least speed-up of an override that is advised
STAGE_NAMES = {"read": "reading", "decode": "decoding", "augment": "augmenting", "collate": "collating"}
PHASE_NAMES = {
    "wait": "waiting for images",
    "copy": "copying, normalising and mixing",
    "forward": "the forward pass",
    "backward": "the backward pass",
    "optimizer": "the optimizer",
    "other": "everything else",
}


@dataclass(frozen=True)
class Advice:
    """Overrides and their measured speed."""

    overrides: tuple[str, ...]
    images_per_second: float
    speed_up: Estimate
    note: str = ""

    @property
    def text(self) -> str:
        """The overrides as they are written after a recipe."""
        return " ".join(self.overrides)


@dataclass(frozen=True)
class Diagnosis:
    """The profile of a training."""

    ready: Ready
    images_per_second: Estimate  # of the training as it is
    step_seconds: float  # of the profiled training
    images_per_step: float
    phases: dict[str, float]  # seconds of a step, by phase; they add up to step_seconds
    stages: dict[str, float]  # worker-seconds of an image, by loader stage
    loader_alone: float  # images/s
    compute_alone: float  # images/s
    wait_fraction: float
    device_bytes: int
    host_bytes: int
    total_seconds: float  # forecast of the whole training, without evaluation and saving
    tried: tuple[Measurement, ...]  # overrides that were measured, beside the training as it is
    advice: tuple[Advice, ...]
    baseline: Measurement
    not_tried: tuple[str, ...] = ()  # overrides, for lack of time
    rough: str = ""  # a note if other programs used the machine meanwhile

    def speed_up_of(self, measurement: Measurement) -> Estimate:
        """Return a measured override's speed-up over the training as it is, from the rounds that both have."""
        return measurement.speed_up(self.baseline)

    @property
    def workers(self) -> int:
        """Loader processes."""
        return int(self.ready.settings["data.workers"])

    @property
    def is_waiting(self) -> bool:
        """Whether the loader is the bottleneck."""
        return self.wait_fraction >= LOADER_BOUND

    @property
    def largest_stage(self) -> str:
        """The loader's stage that takes most of its workers' time."""
        return max(self.stages, key=lambda stage: self.stages[stage])

    @property
    def largest_phase(self) -> str:
        """The phase of a step that takes most of it, except waiting."""
        return max((phase for phase in PHASES if phase != "wait"), key=lambda phase: self.phases[phase])

    @property
    def epoch_seconds(self) -> float:
        """Forecast of an epoch's training, after the first one if images are cached."""
        return self.ready.num_images / self.images_per_second.median

    @property
    def verdict(self) -> str:
        """The verdict as a sentence."""
        on = f"on {self.workers} {'worker' if self.workers == 1 else 'workers'}" if self.workers else "without workers"
        compute, loader = format_rate(self.compute_alone), format_rate(self.loader_alone)
        if self.is_waiting:
            stage = self.largest_stage
            share = self.stages[stage] / max(sum(self.stages.values()), 1e-12)
            text = (
                f"The model processes {compute} images/s, the loader delivers {loader} {on}: "
                f"{format_percent(self.wait_fraction, 0)} waiting, most of the loader's time for {STAGE_NAMES[stage]} "
                f"({1000 * self.stages[stage]:.2f} ms per image, {format_percent(share, 0)})"
            )
        else:
            phase = self.largest_phase
            text = (
                f"The model is the bottleneck: it processes {compute} images/s, the loader could deliver {loader} "
                f"{on}; {format_percent(self.wait_fraction, 0)} waiting, most of a step for {PHASE_NAMES[phase]} "
                f"({1000 * self.phases[phase]:.1f} of {1000 * self.step_seconds:.1f} ms)"
            )
            together = self.images_per_second.median
            if self.workers and together < CONTENTION * min(self.compute_alone, self.loader_alone):
                others = ", as other programs do" if self.rough else ""
                text += f"; together they reach only {format_rate(together)}: they share the processor's cores{others}"
        if self.advice:
            return f"{text}; `{self.advice[0].text}` gives {format_rate(self.advice[0].images_per_second)} here."
        if not self.tried:
            return f"{text}."
        return f"{text}; none of {len(self.tried)} overrides that were tried is clearly faster."

    def as_json(self) -> dict[str, Any]:
        """Return everything as plain values."""
        return {
            "verdict": self.verdict,
            "images_per_second": vars(self.images_per_second),
            "step_seconds": self.step_seconds,
            "phases_seconds": self.phases,
            "loader_stages_worker_seconds_per_image": self.stages,
            "loader_alone_images_per_second": self.loader_alone,
            "compute_alone_images_per_second": self.compute_alone,
            "data_wait_fraction": self.wait_fraction,
            "epoch_seconds": self.epoch_seconds,
            "total_seconds": self.total_seconds,
            "device_bytes": self.device_bytes,
            "host_bytes": self.host_bytes,
            "tried": [self._tried(measurement) for measurement in self.tried],
            "not_tried": list(self.not_tried),
            "rough": self.rough,
            "advice": [
                {
                    "overrides": list(advice.overrides),
                    "images_per_second": advice.images_per_second,
                    "speed_up": vars(advice.speed_up),
                    "note": advice.note,
                }
                for advice in self.advice
            ],
        }

    def _tried(self, measurement: Measurement) -> dict[str, Any]:
        results: dict[str, Any] = {"overrides": list(measurement.arm.overrides), "failed": measurement.failed}
        if measurement.is_measured:
            results["images_per_second"] = vars(measurement.images_per_second)
            results["speed_up"] = vars(self.speed_up_of(measurement))
        return results


def split_step(report: Report) -> tuple[float, dict[str, float]]:
    """Return the seconds of a step of a profiled turn, and of each of its phases, which add up to it."""
    number = max(1, len(report.step_seconds))
    phases = {"wait": report.wait_seconds, **report.phases}
    phases["other"] = max(0.0, report.seconds - sum(phases.values()))
    return report.seconds / number, {phase: phases[phase] / number for phase in PHASES}


def split_loading(report: Report) -> dict[str, float]:
    """Return the worker-seconds of an image by stage, of a profiled turn."""
    number = max(1, report.stage_images)
    return {stage: seconds / number for stage, seconds in report.stages.items()}


def best_advice(baseline: Measurement, tried: list[Measurement], notes: dict[str, str], most: int = 2) -> list[Advice]:
    """Return the overrides that help most; without those whose gain may be noise."""
    results = []
    for measurement in tried:
        if not measurement.is_measured:
            continue
        speed_up = measurement.speed_up(baseline)
        if speed_up.median >= MIN_SPEED_UP and speed_up.low > 1:
            name = measurement.arm.name
            rate = baseline.images_per_second.median * speed_up.median
            results.append(Advice(measurement.arm.overrides, rate, speed_up, notes.get(name, "")))
    return sorted(results, key=lambda advice: -advice.speed_up.median)[:most]
