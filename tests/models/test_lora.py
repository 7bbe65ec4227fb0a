"""Adapters: which layers get them, and the ordinary model that they are merged into."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
import timm
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hf_fasttrain.models.lora import (
    ADAPTER,
    adapted_layers,
    adapter_state,
    add_adapters,
    load_merged,
    merged_model,
    merged_state,
    require_peft,
)
from hf_fasttrain.models.model import head_names, use_gradient_checkpointing
from hf_fasttrain.models.transformers_model import TransformersClassifier
from hf_fasttrain.utils.errors import ModelError, RunError

VIT = {"embed_dim": 32, "depth": 1, "num_heads": 2, "img_size": 32, "patch_size": 8}
SWIN = {"embed_dim": 16, "depths": (1, 1), "num_heads": (2, 2), "img_size": 32, "window_size": 4}
ARGS = {"test_vit": {"img_size": 32}, "test_resnet": {"zero_init_last": False}}  # else conv2 has no effect
CONVNEXT = {"depths": (1, 1, 1, 1), "dims": (8, 16, 16, 16)}


def transformers_vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    return TransformersClassifier(
        ViTForImageClassification(ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=5))
    )


def build(name: str, **args: Any) -> nn.Module:
    torch.manual_seed(0)
    return transformers_vit() if name == "transformers" else timm.create_model(name, num_classes=5, **args)


def adapted(name: str = "test_vit", targets: list[str] | None = None, rank: int = 4, **args: Any) -> nn.Module:
    """Return a model with adapters that are not zero."""
    model = build(name, **ARGS.get(name, args))
    add_adapters(model, head_names(model), 32, rank=rank, alpha=8.0, dropout=0.5, targets=targets)
    for parameter_name, parameter in model.named_parameters():
        if "lora_B" in parameter_name:
            nn.init.normal_(parameter, std=0.5)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "args", "expected"),
    [
        ("test_vit", {}, {"qkv", "proj"}),
        ("transformers", {}, {"q_proj", "k_proj", "v_proj", "o_proj"}),
        ("beit_base_patch16_224", VIT, {"proj"}),  # forward reads the weights of qkv
        ("swinv2_tiny_window8_256", SWIN, {"proj"}),
        ("swin_tiny_patch4_window7_224", SWIN, {"qkv", "proj"}),
        ("convnext_atto", CONVNEXT, {"fc1", "fc2"}),
        ("test_efficientnet", {}, {"conv_pw", "conv_pwl"}),
        ("resnet50", {"layers": (1, 1, 1, 1)}, {"conv1", "conv3", "0"}),
    ],
)
def test_layers_are_chosen_by_the_architecture(name: str, args: dict[str, Any], expected: set[str]) -> None:
    model = adapted(name, **args)
    names = {layer.rpartition(".")[2] for layer in adapted_layers(model)}
    assert expected <= names <= expected | {"conv_reduce", "conv_expand", "conv", "conv_head", "fc"}
    trained = {parameter for parameter, value in model.named_parameters() if value.requires_grad}
    assert all(ADAPTER in parameter or parameter.startswith(tuple(head_names(model))) for parameter in trained)
    assert any(parameter.startswith(tuple(head_names(model))) for parameter in trained)


@pytest.mark.parametrize(
    ("name", "targets"),
    [("test_vit", None), ("test_vit", ["attn.qkv", "mlp.fc1"]), ("test_resnet", None), ("test_resnet", ["conv2"])],
)
def test_the_ordinary_model_gives_the_same_logits(name: str, targets: list[str] | None) -> None:
    model, images = adapted(name, targets), torch.randn(2, 3, 32, 32)
    ordinary, plain = merged_model(model).eval(), build(name, **ARGS[name])
    assert ordinary.state_dict().keys() == plain.state_dict().keys() == merged_state(model).keys()
    assert [type(module) for module in ordinary.modules()] == [type(module) for module in plain.modules()]
    with torch.no_grad():
        torch.testing.assert_close(ordinary(images), model(images), rtol=1e-5, atol=1e-5)
        assert (plain.eval()(images) - model(images)).abs().max() > 1e-4
    assert adapted_layers(model)  # still there


def test_the_merged_state_and_the_adapters_restore_a_model_bitwise() -> None:
    model = adapted()
    other = adapted()
    for parameter in other.parameters():
        nn.init.zeros_(parameter)
    load_merged(other, merged_state(model), adapter_state(model))
    for name, value in model.state_dict().items():
        assert torch.equal(other.state_dict()[name], value), name


@pytest.mark.filterwarnings("error::FutureWarning")
@pytest.mark.parametrize("name", ["test_vit", "transformers"])
def test_adapters_learn_with_gradient_checkpointing(name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(name)
        if checkpointing:
            use_gradient_checkpointing(model)
        model.train()
        torch.manual_seed(1)
        model(torch.ones(2, 3, 32, 32)).square().sum().backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    assert all(isinstance(gradient, Tensor) and gradient.abs().sum() > 0 for gradient in gradients[1].values())
    for parameter, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][parameter], gradient)


def test_adapters_that_a_model_of_the_user_has_are_left_alone() -> None:
    model = get_peft_model(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), LoraConfig(target_modules=["0"], r=2))
    assert merged_model(model) is model
    assert merged_state(model).keys() == model.state_dict().keys()
    assert adapter_state(model) == {}


class OwnLora(nn.Module):
    """A layer with a matrix of the same name."""

    def __init__(self) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.zeros(2, 2))


def test_a_matrix_of_the_same_name_is_no_adapter() -> None:
    assert merged_state(OwnLora()).keys() == {"lora_A"}


@pytest.mark.parametrize(
    ("name", "targets", "message"),
    [
        ("test_vit", ["qvk"], r"'qvk' is no layer of the model. Did you mean 'qkv'\? Allowed are auto, .*proj, qkv"),
        ("test_vit", ["head"], "'head' is the head, which is trained as a whole"),
        ("test_vit", ["norm1"], r"'norm1' can't be adapted \(blocks.0.norm1\)"),
        ("beit_base_patch16_224", ["qkv"], r"'qkv' can't be adapted \(blocks.0.attn.qkv\)"),
    ],
)
def test_other_targets_are_one_message(name: str, targets: list[str], message: str) -> None:
    with pytest.raises(ModelError, match=message):
        adapted(name, targets, **(VIT if name.startswith("beit") else {}))


def test_a_rank_above_every_layer_is_one_message() -> None:
    with pytest.raises(ModelError, match="ResNet has no layers to adapt with rank 5000"):
        adapted("test_resnet", rank=5000)


def test_peft_is_named_if_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RunError, match=r"lora needs peft: pip install 'hf_fasttrain\[lora\]'"):
        require_peft()
