"""Out of memory in a forward, a step, the first update and an evaluation; and how much memory is used."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from gpu_kit import (
    Wide,
    allocated,
    allow,
    distance,
    fail_above,
    flat,
    make,
    peak_of,
    scaled_trainer,
    user_trainer,
    weights_of,
    wide_batches,
)
from torch import Tensor, nn

from hf_fasttrain import Trainer
from hf_fasttrain.data.loading.loader import Step
from hf_fasttrain.from_recipe import cache_plan
from hf_fasttrain.utils.environment import peak_memory_bytes

HALVED = [{"step": 1, "before": 64, "after": 32}]


def test_t06_a_step_that_overflows_is_skipped(device: torch.device) -> None:
    """One overflow reduces the scale from far too large to a usual value."""
    large, small = (2.0**60, 2.0**-50) if device.type == "cuda" else (2.0**127, 2.0**-117)
    trainer = scaled_trainer(device, large, small)
    before = flat(weights_of(trainer.raw_model))
    result = trainer.fit()
    assert (result.steps, result.skipped_steps, trainer.state.updates) == (4, 1, 3)
    assert distance(flat(weights_of(trainer.raw_model)), before) > 0


def test_t06_out_of_memory_in_the_first_forward(device: torch.device) -> None:
    trainer = scaled_trainer(device, 2.0**10, 0.5)
    calls: list[int] = []

    def hook(module: nn.Module, args: tuple[Tensor]) -> None:
        if module.training and not calls:
            calls.append(len(args[0]))
            torch.empty(2**50, dtype=torch.uint8, device=device)

    trainer.step.accumulation.freeze_unused = lambda step: []  # type: ignore[method-assign]  # it makes a forward of its own
    trainer.raw_model.register_forward_pre_hook(hook)
    result = trainer.fit()
    assert result.out_of_memory == [{"step": 1, "before": 16, "after": 8}]
    assert result.skipped_steps == 0
    other = scaled_trainer(device, 2.0**10, 0.5, accumulation_steps=2)
    other.fit()
    assert distance(flat(weights_of(trainer.raw_model)), flat(weights_of(other.raw_model))) < 1e-3


def test_t07_micro_batches_that_do_not_fit_are_halved(
    device: torch.device, record_property: Callable[..., None]
) -> None:
    """Three runs differ only in memory; the first measures the need of 64 images, the second that of 32."""
    batches = wide_batches(3)

    def trained(
        accumulation: int, more_bytes: int | None = None, max_images: int | None = None
    ) -> tuple[Any, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = Wide(512 if device.type == "cuda" else 8)
        before = allocated(device)
        trainer = user_trainer(device, model, batches, accumulation_steps=accumulation, duration="3 steps")
        if more_bytes is not None:
            allow(device, more_bytes)
        if max_images is not None and device.type == "cpu":
            fail_above(model, max_images)
        result = trainer.fit()
        allow(device, None)
        used.append(allocated(device) - before)
        return result, weights_of(model)

    used: list[int] = []
    full_peak, half_peak = peak_of(device, lambda: trained(1)), peak_of(device, lambda: trained(2))
    result, reference = trained(2)
    assert result.out_of_memory == []
    result, short = trained(1, (full_peak + half_peak) // 2, max_images=32)
    record_property("bytes", {"64 images": full_peak, "32 images": half_peak, "kept": used})
    assert result.out_of_memory == HALVED
    assert used[3] == pytest.approx(used[2], rel=0.01), "memory is not given back"
    assert any("running_var" in name for name in reference)
    assert all(distance(short[name].double(), reference[name].double()) < 1e-5 for name in reference), "other weights"


class Lifted(Trainer):
    """Has enough memory once it has run out."""

    def _make_smaller(self, step: Step, what: str, agreed: bool) -> Step:
        allow(self.device, None)
        return super()._make_smaller(step, what, agreed)


def test_t08_a_first_update_that_runs_out_of_memory_is_retried(device: torch.device) -> None:
    """Adam allocates two averages of each weight; only the first fits."""
    width = 8192 if device.type == "cuda" else 16
    batches = wide_batches(2)

    def trained(accumulation: int, *, short: bool) -> tuple[Any, dict[str, Tensor]]:
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.AvgPool2d(16), nn.Flatten(), nn.Linear(12, width), nn.Linear(width, width), nn.Linear(width, 10)
        )
        options: dict[str, Any] = {"kind": Lifted, "name": "AdamW", "accumulation_steps": accumulation}
        trainer = user_trainer(device, model, batches, duration="2 steps", **options)
        step, calls = trainer.step.optimizer.step, list[int]()

        def raise_error() -> None:
            calls.append(1)
            if short and len(calls) == 1:
                if device.type == "cuda":
                    allow(device, int(1.5 * 4 * width * width))
                else:
                    step()
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            step()

        trainer.step.optimizer.step = raise_error  # type: ignore[method-assign]
        return trainer.fit(), weights_of(model)

    result, short = trained(1, short=True)
    assert result.out_of_memory == HALVED
    _, reference = trained(2, short=False)
    assert distance(flat(short), flat(reference)) < 1e-5, "other weights"


def test_t09_evaluation_continues_with_smaller_batches(device: torch.device) -> None:
    torch.manual_seed(0)
    model = Wide(512 if device.type == "cuda" else 8)
    batches = wide_batches(3)
    options: dict[str, Any] = {"eval_loader": batches, "num_classes": 10, "duration": "1 steps"}
    trainer = user_trainer(device, model, batches, **options)
    expected: dict[str, float] = {}
    full_peak = peak_of(device, lambda: expected.update(trainer.evaluate()))
    assert trainer.evaluation.evaluator is not None
    assert trainer.evaluation.evaluator.max_images is None
    allow(device, int(0.75 * full_peak))
    if device.type == "cpu":
        fail_above(model, 32)
    metrics = trainer.evaluate()
    assert trainer.evaluation.evaluator.max_images == 32
    assert metrics == pytest.approx(expected, rel=1e-5)


@pytest.mark.needs_gpu
def test_t21_the_peak_is_the_memory_used_on_the_gpu(device: torch.device, record_property: Callable[..., None]) -> None:
    free, total = torch.cuda.mem_get_info(device)
    model = Wide(512)
    trainer = user_trainer(device, model, wide_batches(2), duration="2 steps")
    result = trainer.fit()
    assert result.peak_memory_bytes == peak_memory_bytes(trainer.device)
    lost = total - torch.cuda.mem_get_info(device)[0]  # all processes', and this one's context
    record_property("bytes", {"before": total - free, "lost": lost, "peak": result.peak_memory_bytes})
    assert abs(lost - result.peak_memory_bytes) < 1.5e9, "the peak is another"


def test_t21_images_are_cached_on_the_gpu_up_to_their_budget(
    device: torch.device, run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The digits need 5 MB."""

    def cache_kind(share: float) -> str:
        monkeypatch.setattr(cache_plan, "DEVICE_SHARE", share)
        trainer = make(
            run.with_name(f"share-{share}"), "data.cache=auto", "augment.crop=padded", "train.duration=9 epochs"
        )
        kind = type(trainer.train_loader.prefetcher).__name__
        return "device" if kind == "DevicePrefetcher" else "memory"

    default_share = cache_plan.DEVICE_SHARE
    assert 0.01 <= default_share <= 0.1
    assert cache_kind(default_share) == ("device" if device.type == "cuda" else "memory")
    assert cache_kind(1e-6) == "memory", "the share is not heeded"
