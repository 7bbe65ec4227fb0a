"""Private APIs of libraries: each works as the package needs it, and is used in one file only."""

from __future__ import annotations

import ast
import io
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import datasets
import evaluate
import numpy as np
import psutil
import pytest
import timm
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from helpers.processes import in_child
from PIL import Image
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.data._utils import signal_handling

import hf_fasttrain
from hf_fasttrain.utils import private_apis
from hf_fasttrain.utils.signals import signal_handler

PACKAGE = Path(hf_fasttrain.__file__).parent


@contextmanager
def relies_on(api: str, *functions: Callable[..., object]) -> Iterator[None]:
    """On any error, fail with the name of the library's API and the functions that use it."""
    names = ", ".join(function.__name__ for function in functions)
    try:
        yield
    except Exception as error:  # noqa: BLE001 - a changed API may raise anything
        message = f"({names}): {type(error).__name__}: {error}"
        pytest.fail(f"{api} has changed: mend hf_fasttrain.utils.private_apis {message}")


def test_fused_operations_change_tensors_in_place() -> None:
    with relies_on("torch._foreach_copy_", private_apis.foreach_copy):
        targets = [torch.zeros(2), torch.zeros(3)]
        private_apis.foreach_copy(targets, [torch.ones(2), torch.full((3,), 2.0)])
        assert [target.tolist() for target in targets] == [[1, 1], [2, 2, 2]]
    with relies_on("torch._foreach_lerp_", private_apis.foreach_lerp):
        private_apis.foreach_lerp(targets, [torch.zeros(2), torch.zeros(3)], 0.25)
        assert [target.tolist() for target in targets] == [[0.75, 0.75], [1.5, 1.5, 1.5]]


def test_module_registries_contain_the_state_dict() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.BatchNorm1d(2))
    model[0].register_buffer("left_out", torch.zeros(1), persistent=False)
    model[0].register_parameter("none", None)
    with relies_on("nn.Module._parameters, _buffers or _non_persistent_buffers_set", private_apis.saved_tensors):
        entries = [(f"{name}.{key}", registry[key]) for name, module in model.named_modules()
                 for registry, key in private_apis.saved_tensors(module)]  # fmt: skip
        assert {name: id(tensor) for name, tensor in entries} == {
            name: id(tensor) for name, tensor in model.state_dict(keep_vars=True).items()
        }
    with relies_on("nn.Module._buffers", private_apis.buffer_registry):
        private_apis.buffer_registry(model[1])["running_mean"] = torch.ones(2)
        assert model[1].running_mean.tolist() == [1, 1]


def test_compiled_modules_are_unwrapped() -> None:
    with relies_on("OptimizedModule._orig_mod", private_apis.uncompiled):
        model = nn.Linear(2, 2)
        assert private_apis.uncompiled(model) is model
        assert private_apis.uncompiled(torch.compile(model, backend="eager")) is model


def test_operations_are_intercepted_and_the_compiler_is_not_imported() -> None:
    """In a process of its own: this one may have imported the compiler."""
    program = """
import sys, torch
from hf_fasttrain.utils.private_apis import argument_names, intercepted_operations
names = []
def record(operation, args, kwargs):
    names.append((str(operation), argument_names(operation)[:2]))
    return operation(*args, **kwargs)
x = torch.ones(2, requires_grad=True)
with intercepted_operations(record):
    torch.dropout(x, 0.5, True).sum().backward()
assert ("aten.bernoulli_.float", ["self", "p"]) in names, names
assert any("expand" in name for name, _ in names), names  # of the backward
assert "torch._dynamo" not in sys.modules
"""
    with relies_on("TorchDispatchMode", private_apis.intercepted_operations, private_apis.argument_names):
        subprocess.run([sys.executable, "-c", program], check=True)


def test_hooks_on_gradients_are_detected() -> None:
    with relies_on("Tensor._post_accumulate_grad_hooks", private_apis.has_gradient_hooks):
        parameter = nn.Parameter(torch.ones(1))
        assert not private_apis.has_gradient_hooks(parameter)
        parameter.register_post_accumulate_grad_hook(lambda _: None)
        assert private_apis.has_gradient_hooks(parameter)


