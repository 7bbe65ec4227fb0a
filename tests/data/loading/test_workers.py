"""Killed loader processes: the first one is replaced, and the trained weights do not change."""

from __future__ import annotations

import errno
import faulthandler
import gc
import multiprocessing
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from io import StringIO
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.processes import run_processes
from helpers.runs import RECIPE, exit_status, steps_of
from torch import Tensor, nn

from hf_fasttrain import Trainer
from hf_fasttrain.data.loading import workers as workers_module
from hf_fasttrain.data.loading.background import BackgroundIterator
from hf_fasttrain.data.loading.batch import Mixing, Normalize
from hf_fasttrain.data.loading.loader import EvalLoader, Step, TrainLoader
from hf_fasttrain.data.loading.prefetch import ImageBatches, Prefetcher
from hf_fasttrain.data.loading.sampler import SamplingPlan
from hf_fasttrain.data.loading.shared_memory import SharedMemory
from hf_fasttrain.data.loading.waiting import WAITING, WaitCutShort
from hf_fasttrain.data.loading.worker_deaths import CHILD_SIGNAL, WorkerDeaths, describe_death, iterate_user_loader
from hf_fasttrain.data.loading.workers import Workers
from hf_fasttrain.data.pixels.augment import EvalTransform, TrainTransform
from hf_fasttrain.data.pixels.images import Images
from hf_fasttrain.data.pixels.prepare import Preparation
from hf_fasttrain.data.source.dataset import Source, load_source
from hf_fasttrain.run_folder.checkpoint import complete_checkpoints, load_checkpoint
from hf_fasttrain.train.log import RunLog
from hf_fasttrain.utils import limits
from hf_fasttrain.utils.errors import LoaderDied, LoaderNotStarted, RunFailure, Stopped
from hf_fasttrain.utils.signals import signal_handler

CPU = torch.device("cpu")
KILLED = "killed by SIGKILL, as the kernel does when memory runs out"


def double(request: Any) -> Any:
    return 2 * request


def kill_self(number: int = signal.SIGKILL) -> None:
    faulthandler.disable()  # pytest's
    os.kill(os.getpid(), number)
    time.sleep(10)  # a signal to this process may take a moment


def num_frozen(request: Any) -> int:
    return gc.get_freeze_count()


def loaders() -> list[int]:
    """Return the loader processes of this process."""
    return [int(child.pid or 0) for child in multiprocessing.active_children()]


@pytest.fixture(autouse=True)
def no_process_is_left() -> Iterator[None]:
    yield
    assert loaders() == []


@pytest.mark.parametrize(("number", "at"), [(3, 0), (1, 7), (3, 20)])
def test_the_requests_of_a_process_that_dies_are_answered_by_another(number: int, at: int, tmp_path: Path) -> None:
    def work(request: int) -> int:
        if request == at and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            kill_self()
        return 2 * request

    notes: list[str] = []
    assert list(Workers(work, number, 4, WorkerDeaths(notes.append)).answers(range(21))) == [2 * n for n in range(21)]
    (text,) = notes
    assert text == (
        f"a loader process died ({KILLED}); another one takes over, and nothing is lost. A second death stops "
        "the run: lower data.workers or data.cache_gb"
    )


def test_garbage_collections_of_a_process_leave_the_shared_objects_alone() -> None:
    frozen_before = gc.get_freeze_count()  # by other tests' fixtures
    gc.unfreeze()
    try:
        (frozen,) = Workers(num_frozen, 1, 1, WorkerDeaths()).answers([0])
        assert frozen > 10_000
        assert gc.get_freeze_count() == 0
        gc.freeze()  # a program that has frozen its objects itself finds them frozen
        frozen = gc.get_freeze_count()
        list(Workers(num_frozen, 1, 1, WorkerDeaths()).answers([0]))
        assert 0.99 * frozen < gc.get_freeze_count() <= frozen  # some of them may be gone
    finally:
        if not frozen_before:
            gc.unfreeze()


