"""The forecast of training's memory, which on a CPU determines the micro-batch size."""

from __future__ import annotations

import ctypes
import os
import random
from collections.abc import Callable
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from helpers.processes import in_child, run_processes
from helpers.runs import exit_status
from torch import nn

from hf_fasttrain import load_recipe
from hf_fasttrain.from_recipe import memory
from hf_fasttrain.from_recipe.accelerator import local_processes
from hf_fasttrain.from_recipe.auto import evaluation_batch_size
from hf_fasttrain.from_recipe.parts import Parts, build_parts
from hf_fasttrain.from_recipe.trainer import build_trainer_without_folder
from hf_fasttrain.models.layers import freeze_untrained
from hf_fasttrain.models.memory_forecast import (
    Activations,
    Forecast,
    equal_micro_batch_size,
    evaluation_bytes,
    images_that_fill_cpu,
    measure_activations,
)
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.train.optim import state_share
from hf_fasttrain.train.out_of_memory import free_cached_memory
from hf_fasttrain.utils import control_groups
from hf_fasttrain.utils.environment import free_memory_bytes, resident_bytes
from hf_fasttrain.utils.train_phases import TrainPhases

CPU = torch.device("cpu")
GB = 10**9


def measured(model: nn.Module, size: int = 32, **options: Any) -> Activations:
    return measure_activations(model, size, 3, device=CPU, **{"autocast": nullcontext, **options})


def bf16() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


def test_saved_tensors_are_counted_once_and_without_parameters() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 1000), nn.ReLU(), nn.Linear(1000, 3))
    forecast = measured(model, size=8)
    assert forecast.fixed == 0
    # The images, the rectified activations, which two operations save, log-probabilities and targets of the loss.
    assert forecast.per_image == pytest.approx(4 * (192 + 1000 + 3 + 3), abs=8)
    assert forecast.workspace_per_image == pytest.approx(2 * 4 * (1000 + 1000))


def test_copies_of_weights_do_not_grow_with_the_images() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(192, 1000), nn.ReLU(), nn.Linear(1000, 3))
    forecast = measured(model, size=8, autocast=bf16)
    assert forecast.fixed == 2 * 3 * 1000  # the second layer's, for the gradient of its input
    assert forecast.per_image == pytest.approx(2 * (192 + 1000), rel=0.05)


def test_a_forecast_changes_nothing() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=3, drop_path_rate=0.5).eval()
    model.compile(backend=lambda graph, inputs: pytest.fail("it was compiled"))
    before, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    model.layer1.train()
    assert measured(model).per_image > 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)
    assert [model.training, model.layer1.training, model.layer2.training] == [False, True, False]
    assert all(parameter.grad is None for parameter in model.parameters())


class Leaving(nn.Module):
    """Replaces a buffer, counts its calls and draws from every source of random numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.calls = nn.Conv2d(3, 3, 3), 0
        self.register_buffer("seen", torch.zeros(1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        self.calls, self.seen = self.calls + 1, self.seen + 1
        assert random.random() + np.random.rand() < 2
        return self.conv(images).mean((2, 3))


def test_a_measured_forward_has_no_side_effects() -> None:
    model = Leaving()
    states = random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]
    assert measured(model).per_image > 0
    assert (model.calls, float(model.seen)) == (0, 0.0)
    assert (random.getstate(), np.random.get_state()[1].tolist(), np.random.get_state()[2]) == states


def test_frozen_and_checkpointed_models_save_fewer_activations() -> None:
    plain, frozen, checkpointed = (timm.create_model("test_vit", num_classes=3, img_size=32) for _ in range(3))
    freeze_untrained(frozen, TrainPhases.parse("head"))
    checkpointed.set_grad_checkpointing(True)
    kept = measured(plain)
    assert measured(frozen).per_image < kept.per_image / 20
    assert measured(frozen).workspace_per_image == kept.workspace_per_image
    assert measured(checkpointed).per_image < kept.per_image / 2
    assert measured(checkpointed).workspace_per_image > 2 * kept.workspace_per_image  # one layer is recomputed


@pytest.mark.parametrize(
    ("name", "share"), [("sgd", 1), ("adamw", 2), ("lion", 1), ("adafactor", 0.01), ("adahessian", 2)]
)
def test_an_optimizers_state_is_known_before_it_is_allocated(name: str, share: float) -> None:
    assert state_share(name, momentum=0.9, args={}) == pytest.approx(share, abs=0.01)
    assert state_share("momentum", momentum=0.0, args={}) == 0


class Wide(nn.Module):
    """Saves 1 MB of activations per 16 px image in each layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.layers = nn.Linear(3, 3), nn.Sequential(*(nn.Sigmoid() for _ in range(12)))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        wide = self.head(images[:, :, 0, 0]).repeat(1, 87_000)
        return self.layers(wide).view(len(images), 3, -1).mean(2)


