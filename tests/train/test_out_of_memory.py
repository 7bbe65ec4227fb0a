"""Out of memory: the step is retried with smaller micro-batches, the same images and the same result."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.processes import in_child, reset_accelerate, run_processes
from helpers.runs import weights
from torch import Tensor, nn

from hf_fasttrain import Trainer
from hf_fasttrain.data.loading.loader import Step
from hf_fasttrain.run_folder.checkpoint import read_state
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.utils.errors import NotEnoughMemory, PeerGone, RunError

# A warning of torch 2.11 about the hooks by which these tests make a backward fail.
pytestmark = pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
# A model without batch norm and dropout: splitting a step changes nothing but rounding.
EXACT = ["model.name=test_vit", "optimizer.name=sgd", "optimizer.lr=0.05", "accelerate.mixed_precision=no"]
SMALL = ["data.eval_fraction=0.05", "augment.mixup=0.5", "log.every=1", "train.duration=5 steps"]
SMALL += ["evaluate.every=5 steps", "checkpoint.every=2 steps"]
CUDA_MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."


class Short(Trainer):
    """From step `since` on, has memory for `most` images in a training forward; `fails`: in which process."""

    most, since, process, backward = 1000, 0, None, False  # type: ignore[var-annotated]

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.raw_model.register_forward_pre_hook(self.look)
        if self.backward:
            self.raw_model.register_full_backward_pre_hook(self.look_backward)

    def is_short(self, images: int) -> bool:
        is_here = self.process in (None, self.accelerator.process_index)
        return is_here and self.raw_model.training and self.state.step >= self.since and images > self.most

    def look(self, module: nn.Module, args: tuple[Tensor]) -> None:
        if not self.backward and self.is_short(len(args[0])):
            raise torch.OutOfMemoryError(CUDA_MESSAGE)

    def look_backward(self, module: nn.Module, gradients: tuple[Tensor]) -> None:
        if self.is_short(len(gradients[0])):
            raise torch.OutOfMemoryError(CUDA_MESSAGE)


def make(recipe: Path, run: Path, *overrides: str, resume: bool = False, **memory: Any) -> Trainer:
    reset_accelerate()
    kind = type("ShortHere", (Short,), memory)
    return kind.from_recipe(recipe, [*SMALL, *overrides, f"output_dir={run}"], resume=resume)


def require_close(run: Path, other: Path) -> None:
    for name, value in weights(other).items():
        torch.testing.assert_close(weights(run)[name], value, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("since", [0, 3])
def test_weights_are_those_of_a_run_with_enough_memory(
    since: int, backward: bool, write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(write_recipe(), tmp_path / "enough", *EXACT).fit()
    capsys.readouterr()
    trainer = make(write_recipe(), tmp_path / "short", *EXACT, most=4, since=since, backward=backward)
    result = trainer.fit()
    require_close(tmp_path / "short", tmp_path / "enough")
    assert result.micro_batch_size == 4
    assert result.out_of_memory == [
        {"step": since + 1, "before": 16, "after": 8},
        {"step": since + 1, "before": 8, "after": 4},
    ]
    messages = f"out of memory with micro-batches of 8 images: 4 from step {since + 1} on"
    assert capsys.readouterr().out.count(messages) == 1
    assert messages in json.loads((tmp_path / "short" / "result.json").read_text())["notes"]
    state = read_state(tmp_path / "short" / "checkpoints" / "step_00000005")
    assert state["state"]["out_of_memory"] == result.out_of_memory


@pytest.mark.parametrize("workers", [0, 1])
def test_batch_norm_and_random_states_are_restored(
    workers: int, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Bitwise: a run whose first step was split equals one with such micro-batches from the start."""
    options = ["model.drop_path=0.1", f"data.workers={workers}", "ema={decay: 0.9}"]
    make(write_recipe(), tmp_path / "short", *options, most=8).fit()
    make(write_recipe(), tmp_path / "asked", *options, "accelerate.micro_batch_size=8").fit()
    short, requested = weights(tmp_path / "short"), weights(tmp_path / "asked")
    assert any("running_var" in name for name in requested)
    assert all(torch.equal(short[name], value) for name, value in requested.items())


