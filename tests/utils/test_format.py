"""Formatting of numbers, including edge cases."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest

from hf_fasttrain.utils.format import (
    format_bytes,
    format_count,
    format_duration,
    format_images_rate,
    format_interval,
    format_number,
    format_percent,
    format_rate,
    is_finite,
)

NAN, INF = math.nan, math.inf


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0.0 s"), (12.34, "12.3 s"), (59.94, "59.9 s"), (59.96, "1 min 00 s"), (60, "1 min 00 s"),
        (185, "3 min 05 s"), (204, "3 min 24 s"), (3599.6, "1 h 00 min"), (7500, "2 h 05 min"),
        (3600 * 1234, "1,234 h 00 min"), (-75, "-1 min 15 s"), (NAN, "nan"), (INF, "inf"), (None, "–"), ("x", "–"),
    ],
)  # fmt: skip
def test_durations(seconds: object, text: str) -> None:
    assert format_duration(seconds) == text


def test_durations_without_tenths() -> None:
    texts = [format_duration(value, 0) for value in (0.4, 59.4, 59.6, 130)]
    assert texts == ["0 s", "59 s", "1 min 00 s", "2 min 10 s"]


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"), (512, "512 B"), (999, "999 B"), (1000, "1.00 kB"), (20_480, "20.5 kB"), (999_600, "1.00 MB"),
        (4_833, "4.83 kB"), (5 << 20, "5.24 MB"), (3 << 30, "3.22 GB"), (80e9, "80.0 GB"), (123.4e9, "123 GB"),
        (1.5e12, "1.50 TB"), (1e18, "1,000 PB"), (-2e6, "-2.00 MB"), (NAN, "nan"), (-INF, "-inf"), (None, "–"),
    ],
)  # fmt: skip
def test_bytes_are_decimal(num_bytes: object, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("rate", "text"),
    [
        (0, "0"), (0.0421, "0.0421"), (0.42, "0.420"), (9.53, "9.53"), (9.996, "10.0"), (56.7, "56.7"), (99.96, "100"),
        (100, "100"), (999.6, "1,000"), (1234.4, "1,230"), (1e7, "10,000,000"), (-5.0, "-5.00"), (NAN, "nan"),
        (None, "–"),
    ],
)  # fmt: skip
def test_rates(rate: object, text: str) -> None:
    assert format_rate(rate) == text
    assert format_images_rate(rate) == f"{text} images/s"


@pytest.mark.parametrize(
    ("share", "digits", "text"),
    [
        (0, 1, "0%"), (1, 1, "100%"), (0.5, 1, "50.0%"), (0.128, 0, "13%"), (0.996, 1, "99.6%"), (0.997, 0, "99.7%"),
        (0.9996, 1, "99.96%"), (0.99999, 1, "99.99%"), (0.99999, 0, "99.99%"), (0.94, 0, "94%"), (2.5, 0, "250%"),
        (-0.2, 0, "-20%"), (NAN, 1, "nan"), (INF, 1, "inf"), (None, 1, "–"),
    ],
)  # fmt: skip
def test_a_fraction_below_one_is_not_100_percent(share: object, digits: int, text: str) -> None:
    assert format_percent(share, digits) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"), (12345.6, "12,346"), (0.00012345, "0.0001234"), (7.0, "7"), (1234567, "1,234,567"),
        (-1.23456, "-1.235"),
        (1e15, "1,000,000,000,000,000"), (NAN, "nan"), (INF, "inf"), (None, "–"), ("many", "many"),
    ],
)  # fmt: skip
def test_numbers(value: object, text: str) -> None:
    assert format_number(value) == text


def test_numbers_with_a_noun() -> None:
    assert [format_count(n, "run") for n in (0, 1, 2000)] == ["0 runs", "1 run", "2,000 runs"]
    assert format_count(2, "class", "classes") == "2 classes"


def test_ratios_with_their_interval() -> None:
    assert format_interval(2, 1.999, 2.004) == "2.00 (2.00 - 2.00)"


def test_finite_numbers_are_recognised() -> None:
    assert all(map(is_finite, (0, -1.5, np.int64(3), np.float32(0.5))))
    assert not any(map(is_finite, (True, None, "1", NAN, INF)))


def test_formatting_needs_no_torch() -> None:
    code = "import sys, hf_fasttrain.utils.format; assert not {'torch', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
