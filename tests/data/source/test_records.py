"""Undecoded images of a column in many chunks."""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow as pa
import pytest

from hf_fasttrain.data.source import records as records_module
from hf_fasttrain.data.source.records import Records


def test_few_chunks_of_a_column_are_kept_open(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(records_module, "MAX_CHUNKS", 3)
    lengths = [4, 0, 1, 7, 0, 0, 2, 5, 3]
    images = [f"image {number}".encode() * (number % 3 + 1) for number in range(sum(lengths))]
    rows = [{"bytes": image, "path": f"{number}.png"} for number, image in enumerate(images)]
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    ends = np.cumsum(lengths)
    chunks = [pa.array(rows[end - length : end], kind) for end, length in zip(ends, lengths, strict=True)]
    table = datasets.table.InMemoryTable(pa.table({"image": pa.chunked_array(chunks)}))
    records = Records(datasets.Dataset(table))
    order = [*range(len(rows)), *np.random.default_rng(0).permutation(len(rows)).tolist()]
    for row in order:
        record = records[row]
        assert (bytes(record["bytes"] or b""), record["path"]) == (images[row], f"{row}.png")
        assert len(records._chunks) <= 3
