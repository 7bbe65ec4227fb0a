"""Pushing while training: for any fault of the Hub, training succeeds, nothing is lost, and a later push completes."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from helpers.hub_server import TOKEN, Fault, Hub
from helpers.processes import reset_accelerate, run_processes
from helpers.runs import exit_status, steps_of
from helpers.written_run import write_run
from safetensors.torch import load_file

from hf_fasttrain.from_recipe.trainer import build_trainer
from hf_fasttrain.hub.background import Pusher, PushOptions
from hf_fasttrain.hub.push import push_run
from hf_fasttrain.models.saved import load_model
from hf_fasttrain.utils.errors import RunError, Stopped

RECIPE = """
model: {name: test_resnet}
data: {dataset: digits, image_size: 32, workers: 0}
train: {duration: 6 steps, batch_size: 16}
evaluate: {every: 2 steps}
checkpoint: {every: 2 steps, keep: 1}
log: {report: false}
hub: {repo: me/digits}
"""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a finished run; without metrics, whose curves would be drawn for each push."""
    run = write_run(tmp_path / "runs" / "small", tmp_path)
    (run / "metrics.jsonl").unlink()
    return run


class Messages(list[str]):
    """Collects a pusher's messages."""

    def __call__(self, text: str) -> None:
        self.append(text)


def pusher_of(run: Path, messages: Messages, **options: object) -> Pusher:
    metadata = {"machine": {"device": "cpu"}, "versions": {}}
    return Pusher(run, PushOptions("me/digits", **{"every": 1, **options}), lambda folder: None, metadata, messages)


def weights_of(run: Path) -> bytes:
    return (run / "model" / "model.safetensors").read_bytes()


