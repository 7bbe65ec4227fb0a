"""Step losses: plain, with parameters, of nested batches, and on several processes."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import PartialState
from helpers.processes import run_processes
from helpers.small_trainer import StatefulLoader
from torch import Tensor, nn

from hf_fasttrain import RunError, Trainer
from hf_fasttrain.data.loading.trees import cut, map_leaves, rows
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.train.step_loss import At
from hf_fasttrain.utils.errors import DataError

CLASSES, BATCH, STEPS, LR = 4, 12, 5, 0.1
Batch = tuple[Any, Any]


class TwoInputs(nn.Module):
    """Logits of an image and additional numbers; `features` is a separate method."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.meta = nn.Linear(3 * 4 * 4, 8), nn.Linear(2, 8)
        self.head = nn.Linear(8, CLASSES)

    def features(self, images: Tensor, meta: Tensor) -> Tensor:
        return torch.tanh(self.body(images.flatten(1)) + self.meta(meta))

    def forward(self, images: Tensor, meta: Tensor) -> Tensor:
        return self.head(self.features(images, meta))


class Centers(nn.Module):
    """A loss with weights: the distance to the learnt centre of an image's class, and a count."""

    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.centers = nn.Parameter(torch.linspace(-1, 1, CLASSES * 8).view(CLASSES, 8))
        self.teacher = nn.Linear(8, 8).requires_grad_(False)
        self.register_buffer("count", torch.zeros(()))

    def forward(self, model: TwoInputs, images: Any, targets: Any, at: At) -> tuple[Tensor, dict[str, Tensor]]:
        features = model.features(images["pixels"], images["meta"])
        self.count += 1
        return_loss = F.cross_entropy(model.head(features), targets)
        distance = (features - self.centers[targets]).square().sum(1).mean()
        return return_loss + 0.5 * distance, {"distance": distance.detach()}


def batches(number: int = STEPS, batch: int = BATCH) -> list[Batch]:
    generator = torch.Generator().manual_seed(2)
    return [
        (
            {
                "pixels": torch.randn(batch, 3, 4, 4, generator=generator),
                "meta": torch.randn(batch, 2, generator=generator),
            },
            torch.randint(0, CLASSES, (batch,), generator=generator),
        )
        for _ in range(number)
    ]


def loader_of(data: Sequence[Batch]) -> StatefulLoader:
    """Return this process's share of each batch."""
    state = PartialState(cpu=True)
    per = BATCH // state.num_processes
    mine = slice(state.process_index * per, (state.process_index + 1) * per)
    return StatefulLoader((rows(images, mine), rows(targets, mine)) for images, targets in data)


def with_values(model: TwoInputs, images: Any, targets: Tensor, at: At) -> tuple[Tensor, dict[str, Any]]:
    logits = model(images["pixels"], images["meta"])
    weight = 1 + at.step / at.num_steps + at.epoch
    loss = weight * F.cross_entropy(logits, targets)
    return loss, {"accuracy": (logits.argmax(1) == targets).float().mean(), "weight": weight}


def plain(step_loss: Any, data: Sequence[Batch], clip: float | None = None) -> tuple[dict[str, Tensor], list[float]]:
    """Return weights and losses of a plain PyTorch loop."""
    torch.manual_seed(0)
    model = TwoInputs()
    parameters = [*model.parameters(), *(step_loss.parameters() if isinstance(step_loss, nn.Module) else ())]
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=LR, momentum=0.9)
    losses = []
    for index, (images, targets) in enumerate(data):
        loss, _ = step_loss(model, images, targets, At(index + 1, index, 0, len(data)))
        optimizer.zero_grad()
        loss.backward()
        if clip:
            nn.utils.clip_grad_norm_(parameters, clip)
        optimizer.step()
        losses.append(float(loss.detach()))
    state = {**model.state_dict(), **({} if not isinstance(step_loss, nn.Module) else step_loss.state_dict())}
    return state, losses


