"""Callbacks that change training, against plain loops, and through a stop and a resume."""

from __future__ import annotations

import copy
import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.callbacks import Norms, Stop
from helpers.processes import run_processes
from helpers.small_trainer import StatefulLoader
from torch import Tensor, nn

from hf_fasttrain import Callback, Ema, ReduceLROnPlateau, RunError, Trainer, Watch
from hf_fasttrain.run_folder.checkpoint import complete_checkpoints, load_checkpoint
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.train.step_loss import At
from hf_fasttrain.utils.errors import Stopped

STEPS, IMAGES = 7, 12


def share_of_batches(rank: int = 0, world: int = 1) -> StatefulLoader:
    """Return a process's share of the three batches of an epoch."""
    generator = torch.Generator().manual_seed(0)
    share = slice(rank * IMAGES // world, (rank + 1) * IMAGES // world)
    every = [(torch.randn(IMAGES, 6, generator=generator), torch.arange(IMAGES) % 3) for _ in range(3)]
    return StatefulLoader((images[share], labels[share]) for images, labels in every)


def model_with_a_frozen_layer(*, norm: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8) if norm else nn.Identity(), nn.ReLU(), nn.Linear(8, 3))
    model[:2].requires_grad_(False)
    return model


def half(update: int) -> float:
    return 1 - update / 14


def trainer_of(model: nn.Sequential, folder: Path | None, *callbacks: Any, **options: Any) -> Trainer:
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2, momentum=0.9)
    return Trainer(
        model,
        share_of_batches(rank, world),
        optimizer,
        duration=f"{STEPS} steps",
        output_dir=folder,
        report=False,
        log=RunLog(folder, show=False),
        callbacks=callbacks,
        **{"schedule": half, "clip_norm": 0.7, "checkpoint_every": f"{STEPS} steps", **options},
    )


def trained(folder: Path | None, stop: int, *callbacks: Any, norm: bool = False, **options: Any) -> Trainer:
    """Train to the end; if `stop` is a step, stop and resume there."""

    def make() -> Trainer:
        model = model_with_a_frozen_layer(norm=norm)
        return trainer_of(
            model, folder, *(each() for each in callbacks), Stop(stop), ema=Ema(model, 0.9, warmup=False), **options
        )

    trainer = make()
    if stop:
        with pytest.raises(Stopped):
            trainer.fit()
        trainer = make()
        trainer.restore()
    trainer.fit()
    return trainer


def plain_loop(change: Any, *, norm: bool = False) -> tuple[list[Tensor], list[Tensor], list[float]]:
    """Return weights, averaged weights and gradient norms of a plain loop."""
    model = model_with_a_frozen_layer(norm=norm)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.2, momentum=0.9)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, half)
    average, norms, batches = copy.deepcopy(model), [], list(share_of_batches())
    for step in range(STEPS):
        change(model, optimizer, schedule, step + 1)
        model.train()
        model[1].train(not norm or model[1].weight.requires_grad)  # a frozen batch norm does not change
        images, labels = batches[step % 3]
        F.cross_entropy(model(images), labels).backward()
        norms.append(float(nn.utils.clip_grad_norm_([p for p in model.parameters() if p.grad is not None], 0.7)))
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        with torch.no_grad():
            for mean, live in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                mean.lerp_(live, 0.1) if live.is_floating_point() else mean.copy_(live)
    return list(model.state_dict().values()), list(average.state_dict().values()), norms


class Unfreeze(Callback):
    """Trains the first layer too from step 3 on, at a quarter of the lr; has no state."""

    def before_step(self, trainer: Trainer, at: At) -> None:
        if at.step == 3:
            model: Any = trainer.raw_model
            layers = model[:2].requires_grad_(True)
            trainer.optimizer.add_param_group({"params": list(layers.parameters()), "lr": 0.05})


def unfreeze(model: Any, optimizer: Any, schedule: Any, step: int) -> None:
    if step == 3:
        layers = model[:2].requires_grad_(True)
        optimizer.add_param_group({"params": list(layers.parameters()), "lr": 0.05 * half(2), "initial_lr": 0.05})
        schedule.base_lrs.append(0.05)
        schedule.lr_lambdas.append(half)


