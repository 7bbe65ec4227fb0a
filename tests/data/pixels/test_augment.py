"""The random numbers of an image, and the augmentations made with them."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import ks_2samp

from hf_fasttrain.data.loading.batch import augment_on_device
from hf_fasttrain.data.loading.sampler import CROP_STREAM, MicroBatchKey, keyed_uniforms
from hf_fasttrain.data.pixels.augment import BOX_TRIES, Growth, NormalFill, TrainTransform, random_box
from hf_fasttrain.data.pixels.operations import Operations
from hf_fasttrain.utils.errors import RecipeError

MASK = 2**64 - 1
IMAGES = np.random.default_rng(0).integers(0, 256, (12, 16, 16, 3), dtype=np.uint8)


def mixed(z: int) -> int:
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & MASK
    return z ^ (z >> 31)


@settings(max_examples=50, deadline=None)
@given(
    st.integers(0, 2**63 - 1),
    st.integers(1, 9),
    st.integers(0, 10**6),
    st.lists(st.integers(0, 10**9), min_size=1, max_size=5),
    st.integers(0, 3),
)
def test_random_numbers_of_an_image_are_splitmix64_of_its_key(
    seed: int, stream: int, epoch: int, indices: list[int], repeat: int
) -> None:
    golden = 0x9E3779B97F4A7C15
    actual = keyed_uniforms(seed, stream, epoch, np.array(indices), repeat, 3)
    for row, index in enumerate(indices):
        state = mixed(seed ^ (stream * golden & MASK))
        for part in (epoch, index, repeat):
            state = mixed((state + (part + 1) * golden) & MASK)
        plain = [(mixed((state + (i + 1) * golden) & MASK) >> 11) / 2**53 for i in range(3)]
        assert actual[row].tolist() == plain


def test_numbers_are_uniform_and_independent() -> None:
    numbers = keyed_uniforms(0, CROP_STREAM, 0, np.arange(20_000), 0, 4)
    next_epoch = keyed_uniforms(0, CROP_STREAM, 1, np.arange(20_000), 0, 4)
    histogram = np.histogram(numbers, 16, (0, 1))[0]
    assert abs(histogram / numbers.size * 16 - 1).max() < 0.05
    together = np.hstack([numbers, next_epoch, numbers[np.arange(20_000) ^ 1][:, :1]])
    correlations = np.corrcoef(together.T) - np.eye(9)
    assert abs(correlations).max() < 0.03


@settings(max_examples=200, deadline=None)
@given(
    st.integers(1, 4000),
    st.integers(1, 4000),
    st.floats(0.01, 1.0),
    st.floats(0.1, 1.0),
    st.integers(0, 10**6),
)
def test_a_box_lies_in_the_image_and_keeps_area_and_ratio(
    width: int, height: int, min_area: float, narrow: float, index: int
) -> None:
    draws = keyed_uniforms(0, CROP_STREAM, 0, np.array([index]), 0, 4 * BOX_TRIES)[0]
    left, top, right, bottom = random_box((width, height), (min_area, 1.0), (narrow, 1 / narrow), draws)
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    w, h = right - left, bottom - top
    area = width * height
    if w * h > 400:  # rounding to integer pixels changes the ratio of small boxes
        assert narrow * 0.8 <= w / h <= 1.25 / narrow or (w == width and h == height)
        assert w * h >= 0.8 * min_area * area or w in (1, width) or h in (1, height)


def test_boxes_are_distributed_as_torchvisions() -> None:
    from torchvision.transforms import v2

    torch.manual_seed(0)
    image = torch.zeros(3, 240, 320)
    reference = v2.RandomResizedCrop(224)
    theirs = np.array([list(reference.make_params([image]).values()) for _ in range(4000)], float)  # top left h w
    draws = keyed_uniforms(1, CROP_STREAM, 0, np.arange(4000), 0, 4 * BOX_TRIES)
    boxes = np.array([random_box((320, 240), (0.08, 1.0), (3 / 4, 4 / 3), row) for row in draws], float)
    ours = np.stack([boxes[:, 1], boxes[:, 0], boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]], 1)
    for column in range(4):
        assert ks_2samp(ours[:, column], theirs[:, column]).pvalue > 1e-3
    assert abs((ours[:, 2] * ours[:, 3]).mean() / (theirs[:, 2] * theirs[:, 3]).mean() - 1) < 0.03


def written(transform: TrainTransform, key: MicroBatchKey) -> np.ndarray:
    size = transform.size_at(key.epoch)
    out = np.empty((len(key.indices), size, size, 3), np.uint8)
    transform.write(((row, IMAGES[index]) for row, index in enumerate(key.indices)), key, out)
    return out


def test_padded_crop_and_flip_equal_numpys() -> None:
    transform = TrainTransform(16, crop="padded", crop_padding=3)
    key = MicroBatchKey(2, np.arange(12))
    padded = np.pad(IMAGES, ((0, 0), (3, 3), (3, 3), (0, 0)))
    shifts, flips = transform.shifts(key), transform.flips(key)
    for row, image in enumerate(written(transform, key)):
        left, top = shifts[row] + 3
        plain = padded[row, top : top + 16, left : left + 16]
        assert np.array_equal(image, plain[:, ::-1] if flips[row] else plain)
    upside_down = TrainTransform(16, crop="padded", crop_padding=3, vflip=0.5)
    chosen = upside_down.vflips(key)
    assert 0 < chosen.sum() < 12
    for row, image in enumerate(written(upside_down, key)):
        plain = written(transform, key)[row]
        assert np.array_equal(image, plain[::-1] if chosen[row] else plain)
    turned = TrainTransform(16, crop="padded", crop_padding=3, quarter_turns=True)
    turns = turned.turns(key)
    assert {*turns} == {0, 1, 2, 3}
    for row, image in enumerate(written(turned, key)):
        assert np.array_equal(image, np.rot90(written(transform, key)[row], turns[row]))
    many = MicroBatchKey(0, np.arange(4000))
    assert np.abs(np.bincount(turned.turns(many)) / 4000 - 0.25).max() < 0.03
    for probability in (0.1, 0.9):
        flipping = TrainTransform(16, flip=probability, vflip=probability)
        assert abs(flipping.flips(many).mean() - probability) < 0.03
        assert abs(flipping.vflips(many).mean() - probability) < 0.03
        assert abs((flipping.flips(many) & flipping.vflips(many)).mean() - probability**2) < 0.03  # independent
    assert set(np.unique(transform.shifts(many))) == set(range(-3, 4))
    assert abs(transform.flips(many).mean() - 0.5) < 0.03


CASES: dict[str, dict[str, Any]] = {
    "padded": {"crop": "padded"},
    "wide padding, no flip": {"crop": "padded", "crop_padding": 9, "flip": False},
    "no crop": {"crop": "none"},
    "flipped both ways": {"crop": "padded", "flip": 0.8, "vflip": 0.6},
    "turned": {"crop": "padded", "vflip": 0.5, "quarter_turns": True, "erase_prob": 0.7},
    "erased": {"crop": "padded", "erase_prob": 0.7, "erase_fill": (1, 2, 3)},
}


@pytest.mark.parametrize("case", CASES)
def test_the_device_makes_the_same_pixels(case: str) -> None:
    transform = TrainTransform(16, seed=5, **CASES[case])
    for epoch in range(3):
        key = MicroBatchKey(epoch, np.array([3, 0, 11, 5, 3, 7, 8]), np.array([0, 0, 0, 0, 1, 0, 0]))
        actual = augment_on_device(torch.from_numpy(IMAGES), torch.from_numpy(key.indices), transform, key)
        assert np.array_equal(actual.numpy(), written(transform, key))


def test_each_image_is_augmented_by_its_key_alone() -> None:
    operations = Operations(trivialaugment=True, color_jitter={"brightness": 0.4, "hue": 0.1})
    transform = TrainTransform(16, operations=operations, erase_prob=0.5, erase_fill=None)
    complete = written(transform, MicroBatchKey(1, np.arange(12)))
    for row in (0, 5, 11):
        assert np.array_equal(transform(IMAGES[row], 1, row), complete[row])
    assert not np.array_equal(transform(IMAGES[0], 1, 0, repeat=1), complete[0])


OPERATIONS: dict[str, dict[str, Any]] = {
    "randaugment": {"randaugment": {"num_ops": 2, "magnitude": 9}},
    "trivialaugment": {"trivialaugment": True},
    "augmix": {"augmix": {"severity": 3, "mixture_width": 3, "chain_depth": -1, "alpha": 1.0}},
    "three_augment": {"three_augment": True},
    "color_jitter": {"color_jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1}},
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_follow_their_seed_and_do_not_touch_torchs_generator(name: str) -> None:
    operations = Operations(**OPERATIONS[name])
    state = torch.get_rng_state()
    results = [operations(IMAGES[0], seed).tobytes() for seed in range(12)]
    assert [operations(IMAGES[0], seed).tobytes() for seed in range(12)] == results
    assert len(set(results)) > 2
    assert torch.equal(state, torch.get_rng_state())
    assert operations
    assert not Operations()


POLICIES = ["rand-m9-mstd0.5-inc1", "rand-m6-n3-p0.7-tweights", "original-mstd0.5", "v0r", "3a", "augmix-m5-w4-d2"]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_of_timm_gives_timms_pixels_and_does_not_touch_any_generator(policy: str) -> None:
    from timm.data.transforms_factory import transforms_imagenet_train

    mean = (0.485, 0.456, 0.406)
    (timms,) = transforms_imagenet_train(
        16, auto_augment=policy, color_jitter=None, interpolation="bicubic", mean=mean, separate=True
    )[1].transforms
    auto = {"policy": policy, "image_size": 16, "mean": mean, "interpolation": "bicubic"}
    operations = Operations(auto=auto)
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()
    actual = [operations(IMAGES[0], seed) for seed in range(2**33, 2**33 + 20)]
    assert (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()) == before
    for seed, pixels in zip(range(20), actual, strict=True):
        random.seed(2**33 + seed)
        np.random.seed(seed)
        assert np.array_equal(pixels, np.asarray(timms(Image.fromarray(IMAGES[0]))))
    random.setstate(before[0])
    assert len({pixels.tobytes() for pixels in actual}) > 2


def test_posterizing_to_no_bits_gives_black_pixels() -> None:
    auto = {"policy": "rand-m10-mstd0-n1-inc1", "image_size": 16, "mean": (0.5, 0.5, 0.5), "interpolation": "bicubic"}
    operations = Operations(auto=auto)
    assert any(not operations(IMAGES[0], seed).any() for seed in range(100))


def test_a_policy_that_timm_cannot_sample_is_refused_before_training() -> None:
    with pytest.raises(RecipeError, match=r"augment\.auto=rand-n99-tweights: timm does not accept it: Cannot take"):
        Operations(auto={"policy": "rand-n99-tweights", "image_size": 16, "mean": (0, 0, 0), "interpolation": "box"})


@pytest.mark.parametrize("mode", ["pixel", "rand"])
def test_normal_noise_is_timms_clipped_to_the_range_of_pixels(mode: str) -> None:
    from timm.data.random_erasing import RandomErasing

    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.1)
    torch.manual_seed(0)
    random.seed(0)
    timms = RandomErasing(1.0, mode=mode, device="cpu")(torch.full((400, 3, 16, 16), torch.nan))
    theirs = [image[:, ~image[0].isnan()].T for image in timms]  # (N, 3) of each box
    fill = NormalFill(mean, std, per_pixel=mode == "pixel")
    transform = TrainTransform(16, crop="none", flip=False, erase_prob=1.0, erase_fill=fill)
    ours = []
    for epoch in range(34):
        key = MicroBatchKey(epoch, np.arange(12))
        batch = written(transform, key)
        for row, (left, top, right, bottom) in transform.erased(key, 16):
            ours.append(batch[row, top:bottom, left:right].reshape(-1, 3))
    if mode == "rand":
        assert all((box == box[0]).all() for box in ours)
        ours, theirs = [box[:1] for box in ours], [box[:1] for box in theirs]
    levels = (255 * (torch.cat(theirs) * torch.tensor(std) + torch.tensor(mean))).round().clamp(0, 255)
    for channel in range(3):
        assert ks_2samp(np.concatenate(ours)[:, channel], levels[:, channel]).pvalue > 1e-3


def test_erasing_fills_a_box_of_two_to_a_third_of_the_area() -> None:
    key = MicroBatchKey(0, np.arange(12))
    transform = TrainTransform(16, crop="none", flip=False, erase_prob=1.0, erase_fill=(1, 2, 3))
    shares = []
    for row, image in enumerate(written(transform, key)):
        erased = (image == (1, 2, 3)).all(-1)
        shares.append(erased.mean())
        assert np.array_equal(image[~erased], IMAGES[row][~erased])
    assert min(shares) > 0.01
    assert max(shares) < 0.36
    noise = TrainTransform(16, crop="none", flip=False, erase_prob=1.0, erase_fill=None)
    changed = (written(noise, key) != IMAGES).any(-1).mean()
    assert 0.05 < changed < 0.34
    assert len(transform.erased(MicroBatchKey(0, np.arange(4000)), 16)) == 4000
    boxes = TrainTransform(16, erase_prob=0.25).erased(MicroBatchKey(0, np.arange(4000)), 16)
    assert abs(len(boxes) / 4000 - 0.25) < 0.03


def test_progressive_sizes_grow_with_the_epoch() -> None:
    transform = TrainTransform(224, growth=Growth(128, until=4, multiple=32))
    assert [transform.size_at(epoch) for epoch in range(6)] == [128, 160, 192, 192, 224, 224]
    assert transform(IMAGES[0], 0, 0).shape == (128, 128, 3)
    fine_steps = TrainTransform(48, growth=Growth(40, until=3, multiple=1))
    assert [fine_steps.size_at(epoch) for epoch in range(4)] == [40, 43, 45, 48]
