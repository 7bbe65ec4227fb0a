"""`model.train`: parts and phases of a recipe, against plain loops that freeze by hand, also when they are resumed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.callbacks import Norms, Stop
from helpers.processes import reset_accelerate, run_processes
from torch import nn

from hf_fasttrain import Trainer
from hf_fasttrain.from_recipe import memory
from hf_fasttrain.models.model import ModelSpec, build_model
from hf_fasttrain.models.weights import save_weights
from hf_fasttrain.recipe.resolved import read_settings
from hf_fasttrain.train.gradual import GradualTraining, PhaseOfSteps
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.train.optim import build_optimizer
from hf_fasttrain.train.step_loss import At
from hf_fasttrain.train.steps import Steps
from hf_fasttrain.utils.errors import ModelError, Stopped

STEPS, DECAY, LR = 8, 0.1, 0.01
PHASES = "[{head: 3 steps}, {last 2 blocks: 3 steps}, all]"
RECIPE = f"""
model: {{name: NAME, pretrained: WEIGHTS}}
data: {{dataset: digits, image_size: 32, workers: 0, cache: none}}
augment: {{crop: center, flip: false}}
train: {{duration: {STEPS} steps, batch_size: 12}}
accelerate: {{mixed_precision: 'no', channels_last: false}}
optimizer: {{lr: {LR}, weight_decay: {DECAY}, clip_norm: 0.5}}
ema: {{decay: 0.9, warmup: false}}
evaluate: {{every: 100 steps, max_images: 20}}
checkpoint: {{every: 100 steps}}
log: {{report: false, every: 1}}
"""


def trainer_of(
    root: Path, name: str, folder: str, *overrides: str, callbacks: Sequence[Any] = (), resume: bool = False
) -> Trainer:
    weights = root / name
    if not weights.exists():
        torch.manual_seed(0)
        save_weights(build_model(ModelSpec(name, [str(number) for number in range(10)], 32)), weights)
    recipe = root / f"{name}.yaml"
    recipe.write_text(RECIPE.replace("NAME", name).replace("WEIGHTS", str(weights)))
    reset_accelerate()
    return Trainer.from_recipe(recipe, [f"output_dir={root / folder}", *overrides], callbacks=callbacks, resume=resume)


def plain_loop(trainer: Trainer, phases: dict[int, list[str]], scale: Callable[[str], float]) -> dict[str, Any]:
    """Train the trainer's model on its batches with AdamW; from each step on, train the parameters with given names."""
    model = trainer.raw_model
    average, norms = copy.deepcopy(model), []
    optimizer: Any = None
    added = set[str]()
    for number, step in enumerate(Steps(trainer.train_loader, 0, STEPS)):
        if number in phases:
            trained = [name for name, _ in model.named_parameters() if name.startswith(tuple(phases[number]))]
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(name in trained)
            new = [group_of(model, name, scale(name)) for name in trained if name not in added]
            added |= set(trained)
            if optimizer is None:
                optimizer = torch.optim.AdamW(new, lr=LR, fused=True)
            for group in new if number else ():
                optimizer.add_param_group(group)
        factor = trainer.schedule(number)
        for group in optimizer.param_groups:
            group["lr"] = LR * factor * group["scale"]
        model.train()
        for norm in model.modules():
            if isinstance(norm, nn.BatchNorm2d) and not norm.weight.requires_grad:
                norm.eval()
        for images, labels in step.micro_batches:
            (F.cross_entropy(model(images), labels) * (len(images) / step.num_images)).backward()
        trained_now = [parameter for parameter in model.parameters() if parameter.requires_grad]
        norms.append(float(nn.utils.clip_grad_norm_(trained_now, 0.5)))
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            for mean, live in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
                mean.lerp_(live, 1 - 0.9) if live.is_floating_point() else mean.copy_(live)
    return {"weights": model.state_dict(), "average": average.state_dict(), "norms": norms}


def group_of(model: nn.Module, name: str, scale: float) -> dict[str, Any]:
    parameter = model.get_parameter(name)
    is_decayed = parameter.ndim > 1 and "pos_embed" not in name and "token" not in name
    return {"params": [parameter], "weight_decay": DECAY if is_decayed else 0.0, "scale": scale, "lr": LR * scale}


def trained(root: Path, name: str, folder: str, *overrides: str, stop: int = 0) -> dict[str, Any]:
    """Train to the end; with `stop`, stop after the step that follows it, and resume. Return weights and norms."""
    norms = Norms()
    trainer = trainer_of(root, name, folder, *overrides, callbacks=[norms, *([Stop(stop)] if stop else [])])
    if stop:
        with pytest.raises(Stopped):
            trainer.fit()
        trainer = trainer_of(root, name, folder, *overrides, callbacks=[norms], resume=True)
    with trainer.running():
        for _ in trainer.iterate():
            pass
    average = trainer.trained_model.state_dict()
    return {"weights": trainer.raw_model.state_dict(), "average": average, "norms": norms.norms}


def assert_same(actual: dict[str, Any], expected: dict[str, Any]) -> None:
    assert actual["norms"] == expected["norms"]
    for kind in ("weights", "average"):
        for name, tensor in expected[kind].items():
            assert torch.equal(actual[kind][name], tensor), (kind, name)


def vit_scale(name: str) -> float:
    """Return the lr of a layer of test_vit, which has six blocks, with a layer decay of 0.5."""
    layer = int(name.split(".")[1]) + 1 if name.startswith("blocks.") else {"norm": 6, "head": 7}[name.split(".")[0]]
    return float(0.5 ** (7 - layer))


