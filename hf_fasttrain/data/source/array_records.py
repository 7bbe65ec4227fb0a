"""Images that a data set holds as arrays or nested lists of numbers, given as encoded images."""

from __future__ import annotations

from typing import Any

import numpy as np

from hf_fasttrain.data.source.records import Record, Stamp
from hf_fasttrain.utils.errors import DataError
from hf_fasttrain.utils.private_apis import dataset_fingerprint

CHANNELS = (1, 3, 4)


class ArrayRecords:
    """The `column` of an HF dataset whose rows are (H, W) or (H, W, 1), (H, W, 3), (H, W, 4) integers from 0 to 255.

    (1, H, W) and (3, H, W) are turned. Raises DataError if the first row is none of these; a later one is a bad image.
    """

    def __init__(self, dataset: Any, column: str, where: str) -> None:
        self.dataset, self.column = dataset.select_columns([column]).with_format("arrow"), column
        for row in range(min(len(dataset), 100)):  # the first ones may be missing
            value = self._value(row)
            if value is not None:
                problem = _problem(value)
                if problem:
                    raise DataError(
                        f"{where}: column '{column}', row {row}: {problem}; images are (H, W) or (H, W, 3) integers "
                        "from 0 to 255. Convert them, or store encoded images (datasets.Image)"
                    )
                break

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, row: int) -> Record:
        """Return the record of a row, whose bytes are a PPM image: its pixels behind a short header."""
        value = self._value(row)
        if value is None:
            return {"bytes": None, "path": None}
        problem = _problem(value)
        return {"bytes": memoryview(problem.encode() if problem else _ppm(np.asarray(value))), "path": None}

    def _value(self, row: int) -> np.ndarray | str | None:
        """Return an array, or what keeps the value from being one."""
        (chunk,) = self.dataset[row].column(self.column).chunks
        return _array_of(getattr(chunk, "storage", chunk))  # of Array2D and Array3D

    @property
    def fingerprint(self) -> str:
        """HF datasets' fingerprint of the dataset."""
        return dataset_fingerprint(self.dataset)

    def stamp(self, row: int) -> Stamp:
        """Return no values: the fingerprint covers the pixels."""
        return 0, 0, 0


def _array_of(column: Any) -> np.ndarray | str | None:
    """Return the array in a column of one row of nested lists; a text if they are none, None if it is missing.

    The numbers of a list lie side by side in Arrow: as Python's numbers, a photo would take a quarter of a second.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    if column.null_count:
        return None
    shape = list[int]()
    while not pa.types.is_primitive(column.type):
        lengths = pc.list_value_length(column)
        extremes = pc.min_max(lengths).as_py()
        if lengths.null_count or extremes["min"] != extremes["max"]:
            return "rows of different lengths"
        shape.append(extremes["max"] or 0)
        column = pc.list_flatten(column)
    if column.null_count:
        return "missing values"
    return column.to_numpy(zero_copy_only=False).reshape(shape)


def _problem(value: np.ndarray | str) -> str:
    """Return what keeps a value from being an image, nothing if it is one."""
    if isinstance(value, str):
        return value
    shape = " x ".join(map(str, value.shape))
    if value.dtype.kind not in "iub" or value.ndim not in (2, 3) or not value.size:
        return f"an array of {value.dtype}, {shape}"
    if value.ndim == 3 and value.shape[-1] not in CHANNELS and value.shape[0] not in CHANNELS:
        return f"an array of {shape} with neither 1, 3 nor 4 channels"
    least, most = int(value.min()), int(value.max())
    return f"values from {least} to {most}" if least < 0 or most > 255 else ""


def _ppm(value: np.ndarray) -> bytes:
    if value.ndim == 3 and value.shape[-1] not in CHANNELS:
        value = value.transpose(1, 2, 0)
    pixels = value.astype(np.uint8) * np.uint8(255 if value.dtype == bool else 1)
    if pixels.ndim == 3:
        pixels = pixels[..., :3] if pixels.shape[-1] != 1 else pixels[..., 0]  # alpha is dropped
    height, width = pixels.shape[:2]
    return f"P{6 if pixels.ndim == 3 else 5} {width} {height} 255\n".encode() + pixels.tobytes()
