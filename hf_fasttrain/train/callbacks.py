"""Callbacks: the base class for users, and the calls to them, on every process in the order of the list."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from hf_fasttrain.utils.errors import RunError, Stopped, first_lines
from hf_fasttrain.utils.tensor_tree import pack, unpack

if TYPE_CHECKING:
    from hf_fasttrain.run_folder.result import Result
    from hf_fasttrain.train.distributed import Processes
    from hf_fasttrain.train.step_loss import At
    from hf_fasttrain.train.trainer import Trainer


class StepReport(NamedTuple):
    """The outcome of an optimizer step."""

    step: int  # counted from 1
    loss: Tensor  # this process's part of the mean loss, 0-d, on the device; the sum over processes is the loss
    num_images: int  # over all processes
    lr: float
    grad_norm: Tensor | None  # 0-d, on the device; None if fp16 scaled the gradients and there is no clipping


class Callback:
    """The methods of a callback; all are optional, and so is this base class.

    All processes call the same methods at the same steps. Tensors are on the device: reading one makes training wait
    for the device. An exception stops training with a CallbackError that names the callback; in `finished` and `close`
    the run is finished and the other callbacks are called first.

    A callback with `before_step`, `after_evaluation` or a state may change what is learned, so a run that was trained
    with it can be resumed only with it. A callback that only observes sets `takes_part` to False.
    """

    takes_part = True  # whether one with these methods may change training

    def before_step(self, trainer: Trainer, at: At) -> None:
        """Called before a step, after the schedule's lr is set; may change lr, frozen parameters and param groups."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """Called after a step, before any evaluation and checkpoint of that step."""

    def after_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """Called after an evaluation during training, before it is saved."""

    def after_save(self, trainer: Trainer, path: Path) -> None:
        """Called when a checkpoint is complete on disk; it is kept at least until the next one."""

    def finished(self, trainer: Trainer, result: Result) -> None:
        """Called when model, result.json and predictions are on disk."""

    def failed(self, trainer: Trainer, error: BaseException) -> None:
        """Called when an exception has ended training, including Stopped after a signal."""

    def close(self) -> None:
        """Called when `running` ends, with or without an exception."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state to save: plain values, tensors, arrays, and lists, tuples, sets and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state from `state_dict`, with tensors on the CPU; called before the optimizer is restored."""


PARTICIPATION_METHODS = ("before_step", "after_evaluation", "state_dict", "load_state_dict")
METHODS = tuple(name for name in vars(Callback) if callable(vars(Callback)[name]) and not name.startswith("_"))


class CallbackError(RunError):
    """A callback raised an exception, which is the `__cause__`."""

    on_every_process = False
    status = 1


