"""A user's plain DataLoader: resumed at the end of an epoch, left within one, and its processes ended with the loop."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from helpers.processes import reset_accelerate, run_processes
from helpers.runs import steps_of
from torch import nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, TensorDataset

from hf_fasttrain import Stopped, Trainer
from hf_fasttrain.data.loading.user_loader import UserLoader
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.train.step_loss import At
from hf_fasttrain.utils.errors import RunError

STEPS = 5  # an epoch's
IMAGES = TensorDataset(torch.arange(20.0).reshape(20, 1) / 20, torch.arange(20) % 3)


class Noisy(Dataset[Any]):
    """Images with noise from Python's generator, like augmentations in the main process."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        return IMAGES[index][0] + random.random(), IMAGES[index][1]


def plain(**options: Any) -> DataLoader[Any]:
    return DataLoader(IMAGES, 4, shuffle=True, **options)


def with_generator() -> DataLoader[Any]:
    return plain(generator=torch.Generator().manual_seed(4))


def noisy() -> DataLoader[Any]:
    return DataLoader(Noisy(), 4, shuffle=True)


def sampled() -> DataLoader[Any]:
    return DataLoader(IMAGES, 4, sampler=DistributedSampler(IMAGES, 1, 0, shuffle=True, seed=9))


def list_loader() -> list[Any]:
    return list(DataLoader(IMAGES, 4))


