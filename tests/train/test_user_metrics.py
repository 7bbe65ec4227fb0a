"""Custom metrics and `predict` against a plain computation, and mistakes in them found before training."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.processes import reset_accelerate, run_processes
from helpers.small_trainer import small_trainer
from sklearn.metrics import average_precision_score, roc_auc_score
from torch import Tensor, nn

from hf_fasttrain import Ema, Trainer, Watch
from hf_fasttrain.cli import main
from hf_fasttrain.from_recipe.trainer import build_evaluator
from hf_fasttrain.recipe.load import load_recipe
from hf_fasttrain.train.distributed import Processes
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.utils.errors import RunError

SEEN: list[tuple[Tensor, Tensor]] = []


def mean_average_precision(logits: Tensor, labels: Tensor) -> float:
    """Return the mean average precision over the classes, of single or multiple labels."""
    assert (logits.dtype, logits.device.type, labels.device.type) == (torch.float32, "cpu", "cpu")
    SEEN.append((logits, labels))
    true = labels if labels.ndim == 2 else F.one_hot(labels, logits.shape[1])
    return float(average_precision_score(true.numpy(), logits.numpy(), average="macro"))


def split(number: int = 23, *, multi_label: bool = False) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, 2, 2) and labels of three classes, (N,) or (N, 3)."""
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(number, 3, 2, 2, generator=generator)
    labels = torch.arange(number) % 3
    return images, F.one_hot(labels, 3).float().roll(1, 0) + F.one_hot(labels, 3) if multi_label else labels


def trained_with_map(multi_label: bool) -> tuple[dict[str, float], float]:
    """Return the final metrics, and the mAP of the same weights computed by hand; processes have unequal shares."""
    images, labels = split(multi_label=multi_label)
    trainer = small_trainer(
        num_classes=None,
        loss=F.binary_cross_entropy_with_logits if multi_label else F.cross_entropy,
        train_loader=[(images[:8], labels[:8])],
        eval_loader=[(images[:0], labels[:0])],
        metrics={"mAP": mean_average_precision, "images": lambda logits, labels: len(labels)},
        best=Watch("mAP"),
    )
    ema = Ema(trainer.raw_model, 0.5)
    trainer.ema = trainer.step.updater.ema = ema
    index, number = trainer.processes.index, trainer.processes.number
    share = slice(0, 23) if number == 1 else slice(0, 17) if index == 0 else slice(17, 23)
    trainer.evaluation.eval_loader.loader = [
        (images[share][i : i + 5], labels[share][i : i + 5]) for i in range(0, share.stop - share.start, 5)
    ]
    result = trainer.fit()
    with torch.no_grad():
        return result.metrics, mean_average_precision(ema.module(images), labels)


@pytest.mark.parametrize("multi_label", [False, True])
def test_a_metric_is_exact_with_a_moving_average_and_over_processes(multi_label: bool) -> None:
    for metrics, expected in (trained_with_map(multi_label), *run_processes(trained_with_map, multi_label)):
        assert metrics["mAP"] == expected
        assert metrics["images"] == 23
        assert "top5_accuracy" not in metrics  # of three classes


def gathered(share: slice) -> list[Any]:
    """Return the rows of all processes as the main process gets them."""
    from accelerate import Accelerator

    processes = Processes(Accelerator(cpu=True))
    received = []
    for rows in (torch.arange(6.0).view(3, 2)[share], torch.tensor([True, False, True])[share], None):
        local_rows = rows if processes.is_main else None if rows is None else torch.cat([rows, rows])
        received.append(processes.rows_on_main(local_rows))
    return received


def test_rows_of_all_processes_reach_the_main_process() -> None:
    (numbers, flags, nothing), others = run_processes(gathered, slice(0, 3))
    assert numbers.tolist() == torch.arange(6.0).view(3, 2).repeat(3, 1).tolist()
    assert (flags.tolist(), nothing, others) == ([True, False, True] * 3, None, [None] * 3)
    (empty, _, _), _ = run_processes(gathered, slice(0, 0))
    assert empty.shape == (0, 2)


def in_order_of_rows(rows: list[list[int]]) -> list[int]:
    from accelerate import Accelerator

    from hf_fasttrain.train.user_metrics import UserMetrics

    accelerator = Accelerator(cpu=True)
    metrics, local_rows = UserMetrics({"order": lambda logits, labels: SEEN.append((logits, labels)) or 0}), rows
    metrics.update(
        torch.tensor(local_rows[accelerator.process_index]).float().view(-1, 1), torch.zeros(len(local_rows[0]))
    )
    assert metrics.compute(Processes(accelerator), local_rows[accelerator.process_index]) == {"order": 0.0}
    return SEEN[-1][0].flatten().int().tolist() if accelerator.is_main_process else []


