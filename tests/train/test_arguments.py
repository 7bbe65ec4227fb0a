"""Missing or wrong arguments of a Trainer: one message at construction, which names the parameter."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from helpers.processes import reset_accelerate
from helpers.small_trainer import small_trainer
from torch import nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

from hf_fasttrain import Callback, Duration, Trainer, Watch, build_schedule
from hf_fasttrain.train.arguments import RULES
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.utils.errors import RunError

IMAGES = TensorDataset(torch.randn(8, 3, 2, 2), torch.arange(8) % 3)
WRONG: list[tuple[dict[str, Any], str]] = [
    ({"accumulation_steps": 0}, "accumulation_steps: must be a whole number of at least 1, .* got 0"),
    ({"accumulation_steps": -1}, "accumulation_steps: .* got -1"),
    ({"accumulation_steps": 2.5}, "accumulation_steps: .* got 2.5"),
    ({"accumulation_steps": True}, "accumulation_steps: .* got True"),
    ({"schedule": "cosine"}, r"schedule: must be a function .*build_schedule\('cosine'.* got 'cosine'"),
    ({"schedule": 0.1}, "schedule: must be a function of the update's number, counted from 0, .* got 0.1"),
    ({"schedule": StepLR}, "schedule: .* got the class StepLR itself"),
    ({"schedule": lambda: 1.0}, "schedule: .* got a function"),
    ({"schedule": lambda update: None}, "schedule: .* got a function"),
    ({"ema": 0.99}, r"ema: must be Ema\(model, decay=0.99\) or None, got 0.99"),
    ({"num_classes": 0}, "num_classes: must be a whole number of at least 2, .* got 0"),
    ({"num_classes": "3"}, "num_classes: .* got '3'"),
    ({"eval_loader": []}, r"eval_loader: must be a loader with at least one batch, .* got \[\]"),
    ({"eval_loader": DataLoader(IMAGES, 8, sampler=[])}, "eval_loader: .* got a DataLoader"),
    ({"eval_loader": IMAGES}, r"eval_loader: .* as DataLoader\(dataset, .* got a TensorDataset"),
    (
        {"train_loader": IMAGES},
        r"train_loader: must be a loader that yields batches, .*DataLoader\(dataset, .* got a TensorDataset",
    ),
    ({"train_loader": datasets.Dataset.from_dict({"image": [1]})}, "train_loader: .* got a Dataset"),
    ({"train_loader": "images"}, "train_loader: .* got 'images'"),
    ({"train_loader": DataLoader}, "train_loader: .* got the class DataLoader itself"),
    ({"loss": "cross_entropy"}, "loss: must be a function or module that maps .* got 'cross_entropy'"),
    ({"step_loss": 3}, "step_loss: must be a function or module that maps .model, images, targets, at. .* got 3"),
    ({"step_loss": print, "loss": nn.L1Loss()}, "loss: has no effect with step_loss"),
    ({"loss": nn.CrossEntropyLoss}, "loss: .* got the class CrossEntropyLoss itself"),
    ({"callbacks": Callback()}, r"callbacks: must be a list of callbacks: callbacks=\[...\], got a Callback"),
    ({"log_every": 0}, "log_every: must be a whole number of at least 1, in steps, got 0"),
    ({"log_every": "10"}, "log_every: .* got '10'"),
    ({"clip_norm": 0}, "clip_norm: must be a number above 0, .* got 0"),
    ({"clip_norm": -1.0}, "clip_norm: .* got -1.0"),
    ({"clip_norm": float("nan")}, "clip_norm: .* got nan"),
    ({"report": "yes"}, "report: must be True or False, got 'yes'"),
    ({"seed": "1"}, "seed: must be a whole number of at least 0, or None, got '1'"),
    ({"best": "loss"}, r"best: must be a Watch, like Watch\('loss'\), got 'loss'"),
    ({"early_stopping": 5}, r"early_stopping: must be a Watch with a patience .*patience=500\), or None, got 5"),
    ({"early_stopping": Watch("loss")}, "early_stopping: must be a Watch with a patience in steps, .* got a Watch"),
    ({"early_stopping": Watch("loss", patience=2), "eval_loader": None}, "early_stopping: .* pass an eval_loader too"),
    ({"accelerator": 1}, "accelerator: must be an accelerate.Accelerator or None, got 1"),
    ({"output_dir": 3, "log": None}, "output_dir: must be a path or None, got 3"),
    ({"duration": 2}, "duration: got 2; a number needs a unit; write '2 epochs' or '2 steps'"),
    ({"duration": "2"}, "duration: got '2'; a number needs a unit; write '2 epochs'"),
    ({"duration": "two"}, "duration: must be a number and a unit, like '90 epochs' or '5000 steps', got 'two'"),
    ({"duration": "0 steps"}, "duration: must be more than 0, got '0 steps'"),
    ({"duration": Duration(5, "percent")}, "duration: must be in epochs or steps, got '5%'"),
    ({"evaluate_every": "0 steps"}, "evaluate_every: must be more than 0"),
    ({"evaluate_every": "10 minutes"}, "evaluate_every: must be a number and a unit, .* got '10 minutes'"),
    ({"checkpoint_every": None}, "checkpoint_every: must be a number and a unit, .*'10 minutes', got None"),
]


def build_trainer(**options: Any) -> Trainer:
    """Return a Trainer with some arguments, some of them positional."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    data = [(torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]))]
    objects = {"model": model, "train_loader": data, "optimizer": torch.optim.SGD(model.parameters(), lr=0.1)}
    kinds: dict[str, Any] = {"eval_loader": data, "log": RunLog(show=False), **objects, **options}
    kinds.setdefault("num_classes", 3)
    return Trainer(kinds.pop("model"), kinds.pop("train_loader"), kinds.pop("optimizer"), **kinds)


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_a_wrong_value_is_named_with_what_is_allowed(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message) as error:
        build_trainer(**options)
    assert isinstance(error.value, ValueError)
    assert error.value.__context__ is None or error.value.__suppress_context__


