"""Planted defects, each of which must turn a row red: small changes to the package, undone after the test."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

Apply = Callable[[pytest.MonkeyPatch], None]


@dataclass(frozen=True)
class Plant:
    """A defect: its description, how it is planted, and a pattern that the failing row's message must match."""

    name: str
    apply: Apply
    says: str
    on_cpu: bool = True
    on_gpu: bool = True


PLANTS: dict[str, list[Plant]] = {}


def plant(row: str, name: str, says: str, *, on_cpu: bool = True, on_gpu: bool = True) -> Callable[[Apply], Apply]:
    """Return a decorator that adds a defect of a row to the table."""

    def add(apply: Apply) -> Apply:
        PLANTS.setdefault(row, []).append(Plant(name, apply, says, on_cpu, on_gpu))
        return apply

    return add


def find(row: str, name: str) -> Plant:
    """Return a row's defect by its name."""
    return next(plant for plant in PLANTS[row] if plant.name == name)


@plant("T14", "only one of cuDNN's flags is set", "mix of the legacy and new APIs|RuntimeError")
def one_flag(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.from_recipe import accelerator

    def set_fp32_precision(matmul: str, conv: str) -> None:
        torch.set_float32_matmul_precision(matmul)
        backend: Any = torch.backends.cudnn
        backend.conv.fp32_precision = "ieee" if conv == "highest" else "tf32"

    patch.setattr(accelerator, "set_fp32_precision", set_fp32_precision)


@plant(
    "T14",
    "the precision asked for is not set",
    "assert 'highest' == |assert 'high' == |assert True == |TF32 is not used",
)
def no_flag(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.from_recipe import accelerator

    patch.setattr(accelerator, "set_fp32_precision", lambda matmul, conv: None)


@plant("T1", "the gradients' norm is read in each step", "synchronizing")
def norm_is_read(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train.update import Update

    real = Update.__call__

    def update(self: Update, *arguments: Any) -> None:
        real(self, *arguments)
        float(self.grad_norm)  # type: ignore[arg-type]

    patch.setattr(Update, "__call__", update)


@plant("T1", "erasing's colour is brought to the GPU in each batch", "synchronizing", on_cpu=False)
def colour_is_brought(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.data.loading.device_cache import DevicePrefetcher

    real = DevicePrefetcher._batch

    def batch(self: DevicePrefetcher, key: Any) -> Any:
        torch.tensor((0, 0, 0), dtype=torch.uint8, device=self.device)
        return real(self, key)

    patch.setattr(DevicePrefetcher, "_batch", batch)


@plant("T4", "the second run has another lr", "< 0.001")
def other_lr(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain import Trainer

    real, runs = Trainer.fit, []

    def fit(self: Trainer) -> Any:
        runs.append(self)
        self.lr *= 1.01 if len(runs) == 2 else 1.0
        return real(self)

    patch.setattr(Trainer, "fit", fit)


@plant("T4", "TF32 is left on", "< 0.001", on_cpu=False)
def tf32_is_on(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.from_recipe import accelerator

    real = accelerator.set_fp32_precision
    patch.setattr(accelerator, "set_fp32_precision", lambda matmul, conv: real("high", "high"))


@plant("T5", "micro-batches are not weighed", "< 1e-05")
def not_weighed(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.data.loading.loader import Step

    real = Step.__init__

    def init(self: Step, index: int, num_images: int, pieces: int, *rest: Any) -> None:
        real(self, index, num_images // pieces, pieces, *rest)

    patch.setattr(Step, "__init__", init)


@plant("T5", "a micro-batch of four is left out", "> 0.999")
def left_out(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train.gradients import Gradients

    real, calls = Gradients._backward, []

    def backward(self: Gradients, loss: Tensor, weight: float) -> None:
        calls.append(1)
        if self.accelerator.mixed_precision == "no" or len(calls) != 3:
            real(self, loss, weight)

    patch.setattr(Gradients, "_backward", backward)


@plant("T11", "the average follows the parameters that it saw first", "the average has not followed")
def stale_average(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train.ema import Ema

    real = Ema.attach
    first: dict[str, list[Tensor]] = {}

    def attach(self: Ema, model: torch.nn.Module) -> None:
        real(self, model)
        first.setdefault("live", [parameter.detach() for parameter in model.parameters()])

    @torch.no_grad()
    def update(self: Ema, number: int) -> None:
        for averaged, live in zip(self.module.parameters(), first["live"], strict=True):
            averaged.lerp_(live.to(averaged.device), 1 - self.decay_at(number))

    patch.setattr(Ema, "attach", attach)
    patch.setattr(Ema, "update", update)


@plant("T11", "the average stays on the CPU", "'cpu'|same device", on_cpu=False)
def average_stays(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train.ema import Ema

    patch.setattr(Ema, "attach", lambda self, model: None)


@plant("T12", "normalised images are contiguous", "not channels_last")
def contiguous_images(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.data.loading.batch import Normalize

    real = Normalize.__call__
    patch.setattr(Normalize, "__call__", lambda self, pixels: real(self, pixels).contiguous())


@plant("T12", "mixed images are contiguous", "not channels_last")
def contiguous_mix(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.data.loading.batch import Mixing

    real = Mixing.__call__

    def mix(self: Mixing, *args: Any) -> tuple[Tensor, Tensor]:
        mixed, targets = real(self, *args)
        return mixed.contiguous(), targets

    patch.setattr(Mixing, "__call__", mix)


@plant("T12", "weights are contiguous", "nchwToNhwc|not channels_last", on_cpu=False)
def contiguous_weights(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train.gradients import Gradients

    real = Gradients.set_train_mode

    def set_train_mode(self: Gradients) -> None:
        self.raw_model.to(memory_format=torch.contiguous_format)
        real(self)

    patch.setattr(Gradients, "set_train_mode", set_train_mode)


@plant("T20", "steps are not seeded", "other masks")
def not_seeded(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train.step import TrainStep

    patch.setattr(TrainStep, "seed_masks", lambda self, step: None)


@plant("T20", "the GPU's generator is not seeded", "other masks", on_cpu=False)
def not_seeded_on_gpu(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train.step import TrainStep

    patch.setattr(TrainStep, "seed_masks", lambda self, step: torch.default_generator.manual_seed(step))


@plant("T20", "the device has no index", "assert None == 0", on_cpu=False)
def no_index(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain import Trainer

    real = Trainer.__init__

    def init(self: Trainer, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        self.device = torch.device("cuda")

    patch.setattr(Trainer, "__init__", init)


@plant("T1b", "a batch waits for the GPU", "the host has waited", on_cpu=False)
def batch_waits(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.data.loading.device_cache import DevicePrefetcher

    real = DevicePrefetcher._batch

    def batch(self: DevicePrefetcher, key: Any) -> Any:
        made = real(self, key)
        torch.cuda.synchronize()
        return made

    patch.setattr(DevicePrefetcher, "_batch", batch)


@plant("T2", "a slot is used again while its copy is on the way", "wrong bytes", on_gpu=False)
def shared_slot(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tensor, "pin_memory", lambda self: self)


@plant("T2", "the present stream does not wait for the copy", "wrong bytes")
def no_wait(patch: pytest.MonkeyPatch) -> None:
    from late_streams import Stream

    patch.setattr(Stream, "wait_event", lambda self, event: None)
    patch.setattr(torch.cuda.Stream, "wait_event", lambda self, event: None)


@plant("T2", "a batch's memory is reused while the present stream reads it", "wrong bytes|reused too early")
def not_recorded(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Tensor, "record_stream", lambda self, stream: None)


def _augment_otherwise(patch: pytest.MonkeyPatch, **changes: Any) -> None:
    from hf_fasttrain.data.loading import device_cache as device

    real = device.augment_on_device

    def augment(pixels: Tensor, rows: Tensor, transform: Any, *rest: Any) -> Tensor:
        return real(pixels, rows, replace(transform, **changes), *rest)

    patch.setattr(device, "augment_on_device", augment)


@plant("T3", "nothing is erased on the device", "wrong bytes")
def not_erased(patch: pytest.MonkeyPatch) -> None:
    _augment_otherwise(patch, erase_prob=0.0)


@plant("T3", "nothing is mirrored on the device", "wrong bytes")
def not_mirrored(patch: pytest.MonkeyPatch) -> None:
    _augment_otherwise(patch, flip=False)


@plant("T3", "nothing is shifted on the device", "wrong bytes")
def not_shifted(patch: pytest.MonkeyPatch) -> None:
    _augment_otherwise(patch, crop="none")


@plant("T15", "waiting is not counted", "assert 0.7 < ")
def waiting_not_counted(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.data.loading.prefetch import Prefetcher

    patch.setattr(Prefetcher, "wait_seconds", property(lambda self: 0.0))


@plant("T15", "all time is counted as waiting", "< 0.02|< 0.1|< 0.9")
def all_is_waiting(patch: pytest.MonkeyPatch) -> None:
    import time

    from hf_fasttrain.data.loading.prefetch import Prefetcher

    patch.setattr(Prefetcher, "wait_seconds", property(lambda self: time.perf_counter()))


@plant("T6", "a scale is set before there is one", "AssertionError|Attempted update but _scale is None")
def scale_is_set(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train.update import Update

    real = Update.undo

    def undo(self: Update) -> None:
        scaler = self.accelerator.scaler
        assert scaler is not None
        scaler.update(scaler.get_scale())
        real(self)

    patch.setattr(Update, "undo", undo)


@plant("T6", "skipped steps are not seen", "1, 3")
def skipped_not_seen(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train.update import Update

    patch.setattr(Update, "_has_skipped", lambda self, scaler, step: False)


@plant("T6", "half of the images of a step that is made again are lost", "< 0.001")
def images_lost(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.data.loading.user_loader import UserLoader

    real = UserLoader.retry

    def retry(self: UserLoader, index: int, stop: int) -> Any:
        assert self._current is not None
        images, targets = self._current
        self._current = images[: len(images) // 2], targets[: len(images) // 2]
        return real(self, index, stop)

    patch.setattr(UserLoader, "retry", retry)


@plant("T7", "batch norm's statistics are not put back", "other weights")
def statistics_stay(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train.retry import Retry

    real = Retry._make_smaller

    def make_smaller(self: Retry, *args: Any) -> Any:
        for norm in self.step.norms:  # as a forward that got this far would have
            norm.running_var.add_(1.0)  # type: ignore[operator]
        for live, kept in self.step.memory._buffers:
            for tensor, copy in zip(live, kept, strict=True):
                copy.copy_(tensor)
        return real(self, *args)

    patch.setattr(Retry, "_make_smaller", make_smaller)


@plant("T7", "what failed is kept", "memory is not given back")
def failed_is_kept(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train.retry import Retry

    real, kept = Retry._make_smaller, []

    def make_smaller(self: Retry, *args: Any) -> Any:
        kept.append(torch.empty(1 << 20, device=self.step.device))
        return real(self, *args)

    patch.setattr(Retry, "_make_smaller", make_smaller)


@plant("T7", "the batch is not halved but quartered", "'after': 16")
def quartered(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train import retry

    patch.setattr(retry, "smaller", lambda size, with_batch_norm: size // 4)


@plant("T8", "half of the optimizer's state stays", "KeyError|other weights|exp_avg")
def half_a_state(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train.out_of_memory import Memory

    patch.setattr(Memory, "failed_in", lambda self: "gradients")


@plant("T8", "weights that the failed update has changed stay", "other weights", on_gpu=False)
def weights_stay(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train.out_of_memory import Memory

    real = Memory.restore

    def restore(self: Memory) -> None:
        self._weights = None
        real(self)

    patch.setattr(Memory, "restore", restore)


@plant("T9", "the images after the first piece are left out", "approx")
def pieces_left_out(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train.evaluation import Evaluator

    real = Evaluator.logits

    def logits(self: Evaluator, model: Any, images: Tensor) -> Tensor:
        outputs = real(self, model, images)
        if self.max_images is not None:
            outputs[self.max_images :] = outputs[: len(outputs) - self.max_images]
        return outputs

    patch.setattr(Evaluator, "logits", logits)


@plant("T9", "batches become too small", "== 32")
def too_small(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train.evaluation import Evaluator

    real = Evaluator.logits

    def logits(self: Evaluator, model: Any, images: Tensor) -> Tensor:
        outputs = real(self, model, images)
        self.max_images = 8 if self.max_images else None
        return outputs

    patch.setattr(Evaluator, "logits", logits)


@plant("T21", "the peak is that of another device", "the peak is another|peak_memory_bytes", on_cpu=False)
def other_peak(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train import ending

    patch.setattr(ending, "peak_memory_bytes", lambda device: 0)


@plant("T21", "images are kept on the device whatever they need", "assert 'device' == 'memory'|the share is not heeded")
def share_not_heeded(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.from_recipe.cache_plan import CachePlanner

    patch.setattr(CachePlanner, "_fits_device", lambda self, *args, **options: True)


@plant("T10", "saved tensors are rounded", "not the live tensors")
def rounded(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.run_folder.checkpoint import Snapshot

    real = Snapshot.to_host

    def to_host(self: Snapshot, *, copy: bool = True) -> Snapshot:
        real(self, copy=copy)
        model = dict(self.tensors["model"])
        name = next(name for name, tensor in model.items() if tensor.is_floating_point())
        self.tensors["model"] = {**model, name: model[name].bfloat16().float()}
        return self

    patch.setattr(Snapshot, "to_host", to_host)


@plant("T10", "the optimizer's state is not restored", "other bits")
def optimizer_anew(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train import checkpoint_state

    patch.setattr(checkpoint_state, "restore_optimizer", lambda optimizer, saved: None)


@plant("T10", "the weights are not restored", "other weights")
def weights_anew(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train.checkpoint_state import TrainingObjects

    patch.setattr(TrainingObjects, "restore_weights", lambda self, checkpoint: None)


@plant("T13", "the compiler's limit of 8 shapes stays", "[Rr]ecompile")
def limit_stays(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.from_recipe import parts

    patch.setattr(parts, "allow_compiling", lambda shapes: None)


@plant("T13", "nothing is compiled", "not compiled: ")
def not_compiled(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.nn.Module, "compile", lambda self, **options: None)


class _Outer(torch.nn.Module):
    """A wrapper around a model, like the one that torch.compile returns."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self._orig_mod = inner

    def forward(self, images: Tensor) -> Any:
        return self._orig_mod(images)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("_orig_mod"), name)


@plant("T13", "the compiled model is another module", "other names")
def other_module(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain import Trainer

    real = Trainer.__init__

    def init(self: Trainer, *args: Any, **options: Any) -> None:
        real(self, *args, **options)
        self.raw_model = _Outer(self.raw_model)

    patch.setattr(Trainer, "__init__", init)


@plant("T16", "the backward is not timed", "the phases are not the step")
def backward_not_timed(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.study.stopwatch import Stopwatch

    real = Stopwatch.phases
    patch.setattr(Stopwatch, "phases", lambda self: {**real(self), "backward": 0.0})


@plant("T17", "an arm is not stopped", "it does not stand still")
def not_stopped(patch: pytest.MonkeyPatch) -> None:
    import signal

    from hf_fasttrain.study.arm_process import ArmProcess

    real = ArmProcess._signal
    patch.setattr(ArmProcess, "_signal", lambda self, n: None if n == signal.SIGSTOP else real(self, n))


@plant("T17", "something holds 20 GB", "the arms hold too much", on_cpu=False)
def holds_memory(patch: pytest.MonkeyPatch) -> None:
    held: list[Tensor] = []
    real = torch.cuda.mem_get_info

    def mem_get_info(device: Any = None) -> tuple[int, int]:
        held.append(torch.empty(20_000_000_000, dtype=torch.uint8, device="cuda"))
        return real(device)

    patch.setattr(torch.cuda, "mem_get_info", mem_get_info)


@plant("T19", "kernels are not seen", "was seen")
def kernels_not_seen(patch: pytest.MonkeyPatch) -> None:
    real = torch.profiler.profile.key_averages
    hidden = ("bn_", "norm", "flash", "fmha", "sdpa", "attention")

    def key_averages(self: Any, *args: Any, **options: Any) -> list[Any]:
        return [event for event in real(self, *args, **options) if not any(h in event.key.lower() for h in hidden)]

    patch.setattr(torch.profiler.profile, "key_averages", key_averages)


def _no_exchange(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train.gradients import Gradients

    real = Gradients._local_gradients

    def local(self: Gradients, *args: Any, exchange: bool) -> Any:
        return real(self, *args, exchange=False)

    patch.setattr(Gradients, "_local_gradients", local)
    patch.setattr(Gradients, "_exchange", lambda self, **_: None)


plant("T18", "gradients are not exchanged", "the processes differ|other weights than")(_no_exchange)
plant("M1", "gradients are not exchanged", "the processes differ|other weights than")(_no_exchange)


@plant("T18", "unused parameters are not looked for", "could not exchange their gradients|mask_token|reduction")
def unused_not_looked_for(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train.gradients import Gradients

    patch.setattr(Gradients, "freeze_unused", lambda self, step: [])


@plant("T18", "a resumed run begins anew", "assert \\(0, ")
def begins_anew(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain import Trainer
    from hf_fasttrain.train import session

    patch.setattr(Trainer, "restore", lambda self: None)
    patch.setattr(session, "complete_checkpoints", lambda folder: [])


@plant("M2", "processes don't agree on their memory", "processes ended|assert|left alone")
def no_agreement(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train.out_of_memory import Memory

    patch.setattr(Memory, "is_uncertain", lambda self, step: False)


@plant("M3", "a process tells nobody of its signal", "they go on|processes ended")
def tells_nobody(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.train.stop import StopRequest, StopRequests

    patch.setattr(StopRequests, "at_step", lambda self, step: StopRequest())
    patch.setattr(StopRequests, "now", lambda self: 0)
    patch.setattr(StopRequests, "pending", lambda self: False)


@plant("M4", "the number of images is summed on the device", "synchronizing", on_cpu=False)
def summed_on_device(patch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.data.loading.user_loader import UserLoader

    real = UserLoader._step

    def step(self: UserLoader, index: int, images: Tensor, targets: Tensor) -> Any:
        int(torch.tensor(len(images), device=self.device).clone())
        return real(self, index, images, targets)

    patch.setattr(UserLoader, "_step", step)
