"""The same images, order and augmentation, however they are loaded."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_fasttrain.data.augment import EvalTransform, TrainTransform
from hf_fasttrain.data.batch import Mixing, Normalize
from hf_fasttrain.data.feed import Feed, ImageBatches
from hf_fasttrain.data.images import Images
from hf_fasttrain.data.loader import EvalLoader, OwnLoader, TrainLoader
from hf_fasttrain.data.operations import Operations
from hf_fasttrain.data.order import Order
from hf_fasttrain.data.prepare import Preparation
from hf_fasttrain.data.source import Source, load_source
from hf_fasttrain.errors import DataError, RunError

CPU = torch.device("cpu")
NORMALIZE = Normalize([0.5] * 3, [0.25] * 3, CPU, channels_last=True)


@pytest.fixture(scope="module")
def digits() -> Source:
    return load_source("digits", eval_fraction=0.02)


def load_steps(source: Source, *, workers: int = 0, micro: int = 8, parts: int = 1, stop: int = 3) -> list:
    """Return (images, targets) of steps 0 to `stop`, the micro-batches of all processes joined."""
    operations = Operations(randaugment={"num_ops": 2, "magnitude": 9})
    transform = TrainTransform(32, crop="random_resized", operations=operations, erase_prob=0.5, erase_fill=None)
    steps: list[list] = [[] for _ in range(stop)]
    for part in range(parts):
        images = ImageBatches(Images(source.train, Preparation()), transform)
        order = Order(len(source.train), 22, micro, num_processes=parts, process_index=part)
        feed = Feed(images, CPU, workers=workers, pin_memory=False)
        loader = TrainLoader(feed, order, NORMALIZE, Mixing(0.8, 1.0, 10), transform.size_at)
        for step in loader.steps(0, stop):
            steps[step.index] += list(step.micro_batches)
    return [tuple(torch.cat(tensors) for tensors in zip(*step, strict=True)) for step in steps]


@pytest.mark.parametrize(("workers", "micro", "parts"), [(2, 22, 1), (0, 2, 1), (0, 6, 2), (1, 4, 3)])
def test_same_batches_whatever_workers_micro_batches_and_processes(
    digits: Source, workers: int, micro: int, parts: int
) -> None:
    torch.manual_seed(workers)  # the global generator has no say
    expected = load_steps(digits)
    got = load_steps(digits, workers=workers, micro=micro, parts=parts)
    for (images, targets), (other_images, other_targets) in zip(expected, got, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(targets, other_targets)


def test_augmentation_changes_with_the_epoch_and_leaves_torch_generator_alone() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    transform = TrainTransform(32, operations=Operations(trivialaugment=True))
    state = torch.get_rng_state()
    first, again, next_epoch = transform(image, 0, 5), transform(image, 0, 5), transform(image, 1, 5)
    assert np.array_equal(first, again)
    assert not np.array_equal(first, next_epoch)
    assert torch.equal(state, torch.get_rng_state())


def test_steps_start_anywhere(digits: Source) -> None:
    transform = TrainTransform(32)
    feed = Feed(ImageBatches(Images(digits.train, Preparation()), transform), CPU, workers=0, pin_memory=False)
    order = Order(len(digits.train), 500, 500)
    loader = TrainLoader(feed, order, NORMALIZE, None, transform.size_at)
    all_steps = [next(step.micro_batches)[0] for step in loader.steps(0, 6)]
    (late,) = [next(step.micro_batches)[0] for step in loader.steps(5, 6)]
    assert torch.equal(all_steps[5], late)
    assert order.plan(5).epoch == 1


def test_eval_transform_is_pillows_resize_and_centre_crop() -> None:
    from torchvision.transforms import v2

    rng = np.random.default_rng(1)
    for width, height in ((300, 200), (201, 333), (64, 64), (20, 90)):
        image = Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))
        short = int(64 / 0.875)
        plain = v2.Compose([v2.Resize(short, v2.InterpolationMode.BICUBIC), v2.CenterCrop(64)])(image)
        assert np.array_equal(EvalTransform(64, "bicubic", 0.875)(np.asarray(image)), np.asarray(plain))


def test_normalize_is_the_plain_formula() -> None:
    pixels = torch.randint(0, 256, (2, 4, 4, 3), dtype=torch.uint8)
    plain = (pixels.permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.25
    assert torch.allclose(NORMALIZE(pixels), plain, atol=1e-6)
    assert NORMALIZE(pixels).is_contiguous(memory_format=torch.channels_last)
    contiguous = Normalize([0.5] * 3, [0.25] * 3, CPU, channels_last=False)(pixels)
    assert contiguous.is_contiguous()
    assert torch.equal(contiguous, NORMALIZE(pixels))


@pytest.mark.parametrize(("mixup", "cutmix"), [(1.0, 0.0), (0.0, 1.0)])
def test_mixing_pairs_neighbours_and_targets_say_how_much(mixup: float, cutmix: float) -> None:
    images = torch.stack([torch.full((3, 16, 16), float(i)) for i in range(5)])
    mixing = Mixing(mixup, cutmix, 5)
    for step in range(20):
        mixed, targets = mixing(images, torch.arange(5), step)
        assert torch.equal(mixed[4], images[4])  # the odd last one
        for i in range(4):
            share = targets[i, i].item()
            assert targets[i, i ^ 1].item() == pytest.approx(1 - share, abs=1e-6)
            assert mixed[i].mean().item() == pytest.approx(share * i + (1 - share) * (i ^ 1), abs=1e-5)
    assert mixing.draw(3, 16) == mixing.draw(3, 16)
    assert mixing.draw(3, 16) != mixing.draw(4, 16)


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_evaluation_sees_each_image_once(digits: Source, num_processes: int) -> None:
    labels = []
    for index in range(num_processes):
        images = Images(digits.evaluation, Preparation(center=EvalTransform(32)))
        feed = Feed(ImageBatches(images), CPU, workers=0, pin_memory=False)
        loader = EvalLoader(feed, len(digits.evaluation), 8, NORMALIZE, num_processes, index)
        labels += [label for _, batch in loader for label in batch.tolist()]
    assert labels == digits.evaluation.labels.tolist()


def test_waiting_for_slow_images_is_counted(digits: Source) -> None:
    class Slow(Preparation):
        def encoded(self, record: Any) -> tuple[np.ndarray, None]:
            time.sleep(0.02)
            return np.zeros((8, 8, 3), np.uint8), None

    transform = TrainTransform(8, crop="none")
    feed = Feed(ImageBatches(Images(digits.train, Slow()), transform), CPU, workers=0, pin_memory=False)
    loader = TrainLoader(feed, Order(len(digits.train), 4, 4), NORMALIZE, None, transform.size_at)
    [list(step.micro_batches) for step in loader.steps(0, 3)]
    assert loader.wait_seconds >= 3 * 4 * 0.02


def test_own_loader_goes_through_epochs_and_asks_for_a_position() -> None:
    data = [(torch.full((2, 3, 4, 4), float(i)), torch.tensor([0, 1])) for i in range(3)]
    loader = OwnLoader(data, CPU)
    values = [next(step.micro_batches)[0][0, 0, 0, 0].item() for step in loader.steps(0, 7)]
    assert values == [0, 1, 2, 0, 1, 2, 0]
    with pytest.raises(RunError, match="train_loader has no state_dict and load_state_dict"):
        loader.load_state_dict(None)
    with pytest.raises(DataError, match="train_loader is empty"):
        OwnLoader([], CPU)
    with pytest.raises(DataError, match="train_loader has no length"):
        OwnLoader((x for x in data), CPU)


def test_own_loader_takes_mappings() -> None:
    batch = {"pixel_values": torch.zeros(4, 3, 4, 4), "labels": torch.arange(4)}
    (step,) = OwnLoader([batch], CPU, accumulation_steps=2).steps(0, 1)
    assert [targets.tolist() for _, targets in step.micro_batches] == [[0, 1], [2, 3]]
