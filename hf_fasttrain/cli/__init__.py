"""The command line: argv to function calls, errors to exit statuses. Heavy imports happen after a recipe is read."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import Any

from hf_fasttrain.before_torch import limit_spinning
from hf_fasttrain.cli.app import app, with_command
from hf_fasttrain.cli.terminal import is_main
from hf_fasttrain.utils.errors import UserError, on_command_line
from hf_fasttrain.utils.launch_variables import require_launch_variables
from hf_fasttrain.utils.limits import raise_file_limit, require_threads_of_libraries
from hf_fasttrain.utils.printing import echo
from hf_fasttrain.utils.standard_folders import require_temporary_folder, require_working_folder, set_home
from hf_fasttrain.utils.streams import flush_stdout, repair_standard_streams
from hf_fasttrain.utils.system_errors import explain_system_error

WITHOUT_LIBRARIES = ("--help", "--version", "recipes", "schema", "explain")  # commands that import nothing large


def main(argv: list[str] | None = None) -> None:
    """Run the command line.

    Exit status: 0 for success; 2 for a user's mistake; 74 if a result could not be written; 75 for a run that was
    stopped by a signal and is saved, or whose loader processes died after a checkpoint; 130 for Ctrl-C; else 1.
    """
    limit_spinning()
    repair_standard_streams()
    arguments = list(sys.argv[1:] if argv is None else argv)
    status: Any = 0
    try:
        with on_command_line(), _system_errors_as_messages():
            status = _run(with_command(arguments))
            flush_stdout()
    except BrokenPipeError:  # `hf-fasttrain ... | head`
        status = 1
    except UserError as error:
        if is_main() or not error.on_every_process:
            with contextlib.suppress(OSError):  # stderr may be on a full disk
                echo(f"error: {error}", err=True)
        status = error.status
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's own, for options and arguments: its class moves about
            raise
        status = _print_usage(error, arguments)
    _leave_processes()  # here, since an exception's frames hold the trainer
    sys.exit(status)


def _run(arguments: list[str]) -> Any:
    """Run a command and return its exit status."""
    if arguments and arguments[0] not in WITHOUT_LIBRARIES:
        _prepare_for_libraries()
    try:
        return app(arguments, prog_name="hf-fasttrain", standalone_mode=False) or 0
    except SystemExit as ended:
        return ended.code


def _prepare_for_libraries() -> None:
    """Check and set what libraries need when they are imported."""
    require_working_folder()
    require_temporary_folder()
    require_launch_variables()
    if (note := set_home()) is not None and is_main():
        echo(f"note: {note}", err=True)
    raise_file_limit()
    require_threads_of_libraries()


def _print_usage(error: Any, arguments: list[str]) -> int:
    """Print what is wrong with the arguments, or the help without any, and return the exit status."""
    if not arguments:
        error.show(sys.stderr)
        return int(error.exit_code)
    said = error.format_message().rstrip(".")
    option = str(getattr(error, "option_name", None) or "").lstrip("-")
    if "." in option:
        said += f". Overrides have no dashes: {option.partition('=')[0]}=VALUE"
    usage = "; usage: " + " ".join(error.ctx.get_usage().removeprefix("Usage: ").split()) if error.ctx else ""
    command = error.ctx.command_path if error.ctx else "hf-fasttrain"
    echo(f"error: {command}: {said[:1].lower()}{said[1:]}{usage}; `{command} --help` explains them", err=True)
    return int(error.exit_code)


def _leave_processes() -> None:
    """Destroy the process group, if there is one."""
    if (distributed := sys.modules.get("hf_fasttrain.train.distributed")) is not None:
        distributed.destroy_process_group()


@contextlib.contextmanager
def _system_errors_as_messages() -> Iterator[None]:
    """Turn an error of the system (files, memory, threads) in any command into a message."""
    try:
        yield
    except BrokenPipeError:
        raise
    except (OSError, MemoryError, RuntimeError, ImportError) as error:
        explained = explain_system_error(error)
        if explained is None:
            raise
        explained.on_every_process = False
        raise explained from None
