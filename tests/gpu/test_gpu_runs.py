"""Complete runs: checkpoints and resume, compilation, studies' arms and stopwatch, and the kernels of a step."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import timm
import timm.optim  # raises the compiler's limit
import torch
import torch._dynamo
from gpu_kit import distance, flat, make, user_trainer
from helpers.processes import reset_accelerate
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_fasttrain import Trainer
from hf_fasttrain.data.loading.loader import Step
from hf_fasttrain.run_folder.checkpoint import complete_checkpoints, load_checkpoint
from hf_fasttrain.study import arm_process
from hf_fasttrain.study.arm_process import Starter
from hf_fasttrain.study.bench import Arm
from hf_fasttrain.study.messages import ArmOptions, ArmRequest, Report, Turn
from hf_fasttrain.study.trial import Trial


def tensors_in(tree: Any, path: str = "") -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of nested dictionaries and lists by their paths."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, dict):
        for key in sorted(tree, key=str):
            yield from tensors_in(tree[key], f"{path}/{key}")
    elif isinstance(tree, list | tuple):
        for number, item in enumerate(tree):
            yield from tensors_in(item, f"{path}/{number}")


class CopiesSaves(Trainer):
    """Copies everything that is saved when saving begins."""

    def save(self) -> None:
        live = {"weights": self.stateful.weights(), "optimizer": self.step.optimizer.state_dict()}
        self.__dict__.setdefault("copies", {})[self.state.step] = {
            key: tensor.detach().to("cpu", copy=True) for key, tensor in tensors_in(live)
        }
        super().save()


RESUMED = ["model.drop_path=0.1", "ema={decay: 0.9}", "augment.mixup=0.5", "accelerate.mixed_precision=bf16"]


def test_t10_checkpoints_hold_the_live_tensors(device: torch.device, run: Path) -> None:
    options = ["train.duration=6 steps", "checkpoint.every=2 steps", "checkpoint.keep=9"]
    trainer = make(run, *RESUMED, *options, kind=CopiesSaves)
    trainer.fit()
    for step in (2, 4, 6):
        checkpoint = load_checkpoint(run / "checkpoints" / f"step_{step:08d}")
        saved = {"weights": checkpoint.weights, "optimizer": checkpoint.training["optimizer"]}
        loaded, expected = dict(tensors_in(saved)), trainer.__dict__["copies"][step]
        assert loaded.keys() == expected.keys()
        assert len(loaded) > 50
        other = [key for key, tensor in loaded.items() if not torch.equal(tensor, expected[key])]
        assert other == [], "not the live tensors"


def resumed_and_whole(run: Path, *options: str) -> tuple[Tensor, Tensor]:
    """Return the weights of a run that is interrupted and resumed, and of one that is not."""
    options = (*RESUMED, *options, "train.duration=6 steps", "checkpoint.every=3 steps")
    make(run.with_name("whole"), *options).fit()
    trainer = make(run, *options)
    make_step = trainer.train_step

    def train_step(step: Step) -> Tensor:
        if step.index == 3:
            raise KeyboardInterrupt
        return make_step(step)

    trainer.train_step = train_step  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert [path.name for path in complete_checkpoints(run / "checkpoints")] == ["step_00000003"]
    resumed = make(run, *options, resume=True)
    assert resumed.state.step == 3
    resumed.fit()
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (run, run.with_name("whole")))
    return flat(one), flat(other)


def test_t10_a_resumed_run_ends_with_the_same_bits(device: torch.device, run: Path) -> None:
    resumed, uninterrupted = resumed_and_whole(run, "accelerate.deterministic=true")
    assert torch.equal(resumed, uninterrupted), "other bits"


def test_t10_without_deterministic_algorithms_a_resumed_run_ends_close(device: torch.device, run: Path) -> None:
    resumed, uninterrupted = resumed_and_whole(run)
    assert distance(resumed, uninterrupted) < 1e-2, "other weights"


def test_t13_every_shape_is_compiled(
    device: torch.device, run: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four sizes, each with a full and a short batch, and two shapes of evaluation: ten of 24 and 12 images."""
    shapes: list[tuple[int, ...]] = []

    def counted(graph: Any, inputs: list[Any]) -> Any:
        """Compile a graph and keep the shape of its images; on a CPU it is only traced."""
        shapes.extend(tuple(i.shape) for i in inputs if isinstance(i, Tensor) and i.ndim == 4 and i.shape[1] == 3)
        if device.type == "cpu":
            return graph.forward
        from torch._inductor.compile_fx import compile_fx

        return compile_fx(graph, inputs)

    real = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **options: real(self, backend=counted, **options))
    config = torch._dynamo.config
    monkeypatch.setattr(config, "recompile_limit", 8)  # PyTorch's own
    monkeypatch.setattr(config, "accumulated_recompile_limit", config.accumulated_recompile_limit)  # to be restored
    monkeypatch.setattr(config, "fail_on_recompile_limit_hit", True)
    torch._dynamo.reset()
    options = [f"data.dataset={image_folder}", "data.image_size=64", "train.batch_size=16", "train.duration=4 epochs"]
    options += ["augment.progressive={start_size: 16, until: 3 epochs, multiple: 16}", "accelerate.compile=true"]
    trainer = make(run, *options, "evaluate.every=4 epochs", "evaluate.batch_size=8")
    trainer.fit()
    names = set(timm.create_model("test_resnet", num_classes=3).state_dict())
    assert set(trainer.raw_model.state_dict()) == names, "other names"
    assert set(load_file(run / "model" / "model.safetensors")) == names, "other names"
    expected = {(number, 3, size, size) for size in (16, 32, 48, 64) for number in (16, 8)}
    expected |= {(8, 3, 64, 64), (4, 3, 64, 64)}  # of evaluation
    assert expected <= set(shapes), f"not compiled: {expected - set(shapes)}"


