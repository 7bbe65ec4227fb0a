"""The command `doctor`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_fasttrain.cli.arguments import Overrides, RecipeArgument
from hf_fasttrain.cli.terminal import exit_on_ctrl_c, print_note
from hf_fasttrain.utils.printing import echo_json


def doctor(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    seconds: Annotated[float, typer.Option(min=1.0, help="Time budget in seconds.")] = 60.0,
    trace: Annotated[
        Path | None, typer.Option(help="File for a trace of some steps by torch's profiler (Chrome's format).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show where training time goes on this machine, and measure which overrides help."""
    from hf_fasttrain.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from hf_fasttrain.study.doctor import doctor as examine
    from hf_fasttrain.study.doctor import print_diagnosis
    from hf_fasttrain.study.techniques import hardware
    from hf_fasttrain.utils.terminal import wide_terminal

    with exit_on_ctrl_c():
        diagnosis = examine(loaded, hardware(), seconds=seconds, note=print_note, trace=trace)
    if as_json:
        echo_json(diagnosis.as_json(), indent=2)
    else:
        print_diagnosis(wide_terminal(), diagnosis)
