"""What a stranger's description of a model may ask for: no code from elsewhere, no size without bound."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from hf_fasttrain.models.limits import building, limited_size, require_plain_args, require_plain_config
from hf_fasttrain.models.model import ModelSpec, Preprocessing, build_model
from hf_fasttrain.models.saved import load_model, save_model
from hf_fasttrain.models.weights import read_weights
from hf_fasttrain.utils.errors import ModelError

FETCHED: list[dict[str, Any]] = [
    {"attn_implementation": "somebody/kernel"},
    {"_attn_implementation": "kernels-community/flash-attn"},
    {"_attn_implementation_internal": "somebody/kernel@v1:attention"},
    {"attn_implementation": {"": "sdpa", "vision_config": "somebody/kernel"}},
    {"backbone_config": {"attn_implementation": "somebody/kernel"}},
    {"parts": [{"attn_implementation": "paged|somebody/kernel"}]},
    {"attn_implementation": "flash_attention_4"},
    {"attn_implementation": ["somebody/kernel"]},
    {"experts_implementation": "sonicmoe"},
    {"quantization_config": {"quant_method": "mxfp4"}},
    {"use_kernels": True},
    {"model_args": {"checkpoint_path": "/etc/passwd"}},
    {"backbone_kwargs": {"pretrained": True}},
]
OWN: list[dict[str, Any]] = [
    {}, {"attn_implementation": None}, {"attn_implementation": "sdpa"}, {"_attn_implementation": "eager"},
    {"experts_implementation": "grouped_mm"}, {"quantization_config": None}, {"model_args": {"drop_rate": 0.1}},
    {"id2label": {"0": "a/b"}, "hidden_size": 768, "architectures": ["ViTForImageClassification"]},
]  # fmt: skip


@pytest.mark.parametrize("config", FETCHED, ids=str)
def test_code_that_a_configuration_names_is_fetched_only_if_it_is_trusted(config: dict[str, Any]) -> None:
    with pytest.raises(ModelError, match=r"names code that would be downloaded and run .*trust_remote_code: true"):
        require_plain_config(config, "somebody/vit", trusted=False)
    require_plain_config(config, "somebody/vit", trusted=True)


@pytest.mark.parametrize("config", OWN, ids=str)
def test_what_transformers_has_itself_needs_no_trust(config: dict[str, Any]) -> None:
    require_plain_config(config, "somebody/vit", trusted=False)


def test_arguments_that_load_files_are_refused_even_if_code_is_trusted() -> None:
    for trusted in (False, True):
        with pytest.raises(ModelError, match=r"model\.args: checkpoint_path would load something other than"):
            require_plain_args({"checkpoint_path": "x"}, trusted=trusted)
    with pytest.raises(ModelError, match=r"model\.args: depth is 1000000000; allowed are numbers up to 2,000,000"):
        require_plain_args({"depth": 10**9}, trusted=False)
    with pytest.raises(ModelError, match=r"config\.json: a\.b is"):
        require_plain_config({"a": [{"b": 10**400}]}, "x", trusted=False)


def test_a_model_that_grows_beyond_its_weights_is_stopped(tmp_path: Path) -> None:
    save_model(nn.Linear(2, 2), ModelSpec("own:x", ["a", "b"], 8, preprocessing=Preprocessing(8)), tmp_path)
    files = [tmp_path / "model.safetensors"]
    with pytest.raises(ModelError, match="it has more than 1,004 tensors"), limited_size("it", files):
        nn.ModuleList(nn.Linear(1, 1) for _ in range(10**7))
    with pytest.raises(ModelError, match="it takes more than 53"), limited_size("it", files):
        nn.Linear(10**5, 10**5, device="meta")
    nn.ModuleList(nn.Linear(1, 1) for _ in range(600))  # afterwards there is no limit


@pytest.mark.parametrize("error", [TypeError("a"), ZeroDivisionError(), RecursionError("b"), OverflowError("c")])
def test_whatever_building_raises_is_one_message(error: Exception) -> None:
    with pytest.raises(ModelError, match=f"the model can't be built: {type(error).__name__}"), building("the model"):
        raise error
    with pytest.raises(ModelError, match="needs more memory than is free"), building("the model"):
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("vit") / "model"
    spec = ModelSpec("test_vit", ["a", "b"], 32, preprocessing=Preprocessing(32))
    torch.manual_seed(0)
    save_model(build_model(spec), spec, folder)
    return folder


@pytest.mark.parametrize(
    "changed",
    [
        {"args": {"embed_dim": 10**8}}, {"args": {"depth": 10**5}}, {"args": {"embed_dim": -1}}, {"args": {"x": 1}},
        {"args": {"mlp_ratio": 1e308}}, {"args": {"patch_size": 0}}, {"args": {"depth": "x"}}, {"args": []},
        {"image_size": 10**6}, {"image_size": 0}, {"image_size": True}, {"class_names": []},
        {"class_names": ["a", 1]}, {"class_names": {"a": 1}}, {"class_names": ["a"] * 3}, {"name": ""}, {"name": 3},
        {"name": "no_such_model"}, {"drop_path": 2.0}, {"drop_path": float("nan")}, {"preprocessing": {}},
        {"preprocessing": {"image_size": 32, "mean": [0.5, "x", 0.5], "std": [1, 1, 1]}},
        {"preprocessing": {"image_size": 32, "mean": [0.5] * 3, "std": [0, 1, 1]}},
        {"preprocessing": {"image_size": 32, "mean": [0.5] * 3, "std": [1] * 3, "interpolation": "x"}},
        {"multi_label": "yes"}, {"small_image_stem": True}, {"unknown": 1},
    ],
    ids=str,
)  # fmt: skip
def test_a_changed_description_is_one_message(changed: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(saved, tmp_path / "model"))
    path = folder / "hf_fasttrain.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changed}))
    with pytest.raises(ModelError) as error:
        load_model(folder)
    assert len(str(error.value)) < 1500


def test_a_sound_description_is_loaded(saved: Path) -> None:
    model, spec = load_model(saved)
    assert spec.class_names == ["a", "b"]
    assert not model.training


def test_a_folder_without_an_architecture_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(ModelError, match=r"config.json names no 'architecture'; .*, or transformers:/.* for one of tr"):
        build_model(ModelSpec(str(tmp_path), ["a", "b"], 32))


def test_weights_that_are_a_fifo_are_one_message(saved: Path) -> None:
    (saved / "model.safetensors").unlink()
    os.mkfifo(saved / "model.safetensors")
    with pytest.raises(ModelError, match="can't be read as safetensors: a FIFO, not a regular file"):
        load_model(saved)
    with pytest.raises(ModelError, match="can't be read as safetensors: a FIFO, not a regular file"):
        read_weights(saved / "model.safetensors")
