"""Custom parts of a recipe: each trains like a plain loop with it, and a resumed run needs it again."""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from helpers.hub_server import Hub
from helpers.processes import reset_accelerate, run_processes
from helpers.runs import exit_status
from safetensors.torch import load_file
from torch import Tensor, nn

from hf_fasttrain import Trainer
from hf_fasttrain.data.loading.sampler import TRANSFORM_STREAM, keyed_rng
from hf_fasttrain.data.pixels.augment import EvalTransform
from hf_fasttrain.data.pixels.decode import read_pixels
from hf_fasttrain.data.pixels.resize import resize
from hf_fasttrain.data.source.dataset import load_source
from hf_fasttrain.hub.card import model_card
from hf_fasttrain.hub.push import hub_section
from hf_fasttrain.inference import evaluate_run
from hf_fasttrain.recipe.resolved import read_settings
from hf_fasttrain.run_folder.finished import read_run
from hf_fasttrain.utils.errors import DataError, ModelError, RunError, UserError

RECIPE = """
model: {name: test_vit}
data: {dataset: digits, image_size: 32, workers: 0, eval_fraction: 0.02, mean: [0.5], std: [0.25]}
train: {duration: 4 steps, batch_size: 12}
optimizer: {name: sgd, lr: 0.02, momentum: 0.9}
augment: {crop: center, flip: false}
checkpoint: {every: 2 steps}
log: {report: false, every: 1}
"""


@pytest.fixture
def recipe(write_recipe: Callable[..., Path]) -> Path:
    return write_recipe(RECIPE)


def build(recipe: Path, run: Path, *overrides: str, **options: Any) -> Trainer:
    reset_accelerate()
    return Trainer.from_recipe(recipe, [f"output_dir={run}", *overrides], **options)


def weights_of(trainer: Trainer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.raw_model.state_dict().items()}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], **({"rtol": 0.0, "atol": 0.0} | tolerance))


