"""Distillation in a recipe: any teacher, exact with every way to run, and clear messages."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from helpers.callbacks import stop_before
from helpers.processes import reset_accelerate, run_processes
from helpers.runs import RECIPE, exit_status, weights
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from hf_fasttrain import RunError, Trainer
from hf_fasttrain.from_recipe.source_from import local_settings
from hf_fasttrain.models.model import IMAGENET_MEAN, ModelSpec, Preprocessing, build_model
from hf_fasttrain.models.saved import save_model
from hf_fasttrain.models.teacher import load_teacher
from hf_fasttrain.recipe.load import load_recipe
from hf_fasttrain.run_folder.checkpoint import complete_checkpoints, load_checkpoint
from hf_fasttrain.utils.errors import ModelError

ORDER = [3, 1, 0, 2, 9, 8, 7, 6, 5, 4]  # of the digits among the teacher's classes
EXACT = ["model.name=test_vit", "optimizer.name=sgd", "optimizer.lr=0.05", "augment.mixup=0.5", "augment.cutmix=0.5"]
EXACT += ["data.eval_fraction=0.05", "log.every=1", "checkpoint.every=2 steps", "train.duration=5 steps"]
HALF = (0.5, 0.5, 0.5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the model folder of a network for digits in another order, of other pixels and another size."""
    folder = tmp_path_factory.mktemp("teacher") / "model"
    names = [""] * 10
    for digit, column in enumerate(ORDER):
        names[column] = str(digit)
    pre = Preprocessing(40, mean=HALF, std=HALF)
    spec = ModelSpec("test_resnet", names, 40, preprocessing=pre)
    torch.manual_seed(1)
    model = build_model(spec)
    nn.init.normal_(model.get_classifier().weight)  # type: ignore[operator]
    save_model(model, spec, folder)
    return folder


def make(recipe: Path, run: Path, *overrides: str, **options: Any) -> Trainer:
    reset_accelerate()
    return Trainer.from_recipe(recipe, [*EXACT, f"output_dir={run}", *overrides], **options)


def by_hand(teacher: Path) -> Callable[..., Tensor]:
    """Return the step loss as a user would write it."""
    model = load_teacher(str(teacher), [str(digit) for digit in range(10)], multi_label=False).model

    def step_loss(student: nn.Module, images: Tensor, targets: Tensor, at: Any) -> Tensor:
        mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, (0.229, 0.224, 0.225)))
        pixels = F.interpolate(images * std + mean, (40, 40), mode="bilinear", antialias=True)
        with torch.no_grad():
            wanted = (model((pixels - 0.5) / 0.5)[:, ORDER] / 3).softmax(1)
        logits = student(images)
        divergence = 9 * (wanted * (wanted.log() - (logits / 3).log_softmax(1))).sum(1).mean()
        return 0.2 * F.cross_entropy(logits, targets) + 0.8 * divergence

    return step_loss


def require_close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    for name, value in other.items():
        torch.testing.assert_close(one[name], value, rtol=1e-5, atol=2e-6)


def fit(recipe: str, run: str, *overrides: str) -> None:
    make(Path(recipe), Path(run), *overrides).fit()


