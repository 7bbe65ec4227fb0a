"""The final weights of a run: the last ones, those of the best evaluation, or the mean of the last evaluated ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fasttrain.run_folder.calibration import Calibration, calibration_in
from hf_fasttrain.run_folder.result import Result, Watch
from hf_fasttrain.train.checkpoint_state import State
from hf_fasttrain.train.checkpointing import Checkpoints
from hf_fasttrain.train.weight_average import StateKeeper, averaged_steps, load_average
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.format import format_command

if TYPE_CHECKING:
    from hf_fasttrain.train.trainer import Trainer

CHOICES = ("auto", "best", "last", "average")


@dataclass
class FinalModel:
    """The weights in RUN/model."""

    weights: str  # best, last or average
    step: int  # after which the weights were saved; of an average, the last one
    metrics: dict[str, float] | None  # of the evaluation split; None: unknown
    averaged: tuple[int, ...] = ()  # the steps that an average is taken over
    calibration: Calibration | None = None

    def is_of_step(self, step: int) -> bool:
        """Return whether these are the weights after a step, and no average."""
        return self.step == step and not self.averaged

    @property
    def name(self) -> str:
        """What messages call the weights."""
        return f"steps {_listed(self.averaged)} averaged" if self.averaged else f"step {self.step:,}"

    def as_json(self) -> dict[str, Any]:
        """Return which weights these are, for result.json."""
        steps = {"steps": list(self.averaged)} if self.averaged else {}
        return {"weights": self.weights, "step": self.step, **steps}


def resolve_final(choice: str, early_stopping: Watch | None) -> str:
    """Resolve auto, best, last or average; auto is best with early stopping. Raises RunError for another choice."""
    if choice not in CHOICES:
        raise RunError(f"final is '{choice}'; allowed are {', '.join(CHOICES)}")
    if choice == "auto":
        return "last" if early_stopping is None else "best"
    return choice


def prepare_final(trainer: Trainer) -> None:
    """Resolve which weights the run ends with, before its first step, and keep what that needs.

    Raises RunError for a choice that is not possible.
    """
    trainer.final = resolve_final(trainer.final, trainer.evaluation.early_stopping)
    number = trainer.num_averaged
    if trainer.final != "average":
        return
    if not isinstance(number, int) or isinstance(number, bool) or number < 2:
        raise RunError(f"num_averaged: must be a whole number of at least 2, got {number!r}")
    if trainer.output_dir is not None and not any(
        isinstance(callback, StateKeeper) for callback in trainer.callbacks.callbacks
    ):
        trainer.callbacks.insert_first(StateKeeper())


def will_average(trainer: Trainer) -> bool:
    """Return whether RUN/model of the finished run should have an average of its weights."""
    return trainer.final == "average" and len(averaged_steps(trainer)) > 1


def final_step(final: str, state: State, checkpoints: Checkpoints | None) -> int:
    """Return the step of the weights that belong into a finished run's model folder, if they are still on disk."""
    best = state.best["step"] if state.best else state.step
    if final != "best" or best == state.step or checkpoints is None:
        return state.step
    return best if checkpoints.can_load(best) else state.step


def load_final(trainer: Trainer) -> FinalModel:
    """Load the final weights into the model, and return which ones they are; called by all processes.

    If the best checkpoint is gone or damaged, the last weights are kept, with a note. The last weights are in the
    newest checkpoint, from which a resumed run continues.
    """
    state, checkpoints, log = trainer.state, trainer.checkpoints, trainer.log
    last = FinalModel("last", state.step, state.metrics)
    if trainer.final == "average" and checkpoints is not None:
        return _load_average(trainer) or last
    if trainer.final == "average":
        log.note("without an output_dir no weights are kept for an average: the run ends with the last ones")
        return last
    if trainer.final == "last" or state.best is None:
        return last
    best = FinalModel("best", state.best["step"], state.best.get("metrics"))
    if best.step == state.step:
        return best
    if checkpoints is None:
        log.note("without an output_dir no checkpoints are kept: the run ends with the last weights, not the best")
        return last
    checkpoint = checkpoints.best(best.step)
    if checkpoint is None:
        return last
    trainer.stateful.restore_weights(checkpoint)
    best.calibration = calibration_in(checkpoint.state.get("state") or {})
    log.print(f"the run ends with the weights of step {best.step:,}, its best evaluation")
    return best


def _load_average(trainer: Trainer) -> FinalModel | None:
    steps = load_average(trainer)
    if not steps:
        return None
    trainer.log.print(f"the run ends with the mean of the weights after steps {_listed(steps)}")
    return FinalModel("average", trainer.state.step, None, steps)


def _listed(steps: Sequence[int]) -> str:
    return ", ".join(f"{step:,}" for step in steps)


def with_metric(best: dict[str, Any] | None, watch: Watch) -> tuple[dict[str, Any] | None, str | None]:
    """Return a resumed run's best evaluation by the current `watch`, and a note if the watched metric has changed."""
    if best is None or best["metric"] == watch.metric:
        return best, None
    value = best.get("metrics", {}).get(watch.metric)
    note = f"best evaluation: now chosen by {watch.metric}, before by {best['metric']}"
    if value is None:
        return None, f"{note}; earlier evaluations are ignored"
    return {
        **best,
        "metric": watch.metric,
        "value": value,
    }, f"{note}; of the earlier evaluations, only that of step {best['step']:,} is compared"


def which_weights(run: Path, result: Result) -> str:
    """Describe the weights in RUN/model and, if the best and the last ones differ, how to export the others."""
    best, last, step = result.best, result.last["step"], result.model["step"]
    kind = "moving average of the weights" if result.model.get("ema") else "weights"
    if "steps" in result.model:
        text = f"mean of the {kind} after steps {_listed(result.model['steps'])}; to export the last, step {last:,}"
        value = result.last["metrics"].get(best["metric"]) if best is not None else None
        text += f" ({best['metric']} {value:.4f})" if best is not None and value is not None else ""
        return f"{text}:\n      {format_command('export', run, '--weights', 'last', '--output', 'FOLDER')}"
    if best is None:
        return f"{kind} of step {step:,}"
    metric = best["metric"]
    values = {last: result.last["metrics"].get(metric), best["step"]: best["value"]}
    texts = {number: "" if value is None else f" ({metric} {value:.4f})" for number, value in values.items()}
    if best["step"] == last:
        return f"{kind} of step {step:,}, the last and the best{texts[last]}"
    names = {best["step"]: "the best evaluation", last: "the last"}
    other = best["step"] if step == last else last
    name = "last" if other == last else "best"
    command = format_command("export", run, "--weights", name, "--output", "FOLDER")
    return (
        f"{kind} of {names[step]}, step {step:,}{texts[step]}; to export {names[other]}, step {other:,}{texts[other]}:"
        f"\n      {command}"
    )
