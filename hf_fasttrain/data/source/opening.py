"""Opens a data set by name, folder or file, or as an object of `datasets`: its splits, each opened when it is used."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from hf_fasttrain.data.source.digits import digits_split
from hf_fasttrain.data.source.folder import open_folder
from hf_fasttrain.data.source.hub_splits import open_hub
from hf_fasttrain.data.source.image_files import TABLE_SUFFIXES, suffix_of
from hf_fasttrain.data.source.label_table import open_label_table
from hf_fasttrain.data.source.label_table_columns import NO_KEYS, TableKeys
from hf_fasttrain.data.source.label_table_files import is_label_table
from hf_fasttrain.data.source.old_folder import open_old_folder
from hf_fasttrain.data.source.splits import Splits, opened
from hf_fasttrain.data.source.tables import open_tables
from hf_fasttrain.utils.clean import one_line
from hf_fasttrain.utils.errors import DataError, RunError, closest, first_line, shown
from hf_fasttrain.utils.files import existing_path, expand_user, read_object, reason, require_regular
from hf_fasttrain.utils.remote import is_dataset_name


def open_splits(
    dataset: Any,
    *,
    config: str | None = None,
    revision: str | None = None,
    empty_classes: bool = False,
    known_classes: Collection[str] = (),
    inventory: str = "full",
    keys: TableKeys = NO_KEYS,
) -> Splits:
    """Return the splits of a `Dataset`, a `DatasetDict`, a path, ``digits`` or a Hub name, by name.

    `empty_classes` and `known_classes` are those of `open_folder`; `inventory` is full, or old: folders and parquet
    files of paths are read by the rules of older versions. `keys` say how a table of paths and labels is read.
    """
    if not isinstance(dataset, str | os.PathLike):
        return opened(_splits_of_object(dataset))
    name = os.fspath(dataset)
    if name == "digits":
        notes = ["digits is scikit-learn's data set; ./digits is the folder"] if os.path.isdir(name) else []
        return Splits({"train": digits_split}, notes=notes)
    if not name.strip():
        raise DataError(f"data.dataset is {name!r}; give the path of a folder or table, digits, or a Hub name")
    path = existing_path(name)
    if path is None and not is_dataset_name(name):
        raise DataError(f"data.dataset: {_no_such_path(name)}")
    if path is None:
        return open_hub(name, config, revision, hint=_nearest_sibling(Path(name)))
    if not os.path.exists(path):
        raise DataError(f"{one_line(name)}: is a link to {one_line(os.readlink(path))}, which does not exist")
    _require_text(name)
    if os.path.isdir(path):
        names = set(_names_in(path))
        if "dataset_dict.json" in names or {"dataset_info.json", "state.json"} <= names:
            return _open_saved(path)
        if inventory == "old":
            return open_old_folder(path, empty_classes=empty_classes)
        rules: dict[str, Any] = {"known_classes": known_classes, "image_column": keys.image_column}
        return open_folder(path, empty_classes=empty_classes, **rules)
    if is_label_table(path, keys.image_column) and not (inventory == "old" and suffix_of(path) in TABLE_SUFFIXES):
        return open_label_table(path, keys)
    if suffix_of(path) in TABLE_SUFFIXES:
        return Splits({"train": partial(open_tables, [path], keys.image_column)})
    raise DataError(
        f"{one_line(name)}: is a file; allowed are .parquet and .arrow files, tables of paths and labels (.csv, .tsv, "
        ".jsonl), folders and Hub names"
    )


def _require_text(name: str) -> None:
    """Raise DataError for a path that is not UTF-8, which neither recipe.yaml nor resolved.yaml could hold."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raise DataError(
            f"{one_line(name)}: this path is not UTF-8, so a recipe can't hold it; rename it, or link to it (ln -s)"
        ) from None


def _names_in(path: str) -> list[str]:
    try:
        return os.listdir(path)
    except OSError as error:
        raise DataError(f"{one_line(path)}: can't be listed: {error.strerror}") from None


def _open_saved(path: str) -> Splits:
    """Return the splits of a folder that `save_to_disk` has written."""
    listed = Path(path, "dataset_dict.json")
    if not os.path.lexists(listed):
        return Splits({"train": partial(_load_saved, path)})
    try:
        names = read_object(listed).get("splits")
    except (OSError, ValueError) as error:
        raise DataError(f"{one_line(str(listed))}: can't be read: {reason(error)}") from None
    folders = os.listdir(path)
    if not isinstance(names, list) or not names or any(name not in folders for name in names):
        raise DataError(f"{one_line(str(listed))}: its splits are {shown(names)}; they must be folders beside it")
    return Splits({name: partial(_load_saved, os.path.join(path, name)) for name in names})


def _load_saved(path: str) -> Any:
    """Return a saved dataset. `load_from_disk` takes a path such as a::b for an address."""
    import datasets
    from datasets.table import MemoryMappedTable, concat_tables

    try:
        state, info = (read_object(Path(path, name)) for name in ("state.json", "dataset_info.json"))
        files = [os.path.join(path, os.path.basename(file["filename"])) for file in state["_data_files"]]
        for file in files:
            require_regular(file)
        table = concat_tables([MemoryMappedTable.from_file(file) for file in files])
        return datasets.Dataset(table, info=datasets.DatasetInfo.from_dict(info), fingerprint=state["_fingerprint"])
    except Exception as error:  # noqa: BLE001 - `datasets` takes files that anybody may have written as sound
        raise DataError(f"{one_line(path)}: can't be read as a saved data set: {first_line(error)}") from None


def _splits_of_object(dataset: Any) -> dict[str, Any]:
    import datasets

    splits = dict(dataset) if isinstance(dataset, Mapping) else {"train": dataset}
    for split in splits.values():
        if not isinstance(split, datasets.Dataset):
            raise DataError(
                f"the dataset passed in holds a {type(split).__name__}; allowed are datasets.Dataset and "
                "DatasetDict (streaming datasets are not supported)"
            )
    return splits


def _no_such_path(name: str) -> str:
    """Return the message for a path that does not exist, with the most likely one."""
    if windows := re.match(r"([A-Za-z]):[\\/]", name):
        below = name[3:].replace("\\", "/")
        return f"{one_line(name)}: is a path of Windows; under WSL it is /mnt/{windows[1].lower()}/{one_line(below)}"
    try:
        path = expand_user(name)
    except RunError as error:  # ~ without a home folder
        return str(error)
    if not os.path.isdir(path.parent):
        return f"{one_line(name)}: no such file or folder; {one_line(str(path.parent))} does not exist either"
    where = "the current folder" if path.parent == Path() else one_line(str(path.parent))
    hint = _nearest_sibling(path)
    return f"{one_line(name)}: no such file or folder in {where}{hint and f'.{hint}'}"


def _nearest_sibling(path: Path) -> str:
    """Return a hint that names what is in the same folder with the nearest name; "" if there is nothing like it."""
    try:
        close = closest(path.name, os.listdir(path.parent))
    except OSError:
        return ""
    return f" Did you mean '{one_line(str(path.parent / close[0]))}'?" if close else ""
