"""The head of pretrained weights: found, kept for the same class names, otherwise initialised to zero."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from hf_fasttrain.from_recipe.trainer import build_trainer
from hf_fasttrain.models.head import output_layers
from hf_fasttrain.models.model import ModelSpec, build_model, head_names
from hf_fasttrain.models.saved import load_model, save_model
from hf_fasttrain.models.weights import names_in, save_weights
from hf_fasttrain.train.loss import ClassificationLoss, first_loss_note, loss_of_uniform_logits
from hf_fasttrain.utils.errors import ModelError

SEVEN = list("abcdefg")
FIVE = ["v", "w", "x", "y", "z"]
SMALL_VIT = {"embed_dim": 16, "depth": 1, "num_heads": 2}
FAMILIES: dict[str, tuple[str, int, dict[str, Any]]] = {
    "ResNet": ("test_resnet", 32, {}),
    "ViT": ("test_vit", 32, {}),
    "EfficientNet": ("test_efficientnet", 32, {}),
    "ConvNeXt, several layers": ("test_convnext", 32, {}),
    "ByobNet": ("test_byobnet", 32, {}),
    "NFNet": ("test_nfnet", 32, {}),
    "MobileNetV3, conv_head": ("mobilenetv3_small_050", 32, {}),
    "LCNet": ("lcnet_035", 32, {}),
    "DeiT, distilled": ("deit_tiny_distilled_patch16_224", 32, SMALL_VIT),
    "LeViT, distilled": ("levit_128s", 64, {"embed_dim": (16, 16, 16), "num_heads": (1, 1, 1), "depth": (1, 1, 1)}),
    "MobileViT": ("mobilevit_xxs", 32, {}),
    "convolution": ("resnetv2_18", 32, {"layers": (1, 1, 1, 1), "width_factor": 0.25}),
    "MambaOut, two layers": ("test_mambaout", 32, {}),
    "ConvNeXt, a hidden layer": ("test_convnext", 32, {"head_hidden_size": 8}),
}


def spec(name: str, classes: list[str], image_size: int = 32, **options: Any) -> ModelSpec:
    return ModelSpec(name, classes, image_size, **options)


def logits_layers(model: nn.Module, num_classes: int) -> list[nn.Module]:
    return [model.get_submodule(name) for name in output_layers(model, head_names(model), num_classes)]


def first_losses(model: nn.Module, num_classes: int, image_size: int) -> list[float]:
    """Return the first loss relative to that of uniform logits: plain, mixed and smoothed, multi-label."""
    images = torch.randn(4, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)) * 2
    labels = torch.arange(4) % num_classes
    mixed = 0.6 * nn.functional.one_hot(labels, num_classes) + 0.4 * nn.functional.one_hot(labels.flip(0), num_classes)
    weights = torch.linspace(0.5, 1.5, num_classes)
    losses = [
        (ClassificationLoss(), labels),
        (ClassificationLoss(label_smoothing=0.1, class_weights=weights), mixed),
        (ClassificationLoss(multi_label=True, label_smoothing=0.1), mixed.round()),
    ]
    with torch.no_grad():
        logits = model.train()(images)
    uniform = [loss_of_uniform_logits(loss, logits, targets) for loss, targets in losses]
    assert float(uniform[0] or 0) == pytest.approx(math.log(num_classes))
    assert float(uniform[2] or 0) == pytest.approx(math.log(2))
    return [float(loss(logits, targets) / (base or 0)) for (loss, targets), base in zip(losses, uniform, strict=True)]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_first_loss_of_a_new_head_is_that_of_uniform_logits(family: str, tmp_path: Path) -> None:
    name, size, args = FAMILIES[family]
    seven = build_model(spec(name, SEVEN, size, args=args))
    for norm in (m for m in seven.modules() if isinstance(m, nn.LayerNorm | nn.BatchNorm2d) and m.weight is not None):
        nn.init.constant_(norm.weight, 2.0)  # features as large as those of trained models
    save_weights(seven, tmp_path)
    messages: list[str] = []
    file = str(tmp_path / "model.safetensors")
    model = build_model(spec(name, FIVE, size, args=args), file, note=messages.append)
    heads = len(logits_layers(model, 5))
    assert heads == (2 if "distilled" in family else 1)
    theirs, ours = seven.state_dict(), model.state_dict()
    changed = [key for key in ours if ours[key].shape != theirs[key].shape or not torch.equal(ours[key], theirs[key])]
    assert len(changed) <= 2 * heads  # weight and bias: everything else is loaded
    assert all(ours[key].shape[0] == 5 for key in changed)
    assert f"{len(changed)} of {len(ours)} tensors" in messages[0]
    assert changed[0] in messages[0]
    assert "has a head for 7 classes, the dataset has 5 classes" in messages[0]
    assert "model.head=keep" not in messages[0]  # its shape would not fit
    assert first_losses(model, 5, size) == pytest.approx([1.0] * 3, rel=0.2)


def transformers_models(folder: Path) -> list[str]:
    from transformers import SwiftFormerConfig, SwiftFormerForImageClassification, ViTConfig, ViTForImageClassification

    torch.manual_seed(0)
    vit = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        id2label=dict(enumerate(SEVEN)), label2id={name: i for i, name in enumerate(SEVEN)},
    )  # fmt: skip
    ViTForImageClassification(vit).save_pretrained(folder / "vit")
    swift = SwiftFormerConfig(depths=[1, 1, 1, 1], embed_dims=[8, 8, 16, 16], image_size=64, num_labels=7)
    SwiftFormerForImageClassification(swift).save_pretrained(folder / "swift")
    return [f"transformers:{folder / name}" for name in ("vit", "swift")]


@pytest.fixture(scope="module")
def hub_models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return transformers' names of a tiny ViT with named classes, and a SwiftFormer with heads of other names."""
    return transformers_models(tmp_path_factory.mktemp("transformers"))


