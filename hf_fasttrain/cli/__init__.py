"""The command line: argv to function calls, errors to exit statuses. Heavy imports happen after a recipe is read."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Iterator
from typing import Any

from hf_fasttrain.before_torch import limit_spinning
from hf_fasttrain.cli.app import app, with_command
from hf_fasttrain.cli.terminal import is_main
from hf_fasttrain.utils.errors import RunError, UserError, on_command_line
from hf_fasttrain.utils.library_errors import is_out_of_memory
from hf_fasttrain.utils.printing import echo


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
            status = app(with_command(arguments), prog_name="hf-fasttrain", standalone_mode=False) or 0
    except SystemExit as ended:
        status = ended.code
    except UserError as error:
        if is_main() or not error.on_every_process:
            echo(f"error: {error}", err=True)
        status = error.status
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own, for options and arguments: its class moves about
            raise
        status = _print_usage(error, arguments)
    _leave_processes()  # here, since an exception's frames hold the trainer
    sys.exit(status)


def _print_usage(error: Any, arguments: list[str]) -> int:
    """Print what typer has to say of the arguments, or its help without any, and return the exit status."""
    written = io.StringIO() if arguments else sys.stderr
    error.show(written)
    if isinstance(written, io.StringIO):
        echo(written.getvalue().rstrip(), err=True)
    return int(error.exit_code)


def _leave_processes() -> None:
    """Destroy the process group, if there is one."""
    if (distributed := sys.modules.get("hf_fasttrain.train.distributed")) is not None:
        distributed.destroy_process_group()


@contextlib.contextmanager
def _out_of_memory_as_error() -> Iterator[None]:
    """Turn lack of memory in any command into a message."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        what = next(iter(str(error).splitlines()), "")
        out_of_memory = RunError(
            f"out of memory{f': {what}' if what else ''}; end other programs, or use a smaller model or image"
        )
        out_of_memory.on_every_process = False
        raise out_of_memory from None