STUDY = """
model: {name: test_resnet}
data: {dataset: digits, image_size: 64, workers: 0, cache: none}
train: {duration: 3 epochs, batch_size: 128}
accelerate: {mixed_precision: "no"}
"""


def arm_request(device: torch.device, *overrides: str) -> ArmRequest:
    """Return the recipe of a study: ResNet-50 on a GPU."""
    large = ["model.name=resnet50", "data.image_size=224", "accelerate.mixed_precision=bf16", "train.batch_size=64"]
    return ArmRequest(STUDY, "study.yaml", "study", (*(large if device.type == "cuda" else []), *overrides))


def test_t16_phases_add_up_to_the_step(device: torch.device, record_property: Callable[..., None]) -> None:
    reset_accelerate()
    trial = Trial(arm_request(device), ArmOptions(profiled=True))
    turns, reports = iter([Turn(min_steps=3), Turn(min_steps=8), None]), list[Report]()

    def next_turn(report: Report | None) -> Turn | None:
        if report is not None:
            reports.append(report)
        return next(turns)

    trial.run(next_turn)
    report = reports[1]
    share = (sum(report.phases.values()) + report.wait_seconds) / sum(report.step_seconds)
    record_property("phases", {**report.phases, "wait": report.wait_seconds, "steps": sum(report.step_seconds)})
    assert 0.95 < share < 1.05, "the phases are not the step"


