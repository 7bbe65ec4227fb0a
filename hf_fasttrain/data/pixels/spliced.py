"""A file made of parts of bytes in memory, none of them copied."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

from hf_fasttrain.data.pixels.jpeg import Encoded


class Spliced:
    """A file for reading, of the parts given. Pillow needs `read`, `seek` and `tell`."""

    def __init__(self, parts: Sequence[Encoded]) -> None:
        self.parts = [memoryview(part) for part in parts if len(part)]
        self.starts = [0, *accumulate(map(len, self.parts))]
        self.position = 0

    def tell(self) -> int:
        """Return the position."""
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Move to an offset from the start, the position or the end, and return the position."""
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.starts[-1]}[whence]
        if base + offset < 0:
            raise ValueError("negative seek position")
        self.position = base + offset
        return self.position

    def read(self, size: int = -1) -> bytes:
        """Return the next `size` bytes, fewer at the end; all that is left for a negative size."""
        end = self.starts[-1] if size < 0 else min(self.starts[-1], self.position + size)
        found = []
        while self.position < end:
            number = bisect_right(self.starts, self.position) - 1
            first = self.position - self.starts[number]
            found.append(self.parts[number][first : first + end - self.position])
            self.position += len(found[-1])
        return b"".join(found)