def unfrozen(folder: Path, stop: int, accumulation: int, options: dict[str, Any]) -> dict[str, Any]:
    norms = Norms()
    trainer = trained(folder, stop, Unfreeze, lambda: norms, accumulation_steps=accumulation, **options)
    return {
        "weights": list(trainer.raw_model.state_dict().values()),
        "average": list(trainer.trained_model.state_dict().values()),
        "norms": norms.norms,
        "lr": [group["lr"] for group in trainer.optimizer.param_groups],
        "notes": trainer.log.notes,
    }


def assert_close(actual: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_unfreezing_equals_a_plain_loop_also_after_resuming(processes: int, accumulation: int, tmp_path: Path) -> None:
    weights, average, norms = plain_loop(unfreeze)
    arguments = (accumulation, {})
    uninterrupted = run_processes(unfrozen, tmp_path / "whole", 0, *arguments, num_processes=processes)
    resumed = run_processes(unfrozen, tmp_path / "resumed", 4, *arguments, num_processes=processes)
    for run in uninterrupted:
        assert_close(run["weights"], weights)
        assert_close(run["average"], average)
        assert run["norms"] == pytest.approx(norms, rel=1e-5)
        assert run["lr"] == pytest.approx([0.2 * half(6), 0.05 * half(6)])
    for before, after in zip(uninterrupted, resumed, strict=True):
        assert all(map(torch.equal, before["weights"], after["weights"]))
        assert all(map(torch.equal, before["average"], after["average"]))
        assert before["norms"] == after["norms"]
    assert resumed[0]["notes"][-1:] == [
        "2 parameters are frozen or unfrozen again, as when the checkpoint was saved (0.weight, 0.bias)"
    ]


def test_an_unfrozen_batch_norm_updates_its_statistics(tmp_path: Path) -> None:
    weights, _, norms = plain_loop(unfreeze, norm=True)
    runs = [unfrozen(tmp_path / str(stop), stop, 1, {"norm": True}) for stop in (0, 4)]
    for run in runs:
        assert_close(run["weights"], weights)
        assert run["norms"] == pytest.approx(norms, rel=1e-5)
    assert all(map(torch.equal, runs[0]["weights"], runs[1]["weights"]))


def mean_step_loss(model: nn.Module, images: Tensor, targets: Tensor, at: At) -> Tensor:
    return F.cross_entropy(model(images), targets)


def test_unfrozen_gradients_of_a_step_loss_are_exchanged(tmp_path: Path) -> None:
    weights, _, norms = plain_loop(unfreeze)
    for run in run_processes(unfrozen, tmp_path, 0, 3, {"step_loss": mean_step_loss}):
        assert_close(run["weights"], weights)
        assert run["norms"] == pytest.approx(norms, rel=1e-5)


class Freeze(Callback):
    """Freezes the first layer, which is in the optimizer, until step 3 and from step 6 on."""

    def before_step(self, trainer: Trainer, at: At) -> None:
        model: Any = trainer.raw_model
        model[0].requires_grad_(3 <= at.step < 6)


def frozen_in_the_optimizer(folder: Path, stop: int) -> list[Tensor]:
    model = model_with_a_frozen_layer().requires_grad_(True)
    trainer = trainer_of(model, folder, Freeze(), Stop(stop))
    if stop:
        with pytest.raises(Stopped):
            trainer.fit()
        trainer = trainer_of(model_with_a_frozen_layer().requires_grad_(True), folder, Freeze())
        trainer.restore()
    trainer.fit()
    return list(trainer.raw_model.state_dict().values())


def test_parameters_of_the_optimizer_may_be_frozen_and_unfrozen(tmp_path: Path) -> None:
    def change(model: Any, optimizer: Any, schedule: Any, step: int) -> None:
        model[0].requires_grad_(3 <= step < 6)
        if step == 1:
            optimizer.add_param_group({"params": list(model[0].parameters()), "lr": 0.2, "initial_lr": 0.2})
            schedule.base_lrs.append(0.2)
            schedule.lr_lambdas.append(half)

    expected = plain_loop(change)[0]
    for processes in (1, 2):
        for stop in (0, 4):
            folder = tmp_path / f"{processes}-{stop}"
            for actual in run_processes(frozen_in_the_optimizer, folder, stop, num_processes=processes):
                assert_close(actual, expected)


def test_restoring_a_checkpoint_undoes_later_unfreezing(tmp_path: Path) -> None:
    model = model_with_a_frozen_layer()
    trainer = trainer_of(model, tmp_path, Unfreeze(), Stop(1))
    with pytest.raises(Stopped):
        trainer.fit()
    assert trainer.state.step == 2
    Unfreeze().before_step(trainer, At(3, 2, 0, STEPS))
    trainer.restore()
    assert len(trainer.optimizer.param_groups) == 1
    trainer.fit()
    assert_close(list(model.state_dict().values()), plain_loop(unfreeze)[0])


def test_a_users_loop_may_unfreeze_too() -> None:
    model = model_with_a_frozen_layer()
    trainer = trainer_of(model, None)
    with trainer.running():
        for report in trainer.iterate():
            if report.step == 2:
                Unfreeze().before_step(trainer, At(3, 2, 0, STEPS))
    assert_close(list(model.state_dict().values()), plain_loop(unfreeze)[0])


class Unused(nn.Module):
    """Has a parameter that forward does not use."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body, self.spare, self.head = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images))


class Everything(Callback):
    """Unfreezes all parameters before each step from 3 on."""

    def before_step(self, trainer: Trainer, at: At) -> None:
        if at.step >= 3:
            trainer.raw_model.requires_grad_(True)


def all_unfrozen() -> tuple[list[int], list[bool], Tensor, list[str]]:
    model: Any = Unused()
    model.body.requires_grad_(False)
    settled: list[int] = []
    trainer = trainer_of(model, None, Everything(), clip_norm=None)
    trainer.optimizer.add_param_group({"params": list(model.body.parameters())})
    settle = trainer.step.settle

    def counted(step: Any) -> list[str]:
        settled.append(step.index)
        return settle(step)

    trainer.step.settle = counted  # type: ignore[method-assign]
    trainer.fit()
    needs = [parameter.requires_grad for parameter in model.parameters()]
    return settled, needs, model.body.weight.detach(), trainer.log.notes


def test_parameters_that_forward_does_not_use_stay_frozen() -> None:
    first, second = run_processes(all_unfrozen)
    single = all_unfrozen()
    for settled, needs, weight, notes in (first, second, single):
        assert settled == [0, 2]  # searched twice, not in every step
        assert needs == [True, True, False, False, True, True]
        torch.testing.assert_close(weight, single[2], rtol=1e-5, atol=1e-6)
        assert [note[:40] for note in notes] == [
            "forward does not use 2 of the model's 4 ",
            "forward does not use 2 of the model's 6 ",
        ]


def test_out_of_memory_after_unfreezing_only_reduces_micro_batches(tmp_path: Path) -> None:
    model = model_with_a_frozen_layer()
    weight, sizes = model[0].weight, []

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        sizes.append(len(labels))
        if weight.requires_grad and len(labels) > 6:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return F.cross_entropy(logits, labels)

    norms = Norms()
    trainer_of(model, tmp_path, Unfreeze(), norms, loss=loss).fit()
    weights, _, expected = plain_loop(unfreeze)
    assert sizes[-1] == 6
    assert_close(list(model.state_dict().values()), weights)
    assert norms.norms == pytest.approx(expected, rel=1e-5)


class Momentum(Callback):
    """Increases momentum and sets the lr of every step."""

    def before_step(self, trainer: Trainer, at: At) -> None:
        for group in trainer.optimizer.param_groups:
            group["momentum"], group["lr"] = at.step / 10, 0.3 / at.step


def test_momentum_and_lr_of_a_step_may_be_set(tmp_path: Path) -> None:
    def change(model: Any, optimizer: Any, schedule: Any, step: int) -> None:
        optimizer.param_groups[0].update({"momentum": step / 10, "lr": 0.3 / step})

    expected = plain_loop(change)
    uninterrupted, resumed = (trained(tmp_path / str(stop), stop, Momentum) for stop in (0, 4))
    assert_close(list(uninterrupted.raw_model.state_dict().values()), expected[0])
    assert_close(list(uninterrupted.trained_model.state_dict().values()), expected[1])
    assert all(map(torch.equal, uninterrupted.raw_model.parameters(), resumed.raw_model.parameters()))


class LowerBaseLr(Callback):
    """Halves what the schedule's factor multiplies, once."""

    def before_step(self, trainer: Trainer, at: At) -> None:
        if at.step == 3:
            trainer.lr /= 2


def test_the_lr_of_the_trainer_may_be_changed_and_is_resumed(tmp_path: Path) -> None:
    uninterrupted, resumed = (trained(tmp_path / str(stop), stop, LowerBaseLr) for stop in (0, 4))
    assert (uninterrupted.lr, resumed.lr) == (0.1, 0.1)
    assert all(map(torch.equal, uninterrupted.raw_model.parameters(), resumed.raw_model.parameters()))


def test_batch_norms_with_frozen_weights_are_named_once() -> None:
    trainer = trainer_of(model_with_a_frozen_layer(norm=True), None)
    trainer.fit()
    (note,) = [note for note in trainer.log.notes if "batch norms" in note]
    assert note.startswith("1 of 1 batch norms have frozen weights (1): in training they use their running statistics")
    trainer = trainer_of(model_with_a_frozen_layer(), None)
    trainer.fit()
    assert not [note for note in trainer.log.notes if "batch norms" in note]


@pytest.mark.parametrize("stop", [0, 3, 5])
def test_reduce_lr_on_plateau_is_torchs_and_is_resumed(stop: int, tmp_path: Path) -> None:
    values = [3.0, 2.0, 2.5, 2.0, 2.5, 2.4, 1.9]
    weight = nn.Parameter(torch.zeros(1))
    torchs = torch.optim.lr_scheduler.ReduceLROnPlateau(
        torch.optim.SGD([weight], lr=0.2), factor=0.5, patience=1, threshold=0, min_lr=0.06
    )
    expected = []
    for value in values:
        torchs.step(value)
        expected.append(torchs.get_last_lr()[0])
    rates = []

    class Recording(Callback):
        takes_part = False

        def after_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
            rates.append(trainer.lr)

    def run() -> Trainer:
        plateau = ReduceLROnPlateau(Watch("loss", patience=2), factor=0.5, min_lr_ratio=0.3)
        callbacks = [plateau, Recording(), *([Stop(stop)] if stop else [])]
        options: dict[str, Any] = {"eval_loader": list(share_of_batches()), "evaluate_every": "1 step"}
        trainer = trainer_of(model_with_a_frozen_layer(), tmp_path, *callbacks, **options)
        trainer.evaluate = lambda loader=None: {"loss": values[trainer.state.step - 1], "accuracy": 0.5}  # type: ignore[method-assign]
        return trainer

    if stop:
        with pytest.raises(Stopped):
            run().fit()
    trainer = run()
    trainer.restore()
    trainer.fit()
    assert rates == pytest.approx(expected)
    assert len({*expected}) == 3


def test_a_plateau_that_can_not_be_watched_is_refused() -> None:
    for make, message in (
        (lambda: ReduceLROnPlateau(Watch("loss")), "give a Watch with a patience in steps"),
        (lambda: ReduceLROnPlateau(Watch("loss", patience=2), factor=1), "factor must be above 0 and below 1, got 1"),
        (lambda: ReduceLROnPlateau(Watch("loss", patience=2), min_lr_ratio=1), "min_lr_ratio must be at least 0"),
    ):
        with pytest.raises(RunError, match=message):
            make()
    callback = ReduceLROnPlateau(Watch("mAP", patience=2))
    options: dict[str, Any] = {"eval_loader": list(share_of_batches())}
    with pytest.raises(RunError, match="'mAP' is not among the metrics of the evaluation: loss, accuracy"):
        trainer_of(model_with_a_frozen_layer(), None, callback, **options).fit()


class Plateau(Callback):
    """Halves the lr of each group where the loss has not fallen: ReduceLROnPlateau(factor=0.5, patience=0)."""

    def __init__(self) -> None:
        self.best = float("inf")

    def after_evaluation(self, trainer: Trainer, metrics: dict[str, float]) -> None:
        if metrics["rising"] < self.best:
            self.best = metrics["rising"]
            return
        for group in trainer.optimizer.param_groups:
            group["lr_scale"] *= 0.5

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.best = state["best"]


@pytest.mark.parametrize("stop", [2, 3, 4])
def test_reducing_the_lr_on_a_plateau_is_resumed(stop: int, tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 2.0, 3: 2.5, 4: 1.0, 5: 1.5, 6: 1.2, 7: 0.5}

    def run(stop: int) -> tuple[list[Tensor], float]:
        evaluated = list(share_of_batches())

        def metric(logits: Tensor, labels: Tensor) -> float:
            return losses[max(1, current[-1].state.step)]

        current: list[Trainer] = []

        class Current(Callback):
            takes_part = False

            def before_step(self, trainer: Trainer, at: At) -> None:
                current.append(trainer)

            after_evaluation = before_step  # type: ignore[assignment]

        trainer = trained(
            tmp_path / str(stop),
            stop,
            Current,
            Plateau,
            eval_loader=evaluated,
            metrics={"rising": metric},
            evaluate_every="1 step",
            schedule=lambda update: 1.0,
        )
        return list(trainer.raw_model.state_dict().values()), trainer.optimizer.param_groups[0]["lr"]

    reference = model_with_a_frozen_layer()
    optimizer = torch.optim.SGD([p for p in reference.parameters() if p.requires_grad], lr=0.2, momentum=0.9)
    plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.5, patience=0, threshold=0)
    for step in range(STEPS):
        images, labels = list(share_of_batches())[step % 3]
        F.cross_entropy(reference(images), labels).backward()
        nn.utils.clip_grad_norm_(reference.parameters(), 0.7)
        optimizer.step()
        optimizer.zero_grad()
        plateau.step(losses[step + 1])
    (uninterrupted, lr), (resumed, resumed_lr) = run(0), run(stop)
    assert_close(uninterrupted, list(reference.state_dict().values()))
    assert lr == resumed_lr == 0.2 / 8
    assert all(map(torch.equal, uninterrupted, resumed))