def test_images_are_in_the_order_of_their_rows_for_any_number_of_processes() -> None:
    assert run_processes(in_order_of_rows, [[4, 1, 3], [5, 0, 2]])[0] == [0, 1, 2, 3, 4, 5]


def test_a_user_metric_chooses_the_best_step_and_stops_early(tmp_path: Path) -> None:
    values = iter([0.0, 0.1, 0.5, 0.4, 0.4, 0.4])  # the first: the check before training
    trainer = small_trainer(
        tmp_path,
        metrics={"rise": lambda logits, labels: torch.tensor(next(values))},
        best=Watch("rise", "max"),
        early_stopping=Watch("rise", "max", patience=2),
        evaluate_every="1 step",
        report=True,
    )
    result = trainer.fit()
    assert result.best is not None
    assert (result.best["step"], result.steps, result.stopped_early) == (2, 4, True)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    rise = [line["rise"] for line in lines if line["kind"] == "evaluation"]
    assert rise == pytest.approx([0.1, 0.5, 0.4, 0.4])
    assert json.loads((tmp_path / "result.json").read_text())["own_metrics"] == ["rise"]
    assert "rise" in (tmp_path / "report.html").read_text()


def test_best_and_early_stopping_watch_it_through_a_resume(tmp_path: Path) -> None:
    def trainer(values: list[float], duration: int = 12) -> Trainer:
        received = iter(values)
        return small_trainer(
            tmp_path,
            duration,
            metrics={"rise": lambda logits, labels: next(received)},
            predict=lambda model, images: model(images.flip(-1)),
            best=Watch("rise", "max"),
            early_stopping=Watch("rise", "max", patience=4),
            evaluate_every="1 step",
            checkpoint_every="3 steps",
        )

    first = trainer([0.0, 0.1, 0.5, 0.4])  # the first: the check before training
    with first.running():
        next(report for report in first.iterate() if report.step == 3)
    second = trainer([0.0, 0.4, 0.5, 0.4, 0.9])
    second.restore()
    assert second.state.best is not None
    assert (second.state.step, second.state.best["step"], second.state.best["value"]) == (3, 2, 0.5)
    result = second.fit()
    assert result.best is not None
    assert (result.best["step"], result.steps, result.stopped_early) == (2, 6, True)


class TwoHeads(nn.Module):
    """Returns logits and features."""

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.head = nn.Linear(12, outputs)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        features = images.flatten(1)
        return self.head(features), features


def trainer_of(model: nn.Module, loss: Callable[..., Tensor], **options: Any) -> Trainer:
    images, labels = split(12)
    data = [(images[i : i + 6], labels[i : i + 6]) for i in (0, 6)]
    options = {"eval_loader": data, "log": RunLog(show=False), **options}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Trainer(model, options.pop("train_loader", data), optimizer, loss=loss, duration="2 steps", **options)


def one_logit(model: nn.Module, images: Tensor) -> Tensor:
    return F.pad(model(images)[0], (1, 0))


def test_predict_gives_the_logits_of_a_model_with_several_outputs_or_one_logit() -> None:
    result = trainer_of(
        TwoHeads(),
        lambda outputs, labels: F.cross_entropy(outputs[0], labels),
        predict=lambda model, images: (model(images)[0] + model(images.flip(-1))[0]) / 2,
    ).fit()
    assert 0 <= result.metrics["accuracy"] <= 1
    images, labels = split(12)
    data = [(images, (labels > 0).long())]
    trainer = trainer_of(
        TwoHeads(1),
        lambda outputs, labels: F.binary_cross_entropy_with_logits(outputs[0][:, 0], labels.float()),
        eval_loader=data,
        predict=one_logit,
        metrics={"auc": lambda logits, labels: roc_auc_score(labels, logits[:, 1])},
    )
    metrics, z = trainer.fit().metrics, trainer.raw_model(images)[0][:, 0].detach()
    assert metrics["loss"] == pytest.approx(F.binary_cross_entropy_with_logits(z, data[0][1].float()).item(), rel=1e-6)
    assert metrics["accuracy"] == ((z > 0) == data[0][1]).double().mean().item()
    assert metrics["auc"] == roc_auc_score(data[0][1], z)
    assert trainer.evaluation.evaluator.user_function_names() == {"own_metrics": ["auc"], "predict": "one_logit"}


