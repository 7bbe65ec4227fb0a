"""Published weights in the local cache of the Hub."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import constants

from hf_fasttrain.models.cached_weights import cached_timm_models, has_published_weights, is_on_this_machine


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    return tmp_path


def add(cache: Path, repo: str, file: str) -> None:
    """Add a file of a repository to a cache."""
    folder = cache / f"models--{repo.replace('/', '--')}"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs/main").write_text("1234")
    (folder / "snapshots/1234").mkdir(parents=True)
    (folder / "snapshots/1234" / file).touch()


def test_weights_are_found_where_they_are_loaded_from(cache: Path) -> None:
    assert cached_timm_models() == []
    add(cache, "timm/resnet50.tv_in1k", "model.safetensors")
    add(cache, "timm/resnet18.a1_in1k", "pytorch_model.bin")  # the default weights
    add(cache, "timm/resnet34.a1_in1k", "config.json")
    add(cache, "timm/not_a_model.in1k", "model.safetensors")
    add(cache, "someone/vit", "model.safetensors")
    assert cached_timm_models() == ["resnet18", "resnet50.tv_in1k"]
    there = ["resnet18", "resnet50.tv_in1k", "timm/resnet50.tv_in1k", "transformers:someone/vit"]
    assert all(map(is_on_this_machine, there))
    assert not any(map(is_on_this_machine, ["resnet50", "resnet34", "transformers:someone/else", "efficientnet_lite0"]))


def test_some_models_have_no_published_weights(cache: Path) -> None:
    assert has_published_weights("resnet18")
    assert has_published_weights("transformers:someone/vit")
    assert not has_published_weights("convnextv2_small")
