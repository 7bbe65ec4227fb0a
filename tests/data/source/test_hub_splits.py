"""Datasets on the Hub: only the splits that are used are read. A folder that `datasets` reads stands in for one."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from PIL import Image

from hf_fasttrain.data.source import opening
from hf_fasttrain.data.source.dataset import load_source
from hf_fasttrain.data.source.evaluation_split import load_evaluation_split
from hf_fasttrain.data.source.hub_splits import FOLDER, open_hub
from hf_fasttrain.utils.errors import DataError

FEATURES = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})


def png(grey: int) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.new("L", (8, 8), grey).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder of parquet files whose test split has another form, which is opened in place of Hub names."""
    folder = tmp_path / "flowers" / "data"
    folder.mkdir(parents=True)
    for number, split in enumerate(("train", "validation", "extra")):
        rows = {"image": [png(100 * number + i) for i in range(4)], "label": [0, 1, 0, 1]}
        datasets.Dataset.from_dict(rows, features=FEATURES).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    datasets.Dataset.from_dict({"file": ["a.png"]}).to_parquet(folder / "test-00000-of-00001.parquet")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(opening, "open_hub", lambda *_, **__: open_hub(str(folder.parent)))
    return folder


def prepared(tmp_path: Path) -> list[str]:
    """Return the splits that were prepared, those of one preparation joined by +."""
    return sorted(path.parent.parent.name for path in (tmp_path / "cache" / FOLDER).rglob("dataset_info.json"))


def test_splits_that_are_not_used_are_not_read(repository: Path, tmp_path: Path) -> None:
    source = load_source("somebody/flowers")
    assert (len(source.train), len(source.evaluation), source.class_names) == (4, 4, ["cat", "dog"])
    assert [record["bytes"] for record in source.evaluation.records([0])] == [png(100)["bytes"]]
    assert prepared(tmp_path) == ["train+validation"]
    assert any("has a split 'test' too, which is not used" in note for note in source.notes)
    assert any("other splits, which are not used: extra" in note for note in source.notes)
    load_evaluation_split("somebody/flowers", multi_label=False)
    assert prepared(tmp_path) == ["train+validation"]  # read again
    load_evaluation_split("somebody/flowers", multi_label=False, split="extra")
    assert prepared(tmp_path) == ["extra", "train+validation"]


def test_a_used_split_of_another_form_is_one_message(repository: Path) -> None:
    with pytest.raises(DataError, match=r"flowers' can't be read: Couldn't cast"):
        load_source("somebody/flowers", test_split="test")


def test_prepared_splits_are_read_without_a_network(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load_source("somebody/flowers")

    def unreachable(*args: Any, **options: Any) -> Callable[..., Any]:
        raise ConnectionError("Couldn't reach the Hub (offline)")

    monkeypatch.setattr(datasets, "load_dataset_builder", unreachable)
    source = load_source("somebody/flowers")
    assert [len(source.train), len(source.evaluation), source.class_names] == [4, 4, ["cat", "dog"]]
    with pytest.raises(DataError, match="'extra' is not a split"):
        load_evaluation_split("somebody/flowers", multi_label=False, split="extra")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "other")
    with pytest.raises(DataError, match=r"could not be downloaded from the Hub: Couldn't reach the Hub \(offline\)"):
        load_source("somebody/flowers")


def test_a_dataset_that_is_cached_as_a_whole_is_not_prepared_again(repository: Path, tmp_path: Path) -> None:
    (repository / "test-00000-of-00001.parquet").unlink()
    whole = datasets.load_dataset(str(repository.parent))
    source = load_source("somebody/flowers", test_split="extra")
    assert source.test is not None
    assert [record["bytes"] for record in source.test.records([3])] == [png(203)["bytes"]]
    assert len(whole) == 3
    assert prepared(tmp_path) == []


@pytest.mark.parametrize("where", ["/proc/nowhere/datasets", "{}/file/datasets"])
def test_a_cache_that_can_not_be_written_is_named(
    where: str, repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    cache = where.format(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", cache)
    for dataset in ("somebody/flowers", str(repository / "train-00000-of-00001.parquet")):
        with pytest.raises(DataError, match=rf"^{cache}: the cache of `datasets`, .* can't be written \(.*; set HF_"):
            load_source(dataset)