def test_images_may_be_trees_of_tensors_and_are_split_when_memory_is_short() -> None:
    images, labels = split(12)
    data = [({"pixels": images[i : i + 6], "age": labels[i : i + 6].float()}, labels[i : i + 6]) for i in (0, 6)]

    class WithAge(TwoHeads):
        def forward(self, batch: Any) -> Any:
            return {"logits": self.head(batch["pixels"].flatten(1) + batch["age"][:, None])}

    trainer = trainer_of(WithAge(), F.cross_entropy, train_loader=data, eval_loader=data)
    metrics = trainer.fit().metrics
    trainer.evaluation.evaluator.max_images = 4
    assert trainer.evaluate() == pytest.approx(metrics)


MISTAKES: dict[str, tuple[dict[str, Any], str]] = {
    "raises": (
        {"metrics": {"top": lambda logits, labels: logits[:, 9].sum()}},
        r"metrics: 'top' fails on 6 images of the evaluation split \(IndexError: .*\) and on synthetic logits of each "
        r"class, logits \(9, 3\) and labels \(9,\) torch.int64 .*called with logits \(N, 3\) float32 and the labels",
    ),
    "no number": (
        {"metrics": {"fine": lambda *_: 1, "each": lambda logits, labels: logits.mean(0)}},
        r"metrics: 'each' fails .*TypeError: it returns tensor.*instead of one number.* must return one number",
    ),
    "nothing": ({"metrics": {"none": lambda *_: None}}, "it returns None instead of one number"),
    "text": ({"metrics": {"text": lambda *_: "0.5"}}, "it returns '0.5' instead of one number"),
    "watched": (
        {"best": Watch("mAP")},
        "'mAP' is watched, but the evaluation measures only loss, accuracy, top5_accuracy, f1_macro",
    ),
    "classes": ({"num_classes": 4}, r"outputs for a batch are of shape \(6, 3\), and num_classes is 4"),
    "predict": (
        {"predict": lambda model, images: model(images).sum()},
        r"predict returned a tensor of shape \(\) for 6 images instead of logits \(6, K\)",
    ),
    "predict raises": (
        {"predict": lambda model, images: model(images).logits},
        "predict fails on 6 images of the evaluation split: AttributeError: 'Tensor' object has no attribute 'logits'",
    ),
    "labels": (
        {"eval_loader": [(split(6)[0], torch.tensor([0, 1, 2, 0, 3, 0]))]},
        "1 of 6 labels of the evaluation split are not from 0 to 2, and num_classes is 3",
    ),
    "labels' shape": (
        {"eval_loader": [(split(6)[0], torch.zeros(6, 1))]},
        r"float32 of shape \(6, 1\); must be 0 or 1 for each class, of shape \(6, 3\)",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_before_the_first_step(name: str) -> None:
    options, message = MISTAKES[name]
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    trainer = trainer_of(model, F.cross_entropy, **options)
    with pytest.raises(RunError, match=message):
        trainer.fit()
    assert trainer.state.step == 0
    with pytest.raises(RunError, match=r"returns a tuple of 2 \(Tensor, Tensor\) instead of logits.*predict="):
        trainer_of(TwoHeads(), lambda outputs, labels: F.cross_entropy(outputs[0], labels)).fit()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metrics": {"accuracy": len}}, "metrics: 'accuracy' can't be a metric's name; reserved are loss, accuracy"),
        ({"metrics": {"step": len}}, "metrics: 'step' can't be a metric's name"),
        ({"metrics": {1: len}}, "metrics: 1 can't be a metric's name"),
        ({"metrics": {"f": 0.5}}, "metrics: must be a dict of functions of all logits .*, got {'f': 0.5}"),
        ({"metrics": [len]}, r"metrics: must be a dict of functions .*, got \[<built-in function len>\]"),
        (
            {"predict": "logits"},
            r"predict: must be a function \(model, images\) -> logits \(B, K\), or None, got 'logits'",
        ),
    ],
)
def test_invalid_metrics_are_refused_at_construction(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RunError, match=message):
        small_trainer(**options)


def failing_on_one_process() -> str:
    images, labels = split(6)
    empty = [(images[:0], labels[:0])]
    trainer = small_trainer(eval_loader=empty, metrics={"broken": lambda *_: None})
    if trainer.processes.index == 1:
        trainer.evaluation.eval_loader.loader = [(images, labels)]
    with pytest.raises(RunError) as error:
        trainer.fit()
    return str(error.value)