class Bank(Callback):
    """A memory bank of this process's last images, on which the next step's loss depends."""

    def __init__(self) -> None:
        self.bank, self.seen = torch.zeros(4, 6), {0}

    def before_step(self, trainer: Trainer, at: At) -> None:
        rank = trainer.processes.index
        self.bank = torch.cat([self.bank[1:], torch.full((1, 6), at.step * (rank + 1.0), device=trainer.device)])
        self.seen.add(at.step)

    def state_dict(self) -> dict[str, Any]:
        return {"bank": self.bank, "seen": self.seen, "bf16": self.bank.bfloat16()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert state["bank"].device.type == "cpu"
        assert torch.equal(state["bf16"], state["bank"].bfloat16())
        self.bank, self.seen = state["bank"], state["seen"]


def banked(folder: Path, stop: int) -> tuple[Tensor, set[int]]:
    bank = None

    def make_bank() -> Bank:
        nonlocal bank
        bank = Bank()
        return bank

    trained(folder, stop, make_bank)
    assert bank is not None
    return bank.bank, bank.seen


def test_a_memory_bank_of_each_process_is_saved_and_restored(tmp_path: Path) -> None:
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        uninterrupted = run_processes(banked, folder / "whole", 0, num_processes=processes)
        resumed = run_processes(banked, folder / "resumed", 4, num_processes=processes)
        for rank, ((bank, seen), (resumed_bank, resumed_seen)) in enumerate(zip(uninterrupted, resumed, strict=True)):
            assert torch.equal(bank, resumed_bank)
            assert bank[:, 0].tolist() == [step * (rank + 1.0) for step in (4, 5, 6, 7)]
            assert seen == resumed_seen == {*range(8)}
    saved = load_checkpoint(complete_checkpoints(tmp_path / "2" / "whole" / "checkpoints")[-1]).training["callbacks"]
    assert [set(each) for each in saved] == [{"Bank"}, {"Bank"}]


def test_states_that_are_the_same_on_all_processes_are_saved_once(tmp_path: Path) -> None:
    def same(folder: Path) -> None:
        trained(folder, 0, SameState)

    run_processes(same, tmp_path)
    saved = load_checkpoint(complete_checkpoints(tmp_path / "checkpoints")[-1]).training["callbacks"]
    assert [set(each) for each in saved] == [{"SameState"}]


class SameState(Callback):
    """The same on all processes."""

    def state_dict(self) -> dict[str, Any]:
        return {"ones": torch.ones(3)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Ignores the state."""
