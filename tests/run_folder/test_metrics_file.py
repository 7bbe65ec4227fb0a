"""metrics.jsonl is read and cut from its end, bad_images.jsonl from where it was read before."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from hf_fasttrain.run_folder import metrics_file
from hf_fasttrain.run_folder.metrics_file import (
    drop_lines_after,
    evaluation_at,
    last_steps,
    read_metrics,
    read_new_bad_images,
)

KINDS = ("train", "evaluation")


def some_lines(rng: random.Random) -> list[str]:
    """Return lines in the order of steps, as training writes them, some of them damaged."""
    lines, step = [], 0
    for _ in range(rng.randrange(40)):
        step += rng.randrange(3)
        kind = rng.choice([*KINDS, "resume"])
        line = json.dumps({"kind": kind, "step": step, "split": "a", "x": rng.choice([0.5, None, 10**9])})
        lines.append(rng.choice([line] * 8 + [line[: rng.randrange(len(line))], "", "x" * rng.randrange(200)]))
    return lines


@pytest.mark.parametrize("block", [1, 2, 7, 50, 1 << 16])
def test_reading_from_the_end_equals_reading_all_lines(
    block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(metrics_file, "BLOCK", block)
    monkeypatch.setattr(metrics_file, "MAX_LINE", 150)
    path = tmp_path / "metrics.jsonl"
    for seed in range(60):
        rng = random.Random(seed)
        text = "\n".join(some_lines(rng)) + rng.choice(["", "\n", '\n{"kind": "tra'])
        path.write_text(text)
        lines = list(read_metrics(path))
        expected = {kind: max((line["step"] for line in lines if line["kind"] == kind), default=0) for kind in KINDS}
        assert last_steps(path, KINDS) == expected
        evaluations = [line for line in lines if line["kind"] == "evaluation"]
        for step in range(12):
            at_step = (line for line in evaluations if line["step"] == step)
            assert evaluation_at(path, step) == next(at_step, None)
        for step in (0, 5, 10**6):
            path.write_text(text)
            drop_lines_after(path, step)
            assert list(read_metrics(path)) == [line for line in lines if line["step"] <= step]


def test_only_the_end_of_a_long_file_is_parsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, parsed = tmp_path / "metrics.jsonl", [0]
    lines = [json.dumps({"kind": "train", "step": step}) for step in range(20_000)]
    path.write_text("".join(f"{line}\n" for line in lines))
    real = metrics_file.parse_metrics_line

    def counting(text: str) -> dict[str, Any] | None:
        parsed[0] += 1
        return real(text)

    monkeypatch.setattr(metrics_file, "parse_metrics_line", counting)
    drop_lines_after(path, 19_900)
    assert last_steps(path, KINDS) == {"train": 19_900, "evaluation": 0}
    assert evaluation_at(path, 19_850) is None
    assert parsed[0] < 170
    assert path.read_text() == "".join(f"{line}\n" for line in lines[:19_901])


def test_without_a_file_there_is_nothing_to_cut(tmp_path: Path) -> None:
    drop_lines_after(tmp_path / "none", 3)
    assert last_steps(tmp_path / "none", KINDS) == {"train": 0, "evaluation": 0}
    (tmp_path / "empty").touch()
    drop_lines_after(tmp_path / "empty", 3)
    assert last_steps(tmp_path / "empty", KINDS) == {"train": 0, "evaluation": 0}


def test_new_bad_images_are_read_once_and_an_unfinished_line_again(tmp_path: Path) -> None:
    path, end, found = tmp_path / "bad_images.jsonl", 0, []
    lines = [json.dumps({"split": "train", "index": index, "path": None, "error": "x"}) for index in range(4)]
    for text in (f"{lines[0]}\n{lines[1]}\n", lines[2], "\n", f"torn\n{lines[3]}\n"):
        with path.open("a") as file:
            file.write(text)
        new, end = read_new_bad_images(path, end)
        found.append([line["index"] for line in new])
    assert found == [[0, 1], [2], [2], [3]]
    assert read_new_bad_images(path, end) == ([], path.stat().st_size)
