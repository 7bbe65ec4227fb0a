"""What a run writes for its report: predictions, pictures, the page; failures there do not affect the run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.processes import reset_accelerate, run_processes
from helpers.runs import exit_status
from PIL import Image
from safetensors.torch import save_file
from sklearn.metrics import accuracy_score, log_loss

from hf_fasttrain.from_recipe.trainer import build_trainer
from hf_fasttrain.run_folder.bits import count_bits, pack_bits, unpack_bits
from hf_fasttrain.run_folder.file_names import PREDICTIONS_FILE
from hf_fasttrain.run_folder.gallery import Gallery, Picture, thumbnail
from hf_fasttrain.run_folder.predictions import Collector, Predictions
from hf_fasttrain.train.trainer import Trainer
from hf_fasttrain.utils.errors import RunError

RECIPE = """
model: {name: test_resnet}
data: {dataset: digits, image_size: 32, workers: 0}
train: {duration: 4 steps, batch_size: 16}
"""


def trained(write_recipe: Callable[..., Path], run: Path, *overrides: str) -> Trainer:
    reset_accelerate()
    trainer = build_trainer(write_recipe(RECIPE), [f"output_dir={run}", *overrides])
    trainer.fit()
    return trainer


def test_predictions_are_those_of_the_last_evaluation(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    trainer = trained(write_recipe, tmp_path / "run")
    result = json.loads((tmp_path / "run" / "result.json").read_text())["metrics"]
    predictions = Predictions.load(tmp_path / "run" / PREDICTIONS_FILE)
    assert predictions.step == 4
    assert predictions.split == "held-out 10% of train"
    assert sorted(predictions.rows.tolist()) == list(range(len(predictions.rows)))
    assert accuracy_score(predictions.labels, predictions.predicted) == pytest.approx(result["accuracy"])
    assert predictions.losses.mean().item() == pytest.approx(result["loss"], rel=1e-5)
    labels = trainer.evaluation.eval_loader.prefetcher.images.images.split.labels
    assert (labels[predictions.rows] == predictions.labels.numpy()).all()


def test_several_processes_give_the_same_predictions(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe, overrides = write_recipe(RECIPE), ["model.name=test_vit", "data.eval_fraction=0.0101"]  # no batch norm

    def train() -> None:
        build_trainer(recipe, [f"output_dir={tmp_path / 'two'}", *overrides]).fit()

    run_processes(train)
    two = Predictions.load(tmp_path / "two" / PREDICTIONS_FILE)
    trained(write_recipe, tmp_path / "one", *overrides)
    one = Predictions.load(tmp_path / "one" / PREDICTIONS_FILE)
    order = two.rows.argsort()
    assert two.rows[order].tolist() == one.rows.tolist()
    assert (two.labels[order] == one.labels).all()
    assert torch.allclose(two.losses[order], one.losses, atol=1e-5)


def test_a_process_may_have_no_image_to_evaluate(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe, overrides = write_recipe(RECIPE), ["data.eval_fraction=0.0008", "train.duration=1 step"]

    def train() -> None:
        build_trainer(recipe, [f"output_dir={tmp_path / 'run'}", *overrides]).fit()

    run_processes(train, num_processes=3)
    assert len(Predictions.load(tmp_path / "run" / PREDICTIONS_FILE).labels) == 1


def test_the_report_and_its_pictures_are_written(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    trained(write_recipe, run, "augment.mixup=1.0")
    assert "<!DOCTYPE html>" in (run / "report.html").read_text()[:100]
    assert "cropped, augmented and mixed, with their targets" in (run / "report.html").read_text()
    assert {"curves.png", "confusion.png", "gallery.json"} <= {path.name for path in (run / "report").iterdir()}
    gallery, predictions = Gallery.load(run), Predictions.load(run / PREDICTIONS_FILE)
    assert gallery.class_names == [str(digit) for digit in range(10)]
    assert len(gallery.training) == 16
    assert any(len(picture.truth) == 2 for picture in gallery.training)  # mixed
    assert all(sum(picture.truth.values()) == pytest.approx(1.0, abs=0.02) for picture in gallery.training)
    assert len(gallery.mistakes) == min(24, int(predictions.is_wrong.sum()))
    losses = [picture.loss for picture in gallery.mistakes]
    assert losses == sorted(losses, reverse=True)
    for picture in (*gallery.training, *gallery.mistakes):
        assert Image.open(run / "report" / picture.file).size == (160, 160)


def test_training_pictures_are_the_models_input(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    overrides = ["augment.mixup=1.0", "augment.erase=0.5", f"output_dir={tmp_path / 'run'}"]
    reset_accelerate()
    trainer = build_trainer(write_recipe(RECIPE), overrides)
    images, targets = next(next(trainer.train_loader.steps(0, 1)).micro_batches)
    pixels: dict[str, np.ndarray] = {}
    pictures = trainer.publish.show.func.__self__
    step, shown = pictures.training(4, pixels)
    assert step == 1
    mean, std = torch.tensor(pictures.pre.mean), torch.tensor(pictures.pre.std)
    for number, picture in enumerate(shown):
        original = images[number].permute(1, 2, 0) * std + mean
        assert np.abs(pixels[picture.file] - original.numpy() * 255).max() <= 0.5001
        assert picture.truth == {str(i): round(float(t), 4) for i, t in enumerate(targets[number]) if t > 0.01}


def test_a_run_stopped_before_its_result_was_written_has_predictions(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    trained(write_recipe, run)
    before = Predictions.load(run / PREDICTIONS_FILE)
    for name in ("result.json", PREDICTIONS_FILE, "report.html"):
        (run / name).unlink()
    reset_accelerate()
    build_trainer(write_recipe(RECIPE), [f"output_dir={run}"], resume=True).fit()
    after = Predictions.load(run / PREDICTIONS_FILE)
    assert torch.equal(before.predicted, after.predicted)
    assert (run / "report.html").exists()


def test_a_run_that_stopped_early_shows_images_of_a_step_that_was_trained(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    stopping = ["early_stopping={patience: 1 step}", "evaluate.every=1 step", "train.duration=3 epochs"]
    trained(write_recipe, run, *stopping, "optimizer.lr=1e-9", "data.eval_fraction=0.9")
    result = json.loads((run / "result.json").read_text())
    assert result["stopped_early"]
    assert Gallery.load(run).training_step == 1
    assert Predictions.load(run / PREDICTIONS_FILE).step == result["model"]["step"] == 1  # the best


def test_a_trainer_without_a_recipe_writes_a_report(tmp_path: Path) -> None:
    reset_accelerate()
    images, labels = torch.rand(24, 3, 8, 8), torch.arange(24) % 3
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 3))
    data = [(images[i : i + 8], labels[i : i + 8]) for i in range(0, 24, 8)]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    options = {"eval_loader": data, "num_classes": 3, "log_every": 1}
    Trainer(model, data, optimizer, output_dir=tmp_path / "own", **options).fit()
    predictions = Predictions.load(tmp_path / "own" / PREDICTIONS_FILE)
    assert predictions.labels.tolist() == labels.tolist()
    assert set(predictions.rows.tolist()) == {-1}
    assert (tmp_path / "own" / "report.html").exists()
    reset_accelerate()
    Trainer(model, data, optimizer, output_dir=tmp_path / "without", report=False, **options).fit()
    assert not (tmp_path / "without" / "report.html").exists()


def test_a_report_can_be_switched_off(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert trained(write_recipe, run, "log.report=false").publish is None
    assert {path.name for path in run.iterdir()} == {
        "checkpoints", "metrics.jsonl", "model", "recipe.yaml", "resolved.yaml", "result.json",
    }  # fmt: skip


def test_a_report_that_fails_does_not_affect_the_run(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def failing_report(runs: list[Path]) -> Path:
        raise KeyError("somebody's drawing")

    monkeypatch.setattr("hf_fasttrain.report.report.write_page", failing_report)
    run = tmp_path / "run"
    assert exit_status([str(write_recipe(RECIPE)), f"output_dir={run}"]) == 0
    messages = capsys.readouterr().out
    assert f'no report: "somebody\'s drawing"; `hf-fasttrain report {run}` writes it later' in messages
    assert (run / "result.json").exists()


def test_ctrl_c_during_the_report_does_not_change_the_run(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def interrupted(runs: list[Path]) -> Path:
        raise KeyboardInterrupt

    monkeypatch.setattr("hf_fasttrain.report.report.write_page", interrupted)
    run = tmp_path / "run"
    assert exit_status([str(write_recipe(RECIPE)), f"output_dir={run}"]) == 0
    assert (
        f"training is finished; Ctrl-C skipped the rest: `hf-fasttrain report {run}`, or push"
        in capsys.readouterr().out
    )
    assert (run / "result.json").exists()


def test_missing_images_cost_only_the_pictures(
    write_recipe: Callable[..., Path], image_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reset_accelerate()
    run = tmp_path / "run"
    overrides = [f"output_dir={run}", f"data.dataset={image_folder}", "data.cache=memory", "evaluate.every=1 step"]
    trainer = build_trainer(write_recipe(RECIPE), [*overrides, "data.max_bad_fraction=1.0"])
    real = trainer.publish.show

    def remove_first(step: int, predictions: Predictions | None) -> None:
        for path in image_folder.rglob("*.jpg"):
            path.unlink()
        real(step, predictions)

    trainer.publish.show = remove_first
    trainer.fit()
    messages = capsys.readouterr().out
    assert "note: the report has no training images: " in messages
    assert "note: the report does not show the worst mistakes: " in messages
    assert (run / "report.html").exists()
    assert len(Predictions.load(run / PREDICTIONS_FILE).labels) == 12


@pytest.mark.parametrize("expected", [0, 4, 10, 100])
def test_predictions_are_stored_in_columns_that_are_made_once(expected: int) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(10, 4), torch.randint(0, 4, (10,))
    collector, capacities = Collector(expected), set()
    for start in range(0, 10, 2):
        collector.add(logits[start : start + 2], labels[start : start + 2])
        capacities.add(collector._columns._capacity)
    columns = collector.columns()
    assert capacities == ({expected} if expected >= 10 else {4, 8, 16} if expected else {2, 4, 8, 16})
    losses = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    confidence, predicted = logits.softmax(1).max(1)
    brier = (logits.softmax(1) - torch.nn.functional.one_hot(labels, 4)).square().sum(1)
    top5 = torch.ones(10, dtype=torch.bool)  # of four classes
    references = labels, predicted, confidence, losses, predicted, brier, top5
    for column, reference in zip(columns, references, strict=True):
        assert column.dtype == reference.dtype
        assert torch.allclose(column, reference)
    assert collector.columns() == ()


def test_multi_label_predictions(tmp_path: Path) -> None:
    torch.manual_seed(0)
    logits, labels = torch.randn(6, 4), (torch.rand(6, 4) > 0.5).float()
    collector = Collector()
    for part in (slice(0, 4), slice(4, 6)):
        collector.add(logits[part], labels[part])
    predictions = Predictions(3, "validation", torch.arange(6), *collector.columns(), num_classes=4)
    predictions.save(tmp_path / PREDICTIONS_FILE)
    predictions = Predictions.load(tmp_path / PREDICTIONS_FILE)
    assert predictions.is_multi_label
    assert torch.equal(unpack_bits(predictions.labels, 4), labels.bool())
    assert torch.equal(unpack_bits(predictions.predicted, 4), logits >= 0)
    assert [predictions.classes_of(predictions.labels, i) for i in range(6)] == [
        row.nonzero().flatten().tolist() for row in labels
    ]
    scores = logits.sigmoid()
    assert torch.allclose(predictions.confidence, (scores - labels).abs().amax(1))
    assert all(
        abs(scores[i, predictions.worst_class[i]] - labels[i, predictions.worst_class[i]]) == predictions.confidence[i]
        for i in range(6)
    )
    reference = [log_loss(labels[:, k], scores[:, k], labels=[0, 1]) for k in range(4)]
    assert predictions.losses.mean().item() == pytest.approx(float(np.mean(reference)), rel=1e-5)
    wrong = ((logits >= 0) != labels.bool()).any(1)
    assert torch.equal(predictions.is_wrong, wrong)
    assert len(predictions.worst(10)) == wrong.sum()


@pytest.mark.parametrize("num_classes", [1, 8, 9, 1000])
def test_bits_are_numpys(num_classes: int) -> None:
    rows = torch.rand(3000, num_classes, generator=torch.Generator().manual_seed(0)) > 0.7
    packed = pack_bits(rows)
    assert np.array_equal(packed.numpy(), np.packbits(rows.numpy(), axis=1))
    assert torch.equal(unpack_bits(packed, num_classes), rows)
    assert torch.equal(count_bits(packed, num_classes), rows.sum(0))


def test_predictions_of_several_labels_take_a_bit_a_class_and_older_files_are_read(tmp_path: Path) -> None:
    number, classes = 200, 1001
    rows = torch.rand(2, number, classes, generator=torch.Generator().manual_seed(0)) > 0.9
    figures, indices = torch.zeros(number), torch.arange(number)
    columns = {"rows": indices, "confidence": figures, "losses": figures.clone(), "worst_class": indices.clone()}
    old = columns | {"labels": rows[0].clone(), "predicted": rows[1].clone()}
    save_file(old, tmp_path / "old", {"step": "3", "split": "validation"})
    loaded = Predictions.load(tmp_path / "old")
    loaded.save(tmp_path / "new")
    assert (tmp_path / "new").stat().st_size < 2 * number * 126 + 32 * number + 1000
    for predictions in (loaded, Predictions.load(tmp_path / "new")):
        assert (predictions.num_classes, predictions.is_multi_label) == (classes, True)
        assert torch.equal(unpack_bits(predictions.labels, classes), rows[0])
        assert torch.equal(unpack_bits(predictions.predicted, classes), rows[1])


def test_broken_predictions_are_named(tmp_path: Path) -> None:
    (tmp_path / PREDICTIONS_FILE).write_bytes(b"{}")
    with pytest.raises(RunError, match=r"predictions.safetensors: can't be read as predictions \(.*; remove it"):
        Predictions.load(tmp_path / PREDICTIONS_FILE)


def test_a_gallery_is_read_as_it_was_written(tmp_path: Path) -> None:
    assert Gallery.load(tmp_path) == Gallery()
    gallery = Gallery(["a", "b"], [Picture("t.jpg", "a/1.jpg", {"a": 0.7, "b": 0.3})], 9, [], 0, "")
    gallery.save(tmp_path, {"t.jpg": np.zeros((200, 400, 3), np.uint8)})
    assert Gallery.load(tmp_path) == gallery
    assert Image.open(tmp_path / "report" / "t.jpg").size == (160, 80)


@pytest.mark.parametrize(("size", "expected"), [((32, 32), (160, 160)), ((100, 50), (100, 50)), ((20, 10), (160, 80))])
def test_thumbnails_have_a_readable_size(size: tuple[int, int], expected: tuple[int, int]) -> None:
    import io

    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    assert Image.open(io.BytesIO(thumbnail(pixels))).size == expected
