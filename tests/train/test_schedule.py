"""Schedules against torch's own."""

from __future__ import annotations

import math

import pytest
import torch

from hf_fasttrain.train.schedule import Schedule, build_schedule, resolve_warmup
from hf_fasttrain.utils.duration import Duration


def schedule(name: str, warmup_steps: int | None = None, **options: float) -> Schedule:
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


@pytest.mark.parametrize("name", ["cosine", "onecycle", "exponential", "step", "constant"])
def test_a_warmup_of_0_is_none_for_every_schedule(name: str) -> None:
    assert schedule(name, warmup_steps=0)(0) == pytest.approx(1.0)
    assert schedule(name, warmup_steps=10)(0) < 0.2


def test_onecycle_with_another_rise_is_torchs() -> None:
    expected = torchs(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=50, pct_start=0.1))
    assert [schedule("onecycle", warmup_steps=5)(i) for i in range(50)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("asked", "name", "steps"),
    [
        ("auto", "cosine", 0),
        ("auto", "onecycle", 60),
        (0, "onecycle", 0),
        ("0", "cosine", 0),
        ("5%", "cosine", 10),
        ("12.5 %", "onecycle", 25),
        ("0.1%", "cosine", 1),
        ("7 steps", "cosine", 7),
        ("1 epoch", "cosine", 50),
    ],
)
def test_a_warmup_is_a_share_steps_epochs_or_the_schedules_own(asked: object, name: str, steps: int) -> None:
    part = asked if asked == "auto" else Duration.parse_part(asked)
    found = resolve_warmup(part, name, num_steps=200, steps_per_epoch=50)  # type: ignore[arg-type]
    assert (found.steps, found.note) == (steps, None)


@pytest.mark.parametrize("asked", ["4 epochs", "200 steps", "999 steps"])
def test_a_warmup_that_does_not_fit_is_cut_and_said(asked: str) -> None:
    found = resolve_warmup(Duration.parse(asked), "cosine", num_steps=200, steps_per_epoch=50)
    assert found.steps == 20
    assert found.note is not None
    assert f"schedule.warmup={asked} is" in found.note
    assert "cut to 10% of it, 20 steps; to choose another: schedule.warmup=5%, or 0" in found.note


@pytest.mark.parametrize("wrong", ["100%", "-1%", "5", 5, True, None, "a while", "10 minutes"])
def test_other_warmups_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match="must be"):
        Duration.parse_part(wrong)
