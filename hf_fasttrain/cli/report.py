"""The command `report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_fasttrain.utils.printing import echo


def report(
    runs: Annotated[list[Path], typer.Argument(help="Run folders; several are compared in one report.")],
    output: Annotated[
        Path | None, typer.Option(help="Output file; by default RUN/report.html, for several report.html.")
    ] = None,
) -> None:
    """Write an offline HTML report of one or several runs: curves, classes, mistakes, settings; whether runs differ."""
    from hf_fasttrain.report.report import write_report

    echo(str(write_report(runs, output, echo)))
