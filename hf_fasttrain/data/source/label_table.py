"""Opens a table of paths and labels: its splits are those of its split column, its images are files.

docs/data.md has the rules. What is left out, and paths that occur twice, are counted and said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import numpy as np

from hf_fasttrain.data.source.columns import Columns
from hf_fasttrain.data.source.file_split import FileSplit, Groups
from hf_fasttrain.data.source.groups import groups_of
from hf_fasttrain.data.source.image_files import SPLIT_OF
from hf_fasttrain.data.source.inventory import (
    PERMISSION_SAMPLE,
    Inventory,
    LeftOut,
    Reason,
    short_path,
    split_by_permission,
)
from hf_fasttrain.data.source.label_table_columns import TableColumns, TableKeys, find_table_columns
from hf_fasttrain.data.source.label_table_files import LabelFile, encoded, folder_of, read_label_table
from hf_fasttrain.data.source.label_table_labels import TableLabels, table_labels
from hf_fasttrain.data.source.label_table_paths import image_root, resolved_paths
from hf_fasttrain.data.source.records import FileRecords
from hf_fasttrain.data.source.splits import Splits
from hf_fasttrain.utils.clean import one_line
from hf_fasttrain.utils.errors import DataError, shortened
from hf_fasttrain.utils.format import format_count

_EXAMPLES = 3


def open_label_table(file: str, keys: TableKeys) -> Splits:
    """Return the splits of a table. Raises DataError for a table that can't be read as the keys say.

    Images that are not there stay: they are bad images, unless there are more than data.max_bad_fraction of them.
    """
    table = read_label_table(file)
    columns = find_table_columns(table, keys)
    labels = table_labels(table, columns, keys)
    rows = _rows(table, columns, labels)
    notes = [*table.notes, *columns.notes, *labels.notes]
    return _Opening(file, columns, labels, rows, keys.image_root, notes).splits()


@dataclass
class _Rows:
    """What each row of a table is, beside its labels; arrays (N,)."""

    paths: list[str]  # distinct
    codes: np.ndarray  # into `paths`
    splits: list[str]
    split_of: np.ndarray  # into `splits`; -1: none
    groups: Groups | None

    @cached_property
    def has_path(self) -> np.ndarray:
        """Which rows have a path."""
        return np.array([bool(path.strip()) for path in self.paths], bool)[self.codes]


def _rows(table: LabelFile, columns: TableColumns, labels: TableLabels) -> _Rows:
    import pyarrow as pa

    try:
        paths, codes = encoded(table.columns[columns.image])
    except pa.ArrowException:
        kind = table.columns[columns.image].type
        raise DataError(f"{table.where}: column '{columns.image}' ({kind}) can't be read as paths") from None
    names, split_of = _splits(table, columns.split, len(labels.missing))
    groups = None if columns.group is None else _groups(table, columns.group)
    return _Rows(paths, codes, names, split_of, groups)


def _splits(table: LabelFile, column: str | None, number: int) -> tuple[list[str], np.ndarray]:
    """Return the names of the splits, by their usual names if all have one, and the split of each row."""
    if column is None:
        return ["train"], np.zeros(number, np.int64)
    import pyarrow as pa

    try:
        texts, codes = encoded(table.columns[column])
    except pa.ArrowException:
        raise DataError(f"{table.where}: column '{column}' can't be read as names of splits") from None
    written = [text.strip() for text in texts]
    if all(text.lower() in SPLIT_OF for text in written if text):
        written = [SPLIT_OF.get(text.lower(), "") for text in written]
    names = list(dict.fromkeys(text for text in written if text))
    number_of = {name: index for index, name in enumerate(names)} | {"": -1}
    lookup = np.array([number_of[text] for text in written], np.int64)
    return names, lookup[codes]


def _groups(table: LabelFile, column: str) -> Groups:
    import pyarrow as pa

    try:
        return groups_of(table.columns[column])
    except pa.ArrowException:
        raise DataError(f"{table.where}: column '{column}' can't be read as groups; give one text a row") from None


@dataclass
class _Opening:
    """A table that is being opened."""

    file: str
    columns: TableColumns
    labels: TableLabels
    rows: _Rows
    root_key: str | None
    notes: list[str]

    def __post_init__(self) -> None:
        self.where = one_line(self.file)
        self.inventory = Inventory(self.file, advice="correct the table, or data.image_root")

    def splits(self) -> Splits:
        """Return the splits, unopened."""
        columns, rows, where = self.columns, self.rows, self.where
        if not rows.has_path.any():
            raise DataError(f"{where}: column '{columns.image}' has no paths")
        usable = rows.has_path & ~self.labels.missing
        if not usable.any():
            raise DataError(f"{where}: no row has a label in column {shortened(map(repr, columns.labels))}")
        self._resolve()
        splitless = np.flatnonzero(rows.split_of < 0)
        self.inventory.add("", 0, self._left_out(splitless, Reason.SPLITLESS, counts=False))
        usable &= rows.split_of >= 0
        self._note_shared(usable)
        counts = np.bincount(rows.split_of[usable], minlength=len(rows.splits)).tolist()
        found = {name: count for name, count in zip(rows.splits, counts, strict=True) if count}
        if columns.split is not None:
            listed = shortened(f"{name} ({count:,})" for name, count in found.items())
            self.notes.append(f"{where}: splits by column '{columns.split}': {listed}")
        classes = columns.labels if columns.are_classes else ()
        used = Columns(columns.image, self.label, listed=classes, split=columns.split)
        return Splits({name: partial(self._open, name) for name in found}, self.inventory, self.notes, columns=used)

    @property
    def label(self) -> str:
        """The label column, or the first of those that are one class each, for messages."""
        return shortened(self.columns.labels, 3)

    def _resolve(self) -> None:
        """Find the files. Paths that are written differently, and lead to one file, become the same."""
        filled = [index for index, path in enumerate(self.rows.paths) if path.strip()]
        paths = [self.rows.paths[index] for index in filled]
        listing = image_root(self.file, self.root_key, paths)
        self.root = listing.root
        if self.root_key is None and self.root != folder_of(self.file):
            self.notes.append(f"{self.where}: its paths are those below the working folder, {one_line(self.root)}")
        names, there = resolved_paths(listing, paths, self.where)
        lookup = np.full(len(self.rows.paths), -1)
        if names == paths:  # which are different: a dictionary of a million takes a second
            self.paths, lookup[filled] = names, np.arange(len(names))
        else:
            number_of = {name: number for number, name in enumerate(dict.fromkeys(names))}
            self.paths, lookup[filled] = list(number_of), [number_of[name] for name in names]
        self.codes = lookup[self.rows.codes]
        self.there = np.zeros(len(self.paths), bool)
        self.there[lookup[filled]] = there

    def _left_out(self, rows: np.ndarray, why: Reason, *, counts: bool = True) -> list[LeftOut]:
        """Return rows that are left out, by their paths."""
        paths = (self.rows.paths[code] for code in self.rows.codes[rows].tolist())
        return [
            LeftOut(path or f"row {row:,}", why, is_image=counts)
            for row, path in zip(rows.tolist(), paths, strict=True)
        ]

    def _note_shared(self, usable: np.ndarray) -> None:
        """Note images that are in two splits."""
        number = np.zeros(len(self.paths), np.int64)
        for split in range(len(self.rows.splits)):
            of_split = self.codes[usable & (self.rows.split_of == split)]
            number += np.bincount(of_split, minlength=len(self.paths)) > 0
        shared = np.flatnonzero(number > 1)
        if len(shared):
            examples = shortened((short_path(self.paths[image]) for image in shared[:_EXAMPLES].tolist()), _EXAMPLES)
            self.notes.append(
                f"{self.where}: {format_count(len(shared), 'image is', 'images are')} in two splits or more "
                f"({examples}): accuracy on them will be overstated"
            )

    def _open(self, split: str) -> FileSplit:
        """Return the rows of a split that have a path and a label, each pair of these once."""
        of_split = self.rows.split_of == self.rows.splits.index(split)
        unlabelled = np.flatnonzero(of_split & self.rows.has_path & self.labels.missing)
        pathless = np.flatnonzero(of_split & ~self.rows.has_path)
        rows = self._once(np.flatnonzero(of_split & self.rows.has_path & ~self.labels.missing), split)
        names = [self.paths[code] for code in self.codes[rows].tolist()]
        is_there = self.there[self.codes[rows]]
        missing = [LeftOut(names[row], Reason.NOT_THERE, is_image=True) for row in np.flatnonzero(~is_there).tolist()]
        present = [names[row] for row in np.flatnonzero(is_there).tolist()]
        _, denied = split_by_permission(self.root, present, PERMISSION_SAMPLE)
        left_out = [*missing, *denied]
        found = len(rows) - len(left_out)
        left_out += self._left_out(unlabelled, Reason.NO_LABEL) + self._left_out(pathless, Reason.NO_PATH)
        self.inventory.add(split, found, left_out)
        values, class_names = self.labels.select(rows)
        groups = None if self.rows.groups is None else Groups(self.rows.groups.codes[rows], self.rows.groups.names)
        images = {self.columns.image: FileRecords(self.root, names)}
        return FileSplit(images, {self.label: values}, class_names, groups)

    def _once(self, rows: np.ndarray, split: str) -> np.ndarray:
        """Return rows without those that repeat an image with the same label; note these, and contradictions."""
        several = rows[np.bincount(self.codes[rows])[self.codes[rows]] > 1]
        if not len(several):
            return rows
        labels_of: dict[int, dict[str, None]] = {}
        repeated = list[int]()
        for row, code, text in zip(
            several.tolist(), self.codes[several].tolist(), self.labels.texts(several), strict=True
        ):
            known = labels_of.setdefault(code, {})
            if text in known:
                repeated.append(row)
            known[text] = None
        self._note_repeated([self.paths[code] for code in self.codes[repeated].tolist()], split)
        self._note_contradictions({code: list(texts) for code, texts in labels_of.items() if len(texts) > 1}, split)
        return np.setdiff1d(rows, repeated, assume_unique=True)

    def _note_repeated(self, paths: Sequence[str], split: str) -> None:
        if paths:
            count = format_count(len(paths), "row repeats", "rows repeat")
            self.notes.append(
                f"{self.where}: split '{split}': {count} an image with the same label "
                f"({shortened(map(short_path, dict.fromkeys(paths)), _EXAMPLES)}); each is used once"
            )

    def _note_contradictions(self, labels: dict[int, list[str]], split: str) -> None:
        if labels:
            examples = [f"{short_path(self.paths[code])}: {shortened(texts, 3)}" for code, texts in labels.items()]
            count = format_count(len(labels), "image has", "images have")
            self.notes.append(
                f"{self.where}: split '{split}': {count} rows with different labels "
                f"({shortened(examples, _EXAMPLES)}); each of these rows is used: correct them, or write all labels of "
                "an image into one row (data.label_separator)"
            )
