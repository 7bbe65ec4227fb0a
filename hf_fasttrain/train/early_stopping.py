"""Early stopping: when it ends a run, its messages, and how a stopped run is continued."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from hf_fasttrain.run_folder.result import Watch
from hf_fasttrain.train.checkpoint_state import State
from hf_fasttrain.utils.errors import how_to_resume


def how_to_continue() -> str:
    """Return how to continue a run that early stopping has ended."""
    return (
        f"to continue: {how_to_resume()} and a longer early_stopping.patience, early_stopping=null or a longer "
        "train.duration"
    )


@dataclass(frozen=True)
class EarlyStop:
    """How early stopping ended a run; also in result.json."""

    metric: str
    mode: str
    value: float  # the best value
    step: int  # of the best value
    patience: int  # in steps
    waited: int  # steps without a better value
    stopped_at: int
    num_steps: int  # of the training without early stopping
    min_delta: float = 0.0  # by how much a value must exceed the best one

    def as_json(self) -> dict[str, Any]:
        """Return a dict of plain values."""
        return asdict(self)

    def __str__(self) -> str:
        better = "above" if self.mode == "max" else "below"
        if self.min_delta:
            better = f"more than {self.min_delta:g} {better}"
        return (
            f"stopped early after step {self.stopped_at:,} of {self.num_steps:,}: {self.metric} has not been {better} "
            f"{self.value:.4f}, its best value (step {self.step:,}), for {self.waited:,} steps; "
            f"early_stopping.patience is {self.patience:,}"
        )


def record_of(watch: Watch, state: State) -> dict[str, Any]:
    """Return the watched metric's last value and its step."""
    return {"metric": watch.metric, "mode": watch.mode, "value": state.metrics[watch.metric], "step": state.step}


def waited_steps(watch: Watch | None, state: State) -> int | None:
    """Return the steps without a better value if they have reached the patience, else None.

    Never stops after an evaluation in which the watched metric could not be computed.
    """
    if watch is None or watch.patience is None or state.watched is None or watch.metric not in state.metrics:
        return None
    waited = state.evaluated_at - max(int(state.watched["step"]), state.patience_from)
    return waited if waited >= watch.patience else None


def early_stop(watch: Watch | None, state: State, num_steps: int) -> EarlyStop | None:
    """Return how early stopping ended a run of `num_steps` steps early; None if it did not."""
    waited = waited_steps(watch, state)
    if watch is None or watch.patience is None or state.watched is None or waited is None or state.step >= num_steps:
        return None
    value, step = float(state.watched["value"]), int(state.watched["step"])
    return EarlyStop(
        watch.metric, watch.mode, value, step, watch.patience, waited, state.step, num_steps, watch.min_delta
    )


def adapt_state(watch: Watch | None, state: State, num_steps: int) -> str | None:
    """Adapt a restored state to changed settings; return a note on it, or None.

    If another metric is watched now, its best value is tracked from here on. If the patience was exhausted and the
    duration is longer now, patience counts from here, so that the run continues.
    """
    if watch is None:
        state.watched = None  # so that later evaluations are not compared with it
        return None
    previous = state.watched
    if previous is not None and (previous["metric"], previous.get("mode", watch.mode)) != (watch.metric, watch.mode):
        state.watched = None
        old_metric = f"{previous['metric']} ({previous['mode']})" if "mode" in previous else previous["metric"]
        return (
            f"early_stopping now watches {watch.metric} ({watch.mode}), before {old_metric}: patience counts from the "
            "next evaluation"
        )
    if waited_steps(watch, state) is None or num_steps <= state.num_steps:
        return None
    stop = early_stop(watch, state, state.num_steps)
    state.patience_from = state.step
    return (
        f"{'this run had ' + str(stop) if stop else 'early_stopping.patience was exhausted'}; train.duration is longer "
        f"now, so it continues, and patience counts from step {state.step:,}"
    )
