"""`mislabeled`: the list of likely label errors, the corrected table that trains, the report, and what is refused."""

from __future__ import annotations

import csv
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers.processes import reset_accelerate, run_processes
from helpers.runs import exit_status, photo_recipe

from hf_fasttrain.from_recipe.label_errors import find_in_recipe, table_of
from hf_fasttrain.recipe.load import load_recipe

WRONG = {"train/red/wrong.jpg": "blue", "validation/green/wrong.jpg": "red"}  # file -> its real class


@pytest.fixture
def photos(image_folder: Path) -> Path:
    """Return the folder of photos with two in the folders of other classes."""
    for number, (target, kind) in enumerate(WRONG.items()):
        split = target.split("/")[0]
        (image_folder / split / kind / f"{number}.jpg").rename(image_folder / target)
    return image_folder


@pytest.fixture
def recipe(write_recipe: Callable[..., Path], photos: Path, tmp_path: Path) -> Path:
    return write_recipe(photo_recipe(photos, tmp_path))


def rows_of(table: Path) -> list[dict[str, str]]:
    with table.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_wrong_labels_come_first_and_the_corrected_table_trains(
    recipe: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    assert exit_status([str(recipe), "log.report=true"]) == 0
    capsys.readouterr()
    assert exit_status(["mislabeled", str(recipe)]) == 0
    printed = capsys.readouterr().out
    rows = rows_of(run / "mislabeled" / "labels.csv")
    assert len(rows) == 36
    assert {str(Path(row["path"]).relative_to(photos)): row["suggested_label"] for row in rows[:2]} == WRONG
    assert [row["flagged"] for row in rows[:3]] == ["yes", "yes", "no"]
    assert all(row["label"] == row["given_label"] == Path(row["path"]).parent.name for row in rows)
    assert [float(row["margin"]) for row in rows] == sorted(float(row["margin"]) for row in rows)
    assert "likely label errors: 2 of 36 images (5.6%) of train, validation" in printed
    assert "red/wrong.jpg" in printed
    assert "data.cache" not in printed
    page = (run / "mislabeled" / "mislabeled.html").read_text()
    assert page.count("<figure><img") == 2
    assert re.search(rf"{rows[0]['given_label']} \d+\.\d%", page)  # as on the terminal, not "0%" for 0.4 %
    assert len(page) < 200_000
    assert f"{run / 'report.html'}    has a section of them now" in printed
    report = (run / "report.html").read_text()
    assert "Likely label errors" in report
    assert "mislabeled/labels.csv lists all images" in report
    for row in rows:
        row["label"] = row["suggested_label"] if row["flagged"] == "yes" else row["label"]
    corrected = run / "mislabeled" / "labels.csv"
    with corrected.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert exit_status(["mislabeled", str(recipe)]) == 2
    assert f"{corrected}: has corrected labels, and would be replaced" in capsys.readouterr().err
    data = [f"data.dataset={corrected}", f"output_dir={tmp_path / 'again'}"]
    assert exit_status([str(recipe), *data]) == 0
    assert exit_status(["mislabeled", str(recipe), *data]) == 0
    assert "likely label errors: 0 of 36 images" in capsys.readouterr().out
    assert "No label is probably wrong" in (tmp_path / "again" / "mislabeled" / "mislabeled.html").read_text()


def test_the_command_that_is_printed_trains_a_recipe_of_another_table(
    write_recipe: Callable[..., Path], photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = sorted((photos / "train").rglob("*.jpg"))
    lines = [f"{path.relative_to(photos)};{path.parent.name},{number % 6}" for number, path in enumerate(files)]
    table = tmp_path / "kinds.csv"
    table.write_text("file,kind,camera\n" + "\n".join(lines).replace(";", ",") + "\n")
    columns = "image_root: photos, image_column: file, label_column: kind, group_column: camera"
    recipe = write_recipe(
        f"""
model: {{name: test_resnet}}
data: {{dataset: "{table}", {columns}, folds: 3, fold: 1, image_size: 32, workers: 0, cache: none}}
train: {{duration: 2 steps, batch_size: 8}}
log: {{report: false}}
"""
    )
    assert exit_status(["mislabeled", str(recipe), "seed=3", f"output_dir={tmp_path / 'run'}"]) == 0
    command = shlex.split(capsys.readouterr().out.split("then: hf-fasttrain ")[1])
    assert "seed=3" in command
    rows = rows_of(tmp_path / "run" / "mislabeled" / "labels.csv")
    cameras = {row["path"]: row["group"] for row in rows}
    assert cameras == {str(path): str(number % 6) for number, path in enumerate(files)}
    assert exit_status([text.replace("FOLDER", str(tmp_path / "again")) for text in command]) == 0
    told = capsys.readouterr().out
    assert exit_status(["mislabeled", str(recipe), "seed=3", f"output_dir={tmp_path / 'run'}"]) == 0  # not corrected
    assert len({row["path"] for row in rows if row["split"] == "validation"}) == len(rows) // 3
    assert "validation" in told


def test_all_processes_find_the_same_errors_as_one(recipe: Path) -> None:
    def find() -> bytes | None:
        found, _ = find_in_recipe(load_recipe(recipe), 5)
        return None if found is None else table_of(found)

    reset_accelerate()
    alone = find()
    reset_accelerate()
    first, second = run_processes(find)
    assert second is None
    assert alone is not None
    assert first is not None
    ours, theirs = ([line.split(b",")[:7] for line in table.splitlines()] for table in (alone, first))
    assert ours[:3] == theirs[:3]
    assert sorted(ours) == sorted(theirs)


def test_images_in_the_dataset_itself_are_named_by_their_rows(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["train.max_images=60", "evaluate.max_images=20", f"output_dir={tmp_path / 'run'}"]
    folder = tmp_path / "found"
    assert exit_status(["mislabeled", str(write_recipe()), *arguments, "--output", str(folder)]) == 0
    assert "the images are in the dataset itself, not in files: correct the rows there" in capsys.readouterr().out
    rows = rows_of(folder / "labels.csv")
    assert {row["path"] for row in rows} == {""}
    assert {row["split"] for row in rows} == {"train"}  # also of the held-out part, whose rows are those of train
    from sklearn.datasets import load_digits

    truth = load_digits().target
    assert [int(row["label"]) for row in rows] == [truth[int(row["row"])] for row in rows]
    assert not (tmp_path / "run").exists()


def test_images_that_cannot_be_read_are_left_out(
    recipe: Path, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (photos / "train" / "red" / "7.jpg").write_bytes(b"\xff\xd8\xff" + bytes(200))
    assert exit_status(["mislabeled", str(recipe), "data.max_bad_fraction=0.5"]) == 0
    assert "left out: 1 that could not be read" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "run" / "mislabeled" / "labels.csv")) == 35


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.multi_label=true", "model.head=new"], "the images have several labels each"),
        (["train.max_images=1", "evaluate.max_images=1", "train.batch_size=1"], "at least two classes must have two"),
        (["--folds", "1"], "invalid value for '--folds'"),
    ],
)
def test_what_cannot_be_judged_is_one_message(
    recipe: Path, tmp_path: Path, overrides: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    table = tmp_path / "several.csv"
    if "data.multi_label=true" in overrides:
        photos = sorted((tmp_path / "photos").rglob("*.jpg"))
        table.write_text("path,label\n" + "".join(f"{path},{path.parent.name};x\n" for path in photos))
        overrides = [f"data.dataset={table}", "data.label_separator=;"]
    assert exit_status(["mislabeled", str(recipe), *overrides]) == 2
    output = " ".join(capsys.readouterr().err.split())
    assert message in output
    assert "Traceback" not in output
    assert not (tmp_path / "run" / "mislabeled").exists()


def test_a_folder_that_cannot_be_written_is_one_message(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    assert exit_status(["mislabeled", str(recipe), "--output", str(tmp_path / "file")]) == 2
    assert "can't be written" in capsys.readouterr().err


def test_probabilities_that_are_no_numbers_are_refused() -> None:
    from hf_fasttrain.from_recipe import label_errors
    from hf_fasttrain.utils.errors import RunError

    with pytest.raises(RunError, match=r"features have NaN or inf; give other weights, model\.pretrained"):
        label_errors.require_judgeable(np.array([0, 0, 1, 1]), np.full((4, 1, 2), np.nan), ["a", "b"])
