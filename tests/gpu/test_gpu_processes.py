"""Several processes: one over NCCL, two over gloo on one GPU, two over NCCL on two GPUs; each forked for the test.

Nothing here may touch CUDA before it forks. Without GPUs all use gloo.
"""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.utils import gather_object
from gpu_kit import distance, flat, make, nothing_waits, user_trainer, weights_of, wide_batches
from helpers.processes import end_child, free_port, results_of_children
from torch import Tensor, nn

from hf_fasttrain import Trainer
from hf_fasttrain.data.loading.loader import Step
from hf_fasttrain.run_folder.checkpoint import complete_checkpoints
from hf_fasttrain.train.distributed import on_main
from hf_fasttrain.utils.errors import NotEnoughMemory, PeerGone, Stopped

# A model without batch norm and dropout: splitting a step changes nothing but rounding.
EXACT = ["model.name=test_vit", "optimizer.name=sgd", "optimizer.lr=0.05", "train.batch_size=16", "log.every=1"]


def in_processes(
    work: Callable[..., Any], *args: Any, number: int, device: torch.device, gloo: bool = False
) -> list[Any]:
    """Return the result of `work(*args)` in each of `number` processes, each on its own GPU or, with `gloo`, on one."""
    assert not torch.cuda.is_initialized()
    port = free_port()
    with tempfile.TemporaryDirectory() as folder:
        children = []
        for rank in range(number):
            child = os.fork()
            if not child:
                _be_rank(work, args, rank, number, port, gloo and device.type == "cuda", Path(folder))
            children.append(child)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        assert statuses == [0] * number, f"processes ended with {statuses}"
        return results_of_children(Path(folder), number)


def _be_rank(
    work: Callable[..., Any], args: Any, rank: int, number: int, port: int, one_gpu: bool, folder: Path
) -> None:
    local = 0 if one_gpu else rank  # as if on separate machines: NCCL refuses two processes on a GPU
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(number), "LOCAL_RANK": str(local)}
    os.environ |= {
        "LOCAL_WORLD_SIZE": str(1 if one_gpu else number),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }

    def join_and_work() -> Any:
        if one_gpu:
            dist.init_process_group("gloo")
        return work(*args)

    end_child(join_and_work, folder / str(rank))


def fit(run: Path, *overrides: str, steps: int = 4) -> tuple[Any, ...]:
    """Train a recipe; return the weights, notes, device, backend and the model's wrapper."""
    trainer = make(run, *EXACT, *overrides, f"train.duration={steps} steps")
    result = trainer.fit()
    backend = dist.get_backend() if dist.is_initialized() else ""
    wrapped = type(trainer.model).__name__
    return flat(weights_of(trainer.raw_model)).numpy(), result.notes, str(trainer.device), backend, wrapped


def as_tensor(result: tuple[Any, ...]) -> Tensor:
    return torch.from_numpy(result[0])


def require_same(result: list[tuple[Any, ...]], single: tuple[Any, ...]) -> None:
    """Require the same weights on all processes as on a single process."""
    assert all(torch.equal(as_tensor(result[0]), as_tensor(other)) for other in result), "the processes differ"
    assert distance(as_tensor(result[0]), as_tensor(single)) < 1e-4, "other weights than one process's"


def whole_life(run: Path, sync_batch_norm: bool) -> dict[str, Any]:
    """Train, save, resume and communicate as a launcher's only process."""
    options = [*EXACT, "model.name=test_resnet", f"accelerate.sync_batch_norm={str(sync_batch_norm).lower()}"]
    options += ["train.drop_last=true", "checkpoint.every=2 steps"]
    first = make(run, *options, "train.duration=2 steps")
    first.fit()
    trainer = make(run, *options, "train.duration=4 steps", resume=True)
    first_step = trainer.state.step
    result = trainer.fit()
    trainer.accelerator.wait_for_everyone()
    collectives = {"main": on_main(lambda: "said"), "gathered": gather_object([trainer.processes.index])}
    saved = [path.name for path in complete_checkpoints(run / "checkpoints")]
    return {**collectives, "began": first_step, "steps": result.steps, "saved": saved, "backend": dist.get_backend()}


def test_t18_one_process_of_a_launcher(device: torch.device, run: Path) -> None:
    cuda = device.type == "cuda"
    (result,) = in_processes(whole_life, run, cuda, number=1, device=device)
    assert result["backend"] == ("nccl" if cuda else "gloo")
    assert (result["began"], result["steps"], result["main"], result["gathered"]) == (2, 4, "said", [0])
    assert result["saved"][-1] == "step_00000004"


