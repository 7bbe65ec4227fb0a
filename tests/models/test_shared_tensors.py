"""Tensors with several names are saved, loaded, averaged and exported; files have the umask's permissions."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from hf_fasttrain import Trainer
from hf_fasttrain.data.pixels.cache import open_cache
from hf_fasttrain.models.model import ModelSpec, build_model
from hf_fasttrain.models.saved import load_model, save_model
from hf_fasttrain.models.weights import load_weights, save_weights
from hf_fasttrain.train.batch_norm import running_statistics
from hf_fasttrain.train.ema import Ema
from hf_fasttrain.utils.errors import ModelError
from hf_fasttrain.utils.files import sync_files

COAT = """
model:
  name: coat_lite_tiny
  args: {serial_depths: [2, 1, 1, 1], embed_dims: [8, 16, 16, 16], mlp_ratios: [1, 1, 1, 1]}
data: {dataset: digits, image_size: 32, workers: 0}
train: {duration: 2 steps, batch_size: 8}
ema: {decay: 0.5}
log: {report: false}
"""


@pytest.fixture
def group_umask() -> Iterator[None]:
    """Make new files writable for the group: neither a library's 0600 nor the usual 0644."""
    before = os.umask(0o002)
    yield
    os.umask(before)


def modes(folder: Path) -> set[str]:
    """Return the modes of all files in a folder, and of all folders in it."""
    return {f"{'d' if path.is_dir() else 'f'}{stat.S_IMODE(path.stat().st_mode):o}" for path in folder.rglob("*")}


def test_a_model_whose_blocks_share_modules_is_trained_saved_opened_by_timm_and_resumed(
    write_recipe: Callable[..., Path], tmp_path: Path, group_umask: None
) -> None:
    """timm's CoaT registers its position encodings in several blocks."""
    run = tmp_path / "run"
    trainer = Trainer.from_recipe(write_recipe(COAT), [f"output_dir={run}"])
    trainer.fit()
    state = trainer.trained_model.state_dict()
    assert len({tensor.data_ptr() for tensor in state.values()}) < len(state)  # otherwise this test checks nothing
    opened, spec = load_model(run / "model")
    theirs = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True)
    for model in (opened, theirs, build_model(spec, str(run))):
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert modes(run) == {"f664", "d775"}
    longer = Trainer.from_recipe(write_recipe(COAT), [f"output_dir={run}", "train.duration=3 steps"], resume=True)
    assert all(torch.equal(value, state[name]) for name, value in longer.trained_model.state_dict().items())
    assert longer.fit().steps == 3


class Tied(nn.Module):
    """Two layers with one weight, one norm under two names, and a buffer that is a view of another."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.norm = self.same_norm = nn.BatchNorm1d(4)
        self.register_buffer("table", torch.arange(4.0))
        self.register_buffer("same_table", self.table.view(4))

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return self.same_norm(self.second(self.norm(self.first(values))))


def test_tensors_with_two_names_are_loaded_from_files_with_both_or_one(tmp_path: Path) -> None:
    model = Tied()
    save_weights(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    assert weights.keys() == model.state_dict().keys()
    single = {name: value for name, value in weights.items() if "same" not in name and name != "second.weight"}
    save_file(single, tmp_path / "once.safetensors")
    save_file({k: v for k, v in single.items() if k != "first.weight"}, tmp_path / "short.safetensors")
    for name in ("model", "once"):
        other = Tied()
        load_weights(other, tmp_path / f"{name}.safetensors")
        assert all(torch.equal(value, weights[key]) for key, value in other.state_dict().items())
        assert other.second.weight is other.first.weight
    with pytest.raises(ModelError, match=r"2 tensors missing \(first.weight, second.weight\)"):
        load_weights(Tied(), tmp_path / "short.safetensors")


def test_shared_tensors_are_averaged_once_an_update() -> None:
    model = Tied()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ema = Ema(model, 0.9, warmup=False)
    with torch.no_grad():
        for value in (model.first.weight, model.norm.weight, model.table):
            value.add_(1.0)
    ema.update(0)
    averaged = ema.module.state_dict()
    for name in ("first.weight", "second.weight", "norm.weight", "same_norm.weight", "table", "same_table"):
        assert torch.allclose(averaged[name], before[name] + 0.1), name


def test_running_statistics_of_a_shared_norm_are_saved_under_all_its_names() -> None:
    """A checkpoint has the processes' mean under each name, or the name loaded last would restore one process's."""
    names = {f"{norm}.running_{statistic}" for norm in ("norm", "same_norm") for statistic in ("mean", "var")}
    assert running_statistics(Tied()).keys() == names


def test_a_transformers_model_with_shared_layers_is_saved(tmp_path: Path, group_umask: None) -> None:
    from transformers import ViTConfig

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 1, "num_hidden_layers": 2}
    ViTConfig(**sizes, image_size=32, patch_size=16).save_pretrained(tmp_path / "vit")
    spec = ModelSpec(f"transformers:{tmp_path / 'vit'}", ["a", "b"], 32)
    model = build_model(spec)
    model.model.vit.layers[1] = model.model.vit.layers[0]
    (tmp_path / "saved").mkdir()
    save_model(model, spec, tmp_path / "saved")
    sync_files(tmp_path / "saved")
    reloaded, _ = load_model(tmp_path / "saved")
    assert all(torch.equal(value, reloaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert modes(tmp_path / "saved") == {"f664"}


def test_a_cache_on_disk_has_the_permissions_of_the_umask(tmp_path: Path, group_umask: None) -> None:
    open_cache(tmp_path / "pixels" / "one", 4, 1 << 20, {})
    assert modes(tmp_path / "pixels") == {"d775", "f664"}
