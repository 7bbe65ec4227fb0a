"""Intervals in a run's result, report and card, and which images its predictions are of."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runs import RECIPE, exit_status
from PIL import Image

from hf_fasttrain.data.source.dataset import Split, load_source, subset
from hf_fasttrain.data.source.identity import group_ids, image_ids
from hf_fasttrain.hub.card import _metrics_table
from hf_fasttrain.report.record import read_record
from hf_fasttrain.report.sections import page_of_run
from hf_fasttrain.run_folder.predictions import Predictions
from hf_fasttrain.train.bootstrap import intervals_of

CLASSES = ("cat", "dog", "owl")


def write_photos(folder: Path, number: int = 40) -> None:
    """Write a table of photos, each a shade of its class, in groups of four."""
    rng, lines = np.random.default_rng(0), ["path,label,site"]
    folder.mkdir(parents=True)
    for index in range(number):
        label = index % 3
        pixels = rng.integers(0, 255, (8, 8, 3)) // 2 + 60 * label
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index}.png")
        lines.append(f"{index}.png,{CLASSES[label]},site {index // 4}")
    (folder / "labels.csv").write_text("\n".join(lines) + "\n")


def trained(folder: Path, *overrides: str) -> tuple[Path, dict[str, Any]]:
    """Train a small run on the table of photos, and return its folder and result."""
    recipe = folder.parent / f"{folder.name}.yaml"
    recipe.write_text(RECIPE.replace("report: false", "report: true").replace("digits", "photos/labels.csv"))
    data = f"data.dataset={folder.parent / 'photos/labels.csv'}"
    assert exit_status([str(recipe), data, f"output_dir={folder}", "data.eval_fraction=0.4", *overrides]) == 0
    return folder, json.loads((folder / "result.json").read_text())


def test_result_report_and_card_have_the_intervals_of_the_final_metrics(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    metrics = "evaluate.metrics=[loss,accuracy,f1_macro,ece,auroc]"
    run, result = trained(tmp_path / "run", metrics, "checkpoint.best.metric=loss")
    predictions, intervals = Predictions.load(run / "predictions.safetensors"), result["intervals"]
    assert intervals["over"] == "images"
    assert intervals["number"] == len(predictions.labels)
    expected = intervals_of(predictions, result["metrics"])
    assert intervals["metrics"] == expected.metrics
    assert {"loss", "ece"} <= set(expected.metrics)
    assert intervals["without"]["auroc"] == "needs the scores of all classes, which are not kept"
    page = page_of_run(read_record(run))
    low, high = intervals["metrics"]["loss"]
    assert any(f"95 %: {low:.4f} to {high:.4f}" in remark for _, _, remark in page.tiles)
    table = next(section.tables[0] for section in page.sections if section.id == "metrics")
    assert f"{low:.4f} to {high:.4f}" in [row[2].text for row in table.rows]
    card = _metrics_table(result)
    assert f"| loss | {result['metrics']['loss']:.4f} ({low:.4f} to {high:.4f}) | - |" in card
    assert f"95 % intervals: bootstrap of {len(predictions.labels)} images, 2,000 resamples." in card


def test_groups_are_resampled_where_the_recipe_has_them(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    run, result = trained(tmp_path / "run", "data.group_column=site")
    groups = Predictions.load(run / "predictions.safetensors").groups
    assert groups is not None
    assert (result["intervals"]["over"], result["intervals"]["number"]) == ("groups", len(np.unique(groups)))


def test_a_test_split_has_intervals_of_its_own_and_no_predictions_no_intervals(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    table = tmp_path / "photos/labels.csv"
    lines = table.read_text().splitlines()
    splits = ["split", *(["train", "train", "train", "test"] * 10)]
    table.write_text("\n".join(f"{line},{split}" for line, split in zip(lines, splits, strict=True)) + "\n")
    _, result = trained(tmp_path / "run", "data.test_split=test")
    assert result["test_intervals"]["number"] == 10
    assert result["test_intervals"]["metrics"]["loss"]
    assert result["intervals"]["number"] != 10
    run, result = trained(tmp_path / "plain", "log.report=false")
    assert result["intervals"] is None
    assert result["test_intervals"] is None
    assert page_of_run(read_record(run)).sections  # a result without intervals, as older versions wrote


def test_a_moved_folder_and_another_training_set_keep_the_names_of_images(tmp_path: Path) -> None:
    write_photos(tmp_path / "photos")
    table = str(tmp_path / "photos/labels.csv")
    source = load_source(table, group_column="site", eval_fraction=0.4)
    (tmp_path / "photos").rename(tmp_path / "moved")
    moved = load_source(str(tmp_path / "moved/labels.csv"), group_column="site", eval_fraction=0.4)
    names = image_ids(source.evaluation)
    assert len(set(names.tolist())) == len(names)
    assert (names == image_ids(moved.evaluation)).all()
    part = subset(moved.evaluation, 5, 0)
    assert set(image_ids(part).tolist()) < set(names.tolist())
    groups = group_ids(part, image_ids(part))
    assert groups is not None
    assert set(groups.tolist()) <= set((group_ids(source.evaluation, names)).tolist())
    whole = load_source(str(tmp_path / "moved/labels.csv"))
    assert group_ids(whole.train, image_ids(whole.train)) is None


def test_images_without_files_are_named_by_their_data_set_and_row() -> None:
    digits = load_source("digits", eval_fraction=0.2)
    names = image_ids(digits.evaluation)
    assert len(set(names.tolist())) == len(names)
    whole = Split("train", digits.train.images, np.zeros(len(digits.train.images), np.int64))
    assert (image_ids(whole)[digits.evaluation.rows] == names).all()


@pytest.mark.parametrize("broken", [{"images": torch.zeros(3)}, {"groups": torch.zeros(2, dtype=torch.int64)}])
def test_damaged_columns_of_predictions_are_refused(tmp_path: Path, broken: dict[str, torch.Tensor]) -> None:
    from hf_fasttrain.utils.errors import RunError

    three = torch.zeros(3, dtype=torch.int64)
    sound = Predictions(1, "v", three, three, three, three.float(), three.float(), three)
    sound.save(tmp_path / "sound")
    assert Predictions.load(tmp_path / "sound").images is None
    Predictions(1, "v", three, three, three, three.float(), three.float(), three, **broken).save(tmp_path / "broken")
    with pytest.raises(RunError, match="can't be read as predictions"):
        Predictions.load(tmp_path / "broken")
