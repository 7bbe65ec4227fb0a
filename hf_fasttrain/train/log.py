"""The log of a run: terminal, metrics.jsonl, trackers, notes. Only the main process writes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn
from rich.text import Text

from hf_fasttrain.run_folder.file_names import METRICS_FILE
from hf_fasttrain.run_folder.metrics_file import drop_lines_after, last_steps
from hf_fasttrain.utils.clean import without_secrets
from hf_fasttrain.utils.files import reason, try_to_write
from hf_fasttrain.utils.format import format_bytes, format_duration, format_images_rate, format_percent
from hf_fasttrain.utils.json_lines import append_line
from hf_fasttrain.utils.printing import echo
from hf_fasttrain.utils.terminal import Terminal

PREFIXES = {"train": "train", "evaluation": "eval"}  # kind of a line -> prefix of its metrics in trackers
SHOWN_EVERY = 10.0  # seconds between two lines where there is no display
Track = Callable[[dict[str, float], int], None]


class _Display(Progress):
    """Two bars, for the epoch and for the run, and a status line below them."""

    facts = "starting"

    def __init__(self, console: Terminal, num_steps: int, done: int, steps_per_epoch: int) -> None:
        super().__init__(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            TextColumn("{task.fields[left]}", justify="right"),
            console=console,
            refresh_per_second=4,
            expand=True,
        )
        self.num_steps, self.steps_per_epoch, self._updated_at = num_steps, steps_per_epoch, 0.0
        self._epochs = -(-num_steps // steps_per_epoch)
        self._seconds_per_step: float | None = None
        self._evaluation_seconds = 0.0
        self._epoch, self._run = self.add_task("epoch", left=""), self.add_task("run", total=num_steps, left="")
        self.show_step(done, always=True)

    def get_renderables(self) -> Iterator[Any]:
        """Yield the bars, then the status line."""
        yield self.make_tasks_table(self.tasks)
        yield Text(self.facts, overflow="ellipsis", no_wrap=True)

    def show_step(self, step: int, *, always: bool = False) -> None:
        """Show that `step` steps are done; at most ten times a second."""
        now = time.monotonic()
        if not always and now - self._updated_at < 0.1:
            return
        self._updated_at = now
        epoch = min(step // self.steps_per_epoch, self._epochs - 1)
        first_step = epoch * self.steps_per_epoch
        steps = min(self.steps_per_epoch, self.num_steps - first_step)  # the last epoch may be shorter
        description = f"epoch {epoch + 1}/{self._epochs}"
        self.update(
            self._epoch,
            description=description,
            completed=step - first_step,
            total=steps,
            left=self._time_left_text(first_step + steps - step),
        )
        self.update(
            self._run, completed=step, left=self._time_left_text(self.num_steps - step, self._evaluation_seconds)
        )

    def show_speed(self, seconds_per_step: float, evaluation_seconds: float, facts: str) -> None:
        """Show the status, and estimate the time left at this speed, plus `evaluation_seconds` of evaluations."""
        self._seconds_per_step, self._evaluation_seconds, self.facts = seconds_per_step, evaluation_seconds, facts

    def _time_left_text(self, steps: int, evaluation_seconds: float = 0.0) -> str:
        return "" if self._seconds_per_step is None else _time_left(steps * self._seconds_per_step + evaluation_seconds)


class _Terminal(Terminal):
    """A terminal that survives a broken pipe: rich would end the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


