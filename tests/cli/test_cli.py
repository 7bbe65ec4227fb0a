"""The commands, from a trained run to its predictions."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
from helpers.commands import require_accepted, suggested
from helpers.processes import reset_accelerate
from helpers.runs import exit_status

from hf_fasttrain.cli import main
from hf_fasttrain.recipe.validate import all_keys


def call(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Run a command that must succeed and return its output."""
    reset_accelerate()
    with pytest.raises(SystemExit) as error:
        main(arguments)
    output = capsys.readouterr()
    assert error.value.code == 0, output
    return output.out


@pytest.fixture
def run(
    write_recipe: Callable[..., Path], tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> Path:
    """Return a run that has learnt to distinguish three colours."""
    folder = tmp_path / "run"
    arguments = ["train", str(write_recipe()), f"data.dataset={image_folder}", f"output_dir={folder}"]
    arguments += ["train={duration: 25 epochs, batch_size: 12}", "augment.crop=center", "optimizer.lr=5e-3"]
    arguments += ["evaluate.every=25 epochs", "checkpoint.every=25 epochs"]
    printed = call(arguments, capsys)
    assert "done: 50 steps" in printed
    commands = suggested(printed)
    assert ["predict", str(folder), "IMAGE..."] in commands
    assert [str(folder), "--resume", "train.duration=50 epochs"] in commands
    for command in commands:
        require_accepted(command)
    return folder


def test_evaluate_predict_and_resume(run: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    trained = json.loads((run / "result.json").read_text())["metrics"]
    assert trained["accuracy"] == 1.0
    measured = json.loads(call(["evaluate", str(run), "--json"], capsys))
    description = {name: measured.pop(name) for name in ("dataset", "split", "num_images", "weights", "step")}
    expected = {"dataset": str(image_folder), "split": "validation", "num_images": 12, "weights": "last", "step": 50}
    assert description == expected
    assert measured == pytest.approx(trained, rel=1e-5)
    on_train = json.loads(call(["evaluate", str(run), "--json", "--split", "train"], capsys))
    assert on_train["loss"] != trained["loss"]
    assert "accuracy" in call(["evaluate", str(run)], capsys)

    red = image_folder / "validation" / "red"
    rows = json.loads(call(["predict", str(run), str(red), "--json", "--top", "2"], capsys))
    assert len(rows) == 4
    assert all(row["classes"][0]["class"] == "red" and len(row["classes"]) == 2 for row in rows)
    assert sum(guess["score"] for guess in rows[0]["classes"]) <= 1.0
    assert "red" in call(["predict", str(run), str(red / "0.jpg")], capsys)

    assert "this run is finished (50 steps)" in call([str(run), "--resume"], capsys)
    reset_accelerate()
    assert exit_status([str(run)]) == 2
    error = capsys.readouterr().err
    assert "recipe.yaml, resolved.yaml, metrics.jsonl, result.json, checkpoints" in error
    assert suggested(error) == [[str(run), "--resume"]]


def test_predict_refuses_files_that_are_not_images(
    run: Path, image_folder: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "x.jpg").write_bytes(b"no")
    cases = {
        str(tmp_path / "empty"): "no images in this folder",
        str(tmp_path / "x.jpg"): "can't be decoded",
        str(tmp_path / "none.jpg"): "no such file or folder",
    }
    for image, expected in cases.items():
        with pytest.raises(SystemExit) as error:
            main(["predict", str(run), image])
        assert error.value.code == 2
        assert expected in capsys.readouterr().err
    (image_folder / "validation" / "red").rename(image_folder / "validation" / "rose")
    (image_folder / "train" / "red").rename(image_folder / "train" / "rose")
    reset_accelerate()
    with pytest.raises(SystemExit) as error:
        main(["evaluate", str(run)])
    assert error.value.code == 2
    assert "its classes (blue, green, rose) are not the model's (blue, green, red)" in capsys.readouterr().err


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    assert call(["--version"], capsys) == f"hf_fasttrain {version('hf_fasttrain')}\n"


def test_a_key_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["explain", "data.workers=3"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "data.workers",
        "  meaning  loader processes for each training process",
        "  allowed  auto, integer >= 0, <= 1024",
        "  default  auto",
        "  tag      speed: changes only speed and memory; may change when a run is resumed",
        "  example  data.workers=4",
    ]
    assert exit_status(["explain", "ema"]) == 0
    assert re.search(r"^ema: .*\n\nema\.decay .*\[0\.9999\]\n", capsys.readouterr().out)
    assert exit_status(["explain"]) == 0
    assert set(re.findall(r"^[a-z_]+(?:\.[a-z_]+)*", capsys.readouterr().out, re.M)) == set(all_keys())
    assert exit_status(["explain", "data.wrkers"]) == 2
    assert "'data.wrkers' is not a key of a recipe. Did you mean 'data.workers'?" in capsys.readouterr().err
