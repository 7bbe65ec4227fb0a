"""The command `explain`: what a key of a recipe means."""

from __future__ import annotations

import shlex
import shutil
import textwrap
from typing import TYPE_CHECKING, Annotated

import typer

from hf_fasttrain.utils.errors import UserError, nearest
from hf_fasttrain.utils.printing import echo

if TYPE_CHECKING:
    from hf_fasttrain.recipe.explain import Key

TAGS = {
    "result": "result: changes what is learned; a resumed run must keep it",
    "speed": "speed: changes only speed and memory; may change when a run is resumed",
    "output": "output: changes only what is measured, written and shown; may change when a run is resumed",
}


def explain(
    key: Annotated[
        str | None, typer.Argument(help="A key such as data.workers, or a section such as data; without one, all.")
    ] = None,
) -> None:
    """Explain a key of recipes: its meaning, allowed values, default and an example."""
    from hf_fasttrain.recipe.explain import all_explained

    keys = all_explained()
    name = (key or "").partition("=")[0].strip().strip(".")
    found = keys.get(name)
    below = [each for each in keys.values() if not each.is_section and each.name.startswith(f"{name}." if name else "")]
    if name and found is None:
        raise UserError(_unknown(name, keys))
    if found is not None and not found.is_section:
        _print(_explained(found))
        return
    if found is not None:
        _print(_explained_section(found))
    width = max(len(each.name) for each in below)
    columns = max(60, min(shutil.get_terminal_size((100, 24)).columns, 120))
    for each in below:
        text = f"{_text(each.meaning)} [{'required' if each.default is None else each.default}]"
        _print(
            textwrap.wrap(text, columns, initial_indent=each.name.ljust(width + 2), subsequent_indent=" " * (width + 2))
        )


def _print(lines: list[str]) -> None:
    for line in lines:
        echo(line)


def _explained(key: Key) -> list[str]:
    values = key.example if key.example is not None else ""
    return [
        key.name,
        f"  meaning  {_text(key.meaning)}",
        f"  allowed  {_text(key.values)}",
        f"  default  {'none: required' if key.default is None else key.default}",
        f"  tag      {TAGS[key.tag]}",
        f"  example  {shlex.quote(f'{key.name}={values}')}",
    ]


def _explained_section(key: Key) -> list[str]:
    default = f"; {key.default} by default" if key.default == "null" else ""
    meaning = f": {_text(key.meaning)}" if key.meaning else ""
    return [f"{key.name}{meaning} ({_text(key.values)}{default})", ""]


def _text(markdown: str) -> str:
    return markdown.replace("`", "")


def _unknown(name: str, keys: dict[str, Key]) -> str:
    from hf_fasttrain.recipe.validate import hint_for

    hint = (nearest(name, keys) if "." in name else "") or hint_for(name)
    return f"'{name}' is not a key of a recipe.{hint} `hf-fasttrain explain` lists all {len(keys)}"
