"""The resources of a running trainer: run folder lock, signal handlers, clock, loader processes; and their cleanup."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import TYPE_CHECKING, Any, Protocol

from hf_fasttrain.data.loading.loader import EvalLoader, TrainLoader
from hf_fasttrain.data.loading.user_loader import UserEvalLoader, UserLoader
from hf_fasttrain.data.loading.waiting import WaitCutShort
from hf_fasttrain.data.loading.worker_deaths import CHILD_SIGNAL, WorkerDeaths
from hf_fasttrain.run_folder.checkpoint import complete_checkpoints
from hf_fasttrain.train.checkpointing import lock_run, unlock_run
from hf_fasttrain.train.ending import result_of, stop_run
from hf_fasttrain.train.launcher import shared_data_note
from hf_fasttrain.train.steps import Steps
from hf_fasttrain.train.stop import MOST_WAIT, exclusive_training, signal_name, stopped
from hf_fasttrain.utils.errors import PEER_GONE, GradientsNotExchanged, PeerGone, RunError, RunFailure
from hf_fasttrain.utils.library_errors import is_peer_gone
from hf_fasttrain.utils.signals import SIGNALS

if TYPE_CHECKING:
    from hf_fasttrain.train.trainer import Trainer


class Probe(Protocol):
    """Fits the head before the first step; `result` is what result.json says of it."""

    result: Any

    def __call__(self, trainer: Trainer) -> None:
        """Fit the head; called by all processes. Raises Stopped after a signal."""


class Session:
    """The resources of `Trainer.running`, which may be entered repeatedly, but not twice at once in a process."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.is_open = False  # whether steps can be run
        self.is_released = False  # whether finish() has ended the run, but running() has not ended yet
        self.deaths = WorkerDeaths(lambda text: trainer.log.alert(f"after step {trainer.state.step:,} {text}"))
        self._resources = ExitStack()

    def require_open(self, method: str) -> None:
        """Raise RunError outside of `running`, and after `finish`."""
        if self.is_released:
            raise RunError(
                f"{method} after finish(), which has ended the run: leave running() and enter it again to continue"
            )
        if not self.is_open:
            raise RunError(f"{method} outside of running(): use it as `with trainer.running(): ...`, or call fit()")

    @contextmanager
    def open(self) -> Iterator[None]:
        """Acquire all resources; see `Trainer.running`."""
        signals, last_signal = self.trainer.stop.signals, 0
        with exclusive_training(self.trainer.output_dir), self._run_folder():
            start_step = self.trainer.state.step
            try:
                with ExitStack() as self._resources:
                    self._open(self._resources)
                    with self._cut_short():
                        if self.trainer.probe is not None and start_step == 0:
                            with self.trainer.throughput.stopped():
                                self.trainer.probe(self.trainer)
                        yield
                    last_signal = signals.received if self.is_open else 0
            except BaseException as error:
                self._call_failed(error)
                failure = self._failure_with_step(error, start_step)
                if failure is not None:
                    raise failure from None
                raise
            finally:
                self.is_open = self.is_released = False
                self._close()
        if last_signal in SIGNALS:
            signal.raise_signal(last_signal)  # a signal after the last step, which was not handled

    @contextmanager
    def _cut_short(self) -> Iterator[None]:
        """If a signal has come and images have not, save the last complete step and raise Stopped.

        Several processes can't agree on that, since the others wait for this one's gradients: each of them ends when
        its images or another one's gradients don't arrive, and the main one saves alone.
        """
        trainer, signals = self.trainer, self.trainer.stop.signals
        try:
            yield
            return
        except WaitCutShort:  # handled outside of the handler, which keeps tensors alive
            reason = f"no images have arrived for {MOST_WAIT:.0f} s after {signal_name(signals.received)}"
        except GradientsNotExchanged:
            if not signals.received:
                raise
            reason = "another training process has ended"
        number = signals.received
        (trainer.log.print if trainer.processes.is_main else trainer.log.alert)(f"{reason}: the step is given up")
        if trainer.processes.is_distributed:
            trainer.processes.leave_others()
        with suppress(WaitCutShort):  # of a user's loader, whose sampler is asked for its position
            if trainer.processes.is_main:
                stop_run(trainer, number)
            message = f"{reason}; the main process saves, if it can"
            raise stopped(number, message, trainer.state.step, result_of(trainer), saved=True)
        failure = RunFailure(f"{reason}; a disk or file server may not answer")
        failure.on_every_process = False
        raise failure

    def release(self) -> None:
        """Release all resources but the run folder, after the last step."""
        self._resources.close()
        self.is_open, self.is_released = False, True

    @contextmanager
    def _run_folder(self) -> Iterator[None]:
        """Lock the run folder."""
        checkpoints, log = self.trainer.checkpoints, self.trainer.log
        if checkpoints is None:
            yield
            return
        is_new = self.trainer.state.step == 0 and checkpoints.saved_at != 0
        if is_new and complete_checkpoints(checkpoints.folder):
            raise RunError(f"{checkpoints.run}: contains checkpoints; call restore(), or pass another output_dir")
        self.trainer.processes.wait()  # no process writes before all have checked
        if not lock_run(checkpoints.run):
            log.note(f"{checkpoints.run}: its file system has no locks, so a second run there is not prevented")
        try:
            yield
        finally:
            unlock_run(checkpoints.run)

    def _open(self, resources: ExitStack) -> None:
        trainer = self.trainer
        trainer.state.num_steps = trainer.num_steps
        trainer.upcoming = Steps(trainer.train_loader, trainer.state.step, trainer.num_steps)
        resources.callback(self._close_loaders)
        for loader in (trainer.train_loader, *trainer.evaluation.loaders):
            if isinstance(loader, TrainLoader | EvalLoader):
                loader.prefetcher.deaths = self.deaths
        self.deaths.number = 0
        for note in self._notes():
            trainer.log.note(note)
        trainer.step.accumulation.set_train_mode()
        bars = trainer.log.progress(trainer.num_steps, trainer.state.step, trainer.train_loader.steps_per_epoch)
        for context in (trainer.stop.signals, CHILD_SIGNAL.deferred(), bars, trainer.throughput.running()):
            resources.enter_context(context)
        self.is_open = True

    def _notes(self) -> Iterator[str]:
        """Yield notes on a user's loaders before the first step."""
        trainer = self.trainer
        for name, loader in (("train_loader", trainer.train_loader), ("eval_loader", trainer.evaluation.eval_loader)):
            if isinstance(loader, UserLoader | UserEvalLoader):
                note = shared_data_note(name, loader.loader, trainer.processes.number)
                yield from [note] if note else []
        train = trainer.train_loader
        if trainer.checkpoints is None or not isinstance(train, UserLoader) or train.keeps_position:
            return
        if train.steps_per_epoch > 1:
            yield (
                "train_loader does not store its position within an epoch: restore() continues from the newest "
                f"checkpoint at the end of an epoch ({train.steps_per_epoch:,} steps); torchdata's StatefulDataLoader "
                "can continue from any checkpoint"
            )

    def _close_loaders(self) -> None:
        for loader in (self.trainer.upcoming, self.trainer.train_loader, *self.trainer.evaluation.loaders):
            if hasattr(loader, "close"):
                loader.close()

    def _call_failed(self, error: BaseException) -> None:
        """Call `callback_error` of the callbacks, once nothing is being written."""
        if self.trainer.checkpoints is not None:
            self.trainer.checkpoints.wait_for_thread()
        if self.is_open:
            for callback_error in self.trainer.callbacks.call_all("failed", self.trainer, error):
                self.trainer.log.alert(str(callback_error))

    def _failure_with_step(self, error: BaseException, start_step: int) -> RunFailure | None:
        """Return the failure with the last saved step if a process has died; None for other errors."""
        if self.trainer.processes.is_distributed and is_peer_gone(error):
            error = PeerGone(PEER_GONE)
        if not isinstance(error, RunFailure):
            return None
        checkpoints = self.trainer.checkpoints
        return error if checkpoints is None else checkpoints.with_saved_step(error, start_step)

    def _close(self) -> None:
        """Close the callbacks, and wait for what is being written."""
        is_failing = sys.exception() is not None
        try:
            errors = self.trainer.callbacks.call_all("close")
        finally:
            if self.trainer.checkpoints is not None:
                self.trainer.checkpoints.wait()
        if errors and not is_failing:
            raise errors[0]
        for error in errors:
            self.trainer.log.alert(str(error))
