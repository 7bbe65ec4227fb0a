"""Writes tables with odd label columns at random and checks them: labels are what the table says, or one message.

    python tests/fuzz_labels.py [--count 10000] [--seed N] [--jobs 2] [--keep FOLDER]

Columns have any type of Arrow, any values and names, and the metadata of `datasets` with changes; files are parquet,
Arrow, metadata.csv and metadata.jsonl, some with changed bytes. What is accepted is compared with a plain reading of
the values. `helpers/fuzzing.py` says what is wrong with the outcome of a command. `data/source/test_labels.py` runs a
short form of it.
"""

from __future__ import annotations

import csv
import json
import random
import shutil
from collections.abc import Callable, Sequence
from datetime import date, datetime, timedelta
from decimal import Decimal
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
from helpers.fuzzing import Case, fuzz_from_command_line
from PIL import Image

NUM_ROWS = 12
RECIPE = """\
model: {name: test_resnet}
data: {dataset: DATASET, image_size: 32, workers: 0, cache: none}
train: {duration: 1 step, batch_size: 4}
log: {report: false}
"""
TEXTS = [
    "cat", "dog", "Cat", "cat ", " cat", "caf\u00e9", "cafe\u0301", "\ufb01sh", "fish", "007", "7", "7.0", "1e3",
    "1000", "True", "true", "nan", "NaN", "null", "None", "N/A", "", " ", "\t", "\0", "a\0b", "\x1b[31mred",
    "\u202ered", "\n", "a\nb", "a/b", "../../x", "|", "`x`", "<b>x</b>", "[bold]x", "{x}", "%s", "\U0001f431",
    "\u200b", "2024-01-01", "-1", "0", "1", "2", "label", "LABEL_0", "hf_" + "a" * 34, "x" * 5000, "train", "\ud7ff",
    "\uffff",
]  # fmt: skip
NUMBERS = [0, 1, 2, 3, 5, 7, 10, 100, 127, -1, -2, -100, 255, 999, 10**6, 2**31 - 1, -(2**31), 2**53 + 1, 2**63 - 1]
FLOATS = [0.0, 1.0, 2.0, -0.0, 0.5, 1e-9, 1e15, 1e16, 1e300, float("nan"), float("inf"), float("-inf"), -1.0, 3.0]
INTEGER_TYPES = [pa.int8(), pa.int16(), pa.int32(), pa.int64(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64()]
OTHERS: list[tuple[Any, list[Any]]] = [
    (pa.date32(), [date(2024, 1, 1), date(1, 1, 1)]),
    (pa.timestamp("us"), [datetime(2024, 1, 1), datetime(1970, 1, 1)]),
    (pa.duration("s"), [timedelta(1), timedelta(0)]),
    (pa.decimal128(9, 2), [Decimal("1.00"), Decimal("2.50")]),
    (pa.struct({"a": pa.int64()}), [{"a": 1}, {"a": 2}]),
    (pa.struct({"bytes": pa.binary(), "path": pa.string()}), [{"bytes": b"x", "path": None}]),
    (pa.map_(pa.string(), pa.int64()), [[("a", 1)], []]),
    (pa.binary(), [b"cat", b"\xff", b""]),
    (pa.binary(2), [b"ab", b"cd"]),
    (pa.null(), [None]),
    (pa.list_(pa.list_(pa.int64())), [[[0], [1]], [[1]], []]),
    (pa.list_(pa.struct({"x": pa.int64()})), [[{"x": 1}], []]),
]
NAMES = [
    "label", "label", "label", "label", "labels", "class", "Label", "category", "tags", "", "x", "image", "label\n",
    "\x1b",
]  # fmt: skip
FEATURES: list[Any] = [
    {"_type": "ClassLabel", "names": ["a", "b", "c"]}, {"_type": "ClassLabel", "names": []}, {"_type": "ClassLabel"},
    {"_type": "ClassLabel", "num_classes": 3}, {"_type": "ClassLabel", "names": ["a", "a", "b"]},
    {"_type": "Nonsense"}, {"_type": "ClassLabel", "names": [1, 2, 3]},
    {"_type": "ClassLabel", "names": ["", " ", "\x1b[31m"]}, [], 3, None, {}, {"_type": "Value", "dtype": "string"},
    {"_type": "Value", "dtype": "int64"}, {"_type": "Value", "dtype": "nonsense"},
    {"_type": "List", "feature": {"_type": "ClassLabel", "names": ["a", "b", "c"]}}, {"_type": "Image"},
    {"_type": "Sequence", "feature": {"_type": "Value", "dtype": "int64"}},
    {"_type": "Array2D", "shape": [1], "dtype": "x"}, {"_type": "ClassLabel", "names": "abc"},
    {"_type": "ClassLabel", "names": ["x" * 10**5] * 3}, {"_type": ["ClassLabel"]},
]  # fmt: skip


def draw(pool: Sequence[Any], rng: random.Random) -> list[Any]:
    """Return a value for each row, of a few of a pool."""
    few = rng.sample(list(pool), min(len(pool), rng.choice((1, 2, 3, 4, 8))))
    return [rng.choice(few) for _ in range(NUM_ROWS)]


def plain_column(rng: random.Random) -> tuple[Any, list[Any]]:
    """Return a type of Arrow and a value for each row."""
    match rng.choice(("text", "text", "integer", "integer", "from zero", "float", "flag")):
        case "text":
            return rng.choice((pa.string(), pa.large_string())), draw(TEXTS, rng)
        case "integer":
            kind = rng.choice(INTEGER_TYPES)
            least, most = (
                (0, 2**kind.bit_width)
                if "u" in str(kind)
                else (-(2 ** (kind.bit_width - 1)), 2 ** (kind.bit_width - 1))
            )
            return kind, draw([number for number in NUMBERS if least <= number < most], rng)
        case "float":
            return rng.choice((pa.float32(), pa.float64())), draw(FLOATS, rng)
        case "flag":
            return pa.bool_(), draw([True, False], rng)
    return pa.int64(), [rng.randrange(3) for _ in range(NUM_ROWS)]


def any_column(rng: random.Random) -> tuple[Any, list[Any]]:
    """Return a type of Arrow and a value for each row: plain ones, lists of them, dictionaries, and any others."""
    kind, values = plain_column(rng)
    match rng.choice(("plain", "plain", "plain", "lists", "vectors", "dictionary", "other")):
        case "lists":
            lists = [rng.sample(values, rng.choice((0, 1, 1, 1, 2, 3))) for _ in values]
            if rng.random() < 0.5:
                lists = [sorted(set(each), key=str) for each in lists]
            kind, values = rng.choice((pa.list_, pa.large_list))(kind), lists
        case "vectors":
            width = rng.choice((1, 2, 3, 5))
            number = rng.choice((int, float, bool))
            values = [[number(rng.random() < 0.4) for _ in range(width)] for _ in values]
            if rng.random() < 0.5:
                values = [[number(place == row % width) for place in range(width)] for row in range(NUM_ROWS)]
            element = {int: rng.choice((pa.int8(), pa.int64())), float: pa.float32(), bool: pa.bool_()}[number]
            kind = pa.list_(element, rng.choice((-1, width)))
        case "dictionary":
            kind = pa.dictionary(pa.int32(), kind)
        case "other":
            kind, pool = rng.choice(OTHERS)
            values = [rng.choice(pool) for _ in values]
    if rng.random() < 0.12:
        values[rng.randrange(NUM_ROWS)] = None
    return kind, values


def plain_texts(value: Any, names: Sequence[str] | None, *, is_vector: bool) -> set[str]:
    """Return the class names that a row's value stands for, by a plain reading."""
    if is_vector:
        return {str(place) for place, each in enumerate(value) if each}
    entries = value if isinstance(value, list) else [value]
    if not all(isinstance(each, str | int | float) for each in entries):
        raise AssertionError(f"{value!r} was accepted as a label")
    if names is not None:
        return {names[each] for each in entries}
    return {each if isinstance(each, str) else str(each if isinstance(each, bool) else int(each)) for each in entries}


def compare(dataset: str, table: Any, label: str, options: dict[str, Any]) -> None:
    """Raise AssertionError if what `load_source` reads is not what the table says; a DataError is for the command."""
    import datasets

    from hf_fasttrain.data.source.dataset import load_source
    from hf_fasttrain.utils.errors import UserError

    datasets.config.HF_DATASETS_CACHE = Path("cache").absolute()
    try:
        source = load_source(dataset, **options)
    except UserError:
        return
    if table is None or source.columns.label != label:
        return
    values = table.column(label).to_pylist()
    feature = datasets.Features.from_arrow_schema(table.schema)[label]
    names = getattr(getattr(feature, "feature", feature), "names", None)
    widths = {len(value) if isinstance(value, list) else 0 for value in values}
    flat = {each for value in values if isinstance(value, list) for each in value}
    is_vector = len(widths) == 1 and widths.pop() >= 2 and flat <= {0, 1} and names is None
    for row, value in enumerate(values):
        found = source.train.labels[row]
        numbers = np.flatnonzero(found) if source.multi_label else [found]
        got = {source.class_names[number] for number in numbers}
        assert got == plain_texts(value, names, is_vector=is_vector), f"row {row} is {value!r}, read as {got}"


def prepare(place: Path) -> None:
    """Write images for the metadata files."""
    folder = place / "given" / "images"
    folder.mkdir(parents=True)
    for row in range(NUM_ROWS):
        Image.new("RGB", (34, 36), (20 * row, 99, 0)).save(folder / f"{row}.png")


def table_of(rng: random.Random, image: Callable[[int], Any]) -> tuple[Any, str]:
    """Return a table of images and labels, and the name of the column of labels."""
    kind, values = any_column(rng)
    name = rng.choice(NAMES)
    images = [image(row) for row in range(NUM_ROWS)]
    columns = [("image", pa.array(images)), (name, pa.array(values, kind))]
    if rng.random() < 0.2:
        other, more = any_column(rng)
        columns.append((rng.choice(NAMES), pa.array(more, other)))
    table = pa.table([array for _, array in columns], names=[each for each, _ in columns])
    if rng.random() < 0.35:
        features = {"image": {"_type": "Image"}, name: rng.choice(FEATURES)}
        described = rng.choice(
            (json.dumps({"info": {"features": features}}),) * 5 + ("{", "[]", '{"info": 3}', "[" * 9999)
        )
        table = table.replace_schema_metadata({"huggingface": described})
    return table, name


def write_table(path: Path, table: Any) -> None:
    """Write a parquet or an Arrow file."""
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(table, path)
        return
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def write_metadata(path: Path, values: list[Any], name: str) -> None:
    """Write a metadata.csv or metadata.jsonl with a label for each image."""
    rows = [{"file_name": f"{row}.png", name: value} for row, value in enumerate(values)]
    with path.open("w", encoding="utf-8", errors="surrogatepass", newline="") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, default=str) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, ["file_name", name])
            writer.writeheader()
            writer.writerows(rows)


