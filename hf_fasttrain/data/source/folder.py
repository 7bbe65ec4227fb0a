"""Opens a folder: its splits are class folders, metadata files or tables, each opened when it is used.

docs/data.md has the rules. What is not read, in any of the splits that are opened, is in the inventory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from hf_fasttrain.data.source.archives import load_archives
from hf_fasttrain.data.source.file_split import FileSplit, class_folders
from hf_fasttrain.data.source.image_files import (
    EVAL_NAMES,
    IMAGE_SUFFIXES,
    SPLIT_FOLDERS,
    SPLIT_OF,
    TABLE_SUFFIXES,
    TRAIN_NAMES,
    suffix_of,
)
from hf_fasttrain.data.source.inventory import (
    PERMISSION_SAMPLE,
    Folder,
    Inventory,
    LeftOut,
    Reason,
    described,
    here,
    images_below,
    list_folder,
    short_path,
    split_by_permission,
    walk,
)
from hf_fasttrain.data.source.label_table_files import TEXT_SUFFIXES
from hf_fasttrain.data.source.metadata import METADATA_FILES, Metadata, names_images
from hf_fasttrain.data.source.splits import Splits, opened
from hf_fasttrain.data.source.tables import files_by_split, may_hold_images, open_tables
from hf_fasttrain.utils.clean import one_line
from hf_fasttrain.utils.errors import DataError, shortened
from hf_fasttrain.utils.format import format_count


def open_folder(
    path: str, *, empty_classes: bool = False, known_classes: Collection[str] = (), image_column: str = "auto"
) -> Splits:
    """Return the splits of a folder ``[split/]class/.../image.jpg``, or of one with tables or metadata files.

    A class folder without images is a DataError, unless `empty_classes`. `known_classes` are those of a model: a folder
    of such a name is a class, where it may also be the folder that an archive was unpacked into.
    """
    root, tree = os.path.abspath(path), list_folder(os.path.abspath(path))
    inner = _only_folder(tree, known_classes)
    notes, left_out = [], list[LeftOut]()
    if inner:
        notes = [f"{one_line(root)}: its only folder is read, {one_line(inner)}"]
        root = os.path.join(root, inner)
        names = inner.split("/")
        for above, name in zip(range(len(names), 0, -1), names, strict=True):
            left_out += here(tree, "../" * above)
            tree = tree.subfolders[name]
    opening = _Opening(root, tree, empty_classes, image_column)
    opening.inventory.add("", 0, left_out)
    return opening.splits(notes)


def _only_folder(tree: Folder, known_classes: Collection[str], own_name: str = "") -> str:
    """Return the path of the folder in which an archive was unpacked: the only one, with class folders or splits in it.

    The empty string if the folder itself holds the data. With `own_name` only a folder of that name is meant.
    """
    path, inner = list[str](), tree
    while len(inner.subfolders) == 1 and not inner.images and not _tables_and_metadata(inner):
        ((name, inner),) = inner.subfolders.items()
        if name in known_classes or name.lower() in SPLIT_FOLDERS - {own_name} or len(path) > 9:
            break
        path.append(name)
        with_images = [below for below in inner.subfolders.values() if below.has_images()]
        if len(with_images) > 1 or {name.lower() for name in inner.subfolders} & SPLIT_FOLDERS:
            return "/".join(path)
    return ""


def _tables_and_metadata(folder: Folder) -> list[str]:
    return [name for name in folder.files if suffix_of(name) in TABLE_SUFFIXES or name in METADATA_FILES]


@dataclass
class _Opening:
    """A folder that is being opened; paths are below `root`."""

    root: str
    tree: Folder
    empty_classes: bool
    image_column: str

    def __post_init__(self) -> None:
        self.inventory = Inventory(self.root)
        self.notes: list[str] = []

    def splits(self, notes: Sequence[str]) -> Splits:
        """Return the splits, unopened."""
        self.notes += notes
        parts = self._parts()
        self._require_no_lost_split()
        tables = files_by_split(self._own_tables())
        outside = [file for file in self._metadata_files if _first(file) not in parts]
        outside = [] if tables else self._own_metadata(outside)
        openers: dict[str, Callable[[], Any]] = {}
        if outside and self._has_archives():
            return opened(load_archives(self.root))
        if outside:  # speaks for the whole folder, as in `load_dataset("imagefolder")`
            metadata = Metadata(self.root, self.tree, outside, SPLIT_OF)
            inside = {SPLIT_OF[name.lower()]: self._metadata_in(name) for name in parts}
            names = {*metadata.splits(), *(split for split, files in inside.items() if files)}
            openers = {name: partial(self._open_rows, name, metadata, inside.get(name, [])) for name in sorted(names)}
        else:
            for name in parts:
                split = name.lower()
                if split not in tables:
                    openers[SPLIT_OF[split] if self._metadata_in(name) else split] = partial(self._open_part, name)
            openers |= {split: partial(self._open_tables, files) for split, files in tables.items()}
            self._leave_out_beside({name: parts[name] for name in parts if name.lower() not in tables}, tables)
        if not openers:
            self._require_classes()
            openers = {"train": partial(self._open_classes, "train", self.tree, "", [])}
        return Splits(openers, self.inventory, self.notes)

    @cached_property
    def files(self) -> list[str]:
        """Tables and metadata files at any depth."""
        found = [path + name for path, folder in walk(self.tree, []) for name in _tables_and_metadata(folder)]
        return sorted(found, key=lambda file: file.split("/"))

    def _has_archives(self) -> bool:
        """Return whether there are archives instead of image files."""
        folders = [self.tree, *self.tree.subfolders.values()]
        return not self.tree.has_images() and any(
            suffix_of(name) == ".zip" for folder in folders for name in folder.files
        )

    @property
    def _metadata_files(self) -> list[str]:
        return [file for file in self.files if os.path.basename(file) in METADATA_FILES]

    def _metadata_in(self, part: str) -> list[str]:
        return [file for file in self._metadata_files if _first(file) == part]

    def _own_tables(self) -> list[str]:
        """Return the tables, without those that belong to something else than the images beside them."""
        tables = [file for file in self.files if file not in self._metadata_files]
        if not tables or not (self.tree.has_images() or self._metadata_files):
            return tables
        own = [file for file in tables if may_hold_images(os.path.join(self.root, file), self.image_column)]
        self._leave_out_foreign([file for file in tables if file not in own], "no column of images")
        return own

    def _own_metadata(self, files: Sequence[str]) -> list[str]:
        """Return the metadata files, without those that belong to something else than the images in class folders."""
        if not any(folder.has_images() for folder in self.tree.subfolders.values()):
            return list(files)
        own = [file for file in files if names_images(os.path.join(self.root, file))]
        self._leave_out_foreign([file for file in files if file not in own], "no column file_name")
        return own

    def _leave_out_foreign(self, files: Sequence[str], why: str) -> None:
        self.inventory.add("", 0, [LeftOut(file, Reason.NO_IMAGES, detail=why) for file in files])

    def _parts(self) -> dict[str, Folder]:
        """Return the folders of splits: those of such names in which there is more than images."""
        named = {name: folder for name, folder in self.tree.subfolders.items() if name.lower() in SPLIT_FOLDERS}
        lower: dict[str, str] = {}
        for name in sorted(named):
            if lower.setdefault(name.lower(), name) != name:
                raise DataError(f"{self.where}: {lower[name.lower()]} and {name} are the same split; join them")
        parts = {
            name: folder for name, folder in sorted(named.items()) if folder.subfolders or _tables_and_metadata(folder)
        }
        if len(named) == 1 and parts and not self.files:
            ((name, folder),) = parts.items()
            others = [other for other in sorted(self.tree.subfolders) if other != name]
            others = [other for other in others if self.tree.subfolders[other].has_images()]
            if others and folder.images:
                return {}  # a class of this name
            if others:
                raise DataError(
                    f"{self.where}: {name} may be a split, and {shortened(map(one_line, others), 6)} beside it, or all "
                    f"of them classes; give data.dataset={one_line(os.path.join(self.root, name))} to train on its "
                    f"folders, or rename {name} (data.inventory=old reads it as older versions did, as a split)"
                )
        return parts

    def _leave_out_beside(self, parts: Mapping[str, Folder], tables: Collection[str]) -> None:
        """Leave out what is beside the splits. Raises DataError for a training split without classes."""
        if not parts and not tables:
            return
        beside = {name: folder for name, folder in sorted(self.tree.subfolders.items()) if name not in parts}
        beside = {name: folder for name, folder in beside.items() if folder.has_images()}
        if tables:
            files = [*self.tree.images, *(f"{name}/" for name in beside)]
            if files:
                named = f"{shortened(map(short_path, files), 3)} only where they name images"
                self.notes.append(f"{self.where}: its tables are read, and {named}")
            hidden = [entry for entry in here(self.tree, "") if entry.path not in self.files]
            self.inventory.add("", 0, [entry for entry in hidden if suffix_of(entry.path) in TABLE_SUFFIXES])
            return
        trains = [name for name in beside if name.lower() in TRAIN_NAMES]
        if trains and not any(name.lower() in TRAIN_NAMES for name in parts):
            raise DataError(f"{os.path.join(self.where, one_line(trains[0]))}: {NO_CLASS_FOLDERS}")
        entries = here(self.tree, "") + [LeftOut(name, Reason.NO_CLASS) for name in self.tree.images]
        for name, folder in beside.items():
            images = format_count(len(images_below(folder)[0]), "image")
            without = ", without class folders" if name.lower() in SPLIT_FOLDERS else ""
            entries.append(LeftOut(f"{name}/", Reason.NO_SPLIT, detail=images + without))
        self.inventory.add("", 0, entries)

    def _require_classes(self) -> None:
        """Raise DataError if the folders can't be classes."""
        names = sorted(self.tree.subfolders)
        if names and all(name.lower() in SPLIT_FOLDERS for name in names):
            raise DataError(f"{os.path.join(self.where, names[0])}: {NO_CLASS_FOLDERS}")
        if not names:
            left_out = described(here(self.tree, ""))
            message = f"{self.where}: {NO_CLASS_FOLDERS}" + (f". It has {left_out}" if left_out else "")
            tables = [name for name in self.tree.files if suffix_of(name) in TEXT_SUFFIXES]
            table = (
                f". To read a table of labels, give data.dataset={self.where}/{one_line(min(tables))}" if tables else ""
            )
            raise DataError(message + table)
        called = [name for name in names if name.lower() in SPLIT_FOLDERS]
        if called:
            self.notes.append(f"{self.where}: read as classes, though called like splits: {shortened(called)}")

    @property
    def where(self) -> str:
        """The root, for messages."""
        return one_line(self.root)

    def _open_part(self, name: str) -> FileSplit:
        """Return the split in a folder of its name."""
        split, folder, at = name.lower(), self.tree.subfolders[name], f"{name}/"
        files = self._own_metadata(self._metadata_in(name))
        if files:
            return self._open_rows(SPLIT_OF[split], Metadata(self.root, self.tree, files, SPLIT_OF))
        inner = _only_folder(folder, self._classes_of_train(name), own_name=split)
        for below in filter(None, inner.split("/")):
            folder, at = folder.subfolders[below], f"{at}{below}/"
        if inner:
            self.notes.append(f"{self.where}: split '{split}' is read from {one_line(at)}")
        return self._open_classes(split, folder, at, [self.tree])

    def _classes_of_train(self, but: str) -> set[str]:
        """Return the names of folders in the training split, unless that is the split `but`."""
        trains = [name for name in self.tree.subfolders if name.lower() in TRAIN_NAMES and name != but]
        return {name for train in trains for name in self.tree.subfolders[train].subfolders}

    def _open_tables(self, files: Sequence[str]) -> Any:
        return open_tables([os.path.join(self.root, file) for file in files], self.image_column)

    def _open_rows(self, split: str, metadata: Metadata, more: Sequence[str] = ()) -> FileSplit:
        rows, left_out = metadata.open(split, more)
        self.notes += [note for note in metadata.notes if note not in self.notes]
        self.inventory.add(split, len(rows) - sum(entry.is_image for entry in left_out), left_out)
        return rows

    def _open_classes(self, split: str, folder: Folder, at: str, above: Sequence[Folder]) -> FileSplit:
        """Return the images of class folders, each with the class of the first folder below the split."""
        line = [*above, folder]
        classes = {name: below for name, below in sorted(folder.subfolders.items()) if below not in line}
        left_out = [LeftOut(f"{at}{name}/", Reason.LOOP) for name in folder.links if name not in classes]
        left_out += [LeftOut(at + name, Reason.NO_CLASS, is_image=True) for name in folder.images] + here(folder, at)
        self._require_no_lost_class(folder, at)
        self._note_same_folders(classes)
        if not classes:
            raise DataError(f"{one_line(os.path.join(self.root, at))}: {NO_CLASS_FOLDERS}")
        names, labels, deeper = list[str](), list[int](), list[str]()
        for label, (name, below) in enumerate(classes.items()):
            found, more = images_below(below, at=f"{at}{name}/", above=line)
            found, denied = split_by_permission(self.root, found, max(2, PERMISSION_SAMPLE // len(classes)))
            more += denied
            if not found and not self.empty_classes:
                self._refuse_empty(f"{at}{name}", below, more)
            names += found
            labels += [label] * len(found)
            left_out += more
            deeper += [image for image in found if "/" in image[len(at) + len(name) + 1 :]] if below.subfolders else []
        if deeper:
            self.notes.append(
                f"{self.where}: {format_count(len(deeper), 'image')} in folders within class folders "
                f"({short_path(deeper[0])}): the class is that of the first folder"
            )
        self.inventory.add(split, len(names), left_out)
        return class_folders(self.root, names, labels, self._class_names(list(classes)))

    def _note_same_folders(self, classes: Mapping[str, Folder]) -> None:
        first: dict[int, str] = {}
        pairs = [(first.setdefault(id(folder), name), name) for name, folder in classes.items()]
        same = [f"{one_line(name)} is {one_line(one)}" for one, name in pairs if one != name]
        if same:
            self.notes.append(f"{self.where}: class folders that are links to another class: {shortened(same, 3)}")

    def _require_no_lost_class(self, folder: Folder, at: str) -> None:
        """Raise DataError for a dead link that may have led to a class folder: a class would be lost."""
        for entry in folder.left_out:
            if entry.reason in (Reason.DEAD_LINK, Reason.LOOP) and "." not in entry.path:
                path = one_line(os.path.join(self.root, at, entry.path))
                raise DataError(
                    f"{path}: dead link among the class folders ({entry.detail or 'to itself'}); repair it or remove it"
                )

    def _require_no_lost_split(self) -> None:
        """Raise DataError for a dead link in the place of images to train or evaluate on: others would be used."""
        for entry in self.tree.left_out:
            if entry.reason in (Reason.DEAD_LINK, Reason.LOOP) and entry.path.lower() in {*TRAIN_NAMES, *EVAL_NAMES}:
                path = one_line(os.path.join(self.root, entry.path))
                raise DataError(f"{path}: dead link ({entry.detail or 'to itself'}); repair it or remove it")

    def _refuse_empty(self, name: str, folder: Folder, left_out: Sequence[LeftOut]) -> None:
        path = one_line(os.path.join(self.root, name))
        if folder.error:
            raise DataError(f"{path}: class folder that can't be listed: {folder.error}")
        if any(entry.reason is Reason.DENIED for entry in left_out):
            raise DataError(
                f"{path}: class folder of which user {os.getuid()} may read no image ({described(left_out)}); give "
                "read permission (chmod -R a+rX), or move the folder away"
            )
        has = f"; it has {described(left_out)}" if left_out else ""
        raise DataError(
            f"{path}: class folder without images ({', '.join(sorted(IMAGE_SUFFIXES))}){has}; add images or remove it"
        )

    def _class_names(self, folders: Sequence[str]) -> list[str]:
        """Return the names of folders as text. Raises DataError if two are the same."""
        names = [os.fsencode(name).decode("utf-8", "backslashreplace") for name in folders]
        odd = [name for name, folder in zip(names, folders, strict=True) if os.fsencode(folder) != name.encode()]
        if odd:
            if len(set(names)) < len(names):
                raise DataError(f"{self.where}: two class folders are called {odd[0]}; rename one")
            self.notes.append(f"{self.where}: class folders whose names are not UTF-8 are called {shortened(odd, 6)}")
        return names


NO_CLASS_FOLDERS = (
    "contains no class folders; an image folder is [train/]<class>/<image>, "
    "a dataset on disk has .parquet or .arrow files"
)


def _first(path: str) -> str:
    return path.split("/", 1)[0]
