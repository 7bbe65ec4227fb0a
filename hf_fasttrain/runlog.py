"""What a run says and writes down: progress, metrics.jsonl, trackers, notes. Only the main process speaks."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

METRICS_FILE = "metrics.jsonl"


class RunLog:
    """Writes to the terminal and, with a folder, to metrics.jsonl; silent where `main` is False.

    `track` is given (values, step) for trackers such as TensorBoard.
    """

    def __init__(
        self,
        folder: Path | None = None,
        *,
        main: bool = True,
        show: bool = True,
        track: Callable[[dict[str, float], int], None] | None = None,
    ) -> None:
        self.folder, self.main, self.track = folder, main, track
        self.console = Console(quiet=not (main and show), highlight=False, soft_wrap=True)
        self.notes: list[str] = []
        self._progress: Progress | None = None
        self._task: TaskID | None = None
        self._said = 0.0

    def note(self, text: str) -> None:
        """Say something once, and keep it for result.json."""
        if text not in self.notes:
            self.notes.append(text)
            self.say(f"note: {text}")

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, markup=False)

    @contextmanager
    def progress(self, num_steps: int, done: int) -> Iterator[None]:
        """Show a bar over the steps while training, on a terminal; lines otherwise."""
        if not self.console.is_terminal or self.console.quiet:
            yield
            return
        columns = (TextColumn("{task.description}"), BarColumn(bar_width=None), TextColumn("{task.fields[facts]}"))
        with Progress(*columns, console=self.console, refresh_per_second=4, expand=True) as self._progress:
            self._task = self._progress.add_task("starting", total=num_steps, completed=done, facts="")
            yield
        self._progress = self._task = None

    def train_line(self, step: int, num_steps: int, values: Mapping[str, float]) -> None:
        """Record the training's state: loss, lr, images/s, share of time spent waiting for data."""
        self._write({"kind": "train", "step": step, **values})
        if self.console.quiet:
            return
        pace = f"{values['images_per_second']:,.0f} images/s  waiting {values['data_wait_fraction']:.0%}"
        facts = f"loss {values['loss']:.4f}  lr {values['lr']:.2e}  {pace}  ETA {_clock(values['eta_seconds'])}"
        if self._progress is not None and self._task is not None:
            done = f"epoch {values['epoch']:.1f}  {step}/{num_steps}"
            short = f"loss {values['loss']:.3f}  {pace}  ETA {_clock(values['eta_seconds'])}"
            self._progress.update(self._task, completed=step, facts=short, description=done)
        elif time.monotonic() - self._said >= 10 or step == num_steps:
            self._said = time.monotonic()
            self.say(f"step {step}/{num_steps}  epoch {values['epoch']:.2f}  {facts}")

    def eval_line(self, step: int, epoch: float, split: str, values: Mapping[str, float], seconds: float) -> None:
        """Record an evaluation, in one line."""
        self._write({"kind": "evaluation", "step": step, "epoch": epoch, "split": split, **values})
        shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
        self.say(f"evaluation after epoch {epoch:.2f} ({split}): {shown}  ({seconds:.1f} s)")

    def _write(self, values: dict[str, Any]) -> None:
        if not self.main:
            return
        if self.folder is not None:
            with (self.folder / METRICS_FILE).open("a", encoding="utf-8") as file:
                file.write(json.dumps(values) + "\n")
        if self.track is not None:
            prefix = {"train": "train", "evaluation": "eval"}[values["kind"]]
            numbers = {f"{prefix}/{k}": v for k, v in values.items() if isinstance(v, int | float) and k != "step"}
            self.track(numbers, values["step"])

    def forget_after(self, step: int) -> None:
        """Drop what metrics.jsonl says of steps after `step`: a resumed run writes them anew."""
        if not self.main or self.folder is None or not (path := self.folder / METRICS_FILE).exists():
            return
        lines = path.read_text(encoding="utf-8").splitlines()
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= step]
        write_whole(path, "".join(f"{line}\n" for line in kept))


def write_whole(path: Path, text: str) -> None:
    """Write a text file beside its place and rename it there, so that it is never seen half-written."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON file as a whole."""
    write_whole(path, json.dumps(values, indent=2, default=str) + "\n")


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"
