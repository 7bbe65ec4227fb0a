"""Which images each process trains on in each step: a pure function of (seed, epoch, step, process, micro-batch).

A step is split over processes and micro-batches at even positions only, so that mixup and cutmix can always pair
positions 2i and 2i+1. Shares of processes differ by at most one pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

ORDER_STREAM = 1  # separate random streams for order, mixing and each stage of augmentation
MIX_STREAM = 3
CROP_STREAM, FLIP_STREAM, ERASE_STREAM, OPERATION_STREAM, NOISE_STREAM, VFLIP_STREAM = 4, 5, 6, 7, 8, 9
TRANSFORM_STREAM, TURN_STREAM = 10, 11
CALIBRATION_STREAM = 40


def keyed_rng(seed: int, stream: int, *key: int) -> np.random.Generator:
    """Return a random generator that depends on (seed, stream) and a key of up to three numbers only."""
    counter = [0, *key, *[0] * (3 - len(key))]  # the first word is the generator's own counter
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=counter))


def keyed_uniforms(
    seed: int, stream: int, epoch: int, indices: np.ndarray, repeats: np.ndarray | int, count: int
) -> np.ndarray:
    """Return `count` uniform numbers in [0, 1) for each image of a batch, (B, count) float64.

    A row depends on its (seed, stream, epoch, index, repeat) only, not on the rest of the batch. SplitMix64
    (Steele, Lea and Flood, 2014) started at a hash of the key, for the whole batch at once: 0.1 us for a number,
    where a generator object for each image would cost 15 us.
    """
    repeats = np.broadcast_to(np.asarray(repeats), np.shape(indices))
    with np.errstate(over="ignore"):
        state = _mix_bits(np.uint64(seed) ^ (np.uint64(stream) * _GOLDEN))
        for part in (np.uint64(epoch), np.asarray(indices).astype(np.uint64), repeats.astype(np.uint64)):
            state = _mix_bits(state + (part + np.uint64(1)) * _GOLDEN)
        steps = np.arange(1, count + 1, dtype=np.uint64) * _GOLDEN
        numbers = _mix_bits(state[:, None] + steps)
    return (numbers >> np.uint64(11)).astype(np.float64) * 2.0**-53


_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix_bits(z: np.ndarray | np.uint64) -> np.ndarray:
    """Return SplitMix64's output function of 64-bit words; overflow is intended."""
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return np.asarray(z ^ (z >> np.uint64(31)))


@dataclass(frozen=True)
class MicroBatchKey:
    """What a loader worker needs to build one micro-batch."""

    epoch: int
    indices: np.ndarray  # (B,) int64, rows of the split
    repeats: np.ndarray | int = 0  # (B,) number of the image's repetition; 0 without repeated augmentation

    def in_views(self, number: int) -> MicroBatchKey:
        """Return the key of a batch with `number` views of each image in a row, each differently augmented."""
        if number == 1:
            return self
        repeats = np.broadcast_to(self.repeats, self.indices.shape)[:, None] * number + np.arange(number)
        return MicroBatchKey(self.epoch, np.repeat(self.indices, number), repeats.ravel())


@dataclass(frozen=True)
class StepPlan:
    """The micro-batches of one process in one optimizer step."""

    step: int
    epoch: int
    num_images: int  # over all processes
    micro_batches: tuple[MicroBatchKey, ...]  # this process's; empty if the step has too few images


def process_share(num_images: int, num_processes: int, process_index: int) -> range:
    """Return the positions of a step's order that belong to a process; cut at even positions."""
    pairs = (num_images + 1) // 2
    start = pairs * process_index // num_processes
    stop = pairs * (process_index + 1) // num_processes
    return range(2 * start, min(2 * stop, num_images))


def cut_micro_batches(share: range, micro_batch_size: int, *, join_single: bool = False) -> list[range]:
    """Split a share into micro-batches of `micro_batch_size` (even) positions; the last one may be shorter.

    With `join_single`, a last micro-batch of one image joins its neighbour: batch norm can't normalise one value.
    """
    parts = [share[i : i + micro_batch_size] for i in range(0, len(share), micro_batch_size)]
    if join_single and len(parts) > 1 and len(parts[-1]) == 1:
        last = parts.pop()
        parts[-1] = range(parts[-1].start, last.stop)
    return parts


