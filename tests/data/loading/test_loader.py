"""Images, order and augmentation do not depend on how they are loaded."""

from __future__ import annotations

import json
import time
from collections import UserDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_fasttrain import Trainer
from hf_fasttrain.data.loading.background import BackgroundIterator
from hf_fasttrain.data.loading.batch import Mixing, Normalize
from hf_fasttrain.data.loading.loader import EvalLoader, TrainLoader
from hf_fasttrain.data.loading.prefetch import ImageBatches, Prefetcher
from hf_fasttrain.data.loading.sampler import MicroBatchKey, SamplingPlan
from hf_fasttrain.data.loading.user_loader import UserEvalLoader, UserLoader
from hf_fasttrain.data.pixels.augment import EvalTransform, TrainTransform
from hf_fasttrain.data.pixels.images import Images
from hf_fasttrain.data.pixels.operations import Operations
from hf_fasttrain.data.pixels.prepare import Preparation
from hf_fasttrain.data.source.dataset import Source, load_source
from hf_fasttrain.utils.errors import DataError, RunError

CPU = torch.device("cpu")
NORMALIZE = Normalize([0.5] * 3, [0.25] * 3, CPU, channels_last=True)


@pytest.fixture(scope="module")
def digits() -> Source:
    return load_source("digits", eval_fraction=0.02)


def load_steps(
    source: Source,
    *,
    workers: int = 0,
    micro: int = 8,
    parts: int = 1,
    stop: int = 3,
    mode: Any = "batch",
    views: int = 1,
) -> list:
    """Return (images, targets) of steps 0 to `stop`, the micro-batches of all processes joined."""
    operations = Operations(randaugment={"num_ops": 2, "magnitude": 9})
    transform = TrainTransform(32, crop="random_resized", operations=operations, erase_prob=0.5, erase_fill=None)
    steps: list[list] = [[] for _ in range(stop)]
    for part in range(parts):
        images = ImageBatches(Images(source.train, Preparation()), transform)
        order = SamplingPlan(len(source.train), 22, micro, num_processes=parts, process_index=part)
        prefetcher = Prefetcher(images, CPU, workers=workers, pin_memory=False)
        mixing = Mixing(0.8, 1.0, 10, prob=0.9, mode=mode)
        loader = TrainLoader(prefetcher, order, NORMALIZE, mixing, transform.size_at, views)
        for step in loader.steps(0, stop):
            steps[step.index] += list(step.micro_batches)
    return [tuple(torch.cat(tensors) for tensors in zip(*step, strict=True)) for step in steps]


@pytest.mark.parametrize(
    ("workers", "micro", "parts", "mode"),
    [(2, 22, 1, "batch"), (0, 2, 1, "elem"), (0, 6, 2, "batch"), (1, 4, 3, "pair"), (0, 6, 2, "elem")],
)
def test_batches_do_not_depend_on_workers_micro_batches_and_processes(
    digits: Source, workers: int, micro: int, parts: int, mode: str
) -> None:
    torch.manual_seed(workers)  # the global generator has no effect
    expected = load_steps(digits, mode=mode)
    actual = load_steps(digits, workers=workers, micro=micro, parts=parts, mode=mode)
    for (images, targets), (other_images, other_targets) in zip(expected, actual, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(targets, other_targets)


@pytest.mark.parametrize(("workers", "micro", "parts"), [(0, 22, 1), (2, 6, 2)])
def test_views_are_independent_augmentations_of_the_same_images(
    digits: Source, workers: int, micro: int, parts: int
) -> None:
    expected = load_steps(digits)
    actual = load_steps(digits, workers=workers, micro=micro, parts=parts, views=2)
    repeated = load_steps(digits, views=2)
    for (images, targets), (both, same), (other, _) in zip(expected, actual, repeated, strict=True):
        assert both.shape == (len(images), 2, 3, 32, 32)
        assert torch.equal(targets, same)
        assert torch.equal(both, other)
        assert not torch.equal(both[:, 0], both[:, 1])


def test_augmentation_changes_with_the_epoch_and_does_not_touch_torchs_generator() -> None:
    image = np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8)
    transform = TrainTransform(32, operations=Operations(trivialaugment=True))
    state = torch.get_rng_state()
    first, same_again, next_epoch = transform(image, 0, 5), transform(image, 0, 5), transform(image, 1, 5)
    assert np.array_equal(first, same_again)
    assert not np.array_equal(first, next_epoch)
    assert torch.equal(state, torch.get_rng_state())


