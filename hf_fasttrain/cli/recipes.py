"""The command `recipes`: list the shipped recipes, copy one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_fasttrain.recipe.find import recipe_header, shipped_recipes
from hf_fasttrain.utils.errors import UserError, nearest
from hf_fasttrain.utils.printing import echo


def list_recipes(context: typer.Context) -> None:
    """List the shipped recipes with their headers."""
    if context.invoked_subcommand is not None:
        return
    for name, path in shipped_recipes().items():
        echo(name)
        for line in recipe_header(path).splitlines():
            echo(f"    {line}")


def copy_recipe(
    name: Annotated[str, typer.Argument(help="Name of a shipped recipe.")],
    target: Annotated[Path | None, typer.Argument(help="Output file; by default NAME.yaml here.")] = None,
) -> None:
    """Copy a shipped recipe to a file of your own."""
    shipped = shipped_recipes()
    if name not in shipped:
        raise UserError(f"no shipped recipe '{name}'; available are {', '.join(shipped)}.{nearest(name, shipped)}")
    path = target or Path(f"{Path(name).name}.yaml")
    if path.exists():
        raise UserError(f"{path} exists already; give another file to write")
    try:
        path.write_text(shipped[name].read_text(encoding="utf-8"), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{path}: can't be written: {error.strerror}; give another file to write") from None
    echo(str(path))
