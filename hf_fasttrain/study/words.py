"""Figures as people read them."""

from __future__ import annotations


def rate(images_per_second: float) -> str:
    """Return images a second."""
    return f"{images_per_second:,.0f}" if images_per_second >= 100 else f"{images_per_second:.1f}"


def clock(seconds: float) -> str:
    """Return a length of time."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"
