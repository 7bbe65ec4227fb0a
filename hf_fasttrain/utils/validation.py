"""Mistakes that pydantic finds, as messages."""

from __future__ import annotations

from pydantic import ValidationError

from hf_fasttrain.utils.clean import cut, one_line
from hf_fasttrain.utils.errors import shown


def first_mistake(error: ValidationError) -> str:
    """Return in one line what is wrong first, and how much more."""
    found = error.errors(include_url=False)
    first, more = found[0], len(found) - 1
    key = one_line(cut(".".join(map(str, first["loc"])), 100)) or "it"
    what = first["msg"].replace("Input should be", "must be").replace("Field required", "is missing")
    what = "is unknown" if first["type"] == "extra_forbidden" else what
    got = "" if first["type"] in ("missing", "extra_forbidden") else f" is {shown(first['input'])};"
    return f"{key}{got} {what}" + (f", and {more} more" if more else "")