def test_a_process_killed_at_its_start_is_replaced() -> None:
    deaths = WorkerDeaths()
    pool = Workers(double, 2, 4, deaths)
    pool.start()
    os.kill(loaders()[0], signal.SIGKILL)
    assert list(pool.answers(range(9))) == [2 * n for n in range(9)]
    assert deaths.number == 1


def test_a_process_killed_while_answering_is_noticed_at_once(tmp_path: Path) -> None:
    """If all wrote to one pipe, as a DataLoader's processes do, the reader would wait for the rest for ever."""

    def work(request: int) -> np.ndarray:
        if request == 3 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()

            def send_half(self: Connection, answer: Any) -> None:
                os.write(self.fileno(), struct.pack("!i", len(answer)) + bytes(answer[:9]))
                kill_self()

            Connection._send_bytes = send_half  # type: ignore[attr-defined]
        return np.full(1000, request)

    start = time.monotonic()
    assert [int(a[999]) for a in Workers(work, 2, 2, WorkerDeaths()).answers(range(8))] == list(range(8))
    assert time.monotonic() - start < 4


@pytest.mark.parametrize(
    ("number", "cause", "remedy"),
    [
        (signal.SIGKILL, KILLED, "lower data.workers or data.cache_gb"),
        (signal.SIGBUS, "a bus error, as when shared memory or a disk is full", "give /dev/shm more room"),
        (
            signal.SIGSEGV,
            "it crashed with a segmentation fault",
            "`hf-fasttrain check RECIPE --images` finds rows that",
        ),
    ],
)
def test_a_second_death_is_one_message_with_cause_and_remedy(number: int, cause: str, remedy: str) -> None:
    with pytest.raises(LoaderDied) as error:
        list(Workers(lambda request: kill_self(number), 1, 2, WorkerDeaths()).answers(range(3)))
    assert str(error.value).startswith(f"a second loader process died ({cause}): {remedy}")


def test_other_causes_of_death_are_described_too() -> None:
    assert describe_death(3) == ("it exited with status 3", "data.workers=0 shows why")
    assert describe_death(-signal.SIGUSR2) == ("killed by SIGUSR2", "lower data.workers")
    assert describe_death(-250)[0] == "killed by signal 250"


def test_large_requests_and_answers_do_not_deadlock() -> None:
    """More than a pipe's buffer, in both directions."""
    requests = [np.full(100_000, number) for number in range(12)]
    answers = Workers(double, 2, 4, WorkerDeaths()).answers(requests)
    assert [int(answer[-1]) for answer in answers] == [2 * number for number in range(12)]


def test_processes_end_at_once_even_if_their_answers_were_not_read() -> None:
    pool = Workers(double, 2, 4, WorkerDeaths())
    pool.answers([np.zeros(200_000)] * 8, keep=True)
    start = time.monotonic()
    pool.close()
    assert loaders() == []
    assert time.monotonic() - start < 3
    answers = pool.answers(range(3))  # which starts them again; closed before the first item is read
    del answers, pool
    assert loaders() == []


def test_an_error_in_a_process_is_raised_with_its_traceback() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)a loader process failed:\nTraceback.*TypeError: unsupported operand"):
        list(Workers(double, 1, 2, WorkerDeaths()).answers([1, {}]))


def test_a_process_that_cannot_be_started_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Any) -> None:
        raise BlockingIOError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    monkeypatch.setattr(multiprocessing.process.BaseProcess, "start", refuse)
    with pytest.raises(
        LoaderNotStarted, match=r"loader process 1 of 2 could not be started: too many processes .* lower data.workers"
    ):
        Workers(double, 2, 4, WorkerDeaths()).start()


