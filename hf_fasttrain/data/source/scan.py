"""The scan of `check --images`, which decodes every image once: corrupt, duplicate, unusual, sizes, class balance."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from hf_fasttrain.data.loading.worker_deaths import WorkerDeaths, describe_death
from hf_fasttrain.data.loading.workers import Workers
from hf_fasttrain.data.pixels.decode import grey_of, inspect, read_pixels
from hf_fasttrain.data.pixels.rgb import Grey, ValueRange, is_deep
from hf_fasttrain.data.source.dataset import Split
from hf_fasttrain.data.source.multi_label import class_counts
from hf_fasttrain.data.source.records import Record
from hf_fasttrain.utils.errors import DataError, ImageError, LoaderDied, RunError
from hf_fasttrain.utils.files import read_regular, reason
from hf_fasttrain.utils.format import format_bytes

CHUNK = 64  # rows that a worker process decodes at a time
CHUNKS_AHEAD = 2  # per worker
DARK = 64  # of 255 levels: below it, 16-bit colour probably has 14 bits or fewer


@dataclass(frozen=True)
class CorruptImage:
    """An image that can't be trained on, and why."""

    split: str
    row: int
    path: str | None
    error: str


@dataclass(frozen=True)
class SplitScan:
    """What was found in a split; the arrays have a row for each image, 0 where it is bad."""

    name: str
    bad: list[CorruptImage]
    hashes: np.ndarray  # (N, 2) uint64, of the encoded bytes
    widths: np.ndarray  # (N,) int64, of the pixels, after the EXIF rotation
    heights: np.ndarray
    encoded_bytes: np.ndarray
    formats: Counter[str]  # JPEG, PNG, ...
    modes: Counter[str]  # Pillow's: RGB, L, CMYK, ...
    unusual: Counter[str]  # CMYK, palette, 16-bit, NaN, EXIF rotation, several frames
    greys: list[Grey] = field(default_factory=list)  # of each image of grey of more than 8 bits
    deep_colour: list[int] = field(default_factory=list)  # the brightest level, 0 to 255, of each of 16-bit colour

    @property
    def num_images(self) -> int:
        """Number of images, the bad ones too."""
        return len(self.widths)

    @property
    def good(self) -> np.ndarray:
        """Rows of the images that can be decoded."""
        return np.flatnonzero(self.widths)

    @property
    def bad_fraction(self) -> float:
        """Share of the images that can't be decoded."""
        return len(self.bad) / max(1, self.num_images)

    @property
    def decoded_bytes(self) -> np.ndarray:
        """Bytes of each image's RGB pixels."""
        return self.widths * self.heights * 3

    def num_smaller(self, size: int) -> int:
        """Return the number of images whose short side is under `size`, which would be enlarged."""
        return int((np.minimum(self.widths, self.heights)[self.good] < size).sum())


def scan_split(
    split: Split,
    *,
    workers: int,
    value_range: ValueRange | None = None,
    progress: Callable[[int], None],
    note: Callable[[str], None] = lambda text: None,
) -> SplitScan:
    """Decode every image of a split in `workers` processes (0: in this one) and return what was found.

    `progress` is called with the number of images of each chunk that is done. Bad images are recorded, not raised.
    `note` is called with a message if a worker process dies; raises LoaderDied if a second one does.
    """
    chunks = [np.arange(start, min(start + CHUNK, len(split))) for start in range(0, len(split), CHUNK)]
    scan_rows, deaths = partial(_scan_rows, split, value_range), WorkerDeaths(note)
    pool = Workers(scan_rows, workers, CHUNKS_AHEAD, deaths)
    parts = []
    try:
        for part in pool.answers(chunks) if workers else map(scan_rows, chunks):
            if isinstance(part, RunError):
                raise part
            parts.append(part)
            progress(part.num_images)
    except LoaderDied:
        rows = chunks[len(parts)]  # answers come in order: this is the chunk that was awaited
        cause, remedy = describe_death(deaths.exit_code)
        raise LoaderDied(
            f"split '{split.name}': a process that decoded images died, and so did a second one ({cause}), at rows "
            f"{rows[0]} to {rows[-1]}: {remedy}"
        ) from None
    return _joined(split.name, parts)


