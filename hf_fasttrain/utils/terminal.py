"""Tables, bars and texts in a terminal, cleaned: names in them may be a stranger's. Messages alone: printing.py.

No other module makes a console or a table of rich; a test requires it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from hf_fasttrain.utils.clean import message, one_line, printable, without_secrets


class Terminal(Console):
    """rich's console, which shows texts as they are, without markup, but cleaned."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "markup": False, "emoji": False, **options})

    def print(self, *objects: Any, **options: Any) -> None:
        """Print texts, cleaned as messages, tables and bars."""
        super().print(*(message(each) if isinstance(each, str) else each for each in objects), **options)

    def print_line(self, text: str) -> None:
        """Print a text, which the terminal wraps itself: it stays one line in a file."""
        self.print(text, soft_wrap=True)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Give the parts of what is printed; texts within tables and bars are cleaned here, and only here."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(printable(segment.text), segment.style)


def wide_terminal() -> Terminal:
    """Return a terminal that is 160 columns wide if stdout is none."""
    return Terminal(width=None if sys.stdout.isatty() else 160)


def build_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    right: Collection[int] = (),
    ends: Collection[int] = (),
) -> Table:
    """Return a table of cleaned texts; long ones are wrapped, not cut.

    `right` are the indices of columns that are aligned at the right, `ends` of rows with a line below.
    """
    table = Table(title=None if title is None else Text(_cell(title)), title_justify="left")
    for number, name in enumerate(header):
        table.add_column(Text(_cell(name)), justify="right" if number in right else "left", overflow="fold")
    for number, row in enumerate(rows):
        table.add_row(*(Text(_cell(text)) for text in row), end_section=number in ends)
    return table


def _cell(text: str) -> str:
    return one_line(without_secrets(text))
