"""Models: building, initial weights, saving and loading; and the optimizer's parameter groups."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

from hf_fasttrain import Trainer
from hf_fasttrain.data.pixels.augment import EvalTransform
from hf_fasttrain.data.source.dataset import load_source
from hf_fasttrain.models.input_size import notes_on_size, seen_by_layers
from hf_fasttrain.models.model import (
    ModelSpec,
    _processor_crop_pct,
    build_model,
    has_large_stem,
    head_names,
    model_preprocessing,
    use_small_image_stem,
)
from hf_fasttrain.models.saved import load_model, save_model
from hf_fasttrain.models.transformers_model import TransformersClassifier, open_classifier
from hf_fasttrain.train.loss import ClassificationLoss, resolve_class_weights
from hf_fasttrain.train.optim import build_param_groups, undecayed_names
from hf_fasttrain.utils.errors import DataError, ModelError

CLASSES = ["a", "b", "c"]


def spec(name: str, image_size: int = 32, **options: object) -> ModelSpec:
    return ModelSpec(name, CLASSES, image_size, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def transformers_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny transformers ResNet with its image processor, as `save_pretrained` writes them."""
    from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

    folder = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], num_labels=7)
    ResNetForImageClassification(config).save_pretrained(folder)
    ConvNextImageProcessor(image_mean=[0.1, 0.2, 0.3], crop_pct=0.7, resample=3).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
def test_timm_models_are_saved_and_loaded_and_open_in_timm(name: str, tmp_path: Path) -> None:
    model_spec = spec(name)
    model = build_model(model_spec).eval()
    save_model(model, model_spec, tmp_path)
    images = torch.randn(2, 3, 32, 32)
    reloaded, loaded_spec = load_model(tmp_path)
    assert loaded_spec.class_names == CLASSES
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    with torch.no_grad():
        assert torch.equal(reloaded(images), model(images))
        assert torch.equal(theirs(images), model(images))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["label_names"] == CLASSES


def test_transformers_models(transformers_folder: Path, tmp_path: Path) -> None:
    model_spec = spec(f"transformers:{transformers_folder}")
    model = build_model(model_spec, pretrained=True).eval()
    assert isinstance(model, TransformersClassifier)
    torch.nn.init.normal_(model.model.classifier[1].weight)  # it is initialised to zero
    logits = model(torch.randn(2, 3, 32, 32))
    assert logits.shape == (2, 3)
    pre = model_preprocessing(model, model_spec)
    assert pre.mean == (0.1, 0.2, 0.3)
    assert (pre.interpolation, pre.crop_pct) == ("bicubic", 0.7)
    save_model(model, model_spec, tmp_path / "saved")
    reloaded, _ = load_model(tmp_path / "saved")
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(reloaded(images), model(images))
    started = build_model(model_spec, pretrained=str(transformers_folder))
    body = "model.resnet.embedder.embedder.convolution.weight"
    assert torch.equal(started.state_dict()[body], model.state_dict()[body])


def test_a_configuration_that_names_a_kernel_is_refused_wherever_it_is_read(
    transformers_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig

    folder = Path(shutil.copytree(transformers_folder, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "attn_implementation": "somebody/kernel"}))
    hostile = spec(f"transformers:{folder}")
    read: list[str] = []
    monkeypatch.setattr(AutoConfig, "from_pretrained", lambda name, **options: read.append(name))
    started = [
        lambda: build_model(hostile),
        lambda: build_model(hostile, pretrained=True),
        lambda: open_classifier(hostile),
    ]
    for start in started:
        with pytest.raises(ModelError, match=r"attn_implementation: 'somebody/kernel'.*trust_remote_code"):
            start()
    assert not read  # refused before transformers looks at it


def test_pretrained_file_gives_the_body_and_a_new_head(tmp_path: Path) -> None:
    source = build_model(ModelSpec("test_vit", [str(i) for i in range(9)], 160))
    save_model(source, ModelSpec("test_vit", [str(i) for i in range(9)], 160), tmp_path)
    model = build_model(spec("test_vit", image_size=96), pretrained=str(tmp_path / "model.safetensors"))
    state = model.state_dict()
    assert state["head.weight"].shape[0] == 3
    assert torch.equal(state["blocks.0.attn.qkv.weight"], source.state_dict()["blocks.0.attn.qkv.weight"])
    assert state["pos_embed"].shape != source.state_dict()["pos_embed"].shape  # resized by timm
    with torch.no_grad():
        assert model(torch.randn(1, 3, 96, 96)).shape == (1, 3)


