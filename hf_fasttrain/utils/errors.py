"""Mistakes that a user can make. Each message says where, what was got, what is allowed, what to do."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from hf_fasttrain.run_folder.result import Result


class UserError(ValueError):
    """Something only the user can put right. The command line prints it alone and exits with `status`.

    Where several processes train, all of them meet most errors, and the main one speaks; an error that one process
    may meet alone (an image, a file) has `on_every_process` False.
    """

    on_every_process = True
    status = 2


class RecipeError(UserError):
    """The recipe file or an override is wrong."""


class DataError(UserError):
    """The data set is not there, or is not what the recipe says."""


class ImageError(DataError):
    """An image can't be decoded; `reason` says why, without the image's name and what to do."""

    def __init__(self, text: str, reason: str = "") -> None:
        super().__init__(text)
        self.reason = reason or text


class ModelError(UserError):
    """The model can't be built or its weights don't fit."""


class RunError(UserError):
    """The run folder or the machine can't do what was asked."""


class Stopped(Exception):
    """Training was stopped by a signal before its end, and its state saved; a resumed run goes on from there.

    `cause` names the signal, `step` is the number of steps made, `result` how far the run has come (nothing of it is
    written). `status` is what the command line exits with: CTRL_C after Ctrl-C, else RESUMABLE (EX_TEMPFAIL of
    sysexits.h: try again), or NOT_WRITTEN (EX_IOERR) if the state could not be saved.
    """

    CTRL_C, RESUMABLE, NOT_WRITTEN = 130, 75, 74

    def __init__(
        self,
        message: str = "",
        *,
        status: int = RESUMABLE,
        cause: str = "",
        step: int = 0,
        result: Result | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.cause, self.step, self.result = status, cause, step, result


class Interrupted(Stopped, KeyboardInterrupt):
    """Ctrl-C has stopped training: a loop over `Trainer.iterate` may take it for the KeyboardInterrupt that it is."""


class NotEnoughMemory(RunError):
    """Memory ran out where a step can't be made again; a resumed run begins with smaller micro-batches."""

    on_every_process = False
    status = Stopped.RESUMABLE


class StepOutOfMemory(RuntimeError):
    """Some process has run out of memory in a step, before any gradient was exchanged."""


class RunFailure(RunError):
    """A process that a run needs is gone; RESUMABLE if the run has saved a checkpoint since it was started, else 1."""

    status = 1


class LoaderDied(RunFailure):
    """Loader processes died and can't be replaced."""

    on_every_process = False


class PeerGone(RunFailure):
    """Another training process has ended."""


_speaks_to_python = True


@contextmanager
def on_command_line() -> Iterator[None]:
    """Let messages say how a run is resumed in the command line's words."""
    global _speaks_to_python
    before, _speaks_to_python = _speaks_to_python, False
    try:
        yield
    finally:
        _speaks_to_python = before


def resume_option() -> str:
    """Return what is added to a training's call to resume it."""
    return "resume=True" if _speaks_to_python else "--resume"


def how_to_resume() -> str:
    """Return the subject of a sentence that ends with `goes on`."""
    return "resume=True (or Trainer.restore())" if _speaks_to_python else "the same command with --resume"


SECRET = re.compile(r"\b(hf_|api_org_)[A-Za-z0-9]{20,}\b")


def without_secrets(text: str) -> str:
    """Return a text with Hub tokens blotted out, whoever put them there."""
    return SECRET.sub(r"\1***", text)


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the nearest of `valid`, or an empty string if none is near."""
    found = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.6)
    return f" Did you mean '{found[0]}'?" if found else ""


def shortened(values: Iterable[object], limit: int = 12) -> str:
    """Return the values separated by commas, cut after `limit` with a count of the rest."""
    texts = [str(value) for value in values]
    rest = len(texts) - limit
    return ", ".join(texts[:limit]) + (f", ... and {rest} more" if rest > 0 else "")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's text, or what it is called if it says nothing."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def first_lines(error: BaseException) -> str:
    """Return the first two lines of an error's text that say something, or what it is called."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__


def shown(value: object) -> str:
    """Return a value's repr, cut to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