def build_trainer(loader: Any, steps: int, folder: Path | None = None, **options: Any) -> Trainer:
    reset_accelerate()
    torch.manual_seed(3)
    random.seed(3)
    model = nn.Sequential(nn.Linear(1, 8), nn.Dropout(0.5), nn.Linear(8, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    options = {"report": False, "log": RunLog(folder, show=False), **options}
    batches = loader() if callable(loader) else loader
    return Trainer(model, batches, optimizer, duration=f"{steps} steps", output_dir=folder, **options)


def same_weights(one: Trainer, other: Trainer) -> bool:
    return all(map(torch.equal, one.raw_model.state_dict().values(), other.raw_model.state_dict().values()))


def left_at(trainer: Trainer, step: int) -> None:
    """Train to a step, leave the loop, and wait for writing."""
    with trainer.running():
        for report in trainer.iterate():
            if report.step == step:
                break


@pytest.mark.parametrize("loader", [plain, with_generator, noisy, sampled, list_loader])
def test_a_plain_loader_is_resumed_at_an_epochs_end_as_if_never_stopped(loader: Any, tmp_path: Path) -> None:
    uninterrupted = build_trainer(loader, 3 * STEPS)
    uninterrupted.fit()
    left_at(build_trainer(loader, 3 * STEPS, tmp_path / "run", checkpoint_every="1 epoch"), 2 * STEPS)
    resumed = build_trainer(loader, 3 * STEPS, tmp_path / "run")
    random.seed(99)
    resumed.restore()
    assert resumed.state.step == 2 * STEPS
    resumed.fit()
    assert same_weights(resumed, uninterrupted)


def test_steps_after_the_last_full_epoch_are_repeated_and_reported_before_the_first_step(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uninterrupted = build_trainer(plain, 3 * STEPS)
    uninterrupted.fit()
    options: dict[str, Any] = {"checkpoint_every": "1 step", "log": None}
    first = build_trainer(plain, 3 * STEPS, tmp_path / "run", **options)
    left_at(first, 2 * STEPS + 3)
    (note,) = [note for note in first.log.notes if "train_loader" in note]
    assert note == (
        "train_loader does not store its position within an epoch: restore() continues from the newest checkpoint at "
        "the end of an epoch (5 steps); torchdata's StatefulDataLoader can continue from any checkpoint"
    )
    assert steps_of(tmp_path / "run") == [
        10,
        12,
        13,
    ]  # the one that can be resumed is kept in addition to the newest two
    capsys.readouterr()
    resumed = build_trainer(plain, 3 * STEPS, tmp_path / "run", log=None)
    resumed.restore()
    expected_message = capsys.readouterr().out
    assert expected_message.count("is within an epoch, and train_loader does not store its position") == 2
    assert "step 10 of 15" in expected_message
    resumed.fit()
    assert same_weights(resumed, uninterrupted)


@pytest.mark.parametrize(
    ("step", "expected_message"),
    [(3, "Trainer.restore() starts the training over"), (8, "continues from step 5, the end of an epoch")],
)
def test_a_stop_promises_only_what_a_restore_can_do(step: int, expected_message: str, tmp_path: Path) -> None:
    class Signalled:
        takes_part = False

        def before_step(self, trainer: Trainer, at: At) -> None:
            if at.step == step:
                os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Stopped) as error:
        build_trainer(plain, 3 * STEPS, tmp_path / "run", callbacks=[Signalled()]).fit()
    assert str(error.value) == (
        f"stopped by SIGTERM after step {step} of 15; its state is saved, but train_loader does not store its position "
        f"within an epoch: {'' if step == 3 else 'Trainer.restore() '}{expected_message}"
    )
    resumed = build_trainer(plain, 3 * STEPS, tmp_path / "run")
    resumed.restore()
    assert resumed.state.step == step // STEPS * STEPS
    resumed.fit()
    uninterrupted = build_trainer(plain, 3 * STEPS)
    uninterrupted.fit()
    assert same_weights(resumed, uninterrupted)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_loaders_processes_end_with_the_loop_and_the_next_loop_continues(persistent: bool) -> None:
    def workers() -> DataLoader[Any]:
        return plain(num_workers=1, persistent_workers=persistent)

    def children() -> set[int]:
        return {child.pid for child in psutil.Process().children()}

    before = children()
    uninterrupted = build_trainer(workers, 2 * STEPS, eval_loader=workers(), num_classes=3)
    uninterrupted.fit()
    assert children() == before
    parts = build_trainer(workers, 2 * STEPS)
    for stop in (2, 5, 8, 10):
        left_at(parts, stop)
        assert children() == before
    assert same_weights(parts, uninterrupted)
    failing = build_trainer(workers, 2 * STEPS)
    with pytest.raises(ZeroDivisionError), failing.running():  # noqa: PT012 - a loop
        next(failing.iterate())
        raise ZeroDivisionError
    assert children() == before


def test_an_image_that_fails_loses_no_other_image() -> None:
    class Fails(Dataset[Any]):
        calls = 0

        def __len__(self) -> int:
            return 20

        def __getitem__(self, index: int) -> Any:
            Fails.calls += 1
            if Fails.calls == 30:
                raise ZeroDivisionError
            return IMAGES[index]

    uninterrupted = build_trainer(plain, 2 * STEPS)
    uninterrupted.fit()
    trainer = build_trainer(lambda: DataLoader(Fails(), 4, shuffle=True), 2 * STEPS)
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    trainer.fit()
    assert same_weights(trainer, uninterrupted)


def saved_by_two(folder: Path) -> None:
    rank = int(os.environ["RANK"])
    loader = DataLoader(IMAGES, 2, sampler=DistributedSampler(IMAGES, 2, rank))
    build_trainer(loader, STEPS, folder).fit()


def test_at_an_epochs_end_the_number_of_processes_may_change(tmp_path: Path) -> None:
    run_processes(saved_by_two, tmp_path / "run")
    single = build_trainer(plain, 2 * STEPS, tmp_path / "run")
    single.restore()
    assert single.state.step == STEPS
    assert single.fit().steps == 2 * STEPS


def test_set_epoch_is_called_on_the_loader_and_its_samplers() -> None:
    epochs: list[int] = []

    class Counted(DistributedSampler[Any]):
        def set_epoch(self, epoch: int) -> None:
            epochs.append(epoch)
            super().set_epoch(epoch)

    build_trainer(DataLoader(IMAGES, 4, sampler=Counted(IMAGES, 1, 0)), 2 * STEPS).fit()
    assert epochs == [0, 1]


class Reloaded:
    """A loader with a position, for a run that had none."""

    def __init__(self) -> None:
        self.batches = list_loader()

    def __len__(self) -> int:
        return STEPS

    def __iter__(self) -> Any:
        return iter(self.batches)

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        raise AssertionError


def test_the_end_of_an_epoch_is_recognised_for_any_loader(tmp_path: Path) -> None:
    build_trainer(list_loader, STEPS, tmp_path / "run").fit()
    resumed = build_trainer(Reloaded, 2 * STEPS, tmp_path / "run")
    resumed.restore()
    resumed.fit()
    uninterrupted = build_trainer(list_loader, 2 * STEPS)
    uninterrupted.fit()
    assert same_weights(resumed, uninterrupted)


def test_a_state_within_an_epoch_is_refused_by_a_loader_without_a_position() -> None:
    loader = UserLoader(list_loader(), torch.device("cpu"))
    state = {"loader": None, "passed": 3, "steps_per_epoch": STEPS}
    with pytest.raises(RunError, match="can't resume within an epoch: train_loader does not store its position"):
        loader.load_state_dict(state)
    with pytest.raises(RunError, match="its position was saved by another number of processes"):
        loader.load_state_dict(state, same_processes=False)
    with pytest.raises(RunError, match="can't resume within an epoch"):
        loader.load_state_dict(None)


@pytest.mark.parametrize("nested", ["images", "targets"])
def test_a_nested_batch_that_model_or_loss_cannot_take_is_refused(nested: str) -> None:
    images, labels = next(iter(DataLoader(IMAGES, 4)))
    batch = ((images, torch.ones(4)), labels) if nested == "images" else (images, (labels, torch.ones(4)))
    kinds = r"\(a tuple\), and the loss its targets \(a tensor\)", r"\(a tensor\), and the loss its targets \(a tuple\)"
    expected_message = f"{kinds[nested == 'targets']}; one of them can't take that .TypeError: .*: give a step_loss"
    with pytest.raises(RunError, match=expected_message):
        build_trainer([batch], 1).fit()