def test_a_recipe_trains_as_a_step_loss_by_hand_also_in_micro_batches_of_two_processes(
    teacher: Path, write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe, distill = write_recipe(), f"distill={{teacher: {teacher}, weight: 0.8, temperature: 3}}"
    mean = ["data.mean=[0.485, 0.456, 0.406]", "data.std=[0.229, 0.224, 0.225]", "train.duration=3 steps"]
    make(recipe, tmp_path / "hand", *mean, step_loss=by_hand(teacher)).fit()
    trainer = make(recipe, tmp_path / "one", *mean, distill)
    trainer.fit()
    require_close(weights(tmp_path / "one"), weights(tmp_path / "hand"))
    assert f"crops of 32 px are resized to 40 px for {teacher}, its own image size" in capsys.readouterr().out
    assert '"distillation_loss"' in (tmp_path / "one/metrics.jsonl").read_text()
    files = {
        name for path in complete_checkpoints(tmp_path / "one/checkpoints") for name in load_checkpoint(path).weights
    }
    assert files == {"model"}  # not the teacher
    run_processes(fit, str(recipe), str(tmp_path / "two"), *mean, distill, "accelerate.micro_batch_size=6")
    require_close(weights(tmp_path / "two"), weights(tmp_path / "hand"))


@pytest.fixture(scope="module")
def finished(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run, which no test may change."""
    folder = tmp_path_factory.mktemp("finished")
    (folder / "small.yaml").write_text(RECIPE)
    make(folder / "small.yaml", folder / "run", "ema=true", f"distill={{teacher: {teacher}}}").fit()
    return folder / "run"


def test_a_run_resumes_bitwise_with_the_same_teacher_only(
    finished: Path, teacher: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    recipe, ema = write_recipe(), ["ema=true"]
    stop_before(make(recipe, tmp_path / "cut", *ema, f"distill={{teacher: {teacher}}}"), 3)
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    moved = make(recipe, tmp_path / "cut", *ema, f"distill={{teacher: {other}}}", resume=True)
    assert moved.state.step == 2
    moved.fit()
    for name, value in weights(finished).items():
        assert torch.equal(weights(tmp_path / "cut")[name], value), name
    tensors = load_file(other / "model.safetensors")
    next(tensor for tensor in tensors.values() if tensor.is_floating_point()).add_(1e-3)
    save_file(tensors, other / "model.safetensors")
    with pytest.raises(RunError, match=r"(?s)distill.teacher: 'test_resnet, \w+' in the run, 'test_resnet, \w+' now"):
        make(recipe, tmp_path / "cut", *ema, f"distill={{teacher: {other}}}", resume=True)
    with pytest.raises(RunError, match=r"(?s)distill.weight: 0.5 in the run, None now"):
        make(recipe, tmp_path / "cut", *ema, resume=True)


def test_memory_that_runs_out_in_the_teacher_is_retried(
    finished: Path, teacher: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    trainer = make(write_recipe(), tmp_path / "short", "ema=true", f"distill={{teacher: {teacher}}}")

    def look(module: nn.Module, args: tuple[Tensor]) -> None:
        if len(args[0]) > 8 and not torch.is_inference_mode_enabled():
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    step_loss: Any = trainer.step.accumulation.step_loss
    step_loss.teacher.model.register_forward_pre_hook(look)
    assert trainer.fit().micro_batch_size == 8
    require_close(weights(tmp_path / "short"), weights(finished))


def test_a_published_teacher_is_matched_by_the_names_of_imagenet(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name))
    assert load_teacher("test_vit", ["n01443537", "n01440764"], multi_label=False).columns == [1, 0]
    assert load_teacher("timm/test_vit", ["goldfish, Carassius auratus"], multi_label=False).columns == [1]
    with pytest.raises(
        ModelError, match=r"does not know 1 of the 2 classes of the data \(crane\)"
    ):  # a bird, a machine
        load_teacher("test_vit", ["tench, Tinca tinca", "crane"], multi_label=False)


def test_a_teacher_of_other_classes_or_labels_is_one_message(teacher: Path) -> None:
    with pytest.raises(ModelError, match=r"does not know 2 of the 3 classes of the data \(cat, dog\); it knows 2, 1"):
        load_teacher(str(teacher), ["1", "cat", "dog"], multi_label=False)
    with pytest.raises(ModelError, match="was trained for one label per image, and the data have several"):
        load_teacher(str(teacher), ["1"], multi_label=True)
    spelled = load_teacher(str(teacher), ["07", "1"], multi_label=False)
    assert spelled.columns == [ORDER[7], ORDER[1]]


@pytest.mark.parametrize(
    ("location", "message"),
    [
        ("runs/nowhere", "distill.teacher: there is no folder runs/nowhere. Allowed are a run folder, hf://"),
        ("test_resnett", "'test_resnett' is neither a folder nor in timm. Did you mean 'test_resnet'? Allowed are"),
        ("vit_tiny_patch16_18", "Did you mean"),
        (".", "distill.teacher: .: contains no model; give the folder of a finished run"),
        ("hf://me", "distill.teacher: 'hf://me' is not a Hub URL; write hf://OWNER/NAME"),
        ("test_vit", "distill.teacher: the published weights of test_vit could not be downloaded"),
    ],
)
def test_what_is_no_teacher_is_one_message(
    location: str,
    message: str,
    write_recipe: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert exit_status(["check", str(write_recipe()), f"distill={{teacher: '{location}'}}"]) == 2
    assert message in capsys.readouterr().err


def test_a_model_of_own_code_and_a_step_loss_are_refused(
    teacher: Path, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    own = tmp_path / "own"
    shutil.copytree(teacher, own)
    (own / "hf_fasttrain.json").write_text(
        (own / "hf_fasttrain.json").read_text().replace('"test_resnet"', '"own:mine.Network"')
    )
    with pytest.raises(ModelError, match="was built by your own code"):
        load_teacher(str(own), ["1"], multi_label=False)
    with pytest.raises(RunError, match=r"distill: has no effect with step_loss=.*by_hand"):
        make(write_recipe(), tmp_path / "run", f"distill={{teacher: {teacher}}}", step_loss=by_hand(teacher))


def test_the_recipe_of_a_pushed_run_does_not_contain_the_path_of_its_teacher(
    teacher: Path, write_recipe: Callable[..., Path]
) -> None:
    recipe = load_recipe(write_recipe(RECIPE), [f"distill={{teacher: {teacher}}}"])
    assert local_settings(recipe, None) == ["distill.teacher"]