def test_each_parameter_has_a_rule_and_all_mistakes_are_reported_at_once() -> None:
    parameters = set(inspect.signature(Trainer).parameters) | set(inspect.signature(Trainer.from_recipe).parameters)
    of_others = {"duration", "evaluate_every", "checkpoint_every", "recipe", "options"}
    assert parameters - of_others - set(RULES) == set()
    assert set(RULES) <= parameters
    with pytest.raises(RunError, match=r"accumulation_steps: .*\nema: .*\nlog_every: "):
        build_trainer(accumulation_steps=0, ema=0.99, log_every=0)


def test_values_of_other_types_with_the_same_meaning_are_accepted(tmp_path: Path) -> None:
    schedule = build_schedule("cosine", num_steps=2)
    options: dict[str, Any] = {"accumulation_steps": np.int64(2), "clip_norm": np.float32(1), "callbacks": None}
    trainer = build_trainer(**options, schedule=schedule, output_dir=str(tmp_path / "run"), report=False, log=None)
    assert trainer.fit().steps == 1


def test_an_optimizer_without_parameters_of_the_model_is_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    other = copy.deepcopy(model)
    with pytest.raises(RunError, match=r"for another model; create it from model.parameters"):
        build_trainer(model=model, optimizer=torch.optim.SGD(other.parameters(), lr=0.1))
    with pytest.raises(RunError, match=r"optimizer: must be a torch.optim.Optimizer with an lr above 0 in each group"):
        build_trainer(model=model, optimizer=torch.optim.SGD([{"params": model[1].parameters(), "lr": 0.0}], lr=0.1))
    scheduler = StepLR(torch.optim.SGD(model.parameters(), lr=0.1), 2)
    with pytest.raises(RunError, match=r"schedule: must be a function of the update's number, .* got a StepLR"):
        build_trainer(model=model, schedule=scheduler)
    for frozen in (model, other):
        frozen.requires_grad_(False)
        with pytest.raises(
            RunError, match="optimizer: none of its 2 parameters requires gradients, so nothing would be trained"
        ):
            build_trainer(model=model, optimizer=torch.optim.SGD(frozen.parameters(), lr=0.1))


@pytest.mark.parametrize("patience", [0, -3, 1.5, True])
def test_a_patience_is_a_number_of_steps(patience: Any) -> None:
    with pytest.raises(RunError, match=rf"Watch\('loss'\): patience must be a whole number .* got {patience}"):
        Watch("loss", patience=patience)


@pytest.mark.parametrize("number", [0, -1, 1.5, "2"])
def test_at_least_one_checkpoint_is_kept(number: Any, tmp_path: Path) -> None:
    trainer = small_trainer(tmp_path / "run")
    assert trainer.checkpoints is not None
    with pytest.raises(RunError, match=r"checkpoints.keep: must be a whole number of at least 1, got"):
        trainer.checkpoints.keep = number


@pytest.mark.parametrize(
    ("outputs", "labels", "message"),
    [
        (5, torch.arange(8) % 3, r"outputs for a batch are of shape \(8, 5\), and num_classes is 3"),
        (3, torch.arange(8) % 4, "2 of 8 labels of the evaluation split are not from 0 to 2, and num_classes is 3"),
        (3, torch.full((8,), -1), "8 of 8 labels of the evaluation split are not from 0 to 2"),
        (3, torch.rand(8, 3), "labels of 8 of 8 images of the evaluation split are not 0 or 1"),
    ],
)
def test_a_number_of_classes_that_does_not_fit_is_refused(outputs: int, labels: torch.Tensor, message: str) -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, outputs))
    trainer = build_trainer(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.1),
        eval_loader=[(torch.zeros(8, 3, 2, 2), labels)],
    )
    with pytest.raises(RunError, match=message):
        trainer.evaluate()


def test_an_accelerator_that_splits_steps_differently_is_refused() -> None:
    reset_accelerate()
    accelerator = Accelerator(gradient_accumulation_steps=4)
    with pytest.raises(
        RunError, match=r"gradient_accumulation_steps=4 has no effect, .* pass accumulation_steps=4 to split"
    ):
        build_trainer(accelerator=accelerator)
    build_trainer(accelerator=accelerator, accumulation_steps=4)
    reset_accelerate()


def test_overrides_are_a_list(write_recipe: Callable[..., Path]) -> None:
    with pytest.raises(RunError, match=r"overrides: must be a list of strings: .* got \'optimizer.lr=1\'"):
        Trainer.from_recipe(write_recipe(), "optimizer.lr=1")
