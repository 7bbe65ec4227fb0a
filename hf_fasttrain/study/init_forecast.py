"""The forecast of `init`: a few real training steps of the recipe on this machine."""

from __future__ import annotations

from dataclasses import dataclass

from hf_fasttrain.from_recipe.auto import micro_batch_size
from hf_fasttrain.recipe.load import load_recipe
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.study.bench import Arm, Measurement
from hf_fasttrain.study.load import free_share, is_busy
from hf_fasttrain.study.messages import ArmOptions, Report, Turn, to_arm_request
from hf_fasttrain.study.trial import Trial
from hf_fasttrain.train.launcher import uses_gpu
from hf_fasttrain.utils.errors import NotEnoughMemory
from hf_fasttrain.utils.format import format_bytes, format_duration, format_images_rate

WARM_TURN = Turn(min_steps=2, enough=4.0, drain=True)
MEASURED_TURN = Turn(min_steps=2, seconds=3.0, enough=5.0)
CPU_IMAGES = 16  # per measured step on a CPU: the rate hardly depends on it, and larger steps take long
FORWARD_SHARE = 1 / 3  # of a training step's time


@dataclass(frozen=True)
class InitForecast:
    """Time and memory of a training, measured for some seconds."""

    images_per_second: float
    seconds: float  # of the whole training, with evaluations
    memory: int  # peak of the process, or of the GPU
    on_gpu: bool
    measured_seconds: float
    is_busy: bool  # whether other programs used the machine

    def line(self) -> str:
        """Return the forecast as text."""
        memory = f"{format_bytes(self.memory)} of {'GPU ' if self.on_gpu else ''}memory"
        measured = f"{format_duration(self.measured_seconds, 0)} at {format_images_rate(self.images_per_second)}"
        others = ", while other programs used the cores" if self.is_busy else ""
        return f"about {_roughly(self.seconds)} of training, {memory}; rough: measured for {measured}{others}"


def forecast(recipe: Recipe, *, has_weights: bool) -> InitForecast | None:
    """Train a few steps and return the forecast; None if a step does not fit in the GPU's memory.

    Without its weights the model is built with random ones, which are as fast. Raises UserError if the recipe can't be
    trained.
    """
    trial = Trial(to_arm_request(_measurable(recipe, has_weights=has_weights)), ArmOptions(stored_tuning=True))
    trial.trainer.log.console.quiet = True  # the trial has no end: progress would be nonsense
    share = free_share()
    measurement = Measurement(Arm("init"), trial.ready)
    reports: list[Report] = []

    def next_turn(report: Report | None) -> Turn | None:
        if report is not None:
            reports.append(report)
        return [WARM_TURN, MEASURED_TURN, None][len(reports)]

    try:
        trial.run(next_turn)
    except NotEnoughMemory:
        return None
    measurement.warm(reports[0])
    measurement.add(0, reports[1])
    per_image = measurement.seconds_per_image
    seconds = measurement.forecast(per_image) + FORWARD_SHARE * per_image * _forward_images(recipe, trial)
    on_gpu = trial.device.type != "cpu"
    return InitForecast(
        images_per_second=1 / per_image,
        seconds=seconds,
        memory=reports[1].device_bytes if on_gpu else _peak(recipe, trial),
        on_gpu=on_gpu,
        measured_seconds=sum(report.seconds for report in reports),
        is_busy=is_busy([share]),
    )


def _roughly(seconds: float) -> str:
    """Return a duration without digits that a rough forecast does not have."""
    unit = 1 if seconds < 60 else 10 if seconds < 600 else 60
    rounded = max(1, round(seconds / unit)) * unit
    return format_duration(rounded, 0)


def _measurable(recipe: Recipe, *, has_weights: bool) -> Recipe:
    """Return the recipe with steps and weights that can be measured here and now."""
    overrides = [] if has_weights else ["model.pretrained=false"]
    if not uses_gpu() and recipe.train.batch_size > CPU_IMAGES:
        overrides.append(f"train.batch_size={CPU_IMAGES}")
    return load_recipe(recipe, overrides) if overrides else recipe


def _forward_images(recipe: Recipe, trial: Trial) -> float:
    """Return how many images go through the model in evaluations and, with train.probe_first, before training."""
    epochs = trial.ready.steps / trial.ready.steps_per_epoch
    every = recipe.evaluate.every
    assert not isinstance(every, str)
    evaluations = max(1, int(epochs / every.count)) if every.unit == "epochs" else 1
    source = trial.parts.source
    probed = len(source.train) + len(source.evaluation) if recipe.train.probe_first else 0
    return evaluations * len(source.evaluation) + probed


def _peak(recipe: Recipe, trial: Trial) -> int:
    """Return the peak memory of a training process on a CPU, with the recipe's own batch size."""
    forecast = trial.parts.forecast
    assert forecast is not None
    share = min(recipe.train.batch_size, trial.ready.num_images)
    largest = int(trial.ready.settings["largest_micro_batch"])
    return forecast.peak(min(share, micro_batch_size(requested=share, share=share, largest=largest).value))