def test_small_image_stem_keeps_the_resolution() -> None:
    model = build_model(spec("resnet18", small_image_stem=True))
    assert model.conv1.stride == (1, 1)
    assert model.forward_features(torch.randn(1, 3, 32, 32)).shape[-1] == 4  # 7x7 stem and max-pool: 1


def test_preprocessing_is_that_of_the_model() -> None:
    vit = spec("vit_tiny_patch16_224")
    pre = model_preprocessing(build_model(vit), vit)
    assert (pre.mean, pre.interpolation, pre.crop_pct) == ((0.5, 0.5, 0.5), "bicubic", 0.9)


def test_preprocessing_of_image_processors(tmp_path: Path) -> None:
    """DeiT resizes to 256 and crops 224; ViT resizes to a square; without normalisation, mean is 0 and std 1."""
    from transformers import DeiTImageProcessor, ResNetConfig, ResNetForImageClassification, ViTImageProcessor

    found = {}
    processors = {
        "deit": DeiTImageProcessor(),
        "vit": ViTImageProcessor(),
        "raw": ViTImageProcessor(do_normalize=False),
    }
    for name, processor in processors.items():
        config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1])
        ResNetForImageClassification(config).save_pretrained(tmp_path / name)
        processor.save_pretrained(tmp_path / name)
        model_spec = spec(f"transformers:{tmp_path / name}")
        found[name] = model_preprocessing(build_model(model_spec), model_spec)
    assert (found["deit"].crop_pct, found["deit"].crop_mode) == (0.875, "center_floor")
    assert (found["vit"].crop_pct, found["vit"].crop_mode) == (1.0, "squash")
    assert (found["raw"].mean, found["raw"].std) == ((0.0,) * 3, (1.0,) * 3)
    wide = Image.fromarray(np.random.default_rng(0).integers(0, 256, (20, 60, 3), dtype=np.uint8))
    squashed = EvalTransform(16, "bilinear", 1.0, "squash")(np.asarray(wide))
    assert np.array_equal(squashed, np.asarray(wide.resize((16, 16), Image.Resampling.BILINEAR)))


@pytest.mark.parametrize(("crop", "resized"), [(224, 256), (64, 93), (112, 200), (128, 186), (224, 224)])
def test_an_image_processors_sizes_follow_from_its_crop_fraction(crop: int, resized: int) -> None:
    from transformers import BitImageProcessor

    processor = BitImageProcessor(size={"shortest_edge": resized}, crop_size={"height": crop, "width": crop})
    assert math.floor(crop / _processor_crop_pct(processor)) == resized


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_convnext", "test_efficientnet"])
def test_weight_decay_is_off_for_norms_biases_and_tokens(name: str) -> None:
    model = build_model(spec(name))
    groups = build_param_groups(model, lr=1.0, weight_decay=0.1)
    names = {id(p): n for n, p in model.named_parameters()}
    decayed = {names[id(p)] for group in groups if group["weight_decay"] for p in group["params"]}
    assert sum(len(group["params"]) for group in groups) == len(names)
    for name_, parameter in model.named_parameters():
        expected = parameter.ndim > 1 and "pos_embed" not in name_ and "token" not in name_
        if "gamma" not in name_:  # ConvNeXt's layer scale is neither norm nor bias
            assert (name_ in decayed) == expected, name_
    assert undecayed_names(model) | decayed >= set(names.values())


