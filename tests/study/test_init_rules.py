"""The rules of `init`, and the recipes that they make."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hf_fasttrain.from_recipe.auto import Choice
from hf_fasttrain.recipe.find import shipped_recipes
from hf_fasttrain.recipe.load import flatten, load_recipe, parse_recipe
from hf_fasttrain.study import init_rules as rules
from hf_fasttrain.study.init_recipe import Draft, Weights, draft, text_of
from hf_fasttrain.study.init_survey import Machine, Survey

LAPTOP = Machine(cores=4, gpu="", memory=8 << 30, gpu_memory=0, disk=1 << 40)
SERVER = Machine(cores=64, gpu="H200", memory=64 << 30, gpu_memory=80 << 30, disk=1 << 40)


def data(number: int = 2000, side: int = 300, **changes: Any) -> Survey:
    """Return a dataset of two classes of the same size without a validation split."""
    sizes = np.array([side, side])
    splits, counts = {"train": number}, np.array([number // 2, number // 2])
    survey = Survey(
        "photos", splits, None, ["a", "b"], counts, multi_label=False, widths=sizes, heights=sizes, left_out=""
    )
    return replace(survey, **changes)


def weights(name: str = "efficientnet_b0", pretrained: bool = True) -> Weights:
    return Weights(Choice(name, "chosen"), Choice(pretrained, "there"), "there", is_here=True)


def values(recipe: Draft) -> dict[str, Any]:
    """Return the values of a recipe, as they are read from its text."""
    return flatten(parse_recipe(text_of(recipe, ["photos"]), where="x.yaml", name="x"))


@pytest.mark.parametrize(
    ("number", "model", "expected"),
    [
        (500, "resnet50", "finetune_small"),
        (501, "resnet50", "finetune"),
        (20_001, "resnet50", "efficientnet"),
        (500, "vit_small_patch16_224", "finetune_vit"),
        (20_001, "timm/deit3_small_patch16_224.fb_in1k", "vit"),
    ],
)
def test_the_shipped_recipe_is_by_images_and_model(number: int, model: str, expected: str) -> None:
    assert rules.base_recipe(images=number, model=model).value == expected
    assert expected in shipped_recipes()


@pytest.mark.parametrize(
    ("machine", "there", "expected"),
    [
        ((4, False), [], "tf_efficientnet_lite0"),
        ((4, False), ["resnet18", "efficientnet_b0"], "efficientnet_b0"),
        ((5, False), [], "efficientnet_b0"),
        ((2, True), ["vit_tiny_patch16_224", "resnet50"], "resnet50"),
    ],
)
def test_the_model_is_by_machine_and_weights(machine: tuple[int, bool], there: list[str], expected: str) -> None:
    cores, gpu = machine
    assert rules.model_name(cores=cores, gpu=gpu, there=there).value == expected


@pytest.mark.parametrize(
    ("side", "machine", "model", "expected"),
    [
        (32, SERVER, "efficientnet_b0", 64),
        (64, LAPTOP, "efficientnet_b0", 64),
        (160, SERVER, "efficientnet_b0", 128),
        (300, LAPTOP, "efficientnet_b0", 128),
        (300, SERVER, "efficientnet_b0", 224),
        (32, LAPTOP, "vit_base_patch16_224", 224),
        (0, SERVER, "efficientnet_b0", 224),
    ],
)
def test_the_image_size_is_by_images_machine_and_model(side: int, machine: Machine, model: str, expected: int) -> None:
    assert values(draft(data(side=side), machine, weights(model), run="runs/x"))["data.image_size"] == expected


def test_few_images_have_more_held_out_and_smaller_steps() -> None:
    for number, expected in ((40, 8), (100, 16)):
        few = values(draft(data(number), SERVER, weights(), run="runs/x"))
        assert (few["data.eval_fraction"], few["train.batch_size"]) == (0.2, expected)
    many = values(draft(data(2000), SERVER, weights(), run="runs/x"))
    assert (many["data.eval_fraction"], many["train.batch_size"]) == (0.1, 32)


def test_unequal_classes_are_watched_and_their_remedies_suggested() -> None:
    unequal = data(counts=np.array([1980, 20]), test_split="test")
    recipe = draft(unequal, SERVER, weights(), run="runs/x")
    assert values(recipe)["checkpoint.best.metric"] == "f1_macro"
    text = text_of(recipe, [])
    for line in ("test_split: test", "sampling: sqrt", "class_weights: balanced"):
        uncommented = text.replace(f"  # {line}  #", f"  {line}  #")
        assert uncommented != text
        parse_recipe(uncommented, where="x.yaml", name="x")
    equal = draft(data(counts=np.array([1000, 100])), SERVER, weights(), run="runs/x")
    assert values(equal)["checkpoint.best.metric"] == "accuracy"
    assert "sampling" not in text_of(equal, [])


def test_several_labels_per_image_stay_automatic() -> None:
    recipe = draft(data(multi_label=True, counts=np.array([1990, 10])), SERVER, weights(), run="runs/x")
    assert (values(recipe)["data.multi_label"], values(recipe)["checkpoint.best.metric"]) == (None, "f1_macro")
    assert "sampling" not in text_of(recipe, [])


def test_settings_that_do_not_suit_the_model_are_left_out() -> None:
    large = data(30_000)
    assert values(draft(large, SERVER, weights(), run="r"))["model.drop_path"] == 0.2
    assert values(draft(large, SERVER, weights("vgg11"), run="r"))["model.drop_path"] == 0
    random = values(draft(large, SERVER, weights(pretrained=False), run="r"))
    assert random["optimizer.backbone_lr_scale"] == 1
    assert random["optimizer.lr"] == load_recipe("efficientnet").optimizer.lr


def test_names_need_no_care() -> None:
    for name in ("a: b #c", "päth/{x}, [y]", "'\"", "no", "1e3", "two\nlines"):
        recipe = draft(data(dataset=name), SERVER, weights(), run="runs/x")
        assert values(recipe)["data.dataset"] == name
