"""Which caches of decoded pixels go without being asked for: those not used for a month, and those beyond a total.

A cache that a process has open stays: it holds a shared lock on the cache's description (cache_locks.py).
"""

from __future__ import annotations

import os
import re
import shutil
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from hf_fasttrain.data.pixels.cache import UNFINISHED, CacheEntry, list_caches
from hf_fasttrain.data.pixels.cache_locks import is_in_use, lock_for_removal
from hf_fasttrain.utils.errors import DataError
from hf_fasttrain.utils.files import reason, write_atomically
from hf_fasttrain.utils.format import format_bytes, format_count

UNUSED_DAYS = 30.0
UNFINISHED_DAYS = 1.0  # after which nothing creates a cache any more
LIMIT_FILE = "max_gb"  # in the folder of caches; without it, the limit is half of what the disk has for them
_DAY = 86400.0


def read_limit(folder: Path) -> float | None:
    """Return the limit of all caches in a folder that the user has set, in GB; None: half of the disk."""
    try:
        with (folder / LIMIT_FILE).open(encoding="ascii") as file:
            text = file.read(40).strip()
    except (OSError, ValueError):
        return None
    return float(text) if re.fullmatch(r"\d{1,12}(\.\d{1,12})?", text) else None


def write_limit(folder: Path, gigabytes: float | None) -> None:
    """Set the limit of all caches in a folder. DataError if that can't be written."""
    try:
        if gigabytes is None:
            (folder / LIMIT_FILE).unlink(missing_ok=True)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_atomically(folder / LIMIT_FILE, f"{gigabytes:.12f}\n".encode())
    except OSError as error:
        raise DataError(f"{folder / LIMIT_FILE}: can't be written: {reason(error)}; choose another folder") from None


def limit_bytes(folder: Path, entries: Iterable[CacheEntry], free: int) -> int:
    """Return how many bytes all caches of a folder may take: what the user has set, or half of free and kept bytes."""
    limit = read_limit(folder)
    if limit is not None:
        return int(limit * 1e9)
    return (free + sum(entry.num_bytes for entry in entries)) // 2


def room_for(folder: Path, own: Path, free: int) -> int:
    """Return by how many bytes the cache `own` may grow, if all others go that are not in use."""
    entries = _entries(folder)
    staying = sum(entry.num_bytes for entry in entries if entry.path == own or is_in_use(entry.path))
    removable = sum(entry.num_bytes for entry in entries) - staying
    return max(0, min(limit_bytes(folder, entries, free) - staying, free + removable))


def _entries(folder: Path) -> list[CacheEntry]:
    """Return the caches in a folder; none if it can't be read, which is an error only where one is written."""
    try:
        return list_caches(folder)
    except OSError:
        return []


def remove_unused(entries: Iterable[CacheEntry]) -> list[CacheEntry]:
    """Delete the caches that were not used for UNUSED_DAYS, and return them; none that is in use."""
    now = time.time()
    days = {True: UNFINISHED_DAYS, False: UNUSED_DAYS}
    old = [each for each in entries if each.last_used < now - _DAY * days[each.path.name.startswith(UNFINISHED)]]
    return [entry for entry in old if _remove(entry)]


def remove_beyond(entries: Iterable[CacheEntry], excess: int) -> list[CacheEntry]:
    """Delete caches in their order until `excess` bytes are freed, and return them; none that is in use."""
    removed: list[CacheEntry] = []
    for entry in entries:
        if sum(each.num_bytes for each in removed) >= excess:
            break
        if not entry.path.name.startswith(UNFINISHED) and _remove(entry):
            removed.append(entry)
    return removed


def make_room(
    folder: Path, own: Path, needed: int, free: int, is_same_data: Callable[[CacheEntry], bool]
) -> str | None:
    """Delete what is unused, and what keeps `own` from growing by `needed` bytes; return a note of it, None if nothing.

    Caches of the same data are never too old, and are the last ones to go for others.
    """
    entries = [entry for entry in _entries(folder) if entry.path != own]
    unused = remove_unused(entry for entry in entries if not is_same_data(entry))
    every = _entries(folder)
    limit = limit_bytes(folder, every, free + sum(entry.num_bytes for entry in unused))
    total = sum(entry.num_bytes for entry in every)
    oldest = sorted((each for each in every if each.path != own), key=lambda each: (is_same_data(each), each.last_used))
    return removal_note(unused, remove_beyond(oldest, total + needed - limit), limit)


def removal_note(unused: list[CacheEntry], beyond: list[CacheEntry], limit: int) -> str | None:
    """Return what was deleted and why, in one line; None if nothing was."""
    if not unused and not beyond:
        return None
    freed = format_bytes(sum(entry.num_bytes for entry in [*unused, *beyond]))
    reasons = [f"{format_count(len(unused), 'cache')} not used for {UNUSED_DAYS:g} days"] if unused else []
    reasons += [f"{format_count(len(beyond), 'cache')} beyond {format_bytes(limit)} of all"] if beyond else []
    names = ", ".join(dict.fromkeys(entry.dataset for entry in [*unused, *beyond]))
    return f"decoded pixels kept on disk were deleted, {freed}: {' and '.join(reasons)} ({names}); `hf-fasttrain cache`"


def keep_limit(folder: Path, free: int) -> list[CacheEntry]:
    """Delete the caches that are beyond the limit of a folder, those used last staying; return them."""
    entries = list_caches(folder)
    excess = sum(entry.num_bytes for entry in entries) - limit_bytes(folder, entries, free)
    return remove_beyond(reversed(entries), excess)


def _remove(entry: CacheEntry) -> bool:
    """Delete a cache; return False if a process has it open, or it can't be deleted."""
    with lock_for_removal(entry.path) as may_go:
        if may_go:
            shutil.rmtree(entry.path, ignore_errors=True)
        return may_go and not os.path.exists(entry.path)


def free_disk_bytes(folder: Path) -> int:
    """Return the free bytes of the disk that holds a folder, or will hold it."""
    return shutil.disk_usage(nearest_existing(folder)).free


def nearest_existing(folder: Path) -> Path:
    """Return the folder, or its closest parent that exists."""
    return next((path for path in (folder, *folder.absolute().parents) if path.exists()), Path("/"))