def test_lr_scales_of_head_and_layers() -> None:
    model = build_model(spec("test_vit"))
    head = [p for n, p in model.named_parameters() if n.startswith("head.")]
    groups = build_param_groups(model, lr=2.0, weight_decay=0.1, head_names=head_names(model), backbone_lr_scale=0.1)
    lrs = {id(p): group["lr"] for group in groups for p in group["params"]}
    assert all(lrs[id(p)] == 2.0 for p in head)
    assert sorted(set(lrs.values())) == pytest.approx([0.2, 2.0])
    groups = build_param_groups(model, lr=1.0, weight_decay=0.1, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    parameters = dict(model.named_parameters())
    assert scales[id(parameters["head.weight"])] == 1.0
    assert scales[id(parameters["blocks.1.attn.qkv.weight"])] == 2 * scales[id(parameters["blocks.0.attn.qkv.weight"])]


def test_class_weights_have_mean_one_over_the_training_set() -> None:
    counts = np.array([90, 9, 1])
    for class_weights in ("balanced", [1.0, 5.0, 20.0]):
        weights = resolve_class_weights(class_weights, counts)
        assert weights is not None
        assert (weights.numpy() * counts).sum() / counts.sum() == pytest.approx(1)
    balanced = resolve_class_weights("balanced", np.array([4, 2, 0]))
    assert balanced is not None
    assert balanced.tolist() == pytest.approx([0.75, 1.5, 1.0])


def test_class_weights_by_name_are_a_list_with_1_for_the_others() -> None:
    counts, names = np.array([90, 9, 1]), ["cat", "dog", "emu"]
    by_name = resolve_class_weights({"emu": 20, "dog": 5}, counts, names)
    listed = resolve_class_weights([1.0, 5.0, 20.0], counts, names)
    assert by_name is not None
    assert listed is not None
    assert by_name.tolist() == listed.tolist()
    with pytest.raises(DataError, match=r"'dgo' is not a class .* Did you mean 'dog'\? .* are cat, dog, emu"):
        resolve_class_weights({"dgo": 2}, counts, names)
    with pytest.raises(DataError, match="numbers of at least 0, at least one of them above 0"):
        resolve_class_weights({"cat": -1}, counts, names)


def test_weighted_loss_divides_by_images_not_by_weights() -> None:
    weights, logits, labels = torch.tensor([0.2, 3.0, 1.0]), torch.randn(6, 3), torch.tensor([0, 1, 1, 2, 0, 0])
    loss = ClassificationLoss(class_weights=weights)
    plain = (torch.nn.functional.cross_entropy(logits, labels, reduction="none") * weights[labels]).mean()
    torch.testing.assert_close(loss(logits, labels), plain)


@pytest.mark.parametrize("threshold", [None, 0.2])
@pytest.mark.parametrize("sum_classes", [False, True])
def test_binary_cross_entropy_is_timms(threshold: float | None, sum_classes: bool) -> None:
    from timm.data.mixup import mixup_target
    from timm.loss import BinaryCrossEntropy

    torch.manual_seed(0)
    logits, labels, weights = torch.randn(6, 3), torch.tensor([0, 1, 1, 2, 0, 0]), torch.tensor([0.2, 3.0, 1.0])
    options: dict[str, Any] = {"target_threshold": threshold, "sum_classes": sum_classes}
    timms = BinaryCrossEntropy(smoothing=0.1, pos_weight=weights, **options)
    ours = ClassificationLoss(label_smoothing=0.1, class_weights=weights, binary=True, **options)
    torch.testing.assert_close(ours(logits, labels), timms(logits, labels))
    mixed = torch.nn.functional.one_hot(labels, 3).float()
    mixed = 0.3 * mixed + 0.7 * mixed.flip(0)
    torch.testing.assert_close(ours(logits, mixed), timms(logits, mixup_target(labels, 3, 0.3, 0.1)))
    multi_targets = (torch.rand(6, 3) < 0.5).float()
    ours = ClassificationLoss(label_smoothing=0.1, multi_label=True, **options)
    timms = BinaryCrossEntropy(smoothing=0.0, **options)
    torch.testing.assert_close(ours(logits, multi_targets), timms(logits, 0.9 * multi_targets + 0.05))


def test_splits_columns_and_classes(image_folder: Path, tmp_path: Path) -> None:
    import datasets

    source = load_source(str(image_folder))
    assert source.class_names == ["blue", "green", "red"]
    assert (len(source.train), len(source.evaluation), source.held_out) == (24, 12, False)
    reference = datasets.load_dataset("imagefolder", data_dir=str(image_folder), cache_dir=str(tmp_path / "cache"))
    assert reference["train"].features["label"].names == source.class_names
    assert reference["train"]["label"][:] == source.train.labels.tolist()

    reference.save_to_disk(str(tmp_path / "saved"))
    assert load_source(str(tmp_path / "saved")).evaluation.labels.tolist() == source.evaluation.labels.tolist()
    renamed = reference["train"].rename_columns({"image": "img", "label": "fine_label"})
    renamed = renamed.add_column("coarse_label", [0] * len(renamed))
    renamed.to_parquet(str(tmp_path / "train.parquet"))
    found = load_source(str(tmp_path / "train.parquet"), eval_fraction=0.25)
    assert (found.columns.image, found.columns.label) == ("img", "fine_label")
    assert np.bincount(found.evaluation.labels).tolist() == [2, 2, 2]
    from_dict = load_source({"train": reference["train"], "dev": reference["validation"]})
    assert from_dict.evaluation.name == "dev"


def test_splits_with_different_class_numbers_are_matched_by_name(image_folder: Path) -> None:
    """The validation split lacks the first class: its own numbers are one lower."""
    import shutil

    shutil.rmtree(image_folder / "validation" / "blue")
    (image_folder / "train" / "red" / "._0.jpg").write_bytes(b"left by a file manager")
    (image_folder / "test").mkdir()
    (image_folder / "test" / "flat.jpg").write_bytes(b"no class folder")
    source = load_source(str(image_folder))
    assert source.class_names == ["blue", "green", "red"]
    assert source.evaluation.labels.tolist() == [1] * 4 + [2] * 4
    assert len(source.train) == 24


def test_labels_as_texts_and_lists() -> None:
    import datasets

    images = [Image.new("L", (4, 4), i) for i in range(10)]
    texts = datasets.Dataset.from_dict({"image": images, "label": ["dog", "cat"] * 5})
    source = load_source(texts, eval_fraction=0.2)
    assert source.class_names == ["cat", "dog"]
    many = datasets.Dataset.from_dict({"image": images, "tags": [["x"], ["x", "y"]] * 5})
    source = load_source(many, eval_fraction=0.2)
    assert source.multi_label
    assert source.train.labels.shape == (8, 2)
    numbers = datasets.Dataset.from_dict({"image": images, "label": [0, 2] * 5})
    assert load_source(numbers, eval_fraction=0.2).class_names == ["0", "1", "2"]


def test_a_multi_label_run_from_python(tmp_path: Path) -> None:
    import datasets

    rng = np.random.default_rng(0)
    images = [Image.fromarray(rng.integers(0, 256, (16, 16), dtype=np.uint8)) for _ in range(40)]
    data = datasets.Dataset.from_dict({"image": images, "tags": [["x"], ["x", "y"], [], ["z"]] * 10})
    overrides = ["model.name=test_resnet", f"output_dir={tmp_path / 'run'}", "train.class_weights=balanced"]
    overrides += ["augment.mixup=0.5", "train.duration=2 steps", "data.workers=0", "model.small_image_stem=false"]
    trainer = Trainer.from_recipe("quickstart", overrides, dataset=data)
    metrics = trainer.fit().metrics
    assert set(metrics) == {"loss", "accuracy", "f1_macro"}
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["problem_type"].startswith("multi")


@pytest.mark.parametrize("options", [{"gradient_checkpointing": True}, {"compile": True}])
def test_checkpointed_and_compiled_models_train_to_the_same_weights(options: dict[str, bool], tmp_path: Path) -> None:
    from helpers.processes import reset_accelerate

    weights = []
    for number, enabled in enumerate((False, True)):
        reset_accelerate()
        switch = f"model.{next(iter(options))}" if "gradient_checkpointing" in options else "accelerate.compile"
        overrides = ["model.name=test_vit", f"output_dir={tmp_path / str(number)}", "train.duration=2 steps"]
        overrides += ["data.workers=0", "train.batch_size=8", "data.eval_fraction=0.02", "optimizer.name=sgd"]
        overrides += ["data.eval_fraction=0.01", f"{switch}={'true' if enabled else 'false'}"]
        trainer = Trainer.from_recipe("quickstart", overrides)
        trainer.fit()
        weights.append(trainer.raw_model.state_dict())
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-4, atol=1e-5)