def trained(
    step_loss: Any, accumulation: int = 1, folder: Path | None = None, steps: int = STEPS, **options: Any
) -> Trainer:
    """Return the trainer after the same training."""
    torch.manual_seed(0)
    model, accelerator = TwoInputs(), Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    parameters = [*model.parameters(), *(step_loss.parameters() if isinstance(step_loss, nn.Module) else ())]
    return Trainer(
        model,
        loader_of(batches()),
        torch.optim.SGD([p for p in parameters if p.requires_grad], lr=LR, momentum=0.9),
        step_loss=step_loss,
        accelerator=accelerator,
        accumulation_steps=accumulation,
        duration=f"{steps} steps",
        log=RunLog(folder, main=accelerator.is_main_process, show=False),
        log_every=1,
        output_dir=folder,
        report=False,
        **options,
    )


def weights_of(trainer: Trainer, step_loss: Any) -> dict[str, Tensor]:
    loss = step_loss.state_dict() if isinstance(step_loss, nn.Module) else {}
    return {name: value.detach().clone() for name, value in {**trainer.raw_model.state_dict(), **loss}.items()}


def fitted(step_loss: Any, accumulation: int, folder: Path, **options: Any) -> dict[str, Tensor]:
    trainer = trained(step_loss, accumulation, folder, **options)
    trainer.fit()
    return weights_of(trainer, step_loss)


def lines(folder: Path) -> list[dict[str, Any]]:
    every = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [line for line in every if line["kind"] == "train"]


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("processes", [1, 2])
def test_a_step_loss_gives_the_weights_and_losses_of_a_plain_loop(
    accumulation: int, processes: int, tmp_path: Path
) -> None:
    expected, losses = plain(with_values, batches())
    both = run_processes(fitted, with_values, accumulation, tmp_path, num_processes=processes)
    exact = accumulation == processes == 1
    for weights in both:
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=0 if exact else 1e-5, atol=0 if exact else 1e-6)
    assert [line["loss"] for line in lines(tmp_path)] == pytest.approx(losses, rel=1e-5)


def test_values_returned_with_the_loss_are_means_over_the_images_of_all_processes(tmp_path: Path) -> None:
    def once(folder: Path) -> None:
        trainer = trained(with_values, 2, folder)
        trainer.log_every = 2  # 5 steps: two log intervals of 2, one of 1
        trainer.fit()

    run_processes(once, tmp_path)
    per_step = []

    def recording(model: Any, images: Any, targets: Any, at: At) -> Any:
        loss, values = with_values(model, images, targets, at)
        per_step.append((float(values["accuracy"]), values["weight"]))
        return loss, values

    plain(recording, batches())
    laps = (per_step[:2], per_step[2:4], per_step[4:])
    expected = [[sum(column) / len(column) for column in zip(*lap, strict=True)] for lap in laps]
    assert [(line["accuracy"], line["weight"]) for line in lines(tmp_path)] == [pytest.approx(e) for e in expected]


def _with_a_value_of_some(folder: Path) -> None:
    def of_some(model: TwoInputs, images: Any, targets: Tensor, at: At) -> tuple[Tensor, dict[str, Any]]:
        loss, _ = with_values(model, images, targets, at)
        return loss, {"class": targets.float().mean()} if targets[0] == 0 else {}

    trained(of_some, 3, folder).fit()


@pytest.mark.parametrize("processes", [1, 2])
def test_a_value_is_a_mean_over_the_images_that_it_was_returned_for(processes: int, tmp_path: Path) -> None:
    run_processes(_with_a_value_of_some, tmp_path, num_processes=processes)
    size = 4 if processes == 1 else 2
    means = []
    for _, targets in batches():
        parts = [part for part in targets.split(size) if part[0] == 0]
        means.append(float(torch.cat(parts).float().mean()) if parts else None)
    assert any(mean is None for mean in means) or processes == 2
    assert [line.get("class") for line in lines(tmp_path)] == pytest.approx(means)