def test_a_process_without_room_for_its_threads_is_one_message_and_no_process_is_left(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Its threads count like processes: a container may allow the one and refuse the others."""

    def refuse(thread: threading.Thread) -> None:
        raise limits.explain_limit(RuntimeError(limits.THREAD_REFUSED)) or AssertionError

    monkeypatch.setattr(workers_module, "start_thread", refuse)  # in the forked processes
    with pytest.raises(
        LoaderNotStarted, match=r"loader process 1 of 2 could not be started: too many threads .* lower"
    ):
        list(Workers(double, 2, 4, WorkerDeaths()).answers(range(8)))
    assert capfd.readouterr().err == ""


def test_processes_that_no_longer_answer_are_killed_when_the_wait_for_them_is_cut_short() -> None:
    """As of a file server that has gone: they can't be waited for, neither here nor at the end of the program."""
    pool = Workers(lambda request: os.kill(os.getpid(), signal.SIGSTOP), 2, 2, WorkerDeaths())
    answers = pool.answers(range(8))
    threading.Timer(0.3, lambda: signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGUSR1)).start()
    began = time.monotonic()
    cut_short = signal_handler(signal.SIGUSR1, lambda *_: WAITING.cut_short())
    with pytest.raises(WaitCutShort), cut_short, WAITING:
        next(answers)
    assert loaders() == []
    assert time.monotonic() - began < 2


def test_processes_end_when_their_training_process_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers_module, "CHECK_SECONDS", 0.05)
    read_end, writes = os.pipe()
    child = os.fork()
    if not child:
        pool = Workers(lambda request: time.sleep(60), 2, 4, WorkerDeaths())
        pool.answers(range(8))
        kill_self()
    os.close(writes)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    assert os.read(read_end, 1) == b""  # the last holder of the other end is gone
    os.close(read_end)


@pytest.fixture(scope="module")
def digits() -> Source:
    return load_source("digits", eval_fraction=0.02)


class Killing(Trainer):
    """Kills one of its loader processes in the middle of steps, and of evaluations before steps."""

    steps: tuple[int, ...] = ()
    evaluations: tuple[int, ...] = ()

    def train_step(self, step: Step) -> Tensor:
        if step.index in self.steps:
            os.kill(max(loaders()), signal.SIGKILL)
        return super().train_step(step)

    def evaluate(self, loader: Any = None) -> dict[str, float]:
        if self.state.step in self.evaluations:
            os.kill(max(loaders()), signal.SIGKILL)  # the youngest is one of the evaluation's
        return super().evaluate(loader)


def make(
    source: Source,
    workers: int,
    kind: type[Trainer] = Trainer,
    run: Path | None = None,
    *,
    duration: int = 6,
    every: int = 2,
    share: tuple[int, int] = (1, 0),
) -> Trainer:
    """Return a trainer of a linear model over two micro-batches a step, evaluated every second one."""
    transform = TrainTransform(16, crop="random_resized")
    order = SamplingPlan(len(source.train), 16, 8, num_processes=share[0], process_index=share[1])
    normalize = Normalize([0.5] * 3, [0.25] * 3, CPU, channels_last=True)
    prefetcher = Prefetcher(
        ImageBatches(Images(source.train, Preparation()), transform), CPU, workers=workers, pin_memory=False
    )
    prepared = Images(source.evaluation, Preparation(center=EvalTransform(16)))
    evaluated = Prefetcher(ImageBatches(prepared), CPU, workers=workers, pin_memory=False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 256, 10))
    return kind(
        model,
        TrainLoader(prefetcher, order, normalize, Mixing(0.8, 1.0, 10), transform.size_at),
        torch.optim.SGD(model.parameters(), lr=0.1),
        duration=f"{duration} steps",
        eval_loader=EvalLoader(evaluated, len(source.evaluation), 8, normalize, *share),
        num_classes=10,
        evaluate_every=f"{every} steps",
        checkpoint_every=f"{every} steps",
        output_dir=run,
        report=False,
        log=RunLog(run, show=False),
    )


