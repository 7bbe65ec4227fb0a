"""Training on a GPU, checked on a CPU: by arithmetic, plain objects and fake CUDA tensors."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from helpers.processes import LAUNCHER_VARIABLES, in_child, reset_accelerate, run_processes
from helpers.runs import exit_status
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hf_fasttrain import Trainer, load_recipe
from hf_fasttrain.data.loading.batch import Mixing, Normalize, augment_on_device
from hf_fasttrain.data.loading.device_cache import DevicePrefetcher
from hf_fasttrain.data.loading.loader import MicroBatches, Step
from hf_fasttrain.data.loading.prefetch import ImageBatches, Prefetcher, _pin, batches_ahead, num_slots
from hf_fasttrain.data.loading.sampler import MicroBatchKey
from hf_fasttrain.data.loading.user_loader import UserLoader
from hf_fasttrain.data.pixels.augment import EvalTransform, TrainTransform
from hf_fasttrain.data.pixels.bad_images import BadImages
from hf_fasttrain.data.pixels.images import Images
from hf_fasttrain.data.pixels.prepare import Preparation
from hf_fasttrain.data.source.dataset import load_source
from hf_fasttrain.from_recipe import accelerator, parts
from hf_fasttrain.from_recipe.accelerator import set_deterministic, set_fp32_precision
from hf_fasttrain.from_recipe.auto import resolve_machine
from hf_fasttrain.from_recipe.loaders import resolve_loading
from hf_fasttrain.from_recipe.parts import build_parts, num_shapes
from hf_fasttrain.from_recipe.trainer import build_loaders
from hf_fasttrain.inference import choose_device, on_device, predict_images
from hf_fasttrain.recipe.resolved import ResolvedSettings
from hf_fasttrain.train import launcher
from hf_fasttrain.train.distributed import on_main
from hf_fasttrain.train.ema import Ema
from hf_fasttrain.train.evaluation import Evaluator
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.train.metrics import Metrics
from hf_fasttrain.train.throughput import Throughput
from hf_fasttrain.utils.environment import set_current_device
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.library_errors import is_out_of_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda:0")
CUDA_MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."
SMALL = ["data.eval_fraction=0.05", "train.duration=2 steps"]


def make(recipe: Path, run: Path, *overrides: str) -> Trainer:
    reset_accelerate()
    return Trainer.from_recipe(recipe, [*SMALL, *overrides, f"output_dir={run}"])


def half_trainer(**options: Any) -> tuple[Trainer, torch.optim.Optimizer]:
    """Return a trainer whose losses are scaled as with fp16, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    data = [(8 * torch.randn(8, 3, 2, 2), torch.randint(3, (8,))) for _ in range(3)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    trainer = Trainer(model, data, optimizer, log=RunLog(show=False))
    scaler = torch.amp.GradScaler("cpu", **{"init_scale": 2.0**10, **options})
    trainer.accelerator.scaler = scaler
    trainer.step.updater.optimizer = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    return trainer, optimizer


def test_out_of_memory_before_fp16_scaled_anything_is_handled() -> None:
    def trained(fail: bool) -> Tensor:
        trainer, _ = half_trainer()
        calls = []

        def hook(module: nn.Module, args: Any) -> None:
            calls.append(1)
            if fail and len(calls) == 1:
                raise torch.OutOfMemoryError(CUDA_MESSAGE)

        trainer.step.is_settled = True  # otherwise the search for unused parameters makes the first forward
        trainer.raw_model.register_forward_pre_hook(hook)
        assert bool(trainer.fit().out_of_memory) == fail
        return next(trainer.raw_model.parameters()).detach()

    torch.testing.assert_close(trained(True), trained(False))


def test_after_a_skipped_update_the_first_real_one_can_be_undone() -> None:
    """It is the one that creates Adam's state."""
    trainer, optimizer = half_trainer(init_scale=2.0**127, backoff_factor=2.0**-100)  # the first gradients overflow
    calls = []

    def raise_error(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError(CUDA_MESSAGE)

    optimizer.register_step_pre_hook(raise_error)
    result = trainer.fit()
    assert result.skipped_steps >= 1
    assert [event["step"] for event in result.out_of_memory] == [result.skipped_steps + 1]


def test_errors_that_a_smaller_batch_does_not_fix_are_not_out_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not is_out_of_memory(RuntimeError("cuDNN error: CUDNN_STATUS_NOT_SUPPORTED."))
    assert is_out_of_memory(RuntimeError("CUDA out of memory."))

    def raise_error(tensor: Tensor) -> Tensor:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(Tensor, "pin_memory", raise_error)
    with pytest.raises(RunError, match=r"24 bytes of the host's memory can't be pinned .*data\.pin_memory=false"):
        _pin(torch.zeros(6))


def test_a_failed_device_keeps_the_first_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def raise_error(device: Any) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch.cuda, "synchronize", raise_error)
    with pytest.raises(ValueError, match="the first error"), Throughput(CUDA, lambda: 0.0).running():
        raise ValueError("the first error")


@pytest.mark.parametrize(("matmul", "conv"), list(itertools.product(("highest", "high", "medium"), repeat=2)))
def test_tf32_flags_can_be_read_for_any_precision(matmul: str, conv: str) -> None:
    try:
        set_fp32_precision(matmul, conv)
        assert torch.backends.cudnn.allow_tf32 is (conv != "highest")
        assert torch.backends.cuda.matmul.allow_tf32 is (matmul != "highest")
        assert torch.get_float32_matmul_precision() == matmul
        with torch.backends.cudnn.flags(benchmark=True):
            pass
        assert torch.backends.cudnn.allow_tf32 is (conv != "highest")
    finally:
        set_fp32_precision("high", "high")


@pytest.mark.parametrize(("messages", "index"), [("cuda", 1), ("cuda:2", 2)])
def test_a_gpu_has_an_index_and_is_the_current_device(
    messages: str, index: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    present: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", present.append)
    accelerator = SimpleNamespace(device=torch.device(messages), state=SimpleNamespace())
    assert set_current_device(accelerator) == torch.device("cuda", index)
    assert accelerator.state.device == torch.device("cuda", index)
    assert present == [torch.device("cuda", index)]


def test_dropout_is_seeded_on_the_training_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, _ = half_trainer()
    generators = [torch.Generator().manual_seed(5), torch.Generator().manual_seed(5)]
    monkeypatch.setattr(torch.cuda, "default_generators", generators)
    trainer.step.device = torch.device("cuda:1")
    trainer.step.seed_masks(3)
    assert [generator.initial_seed() == 5 for generator in generators] == [True, False]


def test_a_run_on_a_cpu_next_to_a_gpu_sets_its_threads(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    recipe = load_recipe(write_recipe(), ["accelerate.cpu_threads=1"])
    facts = ResolvedSettings(recipe)
    torch.set_num_threads(2)
    accelerator._set_threads(resolve_machine(recipe, facts), facts)
    assert facts.all()["accelerate.cpu_threads"].value == 1
    assert torch.get_num_threads() == 1


def test_training_is_bitwise_repeatable_on_request(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    def flags() -> tuple[bool, bool, str | None]:
        return (
            torch.are_deterministic_algorithms_enabled(),
            torch.backends.cudnn.deterministic,
            os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
        )

    def built() -> list[tuple[bool, bool, str | None]]:
        states = [flags()]
        make(write_recipe(), tmp_path / "run", "accelerate.deterministic=true").fit()
        states.append(flags())
        make(write_recipe(), tmp_path / "other")
        return [*states, flags()]

    before, during, after = in_child(built)
    assert before[:2] == after[:2] == (False, False)
    assert during == (True, True, ":4096:8")


def test_cudnn_benchmark_is_off_for_deterministic_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("benchmark", "deterministic"):
        monkeypatch.setattr(torch.backends.cudnn, name, False)
    try:
        set_deterministic(False, CUDA)
        assert torch.backends.cudnn.benchmark
        set_deterministic(True, CUDA)
        assert not torch.backends.cudnn.benchmark
    finally:
        set_deterministic(False, CPU)


GROWING = ["augment.progressive={start_size: 16, until: 5 epochs, multiple: 2}", "data.image_size=32"]


def test_the_shapes_of_training_are_counted(write_recipe: Callable[..., Path]) -> None:
    options = [*GROWING, "train.duration=6 epochs", "train.batch_size=600", "accelerate.micro_batch_size=256"]
    parts = build_parts(load_recipe(write_recipe(), options))
    loaders = build_loaders(parts, BadImages(None, 0.5, lambda text: None), keep_pixels=False)
    num_steps = 6 * parts.sampling_plan.steps_per_epoch
    loader = loaders.train_loader(parts.source.train, parts.sampling_plan, num_steps, parts.spec.num_classes)
    sizes = set()
    for index in range(num_steps):
        plan = parts.sampling_plan.plan(index)
        sizes |= {(len(key.indices), loader.size_at(plan.epoch)) for key in plan.micro_batches}
    assert len(sizes) > 8  # more than the compiler's default limit
    assert num_shapes(parts.recipe, parts.spec, parts.sampling_plan) == len(sizes) + 2


class Doubling(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        return 2 * images


def test_every_shape_is_compiled() -> None:
    """The compiler's limit is 8 shapes; beyond it there is only a warning."""
    import torch._dynamo

    def compiled(shapes: int) -> int:
        torch._dynamo.reset()
        model, times = Doubling(), []

        def backend(graph: Any, inputs: Any) -> Any:
            times.append(1)
            return graph.forward

        model.compile(backend=backend, dynamic=False)
        for number in range(2, shapes + 2):
            model(torch.zeros(number, 3))
        return len(times)

    with torch._dynamo.config.patch(recompile_limit=8):
        assert compiled(12) == 8
        parts.allow_compiling(12)
        assert compiled(12) == 12
        torch._dynamo.reset()


def test_the_average_of_a_compiled_model_is_compiled_too(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    for compiled in (False, True):
        trainer = make(write_recipe(), tmp_path / f"{compiled}", f"accelerate.compile={compiled}", "ema={decay: 0.9}")
        assert trainer.ema is not None
        assert (trainer.ema.module._compiled_call_impl is not None) == compiled


def test_numbers_of_all_processes_are_summed_on_the_host(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe = write_recipe()

    def summed() -> tuple[int, bool]:
        trainer = make(recipe, tmp_path / "run")
        loader = UserLoader.wrap([1], CPU, 1, join_single=False, total=trainer.processes.sum)
        trainer.processes.wait()
        return loader.total(trainer.processes.index + 3), on_main(lambda: trainer.processes.is_main)

    assert run_processes(summed) == [(7, True), (7, True)]


def test_workers_are_the_cores_of_each_training_process(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hf_fasttrain.from_recipe.loaders.num_cores", lambda: 64)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    recipe = load_recipe(write_recipe(), ["data.workers=auto"])
    for local, workers in (("1", 16), ("8", 8), ("32", 2)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert resolve_loading(ResolvedSettings(recipe), CUDA)[0] == workers


def test_batches_on_the_host_are_limited_by_their_images(write_recipe: Callable[..., Path]) -> None:
    assert [batches_ahead(16, images) for images in (8, 64, 128, 256, 1000)] == [4, 4, 2, 1, 1]
    assert (num_slots(16, 256), num_slots(2, 32), num_slots(0, 32)) == (18, 10, 1)
    parts = build_parts(load_recipe(write_recipe(), ["data.workers=2"]))
    no_workers = build_parts(load_recipe(write_recipe(), ["data.workers=0"]))
    parts.forecast = no_workers.forecast = None  # as on a GPU
    needed = [build_loaders(p, BadImages(None, 0.5, print)).planner.needed_memory for p in (parts, no_workers)]
    size, micro = parts.spec.image_size, parts.sampling_plan.micro_batch_size
    assert needed == [3 * size**2 * (num_slots(2, micro) * micro + num_slots(2, max(32, micro)) * max(32, micro)), 0]
    with_batch_size = build_parts(load_recipe(write_recipe(), ["data.workers=2", "evaluate.batch_size=200"]))
    with_batch_size.forecast = None
    planned = build_loaders(with_batch_size, BadImages(None, 0.5, print)).planner.needed_memory
    assert planned == 3 * size**2 * (num_slots(2, micro) * micro + num_slots(2, 200) * 200)


def test_images_allocate_device_memory_when_read_and_free_it() -> None:
    split = load_source("digits", eval_fraction=0.02).train
    images = ImageBatches(Images(split, Preparation(center=EvalTransform(16)), None))
    prefetcher = DevicePrefetcher(images, CPU, 16, rows=range(10, 40), workers=0, pin_memory=False)
    keys = [MicroBatchKey(0, np.arange(start, start + 10)) for start in (10, 20, 30)]
    assert prefetcher._pixels is None
    plain = Prefetcher(images, CPU, workers=0, pin_memory=False)
    expected = [(pixels.clone(), labels.clone()) for pixels, labels in plain.open(keys, 10)]
    opened = prefetcher.open(keys, 10, persistent=True)

    def require_same() -> None:
        for found, wanted in zip(opened, expected, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    require_same()
    assert prefetcher.is_loaded.all()
    require_same()
    assert prefetcher.release_memory() == 30 * 16 * 16 * 3
    assert prefetcher.release_memory() == 0
    require_same()
    assert prefetcher._pixels is None


def test_cached_evaluation_images_are_freed_for_a_step(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["data.cache=device", "augment.crop=padded", "train.duration=4 steps", "evaluate.every=2 steps"]
    trainer = make(write_recipe(), tmp_path / "run", *options)
    before = trainer.train_loader.micro_batch_size

    def hook(module: nn.Module, args: Any) -> None:
        if (
            module.training
            and trainer.state.step == 2
            and trainer.evaluation.eval_loader.prefetcher._pixels is not None
        ):
            raise torch.OutOfMemoryError(CUDA_MESSAGE)

    trainer.raw_model.register_forward_pre_hook(hook)
    result = trainer.fit()
    assert (result.out_of_memory, result.micro_batch_size) == ([], before)
    assert "GB of evaluation images are no longer kept on cpu, and the step is made again" in capsys.readouterr().out


class Waits(TorchDispatchMode):
    """Lists operations that make the host wait for a device: reads of values and blocking copies between devices."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        if name in ("_local_scalar_dense", "nonzero", "equal", "is_nonzero"):
            self.found.append(name)
        if name in ("_to_copy", "copy_"):
            source, target = (args[0], out) if name == "_to_copy" else (args[1], args[0])
            free = kwargs.get("non_blocking", args[2] if name == "copy_" and len(args) > 2 else False)
            if isinstance(source, Tensor) and source.device.type != target.device.type and not free:
                self.found.append(f"{name} {source.device} -> {target.device} {tuple(source.shape)}")
        return out


class Net(nn.Sequential):
    def to(self, *args: Any, **options: Any) -> Any:
        return self  # fake parameters can't be moved


def waits_on_a_fake_gpu() -> dict[str, list[str]]:
    """Return the operations that wait in steps of a training on fake CUDA tensors, whose values can't be read."""
    for name in [name for name in os.environ if name.startswith(LAUNCHER_VARIABLES)]:
        del os.environ[name]
    reset_accelerate()
    os.environ["ACCELERATE_TORCH_DEVICE"] = "cuda:0"
    found: dict[str, list[str]] = {}

    def watched(name: str, work: Callable[[], Any]) -> None:
        with Waits() as waits:
            work()
        found[name] = waits.found

    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device(CUDA):
            layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
            model = Net(*layers, nn.Dropout(0.1), nn.Linear(8, 10))
        accelerator = Accelerator(mixed_precision="bf16")
        trainer = Trainer(
            model,
            [None],
            torch.optim.AdamW(model.parameters(), 1e-3, fused=True),
            accelerator=accelerator,
            clip_norm=1.0,
            ema=Ema(model, 0.99),
            log=RunLog(None, show=False),
            report=False,
        )
        trainer.step.seed_masks = lambda step: None  # type: ignore[method-assign]

        def backward(
            loss: Tensor, weight: float
        ) -> None:  # gradients as the autograd engine, which needs a device, would set them
            for parameter in trainer.step.parameters:
                parameter.grad = torch.zeros_like(parameter)

        trainer.step.accumulation._backward = backward  # type: ignore[method-assign]
        normalize, mix = Normalize([0.5] * 3, [0.3] * 3, CUDA, channels_last=True), Mixing(0.2, 1.0, 10)
        pixels = torch.zeros((8, 32, 32, 3), dtype=torch.uint8, device=CUDA)
        labels = torch.zeros(8, dtype=torch.int64, device=CUDA)

        def batches(step: int) -> Iterator[tuple[Tensor, Tensor]]:
            for _ in range(2):
                yield mix(normalize(pixels), labels, step)

        def make_step(index: int) -> None:
            trainer.step.memory.keep()
            loss = trainer.train_step(Step(index, 16, 2, MicroBatches(batches(index), list), (3, 32, 32)))
            trainer.throughput.add(loss, 16, trainer.step.grad_norm, skipped=trainer.step.skipped)

        trainer.step.accumulation.set_train_mode()
        for index in range(3):  # in the first one the weights are copied to the host
            watched(f"step {index}", lambda index=index: make_step(index))
        transform, key = TrainTransform(32, crop="padded", erase_prob=1.0), MicroBatchKey(0, np.arange(8))
        kept, rows = torch.zeros((20, 32, 32, 3), dtype=torch.uint8, device=CUDA), torch.arange(8, device=CUDA)
        fill = torch.zeros(3, dtype=torch.uint8, device=CUDA)
        watched("crops", lambda: augment_on_device(kept, rows, transform, key, fill))
        watched("crops, colour not there", lambda: augment_on_device(kept, rows, transform, key))
        logits = torch.zeros((8, 10), device=CUDA)
        watched("metrics", lambda: Metrics(10, CUDA).update(logits, labels))
        model.eval()
        evaluator = Evaluator(accelerator, 10)
        with torch.no_grad():
            try:
                watched("evaluation", lambda: evaluator(model, [(normalize(pixels), labels)] * 3))
            except Exception as error:  # noqa: BLE001 - the one read at its end, which fake tensors refuse
                found["evaluation"] = [type(error).__name__]
    return found


def test_no_step_waits_for_the_device() -> None:
    waits = in_child(waits_on_a_fake_gpu)
    assert waits["step 0"]  # the weights of the first update are copied to the host
    assert waits["step 1"] == waits["step 2"] == waits["crops"] == waits["metrics"] == []
    assert len(waits["crops, colour not there"]) == 1
    assert len(waits["evaluation"]) == 1


def test_buffers_of_an_average_are_copied_together() -> None:
    model = nn.Sequential(*(nn.BatchNorm1d(4) for _ in range(20)))
    ema, names = Ema(model, 0.9), []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    model(torch.randn(3, 4))
    with Names():
        ema.update(0)
    assert [name for name in names if "copy" in name] == ["_foreach_copy_"]
    assert all(int(layer.num_batches_tracked) == 1 for layer in ema.module)  # type: ignore[arg-type]


def test_the_device_of_predictions_can_be_chosen(
    write_recipe: Callable[..., Path], tmp_path: Path, image_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    make(write_recipe(), run, f"data.dataset={image_folder}").fit()
    assert predict_images(run, [str(image_folder)], device="cpu") == predict_images(run, [str(image_folder)])
    capsys.readouterr()
    assert exit_status(["predict", str(run), str(image_folder), "--device", "cuda:1"]) == 2
    assert "device 'cuda:1': there is no such device here; allowed are auto, cpu" in capsys.readouterr().err


def test_a_gpu_is_used_if_available(monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("auto") == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert [str(choose_device(name)) for name in ("auto", "cpu", "cuda", "cuda:1")] == [
        "cuda:0",
        "cpu",
        "cuda",
        "cuda:1",
    ]
    with pytest.raises(RunError, match=r"allowed are auto, cpu, cuda, cuda:0, cuda:1"):
        choose_device("cuda:2")


def test_weights_have_the_memory_format_of_the_images() -> None:
    conv = on_device(nn.Conv2d(3, 8, 3), CPU, channels_last=True).weight  # type: ignore[attr-defined]
    assert conv.is_contiguous(memory_format=torch.channels_last)
    assert not conv.is_contiguous()
    assert launcher.uses_gpu() is False
