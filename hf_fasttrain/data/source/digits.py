"""The data set `digits`: scikit-learn's 1,797 handwritten digits, 8x8 pixels, which ship with scikit-learn."""

from __future__ import annotations

import io
from functools import cache

import numpy as np

from hf_fasttrain.data.source.file_split import IMAGE, LABEL, FileSplit
from hf_fasttrain.data.source.records import EncodedRecords


@cache  # a process that opens several runs encodes them once
def digits_split() -> FileSplit:
    """Return the digits as PNGs in memory. Made without `datasets`, whose import takes longer than training a step."""
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = []
    for pixels in np.round(digits.images * (255 / 16)).astype(np.uint8):
        buffer = io.BytesIO()
        Image.fromarray(pixels).save(buffer, "PNG")
        images.append(buffer.getvalue())
    labels = digits.target.astype(np.int64)
    return FileSplit({IMAGE: EncodedRecords(images)}, {LABEL: labels}, [str(name) for name in digits.target_names])
