"""What a model's layers see of images of a size: pixels that they cut off, and maps of a single pixel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn

LAYERS = (nn.Conv2d, nn.MaxPool2d, nn.AvgPool2d)


class Seen(NamedTuple):
    """What a convolution or pooling was given."""

    side: int  # pixels, the shorter one
    kernel: int
    stride: int
    padding: int | str
    ceil_mode: bool

    @property
    def has_patches(self) -> bool:
        """Whether what it looks at lies side by side, so that a rest at the end belongs to nothing."""
        return self.kernel == self.stride > 1 and self.padding == 0 and not self.ceil_mode

    @property
    def cut_off(self) -> int:
        """Rows at the end that belong to no patch."""
        return self.side % self.stride if self.has_patches else 0

    def pixels_of_patch(self, size: int) -> int:
        """Return the rows of an image of `size` pixels that a patch stands for."""
        exact = size % self.side == 0
        return self.stride * (size // self.side if exact else 2 ** round(math.log2(size / self.side)))


@contextmanager
def seen_by_layers(model: nn.Module) -> Iterator[list[Seen]]:
    """Yield a list that is filled with what the layers of a model are given in its next calls."""
    seen: list[Seen] = []

    def look(layer: nn.Module, inputs: tuple[object, ...]) -> None:
        if inputs and isinstance(inputs[0], Tensor) and inputs[0].ndim == 4:
            values = (getattr(layer, name) for name in ("kernel_size", "stride", "padding"))
            kernel, stride, padding = (value[0] if isinstance(value, tuple) else value for value in values)
            side, ceil_mode = min(inputs[0].shape[2:]), bool(getattr(layer, "ceil_mode", False))
            seen.append(Seen(side, int(kernel), int(stride), padding, ceil_mode))

    handles = [layer.register_forward_pre_hook(look) for layer in model.modules() if isinstance(layer, LAYERS)]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def notes_on_size(seen: list[Seen], size: int, key: str, *, stem: bool = False) -> list[str]:
    """Return notes on images of `size` pixels, the setting `key`; `stem`: whether model.small_image_stem would help."""
    notes = []
    cut = [layer for layer in seen if layer.cut_off]
    if cut:
        multiple = math.lcm(*(layer.pixels_of_patch(size) for layer in seen if layer.has_patches))
        lost = max(round(layer.cut_off * size / layer.side) for layer in cut)
        below = size // multiple * multiple
        sizes = [str(other) for other in (below, below + multiple) if other >= 8]
        notes.append(
            f"{key}={size}: the model's patches cut off {lost} of {size} rows and columns at the end of each image; "
            f"at {' or '.join(sizes)} they cover all of it"
        )
    if any(layer.side == 1 and layer.kernel > 1 for layer in seen):
        remedy = "model.small_image_stem=true or a larger size" if stem else "a larger size"
        notes.append(
            f"{key}={size}: to the model's last layers an image is a single pixel; {remedy} (smaller images are "
            "enlarged) lets them see more"
        )
    return notes
