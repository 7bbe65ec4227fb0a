"""One batch on the device: augmented there if data.cache=device, normalised, mixed by mixup or cutmix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from hf_fasttrain.data.loading.sampler import MIX_STREAM, MicroBatchKey, keyed_rng
from hf_fasttrain.data.pixels.augment import TrainTransform
from hf_fasttrain.utils.private_apis import is_memory_free

VALUES_AT_ONCE = 1 << 16  # float32 values: 256 KB, which the second level of a core's cache holds


class Normalize:
    """uint8 pixels (B, H, W, 3) to normalised float32 `images` (B, 3, H, W): (x / 255 - mean) / std.

    The result is channels_last in memory, as the pixels are, or contiguous if `channels_last` is False.
    """

    def __init__(
        self, mean: Sequence[float], std: Sequence[float], device: torch.device, *, channels_last: bool
    ) -> None:
        self.mean = torch.tensor(mean, device=device).view(1, -1, 1, 1) * 255
        self.std = torch.tensor(std, device=device).view(1, -1, 1, 1) * 255
        self.channels_last = channels_last
        self._memory: list[Tensor] = []  # of earlier batches, on a CPU

    def __call__(self, pixels: Tensor) -> Tensor:
        if pixels.device.type == "cpu":
            images = self._on_cpu(pixels)
        else:
            images = pixels.permute(0, 3, 1, 2).to(torch.float32).sub_(self.mean).div_(self.std)
        return images if self.channels_last else images.contiguous()

    def _on_cpu(self, pixels: Tensor) -> Tensor:
        """Normalise whole rows of pixels, into recycled memory: 0.1 ms for 224 px instead of 0.65 ms.

        By numpy, whose loops run in this thread and here within a core's cache. Two threads of torch's wait for each
        other, which takes three times as much of the cores where loader processes use them.
        """
        number, height, width, channels = pixels.shape
        images = self._buffer(pixels.shape)
        values, rows = (x.reshape(number * height, width * channels).numpy() for x in (images, pixels))
        mean, std = (np.tile(x.flatten().numpy(), width) for x in (self.mean, self.std))
        step = max(1, VALUES_AT_ONCE // rows.shape[1])
        for start in range(0, len(rows), step):
            part = values[start : start + step]
            np.copyto(part, rows[start : start + step])
            part -= mean
            part /= std
        return images.permute(0, 3, 1, 2)

    def _buffer(self, shape: Sequence[int]) -> Tensor:
        """Return memory for float pixels: that of an earlier batch which is no longer referenced, or new memory.

        The first use of fresh memory costs several times what filling it does.
        """
        for memory in self._memory:
            if memory.shape == shape and is_memory_free(memory):
                return memory
        self._memory = [*self._memory[-1:], torch.empty(shape, dtype=torch.float32)]
        return self._memory[-1]


def augment_on_device(
    pixels: Tensor, rows: Tensor, transform: TrainTransform, key: MicroBatchKey, fill: Tensor | None = None
) -> Tensor:
    """Return the batch (B, S, S, 3) uint8 of a key from all `pixels` (N, S, S, 3), as `TrainTransform.write` does.

    `fill` is the colour of random erasing, (3,) uint8 on the device: copying it there would wait for the device.
    Supports the crops ``padded`` and ``none`` and erasing with one colour. Works on the whole batch at once.
    """
    number, size, device = len(rows), pixels.shape[1], pixels.device

    def to_device(values: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(values)).to(device, non_blocking=True)

    grid = torch.arange(size, device=device)
    shifts, mirrored = to_device(transform.shifts(key)), to_device(transform.flips(key))
    across = torch.where(mirrored[:, None], grid.flip(0), grid) + shifts[:, :1]  # (B, S): column of the source
    down = grid + shifts[:, 1:]
    if transform.vflip:
        down = torch.where(to_device(transform.vflips(key))[:, None], grid.flip(0), grid) + shifts[:, 1:]
    inside = ((across >= 0) & (across < size))[:, None, :] & ((down >= 0) & (down < size))[:, :, None]
    source = (rows[:, None, None] * size + down.clamp(0, size - 1)[:, :, None]) * size
    source = source + across.clamp(0, size - 1)[:, None, :]
    batch = pixels.view(-1, 3)[source.view(-1)].view(number, size, size, 3) * inside[..., None]
    if transform.quarter_turns:
        turns, upright = to_device(transform.turns(key))[:, None, None, None], batch
        for quarters in (1, 2, 3):
            batch = torch.where(turns == quarters, upright.rot90(quarters, (1, 2)), batch)
    erased = transform.erased(key, size)
    if erased:
        if fill is None:
            fill = torch.tensor(transform.erase_fill, dtype=torch.uint8, device=device)
        boxes = np.zeros((number, 4), np.int64)
        for row, box in erased:
            boxes[row] = box
        left, top, right, bottom = to_device(boxes).T[:, :, None]
        within = ((grid >= left) & (grid < right))[:, None, :] & ((grid >= top) & (grid < bottom))[:, :, None]
        batch = torch.where(within[..., None], fill, batch)
    return batch


@dataclass(frozen=True)
class Mix:
    """How the pairs of one step are mixed: `lam` of each image, the rest from its partner."""

    lam: float
    box: tuple[int, int, int, int] | None  # left, top, right, bottom of cutmix's box; None: mixup


@dataclass(frozen=True)
class Mixing:
    """Mixup (arXiv 1710.09412) and cutmix (arXiv 1905.04899), drawn once for a step from (seed, step).

    Partners are positions 2i and 2i+1 of the step, which are always in the same micro-batch; an odd last image stays
    unmixed. If both alphas are above 0, each step picks cutmix with `switch_prob`. A step is mixed at all with `prob`,
    and before step `until` only. In mode pair and elem all of that is drawn for each pair, or each image, of the step.
    """

    mixup: float
    cutmix: float
    num_classes: int
    seed: int = 0
    prob: float = 1.0
    switch_prob: float = 0.5
    until: int | None = None  # None: in every step
    mode: Literal["batch", "pair", "elem"] = "batch"

    def draw(self, step: int, image_size: int) -> Mix | None:
        """Return the mix of a step with square images, drawn on the CPU; None if it is not mixed."""
        if self.until is not None and step >= self.until:
            return None
        rng = keyed_rng(self.seed, MIX_STREAM, step)
        if self.prob < 1 and rng.random() >= self.prob:
            return None
        cut = self.cutmix > 0 and (self.mixup == 0 or rng.random() < self.switch_prob)
        alpha = self.cutmix if cut else self.mixup
        lam = float(rng.beta(alpha, alpha))
        if not cut:
            return Mix(lam, None)
        side = image_size * (1 - lam) ** 0.5 / 2
        center = rng.integers(image_size, size=2)
        left, top = (max(0, round(c - side)) for c in center)
        right, bottom = (min(image_size, round(c + side)) for c in center)
        return Mix(1 - (right - left) * (bottom - top) / image_size**2, (left, top, right, bottom))

    def draw_each(self, step: int, image_size: int, num_images: int) -> tuple[np.ndarray, np.ndarray]:
        """Return what each image of a step keeps, (N,), and its box (N, 4), which is empty unless it has cutmix."""
        rng = keyed_rng(self.seed, MIX_STREAM, step, 1)
        number = num_images if self.mode == "elem" else (num_images + 1) // 2
        mixed = rng.random(number) < (self.prob if self.until is None or step < self.until else 0.0)
        cut = rng.random(number) < (self.switch_prob if self.mixup and self.cutmix else float(self.cutmix > 0))
        alpha = np.where(cut, self.cutmix, self.mixup)
        lam = np.where(mixed, rng.beta(alpha, alpha), 1.0)
        side, center = image_size * np.sqrt(1 - lam[:, None]) / 2, rng.integers(image_size, size=(number, 2))
        corners = np.concatenate([np.round(center - side), np.round(center + side)], 1).clip(0, image_size)
        boxes = corners.astype(np.int64) * (cut & mixed)[:, None]
        area = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        lam = np.where(cut, 1 - area / image_size**2, lam)
        times = 1 if self.mode == "elem" else 2
        return lam.repeat(times)[:num_images], boxes.repeat(times, 0)[:num_images]

    def _mix_each(
        self, images: Tensor, targets: Tensor, partner: Tensor, lam: np.ndarray, boxes: np.ndarray
    ) -> tuple[Tensor, Tensor]:
        device, grid = images.device, torch.arange(images.shape[-1], device=images.device)
        left, top, right, bottom = torch.from_numpy(boxes).to(device, non_blocking=True).T[:, :, None]
        inside = ((grid >= left) & (grid < right))[:, None, :] & ((grid >= top) & (grid < bottom))[:, :, None]
        kept = torch.from_numpy(lam.astype(np.float32)).to(device, non_blocking=True)
        has_box = (right > left).view(-1, 1, 1, 1)
        blended = torch.lerp(images[partner], images, torch.where(has_box, 1.0, kept.view(-1, 1, 1, 1)))
        layout = (
            torch.channels_last if images.is_contiguous(memory_format=torch.channels_last) else torch.preserve_format
        )
        mixed = torch.where(inside[:, None], images[partner], blended).contiguous(memory_format=layout)
        return mixed, kept[:, None] * targets + (1 - kept[:, None]) * targets[partner]

    def __call__(
        self, images: Tensor, labels: Tensor, step: int, first: int = 0, num_images: int | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return mixed `images` (B, 3, H, W) and soft `targets` (B, K), of `labels` (B,) or multi-hot (B, K).

        They are those from position `first` on of the step's `num_images`, by default all.
        """
        targets = F.one_hot(labels, self.num_classes).to(torch.float32) if labels.ndim == 1 else labels
        partner = torch.arange(len(images), device=images.device).bitwise_xor_(1).clamp_(max=len(images) - 1)
        if self.mode != "batch":
            drawn = self.draw_each(step, images.shape[-1], len(images) if num_images is None else num_images)
            lam, boxes = (values[first : first + len(images)] for values in drawn)
            return self._mix_each(images, targets, partner, lam, boxes)
        mix = self.draw(step, images.shape[-1])
        if mix is None:
            return images, targets
        targets = mix.lam * targets + (1 - mix.lam) * targets[partner]
        if mix.box is None:
            return torch.lerp(images[partner], images, mix.lam), targets
        left, top, right, bottom = mix.box
        images = images.clone(memory_format=torch.preserve_format)
        images[:, :, top:bottom, left:right] = images[partner, :, top:bottom, left:right]
        return images, targets
