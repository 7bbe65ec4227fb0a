"""Optimizers that need gradients at other weights (SAM, LBFGS) or second derivatives (Adahessian)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from helpers.processes import run_processes
from helpers.small_trainer import StatefulLoader
from timm.optim import create_optimizer_v2
from torch import Tensor, nn

from hf_fasttrain import Ema, RunError, Trainer
from hf_fasttrain.train.closure import needs_closure
from hf_fasttrain.train.log import RunLog

CLASSES, BATCH = 3, 12


class SAM(torch.optim.Optimizer):
    """Sharpness-aware minimisation as published: two steps, and a base optimizer with the same groups."""

    def __init__(self, params: Any, base_optimizer: Any, rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base_optimizer(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups
        self.defaults.update(self.base_optimizer.defaults)

    @torch.no_grad()
    def first_step(self) -> None:
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm(p=2) for p in parameters if p.grad is not None]).norm(p=2)
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.state[p]["old_p"] = p.data.clone()
                    p.add_(p.grad * (group["rho"] / (norm + 1e-12)))

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base_optimizer.step()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert closure is not None, "Sharpness Aware Minimization requires closure, but it was not provided"
        self.first_step()
        torch.enable_grad()(closure)()
        self.second_step()


def data(number: int = 4) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [
        (
            torch.randn(BATCH, 3, 4, 4, generator=generator).double(),
            torch.randint(0, CLASSES, (BATCH,), generator=generator),
        )
        for _ in range(number)
    ]


def make_model(*, norm: bool = False, dropout: bool = False) -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4) if norm else nn.Identity(), nn.Tanh(), nn.Flatten()]
    return nn.Sequential(*layers, nn.Dropout(0.3) if dropout else nn.Identity(), nn.Linear(16, CLASSES)).double()


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sam": lambda params: SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9),
    "lbfgs": lambda params: torch.optim.LBFGS(params, lr=0.5, max_iter=3, line_search_fn="strong_wolfe"),
    "adahessian": lambda params: create_optimizer_v2(params, opt="adahessian", lr=0.05),
}


def plain(name: str, *, norm: bool = False, clip: float | None = None) -> dict[str, Tensor]:
    """Return the weights of a plain PyTorch loop, as in each optimizer's documentation."""
    model = make_model(norm=norm)
    optimizer = OPTIMIZERS[name](model.parameters())
    norms = [module for module in model if isinstance(module, nn.BatchNorm2d)]

    def backward(images: Tensor, labels: Tensor, **options: Any) -> Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward(**options)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        return loss

    for index, (images, labels) in enumerate(data()):
        if name == "adahessian":
            optimizer.generator.manual_seed(_key(index))
            optimizer.seed = _key(index)
        backward(images, labels, create_graph=name == "adahessian")
        if name == "adahessian":
            optimizer.step()
            continue

        def closure(images: Tensor = images, labels: Tensor = labels) -> Tensor:
            before = [buffer.clone() for each in norms for buffer in each.buffers()]
            loss = backward(images, labels)
            for buffer, value in zip([b for each in norms for b in each.buffers()], before, strict=True):
                buffer.copy_(value)
            return loss

        optimizer.step(closure)
    return model.state_dict()


def _key(index: int) -> int:
    return index * 65_537


def build(name: str, accumulation: int = 1, folder: Path | None = None, **options: Any) -> Trainer:
    dtype = options.pop("dtype", torch.float64)
    model = make_model(norm=options.pop("norm", False), dropout=options.pop("dropout", False)).to(dtype)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    per = BATCH // accelerator.num_processes
    share = slice(accelerator.process_index * per, (accelerator.process_index + 1) * per)
    if options.pop("averaged", False):
        options["ema"] = Ema(model, 0.5)
    return Trainer(
        model,
        StatefulLoader([(images[share].to(dtype), labels[share]) for images, labels in data()]),
        OPTIMIZERS[name](model.parameters()),
        accelerator=accelerator,
        accumulation_steps=accumulation,
        duration="4 steps",
        log=RunLog(folder, main=accelerator.is_main_process, show=False),
        output_dir=folder,
        report=False,
        **options,
    )


def fitted(name: str, accumulation: int, **options: Any) -> dict[str, Tensor]:
    trainer = build(name, accumulation, **options)
    trainer.fit()
    return {key: value.detach().clone() for key, value in trainer.trained_model.state_dict().items()}


@pytest.mark.parametrize("name", ["sam", "lbfgs", "adahessian"])
def test_an_optimizer_gives_the_weights_of_a_plain_loop(name: str) -> None:
    expected = plain(name)
    for accumulation in (1, 3):
        for key, value in fitted(name, accumulation).items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=0 if accumulation == 1 else 1e-9)