def test_a_resumed_run_starts_with_the_smaller_micro_batch(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make(write_recipe(), tmp_path / "run", *EXACT, most=4).fit()
    longer = make(write_recipe(), tmp_path / "run", *EXACT, "train.duration=7 steps", resume=True)
    assert longer.train_loader.micro_batch_size == 4
    assert "memory ran out earlier in this run: micro-batches of 4 images" in capsys.readouterr().out
    assert longer.fit().micro_batch_size == 4
    options = [*EXACT, "train.duration=8 steps", "accelerate.micro_batch_size=6"]
    other = make(write_recipe(), tmp_path / "run", *options, resume=True)
    assert other.train_loader.micro_batch_size == 6  # the user's choice


def test_pairs_are_split_as_the_last_resort(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    make(write_recipe(), tmp_path / "enough", *EXACT).fit()
    result = make(write_recipe(), tmp_path / "short", *EXACT, most=1).fit()
    assert result.micro_batch_size == 1
    require_close(tmp_path / "short", tmp_path / "enough")


def test_an_image_that_does_not_fit_is_one_message(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(
        RunError, match=r"out of memory: a single image does not fit \(CUDA .*\); lower data.image_size"
    ):
        make(write_recipe(), tmp_path / "run", *EXACT, most=0).fit()
    with pytest.raises(RunError, match=r"out of memory: two images, which batch norm needs, do not fit"):
        make(write_recipe(), tmp_path / "two", most=1).fit()


def test_evaluation_continues_with_smaller_batches(
    write_recipe: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reference = make(write_recipe(), tmp_path / "enough", *EXACT).fit()
    trainer = make(write_recipe(), tmp_path / "short", *EXACT)
    sizes = []

    def hook(module: nn.Module, args: tuple[Tensor]) -> None:
        if not module.training:
            if len(args[0]) > 5:
                raise torch.OutOfMemoryError(CUDA_MESSAGE)
            sizes.append(len(args[0]))

    trainer.raw_model.register_forward_pre_hook(hook)
    result = trainer.fit()
    assert max(sizes) == 4
    assert result.metrics == pytest.approx(reference.metrics, rel=1e-6)
    assert capsys.readouterr().out.count("out of memory while evaluating: batches of 4 images from now on") == 1


def test_an_image_that_does_not_fit_in_evaluation_is_one_message(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    trainer = make(write_recipe(), tmp_path / "run", *EXACT)

    def hook(module: nn.Module, args: tuple[Tensor]) -> None:
        if not module.training:
            raise torch.OutOfMemoryError(CUDA_MESSAGE)

    trainer.raw_model.register_forward_pre_hook(hook)
    with pytest.raises(RunError, match=r"a single image does not fit in evaluation; lower data\.image_size"):
        trainer.fit()


def test_batches_of_user_loaders_are_split_too() -> None:
    def trained(most: int) -> tuple[Tensor, list[dict[str, int]]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        data = [(torch.randn(8, 3, 2, 2), torch.randint(3, (8,))) for _ in range(4)]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        kind = type("ShortHere", (Short,), {"most": most, "since": 2})
        result = kind(model, data, optimizer, log=RunLog(show=False)).fit()
        return model[1].weight.detach(), result.out_of_memory

    enough, nothing = trained(1000)
    short, halved = trained(2)
    assert nothing == []
    assert halved == [{"step": 3, "before": 8, "after": 4}, {"step": 3, "before": 4, "after": 2}]
    torch.testing.assert_close(short, enough)


def test_a_started_update_is_not_retried(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """The optimizer has changed weights before memory ran out: nothing of it may be saved."""
    trainer = make(write_recipe(), tmp_path / "run", *EXACT, "optimizer.name=adamw")
    step, calls = trainer.step.optimizer.step, []

    def raise_error() -> None:
        calls.append(1)
        step()
        if len(calls) == 4:
            raise torch.OutOfMemoryError(CUDA_MESSAGE)

    trainer.step.optimizer.step = raise_error
    with pytest.raises(NotEnoughMemory, match=r"at step 4 .* resume=True .* continues .*micro-batches of 8") as error:
        trainer.fit()
    assert error.value.status == 75
    resumed = make(write_recipe(), tmp_path / "run", *EXACT, "optimizer.name=adamw", resume=True)
    assert (resumed.state.step, resumed.train_loader.micro_batch_size) == (2, 8)


@pytest.mark.parametrize("changed", [False, True])
def test_a_first_update_is_retried(changed: bool, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    """The update that creates the optimizer's state, whether or not weights changed before memory ran out."""
    trainer = make(write_recipe(), tmp_path / "run", *EXACT)
    step, calls = trainer.step.optimizer.step, []

    def raise_error() -> None:
        calls.append(1)
        if len(calls) == 1:
            if changed:
                step()
            raise torch.OutOfMemoryError(CUDA_MESSAGE)
        step()

    trainer.step.optimizer.step = raise_error
    assert trainer.fit().out_of_memory == [{"step": 1, "before": 16, "after": 8}]
    make(write_recipe(), tmp_path / "enough", *EXACT).fit()
    require_close(tmp_path / "run", tmp_path / "enough")


def test_a_first_update_that_left_an_incomplete_state_is_retried(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """Adam allocates its two averages one after the other; memory may run out between them."""
    options = [*EXACT, "optimizer.name=adamw", "optimizer.lr=1e-3"]
    trainer = make(write_recipe(), tmp_path / "run", *options)
    step, calls = trainer.step.optimizer.step, []

    def raise_error() -> None:
        calls.append(1)
        if len(calls) == 1:
            trainer.step.optimizer.state[trainer.step.parameters[0]] = {"step": torch.zeros(())}
            raise torch.OutOfMemoryError(CUDA_MESSAGE)
        step()

    trainer.step.optimizer.step = raise_error
    assert trainer.fit().out_of_memory == [{"step": 1, "before": 16, "after": 8}]


@pytest.mark.parametrize("clip_norm", [None, 1e6])
def test_gradients_unscaled_before_a_retry_are_scaled_again(clip_norm: float | None) -> None:
    from accelerate.optimizer import AcceleratedOptimizer

    def trained(fail: bool) -> Tensor:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
        data = [(torch.randn(8, 3, 2, 2), torch.randint(3, (8,)))]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        trainer = Trainer(model, data, optimizer, clip_norm=clip_norm, log=RunLog(show=False))
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        trainer.accelerator.scaler = scaler
        wrapped = AcceleratedOptimizer(optimizer, device_placement=False, scaler=scaler)
        trainer.step.updater.optimizer = wrapped
        calls = []

        def raise_error(*_: Any) -> None:
            calls.append(1)
            if fail and len(calls) == 1:
                raise torch.OutOfMemoryError(CUDA_MESSAGE)

        optimizer.register_step_pre_hook(raise_error)
        assert bool(trainer.fit().out_of_memory) == fail
        return model[1].weight.detach()

    torch.testing.assert_close(trained(True), trained(False))


def test_out_of_memory_in_the_average_does_not_apply_a_step_twice(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    trainer = make(write_recipe(), tmp_path / "run", *EXACT, "ema={decay: 0.9}")
    assert trainer.ema is not None
    calls: list[int] = []

    def raise_error(update: int) -> None:
        calls.append(update)
        raise torch.OutOfMemoryError(CUDA_MESSAGE)

    trainer.ema.update = raise_error  # type: ignore[method-assign]
    with pytest.raises(NotEnoughMemory):
        trainer.fit()
    assert calls == [0]


def fit_short(recipe: str, run: str, most: int, since: int) -> Any:
    try:
        result = make(Path(recipe), Path(run), *EXACT, "data.workers=1", most=most, since=since, process=1).fit()
    except NotEnoughMemory as error:
        return str(error)
    except (RuntimeError, PeerGone) as error:  # the other process has ended
        return f"left alone: {error}"
    return result.out_of_memory, result.images


def test_processes_agree_on_smaller_micro_batches(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    make(write_recipe(), tmp_path / "one", *EXACT).fit()
    first, second = run_processes(fit_short, str(write_recipe()), str(tmp_path / "two"), 2, 0)
    assert first == second
    assert first == ([{"step": 1, "before": 8, "after": 4}, {"step": 1, "before": 4, "after": 2}], 80)
    require_close(tmp_path / "two", tmp_path / "one")


def test_a_single_launched_process_retries_a_failed_backward(write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    options = [*EXACT, "train.duration=1 steps"]
    result = in_child(
        lambda: make(write_recipe(), tmp_path / "run", *options, most=8, backward=True).fit().out_of_memory
    )
    assert result == [{"step": 1, "before": 16, "after": 8}]


def test_a_later_failure_of_one_process_saves_nothing_inconsistent_and_resume_starts_smaller(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    """The other process waits for gradients that do not arrive; what it then does is irrelevant."""
    first, second = run_processes(fit_short, str(write_recipe()), str(tmp_path / "run"), 4, 3)
    assert "out of memory at step 4 with micro-batches of 8 images" in second
    assert first.startswith("left alone")
    results = run_processes(resume_after, str(write_recipe()), str(tmp_path / "run"))
    assert results == [(2, 4, 80)] * 2
    make(write_recipe(), tmp_path / "one", *EXACT).fit()
    require_close(tmp_path / "run", tmp_path / "one")


def resume_after(recipe: str, run: str) -> tuple[int, int, int]:
    trainer = make(Path(recipe), Path(run), *EXACT, resume=True)
    return trainer.state.step, trainer.train_loader.micro_batch_size, trainer.fit().images


def fit_in_little_memory() -> Any:
    """Train with a memory limit of the process below the activations of a complete batch."""

    class Wide(nn.Module):
        """Needs 40 MB per image: a real allocation that really fails."""

        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(12, 3)

        def forward(self, images: Tensor) -> Tensor:
            wide = images.flatten(1).repeat(1, 900_000)  # (B, 10.8 million) float32
            return self.head(wide.view(len(images), -1, 12)[:, -1])

    torch.manual_seed(0)
    model = Wide()
    data = [(torch.randn(32, 3, 2, 2), torch.randint(3, (32,))) for _ in range(3)]
    trainer = Trainer(model, data, torch.optim.SGD(model.parameters(), lr=0.1), log=RunLog(show=False))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + 900_000_000, resource.RLIM_INFINITY))
    result = trainer.fit()
    return result.out_of_memory, result.images


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's account of memory")
def test_really_running_out_of_memory() -> None:
    ((halved, images),) = run_processes(fit_in_little_memory, num_processes=1)
    assert images == 96
    assert halved[0] == {"step": 1, "before": 32, "after": 16}


def test_an_overridden_step_method_sees_failed_attempts(tmp_path: Path) -> None:
    """An overridden `train_step` is retried as well."""
    seen = []

    class Own(Trainer):
        def train_step(self, step: Step) -> Tensor:
            seen.append(step.num_micro_batches)
            if len(seen) == 1:
                raise torch.OutOfMemoryError(CUDA_MESSAGE)
            return super().train_step(step)

    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    data = [(torch.randn(8, 3, 2, 2), torch.randint(3, (8,)))] * 2
    Own(model, data, torch.optim.SGD(model.parameters(), lr=0.1), log=RunLog(show=False)).fit()
    assert seen == [1, 2, 2]
