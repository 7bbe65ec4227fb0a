"""Out of memory is reported as such: under the command line's limit, in loader processes, in decoders."""

from __future__ import annotations

import io
import resource
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.processes import in_child, reset_accelerate
from helpers.runs import exit_status, steps_of
from PIL import Image

from hf_fasttrain import Trainer, cli
from hf_fasttrain.data.loading.worker_deaths import WorkerDeaths
from hf_fasttrain.data.loading.workers import Workers
from hf_fasttrain.data.pixels import decode
from hf_fasttrain.data.pixels.decode import read_pixels
from hf_fasttrain.data.source import scan
from hf_fasttrain.train.progress import Progress
from hf_fasttrain.utils.errors import DataError, NotEnoughMemory
from hf_fasttrain.utils.library_errors import is_out_of_memory
from hf_fasttrain.utils.process_memory import _data_bytes, limited_memory

linux = pytest.mark.skipif(sys.platform != "linux", reason="RLIMIT_DATA counts mappings on Linux only")


def limit() -> int:
    return resource.getrlimit(resource.RLIMIT_DATA)[0]


def in_full_child(function: Callable[[], Any]) -> Any:
    """Return what `function()` returns in a fork whose free memory is used up, which a limit would not count."""

    def work() -> Any:
        blocks = []
        for size in (256 << 20, 32 << 20, 4 << 20, 1 << 20):
            grown = False
            while not grown and len(blocks) < 1000:
                before = _data_bytes() or 0
                blocks.append(torch.empty(size, dtype=torch.uint8))
                grown = (_data_bytes() or 0) >= before + size
        return function(), len(blocks)

    return in_child(work)[0]


def take_too_much() -> list[Any]:
    before, results = limit(), []
    workers = Workers(lambda request: limit(), 1, 1, WorkerDeaths())
    with limited_memory(100 << 20):
        results.append(limit() < before or before == resource.RLIM_INFINITY)
        torch.ones(20 << 18)  # 20 MiB
        for allocate in (lambda: torch.ones(400 << 18), lambda: bytearray(400 << 20), lambda: np.ones(50 << 20)):
            try:
                allocate()
            except (RuntimeError, MemoryError) as error:
                results.append(is_out_of_memory(error))
        results.append(list(workers.answers([0])) == [before])
    results.append(limit() == before)
    torch.ones(400 << 18)
    return results


@linux
def test_what_is_too_much_fails_where_it_is_asked_for_and_loader_processes_have_no_limit() -> None:
    assert in_full_child(take_too_much) == [True] * 6


def train_in_little_memory(recipe: str, run: str) -> tuple[int, Any]:
    from hf_fasttrain.utils import environment

    environment.free_memory_bytes = lambda: 150 << 20
    overrides = [
        "model.name=test_vit",
        "data.image_size=160",
        "train.batch_size=128",
        "accelerate.micro_batch_size=128",
    ]
    overrides += ["train.duration=1 steps", "data.eval_fraction=0.01", f"output_dir={run}"]
    return exit_status(["train", recipe, *overrides]), limit()


