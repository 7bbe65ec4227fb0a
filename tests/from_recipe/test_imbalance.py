"""Recipes for imbalanced classes: losses, class weights and sampling."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image

from hf_fasttrain.from_recipe.trainer import build_trainer
from hf_fasttrain.recipe.load import load_recipe
from hf_fasttrain.train.imbalanced_losses import AsymmetricLoss, FocalLoss
from hf_fasttrain.train.loss import ClassificationLoss, resolve_loss
from hf_fasttrain.train.step_loss import LossOfLogits
from hf_fasttrain.train.trainer import Trainer
from hf_fasttrain.utils.errors import RecipeError, RunError

COUNTS = {"often": 64, "rare": 4}


@pytest.fixture
def build(write_recipe: Callable[..., Path], tmp_path: Path) -> Callable[..., Trainer]:
    """Return a function that builds a trainer for 64 images of one class and 4 of another."""
    rows = [(name, n) for name, count in COUNTS.items() for n in range(count)]
    images = [Image.new("RGB", (16, 16), (3 * n, 9 * n % 255, 40)) for _, n in rows]
    labels = datasets.ClassLabel(names=list(COUNTS))
    features = datasets.Features({"image": datasets.Image(), "label": labels})
    columns = {"image": images, "label": [name for name, _ in rows]}
    dataset = datasets.Dataset.from_dict(columns, features=features)
    both = datasets.DatasetDict({"train": dataset, "validation": dataset})

    def build(*overrides: str) -> Trainer:
        fixed = [f"output_dir={tmp_path / f'run{len(list(tmp_path.iterdir()))}'}", "train.duration=40 epochs"]
        return build_trainer(write_recipe(), [*fixed, *overrides], dataset=both)

    return build


@pytest.mark.parametrize(
    ("sampling", "power"), [("balanced", 0.0), ("sqrt", 0.5), ("{power: 0.25}", 0.25), ("{power: 1.0}", 1.0)]
)
def test_a_class_is_drawn_in_proportion_to_a_power_of_its_images(
    build: Callable[..., Trainer], sampling: str, power: float
) -> None:
    trainer = build(f"train.sampling={sampling}")
    plan = trainer.train_loader.sampling_plan
    indices = np.concatenate(
        [key.indices for step in range(trainer.num_steps) for key in plan.plan(step).micro_batches]
    )
    assert len(indices) == 40 * 68
    share = np.mean(indices >= 64)
    assert share == pytest.approx(4**power / (4**power + 64**power), abs=0.03)
    (note,) = [note for note in trainer.log.notes if note.startswith("train.sampling")]
    times = 68 * 4**power / (4**power + 64**power) / 4
    assert f"an image of 'rare' (4) is drawn {times:.2g} times per epoch" in note


def test_uniform_sampling_is_the_default(build: Callable[..., Trainer]) -> None:
    plan = build("train.sampling=uniform").train_loader.sampling_plan
    assert plan.weights is None


@pytest.mark.parametrize(
    ("overrides", "kind"),
    [
        (["train.focal=true"], FocalLoss),
        (["train.loss=focal"], FocalLoss),
        (["train.loss=asymmetric", "train.asymmetric.gamma_negative=2"], AsymmetricLoss),
        (["train.loss=bce"], ClassificationLoss),
        (["train.class_weights=effective_number"], ClassificationLoss),
    ],
)
def test_losses_train(build: Callable[..., Trainer], overrides: list[str], kind: type) -> None:
    trainer = build(*overrides, "train.duration=2 steps")
    step_loss = trainer.step.accumulation.step_loss
    assert isinstance(step_loss, LossOfLogits)
    assert type(step_loss.loss) is kind
    assert np.isfinite(trainer.fit().metrics["loss"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.focal=true", "train.bce=true"], "train.focal and train.bce are two losses"),
        (["train.loss=cross_entropy", "train.focal=true"], "train.loss is cross_entropy, and train.focal is set"),
        (["train.sampling=sqrt", "train.class_weights=balanced"], "correct the classes' frequencies twice"),
        (["train.sampling={power: 2}"], "train.sampling"),
        (["train.sampling=0.3"], "train.sampling is 0.3; must be"),
        (["train.sampling={}"], "train.sampling is empty; give {power: 0.3}"),
        (["train.loss=focl"], "focal"),
    ],
)
def test_conflicts(write_recipe: Callable[..., Path], overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe(write_recipe(), overrides)
    assert message in str(error.value)


def test_cross_entropy_needs_one_label_per_image() -> None:
    with pytest.raises(RunError, match="needs one label per image"):
        resolve_loss("cross_entropy", [], multi_label=True)
    assert resolve_loss("auto", [], multi_label=True) == "bce"
    assert resolve_loss("auto", ["focal"], multi_label=True) == "focal"
    assert resolve_loss("auto", [], multi_label=False) == "cross_entropy"
