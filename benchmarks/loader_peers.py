"""The input pipelines that loader.py measures: the others as their documentation sets them up, and ours.

Each imports its libraries only when it runs, so that they do not count as memory of another.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PADDING = 4
LARGE_BYTES = 100_000
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")
Batch = tuple[Tensor, Tensor]
Epochs = Iterator[Iterable[Batch]]


class CannotRun(Exception):
    """The pipeline is not installed, or does not support the options."""


@dataclass(frozen=True)
class Options:
    """The options of a measurement."""

    folder: Path
    size: int
    workers: int
    batch: int
    epochs: int  # the first is the warm-up
    short_side: int
    quality: int
    small: bool
    large: bool
    min_images: int
    cache: str  # where `cached` and `stored_jpeg` keep their images: memory, disk
    uint8: bool
    scratch: Path

    @property
    def parquet(self) -> bool:
        """Whether the folder holds parquet files instead of class folders."""
        return any(any(self.folder.glob(pattern)) for pattern in ("*.parquet", "*/*.parquet"))

    def repeated(self, items: list[Any]) -> list[Any]:
        """Return the items repeated until there are at least `min_images`."""
        if not items:
            raise CannotRun("no images" + (f" of {LARGE_BYTES // 1000} kB" if self.large else ""))
        return items * math.ceil(max(1, self.min_images / len(items)))


@dataclass(frozen=True)
class Photos:
    """The files of an image folder, each as often as it is read per epoch."""

    paths: list[str]
    labels: list[int]
    class_names: list[str]

    @property
    def pairs(self) -> list[tuple[str, int]]:
        """(path, label) pairs, as torchvision and timm use them."""
        return list(zip(self.paths, self.labels, strict=True))


def list_photos(options: Options) -> Photos:
    """Return the files of `train/<class>/` that the options select."""
    root, least = options.folder / "train", LARGE_BYTES if options.large else 0
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    found = [
        (entry.path, label)
        for label, name in enumerate(classes)
        for entry in sorted(os.scandir(root / name), key=lambda entry: entry.name)
        if entry.name.lower().endswith(SUFFIXES) and entry.stat().st_size > least
    ]
    pairs = options.repeated(found)
    return Photos([path for path, _ in pairs], [label for _, label in pairs], classes)


def open_dataset(options: Options, *, decode: bool) -> Any:
    """Return the train split opened by `datasets`, with the rows that the options select."""
    import datasets

    datasets.disable_progress_bars()
    kind = "parquet" if options.parquet else "imagefolder"
    opened = datasets.load_dataset(kind, data_dir=str(options.folder), split="train")
    undecoded = opened.cast_column("image", datasets.Image(decode=False))
    rows = list(range(len(opened)))
    if options.large:
        rows = [row for row, record in enumerate(undecoded["image"]) if encoded_bytes(record) > LARGE_BYTES]
    chosen, dataset = options.repeated(rows), opened if decode else undecoded
    return dataset if len(chosen) == len(opened) else dataset.select(chosen)


def encoded_bytes(record: dict[str, Any]) -> int:
    """Return the size of an undecoded image."""
    return len(record["bytes"]) if record["bytes"] else os.path.getsize(record["path"])


def endless(loader: Iterable[Any]) -> Epochs:
    """Yield a loader's epochs without end."""
    while True:
        yield loader


def torch_loader(dataset: Any, options: Options, collate: Callable[[Any], Batch] | None = None) -> Epochs:
    """Return the epochs of PyTorch's DataLoader."""
    persistent = options.workers > 0
    return endless(
        DataLoader(
            dataset,
            options.batch,
            shuffle=True,
            num_workers=options.workers,
            collate_fn=collate,
            persistent_workers=persistent,
        )
    )