def test_base_classes_of_batch_norm_and_dropout() -> None:
    with relies_on("torch.nn.modules.batchnorm._BatchNorm", private_apis.batch_norm_class):
        for kind in (nn.BatchNorm1d, nn.BatchNorm2d, nn.SyncBatchNorm):
            assert issubclass(kind, private_apis.batch_norm_class())
        assert not issubclass(nn.GroupNorm, private_apis.batch_norm_class())
    with relies_on("torch.nn.modules.dropout._DropoutNd", private_apis.dropout_class):
        for kind in (nn.Dropout, nn.Dropout2d, nn.AlphaDropout):
            assert isinstance(kind(p=0.5), private_apis.dropout_class())
            assert kind(p=0.5).p == 0.5


def test_references_to_memory_are_counted() -> None:
    with relies_on("torch._C._storage_Use_Count", private_apis.is_memory_free):
        tensors = [torch.ones(4)]
        assert private_apis.is_memory_free(tensors[0])
        view = tensors[0][:2]
        assert not private_apis.is_memory_free(tensors[0])
        del view
        weight = torch.ones(4, requires_grad=True)
        graph = (tensors[0].view(4) * weight).sum()
        assert not private_apis.is_memory_free(tensors[0])
        del graph
        assert private_apis.is_memory_free(tensors[0])


@pytest.mark.parametrize("name", ["bilinear", "bicubic"])
def test_filters_write_into_given_memory(name: str) -> None:
    with relies_on(f"torch.ops.aten._upsample_{name}2d_aa", private_apis.antialiased_filters):
        pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (1, 3, 16, 16), np.uint8))
        out = torch.empty(1, 3, 5, 7, dtype=torch.uint8)
        private_apis.antialiased_filters()[name](pixels, [5, 7], False, None, None, out=out)
        expected = nn.functional.interpolate(pixels, (5, 7), mode=name, antialias=True)
        assert torch.equal(out, expected)


def test_the_compilers_limits_are_set() -> None:
    with relies_on("torch._dynamo.config", private_apis.raise_recompile_limit, private_apis.is_compiler_imported):
        from torch._dynamo import config

        assert private_apis.is_compiler_imported()
        before = config.recompile_limit, config.accumulated_recompile_limit
        try:
            private_apis.raise_recompile_limit(before[0] + 1)
            private_apis.raise_recompile_limit(1)
            assert config.recompile_limit == before[0] + 1
            assert config.accumulated_recompile_limit >= 16 * (before[0] + 1)
        finally:
            config.recompile_limit, config.accumulated_recompile_limit = before


def test_loss_scales_are_read_and_set() -> None:
    with relies_on("GradScaler._scale, _init_scale", private_apis.has_loss_scale, private_apis.set_first_loss_scale):
        scaler = torch.amp.GradScaler("cpu")
        private_apis.set_first_loss_scale(scaler, 8.0)
        assert not private_apis.has_loss_scale(scaler)
        assert scaler.scale(torch.ones(())).item() == 8
        assert private_apis.has_loss_scale(scaler)


def test_torchs_sigchld_handler_is_not_installed() -> None:
    """In a separate process: torch sets the handler once."""

    def load() -> None:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal_handling._SIGCHLD_handler_set = False
        with private_apis.no_torch_child_handler():
            assert list(DataLoader([1], num_workers=1)) == [1]
            private_apis.raise_for_dead_workers()
            assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL, "torch's handler is set"
        assert list(DataLoader([1], num_workers=1)) == [1]
        assert private_apis.is_torch_child_handler(signal.getsignal(signal.SIGCHLD)), "torch's handler is another"

    functions = private_apis.no_torch_child_handler, private_apis.is_torch_child_handler
    with relies_on("torch.utils.data._utils.signal_handling", *functions, private_apis.raise_for_dead_workers):
        in_child(load)
        assert not private_apis.is_torch_child_handler(signal.SIG_DFL)