def test_new_heads_of_transformers_start_at_zero_and_are_listed(hub_models: list[str]) -> None:
    for name, size, heads in zip(hub_models, (32, 64), (["classifier"], ["head", "dist_head"]), strict=True):
        assert head_names(build_model(spec(name, FIVE, size))) == [f"model.{head}" for head in heads]
        folder = name.removeprefix("transformers:")
        for pretrained in (True, folder, f"{folder}/model.safetensors"):
            messages: list[str] = []
            model = build_model(spec(name, FIVE, size), pretrained, note=messages.append)
            assert first_losses(model, 5, size) == pytest.approx([1.0] * 3, rel=0.2)
            assert all(f"{head}.weight, {head}.bias" in messages[0] for head in heads)


def test_from_scratch_the_head_keeps_its_librarys_initialisation(hub_models: list[str]) -> None:
    for name in ("test_efficientnet", hub_models[0]):
        (layer,) = logits_layers(build_model(spec(name, FIVE)), 5)
        assert layer.weight.std() > 0


def saved(folder: Path, classes: list[str], name: str = "test_efficientnet") -> tuple[str, torch.Tensor]:
    """Return a model folder of these classes and its head's weight."""
    model_spec = spec(name, classes)
    model = build_model(model_spec)
    save_model(model, model_spec, folder)
    (layer,) = logits_layers(model, len(classes))
    return str(folder), layer.weight.detach().clone()


def head_of(model: nn.Module, num_classes: int) -> torch.Tensor:
    (layer,) = logits_layers(model, num_classes)
    return layer.weight.detach()


def test_a_head_is_kept_for_the_same_class_names_in_any_order(tmp_path: Path, hub_models: list[str]) -> None:
    """From a model folder, a single file in it, a folder of timm, and published models of timm and transformers."""
    folder, weight = saved(tmp_path / "model", FIVE)
    (tmp_path / "model" / "hf_fasttrain.json").unlink()  # also in timm's config.json
    sources: list[tuple[str, bool | str]] = [
        ("test_efficientnet", folder),
        ("test_efficientnet", f"{folder}/model.safetensors"),
        (folder, True),
    ]
    for name, pretrained in sources:
        messages: list[str] = []
        assert torch.equal(head_of(build_model(spec(name, FIVE), pretrained, note=messages.append), 5), weight)
        assert messages[0].startswith("model.head: kept, because")
        turned = build_model(spec(name, FIVE[::-1]), pretrained, note=messages.append)
        assert torch.equal(head_of(turned, 5), weight.flip(0))
        assert "its rows are reordered" in messages[1]
    theirs = load_file(Path(hub_models[0].removeprefix("transformers:")) / "model.safetensors")["classifier.weight"]
    kept = head_of(build_model(spec(hub_models[0], SEVEN[::-1]), True), 7)
    assert torch.equal(kept, theirs.flip(0))


