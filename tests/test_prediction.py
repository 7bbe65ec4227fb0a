"""Predictions are streamed: rows come as they are computed, whatever the number of images."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.runs import exit_status
from PIL import Image

from hf_fasttrain.data.pixels.prepare import Preparation
from hf_fasttrain.data.source.records import FileRecords
from hf_fasttrain.inference import open_predictions, predict_images
from hf_fasttrain.models.model import ModelSpec, build_model
from hf_fasttrain.models.saved import save_model
from hf_fasttrain.prediction import LONG_LIST, Predictions
from hf_fasttrain.utils.errors import DataError, LoaderNotStarted
from hf_fasttrain.utils.terminal import StreamedTable, Terminal, build_table

CLASSES = ["blue", "green", "red"]
NUM_IMAGES = 90  # three batches of 32


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run whose model was not trained."""
    folder = tmp_path_factory.mktemp("streamed") / "run"
    (folder / "model").mkdir(parents=True)
    spec = ModelSpec("test_resnet", CLASSES, 32)
    save_model(build_model(spec), spec, folder / "model")
    return folder


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of images, two of which are damaged."""
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(2)
    for number in range(NUM_IMAGES):
        Image.fromarray(rng.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{number:03d}.png")
    for damaged in ("005.png", "070.png"):
        (folder / damaged).write_bytes((folder / damaged).read_bytes()[:60])
    return folder


def count_decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list that the paths of decoded images are appended to."""
    decoded: list[str] = []
    real = Preparation.encoded

    def counted(self: Preparation, record: Any) -> Any:
        decoded.append(Path(record["path"]).name)
        return real(self, record)

    monkeypatch.setattr(Preparation, "encoded", counted)
    return decoded


def test_a_row_comes_when_its_batch_is_computed_and_no_image_is_read_earlier(
    run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    decoded = count_decoded(monkeypatch)
    predictions = open_predictions(run, [str(photos)], on_bad_image=lambda _: None, workers=0)
    assert (len(predictions), decoded) == (NUM_IMAGES, [])
    rows = iter(predictions)
    assert Path(next(rows)["image"]).name == "000.png"
    assert len(decoded) == predictions.batch_size == 32
    assert (len(list(rows)), len(decoded)) == (NUM_IMAGES - 3, NUM_IMAGES)


@pytest.mark.parametrize("form", [[], ["--json"], ["--json-lines"]])
def test_the_command_prints_rows_while_later_images_are_not_read(
    form: list[str], run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed: list[str] = []
    real = Preparation.encoded

    def noticed(self: Preparation, record: Any) -> Any:
        if Path(record["path"]).name in ("032.png", "064.png"):
            printed.append(capsys.readouterr().out)
        return real(self, record)

    monkeypatch.setattr(Preparation, "encoded", noticed)
    assert exit_status(["predict", str(run), str(photos), *form]) == 2
    after = capsys.readouterr()
    assert "000.png" in printed[0]
    assert "031.png" in printed[0]
    assert "063.png" in printed[1]
    assert "2 of 90 images skipped:\n  image" in after.err
    expected = predict_images(run, [str(photos)], on_bad_image=lambda _: None)
    output = "".join([*printed, after.out])
    if form == ["--json"]:
        assert output == json.dumps(expected, indent=2) + "\n"
    elif form:
        assert [json.loads(line) for line in output.splitlines()] == expected
    else:
        assert output.count("image") == 1
        assert output.count("0.") >= 3 * len(expected)


def test_loader_processes_keep_the_order_and_report_bad_images_alike(run: Path, photos: Path) -> None:
    both = []
    for workers in (0, 2):
        bad: list[str] = []
        both.append((predict_images(run, [str(photos)], workers=workers, on_bad_image=bad.append), bad))
    assert both[0] == both[1]
    assert [Path(row["image"]).stem for row in both[1][0]] == [
        f"{number:03d}" for number in range(NUM_IMAGES) if number not in (5, 70)
    ]
    assert ["005.png" in both[1][1][0], "070.png" in both[1][1][1]] == [True, True]
    with pytest.raises(DataError, match=r"005.png: can't be decoded"):
        predict_images(run, [str(photos)], workers=2)


def test_long_lists_have_loader_processes_and_short_ones_have_none() -> None:
    spec = ModelSpec("test_resnet", CLASSES, 32)
    model, device = build_model(spec), torch.device("cpu")
    for number, workers in ((LONG_LIST - 1, 0), (LONG_LIST, 1)):
        files = FileRecords("", [f"{i}.png" for i in range(number)])
        assert Predictions(model, spec, files, device).workers == workers
        assert Predictions(model, spec, files, device, workers=3).workers == 3


def test_images_are_decoded_in_this_process_where_no_other_can_be_started(
    run: Path, photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise LoaderNotStarted("loader process 1 of 1 could not be started: too many")

    monkeypatch.setattr("hf_fasttrain.prediction.LONG_LIST", 10)
    monkeypatch.setattr("hf_fasttrain.data.loading.workers.Workers.start", refuse)
    notes: list[str] = []
    assert len(predict_images(run, [str(photos)], on_bad_image=lambda _: None, note=notes.append)) == NUM_IMAGES - 2
    assert notes == ["loader process 1 of 1 could not be started: too many; images are decoded in this process"]
    with pytest.raises(LoaderNotStarted):
        predict_images(run, [str(photos)], workers=1)


def test_two_forms_of_json_at_once_are_refused(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["predict", str(run), "x.png", "--json", "--json-lines"]) == 2
    assert "give one of them" in capsys.readouterr().err


def test_an_empty_json_list_is_printed_as_such(run: Path, photos: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["predict", str(run), str(photos / "005.png"), "--json"]) == 2
    assert capsys.readouterr().out == "[]\n"
    assert exit_status(["predict", str(run), str(photos / "005.png")]) == 2
    assert capsys.readouterr().out == ""


def test_a_table_in_pieces_is_the_table_in_one_piece(capsys: pytest.CaptureFixture[str]) -> None:
    header, rows = ("image", "class", "score"), [(f"photos/{i}.png", "red", "0.5000") for i in range(7)]
    terminal = Terminal(width=60)
    terminal.print(build_table(header, rows))
    whole = capsys.readouterr().out
    table = StreamedTable(terminal, header, [12, 3, 6])
    for piece in (rows[:3], [], rows[3:4], rows[4:]):
        table.add(piece)
    table.close()
    assert capsys.readouterr().out.splitlines() == [line.rstrip() for line in whole.splitlines()]


def test_a_table_in_pieces_folds_long_names_within_the_terminals_width(capsys: pytest.CaptureFixture[str]) -> None:
    table = StreamedTable(Terminal(width=60), ("image", "class", "score"), [300, 90, 6])
    table.add([("p" * 300, "short", "0.5000")])
    table.add([("q", "c" * 90, "0.5000")])
    table.close()
    printed = capsys.readouterr().out
    assert {len(line) for line in printed.splitlines()} == {60}
    assert (printed.count("p"), printed.count("c"), printed.count("image")) == (300, 92, 1)