def case(seed: int, index: int, place: Path) -> Case:
    """Write a table, and return how to check it."""
    rng = random.Random(f"{seed} {index}")
    given, table, label = place / "given", None, ""
    for name in ("tables", "cache"):
        shutil.rmtree(given / name, ignore_errors=True)
    for old in given.glob("images/metadata.*"):
        old.unlink()
    form = rng.choice(("parquet", "parquet", "parquet", "arrow", "metadata.csv", "metadata.jsonl"))
    if form.startswith("metadata"):
        dataset, files = "images", [given / "images" / form]
        write_metadata(files[0], any_column(rng)[1], rng.choice(NAMES))
    else:
        dataset = "tables"
        (given / "tables").mkdir()
        files = [given / "tables" / f"{split}.{form}" for split in ("train", "validation")]
        table, label = table_of(rng, partial(_record, dark=rng.randrange(200)))
        for file in files:
            write_table(file, table)
    damaged = rng.random() < 0.1
    if damaged:
        data = bytearray(files[0].read_bytes())
        for _ in range(rng.randint(1, 6)):
            data[-1 - rng.randrange(min(len(data), rng.choice((100, 3000))))] ^= 1 << rng.randrange(8)
        files[0].write_bytes(data)
    (given / "recipe.yaml").write_text(RECIPE.replace("DATASET", dataset))
    options: dict[str, Any] = {}
    if rng.random() < 0.3:
        options["multi_label"] = rng.random() < 0.5
    if rng.random() < 0.3:
        options["label_column"] = label or rng.choice(NAMES)
    overrides = [f"data.{key}={json.dumps(value)}" for key, value in options.items()]
    kind = "" if table is None else f" of {', '.join(str(field.type) for field in table.schema)}"
    description = f"{form}{kind} {'damaged ' if damaged else ''}{' '.join(overrides)}"
    sound = None if damaged else table
    watched = partial(compare, dataset, sound, label, options)
    return Case(description, [["check", "recipe.yaml", *overrides]], [given / "recipe.yaml", *files], watched)


def _record(row: int, dark: int) -> dict[str, Any]:
    buffer = BytesIO()
    Image.new("RGB", (34, 36), (20 * row, dark, 0)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": None}


def main() -> None:
    """Print the seed, what went wrong, and the counts; exit status 1 if anything went wrong."""
    fuzz_from_command_line(__doc__ or "", prepare, case)


if __name__ == "__main__":
    main()