def test_loading_can_start_at_any_step(digits: Source) -> None:
    transform = TrainTransform(32)
    prefetcher = Prefetcher(
        ImageBatches(Images(digits.train, Preparation()), transform), CPU, workers=0, pin_memory=False
    )
    order = SamplingPlan(len(digits.train), 500, 500)
    loader = TrainLoader(prefetcher, order, NORMALIZE, None, transform.size_at)
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


@pytest.mark.parametrize("shape", [(3, 300, 100, 3), (1, 5, 30_000, 3), (2, 1, 1, 3), (0, 8, 8, 3), (5, 40, 40, 1)])
def test_normalize_on_a_cpu_gives_the_bits_of_torchs_operations(shape: tuple[int, ...]) -> None:
    mean, std = [0.485, 0.456, 0.406][: shape[-1]], [0.229, 0.224, 0.225][: shape[-1]]
    pixels = torch.randint(0, 256, shape, dtype=torch.uint8)
    mean_255, std_255 = (torch.tensor(values).view(1, -1, 1, 1) * 255 for values in (mean, std))
    plain = pixels.permute(0, 3, 1, 2).to(torch.float32).sub_(mean_255).div_(std_255)
    assert torch.equal(Normalize(mean, std, CPU, channels_last=True)(pixels), plain)
    across = pixels.transpose(1, 2)
    assert torch.equal(Normalize(mean, std, CPU, channels_last=True)(across), plain.transpose(2, 3))


@pytest.mark.parametrize(("mixup", "cutmix"), [(1.0, 0.0), (0.0, 1.0)])
def test_mixing_pairs_neighbours_and_targets_record_the_fraction(mixup: float, cutmix: float) -> None:
    images = torch.stack([torch.full((3, 16, 16), float(i)) for i in range(5)])
    mixing = Mixing(mixup, cutmix, 5)
    for step in range(20):
        mixed, targets = mixing(images, torch.arange(5), step)
        assert torch.equal(mixed[4], images[4])  # the last one has no partner
        for i in range(4):
            share = targets[i, i].item()
            assert targets[i, i ^ 1].item() == pytest.approx(1 - share, abs=1e-6)
            assert mixed[i].mean().item() == pytest.approx(share * i + (1 - share) * (i ^ 1), abs=1e-5)
    assert mixing.draw(3, 16) == mixing.draw(3, 16)
    assert mixing.draw(3, 16) != mixing.draw(4, 16)


