"""Tables, bars and texts in a terminal, cleaned: names in them may be a stranger's. Messages alone: printing.py.

No other module makes a console or a table of rich; a test requires it.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterable, Sequence
from typing import IO, Any, cast

from rich.console import Console, ConsoleOptions, JustifyMethod, RenderableType, RenderResult
from rich.segment import Segment, SegmentLines
from rich.table import Table
from rich.text import Text

from hf_fasttrain.utils.clean import message, one_line, printable, without_secrets
from hf_fasttrain.utils.streams import PrintableStream

LONGEST_KEY = 44  # characters; the recipe's longest key has 38
LEAST_WIDTH = 8  # characters of a column of a streamed table
ROOM = 11  # characters of each other column, without which long keys are folded too


class Terminal(Console):
    """rich's console, which shows texts as they are, without markup, but cleaned."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**{"highlight": False, "markup": False, "emoji": False, **options})

    @property
    def file(self) -> IO[str]:
        """The stream that is written to, in any encoding."""
        return cast("IO[str]", PrintableStream(super().file))

    @file.setter
    def file(self, stream: IO[str]) -> None:
        Console.file.fset(self, stream)  # type: ignore[attr-defined]

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


class _KeyTable(Table):
    """A table whose first column is narrowed last: rich narrows the widest ones first, and would cut keys in two."""

    key_width = 0

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        has_room = self.key_width + ROOM * (len(self.columns) - 1) < options.max_width
        self.columns[0].no_wrap = self.key_width <= LONGEST_KEY and has_room
        yield from super().__rich_console__(console, options)


def build_table(
    header: Sequence[str],
    rows: Iterable[Sequence[str]],
    *,
    title: str | None = None,
    right: Collection[int] = (),
    ends: Collection[int] = (),
) -> Table:
    """Return a table of cleaned texts; long ones are wrapped, not cut.

    A first column of keys, or of other short texts, stays in one piece if the others have ROOM beside it. `right` are
    the indices of columns that are aligned at the right, `ends` of rows with a line below.
    """
    table = _KeyTable(title=None if title is None else Text(_cell(title)), title_justify="left")
    cells = [[_cell(text) for text in row] for row in rows]
    table.key_width = max((len(row[0]) for row in cells), default=0)
    for number, name in enumerate(header):
        justify: JustifyMethod = "right" if number in right else "left"
        table.add_column(Text(_cell(name)), justify=justify, overflow="fold")
    for number, row in enumerate(cells):
        table.add_row(*map(Text, row), end_section=number in ends)
    return table


class StreamedTable:
    """A table that is printed piece by piece, as its rows come; `lengths` are those of each column's longest cell.

    Widths are fixed before the first row: the last column gets its length, the others share what is left, those on the
    left first. Longer cells are folded.
    """

    def __init__(self, terminal: Terminal, header: Sequence[str], lengths: Sequence[int]) -> None:
        self.terminal, self.header = terminal, header
        room = terminal.width - 3 * len(header) - 1 - lengths[-1]
        self.widths = [*_shared([max(pair) for pair in zip(lengths, map(len, header), strict=True)][:-1], room)]
        self.widths.append(max(lengths[-1], len(header[-1])))
        self._bottom: list[Segment] | None = None

    def add(self, rows: Sequence[Sequence[str]]) -> None:
        """Print rows, below the header if they are the first."""
        if not rows:
            return
        table = build_table(self.header, rows)
        for column, width in zip(table.columns, self.widths, strict=True):
            column.width = width
        lines = self.terminal.render_lines(table, pad=False)
        self.terminal.print(SegmentLines(lines[3 if self._bottom else 0 : -1], new_lines=True), end="")
        self._bottom = lines[-1]

    def close(self) -> None:
        """Print the table's end, if it has rows."""
        if self._bottom is not None:
            self.terminal.print(SegmentLines([self._bottom], new_lines=True), end="")


def _shared(lengths: Sequence[int], room: int) -> Iterable[int]:
    """Yield widths for columns of such lengths: at least a fair share of the room, more if others need less."""
    for number, length in enumerate(lengths):
        later = lengths[number + 1 :]
        fair = room // (len(later) + 1)
        width = min(length, max(LEAST_WIDTH, fair, room - sum(later)))
        yield width
        room -= width


def _cell(text: str) -> str:
    return one_line(without_secrets(text))
