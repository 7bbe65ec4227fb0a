"""The trainer's guarantees: resume, early stopping, moving average, precision, files."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import reset_accelerate, run_processes
from helpers.runs import weights
from ruamel.yaml import YAML
from torch import Tensor, nn

from hf_fasttrain import Trainer, Watch, load_recipe
from hf_fasttrain.data.loading.loader import Step
from hf_fasttrain.run_folder.checkpoint import complete_checkpoints
from hf_fasttrain.train.ema import Ema
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.utils.errors import RunError

SMALL = [
    "data.eval_fraction=0.05",
    "augment.mixup=0.5",
    "model.drop_path=0.1",
    "ema={decay: 0.9}",
    "accelerate.gradient_accumulation_steps=2",
    "log.every=1",
]


def make(write_recipe: Callable[..., Path], output_dir: Path, *overrides: str, resume: bool = False) -> Trainer:
    reset_accelerate()
    return Trainer.from_recipe(write_recipe(), [*SMALL, f"output_dir={output_dir}", *overrides], resume=resume)


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_a_run_folder_is_complete(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    result = make(write_recipe, run, "train.duration=4 steps", "evaluate.every=2 steps", "log.report=true").fit()
    assert {path.name for path in run.iterdir()} == {
        "recipe.yaml", "resolved.yaml", "metrics.jsonl", "result.json", "checkpoints", "model",
        "predictions.safetensors", "report", "report.html",
    }  # fmt: skip
    written = json.loads((run / "result.json").read_text())
    keys = {"metrics", "steps", "images", "train_seconds", "images_per_second", "data_wait_fraction"}
    assert keys | {"peak_memory_bytes", "machine", "versions"} <= written.keys()
    assert written["metrics"] == result.metrics
    assert written["steps"] == 4
    assert written["images"] == 64
    assert 0 <= written["data_wait_fraction"] <= 1
    assert [line["step"] for line in lines(run) if line["kind"] == "train"] == [1, 2, 3, 4]
    assert [line["step"] for line in lines(run) if line["kind"] == "evaluation"] == [2, 4]
    reloaded = load_recipe(run / "recipe.yaml")
    assert reloaded.train.duration.count == 4
    assert "no GPU" in (run / "resolved.yaml").read_text()


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_weights_are_bitwise_those_of_an_uninterrupted_run(
    workers: int, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    options = ["train.duration=6 steps", "checkpoint.every=2 steps", f"data.workers={workers}"]
    make(write_recipe, tmp_path / "whole", *options).fit()

    class Killed(Trainer):
        def train_step(self, step: Step) -> Tensor:
            if step.index == 5:
                raise KeyboardInterrupt
            return super().train_step(step)

    reset_accelerate()
    overrides = [*SMALL, f"output_dir={tmp_path / 'cut'}", *options]
    with pytest.raises(KeyboardInterrupt):
        Killed.from_recipe(write_recipe(), overrides).fit()
    resumed = make(write_recipe, tmp_path / "cut", *options, resume=True)
    assert resumed.state.step == 4
    result = resumed.fit()
    expected, actual = weights(tmp_path / "whole"), weights(tmp_path / "cut")
    assert all(torch.equal(actual[name], value) for name, value in expected.items())
    assert result.images == 96
    losses = [[line["loss"] for line in lines(tmp_path / run) if line["kind"] == "train"] for run in ("whole", "cut")]
    assert losses[0] == losses[1]


def test_resume_without_a_checkpoint_starts_again_and_reports_it(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make(write_recipe, tmp_path / "run", resume=True)
    assert trainer.state.step == 0
    assert "nothing to resume" in capsys.readouterr().out


def test_resume_refuses_settings_that_change_the_result(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    make(write_recipe, tmp_path / "run").fit()
    with pytest.raises(RunError, match=r"optimizer.lr: 0.001 in the run, 0.5 now"):
        make(write_recipe, tmp_path / "run", "optimizer.lr=0.5", resume=True)
    longer = make(write_recipe, tmp_path / "run", "train.duration=3 steps", "data.workers=1", resume=True)
    assert longer.fit().steps == 3


@pytest.mark.usefixtures("rising_loss")
def test_checkpoints_are_pruned_but_the_best_is_kept(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    trainer = make(
        write_recipe,
        tmp_path / "run",
        "train.duration=6 steps",
        "checkpoint={every: 1 steps, keep: 2, best: {metric: loss}}",
        "evaluate.every=1 steps",
        "optimizer.lr=1e-2",
    )
    trainer.fit()
    kept = [int(path.name.split("_")[1]) for path in complete_checkpoints(tmp_path / "run" / "checkpoints")]
    assert trainer.state.best is not None
    assert trainer.state.best["step"] == 1
    assert set(kept) == {1, 5, 6}


def test_incomplete_and_corrupt_checkpoints_are_reported_and_skipped(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(write_recipe, tmp_path / "run", "train.duration=3 steps", "checkpoint={every: 1 steps, keep: 3}").fit()
    first, second, third = complete_checkpoints(tmp_path / "run" / "checkpoints")
    (third / "COMPLETE").unlink()
    damaged = bytearray((second / "training.safetensors").read_bytes())
    damaged[-1] ^= 1
    (second / "training.safetensors").write_bytes(damaged)
    assert make(write_recipe, tmp_path / "run", "train.duration=3 steps", resume=True).state.step == 1
    printed = capsys.readouterr().out
    assert f"checkpoint {third} is incomplete: skipped" in printed
    assert f"checkpoint {second} is corrupt (training.safetensors has changed since it was written)" in printed
    (first / "model.safetensors").write_bytes(b"no")
    with pytest.raises(RunError, match=r"(?s)no checkpoint can be read:.*model.safetensors has 2 of .* bytes"):
        make(write_recipe, tmp_path / "run", "train.duration=3 steps", resume=True)


@pytest.mark.usefixtures("rising_loss")
def test_early_stopping(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    stopping = "early_stopping={metric: loss, patience: 3 steps}"
    options = ["train.duration=40 steps", "evaluate.every=1 steps", stopping, "optimizer.lr=1e-2", "ema=null"]
    result = make(write_recipe, tmp_path / "run", *options).fit()
    assert result.stopped_early
    assert result.steps == 4


def test_a_test_split_is_evaluated_once_at_the_end_and_never_watched(
    write_recipe: Callable[..., Path], tmp_path: Path, image_folder: Path
) -> None:
    (image_folder / "validation").rename(image_folder / "test")
    options = [
        f"data.dataset={image_folder}",
        "data.test_split=test",
        "evaluate.every=1 steps",
        "data.eval_fraction=0.2",
    ]
    trainer = make(write_recipe, tmp_path / "run", *options)
    assert "held-out" in trainer.evaluation.eval_loader.name
    result = trainer.fit()
    assert result.test_metrics is not None
    splits = [line["split"] for line in lines(tmp_path / "run") if line["kind"] == "evaluation"]
    assert splits[-1] == "test"
    assert all("held-out" in split for split in splits[:-1])


def test_a_loss_that_is_not_finite_stops_the_run(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    trainer = make(write_recipe, tmp_path / "run", "train.duration=3 steps")
    with torch.no_grad():
        next(trainer.raw_model.parameters()).fill_(float("nan"))
    with pytest.raises(RunError, match=r"the loss is nan at step 1, lr 0\.001: lower optimizer\.lr"):
        trainer.fit()


def test_bf16_losses_follow_those_of_fp32(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """20 steps: within 5 % of the fp32 loss at every step (measured: at most 1 %)."""
    losses = {}
    for precision in ("no", "bf16"):
        options = ["train.duration=20 steps", f"accelerate.mixed_precision={precision}", "model.name=test_vit"]
        run = tmp_path / precision
        make(write_recipe, run, *options, "augment.mixup=0", "model.drop_path=0").fit()
        losses[precision] = [line["loss"] for line in lines(run) if line["kind"] == "train"]
    assert losses["bf16"] == pytest.approx(losses["no"], rel=0.05)
    assert losses["bf16"] != losses["no"]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="fp16 needs a GPU")
def test_fp16_overflow_skips_the_step_and_keeps_lr(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    trainer = make(write_recipe, tmp_path / "run", "accelerate.mixed_precision=fp16", "train.duration=4 steps")
    trainer.accelerator.scaler._init_scale = 2.0**60  # the first gradients overflow
    result = trainer.fit()
    assert result.skipped_steps >= 1
    assert trainer.state.updates == 4 - result.skipped_steps


def test_ema_is_the_plain_formula() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2))
    ema = Ema(model, 0.9, warmup=True)
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for update in range(30):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter))
        model(torch.randn(4, 3))
        ema.update(update)
        decay = min(0.9, (1 + update) / (10 + update))
        for name, value in model.state_dict().items():
            if value.is_floating_point():
                expected[name] = decay * expected[name] + (1 - decay) * value
            else:
                expected[name] = value.clone()
    for name, value in ema.module.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_frozen_batch_norm_keeps_its_statistics_and_the_backbone_its_weights(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    make(write_recipe, tmp_path / "base", "ema=null").fit()
    trainer = make(
        write_recipe,
        tmp_path / "head",
        "ema=null",
        f"model.pretrained={tmp_path / 'base'}",
        "model.freeze_backbone=true",
        "optimizer.lr=0.1",
    )
    before = {name: value.clone() for name, value in trainer.raw_model.state_dict().items()}
    trainer.fit()
    changed = {n for n, value in trainer.raw_model.state_dict().items() if not torch.equal(value, before[n])}
    assert changed == {"fc.weight", "fc.bias"}


def test_clipping_bounds_the_gradients(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    options = ["optimizer.name=sgd", "optimizer.clip_norm=1e-9", "ema=null", "optimizer.weight_decay=0"]
    trainer = make(write_recipe, tmp_path / "run", *options, "optimizer.lr=1")
    before = [p.detach().clone() for p in trainer.step.parameters]
    trainer.fit()
    moved = (
        sum(float((a.detach() - b).norm() ** 2) for a, b in zip(trainer.step.parameters, before, strict=True)) ** 0.5
    )
    assert 0 < moved < 1e-7


def test_user_objects_with_missing_arguments_are_refused() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    data = [(torch.zeros(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]))]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    trainer = Trainer(model, data, optimizer, log=RunLog(show=False))
    trainer.fit()
    with pytest.raises(RunError, match="nothing to evaluate; pass eval_loader to Trainer"):
        trainer.evaluate()
    with pytest.raises(RunError, match="nothing to push: the trainer has no output_dir"):
        trainer.push_to_hub("me/x")
    reset_accelerate()
    watched = Trainer(
        model, data, optimizer, eval_loader=data, num_classes=3, best=Watch("speed", "max"), log=RunLog(show=False)
    )
    with pytest.raises(RunError, match="'speed' is watched, but the evaluation measures only loss, accuracy"):
        watched.fit()


@pytest.mark.parametrize(
    ("metric", "mode"),
    [("loss", "min"), ("accuracy", "max"), ("me/val_Loss", "min"), ("brier_score", "min"), ("my-f1", "max")],
)
def test_the_mode_follows_from_the_metric(metric: str, mode: str) -> None:
    assert Watch(metric).mode == mode
    assert Watch(metric).is_better(1.0, 2.0) == (mode == "min")


def test_a_mode_that_would_choose_the_worst_is_refused() -> None:
    with pytest.raises(RunError, match=r"Watch\('loss'\): mode is max, but lower loss is better"):
        Watch("loss", "max")
    with pytest.raises(RunError, match="mode is auto, but the name 'sharpness' does not say"):
        Watch("sharpness")
    with pytest.raises(RunError, match="mode is 'most'; must be auto, max or min"):
        Watch("loss", "most")
    assert Watch("error_free_share", "max").mode == "max"  # an explicit mode overrides the guess


def test_the_resolved_mode_is_recorded(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    make(write_recipe, tmp_path / "run", "checkpoint.best.metric=loss", "early_stopping={metric: loss}")
    resolved = YAML(typ="safe").load((tmp_path / "run" / "resolved.yaml").read_text())
    for key in ("checkpoint.best.mode", "early_stopping.mode"):
        assert (resolved[key]["value"], resolved[key]["origin"]) == ("min", "default: lower loss is better")


def test_notes_are_printed_once_and_recorded(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "8")
    result = make(write_recipe, tmp_path / "run", "data.pin_memory=true", "accelerate.mixed_precision=no").fit()
    output = capsys.readouterr().out
    for note in (
        "data.pin_memory=true has no effect without a GPU",
        "the launch configuration says mixed precision bf16; the recipe's no is used",
        "the launch configuration says 8 accumulation steps; the recipe's 2 is used",
        "training images are held out",
    ):
        assert output.count(note) == 1
        assert any(note in kept for kept in result.notes)


def fit_on_two(recipe: str, output_dir: str) -> tuple[dict[str, float], int]:
    result = Trainer.from_recipe(recipe, [*SMALL, f"output_dir={output_dir}", "train.duration=3 steps"]).fit()
    return result.metrics, result.images


def test_two_processes_train_from_a_recipe(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    first, second = run_processes(fit_on_two, str(write_recipe()), str(tmp_path / "run"))
    assert first == second
    assert first[1] == 48
    assert (tmp_path / "run" / "result.json").exists()


def test_tensorboard_gets_the_metrics(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    trainer = make(write_recipe, tmp_path / "run", "log.trackers=[tensorboard]")
    trainer.fit()
    trainer.accelerator.end_training()
    (events,) = (tmp_path / "run" / "trackers" / "hf_fasttrain").glob("events*")
    scalars = EventAccumulator(str(events)).Reload().Tags()["scalars"]
    assert {"train/loss", "train/lr", "eval/accuracy"} <= set(scalars)


def test_a_precision_without_effect_is_refused() -> None:
    from accelerate import Accelerator

    model = nn.Linear(2, 2)
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    with pytest.raises(RunError, match="fp16 has no effect on cpu"):
        Trainer(model, [1], torch.optim.SGD(model.parameters(), lr=0.1), accelerator=accelerator)


def test_a_refused_resume_leaves_the_run_as_it_was(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    make(write_recipe, run).fit()
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    with pytest.raises(RunError, match="these settings change what is learned, and differ"):
        make(write_recipe, run, "train.batch_size=8", resume=True)
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_weights_that_are_not_finite_are_not_saved(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    options = ["optimizer.lr=1e15", "optimizer.name=sgd", "log.every=100", "checkpoint.every=1 steps", "ema=null"]
    trainer = make(write_recipe, tmp_path / "run", "train.duration=9 steps", *options)
    with pytest.raises(RunError, match=r"the loss is (nan|inf) at step"):
        trainer.fit()
    assert complete_checkpoints(tmp_path / "run" / "checkpoints")
    restored = make(write_recipe, tmp_path / "run", "train.duration=9 steps", *options, resume=True)
    assert restored.state.step < 9


def test_groups_keep_the_ratio_of_their_learning_rates() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 3))
    data = [(torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]))] * 2
    groups = [{"params": model[1].parameters(), "lr": 1e-4}, {"params": model[2].parameters(), "lr": 1e-2}]
    optimizer = torch.optim.SGD(groups)
    Trainer(model, data, optimizer, schedule=lambda step: 0.5, log=RunLog(show=False)).fit()
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.5e-4, 0.5e-2])


def test_settings_without_effect_are_reported(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(write_recipe, tmp_path / "run", "schedule.gamma=0.5", "augment.crop_padding=2", "optimizer.momentum=0.5")
    output = capsys.readouterr().out
    assert "schedule.gamma has no effect with schedule.name=cosine" in output
    assert "augment.crop_padding has no effect with augment.crop=random_resized" in output
    assert "optimizer.momentum has no effect with optimizer.name=adamw" in output


def test_a_recipe_may_use_part_of_the_images_and_evaluate_late(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = ["train.max_images=40", "evaluate.max_images=20", "evaluate.start=2 epochs", "train.duration=4 epochs"]
    trainer = make(write_recipe, tmp_path / "run", *overrides)
    assert trainer.num_steps == 12
    assert trainer.evaluation.eval_loader.num_images == 20
    assert "train.max_images: 40 of the 1,707 images of split 'train'" in capsys.readouterr().out
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "evaluation"] == [6, 9, 12]
    trainer = make(write_recipe, tmp_path / "late", *overrides[:2], "evaluate.start=9 epochs", "train.duration=1 epoch")
    assert trainer.fit().metrics["accuracy"] >= 0  # always at the end


class StatefulLoader:
    """Batches 0 to 4, with a position that can be saved, like torchdata's loader."""

    def __init__(self) -> None:
        self.next = 0

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Any:
        while self.next < 5:
            self.next += 1
            torch.manual_seed(self.next)
            yield torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


