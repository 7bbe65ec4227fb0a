"""The moving average is that of the trained weights, also of a moved model and on several processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from helpers.processes import reset_accelerate, run_processes
from torch import Tensor, nn

from hf_fasttrain import Trainer
from hf_fasttrain.data.loading.loader import Step
from hf_fasttrain.train.ema import Ema
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.utils.errors import RunError

DECAY, STEPS = 0.8, 6


def small_model() -> nn.Module:
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(4, 3))


def averages(model: nn.Module, decay: float, start: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: decay * start[name] + (1 - decay) * value if value.is_floating_point() else value.clone()
        for name, value in model.state_dict().items()
    }


class WithReferenceAverage(Trainer):
    """Keeps a plain average next to the trainer's."""

    def train_step(self, step: Step) -> Tensor:
        if step.index == 0:
            self.expected = {name: value.clone() for name, value in self.raw_model.state_dict().items()}
        loss = super().train_step(step)
        self.expected = averages(self.raw_model, DECAY, self.expected)
        return loss


def train(*, seed_by_process: bool = False) -> tuple[dict[str, Tensor], dict[str, Tensor], list[float]]:
    """Return the average, a plain one and the evaluations' losses; 8 images a step over all processes."""
    reset_accelerate()
    accelerator = Accelerator(cpu=True)
    torch.manual_seed(accelerator.process_index if seed_by_process else 0)
    model = small_model()
    images = torch.randn(8 * STEPS, 3, 8, 8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(8 * STEPS) % 3
    share = slice(accelerator.process_index, None, accelerator.num_processes)
    data = [(x[share], y[share]) for x, y in zip(images.split(8), labels.split(8), strict=True)]
    trainer = WithReferenceAverage(
        model,
        data,
        torch.optim.SGD(model.parameters(), lr=0.5),
        accelerator=accelerator,
        ema=Ema(model, DECAY, warmup=False),
        eval_loader=data,
        num_classes=3,
        evaluate_every="2 steps",
        log=(log := RunLog(show=False)),
    )
    losses: list[float] = []
    log.eval_line = lambda *args: losses.append(args[3]["loss"])  # type: ignore[method-assign]
    trainer.fit()
    assert trainer.ema is not None
    return trainer.ema.module.state_dict(), trainer.expected, losses


def test_two_processes_average_and_evaluate_as_one_does() -> None:
    single, expected, losses = train()
    torch.testing.assert_close(single, expected)
    assert len({round(loss, 6) for loss in losses}) == 3
    weights = {name for name in single if "running" not in name and "tracked" not in name}
    for average, plain, split_losses in run_processes(train):
        torch.testing.assert_close({n: average[n] for n in weights}, {n: plain[n] for n in weights})
        assert len({round(loss, 6) for loss in split_losses}) == 3


def test_processes_with_different_initial_weights_average_those_of_the_main_process() -> None:
    def average() -> dict[str, Tensor]:
        return train(seed_by_process=True)[0]

    first, second = run_processes(average)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


MOVES: dict[str, Callable[[nn.Module], object]] = {
    "copied to cpu:0": lambda model: model.to("cpu:0"),
    "channels_last": lambda model: model.to(memory_format=torch.channels_last),
    "float64": lambda model: model.double(),
    "replaced": lambda model: model.load_state_dict({k: v.clone() for k, v in model.state_dict().items()}, assign=True),
}


@pytest.mark.parametrize(
    ("move", "attached"), [(move, True) for move in MOVES] + [(move, False) for move in MOVES if move != "float64"]
)
def test_a_moved_model_is_averaged(move: str, attached: bool) -> None:
    model = small_model()
    ema = Ema(model, 0.5, warmup=False)
    MOVES[move](model)
    if attached:
        ema.attach(model)
    start = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(1)
    ema.update(0)
    torch.testing.assert_close(ema.module.state_dict(), averages(model, 0.5, start))
    if attached:
        layout = {name: (value.dtype, value.stride()) for name, value in model.state_dict().items()}
        assert {name: (value.dtype, value.stride()) for name, value in ema.module.state_dict().items()} == layout


def test_tied_weights_are_averaged_once() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[1].weight = model[0].weight
    ema = Ema(model, 0.5, warmup=False)
    before = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight.add_(1)
    ema.update(0)
    torch.testing.assert_close(ema.module[1].weight.detach(), before + 0.5)


def test_an_average_of_another_model_is_refused() -> None:
    model, data = small_model(), [(torch.randn(4, 3, 8, 8), torch.tensor([0, 1, 2, 0]))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    other = Ema(nn.Sequential(*small_model()[:-1], nn.Linear(4, 5)), 0.9)
    with pytest.raises(
        RunError, match=r"2 tensors are not in both or differ in shape \(5\.bias, 5\.weight\); create it"
    ):
        Trainer(model, data, optimizer, ema=other)


def test_an_average_slower_than_training_is_reported(write_recipe: Callable[..., Path]) -> None:
    """With decay 0.9 the average covers about 10 updates."""
    model = nn.Linear(2, 2)
    assert Ema(model, 0.9, warmup=False).slow_note(10) is None
    assert Ema(model, 0.9, warmup=True).slow_note(5) is None
    assert "covers inf updates" in str(Ema(model, 1.0, warmup=False).slow_note(5))
    override = "ema={decay: 0.9, warmup: false}"
    trainer = Trainer.from_recipe(write_recipe(), [override, f"output_dir={write_recipe().parent / 'run'}"])
    expected = (
        "the moving average covers 10 updates (ema.decay=0.9), but training makes only 2: the averaged weights, which "
        "are evaluated and saved, still contain 81% of the initial weights; set ema.warmup=true (in Python: "
        "Ema(..., warmup=True)) or a lower ema.decay"
    )
    assert trainer.log.notes.count(expected) == 1
    longer = [override, "train.duration=10 steps", f"output_dir={write_recipe().parent / 'longer'}"]
    reset_accelerate()
    assert "moving average" not in " ".join(Trainer.from_recipe(write_recipe(), longer).log.notes)
