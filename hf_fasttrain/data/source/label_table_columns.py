"""Finds out what the columns of a table are: images, labels, split and group, by their names and values."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from hf_fasttrain.data.source.columns import IMAGE_NAMES, LABEL_NAMES
from hf_fasttrain.data.source.image_files import IMAGE_SUFFIXES, SPLIT_OF, suffix_of
from hf_fasttrain.data.source.label_table_files import LabelFile, as_text
from hf_fasttrain.utils.clean import one_line
from hf_fasttrain.utils.errors import DataError, nearest, shortened, shown

PATH_NAMES = (
    *IMAGE_NAMES,
    *("path", "file", "filename", "file_name", "filepath", "file_path", "image_path", "img_path", "image_file"),
    *("image_name", "image_id", "photo_path"),
)
LABEL_TABLE_NAMES = (*LABEL_NAMES, "class_name", "label_name", "category_name", "species", "diagnosis", "breed")
SPLIT_COLUMNS = ("split", "subset", "set", "partition", "fold", "phase", "usage", "dataset_split", "data_split")
ZERO_ONE = {"0": False, "1": True, "0.0": False, "1.0": True}
_LOOKED_AT = 1000  # values of a column, for a first impression
_SHOWN = 30  # columns in a message
_MANY = 0.9  # share of a column's values that are names of images


@dataclass(frozen=True)
class TableKeys:
    """The keys of a recipe that say how a table is read, by their names in section `data`."""

    image_column: str = "auto"
    label_column: str | Sequence[str] = "auto"
    label_separator: str | None = None
    image_root: str | None = None
    split_column: str | None = "auto"
    group_column: str | None = None
    required: Collection[str] | None = None  # columns that must exist, others count as auto; None: all

    @property
    def label_list(self) -> tuple[str, ...]:
        """The columns that are one class each."""
        return () if isinstance(self.label_column, str) else tuple(self.label_column)


NO_KEYS = TableKeys()


@dataclass
class TableColumns:
    """The columns of a table by their use."""

    image: str
    labels: tuple[str, ...]
    are_classes: bool  # whether each column of `labels` is a class, with 0 or 1 in its cells
    split: str | None
    group: str | None
    notes: list[str] = field(default_factory=list)


def find_table_columns(table: LabelFile, keys: TableKeys) -> TableColumns:
    """Return what the columns of a table are. Raises DataError, with what to set, if that can't be decided."""
    return _Finder(table, keys).find()


