"""Parameters that forward does not use are frozen and reported; the search changes nothing else."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import gather_object
from helpers.processes import reset_accelerate, run_processes
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hf_fasttrain import Trainer
from hf_fasttrain.data.loading.loader import Step
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.train.unused_parameters import ParameterUse, find_parameter_use
from hf_fasttrain.utils.errors import RunError

IMAGES = torch.randn(24, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.arange(24) % 3


class Model(nn.Module):
    """Has a layer `spare` that forward does not use, and a head."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.flat, self.body, self.spare, self.head = nn.Flatten(), nn.Linear(48, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Any:
        return self.head(self.body(self.flat(images)))


class SkipsAtRandom(Model):
    """Skips `spare` in half of the calls, like layer drop."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(self.flat(images))
        return self.head(self.spare(features) if torch.rand(()) < 0.5 else features)


class DropsPaths(Model):
    """Multiplies `spare`'s branch by zero for most images, like stochastic depth."""

    def forward(self, images: Tensor) -> Tensor:
        features = self.body(self.flat(images))
        return self.head(features + self.spare(features) * (torch.rand(len(images), 1) < 0.01))


class Checkpointed(Model):
    def forward(self, images: Tensor) -> Tensor:
        images.requires_grad_()
        return self.head(checkpoint(lambda x: self.body(self.flat(x)), images, use_reentrant=True))


class TwoOutputs(Model):
    """Returns a second output, of `spare`, while training."""

    def forward(self, images: Tensor) -> Any:
        features = self.body(self.flat(images))
        return (self.head(features), self.spare(features)) if self.training else self.head(features)


class Fails(Model):
    def forward(self, images: Tensor) -> Tensor:
        raise IndexError("no such row")


class ChangesState(Model):
    """Changes buffers, attributes and random states in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.calls = nn.BatchNorm2d(3), 0
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.cached = images
        self.mean, self.count = self.mean + random.random() + np.random.rand(), self.count + 1
        return super().forward(F.dropout(self.norm(images)))


def use_of(model: nn.Module, loss: Any = F.cross_entropy, images: Tensor = IMAGES) -> ParameterUse | None:
    reset_accelerate()
    parameters = {name: p for name, p in model.train().named_parameters() if p.requires_grad}
    processes = Processes(Accelerator(cpu=True))
    return find_parameter_use(model, loss, parameters, (images, LABELS[: len(images)]), processes)


SPARE = ["spare.weight", "spare.bias"]


@pytest.mark.parametrize("model", [Model, Checkpointed, ChangesState])
def test_parameters_that_are_never_used_are_found(model: Callable[[], nn.Module]) -> None:
    assert use_of(model()) == ParameterUse(SPARE, [])
    assert use_of(model(), images=IMAGES[:1]) == ParameterUse(SPARE, [])


def test_a_gradient_of_zeros_counts_as_used() -> None:
    assert use_of(DropsPaths()) == ParameterUse([], [])


def test_randomly_skipped_parameters_count_as_sometimes_used() -> None:
    assert use_of(SkipsAtRandom()) == ParameterUse([], SPARE)


def test_an_output_that_the_loss_ignores_is_not_used() -> None:
    assert use_of(TwoOutputs(), lambda outputs, labels: F.cross_entropy(outputs[0], labels)) == ParameterUse(SPARE, [])
    assert (
        use_of(TwoOutputs(), lambda outputs, labels: F.cross_entropy(sum(outputs)[:, :3], labels)) is None
    )  # 3 + 4 classes
    outputs = lambda pair, labels: F.cross_entropy(pair[0], labels) + F.cross_entropy(pair[1], labels)  # noqa: E731
    assert use_of(TwoOutputs(), outputs) == ParameterUse([], [])


def test_models_that_cannot_be_probed_are_checked_in_the_step() -> None:
    assert use_of(Fails()) is None
    assert use_of(nn.Sequential(nn.Flatten(), nn.Linear(5, 2))) is None
    assert use_of(nn.Sequential(Model(), Detached())) is None  # no parameter gets a gradient
    updated = Model()
    updated.body.weight.register_post_accumulate_grad_hook(lambda weight: weight.zero_())
    assert use_of(updated) is None  # a backward would change weights


class Detached(nn.Module):
    def forward(self, logits: Tensor) -> Tensor:
        return logits.detach().requires_grad_()


def test_frozen_parameters_are_not_named() -> None:
    model = Model()
    model.spare.weight.requires_grad_(False)
    assert use_of(model) == ParameterUse(["spare.bias"], [])


def test_integer_images_are_not_converted() -> None:
    class Converts(Model):
        def forward(self, images: Tensor) -> Any:
            assert images.dtype == torch.uint8
            return super().forward(images / 255)

    assert use_of(Converts(), images=torch.randint(255, (8, 3, 4, 4), dtype=torch.uint8)) == ParameterUse(SPARE, [])


def random_states() -> list[Any]:
    return [torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist(), np.random.rand()]


def test_probing_changes_nothing() -> None:
    """Statistics, replaced buffers and attributes, gradients and random states are unchanged."""
    model = ChangesState()
    model.head.weight.grad = torch.ones(3, 4)
    buffers = {name: (buffer, buffer.clone()) for name, buffer in model.named_buffers()}
    np.random.seed(3)
    before = random_states()
    np.random.seed(3)
    assert use_of(model) == ParameterUse(SPARE, [])
    assert random_states() == before
    assert model.calls == 0
    assert not hasattr(model, "cached")
    assert {name: p.grad is not None for name, p in model.named_parameters() if p.grad is not None} == {
        "head.weight": True
    }
    assert {name for name, _ in model.named_buffers()} == buffers.keys()
    for name, buffer in model.named_buffers():
        assert buffer is buffers[name][0]
        assert torch.equal(buffer, buffers[name][1])


class Watched(Trainer):
    """Compares the processes' weights after each step."""

    apart = 0.0

    def train_step(self, step: Step) -> Tensor:
        loss = super().train_step(step)
        flat = torch.cat([p.detach().flatten() for p in self.raw_model.parameters()])
        for other in gather_object([flat]) if self.processes.is_distributed else ():
            self.apart = max(self.apart, float((other - flat).abs().max()))
        return loss


