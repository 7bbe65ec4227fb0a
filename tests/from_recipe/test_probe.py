"""`probe` and train.probe_first: features computed once and kept, the head fitted to them, then training from it."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.processes import in_child, run_processes
from helpers.runs import exit_status, photo_recipe, weights
from PIL import Image

from hf_fasttrain.data.pixels.cache import PixelCache
from hf_fasttrain.from_recipe.probe import HeadProbe
from hf_fasttrain.from_recipe.trainer import build_trainer
from hf_fasttrain.inference import evaluate_run
from hf_fasttrain.models.saved import load_model
from hf_fasttrain.train.linear_probe import Vectors, fit_regression
from hf_fasttrain.train.trainer import Trainer
from hf_fasttrain.utils.errors import RunError, UserError


@pytest.fixture
def recipe(write_recipe: Callable[..., Path], image_folder: Path, tmp_path: Path) -> Path:
    """Return a recipe for a folder of photos, whose features are kept in tmp_path."""
    return write_recipe(photo_recipe(image_folder, tmp_path))


def probe(recipe: Path, *overrides: str, **options: Any) -> tuple[Trainer, dict[str, Any]]:
    """Return the trainer of a probe that has ended, and its result."""
    trainer = build_trainer(recipe, ["train.probe_first=true", *overrides], **options)
    with trainer.running():
        trainer.finish()
    return trainer, json.loads((Path(trainer.output_dir or "") / "result.json").read_text())


def features_by_hand(run: Path, folder: Path) -> Vectors:
    """Return features of an image folder by the model of a run without its head, prepared by timm's own transform."""
    from timm.data import create_transform, resolve_model_data_config

    model, _ = load_model(run / "model")
    transform = create_transform(**{**resolve_model_data_config(model), "input_size": (3, 32, 32)}, is_training=False)
    files = sorted(folder.glob("*/*"))
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        features = model.forward_head(model.forward_features(images), pre_logits=True)  # type: ignore[operator]
    labels = np.array([["blue", "green", "red"].index(file.parent.name) for file in files])
    return Vectors(features.numpy()[:, None], labels, 3)


def test_the_head_is_the_regression_of_the_models_features(recipe: Path, image_folder: Path, tmp_path: Path) -> None:
    trainer, result = probe(recipe, "data.decoder=pillow")
    run = tmp_path / "run"
    expected = fit_regression(
        features_by_hand(run, image_folder / "train"), strength=result["probe"]["strength"], has_bias=True, seed=0
    )
    saved = weights(run)
    assert saved["fc.weight"].numpy() == pytest.approx(expected.head.weight, abs=2e-3)
    assert saved["fc.bias"].numpy() == pytest.approx(expected.head.bias, abs=2e-2)
    assert result["steps"] == 0
    assert result["probe"]["images"] == 24
    assert {"accuracy", "f1_macro"} <= result["probe"]["neighbors_metrics"].keys()
    assert evaluate_run(run)["accuracy"] == result["metrics"]["accuracy"]
    assert any("features of random weights" in note for note in trainer.log.notes)


