"""A run that began when folders were read by older rules is not continued with other images unnoticed."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest
import torch
from helpers.runs import weights

from hf_fasttrain import Trainer
from hf_fasttrain.data.source.dataset import load_source
from hf_fasttrain.data.source.fingerprint import fingerprint
from hf_fasttrain.from_recipe.older_rows import refuse_new_rows
from hf_fasttrain.from_recipe.source_from import local_settings, open_source
from hf_fasttrain.inference import evaluate_run
from hf_fasttrain.recipe.load import load_recipe
from hf_fasttrain.utils.errors import RunError


@pytest.fixture
def photos(image_folder: Path) -> Path:
    """Return an image folder without a validation split, in which there is more than older rules read."""
    shutil.rmtree(image_folder / "validation")
    for name in ("blue", "green", "red"):
        folder = image_folder / "train" / name
        (folder / "closer").mkdir()
        shutil.copy(folder / "0.jpg", folder / "closer" / "10.jpg")
        shutil.copy(folder / "1.jpg", folder / "11.jfif")
    return image_folder


def test_an_older_run_goes_on_with_its_images_or_is_refused(
    photos: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe = write_recipe()
    base = [f"data.dataset={photos}", "data.eval_fraction=0.25", "checkpoint.every=1 steps"]
    old = [*base, "data.inventory=old"]
    run = [f"output_dir={tmp_path / 'run'}", "schedule.name=constant", "schedule.warmup=0"]
    whole = [f"output_dir={tmp_path / 'whole'}", "schedule.name=constant", "schedule.warmup=0"]
    Trainer.from_recipe(recipe, [*old, *whole, "train.duration=4 steps"]).fit()
    Trainer.from_recipe(recipe, [*old, *run, "train.duration=2 steps"]).fit()
    with pytest.raises(RunError, match=r"began with 24 images by the rules .* find 30\.\n6 files new:") as error:
        Trainer.from_recipe(recipe, [*base, *run, "train.duration=4 steps"], resume=True)
    for name in ("blue", "green", "red"):
        assert f"{photos}/train/{name}/closer/10.jpg" in str(error.value)
        assert f"{photos}/train/{name}/11.jfif" in str(error.value)
    assert "data.inventory=old continues with the same images, in the same order" in str(error.value)
    Trainer.from_recipe(recipe, [*old, *run, "train.duration=4 steps"], resume=True).fit()
    continued, reference = weights(tmp_path / "run"), weights(tmp_path / "whole")
    assert all(torch.equal(continued[name], reference[name]) for name in reference)
    _forget_the_key(tmp_path / "run" / "recipe.yaml")
    notes: list[str] = []
    assert evaluate_run(tmp_path / "run", note=notes.append)["num_images"] == 6  # a quarter of 24
    assert any("read by the rules of older versions, with which this run began" in note for note in notes)


def _forget_the_key(recipe: Path) -> None:
    """Make a recipe one of an older version, which did not have data.inventory."""
    lines = [line for line in recipe.read_text().splitlines() if "inventory: old" not in line]
    recipe.write_text("\n".join(lines))


def test_a_folder_that_the_present_rules_refuse_can_be_resumed(
    photos: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, run = write_recipe(), [f"data.dataset={photos}", f"output_dir={tmp_path / 'run'}"]
    Trainer.from_recipe(recipe, [*run, "data.inventory=old"]).fit()
    shutil.copytree(photos / "train" / "red", photos / "bus")
    with pytest.raises(RunError, match=r"By the present ones: .*train may be a split, and bus.*\n.*=old continues"):
        Trainer.from_recipe(recipe, [*run, "train.duration=4 steps"], resume=True)


def test_old_rows_are_those_of_the_older_rules(photos: Path) -> None:
    source = load_source(str(photos), inventory="old", eval_fraction=0.25)
    splits = (source.train, source.evaluation)
    found = {record["path"] for split in splits for record in split.records(range(len(split)))}
    assert found == {f"{photos}/train/{name}/{i}.jpg" for name in ("blue", "green", "red") for i in range(8)}
    images = source.train.images
    assert [images[row]["path"] for row in range(24)] == sorted(found)


def test_a_table_of_paths_that_is_read_in_another_way_is_said(
    photos: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    names = [f"{name}/{number}.jpg" for name in ("blue", "green", "red") for number in range(4)]
    columns = {"image": names, "label": [name[0] for name in names], "split": ["train", "val"] * 6}
    pyarrow.parquet.write_table(pa.table(columns), photos / "train" / "labels.parquet")
    overrides = [f"data.dataset={photos}/train/labels.parquet"]
    old = load_recipe(write_recipe(), [*overrides, "data.inventory=old"])
    recipe, begun = load_recipe(write_recipe(), overrides), {"data set": fingerprint(open_source(old))}
    with pytest.raises(RunError, match=r"began with 12 images .*\nThey are the same files in other splits.*\n.*=old"):
        refuse_new_rows(recipe, begun, open_source(recipe))
    same = load_recipe(write_recipe(), [*overrides, "data.split_column=null"])
    refuse_new_rows(same, begun, open_source(same))


def test_an_absolute_image_root_is_a_setting_of_this_machine(photos: Path, write_recipe: Callable[..., Path]) -> None:
    recipe = load_recipe(write_recipe(), [f"data.dataset={photos}", f"data.image_root={photos}"])
    assert local_settings(recipe, None) == ["data.dataset", "data.image_root"]
