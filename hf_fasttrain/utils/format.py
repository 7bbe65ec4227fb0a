"""Numbers as text: durations, sizes, rates and percentages are printed the same everywhere.

Sizes are decimal (1 GB is 10**9 bytes), as disks, downloads, the Hub and the recipe's own `data.cache_gb` count them:
numbers of different commands can be compared, and copied into a recipe. Tools that count in GiB (torch's out-of-memory
errors, nvidia-smi) show numbers that are 7 % lower.

Every function accepts values read from files of older or broken runs: None and values that are not numbers give
`NOTHING`, NaN and infinity their names. This module imports nothing from the package, and no torch.
"""

from __future__ import annotations

import math
import shlex
from numbers import Real
from typing import Any, TypeGuard

NOTHING = "–"
_UNITS = ("B", "kB", "MB", "GB", "TB", "PB")


def is_finite(value: Any) -> TypeGuard[float]:
    """Return whether a value is a finite number, of Python or NumPy; a bool does not count."""
    try:
        return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an integer beyond the largest float, of a damaged file
        return False


def _not_finite(value: Any) -> str:
    return str(value) if isinstance(value, float) else NOTHING


def format_number(value: Any, digits: int = 4) -> str:
    """Return a number with `digits` significant digits and thousands separators; integers are never rounded."""
    if not is_finite(value):
        return NOTHING if value is None else str(value)
    if float(value).is_integer() or abs(value) >= 10**digits:
        return f"{value:,.0f}"
    return f"{value:,.{digits}g}"


def format_count(count: int, one: str, many: str | None = None) -> str:
    """Return a count with its noun: "1 image", "2,000 images"."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def format_duration(seconds: Any, digits: int = 1) -> str:
    """Return a duration: "4.2 s", "3 min 05 s", "2 h 07 min"; `digits` are those of the seconds below a minute."""
    if not is_finite(seconds):
        return _not_finite(seconds)
    if seconds < 0:
        return f"-{format_duration(-seconds, digits)}"
    if round(seconds, digits) < 60:
        return f"{seconds:.{digits}f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours:,} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def format_bytes(num_bytes: Any) -> str:
    """Return a number of bytes with three significant digits: "512 B", "21.4 MB", "1.50 GB"."""
    if not is_finite(num_bytes):
        return _not_finite(num_bytes)
    scaled, unit = float(num_bytes), _UNITS[0]
    for unit in _UNITS:
        if abs(scaled) < 999.5 or unit == _UNITS[-1]:
            break
        scaled /= 1000
    if unit == _UNITS[0]:
        return f"{scaled:.0f} B"
    digits = 2 if abs(scaled) < 9.995 else 1 if abs(scaled) < 99.95 else 0
    return f"{scaled:,.{digits}f} {unit}"


def format_rate(per_second: Any) -> str:
    """Return a rate without its unit, with three significant digits: "1,230", "56.7", "4.20", "0.0421"."""
    if not is_finite(per_second):
        return _not_finite(per_second)
    rounded = float(f"{per_second:.3g}")
    decimals = 2 - math.floor(math.log10(abs(rounded))) if rounded else 0
    return f"{rounded:,.{max(0, decimals)}f}"


def format_images_rate(per_second: Any) -> str:
    """Return a rate of images with its unit."""
    return f"{format_rate(per_second)} images/s"


def format_percent(share: Any, digits: int = 1) -> str:
    """Return a share in percent, with up to 2 digits where a share below 1 would round to 100%."""
    if not is_finite(share):
        return _not_finite(share)
    if share in (0, 1):
        return f"{share:.0%}"
    while digits < 2 and share < 1 and f"{share:.{digits}%}" == f"{1:.{digits}%}":
        digits += 1
    return f"{min(share, 0.9999) if share < 1 and digits == 2 else share:.{digits}%}"


def format_interval(median: float, low: float, high: float) -> str:
    """Return a ratio with its interval: "1.25 (1.20 - 1.31)"."""
    return f"{median:.2f} ({low:.2f} - {high:.2f})"


def format_command(*arguments: object) -> str:
    """Return a command of `hf-fasttrain` as it can be typed in a shell."""
    return shlex.join(["hf-fasttrain", *map(str, arguments)])