def _scan_rows(split: Split, value_range: ValueRange | None, rows: np.ndarray) -> SplitScan | RunError:
    """Return the scan of some rows, or RunError, which can be pickled, if memory ran out."""
    try:
        return _scan_decoded(split, value_range, rows)
    except MemoryError as error:
        return RunError(f"out of memory: {error or 'MemoryError'}; lower data.workers, or remove the image")


def _scan_decoded(split: Split, value_range: ValueRange | None, rows: np.ndarray) -> SplitScan:
    scan = _empty(split.name, len(rows))
    for index, (row, record) in enumerate(zip(rows, split.records(rows), strict=True)):
        try:
            data = _encoded_bytes(record)
            pixels = read_pixels({"bytes": data, "path": record["path"]}, value_range=value_range)
        except DataError as error:
            text = error.reason if isinstance(error, ImageError) else str(error)
            scan.bad.append(CorruptImage(split.name, int(row), record["path"], text))
            continue
        scan.hashes[index] = np.frombuffer(hashlib.blake2b(data, digest_size=16).digest(), np.uint64)
        scan.heights[index], scan.widths[index] = pixels.shape[:2]
        scan.encoded_bytes[index] = len(data)
        found = inspect(data)
        scan.formats[found.format] += 1
        scan.modes[found.mode] += 1
        scan.unusual.update(found.unusual)
        if is_deep(found.mode) and (grey := grey_of(data)) is not None:
            scan.greys.append(grey)
            scan.unusual.update(["NaN"] if grey.has_nan else [])
        elif "16-bit" in found.unusual:
            scan.deep_colour.append(int(pixels.max()))
    return scan


def _empty(name: str, number: int) -> SplitScan:
    widths, heights, encoded = np.zeros((3, number), np.int64)
    hashes = np.zeros((number, 2), np.uint64)
    return SplitScan(name, [], hashes, widths, heights, encoded, Counter(), Counter(), Counter())


def _joined(name: str, parts: Sequence[SplitScan]) -> SplitScan:
    def array(field: str) -> np.ndarray:
        return np.concatenate([getattr(part, field) for part in (_empty(name, 0), *parts)])

    def counter(field: str) -> Counter[str]:
        return sum((getattr(part, field) for part in parts), Counter())

    return SplitScan(
        name,
        [bad for part in parts for bad in part.bad],
        array("hashes"),
        array("widths"),
        array("heights"),
        array("encoded_bytes"),
        counter("formats"),
        counter("modes"),
        counter("unusual"),
        [grey for part in parts for grey in part.greys],
        [level for part in parts for level in part.deep_colour],
    )


def _encoded_bytes(record: Record) -> bytes:
    """Return an image's encoded bytes, its file read once for hash, header and pixels."""
    if record["bytes"] is not None:
        return bytes(record["bytes"])
    if record["path"] is None:
        raise DataError("missing (null)")
    try:
        return read_regular(record["path"])
    except (OSError, ValueError) as error:
        raise DataError(f"can't be read: {reason(error)}") from None


@dataclass(frozen=True)
class Overlap:
    """Images of one split that are in the train split as well, byte for byte."""

    train: str
    other: str
    pairs: np.ndarray  # (number of such images, 2): row in train, row in the other


@dataclass(frozen=True)
class Duplicates:
    """Images that occur more than once, byte for byte; bad images are ignored."""

    within: dict[str, int]  # split -> images that repeat an earlier one of the split
    overlaps: list[Overlap]  # one for each split but train, with pairs or without


def find_duplicates(scans: Sequence[SplitScan]) -> Duplicates:
    """Return the repeated images within each split, and between the first one (train) and each other."""
    rows = [scan.good for scan in scans]
    ids = _numbered([scan.hashes[good] for scan, good in zip(scans, rows, strict=True)])
    within = {scan.name: len(group) - len(np.unique(group)) for scan, group in zip(scans, ids, strict=True)}
    train, first = np.unique(ids[0], return_index=True)
    overlaps = []
    for scan, group, good in list(zip(scans, ids, rows, strict=True))[1:]:
        is_shared = np.isin(group, train)
        partners = rows[0][first[np.searchsorted(train, group[is_shared])]]
        overlaps.append(Overlap(scans[0].name, scan.name, np.stack([partners, good[is_shared]], axis=1)))
    return Duplicates(within, overlaps)


