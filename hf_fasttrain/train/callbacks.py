"""Callbacks, which are called on every process in the order in which they were passed."""

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
    grad_norm: Tensor | None  # 0-d, on the device; None if fp16 has scaled it


class Callback:
    """The methods of a callback; all are optional, and so is this base class.

    All processes call the same methods at the same steps. Tensors are on the device: reading one makes training wait
    for the device. An exception stops training with a CallbackError that names the callback; in `finished` and `close`
    the run is finished and the other callbacks are called first.

    One that has `before_step`, `after_evaluation` or a state may change what is learned: a run that was trained with it
    is resumed with it alone. One that only watches sets `takes_part` to False.
    """

    takes_part = True  # if it has one of these methods

    def before_step(self, trainer: Trainer, at: At) -> None:
        """Before a step; the lr of the schedule is set, and may be changed, as what is frozen and optimized may be."""

    def after_step(self, trainer: Trainer, report: StepReport) -> None:
        """After a step, before an evaluation or a checkpoint that is due after it."""

    def after_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        """After the evaluation split was evaluated while training, before that is saved."""

    def after_save(self, trainer: Trainer, path: Path) -> None:
        """When a checkpoint is complete on disk; it is kept at least until the next one."""

    def finished(self, trainer: Trainer, result: Result) -> None:
        """When model, result.json and predictions are on disk."""

    def failed(self, trainer: Trainer, error: BaseException) -> None:
        """When an exception has ended training, including Stopped, which a signal raises."""

    def close(self) -> None:
        """When `running` is left, with or without an exception."""

    def state_dict(self) -> dict[str, Any]:
        """Return the state to be saved: plain values, tensors, arrays, and lists, tuples, sets and dicts of them."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a state that `state_dict` returned, its tensors on the CPU; before the optimizer's is restored."""


TAKING_PART = ("before_step", "after_evaluation", "state_dict", "load_state_dict")
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
                    "load_state_dict; give it both, or its state is lost when the run is resumed"
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

    @property
    def taking_part(self) -> list[str]:
        """The names of the callbacks that may change what is learned."""
        return [name for name, callback in self._named(*TAKING_PART).items() if getattr(callback, "takes_part", True)]

    def require_same(self, saved: Sequence[str], path: Path) -> None:
        """Raise RunError unless those that take part are the ones that a checkpoint was saved with."""
        names = self.taking_part
        missing, extra = [n for n in saved if n not in names], [n for n in names if n not in saved]
        texts = []
        if missing:
            texts.append(
                f"the run was trained with the callback {' and '.join(missing)}, which takes part in training and is "
                f"missing now: give it again, callbacks=[{', '.join(missing)}(...)]"
            )
        if extra:
            texts.append(
                f"the callback {' and '.join(extra)} takes part in training, and the run was trained without it: leave "
                "it out; if it only watches, say so in it by takes_part = False"
            )
        if texts:
            raise RunError(
                f"can't resume {path}: " + "; ".join(texts) + ". Or start a new run from these weights in another "
                "output_dir"
            )

    def states(self, processes: Processes) -> list[dict[str, Any] | None]:
        """Return name -> state of the callbacks that have one, for each process; None: as on the first one.

        Called by all processes. Raises CallbackError for a state that can't be saved.
        """
        on_host = processes.is_distributed
        mine = {n: _state_of(callback, on_host=on_host) for n, callback in self._named("state_dict").items()}
        if not on_host or not mine:
            return [mine]
        digests = processes.gather([_digest(mine)])
        if len(set(digests)) == 1:
            return [mine]
        differs = digests[processes.index] != digests[0] or processes.is_main
        return processes.gather([mine if differs else None])

    def restore(
        self, saved: Sequence[dict[str, Any] | None], processes: Processes, note: Callable[[str], None]
    ) -> None:
        """Restore what `states` returned: each process's own state, or the first one's where their number differs.

        `note` is called where that is so, and for states without a callback and callbacks without a state.
        """
        first: dict[str, Any] = (saved[0] if saved else None) or {}
        mine: dict[str, Any] = first
        if len(saved) == processes.number:
            mine = saved[processes.index] or first
        elif len(saved) > 1:
            note(
                f"the states of callbacks differed among {len(saved)} processes: {processes.number} have the first "
                "one's now"
            )
        named = self._named("load_state_dict")
        for name, callback in named.items():
            if name not in mine:
                note(f"callback {name}: the checkpoint has no state of it; it begins anew")
                continue
            try:
                callback.load_state_dict(mine[name])
            except Exception as error:
                raise _failed(callback, "load_state_dict", error) from error
        for name in mine.keys() - named.keys():
            note(f"callback {name}: the checkpoint has a state of it, but it is not among the trainer's callbacks")

    def _named(self, *methods: str) -> dict[str, Any]:
        """Return the callbacks that have one of some methods, by class name; a second one of a class is NAME 2."""
        named: dict[str, Any] = {}
        for callback in self.callbacks:
            if not any(_has(callback, method) for method in methods):
                continue
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


def _state_of(callback: Any, *, on_host: bool) -> Any:
    """Return a copy of a callback's state, with its own tensors in it, or with copies of them on the host."""
    tensors: dict[str, Tensor] = {}
    try:
        packed = pack(callback.state_dict(), tensors, "its state")
    except Exception as error:
        raise _failed(callback, "state_dict", error) from error
    return unpack(packed, {name: each.detach().cpu() if on_host else each for name, each in tensors.items()})


def _digest(state: Any) -> str:
    """Return a digest of all values of a state on the host."""
    tensors: dict[str, Tensor] = {}
    digest = hashlib.blake2b(repr(pack(state, tensors)).encode())
    for tensor in tensors.values():
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
