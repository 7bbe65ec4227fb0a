"""Saving and loading checkpoints: copied to the host at once, written by a thread while training continues."""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hf_fasttrain.run_folder.checkpoint import (
    Checkpoint,
    Snapshot,
    checkpoint_path,
    checkpoint_step,
    complete_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    prune_checkpoints,
    restore_replaced,
    save_checkpoint,
)
from hf_fasttrain.run_folder.file_names import MODEL_FILES, MODEL_FOLDER, PREDICTIONS_FILE
from hf_fasttrain.run_folder.lock import acquire, release
from hf_fasttrain.run_folder.predictions import Predictions
from hf_fasttrain.train.distributed import Processes, on_main
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.utils.environment import free_memory_bytes, one_thread
from hf_fasttrain.utils.errors import RunError, RunFailure, Stopped, how_to_resume
from hf_fasttrain.utils.files import new_folder, reason, sync_files, try_to_write, write_json
from hf_fasttrain.utils.process_memory import relax_memory_limit

FOLDER = "checkpoints"


def lock_run(run: Path) -> bool:
    """Create a run folder and lock it until `unlock_run`; does nothing if this process has locked it already.

    Called by all processes. Returns False if the file system has no locks. Raises RunError if another run has locked
    it, or it can't be written.
    """

    def lock() -> bool:
        try:
            (run / FOLDER).mkdir(parents=True, exist_ok=True)
            return acquire(run / FOLDER)
        except OSError as error:
            raise not_writable(run, error) from None

    return on_main(lock)


def not_writable(run: Path, error: OSError) -> RunError:
    """Return the message for a run folder that can't be created or written to."""
    return RunError(f"output_dir {run}: can't be written: {reason(error)}; choose another output_dir")


def unlock_run(run: Path) -> None:
    """Unlock a run folder."""
    release(run / FOLDER)