def leave_a_grown_heap() -> torch.Tensor:
    """Grow the heap by 200 MB of free memory, as earlier work does; keep the returned tensor alive."""
    with suppress(AttributeError, OSError):  # glibc's M_MMAP_THRESHOLD: blocks below 32 MB are in the heap
        ctypes.CDLL(None).mallopt(-3, 32 << 20)
    *blocks, last = [torch.ones(5 << 20) for _ in range(11)]  # the last one is above the others
    del blocks
    return last


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc")
def test_free_heap_memory_is_not_counted(write_recipe: Callable[..., Path]) -> None:
    def grown() -> tuple[int, int]:
        sizes = [resident_in_forecast(load_recipe(write_recipe())), resident_bytes()]
        last = leave_a_grown_heap()
        kept = resident_bytes() - sizes[1]
        counted = resident_in_forecast(load_recipe(write_recipe())) - sizes[0]
        return kept, counted - last.nbytes

    kept, counted = in_child(grown)
    assert kept > 150 * 10**6
    assert counted < 50 * 10**6


def resident_in_forecast(recipe: Recipe) -> int:
    forecast = build_parts(recipe).forecast
    assert forecast is not None
    return forecast.resident


def peak_and_forecast() -> tuple[int, int]:
    kept = leave_a_grown_heap()
    model = Wide().train()
    activations = measured(model, size=16)
    free_cached_memory(CPU)  # otherwise training would partly reuse existing memory, which is not counted as growth
    forecast = Forecast(resident_bytes(), 0, 0, 0, 0, activations, 0, 0)
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    loss = model(torch.randn(8, 3, 16, 16)).sum()
    loss.backward()
    lines = Path("/proc/self/status").read_text().splitlines()
    peak = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    assert len(kept)
    return peak - forecast.resident, forecast.additional(8)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's account of memory")
def test_a_process_uses_the_forecast_memory() -> None:
    peak, forecast = in_child(peak_and_forecast)
    assert peak > 50e6
    assert forecast == pytest.approx(peak, rel=0.25)


@pytest.mark.parametrize(
    ("images", "largest", "size"),
    [(256, 64, 64), (256, 38, 32), (250, 64, 50), (254, 64, 64), (100, 64, 50), (7, 4, 4), (255, 64, 64), (6, 2, 2),
     (2, 2, 2), (1, 2, 2), (10, 100, 10), (96, 34, 32)],
)  # fmt: skip
def test_a_batch_is_split_into_the_fewest_equal_even_micro_batches(images: int, largest: int, size: int) -> None:
    assert equal_micro_batch_size(images, largest) == size


def test_a_micro_batch_has_as_many_pixels_at_any_image_size() -> None:
    assert [images_that_fill_cpu(size) for size in (224, 112, 448, 1024, 4096, 32)] == [64, 256, 16, 4, 2, 3136]