@pytest.mark.parametrize("persistent", [False, True])
def test_a_loaders_processes_are_ended(persistent: bool) -> None:
    functions = private_apis.shut_down_workers, private_apis.would_start_persistent_workers
    with relies_on("DataLoader's iterator or _shutdown_workers", *functions):
        before = psutil.Process().children()
        loader = DataLoader([1, 2, 3], num_workers=1, persistent_workers=persistent)
        assert private_apis.would_start_persistent_workers(loader) == persistent
        iterator = iter(loader)
        assert next(iterator) == 1
        assert len(psutil.Process().children()) == len(before) + 1
        assert not private_apis.would_start_persistent_workers(loader)
        private_apis.shut_down_workers(loader, iterator)
        assert psutil.Process().children() == before
        assert [int(each) for each in loader] == [1, 2, 3]
        private_apis.shut_down_workers(loader)
        private_apis.shut_down_workers([1])


@contextmanager
def no_handler_of_children() -> Iterator[None]:
    """Keep torch's handler of SIGCHLD away, which raises when a loader's process dies; another test may have set it."""
    with private_apis.no_torch_child_handler(), signal_handler(signal.SIGCHLD, signal.SIG_DFL):
        yield


def test_a_loaders_process_that_has_died_is_noticed() -> None:
    with relies_on("DataLoader's iterator's _workers", private_apis.has_dead_worker), no_handler_of_children():
        loader = DataLoader([1, 2, 3], num_workers=1)
        before = psutil.Process().children()
        iterator = iter(loader)
        assert not private_apis.has_dead_worker(iterator, seconds=0.1)
        (worker,) = set(psutil.Process().children()) - set(before)
        worker.kill()
        assert private_apis.has_dead_worker(iterator, seconds=100)
        assert not private_apis.has_dead_worker(iter([1]), seconds=100)
        private_apis.shut_down_workers(loader, iterator)


def test_the_precision_of_accelerates_state_is_changed() -> None:
    with relies_on("AcceleratorState._shared_state, _reset_state", private_apis.reset_precision):
        Accelerator(cpu=True)
        private_apis.reset_precision("no")
        assert AcceleratorState().initialized
        private_apis.reset_precision("bf16")
        assert Accelerator(cpu=True, mixed_precision="bf16").mixed_precision == "bf16"


def test_a_prepared_wrapper_is_replaced() -> None:
    with relies_on("Accelerator._models", private_apis.replace_prepared):
        accelerator = Accelerator(cpu=True)
        old, new = accelerator.prepare_model(nn.Linear(1, 1)), nn.Linear(1, 1)
        private_apis.replace_prepared(accelerator, old, new)
        (present,) = accelerator._models
        assert present is new


def test_datasets_have_a_fingerprint_and_indices() -> None:
    dataset = datasets.Dataset.from_dict({"number": [0, 1, 2]})
    with relies_on("Dataset._fingerprint", private_apis.dataset_fingerprint):
        assert private_apis.dataset_fingerprint(dataset) == private_apis.dataset_fingerprint(dataset) != ""
        assert private_apis.dataset_fingerprint(dataset.select([2, 0])) != private_apis.dataset_fingerprint(dataset)
    with relies_on("Dataset._indices", private_apis.dataset_indices):
        assert private_apis.dataset_indices(dataset) is None
        assert private_apis.dataset_indices(dataset.select([2, 0])).column(0).to_pylist() == [2, 0]


