"""Which image when, and who gets it: a function of (seed, epoch, step, process, micro-batch), no state.

A step's global order is cut to processes and micro-batches at even positions only, so that mixup and cutmix can
pair positions 2i and 2i+1 whatever the cut. Shares of processes differ by at most one pair.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

ORDER_STREAM = 1  # keeps the random numbers of order, augmentation and mixing apart
AUGMENT_STREAM = 2
MIX_STREAM = 3


def keyed_rng(seed: int, stream: int, *key: int) -> np.random.Generator:
    """Return the random numbers that belong to a key of up to three numbers; nothing else influences them."""
    counter = [0, *key, *[0] * (3 - len(key))]  # the generator itself counts in the first word
    return np.random.Generator(np.random.Philox(key=[seed, stream], counter=counter))


@dataclass(frozen=True)
class MicroBatchKey:
    """What a loader worker needs to make one micro-batch."""

    epoch: int
    indices: np.ndarray  # (B,) int64, rows of the data set
    repeat: int = 0


@dataclass(frozen=True)
class StepPlan:
    """One optimizer step as one process sees it."""

    step: int
    epoch: int
    num_images: int  # of all processes together
    micro_batches: tuple[MicroBatchKey, ...]  # this process's; empty if the step has too few images


def process_share(num_images: int, num_processes: int, process_index: int) -> range:
    """Return the positions of a step's order that belong to a process; cut at even positions."""
    pairs = (num_images + 1) // 2
    start = pairs * process_index // num_processes
    stop = pairs * (process_index + 1) // num_processes
    return range(2 * start, min(2 * stop, num_images))


def cut_micro_batches(share: range, micro_batch_size: int, *, join_single: bool = False) -> list[range]:
    """Return a share cut into pieces of `micro_batch_size` (even) positions, the last one shorter.

    With `join_single`, a last piece of one image joins its neighbour: batch norm can't normalise one value.
    """
    pieces = [share[i : i + micro_batch_size] for i in range(0, len(share), micro_batch_size)]
    if join_single and len(pieces) > 1 and len(pieces[-1]) == 1:
        last = pieces.pop()
        pieces[-1] = range(pieces[-1].start, last.stop)
    return pieces


def micro_batch_size_for(batch_size: int, num_processes: int, num_pieces: int) -> int:
    """Return the even micro-batch size that cuts the largest share of a full step into `num_pieces` or fewer."""
    largest_share = process_share(batch_size, num_processes, num_processes - 1)
    pairs = (len(largest_share) + 1) // 2
    return 2 * max(1, -(-pairs // num_pieces))


@dataclass(frozen=True)
class Order:
    """The order of training: every image once an epoch, shuffled by (seed, epoch)."""

    num_images: int
    batch_size: int  # images per step, all processes together
    micro_batch_size: int  # even; images per process and forward
    seed: int = 0
    drop_last: bool = False
    join_single: bool = False
    num_processes: int = 1
    process_index: int = 0

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps in an epoch."""
        full, rest = divmod(self.num_images, self.batch_size)
        return full if self.drop_last or not rest else full + 1

    def plan(self, step: int) -> StepPlan:
        """Return what happens in a step, counted from 0 over the whole training."""
        epoch, step_in_epoch = divmod(step, self.steps_per_epoch)
        start = step_in_epoch * self.batch_size
        indices = epoch_order(self.seed, epoch, self.num_images)[start : start + self.batch_size]
        share = process_share(len(indices), self.num_processes, self.process_index)
        pieces = cut_micro_batches(share, self.micro_batch_size, join_single=self.join_single)
        keys = tuple(MicroBatchKey(epoch, indices[piece.start : piece.stop]) for piece in pieces)
        return StepPlan(step, epoch, len(indices), keys)


@lru_cache(maxsize=4)
def epoch_order(seed: int, epoch: int, num_images: int) -> np.ndarray:
    """Return the epoch's permutation of all images, (num_images,) int64."""
    return keyed_rng(seed, ORDER_STREAM, epoch).permutation(num_images)
