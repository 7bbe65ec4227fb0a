"""model.keep_features: training the head from features that are kept is training it from images, bit by bit."""

from __future__ import annotations

import os
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.callbacks import stop_before
from helpers.processes import in_child, reset_accelerate, run_processes
from helpers.runs import exit_status, steps_of, weights
from PIL import Image

from hf_fasttrain import Callback, Trainer
from hf_fasttrain.data.loading.features import FeatureLoader, Features
from hf_fasttrain.data.pixels.cache import PixelCache
from hf_fasttrain.from_recipe import features as features_module
from hf_fasttrain.from_recipe import kept_features
from hf_fasttrain.inference import evaluate_run
from hf_fasttrain.models.model import ModelSpec, build_model
from hf_fasttrain.models.weights import save_weights
from hf_fasttrain.recipe.resolved import read_settings
from hf_fasttrain.utils.errors import RecipeError, RunError

BATCH = 4  # images per forward


@pytest.fixture
def recipe(write_recipe: Callable[..., Path], image_folder: Path, tmp_path: Path) -> Path:
    """Return a recipe that trains the head of a network on 24 photos, one of which is broken."""
    for seed in (0, 1):
        torch.manual_seed(seed)
        save_weights(build_model(ModelSpec("test_resnet", ["blue", "green", "red"], 32)), tmp_path / f"weights{seed}")
    (image_folder / "train" / "red" / "3.jpg").write_bytes(b"\xff\xd8\xffnone")
    return write_recipe(
        f"""
model: {{name: test_resnet, pretrained: {tmp_path / "weights0"}, train: head, args: {{drop_rate: 0.2}}}}
data: {{dataset: "{image_folder}", image_size: 32, workers: 0, cache_dir: {tmp_path / "cache"}, max_bad_fraction: 0.5}}
augment: {{crop: center, flip: false}}
train: {{duration: 3 epochs, batch_size: 10}}
accelerate: {{micro_batch_size: {BATCH}}}
optimizer: {{lr: 0.05}}
ema: {{decay: 0.9}}
checkpoint: {{keep: 20}}
log: {{report: false}}
"""
    )


def make(recipe: Path, run: Path | str, *overrides: str, **options: Any) -> Trainer:
    reset_accelerate()
    return Trainer.from_recipe(recipe, [f"output_dir={run}", *overrides], **options)


def features_of(recipe: Path, run: Path | str, *overrides: str) -> tuple[Features, int]:
    """Return the features that a run would train from, and how many of them were kept from before."""
    trainer = make(recipe, run, *overrides)
    assert isinstance(trainer.train_loader, FeatureLoader)
    found = trainer.train_loader.compute()
    (note,) = [text for text in trainer.log.notes if text.startswith("model.keep_features")]
    kept = re.search(r"(\d+) images? kept from before", note)
    return found, int(kept[1]) if kept else 0


def require_equal(one: Path, other: Path) -> None:
    expected = weights(other)
    for name, value in weights(one).items():
        assert torch.equal(value, expected[name]), name


PHASES = ["model.train={head: 2 epochs, then: all}", "train.duration=4 epochs"]


@pytest.mark.parametrize("overrides", [[], PHASES])
def test_weights_and_metrics_are_those_of_training_from_images_also_resumed(
    recipe: Path, tmp_path: Path, overrides: list[str]
) -> None:
    trainer = make(recipe, tmp_path / "kept", *overrides)
    given: list[tuple[int, int]] = []
    inner = trainer.raw_model.conv1[0]  # type: ignore[index]
    inner.register_forward_pre_hook(lambda module, args: given.append((trainer.state.step, len(args[0]))))
    result = trainer.fit()
    images = make(recipe, tmp_path / "images", "model.keep_features=false", *overrides).fit()
    require_equal(tmp_path / "kept", tmp_path / "images")
    assert result.metrics == images.metrics
    assert evaluate_run(tmp_path / "kept").items() >= images.metrics.items()
    assert sum(number for step, number in given if step < (6 if overrides else 9)) == 24
    stop_before(make(recipe, tmp_path / "cut", *overrides), 4)
    assert steps_of(tmp_path / "cut") == [3]
    resumed = make(recipe, tmp_path / "cut", *overrides, resume=True)
    resumed.fit()
    assert any("24 images kept from before" in note or "20 images kept" in note for note in resumed.log.notes)
    require_equal(tmp_path / "cut", tmp_path / "images")