@pytest.mark.parametrize(
    ("steps", "evaluations"), [((0,), ()), ((2,), ()), ((), (4,))], ids=["first step", "a step", "an evaluation"]
)
def test_training_after_a_death_is_bitwise_unchanged(
    steps: tuple[int, ...], evaluations: tuple[int, ...], digits: Source
) -> None:
    kind = type("KillingHere", (Killing,), {"steps": steps, "evaluations": evaluations})
    plain, killed = make(digits, 0), make(digits, 2, kind)
    expected, actual = plain.fit(), killed.fit()
    assert torch.equal(killed.raw_model[1].weight, plain.raw_model[1].weight)  # type: ignore[index]
    assert (actual.metrics, actual.best, actual.images) == (expected.metrics, expected.best, expected.images)
    (note,) = actual.notes
    assert re.match(rf"after step [0-5] a loader process died \({KILLED}\); another one takes over", note)


def test_the_status_after_a_second_death_depends_on_saved_checkpoints(digits: Source, tmp_path: Path) -> None:
    always = type("Always", (Killing,), {"steps": tuple(range(99))})
    killing_twice = type("Twice", (Killing,), {"steps": (0, 6)})
    with pytest.raises(LoaderDied) as error:
        make(digits, 1, killing_twice, tmp_path / "saved", duration=12).fit()
    last = steps_of(tmp_path / "saved")[-1]
    assert last >= 6
    assert str(error.value) == (
        f"a second loader process died ({KILLED}): lower data.workers or data.cache_gb; "
        f"resume=True (or Trainer.restore()) continues from step {last}"
    )
    assert error.value.status == Stopped.RESUMABLE
    load_checkpoint(complete_checkpoints(tmp_path / "saved" / "checkpoints")[-1])

    resumed = make(digits, 1, always, tmp_path / "saved", duration=99, every=99)
    resumed.restore()
    with pytest.raises(LoaderDied, match=rf"continues from step {last}$") as error:
        resumed.fit()
    assert error.value.status == 1  # a scheduler that restarts it at status 75 would do so for ever
    with pytest.raises(LoaderDied, match=r"; nothing was saved yet$") as error:
        make(digits, 1, always, tmp_path / "nothing", duration=99, every=99).fit()
    assert error.value.status == 1