def trainer_of(model: nn.Module, optimizer: Any = None, **options: Any) -> Watched:
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    data = [(x[share], y[share]) for x, y in zip(IMAGES.split(8), LABELS.split(8), strict=True)]
    optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5)
    return Watched(model, data, optimizer, accelerator=accelerator, log=RunLog(show=False), **options)


def train(model: nn.Module, duration: str = "2 epochs", before: Any = None) -> tuple[dict[str, Tensor], list[str]]:
    trainer = trainer_of(model, duration=duration)
    if before is not None:
        before(trainer)
    trainer.fit()
    assert trainer.apart == 0
    return {name: value.detach() for name, value in model.state_dict().items()}, trainer.log.notes


NOTE = "forward does not use 2 of the model's 6 trainable parameters (spare.weight, spare.bias): they are frozen"


@pytest.mark.parametrize("model", [Model, Checkpointed])
def test_two_processes_train_a_model_with_unused_parameters_as_one_does(model: Callable[[], nn.Module]) -> None:
    start = model().state_dict()
    single, notes = train(model())
    assert notes == [NOTE]
    assert torch.equal(single["spare.weight"], start["spare.weight"])  # weight decay does not change it
    for weights, messages in run_processes(train, model()):
        torch.testing.assert_close(weights, single, rtol=1e-4, atol=1e-4)
        assert torch.equal(weights["spare.weight"], start["spare.weight"])
        assert messages == [NOTE]


def test_processes_stay_in_step_if_layers_are_skipped_at_random() -> None:
    for weights, notes in run_processes(train, SkipsAtRandom(), "12 steps"):
        assert not torch.equal(weights["spare.weight"], SkipsAtRandom().spare.weight)
        (note,) = notes
        assert note.startswith("forward does not always use spare.weight, spare.bias: DDP searches for unused")


def test_one_process_may_skip_layers_at_random() -> None:
    weights, notes = train(SkipsAtRandom(), "12 steps")
    assert not torch.equal(weights["spare.weight"], SkipsAtRandom().spare.weight)
    assert notes == []


def freeze_body(trainer: Trainer) -> None:
    trainer.raw_model.body.requires_grad_(False)  # type: ignore[union-attr, operator]


def test_parameters_may_be_frozen_after_the_trainer_was_built() -> None:
    single, _ = train(Model(), before=freeze_body)
    assert torch.equal(single["body.weight"], Model().body.weight)
    for weights, _ in run_processes(train, Model(), "2 epochs", freeze_body):
        torch.testing.assert_close(weights, single, rtol=1e-4, atol=1e-4)


class Forgets(Model):
    """Uses `spare` until its fifth forward."""

    forwards = 0

    def forward(self, images: Tensor) -> Any:
        self.forwards += 1
        features = self.body(self.flat(images))
        return self.head(self.spare(features) if self.forwards < 5 else features)


def fit_that_forgets(run: str) -> str:
    trainer = trainer_of(Forgets(), duration="6 steps", output_dir=run, checkpoint_every="1 steps")
    with pytest.raises(RunError) as error:
        trainer.fit()
    return str(error.value)