def test_nothing_stale_is_used(recipe: Path, image_folder: Path, tmp_path: Path) -> None:
    before, _ = features_of(recipe, tmp_path / "first")
    again, kept = features_of(recipe, tmp_path / "second")
    assert torch.equal(again.values, before.values)
    assert kept == 24 - BATCH  # those beside the broken image are computed with its substitute again
    image = image_folder / "train" / "blue" / "1.jpg"
    status = image.stat()
    Image.new("RGB", (24, 21), "white").save(image)
    os.utime(image, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    changed, kept = features_of(recipe, tmp_path / "third")
    assert kept == 24 - 2 * BATCH
    differing = (changed.values != before.values).any(1).nonzero().flatten().tolist()
    assert differing == [1]
    shutil.copytree(tmp_path / "weights1", tmp_path / "weights0", dirs_exist_ok=True)
    other, kept = features_of(recipe, tmp_path / "fourth")
    assert kept == 0
    assert (other.values != changed.values).any(1).all()
    for override in ("data.crop_pct=0.5", "data.mean=0.4", "accelerate.micro_batch_size=6", "train.max_images=20"):
        assert features_of(recipe, tmp_path / override, override)[1] == 0, override


def test_a_full_disk_goes_on_without(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, _ = features_of(recipe, tmp_path / "first", "data.cache=none")
    assert not (tmp_path / "cache").exists()

    def full(self: PixelCache, items: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(PixelCache, "_add", full)
    trainer = make(recipe, tmp_path / "full")
    assert torch.equal(trainer.train_loader.compute().values, expected.values)
    notes = "\n".join(trainer.log.notes)
    assert "No space left" in notes
    assert "kept in memory instead" in notes


def die_in_the_pass(recipe: Path, run: Path) -> None:
    trainer = make(recipe, run)
    layer, seen = trainer.raw_model.conv1[0], []  # type: ignore[index]

    def count(module: Any, args: Any) -> None:
        seen.append(1)
        if len(seen) == 3:
            os.kill(os.getpid(), signal.SIGKILL)

    layer.register_forward_pre_hook(count)
    trainer.fit()


def test_a_run_that_is_killed_in_the_pass_begins_again_with_what_is_kept(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(features_module, "WRITE_BYTES", 1)
    if not (child := os.fork()):
        die_in_the_pass(recipe, tmp_path / "run")
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    found, kept = features_of(recipe, tmp_path / "run")
    assert kept == 2 * BATCH
    assert torch.equal(found.values, features_of(recipe, tmp_path / "new", "data.cache=none")[0].values)


def trained(recipe: Path, run: str) -> tuple[bytes, bytes]:
    """Return the features of a run, and its weights."""
    trainer = make(recipe, run, "data.cache=none")
    found = trainer.train_loader.compute()
    trainer.fit()
    state = [tensor.float().numpy().tobytes() for tensor in trainer.raw_model.state_dict().values()]
    return found.values.numpy().tobytes() + found.used.tobytes(), b"".join(state)


def test_two_processes_share_the_pass_and_train_as_one(recipe: Path, tmp_path: Path) -> None:
    without_dropout = recipe.with_name("plain.yaml")  # whose masks depend on the process
    without_dropout.write_text(recipe.read_text().replace("drop_rate: 0.2", "drop_rate: 0.0"))
    first, second = run_processes(trained, without_dropout, str(tmp_path / "two"))
    alone = in_child(lambda: trained(without_dropout, str(tmp_path / "one")))
    assert first == second
    assert first[0] == alone[0]
    assert np.frombuffer(first[1], np.float32) == pytest.approx(np.frombuffer(alone[1], np.float32), abs=1e-5)


@pytest.mark.parametrize(
    ("override", "reason"),
    [
        ("augment.flip=0.5", "augment.flip=0.5"),
        ("augment.crop=random_resized", "augment.crop=random_resized"),
        ("augment.color_jitter={hue: 0.1}", "augment.color_jitter"),
        ("model.train=last 1 block", "model.train=last 1 block"),
        ("accelerate.compile=true", "accelerate.compile=true"),
    ],
)
def test_what_needs_images_is_one_message_if_features_are_wanted(
    recipe: Path, tmp_path: Path, override: str, reason: str
) -> None:
    with pytest.raises(RecipeError, match=f"which {re.escape(reason)} rules out; leave keep_features at auto"):
        make(recipe, tmp_path / "run", override, "model.keep_features=true")


class Watching(Callback):
    takes_part = False


def test_what_needs_images_is_found_by_trying_the_model_and_needs_no_word_by_default(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    deep = ["model.drop_path=0.1"]
    trainer = make(recipe, tmp_path / "deep", *deep)
    assert not isinstance(trainer.train_loader, FeatureLoader)
    assert not any("keep_features" in note for note in trainer.log.notes)
    setting = read_settings(tmp_path / "deep")["model.keep_features"]
    assert setting.value is False
    assert "a part of test_resnet that is random, or not frozen" in setting.origin
    assert exit_status(["check", str(recipe), *deep, "model.keep_features=true"]) == 2
    assert "model.keep_features: true needs the same features" in capsys.readouterr().err
    with pytest.raises(RunError, match="which callbacks= rules out"):
        make(recipe, tmp_path / "own", "model.keep_features=true", callbacks=[Watching()])
    assert not isinstance(make(recipe, tmp_path / "short", "train.duration=3 steps").train_loader, FeatureLoader)
    assert isinstance(
        make(recipe, tmp_path / "asked", "train.duration=3 steps", "model.keep_features=true").train_loader,
        FeatureLoader,
    )
    monkeypatch.setattr(kept_features, "free_memory_bytes", lambda: 1000)
    assert not isinstance(make(recipe, tmp_path / "small").train_loader, FeatureLoader)
    with pytest.raises(RunError, match=r"\d+ kB of features, and .* may be used; leave it at auto"):
        make(recipe, tmp_path / "asked2", "model.keep_features=true")
