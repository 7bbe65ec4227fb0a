"""Finds the image files that a table lists: each folder is listed once, no file is looked at by itself."""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections.abc import Sequence

import numpy as np

from hf_fasttrain.data.source.image_files import IMAGE_SUFFIXES
from hf_fasttrain.data.source.inventory import short_path
from hf_fasttrain.data.source.label_table_files import folder_of
from hf_fasttrain.utils.clean import one_line
from hf_fasttrain.utils.errors import DataError, shortened
from hf_fasttrain.utils.files import expand_user

_SAMPLED = 100  # paths that are looked for below the working folder


class Listing:
    """The files below a folder, listed folder by folder when one is asked for."""

    def __init__(self, root: str) -> None:
        self.root = root
        self._names: dict[str, set[str]] = {}  # folder -> all that is in it

    def has(self, path: str) -> bool:
        """Return whether there is something at a path, which may be absolute."""
        folder, _, name = path.rpartition("/")
        if not folder and path.startswith("/"):
            folder = "/"
        found = self._names.get(folder)
        if found is None:
            found = self._names[folder] = self._list(folder)
        return name in found

    def _list(self, folder: str) -> set[str]:
        try:
            with os.scandir(os.path.join(self.root, folder)) as entries:
                return {entry.name for entry in entries}
        except (OSError, ValueError):
            return set()

    def number_of(self, paths: Sequence[str]) -> int:
        """Return how many of some paths are there."""
        return sum(self.find(path) is not None for path in paths)

    def find(self, path: str) -> str | None:
        """Return a path as it is on disk, None if there is none.

        Windows writes backslashes; an accent may be encoded in another way; a cell may have spaces around the path.
        """
        if ("./" in path or "//" in path) and "/../" not in path:  # a folder before /../ may be a link
            path = posixpath.normpath(path)
        if self.has(path):
            return path
        spelled = dict.fromkeys(
            posixpath.normpath(unicodedata.normalize(form, text))
            for text in (path, path.strip(), path.strip().replace("\\", "/"))
            for form in ("NFC", "NFD")
        )
        return next((other for other in spelled if self.has(other)), None)


def image_root(file: str, root: str | None, paths: Sequence[str]) -> Listing:
    """Return the absolute folder of a table's relative paths: `root`, its own, or the working folder.

    The last one if more of a sample is found there, and none is given. Raises DataError if there is no `root`.
    """
    own = folder_of(file)
    if root is not None:
        given = os.path.normpath(os.path.join(own, expand_user(root)))
        if not os.path.isdir(given):
            raise DataError(
                f"data.image_root: {one_line(given)} is no folder; give the folder of the images, absolute or relative "
                f"to that of {one_line(os.path.basename(file))}"
            )
        return Listing(given)
    sampled = [paths[row] for row in np.unique(np.linspace(0, len(paths) - 1, _SAMPLED, dtype=np.int64)).tolist()]
    beside, working = Listing(own), Listing(os.getcwd())
    if (number := beside.number_of(sampled)) == len(sampled) or number >= working.number_of(sampled):
        return beside
    return working


def resolved_paths(listing: Listing, paths: Sequence[str], where: str) -> tuple[list[str], np.ndarray]:
    """Return paths as they are on disk, and whether there is something at each (N,).

    Raises DataError if none of them is there.
    """
    names, there = list[str](), np.zeros(len(paths), bool)
    for row, path in enumerate(paths):
        found = listing.find(path) if "\0" not in path else None
        there[row] = found is not None
        names.append(found or path.replace("\0", "\ufffd"))
    if len(paths) and not there.any():
        raise DataError(
            f"{where}: none of the {len(paths):,} images that it lists is there, such as "
            f"{shortened(map(short_path, paths), 3)}, below {one_line(listing.root)}; {_advice(listing, paths)}"
        )
    return names, there


def _advice(listing: Listing, paths: Sequence[str]) -> str:
    if any("://" in path for path in paths[:3]):
        return "addresses are not downloaded: give paths of files"
    for path in paths[:20]:
        suffix = next((suffix for suffix in sorted(IMAGE_SUFFIXES) if listing.has(path + suffix)), None)
        if suffix:
            return f"{short_path(path + suffix)} is: write the names with their suffix"
        name = path.replace("\\", "/").rpartition("/")[2]
        if listing.has(name):
            return f"{short_path(name)} is: write the paths relative to that folder, or set data.image_root"
    return "set data.image_root to the folder of the images, or data.image_column to the column of their paths"
