"""The command `ablate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from hf_fasttrain.cli.arguments import Overrides, RecipeArgument
from hf_fasttrain.cli.terminal import command_line, exit_on_ctrl_c, print_note
from hf_fasttrain.utils.errors import Stopped, UserError

TechniqueNames = Annotated[str | None, typer.Option(metavar="NAME,NAME", help="Names of techniques.")]


def ablate(
    recipe: RecipeArgument,
    overrides: Overrides = None,
    rounds: Annotated[int, typer.Option(min=1, help="Measurements of each arm; 6 or more give 95 % intervals.")] = 6,
    seconds: Annotated[float, typer.Option(min=0.0, help="Minimum length of a measurement.")] = 2.0,
    only: TechniqueNames = None,
    without: TechniqueNames = None,
    full: Annotated[bool, typer.Option("--full", help="Afterwards train every arm to the end.")] = False,
    seeds: Annotated[int, typer.Option(min=1, help="With --full: training runs of each arm.")] = 3,
    output: Annotated[Path | None, typer.Option(help="Output folder; by default a new one in ablations/.")] = None,
) -> None:
    """Measure what each technique contributes (accumulation, mixed precision, pinned memory, ...) on this machine."""
    from hf_fasttrain.recipe.load import load_recipe

    loaded = load_recipe(recipe, overrides or [])
    from hf_fasttrain.study import ablate as study
    from hf_fasttrain.study.ablate_full import train_all
    from hf_fasttrain.study.ablate_report import print_ablation, write_ablation
    from hf_fasttrain.utils.terminal import wide_terminal

    folder, console = output or study.default_folder(loaded), wide_terminal()
    plan = study.Plan(rounds, seconds, _names(only), _names(without))
    ablation = study.load_earlier(folder, loaded) if full else None
    complete = True
    if ablation is None:
        study.require_new(folder)
        with exit_on_ctrl_c():  # nothing to keep so far
            ablation, complete = study.ablate(loaded, plan, command=command_line(), note=print_note)
        write_ablation(ablation, folder)
    if full and complete:
        with exit_on_ctrl_c():
            ablation, complete = train_all(ablation, recipe, folder, seeds, print_note)
            write_ablation(ablation, folder)
    print_ablation(console, ablation)
    console.print(f"{folder}: ablation.json, .md, .png, .svg, .html")
    if not complete:
        sys.exit(Stopped.CTRL_C)
    if full and not any(row.full for row in ablation.rows):
        raise UserError(f"no training finished; see {folder}/runs/*.log")


def _names(text: str | None) -> tuple[str, ...]:
    return tuple(name.strip() for name in (text or "").split(",") if name.strip())
