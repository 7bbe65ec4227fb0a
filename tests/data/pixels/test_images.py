"""Bad images are replaced, reported and counted; rows of all kinds of datasets are read."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from hf_fasttrain import Trainer
from hf_fasttrain.data.loading.prefetch import ImageBatches, Prefetcher
from hf_fasttrain.data.loading.sampler import MicroBatchKey
from hf_fasttrain.data.pixels.augment import EvalTransform, TrainTransform
from hf_fasttrain.data.pixels.bad_images import BadImage, BadImages, Event
from hf_fasttrain.data.pixels.images import Images
from hf_fasttrain.data.pixels.prepare import Preparation
from hf_fasttrain.data.source.dataset import Split, load_source
from hf_fasttrain.data.source.records import Records
from hf_fasttrain.run_folder import metrics_file
from hf_fasttrain.utils.errors import DataError

CPU = torch.device("cpu")


def png(value: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def split_of(contents: list[bytes | None]) -> Split:
    features = datasets.Features({"image": datasets.Image(decode=False)})
    rows = [None if content is None else {"bytes": content, "path": None} for content in contents]
    dataset = datasets.Dataset.from_dict({"image": rows}, features=features)
    return Split("train", Records(dataset), np.arange(len(contents)))


GOOD = [png(value) for value in range(10)]
BAD = [*GOOD[:3], b"", GOOD[4], GOOD[5][:40], None, GOOD[7], GOOD[8], b"not an image"]
STAND_INS = {3: 4, 5: 7, 6: 7, 9: 0}


def fetch(images: Images, indices: list[int]) -> tuple[list[int], list[int], list[Event]]:
    """Return the red value of each image, the indices used, and the notes."""
    used, events = np.zeros(len(indices), np.int64), []
    pixels = {position: found[0, 0, 0] for position, found in images.pixels(np.array(indices), used, events)}
    reds = [int(pixels[position]) for position in range(len(indices))]
    return reds, used.tolist(), events


def test_a_bad_image_is_replaced_by_the_next_good_one_with_its_label() -> None:
    images = Images(split_of(BAD), Preparation())
    reds, used, events = fetch(images, list(range(10)))
    assert reds == used == [STAND_INS.get(i, i) for i in range(10)]
    assert {event.index: event.substitute for event in events if isinstance(event, BadImage)} == STAND_INS
    reasons = [event.error for event in events if isinstance(event, BadImage)]
    assert "0 bytes" in reasons[0]
    assert "missing (null)" in reasons[2]
    assert "not an image" in reasons[3]
    reds, used, events = fetch(images, [9, 3])  # already known
    assert (reds, used, events) == ([0, 4], [0, 4], [])


def test_the_substitute_does_not_depend_on_earlier_images() -> None:
    for order in (range(10), range(9, -1, -1), [6, 3, 3, 9, 5]):
        reds, used, _ = fetch(Images(split_of(BAD), Preparation()), list(order))
        assert reds == used == [STAND_INS.get(i, i) for i in order]


@pytest.mark.parametrize("workers", [0, 2])
def test_labels_follow_the_substitutes_through_the_workers(workers: int, tmp_path: Path) -> None:
    bad = BadImages(tmp_path, 0.5, lambda text: None)
    images = ImageBatches(Images(split_of(BAD), Preparation(center=EvalTransform(8))))
    prefetcher = Prefetcher(images, CPU, workers=workers, pin_memory=False, report=bad.report)
    keys = [MicroBatchKey(epoch, np.arange(5) + start) for epoch in range(3) for start in (0, 5)]
    for (pixels, labels), key in zip(prefetcher.open(keys, 5), keys, strict=True):
        expected = [STAND_INS.get(i, i) for i in key.indices.tolist()]
        assert labels.tolist() == pixels[:, 0, 0, 0].tolist() == expected
    assert bad.count == 4
    lines = [json.loads(line) for line in (tmp_path / "bad_images.jsonl").read_text().splitlines()]
    assert {line["index"]: line["substitute"] for line in lines} == STAND_INS
    assert set(lines[0]) == {"split", "index", "path", "error", "substitute"}


def test_each_line_of_bad_images_is_read_once_by_each_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parsed = [0]
    real = metrics_file.parse_line
    monkeypatch.setattr(metrics_file, "parse_line", lambda line: parsed.__setitem__(0, parsed[0] + 1) or real(line))
    mine, others = (BadImages(tmp_path, 0.6, lambda text: None) for _ in range(2))
    for index in range(300):
        mine.report(BadImage("train", index, None, "x", 0), 1000)
        others.report(BadImage("train", index if index % 3 else 500 + index, None, "x", 0), 1000)
    assert (mine.count, others.count) == (400, 400)
    assert parsed[0] == 2 * 400
    for index in range(300, 500):
        mine.report(BadImage("train", index, None, "x", 0), 1000)
    with pytest.raises(DataError, match="601 of 1,000 images"):
        others.report(BadImage("train", 999, None, "x", 0), 1000)


def test_a_split_without_any_good_image_is_an_error() -> None:
    with pytest.raises(DataError, match=r"split 'train', row 2: image 0 bytes: .*; nor can any of"):
        fetch(Images(split_of([b""] * 5), Preparation()), [2])


def test_too_many_bad_images_stop_the_run_with_a_list(tmp_path: Path) -> None:
    messages: list[str] = []
    bad = BadImages(tmp_path, 0.02, messages.append)
    for index in range(2):
        bad.report(BadImage("train", index, f"{index}.jpg", "image x: can't be decoded", 9), 100)
        bad.report(BadImage("train", index, f"{index}.jpg", "image x: can't be decoded", 9), 100)
    assert bad.count == 2
    with pytest.raises(DataError, match=r"=0.02: 3 of 100 images of split 'train' (?s:.)*row 2: image x"):
        bad.report(BadImage("train", 2, "2.jpg", "image x: can't be decoded", 9), 100)
    assert len(messages) == 1
    assert "bad images are replaced by others: split 'train', row 0" in messages[0]
    bad.report("a note", 100)
    assert messages[1:] == ["a note"]
    resumed = BadImages(tmp_path, 1.0, messages.append)
    resumed.report(BadImage("train", 1, "1.jpg", "again", 9), 100)
    assert resumed.count == 3
    assert len((tmp_path / "bad_images.jsonl").read_text().splitlines()) == 3


def test_training_continues_after_a_bad_image_and_counts_it(
    image_folder: Path, tmp_path: Path, write_recipe: Any
) -> None:
    (image_folder / "train" / "red" / "0.jpg").write_bytes(b"not an image")
    recipe = write_recipe(
        f"model: {{name: test_resnet}}\n"
        f"data: {{dataset: {image_folder}, image_size: 32, workers: 1, max_bad_fraction: 0.05}}\n"
        "train: {duration: 2 epochs, batch_size: 8}\n"
    )
    result = Trainer.from_recipe(recipe, [f"output_dir={tmp_path / 'run'}"]).fit()
    assert result.bad_images == 1
    assert result.images == 48
    assert any("bad images are replaced by others" in note for note in result.notes)
    assert any(note.startswith("1 bad image was replaced by another; ") for note in result.notes)
    (line,) = (tmp_path / "run" / "bad_images.jsonl").read_text().splitlines()
    assert json.loads(line)["path"].endswith("0.jpg")
    with pytest.raises(DataError, match=r"max_bad_fraction=0.01: 1 of 24 images of split 'train' can't be"):
        Trainer.from_recipe(recipe, [f"output_dir={tmp_path / 'strict'}", "data.max_bad_fraction=0.01"]).fit()


def test_repeated_images_are_decoded_once() -> None:
    decoded = []

    class Counting(Preparation):
        def encoded(self, record: Any) -> Any:
            decoded.append(1)
            return super().encoded(record)

    reds, used, _ = fetch(Images(split_of(GOOD), Counting()), [3, 1, 3, 3, 1, 0])
    assert reds == used == [3, 1, 3, 3, 1, 0]
    assert len(decoded) == 3


@pytest.mark.parametrize("kind", ["bytes", "paths", "parquet", "selected", "concatenated", "sliced"])
def test_records_are_those_of_the_dataset(kind: str, tmp_path: Path) -> None:
    rows: list[Any] = [{"bytes": content, "path": f"ä{i}.png"} for i, content in enumerate(GOOD)]
    if kind == "paths":
        for i, content in enumerate(GOOD):
            (tmp_path / f"ä{i}.png").write_bytes(content)
        rows = [{"bytes": None, "path": str(tmp_path / f"ä{i}.png")} for i in range(10)]
    rows[4] = None if kind != "paths" else rows[4]
    dataset = datasets.Dataset.from_dict({"image": rows}, datasets.Features({"image": datasets.Image(decode=False)}))
    if kind == "parquet":
        dataset.to_parquet(tmp_path / "a.parquet")
        dataset = datasets.load_dataset("parquet", data_files=str(tmp_path / "a.parquet"), cache_dir=str(tmp_path))[
            "train"
        ].cast_column("image", datasets.Image(decode=False))
    elif kind == "selected":
        dataset = dataset.shuffle(seed=3).select([7, 1, 1, 3])
    elif kind == "concatenated":
        dataset = datasets.concatenate_datasets([dataset, dataset.select(range(3, 6)), dataset])
    elif kind == "sliced":
        dataset = dataset.select(range(3, 8))
    records = Records(dataset)
    assert len(records) == len(dataset)
    for row, expected in enumerate(dataset["image"]):
        record = records[row]
        expected_record = expected or {"bytes": None, "path": None}
        assert (None if record["bytes"] is None else bytes(record["bytes"])) == expected_record["bytes"]
        assert record["path"] == expected_record["path"]


def test_a_held_out_split_refers_to_rows_of_its_dataset(image_folder: Path) -> None:
    source = load_source(str(image_folder / "train"), eval_fraction=0.25)
    assert source.train.images is source.evaluation.images
    rows = np.concatenate([source.train.rows_of(np.arange(18)), source.evaluation.rows_of(np.arange(6))])
    assert sorted(rows.tolist()) == list(range(24))
    for split in (source.train, source.evaluation):
        for index, record in enumerate(split.records(range(len(split)))):
            assert f"/{source.class_names[split.labels[index]]}/" in record["path"]


def test_transforms_get_the_substitute_with_the_key_of_the_image() -> None:
    transform = TrainTransform(8, crop="padded", flip=False)
    batch = ImageBatches(Images(split_of(BAD), Preparation()), transform).make(MicroBatchKey(0, np.array([3])))
    assert np.array_equal(batch.pixels[0].numpy(), transform(np.full((8, 8, 3), (4, 0, 0), np.uint8), 0, 3))
