"""Runs on tables of labels: trained, checked, evaluated on other tables, resumed and described."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from helpers.runs import exit_status

from hf_fasttrain import Trainer
from hf_fasttrain.hub.push import files_to_push
from hf_fasttrain.inference import evaluate_run
from hf_fasttrain.recipe.resolved import read_settings
from hf_fasttrain.run_folder.finished import read_run
from hf_fasttrain.utils.errors import RunError

NAMES = ("blue", "green", "red")
LABELS = ("007", "NA", "true")


@pytest.fixture
def tables(image_folder: Path, tmp_path: Path) -> Path:
    """Return a folder with labels.csv, which has both splits, and other.tsv, which has the validation images."""
    folder = tmp_path / "tables"
    folder.mkdir()
    rows = [
        (f"{split}\\{name}\\{number}.jpg", label, split, f"p{number // 2} of {split}")
        for split, count in (("train", 8), ("validation", 4))
        for name, label in zip(NAMES, LABELS, strict=True)
        for number in range(count)
    ]
    lines = ["path;label;split;patient", *(";".join(row) for row in rows)]
    (folder / "labels.csv").write_text("\n".join(lines), encoding="utf-16")
    others = [f"{path}\t{label}" for path, label, split, _ in rows if split == "validation"]
    (folder / "other.tsv").write_text("\n".join(["file\tclass", *others]))
    return folder


def test_a_run_on_a_table(
    tables: Path,
    image_folder: Path,
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe, run = write_recipe(), tmp_path / "run"
    data = [f"data.dataset={tables}/labels.csv", f"data.image_root={image_folder}", "data.group_column=patient"]
    options = [*data, f"output_dir={run}", "schedule.name=constant", "schedule.warmup=0"]
    assert exit_status(["check", str(recipe), *options, "--images"]) == 0
    assert "splits by column 'split': train (24), validation (12)" in " ".join(capsys.readouterr().out.split())
    Trainer.from_recipe(recipe, options).fit()
    found = {key: setting.value for key, setting in read_settings(run).items()}
    assert (found["data.split_column"], found["data.label_column"], found["data.image_column"]) == (
        "split",
        "label",
        "path",
    )
    assert found["data.eval_split"] == "validation"
    own, notes = evaluate_run(run), list[str]()
    overrides = [f"data.dataset={tables}/other.tsv", f"data.image_root={image_folder}"]
    other = evaluate_run(run, overrides, note=notes.append)
    assert (own["num_images"], other["num_images"]) == (12, 12)
    assert own["accuracy"] == other["accuracy"]
    Trainer.from_recipe(recipe, [*options, "train.duration=3 steps"], resume=True)
    monkeypatch.setattr("hf_fasttrain.hub.push.pictures_of", lambda *_, **__: {})  # matplotlib takes seconds
    for name, content in files_to_push(read_run(run), "me/x", tmp_path).items():
        text = content if isinstance(content, bytes) else content.read_bytes()
        assert str(tmp_path).encode() not in text, name
    text = (tables / "labels.csv").read_text(encoding="utf-16")
    (tables / "labels.csv").write_text(text.replace("0.jpg;NA;train", "0.jpg;007;train"))
    with pytest.raises(RunError, match="data set"):
        Trainer.from_recipe(recipe, [*options, "train.duration=4 steps"], resume=True)


def test_a_run_on_columns_of_0_and_1_is_resumed(
    image_folder: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    rows = [(f"{name}/{number}.jpg", number % 2, number // 4, 1) for name in NAMES for number in range(8)]
    lines = ["file,odd,late,any", *(",".join(map(str, row)) for row in rows)]
    (image_folder / "train" / "labels.csv").write_text("\n".join(lines))
    shutil.rmtree(image_folder / "validation")
    recipe, run = write_recipe(), tmp_path / "run"
    options = [f"data.dataset={image_folder}/train/labels.csv", f"output_dir={run}", "schedule.warmup=0"]
    options += ["schedule.name=constant", "data.eval_fraction=0.25"]
    Trainer.from_recipe(recipe, options).fit()
    assert read_settings(run)["data.label_column"].value == ["odd", "late", "any"]
    Trainer.from_recipe(recipe, [*options, "train.duration=3 steps"], resume=True)
    assert evaluate_run(run)["num_images"] == 6
