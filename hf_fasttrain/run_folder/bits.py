"""Rows of booleans, eight in a byte, as `np.packbits(rows, axis=1)` has them."""

from __future__ import annotations

import torch
from torch import Tensor

ROWS_AT_ONCE = 1024  # that are unpacked to count them


def num_bytes(num_columns: int) -> int:
    """Return how many bytes a row of booleans takes."""
    return -(-num_columns // 8)


def pack_bits(rows: Tensor) -> Tensor:
    """Return booleans (N, K) as bytes (N, ceil(K / 8)) uint8, on the same device."""
    padded = torch.nn.functional.pad(rows.to(torch.uint8), (0, -rows.shape[1] % 8))
    bits = padded.view(len(rows), -1, 8) << _shifts(rows.device)
    return bits.sum(2, dtype=torch.uint8)


def unpack_bits(packed: Tensor, num_columns: int) -> Tensor:
    """Return the booleans (N, K) of bytes (N, ceil(K / 8))."""
    bits = packed.unsqueeze(2) >> _shifts(packed.device) & 1
    return bits.view(len(packed), -1)[:, :num_columns].bool()


def count_bits(packed: Tensor, num_columns: int) -> Tensor:
    """Return how many rows have each bit, (K,) int64; a few rows are unpacked at a time."""
    counts = torch.zeros(num_columns, dtype=torch.int64)
    for rows in packed.split(ROWS_AT_ONCE):
        counts += unpack_bits(rows, num_columns).sum(0)
    return counts


def _shifts(device: torch.device) -> Tensor:
    return torch.arange(7, -1, -1, dtype=torch.uint8, device=device)
