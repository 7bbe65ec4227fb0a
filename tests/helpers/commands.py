"""Commands that messages suggest, read by the real parser of the command line."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

from typer.main import get_command

from hf_fasttrain.cli.app import app, with_command
from hf_fasttrain.recipe.load import load_recipe


def suggested(text: str) -> list[list[str]]:
    """Return the arguments of each command in a text: in backticks, or up to the end of its line."""
    return [shlex.split(command) for command in re.findall(r"hf-fasttrain ([^`\n]+)", text)]


def require_accepted(arguments: list[str]) -> None:
    """Raise an error unless the command line accepts a command, and its recipe its overrides."""
    group = get_command(app)
    with group.make_context("hf-fasttrain", with_command(arguments)) as context:
        name, command, rest = group.resolve_command(context, [*context._protected_args, *context.args])
        with command.make_context(name, rest, parent=context) as parsed:
            recipe, overrides = parsed.params.get("recipe"), parsed.params.get("overrides")
            if recipe not in (None, "RECIPE"):
                load_recipe(recipe, overrides or [])
            if "run" in parsed.params:
                assert Path(parsed.params["run"]).is_dir()