@pytest.fixture
def starter(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> Iterator[Starter]:
    """Return a starter of arms, as studies have it; on a CPU arms are forked from this process."""
    monkeypatch.setattr(arm_process, "CPU_METHOD", "fork")
    with Starter(arm_request(device), on_gpu=device.type == "cuda") as start:
        yield start


def test_t17_an_arm_pauses_and_continues(device: torch.device, starter: Starter) -> None:
    arm = starter(Arm("one"), ArmOptions())
    try:
        assert torch.device(arm.ready.device).type == device.type
        assert arm.turn(Turn(min_steps=2)).images > 0
        process = psutil.Process(arm._process.pid)
        seconds = process.cpu_times()
        time.sleep(0.2)
        assert process.status() == psutil.STATUS_STOPPED, "it does not stand still"
        assert process.cpu_times() == seconds
        assert arm.turn(Turn(min_steps=2)).images > 0
    finally:
        arm.close()


@pytest.mark.needs_gpu
def test_t17_two_arms_free_their_memory(
    device: torch.device, starter: Starter, record_property: Callable[..., None]
) -> None:
    arms = [starter(Arm(name), ArmOptions()) for name in ("one", "two")]
    try:
        reports = [arm.turn(Turn(min_steps=3)) for arm in arms]
        free, total = torch.cuda.mem_get_info(device)
        record_property("bytes", {"arms": [report.device_bytes for report in reports], "taken": total - free})
        assert total - free < 20e9, "the arms hold too much"
    finally:
        for arm in arms:
            arm.close()


FAMILIES = {
    "batch norm": r"bn_|batch_?norm",
    "depthwise": r"depthwise|dgrad2d_c1|_dw_",
    "attention": r"flash|fmha|sdpa|attention",
}
WANTED = {"resnet": "batch norm", "efficientnet": "batch norm", "vit": "attention"}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("kind", ["resnet", "efficientnet", "vit"])
def test_t19_kernels_are_listed(
    kind: str, precision: str, device: torch.device, record_property: Callable[..., None]
) -> None:
    cuda = device.type == "cuda"
    if precision == "fp16" and (not cuda or kind != "resnet"):
        pytest.skip("needs a GPU" if not cuda else "bf16 is enough")
    large = {"resnet": "resnet50", "efficientnet": "efficientnet_b0", "vit": "vit_base_patch16_224"}
    name, size, number = (large[kind], 224, 128) if cuda else (f"test_{kind}", 160 if kind != "resnet" else 64, 4)
    model = timm.create_model(name, num_classes=10).to(device).to(memory_format=torch.channels_last)
    batch = torch.randn(number, 3, size, size, device=device).to(memory_format=torch.channels_last)
    labels = torch.arange(number, device=device) % 10
    torch.backends.cudnn.benchmark = cuda
    options: dict[str, Any] = {"precision": precision, "name": "AdamW", "lr": 1e-4, "duration": "3 steps"}
    trainer = user_trainer(device, model, [(batch, labels)] * 6, **options)
    trainer.fit()
    steps = trainer.train_loader.steps(3, 6)
    trainer.train_step(next(steps))
    _wait(device)
    with torch.profiler.profile() as profiler:
        start = time.perf_counter()
        for step in steps:
            trainer.train_step(step)
        host = time.perf_counter() - start
        _wait(device)
        total = time.perf_counter() - start
    events = profiler.key_averages()
    on_gpu = {e.key: e.self_device_time_total for e in events if e.device_type == torch.profiler.DeviceType.CUDA}
    times = on_gpu if cuda else {e.key: e.self_cpu_time_total for e in events}
    kernels = {
        family: {key[:100]: round(time_us / 2000, 3) for key, time_us in times.items() if re.search(pattern, key, re.I)}
        for family, pattern in FAMILIES.items()
    }
    launches = sum(e.count for e in events if "LaunchKernel" in e.key)
    largest = sorted(times.items(), key=lambda item: -item[1])[:5]
    facts = {"host ms": host * 500, "ms": total * 500, "GPU ms": sum(on_gpu.values()) / 2000, "launches": launches / 2}
    facts |= {"ms of the largest": {key[:100]: round(time_us / 2000, 3) for key, time_us in largest}}
    record_property(f"{name} {precision}", {**facts, **kernels})
    assert kernels[WANTED[kind]], f"no {WANTED[kind]} was seen"
    assert not cuda or launches > 100


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
