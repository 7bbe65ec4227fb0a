"""Writes the table of all keys in docs/recipes.md, from the schema of recipes.

python docs/make_recipe_table.py            write it
python docs/make_recipe_table.py --check    exit status 1 if it is out of date
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from generated import update_page

from hf_fasttrain.recipe.load import json_schema
from hf_fasttrain.utils.duration import Duration

PAGE = Path(__file__).parent / "recipes.md"


def key_tables(schema: dict[str, Any]) -> str:
    """Return a table of keys for each section of the schema, each with its heading."""
    sections: dict[str, list[str]] = {"": []}
    for name, field in schema["properties"].items():
        part = _section(field, schema)
        if part is None:
            sections[""].append(_row(name, field, schema))
        else:
            sections[name] = _rows(part, schema)
            if "description" in field:  # a section that is off by default
                sections[name].insert(0, _row("", field, schema, text=f"the whole section: {field['description']}"))
    head = "| key | value | default | tag | meaning |\n| --- | --- | --- | --- | --- |"
    return "\n\n".join(f"### {name or 'top level'}\n\n{head}\n" + "\n".join(rows) for name, rows in sections.items())


def _rows(section: dict[str, Any], schema: dict[str, Any], above: str = "") -> list[str]:
    rows = []
    for name, field in section["properties"].items():
        required = name in section.get("required", ())
        rows.append(_row(above + name, field, schema, required=required))
        part = _section(field, schema)
        if part is not None:
            rows += _rows(part, schema, f"{above}{name}.")
    return rows


def _row(name: str, field: dict[str, Any], schema: dict[str, Any], *, required: bool = False, text: str = "") -> str:
    """Return a line of the table; `name` is empty for a section as a whole."""
    default = "required" if required else f"`{_plain(field['default'])}`" if "default" in field else "required"
    cells = (f"`{name}`" if name else "", _values(field, schema), default, field.get("tag", ""))
    meaning = (text or field.get("description", "")).replace("|", "\\|")
    return f"| {' | '.join(cells)} | {meaning} |"


def _section(field: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any] | None:
    """Return the section that a field is, or may be; None for a plain value."""
    for option in (field, *field.get("anyOf", ()), *field.get("allOf", ())):
        if "$ref" in option:
            found: dict[str, Any] = schema["$defs"][option["$ref"].rsplit("/", 1)[-1]]
            return found
    return None


def _values(field: dict[str, Any], schema: dict[str, Any]) -> str:
    """Return what a key may be, as words: values in code, types by name, with their limits."""
    if _section(field, schema) is not None:
        nullable = any(option.get("type") == "null" for option in field.get("anyOf", ()))
        return "section or `null`" if nullable else "section"
    options = field.get("anyOf") or [field]
    return ", ".join(
        _value({**option, "examples": option.get("examples", field.get("examples"))}) for option in options
    )


def _value(option: dict[str, Any]) -> str:
    if "const" in option:
        return f"`{_plain(option['const'])}`"
    if "enum" in option:
        return ", ".join(f"`{_plain(value)}`" for value in option["enum"])
    kind = option.get("type", "")
    if kind == "null":
        return "`null`"
    if kind == "array":
        return f"list of {_value(option['items'])}"
    if "pattern" in option:
        examples = [example for example in option["examples"] or () if example not in ("auto", 0)]
        return "such as " + ", ".join(f"`{example}`" for example in examples)
    names = {
        "string": "text",
        "number": "number",
        "integer": "integer",
        "boolean": "`true`, `false`",
        "object": "mapping",
    }
    return names[kind] + _limits(option)


def _limits(option: dict[str, Any]) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [
        f"{sign} {_plain(option[key])}" for key, sign in signs.items() if key in option and abs(option[key]) < 2**53
    ]
    return f" {', '.join(limits)}" if limits else ""


def _plain(value: Any) -> str:
    """Return a value as a recipe has it."""
    if isinstance(value, dict) and value.keys() == {"count", "unit"}:
        return str(Duration(**value))
    return value if isinstance(value, str) else json.dumps(value)


if __name__ == "__main__":
    update_page(PAGE, "keys", lambda: key_tables(json_schema()), Path(__file__).name)
