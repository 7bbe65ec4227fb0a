"""Predictions for image files, row by row as they are computed: memory does not grow with their number."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from hf_fasttrain.data.loading.batch import Normalize
from hf_fasttrain.data.loading.file_batches import FileBatches
from hf_fasttrain.data.loading.prefetch import Batch, Prefetcher
from hf_fasttrain.data.loading.sampler import MicroBatchKey
from hf_fasttrain.data.pixels.bad_images import Event
from hf_fasttrain.data.source.image_files import IMAGE_SUFFIXES
from hf_fasttrain.data.source.inventory import Inventory, described, images_below, list_folder
from hf_fasttrain.data.source.records import FileRecords
from hf_fasttrain.from_recipe.auto import evaluation_batch_size
from hf_fasttrain.from_recipe.auto import workers as automatic_workers
from hf_fasttrain.from_recipe.loaders import eval_preparation
from hf_fasttrain.from_recipe.memory import evaluation_memory
from hf_fasttrain.models.model import ModelSpec, Preprocessing
from hf_fasttrain.train.thresholds import beyond
from hf_fasttrain.utils.environment import num_cores
from hf_fasttrain.utils.errors import DataError, LoaderNotStarted
from hf_fasttrain.utils.files import existing_path, reason, require_regular

LONG_LIST = 256  # images from which on loader processes are worth their start

# {"image": path, "classes": [{"class": name, "score": number}, ...]}, most likely class first; with thresholds also
# "predicted": [name, ...]
Row = dict[str, Any]


class PredictedBatch(NamedTuple):
    """The rows of some images in a row; `num_images` counts those that could not be decoded too."""

    num_images: int
    rows: list[Row]


class Predictions:
    """The `top` classes of image files, in their order; each iteration reads and predicts all of them.

    `workers`: loader processes, by default as in training for lists of LONG_LIST images or more, else 0. Of an image
    that can't be decoded, `on_bad_image` is called with the reason; DataError is raised without it. `note` is called
    with messages on loader processes. Scores are the probabilities of logits / `temperature`. `thresholds` of a
    multi-label model are of probabilities without it; rows then have the classes that are `predicted`.
    """

    def __init__(
        self,
        network: nn.Module,
        spec: ModelSpec,
        files: FileRecords,
        device: torch.device,
        *,
        top: int = 5,
        workers: int | None = None,
        on_bad_image: Callable[[str], None] | None = None,
        note: Callable[[str], None] = lambda _: None,
        temperature: float = 1.0,
        thresholds: Sequence[float] | None = None,
    ) -> None:
        self.network, self.spec, self.files, self.device = network, spec, files, device
        self.top, self.on_bad_image, self.note = min(top, spec.num_classes), on_bad_image, note
        self.temperature, self.thresholds = temperature, thresholds
        self.pre = preprocessing_of(spec)
        self.may_do_without_workers = workers is None
        self.workers = _workers_for(len(files), device) if workers is None else workers
        memory = evaluation_memory(network, spec.image_size, device, workers=self.workers)
        self.batch_size = evaluation_batch_size(micro_batch_size=0, **memory).value

    def __len__(self) -> int:
        """Return the number of image files."""
        return len(self.files)

    def __iter__(self) -> Iterator[Row]:
        for batch in self.batches():
            yield from batch.rows

    @property
    def longest_name(self) -> int:
        """The number of characters of the longest path."""
        return max(len(self.files[index]["path"]) for index in range(len(self)))

    def batches(self) -> Generator[PredictedBatch]:
        """Yield the rows batch by batch, as they are computed; batches of images that are all bad have none."""
        normalize = Normalize(self.pre.mean, self.pre.std, self.device, channels_last=True)
        for start, (pixels, indices) in zip(self._starts(0), self._loaded(), strict=True):
            rows = self._rows(normalize(pixels), indices) if len(indices) else []
            yield PredictedBatch(min(self.batch_size, len(self) - start), rows)

    def _starts(self, first: int) -> range:
        return range(first, len(self), self.batch_size)

    def _loaded(self) -> Iterator[Batch]:
        """Yield pixels and indices of the images of each batch; in this process if no other one can be started."""
        done = 0
        try:
            with closing(self._open(0, self.workers)) as batches:
                for batch in batches:
                    yield batch
                    done += self.batch_size
        except LoaderNotStarted as error:
            if not self.may_do_without_workers:
                raise
            self.note(f"{error}; images are decoded in this process")
            yield from self._open(done, 0)

    def _open(self, start: int, workers: int) -> Any:
        on_gpu = self.device.type == "cuda"
        images = FileBatches(self.files, eval_preparation(self.pre), self.pre.image_size)
        prefetcher = Prefetcher(images, self.device, workers=workers, pin_memory=on_gpu, report=self._report)
        stops = (min(first + self.batch_size, len(self)) for first in self._starts(start))
        keys = (MicroBatchKey(0, np.arange(*span)) for span in zip(self._starts(start), stops, strict=True))
        return iter(prefetcher.open(keys, self.batch_size))

    def _report(self, event: Event, num_images: int) -> None:
        if isinstance(event, str):
            self.note(event)
        elif self.on_bad_image is None:
            raise DataError(event.error)
        else:
            self.on_bad_image(event.error)

    def _rows(self, images: Tensor, indices: Tensor) -> list[Row]:
        with torch.inference_mode():
            logits = self.network(images).cpu()
        scaled = logits if self.temperature == 1 else logits / self.temperature
        scores = scaled.sigmoid() if self.spec.multi_label else scaled.softmax(1)
        order = scores if self.temperature == 1 else logits  # which no rounding of the scores may change
        best = order.topk(self.top, dim=1).indices
        found = zip(indices.tolist(), scores.gather(1, best).tolist(), best.tolist(), strict=True)
        rows: list[Row] = [
            {"image": self.files[index]["path"], "classes": self._named(*each)} for index, *each in found
        ]
        if self.thresholds is not None:
            for row, is_predicted in zip(rows, beyond(logits, self.thresholds) >= 0, strict=True):
                row["predicted"] = [self.spec.class_names[number] for number in is_predicted.nonzero().flatten()]
        return rows

    def _named(self, scores: Sequence[float], classes: Sequence[int]) -> list[dict[str, Any]]:
        names = self.spec.class_names
        return [{"class": names[number], "score": score} for number, score in zip(classes, scores, strict=True)]


def preprocessing_of(spec: ModelSpec) -> Preprocessing:
    """Return the preprocessing of a model's images; ImageNet's if none is known."""
    return spec.preprocessing or Preprocessing(spec.image_size)


def _workers_for(num_images: int, device: torch.device) -> int:
    if num_images < LONG_LIST:
        return 0
    return int(automatic_workers(gpu=device.type == "cuda", cores=num_cores(), processes=1).value)


def image_files(images: Iterable[str], note: Callable[[str], None]) -> FileRecords:
    """Return the image files of paths; a folder stands for all image files below it.

    `note` is called with what is left out of folders. Raises DataError for a path that does not exist, for what is
    neither a file nor a folder, and for a folder without images.
    """
    return FileRecords("", [str(file) for image in images for file in _files_of(image, note)])


def _files_of(image: str, note: Callable[[str], None]) -> Iterator[Path]:
    path = existing_path(image)
    if path is None or not os.path.exists(path):
        dead = f"; it is a link to {os.readlink(path)}" if path is not None else ""
        raise DataError(f"{image}: no such file or folder{dead}")
    if os.path.isdir(path):
        return (Path(path, name) for name in _names_below(path, image, note))
    try:
        require_regular(path)
    except OSError as error:
        raise DataError(f"{image}: is {reason(error)}") from None
    return iter([Path(path)])


def _names_below(path: str, image: str, note: Callable[[str], None]) -> list[str]:
    names, left_out = images_below(list_folder(path))
    inventory = Inventory(image)
    inventory.add("", len(names), left_out)
    if not names:
        has = f"; left out: {described(inventory.all)}" if left_out else ""
        raise DataError(f"{image}: no images in this folder ({', '.join(sorted(IMAGE_SUFFIXES))}){has}")
    for text in inventory.note(""):
        note(text)
    return names
