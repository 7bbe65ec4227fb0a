"""Errors that are shown to users, with their exit statuses (`status`; docs/checkpoints.md lists them).

Each message says where, what was found, what is allowed and what to do.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from hf_fasttrain.utils.clean import without_secrets

if TYPE_CHECKING:
    from hf_fasttrain.run_folder.result import Result


class UserError(ValueError):
    """An error that only the user can fix. The command line prints its message alone and exits with `status`.

    In distributed training most errors are raised on all processes, and only the main one prints them. An error that a
    single process may raise (an image, a file) has `on_every_process` False, and is printed wherever it is raised.
    """

    on_every_process = True
    status = 2


class RecipeError(UserError):
    """The recipe file or an override is wrong."""


class DataError(UserError):
    """The dataset was not found, or does not match the recipe."""


class ImageError(DataError):
    """An image can't be decoded; `reason` says why, without the image's name and the advice."""

    def __init__(self, text: str, reason: str = "") -> None:
        super().__init__(text)
        self.reason = reason or text


class ModelError(UserError):
    """The model can't be built or its weights don't fit."""


class RunError(UserError):
    """The run folder or the machine can't do what the user wants."""


class Stopped(Exception):
    """A signal stopped training before its end. The state is saved, and a resumed run continues from it.

    A program that goes on after errors (`except Exception`) should let it through: `except Stopped: raise` before it.

    `cause` names the signal, `step` is the number of completed steps, `result` holds the figures so far (they are not
    written to disk). `status` is the exit status of the command line: CTRL_C after Ctrl-C, NOT_WRITTEN (EX_IOERR) if
    the state could not be saved, else RESUMABLE (EX_TEMPFAIL of sysexits.h: try again).
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
    """Ctrl-C stopped training; also a KeyboardInterrupt, so that a loop over `Trainer.iterate` can catch it as one."""


class NotEnoughMemory(RunError):
    """Out of memory at a point where the step can't be retried; a resumed run starts with smaller micro-batches."""

    on_every_process = False
    status = Stopped.RESUMABLE


class StepOutOfMemory(RuntimeError):
    """A process ran out of memory in a step, before any gradient was exchanged: the step can be retried."""


class UnusableCheckpoint(RunError):
    """A checkpoint can be read, but does not fit the model, the optimizer or the loader."""


class RunFailure(RunError):
    """A process that the run needs has died. `status` is RESUMABLE if this start has saved a checkpoint, else 1."""

    status = 1


class LoaderDied(RunFailure):
    """Loader processes died and could not be restarted."""

    on_every_process = False


class LoaderNotStarted(RunFailure):
    """A loader process could not be started: the machine allows too few processes, threads or files."""

    on_every_process = False
    status = 2


class PeerGone(RunFailure):
    """Another training process has ended."""


class GradientsNotExchanged(PeerGone):
    """Another training process has ended before a step's gradients were exchanged; the step is undone."""


PEER_GONE = "another training process has ended; its output may show why"
_called_from_python = True


@contextmanager
def on_command_line() -> Iterator[None]:
    """Make messages name the command line's options instead of Python arguments."""
    global _called_from_python
    previous, _called_from_python = _called_from_python, False
    try:
        yield
    finally:
        _called_from_python = previous


def is_on_command_line() -> bool:
    """Return whether the command line is running, rather than a program that imports the package."""
    return not _called_from_python


def resume_option() -> str:
    """Return the argument that resumes a run: of the command line or of `Trainer.from_recipe`."""
    return "resume=True" if _called_from_python else "--resume"


def how_to_resume() -> str:
    """Return how a run is resumed, as the subject of a sentence that ends with `continues`."""
    return "resume=True (or Trainer.restore())" if _called_from_python else "the same command with --resume"


def nearest(word: str, valid: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the closest of `valid`, or an empty string if none is close."""
    close = closest(word, valid)
    return f" Did you mean '{close[0]}'?" if close else ""


def closest(word: str, valid: Iterable[str], cutoff: float = 0.6) -> list[str]:
    """Return those of `valid` that are like a word, whatever its case: the fewest edits first, then by alphabet.

    `cutoff`: the least similarity (`difflib.SequenceMatcher.ratio`), between 0 and 1.
    """
    word, names = word[:100], list(dict.fromkeys(valid))  # whatever a stranger has written
    close = difflib.get_close_matches(word, names, n=12, cutoff=cutoff)
    close += difflib.get_close_matches(word.lower(), names, n=12, cutoff=cutoff)
    return sorted(set(close), key=lambda name: (edit_distance(word.lower(), name.lower()), name))


def edit_distance(a: str, b: str) -> int:
    """Return the least number of inserted, deleted and replaced characters that turn `a` into `b` (Levenshtein)."""
    row = list(range(len(b) + 1))
    for i, left in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, right in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (left != right))
    return row[-1]


def shortened(values: Iterable[object], limit: int = 12) -> str:
    """Return the values separated by commas, cut after `limit` with a count of the rest."""
    texts = [str(value) for value in values]
    rest = len(texts) - limit
    return ", ".join(texts[:limit]) + (f", ... and {rest} more" if rest > 0 else "")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the name of its class if the message is empty."""
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__


def first_lines(error: BaseException) -> str:
    """Return the first two non-empty lines of an error's message, or the name of its class if it is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__


def shown(value: object) -> str:
    """Return a value's repr, without secrets and cut to 60 characters."""
    text = without_secrets(repr(value))
    return text if len(text) <= 60 else text[:57] + "..."
