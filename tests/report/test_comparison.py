"""Whether two runs differ: their predictions for the same images, and what is said about other ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from hf_fasttrain.report.comparison import compare
from hf_fasttrain.report.record import Record, read_record
from hf_fasttrain.report.report import write_report
from hf_fasttrain.report.sections import page_of_runs
from hf_fasttrain.run_folder.predictions import Predictions

NUM_IMAGES = 400
LABELS = torch.arange(NUM_IMAGES) % 4


def predictions_of(wrong: slice, **columns: torch.Tensor | None) -> Predictions:
    """Return predictions that are right but for some images."""
    predicted = LABELS.clone()
    predicted[wrong] = (predicted[wrong] + 1) % 4
    losses = (predicted != LABELS).float() + 0.1
    names = torch.from_numpy(np.random.default_rng(0).permutation(NUM_IMAGES))
    rows = torch.arange(NUM_IMAGES)
    made = Predictions(3, "validation", rows, LABELS, predicted, losses, losses, predicted, images=names)
    return replace(made, **columns)  # type: ignore[arg-type]


def run_of(folder: Path, predictions: Predictions | None, print_of_data: str = "x", classes: str = "abcd") -> Record:
    """Write a finished run and read it."""
    (folder / "model").mkdir(parents=True)
    spec = {"name": "resnet18", "class_names": list(classes), "image_size": 32, "multi_label": False}
    (folder / "model/hf_fasttrain.json").write_text(json.dumps(spec))
    metrics = {"accuracy": 0.5}
    if predictions is not None:
        predictions.save(folder / "predictions.safetensors")
        metrics["accuracy"] = float((~predictions.is_wrong).float().mean())
        metrics["loss"] = float(predictions.losses.mean())
    (folder / "result.json").write_text(json.dumps({"metrics": metrics, "steps": 3}))
    line = {"kind": "evaluation", "step": 3, "epoch": 1.0, "split": "validation", **metrics}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    fact = {"value": print_of_data, "origin": "", "tag": "fact"}
    (folder / "resolved.yaml").write_text(f"data.fingerprint: {json.dumps(fact)}\n")
    return read_record(folder)


def lines_of(first: Record, second: Record) -> list[str]:
    (comparison,) = compare([first, second], ["a", "b"])
    return comparison.lines()


def test_the_better_run_is_named_whatever_the_order_of_its_images(tmp_path: Path) -> None:
    good = predictions_of(slice(0, 20)).at(torch.randperm(NUM_IMAGES, generator=torch.Generator().manual_seed(1)))
    first, second = run_of(tmp_path / "a", predictions_of(slice(0, 60))), run_of(tmp_path / "b", good, "another")
    accuracy, loss = lines_of(first, second)
    assert accuracy.startswith("accuracy: b is better by 10.0 points (95 %: ")
    assert accuracy.endswith(" 400 images)")
    assert loss.startswith("loss: b is better by 0.1000 (95 %: ")
    expected = 40 + 1.96 * np.sqrt(NUM_IMAGES * 0.1 * 0.9)  # images: the normal approximation
    assert float(accuracy.split(" to ")[1].split(",")[0]) == pytest.approx(100 * expected / NUM_IMAGES, abs=0.6)


def test_a_small_difference_can_not_be_seen_and_the_page_says_so(tmp_path: Path) -> None:
    first, second = (
        run_of(tmp_path / "a", predictions_of(slice(0, 42))),
        run_of(tmp_path / "b", predictions_of(slice(2, 42))),
    )
    assert lines_of(first, second)[0].startswith("accuracy: no difference can be seen (95 %: 0.0 to 1.")
    page = page_of_runs([first, second])
    section = next(section for section in page.sections if section.id == "differences")
    assert section.tables[0].rows[0][3].text in page.summary[0]
    told: list[str] = []
    write_report([tmp_path / "a", tmp_path / "b"], tmp_path / "both.html", told.append)
    assert told == page.summary
    assert "no difference can be seen" in (tmp_path / "both.html").read_text()


def test_groups_are_drawn_as_a_whole(tmp_path: Path) -> None:
    groups = torch.arange(NUM_IMAGES) // 40
    first = run_of(tmp_path / "a", predictions_of(slice(0, 80), groups=groups))
    second = run_of(tmp_path / "b", predictions_of(slice(0, 40), groups=groups))
    # All of the difference is in one group of ten, which a third of the draws leaves out.
    assert lines_of(first, second)[0].startswith("accuracy: no difference can be seen (95 %: 0.0 to 30.0, 10 groups)")
    alone = run_of(tmp_path / "c", predictions_of(slice(0, 40)))
    assert lines_of(run_of(tmp_path / "d", predictions_of(slice(0, 80))), alone)[0].startswith("accuracy: b is better")


@pytest.mark.parametrize(
    ("other", "expected"),
    [
        ({"predictions": None}, "one of them is unfinished, or has no predictions"),
        ({"classes": "abce"}, "their classes are different"),
        (
            {"predictions": predictions_of(slice(0, 9), images=torch.arange(NUM_IMAGES) + 100)},
            "they were evaluated on different images (400 and 400, 300 of them the same)",
        ),
        (
            {"predictions": predictions_of(slice(0, 9), labels=torch.where(LABELS == 2, 3, LABELS))},
            "100 images of 400 have another label in the other run",
        ),
        ({"predictions": predictions_of(slice(0, 9), images=None), "print_of_data": "y"}, "is not recorded"),
    ],
)
def test_runs_on_different_images_are_one_message(tmp_path: Path, other: dict[str, object], expected: str) -> None:
    first = run_of(tmp_path / "a", predictions_of(slice(0, 9)))
    second = run_of(tmp_path / "b", **{"predictions": predictions_of(slice(0, 9)), **other})  # type: ignore[arg-type]
    (line,) = lines_of(first, second)
    assert line.startswith("a and b can't be compared: ")
    assert expected in line


def test_older_runs_on_the_same_data_are_matched_by_their_rows(tmp_path: Path) -> None:
    first = run_of(tmp_path / "a", predictions_of(slice(0, 60), images=None))
    second = run_of(tmp_path / "b", predictions_of(slice(0, 20)).at(torch.arange(NUM_IMAGES).flip(0)))
    assert lines_of(first, second)[0].startswith("accuracy: b is better by 10.0 points")
