"""Every mistake a user can make: one clear message, exit status 2, no traceback."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from helpers.runs import RECIPE, exit_status

from hf_fasttrain.cli import main
from hf_fasttrain.models.model import ModelSpec, build_model
from hf_fasttrain.models.weights import save_weights


def message_of(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """Return the message of a command that must fail with exit status 2 and without a traceback."""
    with pytest.raises(SystemExit) as error:
        main(arguments)
    output = capsys.readouterr()
    assert error.value.code == 2, output
    assert "Traceback" not in output.err
    assert output.err.count("error:") == 1
    return output.err


def recipe(**sections: str) -> str:
    """Return the small recipe with lines replaced: section=its text."""
    lines = {line.split(":")[0]: line for line in RECIPE.strip().splitlines()}
    return "\n".join((lines | {name: f"{name}: {text}" for name, text in sections.items()}).values())


# what is wrong -> (recipe text, overrides, what the message must say)
WRONG_RECIPES: dict[str, tuple[str, list[str], str]] = {
    "misspelt key": (
        recipe(train="{duration: 2 steps, batchsize: 4}"),
        [],
        "batchsize is not a key .*'train.batch_size'?",
    ),
    "misspelt section": (RECIPE + "\noptimiser: {lr: 1}", [], "optimiser is not a key .* mean 'optimizer'"),
    "another tool's name": (RECIPE + "\nlearning_rate: 1", [], "learning_rate .* Did you mean 'optimizer.lr'"),
    "wrong type": (RECIPE, ["train.batch_size=many"], "train.batch_size is 'many'; must be an integer"),
    "a number as text": (RECIPE, ["optimizer.lr='1e-3'"], "optimizer.lr is '1e-3': write optimizer.lr=0.001"),
    "image_size 0": (RECIPE, ["data.image_size=0"], "data.image_size is 0; must be at least 8"),
    "duration without unit": (
        RECIPE,
        ["train.duration=3"],
        "train.duration is 3: a number needs a unit; write '3 epochs' or '3 steps'",
    ),
    "half a step": (RECIPE, ["train.duration=1.5 steps"], "must be a whole number of steps"),
    "no duration": (RECIPE, ["train.duration=0 epochs"], "train.duration is 0"),
    "missing key": (recipe(model="{drop_path: 0.1}"), [], "model.name is missing; it is a timm name"),
    "missing section": ("model: {name: test_resnet}\n", [], r"data is missing; .*\n.*train is missing"),
    "broken YAML": ("model: {name: test_resnet\ndata: x", [], "small.yaml, line 2, column .*: not valid YAML"),
    "not a mapping": ("- a\n- b\n", [], r"a recipe is a mapping .*; got \['a', 'b'\]"),
    "key twice": ("seed: 1\nseed: 2\n", [], "not valid YAML: found duplicate key"),
    "dangerous YAML": ("seed: !!python/object/apply:os.system [ls]\n", [], "not valid YAML"),
    "override without =": (RECIPE, ["train.batch_size"], "override 'train.batch_size': must look like"),
    "override that is no YAML": (RECIPE, ["model.args={a"], r"override 'model.args=\{a': the value is not valid YAML"),
    "hub without repo": (RECIPE, ["hub={every: best}"], "hub.repo is missing; it is OWNER/NAME on the Hub"),
    "hub's repo": (RECIPE, ["hub.repo=me/my flowers"], "hub.repo is 'me/my flowers'; write OWNER/NAME in letters"),
    "hub's rhythm": (RECIPE, ["hub={repo: me/x, every: now and then}"], "hub.every is 'now and then'; must be 'best'"),
    "hub's rhythm of 0": (RECIPE, ["hub={repo: me/x, every: 0 epochs}"], "hub.every is 0; give at least 1 step"),
    "hub's licence": (
        RECIPE,
        ["hub={repo: me/x, license: My Own}"],
        "hub.license is 'My Own'; write it as the Hub does",
    ),
    "a token in a comment": (
        RECIPE + "\n# hf_" + 34 * "x",
        [],
        "small.yaml, line .*: contains an access token; remove it",
    ),
    "a token in an override": (
        RECIPE,
        ["hub.repo=me/hf_oauth_eyJhbGciOiJFZERTQSJ9.eyJzdWIi"],
        "hub contains an access",
    ),
    "a control character": (RECIPE, ['output_dir="a\\0b"'], "output_dir holds a control character"),
    "hub without patience": (RECIPE, ["hub={repo: me/x, wait: 0 minutes}"], "hub.wait is 0 minutes; give more than 0"),
    "hub's patience": (RECIPE, ["hub={repo: me/x, wait: 2 epochs}"], "hub.wait is '2 epochs'; must be a number of min"),
    "not built: fp8": (RECIPE, ["accelerate.mixed_precision=fp8"], "must be 'no', 'fp16', 'bf16' or 'auto'"),
    "said twice": (
        RECIPE,
        ["accelerate.gradient_accumulation_steps=2", "accelerate.micro_batch_size=4"],
        "set the same thing; leave one of them out",
    ),
    "odd micro-batch": (RECIPE, ["accelerate.micro_batch_size=3"], "must be a multiple of 2"),
    "more pieces than images": (
        RECIPE,
        ["accelerate.gradient_accumulation_steps=99"],
        "gradient_accumulation_steps is 99, but train.batch_size is only 16",
    ),
    "two augmentations": (
        RECIPE,
        ["augment.trivialaugment=true", "augment.randaugment={}"],
        "trivialaugment and augment.randaugment exclude",
    ),
    "a policy and another": (
        RECIPE,
        ["augment.auto=v0", "augment.randaugment={}"],
        "augment.randaugment and augment.auto exclude each other",
    ),
    "no policy": (
        RECIPE,
        ["augment.auto=rand-x3"],
        "augment.auto is 'rand-x3'; must be a policy of timm, such as rand",
    ),
    "device and normal noise": (
        RECIPE,
        ["data.cache=device", "augment.crop=padded", "augment.erase=0.5", "augment.erase_fill=pixel"],
        "augment.erase_fill pixel is not available on the device",
    ),
    "flip above 1": (RECIPE, ["augment.flip=1.5"], "augment.flip is 1.5; must be true, false or a number of at most 1"),
    "timm's name": (RECIPE + "\naa: v0", [], "aa is not a key .*Did you mean 'augment.auto'"),
    "augmix and another": (
        RECIPE,
        ["augment.augmix={}", "augment.trivialaugment=true"],
        "augment.augmix and augment.trivialaugment exclude",
    ),
    "progressive padded crop": (
        RECIPE,
        ["augment.crop=padded", "augment.progressive={start_size: 16, until: 1 step}"],
        "augment.progressive needs augment.crop=random_resized; it is padded",
    ),
    "progressive from full size": (
        RECIPE,
        ["augment.progressive={start_size: 32, until: 1 step}"],
        "augment.progressive.start_size is not below data.image_size=32",
    ),
    "progressive from the full size of training": (
        RECIPE,
        ["data.train_size=24", "augment.progressive={start_size: 24, until: 1 step}"],
        "augment.progressive.start_size is not below data.train_size=24",
    ),
    "more repeats than images": (
        RECIPE,
        ["augment.repeats=17"],
        "augment.repeats is 17, but train.batch_size is only 16",
    ),
    "reduced to nothing": (RECIPE, ["data.reduced_decode=true"], "data.reduced_decode true needs data.short_side"),
    "device and random crops": (RECIPE, ["data.cache=device"], "data.cache device needs augment.crop=padded or center"),
    "device and noise": (
        RECIPE,
        ["data.cache=device", "augment.crop=padded", "augment.erase=0.5", "augment.erase_fill=noise"],
        "augment.erase_fill noise is not available on the device",
    ),
    "unknown cache": (RECIPE, ["data.cache=ram"], "data.cache is 'ram'; must be 'auto', 'none', 'memory', 'disk' or"),
    "quality above 100": (
        RECIPE,
        ["data.stored_quality=101"],
        "data.stored_quality is 101; must be .* of at most 100",
    ),
    "crop scale": (RECIPE, ["augment.crop_scale=[1, 0.5]"], "augment.crop_scale is .*the smaller first"),
    "crop scale above 1": (RECIPE, ["augment.crop_scale=[0.5, 2]"], "share of the image's area; at most 1"),
    "same split": (RECIPE, ["data.train_split=a", "data.eval_split=a"], "is 'a', as data.train_split is"),
    "two means": (RECIPE, ["data.mean=[0.5, 0.5]"], "data.mean has 2 numbers; give 3"),
    "no means": (RECIPE, ["data.mean=[]"], "data.mean has 0 numbers; give 3"),
    "no spread": (RECIPE, ["data.std=[0]"], "data.std must be above 0"),
    "stem of published weights": (
        RECIPE,
        ["model.small_image_stem=true", "model.pretrained=true"],
        "published weights have the 7x7 stem",
    ),
    "frozen random weights": (RECIPE, ["model.freeze_backbone=true"], "would freeze random weights"),
    "frozen and layer decay": (
        RECIPE,
        ["model.freeze_backbone=true", "model.pretrained=w", "optimizer.layer_decay=0.5"],
        "layer_decay has no effect with model.freeze_backbone",
    ),
    "two lr scales": (
        RECIPE,
        ["optimizer.layer_decay=0.5", "optimizer.backbone_lr_scale=0.1"],
        "layer_decay and optimizer.backbone_lr_scale exclude",
    ),
    "warmup of the whole training": (RECIPE, ["schedule.warmup=100%"], "schedule.warmup.*must be below 100%"),
    "warmup without a unit": (RECIPE, ["schedule.warmup=3"], "schedule.warmup is 3: .* '3%', '3 epochs' or '3 steps'"),
    "no milestones": (RECIPE, ["schedule.name=multistep"], "schedule.milestones is empty; multistep needs them"),
    "early stopping without evaluations": (
        RECIPE,
        ["evaluate.every=never", "early_stopping={patience: 3 epochs}"],
        "early_stopping needs evaluations, and evaluate.every is never; leave one of them out",
    ),
    "a plateau of another metric": (
        RECIPE,
        ["schedule={name: plateau, metric: mAP}"],
        "schedule.metric is 'mAP', which evaluate.metrics does not measure; choose one of loss, accuracy",
    ),
    "a plateau that lowers nothing": (RECIPE, ["schedule={name: plateau, gamma: 1.0}"], "schedule.gamma is 1"),
    "a milestone at 0": (RECIPE, ["schedule.milestones=[0 steps]"], "schedule.milestones contains 0"),
    "a milestone without a unit": (RECIPE, ["schedule.milestones=[3]"], "contains 3: a number needs a unit"),
    "never evaluated": (RECIPE, ["evaluate.every=0 steps"], "evaluate.every is 0"),
    "two clippings": (
        RECIPE,
        ["optimizer.clip_norm=1", "optimizer.clip_agc=0.01"],
        "optimizer.clip_agc and optimizer.clip_norm exclude each other",
    ),
    "a policy of timm for torchvision's": (
        RECIPE,
        ["augment.randaugment=rand-m9"],
        "augment.randaugment is 'rand-m9'; it is a section; timm's policies are set by augment.auto=rand-m9",
    ),
    "a default that is not measured": (
        RECIPE,
        ["evaluate.metrics=[roc_auc]"],
        r"override 'evaluate.metrics=.*': checkpoint.best.metric is 'accuracy', the default, .*; set it to one of",
    ),
    "only the loss is measured": (
        RECIPE,
        ["evaluate.metrics=[loss]", "checkpoint.best.metric=accuracy"],
        "choose one of loss, or pass it as a function",
    ),
    "watched but not measured": (
        RECIPE,
        ["evaluate.metrics=[f1_macro]", "checkpoint.best.metric=accuracy"],
        "checkpoint.best.metric is 'accuracy', which evaluate.metrics does not measure; choose one of loss, f1_macro",
    ),
    "the largest loss as the best": (
        RECIPE,
        ["checkpoint.best={metric: loss, mode: max}"],
        "checkpoint.best.mode is max, but lower loss is better; set it to min or omit it",
    ),
    "stopping at the least accuracy": (
        RECIPE,
        ["early_stopping={metric: accuracy, mode: min}"],
        "early_stopping.mode is min, but higher accuracy is better; set it to max or omit it",
    ),
    "a metric without a known direction": (
        RECIPE,
        ["evaluate.metrics=[me/sharpness]", "checkpoint.best.metric=sharpness"],
        "checkpoint.best.mode is auto, but the name 'sharpness' does not say whether higher or lower is better",
    ),
}


@pytest.mark.parametrize("case", WRONG_RECIPES)
def test_invalid_recipes_are_refused(
    case: str, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text, overrides, expected = WRONG_RECIPES[case]
    message = message_of([str(write_recipe(text)), *overrides], capsys)
    assert_says(message, expected)


def assert_says(message: str, pattern: str) -> None:
    import re

    assert re.search(pattern, message), message


def test_all_mistakes_are_reported_at_once_with_their_lines(
    write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    text = "model: {nam: x}\ndata: {dataset: digits}\ntrain: {duration: 3, batch_size: 4}\noptimizer:\n  lrr: 1\n"
    text += "augment: {trivialaugment: true, randaugment: {}}\n"
    message = message_of([str(write_recipe(text)), "seed=-1"], capsys)
    assert_says(message, "small.yaml with the overrides has 5 mistakes")
    for expected in (
        "line 1: model.nam is",
        "line 1: model.nam is not a key",
        "line 3: train.duration",
        "line 5: optimizer.lrr",
        "line 6: augment.trivialaugment",
        "override: seed is -1",
    ):
        assert expected in message


# what is wrong -> (overrides, what the message must say); FOLDER is the image folder, TMP an empty one
WRONG_RUNS: dict[str, tuple[list[str], str]] = {
    "no such model": (["model.name=resnet5O"], "has no model 'resnet5O'. Did you mean 'resnet50'"),
    "transformers name without prefix": (["model.name=microsoft/resnet-50"], "transformers:microsoft/resnet-50"),
    "no such model folder": (["model.name=./nowhere"], "no folder ./nowhere"),
    "model folder without config": (["model.name=TMP"], "has no config.json"),
    "wrong model argument": (["model.args={depthh: 3}"], "does not take .*depthh"),
    "no such transformers model": (["model.name=transformers:nobody/nothing"], "could not be downloaded from the Hub"),
    "stem of a ViT": (["model.name=test_vit", "model.small_image_stem=true"], "has no 7x7 stem to replace"),
    "no such weights": (["model.pretrained=TMP/no.safetensors"], "no file or folder .*no.safetensors"),
    "pickled weights": (["model.pretrained=FOLDER/train/red/0.jpg"], "is not a .safetensors file"),
    "folder without weights": (["model.pretrained=TMP"], "no model.safetensors in folder"),
    "weights of another model": (["model.pretrained=TMP/other.safetensors"], "weights of another model: .* missing"),
    "damaged weights": (["model.pretrained=TMP/damaged.safetensors"], "can't be read as safetensors"),
    "no such folder": (["data.dataset=./nowhere"], "./nowhere: no such file or folder"),
    "no such folder, nearly": (["data.dataset=FOLDERR"], "Did you mean '.*photos'"),
    "not on the Hub": (["data.dataset=nobody/nothing"], "could not be downloaded from the Hub"),
    "a file that is no data": (["data.dataset=TMP/notes.txt"], "allowed are .parquet and .arrow"),
    "broken parquet": (["data.dataset=TMP/broken.parquet"], "can't be read as parquet"),
    "folder without classes": (["data.dataset=FOLDER/train/red"], "contains no class folders"),
    "empty class folder": (["data.dataset=TMP/empty_class"], "black: class folder without images"),
    "one class": (["data.dataset=TMP/one_class"], "only one class"),
    "no such column": (["data.image_column=img"], "data.image_column: 'img' is not a column .* it has image"),
    "no such split": (["data.train_split=trian"], "data.train_split: 'trian' is not a split .* it has train"),
    "no such test split": (["data.test_split=test"], "data.test_split: 'test' is not a split"),
    "nothing held out": (["data.eval_fraction=0.0001"], "holds out none"),
    "batch too small": (
        ["train.batch_size=3", "accelerate.gradient_accumulation_steps=3"],
        "train.batch_size=3 is too small for 1 processes x 3 accumulation",
    ),
    "nothing left": (["train.drop_last=true", "train.batch_size=5000"], "train.drop_last drops every step"),
    "fp16 without a GPU": (["accelerate.mixed_precision=fp16"], "fp16 needs a GPU"),
    "sync_batch_norm without a GPU": (["accelerate.sync_batch_norm=true"], "sync_batch_norm needs GPUs"),
    "no such optimizer": (["optimizer.name=adamv"], "which timm does not know. Did you mean 'adam"),
    "wrong optimizer argument": (["optimizer.args={beta: 3}"], "can't be built with optimizer.args"),
    "more blocks than there are": (
        [
            "model.name=test_vit",
            "data.image_size=160",
            "model.pretrained=TMP/other.safetensors",
            "model.train=last 7 blocks",
        ],
        "model.train=last 7 blocks: the model has 6 blocks; give at most 6, or all",
    ),
    "drop_path of transformers": (
        ["model.name=transformers:TMP/tiny", "model.drop_path=0.1"],
        "drop_path and small_image_stem are for timm",
    ),
    "class weights of another data set": (["train.class_weights=[1, 2]"], "has 2 numbers; the dataset has 10"),
    "unknown metric": (["evaluate.metrics=[accuracy, acuracy]"], "'acuracy' is not built in"),
    "top5 of multi-label": (["evaluate.metrics=[accuracy, top5_accuracy]", "data.dataset=TMP/multi"], "no meaning"),
    "output_dir is a file": (["output_dir=TMP/notes.txt"], "is a file; choose another output_dir"),
    "output_dir holds a run": (
        ["output_dir=TMP/held"],
        "holds a run already .recipe.yaml.; `hf-fasttrain .*held --resume` continues it, or choose another",
    ),
    "test split trained on": (["data.test_split=train"], "data.test_split: 'train' is trained or evaluated on already"),
    "evaluation split trained on": (["data.eval_split=train"], "data.eval_split: 'train' is trained on already"),
    "model of one size": (
        ["model.name=test_vit", "model.args={dynamic_img_size: false}", "data.train_size=48"],
        "can't take 48 px .*; change data.train_size or model.args",
    ),
    "model that takes no colour": (["model.args={in_chans: 1}"], "can't take 32 px colour images"),
    "model without logits": (["model.args={features_only: true}"], "instead of .1, 10. logits"),
    "wrong layer name": (["model.args={act_layer: nope}"], "does not take .*nope"),
    "one beta": (["optimizer.args={betas: [0.9]}"], "can't be built with optimizer.args"),
    "lr said twice": (["optimizer.args={lr: 1}"], "optimizer.args: lr has its own key"),
    "watched metric": (["checkpoint.best.metric=f1"], "'f1', which evaluate.metrics does not measure"),
    "endless": (["train.duration=9999999999999 steps"], "must be below 10..12"),
    "no such recipe value": (["model.gradient_checkpointing=true", "model.name=dla46_c"], "does not support it"),
}


@pytest.fixture
def wrong_files(tmp_path: Path) -> Path:
    """Return a folder of things that are wrong in one way each."""
    import datasets
    import numpy as np
    from PIL import Image
    from transformers import ResNetConfig

    folder = tmp_path / "wrong"
    folder.mkdir()
    save_weights(build_model(ModelSpec("test_vit", ["a", "b"], 160)), folder)
    (folder / "model.safetensors").rename(folder / "other.safetensors")
    (folder / "damaged.safetensors").write_bytes(b"\x00" * 50)
    (folder / "notes.txt").write_text("notes")
    (folder / "broken.parquet").write_bytes(b"PAR1 no")
    (folder / "held").mkdir()
    (folder / "held" / "recipe.yaml").write_text("seed: 0")
    for name, classes in (("one_class", ["black"]), ("empty_class", ["black", "white"])):
        for label in classes:
            (folder / name / label).mkdir(parents=True)
    pixels = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    pixels.save(folder / "one_class" / "black" / "0.png")
    pixels.save(folder / "empty_class" / "white" / "0.png")
    ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], architectures=["R"]).save_pretrained(
        folder / "tiny"
    )
    features = {"image": datasets.Image(), "labels": datasets.List(datasets.ClassLabel(names=["a", "b"]))}
    many = {"image": [pixels] * 20, "labels": [[0], [0, 1]] * 10}
    datasets.Dataset.from_dict(many, features=datasets.Features(features)).save_to_disk(str(folder / "multi"))
    return folder


@pytest.mark.parametrize("case", WRONG_RUNS)
def test_invalid_run_folders_are_refused(
    case: str,
    write_recipe: Callable[..., Path],
    image_folder: Path,
    wrong_files: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    overrides, expected = WRONG_RUNS[case]
    output = [] if any(o.startswith("output_dir") for o in overrides) else [f"output_dir={tmp_path / 'run'}"]
    locations = {"FOLDERR": f"{image_folder}s", "FOLDER": str(image_folder), "TMP": str(wrong_files)}
    for name, location in locations.items():
        overrides = [override.replace(name, location) for override in overrides]
    message = message_of([str(write_recipe()), *output, *overrides], capsys)
    assert_says(message, expected)
    assert not (tmp_path / "run").exists() or not (tmp_path / "run" / "result.json").exists()


LABELS: dict[str, tuple[list[Any], str]] = {
    "label out of range": ([0, 1, 2, 7], "row 3 has label 7; allowed are 0 to 2"),
    "negative label": ([0, 1, 2, -1], "row 3 has label -1"),
    "missing label": ([0, 1, None, 2], "row 2 has no label"),
}


@pytest.mark.parametrize("case", LABELS)
def test_invalid_labels_are_refused(
    case: str, write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow as pa
    import pyarrow.parquet

    labels, expected = LABELS[case]
    classes = '{"info": {"features": {"image": {"_type": "Image"}, "label": {"names": ["a", "b", "c"], '
    classes += '"_type": "ClassLabel"}}}}'
    images = [{"bytes": b"", "path": None}] * 4
    table = pa.table({"image": images, "label": pa.array(labels, pa.int64())})
    pyarrow.parquet.write_table(table.replace_schema_metadata({"huggingface": classes}), tmp_path / "train.parquet")
    message = message_of(
        [str(write_recipe()), f"data.dataset={tmp_path / 'train.parquet'}", f"output_dir={tmp_path / 'run'}"], capsys
    )
    assert_says(message, expected)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        ({"a": [1, 2], "b": [0, 1]}, r"no image column; set data.image_column. Its columns are a \(int64\)"),
        ({"image": "IMAGES", "x": [0.5, 1.5]}, "no label column; set data.label_column"),
        ({"image": "IMAGES", "label": [0, 1], "class": [0, 1]}, "several columns may be the labels: label, class"),
        ({"image": "IMAGES", "label": [0.5, 1.5]}, "labels must be integers or texts; got 0.5, 1.5"),
        ({"image": "IMAGES", "label": [[0, 2, 0], [1, 0, 0]]}, "row 0 names a class twice; give lists of the classes"),
        ({"image": "IMAGES", "label": [5, 10**11]}, "look like ids, not classes"),
    ],
)
def test_invalid_columns_are_refused(
    columns: dict[str, Any],
    expected: str,
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import datasets
    from PIL import Image

    images = [Image.new("RGB", (4, 4))] * 2
    table = {name: images if values == "IMAGES" else values for name, values in columns.items()}
    datasets.Dataset.from_dict(table).save_to_disk(str(tmp_path / "data"))
    message = message_of([str(write_recipe()), f"data.dataset={tmp_path / 'data'}"], capsys)
    assert_says(message, expected)


def test_missing_permissions_are_reported(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Writing below /proc is refused even to root."""
    message = message_of([str(write_recipe()), "output_dir=/proc/no/run"], capsys)
    assert_says(message, "output_dir /proc/no/run: can't be written")


