"""Mistakes that need neither data nor model to be found come together, before anything is downloaded or built."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from accelerate.tracking import get_available_trackers
from helpers.runs import RECIPE

from hf_fasttrain.from_recipe.early_checks import require_no_early_mistakes, require_writable
from hf_fasttrain.recipe.load import parse_recipe
from hf_fasttrain.utils.errors import ModelError, RecipeError, RunError, UserError


def check(*overrides: str, folder: Path | None = None, resume: bool = False) -> None:
    recipe = parse_recipe(RECIPE, overrides, where="small.yaml", name="small")
    require_no_early_mistakes(recipe, folder, resume=resume)


def test_all_mistakes_come_in_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    wrong = {
        f"data.dataset={tmp_path}/nowhere": "/nowhere: no such file or folder",
        "model.name=resnet5O": "model.name: timm .* has no model 'resnet5O'. Did you mean 'resnet50'",
        f"model.pretrained={tmp_path}/no.safetensors": "model.pretrained: no file or folder",
        "optimizer.name=adamv": "optimizer.name is 'adamv', which timm does not know",
        "evaluate.metrics=[accuracy, acuracy]": "evaluate.metrics: 'acuracy' is not built in .* 'accuracy'",
    }
    if missing := {"wandb", "trackio", "mlflow"} - {tracker.value for tracker in get_available_trackers()}:
        wrong[f"log.trackers={min(missing)}"] = f"log.trackers: {min(missing)} is not installed"
    with pytest.raises(RecipeError) as error:
        check(*wrong, folder=tmp_path / "file")
    first, *lines = str(error.value).splitlines()
    assert first == f"small has {len(wrong) + 1} mistakes:"
    for text in ("output_dir .*file: is a file; choose another", *wrong.values()):
        assert sum(bool(re.search(text, line)) for line in lines) == 1, text


def test_one_mistake_is_its_own_error_and_the_hub_is_not_asked() -> None:
    with pytest.raises(ModelError, match=r"^model.name: timm .* has no model 'resnet5O'"):
        check("model.name=resnet5O", "data.dataset=nobody/nothing")
    check("data.dataset=nobody/nothing", "evaluate.metrics=[accuracy, acuracy]")  # the Hub may have them


def test_a_run_folder_must_be_free_and_possible_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(RunError, match="can't be written: Not a directory; choose another output_dir"):
        require_writable(tmp_path / "file" / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "result.json").write_text("{}")
    with pytest.raises(UserError, match="holds a run already"):
        check(folder=tmp_path / "run")
    with pytest.raises(RunError, match="its checkpoints have been removed"):
        check(folder=tmp_path / "run", resume=True)
    (tmp_path / "run" / "checkpoints" / "step_00000002").mkdir(parents=True)
    check(folder=tmp_path / "run", resume=True)
    check(folder=tmp_path / "a" / "b")
    assert not (tmp_path / "a").exists()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission_to_write(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(RunError, match="can't be written: Permission denied"):
        require_writable(tmp_path / "run")
