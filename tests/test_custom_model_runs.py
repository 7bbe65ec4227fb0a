"""Finished runs of a custom model: evaluated, used for predictions, exported and pushed."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers.hub_server import Hub
from helpers.processes import reset_accelerate
from helpers.runs import exit_status
from PIL import Image
from safetensors.torch import load_file
from torch import nn

from hf_fasttrain import Trainer, Watch
from hf_fasttrain.export.export import export_run
from hf_fasttrain.hub.push import push_run
from hf_fasttrain.inference import evaluate_run, predict_images
from hf_fasttrain.models.saved import load_model
from hf_fasttrain.models.user_model import open_user_model
from hf_fasttrain.models.weights import save_weights
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.utils.errors import DataError, ModelError, RunError

SIZE, CLASSES = 8, ["dark", "light"]
ABOUT: dict[str, Any] = {"image_size": SIZE, "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0}
GIVE = r"was not trained from a recipe, .*; pass the model: --model package.module:function \(in Python model=...\)"
MODULE = """
from torch import nn

def make():
    about = {"image_size": 8, "mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "class_names": ["dark", "light"]}
    return nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), about

def fails():
    raise KeyError("no file")

number = 3
"""


def make() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIZE * SIZE, 2))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the run of a linear model that separates dark from light images; its first evaluation is the best."""
    folder = tmp_path_factory.mktemp("own") / "run"
    torch.manual_seed(0)
    labels = torch.arange(32) % 2
    images = torch.randn(32, 3, SIZE, SIZE) * 0.1 + (labels * 2.0 - 1)[:, None, None, None]
    data, model = [(images, labels)], make()
    options: dict[str, Any] = {
        "eval_loader": data,
        "num_classes": 2,
        "report": False,
        "log": RunLog(folder, show=False),
    }
    options |= {"evaluate_every": "2 steps", "checkpoint_every": "1 step", "best": Watch("accuracy")}
    reset_accelerate()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    Trainer(model, data, optimizer, duration="4 steps", output_dir=folder, **options).fit()
    return folder


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Return class folders of dark and light images, one of the dark ones in the wrong folder."""
    rng = np.random.default_rng(0)
    for name, level in (("dark", 40), ("light", 210)):
        (tmp_path / "photos" / name).mkdir(parents=True)
        for number in range(4):
            shade = 40 if number == 0 else level
            pixels = rng.integers(shade - 30, shade + 30, (SIZE, SIZE, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "photos" / name / f"{number}.png")
    return tmp_path / "photos"


def pixels_of(path: Path) -> torch.Tensor:
    pixels = torch.tensor(np.asarray(Image.open(path)), dtype=torch.float32)
    return (pixels.permute(2, 0, 1) / 255 - 0.5) / 0.5


def test_a_missing_model_gives_a_message_that_explains_how_to_pass_it(run: Path, photos: Path, hub: Hub) -> None:
    asked: list[Callable[[], Any]] = [
        lambda: evaluate_run(run),
        lambda: predict_images(run, [str(photos)]),
        lambda: export_run(run),
        lambda: push_run(run, "me/own"),
    ]
    for call in asked:
        with pytest.raises(RunError, match=GIVE):
            call()


def test_images_are_predicted_with_the_runs_weights(run: Path, photos: Path) -> None:
    model = make()
    model.load_state_dict(load_file(run / "model/model.safetensors"))
    path = photos / "light/2.png"
    user_model = make()
    before = user_model[1].weight.detach().clone()
    (row,) = predict_images(run, [str(path)], model=(user_model, {**ABOUT, "class_names": CLASSES}), device="cpu")
    expected = model(pixels_of(path)[None]).softmax(1)[0].tolist()
    assert row["classes"][0]["class"] == "light"
    assert row["classes"][0]["score"] == pytest.approx(expected[1], abs=1e-5)
    assert torch.equal(user_model[1].weight, before)  # the caller's model is not changed
    (first,) = predict_images(run, [str(path)], model=lambda: (make(), ABOUT), weights="step_2", device="cpu")
    assert first["classes"][0]["class"] == "1"
    assert first["classes"][0]["score"] != row["classes"][0]["score"]


def test_other_images_are_evaluated(run: Path, photos: Path) -> None:
    notes: list[str] = []
    swapped = (make(), {**ABOUT, "class_names": ["light", "dark"]})  # the other way round
    data = [f"data.dataset={photos}", "data.workers=0"]
    measured = evaluate_run(run, data, model=(make(), ABOUT), note=notes.append)
    assert (measured["accuracy"], measured["num_images"], measured["step"]) == (0.875, 8, 4)
    assert "the model's outputs count as dark, light, in the order of the data" in notes
    reset_accelerate()
    assert evaluate_run(run, data, model=swapped)["accuracy"] == 0.125
    reset_accelerate()
    with pytest.raises(RunError, match=r"no recipe says what to evaluate on; give data.dataset=FOLDER"):
        evaluate_run(run, model=(make(), ABOUT))
    (photos / "third").mkdir()
    Image.new("RGB", (SIZE, SIZE)).save(photos / "third/0.png")
    with pytest.raises(DataError, match=r"has 3 classes .dark, light, third., and the model has 2 outputs"):
        evaluate_run(run, data, model=(make(), ABOUT))


def test_the_command_line_imports_the_model_from_the_current_directory(
    run: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own_model_of_a_test.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    model = ["--model", "own_model_of_a_test:make"]
    assert exit_status(["predict", str(run), str(photos / "light/1.png"), "--json", *model]) == 0
    assert json.loads(capsys.readouterr().out)[0]["classes"][0]["class"] == "light"
    assert exit_status(["evaluate", str(run), f"data.dataset={photos}", "data.workers=0", "--json", *model]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == 0.875
    assert exit_status(["export", str(run), "--output", "exported", *model]) == 0
    assert "exported: opened by torch (load_state_dict)" in capsys.readouterr().out
    wrong = {
        "own_model_of_a_test": "write it as package.module:function, like mine:make_model",
        "no_such_module:make": "can't be imported from",
        "own_model_of_a_test:absent": "can't be imported from",
        "own_model_of_a_test:number": "must be a function that returns the model, got a int",
        "own_model_of_a_test:fails": "the function failed: KeyError: 'no file'",
    }
    for name, message in wrong.items():
        assert exit_status(["predict", str(run), str(photos), "--model", name]) == 2
        told = capsys.readouterr().err
        assert f"error: --model {name}: " in told
        assert message in told


def test_the_weights_are_exported_and_pushed(run: Path, tmp_path: Path, hub: Hub) -> None:
    user_model = (make(), {**ABOUT, "class_names": CLASSES})
    best = export_run(run, tmp_path / "best", weights="step_2", model=user_model)
    assert best.forms == ["torch (load_state_dict)"]
    assert load_file(tmp_path / "best/model.safetensors").keys() == make().state_dict().keys()
    replaced = export_run(run, tmp_path / "best", model=user_model)  # replaces the earlier one
    exported = load_file(replaced.folder / "model.safetensors")
    assert all(torch.equal(exported[name], value) for name, value in load_file(run / "model/model.safetensors").items())
    push_run(run, "me/own", model=user_model)
    files = hub.repos["me/own"].files
    assert {"README.md", "model.safetensors", "result.json", "metrics.jsonl", "hf_fasttrain.json"} <= files.keys()
    card = files["README.md"].decode()
    assert "model.load_state_dict(load_file(hf_hub_download" in card
    assert "`model` for 8 px images and 2 classes: dark, light." in card
    assert "hf-fasttrain predict" not in card
    (tmp_path / "pulled").mkdir()
    (tmp_path / "pulled/hf_fasttrain.json").write_bytes(files["hf_fasttrain.json"])
    with pytest.raises(ModelError, match=r"its model was built by your own code \(model\)"):
        load_model(tmp_path / "pulled")
    assert not (run / ".hub").exists()


@pytest.mark.parametrize(
    ("user_model", "message"),
    [
        (make, "model: image_size, mean, std of its images is not known; pass .model, dict.image_size=224"),
        (lambda: (make(), {**ABOUT, "size": 3}), "model: size is unknown; allowed are image_size, mean, std"),
        (
            lambda: (make(), {**ABOUT, "class_names": ["a"]}),
            r"model: returns \(1, 2\) for an image instead of \(1, 1\) logits",
        ),
        (lambda: (make(), {**ABOUT, "image_size": 16}), "model: can't take an image of 16 px: "),
        (lambda: (nn.Linear(3, 2), ABOUT), "model.safetensors has weights of another model: "),
        (lambda: 3, r"model: must be a torch.nn.Module or \(module, dict\(image_size=224, .* got a int"),
    ],
)
def test_a_model_that_does_not_fit_the_run_is_refused(user_model: Any, message: str, run: Path) -> None:
    with pytest.raises(RunError, match=message):
        open_user_model(run, user_model, None)


def test_a_timm_model_needs_no_image_settings(tmp_path: Path) -> None:
    model = timm.create_model("test_vit", num_classes=3)
    (tmp_path / "model").mkdir()
    save_weights(model, tmp_path / "model")
    opened = open_user_model(tmp_path, model, None)
    assert (opened.spec.image_size, opened.spec.class_names, opened.has_names) == (160, ["0", "1", "2"], False)


def test_a_recipe_run_with_a_known_model_refuses_another(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model/hf_fasttrain.json").write_text("{}")
    for call in (predict_images, evaluate_run):
        with pytest.raises(RunError, match="--model is for finished runs of your own model; leave it out"):
            call(tmp_path, [], model=make)
