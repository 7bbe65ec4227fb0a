"""Callbacks, which are called on every process in the order in which they were passed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from hf_fasttrain.utils.errors import RunError, Stopped, first_lines

if TYPE_CHECKING:
    from hf_fasttrain.run_folder.result import Result
    from hf_fasttrain.train.trainer import Trainer


class StepReport(NamedTuple):
    """The outcome of an optimizer step."""

    step: int  # counted from 1
    loss: Tensor  # this process's part of the mean loss, 0-d, on the device; the sum over processes is the loss
    num_images: int  # over all processes
    lr: float
    grad_norm: Tensor | None  # 0-d, on the device; None if fp16 has scaled it


class Callback:
    """The methods of a callback; all are optional, and so is this base class.

    All processes call the same methods at the same steps. Tensors are on the device: reading one makes training wait
    for the device. An exception stops training with a CallbackError that names the callback; in `finished` and `close`
    the run is finished and the other callbacks are called first.
    """

    def before_step(self, trainer: Trainer, step: int) -> None:
        """Before a step; `step` is counted from 1."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """After a step, before an evaluation or a checkpoint that is due after it."""

    def after_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After the evaluation split was evaluated while training."""

    def after_save(self, trainer: Trainer, path: Path) -> None:
        """When a checkpoint is complete on disk; it is kept at least until the next one."""

    def finished(self, trainer: Trainer, result: Result) -> None:
        """When model, result.json and predictions are on disk."""

    def failed(self, trainer: Trainer, error: BaseException) -> None:
        """When an exception has ended training, including Stopped, which a signal raises."""

    def close(self) -> None:
        """When `running` is left, with or without an exception."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state to be saved, of plain values: str, int, float, bool, None, lists, dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned."""


METHODS = tuple(name for name in vars(Callback) if not name.startswith("_"))


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
        self._index()

    def _index(self) -> None:
        self._by_method = {name: [each for each in self.callbacks if _has(each, name)] for name in METHODS}

    def put_first(self, callback: Callback) -> None:
        """Add a callback that is called before all others."""
        self.callbacks.insert(0, callback)
        self._index()

    def call(self, method: str, *arguments: Any) -> None:
        """Call a method of each callback that has it; CallbackError at the first failure."""
        for callback in self._by_method[method]:
            try:
                getattr(callback, method)(*arguments)
            except Stopped:
                raise
            except Exception as error:
                raise _failed(callback, method, error) from error

    def call_all(self, method: str, *arguments: Any) -> list[CallbackError]:
        """Call a method of each callback that has it, and return the errors of those that failed.

        Ctrl-C is raised, in `failed` and `close` once all callbacks were called.
        """
        errors: list[CallbackError] = []
        interrupt: BaseException | None = None
        for callback in self._by_method[method]:
            try:
                getattr(callback, method)(*arguments)
            except (KeyboardInterrupt, SystemExit, Stopped) as error:
                if method == "finished":  # which Ctrl-C shall end
                    raise
                interrupt = interrupt or error
            except Exception as error:  # noqa: BLE001 - user code; the other callbacks must still be called
                failed = _failed(callback, method, error)
                failed.__cause__ = error
                errors.append(failed)
        if interrupt is not None:
            raise interrupt
        return errors

    def state_dict(self) -> dict[str, Any]:
        """Return name -> state of the callbacks that have one; CallbackError for a state that is not plain values."""
        return {name: self._state_of(callback) for name, callback in self._named("state_dict").items()}

    def _state_of(self, callback: Any) -> Any:
        try:
            state = callback.state_dict()
            if not _is_plain(state):
                raise TypeError("it is not of plain values: str, int, float, bool, None, lists, dicts with str as keys")
        except Exception as error:
            raise _failed(callback, "state_dict", error) from error
        return copy.deepcopy(state)  # it is written by a thread while training continues

    def load_state_dict(self, states: Mapping[str, Any], note: Callable[[str], None]) -> None:
        """Restore the saved states; `note` is called for callbacks without a state, and states without a callback."""
        named = self._named("load_state_dict")
        for name, callback in named.items():
            if name not in states:
                note(f"callback {name}: the checkpoint has no state of it; it begins anew")
                continue
            try:
                callback.load_state_dict(states[name])
            except Exception as error:
                raise _failed(callback, "load_state_dict", error) from error
        for name in states:
            if name not in named:
                note(f"callback {name}: the checkpoint has a state of it, but it is not among the trainer's callbacks")

    def _named(self, method: str) -> dict[str, Any]:
        """Return the callbacks that have a method, by class name; a second one of a class is NAME 2."""
        named: dict[str, Any] = {}
        for callback in self._by_method[method]:
            name, number = type(callback).__qualname__, 1
            while name in named:
                number += 1
                name = f"{type(callback).__qualname__} {number}"
            named[name] = callback
        return named


def _has(callback: Any, method: str) -> bool:
    """Return whether a callback has a method that is not the base class's empty one."""
    attribute = getattr(callback, method, None)
    return callable(attribute) and getattr(attribute, "__func__", attribute) is not vars(Callback)[method]


def _failed(callback: Any, method: str, error: Exception) -> CallbackError:
    return CallbackError(
        f"callback {type(callback).__qualname__}.{method} failed: {type(error).__name__}: {first_lines(error)}"
    )


def _is_plain(value: Any) -> bool:
    """Return whether a value survives a round trip through JSON."""
    if isinstance(value, dict):
        return all(type(key) is str and _is_plain(each) for key, each in value.items())
    if isinstance(value, list):
        return all(map(_is_plain, value))
    return value is None or type(value) in (str, int, float, bool)
