"""Every form of image column that a data set can hold is read as its pixels, or refused in one message."""

from __future__ import annotations

import io
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from hf_fasttrain.data.pixels.decode import read_pixels
from hf_fasttrain.data.source.dataset import Source, load_source
from hf_fasttrain.data.source.fingerprint import fingerprint
from hf_fasttrain.utils.errors import DataError, ImageError

LABELS = ["cat", "dog"] * 4
COLOUR = [np.random.default_rng(i).integers(0, 256, (6, 5, 3), dtype=np.uint8) for i in range(len(LABELS))]
GREY = [pixels[..., 0] for pixels in COLOUR]


def png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def dataset(images: list[Any], feature: Any = None, name: str = "image") -> datasets.Dataset:
    if feature is None:
        return datasets.Dataset.from_dict({name: images, "label": LABELS})
    features = datasets.Features({name: feature, "label": datasets.Value("string")})
    return datasets.Dataset.from_dict({name: images, "label": LABELS}, features=features)


def load(data: Any, **options: Any) -> Source:
    return load_source(data, eval_fraction=0.25, **options)


def require_pixels(source: Source, expected: list[np.ndarray]) -> None:
    """Require that each split has the pixels of its rows."""
    for split in (source.train, source.evaluation):
        assert split.rows is not None
        for record, row in zip(split.records(range(len(split))), split.rows, strict=True):
            wanted = expected[row] if expected[row].ndim == 3 else np.repeat(expected[row][..., None], 3, 2)
            assert np.array_equal(read_pixels(record), wanted)


UINT8 = datasets.Value("uint8")
ARRAYS: dict[str, tuple[Callable[[], datasets.Dataset], list[np.ndarray]]] = {
    "nested lists": (lambda: dataset([pixels.tolist() for pixels in COLOUR]), COLOUR),
    "Array3D": (lambda: dataset(COLOUR, datasets.Array3D((6, 5, 3), "uint8")), COLOUR),
    "channels first": (
        lambda: dataset([pixels.transpose(2, 0, 1) for pixels in COLOUR], datasets.Array3D((3, 6, 5), "uint8")),
        COLOUR,
    ),
    "Array2D": (lambda: dataset(GREY, datasets.Array2D((6, 5), "uint8")), GREY),
    "lists of lists": (lambda: dataset(GREY, datasets.List(datasets.List(UINT8))), GREY),
    "one channel": (lambda: dataset([grey[..., None] for grey in GREY], datasets.Array3D((6, 5, 1), "int64")), GREY),
    "alpha": (
        lambda: dataset(
            [np.dstack([c, g]) for c, g in zip(COLOUR, GREY, strict=True)], datasets.Array3D((6, 5, 4), "uint8")
        ),
        COLOUR,
    ),
    "booleans": (
        lambda: dataset([grey > 99 for grey in GREY], datasets.Array2D((6, 5), "bool")),
        [(grey > 99) * np.uint8(255) for grey in GREY],
    ),
    "other sizes": (
        lambda: dataset([pixels[: 3 + i % 3].tolist() for i, pixels in enumerate(COLOUR)]),
        [pixels[: 3 + i % 3] for i, pixels in enumerate(COLOUR)],
    ),
}


@pytest.mark.parametrize("form", ARRAYS)
def test_arrays_are_images(form: str) -> None:
    build, expected = ARRAYS[form]
    source = load(build())
    require_pixels(source, expected)
    assert fingerprint(source) == fingerprint(load(build()))


def test_a_row_that_is_no_image_is_a_bad_image() -> None:
    source = load(dataset([*(pixels.tolist() for pixels in COLOUR[:6]), None, [[[1, 2]] * 2] * 2]))
    for row, reason in ((6, "missing"), (7, "not an image")):
        with pytest.raises(ImageError, match=reason):
            read_pixels(source.train.images[row])