def test_the_command_line_ends_a_second_death_with_one_message(
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(ImageBatches, "make", lambda *_: kill_self(signal.SIGBUS))
    recipe = write_recipe(RECIPE.replace("workers: 0", "workers: 1"))
    assert exit_status([str(recipe), f"output_dir={tmp_path / 'run'}"]) == 1
    printed = capsys.readouterr()
    assert printed.out.count("note: after step 0 a loader process died (a bus error, as when shared memory or") == 1
    (line,) = printed.err.splitlines()
    assert line.startswith("error: a second loader process died (a bus error, ")
    assert line.endswith(
        "give /dev/shm more room (docker run --shm-size) or set data.cache=none; nothing was saved yet"
    )


def killed_on_one(source: Source) -> tuple[bool, Tensor, str]:
    """Train without and with a kill on the second process; return whether the weights are the same."""
    at = int(os.environ["RANK"])
    plain, killed = (make(source, 1, kind, share=(2, at)) for kind in (Trainer, Killing))
    killed.log.__init__(main=not at)  # type: ignore[misc] - this one speaks
    type(killed).steps = (0,) if at else ()
    plain.fit()
    with redirect_stdout(StringIO()), redirect_stderr(StringIO()) as err:
        killed.fit()
    first, second = (trainer.raw_model[1].weight.detach() for trainer in (plain, killed))  # type: ignore[index]
    return torch.equal(first, second), second, err.getvalue()


def test_a_process_whose_loader_died_stays_in_step_with_the_others(digits: Source) -> None:
    (same, first, messages), (same_too, second, said_too) = run_processes(killed_on_one, digits)
    assert same
    assert same_too
    assert torch.equal(first, second)
    assert messages == ""
    assert re.match(r"note: after step \d a loader process died", said_too)
    assert len(said_too.splitlines()) == 1


def killed_twice_on_one(source: Source, run: str) -> tuple[str, int, str]:
    """Return the end of a run whose second process loses two loader processes."""
    at = int(os.environ["RANK"])
    steps = (3, 4, 5, 6, 7, 8) if at else ()
    trainer = make(source, 1, type("Twice", (Killing,), {"steps": steps}), Path(run), duration=40, share=(2, at))
    with pytest.raises(RunFailure) as error:
        trainer.fit()
    return type(error.value).__name__, error.value.status, str(error.value)


def test_a_second_death_on_one_process_prints_no_traceback_on_the_others(digits: Source, tmp_path: Path) -> None:
    (first, status, messages), (second, status_too, said_too) = run_processes(
        killed_twice_on_one, digits, str(tmp_path)
    )
    assert (first, second, status, status_too) == ("PeerGone", "LoaderDied", 75, 75)
    newest = f"; resume=True (or Trainer.restore()) continues from step {steps_of(tmp_path)[-1]}"
    assert messages == f"another training process has ended; its output may show why{newest}"
    assert re.search(r"; resume=True \(or Trainer.restore\(\)\) continues from step \d+$", said_too)  # as before


def test_a_death_is_noticed_by_a_thread_that_reads_ahead(tmp_path: Path) -> None:
    """As on a GPU, where a thread receives the batches."""

    def work(request: int) -> int:
        if request == 5 and not (tmp_path / "died").exists():
            (tmp_path / "died").touch()
            kill_self()
        return 2 * request

    assert list(BackgroundIterator(Workers(work, 2, 4, WorkerDeaths()).answers(range(20)), str)) == [
        str(2 * n) for n in range(20)
    ]
    with pytest.raises(LoaderDied):
        list(BackgroundIterator(Workers(lambda request: kill_self(), 2, 4, WorkerDeaths()).answers(range(20)), str))


class Rows(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return torch.ones(3, 2, 2), index % 3


class KillingInUpdate(Trainer):
    """Kills a DataLoader's process and waits, as long as torch's handler would need to raise here."""

    def train_step(self, step: Step) -> Tensor:
        loss = self.step.gradients(step)
        if step.index == 1:
            os.kill(loaders()[0], signal.SIGKILL)
            time.sleep(0.1)
        self.step.update()
        return loss


@pytest.fixture
def user_trainer(no_process_is_left: None) -> Iterator[Callable[..., Trainer]]:
    """Return a function that makes a trainer with a DataLoader."""
    trainers: list[Trainer] = []

    def build(*args: Any, **options: Any) -> Trainer:
        trainers.append(build_user_trainer(*args, **options))
        return trainers[0]

    yield build
    trainers[0].train_loader._batches.close()  # which is kept for the next `fit`


def build_user_trainer(kind: type[Trainer], **options: Any) -> Trainer:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    loader = torch.utils.data.DataLoader(Rows(), batch_size=2, num_workers=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return kind(model, loader, optimizer, num_classes=3, log=RunLog(show=False), **options)


def test_a_death_in_a_user_loader_is_raised_between_two_steps(user_trainer: Callable[..., Trainer]) -> None:
    before = signal.getsignal(signal.SIGCHLD)
    trainer = user_trainer(KillingInUpdate)
    with pytest.raises(LoaderDied, match=r"a loader process of train_loader died, possibly out of memory \(DataLo"):
        trainer.fit()
    assert (trainer.state.step, trainer.state.updates) == (2, 2)
    assert signal.getsignal(signal.SIGCHLD) == before


def test_a_death_in_a_user_evaluation_loader_is_one_message_too(user_trainer: Callable[..., Trainer]) -> None:
    class Dying(Rows):
        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            if index >= 4:  # not in the check of the first batch, before training
                kill_self()
            return super().__getitem__(index)

    trainer = user_trainer(Trainer, eval_loader=torch.utils.data.DataLoader(Dying(), batch_size=2, num_workers=1))
    with pytest.raises(LoaderDied, match="a loader process of evaluation split died"):
        trainer.fit()
    assert trainer.state.step == 6


class Batch:
    """A batch whose process is killed while it is received: the connection breaks before the process has ended."""

    def __init__(self, rows: list[Any]) -> None:
        threading.Timer(0.3, kill_self).start()

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[()]]:
        return (broken_connection, ())


def broken_connection() -> None:
    raise ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")


def test_a_connection_that_breaks_since_a_process_of_a_user_loader_dies_is_one_message() -> None:
    loader = torch.utils.data.DataLoader(Rows(), batch_size=2, num_workers=1, collate_fn=Batch)
    with (
        CHILD_SIGNAL.deferred(),  # as while training
        pytest.raises(LoaderDied, match=r"a loader process of training split died.*Connection reset by peer"),
    ):
        next(iterate_user_loader(loader, "training split"))


def test_a_users_handler_of_sigchld_is_called_while_training(user_trainer: Callable[..., Trainer]) -> None:
    signals: list[int] = []

    class Child(Trainer):
        def train_step(self, step: Step) -> Tensor:
            if not (child := os.fork()):
                os._exit(0)
            os.waitpid(child, 0)
            return super().train_step(step)

    before = signal.signal(signal.SIGCHLD, lambda number, frame: signals.append(number))
    try:
        user_trainer(Child, duration="1 steps").fit()
    finally:
        signal.signal(signal.SIGCHLD, before)
    assert signal.SIGCHLD in signals


def test_check_images_survives_a_death_and_names_the_rows_of_a_second(
    image_folder: Path,
    write_recipe: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from hf_fasttrain.data.source import scan

    real, times = scan._scan_decoded, 1

    def dying(split: Any, value_range: Any, rows: np.ndarray) -> Any:
        died = len(list(tmp_path.glob("died*")))
        if died < times:
            (tmp_path / f"died{died}").touch()
            kill_self(signal.SIGSEGV)
        return real(split, value_range, rows)

    monkeypatch.setattr(scan, "_scan_decoded", dying)
    recipe = write_recipe(RECIPE.replace("workers: 0", "workers: 1").replace("digits", str(image_folder)))
    arguments = ["check", str(recipe), "--images"]
    assert exit_status(arguments) == 0
    assert "note: a loader process died (it crashed with a segmentation fault)" in capsys.readouterr().err
    times = 3
    assert exit_status(arguments) == 1
    assert "error: split 'train': a process that decoded images died, and so did a second one (it crashed with a " in (
        printed := capsys.readouterr().err
    )
    assert "at rows 0 to 23: " in printed


class _Writes:
    """Fills a row of shared memory in a loader process."""

    def __init__(self, memory: SharedMemory) -> None:
        self.memory = memory

    def __call__(self, row: int) -> int:
        self.memory.rows[row] = row + 1
        return os.getpid()


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_loader_processes_share_memory_without_using_dev_shm(method: str) -> None:
    before = torch.multiprocessing.get_start_method()
    torch.multiprocessing.set_start_method(method, force=True)
    used = set(os.listdir("/dev/shm"))
    try:
        memory = SharedMemory(3, 5)
        workers = Workers(_Writes(memory), 1, 1, WorkerDeaths(print))
        processes = set(workers.answers([0, 2], keep=True))
        assert set(os.listdir("/dev/shm")) == used
        workers.close()
    finally:
        torch.multiprocessing.set_start_method(before, force=True)
    assert os.getpid() not in processes
    assert memory.rows.tolist() == [[1] * 5, [0] * 5, [3] * 5]


def test_a_script_without_a_guard_is_one_message(tmp_path: Path) -> None:
    """Loader processes import it again, and would train too."""
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing\n"
        "from hf_fasttrain.data.loading.worker_deaths import WorkerDeaths, require_main_script\n"
        "require_main_script()\n"
        "from hf_fasttrain.data.loading.workers import Workers\n"
        "from hf_fasttrain.utils.errors import RunError\n"
        "multiprocessing.set_start_method('spawn')\n"
        "try:\n"
        "    list(Workers(abs, 1, 1, WorkerDeaths()).answers([1]))\n"
        "except RunError as error:\n"
        "    print(type(error).__name__, error)\n"
    )
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=100, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("LoaderNotStarted a loader process runs the whole script again, as processes are")
