"""What commands share: notes, tables, Ctrl-C, and which process speaks."""

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
    """Return whether this is the process that speaks, of several that a launcher has started."""
    return launched_rank() == 0


def print_note(text: str) -> None:
    """Print a note beside a command's own output, which other programs may read."""
    if is_main():
        print(f"note: {text}", file=sys.stderr)


@contextlib.contextmanager
def exit_on_ctrl_c() -> Iterator[None]:
    """End with its status on Ctrl-C; SIGTERM is taken for it, so that arms and their files are cleaned up."""
    from hf_fasttrain.utils.signals import signal_handler

    try:
        with signal_handler(signal.SIGTERM, signal.default_int_handler):
            yield
    except KeyboardInterrupt:
        sys.exit(Stopped.CTRL_C)


def wide_console() -> Console:
    """Return a console whose tables are not folded where there is no terminal."""
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 160)


def print_table(console: Console, title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Print a table; long texts are folded, not cut."""
    from rich.table import Table
    from rich.text import Text

    table = Table(title=Text(title))
    for name in header:
        table.add_column(Text(name), overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    console.print(table)


def command_line() -> str:
    """Return the command as it was typed, without tokens."""
    return without_secrets(shlex.join(["hf-fasttrain", *sys.argv[1:]]))
