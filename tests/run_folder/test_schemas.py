"""Files of a run folder that are read back: what is written fits its schema, and so does what older versions wrote."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import fuzz_run_folder
import pytest
import torch
from helpers.fuzzing import fuzz
from helpers.written_run import write_run
from safetensors.torch import save_file

from hf_fasttrain.data.pixels.bad_images import BadImage
from hf_fasttrain.data.pixels.resize import FILTERS
from hf_fasttrain.models.model import ModelSpec, Preprocessing
from hf_fasttrain.run_folder import schemas
from hf_fasttrain.run_folder.finished import read_run
from hf_fasttrain.run_folder.gallery import Gallery, Picture
from hf_fasttrain.run_folder.metrics_file import parse_metrics_line, read_bad_images
from hf_fasttrain.run_folder.predictions import Predictions
from hf_fasttrain.run_folder.result import Result
from hf_fasttrain.train.checkpoint_state import State
from hf_fasttrain.train.early_stopping import EarlyStop
from hf_fasttrain.utils import json_lines
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.files import safetensors_header


@pytest.mark.parametrize(
    ("written", "schema"),
    [
        (ModelSpec, schemas.SpecFile), (Preprocessing, schemas.PreprocessingPart), (State, schemas.TrainingState),
        (Result, schemas.ResultFile), (EarlyStop, schemas.EarlyStopPart), (Gallery, schemas.GalleryFile),
        (Picture, schemas.PicturePart), (BadImage, schemas.BadImagePart),
    ],
)  # fmt: skip
def test_every_field_that_is_written_has_a_type_and_a_bound(written: Any, schema: Any) -> None:
    missing = {each.name for each in fields(written)} - schema.model_fields.keys()
    assert not missing


def test_filters_are_those_that_resize_has() -> None:
    allowed = schemas.PreprocessingPart.model_fields["interpolation"].annotation
    assert set(allowed.__args__) == set(FILTERS)


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the object in a JSON file."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("result.json", lambda v: v.update(versions=1e308), r"versions is 1e\+308; must be a valid dictionary"),
        ("result.json", lambda v: v.update(last="\u202e"), r"last is '\\u202e'; must be a valid dictionary"),
        ("result.json", lambda v: v["best"].pop("step"), "best.step is missing"),
        ("result.json", lambda v: v.update(images=10**30), "images is 1000000"),
        ("model/hf_fasttrain.json", lambda v: v["preprocessing"]["mean"].pop(), "preprocessing.mean"),
        ("model/hf_fasttrain.json", lambda v: v["preprocessing"]["std"].append(1.0), "preprocessing.std"),
        ("model/hf_fasttrain.json", lambda v: v.update(new=1), "new is unknown"),
        ("model/hf_fasttrain.json", lambda v: v.update(image_size=10**8), "image_size is 100000000; must be less than"),
    ],
)  # fmt: skip
def test_a_damaged_file_of_a_finished_run_is_one_message(tmp_path: Path, name: str, change: Any, message: str) -> None:
    run = write_run(tmp_path / "run", tmp_path)
    changed(run / name, change)
    with pytest.raises(RunError, match=message) as caught:
        read_run(run)
    assert str(caught.value).startswith(f"{run / name}: can't be read as ")
    assert str(caught.value).endswith("; fix it or train again")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[1]", "not a JSON object"),
        ("[" * 10**5, "nested more than 100 levels"),
        ("{", "Expecting"),
        ("9" * 5000, "digits"),
    ],
)
def test_a_file_that_is_no_object_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    run = write_run(tmp_path / "run", tmp_path)
    (run / "result.json").write_text(text)
    with pytest.raises(RunError, match=message):
        read_run(run)
    assert schemas.read_if_sound(run / "result.json", schemas.ResultFile) == {}


@pytest.mark.parametrize(
    "text", ["model: [a, b]", "'x'", "a: &a [*a]", "model: {name: 3}", "data: {dataset: [1]}", "{"]
)
def test_a_damaged_recipe_of_a_finished_run_is_one_message(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "run", tmp_path)
    (run / "recipe.yaml").write_text(text)
    with pytest.raises(RunError, match=r"recipe\.yaml: can't be read \(.*\); fix it or train again"):
        read_run(run)


@pytest.mark.parametrize("text", ["seed: 3", "- a", "seed: {value: 1, origin: [1]}", "seed: {value: !!int x}"])
def test_a_damaged_resolved_yaml_is_one_message(tmp_path: Path, text: str) -> None:
    run = write_run(tmp_path / "run", tmp_path)
    (run / "resolved.yaml").write_text(text)
    with pytest.raises(RunError, match=r"resolved\.yaml: can't be read \(.*\); fix it or train again"):
        read_run(run)


@pytest.mark.parametrize(
    "line",
    [
        "", "{", "[]", "3", '{"kind": "train"}', '{"step": 1}', '{"kind": 1, "step": 1}', '{"kind": "a", "step": -1}',
        '{"kind": "train", "step": 1.5}', '{"kind": "train", "step": true}', f'{{"kind": "train", "step": {10**30}}}',
        '{"kind": "evaluation", "step": 1}', '{"kind": "evaluation", "step": 1, "split": []}', "[" * 10**5,
    ],
)  # fmt: skip
def test_a_damaged_line_of_metrics_is_skipped(line: str) -> None:
    assert parse_metrics_line(line) is None


def test_only_numbers_of_an_evaluation_are_metrics() -> None:
    values = {"kind": "evaluation", "step": 1, "split": "a", "loss": float("nan"), "f1": None, "accuracy": 1}
    wrong = {"auc": "0.5", "map": [1], "flag": True, "more": {}}
    read = parse_metrics_line(json.dumps(values | wrong))
    assert read is not None
    assert read.keys() == values.keys()


def test_a_damaged_line_of_bad_images_is_skipped(tmp_path: Path) -> None:
    sound = {"split": "train", "index": 3, "path": None, "error": "cut", "substitute": 4}
    wrong = [{"index": [1]}, {"split": {}}, {"index": -1}, {"error": 3}, {"substitute": "x"}, {"index": True}]
    lines = [sound, *(sound | each for each in wrong)]
    (tmp_path / "bad.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines) + "torn {")
    assert read_bad_images(tmp_path / "bad.jsonl") == [sound]


@pytest.mark.parametrize("change", [
    lambda v: v["mistakes"][0].update(predicted="x"), lambda v: v["mistakes"][0].update(truth={"dog": ["a"]}),
    lambda v: v["mistakes"][0].update(file=[1]), lambda v: v.update(training=3), lambda v: v["mistakes"][0].pop("name"),
])  # fmt: skip
def test_a_damaged_gallery_is_one_message(tmp_path: Path, change: Any) -> None:
    gallery = Gallery(["cat", "dog"], mistakes=[Picture("0.jpg", "cat/0.jpg", {"cat": 1.0}, {"dog": 0.9}, 2.3)])
    gallery.save(tmp_path, {})
    assert Gallery.load(tmp_path) == gallery
    changed(tmp_path / "report" / "gallery.json", change)
    with pytest.raises(RunError, match=r"gallery\.json: can't be read as a list of pictures \("):
        Gallery.load(tmp_path)


@pytest.mark.parametrize("change", [
    {"labels": torch.tensor([0, 10**6])}, {"labels": torch.tensor([0, -1])}, {"labels": torch.zeros(2)},
    {"losses": torch.zeros(3)}, {"predicted": torch.zeros(2, 3, dtype=torch.bool)}, {"rows": torch.tensor(3)},
])  # fmt: skip
def test_damaged_predictions_are_one_message(tmp_path: Path, change: dict[str, torch.Tensor]) -> None:
    numbers, figures = torch.tensor([0, 1]), torch.zeros(2)
    tensors = dict.fromkeys(("rows", "labels", "predicted", "worst_class"), numbers) | {
        "confidence": figures,
        "losses": figures,
    }
    path = tmp_path / "predictions.safetensors"
    for values in (tensors, tensors | change):
        save_file({name: value.clone() for name, value in values.items()}, path, {"step": "3", "split": "validation"})
        if values is tensors:
            assert Predictions.load(path).step == 3
    with pytest.raises(RunError, match=r"can't be read as predictions \(.*\); remove it"):
        Predictions.load(path)


@pytest.mark.parametrize("content", [
    b"\xff" * 8, (10**9).to_bytes(8, "little") + b"{}", (2).to_bytes(8, "little") + b"[]", b"\2",
    (10**5).to_bytes(8, "little") + b"[" * 10**5,
])  # fmt: skip
def test_a_damaged_header_of_safetensors_is_a_value_error(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"a header |Expecting|Extra"):
        safetensors_header(tmp_path / "x.safetensors")


def test_commands_on_a_damaged_run_end_well_or_with_one_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The short form of fuzz_run_folder.py."""
    counts = fuzz(7, range(10), partial(fuzz_run_folder.prepare, libraries=["timm"]), fuzz_run_folder.case, tmp_path)
    assert capsys.readouterr().out == ""
    assert sum(counts.values()) == 10
    assert {name.rpartition(" ")[2] for name in counts} >= {"0", "2"}


def test_lines_are_read_in_bounded_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, texts = tmp_path / "lines", ["", "one", "x" * 30, "", "\u2028two", "end"]
    for end in ("", "\n"):
        path.write_text("\n".join(texts) + end, encoding="utf-8")
        for most in (1, 3, 7, 100):
            monkeypatch.setattr(json_lines, "MAX_LINE", most)
            found = list(json_lines.lines_of(path))
            assert max(map(len, found)) <= 2 * most
            assert "".join(found) == "".join(texts)
            assert found == texts or most < 30
