"""The option --version."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_fasttrain import __version__
from hf_fasttrain.utils.printing import echo


def print_version(is_set: bool) -> None:
    """Print the version and exit."""
    if is_set:
        echo(f"hf_fasttrain {__version__}")
        raise typer.Exit


def common_options(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Accept the options before a command."""
