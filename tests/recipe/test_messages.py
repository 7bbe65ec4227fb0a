"""What is said of a wrong value in a recipe or an override: what it is, what is allowed, and the form to write."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import RECIPE

from hf_fasttrain.recipe.load import flatten, load_recipe, origin_of, parse_recipe
from hf_fasttrain.recipe.messages import MAIN_KEYS, flow_text
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.recipe.validate import all_keys, model_at
from hf_fasttrain.utils.errors import RecipeError


def read(*overrides: str, text: str = RECIPE) -> Recipe:
    return parse_recipe(text, overrides, where="small.yaml", name="small")


def message(*overrides: str, text: str = RECIPE) -> str:
    with pytest.raises(RecipeError) as error:
        read(*overrides, text=text)
    return str(error.value)


# short form -> the same value in full
ACCEPTED: dict[str, Any] = {
    "log.trackers=tensorboard": ["tensorboard"],
    "evaluate.metrics=accuracy": ["accuracy"],
    "evaluate.metrics=auto": "auto",
    "schedule.milestones=30 epochs": ["30 epochs"],
    "data.mean=0.5": [0.5],
    "data.std=auto": "auto",
    "train.class_weights={cat: 2, '7': 3}": {"cat": 2.0, "7": 3.0},
    "train.class_weights=balanced": "balanced",
    "ema=false": None,
    "early_stopping=false": None,
    "hub=false": None,
    "train.bce=false": None,
}


@pytest.mark.parametrize("override", ACCEPTED)
def test_short_forms_are_accepted(override: str) -> None:
    recipe, (key, _, _) = read(override), override.partition("=")
    assert flatten(recipe)[key] == ACCEPTED[override]
    assert origin_of(recipe, key) == "override"


@pytest.mark.parametrize("key", ["ema", "early_stopping", "train.bce", "augment.randaugment", "augment.augmix"])
def test_true_is_a_section_with_its_defaults(key: str) -> None:
    assert flatten(read(f"{key}=true")) == flatten(read(f"{key}={{}}"))


# override -> what is said of it, after "override: "; without quotes of the shell it is what to type
WRONG = {
    "train.duration=20": "train.duration is 20: a number needs a unit; write '20 epochs' or '20 steps'",
    "train.duration='1'": "train.duration is '1': a number needs a unit; write '1 epoch' or '1 step'",
    "train.duration=1.5": "train.duration is 1.5: a number needs a unit; write '1.5 epochs'",
    "train.duration=x": "train.duration is 'x'; must be a number and a unit, like '90 epochs' or '5000 steps'",
    "train.duration=9999999999999 steps": "is '9999999999999 steps'; must be below 10**12",
    "optimizer.clip_value=1e308": "optimizer.clip_value holds 1e+308; numbers are at most 1e+15",
    "augment.color_jitter={hue: 0.1, contrast: 1e300}": "augment.color_jitter.contrast holds 1e+300; numbers are",
    "train.class_weights=[1, 1e16]": "train.class_weights holds 1e+16; numbers are at most 1e+15",
    "train.batch_size=99999999999999999999": "train.batch_size holds 99999999999999999999; numbers are at most 1e+15",
    "data.mean=[1e7, 0, 0]": "data.mean is [10000000.0, 0.0, 0.0]; of 0-1 pixels it is about 0.5, and at most 1e6",
    "data.crop_pct=0.1": "data.crop_pct is 0.1; must be 'auto' or a number above 0.1",
    "checkpoint.every=100": "is 100: a number needs a unit; write '100 epochs', '100 steps' or '100 minutes'",
    "schedule.warmup=100": "is 100: a number needs a unit; write '100 epochs' or '100 steps'",
    "schedule.warmup=0.05": "is 0.05: a number needs a unit; write '5%' or '0.05 epochs'",
    "schedule.milestones=[30, 60]": "contains 30: a number needs a unit; write '30 epochs' or '30 steps'",
    "hub={repo: me/x, every: 5}": "hub.every is 5: a number needs a unit; write '5 epochs' or '5 steps'",
    "early_stopping=5": "early_stopping is 5; it is a section: write 'early_stopping={patience: 5 epochs}'",
    "early_stopping=f1_macro": "write 'early_stopping={metric: f1_macro}'",
    "ema=0.999": "write 'ema={decay: 0.999}'",
    "ema=yes": "write ema=true",
    "checkpoint.best=loss": "write checkpoint.best.metric=loss",
    "hub=me/x": "write 'hub={repo: me/x}'",
    "augment.randaugment=9": "write 'augment.randaugment={magnitude: 9}'",
    "augment.color_jitter=0.4": "write 'augment.color_jitter={brightness: 0.4, contrast: 0.4, saturation: 0.4}'",
    "augment.color_jitter=true": "write 'augment.color_jitter={brightness: 0.4, contrast: 0.4, saturation: 0.4}'",
    "augment.progressive=16": "write 'augment.progressive={start_size: 16, until: 10 epochs}'",
    "augment.augmix=rand-m9": "timm's policies are set by augment.auto=rand-m9",
    "augment=none": "write augment.crop=center augment.flip=false",
    "augment=v0": "timm's policies are set by augment.auto=v0",
    "model=resnet50": "write model.name=resnet50",
    "data=photos": "write data.dataset=photos",
    "train=5": "write 'train.duration=5 epochs'",
    "optimizer=sgd": "write optimizer.name=sgd",
    "optimizer=0.1": "write optimizer.lr=0.1",
    "schedule=cosine": "write schedule.name=cosine",
    "accelerate=bf16": "write accelerate.mixed_precision=bf16",
    "evaluate=accuracy": "write evaluate.metrics=accuracy",
    "log=false": "write log.report=false",
    "log.report=on": "log.report is 'on': write log.report=true",
    "log.trackers=tensorboard,wandb": "write 'log.trackers=[tensorboard, wandb]'",
    "log.trackers=tensorbord": "is 'tensorbord'; must be 'tensorboard', 'wandb', 'trackio' or 'mlflow'",
    "optimizer.clip_norm=none": "write optimizer.clip_norm=null",
    "optimizer.clip_norm=-1": "is -1; must be a number above 0 or null",
    "augment.crop_scale=0.5": "must be a list such as [0.35, 1.0] (",
    "augment.crop_scale=[0.5, x]": "augment.crop_scale contains 'x'; must be a number (",
    "data.mean=x": "data.mean is 'x'; must be 'auto' or a number (",
    "data.workers=-1": "must be 'auto' or an integer of at least 0",
    "model.args=5": "must be a mapping such as {drop_rate: 0.2} (",
    "model.name=5": "model.name is 5; must be text (",
    "log.report=1": "log.report is 1: write log.report=true",
    "optimizer.lr=1,5": "write optimizer.lr=1.5",
    "data.image_size=64px": "write data.image_size=64",
    "data.image_size=[64, 64]": "write data.image_size=64",
    "data.eval_fraction=20%": "write data.eval_fraction=0.2",
    "data.mean='0.5, 0.4, 0.3'": "write 'data.mean=[0.5, 0.4, 0.3]'",
    "checkpoint.every=5 min": "write 'checkpoint.every=5 minutes'",
    "log.every=10 steps": "write log.every=10",
    "data=dataset photos": "write data.dataset=photos",
    "model=name:resnet50": "write model.name=resnet50",
    "schedule.name=cos": "Did you mean 'cosine'?",
    "model.pretrained=yes": "is 'yes'; write true, or ./yes for a folder of that name",
    "train.class_weights={cat: x}": "train.class_weights contains 'x' for 'cat'; must be a number (",
    "train.class_weights={cat: -2}": "train.class_weights contains -2 for 'cat'; must be at least 0 (",
    "train.class_weights=[1, -2]": "train.class_weights contains -2; must be at least 0 (",
    "train.duration=null": "train.duration is null; must be",
    "train.class_weights=3": "must be 'balanced', 'effective_number', a list such as [1.0, 2.5], a mapping such as "
    "{cat: 2.5} or null",
}


@pytest.mark.parametrize("override", WRONG)
def test_a_wrong_value_is_told_what_to_write(override: str) -> None:
    said = message(override)
    assert said.startswith("the overrides have 1 mistake:\n  override: ")
    assert WRONG[override] in said
    assert "valid" not in said
    if proposed := re.search(r": write ((?:'[^']*'|\S+)(?: [a-z.]+=\S+)?)$", said):
        import shlex

        read(*shlex.split(proposed[1]))


def test_what_to_write_in_a_file_is_its_line() -> None:
    said = message(text=RECIPE + "\nearly_stopping: 5\noptimizer: sgd\n")
    assert "early_stopping is 5; it is a section: write early_stopping: {patience: 5 epochs}" in said
    assert "optimizer is 'sgd'; it is a section: write optimizer: {name: sgd}" in said


def test_every_section_has_main_keys_that_are_its_own() -> None:
    sections = {key.rpartition(".")[0] for key in all_keys()} - {""}
    assert set(MAIN_KEYS) == sections
    for name, keys in MAIN_KEYS.items():
        section = model_at(tuple(name.split(".")))
        assert section is not None
        assert {key for names in keys for key in names.split()} <= set(section.model_fields)


def test_values_survive_being_written_in_one_line() -> None:
    values = {"a": ["x y", "1", "1e-3", 1e-3, True, None, "true", "hf://me/x", "a: b", "-x", "", "#"], "b": {}}
    assert read(f"model.args={flow_text(values)}").model.args == values


# overrides -> what is laid to them, though the key is one of the file, or not written at all
BLAMED: dict[tuple[str, ...], str] = {
    ("augment.randaugment=true",): "override augment.randaugment=true: augment.trivialaugment and",
    (
        "seed=3",
        "train={duration: 5 epochs}",
    ): "override 'train={duration: 5 epochs}': train.batch_size is missing; it is images per optimizer step, all "
    "processes together; train=... replaces the whole section, 'train.duration=5 epochs' does not",
    ("seed.x=3",): "override: seed is {'x': 3}; must be an integer",
    ("hub=true",): "override: hub.repo is missing",
}


@pytest.mark.parametrize("overrides", BLAMED)
def test_a_mistake_is_laid_to_the_override_that_makes_it(overrides: tuple[str, ...]) -> None:
    said = message(*overrides, text=RECIPE + "\naugment: {trivialaugment: true}\n")
    assert BLAMED[overrides] in said
    assert said.startswith("the overrides have 1 mistake:")
    assert "small.yaml" not in said


def test_mistakes_of_the_file_stay_its_own() -> None:
    text = RECIPE + "\naugment: {trivialaugment: true, randaugment: {}}\n"
    assert message(text=text).startswith("small.yaml has 1 mistake:\n  small.yaml, line ")
    reported = message("seed=x", text=text)
    assert reported.startswith("small.yaml with the overrides has 2 mistakes:")
    assert re.search(r"small.yaml, line \d+: augment.trivialaugment and", reported)


MALFORMED: dict[tuple[str, ...], str] = {
    ("train.duration=5", "epochs", "seed=1"): "has no spaces outside quotes: write 'train.duration=5 epochs'",
    ("seed=1", "train.duration", "=", "5", "epochs"): "write 'train.duration=5 epochs'",
    ("train.batch_size", "5"): "write train.batch_size=5",
    ("train.batch_size:5",): "Did you mean train.batch_size=5?",
    ("train.batch_size",): "Did you mean train.batch_size=VALUE?",
    ("other.yaml",): "a training has one recipe",
    ("resume",): "Did you mean '--resume'?",
    ("train..duration=5",): "must look like section.key=value",
    ("train.batch_size=4,seed=1,train.duration=5 epochs",): "overrides are separated by spaces, not by commas",
    ("train={duration:5}",): "after 'duration' a colon and a space are missing",
}


@pytest.mark.parametrize("words", MALFORMED)
def test_words_that_are_no_overrides_are_told_how_one_is_written(words: tuple[str, ...]) -> None:
    assert MALFORMED[words] in message(*words)


MISNAMED = {
    "name: resnet18": "Did you mean 'model.name', 'optimizer.name' or 'schedule.name'?",
    "dataset: photos": "dataset is not a key of a recipe. Did you mean 'data.dataset'?",
    "Optimizer: {lr: 1}": "Optimizer is not a key of a recipe. Did you mean 'optimizer'?",
    "optimizer: {data: photos}": "Did you mean 'data', outside of 'optimizer'?",
    "schedule: {NAME: cosine}": "Did you mean 'schedule.name'?",
    "qwerty: 1": "qwerty is not a key of a recipe. Known here: seed,",
}


@pytest.mark.parametrize("line", MISNAMED)
def test_a_misnamed_key_is_told_the_likeliest_one(line: str) -> None:
    said = message(text=f"{RECIPE}\n{line}\n")
    assert MISNAMED[line] in said
    assert "has 1 mistake" in said


def test_a_misspelt_section_is_not_missing_too() -> None:
    said = message(text=RECIPE.replace("train:", "trian:"))
    assert "1 mistake" in said
    assert "Did you mean 'train'?" in said


def test_a_text_that_is_not_yaml_is_told_what_is_likely_wrong() -> None:
    wrong = {
        "model:\n\tname: x": "line 2, column 1: not valid YAML: a tab: YAML is indented by spaces",
        "model: y\ndata\n  x\n": "line 2, column 1: not valid YAML: a key without ':' after it",
        "model\n  name: x": "line 2, column 7: not valid YAML: a ':' where no key can be: the line above lacks its ':'",
        "model:\n  name: x\n data: y": "line 3, column 2: not valid YAML: its indentation fits no line above it",
        "model: {name: x\ndata: {dataset: y}": "not valid YAML: a ',' or the closing '}' is missing before this",
        "": "this one is empty",
    }
    for text, reason in wrong.items():
        assert reason in message(text=text)


def test_all_malformed_overrides_are_named() -> None:
    assert message("nonsense", "seed={a").splitlines() == [
        "override 'nonsense': must look like section.key=value, such as train.batch_size=64",
        next(line for line in message("seed={a").splitlines() if "not valid YAML" in line),
    ]


def test_a_recipe_in_short_forms_is_read_again_as_it_was(tmp_path: Path) -> None:
    from hf_fasttrain.recipe.load import recipe_text

    recipe = read("ema=true", "log.trackers=tensorboard", "train.class_weights={a: 2}", "early_stopping=false")
    (tmp_path / "again.yaml").write_text(recipe_text(recipe))
    assert flatten(load_recipe(tmp_path / "again.yaml")) == flatten(recipe)