class _Finder:
    def __init__(self, table: LabelFile, keys: TableKeys) -> None:
        self.table, self.keys, self.notes = table, keys, list[str]()
        self.texts = {name: found for name in table.columns if (found := self._first_texts(name)) is not None}

    def find(self) -> TableColumns:
        """Return the columns."""
        self._require_header()
        image = self._named("image_column", self.keys.image_column) or self._image()
        split = self._split(image)
        group = self._named("group_column", self.keys.group_column)
        labels = self._labels([name for name in self.table.columns if name not in (image, split, group)])
        if image in labels:
            raise DataError(f"{self.table.where}: column '{image}' can't be both images and labels")
        for key, name in (("split_column", split), ("group_column", group)):
            if name is not None and name in (image, *labels):
                raise DataError(f"data.{key}: '{name}' is the column of images or labels already; name another")
        are_classes = bool(self.keys.label_list) or len(labels) > 1
        self._note_unused(image, labels, split, group)
        return TableColumns(image, labels, are_classes, split, group, self.notes)

    def _first_texts(self, name: str) -> list[str] | None:
        """Return the first values of a column as texts, None if they are no single values."""
        import pyarrow as pa

        try:
            values: list[str] = as_text(self.table.columns[name][:_LOOKED_AT]).to_pylist()
            return values
        except pa.ArrowException:
            return None

    def _require_header(self) -> None:
        paths = [name for name in self.table.columns if suffix_of(name) in IMAGE_SUFFIXES]
        if paths and self.table.is_text:
            raise DataError(
                f"{self.table.where}: its first line must have the names of the columns; got "
                f"{shortened(map(shown, self.table.columns), 4)}. Add a line such as image,label"
            )
        if not len(self.table):
            raise DataError(f"{self.table.where}: has no rows, only {shortened(map(shown, self.table.columns))}")

    def _named(self, key: str, name: str | None) -> str | None:
        """Return a column that the recipe names, None for auto. Raises DataError if there is no such column."""
        if name is None or name == "auto" or name in self.table.columns:
            return None if name == "auto" else name
        if self.keys.required is not None and name not in self.keys.required:
            return None
        columns = ", ".join(self.table.columns)
        hint = nearest(name, self.table.columns)
        raise DataError(f"data.{key}: '{name}' is not a column of {self.table.where}; it has {columns}.{hint}")

    def _image(self) -> str:
        """Return the column whose values are names of images, else the one that is called like one."""
        paths = self._path_columns
        called = [name for name in self.texts if name.lower() in PATH_NAMES]
        best = [name for name in paths if name in called] if len(paths) > 1 else paths
        candidates = best or paths or called
        if len(candidates) == 1:
            return candidates[0]
        raise self._undecided("image_column", "images", candidates)

    @cached_property
    def _path_columns(self) -> list[str]:
        def is_path(values: list[str]) -> bool:
            found = [value for value in values if value]
            return sum(suffix_of(value.strip()) in IMAGE_SUFFIXES for value in found) > _MANY * max(1, len(found))

        return [name for name, values in self.texts.items() if is_path(values)]

    def _split(self, image: str) -> str | None:
        wanted = self.keys.split_column
        if wanted is None or wanted != "auto":
            return self._named("split_column", wanted)
        taken = (image, self.keys.label_column, self.keys.group_column, *self.keys.label_list)
        called = [name for name in self.texts if name.lower() in SPLIT_COLUMNS and name not in taken]
        found = [name for name in called if self._are_splits(name)]
        if len(found) > 1:
            raise DataError(
                f"{self.table.where}: columns {shortened(map(repr, found))} have names of splits; set "
                f"data.split_column={found[0]} or another of them, or data.split_column=null for none"
            )
        return found[0] if found else None

    def _are_splits(self, name: str) -> bool:
        values = {value.strip().lower() for value in distinct(self.table.columns[name])} - {""}
        return bool(values) and values <= SPLIT_OF.keys()

    def _labels(self, others: list[str]) -> tuple[str, ...]:
        if self.keys.label_list:
            listed = tuple(name for each in self.keys.label_list if (name := self._named("label_column", each)))
            if len(set(self.keys.label_list)) < len(self.keys.label_list):
                raise DataError(f"data.label_column: names a column twice; got {shortened(self.keys.label_list)}")
            if listed:
                return listed
        elif name := self._named("label_column", str(self.keys.label_column)):
            return (name,)
        called = [name for name in others if name.lower() in LABEL_TABLE_NAMES]
        hot = [] if called else [name for name in others if self._is_zero_one(name)]
        if len(hot) > 2:
            self.notes.append(
                f"{self.table.where}: no label column, so columns {shortened(hot, 6)} are one class each (0 or 1); "
                "data.label_column names others"
            )
            return tuple(hot)
        candidates = called or [name for name in others if name and not name.lower().startswith("unnamed:")]
        if len(candidates) == 1:
            return (candidates[0],)
        raise self._undecided("label_column", "labels", called or self._may_be_labels(candidates))

    def _is_zero_one(self, name: str) -> bool:
        values = self.texts.get(name)
        return values is not None and {*values} <= ZERO_ONE.keys() and distinct(self.table.columns[name]) <= {*ZERO_ONE}

    def _may_be_labels(self, names: Sequence[str]) -> list[str]:
        """Return the columns whose values repeat, those with the fewest ones first."""
        counts = {name: len(set(values)) for name in names if (values := self.texts.get(name)) is not None}
        fit = [name for name, count in counts.items() if 1 < count <= max(2, min(len(self.table), _LOOKED_AT) // 2)]
        return sorted(fit, key=lambda name: counts[name])

    def _undecided(self, key: str, what: str, candidates: Sequence[str]) -> DataError:
        """Return the message that shows all columns with examples, which of them would do, and what to write."""
        names = list(self.table.columns)
        lines = "".join(f"\n  {self._described(name, what, candidates)}" for name in names[:_SHOWN])
        more = f"\n  ... and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        found = "several columns would do" if candidates else "no column looks like them"
        write = f"data.{key}={candidates[0] if candidates else 'NAME'}"
        if what == "labels" and len(candidates) > 1 and all(map(self._is_zero_one, candidates)):
            write += f", or data.{key}=[{','.join(candidates[:3])}] if each is a class (0 or 1)"
        others = ", or another of these" if candidates else ", with one of these"
        return DataError(
            f"{self.table.where}: which column has the {what} can't be decided: {found}. Write {write}{others}. Its "
            f"columns, with examples:{lines}{more}"
        )

    def _described(self, name: str, what: str, candidates: Sequence[str]) -> str:
        """Return a column with its first different values, and what it may be."""
        values = self.texts.get(name) or [str(value) for value in self.table.columns[name][:3].to_pylist()]
        examples = shortened(map(shown, list(dict.fromkeys(values))[:3]))
        fits = f" <- may be the {what}" if name in candidates else ""
        return f"{one_line(name) or repr(name)}: {examples}{fits or ' <- images' * (name in self._path_columns)}"

    def _note_unused(self, image: str, labels: Sequence[str], split: str | None, group: str | None) -> None:
        rest = [name for name in self.table.columns if name and name not in (image, *labels, split, group)]
        if rest:
            uses = [f"images: {image}", f"labels: {shortened(labels, 3)}"]
            uses += [f"{what}: {name}" for what, name in (("split", split), ("group", group)) if name]
            columns = f"column{'s' * (len(rest) > 1)} {shortened(rest)}"
            self.notes.append(f"{self.table.where}: not used: {columns} ({', '.join(uses)})")


def distinct(array: Any) -> set[str]:
    """Return the distinct values of an Arrow array, as texts; a missing one is empty."""
    import pyarrow.compute as pc

    return {*as_text(pc.unique(array)).to_pylist()}
