"""Schedules against torch's own."""

from __future__ import annotations

import math

import pytest
import torch

from hf_fasttrain.schedule import Schedule, build_schedule


def schedule(name: str, warmup_steps: int = 0, **options: float) -> Schedule:
    defaults = {"min_lr_ratio": 0.0, "gamma": 0.1, "every_steps": 10}
    return build_schedule(name, num_steps=50, warmup_steps=warmup_steps, **(defaults | options))  # type: ignore[arg-type]


def torchs(make: object, steps: int = 50) -> list[float]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    scheduler = make(optimizer)  # type: ignore[operator]
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_onecycle_is_torchs() -> None:
    expected = torchs(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=50))
    assert [schedule("onecycle")(i) for i in range(50)] == pytest.approx(expected)


def test_cosine_is_torchs() -> None:
    expected = torchs(lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 50))
    assert [schedule("cosine")(i) for i in range(50)] == pytest.approx(expected, abs=1e-9)


def test_step_is_torchs() -> None:
    expected = torchs(lambda o: torch.optim.lr_scheduler.StepLR(o, 10, 0.1))
    assert [schedule("step")(i) for i in range(50)] == pytest.approx(expected)


def test_exponential_is_torchs_at_whole_periods() -> None:
    expected = torchs(lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.1 ** (1 / 10)))
    assert [schedule("exponential")(i) for i in range(50)] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["cosine", "exponential", "step", "constant"])
def test_warmup_rises_to_one(name: str) -> None:
    values = [schedule(name, warmup_steps=5)(i) for i in range(6)]
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_cosine_ends_at_its_minimum() -> None:
    values = [schedule("cosine", min_lr_ratio=0.1)(i) for i in range(51)]
    assert values[50] == pytest.approx(0.1)
    assert all(math.isfinite(v) for v in values)
