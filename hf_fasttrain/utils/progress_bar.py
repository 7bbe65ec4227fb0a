"""A progress bar on stderr."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hf_fasttrain.utils.terminal import Terminal


@contextmanager
def progress_bar(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Show a progress bar on stderr if it is a terminal and stdout is none, whose rows it would be mixed with.

    Yields a function that advances it by a number.
    """
    terminal = Terminal(stderr=True)
    columns = (TextColumn(text), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    hidden = not terminal.is_terminal or sys.stdout.isatty()
    with Progress(*columns, console=terminal, disable=hidden, transient=True, redirect_stdout=False) as progress:
        yield partial(progress.advance, progress.add_task("", total=total))
