"""A user's program under a launcher: one model for all processes, and seeds set by torch.manual_seed."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from helpers.processes import reset_accelerate, run_processes
from helpers.small_trainer import small_trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from hf_fasttrain import Trainer
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.utils.errors import RunError

IMAGES = TensorDataset(torch.arange(24.0).reshape(24, 1) / 24, torch.arange(24) % 3)


def as_under_torchrun() -> None:
    """Keep only the environment that torchrun sets, without that of `accelerate launch`."""
    del os.environ["ACCELERATE_USE_CPU"]


def trained_by_torchrun(share: bool) -> tuple[int, Tensor, list[str]]:
    as_under_torchrun()
    torch.manual_seed(int(os.environ["RANK"]))  # different initial weights on each process
    model = nn.Linear(1, 3)
    sampler = DistributedSampler(IMAGES, 2, int(os.environ["RANK"])) if share else None
    loader = DataLoader(IMAGES, 4, sampler=sampler)
    trainer = Trainer(model, loader, torch.optim.SGD(model.parameters(), lr=1e-3), log=RunLog(show=False))
    result = trainer.fit()
    return trainer.processes.number, model.weight.detach(), result.notes


def test_torchrun_on_a_cpu_trains_one_model() -> None:
    (number, first, notes), (_, second, _) = run_processes(trained_by_torchrun, True)
    assert number == 2
    assert torch.equal(first, second)
    assert notes == []


def test_a_loader_that_gives_all_images_to_each_process_is_refused() -> None:
    (_, _, notes), _ = run_processes(trained_by_torchrun, False)
    (note,) = notes
    assert note.startswith("train_loader: its DataLoader gives each of 2 processes all images of its dataset")


def blind_accelerator() -> str:
    as_under_torchrun()
    accelerator = Accelerator()
    with pytest.raises(RunError) as error:
        small_trainer(accelerator=accelerator)
    with pytest.raises(RunError, match=r"create it before using anything else of accelerate"):
        small_trainer()
    return str(error.value)


def test_an_accelerator_unaware_of_the_other_processes_is_refused() -> None:
    message, _ = run_processes(blind_accelerator)
    assert message.startswith(
        "a launcher has started 2 processes, but the Accelerator knows of 1: each would train its"
    )


def losses(torchs_seed: int, **options: Any) -> list[float]:
    """Return the losses of a model with dropout over two epochs in a random order."""
    reset_accelerate()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(1, 6), nn.Dropout(0.5), nn.Linear(6, 3))
    torch.manual_seed(torchs_seed)
    loader = DataLoader(IMAGES, 8, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-9)  # so that weights stay as they are
    trainer = Trainer(model, loader, optimizer, duration="2 epochs", log=RunLog(show=False), **options)
    seen = []
    with trainer.running():
        for report in trainer.iterate():
            seen.append(float(report.loss))
    return seen


def test_dropout_and_order_follow_torchs_seed_unless_one_is_given() -> None:
    assert losses(1) == losses(1)
    assert losses(1)[3:] != pytest.approx(losses(2)[3:])
    assert losses(1, seed=5)[3:] == pytest.approx(losses(2, seed=5)[3:])


def seeds() -> int:
    torch.manual_seed(int(os.environ["RANK"]) + 7)
    model = nn.Linear(1, 3)
    trainer = Trainer(model, DataLoader(IMAGES, 8), torch.optim.SGD(model.parameters(), 0.1))
    return int(trainer.state.seed or 0)


def test_all_processes_use_the_main_processs_seed() -> None:
    assert run_processes(seeds) == [7, 7]


def test_a_restored_run_keeps_its_seed(tmp_path: Path) -> None:
    torch.manual_seed(11)
    model = nn.Linear(1, 3)
    data = [(torch.zeros(2, 1), torch.zeros(2, dtype=torch.long))]

    def build_trainer(**options: Any) -> Trainer:
        reset_accelerate()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        return Trainer(model, data, optimizer, output_dir=tmp_path / "run", report=False, **options)

    build_trainer().fit()
    torch.manual_seed(12)
    resumed = build_trainer(duration="2 epochs")
    resumed.restore()
    assert resumed.state.seed == 11
    with pytest.raises(RunError, match="seed is 12 now, and 11 in the run; leave it out"):
        build_trainer(duration="2 epochs", seed=12).restore()
