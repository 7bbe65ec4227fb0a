"""Folders whose images are in .zip files, which `datasets` unpacks into its cache."""

from __future__ import annotations

from typing import Any

from hf_fasttrain.utils.clean import one_line
from hf_fasttrain.utils.errors import DataError, first_line


def load_archives(root: str) -> dict[str, Any]:
    """Return the splits of metadata files that list images in archives, by `load_dataset("imagefolder")`."""
    import datasets

    verbosity = datasets.logging.get_verbosity()
    datasets.logging.set_verbosity(datasets.logging.CRITICAL)
    try:
        return dict(datasets.load_dataset("imagefolder", data_dir=root))
    except (datasets.exceptions.DatasetGenerationError, OSError, ValueError) as error:
        why = first_line(error.__cause__ or error)
        raise DataError(f"{one_line(root)}: the images in its archives can't be read: {why}; unpack them") from None
    finally:
        datasets.logging.set_verbosity(verbosity)
