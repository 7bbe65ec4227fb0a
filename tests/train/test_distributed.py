"""The launchers themselves: torchrun with two processes, accelerate launch, and python -m."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from hf_fasttrain.recipe.resolved import read_settings
from hf_fasttrain.utils.environment import num_cores

ROOT = Path(__file__).parents[2]
OVERRIDES = ["train.duration=3 steps", "train.batch_size=6", "data.eval_fraction=0.02", "augment.mixup=0.5"]
# A model without batch norm and dropout, so that one and two processes agree to rounding.
OVERRIDES += ["model.name=test_vit", "optimizer.name=sgd", "accelerate.mixed_precision=no"]


def launch(command: list[str], expected_status: int = 0, **environment: str) -> str:
    """Return the output of a launcher."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("ACCELERATE_", "OMP_"))}
    process = subprocess.run(
        command, capture_output=True, text=True, check=False, cwd=ROOT, env=clean | environment, timeout=280
    )
    assert process.returncode == expected_status, process.stdout + process.stderr
    return process.stdout + process.stderr


def test_torchrun_with_two_processes_and_accelerate_launch_give_the_same_weights(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = str(write_recipe())
    module = ["-m", "hf_fasttrain", recipe, *OVERRIDES]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file"]
    accelerate += ["accelerate_configs/cpu.yaml"]
    commands = {"torchrun": torchrun, "accelerate": accelerate}
    models = {}
    for name, command in commands.items():
        run = tmp_path / name
        printed = launch([*command, *module, f"output_dir={run}"])
        assert printed.count("note: no validation split") == 1  # only the main process prints
        assert printed.count("evaluation after epoch") == 1
        models[name] = load_file(run / "model" / "model.safetensors")
        result = json.loads((run / "result.json").read_text())
        assert result["images"] == 18
        processes = result["machine"]["num_processes"]
        assert processes == (2 if name == "torchrun" else 1)
        threads = read_settings(run)["accelerate.cpu_threads"]  # launchers export their own numbers
        assert threads.origin == f"default: {num_cores()} cores / {processes} processes"
    for name, value in models["accelerate"].items():
        np.testing.assert_allclose(models["torchrun"][name], value, rtol=1e-4, atol=1e-5)


def test_a_mistake_is_one_message_and_exit_status_2(write_recipe: Callable[..., Path]) -> None:
    printed = launch([sys.executable, "-m", "hf_fasttrain", str(write_recipe()), "seed=x"], expected_status=2)
    assert printed.count("error:") == 1
    assert "Traceback" not in printed
