"""The command `tune`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_fasttrain.cli.arguments import Overrides, RecipeArgument
from hf_fasttrain.cli.terminal import command_line, exit_on_ctrl_c, print_note
from hf_fasttrain.utils.errors import Stopped


def tune(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    budget: Annotated[str, typer.Option(help="Time budget: 3m, 90s, 1h.")] = "3m",
    output: Annotated[Path | None, typer.Option(help="Recipe file to write; by default NAME.tuned.yaml.")] = None,
    store: Annotated[bool, typer.Option(help="Store the result for `auto` on this machine.")] = True,
) -> None:
    """Find the fastest settings for a recipe on this machine, and write them as a recipe."""
    from hf_fasttrain.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from hf_fasttrain.study.techniques import hardware
    from hf_fasttrain.study.tune import parse_budget
    from hf_fasttrain.study.tune import tune as search
    from hf_fasttrain.study.tune_recipe import default_path, print_tuning, require_new_file, write_tuned
    from hf_fasttrain.utils.terminal import wide_terminal

    path, seconds = output or default_path(loaded), parse_budget(budget)
    require_new_file(path)
    with exit_on_ctrl_c():  # nothing to keep so far
        result = search(loaded, seconds, hardware(), note=print_note)
    for problem in write_tuned(loaded, result, path, command=command_line(), store=store):
        print_note(problem)
    print_tuning(wide_terminal(), result, path)
    if not result.complete:
        sys.exit(Stopped.CTRL_C)
