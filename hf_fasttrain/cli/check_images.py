"""The reports of `check`: what is left out; with --images corrupt images, class balance, duplicates, sizes."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from hf_fasttrain.data.pixels.rgb import ValueRange
from hf_fasttrain.data.source.copies import Copy, contradicting_copies
from hf_fasttrain.data.source.dataset import Source, Split
from hf_fasttrain.data.source.inventory import Inventory
from hf_fasttrain.data.source.scan import (
    ClassBalance,
    CorruptImage,
    Duplicates,
    SplitScan,
    class_balance,
    describe_scan,
    find_duplicates,
    grey_notes,
    image_names,
    scan_split,
)
from hf_fasttrain.from_recipe.value_range import describe_range
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.utils.environment import num_cores
from hf_fasttrain.utils.errors import UserError
from hf_fasttrain.utils.format import format_count
from hf_fasttrain.utils.terminal import Terminal, build_table


def check_images(
    terminal: Terminal, recipe: Recipe, source: Source, list_file: Path | None, value_range: ValueRange | None
) -> None:
    """Decode all images and print the report. Raises UserError if training would stop for too many corrupt images."""
    splits = [split for split in (source.train, source.evaluation, source.test) if split]  # not an empty one
    scans = _scan(splits, recipe.data.workers, value_range)
    balances = [class_balance(split, source.class_names) for split in splits]
    duplicates = find_duplicates(scans)
    _print_scan(terminal, scans, balances, duplicates, recipe.data.image_size)
    _print_bad(terminal, [bad for scan in scans for bad in scan.bad], list_file)
    _print_overlaps(terminal, splits, duplicates)
    _print_contradictions(terminal, *contradicting_copies(splits, scans, source.class_names))
    for scan in scans:
        for note in grey_notes(scan, describe_range(value_range)):
            terminal.print_line(f"note: split '{scan.name}': {note}")
    limit = recipe.data.max_bad_fraction
    broken = [scan for scan in scans if scan.bad_fraction > limit]
    if broken:
        counts = "; ".join(f"split '{s.name}': {len(s.bad):,} of {s.num_images:,} images are corrupt" for s in broken)
        raise UserError(
            f"{counts}; training would stop, since data.max_bad_fraction is {limit}. Repair or remove them "
            "(--list FILE writes them all), or raise data.max_bad_fraction"
        )


def print_left_out(terminal: Terminal, inventory: Inventory) -> None:
    """Print everything that a folder holds beside the images that are used, and why it is left out."""
    left_out = inventory.all
    if left_out:
        rows = [(entry.text, entry.reason.value[0]) for entry in left_out]
        terminal.print(build_table(("path", "reason"), rows, title=f"left out of {inventory.root}: {len(left_out):,}"))


def _scan(splits: list[Split], workers: int | str, value_range: ValueRange | None) -> list[SplitScan]:
    """Scan all splits in worker processes, with a progress bar on a terminal."""
    number = num_cores() if workers == "auto" else int(workers)
    terminal = Terminal(stderr=True)
    columns = (TextColumn("decoding images"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=terminal, disable=not terminal.is_terminal, transient=True) as progress:
        task = progress.add_task("", total=sum(map(len, splits)))
        advance: Callable[[int], None] = partial(progress.advance, task)
        note: Callable[[str], None] = lambda text: terminal.print_line(f"note: {text}")  # noqa: E731
        options: dict[str, Any] = {"workers": number, "value_range": value_range, "progress": advance, "note": note}
        return [scan_split(split, **options) for split in splits]


def _print_scan(
    terminal: Terminal, scans: list[SplitScan], balances: list[ClassBalance], duplicates: Duplicates, image_size: int
) -> None:
    columns = [
        describe_scan(scan, balance, duplicates, image_size) for scan, balance in zip(scans, balances, strict=True)
    ]
    rows = [(key, *(column[key] for column in columns)) for key in columns[0]]
    terminal.print(build_table(("", *(scan.name for scan in scans)), rows, title="every image, decoded"))


def _print_bad(terminal: Terminal, bad: list[CorruptImage], list_file: Path | None) -> None:
    """Print the first corrupt images, and write all of them to `list_file` if it is given."""
    if bad:
        title = f"corrupt images: {len(bad):,}" + (", the first 20" if len(bad) > 20 else "")
        rows = [(image.split, str(image.row), image.path or "", image.error) for image in bad[:20]]
        terminal.print(build_table(("split", "row", "path", "error"), rows, title=title))
    if list_file is None:
        return
    try:
        list_file.write_text("".join(json.dumps(vars(image)) + "\n" for image in bad), encoding="utf-8")
    except OSError as error:
        raise UserError(f"{list_file}: can't be written: {error.strerror}; give another file to write") from None
    terminal.print_line(f"{list_file}: all corrupt images, {len(bad):,}")


def _print_overlaps(terminal: Terminal, splits: list[Split], duplicates: Duplicates) -> None:
    for other, overlap in zip(splits[1:], duplicates.overlaps, strict=True):
        if not len(overlap.pairs):
            continue
        overlapping = f"{len(overlap.pairs):,} of {len(other):,} images of split '{overlap.other}'"
        terminal.print_line(
            f"warning: {overlapping} are in split '{overlap.train}' too: its accuracy will be overstated"
        )
        trained, first = overlap.pairs[:10].T
        for name, twin in zip(image_names(other, first), image_names(splits[0], trained), strict=True):
            terminal.print_line(f"  {name} = {twin}")


def _print_contradictions(terminal: Terminal, number: int, shown: list[list[Copy]]) -> None:
    """Print the images that have copies with different labels, one copy for each label."""
    if not number:
        return
    first = f", the first {len(shown)}" if number > len(shown) else ""
    count = format_count(number, "image has copies", "images have copies")
    terminal.print_line(f"warning: {count} with different labels{first}; correct them or remove them:")
    for copies in shown:
        terminal.print_line("  " + " = ".join(f"{name} ({label})" for name, label in copies))
