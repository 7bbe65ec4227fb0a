"""Schedules compared with torch's, transformers' and timm's."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.processes import reset_accelerate

from hf_fasttrain import Trainer, Watch
from hf_fasttrain.recipe.resolved import read_settings
from hf_fasttrain.train.schedule import Cosine, Schedule, build_schedule, resolve_warmup
from hf_fasttrain.utils.duration import Duration


def schedule(name: str, warmup_steps: int | None = None, **options: object) -> Schedule:
    defaults: dict[str, object] = {"min_lr_ratio": 0.0, "gamma": 0.1, "every_steps": 10}
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


def test_exponential_is_torchs_at_full_periods() -> None:
    expected = torchs(lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.1 ** (1 / 10)))
    assert [schedule("exponential")(i) for i in range(50)] == pytest.approx(expected)


@pytest.mark.parametrize("warmup_steps", [0, 1, 7])
def test_linear_is_exactly_transformers(warmup_steps: int) -> None:
    from transformers import get_linear_schedule_with_warmup

    expected = torchs(lambda o: get_linear_schedule_with_warmup(o, warmup_steps, 50), steps=51)
    assert [schedule("linear", warmup_steps)(i) for i in range(51)] == expected


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_polynomial_is_transformers_torchs_and_timms(power: float) -> None:
    from timm.scheduler import PolyLRScheduler
    from transformers import get_polynomial_decay_schedule_with_warmup

    expected = torchs(lambda o: get_polynomial_decay_schedule_with_warmup(o, 7, 50, lr_end=0.01, power=power))
    computed = schedule("polynomial", 7, min_lr_ratio=0.01, power=power)
    assert [computed(i) for i in range(50)] == pytest.approx(expected)
    plain = torchs(lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 50, power))
    assert [schedule("polynomial", 0, power=power)(i) for i in range(50)] == pytest.approx(plain)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    timms = PolyLRScheduler(optimizer, 43, power, lr_min=0.01, warmup_t=7, warmup_lr_init=0.2, warmup_prefix=True)
    computed = schedule("polynomial", 7, min_lr_ratio=0.01, power=power, start_ratio=0.2)
    assert [computed(i) for i in range(50)] == pytest.approx([timms._get_lr(i)[0] for i in range(50)])


def test_multistep_is_torchs() -> None:
    expected = torchs(lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [10, 25, 40], 0.3))
    computed = schedule("multistep", gamma=0.3, milestones=[40, 10, 25])
    assert [computed(i) for i in range(50)] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["cosine", "linear", "polynomial", "exponential", "step", "constant"])
def test_a_warmup_from_a_start_ratio_is_torchs(name: str) -> None:
    expected = torchs(lambda o: torch.optim.lr_scheduler.LinearLR(o, 0.1, total_iters=8), steps=9)
    computed = schedule(name, 8, start_ratio=0.1, every_steps=100)
    assert [computed(i) for i in range(8)] == pytest.approx(expected[:8])


def test_cosine_with_restarts_is_torchs_and_transformers() -> None:
    from transformers import get_cosine_with_hard_restarts_schedule_with_warmup

    restarts = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts
    expected = torchs(lambda o: restarts(o, 10, eta_min=0.02))
    computed = schedule("cosine", cycles=5, min_lr_ratio=0.02)
    assert [computed(i) for i in range(50)] == pytest.approx(expected)
    expected = torchs(lambda o: get_cosine_with_hard_restarts_schedule_with_warmup(o, 8, 50, 4))
    computed = schedule("cosine", 8, cycles=4, start_ratio=0.0)
    assert [computed(i) for i in range(50)] == pytest.approx(expected, abs=1e-9)


def test_each_restart_is_at_its_step_for_any_length() -> None:
    for length in range(1, 300):
        values = [Cosine(length, cycles=3)(i) for i in range(length)]
        plain = [(1 + math.cos(math.pi * (i * 3 % length) / length)) / 2 for i in range(length)]
        assert values == pytest.approx(plain)
        assert Cosine(length, cycles=3)(length) == pytest.approx(0.0)


def test_onecycle_with_other_divisors_is_torchs() -> None:
    make = torch.optim.lr_scheduler.OneCycleLR
    expected = torchs(lambda o: make(o, 1.0, total_steps=50, div_factor=5.0, final_div_factor=100.0))
    computed = schedule("onecycle", div=5.0, final_div=100.0)
    assert [computed(i) for i in range(50)] == pytest.approx(expected)


@pytest.mark.parametrize("name", ["cosine", "exponential", "step", "constant"])
def test_warmup_rises_to_one(name: str) -> None:
    values = [schedule(name, warmup_steps=5)(i) for i in range(6)]
    assert values[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_cosine_ends_at_its_minimum() -> None:
    values = [schedule("cosine", min_lr_ratio=0.1)(i) for i in range(51)]
    assert values[50] == pytest.approx(0.1)
    assert all(math.isfinite(v) for v in values)


@pytest.mark.parametrize("name", ["cosine", "onecycle", "exponential", "step", "constant"])
def test_a_warmup_of_0_means_no_warmup(name: str) -> None:
    assert schedule(name, warmup_steps=0)(0) == pytest.approx(1.0)
    assert schedule(name, warmup_steps=10)(0) < 0.2


def test_onecycle_with_another_rise_is_torchs() -> None:
    expected = torchs(lambda o: torch.optim.lr_scheduler.OneCycleLR(o, 1.0, total_steps=50, pct_start=0.1))
    assert [schedule("onecycle", warmup_steps=5)(i) for i in range(50)] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("warmup", "name", "steps"),
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
def test_a_warmup_is_a_percentage_steps_epochs_or_the_schedules_default(warmup: object, name: str, steps: int) -> None:
    part = warmup if warmup == "auto" else Duration.parse_part(warmup)
    resolved = resolve_warmup(part, name, num_steps=200, steps_per_epoch=50)  # type: ignore[arg-type]
    assert (resolved.steps, resolved.note) == (steps, None)


@pytest.mark.parametrize("warmup", ["4 epochs", "200 steps", "999 steps"])
def test_a_warmup_that_does_not_fit_is_shortened_and_reported(warmup: str) -> None:
    resolved = resolve_warmup(Duration.parse(warmup), "cosine", num_steps=200, steps_per_epoch=50)
    assert resolved.steps == 20
    assert resolved.note is not None
    assert f"schedule.warmup={warmup} is" in resolved.note
    assert "cut to 10% of it, 20 steps; to choose another: schedule.warmup=5%, or 0" in resolved.note


def test_a_recipes_keys_are_passed_to_its_schedule(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    def make(number: int, *overrides: str) -> Trainer:
        reset_accelerate()
        run = f"output_dir={tmp_path / str(number)}"
        return Trainer.from_recipe(write_recipe(), ["train.duration=2 epochs", *overrides, run])

    multistep = "schedule={name: multistep, milestones: [1 epoch, 3 steps, 2 epochs], gamma: 0.5}"
    trainer = make(0, multistep)
    assert "schedule.milestones: 2 epochs is not before the end, 204 steps: lr is not multiplied there" in (
        trainer.log.notes
    )
    assert [trainer.schedule(step) for step in (2, 3, 101, 102, 203)] == [1, 0.5, 0.5, 0.25, 0.25]
    polynomial = "schedule={name: polynomial, warmup: 4 steps, start_ratio: 0.5, power: 2, min_lr_ratio: 0.1}"
    computed = make(1, polynomial).schedule
    assert [computed(0), computed(2), computed(4), computed(104)] == pytest.approx([0.5, 0.75, 1.0, 0.325])
    computed = make(2, "schedule={name: cosine, cycles: 2, warmup: 4 steps, start_ratio: 0}").schedule
    assert [computed(0), computed(4), computed(54), computed(104)] == pytest.approx([0.0, 1.0, 0.5, 1.0])
    computed = make(3, "schedule={name: onecycle, div: 2, final_div: 5}").schedule
    assert [computed(0), computed(203)] == pytest.approx([0.5, 0.1])
    notes = make(4, "schedule={name: step, start_ratio: 0.5, cycles: 2}").log.notes
    assert "schedule.start_ratio has no effect without schedule.warmup" in notes
    trainer = make(5, "schedule={name: plateau, patience: 2 epochs, gamma: 0.5, min_lr_ratio: 0.1, min_delta: 0.01}")
    assert [trainer.schedule(step) for step in (0, 203)] == [1, 1]
    (plateau,) = trainer.callbacks.callbacks
    assert plateau.watch == Watch("loss", "min", 204, 0.01)
    assert (plateau.factor, plateau.min_lr_ratio, read_settings(tmp_path / "5")["schedule.mode"].value) == (
        0.5,
        0.1,
        "min",
    )
    assert "schedule.cycles has no effect with schedule.name=step" in notes


@pytest.mark.parametrize("wrong", ["100%", "-1%", "5", 5, True, None, "a while", "10 minutes"])
def test_invalid_warmups_are_refused(wrong: object) -> None:
    with pytest.raises(ValueError, match=r"must be|a number needs a unit"):
        Duration.parse_part(wrong)
