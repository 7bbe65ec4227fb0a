"""Shared by the commands: notes, Ctrl-C, and which process prints."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator

from hf_fasttrain.before_torch import launched_rank
from hf_fasttrain.utils.clean import without_secrets
from hf_fasttrain.utils.errors import Stopped
from hf_fasttrain.utils.format import format_command
from hf_fasttrain.utils.printing import echo


def is_main() -> bool:
    """Return whether this is the main process, which alone prints, of those that a launcher started."""
    return launched_rank() == 0


def print_note(text: str) -> None:
    """Print a note to stderr; other programs may read a command's stdout."""
    if is_main():
        echo(f"note: {text}", err=True)


@contextlib.contextmanager
def exit_on_ctrl_c() -> Iterator[None]:
    """Exit with status 130 on Ctrl-C; SIGTERM is handled alike, so that child processes and files are cleaned up."""
    from hf_fasttrain.utils.signals import signal_handler

    try:
        with signal_handler(signal.SIGTERM, signal.default_int_handler):
            yield
    except KeyboardInterrupt:
        sys.exit(Stopped.CTRL_C)


def command_line() -> str:
    """Return the command line as typed, without tokens."""
    return without_secrets(format_command(*sys.argv[1:]))