@pytest.mark.parametrize("name", ["sam", "lbfgs"])
def test_two_processes_give_the_weights_of_one(name: str) -> None:
    expected = plain(name)
    for weights in run_processes(fitted, name, 3):
        for key, value in weights.items():
            torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-9)


def test_every_gradient_is_clipped_and_batch_norm_is_frozen_in_the_second_pass() -> None:
    expected = plain("sam", norm=True, clip=0.2)
    for key, value in fitted("sam", 1, norm=True, clip_norm=0.2).items():
        assert torch.equal(value, expected[key]), key
    moving = build("sam", norm=True)
    moving.optimizer.moves_batch_norm = True
    moving.fit()
    assert int(moving.raw_model.state_dict()["1.num_batches_tracked"]) == 8
    assert int(expected["1.num_batches_tracked"]) == 4


@pytest.mark.parametrize("name", ["sam", "lbfgs", "adahessian"])
def test_a_run_is_resumed_with_the_state_of_nested_optimizers(name: str, tmp_path: Path) -> None:
    """In float32: LBFGS's sums round differently if memory is not aligned, and its line search amplifies it."""
    options: dict[str, Any] = {"dropout": True, "averaged": True, "dtype": torch.float32}
    uninterrupted = fitted(name, 3, folder=tmp_path / "whole", **options)
    first = build(name, 3, tmp_path / "run", checkpoint_every="2 steps", **options)
    with first.running():
        for report in first.iterate():
            if report.step == 3:
                break
    second = build(name, 3, tmp_path / "run", **options)
    second.restore()
    assert second.state.step == 2
    second.fit()
    for key, value in second.trained_model.state_dict().items():
        assert torch.equal(value, uninterrupted[key]), key


class FailsOnce(nn.Module):
    """Runs out of memory in the given forward."""

    def __init__(self, inner: nn.Module, number: int) -> None:
        super().__init__()
        self.inner, self.left = inner, number

    def forward(self, images: Tensor) -> Tensor:
        self.left -= self.training
        if self.left == 0:
            raise torch.OutOfMemoryError("out of memory")
        return self.inner(images)


@pytest.mark.parametrize("name", ["sam", "lbfgs"])
@pytest.mark.parametrize("forward", [2, 4, 6])
def test_memory_that_runs_out_in_any_pass_undoes_all_of_them(name: str, forward: int) -> None:
    """Forwards 2 and 4 are the second passes of steps 1 and 2 with SAM, when the weights are perturbed."""
    expected = plain(name, norm=False)
    model = make_model()
    trainer = Trainer(
        FailsOnce(model, forward + 1),  # one forward finds the parameters that are used
        data(),
        OPTIMIZERS[name](model.parameters()),
        duration="4 steps",
        log=RunLog(show=False),
    )
    trainer.fit()
    assert len(trainer.state.out_of_memory) == 1
    for key, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[key], rtol=0, atol=1e-9)


def test_adahessian_trains_attention() -> None:
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=CLASSES, img_size=32)
    images, labels = torch.randn(4, 3, 32, 32), torch.arange(4) % CLASSES
    optimizer = create_optimizer_v2(model, opt="adahessian", lr=0.01)
    before = model.blocks[0].attn.qkv.weight.detach().clone()
    Trainer(model, [(images, labels)], optimizer, duration="1 steps", log=RunLog(show=False)).fit()
    assert not torch.equal(before, model.blocks[0].attn.qkv.weight)


def test_an_optimizer_with_modes_is_refused() -> None:
    class ScheduleFree(torch.optim.SGD):
        def train(self) -> None: ...

        def eval(self) -> None: ...

    model = make_model()
    with pytest.raises(RunError, match=r"ScheduleFree has the modes train\(\) and eval\(\)"):
        Trainer(model, data(), ScheduleFree(model.parameters(), lr=0.1))


def test_optimizers_that_need_a_closure_are_recognised() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    assert needs_closure(SAM(parameters, torch.optim.SGD, lr=0.1))
    assert needs_closure(torch.optim.LBFGS(parameters))
    for name in ("sgd", "adamw", "lamb", "muon", "adahessian", "lookahead_adamw"):
        assert not needs_closure(create_optimizer_v2([nn.Parameter(torch.zeros(2, 2))], opt=name, lr=0.1)), name


def _two_of_adahessian() -> None:
    build("adahessian").fit()


def test_second_order_gradients_are_refused_with_several_processes() -> None:
    with pytest.raises(AssertionError, match="Adahessian differentiates gradients"):
        run_processes(_two_of_adahessian)


def test_fp16_scales_one_loss_per_step(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(accelerator, "scaler", torch.amp.GradScaler("cpu"))
    model = make_model()
    with pytest.raises(RunError, match="SAM makes several passes per step, which fp16"):
        Trainer(model, data(), OPTIMIZERS["sam"](model.parameters()), accelerator=accelerator)
