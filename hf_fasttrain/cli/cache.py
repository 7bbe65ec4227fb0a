"""The command `cache`: list or delete the decoded pixels cached on disk."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hf_fasttrain.utils.errors import DataError
from hf_fasttrain.utils.format import format_bytes
from hf_fasttrain.utils.printing import echo

if TYPE_CHECKING:
    from hf_fasttrain.data.pixels.cache import CacheEntry

CacheFolder = Annotated[Path | None, typer.Option("--dir", help="Folder of the caches, if data.cache_dir is set.")]


def list_caches(
    context: typer.Context,
    folder: CacheFolder = None,
    max_gb: Annotated[
        str | None,
        typer.Option(help="From now on, keep at most so many GB; auto: half of what is free and kept on the disk."),
    ] = None,
) -> None:
    """List the decoded pixels cached on disk, the most recently used first."""
    if context.invoked_subcommand is not None:
        context.obj = folder
        return
    from hf_fasttrain.data.pixels import cache
    from hf_fasttrain.data.pixels.cache_limits import UNUSED_DAYS, free_disk_bytes, limit_bytes, read_limit
    from hf_fasttrain.data.pixels.cache_locks import is_in_use

    cache_dir = folder or cache.default_cache_dir()
    if max_gb is not None:
        _set_limit(cache_dir, max_gb)
    entries = cache.list_caches(cache_dir)
    for entry in entries:
        size = f"{format_bytes(entry.num_bytes):>8}"
        used = "in use" if is_in_use(entry.path) else f"last used {entry.last_used_text}"
        echo(f"{entry.path.name}  {size}  {used}  {entry.dataset}: {entry.settings}")
    echo(f"{format_bytes(sum(entry.num_bytes for entry in entries))} in {cache_dir}")
    limit = format_bytes(limit_bytes(cache_dir, entries, free_disk_bytes(cache_dir)))
    origin = "half of what is free and kept" if read_limit(cache_dir) is None else "set by --max-gb"
    echo(f"at most {limit} ({origin}); a run that keeps pixels deletes what was not used for {UNUSED_DAYS:g} days")


def _set_limit(folder: Path, text: str) -> None:
    from hf_fasttrain.data.pixels.cache_limits import free_disk_bytes, keep_limit, write_limit

    if text != "auto" and not re.fullmatch(r"\d{1,9}(\.\d{1,9})?", text):
        raise DataError(f"--max-gb is '{text}'; give a number of GB, such as 200, or auto")
    write_limit(folder, None if text == "auto" else float(text))
    for entry in keep_limit(folder, free_disk_bytes(folder)):
        _say_deleted(entry)


def _say_deleted(entry: CacheEntry) -> None:
    echo(f"deleted {entry.path.name}: {entry.dataset}, {format_bytes(entry.num_bytes)}")


def clean_caches(
    context: typer.Context,
    names: Annotated[list[str] | None, typer.Argument(help="Names as listed; needed unless --all is given.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Delete all caches.")] = False,
    unused_days: Annotated[float | None, typer.Option(min=0, help="Delete caches not used for this many days.")] = None,
    folder: CacheFolder = None,
) -> None:
    """Delete decoded pixels cached on disk."""
    from hf_fasttrain.data.pixels.cache import default_cache_dir, remove_cache, select_caches

    freed = 0
    for entry in select_caches(folder or context.obj or default_cache_dir(), names or [], everything, unused_days):
        remove_cache(entry)
        freed += entry.num_bytes
        _say_deleted(entry)
    echo(f"freed {format_bytes(freed)}")