class Callbacks:
    """The callbacks of a run. Raises RunError for an object without any method of `Callback`."""

    def __init__(self, callbacks: Sequence[Any] = ()) -> None:
        self.callbacks = list(callbacks)
        for number, callback in enumerate(self.callbacks):
            if not any(_has(callback, name) for name in METHODS):
                raise RunError(
                    f"callbacks[{number}] is {type(callback).__name__}, which has none of the methods of a callback: "
                    f"{', '.join(METHODS)}"
                )
            if _has(callback, "state_dict") != _has(callback, "load_state_dict"):
                raise RunError(
                    f"callbacks[{number}] is {type(callback).__name__}, which has only one of state_dict and "
                    "load_state_dict; define both, or its state is lost when the run is resumed"
                )
        self._group_by_method()

    def _group_by_method(self) -> None:
        self._by_method = {name: [callback for callback in self.callbacks if _has(callback, name)] for name in METHODS}

    def insert_first(self, callback: Callback) -> None:
        """Add a callback that is called before all others."""
        self.callbacks.insert(0, callback)
        self._group_by_method()

    def call(self, method: str, *arguments: Any) -> None:
        """Call a method of each callback that has it; CallbackError at the first failure."""
        for callback in self._by_method[method]:
            try:
                getattr(callback, method)(*arguments)
            except Stopped:
                raise
            except Exception as error:
                raise _callback_error(callback, method, error) from error

    def call_all(self, method: str, *arguments: Any) -> list[CallbackError]:
        """Call a method of each callback that has it, and return the errors of those that failed.

        Ctrl-C is raised, in `callback_error` and `close` once all callbacks were called.
        """
        errors: list[CallbackError] = []
        interrupt: BaseException | None = None
        for callback in self._by_method[method]:
            try:
                getattr(callback, method)(*arguments)
            except (KeyboardInterrupt, SystemExit, Stopped) as error:
                if method == "finished":  # Ctrl-C skips the other callbacks
                    raise
                interrupt = interrupt or error
            except Exception as error:  # noqa: BLE001 - user code; the other callbacks must still be called
                callback_error = _callback_error(callback, method, error)
                callback_error.__cause__ = error
                errors.append(callback_error)
        if interrupt is not None:
            raise interrupt
        return errors

    @property
    def participants(self) -> list[str]:
        """Names of the callbacks that may change what is learned."""
        return [
            name
            for name, callback in self._by_name(*PARTICIPATION_METHODS).items()
            if getattr(callback, "takes_part", True)
        ]

    def require_same(self, saved: Sequence[str], path: Path) -> None:
        """Raise RunError unless the participants are those that a checkpoint was saved with."""
        names = self.participants
        missing, extra = [n for n in saved if n not in names], [n for n in names if n not in saved]
        texts = []
        if missing:
            texts.append(
                f"the run was trained with the callback {' and '.join(missing)}, which may change training and is "
                f"missing now: pass it again, callbacks=[{', '.join(missing)}(...)]"
            )
        if extra:
            texts.append(
                f"the callback {' and '.join(extra)} may change training, and the run was trained without it: leave it "
                "out; if it only observes, set takes_part = False in its class"
            )
        if texts:
            raise RunError(
                f"can't resume {path}: " + "; ".join(texts) + ". Or start a new run from these weights in another "
                "output_dir"
            )

    def states(self, processes: Processes) -> list[dict[str, Any] | None]:
        """Return name -> state of the callbacks that have one, for each process; None stands for the first one's.

        Called by all processes. Raises CallbackError for a state that can't be saved.
        """
        on_host = processes.is_distributed
        own_states = {n: _state_of(callback, on_host=on_host) for n, callback in self._by_name("state_dict").items()}
        if not on_host or not own_states:
            return [own_states]
        digests = processes.gather([_digest(own_states)])
        if len(set(digests)) == 1:
            return [own_states]
        is_sent = digests[processes.index] != digests[0] or processes.is_main
        return processes.gather([own_states if is_sent else None])

    def restore(
        self, saved: Sequence[dict[str, Any] | None], processes: Processes, note: Callable[[str], None]
    ) -> None:
        """Restore the result of `states`: each process's own state, or the first one's if their number has changed.

        `note` reports the latter, states without a callback and callbacks without a state.
        """
        first: dict[str, Any] = (saved[0] if saved else None) or {}
        own_states: dict[str, Any] = first
        if len(saved) == processes.number:
            own_states = saved[processes.index] or first
        elif len(saved) > 1:
            note(
                f"the states of callbacks differed among {len(saved)} processes: now {processes.number} processes have "
                "the first one's"
            )
        by_name = self._by_name("load_state_dict")
        for name, callback in by_name.items():
            if name not in own_states:
                note(f"callback {name}: the checkpoint has no state of it; it starts without one")
                continue
            try:
                callback.load_state_dict(own_states[name])
            except Exception as error:
                raise _callback_error(callback, "load_state_dict", error) from error
        for name in own_states.keys() - by_name.keys():
            note(f"callback {name}: the checkpoint has a state of it, but it is not among the trainer's callbacks")

    def _by_name(self, *methods: str) -> dict[str, Any]:
        """Return the callbacks with any of the methods, by class name; a second one of a class is called NAME 2."""
        by_name: dict[str, Any] = {}
        for callback in self.callbacks:
            if not any(_has(callback, method) for method in methods):
                continue
            name, number = type(callback).__qualname__, 1
            while name in by_name:
                number += 1
                name = f"{type(callback).__qualname__} {number}"
            by_name[name] = callback
        return by_name


def _has(callback: Any, method: str) -> bool:
    """Return whether a callback has a method, other than the base class's empty one."""
    attribute = getattr(callback, method, None)
    return callable(attribute) and getattr(attribute, "__func__", attribute) is not vars(Callback)[method]


def _callback_error(callback: Any, method: str, error: Exception) -> CallbackError:
    return CallbackError(
        f"callback {type(callback).__qualname__}.{method} failed: {type(error).__name__}: {first_lines(error)}"
    )


def _state_of(callback: Any, *, on_host: bool) -> Any:
    """Return a copy of a callback's state; `on_host`: with copies of its tensors on the host."""
    tensors: dict[str, Tensor] = {}
    try:
        packed = pack(callback.state_dict(), tensors, "its state")
    except Exception as error:
        raise _callback_error(callback, "state_dict", error) from error
    return unpack(packed, {name: tensor.detach().cpu() if on_host else tensor for name, tensor in tensors.items()})


def _digest(state: Any) -> str:
    """Return a digest of all values of a state on the host."""
    tensors: dict[str, Tensor] = {}
    digest = hashlib.blake2b(repr(pack(state, tensors)).encode())
    for tensor in tensors.values():
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
