"""Prints messages and JSON, cleaned: names in them may be a stranger's. Tables and bars: terminal.py.

No other module prints; a test requires it.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from hf_fasttrain.utils.clean import message, without_secrets


def echo(text: str, *, err: bool = False) -> None:
    """Print a message on standard output, or standard error."""
    print(message(text), file=sys.stderr if err else sys.stdout)


def echo_json(values: Any, indent: int | None = None) -> None:
    """Print values as JSON, in which all that is not ASCII is escaped."""
    print(without_secrets(json.dumps(values, indent=indent)))