def test_class_names_with_other_spellings_match(tmp_path: Path) -> None:
    folder, weight = saved(tmp_path / "model", ["Rose", "lily", "007"])
    messages: list[str] = []
    model = build_model(spec("test_efficientnet", ["7", "lily", "rose"]), folder, note=messages.append)
    assert torch.equal(head_of(model, 3), weight.flip(0))
    assert "the same class names, written differently ('7' is '007', 'rose' is 'Rose'), in another order" in messages[0]
    messages.clear()
    build_model(spec("test_efficientnet", ["rose", "lily", "Rose"]), folder, note=messages.append)
    assert "is for other classes" in messages[0]  # two names that would be the same


def test_weights_of_another_model_are_refused_with_its_name(tmp_path: Path) -> None:
    folder, _ = saved(tmp_path / "model", FIVE)
    messages = r"weights of another model: \d+ tensors missing \(.*\), \d+ tensors unknown .* \(these are of test_eff"
    with pytest.raises(ModelError, match=messages):
        build_model(spec("test_resnet", FIVE), folder)


def test_the_same_number_of_classes_with_other_names_gets_a_new_head(tmp_path: Path, hub_models: list[str]) -> None:
    folder, _ = saved(tmp_path / "model", FIVE)
    for name, pretrained, others in (
        ("test_efficientnet", folder, ["v", "w", "x", "y", "q"]),
        (folder, True, ["v", "w", "x", "y", "q"]),
        (hub_models[0], True, list("1234567")),
    ):
        messages: list[str] = []
        model = build_model(spec(name, others), pretrained, note=messages.append)
        assert not head_of(model, len(others)).any()
        assert "is for other classes" in messages[0]


def test_keep_and_new_override_auto(tmp_path: Path) -> None:
    folder, weight = saved(tmp_path / "model", FIVE)
    others, messages = ["1", "2", "3", "4", "5"], list[str]()
    for name, pretrained in (("test_efficientnet", folder), (folder, True)):
        kept = build_model(spec(name, others), pretrained, head="keep", note=messages.append)
        assert torch.equal(head_of(kept, 5), weight)
        assert messages[-1].startswith("model.head=keep: kept, though")
        assert "output 0 now means '1'" in messages[-1]
        assert not head_of(build_model(spec(name, FIVE), pretrained, head="new", note=messages.append), 5).any()
        assert "since model.head=new" in messages[-1]
        with pytest.raises(ModelError, match=r"model.head=keep: .* has a head .* classes.*, the dataset has 3 classes"):
            build_model(spec(name, others[:3]), pretrained, head="keep")


def test_a_finished_run_is_loaded_with_its_head(tmp_path: Path, hub_models: list[str]) -> None:
    for number, name in enumerate(("test_efficientnet", hub_models[0])):
        model_spec = spec(name, FIVE)
        model = build_model(model_spec)
        save_model(model, model_spec, tmp_path / str(number))
        reloaded = load_model(tmp_path / str(number))[0]
        assert head_of(reloaded, 5).any()
        assert torch.equal(head_of(reloaded, 5), head_of(model, 5))


def test_transformers_position_embeddings_are_resized_and_other_shapes_refused(hub_models: list[str]) -> None:
    vit, messages = hub_models[0], list[str]()
    table = "model.vit.embeddings.position_embeddings"
    before = build_model(spec(vit, SEVEN), True).state_dict()[table]
    model = build_model(spec(vit, SEVEN, 64, args={"image_size": 64}), True, note=messages.append)
    after = model.state_dict()[table]
    assert after.shape == (1, 65, 16)
    assert torch.equal(after[:, 0], before[:, 0])  # the class token's
    assert (after[:, 1:].mean(1) - before[:, 1:].mean(1)).abs().max() < 0.01
    assert "position_embeddings is resized from 17 to 65 positions" in messages[0]
    from_file = build_model(spec(vit, SEVEN, 64), vit.removeprefix("transformers:"))
    assert torch.equal(from_file.state_dict()[table], after)
    with pytest.raises(ModelError, match=r"weights of another model: 3 tensors of other shape"):
        build_model(spec(vit, SEVEN, args={"intermediate_size": 24}), True)


