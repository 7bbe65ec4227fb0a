"""The digits: images in memory, made without the library `datasets`."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_digits

from hf_fasttrain.data.source.digits import digits_split
from hf_fasttrain.data.source.records import EncodedRecords


def test_digits_are_scikit_learns_images_in_order() -> None:
    split, expected = digits_split(), load_digits()
    decoded = [np.asarray(Image.open(io.BytesIO(split.images["image"][row]["bytes"]))) for row in range(len(split))]
    np.testing.assert_array_equal(np.stack(decoded), np.round(expected.images * (255 / 16)).astype(np.uint8))
    np.testing.assert_array_equal(split.columns["label"], expected.target)
    assert split.class_names == [str(number) for number in range(10)]


def test_the_fingerprint_of_images_in_memory_changes_with_their_bytes_and_their_borders() -> None:
    images = ([b"ab", b"c"], [b"a", b"bc"], [b"ab", b"d"], [b"c", b"ab"])
    assert len({EncodedRecords(each).fingerprint for each in images}) == len(images)
    assert EncodedRecords([b"ab", b"c"]).fingerprint == EncodedRecords([b"ab", b"c"]).fingerprint
    assert EncodedRecords([b"ab", b"c"]).stamp(0) == (0, 0, 2)


def test_digits_and_folders_are_opened_without_importing_datasets(tmp_path: Path) -> None:
    code = (
        "import sys, numpy as np\nfrom pathlib import Path\nfrom PIL import Image\n"
        "from hf_fasttrain.data.source.dataset import load_source\n"
        "for name in ('cat', 'dog'):\n    Path(name).mkdir()\n"
        "    for number in range(4):\n        Image.new('RGB', (8, 8)).save(f'{name}/{number}.png')\n"
        "for dataset in ('digits', '.'):\n    source = load_source(dataset, eval_fraction=0.5)\n"
        "    source.train.records([0]), source.train.images.fingerprint\n"
        "assert 'datasets' not in sys.modules\n"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