class RunLog:
    """Writes to the terminal and, with a folder, to metrics.jsonl; silent where `main` is False.

    `track` is called with (values, step) for trackers such as TensorBoard. A write error is reported once, recorded
    in `lost`, and does not stop training.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        main: bool = True,
        show: bool = True,
        track: Track | None = None,
    ) -> None:
        self.folder, self.main, self.track, self._show = folder, main, track, show
        self.console = _Terminal(quiet=not (main and show), soft_wrap=True)
        self.notes: list[str] = []
        self.lost: list[str] = []  # results that could not be written, each with the reason
        self.expected: tuple[str, ...] = ()  # files that the run folder must have at the end
        self._display: _Display | None = None
        self._printed_at = 0.0
        self._has_skipped_lines = self._has_reported_skipping = False

    def note(self, text: str) -> None:
        """Print a note once, and store it for result.json."""
        text = without_secrets(text)
        if text not in self.notes:
            self.notes.append(text)
            self.print(f"note: {text}")

    def alert(self, text: str) -> None:
        """Print a note that may concern only this process; on standard error if it is not the main one."""
        if self.main:
            self.note(text)
        elif self._show:
            with suppress(OSError):
                echo(f"note: {text}", err=True)

    def print(self, text: str) -> None:
        """Print a line; ignores a closed terminal."""
        with suppress(OSError):
            self.console.print(text)

    def not_written(self, name: str, error: BaseException) -> None:
        """Record that a result could not be written, and report it once."""
        if not any(lost.startswith(f"{name}:") for lost in self.lost):
            self.lost.append(f"{name}: {reason(error)}")
            self.print(f"not written: {self.lost[-1]}")

    def report_signal(self, name: str) -> None:
        """Report a signal; called from another thread while a step is running."""
        hint = "; Ctrl-C again exits at once" if name == "Ctrl-C" else ""
        with suppress(OSError):
            self.console.show_cursor(True)  # now: a second Ctrl-C ends the process at once
        self.print(f"{name}: finishing the step, then saving{hint}")

    def report_slow_data(self, seconds: float) -> None:
        """Report that images have been awaited for so long; called from another thread."""
        self.print(f"waiting for images for {seconds:.0f} s: the disk or file server that holds them may not answer")

    @contextmanager
    def progress(self, num_steps: int, done: int, steps_per_epoch: int) -> Iterator[None]:
        """Show progress bars for epoch and run in a terminal, otherwise lines."""
        if not self.console.is_terminal or self.console.quiet:
            yield
            return
        self._display = _Display(self.console, num_steps, done, steps_per_epoch)
        self._display.start()
        try:
            yield
        finally:
            with suppress(OSError):  # the terminal may be gone
                self._display.stop()
            self._display = None

    def at_step(self, step: int) -> None:
        """Update the bars after a step; nothing is read from the device."""
        if self._display is not None:
            with suppress(OSError):
                self._display.show_step(step)

    @contextmanager
    def activity(self, text: str) -> Iterator[None]:
        """Show another activity than training below the bars."""
        if self._display is None:
            yield
            return
        previous, self._display.facts = self._display.facts, text
        try:
            yield
        finally:
            self._display.facts = previous

    def train_line(self, step: int, num_steps: int, values: Mapping[str, float], pace: float | None = None) -> None:
        """Record the training's state: loss, lr, images/s, share of time spent waiting for data, memory.

        `pace`: seconds per step for the estimate of the remaining time; None: those of this line. Without a terminal,
        a line is printed every SHOWN_EVERY seconds; the first one after a skipped line says so.
        """
        self._write({"kind": "train", "step": step, **values})
        if self.console.quiet:
            return
        rate, waiting = format_images_rate(values["images_per_second"]), format_percent(values["data_wait_fraction"], 0)
        memory = format_bytes(values["peak_memory_bytes"])
        facts = f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  {rate}  waiting {waiting}  {memory}"
        if self._display is not None:
            pace = values["seconds_per_step"] if pace is None else pace
            evaluation_seconds = values["eta_seconds"] - (num_steps - step) * pace
            self._display.show_speed(pace, max(0.0, evaluation_seconds), facts)
            with suppress(OSError):
                self._display.show_step(step, always=True)
        elif time.monotonic() - self._printed_at >= SHOWN_EVERY or step == num_steps:
            self._printed_at = time.monotonic()
            self.print(
                f"step {step}/{num_steps}  epoch {values['epoch']:.2f}  {facts}  {_time_left(values['eta_seconds'])}"
                f"{self._skipping_note()}"
            )
        else:
            self._has_skipped_lines = True

    def _skipping_note(self) -> str:
        """Return, once, a note that not all log lines are printed."""
        if not self._has_skipped_lines or self._has_reported_skipping:
            return ""
        self._has_reported_skipping = True
        return f"  (a line every {SHOWN_EVERY:.0f} s{f'; {METRICS_FILE} has all' if self.folder else ''})"

    def eval_line(
        self, step: int, epoch: float, split: str, values: Mapping[str, float], seconds: float, train_seconds: float
    ) -> None:
        """Record an evaluation that took `seconds`, after `train_seconds` of training, in one line."""
        line = {"kind": "evaluation", "step": step, "epoch": epoch, "split": split, **values}
        self._write({**line, "train_seconds": train_seconds})
        text = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.print(f"evaluation after epoch {epoch:.2f} ({split}): {text}  ({format_duration(seconds)})")

    def tracker_ids(self) -> dict[str, str]:
        """Return the ids with which trackers resume a run."""
        ids: Callable[[], dict[str, str]] = getattr(self.track, "ids", dict)
        return ids()

    def resume_line(self, step: int, checkpoint: str, num_processes: int) -> None:
        """Record that a run was resumed from a checkpoint."""
        date = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        self._write(
            {"kind": "resume", "step": step, "checkpoint": checkpoint, "processes": num_processes, "date": date}
        )

    def _write(self, values: dict[str, Any]) -> None:
        if not self.main:
            return
        if self.folder is not None:
            try:
                append_line(self.folder / METRICS_FILE, json.dumps(values))
            except OSError as error:
                self.not_written(str(self.folder / METRICS_FILE), error)
        prefix = PREFIXES.get(values["kind"])
        if self.track is not None and prefix:
            numbers = {f"{prefix}/{k}": v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
            try:
                self.track(numbers, values["step"])
            except Exception as error:  # noqa: BLE001 - others' code, and training does not depend on it
                self.note(f"log.trackers: values from step {values['step']} on are missing: {reason(error)}")

    def drop_lines_after(self, step: int) -> None:
        """Drop the lines of metrics.jsonl after `step`, which a resumed run writes again."""
        if not self.main or self.folder is None or not (path := self.folder / METRICS_FILE).exists():
            return
        try_to_write(lambda: drop_lines_after(path, step), lambda error: self.not_written(str(path), error))


def last_tracked_steps(folder: Path) -> dict[str, int]:
    """Return the last step of each kind of line in metrics.jsonl, by its prefix in trackers."""
    steps = last_steps(folder / METRICS_FILE, PREFIXES)
    return {PREFIXES[kind]: step for kind, step in steps.items()}


def _time_left(seconds: float) -> str:
    return f"{format_duration(seconds, 0)} left"