def _with_more_unlabelled_images(accumulation: int) -> dict[str, Tensor]:
    torch.manual_seed(0)
    model, log = TwoInputs(), RunLog(show=False)
    halves, index = PartialState(cpu=True).num_processes, PartialState(cpu=True).process_index
    data = []
    for images, targets in batches():
        part = {"labelled": images, "unlabelled": map_leaves(lambda x: torch.cat([x, -x, 2 * x]), images)}
        mine = list(range(BATCH))[index * BATCH // halves : (index + 1) * BATCH // halves]
        data.append((rows(part, mine, BATCH), targets[mine]))

    def semi_supervised(model: TwoInputs, images: Any, targets: Tensor, at: At) -> Tensor:
        assert len(images["unlabelled"]["meta"]) == 3 * len(targets)
        logits = model(*images["unlabelled"].values())
        return F.cross_entropy(model(*images["labelled"].values()), targets) + logits.square().mean()

    options: dict[str, Any] = {"accelerator": Accelerator(cpu=True), "accumulation_steps": accumulation, "log": log}
    Trainer(model, data, torch.optim.SGD(model.parameters(), lr=LR), step_loss=semi_supervised, **options).fit()
    assert not log.notes
    return model.state_dict()


def test_several_unlabelled_images_per_labelled_one_are_split_in_proportion() -> None:
    (whole,) = run_processes(_with_more_unlabelled_images, 1, num_processes=1)
    for weights in (
        *run_processes(_with_more_unlabelled_images, 5, num_processes=1),
        *run_processes(_with_more_unlabelled_images, 2),
    ):
        for name, value in weights.items():
            torch.testing.assert_close(value, whole[name], rtol=1e-5, atol=1e-6)
    tree = {"a": torch.arange(3), "b": torch.arange(6), "c": list("uvwxyz"), "d": None}
    assert [[list(leaf) if leaf is not None else None for leaf in part.values()] for part in cut(tree, [1, 2])] == [
        [[0], [0, 1], ["u", "v"], None],
        [[1, 2], [2, 3, 4, 5], ["w", "x", "y", "z"], None],
    ]
    assert [len(part) for part in cut(torch.arange(6), [1, 2])] == [2, 4]
    assert rows(tree, [0, -1], 3)["b"].tolist() == [0, 1, 4, 5]


@pytest.mark.parametrize("processes", [1, 2])
def test_a_loss_with_weights_is_trained_clipped_and_exchanged(processes: int, tmp_path: Path) -> None:
    expected, _ = plain(Centers(), batches(), clip=0.5)
    torch.manual_seed(3)
    for weights in run_processes(_with_centers, tmp_path, num_processes=processes):
        for name in ("centers", "body.weight", "head.bias"):
            torch.testing.assert_close(weights[name], expected[name], rtol=1e-5, atol=1e-6)


def _with_centers(folder: Path) -> dict[str, Tensor]:
    return fitted(Centers(), 2, folder, clip_norm=0.5)


def test_a_loss_with_weights_is_saved_and_restored_without_its_teacher(tmp_path: Path) -> None:
    loss = Centers()
    whole = fitted(loss, 1, tmp_path / "whole")
    first = trained(Centers(), 1, tmp_path / "run", checkpoint_every="2 steps")
    with first.running():
        for report in first.iterate():
            if report.step == 3:
                break
    again = Centers()
    with torch.no_grad():
        again.centers.zero_()
    second = trained(again, 1, tmp_path / "run")
    second.restore()
    assert second.state.step == 2
    assert float(again.count) == 2
    second.fit()
    for name, value in weights_of(second, again).items():
        assert torch.equal(value, whole[name]) or name.startswith("teacher"), name
    names = {path.name for path in (tmp_path / "whole" / "checkpoints").rglob("*.safetensors")}
    assert "loss.safetensors" in names
    assert second.step.loss_state is not None
    assert second.step.loss_state.names == {"centers", "count"}
    plain_loss = trained(with_values, 1, tmp_path / "run")
    with pytest.raises(RunError, match=r"loss: '.*Centers' in the run"):
        plain_loss.restore()


class ModelOfLogits(nn.Module):
    """Scaled logits, as a loss of logits with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(self.scale * logits, targets)


def _with_scale(accumulation: int) -> tuple[float, Tensor]:
    torch.manual_seed(0)
    model, loss = nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES)), ModelOfLogits()
    data = loader_of([(images["pixels"], targets) for images, targets in batches()])
    optimizer = torch.optim.SGD([*model.parameters(), *loss.parameters()], lr=LR)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    options: dict[str, Any] = {"accumulation_steps": accumulation, "log": RunLog(show=False)}
    Trainer(model, data, optimizer, loss=loss, accelerator=accelerator, duration="5 steps", **options).fit()
    return float(loss.scale), model[1].weight.detach().clone()


def test_a_loss_of_logits_may_have_weights_too() -> None:
    ((scale, weight),) = run_processes(_with_scale, 1, num_processes=1)
    assert scale != 2.0
    for other, moved in run_processes(_with_scale, 3):
        assert other == pytest.approx(scale, rel=1e-5)
        torch.testing.assert_close(moved, weight, rtol=1e-5, atol=1e-6)


def test_loss_weights_missing_from_the_optimizer_are_reported() -> None:
    torch.manual_seed(0)
    model, log = TwoInputs(), RunLog(show=False)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    Trainer(model, loader_of(batches()), optimizer, step_loss=Centers(), duration="1 steps", log=log).fit()
    assert any("loss.centers" in note for note in log.notes)


def _uses_some(folder: Path) -> tuple[dict[str, Tensor], list[str]]:
    def body_only(model: TwoInputs, images: Any, targets: Tensor, at: At) -> Tensor:
        features = model.features(images["pixels"], images["meta"])
        return model.head(features)[:, :CLASSES].square().mean() if at.step > 2 else features.square().mean()

    trainer = trained(body_only, 2)
    trainer.fit()
    return weights_of(trainer, None), trainer.log.notes


def test_two_processes_agree_where_a_step_loss_uses_the_head_from_the_third_step_on(tmp_path: Path) -> None:
    ((one, _),) = run_processes(_uses_some, tmp_path, num_processes=1)
    for weights, _ in run_processes(_uses_some, tmp_path):
        for name, value in weights.items():
            torch.testing.assert_close(value, one[name], rtol=1e-5, atol=1e-6)


def _short_step() -> dict[str, Tensor]:
    torch.manual_seed(0)
    model = TwoInputs()
    state, data = PartialState(cpu=True), batches(2)
    index = state.process_index
    if state.num_processes == 2:
        halves = [slice(0, 6), slice(6, 12)]
        first = (rows(data[0][0], halves[index]), rows(data[0][1], halves[index]))
        second = data[1] if index == 0 else (rows(data[1][0], slice(0, 0)), data[1][1][:0])
        data = [first, second]
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    options: dict[str, Any] = {"duration": "2 steps", "log": RunLog(show=False), "accelerator": Accelerator(cpu=True)}
    Trainer(model, data, optimizer, step_loss=with_values, **options).fit()
    return model.state_dict()


def test_a_process_without_images_joins_a_step_with_a_step_loss() -> None:
    (one,) = run_processes(_short_step, num_processes=1)
    for weights in run_processes(_short_step):
        for name, value in weights.items():
            torch.testing.assert_close(value, one[name], rtol=1e-5, atol=1e-6)


def _searches_after_an_empty_step() -> bool:
    torch.manual_seed(0)
    model, state = TwoInputs(), PartialState(cpu=True)
    data = batches(2)
    if state.process_index:
        data = [(rows(images, slice(0, 0)), targets[:0]) for images, targets in data]
    options: dict[str, Any] = {"duration": "2 steps", "log": RunLog(show=False), "accelerator": Accelerator(cpu=True)}
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    trainer = Trainer(model, data, optimizer, step_loss=with_values, **options)
    trainer.fit()
    return trainer.step.accumulation._finds_unused


def test_a_first_step_without_images_does_not_make_later_ones_search_unused_parameters() -> None:
    assert run_processes(_searches_after_an_empty_step) == [False, False]


def small(loss: Any, accumulation: int, **options: Any) -> Trainer:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, CLASSES), nn.Dropout(0.5))
    data = [(images["pixels"], torch.arange(BATCH) % CLASSES) for images, _ in batches()]
    options = {"log": RunLog(show=False), "accumulation_steps": accumulation, "duration": "2 steps", **options}
    return Trainer(model, data, torch.optim.SGD(model.parameters(), lr=0.01), loss=loss, **options)


def test_a_sum_is_refused_only_when_a_step_is_split() -> None:
    loss = nn.CrossEntropyLoss(reduction="sum")
    with pytest.raises(RunError, match=r"a sum over its images: .*divided by the number of images"):
        small(loss, 3).fit()
    small(loss, 1).fit()


@pytest.mark.parametrize("loss", [nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 5.0, 9.0])), "contrastive"])
def test_a_loss_that_is_not_a_mean_is_reported_when_a_step_is_split(loss: Any) -> None:
    if loss == "contrastive":
        loss = lambda logits, targets: F.cross_entropy(logits @ logits.T, torch.arange(len(logits)))  # noqa: E731
    messages = [note for n in (1, 3) for note in _notes(small(loss, n)) if "not a mean over its images" in note]
    assert len(messages) == 1
    assert "accumulation_steps" in messages[0]


def _notes(trainer: Trainer) -> list[str]:
    trainer.fit()
    return trainer.log.notes


def test_invalid_results_of_a_step_loss_are_refused() -> None:
    def trainer(returned: Any) -> Trainer:
        return trained(lambda model, images, targets, at: returned(model(images["pixels"], images["meta"])))

    for returned, message in (
        (lambda logits: logits.sum(1), r"a tensor of shape \(12,\)"),
        (lambda logits: 1.0, "a batch is float"),
        (lambda logits: (logits.mean(), [1.0]), r"\(loss, list\)"),
        (lambda logits: (logits.mean(), {"a": logits}), r"the value 'a' \(shape \(12, 4\)\)"),
        (lambda logits: (logits.mean(), {"a": "b"}), r"the value 'a' \(str\)"),
        (lambda logits: (logits.mean(), {"lr": 1.0}), "values named lr"),
    ):
        with pytest.raises(RunError, match=message):
            trainer(returned).fit()


class Pair(NamedTuple):
    image: Tensor
    names: list[str]


def test_trees_are_split() -> None:
    tree = {"a": Pair(torch.arange(5), list("vwxyz")), "b": (torch.arange(10).view(5, 2), None)}
    parts = list(cut(tree, [2, 3]))
    assert parts[0]["a"].names == ["v", "w"]
    assert parts[1]["b"][0].tolist() == [[4, 5], [6, 7], [8, 9]]
    assert isinstance(parts[0]["a"], Pair)
    assert [name for part in parts for name in part["a"].names] == list("vwxyz")
    assert torch.equal(torch.cat([part["b"][0] for part in parts]), tree["b"][0])
    assert rows(tree, [0, -1])["a"].names == ["v", "z"]
    assert map_leaves(lambda leaf: leaf, tree)["b"][1] is None


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ([torch.zeros(12), torch.zeros(11)], r"the targets of a batch of 12 images have a tensor of shape \(11,\)"),
        ({"id": 7}, "have int;"),
        ((torch.zeros(12), ["a", "b"]), "have list of 2 strings"),
        (torch.zeros(18), r"must be 12 \(.*first tensor\) or a multiple of it"),
    ],
)
def test_a_batch_that_cannot_be_split_is_refused(targets: Any, message: str) -> None:
    torch.manual_seed(0)
    model = TwoInputs()
    trainer = Trainer(
        model, [(batches(1)[0][0], targets)], torch.optim.SGD(model.parameters(), lr=LR), step_loss=with_values
    )
    with pytest.raises(DataError, match=message):
        trainer.fit()


class Momentum(nn.Module):
    """A loss that updates a teacher and replaces a buffer, like a momentum encoder, and learns a scale."""

    center: Tensor

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.teacher, self.scale = TwoInputs().requires_grad_(False), nn.Parameter(torch.ones(CLASSES))
        self.register_buffer("center", torch.zeros(CLASSES))

    def compute(self, model: TwoInputs, images: Any, targets: Tensor, at: At) -> Tensor:
        for old, new in zip(self.teacher.parameters(), model.parameters(), strict=True):
            old.data.mul_(0.5).add_(new.data, alpha=0.5)
        soft = self.teacher(images["pixels"], images["meta"])
        self.center = 0.5 * self.center + 0.5 * soft.mean(0)
        return F.cross_entropy(self.scale * model(images["pixels"], images["meta"]), (soft - self.center).softmax(1))

    forward = compute


def _with_momentum(folder: Path | None, resume_at: int = 0, **options: Any) -> dict[str, Tensor]:
    loss = Momentum()
    trainer = trained(loss, 1, folder, checkpoint_every="2 steps", **options)
    if resume_at:
        with trainer.running():
            next(report for report in trainer.iterate() if report.step == resume_at)
        loss = Momentum()
        trainer = trained(loss, 1, folder, **options)
        trainer.restore()
        assert trainer.state.step == resume_at - 1
    trainer.fit()
    return weights_of(trainer, loss)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_moving_teacher_and_a_replaced_buffer_are_resumed(processes: int, tmp_path: Path) -> None:
    whole = run_processes(_with_momentum, tmp_path / "whole", num_processes=processes)
    resumed = run_processes(_with_momentum, tmp_path / "resumed", 3, num_processes=processes)
    for one, other in zip(whole, resumed, strict=True):
        for name, value in one.items():
            assert torch.equal(other[name], value), name


def test_a_loss_that_updates_buffers_counts_retries_and_second_passes_once() -> None:
    class Short(Momentum):
        left = 3

        def forward(self, model: TwoInputs, images: Any, targets: Tensor, at: At) -> Tensor:
            loss = super().compute(model, images, targets, at)
            self.left -= 1
            if not self.left:
                raise torch.OutOfMemoryError("out of memory")
            return loss

    before = []

    class Recording(Short):
        left = 0

        def forward(self, *arguments: Any) -> Tensor:
            before.append((arguments[3].step, self.center.clone()))
            return super().forward(*arguments)

    for left in (0, 3):
        before.clear()
        loss = Recording()
        loss.left = left
        trained(loss, 1, steps=3).fit()
        if left:
            assert [step for step, _ in before[:4]] == [1, 2, 3, 3]
            assert torch.equal(before[2][1], before[3][1])

    class TwoPasses(torch.optim.SGD):
        needs_closure = True

        def step(self, closure: Any = None) -> None:
            closure()
            super().step()

    counts, model = Centers(), TwoInputs()
    optimizer = TwoPasses([p for p in [*model.parameters(), *counts.parameters()] if p.requires_grad], lr=LR)
    Trainer(model, loader_of(batches()), optimizer, step_loss=counts, duration="5 steps", log=RunLog(show=False)).fit()
    assert float(counts.count) == 5


def _method_of(kind: str) -> dict[str, Tensor]:
    loss = Momentum()
    step_loss = {"module": loss, "method": loss.compute, "partial": functools.partial(loss)}[kind]
    torch.manual_seed(0)
    model, accelerator = TwoInputs(), Accelerator(cpu=True, gradient_accumulation_steps=3)
    optimizer = torch.optim.SGD([*model.parameters(), loss.scale], lr=LR)
    options: dict[str, Any] = {"accelerator": accelerator, "accumulation_steps": 3, "duration": "3 steps"}
    trainer = Trainer(model, loader_of(batches()), optimizer, step_loss=step_loss, log=RunLog(show=False), **options)
    trainer.fit()
    return weights_of(trainer, loss)


@pytest.mark.parametrize("kind", ["method", "partial"])
def test_the_module_of_a_method_or_a_partial_is_exchanged_like_a_module(kind: str) -> None:
    expected = run_processes(_method_of, "module")
    for weights, others in zip(run_processes(_method_of, kind), expected, strict=True):
        for name, value in others.items():
            assert torch.equal(weights[name], value), name


def _foreign() -> list[str]:
    scale, model = nn.Parameter(torch.ones(CLASSES)), TwoInputs()

    def scaled(model: TwoInputs, images: Any, targets: Tensor, at: At) -> Tensor:
        return F.cross_entropy(scale * model(images["pixels"], images["meta"]), targets)

    optimizer, log = torch.optim.SGD([*model.parameters(), scale], lr=LR), RunLog(show=False)
    Trainer(model, loader_of(batches()), optimizer, step_loss=scaled, accelerator=Accelerator(cpu=True), log=log).fit()
    return log.notes


def test_optimized_parameters_of_neither_module_are_reported_and_refused_with_several_processes() -> None:
    ((note,),) = run_processes(_foreign, num_processes=1)
    assert "1 parameters that are neither the model's nor the loss's: they are trained, but not" in note
    with pytest.raises(
        AssertionError, match=r"do not exchange their gradients; pass a loss that is a torch\.nn\.Module"
    ):
        run_processes(_foreign)


class Holding(nn.Module):
    """A loss that contains the model, like a LightningModule."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.weight = model, model.head.weight

    def forward(self, model: nn.Module, images: Any, targets: Tensor, at: At) -> Tensor:
        return F.cross_entropy(self.model(images["pixels"], images["meta"]), targets).view(1)


def test_a_loss_may_hold_the_model_and_give_a_number_in_brackets(tmp_path: Path) -> None:
    def of_model(model: TwoInputs, images: Any, targets: Tensor, at: At) -> Tensor:
        return F.cross_entropy(model(images["pixels"], images["meta"]), targets)

    expected, _ = plain(lambda *arguments: (of_model(*arguments), {}), batches())
    torch.manual_seed(0)
    model = TwoInputs()
    optimizer, log = torch.optim.SGD(model.parameters(), lr=LR, momentum=0.9), RunLog(tmp_path, show=False)
    options: dict[str, Any] = {"output_dir": tmp_path, "log": log, "log_every": 1, "report": False}
    trainer = Trainer(model, loader_of(batches()), optimizer, step_loss=Holding(model), **options)
    trainer.fit()
    assert trainer.step.loss_state is None
    assert not list((tmp_path / "checkpoints").rglob("loss.safetensors"))
    for name, value in model.state_dict().items():
        assert torch.equal(value, expected[name]), name


def test_a_loss_without_gradient_or_with_other_arguments_is_refused() -> None:
    def three(model: Any, images: Any, targets: Any) -> Tensor:
        raise AssertionError

    with pytest.raises(RunError, match=r"step_loss: must be .* maps \(model, images, targets, at\)"):
        trained(three)
    with pytest.raises(RunError, match="the loss of a batch does not require gradients"):
        trained(lambda model, images, targets, at: model(images["pixels"], images["meta"]).mean().detach()).fit()


def test_a_list_of_single_images_must_be_stacked() -> None:
    model = TwoInputs()
    images = [torch.zeros(3, 4 + number, 4) for number in range(5)]
    loader = [(images, torch.zeros(5, dtype=torch.long))]
    with pytest.raises(DataError, match=r"stack a list of tensors, one per image, to one tensor \(B, 3, H, W\)"):
        Trainer(model, loader, torch.optim.SGD(model.parameters(), lr=LR), step_loss=with_values).fit()
