"""What `init` looks at: the images with their classes and sizes, and this machine."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from hf_fasttrain.data.pixels.decode import DECODING_ERRORS, image_size_of
from hf_fasttrain.data.source.dataset import Source, Split, load_source
from hf_fasttrain.data.source.image_files import TEST_NAMES
from hf_fasttrain.data.source.inventory import described
from hf_fasttrain.data.source.multi_label import class_counts
from hf_fasttrain.train.launcher import uses_gpu
from hf_fasttrain.utils.clean import one_line
from hf_fasttrain.utils.environment import free_memory_bytes, num_cores
from hf_fasttrain.utils.errors import DataError, shortened
from hf_fasttrain.utils.format import format_bytes, format_count

HEADERS = 200  # images whose headers are read: of a file server 1 s
MAX_BAD_FRACTION = 0.01  # the recipe's default: more would end the training too


@dataclass(frozen=True)
class Survey:
    """What a dataset holds."""

    dataset: str
    splits: dict[str, int]  # used splits and their images; the first is trained on
    test_split: str | None  # not used unless the recipe says so
    class_names: list[str]
    counts: np.ndarray  # (K,) training images of each class, before any are held out
    multi_label: bool
    widths: np.ndarray  # of a sample of the training images
    heights: np.ndarray
    left_out: str  # "" if nothing is

    @property
    def images(self) -> int:
        """Training images, before any are held out."""
        return next(iter(self.splits.values()))

    @property
    def short_side(self) -> int:
        """Median short side in pixels, 0 if no header could be read."""
        return int(np.median(np.minimum(self.widths, self.heights))) if len(self.widths) else 0

    @property
    def imbalance(self) -> float:
        """Largest class / smallest class that has images."""
        present = self.counts[self.counts > 0]
        return float(present.max() / present.min())

    def lines(self) -> list[str]:
        """Return the findings as text."""
        splits = ", ".join(f"{one_line(name)} {number:,}" for name, number in self.splits.items())
        low, high = int(self.counts.min()), int(self.counts.max())
        each = f"{low:,} to {high:,} images each" if low < high else f"{format_count(low, 'image')} each"
        several = ", several per image" if self.multi_label else ""
        lines = [f"{splits} images; {len(self.class_names):,} classes{several}, {each}"]
        if len(self.widths):
            median = f"{int(np.median(self.widths)):,} x {int(np.median(self.heights)):,} px"
            smallest, largest = (int(f(np.minimum(self.widths, self.heights))) for f in (np.min, np.max))
            lines.append(
                f"median size {median}, short sides from {smallest:,} to {largest:,} px ({len(self.widths)} read)"
            )
        return [*lines, *([f"left out: {self.left_out}"] if self.left_out else [])]


@dataclass(frozen=True)
class Machine:
    """What there is to train with; bytes are those that are free."""

    cores: int
    gpu: str  # its name; "" for none
    memory: int
    gpu_memory: int
    disk: int

    def line(self) -> str:
        """Return the machine as text."""
        gpu = f"{self.gpu} with {format_bytes(self.gpu_memory)} free" if self.gpu else "no GPU"
        free = f"{format_bytes(self.memory)} of memory and {format_bytes(self.disk)} of disk are free"
        return f"{format_count(self.cores, 'core')}, {gpu}; {free}"


def survey(dataset: str) -> Survey:
    """Return what a dataset holds. Raises DataError if it can't be opened, or can't be evaluated on."""
    source = load_source(dataset, eval_fraction=0, max_bad_fraction=MAX_BAD_FRACTION)
    counts = class_counts(source.train.labels, len(source.class_names))
    if source.held_out and not source.multi_label and counts.max() < 2:
        raise DataError(
            f"{one_line(dataset)}: one image of each class ({shortened(source.class_names)}); training needs at least "
            "two, one of them to evaluate on. Add images, or a folder 'validation' beside 'train'"
        )
    splits = {source.train.name: len(source.train)}
    if not source.held_out:
        splits[source.evaluation.name] = len(source.evaluation)
    widths, heights = _sizes(source.train)
    tests = [name for name in source.split_names if name in TEST_NAMES and name not in splits]
    return Survey(
        dataset=dataset,
        splits=splits,
        test_split=tests[0] if tests else None,
        class_names=source.class_names,
        counts=counts,
        multi_label=source.multi_label,
        widths=widths,
        heights=heights,
        left_out=_left_out(source),
    )


def _left_out(source: Source) -> str:
    return described(source.inventory.all) if source.inventory is not None else ""


def _sizes(split: Split) -> tuple[np.ndarray, np.ndarray]:
    """Return widths and heights of evenly spaced images, from their headers; those that can't be read are skipped."""
    rows = np.unique(np.linspace(0, len(split) - 1, min(HEADERS, len(split))).astype(int))
    sizes = []
    for record in split.records(rows):
        try:
            sizes.append(image_size_of(record))
        except DECODING_ERRORS:  # reported in training, or by `check --images`
            continue
    return tuple(np.array(sizes, np.int64).reshape(-1, 2).T)  # type: ignore[return-value]


def this_machine() -> Machine:
    """Return cores, GPU, and free memory and disk."""
    is_gpu = uses_gpu()
    return Machine(
        cores=num_cores(),
        gpu=torch.cuda.get_device_name() if is_gpu else "",
        memory=free_memory_bytes(),
        gpu_memory=torch.cuda.mem_get_info()[0] if is_gpu else 0,
        disk=shutil.disk_usage(Path.cwd()).free,
    )
