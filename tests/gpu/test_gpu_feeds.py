"""Batches on their way to the GPU: correct bytes for any timing, and no unnecessary waiting."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gpu_kit import user_trainer
from late_streams import LateStreams
from torch import Tensor, nn

from hf_fasttrain.data.loading import device_cache as device_module
from hf_fasttrain.data.loading.batch import Normalize
from hf_fasttrain.data.loading.device_cache import DevicePrefetcher
from hf_fasttrain.data.loading.loader import TrainLoader
from hf_fasttrain.data.loading.prefetch import ImageBatches, PixelBatch, Prefetcher, pixel_buffer
from hf_fasttrain.data.loading.sampler import MicroBatchKey, SamplingPlan
from hf_fasttrain.data.pixels.augment import EvalTransform, TrainTransform
from hf_fasttrain.data.pixels.images import Images
from hf_fasttrain.data.pixels.prepare import Preparation
from hf_fasttrain.data.source.dataset import load_source

CPU = torch.device("cpu")
BATCHES, NUMBER = 200, 64


class Numbers(ImageBatches):
    """Batches whose pixels are computed from their images' indices; a worker needs `seconds` per batch."""

    def __init__(self, size: int, seconds: float = 0.0) -> None:
        self.size, self.seconds = size, seconds

    @property
    def num_images(self) -> int:
        return BATCHES * NUMBER

    def make(self, key: MicroBatchKey, room: Tensor | None = None) -> PixelBatch:
        if self.seconds:
            time.sleep(self.seconds)
        batch = pixel_buffer(room, len(key.indices), self.size, self.size)
        rows = torch.from_numpy(key.indices).view(-1, 1, 1, 1)
        offsets = torch.arange(self.size * self.size * 3).view(1, self.size, self.size, 3)
        batch.copy_((rows * 37 + offsets) % 233)
        return PixelBatch(batch, torch.from_numpy(key.indices % 10), ())

    def max_bytes(self, num_images: int) -> int:
        return num_images * self.size**2 * 3


def keys(number: int) -> list[MicroBatchKey]:
    return [MicroBatchKey(0, np.arange(i * NUMBER, (i + 1) * NUMBER)) for i in range(number)]


def delay(stream: Any, rng: random.Random) -> None:
    """Delay a stream by up to 5 ms, sometimes."""
    if rng.random() < 0.3:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(rng.randrange(10_000_000))


