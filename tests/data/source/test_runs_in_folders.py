"""Folders of images in which there are runs and caches of this package, and links in the place of splits."""

from __future__ import annotations

from pathlib import Path

import pytest

from hf_fasttrain.data.pixels.cache import ABOUT_FILE, INDEX_FILE, PIXELS_FILE
from hf_fasttrain.data.source.dataset import Source, load_source
from hf_fasttrain.run_folder.file_names import METRICS_FILE, RECIPE_FILE, RESOLVED_FILE
from hf_fasttrain.utils.errors import DataError

CLASSES = [f"{name}/{i}.jpg" for name in ("cat", "dog") for i in range(4)]
RUN = [RECIPE_FILE, RESOLVED_FILE, METRICS_FILE, "checkpoints/step_1/COMPLETE", "model/config.json"]
RUN += ["report/gallery.json", "report/confusion.png", "report/mistake_0.jpg"]


def write(root: Path, *paths: str) -> Path:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_bytes(b"x")
    return root


def load(root: Path) -> Source:
    return load_source(str(root), eval_fraction=0.25)


@pytest.mark.parametrize(
    ("files", "note"),
    [
        ([f"run/{name}" for name in RUN], "1 run or cache of hf-fasttrain (run/)"),
        ([f"runs/{run}/{name}" for run in "ab" for name in RUN], "1 run or cache of hf-fasttrain (runs/)"),
        ([f"dog/run/{name}" for name in RUN], "1 run or cache of hf-fasttrain (dog/run/)"),
        (RUN, "3 runs or caches of hf-fasttrain (checkpoints/)"),
        ([f"0f21fc/{name}" for name in (ABOUT_FILE, INDEX_FILE, PIXELS_FILE)], "1 run or cache"),
    ],
)
def test_runs_and_caches_in_a_folder_of_images_are_no_classes(files: list[str], note: str, tmp_path: Path) -> None:
    source = load(write(tmp_path, *CLASSES, *files))
    assert source.class_names == ["cat", "dog"]
    assert len(source.train) + len(source.evaluation) == len(CLASSES)
    assert any(note in text for text in source.notes), source.notes


def test_a_run_that_is_linked_to_is_left_out_and_images_within_a_run_can_be_named(tmp_path: Path) -> None:
    root = write(tmp_path / "photos", *CLASSES)
    write(tmp_path / "run", *RUN, *(f"photos/{path}" for path in CLASSES))
    (root / "last").symlink_to(tmp_path / "run")
    assert load(root).class_names == load(tmp_path / "run" / "photos").class_names == ["cat", "dog"]


@pytest.mark.parametrize("name", ["val", "Train"])
def test_a_dead_link_in_the_place_of_a_split_is_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path, *(f"training/{path}" for path in CLASSES))
    (tmp_path / name).symlink_to("/mnt/gone")
    with pytest.raises(DataError, match=rf"{name}: dead link \(links to /mnt/gone\); repair it or remove it"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["", " "])
def test_an_empty_name_is_one_message(name: str) -> None:
    with pytest.raises(DataError, match=r"data.dataset is ' ?'; give the path of a folder or table"):
        load_source(name)
