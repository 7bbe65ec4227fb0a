"""Folders that `save_to_disk` has written, and what a stranger may have made of them."""

from __future__ import annotations

import os
from pathlib import Path

import datasets
import pytest

from hf_fasttrain.data.source.dataset import load_source
from hf_fasttrain.utils.errors import DataError

STATE, INFO, SPLITS, TABLE = "state.json", "dataset_info.json", "dataset_dict.json", "data-00000-of-00001.arrow"
HOSTILE = [
    (INFO, "[]", "is not a JSON object"),
    (INFO, '{"features": 3}', "can't be read as a saved data set"),
    (INFO, '{"features": {"image": {"_type": "Nope"}}}', "Feature type 'Nope' not found"),
    (INFO, None, "a FIFO, not a regular file"),
    (STATE, "[" * 100_000, "nested more than 100 levels deep"),
    (STATE, '{"_data_files": [{"filename": 3}], "_fingerprint": "x"}', "not int"),
    (STATE, '{"_data_files": [{"filename": "../../x"}], "_fingerprint": "x"}', "No such file"),
    (TABLE, None, "a FIFO, not a regular file"),
    (TABLE, "junk", "can't be read as a saved data set"),
    (SPLITS, "[]", "dataset_dict.json: can't be read: is not a JSON object"),
    (SPLITS, "{}", "its splits are None; they must be folders beside it"),
    (SPLITS, '{"splits": ["../ok"]}', r"its splits are \['../ok'\]; they must be"),
    (SPLITS, '{"splits": {"train": 1}}', "its splits are {'train': 1}; they must be"),
    (SPLITS, None, "a FIFO, not a regular file"),
]


@pytest.mark.parametrize(("name", "text", "expected"), HOSTILE)
def test_a_damaged_saved_dataset_is_one_message(name: str, text: str | None, expected: str, tmp_path: Path) -> None:
    data = {"image": [str(tmp_path / "a.png")] * 8, "label": ["cat", "dog"] * 4}
    datasets.Dataset.from_dict(data).save_to_disk(str(tmp_path / "saved"))
    path = tmp_path / "saved" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path) if text is None else path.write_text(text)
    with pytest.raises(DataError, match=expected):
        load_source(str(tmp_path / "saved"))