def batches_of(trainer: Trainer, stop: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the images and labels of steps."""
    for step in trainer.train_loader.steps(0, stop):
        images, labels = zip(*step.micro_batches, strict=True)
        yield torch.cat(images), torch.cat(labels)


def jitter(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random square of an image, brighter or darker; draws from each kind of generator."""
    top, left = rng.integers(0, 3, 2)
    factor = 0.5 + torch.rand(()).item() + 0.1 * np.random.rand()
    pixels[...] = np.clip(pixels * factor, 0, 255)  # in place, on its own copy
    return pixels[top : top + 24, left : left + 24]


def transformed_by_hand(epoch: int, index: int, repeat: int, seed: int = 0) -> np.ndarray:
    """Return the pixels of an image as a plain loop would compute them."""
    split = load_source("digits", eval_fraction=0.02).train
    rng = keyed_rng(seed, TRANSFORM_STREAM, epoch, index, repeat)
    common = int(rng.integers(2**32))
    np.random.seed(common)
    torch.manual_seed(common)
    pixels = EvalTransform(32, "bicubic", 1.0)(read_pixels(split.records([index])[0]))
    return resize(jitter(pixels.copy(), rng), (32, 32), "bicubic")


@pytest.mark.parametrize(
    "options", [["data.workers=0", "data.cache=none"], ["data.workers=2", "accelerate.micro_batch_size=4"]]
)
def test_a_transform_gives_the_pixels_of_a_plain_loop(recipe: Path, tmp_path: Path, options: list[str]) -> None:
    overrides = [*options, "augment.repeats=2", "data.interpolation=bicubic", "data.crop_pct=1.0"]
    trainer = build(recipe, tmp_path, *overrides, transform=jitter)
    states = torch.get_rng_state(), np.random.get_state()[1].tolist()
    plan = trainer.train_loader.sampling_plan
    seen: set[tuple[int, int]] = set()
    for number, (images, _) in enumerate(batches_of(trainer, 2)):
        keys = plan.plan(number).micro_batches
        rows = [(int(i), int(r)) for key in keys for i, r in zip(key.indices, key.repeats, strict=True)]
        expected = np.stack([transformed_by_hand(0, *row) for row in rows])
        pixels = torch.from_numpy(expected).permute(0, 3, 1, 2).float()
        torch.testing.assert_close(images, (pixels / 255 - 0.5) / 0.25, rtol=0, atol=1e-5)
        seen |= set(rows)
    assert {repeat for _, repeat in seen} == {0, 1}
    if options[0] == "data.workers=0":
        torch.set_rng_state(states[0])
        np.random.set_state(("MT19937", np.array(states[1], np.uint32), 624))


def test_a_transform_does_not_touch_the_generators_of_training(recipe: Path, tmp_path: Path) -> None:
    trainer = build(recipe, tmp_path, transform=jitter)
    np.random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist()
    next(batches_of(trainer, 1))
    assert torch.equal(before[0], torch.get_rng_state())
    assert before[1] == np.random.get_state()[1].tolist()


@pytest.mark.parametrize("cache", ["memory", "disk"])
def test_a_transform_does_not_depend_on_caches_workers_or_resuming(
    recipe: Path, tmp_path: Path, image_folder: Path, monkeypatch: pytest.MonkeyPatch, cache: str
) -> None:
    monkeypatch.setenv("HF_FASTTRAIN_CACHE", str(tmp_path / "pixels"))
    short_run = ["train.duration=6 steps", f"data.dataset={image_folder}"]  # three epochs
    plain = build(recipe, tmp_path / "plain", *short_run, "data.cache=none", transform=jitter)
    plain.fit()
    first = build(recipe, tmp_path / "run", *short_run, f"data.cache={cache}", "data.workers=2", transform=jitter)
    with first.running():
        for report in first.iterate():
            if report.step == 4:
                break
    second = build(
        recipe, tmp_path / "run", *short_run, f"data.cache={cache}", "data.workers=1", transform=jitter, resume=True
    )
    assert second.state.step == 4
    second.fit()
    assert_same(weights_of(plain), weights_of(second))


def failing(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    if rng.random() < 0.3:
        raise IndexError("no such corner")
    return pixels


def floats(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    return pixels.astype(np.float32) / 255


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (failing, r"transform=\S*test_custom.failing failed for row \d+ of split 'train': IndexError: no such corner"),
        (floats, r"transform=\S*floats returned float32 \(32, 32, 3\) for row .*uint8 \(S, S, 3\)"),
        (lambda pixels, rng: pixels[:20], r"transform=\S*: lambda .* returned uint8 \(20, 32, 3\)"),
        (lambda pixels, rng: None, "returned a NoneType for row"),
    ],
)
def test_a_transform_that_fails_is_one_message(
    recipe: Path, tmp_path: Path, transform: Any, message: str, workers: int
) -> None:
    trainer = build(recipe, tmp_path, f"data.workers={workers}", transform=transform)
    with pytest.raises(RunError, match=message) as raised:
        trainer.fit()
    assert "Traceback" not in str(raised.value)


def test_the_message_has_the_path_of_the_image(recipe: Path, tmp_path: Path, image_folder: Path) -> None:
    trainer = build(recipe, tmp_path / "run", f"data.dataset={image_folder}", transform=floats)
    with pytest.raises(RunError, match=r"row \d+ of split 'train' \(.*\.(jpg|png)\)"):
        trainer.fit()


def test_a_transform_that_cannot_be_sent_to_loader_processes_is_refused(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    method = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method("spawn", force=True)
    try:
        with pytest.raises(RunError, match="can't be sent to loader processes, which are started by 'spawn' here"):
            build(recipe, tmp_path / "run", "data.workers=1", transform=lambda pixels, rng: pixels)
        build(recipe, tmp_path / "other", "data.workers=0", transform=lambda pixels, rng: pixels)
    finally:
        torch.multiprocessing.set_start_method(method, force=True)


def test_a_transform_does_not_run_on_the_device(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"data.cache=device: transform=.*jitter runs in loader processes"):
        build(recipe, tmp_path, "data.cache=device", transform=jitter)


def plain_loop(
    trainer: Trainer, make: Callable[[list], torch.optim.Optimizer], factors: list[float]
) -> dict[str, Tensor]:
    """Return the weights after training by a plain loop of five lines."""
    model, lr = trainer.raw_model, 0.02
    optimizer = make(trainer.optimizer.param_groups)
    for (images, labels), factor in zip(batches_of(trainer, len(factors)), factors, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = lr * group["lr_scale"] * factor
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()
    return weights_of(trainer)


def rmsprop(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.RMSprop(groups, momentum=0.5)


def slow_sgd(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, momentum=0.5)


def falling(num_steps: int) -> Callable[[int], float]:
    return lambda update: 1 - update / num_steps


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_an_optimizer_and_a_schedule_train_as_in_a_plain_loop(recipe: Path, tmp_path: Path, micro_batches: int) -> None:
    overrides = [f"accelerate.gradient_accumulation_steps={micro_batches}", "optimizer.backbone_lr_scale=0.5"]
    plain_run = build(recipe, tmp_path / "plain", *overrides, optimizer=slow_sgd)
    expected = plain_loop(plain_run, slow_sgd, [1.0, 0.75, 0.5, 0.25])
    trainer = build(recipe, tmp_path / "run", *overrides, optimizer=slow_sgd, schedule=falling)
    assert {group["momentum"] for group in trainer.optimizer.param_groups} == {0.5}
    scales = {(group["lr_scale"], group["weight_decay"]) for group in trainer.optimizer.param_groups}
    assert scales == {(1.0, 0.05), (1.0, 0.0), (0.5, 0.05), (0.5, 0.0)}
    trainer.fit()
    assert_same(expected, weights_of(trainer), rtol=1e-4, atol=1e-5)
    assert json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[0])["lr"] == 0.02


def test_an_optimizer_may_set_its_own_learning_rates(recipe: Path, tmp_path: Path) -> None:
    def own(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
        parameters = [parameter for group in groups for parameter in group["params"]]
        return torch.optim.SGD([{"params": parameters[:3], "lr": 0.1}, {"params": parameters[3:], "lr": 0.3}])

    trainer = build(recipe, tmp_path, "schedule.name=constant", optimizer=own)
    trainer.fit()
    assert trainer.lr == 0.1
    assert [group["lr"] for group in trainer.optimizer.param_groups] == pytest.approx([0.1, 0.3])
    assert "optimizer.lr=0.02 has no effect: optimizer=" in "\n".join(trainer.log.notes)


def small_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 6, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 10))


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_a_model_trains_as_in_a_plain_loop(recipe: Path, tmp_path: Path, micro_batches: int) -> None:
    overrides = [f"accelerate.gradient_accumulation_steps={micro_batches}", "schedule.name=constant"]
    trainer = build(recipe, tmp_path / "run", *overrides, model=small_net(), optimizer=slow_sgd)
    plain_run = build(recipe, tmp_path / "plain", *overrides, model=small_net(), optimizer=slow_sgd)
    expected = plain_loop(plain_run, slow_sgd, [1.0] * 4)
    trainer.fit()
    assert_same(expected, weights_of(trainer), rtol=1e-4, atol=1e-5)


def test_the_head_of_a_model_is_found_by_its_outputs(recipe: Path, tmp_path: Path) -> None:
    trainer = build(recipe, tmp_path, "optimizer.backbone_lr_scale=0.1", model=small_net())
    scales = {id(p): group["lr_scale"] for group in trainer.optimizer.param_groups for p in group["params"]}
    assert [scales[id(p)] for p in trainer.raw_model.parameters()] == [0.1, 0.1, 1.0, 1.0]


def test_a_timm_model_passed_as_an_object_can_be_evaluated_by_name(recipe: Path, tmp_path: Path) -> None:
    by_name = build(recipe, tmp_path / "name")
    by_name.fit()
    torch.manual_seed(0)
    passed = build(recipe, tmp_path / "run", model=timm.create_model("test_vit", num_classes=10, img_size=32))
    passed.fit()
    assert_same(weights_of(by_name), weights_of(passed))
    assert evaluate_run(tmp_path / "run")["accuracy"] == evaluate_run(tmp_path / "name")["accuracy"]


def test_a_custom_model_is_passed_again_to_use_its_run(
    recipe: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = build(recipe, tmp_path, "data.mean=auto", model=small_net())
    trainer.fit()
    assert "ImageNet's values are used for data.mean, data.interpolation, data.crop_pct" in "\n".join(trainer.log.notes)
    with pytest.raises(ModelError, match=r"code \(torch.nn.modules.container.Sequential\), .* pass the model, --model"):
        evaluate_run(tmp_path)
    reset_accelerate()
    measured = evaluate_run(tmp_path, model=small_net)
    assert measured["accuracy"] == json.loads((tmp_path / "result.json").read_text())["metrics"]["accuracy"]
    assert measured["num_images"] == len(load_source("digits", eval_fraction=0.02).evaluation)
    source = f"import torch\nfrom torch import nn\n\n{inspect.getsource(small_net)}"
    (tmp_path / "custom_model_of_a_test.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    model = ["--model", "custom_model_of_a_test:small_net"]
    for weights in ([], ["--weights", "step_2"]):
        assert exit_status(["export", str(tmp_path), "--output", f"exported{len(weights)}", *weights, *model]) == 0
        assert exit_status(["push", str(tmp_path), f"me/digits{len(weights)}", *weights, *model]) == 0
    assert exit_status(["export", str(tmp_path), *model]) == 0  # into the run's own folder, which is used on
    reset_accelerate()
    assert evaluate_run(tmp_path, model=small_net)["accuracy"] == measured["accuracy"]
    assert hub_section(tmp_path, small_net) == {}
    recipe_file = tmp_path / "recipe.yaml"
    recipe_file.write_text(recipe_file.read_text() + "hub: {repo: me/named}\n")
    assert hub_section(tmp_path, small_net) == {"repo": "me/named"}
    saved = trainer.raw_model.state_dict()
    assert_same(saved, load_file("exported0/model.safetensors"))
    assert not torch.equal(saved["4.bias"], load_file("exported2/model.safetensors")["4.bias"])
    for number in (0, 2):
        pushed = hub.repos[f"me/digits{number}"].files
        assert pushed["model.safetensors"] == Path(f"exported{number}/model.safetensors").read_bytes()
        assert b"duration: 4 steps" in pushed["recipe.yaml"]
        assert b"`custom_model_of_a_test:small_net` for 32 px images and 10 classes" in pushed["README.md"]
        assert b"model.load_state_dict(load_file(hf_hub_download" in pushed["README.md"]


def first_four(model: nn.Module, images: Tensor) -> Tensor:
    return model(images)[:, :4]


def twice(model: nn.Module, images: Tensor) -> tuple[Tensor, Tensor]:
    return model(images), model(images)


def of_no_such_head(model: nn.Module, images: Tensor) -> Tensor:
    return model.head2(images)  # type: ignore[operator]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(3072, 7))}, r"returns logits of shape \(1, 7\) .* 10 classes"),
        ({"model": nn.Sequential(nn.Flatten(), nn.Linear(5, 10))}, "failed for an image of 32 px: RuntimeError"),
        (
            {"model": small_net(), "predict": first_four},
            r"predict=.*first_four: returns logits .* 10 classes, so return logits \(B, 10\) from it",
        ),
        (
            {"model": small_net(), "predict": twice},
            r"predict=.*twice: returns a tuple of 2 \(Tensor, Tensor\) .* so return logits \(B, 10\) from it",
        ),
        (
            {"model": small_net(), "predict": of_no_such_head},
            "predict=.*of_no_such_head: failed for an image of 32 px: AttributeError",
        ),
        ({"model": "resnet18"}, "model: must be a torch.nn.Module, got a str"),
        (
            {"optimizer": torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1)},
            "optimizer: must be a function, got a SGD",
        ),
        ({"optimizer": lambda groups: 3}, "returned a int"),
        ({"schedule": lambda num_steps: 0.5}, "a function of the number of steps that returns a function"),
        ({"schedule": lambda num_steps: lambda update: float("nan")}, "returns nan for the first"),
        ({"metrics": [len]}, "metrics: must be a dict of functions by name"),
        ({"sample_weights": [1.0, 2.0]}, r"sample_weights: shape \(2,\), but split 'train' has"),
        ({"sample_weights": lambda labels: -1.0 * labels}, "must be finite, at least 0"),
        ({"sample_weights": "balanced"}, "must be numbers or a function of labels, got a str"),
        ({"transfrom": jitter}, "transfrom"),
    ],
)
def test_a_wrong_part_is_one_message(recipe: Path, tmp_path: Path, parts: dict[str, Any], message: str) -> None:
    with pytest.raises((UserError, TypeError), match=message):
        build(recipe, tmp_path / "run", **parts)


def mostly_threes(labels: np.ndarray) -> np.ndarray:
    return np.where(labels == 3, 8.0, 1.0)


def fit_weighted(recipe: Path, folder: Path) -> tuple[dict[str, Tensor], list[int]]:
    trainer = build(recipe, folder, "train.duration=3 steps", sample_weights=mostly_threes)
    labels = [
        label for step in trainer.train_loader.steps(0, 30) for _, t in step.micro_batches for label in t.tolist()
    ]
    trainer.fit()
    return weights_of(trainer), labels


def test_weighted_samples_are_the_same_with_one_and_two_processes(recipe: Path, tmp_path: Path) -> None:
    single, labels = fit_weighted(recipe, tmp_path / "one")
    (first, some), (second, others) = run_processes(fit_weighted, recipe, tmp_path / "two")
    assert sorted(labels) == sorted(some + others)
    assert 0.3 < labels.count(3) / len(labels) < 0.6  # 8 of 17
    assert_same(first, second)
    assert_same(single, first, rtol=1e-4, atol=1e-5)


def test_weights_of_the_complete_dataset_are_reduced_to_its_training_part(recipe: Path, tmp_path: Path) -> None:
    labels = np.zeros(len(load_source("digits", eval_fraction=0.02).train.images))
    labels[::7] = 1.0
    trainer = build(recipe, tmp_path, sample_weights=labels)
    rows = load_source("digits", eval_fraction=0.02).train.rows
    assert rows is not None
    sampled = {int(row) for step in range(20) for row in rows[trainer.train_loader.image_indices(step)]}
    assert {row % 7 for row in sampled} == {0}


@pytest.mark.parametrize(("sampling", "shares"), [("balanced", [1 / 2, 1 / 2]), ("sqrt", [3 / 4, 1 / 4])])
def test_sampling_by_class(recipe: Path, tmp_path: Path, sampling: str, shares: list[float]) -> None:
    import datasets

    records = load_source("digits").train.records(range(200))
    columns = {"image": [{"bytes": bytes(one["bytes"])} for one in records], "label": [0] * 180 + [1] * 20}
    images = datasets.Dataset.from_dict(columns).cast_column("image", datasets.Image())
    dataset = datasets.DatasetDict(train=images, validation=images)
    trainer = build(recipe, tmp_path, f"train.sampling={sampling}", dataset=dataset)
    labels = np.array([0] * 180 + [1] * 20)
    sampled = np.concatenate([labels[trainer.train_loader.image_indices(step)] for step in range(400)])
    assert np.bincount(sampled) / len(sampled) == pytest.approx(shares, abs=0.03)


def slower(num_steps: int, power: int = 1) -> Callable[[int], float]:
    return lambda update: (1 - update / num_steps) ** power


def with_temperature(model: nn.Module, images: Tensor, labels: Tensor, at: Any) -> Tensor:
    return F.cross_entropy(2 * model(images), labels)


class LossWithState(nn.Module):
    """A step loss with a parameter, which a resumed run restores."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor, at: Any) -> Tensor:
        return F.cross_entropy(self.scale * model(images), labels)


PARTS: dict[str, tuple[Any, Any]] = {
    "transform": (jitter, failing),
    "optimizer": (rmsprop, lambda groups: rmsprop(groups)),
    "schedule": (functools.partial(slower, power=1), functools.partial(slower, power=2)),
    "sample_weights": (mostly_threes, np.arange(1761.0) + 1),
    "step_loss": (LossWithState(), with_temperature),
    "model": (small_net(), nn.Sequential(nn.Flatten(), nn.Linear(3072, 10))),
}


@pytest.mark.parametrize("part", PARTS)
def test_a_resumed_run_needs_the_same_part(recipe: Path, tmp_path: Path, part: str, capsys: Any) -> None:
    ours, other = PARTS[part]
    trainer = build(recipe, tmp_path / "run", "train.duration=2 steps", **{part: ours})
    trainer.fit()
    name = read_settings(tmp_path / "run")[f"custom.{part}"].value
    longer = [recipe, tmp_path / "run", "train.duration=3 steps"]
    with pytest.raises(RunError, match=rf"{part}: .* in the run, not passed now\n.*resume=True, {part}=\.\.\."):
        build(*longer, resume=True)
    with pytest.raises(RunError, match=rf"{part}: .* in the run, .* now") as raised:
        build(*longer, resume=True, **{part: other})
    assert name in str(raised.value)
    status = exit_status(["train", str(recipe), f"output_dir={tmp_path / 'run'}", "--resume"])
    assert status == 2
    assert (
        f"in Python, with the same parts: Trainer.from_recipe(..., resume=True, {part}=...)" in capsys.readouterr().err
    )
    resumed = build(*longer, resume=True, **{part: ours})
    assert resumed.fit().steps == 3


def test_a_part_that_the_run_did_not_start_with_is_refused(recipe: Path, tmp_path: Path) -> None:
    build(recipe, tmp_path / "run", "train.duration=2 steps").fit()
    with pytest.raises(RunError, match=r"transform: not passed in the run, .*jitter now\nLeave transform out"):
        build(recipe, tmp_path / "run", "train.duration=3 steps", resume=True, transform=jitter)


def test_a_run_killed_before_its_first_checkpoint_starts_again_with_the_same_parts(
    recipe: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    build(recipe, run, transform=jitter)  # which writes resolved.yaml
    with pytest.raises(RunError, match=r"transform: .*jitter in the run, not passed now"):
        build(recipe, run, resume=True)
    (run / "resolved.yaml").unlink()
    assert build(recipe, run, resume=True, transform=jitter).state.step == 0


def test_settings_without_effect_are_reported_once(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    text = RECIPE.replace("flip: false", "flip: false, erase: 0.5, mixup: 0.2, color_jitter: {hue: 0.1}")
    trainer = build(write_recipe(text), tmp_path, "schedule.warmup=1 steps", transform=jitter, schedule=falling)
    notes = [note for note in trainer.log.notes if "no effect with" in note]
    assert [note.partition(": ")[2] for note in notes] == [
        "schedule.warmup",
        "augment.color_jitter.hue, augment.erase, augment.flip",
    ]


def with_hint(model: nn.Module, images: Tensor, labels: Tensor, at: Any) -> tuple[Tensor, dict[str, Tensor]]:
    logits = model(images)
    hint = logits.square().mean(1).mean() * at.step
    return F.cross_entropy(logits, labels) + 0.1 * hint, {"hint": hint}


def consistent(model: nn.Module, images: Tensor, labels: Tensor, at: Any) -> Tensor:
    """Return the cross-entropy of the first of two views, plus the distance of the second from it."""
    assert images.ndim == 5
    first, second = model(images[:, 0]), model(images[:, 1])
    return F.cross_entropy(first, labels) + (first - second).square().mean(1).mean()


class Margin(nn.Module):
    """Cross-entropy of logits, with a learnt bias for each class."""

    def __init__(self) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.linspace(-1, 1, 10))

    def forward(self, model: nn.Module, images: Tensor, labels: Tensor, at: Any) -> Tensor:
        return F.cross_entropy(model(images) + self.bias, labels)


def by_hand(trainer: Trainer, step_loss: Any, steps: int) -> dict[str, Tensor]:
    """Return the weights after training by a plain loop over complete batches."""
    for number, (images, labels) in enumerate(batches_of(trainer, steps), start=1):
        trainer.optimizer.zero_grad()
        returned = step_loss(trainer.raw_model, images, labels, SimpleNamespace(step=number))
        (returned[0] if isinstance(returned, tuple) else returned).backward()
        trainer.optimizer.step()
    return weights_of(trainer)


LOSSES = {"hint": (with_hint, 1), "views": (consistent, 2), "margin": (Margin, 1)}


def loss_of(name: str) -> tuple[Any, list[str]]:
    step_loss, views = LOSSES[name]
    overrides = [f"data.views={views}", "schedule.name=constant", "augment.flip=true"]
    return step_loss() if isinstance(step_loss, type) else step_loss, overrides


@pytest.mark.parametrize("micro_batches", [1, 3])
@pytest.mark.parametrize("name", LOSSES)
def test_a_step_loss_trains_as_in_a_plain_loop(recipe: Path, tmp_path: Path, name: str, micro_batches: int) -> None:
    step_loss, overrides = loss_of(name)
    overrides.append(f"accelerate.gradient_accumulation_steps={micro_batches}")
    plain_loss, _ = loss_of(name)
    expected = by_hand(build(recipe, tmp_path / "plain", *overrides, step_loss=plain_loss), plain_loss, 4)
    trainer = build(recipe, tmp_path / "run", *overrides, step_loss=step_loss)
    trainer.fit()
    assert_same(expected, weights_of(trainer), rtol=1e-4, atol=1e-5)
    if name == "margin":
        torch.testing.assert_close(step_loss.bias, plain_loss.bias, rtol=1e-4, atol=1e-5)
        assert not torch.equal(step_loss.bias, Margin().bias)
    if name == "hint":
        assert "train/hint" in (tmp_path / "run/metrics.jsonl").read_text() or "hint" in json.loads(
            (tmp_path / "run/metrics.jsonl").read_text().splitlines()[0]
        )


def fit_unequal_shares(name: str, recipe: Path, folder: Path) -> dict[str, Tensor]:
    """Train on steps of 13, 13, 1 and 13 images."""
    step_loss, overrides = loss_of(name)
    overrides += ["data.workers=1", "train.batch_size=13", "train.max_images=27", "accelerate.micro_batch_size=4"]
    trainer = build(recipe, folder, *overrides, step_loss=step_loss)
    trainer.fit()
    return weights_of(trainer) | (step_loss.state_dict() if isinstance(step_loss, nn.Module) else {})


@pytest.mark.parametrize("name", ["views", "margin"])
def test_one_and_two_processes_with_unequal_shares_train_alike(recipe: Path, tmp_path: Path, name: str) -> None:
    single = fit_unequal_shares(name, recipe, tmp_path / "one")
    first, second = run_processes(fit_unequal_shares, name, recipe, tmp_path / "two")
    assert_same(first, second)
    assert_same(single, first, rtol=1e-4, atol=1e-5)


def features_net() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(3, 6, 5, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(24, 7))


def self_supervised(model: nn.Module, images: Tensor, labels: Tensor, at: Any) -> Tensor:
    """Return how unlike the features of two views are."""
    first, second = model(images[:, 0]), model(images[:, 1])
    return -F.cosine_similarity(first, second.detach()).mean()


def test_a_model_without_class_logits_is_trained_without_evaluations(recipe: Path, tmp_path: Path, capsys: Any) -> None:
    views = ["data.views=2", "augment.flip=true"]
    with pytest.raises(ModelError, match=r"\(1, 7\) .*evaluate.every=never trains without evaluations"):
        build(recipe, tmp_path / "no", *views, model=features_net(), step_loss=self_supervised)
    overrides = [*views, "evaluate.every=never", "log.report=true", "train.duration=6 steps"]
    parts: dict[str, Any] = {"model": features_net(), "step_loss": self_supervised}
    first = build(recipe, tmp_path / "run", *overrides, **parts)
    with first.running():
        next(report for report in first.iterate() if report.step == 4)
    second = build(recipe, tmp_path / "run", *overrides, **parts, resume=True)
    assert second.state.step == 4
    result = second.fit()
    assert (result.steps, result.metrics, result.best, result.model["weights"]) == (6, {}, None, "last")
    assert (tmp_path / "run/report.html").is_file()
    assert load_file(tmp_path / "run/model/model.safetensors")["4.weight"].shape == (7, 24)
    assert "held out, though evaluate.every is never" in capsys.readouterr().out
    everything = build(recipe, tmp_path / "all", *overrides, "data.eval_fraction=0", **parts)
    assert everything.train_loader.steps_per_epoch > second.train_loader.steps_per_epoch
    everything.fit()
    resumed = build(recipe, tmp_path / "all", *overrides, "data.eval_fraction=0", **parts, resume=True)
    assert resumed.is_finished
    with pytest.raises(DataError, match=r"data.eval_fraction is 0, .* Set evaluate.every=never"):
        build(recipe, tmp_path / "no", "data.eval_fraction=0")
    with pytest.raises(RunError, match=r"metrics and predict: evaluate.every is never, and only evaluations use them"):
        build(recipe, tmp_path / "no", *overrides, **parts, metrics={"margin": mean_margin}, predict=mirrored_too)
    with pytest.raises(RunError, match=r"returns \(1, 7\) for an image instead of \(1, 10\) logits"):
        evaluate_run(tmp_path / "run", model=features_net)


def test_the_optimizer_trains_the_module_of_a_bound_method(recipe: Path, tmp_path: Path) -> None:
    loss = Margin()
    trainer = build(recipe, tmp_path, step_loss=loss.forward)
    assert any(p is loss.bias for group in trainer.optimizer.param_groups for p in group["params"])


def test_views_without_a_step_loss_are_refused(recipe: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"data.views=2: images are \(B, V, 3, H, W\).*pass step_loss"):
        build(recipe, tmp_path, "data.views=2")


def test_the_report_of_a_run_with_views_shows_the_training_images(recipe: Path, tmp_path: Path) -> None:
    step_loss, overrides = loss_of("views")
    build(recipe, tmp_path, *overrides, "log.report=true", step_loss=step_loss, transform=jitter).fit()
    assert len(list((tmp_path / "report").rglob("training_*.jpg"))) > 0


def mean_margin(logits: Tensor, labels: Tensor) -> float:
    """Return how far the label's logit is above the mean of all, averaged over the images."""
    return float((logits.gather(1, labels[:, None])[:, 0] - logits.mean(1)).mean())


def mirrored_too(model: nn.Module, images: Tensor) -> Tensor:
    return (model(images) + model(images.flip(-1))) / 2


def test_metrics_and_predict_choose_the_best_checkpoint(recipe: Path, tmp_path: Path) -> None:
    overrides = ["checkpoint.best.metric=margin", "checkpoint.best.mode=max", "evaluate.every=2 steps"]
    trainer = build(recipe, tmp_path, *overrides, metrics={"margin": mean_margin}, predict=mirrored_too)
    result = trainer.fit()
    with torch.no_grad():
        model = trainer.raw_model.eval()
        pairs = [(mirrored_too(model, images), labels) for images, labels in trainer.evaluation.eval_loader]  # type: ignore[union-attr]
    logits, labels = (torch.cat(column) for column in zip(*pairs, strict=True))
    assert result.metrics["margin"] == pytest.approx(mean_margin(logits, labels), abs=1e-5)
    assert result.best["metric"] == "margin"  # type: ignore[index]
    with pytest.raises(UserError, match=r"checkpoint.best.metric is 'margin'.* Trainer.from_recipe\(..., metrics="):
        build(recipe, tmp_path / "without", *overrides)
    reset_accelerate()
    assert "margin" not in evaluate_run(tmp_path)


def test_the_card_names_the_parts_and_claims_no_other_model(recipe: Path, tmp_path: Path) -> None:
    build(recipe, tmp_path, "train.duration=2 steps", model=small_net(), transform=jitter).fit()
    run = read_run(tmp_path)
    assert run.passed["transform"] == f"{__name__}.jitter"
    card = model_card(run, run.recipe, "me/digits", {"recipe.yaml": run.recipe_text.encode()})
    assert "parts of its own, which are not here: `model=torch.nn.modules.container.Sequential (4 tensors" in card
    assert "accelerate launch" not in card
    assert "base_model" not in card