Case = tuple[str, list[str], dict[int, list[str]], Callable[[str], float]]
CASES: dict[str, Case] = {  # model, overrides, beginnings of the names that are trained from a step on, scale of the lr
    "blocks of a ResNet": (
        "test_resnet",
        [f"model.train={PHASES}", "optimizer.backbone_lr_scale=0.5"],
        {0: ["fc."], 3: ["layer3", "layer4", "fc."], 6: [""]},
        lambda name: 1.0 if name.startswith("fc.") else 0.5,
    ),
    "norms of a ViT": (
        "test_vit",
        ["model.train={norm: 3 steps, then: last 1 block}", "optimizer.layer_decay=0.5"],
        {0: [*(f"blocks.{n}.norm" for n in range(6)), "norm.", "head."], 3: ["blocks.5.", "norm.", "head."]},
        vit_scale,
    ),
}


@pytest.fixture(autouse=True)
def uncollected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare each trainer the collection of garbage before the forecast of its memory: more than half of its time."""
    monkeypatch.setattr(memory, "free_cached_memory", lambda device: None)


@pytest.mark.parametrize(
    ("case", "accumulation", "stops"),
    [
        ("blocks of a ResNet", 1, [0]),
        ("blocks of a ResNet", 3, [1, 4, 6]),  # within each phase
        ("norms of a ViT", 3, [0, 2]),  # between two
    ],
)
def test_phases_equal_a_plain_loop_also_when_they_are_resumed(
    case: str, accumulation: int, stops: list[int], tmp_path: Path
) -> None:
    name, overrides, phases, scale = CASES[case]
    overrides = [*overrides, f"accelerate.gradient_accumulation_steps={accumulation}"]
    expected = plain_loop(trainer_of(tmp_path, name, "plain", *overrides), phases, scale)
    for stop in stops:
        assert_same(trained(tmp_path, name, f"stop{stop}", *overrides, stop=stop), expected)


def test_two_processes_exchange_the_gradients_of_each_phase(tmp_path: Path) -> None:
    name, overrides, phases, scale = CASES["norms of a ViT"]
    expected = plain_loop(trainer_of(tmp_path, name, "plain", *overrides), phases, scale)
    for run in run_processes(trained, tmp_path, name, "two", *overrides):
        assert run["norms"] == pytest.approx(expected["norms"], rel=1e-4)
        for tensor, right in zip(run["weights"].values(), expected["weights"].values(), strict=True):
            torch.testing.assert_close(tensor, right, rtol=1e-4, atol=1e-4)


def test_only_the_trained_part_changes_and_counts_are_recorded(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "test_resnet", "run", "model.train=last 1 block")
    before = copy.deepcopy(trainer.raw_model.state_dict())
    optimized = sum(len(group["params"]) for group in trainer.optimizer.param_groups)
    trainer.fit()
    after = trainer.raw_model.state_dict()
    changed = {name.split(".")[0] for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    assert changed == {"layer4", "fc"}  # and no statistics of the other batch norms
    assert optimized == sum(1 for name, _ in trainer.raw_model.named_parameters() if name.startswith(("layer4", "fc")))
    text = "last 1 block, 268,810 parameters of the model's 373,658"
    assert read_settings(tmp_path / "run")["trained_parameters"].value == text
    assert f"model.train: {text}" in trainer.log.notes


def test_the_older_name_freezes_the_same_parameters(tmp_path: Path) -> None:
    frozen = []
    for number, key in enumerate(("model.freeze_backbone=true", "model.train=head")):
        trainer = trainer_of(tmp_path, "test_resnet", str(number), key)
        frozen.append([name for name, parameter in trainer.raw_model.named_parameters() if not parameter.requires_grad])
    assert frozen[0] == frozen[1]
    assert len(frozen[0]) == 45


def test_a_phase_after_the_end_is_noted_and_what_a_model_lacks_is_one_message(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, "test_resnet", "late", "model.train={head: 9 steps, then: all}")
    note = "model.train: all would be trained from step 10 on, after the end, 8 steps"
    assert note in trainer.log.notes
    message = "model.train=last 6 blocks: the model has 4 blocks; give at most 4, or all"
    with pytest.raises(ModelError, match=message):
        trainer_of(tmp_path, "test_resnet", "many", "model.train=last 6 blocks")


@pytest.mark.parametrize("name", ["lamb", "sgd"])
def test_a_part_that_is_unfrozen_begins_without_momenta(name: str) -> None:
    """Also without the count of updates that LAMB keeps for a group of parameters, frozen ones too."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    groups = [{"params": list(layer.parameters()), "lr": 0.1} for layer in (model[1], model[0])]
    optimizer = build_optimizer(name, groups, momentum=0.9, args={})
    head, body = frozenset({"1.weight", "1.bias"}), frozenset({"0.weight", "0.bias"})
    callback = GradualTraining([PhaseOfSteps("head", 1, head), PhaseOfSteps("body", 3, body)])
    trainer: Any = SimpleNamespace(raw_model=model, optimizer=optimizer, log=RunLog(show=False))
    for step in (1, 2, 3):
        callback.before_step(trainer, At(step, step - 1, 0, 3))
        assert {name for name, p in model.named_parameters() if p.requires_grad} == (head if step < 3 else body)
        assert len(optimizer.state) == (0 if step in (1, 3) else 2)
        optimizer.zero_grad()
        model(torch.ones(3, 4)).sum().backward()
        optimizer.step()
    assert [group.get("step") for group in optimizer.param_groups] == ([3, 1] if name == "lamb" else [None, None])