def micro_batch_size_for(batch_size: int, num_processes: int, num_micro_batches: int) -> int:
    """Return the even micro-batch size that splits the largest share of a full step into at most so many."""
    largest_share = process_share(batch_size, num_processes, num_processes - 1)
    pairs = (len(largest_share) + 1) // 2
    return 2 * max(1, -(-pairs // num_micro_batches))


@dataclass(frozen=True, eq=False)
class SampleWeights:
    """How often each image of a split is drawn, in proportion to the others."""

    values: np.ndarray  # (N,) float64, at least 0, with a sum above 0


@dataclass(frozen=True)
class SamplingPlan:
    """Samples every image once per epoch, shuffled by (seed, epoch).

    With `repeats` above 1 (repeated augmentation, arXiv 1901.09335) each image appears `repeats` times in its step,
    with different augmentations. An epoch keeps its number of images and steps, but reads 1 / repeats of the files.
    The repeats of an image are far apart, so that mixup and cutmix pair different images.

    With `weights` images are drawn with replacement from (seed, epoch), as many as there are; an image that is drawn
    again in an epoch is augmented differently.
    """

    num_images: int
    batch_size: int  # images per step, over all processes
    micro_batch_size: int  # even; images per process and forward
    seed: int = 0
    drop_last: bool = False
    join_single: bool = False
    num_processes: int = 1
    process_index: int = 0
    repeats: int = 1
    weights: SampleWeights | None = None

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        full, rest = divmod(self.num_images, self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def plan(self, step: int) -> StepPlan:
        """Return the plan of a step, counted from 0 over the whole training."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        num_images = min(self.batch_size, self.num_images - step_in_epoch * self.batch_size)
        different = -(-num_images // self.repeats)
        start = step_in_epoch * -(-self.batch_size // self.repeats)
        positions = np.arange(num_images)
        drawn, repeats = start + positions % different, positions // different
        if self.weights is None:
            indices = epoch_order(self.seed, epoch, self.num_images)[drawn].astype(np.int64)
        else:
            images, occurrences = weighted_epoch_order(self.seed, epoch, self.weights)
            indices, repeats = images[drawn], repeats + self.repeats * occurrences[drawn]
        share = process_share(len(indices), self.num_processes, self.process_index)
        parts = cut_micro_batches(share, self.micro_batch_size, join_single=self.join_single)
        slices = (slice(part.start, part.stop) for part in parts)
        keys = tuple(MicroBatchKey(epoch, indices[part], repeats[part]) for part in slices)
        return StepPlan(step, epoch, len(indices), keys)


@lru_cache(maxsize=2)  # the present epoch's, and the next one's, which is prefetched
def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """Return the epoch's permutation of all images, (num_images,) int32, or int64 from 2**31 images on."""
    order = np.arange(num_images, dtype=np.int32 if num_images < 2**31 else np.int64)
    keyed_rng(seed, ORDER_STREAM, epoch).shuffle(order)  # as `permutation` does, with half the memory
    return order


@lru_cache(maxsize=2)
def weighted_epoch_order(seed: int, epoch: int, weights: SampleWeights) -> tuple[np.ndarray, np.ndarray]:
    """Return the epoch's N images, drawn with replacement, and how often each was drawn before; both (N,) int64."""
    shares = np.cumsum(weights.values / weights.values.sum())
    draws = keyed_rng(seed, ORDER_STREAM, epoch).random(len(shares))
    images = np.searchsorted(shares / shares[-1], draws, side="right")
    grouped, positions = np.argsort(images, kind="stable"), np.arange(len(images))
    is_first = np.diff(images[grouped], prepend=-1) > 0
    occurrences = np.empty_like(images)
    occurrences[grouped] = positions - np.maximum.accumulate(np.where(is_first, positions, 0))
    return images, occurrences