class HfTransform:
    """torchvision's transforms on decoded rows, as in transformers' image classification example."""

    def __init__(self, options: Options) -> None:
        from torchvision import transforms as T

        crop = T.RandomCrop(options.size, padding=PADDING) if options.small else T.RandomResizedCrop(options.size)
        self.apply = T.Compose([crop, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)])

    def __call__(self, rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows["pixel_values"] = [self.apply(image.convert("RGB")) for image in rows["image"]]
        return rows


def hf_collate(examples: list[dict[str, Any]]) -> Batch:
    """Return images and labels of transformed rows."""
    return torch.stack([e["pixel_values"] for e in examples]), torch.tensor([e["label"] for e in examples])


def hf_example(options: Options) -> Epochs:
    """datasets and torchvision's v1 transforms, as in transformers' image classification example."""
    dataset = open_dataset(options, decode=True).with_transform(HfTransform(options))
    return torch_loader(dataset, options, hf_collate)


def timm_loader(options: Options) -> Epochs:
    """timm's reader, transforms and loader, without its prefetcher, which is for GPUs."""
    from timm.data import create_dataset, create_loader

    if options.small:
        raise CannotRun("timm has no padded crop")
    if options.parquet:
        dataset = create_dataset(f"hfds/{options.folder}", split="train")
        dataset.reader.dataset = open_dataset(options, decode=False)
    else:
        dataset = create_dataset("", root=str(options.folder), split="train")
        dataset.reader.samples = list_photos(options).pairs
    loader = create_loader(
        dataset,
        (3, options.size, options.size),
        options.batch,
        is_training=True,
        use_prefetcher=False,
        num_workers=options.workers,
        color_jitter=0.0,
        interpolation="bilinear",
        mean=MEAN,
        std=STD,
        persistent_workers=options.workers > 0,
        pin_memory=False,
    )
    return endless(loader)


class DecodedRows(Dataset):
    """Rows of a parquet file for torchvision, which has no such dataset."""

    def __init__(self, dataset: Any, transform: Callable[[Tensor], Tensor]) -> None:
        self.dataset, self.transform = dataset, transform

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, int]]:
        from torchvision.io import ImageReadMode, decode_image

        rows = self.dataset[indices]
        encoded = [torch.frombuffer(bytearray(record["bytes"]), dtype=torch.uint8) for record in rows["image"]]
        images = [self.transform(decode_image(data, mode=ImageReadMode.RGB)) for data in encoded]
        return list(zip(images, rows["label"], strict=True))


def read_rgb(path: str) -> Tensor:
    """Return the pixels of a file from torchvision's decoder."""
    from torchvision.io import ImageReadMode, decode_image

    return decode_image(path, mode=ImageReadMode.RGB)


def torchvision_v2(options: Options) -> Epochs:
    """torchvision's decoder and v2 transforms, on tensors."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    crop = v2.RandomCrop(options.size, padding=PADDING) if options.small else v2.RandomResizedCrop(options.size)
    to_float = v2.ToDtype(torch.float32, scale=True)
    transform = v2.Compose([crop, v2.RandomHorizontalFlip(), to_float, v2.Normalize(MEAN, STD)])
    if options.parquet:
        return torch_loader(DecodedRows(open_dataset(options, decode=False), transform), options)
    folder = ImageFolder(str(options.folder / "train"), transform=transform, loader=read_rgb)
    folder.samples = list_photos(options).pairs
    return torch_loader(folder, options)


class EncodedBatches:
    """Shuffled batches of encoded images of a parquet file, for DALI, which has no such reader."""

    def __init__(self, dataset: Any, batch: int) -> None:
        self.dataset, self.batch = dataset, batch

    def __iter__(self) -> Iterator[tuple[list[np.ndarray], np.ndarray]]:
        for indices in torch.randperm(len(self.dataset)).split(self.batch):
            rows = self.dataset[indices.tolist()]
            images = [np.frombuffer(record["bytes"], np.uint8) for record in rows["image"]]
            yield images, np.asarray(rows["label"], np.int32)[:, None]


def dali(options: Options) -> Epochs:
    """DALI on the CPU, with threads instead of workers."""
    try:
        from nvidia.dali.plugin.pytorch import DALIClassificationIterator
    except ImportError as error:
        raise CannotRun(f"DALI is not installed ({error})") from None
    pipe = dali_pipeline(options)
    pipe.build()
    if options.parquet:
        batches = DALIClassificationIterator(pipe, size=-1, auto_reset=True)
    else:
        batches = DALIClassificationIterator(pipe, reader_name="files", auto_reset=True)
    epochs: Iterator[Any] = endless(batches)
    return (((b[0]["data"], b[0]["label"]) for b in epoch) for epoch in epochs)


def dali_pipeline(options: Options) -> Any:
    """Return DALI's graph: read, decode and crop, resize, flip and normalise."""
    from nvidia.dali import fn, pipeline_def, types

    def read() -> Any:
        if options.parquet:
            rows = EncodedBatches(open_dataset(options, decode=False), options.batch)
            return fn.external_source(source=rows, num_outputs=2, batch=True, cycle="raise")
        photos = list_photos(options)
        return fn.readers.file(files=photos.paths, labels=photos.labels, random_shuffle=True, name="files")

    def crop(encoded: Any) -> Any:
        size = options.size
        if options.small:
            corner = fn.random.uniform(values=[float(v) for v in range(-PADDING, PADDING + 1)], shape=2)
            image = fn.decoders.image(encoded, device="cpu", output_type=types.RGB)
            start = fn.cast(corner, dtype=types.INT32)
            return fn.slice(image, start=start, shape=(size, size), axes=(0, 1), out_of_bounds_policy="pad")
        area, ratio = [0.08, 1.0], [3 / 4, 4 / 3]
        image = fn.decoders.image_random_crop(
            encoded, device="cpu", random_area=area, random_aspect_ratio=ratio, output_type=types.RGB
        )
        # Without antialiasing it would be faster, and its pixels no longer those of the others.
        return fn.resize(image, device="cpu", resize_x=size, resize_y=size, antialias=True)

    @pipeline_def(batch_size=options.batch, num_threads=max(1, options.workers), device_id=None)
    def pipeline() -> Any:
        encoded, label = read()
        mean, std = [255 * m for m in MEAN], [255 * s for s in STD]
        image = fn.crop_mirror_normalize(crop(encoded), mirror=fn.random.coin_flip(), mean=mean, std=std)
        return image, label

    return pipeline()


