"""Shared by the commands: notes, tables, Ctrl-C, and which process prints."""

from __future__ import annotations

import contextlib
import shlex
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from hf_fasttrain.before_torch import launched_rank
from hf_fasttrain.utils.errors import Stopped, without_secrets

if TYPE_CHECKING:
    from rich.console import Console


def is_main() -> bool:
    """Return whether this is the main process, which alone prints, of those that a launcher started."""
    return launched_rank() == 0


def print_note(text: str) -> None:
    """Print a note to stderr; other programs may read a command's stdout."""
    if is_main():
        print(f"note: {text}", file=sys.stderr)


@contextlib.contextmanager
def exit_on_ctrl_c() -> Iterator[None]:
    """Exit with status 130 on Ctrl-C; SIGTERM is handled alike, so that child processes and files are cleaned up."""
    from hf_fasttrain.utils.signals import signal_handler

    try:
        with signal_handler(signal.SIGTERM, signal.default_int_handler):
            yield
    except KeyboardInterrupt:
        sys.exit(Stopped.CTRL_C)


def wide_console() -> Console:
    """Return a console that is 160 columns wide if stdout is not a terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def print_table(console: Console, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; long texts are wrapped, not cut."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title))
    for name in header:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def command_line() -> str:
    """Return the command line as typed, without tokens."""
    return without_secrets(shlex.join(["hf-fasttrain", *sys.argv[1:]]))