FEATURE = datasets.Features
REFUSED: dict[str, tuple[Callable[[], datasets.Dataset], str]] = {
    "floats": (
        lambda: dataset([pixels / 255 for pixels in COLOUR], datasets.Array3D((6, 5, 3), "float32")),
        r"column 'image' \(Array3D 6x5x3 of float32\) can't be read as images; allowed are encoded images",
    ),
    "values beyond bytes": (
        lambda: dataset([pixels.astype(int) * 16 for pixels in COLOUR], datasets.Array3D((6, 5, 3), "int32")),
        r"column 'image', row 0: values from \d+ to \d{4}; images are",
    ),
    "seven channels": (
        lambda: dataset([np.zeros((6, 5, 7), np.uint8)] * 8, datasets.Array3D((6, 5, 7), "uint8")),
        "row 0: an array of 6 x 5 x 7 with neither 1, 3 nor 4 channels",
    ),
    "lists of images": (
        lambda: dataset([[Image.fromarray(pixels)] for pixels in COLOUR], datasets.List(datasets.Image()), "images"),
        r"column 'images' \(list of Image\) can't be read as images",
    ),
    "flat lists": (lambda: dataset([grey.ravel() for grey in GREY]), r"\(list of uint8\) can't be read as images"),
    "other structs": (lambda: dataset([{"data": b"x", "mime": "y"}] * 8), r"\(struct of data, mime\) can't be read"),
    "numbers": (lambda: dataset(list(range(8))), r"\(int64\) can't be read as images"),
    "addresses": (
        lambda: dataset([f"https://example.org/{i}.png" for i in range(8)]),
        "column 'image' holds addresses, which are not downloaded, such as 'https://example.org/0.png'",
    ),
    "lists with gaps": (lambda: dataset([[[1, None], [2, 3]]] * 8), "row 0: missing values; images are"),
    "lists of different lengths": (lambda: dataset([[[1, 2], [3]]] * 8), "row 0: rows of different lengths"),
    "other texts": (
        lambda: dataset(["iVBORw0KGgo="] * 8),
        "holds no paths of files: none of 8 exists, such as 'iVBORw",
    ),
}


@pytest.mark.parametrize("form", REFUSED)
def test_other_forms_are_one_message(form: str) -> None:
    build, expected = REFUSED[form]
    with pytest.raises(DataError, match=expected):
        load(build())


def test_texts_and_encoded_bytes_are_images(tmp_path: Path) -> None:
    for i, pixels in enumerate(COLOUR):
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    require_pixels(load(dataset([str(tmp_path / f"{i}.png") for i in range(8)])), COLOUR)
    require_pixels(load(dataset([png(pixels) for pixels in COLOUR])), COLOUR)


ODD_TABLES = ["plain", "p [v2]", "a::b", "zip::p", "a:b", "100%20#1", "{x}", "q?", "~u", "hf:::x"]