class Checkpoints:
    """The checkpoints of a run folder: the newest `keep` and the best. The main process writes, all processes read.

    Training waits while the state is copied to the host; a thread writes the copy. If the copy would take more than
    half of the free memory, training waits until the checkpoint is written instead. Weights with NaN or inf are not
    saved.
    """

    def __init__(
        self,
        run: Path,
        processes: Processes,
        log: RunLog,
        keep: int = 2,
    ) -> None:
        # Called by the writing thread for each complete checkpoint, before it may be pruned; must not raise.
        self.saved: Callable[[Path, int, bool], None] | None = None  # (path, step, whether it is the best)
        self.default_settings: dict[str, Any] = {}  # for checkpoints from before a setting existed
        self.saved_at = -1  # step of the last checkpoint, written or being written
        self.announced = 0  # step of the newest checkpoint that was announced to callbacks
        self.resumable: set[int] = set()  # steps from whose checkpoints training can continue
        self._written = 0  # step of the newest checkpoint that this process has written
        self.run, self.folder = run, run / FOLDER
        self.processes, self.log, self.keep = processes, log, keep
        self.failed: str | None = None  # error of the last save
        self._full = False  # whether the reason was a full disk
        self._best: int | None = None  # step of the best checkpoint on disk
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    @property
    def keep(self) -> int:
        """The number of newest checkpoints to keep, in addition to the best. Setting it below 1 raises RunError."""
        return self._keep

    @keep.setter
    def keep(self, number: int) -> None:
        if not isinstance(number, int) or isinstance(number, bool) or number < 1:
            raise RunError(f"checkpoints.keep: must be a whole number of at least 1, got {number!r}")
        self._keep = number

    def save(self, snapshot: Snapshot, best_step: int | None, *, resumable: bool = True) -> None:
        """Copy the state of a step and start to write it, after the previous checkpoint is written."""
        self.saved_at = snapshot.step
        self.resumable |= {snapshot.step} if resumable else set()
        self.wait()
        if not self.processes.is_main:
            return
        relax_memory_limit()  # steps may have used all memory up to the limit
        copy = snapshot.num_bytes < free_memory_bytes() // 2
        with one_thread():
            snapshot.to_host(copy=copy)
        thread = threading.Thread(target=self._write, args=(snapshot, best_step), name="checkpoint")
        try:
            thread.start()
        except RuntimeError:  # the system refuses
            self._write(snapshot, best_step)
        else:
            self._thread = thread
        if not copy:
            self.wait()

    def wait(self) -> bool:
        """Wait until the last checkpoint is written; return whether that succeeded."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        return self.failed is None

    def newest_written(self) -> int:
        """Return the step of the newest checkpoint that this process has written, 0 if there is none."""
        return self._written

    def wait_for_thread(self) -> None:
        """Wait until nothing is being written, without raising its error."""
        if self._thread is not None:
            self._thread.join()

    def with_saved_step(self, error: RunFailure, start_step: int) -> RunFailure:
        """Return the error with the last saved step; its status is RESUMABLE if that is after `start_step`."""
        complete = [
            step for path in complete_checkpoints(self.folder) if (step := checkpoint_step(path)) in self.resumable
        ]
        if not complete:
            return type(error)(f"{error}; nothing was saved yet")
        newest = complete[-1]
        failure = type(error)(f"{error}; {how_to_resume()} continues from step {newest:,}")
        if newest > start_step:
            failure.status = Stopped.RESUMABLE
        return failure

    def _write(self, snapshot: Snapshot, best_step: int | None) -> None:
        try:
            if not snapshot.is_finite():  # the loss of the next steps will not be finite either, and will stop the run
                self.failed = "its weights are NaN or inf"
            elif not self._try(snapshot) and self._free_space(best_step, snapshot.step):
                self._try(snapshot)
            if self.failed is None:
                self._written = snapshot.step
                if self.saved is not None:
                    self.saved(checkpoint_path(self.folder, snapshot.step), snapshot.step, snapshot.step == best_step)
                self._prune(self.keep, best_step, snapshot.step)
            else:
                newest = complete_checkpoints(self.folder)
                remaining = f"the newest is {newest[-1]}" if newest else "there is none yet"
                self.log.print(f"checkpoint of step {snapshot.step} not written: {self.failed}; {remaining}")
        except BaseException as error:  # noqa: BLE001 - raised again in the main thread
            self._error = error

    def _try(self, snapshot: Snapshot) -> bool:
        self._full = False

        def failed(error: BaseException) -> None:
            self._full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            self.failed = reason(error)

        if try_to_write(lambda: save_checkpoint(self.folder, snapshot), failed):
            self.failed = None
        return self.failed is None

    def _free_space(self, best_step: int | None, step: int) -> bool:
        """If the disk is full, remove all checkpoints but the newest and the best; return whether any were removed."""
        if not self._full or len(complete_checkpoints(self.folder)) < 2:
            return False
        return self._prune(1, best_step, step)

    def _prune(self, keep: int, best_step: int | None, step: int) -> bool:
        """Remove old checkpoints; the best one is kept until a better one is written."""
        if best_step is not None and checkpoint_path(self.folder, best_step) in complete_checkpoints(self.folder):
            self._best = best_step
        return try_to_write(
            lambda: prune_checkpoints(self.folder, keep, self._best, step, self.resumable), lambda error: None
        )

    def write_results(
        self,
        write_model: Callable[[Path], None],
        predictions: Predictions | None,
        result: Callable[[], dict[str, Any]],
    ) -> None:
        """Write RUN/model, predictions and result.json, on the main process; failures are logged in `log.lost`.

        `result` is called last, when all failures are known.
        """
        run, log = self.run, self.log
        if not self.wait():
            log.lost.append(f"{self.folder}: the last checkpoint: {self.failed}")

        def write() -> None:
            with new_folder(run / MODEL_FOLDER, marks=MODEL_FILES) as folder:
                write_model(folder)
                sync_files(folder)

        try_to_write(write, lambda error: log.not_written(str(run / "model"), error))
        path = run / PREDICTIONS_FILE
        if predictions is not None:
            try_to_write(lambda: predictions.save(path), lambda error: log.not_written(str(path), error))
        log.lost += [f"{run / name}: is gone" for name in log.expected if not (run / name).exists()]
        self.write_result(result())

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json."""
        path = self.run / "result.json"
        try_to_write(lambda: write_json(path, result), lambda error: self.log.not_written(str(path), error))

    def can_load(self, step: int) -> bool:
        """Read a step's checkpoint and return whether it is complete and undamaged."""
        path = checkpoint_path(self.folder, step)
        try:
            return path in complete_checkpoints(self.folder) and bool(load_checkpoint(path))
        except RunError:
            return False

    def newest(
        self, reason_to_skip: Callable[[Checkpoint], str | None] = lambda _: None, before: int | None = None
    ) -> Checkpoint | None:
        """Return the newest complete checkpoint, of a step below `before`, the same on every process.

        Damaged ones, and those for which `reason_to_skip` returns a reason, are reported and skipped.
        """
        return self._on_every_process(
            lambda: newest_checkpoint(self.folder, self.log.print, reason_to_skip, before), "can't resume"
        )

    def best(self, step: int) -> Checkpoint | None:
        """Return the best evaluation's checkpoint, the same on every process; None and a note if it can't be read."""

        def load() -> Checkpoint | None:
            restore_replaced(self.folder)
            path = checkpoint_path(self.folder, step)
            try:
                if path not in complete_checkpoints(self.folder):
                    raise RunError(f"checkpoint {path} is gone")
                return load_checkpoint(path)
            except RunError as error:
                self.log.note(
                    f"the best evaluation's weights can't be read: {error}; the run ends with the last weights"
                )
                return None

        return self._on_every_process(load, "can't load the best evaluation's weights")

    def _on_every_process(self, load: Callable[[], Checkpoint | None], failure: str) -> Checkpoint | None:
        """Return the checkpoint that `load` finds on the main process, on every process."""
        checkpoint: Checkpoint | None = None

        def load_on_main() -> str | None:
            nonlocal checkpoint
            checkpoint = load()
            return checkpoint.path.name if checkpoint else None

        name = on_main(load_on_main)
        if name is None or checkpoint is not None:
            return checkpoint
        try:
            return load_checkpoint(self.folder / name)
        except RunError as error:
            local_error = RunError(
                f"{failure}: {error} for process {self.processes.index}; share the disk of {self.run}"
            )
            local_error.on_every_process = False
            raise local_error from None