@pytest.mark.parametrize(
    ("crop", "cache", "sizes"),
    [("random_resized", "memory", [16, 24]), ("padded", "device", [24, 24]), ("center", "device", [24, 24])],
)
def test_training_and_evaluation_may_have_different_sizes(
    crop: str, cache: str, sizes: list[int], image_folder: Path, tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    recipe = write_recipe(
        f"model: {{name: test_resnet}}\ndata: {{dataset: {image_folder}, image_size: 32, train_size: 24, workers: 0}}\n"
        f"augment: {{crop: {crop}, vflip: 0.5}}\ntrain: {{duration: 5 steps, batch_size: 8}}\nlog: {{report: false}}\n"
    )
    if crop == "random_resized":
        recipe.write_text(recipe.read_text().replace("vflip", "progressive: {start_size: 16, until: 1 epoch}, vflip"))
    weights = []
    for mode in ("none", cache):
        trainer = Trainer.from_recipe(recipe, [f"data.cache={mode}", f"output_dir={tmp_path / mode}"])
        if mode == "none":
            shapes = [step.image_shape for step in trainer.train_loader.steps(0, 6)]
            assert shapes == [(3, size, size) for size in sizes for _ in range(3)]
            assert next(iter(trainer.evaluation.eval_loader))[0].shape[1:] == (3, 32, 32)
        trainer.fit()
        weights.append(torch.cat([p.flatten() for p in trainer.raw_model.parameters()]))
    assert torch.equal(*weights)
    assert (
        json.loads((tmp_path / "none" / "model" / "config.json").read_text())["pretrained_cfg"]["input_size"][1] == 32
    )


@pytest.mark.parametrize("mode", ["pair", "elem"])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 1.0), (0.8, 0.0), (0.0, 1.0)])
def test_each_pair_or_image_is_mixed_by_a_separate_draw(mixup: float, cutmix: float, mode: Any) -> None:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(401, 3, 16, 16, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(0, 5, (401,), generator=generator)
    mixing = Mixing(mixup, cutmix, 5, prob=0.75, switch_prob=0.4, until=4, mode=mode)
    mixed, targets = mixing(images, labels, step=3)
    lam, boxes = mixing.draw_each(3, 16, 401)
    has_box = boxes.any(1)
    assert (lam < 1).mean() == pytest.approx(0.75, abs=0.08)
    assert has_box.sum() / (lam < 1).sum() == pytest.approx({0.0: 0, 1.0: 0.4 if mixup else 1.0}[cutmix], abs=0.1)
    assert (mode == "elem") == any(lam[i] != lam[i ^ 1] for i in range(400))
    one_hot = torch.nn.functional.one_hot(labels, 5).float()
    for i in range(401):
        j = min(i ^ 1, 400)
        expected, share = images[i].clone(), float(lam[i])
        left, top, right, bottom = boxes[i].tolist()
        if has_box[i]:
            expected[:, top:bottom, left:right] = images[j][:, top:bottom, left:right]
            assert share == pytest.approx(1 - (right - left) * (bottom - top) / 256)
        else:
            expected = share * images[i] + (1 - share) * images[j]
        torch.testing.assert_close(mixed[i], expected)
        torch.testing.assert_close(targets[i], share * one_hot[i] + (1 - share) * one_hot[j])
    assert mixed.is_contiguous(memory_format=torch.channels_last)
    same, hard = mixing(images, labels, step=4)
    assert torch.equal(same, images)
    assert torch.equal(hard, one_hot)


def test_steps_are_mixed_with_their_probability_until_a_step() -> None:
    always = Mixing(0.8, 1.0, 5, seed=3)
    assert [always.draw(step, 16) for step in range(50)] == [
        Mixing(0.8, 1.0, 5, seed=3, until=50).draw(step, 16) for step in range(50)
    ]
    draws = [Mixing(0.8, 1.0, 5, prob=0.7, switch_prob=0.2, until=2000).draw(step, 16) for step in range(2500)]
    mixed = [mix for mix in draws if mix is not None]
    assert draws[2000:] == [None] * 500
    assert len(mixed) / 2000 == pytest.approx(0.7, abs=0.04)
    assert sum(mix.box is not None for mix in mixed) / len(mixed) == pytest.approx(0.2, abs=0.04)
    images, labels = torch.randn(4, 3, 8, 8), torch.tensor([3, 1, 0, 2])
    same, targets = Mixing(0.8, 1.0, 5, until=1)(images, labels, step=1)
    assert torch.equal(same, images)
    assert torch.equal(targets, torch.nn.functional.one_hot(labels, 5).float())


@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_evaluation_sees_each_image_once(digits: Source, num_processes: int) -> None:
    labels = []
    for index in range(num_processes):
        images = Images(digits.evaluation, Preparation(center=EvalTransform(32)))
        prefetcher = Prefetcher(ImageBatches(images), CPU, workers=0, pin_memory=False)
        loader = EvalLoader(prefetcher, len(digits.evaluation), 8, NORMALIZE, num_processes, index)
        labels += [label for _, batch in loader for label in batch.tolist()]
    assert labels == digits.evaluation.labels.tolist()


def test_waiting_for_slow_images_is_counted(digits: Source) -> None:
    class Slow(Preparation):
        def encoded(self, record: Any) -> tuple[np.ndarray, None]:
            time.sleep(0.02)
            return np.zeros((8, 8, 3), np.uint8), None

    transform = TrainTransform(8, crop="none")
    prefetcher = Prefetcher(ImageBatches(Images(digits.train, Slow()), transform), CPU, workers=0, pin_memory=False)
    loader = TrainLoader(prefetcher, SamplingPlan(len(digits.train), 4, 4), NORMALIZE, None, transform.size_at)
    [list(step.micro_batches) for step in loader.steps(0, 3)]
    assert loader.wait_seconds >= 3 * 4 * 0.02


def test_a_user_loader_is_iterated_by_epochs_and_resume_needs_its_state() -> None:
    data = [(torch.full((2, 3, 4, 4), float(i)), torch.tensor([0, 1])) for i in range(3)]
    loader = UserLoader(data, CPU)
    values = [next(step.micro_batches)[0][0, 0, 0, 0].item() for step in loader.steps(0, 7)]
    assert values == [0, 1, 2, 0, 1, 2, 0]
    with pytest.raises(RunError, match=r"train_loader does not store its position .state_dict and load_state_dict;"):
        loader.load_state_dict(None)
    with pytest.raises(DataError, match="train_loader is empty"):
        UserLoader([], CPU)
    with pytest.raises(DataError, match="train_loader has no length"):
        UserLoader((x for x in data), CPU)


@pytest.mark.parametrize(
    ("of_images", "of_labels"),
    [("pixel_values", "labels"), ("image", "label"), ("images", "targets"), ("img", "target")],
)
def test_a_user_loader_may_yield_mappings(of_images: str, of_labels: str) -> None:
    batch = UserDict({of_images: torch.zeros(4, 3, 4, 4), of_labels: torch.arange(4)})
    (step,) = UserLoader([batch], CPU, accumulation_steps=2).steps(0, 1)
    assert [targets.tolist() for _, targets in step.micro_batches] == [[0, 1], [2, 3]]
    ((_, labels),) = UserEvalLoader([dict(batch)], CPU)
    assert labels.tolist() == [0, 1, 2, 3]


IMAGES, LABELS = torch.zeros(4, 3, 4, 4), torch.arange(4)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        (
            (IMAGES, LABELS, torch.ones(4)),
            r"is a tuple of 3: a tensor of float32 .*, a tensor of int64 \(4,\), a tensor of float32 \(4,\);"
            r" a batch is \(images, targets\), .*; put what else the loss needs into the targets",
        ),
        (IMAGES, r"is a tensor of float32 \(4, 3, 4, 4\); a batch is \(images, targets\), or a mapping"),
        ([IMAGES], r"is a list of 1: a tensor .*; a batch is \(images, targets\)"),
        ({"x": IMAGES, "y": LABELS}, r"is a mapping with x, y; .* one entry of images \(pixel_values, image, images,"),
        ({"image": IMAGES, "images": IMAGES, "label": LABELS}, "is a mapping with image, images, label; a batch is"),
        (
            {"image": IMAGES, "label": LABELS, "path": ["a"] * 4, "weight": torch.ones(4)},
            "has path, weight in addition to image and label, which would not be used; drop it",
        ),
        ("a", "is a str; a batch is"),
    ],
)
def test_items_that_are_not_batches_are_errors_and_nothing_is_dropped(batch: Any, message: str) -> None:
    with pytest.raises(DataError, match="a batch of train_loader " + message):
        next(UserLoader([batch], CPU).steps(0, 1))
    with pytest.raises(DataError, match="a batch of eval_loader " + message):
        next(iter(UserEvalLoader([batch], CPU)))


