"""When and where a run's checkpoints are written: copied in a moment, written by a thread beside training."""

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
from hf_fasttrain.run_folder.lock import acquire, release
from hf_fasttrain.run_folder.predictions import PREDICTIONS_FILE, Predictions
from hf_fasttrain.train.distributed import Processes, on_main
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.utils.environment import free_memory_bytes, one_thread
from hf_fasttrain.utils.errors import RunError, RunFailure, Stopped, how_to_resume
from hf_fasttrain.utils.files import new_folder, reason, sync_files, try_to_write, write_json
from hf_fasttrain.utils.process_memory import relax_memory_limit

FOLDER = "checkpoints"


def lock_run(run: Path) -> bool:
    """Make a run folder and keep other runs out of it until `unlock_run`; nothing happens if it is held already.

    Called by all processes. Returns False where the file system has no locks. Raises RunError if another run is in it,
    or it can't be written.
    """

    def lock() -> bool:
        try:
            (run / FOLDER).mkdir(parents=True, exist_ok=True)
            return acquire(run / FOLDER)
        except OSError as error:
            raise not_writable(run, error) from None

    return on_main(lock)


def not_writable(run: Path, error: OSError) -> RunError:
    """Return the message for a run folder that can't be made or written to."""
    return RunError(f"output_dir {run}: can't be written: {reason(error)}; choose another output_dir")


def unlock_run(run: Path) -> None:
    """Let other runs into a run folder."""
    release(run / FOLDER)


