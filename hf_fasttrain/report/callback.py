"""The built-in callback: writes the report of a finished run, then pushes it. Its failures do not fail the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from hf_fasttrain.run_folder.file_names import MODEL_FOLDER, REPORT_FILE, RESULT_FILE
from hf_fasttrain.run_folder.predictions import Predictions
from hf_fasttrain.train.callbacks import Callback
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.utils.files import reason
from hf_fasttrain.utils.format import format_command

if TYPE_CHECKING:
    from hf_fasttrain.hub.background import Pusher
    from hf_fasttrain.run_folder.result import Result
    from hf_fasttrain.train.trainer import Trainer


class Publish(Callback):
    """Writes the report of a run and pushes it to the Hub, on the main process. Failures are logged, not raised.

    `show(step, predictions)` writes pictures for the report. No report is written if `report` is False.
    """

    def __init__(
        self,
        run: Path,
        log: RunLog,
        *,
        report: bool = True,
        show: Callable[[int, Predictions | None], None] | None = None,
        pusher: Pusher | None = None,
    ) -> None:
        self.run, self.log, self.report, self.show, self.pusher = run, log, report, show, pusher

    def saved(self, checkpoint: Path, step: int, best: bool) -> None:
        """Push a checkpoint if it is due; called by the thread that writes checkpoints, before it may be pruned."""
        if self.pusher is None:
            return
        try:
            self.pusher.saved(checkpoint, step, best=best)
        except Exception as error:  # noqa: BLE001 - no error may stop training
            self.pusher.not_staged(error)

    def finished(self, trainer: Trainer, result: Result) -> None:
        """Write the report, then push the run; Ctrl-C skips the rest."""
        if not trainer.processes.is_main:
            return
        try:
            self.publish(trainer.state.step, trainer.evaluation.predictions)
        except KeyboardInterrupt:
            command = format_command("report", self.run)
            self.log.print(f"training is finished; Ctrl-C skipped the rest: `{command}`, or push")

    def publish(self, step: int, predictions: Predictions | None) -> None:
        """Write the report of a run that ended after `step` steps, then push it."""
        if self.report:
            self._write_report(step, predictions)
        if self.pusher is None:
            return
        lost = [name for name in (MODEL_FOLDER, RESULT_FILE) if self._is_lost(name)]
        if lost:
            command = self.pusher.options.command(self.run)
            self.log.print(f"not pushed: {' and '.join(lost)} could not be written; when they are: {command}")
            return
        self.pusher.finished(step)

    def _write_report(self, step: int, predictions: Predictions | None) -> None:
        try:
            if self.show is not None:
                self.show(step, predictions)
            from hf_fasttrain.report.report import write_page

            write_page([self.run])
        except OSError as error:
            self.log.not_written(str(self.run / REPORT_FILE), error)
        except Exception as error:  # noqa: BLE001 - errors of drawing libraries
            self.log.print(f"note: no report: {reason(error)}; `{format_command('report', self.run)}` writes it later")

    def _is_lost(self, name: str) -> bool:
        return any(lost.startswith(f"{self.run / name}:") for lost in self.log.lost)

    def close(self) -> None:
        """Stop the current upload."""
        if self.pusher is not None:
            self.pusher.close()
