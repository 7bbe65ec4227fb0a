"""What a launcher and a recipe say of this process: the Accelerator, its threads, and torch's process-wide switches.

This file alone reads the launchers' environment and sets those switches.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import psutil
import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from accelerate.utils.environment import get_int_from_env

from hf_fasttrain.recipe.load import output_dir
from hf_fasttrain.recipe.resolved import ResolvedSettings
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.utils.environment import set_current_device
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.private_apis import raise_recompile_limit, reset_precision

# What accelerate launch and torchrun export in any case, and nobody else does.
LAUNCHER_MARKS = ("ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID")
# What other ways of distributing a model announce themselves by.
NOT_BUILT = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}
# What torchrun and accelerate export, then what mpirun does, as far as accelerate knows it.
LOCAL_PROCESSES = ("LOCAL_WORLD_SIZE", "MPI_LOCALNRANKS", "OMPI_COMM_WORLD_LOCAL_SIZE", "MV2_COMM_WORLD_LOCAL_SIZE")
PROCESSES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
THREADS_VARIABLE = "OMP_NUM_THREADS"


def build_accelerator(recipe: Recipe, settings: ResolvedSettings) -> Accelerator:
    """Return the Accelerator of a recipe whose `auto` of machine settings is resolved.

    Raises RunError for a launch configuration that is not built (DeepSpeed, FSDP, fp8) and for a precision that the
    device does not have.
    """
    for variable, name in NOT_BUILT.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise RunError(f"the launch configuration asks for {name}, which is not built; use accelerate_configs/")
    _require_trackers(recipe)
    settings.launched = was_launched()
    _set_threads(recipe)
    set_fp32_precision(recipe.accelerate.matmul_precision, recipe.accelerate.conv_precision)
    precision = _precision(recipe)
    reset_precision(precision)
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
    set_current_device(accelerator)
    return accelerator


def _set_threads(recipe: Recipe) -> None:
    """Set the threads of a process that trains on a CPU."""
    if uses_gpu():
        return
    torch.set_num_threads(int(recipe.accelerate.cpu_threads))
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # so that several processes meet over gloo


def _require_trackers(recipe: Recipe) -> None:
    installed = {tracker.value for tracker in get_available_trackers()}
    missing = sorted(set(recipe.log.trackers) - installed)
    if missing:
        raise RunError(
            f"log.trackers: {', '.join(missing)} not installed; pip install 'hf_fasttrain[trackers]' or leave it out"
        )


def _precision(recipe: Recipe) -> str:
    precision: str = recipe.accelerate.mixed_precision
    if precision == "fp16" and not uses_gpu():
        raise RunError(
            "accelerate.mixed_precision: fp16 needs a GPU, and there is none; allowed here are no, bf16 and auto"
        )
    return precision


def _note_overruled(recipe: Recipe, precision: str, settings: ResolvedSettings) -> None:
    """Say what the launcher states that is not done."""
    stated, steps = launcher_precision(), recipe.accelerate.gradient_accumulation_steps
    if stated not in (None, precision):
        why = {"fp16": ", which needs a GPU", "fp8": ", which is not built"}.get(str(stated), "")
        why = why if settings.is_open("accelerate.mixed_precision") else ""
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
    before = {name: os.environ.get(name) for name in (*overruling, THREADS_VARIABLE)}
    for name in overruling:
        os.environ.pop(name, None)
    os.environ[THREADS_VARIABLE] = str(torch.get_num_threads())
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# --- what the launcher says ----------------------------------------------------------------------------------


def was_launched() -> bool:
    """Return whether accelerate launch or torchrun started this process, as their variables tell."""
    return any(mark in os.environ for mark in ("ACCELERATE_MIXED_PRECISION", *LAUNCHER_MARKS))


def launcher_precision() -> str | None:
    """Return the mixed precision that the launcher asks for, None if it says nothing: "no" is exported always."""
    stated = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return None if stated == "no" else stated


def uses_gpu() -> bool:
    """Return whether training runs on a GPU: there is one, and the launcher does not say to use the CPU."""
    return torch.cuda.is_available() and os.environ.get("ACCELERATE_USE_CPU", "false").lower() != "true"


def local_processes() -> int:
    """Return how many training processes this machine has."""
    return max(1, get_int_from_env(LOCAL_PROCESSES, 1))


def num_processes() -> int:
    """Return how many training processes there are, on all machines."""
    return max(1, get_int_from_env(PROCESSES, 1))


def user_threads() -> int | None:
    """Return what the user's OMP_NUM_THREADS asks for, None if nothing does.

    One that a launcher exports is not the user's: torchrun exports 1, `accelerate launch` 1 or the host's physical
    cores. It is if the launcher was started with the variable, or was told with how many threads to start processes.
    """
    value = _number(os.environ.get(THREADS_VARIABLE))
    if value is None or not was_launched():
        return value
    launcher = _launcher()
    with suppress(psutil.Error, OSError):
        if launcher is not None:
            passed = any(word.startswith("--num_cpu_threads_per_process") for word in launcher.cmdline())
            return value if passed or _number(launcher.environ().get(THREADS_VARIABLE)) else None
    return None if value in _launchers_choices() else value


def _number(text: str | None) -> int | None:
    """Return the threads that a value of OMP_NUM_THREADS asks for, at its outermost level; None if it is none."""
    first = (text or "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


def _launcher() -> psutil.Process | None:
    """Return the nearest process above this one that no launcher started, None if it can't be looked at."""
    with suppress(psutil.Error, OSError):
        for process in psutil.Process().parents():
            if not any(mark in process.environ() for mark in LAUNCHER_MARKS):
                return process
    return None


def _launchers_choices() -> set[int]:
    """Return the numbers of threads that launchers choose by themselves."""
    physical = psutil.cpu_count(logical=False) or 1
    return {1, physical // local_processes()}


# --- torch's process-wide switches ---------------------------------------------------------------------------


def set_fp32_precision(matmul: str, conv: str) -> None:
    """Set what fp32 matrix products and convolutions may be rounded to: highest: fp32, high: TF32, medium: bf16.

    TF32 is a GPU's, bf16 a CPU's (oneDNN); where the hardware has it not, nothing changes.
    """
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = conv != "highest"  # of conv alone, reading cuDNN's flags would raise afterwards
    onednn = getattr(torch.backends.mkldnn, "conv", None)
    if onednn is not None and hasattr(onednn, "fp32_precision"):  # torch 2.9 and newer
        onednn.fp32_precision = "bf16" if conv == "medium" else "ieee"


def set_deterministic(wanted: bool, device: torch.device) -> None:
    """Make operations give the same bits each time, or let cuDNN choose the fastest algorithms by trying them.

    What has no deterministic form warns once. Has to be called before CUDA is used, as cuBLAS then reads its variable.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if wanted or torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(wanted, warn_only=True)
    torch.backends.cudnn.deterministic = wanted
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not wanted


def use_cudnn_benchmark(device: torch.device) -> None:
    """Let cuDNN try its algorithms on a GPU, unless the same bits were asked for."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()


def allow_compiling(shapes: int) -> None:
    """Let the compiler make code for so many shapes: one more than its limit would be run uncompiled to the end.

    Twice, for the model and its moving average, and some for batches that are cut when memory runs out.
    """
    raise_recompile_limit(2 * shapes + 8)