@pytest.mark.parametrize("name", ODD_TABLES)
def test_paths_of_tables_are_paths(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    data = dataset([{"bytes": png(pixels), "path": None} for pixels in COLOUR])
    Path(name).mkdir()
    with open(f"{name}/train.parquet", "wb") as file:
        pq.write_table(data.data.table, file)
    require_pixels(load(name), COLOUR)
    Path(f"{name}/train.parquet").rename(f"{name}.parquet")
    require_pixels(load(f"{name}.parquet"), COLOUR)
    data.save_to_disk("saved")
    Path(name).rmdir()
    Path("saved").rename(name)
    require_pixels(load(name), COLOUR)


@pytest.mark.parametrize("as_struct", [True, False])
def test_relative_paths_in_tables_are_beside_the_table(
    as_struct: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "data" / "pics").mkdir(parents=True)
    for i, pixels in enumerate(COLOUR):
        Image.fromarray(pixels).save(tmp_path / "data" / "pics" / f"{i}.png")
    paths = [f"pics/{i}.png" for i in range(8)]
    images = [{"bytes": None, "path": path} for path in paths] if as_struct else paths
    pq.write_table(pa.table({"image": images, "label": LABELS}), tmp_path / "data" / "train.parquet")
    for place in ("data", "data/train.parquet"):
        require_pixels(load(str(tmp_path / place)), COLOUR)
    monkeypatch.chdir(tmp_path / "data")
    pq.write_table(pa.table({"image": images, "label": LABELS}), tmp_path / "elsewhere.parquet")
    require_pixels(load(str(tmp_path / "elsewhere.parquet")), COLOUR)  # as `datasets` reads them


def test_tables_with_columns_that_datasets_does_not_know(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    images = pa.array([png(pixels) for pixels in COLOUR], pa.binary_view())
    odd = pa.array([[("a", 1)]] * 8, pa.map_(pa.string(), pa.int64()))
    pq.write_table(pa.table({"image": images, "label": LABELS, "odd": odd}), tmp_path / "a.parquet")
    source = load(str(tmp_path / "a.parquet"))
    require_pixels(source, COLOUR)
    assert any("not used: column odd" in note for note in source.notes)
    with pytest.raises(DataError, match=r"column 'odd' \(map<string, int64.*can't be read as labels"):
        load(str(tmp_path / "a.parquet"), label_column="odd")
    twice = pa.Table.from_arrays([pa.array(LABELS), images, pa.array(LABELS)], ["label", "image", "label"])
    pq.write_table(twice, tmp_path / "b.parquet")
    with pytest.raises(DataError, match=r"b.parquet: has column 'label' twice; rename one"):
        load(str(tmp_path / "b.parquet"))
    pq.write_table(pa.table({"image": images[:0], "label": pa.array([], pa.string())}), tmp_path / "c.parquet")
    with pytest.raises(DataError, match=r"c.parquet: split 'train' has no images"):
        load(str(tmp_path / "c.parquet"))
    pq.write_table(pa.table({"image": images}), tmp_path / "d.parquet")
    (tmp_path / "two").mkdir()
    for name in "ad":
        (tmp_path / f"{name}.parquet").rename(tmp_path / "two" / f"{name}.parquet")
    with pytest.raises(DataError, match=r"two/d.parquet: lacks column label, which a.parquet has"):
        load(str(tmp_path / "two"))


BYTES_AND_PATH: dict[str, tuple[pa.DataType, Any, str | None]] = {  # type, value, message
    "views": (pa.struct([("bytes", pa.binary_view()), ("path", pa.string_view())]), {"bytes": png(COLOUR[0])}, None),
    "bytes of a fixed number": (pa.binary(len(png(COLOUR[0]))), png(COLOUR[0]), None),
    "paths without a type": (pa.struct([("bytes", pa.binary()), ("path", pa.null())]), {"bytes": png(COLOUR[0])}, None),
    "numbers": (
        pa.struct([("bytes", pa.int8()), ("path", pa.int8())]),
        {"bytes": 1},
        "'image' can't be read as images",
    ),
}


@pytest.mark.parametrize("form", BYTES_AND_PATH)
def test_bytes_of_any_type_of_arrow_are_images(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    kind, value, message = BYTES_AND_PATH[form]
    images = pa.array([None, *[value] * 7], kind)
    pq.write_table(pa.table({"image": images, "label": LABELS}), tmp_path / "a.parquet")
    if message is not None:
        with pytest.raises(DataError, match=message):
            load(str(tmp_path / "a.parquet"))
        return
    source = load(str(tmp_path / "a.parquet"))
    assert np.array_equal(read_pixels(source.train.images[7]), COLOUR[0])
    with pytest.raises(ImageError, match="missing"):
        read_pixels(source.train.images[0])


def test_nested_lists_are_read_without_an_object_for_each_number() -> None:
    photo = np.random.default_rng(0).integers(0, 256, (500, 400, 3), dtype=np.uint8)
    images = load(dataset([photo, *[photo[:9]] * 7])).train.images
    start = time.process_time()
    assert np.array_equal(read_pixels(images[0]), photo)
    assert time.process_time() - start < 0.2  # as Python's numbers: 0.9 s


def test_a_cache_of_datasets_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", "/proc/nowhere/datasets")
    pq.write_table(pa.table({"image": [png(p) for p in COLOUR], "label": LABELS}), tmp_path / "train.parquet")
    with pytest.raises(DataError, match=r"/proc/nowhere/datasets: the cache of `datasets`.*set HF_DATASETS_CACHE"):
        load(str(tmp_path))