def test_weights_missing_in_a_published_model_are_reported(hub_models: list[str], tmp_path: Path) -> None:
    """A model of transformers may lack its last norm and head, which are initialised, but not its body."""
    from safetensors.torch import save_file

    folder = Path(hub_models[0].removeprefix("transformers:"))
    weights = load_file(folder / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    left = {
        name: value for name, value in weights.items() if "layernorm.weight" not in name and "classifier" not in name
    }
    save_file(left, tmp_path / "model.safetensors", metadata={"format": "pt"})
    messages: list[str] = []
    model = build_model(spec(f"transformers:{tmp_path}", SEVEN), True, note=messages.append)
    assert not head_of(model, 7).any()
    assert "has no head, the dataset has 7 classes" in messages[0]
    assert "vit.layernorm.weight) are not in" in messages[1]
    save_file({"vit.layernorm.bias": weights["vit.layernorm.bias"]}, tmp_path / "model.safetensors")
    with pytest.raises(ModelError, match=r"weights of another model: .* are not in them"):
        build_model(spec(f"transformers:{tmp_path}", SEVEN), True)


def test_class_names_are_read_as_each_library_writes_them() -> None:
    assert names_in({"id2label": {"1": "b", "0": "a"}}) == ["a", "b"]
    assert names_in({"pretrained_cfg": {"label_names": ["a", "b"]}}) == ["a", "b"]
    assert names_in({"learnt": {"class_names": ["a", "b"]}}) == ["a", "b"]
    assert names_in({"id2label": {"0": "LABEL_0", "1": "LABEL_1"}}) is None
    assert names_in({"num_classes": 1000, "label_names": None}) is None


def notes_of(run: Path) -> list[str]:
    return list(json.loads((run / "result.json").read_text())["notes"])


def test_a_run_reports_its_head_and_resumes_with_it(
    write_recipe: Callable[..., Path], tmp_path: Path, image_folder: Path
) -> None:
    """From other classes: new; from a checkpoint of the same classes: kept; without weights the key has no effect."""
    digits, photos = tmp_path / "digits", tmp_path / "photos_run"
    build_trainer(write_recipe(), [f"output_dir={digits}", "model.head=new"]).fit()
    assert "model.head has no effect with model.pretrained=false" in notes_of(digits)
    start = [f"output_dir={photos}", f"model.pretrained={digits}", f"data.dataset={image_folder}"]
    build_trainer(write_recipe(), start).fit()
    assert any("is for 10 classes, the dataset has 3" in note for note in notes_of(photos))
    resumed = build_trainer(write_recipe(), start, resume=True)  # its head is the checkpoint's
    assert not any(note.startswith("model.head") for note in resumed.log.notes)
    restarted = build_trainer(write_recipe(), [*start, f"output_dir={tmp_path / 'restarted'}"], resume=True)
    assert any("is for 10 classes" in note for note in restarted.log.notes)  # nothing to resume: it starts from it
    (checkpoint,) = (digits / "checkpoints").glob("step_*")
    trainer = build_trainer(write_recipe(), [f"output_dir={tmp_path / 'again'}", f"model.pretrained={checkpoint}"])
    assert torch.equal(trainer.raw_model.fc.weight, load_file(checkpoint / "model.safetensors")["fc.weight"])
    assert any("has the same class names" in note for note in trainer.log.notes)


def test_a_first_loss_of_three_times_that_of_uniform_logits_is_reported(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """A head with large weights, as timm initialises it for few classes, gets a note; a usual one does not."""
    messages: list[list[str]] = []
    for factor in (400.0, 1.0):
        trainer = build_trainer(write_recipe(), [f"output_dir={tmp_path / str(factor)}", "train.duration=1 steps"])
        with torch.no_grad():
            trainer.raw_model.fc.weight.mul_(factor)
        trainer.fit()
        messages.append([note for note in notes_of(tmp_path / str(factor)) if note.startswith("the first loss is")])
    assert len(messages[0]) == 1
    assert "times that of uniform logits (2.3)" in messages[0][0]
    assert messages[1] == []


def test_the_note_on_a_high_first_loss() -> None:
    assert first_loss_note(2.0, 0.69) is None
    assert "the first loss is 15.2, 22 times" in str(first_loss_note(15.2, 0.69))
    assert first_loss_note(math.nan, 0.69) is None
    assert loss_of_uniform_logits(lambda logits, _: logits.sum(), torch.ones(1, 2), torch.ones(1)) is None


assert timm.__version__