def test_a_metric_is_reset(tmp_path: Path) -> None:
    (tmp_path / "count").mkdir()
    (tmp_path / "count/count.py").write_text(
        "import datasets\nimport evaluate\n"
        "class Count(evaluate.Metric):\n"
        "    def _info(self):\n"
        "        features = datasets.Features({'predictions': datasets.Value('int64')})\n"
        "        return evaluate.MetricInfo(description='', citation='', features=features)\n"
        "    def _compute(self, predictions):\n"
        "        if 9 in predictions: raise ValueError('nine')\n"
        "        return {'count': len(predictions)}\n"
    )
    with relies_on("evaluate.EvaluationModule's data and writers", private_apis.reset_metric):
        metric = evaluate.load(str(tmp_path / "count"), cache_dir=str(tmp_path / "cache"))
        with pytest.raises(ValueError, match="nine"):
            metric.compute(predictions=[9, 1])
        private_apis.reset_metric(metric)
        assert metric.compute(predictions=[1, 2, 3]) == {"count": 3}


def test_the_hubs_client_is_created() -> None:
    with relies_on("huggingface_hub.utils._http", private_apis.hub_client_factory):
        client = private_apis.hub_client_factory()()
        client.timeout = 3.0
        assert client.timeout.read == 3


def test_timms_filters_are_found() -> None:
    with relies_on("checkpoint_filter_fn of timm's modules", private_apis.timm_weights_filter):
        model = timm.create_model("test_vit")
        convert = private_apis.timm_weights_filter(model)
        assert convert is not None
        assert convert(dict(model.state_dict()), model).keys() == model.state_dict().keys()
        assert private_apis.timm_weights_filter(nn.Linear(1, 1)) is None


def test_timms_policies_call_another_posterize(monkeypatch: pytest.MonkeyPatch) -> None:
    from timm.data import auto_augment

    with relies_on("timm.data.auto_augment.NAME_TO_OP", private_apis.let_timm_posterize_by):
        monkeypatch.setattr(auto_augment, "NAME_TO_OP", dict(auto_augment.NAME_TO_OP))
        bits: list[int] = []
        private_apis.let_timm_posterize_by(lambda image, number, **rest: bits.append(number) or image)
        image = Image.new("RGB", (4, 4))
        for operation in auto_augment.rand_augment_ops(10, transforms=["PosterizeIncreasing"], hparams={}, prob=1.0):
            operation(image)
        assert bits[-1] == 0


def test_trackios_progress_is_read() -> None:
    with relies_on("trackio.Run._next_step", private_apis.trackio_last_step):
        assert private_apis.trackio_last_step(SimpleNamespace(_next_step=4)) == 3
        assert private_apis.trackio_last_step(SimpleNamespace()) == -1
        trackio = pytest.importorskip("trackio")
        assert "_next_step" in Path(trackio.run.__file__).read_text()


def test_a_fork_server_ends_with_its_parent(tmp_path: Path) -> None:
    """Even if a process that it started continues."""
    script = tmp_path / "parent.py"
    script.write_text(
        "import multiprocessing, os, time\n"
        "from hf_fasttrain.utils.private_apis import let_forkserver_exit\n"
        "def serve():\n"
        "    let_forkserver_exit()\n"
        "    print(os.getppid(), os.getpid(), flush=True)\n"
        "    time.sleep(60)\n"
        "if __name__ == '__main__':\n"
        "    multiprocessing.get_context('forkserver').Process(target=serve).start()\n"
        "    time.sleep(60)\n"
    )
    with relies_on("multiprocessing.forkserver._forkserver", private_apis.let_forkserver_exit):
        parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
        server, child = (psutil.Process(int(pid)) for pid in parent.stdout.readline().split())
        try:
            parent.kill()
            parent.wait()
            assert psutil.wait_procs([server], timeout=10)[0] == [server]
            assert child.is_running()
        finally:
            child.kill()


def test_libtiff_prints_nothing_of_a_damaged_image(capfd: pytest.CaptureFixture[str]) -> None:
    with relies_on("symbols of the libtiff that Pillow is linked with", private_apis.silence_libtiff):
        private_apis.silence_libtiff()
        buffer = io.BytesIO()
        noise = np.random.default_rng(0).integers(0, 256, (50, 60), dtype=np.uint8)
        Image.fromarray(noise).save(buffer, "TIFF", compression="tiff_lzw")
        damaged = buffer.getvalue()[:1000] + b"\xff" * 200 + buffer.getvalue()[1200:]
        with pytest.raises(OSError, match="decoder error"):
            Image.open(io.BytesIO(damaged)).load()
        assert capfd.readouterr().err == ""