@pytest.fixture
def parts_with(write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> Callable[..., Parts]:
    """Return a function that builds a recipe's parts on a machine with the given free memory."""

    def build(free: int, *overrides: str) -> Parts:
        monkeypatch.setattr(memory, "free_memory_bytes", lambda: free)
        loaded = load_recipe(write_recipe(), ["train.batch_size=256", "accelerate.mixed_precision=no", *overrides])
        return build_parts(loaded)

    return build


def least(parts: Parts, images: int) -> int:
    assert parts.forecast is not None
    return parts.forecast.needed(images)


def test_auto_uses_the_fewest_micro_batches_that_fit_half_of_the_free_memory(parts_with: Callable[..., Parts]) -> None:
    unlimited = parts_with(1000 * GB)
    assert unlimited.sampling_plan.micro_batch_size == 256
    assert not [note for note in unlimited.settings.notes if "micro_batch" in note]
    free = 2 * least(unlimited, 70)
    parts = parts_with(free)
    assert parts.sampling_plan.micro_batch_size == 64
    assert least(parts, 64) <= free // 2 < least(parts, 128)
    assert parts.accelerator.gradient_accumulation_steps == 4
    fact = parts.settings.all()["accelerate.micro_batch_size"]
    assert "the fewest equal parts of 256 images of at most" in fact.origin
    assert "half of the " in fact.origin
    (note,) = [note for note in parts.settings.notes if "micro_batch" in note]
    assert note.startswith("accelerate.micro_batch_size=auto: a step's 256 images are split into micro-batches of 64")
    assert "batch norm computes its statistics over 64 images" in note
    assert parts.settings.all()["memory_forecast_bytes"].value == parts.forecast.peak(64)  # type: ignore[union-attr]


def test_the_forecast_uses_the_training_image_size(parts_with: Callable[..., Parts]) -> None:
    forecasts = [parts_with(1000 * GB, "data.image_size=64", "data.train_size=32"), parts_with(1000 * GB)]
    for name in ("activations", "batch_per_image"):
        smaller, plain = (getattr(parts.forecast, name) for parts in forecasts)
        assert smaller == plain


def test_auto_uses_no_more_than_a_cpu_can_use(
    parts_with: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "images_that_fill_cpu", lambda size: 66)
    parts = parts_with(1000 * GB, "model.name=test_vit")
    assert parts.sampling_plan.micro_batch_size == 64
    assert not [
        note for note in parts.settings.notes if "micro_batch" in note
    ]  # no batch norm: the note would not matter
    smaller = parts_with(1000 * GB, "model.name=test_vit", "data.eval_fraction=0.96")  # 71 images are less than a step
    assert smaller.sampling_plan.micro_batch_size == 36


def test_a_set_micro_batch_is_kept_with_a_note_if_memory_is_short(parts_with: Callable[..., Parts]) -> None:
    for override, size in (("accelerate.micro_batch_size=128", 128), ("accelerate.gradient_accumulation_steps=1", 256)):
        parts = parts_with(1 << 20, override)
        assert parts.sampling_plan.micro_batch_size == size
        (note,) = [note for note in parts.settings.notes if "micro_batch" in note]
        assert note.startswith(f"accelerate.micro_batch_size={size}: training will take about ")
        assert "1.05 MB are free" in note
        assert not [note for note in parts_with(1000 * GB, override).settings.notes if "micro_batch" in note]


def batch_size_without_training(model: nn.Module, micro_batch_size: int) -> int:
    """Return the evaluation batch size without training."""
    needed = memory.evaluation_memory(model, 32, CPU)
    return int(evaluation_batch_size(micro_batch_size=micro_batch_size, **needed).value)


def test_evaluation_uses_the_same_forecast(parts_with: Callable[..., Parts], monkeypatch: pytest.MonkeyPatch) -> None:
    parts = parts_with(1000 * GB, "model.name=test_vit", "train.batch_size=8")
    build_trainer_without_folder(parts, keep_pixels=False)
    assert parts.settings.all()["evaluate.batch_size"].value == 32
    per_image = evaluation_bytes(parts.model, 32, CPU)
    state = least(parts, 0) - parts.forecast.activations.fixed  # type: ignore[union-attr]
    parts = parts_with(2 * (state + 10 * per_image), "model.name=test_vit", "train.batch_size=8")
    build_trainer_without_folder(parts, keep_pixels=False)
    assert 2 <= parts.settings.all()["evaluate.batch_size"].value <= 10
    assert "as many as fit into half of the free memory" in parts.settings.all()["evaluate.batch_size"].origin
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: 20 * per_image)
    assert 1 <= batch_size_without_training(parts.model, 64) <= 10
    monkeypatch.setattr(memory, "free_memory_bytes", lambda: GB)
    assert batch_size_without_training(parts.model, 64) == 64


