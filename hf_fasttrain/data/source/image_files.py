"""Folders of image files: which files are images (IMAGE_SUFFIXES), names of split folders, and classes by folder.

A new file type needs its suffix here, and must be one that pixels/decode.py can decode.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hf_fasttrain.utils.errors import DataError
from hf_fasttrain.utils.files import is_hidden

IMAGE_SUFFIXES = {
    ".bmp", ".gif", ".jpeg", ".jpg", ".jp2", ".png", ".ppm", ".pgm", ".tif", ".tiff", ".webp",
}  # fmt: skip
TRAIN_NAMES = ("train", "training")
EVAL_NAMES = ("validation", "val", "valid", "dev")
TEST_NAMES = ("test", "testing")
SPLIT_FOLDERS = {*TRAIN_NAMES, *EVAL_NAMES, *TEST_NAMES}
SPLIT_OF = {name: names[0] for names in (TRAIN_NAMES, EVAL_NAMES, TEST_NAMES) for name in names}


def scan_image_folder(root: Path, *, empty_classes: bool = False) -> dict[str, Any]:
    """Return split -> dataset of a folder ``[split/]class/image.jpg``; classes are the folders in sorted order.

    Reads names only: 100,000 files need 0.2 s, where `load_dataset("imagefolder")` needs 47 s and gives the same.
    """
    root = Path(os.path.abspath(root))  # the paths are part of the cache key of the pixels
    folders = {entry.name: Path(entry.path) for entry in os.scandir(root) if entry.is_dir()}
    split_folders = {name: path for name, path in folders.items() if name.lower() in SPLIT_FOLDERS}
    with_classes = {name: path for name, path in split_folders.items() if _has_class_folders(path)}
    if with_classes:
        return {name.lower(): _scan_classes(path, empty_classes) for name, path in sorted(with_classes.items())}
    return {"train": _scan_classes(root, empty_classes)}


def is_image_file(entry: os.DirEntry[str] | Path) -> bool:
    """Return whether a directory entry has the name of an image."""
    suffix = os.path.splitext(entry.name)[1].lower()
    return suffix in IMAGE_SUFFIXES and not is_hidden(entry.name) and entry.is_file()


def _has_class_folders(path: Path) -> bool:
    with os.scandir(path) as entries:
        return any(entry.is_dir() and not is_hidden(entry.name) for entry in entries)


def _scan_classes(root: Path, empty_classes: bool) -> Any:
    import datasets

    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir() and not is_hidden(entry.name))
    if not classes:
        raise DataError(
            f"{root}: contains no class folders; an image folder is [train/]<class>/<image>, "
            "a dataset on disk has .parquet or .arrow files"
        )
    files: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(entry.path for entry in os.scandir(root / name) if is_image_file(entry))
        if not found and not empty_classes:
            raise DataError(
                f"{root / name}: class folder without images ({', '.join(sorted(IMAGE_SUFFIXES))}); "
                "add images or remove it"
            )
        files += found
        labels += [label] * len(found)
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=classes)})
    return datasets.Dataset.from_dict({"image": files, "label": labels}, features=features)