def test_kept_features_give_the_same_head_and_no_image_is_read(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe(recipe, "probe.views=2")
    monkeypatch.setattr(torch.nn.Module, "train", torch.nn.Module.train)
    trainer = build_trainer(recipe, ["train.probe_first=true", "probe.views=2", f"output_dir={tmp_path / 'second'}"])
    assert isinstance(trainer.probe, HeadProbe)
    read: list[int] = []
    monkeypatch.setattr(trainer.probe.loaders, "pass_over", lambda *_, **__: read.append(1))
    with trainer.running():
        trainer.finish()
    assert not read
    assert trainer.probe.result is not None
    assert trainer.probe.result.kept == 24 + 24 + 12
    first, second = weights(tmp_path / "run"), weights(tmp_path / "second")
    assert all(torch.equal(first[name], second[name]) for name in first)


def computed_again(recipe: Path, tmp_path: Path, *overrides: str) -> int:
    """Return how many images of 36 were not read from the kept features."""
    _, result = probe(recipe, f"output_dir={tmp_path / f'again-{time.monotonic_ns()}'}", *overrides)
    return 36 - int(result["probe"]["kept"])


def test_only_what_has_changed_is_computed_again(recipe: Path, image_folder: Path, tmp_path: Path) -> None:
    probe(recipe)
    assert computed_again(recipe, tmp_path) == 0
    image = image_folder / "train" / "red" / "3.jpg"
    status = image.stat()
    Image.new("RGB", (24, 23), "blue").save(image)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert computed_again(recipe, tmp_path) == 1
    assert computed_again(recipe, tmp_path) == 0
    for override in ("data.image_size=48", "data.crop_pct=0.5", "data.mean=0.4", "seed=1", "model.name=test_vit"):
        assert computed_again(recipe, tmp_path, override) == 36, override
    assert computed_again(recipe, tmp_path) == 0


def test_a_damaged_or_full_or_missing_store_changes_nothing(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    probe(recipe)
    expected = weights(tmp_path / "run")["fc.weight"]
    (pixels,) = {path for path in (tmp_path / "cache").glob("*/pixels") if path.stat().st_size == 4 * 96 * 24}
    data = bytearray(pixels.read_bytes())
    data[100] ^= 1
    pixels.write_bytes(data)
    assert computed_again(recipe, tmp_path) == 1

    def full(self: PixelCache, items: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PixelCache, "_add", full)
    trainer, _ = probe(recipe, f"output_dir={tmp_path / 'full'}", f"data.cache_dir={tmp_path / 'other'}")
    assert torch.equal(weights(tmp_path / "full")["fc.weight"], expected)
    assert any("No space left" in note for note in trainer.log.notes)
    trainer, _ = probe(recipe, f"output_dir={tmp_path / 'none'}", "data.cache=none")
    assert torch.equal(weights(tmp_path / "none")["fc.weight"], expected)


def test_bad_images_are_left_out(recipe: Path, image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "train" / "red" / "3.jpg").write_bytes(b"\xff\xd8\xffnone")
    trainer, result = probe(recipe, "data.max_bad_fraction=0.5", "probe.views=1")
    assert result["probe"]["images"] == 23
    assert any("bad images are replaced" in note for note in trainer.log.notes)


def test_probe_first_trains_from_the_head_and_resumes_with_it(recipe: Path, tmp_path: Path) -> None:
    overrides = ["train.duration=4 steps", "checkpoint.every=1 steps", "checkpoint.keep=9", "ema.decay=0.9"]
    overrides += ["model.name=test_vit", "augment.crop_scale=[0.9, 1.0]"]
    probe(recipe, *overrides)
    whole = build_trainer(recipe, [*overrides, "train.probe_first=true", f"output_dir={tmp_path / 'whole'}"])
    whole.fit()
    resumed = build_trainer(recipe, [*overrides, "train.probe_first=true"], resume=True)
    result = resumed.fit()
    assert result.steps == 4
    first, second = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(first[name], second[name]) for name in first)
    history = [json.loads(line) for line in (tmp_path / "whole" / "metrics.jsonl").read_text().splitlines()]
    assert next(line["loss"] for line in history if line["kind"] == "train") < 0.8 * np.log(3)


def share(recipe: Path, output: str) -> bytes:
    trainer = build_trainer(recipe, ["train.probe_first=true", f"output_dir={output}", "data.cache=none"])
    with trainer.running():
        trainer.finish()
    return b"".join(tensor.numpy().tobytes() for tensor in trainer.raw_model.state_dict().values())


def test_two_processes_share_the_images(recipe: Path, tmp_path: Path) -> None:
    first, second = run_processes(share, recipe, str(tmp_path / "two"))
    assert first == second
    one = in_child(lambda: share(recipe, str(tmp_path / "one")))
    two, alone = (np.frombuffer(each, np.float32) for each in (first, one))
    assert two == pytest.approx(alone, abs=1e-4)
    assert not (tmp_path / "cache").exists()


def test_what_does_not_go_together(recipe: Path) -> None:
    with pytest.raises(RunError, match=r"predict= does not use"):
        probe(recipe, predict=lambda model, images: model(images))


def test_the_command_and_its_table(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exit_status(["probe", str(recipe), "train.duration=9 epochs"]) == 0
    output = capsys.readouterr().out
    assert "images of split" not in output  # are kept in memory, for the epochs that follow later
    assert "logistic regression of strength" in output
    assert f"hf-fasttrain {tmp_path / 'run'} --resume    trains all of it" in output
    assert exit_status(["probe", str(recipe)]) == 2
    assert exit_status(["probe", str(recipe), f"output_dir={tmp_path / 'm'}", "--models", "test_vit,test_resnet"]) == 0
    lines = capsys.readouterr().out.splitlines()
    start = next(number for number, line in enumerate(lines) if line.split()[:2] == ["model", "parameters"])
    assert {line.split()[0] for line in lines[start + 1 : start + 3]} == {"test_vit", "test_resnet"}
    assert (tmp_path / "m" / "test_vit" / "model" / "model.safetensors").exists()
    for models, message in (("a,a", "give different names"), ("test_vit,resnet_none", "no model 'resnet_none'")):
        assert exit_status(["probe", str(recipe), f"output_dir={tmp_path / 'n'}", "--models", models]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "n").exists()


def test_frozen_statistics_of_batch_norms_are_kept_while_weights_are_trained(recipe: Path, tmp_path: Path) -> None:
    build_trainer(recipe, [f"output_dir={tmp_path / 'first'}"]).fit()
    start = weights(tmp_path / "first")
    options = ["model.batch_norm=frozen", f"model.pretrained={tmp_path / 'first'}", "train.probe_first=true"]
    trainer = build_trainer(recipe, [*options, "train.duration=4 steps"])
    trainer.fit()
    ended = weights(tmp_path / "run")
    statistics = [name for name in ended if name.endswith(("running_mean", "running_var"))]
    assert statistics
    assert all(torch.equal(ended[name], start[name]) for name in statistics)
    assert not torch.equal(ended["bn1.weight"], start["bn1.weight"])
    assert not any("model.batch_norm=frozen avoids" in note for note in trainer.log.notes)
    for overrides, message in (
        (["model.batch_norm=frozen"], "needs pretrained statistics"),
        ([*options, "model.name=test_vit", f"model.pretrained={tmp_path / 'vit'}"], "no batch norms"),
    ):
        if "vit" in str(overrides):
            vit = [f"output_dir={tmp_path / 'vit'}", "model.name=test_vit"]
            build_trainer(recipe, vit).fit()
        with pytest.raises(UserError, match=message):
            build_trainer(recipe, [*overrides, f"output_dir={tmp_path / 'none'}"])