def sizes(recipe: str) -> tuple[int, int]:
    rank = os.environ["RANK"]
    memory.free_memory_bytes = lambda: (1000 if rank == "0" else 1) * GB // 4
    parts = build_parts(load_recipe(recipe, ["train.batch_size=1024", "data.image_size=64"]))
    return parts.sampling_plan.micro_batch_size, local_processes()


def test_processes_share_the_memory_and_split_alike(write_recipe: Callable[..., Path]) -> None:
    first, second = run_processes(sizes, str(write_recipe()))
    assert first == second
    assert first[0] < 512
    assert first[1] == 2


def test_check_prints_the_forecast(write_recipe: Callable[..., Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["check", str(write_recipe()), "ema={decay: 0.9}"]) == 0
    printed = capsys.readouterr().out
    for part in ("memory of a training process", "weights and buffers", "gradients", "state of the optimizer",
                 "moving average", "activations kept for backward, 16", "total", "free now"):  # fmt: skip
        assert part in printed


def test_pixels_are_not_cached_in_memory_that_training_needs(parts_with: Callable[..., Parts], tmp_path: Path) -> None:
    from hf_fasttrain.from_recipe.cache_plan import CachePlanner

    parts = parts_with(1000 * GB)
    single, beside = (CachePlanner(parts.recipe, parts.settings, parts.accelerator, needed) for needed in (0, 4 * GB))
    assert single._budget("memory", tmp_path) - beside._budget("memory", tmp_path) == pytest.approx(
        2 * GB, abs=0.5 * GB
    )


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("memory_", "memory.")).write_text(f"{text}\n")


def test_control_groups_limit_what_is_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_groups, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(control_groups, "PROCESS_CGROUPS", tmp_path / "own")
    everything = free_memory_bytes()
    assert everything > 0
    (tmp_path / "own").write_text("4:memory:/job/part\n3:cpu:/\n0::/\n")
    stat = "cache 9\ntotal_inactive_file 300000\ntotal_active_file 200000\n"
    group(tmp_path / "memory" / "job" / "part", memory_limit_in_bytes=2**62, memory_usage_in_bytes=1000000)
    assert free_memory_bytes() > everything // 2
    group(tmp_path / "memory" / "job", memory_limit_in_bytes=9000000, memory_usage_in_bytes=1000000, memory_stat=stat)
    assert free_memory_bytes() == 8000000 + 300000 + 100000  # cached files can be dropped
    (tmp_path / "own").write_text("0::/job\n")
    group(tmp_path / "job", memory_max="max", memory_high="max", memory_current=1000000)
    assert free_memory_bytes() > everything // 2
    group(tmp_path / "job", memory_max=9000000, memory_stat="inactive_file 300000\nanon 5\n")
    assert free_memory_bytes() == 8300000
    group(tmp_path / "job", memory_high=6000000)
    assert free_memory_bytes() == 5300000
    group(tmp_path / "job", memory_current=7000000)
    assert free_memory_bytes() == 0
