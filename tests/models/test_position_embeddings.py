"""Position embeddings of transformers' models for images of another size: resized once, or in each forward pass."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers

from hf_fasttrain import Trainer
from hf_fasttrain.models.model import ModelSpec, build_model, require_logits
from hf_fasttrain.utils.errors import ModelError

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 2}
SIZES = {"patch_size": 8, "image_size": 32}
TEXT = {**SMALL, "vocab_size": 9, "bos_token_id": 1, "eos_token_id": 2}
NAMES = {"id2label": {0: "a", 1: "b", 2: "c"}, "label2id": {"a": 0, "b": 1, "c": 2}}
CONFIGS: dict[str, tuple[dict[str, Any], str, int]] = {  # options, name of the embedding, tokens in it besides patches
    "ViT": ({**SMALL, **SIZES}, "vit.embeddings.position_embeddings", 1),
    "Siglip": (
        {"vision_config": {**SMALL, **SIZES}, "text_config": TEXT},
        "vision_model.embeddings.position_embedding.weight",
        0,
    ),
}


def published(family: str, folder: Path) -> Any:
    """Save a model with random weights, as it would be published; return it."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(**CONFIGS[family][0], **NAMES)
    model = getattr(transformers, f"{family}ForImageClassification")(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    return model.eval()


def spec_of(folder: Path, image_size: int) -> ModelSpec:
    return ModelSpec(f"transformers:{folder}", ["a", "b", "c"], image_size)


@pytest.mark.parametrize("size", [48, 24])
@pytest.mark.parametrize("family", CONFIGS)
def test_published_positions_are_resized_once_to_the_image_size(family: str, size: int, tmp_path: Path) -> None:
    plain, notes = published(family, tmp_path), list[str]()
    _, name, tokens = CONFIGS[family]
    model: Any = build_model(spec_of(tmp_path, size), pretrained=True, note=notes.append)
    table = plain.get_parameter(name).detach().reshape(-1, 16)
    grid = table[tokens:].T.reshape(1, 16, 4, 4)
    resized = F.interpolate(grid, (size // 8, size // 8), mode="bicubic", antialias=True).reshape(16, -1).T
    expected = torch.cat([table[:tokens], resized])
    torch.testing.assert_close(model.model.get_parameter(name).detach().reshape(-1, 16), expected)
    assert any(f"{name} is resized from {16 + tokens} to {len(expected)} positions" in note for note in notes)
    config = copy.deepcopy(plain.config)
    getattr(config, "vision_config", config).image_size = size
    other = type(plain)(config).eval()
    shape = other.get_parameter(name).shape
    other.load_state_dict({**plain.state_dict(), name: expected.reshape(shape)})
    images = torch.randn(2, 3, size, size)
    torch.testing.assert_close(model.eval()(images), other(pixel_values=images).logits)


@pytest.mark.parametrize("family", CONFIGS)
def test_images_of_another_size_are_seen_with_interpolated_positions(family: str, tmp_path: Path) -> None:
    plain = published(family, tmp_path)
    model: Any = build_model(spec_of(tmp_path, 32), pretrained=True).eval()
    for size in (16, 32, 48):
        images = torch.randn(2, 3, size, size)
        expected = plain(pixel_values=images, interpolate_pos_encoding=size != 32).logits
        torch.testing.assert_close(model(images), expected, rtol=0, atol=0)
    model(images).sum().backward()
    assert model.model.get_parameter(CONFIGS[family][1]).grad.abs().sum() > 0


def test_a_vit_is_trained_at_a_smaller_size_than_it_is_evaluated_at(
    image_folder: Path, tmp_path: Path, write_recipe: Callable[..., Path]
) -> None:
    published("ViT", tmp_path / "vit")
    recipe = write_recipe(
        f"model: {{name: 'transformers:{tmp_path / 'vit'}', pretrained: true}}\n"
        f"data: {{dataset: {image_folder}, image_size: 32, train_size: 24, workers: 0}}\n"
        "train: {duration: 2 steps, batch_size: 8}\noptimizer: {layer_decay: 0.7}\nlog: {report: false}\n"
    )
    trainer = Trainer.from_recipe(recipe, [f"output_dir={tmp_path / 'run'}"])
    assert {step.image_shape for step in trainer.train_loader.steps(0, 2)} == {(3, 24, 24)}
    before = trainer.raw_model.get_parameter("model.vit.embeddings.position_embeddings").detach().clone()
    trainer.fit()
    after = trainer.raw_model.get_parameter("model.vit.embeddings.position_embeddings")
    assert not torch.equal(before, after)
    assert json.loads((tmp_path / "run" / "model" / "config.json").read_text())["image_size"] == 32


def test_the_message_on_a_fixed_size_says_how_other_sizes_are_taken() -> None:
    spec = ModelSpec("vit_tiny_patch16_224", ["a", "b"], 32, args={"depth": 1})
    message = r"can't take 48 px .* change data\.train_size or model\.args: {dynamic_img_size: true} lets it take"
    with pytest.raises(ModelError, match=message):
        require_logits(build_model(spec), ModelSpec(spec.name, spec.class_names, 48), "data.train_size")
