"""A run without a recipe is restored with the settings that decided its result, or a message names the difference."""

from __future__ import annotations

import functools
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.processes import reset_accelerate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from hf_fasttrain import Ema, Trainer, build_schedule
from hf_fasttrain.run_folder.checkpoint import checkpoint_path
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.train.user_settings import name_of, plain_value
from hf_fasttrain.utils.errors import RunError

IMAGES = TensorDataset(torch.randn(24, 4), torch.arange(24) % 3)


def three_times(logits: Tensor, labels: Tensor) -> Tensor:
    return 3 * F.cross_entropy(logits, labels)


def halve_lr(update: int) -> float:
    return 0.5**update


class Warm(nn.Module):
    """A loss with a setting, and a counter that changes during training."""

    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.temperature, self.calls = temperature, 0

    def forward(self, logits: Tensor, labels: Tensor) -> Tensor:
        self.calls += 1
        return F.cross_entropy(logits / self.temperature, labels)


def build_trainer(folder: Path, steps: int, **options: Any) -> Trainer:
    reset_accelerate()
    torch.manual_seed(0)
    model = nn.Linear(4, 3)
    size, kind = options.pop("batch_size", 8), options.pop("kind", torch.optim.SGD)
    groups = options.pop("groups", model.parameters)
    optimizer = kind(
        groups(model) if groups is groups_of else groups(), **{"lr": 0.1, **options.pop("of_optimizer", {})}
    )
    average = options.pop("decay", None)
    options |= {"ema": Ema(model, average)} if average else {}
    loader = DataLoader(IMAGES, size)
    return Trainer(
        model,
        loader,
        optimizer,
        duration=f"{steps} steps",
        output_dir=folder,
        report=False,
        log=RunLog(folder, show=False),
        **options,
    )


def groups_of(model: nn.Linear) -> list[dict[str, Any]]:
    return [{"params": [model.weight]}, {"params": [model.bias], "lr": 0.3}]


CHANGED: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({}, {"of_optimizer": {"lr": 1.0}}, "optimizer.lr: 0.1 in the run, 1.0 now"),
    ({}, {"of_optimizer": {"momentum": 0.9}}, "optimizer.momentum: 0 in the run, 0.9 now"),
    ({}, {"kind": torch.optim.AdamW}, "optimizer: 'torch.optim.sgd.SGD' in the run, 'torch.optim.adamw.AdamW' now"),
    ({}, {"groups": groups_of}, r"optimizer.lr: 0.1 in the run, \[0.1, 0.3\] now"),
    ({}, {"loss": three_times}, "loss: 'torch.nn.functional.cross_entropy' in the run, '.*three_times' now"),
    ({"loss": Warm(1.0)}, {"loss": Warm(2.0)}, "loss.temperature: 1.0 in the run, 2.0 now"),
    (
        {"loss": nn.CrossEntropyLoss()},
        {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)},
        "loss.label_smoothing: 0.0 in the run, 0.1 now",
    ),
    ({}, {"schedule": halve_lr}, "schedule: 'hf_fasttrain.train.schedule.constant' in the run, '.*halve_lr' now"),
    (
        {"schedule": build_schedule("cosine", num_steps=6, warmup_steps=1)},
        {"schedule": build_schedule("exponential", num_steps=6, warmup_steps=1)},
        r"schedule: '.*Warmup\(Cosine\)' in the run, '.*Warmup\(Exponential\)' now",
    ),
    ({}, {"clip_norm": 1.0}, "clip_norm: None in the run, 1.0 now"),
    ({"decay": 0.5}, {"decay": 0.9}, "ema.decay: 0.5 in the run, 0.9 now"),
    ({}, {"batch_size": 12}, "images per step: 8 in the run, 12 now\n  steps per epoch: 3 in the run, 2 now"),
]


@pytest.mark.parametrize(("before", "now", "message"), CHANGED)
def test_changed_result_settings_of_a_trainer_are_refused_with_both_values(
    before: dict[str, Any], now: dict[str, Any], message: str, tmp_path: Path
) -> None:
    build_trainer(tmp_path / "run", 6, **before).fit()
    with pytest.raises(RunError, match=message) as error:
        build_trainer(tmp_path / "run", 12, **now).restore()
    weights = checkpoint_path(tmp_path / "run/checkpoints", 6) / "model.safetensors"
    assert f"another output_dir, and load {weights} into the model. duration, evaluate_every," in str(error.value)
    resumed = build_trainer(tmp_path / "run", 12, **before)
    resumed.restore()
    assert resumed.fit().steps == 12


def test_settings_that_do_not_affect_the_result_may_change(tmp_path: Path) -> None:
    build_trainer(tmp_path / "run", 3, of_optimizer={"foreach": True}).fit()
    changed: dict[str, Any] = {"accumulation_steps": 2, "evaluate_every": "1 step", "log_every": 1}
    resumed = build_trainer(tmp_path / "run", 6, of_optimizer={"foreach": False}, **changed)
    resumed.restore()
    assert resumed.fit().steps == 6


def test_a_run_of_an_older_version_is_restored_as_before(tmp_path: Path) -> None:
    first = build_trainer(tmp_path / "run", 3)
    first.resume_settings = {}
    first.fit()
    resumed = build_trainer(tmp_path / "run", 6, of_optimizer={"lr": 0.2})
    resumed.restore()
    assert resumed.fit().steps == 6


def test_a_duration_shorter_than_the_run_is_refused_by_its_python_name(tmp_path: Path) -> None:
    build_trainer(tmp_path / "run", 6).fit()
    with pytest.raises(RunError, match="step_00000006: duration is 3 steps, and 6 are done already"):
        build_trainer(tmp_path / "run", 3).restore()


def test_names_are_those_used_to_import_them(tmp_path: Path) -> None:
    assert name_of(three_times).endswith("test_user_settings.three_times")
    assert name_of(functools.partial(three_times, labels=1)) == name_of(three_times)
    assert name_of(Warm(1.0)) == name_of(Warm)
    assert name_of(math.sqrt) == "math.sqrt"
    assert plain_value([torch.tensor(0.5), (1, None), print]) == [0.5, [1, None], "builtins.print"]
    script = tmp_path / "mine.py"
    script.write_text(
        "from hf_fasttrain.train.user_settings import name_of\n"
        "def loss(): ...\n"
        "if __name__ == '__main__':\n"
        "    import mine\n"
        "    assert name_of(loss) == name_of(mine.loss) == 'mine.loss', name_of(loss)\n"
    )
    subprocess.run([sys.executable, str(script)], check=True)
