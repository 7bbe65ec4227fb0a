"""Clipping by value and adaptive clipping, compared with timm's in a plain loop."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import reset_accelerate, run_processes
from timm.utils.agc import adaptive_clip_grad
from timm.utils.clip_grad import dispatch_clip_grad
from torch import Tensor, nn

from hf_fasttrain import Trainer
from hf_fasttrain.train.clipping import clip_adaptively, clip_by_value
from hf_fasttrain.train.log import RunLog

LIMITS = {"value": 0.02, "agc": 0.03}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(16, 3))


def batches() -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(12, 3, 4, 4, generator=generator), torch.arange(12) % 3) for _ in range(4)]


def train(mode: str, accumulation: int) -> tuple[dict[str, Tensor], float]:
    """Return the weights and the last step's gradient norm after training by Trainer on this process's share."""
    model = make_model()
    share = slice(int(os.environ.get("RANK", 0)), None, int(os.environ.get("WORLD_SIZE", 1)))
    trainer = Trainer(
        model,
        [(images[share], labels[share]) for images, labels in batches()],
        torch.optim.SGD(model.parameters(), lr=0.5),
        accumulation_steps=accumulation,
        log=RunLog(show=False),
    )
    clip = (
        clip_by_value(LIMITS[mode]) if mode == "value" else clip_adaptively(LIMITS[mode], list(model[-1].parameters()))
    )
    trainer.step.updater.clip = clip
    trainer.fit()
    assert trainer.step.grad_norm is not None
    return {name: value.detach() for name, value in model.state_dict().items()}, float(trainer.step.grad_norm)


def reference(mode: str) -> tuple[dict[str, Tensor], float]:
    """Return the same of a plain loop; timm's AGC skips the last layer."""
    model, norm = make_model(), torch.zeros(())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for images, labels in batches():
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(images), labels).backward()
        norm = torch.nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
        parameters = list(model.parameters())
        dispatch_clip_grad(parameters[:-2] if mode == "agc" else parameters, LIMITS[mode], mode=mode)
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}, float(norm)


@pytest.mark.parametrize("mode", LIMITS)
@pytest.mark.parametrize("accumulation", [1, 3])
def test_clipping_is_timms_with_and_without_accumulation(mode: str, accumulation: int) -> None:
    reset_accelerate()
    (weights, norm), (expected, expected_norm) = train(mode, accumulation), reference(mode)
    for name, value in expected.items():
        torch.testing.assert_close(weights[name], value)
    assert norm == pytest.approx(expected_norm, rel=1e-4)  # before the clipping


def test_two_processes_clip_as_one() -> None:
    expected, _ = reference("agc")
    for weights, _ in run_processes(train, "agc", 1):
        for name, value in expected.items():
            torch.testing.assert_close(weights[name], value)


@pytest.mark.parametrize(("key", "limit"), [("clip_value", 1e-3), ("clip_agc", 1e-2)])
def test_a_recipe_clips_and_agc_skips_the_head(
    key: str, limit: float, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    trainer = Trainer.from_recipe(write_recipe(), [f"optimizer.{key}={limit}", f"output_dir={tmp_path / 'run'}"])
    step = next(iter(trainer.train_loader.steps(0, 1)))
    trainer.step.gradients(step)
    parameters = dict(trainer.raw_model.named_parameters())
    before: dict[str, Any] = {name: p.grad.clone() for name, p in parameters.items() if p.grad is not None}
    clip = trainer.step.updater.clip
    assert clip is not None
    clip(trainer.step.parameters)
    if key == "clip_value":
        expected = {name: grad.clamp(-limit, limit) for name, grad in before.items()}
    else:
        copies = {name: nn.Parameter(p.detach().clone()) for name, p in parameters.items()}
        for name, copy in copies.items():
            copy.grad = before[name].clone()
        adaptive_clip_grad([copy for name, copy in copies.items() if not name.startswith("fc.")], limit)
        expected = {name: copy.grad for name, copy in copies.items() if copy.grad is not None}
    changed = set()
    for name, value in expected.items():
        assert torch.equal(parameters[name].grad, value)  # type: ignore[arg-type]
        changed |= {name} if not torch.equal(value, before[name]) else set()
    assert changed
    assert ("fc.weight" in changed) == (key == "clip_value")
