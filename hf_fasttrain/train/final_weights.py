"""The final weights of a run: the last ones, or those of the best evaluation, loaded from their checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_fasttrain.run_folder.result import Result, Watch
from hf_fasttrain.train.checkpoint_state import State, TrainingObjects
from hf_fasttrain.train.checkpointing import Checkpoints
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.format import format_command

CHOICES = ("auto", "best", "last")


@dataclass
class FinalModel:
    """The weights in RUN/model."""

    weights: str  # best or last
    step: int  # after which the weights were saved
    metrics: dict[str, float] | None  # of the evaluation split; None: unknown


def resolve_final(choice: str, early_stopping: Watch | None) -> str:
    """Resolve auto, best or last; auto is best with early stopping. Raises RunError for another choice."""
    if choice not in CHOICES:
        raise RunError(f"final is '{choice}'; allowed are {', '.join(CHOICES)}")
    if choice == "auto":
        return "last" if early_stopping is None else "best"
    return choice


def final_step(final: str, state: State, checkpoints: Checkpoints | None) -> int:
    """Return the step of the weights that belong into a finished run's model folder, if they are still on disk."""
    best = state.best["step"] if state.best else state.step
    if final != "best" or best == state.step or checkpoints is None:
        return state.step
    return best if checkpoints.can_load(best) else state.step


def load_final(
    final: str, state: State, checkpoints: Checkpoints | None, stateful: TrainingObjects, log: RunLog
) -> FinalModel:
    """Load the final weights into the model, and return which ones they are; called by all processes.

    If the best checkpoint is gone or damaged, the last weights are kept, with a note. The last weights are in the
    newest checkpoint, from which a resumed run continues.
    """
    last = FinalModel("last", state.step, state.metrics)
    if final == "last" or state.best is None:
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
    stateful.restore_weights(checkpoint)
    log.print(f"the run ends with the weights of step {best.step:,}, its best evaluation")
    return best


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
