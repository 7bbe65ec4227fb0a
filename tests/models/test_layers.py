"""Layers of models: numbers for layer-wise learning rates, and parts that are trained."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import timm
import transformers
from timm.models import group_parameters
from torch import nn

from hf_fasttrain.models.layers import layer_numbers, trained_names
from hf_fasttrain.models.transformers_model import TransformersClassifier
from hf_fasttrain.train.optim import build_param_groups
from hf_fasttrain.utils.errors import ModelError
from hf_fasttrain.utils.train_phases import TrainedPart

SMALL = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "num_labels": 5}
STAGES = {"hidden_sizes": [8, 8], "depths": [1, 2], "num_labels": 5}
CONFIGS: dict[str, tuple[dict[str, Any], int]] = {  # a family of transformers -> options, number of blocks
    "ViT": ({**SMALL, "num_hidden_layers": 3}, 3),
    "Beit": ({**SMALL, "num_hidden_layers": 3}, 3),
    "Dinov2": ({**SMALL, "num_hidden_layers": 3}, 3),
    "Swin": ({"embed_dim": 8, "depths": [1, 2], "num_heads": [2, 2], "num_labels": 5}, 3),
    "ConvNext": ({**STAGES, "num_stages": 2}, 3),
    "ResNet": ({**STAGES, "embedding_size": 8}, 3),
    "RegNet": ({**STAGES, "embedding_size": 8, "groups_width": 4}, 3),
}


def of_transformers(family: str) -> TransformersClassifier:
    config = getattr(transformers, f"{family}Config")(**CONFIGS[family][0])
    return TransformersClassifier(getattr(transformers, f"{family}ForImageClassification")(config))


@pytest.mark.parametrize("family", CONFIGS)
def test_layers_of_transformers_go_from_embeddings_to_head(family: str) -> None:
    model = of_transformers(family)
    numbers = layer_numbers(model, "key")
    blocks = CONFIGS[family][1]
    assert list(numbers) == [name for name, _ in model.named_parameters()]
    assert list(numbers.values()) == sorted(numbers.values())
    assert {*numbers.values()} == {*range(blocks + 2)}
    assert {number for name, number in numbers.items() if "embed" in name.split(".")[2]} == {0}
    assert {number for name, number in numbers.items() if name.startswith("model.classifier.")} == {blocks + 1}


def kinds(numbers: Mapping[str, float], model: nn.Module) -> list[tuple[float, int]]:
    """Return each number with the elements of the parameters that have it."""
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters()}
    return [(each, sum(sizes[n] for n, number in numbers.items() if number == each)) for each in {*numbers.values()}]


def test_layer_decay_of_a_vit_is_timms() -> None:
    """timm's has one matrix for query, key and value."""
    ours = of_transformers("ViT")
    theirs = timm.create_model("vit_tiny_patch16_224", embed_dim=16, depth=3, num_heads=2, mlp_ratio=2, num_classes=5)
    scales = []
    for model in (ours, theirs):
        groups = build_param_groups(model, lr=1.0, weight_decay=0.0, layer_decay=0.5)
        scale_of = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
        scales.append({name: scale_of[id(p)] for name, p in model.named_parameters()})
    assert sorted(kinds(scales[0], ours)) == sorted(kinds(scales[1], theirs))
    assert {*scales[0].values()} == {1, 0.5, 0.25, 0.125, 0.0625}


def test_layers_of_timm_are_timms() -> None:
    model = timm.create_model("test_efficientnet")
    assert layer_numbers(model, "key") == group_parameters(model, model.group_matcher(), reverse=True)


def names_of(model: nn.Module, part: str) -> set[str]:
    return trained_names(model, TrainedPart.parse(part))


def test_the_parts_of_a_model() -> None:
    model = timm.create_model("test_vit", num_classes=5)
    head = {"head.weight", "head.bias"}
    every = {name for name, _ in model.named_parameters()}
    assert names_of(model, "head") == head
    assert names_of(model, "norm") == head | {name for name in every if "norm" in name}
    last = ("blocks.4", "blocks.5", "norm", "head")
    assert names_of(model, "last 2 blocks") == {name for name in every if name.startswith(last)}
    assert names_of(model, "last 6 blocks") == {n for n in every if n.startswith(("blocks.", "norm", "head"))}
    assert names_of(model, "all") == every
    model.patch_embed.requires_grad_(False)
    assert names_of(model, "all") == {name for name in every if not name.startswith("patch_embed")}
    inner = {name.removeprefix("model.") for name in names_of(of_transformers("Swin"), "last 1 block")}
    assert {name.split(".")[1:4][-1] for name in inner if "encoder" in name} == {"1"}
    assert {name.split(".")[0] for name in inner} == {"swin", "classifier"}


@pytest.mark.parametrize(
    ("model", "part", "message"),
    [
        (lambda: of_transformers("ViT"), "last 4 blocks", "last 4 blocks: the model has 3 blocks; give at most 3, or"),
        (lambda: Headed(nn.Linear(4, 4)), "norm", "model.train=norm: Headed has no norm layers; use head, all or last"),
        (lambda: Headed(nn.Linear(4, 4)), "last 1 block", "needs a model of timm or transformers; Headed does not"),
        (lambda: nn.Sequential(nn.Flatten()), "head", "model.train=head: the head of Sequential was not found"),
    ],
)
def test_a_part_that_a_model_lacks_is_one_message(model: Any, part: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        names_of(model(), part)


class Headed(nn.Module):
    """A body and a head."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.body, self.head, self.num_classes = body, nn.Linear(4, 5), 5
