"""What each key of a recipe means, may be and is by default, from the schema: for `hf-fasttrain explain` and docs/."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from hf_fasttrain.recipe.load import json_schema
from hf_fasttrain.recipe.messages import flow_text
from hf_fasttrain.utils.duration import Duration

Schema = dict[str, Any]
TYPES = {
    "string": "text",
    "number": "number",
    "integer": "integer",
    "boolean": "`true`, `false`",
    "object": "mapping",
}


@dataclass(frozen=True)
class Key:
    """A key of a recipe. `values` and `meaning` are Markdown."""

    name: str  # dotted, such as "data.workers"
    values: str  # that are allowed
    default: str | None  # None: required
    tag: str  # "result", "speed" or "output"; empty for a section that is always there
    meaning: str
    example: str | None  # a value that is not the default; None for a section
    is_section: bool = False


def all_explained() -> dict[str, Key]:
    """Return name -> key for all keys and sections, in the schema's order."""
    schema = json_schema()
    return {key.name: key for key in _keys(schema, schema, "")}


def _keys(section: Schema, schema: Schema, above: str) -> Iterator[Key]:
    for name, field in section["properties"].items():
        inner = _section(field, schema)
        yield _key(above + name, field, inner, is_required=name in section.get("required", ()))
        if inner is not None:
            yield from _keys(inner, schema, f"{above}{name}.")


def _key(name: str, field: Schema, inner: Schema | None, *, is_required: bool) -> Key:
    options = field.get("anyOf") or [field]
    if inner is not None:
        kinds = [option.get("type") for option in options]
        values = f"section{', `true` (its defaults)' * ('boolean' in kinds)}{' or `null`' * ('null' in kinds)}"
        example = None
    else:
        examples = field.get("examples", ())
        items = [option["items"] for option in options if "items" in option]
        values = ", ".join(
            f"{_value(option['items'])} or a list of these"
            if option.get("items") in options
            else _value({**option, "examples": option.get("examples", examples)})
            for option in options
            if option not in items
        )
        example = _example(field, options)
    default = None if is_required or "default" not in field else _text(field["default"])
    meaning = field.get("description", "")
    return Key(name, values, default, field.get("tag", ""), meaning, example, is_section=inner is not None)


def _section(field: Schema, schema: Schema) -> Schema | None:
    """Return the section that a field is, or may be; None for a plain value."""
    for option in (field, *field.get("anyOf", ()), *field.get("allOf", ())):
        if "$ref" in option:
            found: Schema = schema["$defs"][option["$ref"].rsplit("/", 1)[-1]]
            return found
    return None


def _value(option: Schema) -> str:
    if "const" in option:
        return f"`{flow_text(option['const'])}`"
    if "anyOf" in option:
        return " or ".join(map(_value, option["anyOf"]))
    if "enum" in option:
        return ", ".join(f"`{flow_text(value)}`" for value in option["enum"])
    kind = option.get("type", "")
    if kind == "null":
        return "`null`"
    if kind == "array":
        return f"list of {_value(option['items'])}"
    if "pattern" in option:
        examples = [text for text in option["examples"] or () if re.search(option["pattern"], str(text)) and text != 0]
        return "such as " + ", ".join(f"`{example}`" for example in examples)
    if isinstance(of_each := option.get("additionalProperties"), dict):
        return f"mapping to {_value(of_each)}"
    return TYPES[kind] + _limits(option)


def _limits(option: Schema) -> str:
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    limits = [
        f"{sign} {flow_text(option[key])}" for key, sign in signs.items() if key in option and abs(option[key]) < 2**53
    ]
    return f" {', '.join(limits)}" if limits else ""


def _example(field: Schema, options: list[Schema]) -> str:
    """Return a value to write: an example or a choice that is not the default, else the default."""
    default = _text(field.get("default"))
    found = [*field.get("examples", ())]
    for option in options:
        found += [*option.get("examples", ()), *option.get("enum", ())]
        found += [default != "true"] if option.get("type") == "boolean" else []
    return next((text for text in map(flow_text, found) if text not in (default, "auto")), default)


def _text(default: Any) -> str:
    """Return a default as a recipe has it; the schema has durations as mappings."""
    is_duration = isinstance(default, dict) and default.keys() == {"count", "unit"}
    return flow_text(str(Duration(**default)) if is_duration else default)
