"""Prints messages and JSON, cleaned: names in them may be a stranger's. Tables and bars: terminal.py.

No other module prints; a test requires it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from typing import Any

from hf_fasttrain.utils.clean import message, without_secrets


def echo(text: str, *, err: bool = False) -> None:
    """Print a message on standard output, or standard error."""
    print(message(text), file=sys.stderr if err else sys.stdout)


def echo_json(values: Any, indent: int | None = None) -> None:
    """Print values as JSON, in which all that is not ASCII is escaped."""
    print(without_secrets(json.dumps(values, indent=indent)))


class JsonLines:
    """Prints each item as one line of JSON."""

    def add(self, items: Iterable[Any]) -> None:
        """Print more items."""
        for item in items:
            echo_json(item)

    def close(self) -> None:
        """Do nothing: no line is pending."""


class JsonList:
    """Prints the items of a JSON list as they come: what `echo_json(items, indent=2)` prints of all of them."""

    def __init__(self) -> None:
        self._is_empty = True

    def add(self, items: Iterable[Any]) -> None:
        """Print more items."""
        for item in items:
            text = without_secrets(json.dumps([item], indent=2))[1:-2]  # between the brackets
            print(("[" if self._is_empty else ",") + text, end="")
            self._is_empty = False

    def close(self) -> None:
        """Print the end of the list."""
        print("[]" if self._is_empty else "\n]")