def test_gradients_that_were_not_exchanged_are_never_applied(tmp_path: Path) -> None:
    for message in run_processes(fit_that_forgets, str(tmp_path / "run")):
        assert message.startswith("step 5: forward no longer uses spare.weight, spare.bias, so the processes could")
    assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir())[-1] == "step_00000004"


def test_probing_does_not_change_the_images_or_random_numbers_of_the_first_step() -> None:
    """Bitwise: a model with dropout and batch norm, probed or not."""

    def skip(trainer: Watched) -> None:
        trainer.step.is_settled = True

    probed, _ = train(ChangesState(), before=lambda _: (random.seed(1), np.random.seed(1)))
    plain, _ = train(ChangesState(), before=lambda trainer: (random.seed(1), np.random.seed(1), skip(trainer)))
    assert all(torch.equal(probed[name], value) for name, value in plain.items())


def fit_dino(recipe: Path, folder: Path, output_dir: Path) -> tuple[dict[str, Tensor], list[str]]:
    overrides = [f"model.name=transformers:{folder}", "train.duration=3 steps", f"output_dir={output_dir}"]
    options = ["optimizer={name: sgd, lr: 0.05, weight_decay: 0.5}", "train.batch_size=8", "data.eval_fraction=0.02"]
    trainer = Trainer.from_recipe(recipe, [*overrides, *options])
    trainer.fit()
    return trainer.raw_model.state_dict(), [note for note in trainer.log.notes if "trainable" in note]


def test_dinov2_with_its_mask_token_trains_on_two_processes(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    from transformers import Dinov2Config

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "mlp_ratio": 1}
    Dinov2Config(**sizes, image_size=32, patch_size=16).save_pretrained(tmp_path / "dino")
    single, notes = fit_dino(write_recipe(), tmp_path / "dino", tmp_path / "one")
    (first, second) = run_processes(fit_dino, write_recipe(), tmp_path / "dino", tmp_path / "two")
    torch.testing.assert_close(first[0], second[0], rtol=0, atol=0)
    torch.testing.assert_close(first[0], single, rtol=1e-5, atol=1e-6)
    assert notes == first[1] == second[1]
    assert "(model.dinov2.embeddings.mask_token): they are frozen" in notes[0]


def test_an_optimizer_of_another_model_is_refused() -> None:
    expected = (
        r"the optimizer holds 6 parameters that are not the model's, and not 6 that are \(body\.weight, .*\): it was "
        r"created before the model was changed, or for another model; create it from model\.parameters\(\) of the model"
    )
    with pytest.raises(RunError, match=expected):
        trainer_of(Model(), torch.optim.SGD(Model().parameters(), lr=0.1))
    model = Model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.head = nn.Linear(4, 3)
    with pytest.raises(RunError, match=r"holds 2 parameters that are not the model's, and not 2 that are \(head\."):
        trainer_of(model, optimizer)


class Replaces(Model):
    """Has new parameters after each move, as if torch couldn't change them in place."""

    def to(self, *args: Any, **options: Any) -> Any:
        for module in self.modules():
            for name, parameter in module._parameters.items():
                module._parameters[name] = nn.Parameter(parameter.detach().clone())  # type: ignore[union-attr]
        return super().to(*args, **options)


def test_parameters_replaced_by_moving_the_model_are_trained() -> None:
    plain, moved = Model(), Replaces()
    trainer_of(plain).fit()
    optimizer = torch.optim.AdamW(moved.parameters(), lr=0.1, weight_decay=0.5)
    trainer_of(moved, optimizer).fit()
    torch.testing.assert_close(moved.state_dict(), plain.state_dict(), rtol=0, atol=0)


def test_parameters_missing_from_the_optimizer_are_named_and_not_counted() -> None:
    """Clips by the norm of the head's gradients alone; gradients outside the optimizer do not count."""
    model = Model()
    trainer = trainer_of(model, torch.optim.SGD(model.head.parameters(), lr=0.1), clip_norm=1.0)
    trainer.fit()
    assert trainer.log.notes[1] == (
        "the optimizer does not have 2 of the model's 4 trainable parameters (body.weight, body.bias): they do not "
        "change"
    )
    assert all(parameter.grad is None for parameter in model.parameters())
    frozen = Model()
    frozen.body.requires_grad_(False)
    trainer_of(frozen, torch.optim.SGD(frozen.head.parameters(), lr=0.1), clip_norm=1.0).fit()
    torch.testing.assert_close(model.state_dict(), frozen.state_dict())