def test_a_mistake_on_one_process_ends_all() -> None:
    first, second = run_processes(failing_on_one_process)
    assert first == second
    assert first.startswith("metrics: 'broken' fails on 6 images")


def test_a_metric_that_needs_every_class_is_not_refused_for_a_first_batch_of_one() -> None:
    images, labels = split(24)
    order = labels.argsort(stable=True)
    sorted_by_class = [(images[order][i : i + 8], labels[order][i : i + 8]) for i in (0, 8, 16)]
    area = lambda logits, labels: roc_auc_score(labels, logits.softmax(1), multi_class="ovr")  # noqa: E731
    result = small_trainer(eval_loader=sorted_by_class, metrics={"auc": area}).fit()
    assert 0 < result.metrics["auc"] < 1
    assert not [note for note in result.notes if "auc" in note]


def test_a_metric_that_fails_later_is_skipped_and_reported_once() -> None:
    calls: list[int] = []

    def flaky(logits: Tensor, labels: Tensor) -> float:
        calls.append(len(labels))
        if len(calls) in (3, 4):  # the first is the check before training
            raise ValueError("no positives")
        return len(calls)

    trainer = small_trainer(metrics={"flaky": flaky}, best=Watch("flaky", "max"), evaluate_every="1 step", steps=4)
    result = trainer.fit()
    assert result.best is not None
    assert (result.best["step"], calls[0], set(calls[1:])) == (4, 8, {24})
    assert [note for note in result.notes if "flaky" in note] == [
        "metric 'flaky' could not be computed and is skipped: ValueError: no positives",
        "'flaky' is watched; evaluations without it are not compared with the best",
    ]


def test_trying_a_metric_does_not_change_training() -> None:
    def weights(**options: Any) -> list[Tensor]:
        torch.manual_seed(3)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))
        images, labels = split(24)
        data = torch.utils.data.TensorDataset(images, labels)
        loaders = [torch.utils.data.DataLoader(data, 6, shuffle=shuffle) for shuffle in (True, False)]
        trainer_of(model, F.cross_entropy, **{"eval_loader": loaders[1], **options}).fit()
        return list(model.state_dict().values())

    drawing = {"random": lambda logits, labels: float(torch.rand(()))}  # the metric is called in evaluations too
    plain, with_metrics = weights(eval_loader=None), weights(metrics=drawing)
    assert all(map(torch.equal, plain, with_metrics))


def test_metrics_are_not_tried_on_a_one_time_iterator() -> None:
    images, labels = split(6)

    def once() -> Iterator[tuple[Tensor, Tensor]]:
        yield images, labels

    trainer = small_trainer(eval_loader=once(), metrics={"images": lambda logits, labels: len(labels)})
    trainer.checkpoint_every = trainer.evaluate_every = 6
    result = trainer.fit()
    assert result.metrics["images"] == 6
    assert [note for note in result.notes if "iterator" in note] == [
        "the evaluation split is an iterator, which yields its images once: metrics are not tried on it"
    ]
    with pytest.raises(RunError, match="no images to evaluate: an iterator yields its images once"):
        trainer.evaluate()


def test_the_number_of_classes_comes_from_the_logits() -> None:
    plain, without = (small_trainer(num_classes=number).fit() for number in (3, None))
    assert plain.metrics == without.metrics


def test_recipes_take_custom_metrics_and_evaluate_reports_that_it_lacks_them(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: Any
) -> None:
    recipe, run = write_recipe(), tmp_path / "run"
    trainer = Trainer.from_recipe(recipe, [f"output_dir={run}", "evaluate.metrics=[accuracy]", "data.workers=1"])
    options = {"user_metrics": {"mAP": mean_average_precision}, "predict": one_of_one}
    names = [str(number) for number in range(10)]
    trainer.evaluation.evaluator = build_evaluator(load_recipe(recipe), trainer.accelerator, False, names, **options)
    SEEN.clear()
    result = trainer.fit()
    number = trainer.evaluation.eval_loader.num_images
    assert [len(labels) for _, labels in SEEN] == [8, number]
    images, labels = (torch.cat(column) for column in zip(*trainer.evaluation.eval_loader, strict=True))
    with torch.no_grad():
        assert result.metrics["mAP"] == pytest.approx(mean_average_precision(trainer.raw_model.eval()(images), labels))
    reset_accelerate()
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["evaluate", str(run)])
    messages = " ".join(capsys.readouterr().err.split())
    assert "mAP: functions of your own that the run was trained with (metrics=)" in messages
    assert "while training, one_of_one gave the logits (predict=)" in messages


def one_of_one(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)
