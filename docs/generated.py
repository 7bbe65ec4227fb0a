"""Keeps what is generated in a page of the docs, between two marks, up to date: for the programs make_*.py."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path


def update_page(page: Path, mark: str, make: Callable[[], str], script: str) -> None:
    """Write `make()` between the marks of a page. With --check, end with exit status 1 if that would change it."""
    text = page.read_text(encoding="utf-8")
    begin, end = f"<!-- {mark} -->", f"<!-- /{mark} -->"
    before, _, rest = text.partition(begin)
    _, _, after = rest.partition(end)
    new = f"{before}{begin}\n\n{make()}\n\n{end}{after}"
    if "--check" in sys.argv[1:]:
        sys.exit(0 if new == text else f"{page.name} is out of date: python docs/{script}")
    page.write_text(new, encoding="utf-8")