RECIPE = """
model: {name: test_resnet}  # never run
data: {dataset: handed over, interpolation: bilinear}
augment: {flip: true}
"""


def recipe_overrides(options: Options, arm: str) -> list[str]:
    """Return the recipe overrides of one of our arms."""
    is_cached = arm != "uncached"
    cache_override = [f"data.cache_dir={options.scratch}"] if is_cached and options.cache == "disk" else []
    crop = ["padded", f"augment.crop_padding={PADDING}"] if options.small else ["random_resized"]
    return [
        f"data.image_size={options.size}",
        f"data.mean={list(MEAN)}",
        f"data.std={list(STD)}",
        f"data.workers={options.workers}",
        f"data.cache={options.cache if is_cached else 'none'}",
        f"data.short_side={options.short_side if is_cached and not options.small else 'null'}",
        f"data.stored_quality={options.quality if arm == 'stored_jpeg' else 'null'}",
        *cache_override,
        f"augment.crop={crop[0]}",
        *crop[1:],
        f"train.batch_size={options.batch}",
        f"train.duration={options.epochs + 1} epochs",
    ]


def our_dataset(options: Options) -> Any:
    """Return the rows as a dataset, with a validation split that is not read."""
    import datasets

    if options.parquet:
        train = open_dataset(options, decode=True)
    else:
        photos = list_photos(options)
        label = datasets.ClassLabel(names=photos.class_names)
        features = datasets.Features({"image": datasets.Image(), "label": label})
        train = datasets.Dataset.from_dict({"image": photos.paths, "label": photos.labels}, features=features)
    return datasets.DatasetDict({"train": train, "validation": train.select(range(2))})


def ours(options: Options, arm: str) -> Epochs:
    """Our loader as the Trainer reads it: all epochs in one go, the next one prefetched while one ends."""
    from hf_fasttrain.from_recipe.parts import build_parts
    from hf_fasttrain.from_recipe.trainer import build_train_loader
    from hf_fasttrain.recipe.load import parse_recipe

    recipe = parse_recipe(RECIPE, recipe_overrides(options, arm), where="benchmarks/loader.py", name="loader")
    parts = build_parts(recipe, dataset=our_dataset(options))
    torch.set_num_threads(1)  # as for the peers: building the parts gave it all cores
    loader = build_train_loader(parts)
    for note in parts.settings.notes:  # such as that not all of it fits into the cache
        print(note, flush=True)
    if options.uint8:
        loader.normalize = unchanged  # type: ignore[assignment]
    steps = loader.steps(0, (options.epochs + 1) * loader.steps_per_epoch)
    while True:
        yield (batch for step in islice(steps, loader.steps_per_epoch) for batch in step.micro_batches)


def unchanged(pixels: Tensor) -> Tensor:
    """Return pixels unchanged, as they would be copied to a GPU."""
    return pixels


def uncached(options: Options) -> Epochs:
    """Ours, each image decoded every time."""
    return ours(options, "uncached")


def cached(options: Options) -> Epochs:
    """Ours, with pixels cached."""
    return ours(options, "cached")


def stored_jpeg(options: Options) -> Epochs:
    """Ours, with smaller JPEGs cached."""
    return ours(options, "stored_jpeg")


ARMS: dict[str, Callable[[Options], Epochs]] = {
    arm.__name__: arm for arm in (hf_example, timm_loader, torchvision_v2, dali, uncached, cached, stored_jpeg)
}
