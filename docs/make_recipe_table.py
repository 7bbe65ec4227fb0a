"""Writes the table of all keys in docs/recipes.md, from the schema of recipes.

python docs/make_recipe_table.py            write it
python docs/make_recipe_table.py --check    exit status 1 if it is out of date
"""

from __future__ import annotations

from pathlib import Path

from generated import update_page

from hf_fasttrain.recipe.explain import Key, all_explained

PAGE = Path(__file__).parent / "recipes.md"


def key_tables() -> str:
    """Return a table of keys for each section of the schema, each with its heading."""
    sections: dict[str, list[str]] = {"": []}
    for key in all_explained().values():
        section, _, below = key.name.partition(".")
        if below:
            sections[section].append(_row(key, below))
        elif not key.is_section:
            sections[""].append(_row(key, key.name))
        else:
            sections[section] = [_row(key, "", f"the whole section: {key.meaning}")] if key.meaning else []
    head = "| key | value | default | tag | meaning |\n| --- | --- | --- | --- | --- |"
    return "\n\n".join(f"### {name or 'top level'}\n\n{head}\n" + "\n".join(rows) for name, rows in sections.items())


def _row(key: Key, name: str, meaning: str = "") -> str:
    """Return a line of the table; `name` is empty for a section as a whole."""
    default = "required" if key.default is None else f"`{key.default}`"
    text = (meaning or key.meaning).replace("|", "\\|")
    return f"| {f'`{name}`' if name else ''} | {key.values} | {default} | {key.tag} | {text} |"


if __name__ == "__main__":
    update_page(PAGE, "keys", key_tables, Path(__file__).name)