def test_t18_two_processes_end_with_the_weights_of_one(device: torch.device, run: Path) -> None:
    (single,) = in_processes(fit, run.with_name("one"), number=1, device=device, gloo=True)
    results = in_processes(fit, run, number=2, device=device, gloo=True)
    assert {result[4] for result in results} == {"DistributedDataParallel"}
    assert {result[3] for result in results} == {"gloo"}
    assert {torch.device(result[2]).type for result in results} == {device.type}
    require_same(results, single)


def test_t18_an_unused_parameter(device: torch.device, run: Path) -> None:
    """DINOv2 keeps a mask token that training does not use."""
    from transformers import Dinov2Config

    folder = run.with_name("dino")
    sizes: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 1}
    Dinov2Config(**sizes, image_size=32, patch_size=16).save_pretrained(folder)
    name = f"model.name=transformers:{folder}"
    (single,) = in_processes(fit, run.with_name("one"), name, number=1, device=device, gloo=True)
    results = in_processes(fit, run, name, number=2, device=device, gloo=True)
    assert any("mask_token" in note for note in results[0][1])
    require_same(results, single)


def test_m1_two_processes_end_with_the_weights_of_one(device: torch.device, run: Path) -> None:
    (single,) = in_processes(fit, run.with_name("one"), number=1, device=device)
    results = in_processes(fit, run, number=2, device=device)
    if device.type == "cuda":
        assert [result[2] for result in results] == ["cuda:0", "cuda:1"]
        assert {result[3] for result in results} == {"nccl"}
    require_same(results, single)


class Short(Trainer):
    """From a step on, has no memory for more than 4 images in process 1."""

    since = 0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)

        def hook(module: nn.Module, args: tuple[Tensor]) -> None:
            if self.processes.index == 1 and module.training and self.state.step >= self.since and len(args[0]) > 4:
                torch.empty(2**50, dtype=torch.uint8, device=self.device)

        self.raw_model.register_forward_pre_hook(hook)


def fit_short(run: Path, since: int) -> Any:
    """Train where process 1 runs out of memory; return the new micro-batch size, or the error."""
    kind = type("ShortSince", (Short,), {"since": since})
    trainer = make(run, *EXACT, "train.duration=6 steps", "checkpoint.every=2 steps", kind=kind)
    try:
        result = trainer.fit()
    except NotEnoughMemory as error:
        return str(error)
    except (RuntimeError, PeerGone) as error:
        return f"left alone: {error}"
    return result.out_of_memory


def test_m2_out_of_memory_in_the_first_step_of_one_process(device: torch.device, run: Path) -> None:
    first, second = in_processes(fit_short, run, 0, number=2, device=device)
    assert first == second == [{"step": 1, "before": 8, "after": 4}]


def test_m2_out_of_memory_in_a_later_step_of_one_process(device: torch.device, run: Path) -> None:
    first, second = in_processes(fit_short, run, 4, number=2, device=device)
    assert "out of memory at step 5 with micro-batches of 8 images" in second
    assert first.startswith("left alone")
    assert complete_checkpoints(run / "checkpoints")[-1].name == "step_00000004"


def fit_and_stop(run: Path) -> tuple[str, int]:
    """Train until process 1 gets a signal after its third step; return how and where training ended."""
    trainer = make(run, *EXACT, "train.duration=60 steps")
    make_step = trainer.train_step

    def train_step(step: Step) -> Tensor:
        if step.index == 2 and trainer.processes.index == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return make_step(step)

    trainer.train_step = train_step  # type: ignore[method-assign]
    try:
        trainer.fit()
    except Stopped as stopped:
        return stopped.cause, trainer.state.step
    return "", trainer.state.step


def test_m3_a_signal_to_one_process_stops_both(device: torch.device, run: Path) -> None:
    first, second = in_processes(fit_and_stop, run, number=2, device=device)
    assert first[1] == second[1] < 60, "they go on"
    assert complete_checkpoints(run / "checkpoints")[-1].name == f"step_{first[1]:08d}"


def fit_own_loader(device: str) -> int:
    """Train on user loaders; from the second step on nothing may wait for the device."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 10))
    batches = [(images.pin_memory() if device == "cuda" else images, labels) for images, labels in wide_batches(4, 8)]
    trainer = user_trainer(torch.device(device), model, batches, duration="4 steps")
    steps = trainer.train_loader.steps(0, 4)
    trainer.step.accumulation.set_train_mode()
    trainer.train_step(next(steps))
    made = 1
    with nothing_waits(trainer.device):
        for step in steps:
            trainer.train_step(step)
            made += 1
    return made


def test_m4_a_step_with_user_loaders_does_not_wait(device: torch.device) -> None:
    assert in_processes(fit_own_loader, device.type, number=2, device=device) == [4, 4]
