"""The command `init`: looks at images and this machine, and writes a recipe for them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from hf_fasttrain.cli.terminal import command_line, exit_on_ctrl_c, print_note
from hf_fasttrain.utils.errors import UserError
from hf_fasttrain.utils.printing import echo

SUFFIXES = (".yaml", ".yml")


def init(
    folder: Annotated[
        str,
        typer.Argument(help="Your images: whatever data.dataset takes, such as a folder with one folder per class."),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Recipe file to write; by default FOLDER's name, .yaml, here.")
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(help="Pretrained weights: a .safetensors file, a model or run folder, or hf://OWNER/NAME."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="Model, as model.name takes it; by default chosen.")] = None,
) -> None:
    """Look at your images and this machine, and write a commented recipe that trains as it is.

    A few real training steps forecast time and memory.
    """
    path = output or Path(f"{default_name(folder)}.yaml")
    require_new_recipe(path)
    from hf_fasttrain.study import init_recipe
    from hf_fasttrain.study.init_forecast import forecast
    from hf_fasttrain.study.init_survey import survey, this_machine
    from hf_fasttrain.utils.files import reason, write_atomically

    with exit_on_ctrl_c():
        data, machine = survey(folder), this_machine()
        found = init_recipe.find_weights(machine, model, weights)
        run = init_recipe.free_run_folder(path.stem)
        recipe = init_recipe.draft(data, machine, found, run=run)
        facts = {"data": data.lines(), "machine": [machine.line()], "weights": [found.line]}
        for topic, texts in facts.items():
            _print(topic, texts)
        print_note("training a few steps, to forecast time and memory")
        loaded = init_recipe.checked(init_recipe.text_of(recipe, ()), path)
        measured = forecast(loaded, has_weights=found.is_here)
    facts["forecast"] = [measured.line() if measured else "a step did not fit in this GPU's memory: it is split then"]
    _print("forecast", facts["forecast"])
    commands = init_recipe.next_commands(path, run)
    facts["next"] = [command for command, _ in commands]
    header = init_recipe.header_of(data, command=command_line(), facts=facts, base=recipe.base.value)
    text = init_recipe.text_of(recipe, header)
    init_recipe.checked(text, path)
    require_new_recipe(path)  # measuring took a while
    try:
        write_atomically(path, text)
    except OSError as error:
        raise UserError(f"{path}: can't be written: {reason(error)}; give another file with -o") from None
    echo(f"{path}: written, from the recipe {recipe.base.value} ({recipe.base.reason})")
    for key, why in recipe.reasons.items():
        if why:
            echo(f"  {key}: {why}")
    echo("next:")
    width = max(len(command) for command, _ in commands)
    for command, what in commands:
        echo(f"  {command:<{width}}  # {what}")


def default_name(dataset: str) -> str:
    """Return the name of a dataset for a file: of its folder, file or repository."""
    path = os.path.realpath(dataset) if os.path.basename(dataset) in ("", ".", "..") else dataset
    name = Path(path).name.lstrip("-.") or "recipe"
    return Path(name).stem if os.path.isfile(path) else name


def require_new_recipe(path: Path) -> None:
    """Raise UserError unless a recipe can be written to a new file."""
    if os.path.isdir(path):
        raise UserError(f"{path}: is a folder; give a file to write with -o FILE.yaml")
    if os.path.lexists(path):
        raise UserError(f"{path}: exists already, and is not overwritten; give another file with -o FILE.yaml")
    if path.suffix not in SUFFIXES:
        raise UserError(f"{path}: a recipe's name ends in {' or '.join(SUFFIXES)}; give another file with -o FILE.yaml")
    if not path.absolute().parent.is_dir():
        raise UserError(f"{path}: can't be written: {path.absolute().parent} is not a folder; give another with -o")


def _print(topic: str, texts: list[str]) -> None:
    for number, text in enumerate(texts):
        echo(f"{topic if number == 0 else '':<9} {text}")