class Checkpoints:
    """The checkpoints of a run folder: the newest `keep` and the best. The main process writes, all read.

    Training stands still while the state is copied to the host; a thread writes the copy. Where the copy would take
    more than half of the free memory, training waits for the writing instead. Weights that are no numbers are not
    written.
    """

    def __init__(
        self,
        run: Path,
        processes: Processes,
        log: RunLog,
        keep: int = 2,
    ) -> None:
        # Called beside training with each checkpoint that is complete, before it may be removed; it raises nothing.
        self.saved: Callable[[Path, int, bool], None] | None = None  # its folder, its step, whether it is the best
        self.saved_at = -1  # step whose checkpoint is written, or being written
        self.announced = 0  # step of the newest checkpoint that callbacks were told of
        self._written = 0  # step of the newest checkpoint that this process has written
        self.run, self.folder = run, run / FOLDER
        self.processes, self.log, self.keep = processes, log, keep
        self.failed: str | None = None  # why the newest save was not written
        self._full = False  # whether that was for want of room
        self._best: int | None = None  # step of the best checkpoint that is on disk
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, snapshot: Snapshot, best_step: int | None) -> None:
        """Copy the state of a step and begin to write it; the one before is waited for."""
        self.saved_at = snapshot.step
        self.wait()
        if not self.processes.is_main:
            return
        relax_memory_limit()  # the steps may have taken all that they could get
        copy = snapshot.num_bytes < free_memory_bytes() // 2
        with one_thread():
            snapshot.to_host(copy=copy)
        thread = threading.Thread(target=self._write, args=(snapshot, best_step), name="checkpoint")
        try:
            thread.start()
        except RuntimeError:  # the system has none to give
            self._write(snapshot, best_step)
        else:
            self._thread = thread
        if not copy:
            self.wait()

    def wait(self) -> bool:
        """Wait until nothing is being written, and return whether the newest checkpoint is on disk."""
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

    def stand_by(self) -> None:
        """Wait until nothing is being written, whatever came of it."""
        if self._thread is not None:
            self._thread.join()

    def what_remains(self, error: RunFailure, began_at: int) -> RunFailure:
        """Return the error with what is saved, and the status by it: whether a run that began at a step got on."""
        there = complete_checkpoints(self.folder)
        if not there:
            return type(error)(f"{error}; nothing was saved yet")
        newest = checkpoint_step(there[-1])
        told = type(error)(f"{error}; {how_to_resume()} continues from step {newest:,}")
        if newest > began_at:
            told.status = Stopped.RESUMABLE
        return told

    def _write(self, snapshot: Snapshot, best_step: int | None) -> None:
        try:
            if not snapshot.is_finite():  # the next steps' losses will not be either, and stop the run
                self.failed = "its weights are no finite numbers"
            elif not self._try(snapshot) and self._made_room(best_step, snapshot.step):
                self._try(snapshot)
            if self.failed is None:
                self._written = snapshot.step
                if self.saved is not None:
                    self.saved(checkpoint_path(self.folder, snapshot.step), snapshot.step, snapshot.step == best_step)
                self._prune(self.keep, best_step, snapshot.step)
            else:
                newest = complete_checkpoints(self.folder)
                have = f"the newest is {newest[-1]}" if newest else "there is none yet"
                self.log.say(f"checkpoint of step {snapshot.step} not written: {self.failed}; {have}")
        except BaseException as error:  # noqa: BLE001 - raised again by the thread that trains
            self._error = error

    def _try(self, snapshot: Snapshot) -> bool:
        self._full = False

        def failed(error: BaseException) -> None:
            self._full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            self.failed = reason(error)

        if try_to_write(lambda: save_checkpoint(self.folder, snapshot), failed):
            self.failed = None
        return self.failed is None

    def _made_room(self, best_step: int | None, step: int) -> bool:
        """Where the disk is full, remove all checkpoints but the newest and the best."""
        if not self._full or len(complete_checkpoints(self.folder)) < 2:
            return False
        return self._prune(1, best_step, step)

    def _prune(self, keep: int, best_step: int | None, step: int) -> bool:
        """Remove old checkpoints; the best one on disk stays until a better one is there."""
        if best_step is not None and checkpoint_path(self.folder, best_step) in complete_checkpoints(self.folder):
            self._best = best_step
        return try_to_write(lambda: prune_checkpoints(self.folder, keep, self._best, step), lambda error: None)

    def write_results(
        self,
        write_model: Callable[[Path], None],
        predictions: Predictions | None,
        result: Callable[[], dict[str, Any]],
    ) -> None:
        """Write RUN/model, predictions and result.json, on the main process; what the disk does not take is named.

        `result` is asked last, when it is known what is missing.
        """
        run, log = self.run, self.log
        if not self.wait():
            log.lost.append(f"{self.folder}: the last checkpoint: {self.failed}")

        def write() -> None:
            with new_folder(run / "model") as folder:
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
        """Return whether a step's checkpoint is on disk and undamaged; it is read for that."""
        path = checkpoint_path(self.folder, step)
        try:
            return path in complete_checkpoints(self.folder) and bool(load_checkpoint(path))
        except RunError:
            return False

    def newest(self) -> Checkpoint | None:
        """Return the newest complete checkpoint, the same on every process; damaged ones are named and passed over."""
        return self._on_every_process(lambda: newest_checkpoint(self.folder, self.log.say), "can't resume")

    def best(self, step: int) -> Checkpoint | None:
        """Return the best evaluation's checkpoint, the same on every process; None and a note if it can't be read."""

        def look() -> Checkpoint | None:
            restore_replaced(self.folder)
            path = checkpoint_path(self.folder, step)
            try:
                if path not in complete_checkpoints(self.folder):
                    raise RunError(f"checkpoint {path} is gone")
                return load_checkpoint(path)
            except RunError as error:
                self.log.note(f"the best evaluation's weights can't be read: {error}; the run ends with the last ones")
                return None

        return self._on_every_process(look, "can't load the best evaluation's weights")

    def _on_every_process(self, look: Callable[[], Checkpoint | None], failed: str) -> Checkpoint | None:
        """Return on every process the checkpoint that the main one finds by `look`."""
        found: Checkpoint | None = None

        def name_of_found() -> str | None:
            nonlocal found
            found = look()
            return found.path.name if found else None

        name = on_main(name_of_found)
        if name is None or found is not None:
            return found
        try:
            return load_checkpoint(self.folder / name)
        except RunError as error:
            alone = RunError(f"{failed}: {error} for process {self.processes.index}; share the disk of {self.run}")
            alone.on_every_process = False
            raise alone from None