@linux
def test_a_command_continues_with_smaller_micro_batches_if_memory_is_short(
    write_recipe: Callable[..., Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    before, run = limit(), tmp_path / "run"
    assert in_full_child(lambda: train_in_little_memory(str(write_recipe()), str(run))) == (0, before)
    printed = capfd.readouterr().out
    assert "note: out of memory with micro-batches of 128 images: 64 from step 1 on" in printed
    assert (run / "result.json").exists()


def evaluate_at_the_limit(recipe: str, run: str) -> bool:
    """Return whether an evaluation gets the reserved memory after a step has used all the rest."""
    trainer = Trainer.from_recipe(recipe, ["data.eval_fraction=0.02", f"output_dir={run}"])
    evaluation = trainer.evaluation
    with limited_memory(200 << 20):
        before, used = limit(), torch.ones(150 << 18)
        evaluation.measure(trainer.evaluate, evaluation.eval_loader, is_last=False)
        return bool(limit() > before and len(used))


@linux
def test_an_evaluation_after_steps_that_used_all_memory_gets_some(
    write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    assert in_full_child(lambda: evaluate_at_the_limit(str(write_recipe()), str(tmp_path / "run")))


def test_out_of_memory_elsewhere_is_one_message(
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    error = RuntimeError("std::bad_alloc")
    monkeypatch.setattr(Progress, "log_training", lambda self: (_ for _ in ()).throw(error))
    assert exit_status(["train", str(write_recipe()), f"output_dir={tmp_path / 'run'}"]) == 75
    messages = "error: out of memory after step 2 (std::bad_alloc); the same command with --resume"
    assert messages in capsys.readouterr().err
    monkeypatch.setattr(cli, "with_command", lambda arguments: (_ for _ in ()).throw(MemoryError("image x")))
    assert exit_status(["predict", "x", "y"]) == 2
    assert capsys.readouterr().err.startswith("error: out of memory: image x; end other programs")


def test_a_step_that_runs_out_of_memory_is_retried_smaller(
    write_recipe: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    real, sizes = Trainer.train_step, []
    for error in (RuntimeError("std::bad_alloc"), RuntimeError("could not create a primitive"), OSError(12, "")):
        assert is_out_of_memory(error)

    def short(self: Trainer, step: Any) -> Any:
        sizes.append(self.train_loader.micro_batch_size)
        if sizes[-1] > 8:
            raise MemoryError
        return real(self, step)

    monkeypatch.setattr(Trainer, "train_step", short)
    trainer = Trainer.from_recipe(write_recipe(), ["train.duration=1 steps", f"output_dir={write_recipe().parent}/run"])
    assert trainer.fit().out_of_memory == [{"step": 1, "before": 16, "after": 8}]
    assert sizes == [16, 8]


def png(side: int = 8) -> bytes:
    buffer = io.BytesIO()
    Image.new("1", (side, side)).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize(
    "error",
    [MemoryError(), OSError(12, "Cannot allocate memory"), OSError("out of memory error when reading image file"),
     ValueError("Insufficient memory (case 4)"), RuntimeError("std::bad_alloc")],
)  # fmt: skip
def test_a_decoder_without_memory_says_nothing_about_the_image(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(decode, "decode", lambda data, **options: (_ for _ in ()).throw(error))
    with pytest.raises(MemoryError, match=r"image photo\.png: no memory to decode it"):
        read_pixels({"bytes": png(), "path": "photo.png"})
    monkeypatch.setattr(decode, "decode", lambda data, **options: (_ for _ in ()).throw(ValueError("cut")))
    with pytest.raises(DataError, match="can't be decoded: cut"):
        read_pixels({"bytes": png(), "path": "photo.png"})


def decode_in_little_memory() -> str:
    data = png(7000)
    with limited_memory(60 << 20):
        try:
            read_pixels(data)
        except (DataError, MemoryError) as error:
            return type(error).__name__
    return "decoded"


@linux
def test_a_large_image_in_little_memory_is_no_bad_image() -> None:
    assert in_full_child(decode_in_little_memory) == "MemoryError"


def fail_decoding(times: int, path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make decoding run out of memory the given number of times, in any process."""
    real = decode.decode

    def short(data: Any, **options: Any) -> Any:
        number = len(list(path.glob("failed*")))
        if number < times:
            (path / f"failed{number}").touch()
            raise MemoryError
        return real(data, **options)

    monkeypatch.setattr(decode, "decode", short)


def trained(recipe: Path, run: Path, images: Path, workers: int) -> Trainer:
    reset_accelerate()
    options = [f"data.dataset={images}", f"data.workers={workers}", "train.batch_size=8", "train.duration=1 steps"]
    trainer = Trainer.from_recipe(recipe, [*options, f"output_dir={run}"])
    trainer.fit()
    return trainer


@pytest.mark.parametrize("workers", [0, 1])
def test_a_batch_is_loaded_a_second_time_and_then_fails_with_one_message(
    workers: int, image_folder: Path, write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_decoding(1, tmp_path, monkeypatch)
    trainer = trained(write_recipe(), tmp_path / "once", image_folder, workers)
    assert trainer.bad_images is not None
    assert trainer.bad_images.count == 0
    fail_decoding(3, tmp_path, monkeypatch)
    with pytest.raises(NotEnoughMemory, match=r"out of memory twice while loading a batch: image .*\.jpg: no memory"):
        trained(write_recipe(), tmp_path / "twice", image_folder, workers)
    assert not (tmp_path / "twice" / "bad_images.jsonl").exists()


@pytest.mark.parametrize("workers", [0, 1])
def test_check_images_reports_it_too(
    workers: int,
    image_folder: Path,
    write_recipe: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def short(split: Any, value_range: Any, rows: Any) -> Any:
        raise MemoryError("image big.png: no memory to decode it")

    monkeypatch.setattr(scan, "_scan_decoded", short)
    arguments = [str(write_recipe()), f"data.dataset={image_folder}", f"data.workers={workers}", "--images"]
    assert exit_status(["check", *arguments]) == 2
    messages = "error: out of memory: image big.png: no memory to decode it; lower data.workers"
    assert messages in capsys.readouterr().err


def test_a_checkpoint_is_written_without_a_thread_too(
    write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoThread(threading.Thread):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    trainer = Trainer.from_recipe(write_recipe(), ["train.duration=1 steps", f"output_dir={tmp_path / 'run'}"])
    monkeypatch.setattr("hf_fasttrain.train.checkpointing.threading.Thread", NoThread)
    assert trainer.checkpoints is not None
    trainer.save()
    assert steps_of(tmp_path / "run") == [0]