def noted(model: nn.Module, size: int, **options: bool) -> str:
    with seen_by_layers(model) as seen, torch.no_grad():
        model.eval()(torch.zeros(1, 3, size, size))
    model(torch.zeros(2, 3, size, size))  # nothing is seen any more
    return "; ".join(notes_on_size(seen, size, "data.image_size", **options))


def test_rows_that_patches_cut_off_and_maps_of_one_pixel_are_noted() -> None:
    patches = nn.Sequential(nn.Conv2d(3, 4, 16, stride=16), nn.AdaptiveAvgPool2d(1))
    assert noted(patches, 64) == ""
    assert noted(patches, 70) == (
        "data.image_size=70: the model's patches cut off 6 of 70 rows and columns at the end of each image; "
        "at 64 or 80 they cover all of it"
    )
    pooled = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1))
    assert "cut off 2 of 34 rows" in noted(pooled, 34)
    assert "at 32 or 36 they" in noted(pooled, 34)
    stages = nn.Sequential(nn.Conv2d(3, 4, 4, stride=4), *(nn.Conv2d(4, 4, 2, stride=2) for _ in range(3)))
    assert "cut off 4 of 100 rows and columns at the end of each image; at 96 or 128 they" in noted(stages, 100)
    assert noted(stages, 128) == ""
    resnet = timm.create_model("resnet18", num_classes=3)
    assert has_large_stem(resnet)
    assert noted(resnet, 64) == ""
    assert "an image is a single pixel; model.small_image_stem=true or a larger size" in noted(resnet, 32, stem=True)
    use_small_image_stem(resnet)
    assert not has_large_stem(resnet)
    assert noted(resnet, 32) == ""
