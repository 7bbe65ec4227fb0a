"""The recipe's Accelerator, whatever the launcher's environment says; where they differ, the recipe wins."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

from hf_fasttrain.environment import (
    launcher_precision,
    set_deterministic,
    set_fp32_precision,
    settle_device,
    uses_gpu,
    was_launched,
)
from hf_fasttrain.errors import RunError
from hf_fasttrain.recipe import Recipe
from hf_fasttrain.resolved import ResolvedSettings
from hf_fasttrain.threads import VARIABLE as THREADS
from hf_fasttrain.threads import set_cpu_threads

# What other ways of distributing a model announce themselves by.
NOT_BUILT = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}


def build_accelerator(recipe: Recipe, settings: ResolvedSettings) -> Accelerator:
    """Return the Accelerator of a recipe.

    Raises RunError for a launch configuration that is not built (DeepSpeed, FSDP, fp8) and for a precision that the
    device does not have.
    """
    for variable, name in NOT_BUILT.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise RunError(f"the launch configuration asks for {name}, which is not built; use accelerate_configs/")
    _require_trackers(recipe)
    settings.launched = was_launched()
    _set_threads(recipe, settings)
    set_fp32_precision(recipe.accelerate.matmul_precision, recipe.accelerate.conv_precision)
    precision = _resolve_precision(recipe, settings)
    if AcceleratorState._shared_state.get("_mixed_precision", precision) != precision:
        AcceleratorState._reset_state()  # an earlier run of this process had another one; the process group stays
    steps = recipe.accelerate.gradient_accumulation_steps
    _note_overruled(recipe, precision, settings)
    folder = output_dir(recipe)
    set_deterministic(recipe.accelerate.deterministic, torch.device("cuda" if uses_gpu() else "cpu"))
    with _overruled_environment():
        accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=1 if steps == "auto" else steps,
            log_with=list(recipe.log.trackers) or None,
            project_config=ProjectConfiguration(project_dir=folder, logging_dir=os.path.join(folder, "trackers")),
            # Our own running statistics are averaged before evaluation and saving instead of rank 0's overwriting all.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
    settle_device(accelerator)
    return accelerator


def _set_threads(recipe: Recipe, settings: ResolvedSettings) -> None:
    """Set the threads of a process that trains on a CPU, and record why there are so many."""
    if uses_gpu():
        return
    wish, key = recipe.accelerate.cpu_threads, "accelerate.cpu_threads"
    threads, why = set_cpu_threads(None if wish == "auto" else wish)
    settings.resolve(key, threads, settings.why(key, why))
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # so that several processes meet over gloo


def _require_trackers(recipe: Recipe) -> None:
    installed = {tracker.value for tracker in get_available_trackers()}
    missing = sorted(set(recipe.log.trackers) - installed)
    if missing:
        raise RunError(
            f"log.trackers: {', '.join(missing)} not installed; pip install 'hf_fasttrain[trackers]' or leave it out"
        )


def output_dir(recipe: Recipe) -> str:
    """Return the recipe's run folder: as asked, else runs/<recipe name>."""
    return os.path.expanduser(recipe.output_dir or os.path.join("runs", recipe.source.name))


def _resolve_precision(recipe: Recipe, settings: ResolvedSettings) -> str:
    wish, key = recipe.accelerate.mixed_precision, "accelerate.mixed_precision"
    cuda = uses_gpu()
    if wish == "fp16" and not cuda:
        raise RunError(f"{key}: fp16 needs a GPU, and there is none; allowed here are no, bf16 and auto")
    if wish != "auto":
        return wish
    if not cuda:
        return settings.resolve(key, "no", "on a CPU bf16 is slower for many models; try bf16")
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return settings.resolve(key, "bf16", "the GPU has it")
    return settings.resolve(key, "fp16", "the GPU has no bf16")


def _note_overruled(recipe: Recipe, precision: str, settings: ResolvedSettings) -> None:
    """Say what the launcher states that is not done."""
    stated, steps = launcher_precision(), recipe.accelerate.gradient_accumulation_steps
    if stated not in (None, precision):
        why = {"fp16": ", which needs a GPU", "fp8": ", which is not built"}.get(str(stated), "")
        why = why if "accelerate.mixed_precision" in settings.resolved else ""
        settings.note(f"the launch configuration says mixed precision {stated}{why}; the recipe's {precision} is used")
    launched = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if launched not in ("1", "auto", str(steps)):
        settings.note(f"the launch configuration says {launched} accumulation steps; the recipe's {steps} is used")
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no" and recipe.accelerate.compile is not True:
        settings.note(f"the launch configuration says to compile with {backend}; the recipe's compile=false is used")


@contextmanager
def _overruled_environment() -> Iterator[None]:
    """Keep from an Accelerator that is made within what would overrule the recipe, and put it back.

    With OMP_NUM_THREADS unset, accelerate sets the threads of a process among several to all physical cores of its
    share of the machine, those that it may not use included.
    """
    overruling = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DYNAMO_BACKEND")
    before = {name: os.environ.get(name) for name in (*overruling, THREADS)}
    for name in overruling:
        os.environ.pop(name, None)
    os.environ[THREADS] = str(torch.get_num_threads())
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
