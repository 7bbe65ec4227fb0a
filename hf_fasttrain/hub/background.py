"""Pushes a run to the Hub while it trains, in a separate process that can neither slow down nor stop training."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_fasttrain.hub.staging import result_while_training, stage
from hf_fasttrain.run_folder.file_names import PUSHED_FILE, STAGING_FOLDER
from hf_fasttrain.run_folder.schemas import PushedFile, read_if_sound
from hf_fasttrain.utils.files import reason, try_to_write, write_json
from hf_fasttrain.utils.format import format_command

PATIENCE_SECONDS = 300.0  # how long one push retries transient errors
REPORT_SECONDS = 10.0  # reserved at the end of the wait, so that the error is known
PAUSES = (60.0, 600.0)  # seconds before a failed push is retried: first, longest


@dataclass(frozen=True)
class PushOptions:
    """Where to push and when: after each best evaluation, every N steps, or only at the end."""

    repo: str
    every: int | str = "end"  # steps, "best" or "end"
    private: bool | None = None
    license: str | None = None
    wait_seconds: float = 600.0  # for an upload that is running at the end
    stalled_seconds: float = 60.0  # without a byte until a connection is closed
    rest: float = 0.0  # pause after a push during training, as a multiple of its duration

    def command(self, run: Path) -> str:
        """Return the command that pushes the run manually."""
        arguments = [*(["--private"] if self.private else []), *(["--license", self.license] if self.license else [])]
        arguments += ["--weights", "best"] if self.every == "best" else []
        return format_command("push", run, self.repo, *arguments)


class Pusher:
    """Pushes checkpoints while training, one at a time, the newest first, and the run at its end.

    `describe` writes a model folder without the weights, `environment` describes machine and versions, `log` prints
    failures and the outcome. Errors of the Hub and the disk are never raised.
    """

    def __init__(
        self,
        run: Path,
        options: PushOptions,
        describe: Callable[[Path], None],
        environment: Mapping[str, Any],
        log: Callable[[str], None],
        num_steps: int | None = None,
    ) -> None:
        self.num_steps = num_steps
        self.run, self.options, self.describe, self.environment, self.log = run, options, describe, environment, log
        pushed = read_if_sound(run / PUSHED_FILE, PushedFile)
        self._pushed_step = int(pushed.get("step", 0)) if pushed.get("repo") == options.repo else 0
        self._lock = threading.Condition()
        self._waiting: tuple[Path, int] | None = None  # a staged run and its step
        self._process: subprocess.Popen[str] | None = None
        self._thread: threading.Thread | None = None
        self._ending = self._closed = False
        self._pause_until = 0.0
        self._reported: set[str] = set()
        shutil.rmtree(run / STAGING_FOLDER, ignore_errors=True)

    def saved(self, checkpoint: Path, step: int, *, best: bool) -> None:
        """Stage a checkpoint that is complete on disk, if it is due; called before it may be pruned."""
        if self._closed or step == self.num_steps or not self._is_due(step, best=best):
            return  # after the last step the run itself is pushed
        folder = self.run / STAGING_FOLDER / f"step_{step:08d}"
        shutil.rmtree(folder, ignore_errors=True)
        result = result_while_training(self.run, checkpoint, self.environment)
        if not try_to_write(lambda: stage(self.run, checkpoint, folder, self.describe, result), self.not_staged):
            return
        self._pushed_step = step
        with self._lock:
            if self._waiting is not None:  # replaced by a newer one
                shutil.rmtree(self._waiting[0], ignore_errors=True)
            self._waiting = (folder, step)
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="hub", daemon=True)
                self._thread.start()
            self._lock.notify_all()

    def _is_due(self, step: int, *, best: bool) -> bool:
        if self.options.every == "best":
            return best and step > self._pushed_step
        return isinstance(self.options.every, int) and step - self._pushed_step >= self.options.every

    def not_staged(self, error: BaseException) -> None:
        """Report once why staging failed."""
        self._say_once(f"hub: could not prepare an upload to {self.options.repo}: {reason(error)}; training continues")

    def _say_once(self, text: str) -> None:
        if text not in self._reported:
            self._reported.add(text)
            self.log(text)

    def _work(self) -> None:
        """Push until nothing is waiting; runs in a thread that mostly waits for the upload process."""
        pause = PAUSES[0]
        while True:
            with self._lock:
                if self._waiting is not None:
                    self._lock.wait_for(lambda: self._ending, timeout=max(0.0, self._pause_until - time.monotonic()))
                if self._ending or self._waiting is None:
                    self._thread = None
                    return
                folder, step = self._waiting
                self._waiting = None
            start_time = time.monotonic()
            answer = self._push(folder, f"Step {step}")
            self._pause_until = time.monotonic() + self.options.rest * (time.monotonic() - start_time)
            if "address" in answer:
                self._record_push(answer["address"], step)
                pause = PAUSES[0]
            else:
                pause = self._requeue(folder, step, answer, pause)
                continue
            shutil.rmtree(folder, ignore_errors=True)

    def _requeue(self, folder: Path, step: int, answer: Mapping[str, Any], pause: float) -> float:
        """Queue a failed push again, if a retry may help and nothing newer is waiting; return the next pause."""
        with self._lock:
            if self._ending:
                return pause
            self._say_once(
                f"hub: {answer['error']}; training continues" + ", retried later" * bool(answer.get("is_transient"))
            )
            if not answer.get("is_transient") or self._waiting is not None:
                shutil.rmtree(folder, ignore_errors=True)
                return PAUSES[0]
            delay = max(pause, float(answer.get("retry_after", 0.0)))
            self._lock.wait_for(lambda: self._ending or self._waiting is not None, timeout=delay)
            if self._waiting is None:
                self._waiting = (folder, step)
        return min(PAUSES[1], 2 * pause)

    def _push(
        self, run: Path, message: str, *, patience: float | None = None, weights: str | None = None
    ) -> dict[str, Any]:
        """Push a run folder in a separate process and return its answer: address, or error and is_transient."""
        command = self.options.command(self.run)
        request = {
            "run": str(run), "original": str(self.run), "repo": self.options.repo, "private": self.options.private,
            "license": self.options.license, "weights": weights, "message": message, "command": command,
            "patience": PATIENCE_SECONDS if patience is None else patience, "stalled": self.options.stalled_seconds,
        }  # fmt: skip
        stderr = ""
        try:
            with self._lock:
                if self._closed:
                    return {"error": "ended", "is_transient": True}
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "hf_fasttrain.hub.worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                    start_new_session=True,  # Ctrl-C stops training only
                )
            out, stderr = self._process.communicate(json.dumps(request))
            return dict(json.loads(out))
        except (OSError, ValueError):
            last = (stderr.strip().splitlines() or ["its process was ended"])[-1]
            return {
                "error": f"push to {self.options.repo}: the upload failed ({last}); then {command}",
                "is_transient": True,
            }

    def _record_push(self, address: str, step: int, *, finished: bool = False) -> None:
        date = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        values = {"repo": self.options.repo, "address": address, "step": step, "date": date, "finished": finished}
        try_to_write(lambda: write_json(self.run / PUSHED_FILE, values), lambda error: None)

    def finished(self, step: int) -> None:
        """Push the finished run, whose files are complete on disk, and report the outcome.

        With `every` "best", the weights of the best evaluation are pushed. Waits at most `wait_seconds`, or until
        Ctrl-C.
        """
        deadline, command = time.monotonic() + self.options.wait_seconds, self.options.command(self.run)
        self.log(f"pushing to {self.options.repo}: {self.options.wait_seconds / 60:g} minutes at most, Ctrl-C skips it")
        with self._lock:
            self._ending = True  # push the run itself, not the waiting checkpoint
            self._lock.notify_all()
            current = self._thread
        outcome: dict[str, Any] = {}
        thread = threading.Thread(
            target=lambda: outcome.update(self._push_run(current, deadline)), name="hub", daemon=True
        )
        thread.start()
        try:
            thread.join(self.options.wait_seconds)
        except KeyboardInterrupt:
            outcome = {"error": f"push to {self.options.repo}: interrupted by a signal; then {command}"}
        outcome = dict(outcome)  # a copy, since closing makes the push fail
        self.close()
        if "address" in outcome:
            self._record_push(outcome["address"], step, finished=True)
            self.log(f"pushed to {outcome['address']}")
            return
        timeout = f"push to {self.options.repo}: not done after {self.options.wait_seconds / 60:g} minutes (hub.wait)"
        why = str(outcome.get("error") or timeout)
        self.log(f"trained to the end, but not pushed: {why}" + f"; then {command}" * (command not in why))

    def _push_run(self, current: threading.Thread | None, deadline: float) -> dict[str, Any]:
        if current is not None:  # so that its large files are not sent twice
            current.join()
        patience = max(0.0, min(PATIENCE_SECONDS, deadline - time.monotonic() - REPORT_SECONDS))
        weights = "best" if self.options.every == "best" else None
        try:
            return self._push(self.run, "Push a run of hf_fasttrain", patience=patience, weights=weights)
        except Exception as error:  # noqa: BLE001 - reported, instead of waiting until the deadline
            return {"error": f"push to {self.options.repo}: {reason(error)}"}

    def close(self) -> None:
        """Stop the current push; a later one sends only what is missing."""
        with self._lock:
            self._ending = self._closed = True
            self._lock.notify_all()
            process = self._process
        if process is not None and process.poll() is None:
            with suppress(OSError):
                process.terminate()
            with suppress(subprocess.TimeoutExpired):
                process.wait(5)
        shutil.rmtree(self.run / STAGING_FOLDER, ignore_errors=True)
