"""What a recipe's run hands to `publish`: predictions for the report, its checkpoints for the Hub."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hf_fasttrain.duration import Duration
from hf_fasttrain.predictions import Predictions
from hf_fasttrain.publish.at_end import report_at_end
from hf_fasttrain.publish.pushing import HubWish, Pusher
from hf_fasttrain.recipe import HubSection
from hf_fasttrain.runlog import RunLog


@dataclass(frozen=True)
class RunPublisher:
    """Writes the report and pushes to the Hub, each if asked for. What fails is said, and harms nothing."""

    run: Path
    log: RunLog
    show: Callable[[int, Predictions | None], None] | None  # writes pictures for the report, of a run of so many steps
    pusher: Pusher | None

    def saved(self, checkpoint: Path, step: int, *, best: bool) -> None:
        """Push a checkpoint, if its turn has come."""
        if self.pusher is None:
            return
        try:
            self.pusher.saved(checkpoint, step, best=best)
        except Exception as error:  # noqa: BLE001 - whatever it is, training goes on
            self.pusher.not_staged(error)

    def finished(self, step: int, predictions: Predictions | None) -> None:
        """Write the report, then push the run."""
        if self.show is not None:
            report_at_end(self.run, self.log.say, self.log.not_written, partial(self.show, step, predictions))
        if self.pusher is None:
            return
        lost = [name for name in ("model", "result.json") if self._is_lost(name)]
        if lost:
            command = self.pusher.wish.command(self.run)
            self.log.say(f"not pushed: {' and '.join(lost)} could not be written; when they are: {command}")
            return
        self.pusher.finished(step)

    def _is_lost(self, name: str) -> bool:
        return any(lost.startswith(f"{self.run / name}:") for lost in self.log.lost)

    def close(self) -> None:
        """End uploads that are under way."""
        if self.pusher is not None:
            self.pusher.close()


def hub_wish(hub: HubSection, steps_per_epoch: int, *, on_cpu: bool) -> HubWish:
    """Return a recipe's wish with its duration in steps and its waiting in seconds.

    Where training needs the processor's cores itself, uploads have a tenth of the time.
    """
    every = hub.every.to_steps(steps_per_epoch) if isinstance(hub.every, Duration) else hub.every
    return HubWish(hub.repo, every, hub.private, hub.license, 60 * hub.wait.count, rest=9.0 if on_cpu else 0.0)
