"""The Accelerator of a run, from launcher and recipe: precision, threads, and torch's process-wide switches.

Only this file, train/launcher.py and utils/launch_variables.py read the launchers' environment, and only this one sets
those switches.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
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
from hf_fasttrain.run_folder.file_names import TRACKERS_FOLDER
from hf_fasttrain.train.launcher import uses_gpu
from hf_fasttrain.utils.environment import num_cores, set_current_device
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.launch_variables import LOCAL_PROCESSES, require_launch_variables
from hf_fasttrain.utils.limits import require_threads
from hf_fasttrain.utils.private_apis import raise_recompile_limit, reset_precision

# Only accelerate launch and torchrun export these variables, and always do.
LAUNCHER_VARIABLES = ("ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID")
# Variables of other ways to distribute a model, which are not supported.
NOT_SUPPORTED = {
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
    "ACCELERATE_USE_PARALLELISM_CONFIG": "tensor or context parallelism",
}
THREADS_VARIABLE = "OMP_NUM_THREADS"


def build_accelerator(recipe: Recipe, settings: ResolvedSettings) -> Accelerator:
    """Return the Accelerator of a recipe whose machine settings are resolved (no `auto`).

    Raises RunError for a launch configuration that is not supported (DeepSpeed, FSDP) or makes no sense, and for a
    precision that the device does not have.
    """
    require_launch_variables()
    for variable, name in NOT_SUPPORTED.items():
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise RunError(f"the launch configuration asks for {name}, which is not supported; use accelerate_configs/")
    require_trackers(recipe.log.trackers)
    settings.launched = was_launched()
    _set_threads(recipe, settings)
    set_fp32_precision(recipe.accelerate.matmul_precision, recipe.accelerate.conv_precision)
    precision = _precision(recipe)
    reset_precision(precision)
    steps = recipe.accelerate.gradient_accumulation_steps
    _note_overridden_settings(recipe, precision, settings)
    folder = output_dir(recipe)
    set_deterministic(recipe.accelerate.deterministic, torch.device("cuda" if uses_gpu() else "cpu"))
    with _without_launcher_settings():
        accelerator = Accelerator(
            mixed_precision=precision,
            gradient_accumulation_steps=1 if steps == "auto" else steps,
            log_with=list(recipe.log.trackers) or None,
            project_config=ProjectConfiguration(project_dir=folder, logging_dir=os.path.join(folder, TRACKERS_FOLDER)),
            # Running statistics are averaged before evaluation and saving, instead of rank 0's replacing all others.
            kwargs_handlers=[DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)],
        )
    set_current_device(accelerator)
    return accelerator


def _set_threads(recipe: Recipe, settings: ResolvedSettings) -> None:
    """Set the threads of a process that trains on a CPU. Raises RunError if it may not have so many."""
    if uses_gpu():
        return
    threads, cores = int(recipe.accelerate.cpu_threads), num_cores()
    if threads > cores:
        settings.note(
            f"accelerate.cpu_threads={threads}: on {cores} core{'s' * (cores > 1)} so many are slower than {cores}"
        )
    require_threads(threads - 1, f"accelerate.cpu_threads={threads}")  # libgomp ends the process if one is refused
    torch.set_num_threads(threads)
    os.environ.setdefault("ACCELERATE_USE_CPU", "true")  # so that processes communicate over gloo


def require_trackers(trackers: Sequence[str]) -> None:
    """Raise RunError for experiment trackers that are not installed."""
    installed = {tracker.value for tracker in get_available_trackers()}
    missing = sorted(set(trackers) - installed)
    if missing:
        raise RunError(
            f"log.trackers: {' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed; install with "
            f"pip install 'hf_fasttrain[trackers]', or leave {'it' if len(missing) == 1 else 'them'} out"
        )


def _precision(recipe: Recipe) -> str:
    precision: str = recipe.accelerate.mixed_precision
    if precision == "fp16" and not uses_gpu():
        raise RunError(
            "accelerate.mixed_precision: fp16 needs a GPU, and there is none; on a CPU, use no, bf16 or auto"
        )
    return precision


def _note_overridden_settings(recipe: Recipe, precision: str, settings: ResolvedSettings) -> None:
    """Add a note for each setting of the launcher that the recipe overrides."""
    launched, steps = launcher_precision(), recipe.accelerate.gradient_accumulation_steps
    if launched not in (None, precision):
        reason = {"fp16": ", which needs a GPU", "fp8": ", which is not supported"}.get(str(launched), "")
        reason = reason if settings.is_open("accelerate.mixed_precision") else ""
        settings.note(
            f"the launch configuration says mixed precision {launched}{reason}; the recipe's {precision} is used"
        )
    launcher_steps = os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if launcher_steps not in ("1", "auto", str(steps)):
        settings.note(
            f"the launch configuration says {launcher_steps} accumulation steps; the recipe's {steps} is used"
        )
    backend = os.environ.get("ACCELERATE_DYNAMO_BACKEND", "no")
    if backend.lower() != "no" and recipe.accelerate.compile is not True:
        settings.note(f"the launch configuration says to compile with {backend}; the recipe's compile=false is used")


@contextmanager
def _without_launcher_settings() -> Iterator[None]:
    """Hide environment variables that would override the recipe while an Accelerator is created.

    Without OMP_NUM_THREADS, accelerate sets the threads of a distributed process to its share of all physical cores,
    including those that it may not use.
    """
    variables = ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_DYNAMO_BACKEND")
    previous = {name: os.environ.get(name) for name in (*variables, THREADS_VARIABLE)}
    for name in variables:
        os.environ.pop(name, None)
    os.environ[THREADS_VARIABLE] = str(torch.get_num_threads())
    try:
        yield
    finally:
        for name, value in previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def was_launched() -> bool:
    """Return whether accelerate launch or torchrun started this process, by their environment variables."""
    return any(variable in os.environ for variable in ("ACCELERATE_MIXED_PRECISION", *LAUNCHER_VARIABLES))


def launcher_precision() -> str | None:
    """Return the launcher's mixed precision, None for "no", which it exports by default."""
    precision = os.environ.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    return None if precision == "no" else precision