@pytest.mark.parametrize("stop", [3, 5])
def test_a_user_loader_with_a_state_is_resumed(stop: int, tmp_path: Path) -> None:
    def trained(folder: str, steps: int, resume: bool = False) -> Tensor:
        reset_accelerate()
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        options: dict[str, Any] = {"output_dir": tmp_path / folder, "checkpoint_every": "1 step"}
        trainer = Trainer(model, StatefulLoader(), optimizer, duration=f"{steps} steps", **options)
        if resume:
            trainer.restore()
        trainer.fit()
        return model[1].weight.detach()

    uninterrupted = trained("whole", 8)
    trained("cut", stop)
    with pytest.raises(RunError, match=r"contains checkpoints; call restore\(\)"):
        trained("cut", 8)
    assert torch.equal(trained("cut", 8, resume=True), uninterrupted)


@pytest.mark.parametrize("fused", [False, True])
def test_a_scaled_step_that_overflows_is_skipped_and_lr_does_not_advance(fused: bool) -> None:
    """The loss scaler's logic, also on a CPU: the first scale is too large, halved ones are not."""
    from accelerate.optimizer import AcceleratedOptimizer

    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    data = [(torch.full((4, 3, 2, 2), 100.0), torch.tensor([0, 1, 2, 0]))] * 12
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, fused=fused)
    trainer = Trainer(model, data, optimizer, schedule=lambda update: 1.0 + update, log=RunLog(show=False))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, growth_interval=1000)
    trainer.accelerator.scaler = scaler
    wrapped = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
    trainer.step.updater.optimizer = wrapped
    before = model[1].weight.detach().clone()
    result = trainer.fit()
    assert 1 <= result.skipped_steps < 12
    assert trainer.state.updates == 12 - result.skipped_steps
    assert scaler.get_scale() == 2.0 ** (126 - result.skipped_steps)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-6 * trainer.state.updates)
    assert torch.isfinite(model[1].weight).all()
    assert not torch.equal(model[1].weight, before)


def test_the_trainer_stays_small() -> None:
    """Each parameter is one that somebody with a model and a loader would set; the implementation is in other files."""
    # public methods
    assert len(inspect.signature(Trainer.__init__).parameters) - 1 <= 25
    methods = [
        name for name, value in vars(Trainer).items() if callable(value) or isinstance(value, property | classmethod)
    ]
    assert len(methods) <= 24


def test_the_weights_that_a_run_ends_with_are_best_or_last() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    data = [(torch.randn(8, 3, 2, 2), torch.randint(3, (8,)))]
    trainer = Trainer(model, data, torch.optim.SGD(model.parameters(), lr=0.1), log=RunLog(show=False))
    trainer.final = "newest"
    with pytest.raises(RunError, match="final is 'newest'; allowed are auto, best, last"):
        trainer.fit()
