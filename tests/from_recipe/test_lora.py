"""LoRA in a recipe: what leaves the run is an ordinary model, and a run resumes bitwise."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from helpers.callbacks import stop_before
from helpers.processes import reset_accelerate, run_processes
from helpers.runs import RECIPE, exit_status, weights
from safetensors.torch import load_file
from torch import Tensor

from hf_fasttrain import Trainer
from hf_fasttrain.inference import evaluate_run
from hf_fasttrain.models.lora import merged_state
from hf_fasttrain.models.model import ModelSpec, build_model
from hf_fasttrain.models.saved import load_model, save_model
from hf_fasttrain.run_folder.checkpoint import checkpoint_path

SMALL = ["model.name=test_vit", "data.eval_fraction=0.05", "augment.mixup=0.5", "log.every=1", "train.duration=5 steps"]
SMALL += ["checkpoint.every=2 steps", "optimizer.lr=0.01", "lora={rank: 4, dropout: 0.1}", "ema={decay: 0.5}"]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the weights of a ViT and a ResNet for the digits."""
    folder = tmp_path_factory.mktemp("pretrained")
    for name in ("test_vit", "test_resnet"):
        torch.manual_seed(2)
        spec = ModelSpec(name, [str(digit) for digit in range(10)], 32)
        save_model(build_model(spec), spec, folder / name)
    return folder


def make(recipe: Path, pretrained: Path, run: Path, *overrides: str, **options: Any) -> Trainer:
    reset_accelerate()
    names = [text.removeprefix("model.name=") for text in [*SMALL, *overrides] if text.startswith("model.name=")]
    start = f"model.pretrained={pretrained / names[-1]}"
    return Trainer.from_recipe(recipe, [*SMALL, start, f"output_dir={run}", *overrides], **options)


@pytest.fixture(scope="module")
def finished(pretrained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Trainer, Path]:
    """Return the trainer of a finished run and its folder, which no test may change."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "small.yaml").write_text(RECIPE)
    trainer = make(folder / "small.yaml", pretrained, folder / "run")
    trainer.fit()
    return trainer, folder / "run"


def test_everything_that_a_run_leaves_is_the_ordinary_model(
    finished: tuple[Trainer, Path], pretrained: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    (trainer, run), images = finished, torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        expected = trainer.trained_model.eval()(images)
        averaged = load_model(run / "model")[0](images)
        plain = timm.create_model(f"local-dir:{run / 'model'}", pretrained=True).eval()(images)
    torch.testing.assert_close(averaged, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain, expected, rtol=1e-5, atol=1e-5)
    assert weights(run).keys() == weights_of(pretrained / "test_vit").keys()
    newest = checkpoint_path(run / "checkpoints", 5)
    saved = load_file(newest / "model.safetensors")
    assert all(torch.equal(saved[name], value) for name, value in merged_state(trainer.raw_model).items())
    assert all(torch.equal(value, weights(run)[name]) for name, value in load_file(newest / "ema.safetensors").items())
    frozen = load_file(newest / "model_lora.safetensors")["blocks.0.attn.qkv.base_layer.weight"]
    assert torch.equal(frozen, weights_of(pretrained / "test_vit")["blocks.0.attn.qkv.weight"])
    measured = evaluate_run(run, weights="step_4"), evaluate_run(run)
    assert [metrics["step"] for metrics in measured] == [4, 5]
    assert measured[1]["loss"] == pytest.approx((trainer.state.metrics or {})["loss"], rel=1e-5)
    again = make(write_recipe(), pretrained, tmp_path / "again", "lora=null", f"model.pretrained={newest}")
    assert torch.equal(again.raw_model.state_dict()["blocks.0.attn.qkv.weight"], saved["blocks.0.attn.qkv.weight"])


def weights_of(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_run_resumes_bitwise(
    finished: tuple[Trainer, Path], pretrained: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    whole, run = finished
    stop_before(make(write_recipe(), pretrained, tmp_path / "cut"), 3)
    trainer = make(write_recipe(), pretrained, tmp_path / "cut", resume=True)
    assert trainer.state.step == 2
    trainer.fit()
    for name, value in weights(run).items():
        assert torch.equal(weights(tmp_path / "cut")[name], value), name
    for name, value in whole.raw_model.state_dict().items():
        assert torch.equal(trainer.raw_model.state_dict()[name], value), name


def test_a_run_of_the_users_model_resumes(pretrained: Path, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    def start(resume: bool) -> Trainer:
        model = timm.create_model(f"local-dir:{pretrained / 'test_vit'}", pretrained=True)
        return make(write_recipe(), pretrained, tmp_path / "run", model=model, resume=resume)

    stop_before(start(resume=False), 3)
    trainer = start(resume=True)
    assert trainer.state.step == 2
    assert trainer.fit().steps == 5
    assert weights(tmp_path / "run").keys() == weights_of(pretrained / "test_vit").keys()


def fit(recipe: str, pretrained: str, run: str, *overrides: str) -> None:
    make(Path(recipe), Path(pretrained), Path(run), *overrides).fit()


def test_micro_batches_in_two_processes_train_the_same_and_frozen_batch_norms_do_not_change(
    pretrained: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    options = ["model.name=test_resnet", "lora={rank: 4}", "optimizer.name=sgd", "train.duration=2 steps"]
    options += ["model.head=new", "ema=null"]  # whose logits are zero at first
    fit(str(write_recipe()), str(pretrained), str(tmp_path / "whole"), *options)
    split = [*options, "accelerate.micro_batch_size=6"]
    run_processes(fit, str(write_recipe()), str(pretrained), str(tmp_path / "two"), *split)
    trained, before = weights(tmp_path / "whole"), weights_of(pretrained / "test_resnet")
    for name, value in weights(tmp_path / "two").items():
        torch.testing.assert_close(value, trained[name], rtol=1e-5, atol=2e-6)
    assert all(torch.equal(value, trained[name]) for name, value in before.items() if "running" in name)
    changed = {name for name, value in before.items() if not torch.equal(value, trained[name])}
    assert {"fc.weight", "fc.bias"} < changed
    assert all(trained[name].ndim == 4 for name in changed - {"fc.weight", "fc.bias"})
    assert "layers; with the head" in (tmp_path / "whole/resolved.yaml").read_text()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("lora=4", "write 'lora={rank: 4}'"),
        ("lora=true", "lora would adapt random weights; set model.pretrained to weights to start from"),
        ("lora={rank: 0}", "lora.rank is 0; must be at least 1"),
    ],
)
def test_mistakes_are_one_message(
    override: str, message: str, write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_status(["check", str(write_recipe(RECIPE)), override]) == 2
    assert message in capsys.readouterr().err
