"""The splits of a dataset on the Hub: those that are used are downloaded and prepared, together, and no others."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from hf_fasttrain.data.source.splits import Splits, opened
from hf_fasttrain.data.source.table_files import cache_error
from hf_fasttrain.utils.errors import DataError, first_line

FOLDER = "hf_fasttrain"  # in the cache of `datasets`, whose own folders have whole datasets


def open_hub(name: str, config: str | None = None, revision: str | None = None, *, hint: str = "") -> Splits:
    """Return the splits of a dataset on the Hub. Raises DataError if it can't be downloaded or read; `hint` ends it.

    A dataset that `datasets` has in its cache as a whole is read from there. Without a network, so are splits that were
    prepared earlier.
    """
    import datasets

    prepared = _Prepared(name, config, revision)
    with _errors(name, hint):
        try:
            builder = datasets.load_dataset_builder(name, config, revision=revision)
        except Exception:
            if not (earlier := prepared.newest()):
                raise
            return Splits({split: partial(_read, folder, split) for split, folder in earlier.items()})
        files = builder.config.data_files
        if not isinstance(files, dict) or len(files) == 1 or os.path.isdir(builder.cache_dir):
            return opened(dict(datasets.load_dataset(name, config, revision=revision)))
    preparing = _Preparing(name, builder, prepared)
    return Splits({str(split): partial(preparing.open, str(split)) for split in files}, use=preparing.use)


class _Prepared:
    """The folders of prepared splits: .../NAME/CONFIG/REVISION/SPLITS/HASH."""

    def __init__(self, name: str, config: str | None, revision: str | None) -> None:
        import datasets

        parts = (name, config or "default", revision or "main")
        safe = (part.replace("/", "___") for part in parts)
        self.root = Path(datasets.config.HF_DATASETS_CACHE, FOLDER, *safe)

    def folder(self, used: set[str], version: str) -> Path:
        """Return the folder in which all `used` splits of a version are, or shall be."""
        there = (folder for folder, splits in self._folders(version) if used <= splits)
        return next(there, self.root / "+".join(sorted(used)) / version)

    def newest(self) -> dict[str, Path]:
        """Return split -> the folder in which it was prepared last."""
        folders = sorted(self._folders(), key=lambda found: found[0].stat().st_mtime)
        return {split: folder for folder, splits in folders for split in sorted(splits)}

    def _folders(self, version: str = "*") -> Iterator[tuple[Path, set[str]]]:
        for file in sorted(self.root.glob(f"*/{version}/dataset_info.json")):
            yield file.parent, set(file.parent.parent.name.split("+"))


class _Preparing:
    """Prepares the splits that are used."""

    def __init__(self, name: str, builder: Any, prepared: _Prepared) -> None:
        self.name, self.builder, self.prepared = name, builder, prepared
        self.files = builder.config.data_files
        self.version = Path(builder.cache_dir).name
        self.used: set[str] = set()

    def use(self, names: Iterable[str]) -> None:
        """Prepare these splits together: class names that are told from folders are then the same."""
        self.used |= set(names)

    def open(self, split: str) -> Any:
        """Return a split."""
        self.use([split])
        folder = self.prepared.folder(self.used, self.version)
        with _errors(self.name):
            if not (folder / "dataset_info.json").exists():
                chosen = {name: files for name, files in self.files.items() if str(name) in self.used}
                self.builder.config.data_files = type(self.files)(chosen)
                self.builder.download_and_prepare(str(folder), verification_mode="no_checks")
            return _read(folder, split)


def _read(folder: Path, split: str) -> Any:
    """Return a split of a folder that `download_and_prepare` has written."""
    import datasets

    info = datasets.DatasetInfo.from_directory(str(folder))
    files = sorted(folder.glob(f"*-{split}.arrow")) or sorted(folder.glob(f"*-{split}-[0-9]*-of-[0-9]*.arrow"))
    parts = [datasets.Dataset.from_file(str(file), info=info, split=datasets.Split(split)) for file in files]
    return datasets.concatenate_datasets(parts) if len(parts) > 1 else parts[0]


@contextmanager
def _errors(name: str, hint: str = "") -> Iterator[None]:
    from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
    from huggingface_hub.errors import HfHubHTTPError

    try:
        yield
    except DatasetGenerationError as error:
        cause = error.__cause__ or error
        raise cache_error(cause) or DataError(f"data.dataset: '{name}' can't be read: {first_line(cause)}") from None
    except (DatasetNotFoundError, HfHubHTTPError, OSError, ValueError) as error:
        raise cache_error(error) or DataError(
            f"data.dataset: '{name}' is not a local file or folder, and could not be downloaded from the Hub: "
            f"{first_line(error).rstrip('.')}. Give a path (./{name}), digits, or check name, data.config and network."
            f"{hint}"
        ) from None