def test_a_child_that_can_not_be_killed_is_not_waited_for_at_exit() -> None:
    """Here it is one that has been stopped; the test kills it."""
    script = (
        "import multiprocessing, os, signal, sys\n"
        "from hf_fasttrain.utils.private_apis import forget_child\n"
        "child = multiprocessing.get_context('fork').Process(target=signal.pause, daemon=True)\n"
        "child.start()\n"
        "os.kill(child.pid, signal.SIGSTOP)\n"
        "print(child.pid, flush=True)\n"
        "forget_child(child)\n"
    )
    with relies_on("multiprocessing.process._children", private_apis.forget_child):
        parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
        child = psutil.Process(int(parent.stdout.readline()))
        try:
            assert parent.wait(timeout=10) == 0
            assert child.is_running()
        finally:
            child.kill()
            parent.kill()


def test_a_spawned_process_knows_that_it_imports_the_main_script(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import multiprocessing, os\n"
        "from hf_fasttrain.utils.private_apis import is_importing_main_script\n"
        "if is_importing_main_script():\n"
        "    os._exit(7)\n"
        "child = multiprocessing.get_context('spawn').Process(target=print)\n"
        "child.start()\n"
        "child.join()\n"
        "os._exit(child.exitcode)\n"
    )
    with relies_on("multiprocessing.process.current_process()._inheriting", private_apis.is_importing_main_script):
        assert subprocess.run([sys.executable, script], check=False, timeout=60).returncode == 7


def test_worker_processes_that_do_not_answer_are_killed() -> None:
    with relies_on("DataLoader's iterator's _workers", private_apis.kill_workers), no_handler_of_children():
        before = psutil.Process().children()
        iterator = iter(DataLoader(list(range(100)), num_workers=1))
        (worker,) = set(psutil.Process().children()) - set(before)
        worker.suspend()  # it takes no other signal
        private_apis.kill_workers(iterator)
        assert not worker.is_running()


def test_each_function_has_its_test() -> None:
    functions = {node.name for node in ast.parse(Path(private_apis.__file__).read_text()).body if hasattr(node, "name")}
    calls = [node for node in ast.walk(ast.parse(Path(__file__).read_text())) if isinstance(node, ast.Attribute)]
    assert functions == {call.attr for call in calls if ast.unparse(call.value) == "private_apis"} - {"__file__"}


def test_no_other_file_uses_private_apis() -> None:
    files = [path for path in PACKAGE.rglob("*.py") if path.name != "private_apis.py"]
    package_names = {name for path in files for name in own_names(ast.parse(path.read_text()))} | {
        "_exit"
    }  # os._exit is public
    for path in files:
        for node in ast.walk(ast.parse(path.read_text())):
            assert not foreign_names(node) - package_names, (
                f"{path}:{node.lineno}: {ast.unparse(node)}: into private_apis.py"
            )


def own_names(tree: ast.AST) -> Iterator[str]:
    """Yield the private names of the package's classes and modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and ast.unparse(node.value) == "self":
            yield node.attr
        elif isinstance(node, ast.AnnAssign):
            yield ast.unparse(node.target)


def foreign_names(node: ast.AST) -> set[str]:
    """Return the private names of other libraries that the code uses."""
    private_names: list[str] = []
    if isinstance(node, ast.Attribute) and ast.unparse(node.value) not in ("self", "cls"):
        private_names = [node.attr]
    elif isinstance(node, ast.ImportFrom) and node.module != "__future__":
        private_names = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    elif isinstance(node, ast.Import):
        private_names = [part for alias in node.names for part in alias.name.split(".")]
    elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "setattr") and len(node.args) > 1:
        private_names = [node.args[1].value] if isinstance(node.args[1], ast.Constant) else []
    return {name for name in private_names if name.startswith("_") and not name.startswith("__")}
