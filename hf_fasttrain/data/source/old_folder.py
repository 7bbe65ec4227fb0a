"""Folders as they were read before every file was listed: `data.inventory: old`, to resume runs of that time.

Class folders to a depth of one, fewer suffixes, tables to a depth of two.
"""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import Any

from hf_fasttrain.data.source.archives import load_archives
from hf_fasttrain.data.source.file_split import FileSplit, class_folders
from hf_fasttrain.data.source.image_files import SPLIT_FOLDERS, SPLIT_OF
from hf_fasttrain.data.source.inventory import list_folder
from hf_fasttrain.data.source.metadata import METADATA_FILES, Metadata
from hf_fasttrain.data.source.splits import Splits, opened
from hf_fasttrain.data.source.tables import files_by_split, open_tables
from hf_fasttrain.utils.errors import DataError

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


def open_old_folder(path: str, *, empty_classes: bool) -> Splits:
    """Return the splits of a folder; what is left out is not said."""
    root = Path(os.path.abspath(path))
    near = [p for pattern in ("*", "*/*") for p in root.glob(pattern)]
    tables = sorted(p for p in near if p.suffix in (".parquet", ".arrow") and p.name not in METADATA_FILES)
    if tables:
        splits = files_by_split([str(file.relative_to(root)) for file in tables])
        return Splits({name: partial(_open_tables, root, files) for name, files in splits.items()})
    metadata = [p for p in root.rglob("*") if p.name in METADATA_FILES and not _is_hidden(p, root)]
    if any(p.name in METADATA_FILES for p in near):
        if any(p.suffix == ".zip" for p in near):
            return opened(load_archives(str(root)))
        rows = Metadata(str(root), list_folder(str(root)), sorted(str(p.relative_to(root)) for p in metadata), SPLIT_OF)
        return opened({name: rows.open(name)[0] for name in rows.splits()})
    named = {entry.name: Path(entry.path) for entry in os.scandir(root) if entry.is_dir()}
    named = {name: folder for name, folder in named.items() if name.lower() in SPLIT_FOLDERS and _classes_in(folder)}
    if named:
        return opened({name.lower(): _scan(folder, empty_classes) for name, folder in sorted(named.items())})
    return opened({"train": _scan(root, empty_classes)})


def _open_tables(root: Path, files: list[str]) -> Any:
    return open_tables([os.path.join(root, file) for file in files])


def _is_hidden(path: Path, root: Path) -> bool:
    return any(part.startswith((".", "__")) for part in path.relative_to(root).parts)


def _classes_in(folder: Path) -> list[str]:
    folders = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    return sorted(name for name in folders if not name.startswith((".", "__")))


def _scan(root: Path, empty_classes: bool) -> FileSplit:
    classes = _classes_in(root)
    if not classes:
        raise DataError(f"{root}: contains no class folders; data.inventory=full reads more forms of folders")
    names: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(entry.name for entry in os.scandir(root / name) if _is_image(entry))
        if not found and not empty_classes:
            raise DataError(f"{root / name}: class folder without images; add images or remove it")
        names += [f"{name}/{file}" for file in found]
        labels += [label] * len(found)
    return class_folders(str(root), names, labels, classes)


def _is_image(entry: os.DirEntry[str]) -> bool:
    suffix = os.path.splitext(entry.name)[1].lower()
    return suffix in SUFFIXES and not entry.name.startswith((".", "__")) and entry.is_file()