def local_processes() -> int:
    """Return the number of training processes on this machine."""
    return max(1, get_int_from_env(LOCAL_PROCESSES, 1))


def user_threads() -> int | None:
    """Return the number of threads in the user's OMP_NUM_THREADS, None if the user has not set it.

    A value that a launcher chose is not the user's: torchrun exports 1, `accelerate launch` 1 or the host's physical
    cores. It is the user's if the launcher was started with the variable or with --num_cpu_threads_per_process.
    """
    value = _parse_threads(os.environ.get(THREADS_VARIABLE))
    if value is None or not was_launched():
        return value
    launcher = _launcher()
    with suppress(psutil.Error, OSError):
        if launcher is not None:
            is_option_set = any(argument.startswith("--num_cpu_threads_per_process") for argument in launcher.cmdline())
            return value if is_option_set or _parse_threads(launcher.environ().get(THREADS_VARIABLE)) else None
    return None if value in _default_launcher_threads() else value


def _parse_threads(text: str | None) -> int | None:
    """Return the outermost number of threads in a value of OMP_NUM_THREADS; None if it is not valid."""
    first = (text or "").split(",")[0].strip()
    return int(first) if first.isdecimal() and int(first) > 0 else None


def _launcher() -> psutil.Process | None:
    """Return the closest parent process that no launcher started, None if it can't be inspected."""
    with suppress(psutil.Error, OSError):
        for process in psutil.Process().parents():
            if not any(variable in process.environ() for variable in LAUNCHER_VARIABLES):
                return process
    return None


def _default_launcher_threads() -> set[int]:
    """Return the numbers of threads that launchers choose by default."""
    physical = psutil.cpu_count(logical=False) or 1
    return {1, physical // local_processes()}


def set_fp32_precision(matmul: str, conv: str) -> None:
    """Set the precision of fp32 matrix products and convolutions: highest: fp32, high: TF32, medium: bf16.

    TF32 is for GPUs, bf16 for CPUs (oneDNN); without hardware support nothing changes.
    """
    torch.set_float32_matmul_precision(matmul)
    torch.backends.cudnn.allow_tf32 = conv != "highest"  # of conv alone, reading cuDNN's flags would raise afterwards
    onednn = getattr(torch.backends.mkldnn, "conv", None)
    if onednn is not None and hasattr(onednn, "fp32_precision"):  # torch 2.9 and newer
        onednn.fp32_precision = "bf16" if conv == "medium" else "ieee"


def set_deterministic(enabled: bool, device: torch.device) -> None:
    """Use deterministic algorithms, or else let cuDNN benchmark its algorithms and choose the fastest.

    Operations without a deterministic implementation warn once. Call it before CUDA is used: cuBLAS reads its
    environment variable only then.
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if enabled or torch.are_deterministic_algorithms_enabled():
        torch.use_deterministic_algorithms(enabled, warn_only=True)
    torch.backends.cudnn.deterministic = enabled
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not enabled


def use_cudnn_benchmark(device: torch.device) -> None:
    """Let cuDNN benchmark its algorithms on a GPU, unless deterministic algorithms are on."""
    if device.type == "cuda":
        torch.backends.cudnn.benchmark = not torch.are_deterministic_algorithms_enabled()


def allow_compiling(shapes: int) -> None:
    """Raise the compiler's limit to `shapes` batch shapes: those beyond its limit would run uncompiled to the end.

    The limit is doubled for the moving average, with some room for batches that are split when memory runs out.
    """
    raise_recompile_limit(2 * shapes + 8)