@pytest.mark.parametrize("pinned", [True, False])
@pytest.mark.parametrize("workers", [0, 4])
def test_t02_batches_equal_the_hosts(
    workers: int, pinned: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    late = LateStreams(monkeypatch) if device.type == "cpu" else None
    images, expected_keys = Numbers(4 if late else 32), keys(50 if late else BATCHES)
    prefetcher = Prefetcher(images, late.device if late else device, workers=workers, pin_memory=pinned)
    expected = [images.make(key) for key in expected_keys]
    on_device = [(batch.pixels.to(device), batch.labels.to(device)) for batch in expected]
    wrong = torch.zeros(len(expected_keys), dtype=torch.bool, device=device)
    rng, unrecorded = random.Random(0), 0
    for number, (pixels, labels) in enumerate(prefetcher.open(expected_keys, NUMBER)):
        if late is None:
            delay(torch.cuda.current_stream(), rng)
            delay(prefetcher._copy_stream, rng)
        else:
            time.sleep(0.003)  # time for workers to use a slot that was released too early
            unrecorded += id(pixels) not in late.recorded
            late.recorded.clear()
        wrong[number] = (pixels != on_device[number][0]).any() | (labels != on_device[number][1]).any()
        del pixels, labels  # their memory may be reused while the current stream still reads it
    assert number == len(expected_keys) - 1
    assert int(wrong.sum()) == 0, "wrong bytes"
    assert unrecorded == 0, "memory may be reused too early"


def device_feed(device: torch.device, transform: TrainTransform) -> tuple[DevicePrefetcher, ImageBatches]:
    """Return a feed of the digits that caches them on the device, and the expected batches."""
    source = load_source("digits", eval_fraction=0.05)
    images = ImageBatches(Images(source.train, Preparation(center=EvalTransform(32, crop_pct=1.0))), transform)
    return DevicePrefetcher(images, device, 32, workers=0, pin_memory=device.type == "cuda"), images


CROP = TrainTransform(32, crop="padded", erase_prob=0.5, erase_fill=(10, 200, 30))


@pytest.mark.parametrize(
    "transform",
    [CROP, TrainTransform(32, crop="none", flip=True), TrainTransform(32, crop="padded", flip=False)],
    ids=["crop, flip, erase", "flip", "crop"],
)
def test_t03_images_on_the_device_give_the_hosts_bytes(transform: TrainTransform, device: torch.device) -> None:
    prefetcher, images = device_feed(device, transform)
    order = [np.random.default_rng(epoch).permutation(512) for epoch in range(3)]
    expected_keys = [MicroBatchKey(epoch, part) for epoch in range(3) for part in np.split(order[epoch], 8)]
    for number, (key, (pixels, labels)) in enumerate(
        zip(expected_keys, prefetcher.open(expected_keys, NUMBER), strict=True)
    ):
        if device.type == "cpu":  # if feeds write each image as the host does
            rows = torch.from_numpy(key.indices)
            pixels = device_module.augment_on_device(prefetcher.pixels, rows, transform, key)
        expected = images.make(key)
        wrong = int((pixels.cpu() != expected.pixels).sum())
        assert wrong == 0, f"{wrong:,} wrong bytes in batch {number}"
        assert labels.tolist() == expected.labels.tolist()


def test_t01b_a_batch_does_not_wait_for_queued_kernels(
    device: torch.device, record_property: Callable[..., None]
) -> None:
    prefetcher, _ = device_feed(device, CROP)
    expected_keys = keys(12)
    for _ in prefetcher.open(expected_keys, NUMBER):  # then all of them are cached
        pass
    batches = iter(prefetcher.open(expected_keys, NUMBER))
    next(batches)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # a second
    start = time.perf_counter()
    for _ in range(10):
        next(batches)
    seconds = time.perf_counter() - start
    busy = not torch.cuda.current_stream().query()
    record_property("ms for a batch of 64", 1000 * seconds / 10)
    assert busy, "the host has waited"
    assert seconds < 0.5


class Works(nn.Module):
    """A model whose forward takes `seconds` on the device."""

    def __init__(self, device: torch.device, seconds: float) -> None:
        super().__init__()
        self.device, self.seconds = device, seconds
        self.head = nn.Linear(3 * 8 * 8, 10)
        self.cycles = 0
        if device.type == "cuda":
            self.cycles = round(seconds * cycles_in_a_second())

    def forward(self, images: Tensor) -> Tensor:
        if self.cycles and images.is_cuda:
            torch.cuda._sleep(self.cycles)
        else:
            time.sleep(self.seconds)
        return self.head(images.flatten(1))


def cycles_in_a_second() -> float:
    """Return how many of `_sleep`'s cycles pass in a second."""
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(1_000_000)
    before.record()
    torch.cuda._sleep(50_000_000)
    after.record()
    torch.cuda.synchronize()
    return 50_000_000 / (before.elapsed_time(after) / 1000)


def waiting(device: torch.device, run: Path, feeding: float, working: float) -> float:
    """Return the fraction of time that training waits for data once its workers have started."""
    prefetcher = Prefetcher(Numbers(8, feeding), device, workers=1, pin_memory=device.type == "cuda")
    normalize = Normalize([0.5] * 3, [0.25] * 3, device, channels_last=True)
    loader = TrainLoader(prefetcher, SamplingPlan(BATCHES * NUMBER, NUMBER, NUMBER), normalize, None, lambda epoch: 8)
    model = Works(device, working)
    trainer = user_trainer(device, model, loader, duration="24 steps", output_dir=run, log_every=8)
    trainer.fit()
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    waits = {line["step"]: line["data_wait_fraction"] for line in lines if line["kind"] == "train"}
    return float(waits[16] + waits[24]) / 2


def test_t15_waiting_for_a_slow_loader_is_measured(device: torch.device, run: Path) -> None:
    assert 0.7 < waiting(device, run, feeding=0.1, working=0.02) < 0.9


def test_t15_a_fast_loader_causes_no_waiting(device: torch.device, run: Path) -> None:
    limit = 0.02 if device.type == "cuda" else 0.1  # on a CPU receiving a batch counts as waiting
    assert waiting(device, run, feeding=0.01, working=0.05) < limit
