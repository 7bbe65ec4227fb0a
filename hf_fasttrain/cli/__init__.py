"""The command line: argv to function calls, errors to exit statuses. Heavy imports happen after a recipe is read."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from hf_fasttrain.before_torch import limit_spinning
from hf_fasttrain.cli.app import app, with_command
from hf_fasttrain.cli.terminal import is_main
from hf_fasttrain.utils.errors import RunError, UserError, on_command_line, without_secrets


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Exit status: 0 for success; 2 for a user's mistake; 74 if a result could not be written; 75 for a run that was
    stopped by a signal and is saved, or whose loader processes died after a checkpoint; 130 for Ctrl-C; else 1.
    """
    limit_spinning()
    arguments = list(sys.argv[1:] if argv is None else argv)
    status: Any = 0
    try:
        with on_command_line(), _out_of_memory_as_error():
            app(with_command(arguments), prog_name="hf-fasttrain", standalone_mode=True)
    except SystemExit as ended:
        status = ended.code
    except UserError as error:
        if is_main() or not error.on_every_process:
            print(f"error: {without_secrets(str(error))}", file=sys.stderr)
        status = error.status
    _leave_processes()  # here, since an exception's frames hold the trainer
    sys.exit(status)


def _leave_processes() -> None:
    """Destroy the process group, if there is one."""
    if (distributed := sys.modules.get("hf_fasttrain.train.distributed")) is not None:
        distributed.destroy_process_group()


@contextlib.contextmanager
def _out_of_memory_as_error() -> Iterator[None]:
    """Turn a MemoryError of any command into a message."""
    try:
        yield
    except MemoryError as error:
        what = next(iter(str(error).splitlines()), "")
        out_of_memory = RunError(
            f"out of memory{f': {what}' if what else ''}; end other programs, or use a smaller model or image"
        )
        out_of_memory.on_every_process = False
        raise out_of_memory from None
