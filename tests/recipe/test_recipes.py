"""Recipes: typed loading, overrides, schema, and every recipe on disk trained for two steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fuzz_recipes
import pytest
from helpers.fuzzing import fuzz
from helpers.runs import RECIPE

from hf_fasttrain import Trainer, load_recipe
from hf_fasttrain.cli import main
from hf_fasttrain.recipe.conflicts import without_effect
from hf_fasttrain.recipe.explain import all_explained
from hf_fasttrain.recipe.find import recipe_header, recipes_folder, shipped_recipes
from hf_fasttrain.recipe.load import flatten, json_schema, origin_of, output_dir, recipe_text, tag_of
from hf_fasttrain.recipe.overrides import apply_overrides
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.recipe.validate import all_keys, is_allowed
from hf_fasttrain.utils.duration import Duration
from hf_fasttrain.utils.errors import RecipeError, RunError
from hf_fasttrain.utils.files import expand_user

SMALLER = {
    "resnet18": "test_resnet",
    "resnet50": "test_resnet",
    "efficientnet_b0": "test_efficientnet",
    "vit_base_patch16_224": "test_vit",
    "vit_small_patch16_224": "test_vit",
}
MAIN_RECIPES = ("quickstart", "finetune_small", "finetune", "finetune_vit", "resnet50", "efficientnet", "vit")


def test_every_recipe_is_shipped() -> None:
    assert len(shipped_recipes()) == 13
    assert set(shipped_recipes()) == set(MAIN_RECIPES) | {
        f"study/{model}_{data}"
        for model in ("resnet50", "efficientnet_b0", "vit_b16")
        for data in ("cifar10", "cifar100")
    }


@pytest.mark.parametrize("name", shipped_recipes())
def test_every_recipe_trains_two_steps_on_tiny_images(name: str, tmp_path: Path, image_folder: Path) -> None:
    """With the smallest model of the same family, so that all other settings of the recipe are used."""
    recipe = load_recipe(name)
    has_test = recipe.data.test_split is not None
    if has_test:
        (image_folder / "validation").rename(image_folder / "test")
    trainer = Trainer.from_recipe(
        name,
        [
            f"model.name={'resnet18' if recipe.model.small_image_stem else SMALLER[recipe.model.name]}",
            "model.pretrained=false",
            f"data.dataset={image_folder}",
            "data.image_size=32",
            "data.workers=0",
            "data.eval_fraction=0.2",
            "train={duration: 2 steps, batch_size: 8}",
            f"output_dir={tmp_path / 'run'}",
        ],
    )
    result = trainer.fit()
    assert result.steps == 2
    assert (result.test_metrics is not None) == has_test
    assert recipe_header(shipped_recipes()[name])


@pytest.mark.parametrize("name", shipped_recipes())
def test_recipes_name_themselves_in_their_headers(name: str) -> None:
    assert f"recipes/{name}.yaml" in recipe_header(shipped_recipes()[name])


def test_study_recipes_have_the_studys_settings() -> None:
    resnet = load_recipe("study/resnet50_cifar10")
    assert resnet.model.small_image_stem
    assert (resnet.train.batch_size, resnet.accelerate.gradient_accumulation_steps) == (256, 2)
    assert (resnet.optimizer.name, resnet.optimizer.lr, resnet.optimizer.weight_decay) == ("adam", 1e-3, 1e-3)
    assert resnet.schedule.name == "onecycle"
    efficientnet = load_recipe("study/efficientnet_b0_cifar100")
    assert (efficientnet.optimizer.lr, efficientnet.optimizer.backbone_lr_scale) == (0.01, 0.1)
    assert efficientnet.schedule.gamma == 0.975
    assert load_recipe("study/vit_b16_cifar100").train.duration == Duration(15, "epochs")
    for name in shipped_recipes():
        if name.startswith("study/"):
            assert load_recipe(name).data.test_split == "test"


def test_names_paths_and_overrides(write_recipe: Callable[..., Path]) -> None:
    assert flatten(load_recipe("quickstart")) == flatten(load_recipe(recipes_folder() / "quickstart.yaml"))
    recipe = load_recipe(write_recipe(), ["optimizer.lr=1e-3", "ema.decay=0.5", "train.duration=3 epochs", "seed=4"])
    assert recipe.optimizer.lr == 1e-3
    assert recipe.ema is not None
    assert recipe.ema.decay == 0.5
    assert recipe.train.duration == Duration(3, "epochs")
    assert (origin_of(recipe, "seed"), origin_of(recipe, "train.batch_size")) == ("override", "recipe")
    assert origin_of(recipe, "optimizer.momentum") == "default"


def test_a_recipe_object_accepts_overrides(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    read = load_recipe(write_recipe(), ["train.batch_size=4"])
    for recipe in (read, Recipe.model_validate(read.model_dump())):
        trainer = Trainer.from_recipe(recipe, ["train.duration=3 steps", f"output_dir={tmp_path / recipe.source.name}"])
        assert trainer.num_steps == 3
        assert trainer.train_loader.sampling_plan.batch_size == 4
    changed = load_recipe(read, ["optimizer={name: sgd}"])
    assert changed.source.overrides == ("train.batch_size=4", "optimizer={name: sgd}")
    assert (origin_of(changed, "optimizer.name"), origin_of(changed, "data.dataset")) == ("override", "recipe")
    assert read.optimizer.name != "sgd"
    assert load_recipe(read) is read


def test_overrides_of_a_recipe_object_are_checked(write_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(write_recipe())
    with pytest.raises(RecipeError, match=r"(?s)the overrides have 2 mistakes:.*override: train.batch"):
        Trainer.from_recipe(recipe, ["train.batch_size=none", "train.durations=3 steps"])
    with pytest.raises(RecipeError, match="override 'batch_size': must look like"):
        Trainer.from_recipe(recipe, ["batch_size"])


def test_yaml_is_version_1_2(write_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(write_recipe(RECIPE + "\noptimizer: {lr: 1e-3, weight_decay: 0}\n"), ["model.args={a: no}"])
    assert recipe.optimizer.lr == 0.001
    assert recipe.model.args == {"a": "no"}


def test_a_recipe_is_unchanged_by_writing_and_reading(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    path = write_recipe()
    assert recipe_text(load_recipe(path)) == path.read_text()
    changed = load_recipe(path, ["optimizer.lr=1e-5", "augment.randaugment={num_ops: 1}", "ema={}"])
    reloaded = load_recipe(write_recipe(recipe_text(changed), "again.yaml"))
    assert flatten(reloaded) == flatten(changed)


def test_the_example_of_every_key_is_a_valid_value_other_than_its_default() -> None:
    for key in all_explained().values():
        if key.is_section:
            assert key.values.startswith("section")
            continue
        assert key.meaning, key
        assert key.example not in (None, key.default), key
        tree: dict[str, Any] = {"model": {"name": "resnet18"}, "data": {"dataset": "digits"}}
        tree["train"] = {"duration": "1 epochs", "batch_size": 2}
        apply_overrides(tree, [f"{key.name}={key.example}"], {})
        required = {"hub": {"repo": "me/x"}, "distill": {"teacher": "runs/x"}}
        for name, values in {**required, "progressive": {"start_size": 8, "until": "1 epochs"}}.items():
            section = tree if name in required else tree.get("augment", {})
            if name in section:
                section[name] = {**values, **section[name]}
        Recipe.model_validate(tree)


def test_every_key_is_tagged_and_described() -> None:
    schema = json_schema()
    for key in all_keys():
        assert tag_of(key) in ("result", "speed", "output")
    assert "optimizer.lr" in set(all_keys())
    assert schema["properties"]["seed"]["description"]
    tags: dict[str, set[str]] = {}
    for key in all_keys():
        tags.setdefault(tag_of(key), set()).add(key)
    assert {"data.workers", "data.pin_memory", "accelerate.mixed_precision", "accelerate.channels_last"} <= tags[
        "speed"
    ]
    assert {"train.batch_size", "seed", "optimizer.lr", "accelerate.sync_batch_norm"} <= tags["result"]
    assert {"output_dir", "log.every", "hub.repo", "checkpoint.keep", "evaluate.metrics"} <= tags["output"]


def test_the_schema_on_disk_is_up_to_date() -> None:
    assert json.loads((recipes_folder() / "recipe.schema.json").read_text()) == json_schema()


def test_flatten_gives_every_default() -> None:
    recipe = Recipe.model_validate(
        {"model": {"name": "a"}, "data": {"dataset": "b"}, "train": {"duration": "1 step", "batch_size": 2}}
    )
    values = flatten(recipe)
    assert values["train.duration"] == "1 step"
    assert values["ema"] is None
    assert values["checkpoint.best.metric"] == "accuracy"


@pytest.mark.parametrize(
    ("text", "steps"), [("1 epoch", 7), ("90 epochs", 630), ("0.5 epochs", 4), ("1 step", 1), ("5000 steps", 5000)]
)
def test_durations(text: str, steps: int) -> None:
    assert Duration.parse(text).to_steps(7) == steps
    assert str(Duration.parse(text)) == text


def test_check_prints_every_value_with_its_origin(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        main(["check", str(write_recipe()), "optimizer.lr=0.5"])
    assert error.value.code == 0
    output = capsys.readouterr().out
    for key in load_and_flatten(write_recipe()):
        assert key in output
    row = next(line for line in output.splitlines() if "optimizer.lr" in line)
    assert [cell.strip() for cell in row.strip("│┃ ").split("│")] == ["optimizer.lr", "0.5", "override", "result"]
    row = next(line for line in output.splitlines() if "data.mean" in line)
    assert "the model's configuration" in row
    assert not (tmp_path / "runs").exists()


def load_and_flatten(path: Path) -> dict[str, object]:
    return flatten(load_recipe(path))


def test_recipes_are_listed_with_their_headers(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["recipes"])
    output = capsys.readouterr().out
    for name, path in shipped_recipes().items():
        assert name in output
        assert recipe_header(path).splitlines()[0] in output


def test_launch_configurations_are_accepted_by_accelerate() -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    folder = Path(__file__).parents[2] / "accelerate_configs"
    configs = {path.stem: load_config_from_file(str(path)) for path in folder.glob("*.yaml")}
    assert set(configs) == {"cpu", "single_gpu", "multi_gpu", "multi_node"}
    assert configs["cpu"].use_cpu
    assert configs["multi_gpu"].distributed_type == "MULTI_GPU"
    assert configs["multi_node"].num_machines == 2


def test_a_learning_rate_of_a_frozen_backbone_is_noted(write_recipe: Callable[..., Path]) -> None:
    overrides = ["model.pretrained=true", "model.freeze_backbone=true", "optimizer.backbone_lr_scale=0.1"]
    expected = "optimizer.backbone_lr_scale has no effect with model.freeze_backbone=true: only the head is trained"
    assert expected in without_effect(load_recipe(write_recipe(), overrides))
    assert expected not in without_effect(load_recipe(write_recipe(), overrides[::2]))


@pytest.mark.parametrize("value", ["[1]", "[5, 5]", "[9, 2, 3]"])
def test_a_value_range_is_two_numbers_in_order(value: str, write_recipe: Callable[..., Path]) -> None:
    with pytest.raises(RecipeError, match=r"data\.value_range.* give two numbers, the smaller one \(black\) first"):
        load_recipe(write_recipe(), [f"data.value_range={value}"])


def test_the_home_of_a_user_that_does_not_exist_is_one_message(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    message = r"^'?~nosuch/x.*there is no such user, or no home folder; write the path out$"
    with pytest.raises(RunError, match=message):
        load_recipe("~nosuch/x.yaml")
    with pytest.raises(RunError, match=message):
        output_dir(load_recipe(write_recipe(), ["output_dir=~nosuch/x"]))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~nosuch").mkdir()
    assert expand_user("~nosuch/x") == Path("~nosuch/x")  # a folder of this name exists
    assert expand_user("~/x") == Path.home() / "x"


@pytest.mark.parametrize(
    ("key", "value", "allowed"),
    [
        ("evaluate.batch_size", 64, True), ("evaluate.batch_size", 0, False), ("evaluate.batch_size", "../x", False),
        ("data.workers", 3, True), ("data.workers", [], False), ("train.duration", "1 epoch", True),
        ("train.duration", {}, False), ("data.mean", [0.5, 0.5, 0.5], True), ("data.no", 1, False), ("", 1, False),
    ],
)  # fmt: skip
def test_whether_a_recipe_may_have_a_value(key: str, value: Any, allowed: bool) -> None:
    assert is_allowed(key, value) == allowed


def test_mutated_recipes_are_valid_or_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The short form of fuzz_recipes.py."""
    counts = fuzz(7, range(25), fuzz_recipes.prepare, fuzz_recipes.case, tmp_path)
    assert capsys.readouterr().out == ""
    assert counts["check: status 2"] > 10
    assert counts["check: status 0"] >= 1
