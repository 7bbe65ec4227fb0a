"""The command `cache`: list or delete the decoded pixels cached on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_fasttrain.utils.format import format_bytes
from hf_fasttrain.utils.printing import echo

CacheFolder = Annotated[Path | None, typer.Option("--dir", help="Folder of the caches, if data.cache_dir is set.")]


def list_caches(context: typer.Context, folder: CacheFolder = None) -> None:
    """List the decoded pixels cached on disk, the most recently used first."""
    if context.invoked_subcommand is not None:
        context.obj = folder
        return
    from hf_fasttrain.data.pixels import cache

    cache_dir = folder or cache.default_cache_dir()
    entries = cache.list_caches(cache_dir)
    for entry in entries:
        size = f"{format_bytes(entry.num_bytes):>8}"
        echo(f"{entry.path.name}  {size}  last used {entry.last_used_text}  {entry.dataset}: {entry.settings}")
    echo(f"{format_bytes(sum(entry.num_bytes for entry in entries))} in {cache_dir}")


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
        echo(f"deleted {entry.path.name}: {entry.dataset}, {format_bytes(entry.num_bytes)}")
    echo(f"freed {format_bytes(freed)}")
