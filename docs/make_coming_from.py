"""Writes the tables of docs/coming-from.md, from docs/coming_from.yaml.

python docs/make_coming_from.py            write them
python docs/make_coming_from.py --check    exit status 1 if they are out of date
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from generated import update_page
from ruamel.yaml import YAML

PAGE = Path(__file__).parent / "coming-from.md"
TABLE = Path(__file__).parent / "coming_from.yaml"
Row = dict[str, Any]


def read_table() -> dict[str, Any]:
    """Return the content of coming_from.yaml."""
    table: dict[str, Any] = YAML(typ="safe").load(TABLE.read_text(encoding="utf-8"))
    return table


def listed(row: Row, field: str) -> list[str]:
    """Return a field of a row as a list, which is empty if the field is missing."""
    value = row.get(field, [])
    return value if isinstance(value, list) else [value] if value else []


def python_names(row: Row, python_of: dict[str, str]) -> list[str]:
    """Return the Python names of a row: its `python` field, else that of its first key or of the key's section."""
    if "python" in row:
        return listed(row, "python")
    key = next((text.partition("=")[0] for text in listed(row, "to")), "")
    while key and key not in python_of:
        key = key.rpartition(".")[0]
    return [python_of[key]] if key else []


def tables(table: dict[str, Any]) -> str:
    """Return the sections of the page, one for each source."""
    return "\n\n".join("\n".join(_section(source, table["python_of"])) for source in table["sources"])


def _section(source: dict[str, Any], python_of: dict[str, str]) -> Iterator[str]:
    equivalent = [row for row in source["rows"] if "instead" not in row]
    with_python = source.get("python", False)
    columns = [source["library"], "recipe", *(["Python"] if with_python else []), "what differs"]
    yield f"## {source['title']}\n\n{source['intro']}\n"
    yield from _table(columns, (_cells(row, python_of, with_python=with_python) for row in equivalent))
    yield "\nNo direct equivalent:\n"
    rest = ([_code(listed(row, "from")), row["instead"]] for row in source["rows"] if "instead" in row)
    yield from _table([source["library"], "instead"], rest)


def _cells(row: Row, python_of: dict[str, str], *, with_python: bool) -> list[str]:
    python = [_code(python_names(row, python_of))] if with_python else []
    return [_code(listed(row, "from")), _code(listed(row, "to")), *python, row.get("note", "")]


def _table(columns: list[str], rows: Any) -> Iterator[str]:
    for cells in (columns, ["---"] * len(columns), *rows):
        yield f"| {' | '.join(cells)} |"


def _code(names: list[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


if __name__ == "__main__":
    update_page(PAGE, "tables", lambda: tables(read_table()), Path(__file__).name)
