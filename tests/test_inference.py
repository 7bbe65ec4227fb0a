"""`evaluate`: the run's split, or all of other data, by the model's class names."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers.runs import exit_status
from PIL import Image

from hf_fasttrain.data.source.evaluation_split import load_evaluation_split, with_model_classes
from hf_fasttrain.inference import evaluate_run, predict_images
from hf_fasttrain.models.model import ModelSpec, build_model
from hf_fasttrain.models.saved import save_model
from hf_fasttrain.utils.errors import DataError, RunError

CLASSES = ["blue", "green", "red"]


@pytest.fixture
def run(tmp_path: Path, image_folder: Path) -> Path:
    """Return a run whose model was not trained: its predictions are arbitrary but constant."""
    folder = tmp_path / "run"
    (folder / "model").mkdir(parents=True)
    spec = ModelSpec("test_resnet", CLASSES, 32)
    save_model(build_model(spec), spec, folder / "model")
    text = f"model: {{name: test_resnet}}\ndata: {{dataset: '{image_folder}', image_size: 32, workers: 0}}\n"
    (folder / "recipe.yaml").write_text(text + "train: {duration: 2 steps, batch_size: 16}\n")
    return folder


def draw(folder: Path, classes: dict[str, int]) -> Path:
    """Write class folders of small random images and return their folder."""
    rng = np.random.default_rng(1)
    for name, number in classes.items():
        (folder / name).mkdir(parents=True)
        for i in range(number):
            Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / name / f"{i}.png")
    return folder


def evaluate(run: Path, *overrides: str, **options: Any) -> tuple[dict[str, Any], list[str]]:
    """Return the result and the notes."""
    notes: list[str] = []
    return evaluate_run(run, overrides, note=notes.append, **options), notes


def test_another_folder_without_splits_is_evaluated_completely(run: Path, tmp_path: Path) -> None:
    other = draw(tmp_path / "other", {"blue": 9, "green": 5, "red": 11})
    measured, notes = evaluate(run, f"data.dataset={other}")
    rows = predict_images(run, [str(other)], top=1)
    correct = [Path(row["image"]).parent.name == row["classes"][0]["class"] for row in rows]
    assert measured["accuracy"] == pytest.approx(sum(correct) / 25)
    assert (measured["dataset"], measured["split"], measured["num_images"]) == (str(other), "train", 25)
    assert notes == []


def test_table_and_json_name_the_evaluated_data_and_weights(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    other = draw(tmp_path / "[other] data", {"blue": 2, "green": 1, "red": 1})
    assert exit_status(["evaluate", str(run), f"data.dataset='{other}'", "--json"]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert (measured["dataset"], measured["split"], measured["num_images"]) == (str(other), "train", 4)
    assert exit_status(["evaluate", str(run), f"data.dataset='{other}'"]) == 0
    printed = capsys.readouterr().out
    rows = dict(line.strip("│ ").split("│") for line in printed.splitlines() if line.startswith("│"))
    cells = {name.strip(): value.strip() for name, value in rows.items()}
    assert (cells["dataset"], cells["split"], cells["num_images"]) == (str(other), "train", "4")


def test_the_runs_data_is_evaluated_as_in_training(run: Path, image_folder: Path) -> None:
    measured, notes = evaluate(run)
    assert (measured["split"], measured["num_images"], notes) == ("validation", 12, [])
    shutil.rmtree(image_folder / "validation")
    for overrides in ([], [f"data.dataset={image_folder}/../{image_folder.name}"]):
        measured, _ = evaluate(run, *overrides)
        assert (measured["split"], measured["num_images"]) == ("held-out 10% of train", 2)


def test_a_folder_without_some_classes_is_evaluated_with_a_note(run: Path, tmp_path: Path) -> None:
    other = draw(tmp_path / "other", {"blue": 3, "red": 4, "green": 0})
    measured, notes = evaluate(run, f"data.dataset={other}")
    assert measured["num_images"] == 7
    assert len(notes) == 1
    assert "has no image of green, 1 of the model's 3 classes; it is measured with the others" in notes[0]
    shutil.rmtree(other / "green")
    assert evaluate(run, f"data.dataset={other}") == (measured, notes)
    shutil.rmtree(other / "blue")
    measured, notes = evaluate(run, f"data.dataset={other}")
    assert measured["num_images"] == 4
    assert "has no image of blue, green, 2 of the model's 3 classes" in notes[0]


def test_classes_are_matched_by_name_and_not_by_number(run: Path, tmp_path: Path) -> None:
    other = draw(tmp_path / "other", {"Red": 4, "green": 3})
    measured = load_evaluation_split(str(other), multi_label=False)
    assert measured.class_names == ["Red", "green"]
    renamed = with_model_classes(measured, CLASSES, "other")
    assert renamed.split.labels.tolist() == [2] * 4 + [1] * 3
    assert renamed.notes[0] == "other: classes are matched to the model's: 'Red' is 'red'"
    rows = predict_images(run, [str(other)], top=1)
    correct = [Path(row["image"]).parent.name.lower() == row["classes"][0]["class"] for row in rows]
    assert evaluate(run, f"data.dataset={other}")[0]["accuracy"] == pytest.approx(sum(correct) / 7)


def test_unknown_classes_are_refused_with_both_lists(run: Path, tmp_path: Path) -> None:
    other = draw(tmp_path / "other", {"blue": 1, "rose": 1})
    messages = r"its classes \(blue, rose\) are not the model's \(blue, green, red\): rose can't be matched"
    with pytest.raises(DataError, match=messages):
        evaluate(run, f"data.dataset={other}")


def test_a_test_split_is_mentioned_and_evaluated_on_request(run: Path, tmp_path: Path) -> None:
    classes = {"blue": 2, "green": 2, "red": 1}
    other = draw(tmp_path / "other" / "train", classes).parent
    draw(other / "test", {name: 2 * number for name, number in classes.items()})
    measured, notes = evaluate(run, f"data.dataset={other}")
    assert (measured["split"], measured["num_images"]) == ("train", 5)
    assert notes == [f"{other} has a split 'test' too, which is not used; --split test measures it"]
    for options, override in (({"split": "test"}, []), ({}, ["data.eval_split=test"])):
        measured, notes = evaluate(run, f"data.dataset={other}", *override, **options)
        assert (measured["split"], measured["num_images"], notes) == ("test", 10, [])
    draw(other / "validation", classes)
    assert evaluate(run, f"data.dataset={other}")[0]["split"] == "validation"
    with pytest.raises(DataError, match=r"--split: 'tset' is not a split of .* Did you mean 'test'"):
        evaluate(run, f"data.dataset={other}", split="tset")
    with pytest.raises(RunError, match=r"--split test and override 'data.eval_split=train' set the same thing"):
        evaluate(run, "data.eval_split=train", split="test")


def test_a_wrong_split_of_the_runs_data_is_named_by_its_option(run: Path) -> None:
    with pytest.raises(DataError, match=r"--split: 'tset' is not a split of .*; it has train, validation"):
        evaluate(run, split="tset")


def test_the_evaluated_weights_are_described_as_far_as_known(run: Path) -> None:
    assert evaluate(run)[0].keys() & {"weights", "step"} == set()
    (run / "result.json").write_text('{"steps": 9, "model": {"weights": "best", "step": 4, "ema": false}}')
    measured = evaluate(run)[0]
    assert (measured["weights"], measured["step"]) == ("best", 4)


def test_settings_of_the_runs_data_do_not_apply_to_other_data(run: Path, tmp_path: Path) -> None:
    recipe = run / "recipe.yaml"
    run_keys = "workers: 0, eval_split: val, image_column: img, label_column: fine_label, test_split: test"
    recipe.write_text(recipe.read_text().replace("workers: 0", run_keys))
    other = draw(tmp_path / "other", {"blue": 1, "green": 1, "red": 1})
    assert evaluate(run, f"data.dataset={other}")[0]["num_images"] == 3
    with pytest.raises(DataError, match=r"data.label_column: 'class' is not a column"):
        evaluate(run, f"data.dataset={other}", "data.label_column=class")

    with pytest.raises(
        RunError, match=r"override data.eval_fraction has no effect on other data, which are measured as a wh"
    ):
        evaluate(run, f"data.dataset={other}", "data.eval_fraction=0.5")


def test_moved_training_images_are_recognised_and_noted(
    image_folder: Path, tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    trained = image_folder / "train"
    overrides = [
        f"data.dataset={trained}",
        f"output_dir={tmp_path / 'run'}",
        "train.duration=1 step",
        "train.max_images=10",
    ]
    assert exit_status([str(write_recipe()), *overrides]) == 0
    trained.rename(image_folder / "elsewhere")
    measured, notes = evaluate(tmp_path / "run", f"data.dataset={image_folder / 'elsewhere'}")
    assert (measured["split"], measured["num_images"], len(notes)) == ("train", 24, 1)
    assert "these are the images that the run was trained on; to measure the held-out ones, omit" in notes[0]
    (image_folder / "elsewhere" / "red" / "0.jpg").unlink()
    assert evaluate(tmp_path / "run", f"data.dataset={image_folder / 'elsewhere'}")[1] == []


def test_a_metric_that_raises_is_noted(run: Path, tmp_path: Path) -> None:
    from helpers.metric_module import MODULE

    (tmp_path / "flaky").mkdir()
    body = "if len(predictions) == 12:\n            raise ValueError('a dozen')\n        return {'f1': 1.0}"
    (tmp_path / "flaky" / "flaky.py").write_text(MODULE.replace("BODY", body).replace("KIND", "number"))
    measured, notes = evaluate(run, f"evaluate.metrics=[accuracy, {tmp_path / 'flaky'}]")
    assert "flaky" not in measured
    assert notes == ["metric 'flaky' could not be computed and is skipped: ValueError: a dozen"]


def test_several_splits_with_other_names_need_a_split_option(tmp_path: Path, write_recipe: Callable[..., Path]) -> None:
    import datasets

    images = [Image.new("RGB", (4, 4))] * 2
    part = datasets.Dataset.from_dict({"image": images, "label": ["a", "b"]})
    datasets.DatasetDict({"first": part, "second": part}).save_to_disk(str(tmp_path / "data"))
    with pytest.raises(DataError, match="has several splits; choose one of first, second by --split"):
        load_evaluation_split(str(tmp_path / "data"), multi_label=False)


def test_replaced_images_are_counted(run: Path, tmp_path: Path) -> None:
    other = draw(tmp_path / "other", {"blue": 9, "green": 5, "red": 11})
    assert "bad_images" not in evaluate(run, f"data.dataset={other}")[0]
    damaged = other / "red" / "3.png"
    damaged.write_bytes(damaged.read_bytes()[:60])
    measured, notes = evaluate(run, f"data.dataset={other}", "data.max_bad_fraction=0.1")
    assert (measured["num_images"], measured["bad_images"]) == (25, 1)
    assert any("bad images are replaced" in note for note in notes)
