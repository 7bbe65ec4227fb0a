"""Tables: keys in one piece where there is room, nothing cut off where there is none."""

from __future__ import annotations

import io

import pytest

from hf_fasttrain.recipe.validate import all_keys
from hf_fasttrain.utils.terminal import Terminal, build_table

VALUE = "a text that is longer than its column is wide, with " + "x" * 60


def printed(width: int, rows: list[tuple[str, ...]]) -> list[str]:
    file = io.StringIO()
    Terminal(file=file, width=width).print(build_table(("key", "value", "origin", "tag"), rows))
    return file.getvalue().splitlines()


@pytest.mark.parametrize("width", [80, 100, 160])
def test_no_key_is_cut_in_two(width: int) -> None:
    lines = printed(width, [(key, VALUE, "default: " + VALUE, "result") for key in all_keys()])
    assert max(map(len, lines)) <= width
    cells = {line.split("│")[1].strip() for line in lines if line.startswith("│")}
    assert set(all_keys()) <= cells


@pytest.mark.parametrize("width", [24, 40, 60, 80, 160])
@pytest.mark.parametrize("key", ["k" * 38, "k" * 150, "a few words of a label"])
def test_nothing_is_cut_off(width: int, key: str) -> None:
    lines = printed(width, [(key, VALUE, "default", "result")])
    columns = [[line.split("│")[n].strip() for line in lines if line.startswith("│")] for n in (1, 2, 3, 4)]
    texts = ["".join(column).replace(" ", "") for column in columns]
    assert texts == [text.replace(" ", "") for text in (key, VALUE, "default", "result")]
