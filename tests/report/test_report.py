"""The report: what it reads, what it computes, and how a browser shows the page."""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from hf_fasttrain.run_folder.bits import unpack_bits
from hf_fasttrain.run_folder.gallery import Gallery, Picture
from hf_fasttrain.run_folder.predictions import Predictions
from hf_fasttrain.utils.errors import RunError

WAIT_SECONDS = 100  # for a browser that has other things to do
NASTY = ["</script><script>alert(1)</script>", 'it\'s "quoted" & <b>bold</b>', "{{ 7 * 7 }}"]


def write_metrics(run: Path, steps: int, *, every: int = 1, old: bool = False, resumed: bool = False) -> None:
    """Write metrics.jsonl as a run of the given steps does, with ten evaluations."""
    random, lines = np.random.default_rng(0), []
    noise = random.normal(0, 0.05, (steps // every + 1, 3)).tolist()
    for number, step in enumerate(range(every, steps + 1, every)):
        a, b, c = noise[number]
        line = (
            f'{{"kind": "train", "step": {step}, "loss": {2.4 * 0.1 ** (step / steps) * (1 + a):.6f}, "grad_norm": '
            f'{3 + b:.5f}, "images_per_second": {900 * (1 + c):.5f}, "data_wait_fraction": {0.1 + abs(a):.5f}, '
            f'"seconds_per_step": {0.03 * (1 + b):.6f}, "epoch": {10 * step / steps:.6f}, "lr": '
            f'{1e-3 * (1 - step / (steps + 1)):.3e}, "eta_seconds": 1.5'
        )
        lines.append(line + ("}" if old else ', "peak_memory_bytes": 1020231680}'))
    for epoch in range(1, 11):
        share, at = epoch / 10, steps * epoch // 10
        metrics = {"loss": 2.3 - 1.7 * share, "accuracy": 0.2 + 0.72 * share, "f1_macro": 0.15 + 0.75 * share}
        line = {"kind": "evaluation", "step": at, "epoch": float(epoch), "split": "validation", **metrics}
        lines.append(json.dumps({**line, "train_seconds": 3.0 * epoch}))
    test = {"loss": 0.7, "accuracy": 0.9, "f1_macro": 0.88}
    lines.append(json.dumps({"kind": "evaluation", "step": steps, "epoch": 10.0, "split": "test", **test}))
    if resumed:
        line = {"kind": "resume", "step": steps // 2, "checkpoint": f"step-{steps // 2}", "processes": 2}
        lines.append(json.dumps({**line, "date": "2026-03-01T12:30:00+0000"}))
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def predictions_of(num_classes: int, per_class: int = 20) -> Predictions:
    """Return predictions of an unbalanced split; each class is sometimes confused with another one."""
    random = np.random.default_rng(1)
    labels = np.repeat(np.arange(num_classes), random.integers(per_class // 2, per_class * 2, num_classes))
    ring = random.permutation(num_classes)
    after = np.empty(num_classes, np.int64)
    after[ring] = np.roll(ring, 1)
    predicted = np.where(random.random(len(labels)) < 0.15, after[labels], labels)
    predicted = np.where(random.random(len(labels)) < 0.03, random.integers(0, num_classes, len(labels)), predicted)
    confidence = random.uniform(0.3, 1, len(labels)).astype(np.float32)
    losses = np.where(predicted == labels, 1 - confidence, 3 * confidence).astype(np.float32)
    columns = map(torch.from_numpy, (np.arange(len(labels)), labels, predicted, confidence, losses, predicted))
    return Predictions(90, "validation", *columns)


def write_gallery(run: Path, names: list[str], pictures: int = 12) -> None:
    random, kinds = np.random.default_rng(2), ("training", "mistakes")
    pixels = {
        f"{kind}-{n}.jpg": random.integers(0, 255, (64, 80, 3), np.uint8) for kind in kinds for n in range(pictures)
    }
    training, mistakes = [], []
    for n in range(pictures):
        a, b = names[n % len(names)], names[(n + 1) % len(names)]
        training.append(Picture(f"training-{n}.jpg", f"row {n}", {a: 0.7, b: 0.3} if n % 2 else {a: 1.0}))
        mistakes.append(Picture(f"mistakes-{n}.jpg", f"{a}/{n}.jpg", {a: 1.0}, {b: 0.97, a: 0.02}, 4.5 - n / 10))
    Gallery(names, training, 1, mistakes, 90, "validation").save(run, pixels)


def make_run(
    folder: Path, num_classes: int = 10, steps: int = 90, names: list[str] | None = None, **options: Any
) -> Path:
    """Write a run folder as training does."""
    folder.mkdir(parents=True)
    names = names or [f"species number {n}" if num_classes > 10 else f"class {n}" for n in range(num_classes)]
    lr = options.pop("lr", 0.001)
    write_metrics(folder, steps, **options)
    (folder / "recipe.yaml").write_text("data: {dataset: /home/me/flowers}\n")
    resolved = {
        "seed": (0, "default", "learnt"), "model.name": ("resnet18", "recipe", "learnt"),
        "data.dataset": ("/home/me/flowers", "recipe", "learnt"), "optimizer.lr": (lr, "override", "learnt"),
        "data.workers": (2, "default: cores", "machine"), "output_dir": (str(folder), "override", "machine"),
        "data.mean": ([0.5, 0.5, 0.5], "default: the model's configuration", "learnt"),
        "model.args": ({}, "default", "learnt"), "log.every": (options.get("every", 1), "default", "machine"),
    }  # fmt: skip
    lines = [f"{k}: {json.dumps({'value': v, 'origin': o, 'tag': t})}" for k, (v, o, t) in resolved.items()]
    (folder / "resolved.yaml").write_text("\n".join(lines) + "\n")
    (folder / "model").mkdir()
    spec = {"name": "resnet18", "class_names": names, "image_size": 224, "multi_label": False}
    (folder / "model/hf_fasttrain.json").write_text(json.dumps(spec))
    result = {
        "metrics": {"loss": 0.6, "accuracy": 0.92, "f1_macro": 0.9}, "test_metrics": {"accuracy": 0.9, "loss": 0.7},
        "best": {"metric": "accuracy", "value": 0.93, "step": 81}, "steps": steps, "images": steps * 32,
        "skipped_steps": 0, "micro_batch_size": 32, "out_of_memory": [], "resumed_at": [], "not_written": [],
        "train_seconds": 204.0, "images_per_second": 912.5, "data_wait_fraction": 0.128, "bad_images": 2,
        "peak_memory_bytes": 1020231680, "stopped_early": False,
        "machine": {"processor": "A Processor", "cores": 8, "device": "A GPU", "num_processes": 2},
        "versions": {"python": "3.11.7", "torch": "2.9.0"}, "notes": ["images are kept in memory"],
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    bad = {"split": "train", "index": 3, "path": "a/b.jpg", "error": "truncated", "substitute": 4}
    (folder / "bad_images.jsonl").write_text(
        json.dumps(bad) + "\n" + json.dumps(bad | {"index": 9, "path": None}) + "\n"
    )
    predictions_of(num_classes).save(folder / "predictions.safetensors")
    write_gallery(folder, names)
    return folder


# What is reckoned.


@pytest.mark.parametrize("num_classes", [2, 10, 1000])
def test_per_class_metrics_are_those_of_scikit_learn(num_classes: int) -> None:
    from sklearn import metrics

    from hf_fasttrain.report.classes import class_figures, confusion_matrix

    predictions = predictions_of(num_classes)
    class_metrics, labels = class_figures(predictions, num_classes), range(num_classes)
    reference = metrics.precision_recall_fscore_support(
        predictions.labels, predictions.predicted, labels=labels, zero_division=0
    )
    for ours, theirs in zip(
        (class_metrics.precision, class_metrics.recall, class_metrics.f1, class_metrics.support), reference, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)
    counts = confusion_matrix(predictions, num_classes).counts
    np.testing.assert_array_equal(
        counts, metrics.confusion_matrix(predictions.labels, predictions.predicted, labels=labels)
    )


def test_metrics_of_classes_that_never_occur_are_zero() -> None:
    from hf_fasttrain.report.classes import class_figures

    one = torch.tensor([0])
    class_metrics = class_figures(Predictions(1, "v", one, one, one, one.float(), one.float(), one), 3)
    assert class_metrics.f1.tolist() == [1.0, 0.0, 0.0]
    assert class_metrics.support.tolist() == [1, 0, 0]


def multi_label_predictions() -> Predictions:
    random = torch.Generator().manual_seed(0)
    labels, predicted = (torch.rand(40, 4, generator=random) > 0.6 for _ in range(2))
    rows, ones = torch.arange(40), torch.ones(40)
    return Predictions(5, "validation", rows, labels, predicted, ones, ones, torch.zeros(40, dtype=torch.int64))


def test_multi_label_class_metrics_are_those_of_scikit_learn() -> None:
    from sklearn import metrics

    from hf_fasttrain.report.classes import class_figures

    predictions = multi_label_predictions()
    class_metrics = class_figures(predictions, 4)
    bits = (unpack_bits(packed, 4) for packed in (predictions.labels, predictions.predicted))
    reference = metrics.precision_recall_fscore_support(*bits, zero_division=0)
    for ours, theirs in zip(
        (class_metrics.precision, class_metrics.recall, class_metrics.f1, class_metrics.support), reference, strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-12)


def test_confused_classes_are_adjacent_and_listed() -> None:
    from hf_fasttrain.report.classes import cluster_classes, confusion_matrix, most_confused

    labels = np.repeat(np.arange(40), 10)
    predicted = np.where(np.arange(400) % 10 < 3, (labels + 20) % 40, labels)  # 0 and 20, 1 and 21, ...
    tensors = map(torch.from_numpy, (labels, labels, predicted, labels / 40, labels / 40, predicted))
    confusion = confusion_matrix(Predictions(1, "v", *tensors), 40)
    position = np.argsort(cluster_classes(confusion))
    assert sorted(position.tolist()) == list(range(40))
    assert all(abs(position[n] - position[n + 20]) == 1 for n in range(20))
    pairs = most_confused(confusion)
    assert len(pairs) == 40
    assert pairs[0] == (0, 20, 3, 0.3)


def test_a_large_matrix_keeps_the_most_confused_classes() -> None:
    from hf_fasttrain.report.charts import confusion_chart
    from hf_fasttrain.report.classes import confusion_matrix

    labels = torch.tensor([0, 1, 2, 3, 3])
    predicted = torch.tensor([0, 1, 3, 2, 3])
    predictions = Predictions(1, "v", labels, labels, predicted, labels.float(), labels.float(), predicted)
    confusion = confusion_matrix(predictions, 4, largest=2)
    assert confusion.classes.tolist() == [2, 3]
    assert confusion.counts.tolist() == [[0, 1], [1, 1]]
    caption = confusion_chart(confusion, ["a", "b", "c", "d"]).caption
    message = "Only the 2 most confused classes are shown; 2 are left out."
    assert caption == f"60.0% of all images are classified correctly. {message}"


def test_images_predicted_as_a_hidden_class_count() -> None:
    from hf_fasttrain.report.classes import confusion_matrix, most_confused

    labels = torch.tensor([0, 0, 0, 0, 1, 1, 2])
    predicted = torch.tensor([0, 1, 1, 2, 0, 0, 2])
    predictions = Predictions(1, "v", labels, labels, predicted, labels.float(), labels.float(), predicted)
    confusion = confusion_matrix(predictions, 3, largest=2)
    assert confusion.classes.tolist() == [0, 1]
    assert confusion.support.tolist() == [4, 2]
    assert confusion.shares.tolist() == [[0.25, 0.5], [1.0, 0.0]]
    assert most_confused(confusion)[1] == (0, 1, 2, 0.5)


@pytest.mark.parametrize("lines", [1, 5, 2000, 2001, 1_000_000])
def test_reduced_curves_keep_extremes(lines: int) -> None:
    from hf_fasttrain.report.points import downsample

    values = np.random.default_rng(0).normal(size=lines)
    values[lines // 2] = 1000.0  # a single spike
    points = downsample(np.arange(1.0, lines + 1), values)
    assert len(points.x) <= 2000
    assert (np.nanmin(points.low), np.nanmax(points.high)) == (values.min(), values.max())
    number = np.diff([*range(0, lines, points.lines_per_point), lines])
    assert np.isclose((points.mean * number).sum(), values.sum())
    assert points.has_band == (lines > 2000)
    assert ((points.low <= points.mean + 1e-9) & (points.mean <= points.high + 1e-9)).all()


def test_nan_and_inf_are_left_out_of_points() -> None:
    from hf_fasttrain.report.points import downsample

    values = np.array([1.0, np.nan, 3.0, np.inf, np.nan, np.nan])
    points = downsample(np.arange(6.0), values, most=3)
    np.testing.assert_array_equal(points.mean, [1.0, 3.0, np.nan])
    np.testing.assert_array_equal(points.high, [1.0, 3.0, np.nan])
    assert points.missing == 4
    assert np.isnan(downsample(np.arange(6.0), values).mean[3])


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (("format_metric", "accuracy", 0.95), "95.00%"),
        (("format_metric", "f1_macro", 0.5), "0.5000"),
        (("format_metric", "x", None), "–"),
        (("format_setting", [1, None]), "[1, null]"),
        (("format_setting", "a"), "a"),
        (("metric_title", "f1_macro"), "macro F1"),
    ],
)
def test_metrics_and_settings_are_formatted(call: tuple[Any, ...], expected: str) -> None:
    from hf_fasttrain.report import format as report_format

    assert getattr(report_format, call[0])(*call[1:]) == expected


# What is read.


def record_of(run: Path) -> Any:
    from hf_fasttrain.report.record import read_record

    return read_record(run)


def test_old_and_incomplete_metric_lines_are_read(tmp_path: Path) -> None:
    lines = [
        '{"kind": "train", "step": 1, "loss": 2.0, "memory_bytes": 7}', "torn {", "[1]", '{"kind": "train"}', "",
        '{"kind": "train", "step": 2, "loss": NaN, "lr": null}', '{"kind": "train", "step": 2, "loss": 1.0}',
        '{"kind": "train", "step": 1, "loss": 3.0}', '{"kind": "evaluation", "step": 2, "epoch": 0.5, "split": "v", '
        '"loss": NaN, "accuracy": 0.5}', '{"kind": "resume", "step": 1}', '{"kind": "evaluation", "step": 3}',
    ]  # fmt: skip
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    record = record_of(tmp_path)
    assert record.train["step"].tolist() == [1, 2]
    assert record.train["loss"].tolist() == [3.0, 1.0]
    assert np.isnan(record.train["grad_norm"]).all()
    assert record.problems == ["metrics.jsonl: 4 unreadable lines skipped"]  # the last one has no split
    assert record.epochs_per_step == 0.25
    assert (record.metric_names, record.splits, record.last_step) == (["accuracy"], ["v"], 2)
    assert not len(record.metric_curve("loss", "v")[0])
    assert not record.is_finished


def test_unreadable_files_are_reported_and_the_rest_is_shown(tmp_path: Path) -> None:
    from hf_fasttrain.report.report import write_report

    run = make_run(tmp_path / "run")
    for name in ("predictions.safetensors", "resolved.yaml", "result.json", "model/hf_fasttrain.json"):
        (run / name).write_bytes(b"{: \x00")
    (run / "report/gallery.json").write_text('{"training": [{"wrong": 1}]}')
    record = record_of(run)
    messages = " ".join(record.problems)
    for name in ("predictions.safetensors", "resolved.yaml", "result.json", "hf_fasttrain.json", "gallery.json"):
        assert f"{name} can't be read" in messages or f"{name}: can't be read" in messages
    page = write_report([run]).read_text()
    assert "has not finished; this is its state up to step 90" in page
    assert "gallery.json: can&#39;t be read as a list of pictures (training.0.file is missing" in page


@pytest.mark.parametrize("kept_file", ["metrics.jsonl", "recipe.yaml", "result.json"])
def test_a_run_folder_with_few_files(tmp_path: Path, kept_file: str) -> None:
    from hf_fasttrain.report.report import write_report

    complete = make_run(tmp_path / "whole")
    run = tmp_path / "bare"
    run.mkdir()
    shutil.copy(complete / kept_file, run / kept_file)
    page = write_report([run]).read_text()
    assert ("has not finished" in page) == (kept_file != "result.json")
    assert write_report([run, complete], tmp_path / "both.html").exists()


def test_a_run_continued_after_its_end_has_not_ended(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", steps=90)
    before = json.loads((run / "result.json").read_text())["metrics"]
    assert record_of(run).is_finished
    assert record_of(run).metrics == before
    line = {"kind": "evaluation", "step": 100, "epoch": 11.0, "split": "validation", "loss": 0.1, "accuracy": 0.99}
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    record = record_of(run)
    assert not record.is_finished
    assert record.metrics == {"loss": 0.1, "accuracy": 0.99}


def test_a_single_log_line_is_visible(tmp_path: Path) -> None:
    from hf_fasttrain.report.charts import curve_charts

    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    (loss,) = (chart for chart in curve_charts(record_of(run)) if chart.id == "loss")
    assert loss.figure["data"][0]["mode"] == "lines+markers"


def test_targets_of_several_classes_are_all_named() -> None:
    from hf_fasttrain.report.tables import _format_target

    assert _format_target({"cat": 1.0, "dog": 1.0}) == "cat, dog"
    assert _format_target({}) == "no class"
    assert _format_target({"dog": 0.3, "cat": 0.7}) == "cat 70%, dog 30%"


def test_the_report_says_that_all_images_were_decoded_only_if_known(tmp_path: Path) -> None:
    from hf_fasttrain.report.report import write_report

    run = make_run(tmp_path / "run")
    (run / "bad_images.jsonl").unlink(missing_ok=True)
    result = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**result, "bad_images": 0}))
    assert "Every image could be decoded." in write_report([run]).read_text()
    (run / "result.json").write_text(json.dumps({**result, "bad_images": 3}))
    assert "Every image could be decoded." not in write_report([run]).read_text()


def test_class_names_are_unique(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", 4, names=["crane", "owl", "crane"])
    assert record_of(run).class_names == ["crane (0)", "owl", "crane (2)", "class 3"]


def test_only_pictures_next_to_the_gallery_are_shown(tmp_path: Path) -> None:
    from hf_fasttrain.report.tables import training_pictures

    run = make_run(tmp_path / "run")
    (run / "report/gallery.json").write_text(
        json.dumps({"training": [{"file": "../recipe.yaml", "name": "x", "truth": {"a": 1.0}}]})
    )
    assert training_pictures(record_of(run)) == []


# What is written.


def test_files_of_a_run(tmp_path: Path) -> None:
    from hf_fasttrain.report.report import write_report

    run = make_run(tmp_path / "run", resumed=True)
    assert write_report([run]) == run / "report.html"
    for name in ("curves.png", "confusion.png"):
        with Image.open(run / "report" / name) as picture:
            assert min(picture.size) > 700
    assert (run / "report/gallery.json").exists()
    before = (run / "report.html").read_text()
    write_report([run])  # an earlier report is replaced
    assert (run / "report.html").read_text() == before
    other_page = write_report([run], tmp_path / "page.html")
    assert other_page.read_text() == before


def test_pictures_without_data_are_not_drawn(tmp_path: Path) -> None:
    from hf_fasttrain.report.report import write_report

    (tmp_path / "recipe.yaml").write_text("seed: 0\n")
    write_report([tmp_path])
    assert not list((tmp_path / "report").iterdir())


def test_pictures_of_many_classes_and_of_several_lines(tmp_path: Path) -> None:
    from hf_fasttrain.report.pictures import draw_confusion, draw_curves

    record = record_of(make_run(tmp_path / "run", 300, steps=5000, names=[f"$x_{n}$ $" for n in range(300)]))
    draw_curves(record, tmp_path / "a.png")
    draw_confusion(record, tmp_path / "b.png")
    assert min((tmp_path / name).stat().st_size for name in ("a.png", "b.png")) > 10_000


def test_multi_label_data_has_tables_and_no_matrix(tmp_path: Path) -> None:
    from hf_fasttrain.report.report import write_report

    run = make_run(tmp_path / "run", 4)
    multi_label_predictions().save(run / "predictions.safetensors")
    page = write_report([run]).read_text()
    assert "so there is no confusion matrix" in page
    assert 'id="classes-table"' in page
    assert 'id="chart-confusion"' not in page
    assert not (run / "report/confusion.png").exists()


def test_a_page_sends_nothing_and_turns_no_text_around(tmp_path: Path) -> None:
    from hf_fasttrain.report.report import write_report

    page = write_report([make_run(tmp_path / "run", 2, names=["\u202egpj.exe", "a\u2066b"])]).read_text()
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1].split("; ")
    assert {"default-src 'none'", "form-action 'none'", "base-uri 'none'"} <= set(policy)
    ours = page.split("<script>")[0]  # before plotly's own
    assert "\\u202egpj.exe" in ours
    assert not {"\u202e", "\u2066"} & set(ours)
    embedded = re.search(r'id="figures">(.*?)</script>', ours)[1]
    assert "\u202e" not in str(json.loads(embedded))


def test_secrets_are_masked(tmp_path: Path) -> None:
    from hf_fasttrain.report.report import write_report

    token = "hf_" + "abcdefghij" * 3
    run = make_run(tmp_path / "run", 2, names=[token, "other"])
    assert token not in write_report([run]).read_text()


def test_a_folder_that_is_not_a_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.report.report import write_report

    monkeypatch.chdir(tmp_path)
    run, empty = make_run(tmp_path / "run"), tmp_path / "empty"
    empty.mkdir()
    refused = [
        ([], "no run folder given"),
        ([tmp_path / "gone"], "gone: no such folder; give the run folder"),
        ([empty], "empty: is not a run folder: it has no metrics.jsonl, no result.json and no recipe.yaml"),
        ([run, Path("run/../run")], "is given twice; give different run folders"),
    ]
    for runs, message in refused:
        with pytest.raises(RunError, match=re.escape(message)):
            write_report(runs)


def test_a_file_that_is_not_a_report_is_not_replaced(tmp_path: Path) -> None:
    from hf_fasttrain.report.report import write_report

    run, other_file = make_run(tmp_path / "run"), tmp_path / "mine.html"
    other_file.write_text("<html>mine</html>")
    with pytest.raises(RunError, match=r"mine\.html: is not a report and would be overwritten; move it"):
        write_report([run], other_file)
    assert other_file.read_text() == "<html>mine</html>"
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(RunError, match="fifo: is a FIFO and would be overwritten; move it"):
        write_report([run], tmp_path / "fifo")
    assert (tmp_path / "fifo").is_fifo()
    with pytest.raises(
        RunError, match="the report could not be written: No such file or directory; choose another output"
    ):
        write_report([run], tmp_path / "no/such/folder.html")
    with pytest.raises(RunError, match="the report could not be written: Is a directory"):
        write_report([run], run)


def test_runs_are_named_by_the_shortest_unique_suffixes_of_their_paths(tmp_path: Path) -> None:
    from hf_fasttrain.report.sections import run_names

    assert run_names([tmp_path / "a/x", tmp_path / "b/y"]) == ["x", "y"]
    assert run_names([tmp_path / "a/x", tmp_path / "b/x"]) == ["a/x", "b/x"]


def test_several_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from hf_fasttrain.report.report import write_report
    from hf_fasttrain.report.tables import differences_table

    monkeypatch.chdir(tmp_path)
    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=0.003, old=True)]
    assert write_report(runs) == Path("report.html")
    rows = differences_table([record_of(run) for run in runs], ["a", "b"]).rows
    assert [[cell.text for cell in row] for row in rows] == [["optimizer.lr", "result", "0.001", "0.003"]]
    assert "Machines and versions are the same." in Path("report.html").read_text()
    assert not (runs[0] / "report.html").exists()


def with_settings(run: Path, **values: Any) -> Path:
    """Add settings to a run's resolved.yaml; their keys have __ for the dot."""
    lines = [
        f"{key.replace('__', '.')}: {json.dumps({'value': value, 'origin': 'recipe', 'tag': 'result'})}\n"
        for key, value in values.items()
    ]
    with (run / "resolved.yaml").open("a") as file:
        file.writelines(lines)
    return run


def test_other_data_are_a_warning_of_a_comparison(tmp_path: Path) -> None:
    from hf_fasttrain.report.sections import page_of_runs

    data = dict.fromkeys("ac", "90 + 10 images, 3 classes, 12") | {"b": "80 + 10 images, 3 classes, 34"}
    runs = {n: with_settings(make_run(tmp_path / n), data__fingerprint=text) for n, text in data.items()}
    (warning,) = page_of_runs([record_of(runs[name]) for name in "abc"]).warnings
    assert "different data" in warning
    assert "(a, c: 90 + 10 images, 3 classes; b: 80 + 10 images, 3 classes; images" in warning
    assert not page_of_runs([record_of(runs[name]) for name in "ac"]).warnings


def test_a_training_loss_unlike_that_of_evaluations_is_said(tmp_path: Path) -> None:
    from hf_fasttrain.report.charts import curve_charts

    run = make_run(tmp_path / "run")
    assert "compared" not in curve_charts(record_of(run))[0].caption
    with_settings(run, augment__label_smoothing=0.1, augment__mixup=0.2, augment__cutmix=0.0, train__class_weights=None)
    caption = curve_charts(record_of(run))[0].caption
    assert "The training loss is with label smoothing and mixup, that of evaluations without: their levels" in caption


def test_the_axis_of_accuracies_that_are_compared_ends_at_1(tmp_path: Path) -> None:
    from hf_fasttrain.report.charts import comparison_charts

    records = [record_of(make_run(tmp_path / name)) for name in "ab"]
    axes = {chart.id: chart.figure["layout"]["yaxis"] for chart in comparison_charts(records, ["a", "b"])}
    low, high = axes["eval-accuracy"]["range"]  # of accuracies from 0.272 to 0.92
    assert 0 < low < 0.272
    assert high == axes["eval-f1_macro"]["range"][1] == 1
    assert "range" not in axes["eval-loss"]
    assert axes["data-wait-fraction"]["tickformat"] == ".1~%"  # whole percents would repeat "0%" and "1%"
    assert axes["lr"]["exponentformat"] == "power"  # plotly's default writes 150µ


def test_the_worst_classes_come_first() -> None:
    from hf_fasttrain.report.classes import ClassFigures
    from hf_fasttrain.report.tables import class_table

    support, f1 = np.array([5, 9, 0, 7, 3]), np.array([0.5, 0.9, 0.0, 0.5, 0.0])
    table = class_table(ClassFigures(support, support, support, f1, f1, f1), list("abcde"), "validation")
    assert [row[0].text for row in table.rows] == ["e", "d", "a", "b", "c"]
    assert (table.columns[table.sorted_by or 0].title, table.ascending) == ("F1", True)


def test_of_many_classes_only_the_first_rows_are_html_and_all_are_data() -> None:
    from hf_fasttrain.report.classes import class_figures
    from hf_fasttrain.report.report import to_html
    from hf_fasttrain.report.sections import Page, Section
    from hf_fasttrain.report.tables import FIRST_ROWS, MAX_ROWS, class_table

    for number, rows in ((MAX_ROWS, MAX_ROWS), (MAX_ROWS + 1, FIRST_ROWS), (20_000, FIRST_ROWS)):
        names = [f"species <b>number</b> {n}" for n in range(number)]
        table = class_table(class_figures(predictions_of(number, 4), number), names, "validation")
        page = to_html(Page("", "", sections=[Section("classes", "Classes", tables=[table])]))
        assert (len(table.rows), page.count("<tr>") - 1) == (rows, rows)
        data = json.loads(page.partition('id="long-tables">')[2].partition("</script>")[0])
        if number == rows:
            assert (data, "noscript><p>These" in page) == ({}, False)
            continue
        assert f"<p>These are the first 100 of {number:,} rows; the others need JavaScript.</p>" in page
        columns = data["classes-table"]
        assert [len(column["values"]) for column in columns] == [number] * 7
        for row, first in zip(table.rows, zip(*(column["values"] for column in columns), strict=True), strict=False):
            assert [cell.text for cell in row[:1]] == [first[0]]
            assert [cell.value for cell in row[1:]] == pytest.approx(first[1:], rel=1e-6)
        assert len(page) < 5_200_000 + 100 * number  # 430 bytes a class as HTML


def test_figures_are_valid_for_plotly(tmp_path: Path) -> None:
    """Every trace and layout is valid for plotly, and every curve has a colour of the page."""
    from plotly.graph_objects import Figure

    from hf_fasttrain.report.charts import comparison_charts, curve_charts, throughput_charts

    records = [record_of(make_run(tmp_path / name, steps=5000, resumed=True)) for name in "ab"]
    charts = [*curve_charts(records[0]), *throughput_charts(records[0]), *comparison_charts(records, ["a", "b"])]
    assert len(charts) == 13
    for chart in charts:
        text = json.dumps(chart.figure, allow_nan=False)
        assert "theme:" in text
        Figure(json.loads(re.sub(r"theme:\w+", "#123456", text)))
        assert len(chart.caption) > 10
    loss = charts[0]
    assert "Each point is the mean of 3 steps; the band spans minimum to maximum." in loss.caption


def contrast(first: str, second: str) -> float:
    """Return WCAG's contrast of two #rrggbb colours."""

    def luminance(colour: str) -> float:
        parts = [int(colour[position : position + 2], 16) / 255 for position in (1, 3, 5)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize(("theme", "position"), [("light", 0), ("dark", 1)])
def test_texts_and_curves_have_enough_contrast(theme: str, position: int) -> None:
    from importlib.resources import files

    folder = files("hf_fasttrain.report") / "page"
    block = re.findall(r"color-scheme: (?:light|dark);\s([^}]*)}", (folder / "style.css").read_text())[position]
    colours = dict(re.findall(r"--([a-z-]+): (#[0-9a-f]{6})", block))
    for name in ("ink", "muted", "accent", "wrong", "right"):
        assert contrast(colours[name], colours["paper"]) >= 4.5
    for below in ("panel", "bar", "warning"):
        assert contrast(colours["ink"], colours[below]) >= 4.5
    assert contrast(colours["muted"], colours["panel"]) >= 4.5
    curves = re.search(rf"{theme}: \[(.*?)]", (folder / "charts.js").read_text()).group(1)
    for curve in re.findall(r"#\w{6}", curves):
        assert contrast(curve, colours["paper"]) >= 3


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the report of a run with 1,000 classes and a million steps, every tenth of them in its log."""
    from hf_fasttrain.report.report import write_report

    run = make_run(tmp_path_factory.mktemp("large") / "run", 1000, steps=1_000_000, every=10, resumed=True)
    return write_report([run])


def test_a_million_steps_and_a_thousand_classes_fit_in_10_mb(large: Path) -> None:
    assert large.stat().st_size < 10_000_000
    assert "Each point is the mean of 50 lines of the log; the band spans minimum to maximum." in large.read_text()


# What a browser makes of it.


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Return headless Chromium; skip the test without it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    executable = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as running:
        if executable is None and not os.path.exists(running.chromium.executable_path):
            pytest.skip("no Chromium is installed")
        quiet = ["no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-background-networking",
                 "disable-component-update", "disable-sync"]  # fmt: skip
        browser = running.chromium.launch(executable_path=executable, args=[f"--{name}" for name in quiet])
        yield browser
        browser.close()


@dataclass
class OpenPage:
    """A page and its errors."""

    page: Any
    errors: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)

    def until(self, condition: str) -> None:
        """Wait until a JavaScript expression is true; playwright's method needs eval, which the page forbids."""
        deadline = time.monotonic() + WAIT_SECONDS
        while not self.page.evaluate(condition):
            assert time.monotonic() < deadline, condition
            time.sleep(0.05)

    def ranges(self, chart: str) -> list[float]:
        axes = "[...p.layout.xaxis.range, ...p.layout.yaxis.range]"
        return list(
            self.page.evaluate(f"(() => {{ const p = document.getElementById('chart-{chart}'); return {axes} }})()")
        )

    def drag(self, chart: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Drag a box on a chart, in fractions of its plot area."""
        area = self.page.locator(f"#chart-{chart} .nsewdrag").first
        area.scroll_into_view_if_needed()
        box = area.bounding_box()
        points = [(box["x"] + x * box["width"], box["y"] + y * box["height"]) for x, y in (start, end)]
        self.page.mouse.move(*points[0])
        self.page.mouse.down()
        self.page.mouse.move(*points[1], steps=4)
        self.page.mouse.up()

    def hover(self, chart: str, x: float = 0.5, y: float = 0.5) -> str:
        """Return the hover text at a position of a chart."""
        area = self.page.locator(f"#chart-{chart} .nsewdrag").first
        area.scroll_into_view_if_needed()
        box = area.bounding_box()
        self.page.mouse.move(box["x"] + x * box["width"] - 3, box["y"] + y * box["height"] - 3)
        self.page.mouse.move(box["x"] + x * box["width"], box["y"] + y * box["height"], steps=3)
        label = self.page.locator(f"#chart-{chart} .hoverlayer text").first
        label.wait_for()
        return " ".join(self.page.locator(f"#chart-{chart} .hoverlayer text").all_text_contents())

    def colours(self) -> tuple[str, str]:
        """Return the colours of the background and of a curve."""
        style = "getComputedStyle(document.body).backgroundColor"
        line = "document.querySelector('#chart-loss .js-line[style*=\"stroke-width: 1.6\"]').style.stroke"
        return tuple(self.page.evaluate(f"[{style}, {line}]"))


Open = Callable[..., OpenPage]


@pytest.fixture
def opened(browser: Any) -> Iterator[Open]:
    """Return a function that opens a page; at the end it must have no errors."""
    pages = []

    def open_page(path: Path, **options: Any) -> OpenPage:
        context = browser.new_context(
            **{"viewport": {"width": 1280, "height": 900}, "color_scheme": "light", **options}
        )
        context.set_default_timeout(1000 * WAIT_SECONDS)
        view = OpenPage(context.new_page())
        pages.append(view)
        view.page.on("console", lambda m: view.errors.append(m.text) if m.type in ("error", "warning") else None)
        view.page.on("pageerror", lambda error: view.errors.append(str(error)))
        view.page.on("dialog", lambda dialog: (view.errors.append(dialog.message), dialog.dismiss()))

        def handle(route: Any) -> None:
            if route.request.url == path.as_uri():
                route.continue_()
            else:
                view.requests.append(route.request.url)
                route.abort()

        context.route(lambda url: not url.startswith(("data:", "blob:")), handle)
        view.page.goto(path.as_uri())
        every = "document.querySelectorAll('.plot').length === document.querySelectorAll('.plot[data-drawn]').length"
        view.until(every)
        return view

    yield open_page
    for opened_page in pages:
        assert opened_page.errors == []
        assert opened_page.requests == []
        opened_page.page.context.close()


def has_graphics(page: Any) -> dict[str, bool]:
    """Return whether each chart contains a curve, an area or a picture."""
    selector = ".js-line, .point, .js-fill, .heatmaplayer image"
    counts = (
        f"[...document.querySelectorAll('.plot')].map(p => [p.dataset.chart, p.querySelectorAll('{selector}').length])"
    )
    return {name: number > 0 for name, number in page.evaluate(counts)}


@pytest.fixture(scope="module")
def ten_classes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the report of a run with 10 classes with difficult names."""
    from hf_fasttrain.report.report import write_report

    names = [*NASTY, *(f"class {n}" for n in range(3, 10))]
    return write_report([make_run(tmp_path_factory.mktemp("ten_classes") / "run", 10, names=names, resumed=True)])


SINGLE = {"loss", "metrics", "lr", "grad-norm", "step-time", "images-per-second", "confusion"}


def test_two_classes_in_a_browser(tmp_path: Path, opened: Open) -> None:
    from hf_fasttrain.report.report import write_report

    view = opened(write_report([make_run(tmp_path / "run", 2, names=["cat", "dog"])]))
    assert has_graphics(view.page) == dict.fromkeys(SINGLE, True)
    matrix = view.page.locator("#chart-confusion")
    assert matrix.locator(".heatmap-label").count() == 4  # every count is written
    assert "cat" in view.hover("confusion", 0.25, 0.25)
    assert not view.page.locator("#matrix-order").is_visible()


def test_ten_classes_in_a_browser(ten_classes: Path, opened: Open) -> None:
    view = opened(ten_classes)
    assert has_graphics(view.page) == dict.fromkeys(SINGLE, True)
    for name in NASTY:
        assert view.page.get_by_text(name, exact=True).count() > 0
    assert "</script>" in view.hover("confusion", 0.05, 0.05)
    tooltip = view.hover("loss")
    assert re.search(r"step \d+", tooltip)
    assert "training" in tooltip
    assert "images/s" in view.hover("step-time")
    assert view.page.locator("#chart-loss .shapelayer path").count() == 1  # where it was resumed
    buttons = view.page.locator("#chart-loss .modebar-btn")
    assert {button.get_attribute("data-title") for button in buttons.all()} == {
        "Download plot as a PNG", "Zoom", "Pan", "Zoom in", "Zoom out", "Reset axes",
    }  # fmt: skip
    assert view.page.locator("#mistakes img").count() == view.page.locator("#training-images img").count() == 12
    assert view.page.evaluate("[...document.images].every(i => i.complete && i.naturalWidth > 0)")


def test_curves_zoom_and_switch_their_axis(ten_classes: Path, opened: Open) -> None:
    view = opened(ten_classes)
    before = view.ranges("loss")
    view.drag("loss", (0.2, 0.2), (0.6, 0.7))
    zoomed = view.ranges("loss")
    assert before[0] < zoomed[0] < zoomed[1] < before[1]
    view.page.locator("#theme").click()
    assert view.ranges("loss") == zoomed  # a new theme keeps the zoom
    view.page.locator("#chart-loss .nsewdrag").first.dblclick()
    view.until(f"document.getElementById('chart-loss').layout.xaxis.range[1] > {before[1] - 1}")
    view.page.get_by_role("button", name="Epochs").first.click()
    assert max(view.ranges("lr")[:2]) < 11
    assert re.search(r"epoch \d+\.\d\d", view.hover("loss"))
    assert view.page.locator('[data-axis="epochs"][aria-pressed="true"]').count() == 2
    view.page.get_by_role("button", name="Steps").first.click()
    assert max(view.ranges("lr")[:2]) > 80


def test_a_thousand_classes_in_a_browser(large: Path, opened: Open) -> None:
    view = opened(large)
    assert has_graphics(view.page) == dict.fromkeys(SINGLE, True)
    matrix = view.page.locator("#chart-confusion")
    assert "strongest of 4 × 4 cells" in view.hover("confusion", 0.5001, 0.5001)
    assert matrix.locator(".ytick text").count() == 0
    view.drag("confusion", (0.5, 0.5), (0.515, 0.515))
    assert matrix.locator(".ytick text").count() in range(12, 20)  # near enough to show its text
    assert matrix.locator(".heatmap-label").count() > 10
    low, high = view.ranges("confusion")[:2]
    assert high - low < 20
    assert "species number" in view.hover("confusion")
    matrix.locator(".nsewdrag").first.dblclick()
    view.until("document.getElementById('chart-confusion').layout.xaxis.range[1] === 999.5")
    assert matrix.locator(".ytick text").count() == 0
    view.page.locator("#matrix-order").select_option("original")
    assert "strongest of 4 × 4 cells" in view.hover("confusion", 0.5001, 0.5001)
    view.page.get_by_label("Find a class").fill("number 99")
    assert view.page.locator("#classes-table tbody tr:visible").count() == 11
    assert view.page.locator("#classes .count").text_content() == "11 of 1,000"


def test_rows_of_a_long_table_are_made_when_they_are_looked_at(large: Path, opened: Open) -> None:
    from hf_fasttrain.report.classes import class_figures
    from hf_fasttrain.report.tables import share_cell

    view = opened(large)
    rows = view.page.locator("#classes-table tbody tr")
    assert (rows.count(), view.page.locator("#classes-table").get_attribute("aria-rowcount")) == (100, "1001")
    end = "(() => { const view = document.querySelector('#classes .scroll'); view.scrollTop = view.scrollHeight; })()"
    view.page.evaluate(end)
    view.until("document.querySelectorAll('#classes-table tbody tr').length === 200")
    while rows.count() < 1000:
        before = rows.count()
        view.page.evaluate(end)
        view.until(f"document.querySelectorAll('#classes-table tbody tr').length > {before}")
    names = [f"species number {n}" for n in range(1000)]
    figures = class_figures(predictions_of(1000), 1000)
    texts = [row.split("\t") for row in view.page.locator("#classes-table tbody").inner_text().splitlines()]
    assert sorted(row[0] for row in texts) == sorted(names)
    for name, *shown in texts:
        number = int(name.split()[-1])
        shares = [share_cell(float(values[number])).text for values in (figures.precision, figures.recall, figures.f1)]
        counts = [f"{int(values[number]):,}" for values in (figures.support, figures.correct, figures.predicted)]
        assert shown == [counts[0], *shares, *counts[1:]]
    assert [float(row[4]) for row in texts] == sorted(float(row[4]) for row in texts)
    view.page.locator("#classes-table th", has_text="support").locator("button").click()
    assert rows.count() == 100
    assert rows.first.locator("td").first.text_content() == str(figures.support.max())
    view.page.get_by_label("Find a class").fill("number 99")
    supports = [int(text) for text in view.page.locator("#classes-table tbody td:nth-child(2)").all_text_contents()]
    assert supports == sorted((int(figures.support[n]) for n in (99, *range(990, 1000))), reverse=True)
    view.page.get_by_label("Find a class").fill("")
    assert rows.count() == 100


def test_tables_sort_by_mouse_and_keyboard(ten_classes: Path, opened: Open) -> None:
    view = opened(ten_classes)
    table = view.page.locator("#classes-table")

    def column(position: int) -> list[float]:
        return [float(text) for text in table.locator(f"tbody td:nth-child({position})").all_text_contents()]

    support, f1 = table.locator("th", has_text="support"), table.locator("th", has_text="F1")
    assert f1.get_attribute("aria-sort") == "ascending"
    assert column(5) == sorted(column(5))
    support.locator("button").click()
    assert (f1.get_attribute("aria-sort"), support.get_attribute("aria-sort")) == (None, "descending")
    assert column(2) == sorted(column(2), reverse=True)
    f1.locator("button").click()
    assert column(5) == sorted(column(5), reverse=True)
    f1.locator("button").focus()
    view.page.keyboard.press("Enter")
    assert f1.get_attribute("aria-sort") == "ascending"
    assert column(5) == sorted(column(5))
    table.locator("thead th").first.locator("button").click()
    names = table.locator("tbody th").all_text_contents()
    assert [name for name in names if name.startswith("class")] == [f"class {n}" for n in range(3, 10)]


def test_dark_mode(ten_classes: Path, opened: Open) -> None:
    view = opened(ten_classes)
    button = view.page.locator("#theme")
    light = view.colours()
    button.click()
    dark = view.colours()
    assert dark[0] != light[0]
    assert dark[1] != light[1]
    assert button.get_attribute("aria-pressed") == "true"
    button.click()
    assert view.colours() == light


def test_a_change_of_the_systems_theme_is_followed(ten_classes: Path, opened: Open) -> None:
    view = opened(ten_classes)
    light = view.colours()
    view.page.emulate_media(color_scheme="dark")
    view.until(
        f"document.querySelector('#chart-loss .js-line[style*=\"stroke-width: 1.6\"]').style.stroke !== '{light[1]}'"
    )
    assert view.colours()[0] != light[0]


def test_accessible_names_for_screen_readers(ten_classes: Path, opened: Open) -> None:
    page = opened(ten_classes).page
    assert page.locator("html").get_attribute("lang") == "en"
    for chart in page.locator(".plot").all():
        assert chart.get_attribute("role") == "img"
        assert re.match(r"Chart: .{20,}", str(chart.get_attribute("aria-label")))
    assert page.locator("figure.chart figcaption").count() == page.locator(".plot").count()
    assert "Training loss went from" in page.locator("figcaption").first.text_content()
    for table in page.locator("table").all():
        assert len(table.locator("caption").text_content()) > 4
        assert table.locator("thead th[scope=col]").count() == table.locator("thead th").count()
        assert table.locator("tbody th[scope=row]").count() == table.locator("tbody tr").count()
    assert page.locator("img:not([alt])").count() == page.locator("img[alt='']").count() == 0
    labels = page.evaluate(
        "[...document.querySelectorAll('button, input, select')]"
        ".every(e => e.textContent || e.labels?.length || e.ariaLabel)"
    )
    assert labels


def test_the_page_fits_a_phone(ten_classes: Path, opened: Open) -> None:
    view = opened(ten_classes, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    assert view.page.evaluate("document.documentElement.scrollWidth") == 390
    widths = view.page.evaluate("[...document.querySelectorAll('.plot svg.main-svg')].map(s => s.clientWidth)")
    assert max(widths) <= 390


def test_several_runs_in_a_browser(tmp_path: Path, opened: Open) -> None:
    from hf_fasttrain.report.report import write_report

    runs = [make_run(tmp_path / "a"), make_run(tmp_path / "b", lr=0.003, old=True), make_run(tmp_path / "c", steps=120)]
    view = opened(write_report(runs, tmp_path / "several.html"))
    assert all(has_graphics(view.page).values())
    lines = "document.getElementById('chart-loss').data.map(t => [t.name, t.line.dash, t.line.color])"
    curves = view.page.evaluate(lines)
    assert [name for name, _, _ in curves] == ["a", "b", "c"]
    assert len({dash for _, dash, _ in curves}) == len({colour for _, _, colour in curves}) == 3
    assert curves == view.page.evaluate(lines.replace("loss", "images-per-second"))
    tooltip = view.hover("eval-accuracy")
    assert all(name in tooltip for name in "abc")
    view.page.locator("#results-table th", has_text="steps").locator("button").click()
    assert view.page.locator("#results-table tbody th").first.text_content() == "c"
    assert view.page.locator("#differences-table tbody tr").count() == 1
