"""hf://OWNER/NAME: as recipe, for evaluation and prediction, and as initial weights, from a Hub on loopback."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from helpers.hub_server import Hub
from helpers.processes import reset_accelerate
from helpers.runs import RECIPE, exit_status
from PIL import Image
from safetensors.torch import load_file

from hf_fasttrain.from_recipe.trainer import build_trainer
from hf_fasttrain.hub.push import push_run
from hf_fasttrain.inference import evaluate_run, predict_images
from hf_fasttrain.models.weights import weights_file
from hf_fasttrain.recipe.load import load_recipe, recipe_text
from hf_fasttrain.utils.errors import ModelError, RecipeError, RunError
from hf_fasttrain.utils.remote import download_file, download_run, is_repo_name, parse_hub_url


@pytest.fixture
def pushed(hub: Hub, write_recipe: Callable[..., Path], tmp_path: Path) -> Path:
    """Return the folder of a run that was trained and pushed to me/digits, private."""
    reset_accelerate()
    run = tmp_path / "runs" / "first"
    build_trainer(write_recipe(RECIPE), [f"output_dir={run}"]).fit()
    push_run(run, "me/digits", private=True)
    return run


def test_a_pushed_run_is_evaluated_and_predicts(pushed: Path, tmp_path: Path) -> None:
    reset_accelerate()
    local = evaluate_run(pushed)
    reset_accelerate()
    remote = evaluate_run("hf://me/digits")
    assert remote == local
    image = tmp_path / "photo.png"
    Image.effect_noise((40, 30), 60).save(image)
    assert predict_images("hf://me/digits", [str(image)]) == predict_images(pushed, [str(image)])


def test_a_pushed_recipe_trains_the_same(pushed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_status(["hf://me/digits", "data.workers=0"]) == 0
    rerun = tmp_path / "runs" / "digits"  # named after the repository, not the training folder
    first, second = (load_file(run / "model" / "model.safetensors") for run in (pushed, rerun))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_training_starts_from_pushed_weights(pushed: Path, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    reset_accelerate()
    trainer = build_trainer(write_recipe(RECIPE), [f"output_dir={tmp_path / 'b'}", "model.pretrained=hf://me/digits"])
    saved = load_file(pushed / "model" / "model.safetensors")
    state = trainer.raw_model.state_dict()
    assert all(torch.equal(state[name], saved[name]) for name in saved)


def test_a_revision_is_that_commit(pushed: Path, hub: Hub) -> None:
    repo = hub.repos["me/digits"]
    first = repo.sha
    (pushed / "model" / "hf_fasttrain.json").write_bytes(
        (pushed / "model" / "hf_fasttrain.json").read_bytes().replace(b'"0"', b'"zero"')
    )
    push_run(pushed, "me/digits")
    old = json.loads(download_file(f"hf://me/digits@{first}", "hf_fasttrain.json").read_text())
    new = json.loads(download_file("hf://me/digits", "hf_fasttrain.json").read_text())
    assert (old["class_names"][0], new["class_names"][0]) == ("0", "zero")
    with pytest.raises(RunError, match="hf://me/digits@nothing: has no such revision; omit @REVISION"):
        download_file("hf://me/digits@nothing", "hf_fasttrain.json")


def test_output_folder_and_repository_of_a_pushed_recipe_are_not_adopted(pushed: Path, hub: Hub) -> None:
    text = RECIPE.replace("report: false", "report: false, trackers: [tensorboard], project: theirs")
    text = text.replace("workers: 0", "workers: 0, cache_dir: /somewhere")
    text += "hub: {repo: me/digits, every: best}\noutput_dir: runs/first\n"
    hub.repos["me/digits"].files["recipe.yaml"] = text.encode()
    recipe = load_recipe("hf://me/digits", ["seed=3"])
    assert recipe.hub is None
    assert recipe.output_dir is None
    assert recipe.data.cache_dir is None
    assert (recipe.log.trackers, recipe.log.project) == ([], "hf_fasttrain")
    assert "somewhere" not in recipe_text(load_recipe("hf://me/digits"))
    assert recipe.seed == 3
    assert recipe.source.name == "digits"
    assert load_recipe("hf://me/digits", ["hub.repo=you/digits"]).hub.repo == "you/digits"


@pytest.mark.parametrize(
    ("line", "override"),
    [
        ("model: {name: test_resnet, trust_remote_code: true}", "model.trust_remote_code=true"),
        ("evaluate: {metrics: [accuracy, somebody/metric]}", "evaluate.metrics=[accuracy, somebody/metric]"),
    ],
)
def test_code_from_the_hub_is_run_only_if_requested(
    hub: Hub,
    pushed: Path,
    line: str,
    override: str,
) -> None:
    section = line.split(":")[0]
    lines = [old for old in RECIPE.splitlines() if not old.startswith(f"{section}:")]
    hub.repos["me/digits"].files["recipe.yaml"] = "\n".join([*lines, line]).encode()
    key = override.split("=")[0]
    with pytest.raises(RecipeError, match=rf"hf://me/digits, recipe.yaml: {key}=.* runs code from the Hub; read that"):
        load_recipe("hf://me/digits")
    assert load_recipe("hf://me/digits", [override])


def test_a_pushed_model_with_code_is_not_opened(hub: Hub, pushed: Path) -> None:
    repo = hub.repos["me/digits"]
    files = repo.versions[repo.sha]
    files["hf_fasttrain.json"] = files["hf_fasttrain.json"].replace(b'code": false', b'code": true')
    with pytest.raises(RunError, match="its model needs its own Python code; `hf download`"):
        predict_images("hf://me/digits", ["x.png"])


def test_only_the_config_at_the_root_counts(hub: Hub, pushed: Path, tmp_path: Path) -> None:
    repo = hub.repos["me/digits"]
    files = repo.versions[repo.sha]
    files["model/hf_fasttrain.json"] = files["hf_fasttrain.json"].replace(b'code": false', b'code": true')
    files["model/config.json"] = b'{"auto_map": {"AutoConfig": "evil/code--x.Y"}}'
    image = tmp_path / "photo.png"
    Image.effect_noise((40, 30), 60).save(image)
    assert predict_images("hf://me/digits", [str(image)]) == predict_images(pushed, [str(image)])
    assert not list(Path(download_run("hf://me/digits")).glob("model/*"))


@pytest.mark.parametrize("line", ["{weights_only: false}", "{checkpoint_path: x}", "{attn_implementation: a/kernel}"])
@pytest.mark.parametrize("name", ["test_resnet", "transformers:somebody/vit"])
def test_arguments_that_would_load_another_model_are_refused(
    write_recipe: Callable[..., Path], tmp_path: Path, line: str, name: str
) -> None:
    reset_accelerate()
    with pytest.raises(ModelError, match=r"model.args: .* would load something other than the recipe says; remove it"):
        build_trainer(
            write_recipe(RECIPE), [f"output_dir={tmp_path / 'r'}", f"model.args={line}", f"model.name={name}"]
        )


def test_a_timm_name_on_the_hub_starts_from_the_pushed_weights(
    hub: Hub, pushed: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    push_run(pushed, "timm/digits")
    reset_accelerate()
    overrides = [f"output_dir={tmp_path / 'b'}", "model.name=timm/digits", "model.pretrained=true"]
    trainer = build_trainer(write_recipe(RECIPE), overrides)
    saved, state = load_file(pushed / "model" / "model.safetensors"), trainer.raw_model.state_dict()
    assert all(torch.equal(state[name], saved[name]) for name in saved)


def test_a_config_of_another_version_is_named(hub: Hub, pushed: Path) -> None:
    spec = pushed / "model" / "hf_fasttrain.json"
    spec.write_text(json.dumps({**json.loads(spec.read_text()), "from_the_future": 1}))
    with pytest.raises(ModelError, match=r"can't be read as a model's description \(.*from_the_future"):
        predict_images(pushed, [str(spec)])


@pytest.mark.parametrize(
    "location", ["hf://flowers", "hf://", "hf://me/a/b", "hf://me/a--b", "hf://../x", "hf://me/x.git"]
)
def test_an_invalid_location_is_named(location: str) -> None:
    with pytest.raises(RunError, match=r"is not a Hub URL; write hf://OWNER/NAME or hf://OWNER/NAME@REVISION"):
        parse_hub_url(location)


def test_names_are_checked_as_by_the_hub() -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    names = [
        "me/x",
        "me/x.y",
        "me/x-y_z",
        "Me2/X",
        "me/.x",
        "me/-x",
        "me/x-",
        "me/x--y",
        "me/x..y",
        "me/x y",
        "me/x.git",
    ]
    names += ["me/" + "x" * 93, "me/" + "x" * 94, "me/x/y", "me", "me/"]
    for name in names:
        try:
            validate_repo_id(name)
            valid = "/" in name
        except HFValidationError:
            valid = False
        assert is_repo_name(name) <= valid, name
    assert all(is_repo_name(name) for name in ("me/x", "me/x.y", "me/x-y_z", "Me2/X", "me/" + "x" * 93))


def test_missing_repositories_and_files_are_named(hub: Hub) -> None:
    with pytest.raises(RunError, match="hf://me/none: was not found, or is private; check the name, and log in"):
        load_recipe("hf://me/none")
    with pytest.raises(RunError, match="hf://me/none: was not found, or is private"):
        evaluate_run("hf://me/none")
    with pytest.raises(RunError, match="hf://me/none: was not found, or is private"):
        weights_file("hf://me/none")


def test_a_repository_of_another_tool_has_no_recipe(hub: Hub, pushed: Path) -> None:
    del hub.repos["me/digits"].files["recipe.yaml"]
    with pytest.raises(RunError, match=r"hf://me/digits: recipe.yaml was not found; the repository was not pushed by"):
        load_recipe("hf://me/digits")
    hub.repos["me/digits"].versions = {hub.repos["me/digits"].sha: {"README.md": b"nothing"}}
    with pytest.raises(RunError, match=r"hf://me/digits: contains no model of hf_fasttrain \(hf_fast"):
        predict_images("hf://me/digits", ["x.png"])


def test_a_hub_that_does_not_answer_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(RunError, match="the Hub can't be reached and there is no local copy; check the network"):
        load_recipe("hf://me/x")


def test_the_command_line_reports_it_in_one_line(hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_status(["evaluate", "hf://me/none"]) == 2
    assert capsys.readouterr().err.startswith("error: hf://me/none: was not found, or is private")
    assert exit_status(["hf://nothing"]) == 2
    assert "write hf://OWNER/NAME" in capsys.readouterr().err