def test_the_background_iterator_keeps_order_and_raises_errors() -> None:
    assert list(BackgroundIterator(iter(range(20)), lambda x: x * x)) == [x * x for x in range(20)]

    def failing() -> Iterator[int]:
        yield 1
        raise DataError("no more")

    ahead = BackgroundIterator(failing(), lambda x: x)
    with pytest.raises(DataError, match="no more"):
        list(ahead)
    with pytest.raises(ZeroDivisionError):
        list(BackgroundIterator(iter([1, 0]), lambda x: 1 / x))


def test_the_background_iterator_is_two_items_ahead_and_can_be_stopped() -> None:
    started: list[int] = []
    ahead = BackgroundIterator(iter(range(1000)), lambda x: started.append(x) or x)
    assert next(iter(ahead)) == 0
    deadline = time.monotonic() + 5
    while len(started) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert started == [0, 1, 2, 3]  # the first, two in the queue, and one that waits for a place in it
    ahead.stop()
    assert not ahead._thread.is_alive()


def test_a_batch_still_referenced_is_not_overwritten() -> None:
    normalize = Normalize([0.5] * 3, [0.25] * 3, CPU, channels_last=True)
    pixels = [torch.full((4, 8, 8, 3), i, dtype=torch.uint8) for i in range(6)]
    batches = [normalize(batch) for batch in pixels]
    assert [round(batch[0, 0, 0, 0].item() * 0.25 * 255 + 127.5) for batch in batches] == list(range(6))
    addresses = set()
    for batch in pixels:
        addresses.add(normalize(batch).data_ptr())
    assert len(addresses) <= 2
    weight = torch.ones(3, 1, 1, requires_grad=True)
    losses = [(normalize(batch) * weight).sum() for batch in pixels]  # the graph holds the batches
    for number, loss in enumerate(losses):
        (gradient,) = torch.autograd.grad(loss, weight)
        assert gradient[0].item() == pytest.approx(4 * 64 * (number / 255 - 0.5) / 0.25, rel=1e-4)