def _numbered(hashes: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Return the hashes, in the same groups, as numbers that are equal for equal hashes."""
    joined = np.concatenate(hashes)
    order = np.lexsort(joined.T)
    ordered = joined[order]
    is_new = np.r_[np.zeros(min(1, len(ordered)), bool), (ordered[1:] != ordered[:-1]).any(axis=1)]
    numbers = np.empty(len(joined), np.int64)
    numbers[order] = np.cumsum(is_new)
    return np.split(numbers, np.cumsum([len(group) for group in hashes])[:-1])


def image_names(split: Split, rows: np.ndarray) -> list[str]:
    """Return names for images of a split: their paths if they have one, else their rows."""
    records = split.records(rows)
    return [record["path"] or f"{split.name} row {row}" for row, record in zip(rows, records, strict=True)]


@dataclass(frozen=True)
class ClassBalance:
    """How many images of a split each class has; with several labels an image counts for each of them."""

    name: str
    class_names: list[str]
    counts: np.ndarray  # (number of classes,)

    @property
    def missing(self) -> list[str]:
        """The classes without images."""
        return [self.class_names[number] for number in np.flatnonzero(self.counts == 0)]

    def rarest(self, number: int = 5) -> list[tuple[str, int]]:
        """Return the classes with the fewest images, and their numbers, ignoring classes without images."""
        order = np.argsort(self.counts, kind="stable")
        order = order[self.counts[order] > 0][:number]
        return [(self.class_names[label], int(self.counts[label])) for label in order]


def class_balance(split: Split, class_names: Sequence[str]) -> ClassBalance:
    """Return the number of images per class of a split."""
    return ClassBalance(split.name, list(class_names), class_counts(split.labels, len(class_names)))


def describe_scan(scan: SplitScan, balance: ClassBalance, duplicates: Duplicates, image_size: int) -> dict[str, str]:
    """Return the findings of a scan as text, by topic."""
    return {
        "images": f"{scan.num_images:,}",
        "corrupt": f"{len(scan.bad):,}",
        "duplicates within the split": f"{duplicates.within[scan.name]:,}",
        "width: min, median, max": _spread(scan.widths[scan.good]),
        "height: min, median, max": _spread(scan.heights[scan.good]),
        f"short side below {image_size} px, upscaled": f"{scan.num_smaller(image_size):,}",
        "formats": _listed(scan.formats.most_common()),
        "unusual": _listed(scan.unusual.most_common()),
        "encoded: mean, total": _amounts(scan.encoded_bytes[scan.good]),
        "decoded (RGB): mean, total": _amounts(scan.decoded_bytes[scan.good]),
        "images per class: min, median, max": _spread(balance.counts),
        "rarest classes": _listed(balance.rarest()),
        "classes without images": f"{len(balance.missing):,}",
    }


def grey_notes(scan: SplitScan, values: str) -> list[str]:
    """Return notes on the images of more than 8 bits of a split, of which `values` become black and white."""
    notes = []
    if scan.greys:
        lowest, highest = min(grey.lowest for grey in scan.greys), max(grey.highest for grey in scan.greys)
        kinds = " and ".join(sorted({grey.kind for grey in scan.greys}))
        with_nan = sum(grey.has_nan for grey in scan.greys)
        notes.append(
            f"{len(scan.greys):,} grey images of more than 8 bits have {kinds} from {lowest:,g} to {highest:,g}; "
            f"{values}, in each of them (data.value_range)"
            + (f"; {with_nan:,} of them have NaN, which becomes black" if with_nan else "")
        )
    if scan.deep_colour and max(scan.deep_colour) < DARK:
        notes.append(
            f"{len(scan.deep_colour):,} images of 16-bit colour are dark: Pillow keeps the upper 8 bits, of which the "
            f"highest is {max(scan.deep_colour)} of 255; convert them to 8 bits, scaled to what they have"
        )
    return notes


def _listed(counts: Iterable[tuple[str, int]]) -> str:
    return ", ".join(f"{name} {number:,}" for name, number in counts) or "none"


def _spread(values: np.ndarray) -> str:
    return f"{values.min():,}, {np.median(values):,.10g}, {values.max():,}" if len(values) else "none"


def _amounts(values: np.ndarray) -> str:
    return f"{format_bytes(values.mean())}, {format_bytes(values.sum())}" if len(values) else "none"
