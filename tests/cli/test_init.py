"""`init`: the recipe that it writes can be checked and trained, and bad input is one message."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
from helpers.commands import require_accepted, suggested
from helpers.runs import exit_status
from huggingface_hub import constants
from PIL import Image
from safetensors.torch import save_file

from hf_fasttrain.cli.init import default_name
from hf_fasttrain.recipe.load import load_recipe
from hf_fasttrain.study import init_forecast
from hf_fasttrain.study.init_recipe import free_run_folder
from hf_fasttrain.study.messages import Turn
from hf_fasttrain.study.trial import Trial
from hf_fasttrain.utils.errors import NotEnoughMemory


@pytest.fixture(autouse=True)
def short_turns(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Measure few steps, in a folder of this test."""
    monkeypatch.setattr(init_forecast, "WARM_TURN", Turn(min_steps=1))
    monkeypatch.setattr(init_forecast, "MEASURED_TURN", Turn(min_steps=1))
    monkeypatch.setenv("HF_FASTTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a local cache of the Hub with the weights of timm's test_resnet, here random ones."""
    cache = tmp_path / "hub"
    repo = cache / "models--timm--test_resnet.r160_in1k"
    for folder in ("refs", "snapshots/1234"):
        (repo / folder).mkdir(parents=True)
    (repo / "refs/main").write_text("1234")
    weights = {name: value.clone() for name, value in timm.create_model("test_resnet").state_dict().items()}
    save_file(weights, repo / "snapshots/1234/model.safetensors")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    return cache


def test_the_recipe_is_commented_checked_and_trained(
    image_folder: Path, hub_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(["init", "photos", "--model", "test_resnet"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"^data +train 24, validation 12 images; 3 classes, 8 images each$", printed, re.M)
    assert re.search(r"^weights +test_resnet: in the local cache of the Hub$", printed, re.M)
    assert re.search(r"^forecast +about \d+ .* of training, \d.* of memory; rough: measured for", printed, re.M)
    commands = suggested(re.sub(r" +#.*", "", printed.split("next:\n")[1]))
    assert commands == [
        ["check", "photos.yaml"], ["probe", "photos.yaml", "output_dir=runs/photos_probe"], ["photos.yaml"],
    ]  # fmt: skip
    for command in commands:
        require_accepted(command)

    text = Path("photos.yaml").read_text()
    assert text.startswith("# Trains a classifier on photos; written by `")
    assert re.search(r"^# forecast +about ", text, re.M)
    assert "  pretrained: true  # in the local cache of the Hub\n" in text
    assert "  image_size: 64  # small images: the median short side is 2" in text
    assert exit_status(["check", "photos.yaml"]) == 0

    Path("photos.yaml").write_text(
        re.sub(r"duration: .*", "duration: 2 steps  # mine", text) + "log: {report: false}\n"
    )
    assert exit_status(["photos.yaml"]) == 0
    assert json.loads(Path("runs/photos/result.json").read_text())["steps"] == 2
    kept = Path("runs/photos/recipe.yaml").read_text()
    assert "# in the local cache of the Hub" in kept
    assert "# mine" in kept
    assert free_run_folder("photos") == "runs/photos_2"


def test_weights_that_are_not_here_are_downloaded_later(
    image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty"))
    monkeypatch.setattr(Trial, "run", out_of_memory)
    assert exit_status(["init", "photos", "--model", "test_resnet", "-o", "other.yml"]) == 0
    assert "forecast  a step did not fit" in capsys.readouterr().out
    text = Path("other.yml").read_text()
    assert "pretrained: true  # not on this machine: the first run downloads them; or write the path of a" in text
    assert load_recipe("other.yml").output_dir == "runs/other"


def out_of_memory(trial: Trial, next_turn: object) -> None:
    raise NotEnoughMemory("out of memory")


def one_class(root: Path) -> str:
    photos(root / "one", {"cat": 2})
    return "one"


def single_images(root: Path) -> str:
    photos(root / "single", {"cat": 1, "dog": 1})
    return "single"


def flat(root: Path) -> str:
    photos(root / "flat", {".": 2})
    return "flat"


def taken(root: Path) -> str:
    (root / "photos.yaml").write_text("mine")
    return "photos"


def photos(folder: Path, numbers: dict[str, int]) -> None:
    for name, number in numbers.items():
        (folder / name).mkdir(parents=True)
        for index in range(number):
            Image.new("RGB", (8, 8), (index, 0, 0)).save(folder / name / f"{index}.png")


@pytest.mark.parametrize(
    ("make", "options", "expected"),
    [
        (lambda root: "./none", [], "./none: no such file or folder in the current folder"),
        (flat, [], "flat: contains no class folders; an image folder is [train/]<class>/<image>"),
        (one_class, [], "one: only one class (cat); a classifier needs at least two"),
        (single_images, [], "single: one image of each class (cat, dog); training needs at least two"),
        (taken, [], "photos.yaml: exists already, and is not overwritten; give another file with -o FILE.yaml"),
        (lambda root: "photos", ["-o", "photos"], "photos: is a folder; give a file to write with -o FILE.yaml"),
        (lambda root: "photos", ["-o", "x.txt"], "x.txt: a recipe's name ends in .yaml or .yml; give another file"),
        (lambda root: "photos", ["-o", "no/x.yaml"], "no/x.yaml: can't be written: "),
        (lambda root: "photos", ["--model", "resnt50"], "has no model 'resnt50'. Did you mean 'resnet50'?"),
        (lambda root: "photos", ["--weights", "no.safetensors"], "no file or folder no.safetensors"),
        (lambda root: "photos", ["--weights", "w.safetensors"], "which model these weights are of; add --model NAME"),
        (lambda root: "photos", ["--weights", "resnet18.safetensors"], "such as --model resnet18"),
    ],
)
def test_bad_input_is_one_message(
    make: Callable[[Path], str],
    options: list[str],
    expected: str,
    image_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name in ("w.safetensors", "resnet18.safetensors"):
        (tmp_path / name).touch()
    before = set(tmp_path.rglob("*.y*ml"))
    folder = make(tmp_path)
    assert exit_status(["init", folder, *options]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len([line for line in error if not line.startswith("note: ")]) == 1
    assert expected in error[-1]
    assert set(tmp_path.rglob("*.y*ml")) - before <= {tmp_path / "photos.yaml"}
    assert not (tmp_path / "photos.yaml").exists() or (tmp_path / "photos.yaml").read_text() == "mine"


def test_a_folder_that_may_not_be_read_is_one_message(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def denied(path: str) -> list[str]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("os.listdir", denied)
    assert exit_status(["init", str(image_folder)]) == 2
    assert "photos: can't be listed: Permission denied" in capsys.readouterr().err


def test_the_recipe_is_named_after_the_data(tmp_path: Path) -> None:
    (tmp_path / "rows.parquet").touch()
    names = ["a/photos", "a/photos/", "owner/photos", "digits", "rows.parquet", ".", "-x", "v1.5"]
    expected = ["photos", "photos", "photos", "digits", "rows", tmp_path.name, "x", "v1.5"]
    assert list(map(default_name, names)) == expected