def test_the_best_weights_are_pushed_while_training_and_at_the_end(
    hub: Hub, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    reset_accelerate()
    run = tmp_path / "run"
    trainer = build_trainer(write_recipe(RECIPE), [f"output_dir={run}", "hub.every=best", "hub.private=true"])
    result = trainer.fit()
    repo = hub.repos["me/digits"]
    assert repo.private
    best = result.best["step"]
    checkpoint = load_file(run / "checkpoints" / f"step_{best:08d}" / "model.safetensors")
    (tmp_path / "got").write_bytes(repo.files["model.safetensors"])
    pushed = load_file(tmp_path / "got")
    assert all((pushed[name] == tensor).all() for name, tensor in checkpoint.items())
    assert all(
        {"README.md", "config.json", "model.safetensors", "recipe.yaml"} <= set(v) for v in repo.versions.values()
    )
    told = json.loads(repo.files["result.json"])
    assert told["metrics"]["accuracy"] == result.best["value"]
    assert not (run / ".hub").exists()
    assert json.loads((run / "hub.json").read_text())["step"] == 6
    for path in run.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_steps_are_pushed_as_they_are_saved(hub: Hub, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    reset_accelerate()
    run = tmp_path / "run"
    trainer = build_trainer(write_recipe(RECIPE), [f"output_dir={run}", "hub.every=2 steps", "train.duration=4 steps"])
    real = trainer.checkpoints.saved

    def save_and_wait(*args: object) -> None:
        real(*args)
        if (thread := trainer.publish.pusher._thread) is not None:
            thread.join(60)

    trainer.checkpoints.saved = save_and_wait
    trainer.fit()
    repo = hub.repos["me/digits"]
    assert [commit["summary"] for commit in repo.commits] == ["Step 2", "Push a run of hf_fasttrain"]
    first = next(iter(repo.versions.values()))
    assert "Training is still running: these are the weights after step 2 of 4." in first["README.md"].decode()
    assert json.loads(first["result.json"])["steps"] == 2
    assert first["model.safetensors"] != repo.files["model.safetensors"]
    (tmp_path / "early" / "model").mkdir(parents=True)
    for name, content in first.items():
        (tmp_path / "early" / "model" / name).write_bytes(content)
    assert load_model(tmp_path / "early" / "model")[1].num_classes == 10


def test_a_transformers_model_is_pushed_with_its_own_names(
    hub: Hub, write_recipe: Callable[..., Path], tmp_path: Path
) -> None:
    from transformers import ViTConfig

    reset_accelerate()
    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ViTConfig(**size, image_size=32, patch_size=16).save_pretrained(tmp_path / "vit")
    run = tmp_path / "run"
    overrides = [f"model.name=transformers:{tmp_path / 'vit'}", f"output_dir={run}", "hub.every=best", "ema={}"]
    trainer = build_trainer(write_recipe(RECIPE), [*overrides, "train.duration=2 steps"])
    trainer.fit()
    (tmp_path / "got").write_bytes(hub.repos["me/digits"].files["model.safetensors"])
    local, actual = load_file(run / "model" / "model.safetensors"), load_file(tmp_path / "got")
    assert local.keys() == actual.keys()
    assert all((actual[name] == tensor).all() for name, tensor in local.items())
    assert "preprocessor_config.json" in hub.repos["me/digits"].files


def test_only_the_main_process_pushes(hub: Hub, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    recipe, run = write_recipe(RECIPE), tmp_path / "run"

    def train() -> int:
        trainer = build_trainer(recipe, [f"output_dir={run}", "train.duration=2 steps"])
        return trainer.fit().steps

    assert run_processes(train) == [2, 2]
    assert len(hub.repos["me/digits"].commits) == 1
    assert hub.repos["me/digits"].files["model.safetensors"] == weights_of(run)


def test_a_stopped_run_leaves_no_upload_behind(hub: Hub, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    reset_accelerate()
    hub.faults = [Fault("POST /api", times=99, kind="hang")]
    run = tmp_path / "run"
    trainer = build_trainer(write_recipe(RECIPE), [f"output_dir={run}", "hub.every=2 steps"])
    real = trainer.train_step

    def stop_at_four(step: Any) -> Any:
        if step.index == 3:
            while trainer.publish.pusher._process is None:
                time.sleep(0.01)
            trainer.stop.signals._received = 15
        return real(step)

    trainer.train_step = stop_at_four
    with pytest.raises(Stopped):
        trainer.fit()
    assert trainer.publish.pusher._process.poll() is not None
    assert not (run / ".hub").exists()
    hub.faults.clear()
    reset_accelerate()
    build_trainer(write_recipe(RECIPE), [f"output_dir={run}", "hub.every=2 steps"], resume=True).fit()
    assert hub.repos["me/digits"].files["model.safetensors"] == weights_of(run)
    assert steps_of(run)[-1] == 6


def test_without_a_token_nothing_is_trained(
    hub: Hub, write_recipe: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no"))
    with pytest.raises(RunError, match=r"no token found; log in .*, then the same command again, or leave hub out"):
        build_trainer(write_recipe(RECIPE), [f"output_dir={tmp_path / 'run'}"])
    assert not (tmp_path / "run").exists()


PASSING = {
    "429 with Retry-After": Fault("POST /api/repos/create", 429, headers={"Retry_After": "7"}),
    "429 on a file": Fault("PUT /storage", 429, headers={"Retry_After": "7"}),
    "500 on the commit": Fault("/commit/main", 500),
    "503 on a file": Fault("PUT /storage", 503),
    "409, another commit at the same time": Fault("/commit/main", 409),
    "412, the branch has moved": Fault("/commit/main", 412),
    "a connection cut in the middle of a file": Fault("PUT /storage", kind="cut"),
    "a connection cut at the commit": Fault("/commit/main", kind="cut"),
    "a server that hangs over a file": Fault("PUT /storage", kind="hang"),
    "a server that hangs over the commit": Fault("/commit/main", kind="hang"),
}


@pytest.mark.parametrize("name", PASSING)
def test_transient_errors_are_retried(hub: Hub, run: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fault, slept, sleep = PASSING[name], [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: (slept.append(seconds), sleep(min(seconds, 0.05))))
    hub.faults = [replace(fault)]
    assert push_run(run, "me/digits", stalled=1.0) == f"{hub.url}/me/digits"
    assert hub.faults[0].times == 0
    assert not fault.headers or max(slept) >= float(fault.headers["Retry_After"])
    repo = hub.repos["me/digits"]
    assert repo.files["model.safetensors"] == weights_of(run)
    assert len(repo.commits) == 1


LASTING = {
    "403": (Fault("/api", 403, times=999), r"the token has no write access \(403.*\)"),
    "500s without end": (Fault("/api/repos/create", 500, times=999), r"is unavailable \(500\); the run is complete"),
    "a server that hangs": (Fault("POST /api", times=999, kind="hang"), r"not done after 0.05 minutes \(hub.wait\)"),
}


@pytest.mark.parametrize("name", LASTING)
def test_permanent_errors_are_reported_and_a_later_push_finishes(hub: Hub, run: Path, name: str) -> None:
    fault, message = LASTING[name]
    hub.faults, messages = [fault], Messages()
    seconds = 3.0 if fault.kind == "hang" else 10.0  # of which 10 are kept for the process to start and report
    pusher_of(run, messages, private=True, wait_seconds=seconds).finished(2)
    announced, text = messages
    assert announced == f"pushing to me/digits: {seconds / 60:g} minutes at most, Ctrl-C skips it"
    assert text.startswith("trained to the end, but not pushed: push to me/digits: ")
    assert re.search(message, text), text
    command = f"hf-fasttrain push {run} me/digits --private"
    assert text.endswith(command)
    assert TOKEN not in text
    hub.faults.clear()
    push_run(run, "me/digits", private=True)
    repo = hub.repos["me/digits"]
    assert repo.files["model.safetensors"] == weights_of(run)
    assert repo.private


def test_uploaded_files_are_not_sent_again(hub: Hub, run: Path) -> None:
    hub.faults, messages = [Fault("/commit/main", 400, times=999)], Messages()
    pusher_of(run, messages).finished(2)
    assert "not pushed" in messages[1]
    (name,) = hub.received
    hub.faults.clear()
    push_run(run, "me/digits")
    assert hub.received == {name: 1}
    assert hub.repos["me/digits"].files["model.safetensors"] == weights_of(run)


def make_checkpoint(run: Path, step: int) -> Path:
    """Write the files of a checkpoint that a push reads."""
    from hf_fasttrain.run_folder.checkpoint import Snapshot, save_checkpoint

    state = {
        "step": step,
        "num_steps": 9,
        "metrics": {"accuracy": step / 10},
        "evaluated_at": step,
        "images": 16 * step,
    }
    weights = load_file(run / "model" / "model.safetensors")
    name = next(name for name in weights if name.endswith("weight"))
    weights[name] = weights[name] + step
    return save_checkpoint(run / "checkpoints", Snapshot(step, {"state": state}, {"model": weights}, {}))


def described_pusher(run: Path, messages: Messages, **options: object) -> Pusher:
    pusher = pusher_of(run, messages, **options)
    texts = {path.name: path.read_bytes() for path in (run / "model").glob("*.json")}
    pusher.describe = lambda folder: [(folder / name).write_bytes(text) for name, text in texts.items()]
    return pusher


def test_the_newest_waiting_checkpoint_is_pushed(hub: Hub, run: Path) -> None:
    hub.faults, messages = [Fault("POST /api/repos/create", kind="hang")], Messages()
    pusher = described_pusher(run, messages, stalled_seconds=3.0)
    pusher.saved(make_checkpoint(run, 1), 1, best=True)
    while not hub.requests:
        time.sleep(0.01)
    for step in (2, 3):
        pusher.saved(make_checkpoint(run, step), step, best=False)
    assert sorted(path.name for path in (run / ".hub").iterdir()) == ["step_00000001", "step_00000003"]
    thread = pusher._thread
    assert thread is not None
    thread.join(60)
    assert [commit["summary"] for commit in hub.repos["me/digits"].commits] == ["Step 1", "Step 3"]
    pusher.close()
    assert messages == []


def test_pushes_pause_while_training_needs_the_cores(hub: Hub, run: Path) -> None:
    pusher = described_pusher(run, Messages(), rest=1000.0)
    pusher.saved(make_checkpoint(run, 1), 1, best=True)
    join(pusher)
    assert pusher._pause_until > time.monotonic() + 100
    pusher.saved(make_checkpoint(run, 2), 2, best=True)
    time.sleep(0.2)
    assert len(hub.repos["me/digits"].commits) == 1
    pusher.finished(2)  # does not wait for the rest
    assert [commit["summary"] for commit in hub.repos["me/digits"].commits] == ["Step 1", "Push a run of hf_fasttrain"]


def test_a_checkpoint_may_be_pruned_while_it_is_pushed(hub: Hub, run: Path) -> None:
    messages = Messages()
    pusher, checkpoint = described_pusher(run, messages), make_checkpoint(run, 1)
    content = (checkpoint / "model.safetensors").read_bytes()
    pusher.saved(checkpoint, 1, best=True)
    shutil.rmtree(checkpoint)
    thread = pusher._thread
    if thread is not None:
        thread.join(60)
    assert hub.repos["me/digits"].files["model.safetensors"] == content


def test_a_failed_push_is_retried_while_training(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_fasttrain.hub.background.PAUSES", (0.1, 0.1))
    monkeypatch.setattr("hf_fasttrain.hub.background.PATIENCE_SECONDS", 0.0)
    hub.faults, messages = [Fault("POST /api/repos/create", 500)], Messages()
    pusher = described_pusher(run, messages)
    pusher.saved(make_checkpoint(run, 1), 1, best=True)
    thread = pusher._thread
    if thread is not None:
        thread.join(60)
    assert len(hub.repos["me/digits"].commits) == 1
    assert len(messages) == 1
    assert messages[0].startswith("hub: push to me/digits: ")
    assert messages[0].endswith("; training continues, retried later")


def test_a_full_disk_does_not_stop_training(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    messages = Messages()
    pusher = described_pusher(run, messages)
    checkpoint = make_checkpoint(run, 1)

    def raise_disk_full(folder: Path) -> None:
        raise OSError(28, "No space left on device")

    pusher.describe = raise_disk_full
    for step in (1, 2):
        pusher.saved(checkpoint, step, best=True)
    assert messages == ["hub: could not prepare an upload to me/digits: No space left on device; training continues"]


def test_ctrl_c_ends_the_wait_for_a_push(hub: Hub, run: Path) -> None:
    hub.faults, messages = [Fault("POST /api", times=99, kind="hang")], Messages()
    pusher = pusher_of(run, messages)
    threading.Thread(target=lambda: (wait_for_requests(hub), os.kill(os.getpid(), signal.SIGINT)), daemon=True).start()
    pusher.finished(2)
    command = f"hf-fasttrain push {run} me/digits"
    assert (
        messages[1] == f"trained to the end, but not pushed: push to me/digits: interrupted by a signal; then {command}"
    )
    assert pusher._process.poll() is not None


def wait_for_requests(hub: Hub) -> None:
    while not hub.requests:
        time.sleep(0.01)


def test_an_uploader_that_dies_is_named(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen
    monkeypatch.setattr(
        subprocess, "Popen", lambda command, **options: real([command[0], "-c", "raise SystemExit('gone')"], **options)
    )
    messages = Messages()
    pusher_of(run, messages).finished(2)
    assert "the upload failed (gone); then hf-fasttrain push" in messages[1]


def test_the_best_weights_are_pushed_rather_than_the_last(hub: Hub, run: Path) -> None:
    checkpoint = make_checkpoint(run, 1)
    result = json.loads((run / "result.json").read_text())
    best = {"metric": "accuracy", "value": 0.1, "step": 1}
    (run / "result.json").write_text(json.dumps({**result, "best": best}))
    push_run(run, "me/digits", weights="best")
    files = hub.repos["me/digits"].files
    assert files["model.safetensors"] == (checkpoint / "model.safetensors").read_bytes() != weights_of(run)
    assert json.loads(files["result.json"])["metrics"] == {"accuracy": 0.1}
    assert "weights of the best evaluation, after step 1 of 2" in files["README.md"].decode()
    assert not (run / ".hub").exists()
    shutil.rmtree(checkpoint)
    with pytest.raises(RunError, match=r"no checkpoint of step 1 \(weights=best\); available: none"):
        push_run(run, "me/digits", weights="best")
    with pytest.raises(RunError, match="weights=newest: allowed are last, best, average and step_N"):
        push_run(run, "me/digits", weights="newest")


def test_a_run_continued_after_its_end_is_described_correctly(hub: Hub, run: Path) -> None:
    pusher = described_pusher(run, Messages())  # result.json of the earlier end exists
    pusher.saved(make_checkpoint(run, 5), 5, best=True)
    join(pusher)
    result = json.loads(hub.repos["me/digits"].files["result.json"])
    assert (result["steps"], result["num_steps"], result["images"]) == (5, 9, 80)
    assert "these are the weights after step 5 of 9" in hub.repos["me/digits"].files["README.md"].decode()


def join(pusher: Pusher) -> None:
    if (thread := pusher._thread) is not None:
        thread.join(60)


def test_results_that_could_not_be_written_are_not_pushed(hub: Hub, run: Path) -> None:
    from hf_fasttrain.report.callback import Publish
    from hf_fasttrain.train.log import RunLog

    messages, log = Messages(), RunLog(run)
    log.print = messages  # type: ignore[method-assign]
    log.lost = [f"{run / 'model'}: No space left on device"]
    Publish(run, log, report=False, pusher=pusher_of(run, messages)).publish(2, None)
    assert messages == [f"not pushed: model could not be written; when they are: hf-fasttrain push {run} me/digits"]
    assert hub.requests == []


def test_an_error_while_staging_is_reported_and_training_continues(run: Path) -> None:
    from hf_fasttrain.report.callback import Publish
    from hf_fasttrain.train.log import RunLog

    messages = Messages()
    pusher = pusher_of(run, messages)
    pusher.describe = lambda folder: {}["a key"]
    Publish(run, RunLog(run), pusher=pusher).saved(make_checkpoint(run, 1), 1, best=True)
    assert messages == ["hub: could not prepare an upload to me/digits: 'a key'; training continues"]


def test_nothing_is_staged_after_the_end(run: Path) -> None:
    pusher = described_pusher(run, Messages())
    pusher.close()
    pusher.saved(make_checkpoint(run, 1), 1, best=True)
    assert not (run / ".hub").exists()


def test_the_last_step_is_pushed_once(run: Path) -> None:
    pusher = described_pusher(run, Messages())
    pusher.num_steps = 3
    assert pusher._is_due(3, best=True)
    pusher.saved(make_checkpoint(run, 3), 3, best=True)
    assert not (run / ".hub").exists()


def test_pushes_to_another_repository_do_not_count(run: Path) -> None:
    (run / "hub.json").write_text(json.dumps({"repo": "you/digits", "step": 100}))
    assert pusher_of(run, Messages())._is_due(1, best=False)
    (run / "hub.json").write_text(json.dumps({"repo": "me/digits", "step": 100}))
    assert not pusher_of(run, Messages())._is_due(1, best=False)


def test_an_uploader_ends_when_its_training_is_killed(hub: Hub, run: Path) -> None:
    hub.faults = [Fault("POST /api", times=99, kind="hang")]
    code = (
        "import json, subprocess, sys, time\n"
        "child = subprocess.Popen([sys.executable, '-m', 'hf_fasttrain.hub.worker'], stdin=subprocess.PIPE, "
        "text=True)\n"
        f"child.stdin.write(json.dumps({{'run': {str(run)!r}, 'repo': 'me/digits'}}))\nchild.stdin.close()\n"
        "print(child.pid, flush=True)\ntime.sleep(100)\n"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    uploader = psutil.Process(int(parent.stdout.readline()))
    wait_for_requests(hub)
    parent.kill()
    parent.wait()
    psutil.wait_procs([uploader], timeout=20)
    assert not uploader.is_running() or uploader.status() == psutil.STATUS_ZOMBIE


def test_sigterm_during_the_wait_for_a_push_cancels_it(hub: Hub, run: Path) -> None:
    from hf_fasttrain.utils.signals import interruptible

    hub.faults, messages = [Fault("POST /api", times=99, kind="hang")], Messages()
    pusher = pusher_of(run, messages)
    threading.Thread(target=lambda: (wait_for_requests(hub), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()
    with interruptible():
        pusher.finished(2)
    assert "interrupted by a signal; then hf-fasttrain push" in messages[1]


def test_trainers_push_as_the_command_does(hub: Hub, write_recipe: Callable[..., Path], tmp_path: Path) -> None:
    reset_accelerate()
    overrides = [f"output_dir={tmp_path / 'run'}", "hub=null", "train.duration=1 step"]
    trainer = build_trainer(write_recipe(RECIPE), overrides)
    trainer.fit()
    assert trainer.push_to_hub("me/mine", license="mit") == f"{hub.url}/me/mine"
    assert "visibility" not in hub.created[0]  # what the owner's settings say
    assert b"license: mit" in hub.repos["me/mine"].files["README.md"]


def test_the_command_uses_the_recipes_push_options(
    hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (run / "recipe.yaml").read_text()
    requests: list[object] = []
    monkeypatch.setattr(
        "hf_fasttrain.hub.push.push_run", lambda *args, **options: requests.append((args, options)) or "address"
    )
    assert exit_status(["push", str(run)]) == 2
    assert "its recipe has no hub.repo; give the repository: hf-fasttrain push" in capsys.readouterr().err
    (run / "recipe.yaml").write_text(text + "hub: {repo: me/x, every: best, private: true, license: mit}\n")
    assert exit_status(["push", str(run)]) == 0
    (args, options) = requests[0]
    assert args == (run, "me/x")
    assert {key: options[key] for key in ("private", "license", "weights")} == {
        "private": True, "license": "mit", "weights": "best",
    }  # fmt: skip
    assert exit_status(["push", str(run), "me/other"]) == 0
    assert requests[1][1]["private"] is None
    assert requests[1][1]["weights"] is None  # those in RUN/model