def test_trackers_that_are_not_installed_are_refused(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    from accelerate.utils import is_wandb_available

    if is_wandb_available():
        pytest.skip("wandb is installed here")
    message = message_of([str(write_recipe()), "log.trackers=[wandb]", f"output_dir={tmp_path / 'run'}"], capsys)
    assert_says(message, "log.trackers: wandb is not installed; install with pip install")


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP"])
def test_unsupported_launch_configurations_are_refused(
    variable: str,
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, "true")
    assert_says(message_of([str(write_recipe())], capsys), "asks for .*, which is not supported")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["chek"], "'chek' is neither a recipe nor a command. Did you mean 'check'"),
        (["resume", "runs/x"], "A run is resumed by `hf-fasttrain RUN --resume`"),
        (["eval"], "Did you mean 'evaluate'"),
        (["train", "quickstart", "--train.duration=5"], "Overrides have no dashes: train.duration=VALUE"),
        (["predict"], "^error: hf-fasttrain predict: missing argument 'run'; usage: hf-fasttrain predict .OPTIONS."),
        (["quickstat.yaml"], "quickstat.yaml: no such recipe file. Did you mean 'quickstart'"),
        (["."], "is a folder without recipe.yaml; give a recipe file or a run folder, and images as data.dataset=."),
        (["evaluate", "nowhere"], "nowhere: no such folder"),
        (["x" * 3000 + ".yaml"], "is not the name of a recipe file"),
        (["recipes", "copy", "vit", "/nowhere/x.yaml"], "/nowhere/x.yaml: can't be written"),
        (["predict", "nowhere", "x.jpg"], "nowhere: no such folder; give a run folder"),
        (["recipes", "copy", "vitt"], "no shipped recipe 'vitt'.* Did you mean 'vit'"),
    ],
)
def test_invalid_commands_are_refused(arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert_says(message_of(arguments, capsys), expected)


def test_recipes_that_are_not_text_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert_says(message_of([str(path)], capsys), "can't be read as text")


def test_an_object_passed_as_data_must_be_a_dataset() -> None:
    from hf_fasttrain import Trainer
    from hf_fasttrain.utils.errors import DataError

    for wrong in ([1, 2], {"train": None}):
        with pytest.raises(DataError, match=r"allowed are datasets\.Dataset and DatasetDict"):
            Trainer.from_recipe("quickstart", dataset=wrong)


def test_only_the_main_process_prints(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(os.environ, "RANK", "1")
    with pytest.raises(SystemExit) as error:
        main([str(write_recipe()), "seed=x"])
    assert error.value.code == 2
    assert capsys.readouterr().err == ""


def test_copy_does_not_overwrite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_status(["recipes", "copy", "quickstart"]) == 0
    assert (tmp_path / "quickstart.yaml").exists()
    assert_says(message_of(["recipes", "copy", "quickstart"], capsys), "exists already")
    shutil.rmtree(tmp_path)