def test_batches_stay_correct_when_workers_write_ahead(digits: Source) -> None:
    """Each batch is compared while the workers already fill the next ones."""
    images = ImageBatches(Images(digits.train, Preparation()), TrainTransform(32))
    keys = [MicroBatchKey(0, np.arange(start, start + 8)) for start in range(0, 800, 8)]
    prefetcher = Prefetcher(images, CPU, workers=2, pin_memory=False)
    opened = prefetcher.open(keys, 8, persistent=True)
    for rounds in range(2):
        for number, ((pixels, labels), key) in enumerate(zip(opened, keys, strict=True)):
            batch = images.make(key)
            time.sleep(0.002)
            assert torch.equal(pixels, batch.pixels)
            assert torch.equal(labels, batch.labels)
            if rounds == 0 and number == 30:
                break  # the second pass starts again, with all slots free


def test_a_batch_larger_than_its_slot_is_loaded(digits: Source) -> None:
    images = ImageBatches(Images(digits.train, Preparation()), TrainTransform(16))
    key = MicroBatchKey(0, np.arange(20))
    ((pixels, _),) = Prefetcher(images, CPU, workers=1, pin_memory=False).open([key], 4)
    assert torch.equal(pixels, images.make(key).pixels)


AUGMENTED = """
model: {name: test_resnet}
data: {dataset: FOLDER, image_size: 48, short_side: 18, stored_quality: 90}
augment:
  three_augment: true
  color_jitter: {brightness: 0.3, contrast: 0.3, saturation: 0.3, hue: 0.1}
  auto: rand-m9-mstd0.5-inc1
  flip: 0.3
  vflip: 0.5
  erase: 0.3
  erase_fill: pixel
  repeats: 3
  mixup: 0.2
  cutmix: 1.0
  mixup_prob: 0.8
  mixup_switch_prob: 0.3
  mixup_until: 7 steps
  progressive: {start_size: 32, until: 2 epochs, multiple: 8}
train: {duration: 8 steps, batch_size: 8}
evaluate: {every: 8 steps}
checkpoint: {every: 4 steps}
"""


def test_all_augmentations_together_do_not_depend_on_workers_micro_batches_caches_or_resuming(
    image_folder: Path, tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    recipe = write_recipe(AUGMENTED.replace("FOLDER", str(image_folder)))
    variants = {
        "plain": ["data.workers=0", "data.cache=none"],
        "workers": ["data.workers=2", "data.cache=memory"],
        "stopped": ["data.workers=1", "data.cache=none", "train.duration=4 steps", "schedule.name=constant"],
    }
    weights = {}
    for name, overrides in variants.items():
        trainer = Trainer.from_recipe(recipe, ["schedule.name=constant", f"output_dir={tmp_path / name}", *overrides])
        shapes = [tuple(step.image_shape) for step in trainer.train_loader.steps(0, 8)] if name == "plain" else []
        assert shapes in ([], [(3, size, size) for size in (32, 32, 32, 40, 40, 40, 48, 48)])
        trainer.fit()
        weights[name] = torch.cat([p.flatten() for p in trainer.raw_model.parameters()])
    overrides = ["schedule.name=constant", f"output_dir={tmp_path / 'stopped'}", "data.workers=0"]
    trainer = Trainer.from_recipe(recipe, overrides, resume=True)
    trainer.fit()
    resumed = torch.cat([p.flatten() for p in trainer.raw_model.parameters()])
    assert torch.equal(weights["workers"], weights["plain"])
    assert torch.equal(resumed, weights["plain"])
    assert not torch.equal(weights["stopped"], weights["plain"])
