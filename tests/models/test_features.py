"""Features that heads are given, and heads of given weights."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from transformers import ConvNextConfig, ConvNextForImageClassification

from hf_fasttrain.models.features import Head, LinearHead, OutputLayer, backbone_digest, constant_features
from hf_fasttrain.models.model import ModelSpec, build_model
from hf_fasttrain.utils.errors import ModelError

IMAGES = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def build(name: str, size: int = 32, **args: object) -> nn.Module:
    return build_model(ModelSpec(name, ["a", "b", "c", "d"], size, args=args)).eval()


@pytest.mark.parametrize(
    ("name", "size", "args"),
    [
        ("test_resnet", 32, {}),
        ("test_vit", 32, {}),
        ("test_efficientnet", 32, {}),
        ("deit_tiny_distilled_patch16_224", 32, {"depth": 1}),  # two heads, whose logits it averages
        ("mobilenetv4_conv_small", 64, {}),
        ("resnetv2_18d", 64, {}),  # a 1 x 1 convolution
        ("levit_128s", 64, {}),  # batch norms before both of its heads
    ],
)
def test_the_logits_are_those_of_the_head_and_its_features(name: str, size: int, args: dict[str, object]) -> None:
    torch.manual_seed(0)
    model, images = build(name, size, **args), torch.rand(3, 3, size, size)
    head = Head(model, 4)
    rng = np.random.default_rng(0)
    linear = LinearHead(*(rng.normal(size=s).astype(np.float32) for s in ((4, head.num_features), 4)))
    head.set_exactly(linear, images)
    with torch.no_grad(), head.captured() as features_of:
        logits = model(images).numpy()
        features = features_of(3).numpy()
    assert features.shape == (3, head.num_features)
    assert logits == pytest.approx(features @ linear.weight.T + linear.bias, abs=1e-4 * float(np.abs(logits).max()))


def test_a_transformers_model() -> None:
    torch.manual_seed(0)
    inner = ConvNextForImageClassification(ConvNextConfig(depths=[1] * 4, hidden_sizes=[8, 16, 24, 32], num_labels=4))
    head = Head(inner.eval(), 4)
    assert head.names == ["classifier"]
    with torch.no_grad(), head.captured() as features_of:
        logits = inner(IMAGES).logits
        expected = inner.convnext(IMAGES).pooler_output
        assert torch.equal(features_of(3), expected)
        assert torch.allclose(inner.classifier(expected), logits)


def test_what_a_failed_pass_has_left_is_forgotten() -> None:
    model = build("test_resnet")
    head = Head(model, 4)
    with torch.no_grad(), head.captured() as features_of:
        model(IMAGES[:1])
        model(IMAGES[:2])
        model(IMAGES[2:])
        both = features_of(3)
        model(IMAGES)
        assert torch.allclose(features_of(3), both, atol=1e-6)


class Scaled(nn.Module):
    """Changes the logits of its head in another way than by a factor."""

    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(3 * 32 * 32, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images.flatten(1)).tanh()


class EveryPlace(nn.Module):
    """Classifies every pixel and averages."""

    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(3, 4, 1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.head(images).mean((2, 3))


def test_heads_that_are_not_linear_are_refused() -> None:
    head = Head(Scaled(), 4)
    with pytest.raises(ModelError, match="Scaled changes the logits of its last layer"):
        head.set_exactly(LinearHead(np.ones((4, 3072), np.float32), np.zeros(4, np.float32)), IMAGES)
    head = Head(model := EveryPlace(), 4)
    with head.captured() as features_of, torch.no_grad():
        model(IMAGES)
        with pytest.raises(ModelError, match=r"the last layer of EveryPlace is given \(3, 32, 32\) of an image"):
            features_of(3)
    with pytest.raises(ModelError, match="no linear layer with 4 outputs"):
        Head(nn.Sequential(nn.Flatten(), nn.Linear(3072, 5)), 4)


def test_the_digest_is_that_of_all_weights_but_the_head() -> None:
    model = build("test_resnet")
    names, state = Head(model, 4).names, model.state_dict()
    before = backbone_digest(model, names)
    with torch.no_grad():
        state[f"{names[0]}.weight"].add_(1)
        assert backbone_digest(model, names) == before
        state[next(name for name in state if name.endswith("running_mean"))][0] += 1e-3
    assert backbone_digest(model, names) != before


def found_layer(model: nn.Module, *trained: str) -> OutputLayer | None:
    head = Head(model, 4)
    torch.manual_seed(3)
    states = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    layer = constant_features(head, trained or [f"{name}.weight" for name in head.names], IMAGES)
    assert all(torch.equal(states[name], tensor) for name, tensor in model.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert torch.initial_seed() == 3
    return layer


class Doubled(nn.Module):
    """Multiplies the logits of its last layer."""

    num_classes = 4

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(3, 4)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.fc(images.mean((2, 3))) * 2


def test_features_are_constant_if_nothing_random_or_trained_comes_before_the_last_layer() -> None:
    assert found_layer(build("test_resnet")) == OutputLayer("fc")
    assert found_layer(build("test_vit")) == OutputLayer("head")
    assert found_layer(build("test_efficientnet", drop_rate=0.3)) == OutputLayer("classifier", 0.3)
    assert found_layer(build("test_vit", drop_rate=0.25)) == OutputLayer("head", 0.25)
    assert found_layer(build("test_convnext")) == OutputLayer("head.fc")
    assert found_layer(build("test_vit", drop_path_rate=0.5)) is None
    assert found_layer(build("test_vit", proj_drop_rate=0.1)) is None
    assert found_layer(build("test_resnet"), "fc.weight", "layer4.0.conv1.weight") is None
    assert found_layer(build("deit_tiny_distilled_patch16_224", depth=1)) is None  # two heads
    zeros = Doubled()
    nn.init.zeros_(zeros.fc.weight)
    nn.init.zeros_(zeros.fc.bias)
    assert found_layer(zeros) is None


def test_batch_norms_without_weights_use_the_statistics_of_a_batch() -> None:
    model = build("test_resnet")
    model.bn1 = nn.BatchNorm2d(model.bn1.num_features, affine=False)  # type: ignore[union-attr, arg-type]
    assert found_layer(model) is None
