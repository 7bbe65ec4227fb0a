"""Exported runs, loaded by timm, transformers and onnxruntime without this package."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import shutil
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers.processes import in_child
from helpers.programs import Job, run_forked, run_fresh
from PIL import Image
from torch import nn

from hf_fasttrain.data.loading.batch import Normalize
from hf_fasttrain.data.pixels.augment import EvalTransform
from hf_fasttrain.data.pixels.decode import read_pixels
from hf_fasttrain.export import export, onnx_file
from hf_fasttrain.export.export import ExportResult, export_run
from hf_fasttrain.export.snippets import onnx_snippet, timm_snippet, transformers_snippet
from hf_fasttrain.models.model import ModelSpec, Preprocessing, build_model, head_names, model_preprocessing
from hf_fasttrain.models.saved import load_model, save_model
from hf_fasttrain.run_folder.checkpoint import Snapshot, save_checkpoint
from hf_fasttrain.utils.errors import RunError

CLASSES = ["daisy", "dandelion", "rose's", 'sun"flower', "tulip", "été", "{g}"]
CENTER = Preprocessing(48, interpolation="bicubic", crop_pct=0.83)
PARTS = {  # name -> (model, preprocessing, what else its spec says)
    "efficientnet": ("test_efficientnet", CENTER, {}),
    "squashed vit": ("test_vit", replace(CENTER, interpolation="bilinear", crop_pct=1.0, crop_mode="squash"), {}),
    "multi-label": ("test_resnet", replace(CENTER, std=(0.5, 0.5, 0.5)), {"multi_label": True}),
    "small stem": (
        "resnet18",
        replace(CENTER, interpolation="lanczos"),
        {"small_image_stem": True, "args": {"layers": [1, 1, 1, 1], "channels": [8, 8, 16, 16]}},
    ),
    "hf vit": ("transformers:vit", replace(CENTER, crop_mode="center_floor"), {"multi_label": True}),
    "hf squashed": ("transformers:vit", replace(CENTER, crop_pct=1.0, crop_mode="squash"), {}),
    "hf convnext": ("transformers:convnext", replace(CENTER, crop_mode="center_floor"), {}),
}
WITHOUT_ONNX = {"multi-label", "hf squashed"}  # made of what others have
HAS_ONNX = all(importlib.util.find_spec(name) for name in onnx_file.PACKAGES)
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="onnx, onnxscript or onnxruntime is not installed")

TIMM_LOGITS = """
import json, sys, timm, torch
from PIL import Image, ImageOps
model = timm.create_model("local-dir:" + sys.argv[1], pretrained=True).eval()
transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
for path in sys.argv[2:]:
    image = transform(ImageOps.exif_transpose(Image.open(path)).convert("RGB"))
    with torch.inference_mode():
        print(json.dumps(model(image[None])[0].tolist()))
"""
TRANSFORMERS_LOGITS = """
import json, sys
from transformers import pipeline
classify = pipeline("image-classification", model=sys.argv[1])
for path in sys.argv[2:]:
    found = classify(path, top_k=100, function_to_apply="none")
    by_name = {one["label"]: one["score"] for one in found}
    print(json.dumps([by_name[name] for name in classify.model.config.id2label.values()]))
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return 20 small images of odd sizes: JPEGs, some of them rotated, grey, CMYK or with alpha."""
    from sklearn.datasets import load_sample_images

    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    sources = [Image.fromarray(image) for image in load_sample_images().images]
    photo_list = []
    for number in range(20):
        width, height = (int(side) for side in rng.integers(31, 260, 2))
        left, top = int(rng.integers(0, 640 - width)), int(rng.integers(0, 427 - height))
        image = sources[number % 2].crop((left, top, left + width, top + height))
        path, options = folder / f"{number}.jpg", {}
        if number in (3, 14):
            exif = Image.Exif()
            exif[0x0112] = 6 if number == 3 else 8
            options["exif"] = exif
        elif number in (5, 6):
            image = image.convert("L" if number == 5 else "CMYK")
        elif number in (7, 8, 9):
            path = path.with_suffix(".png")
            image = image.convert({7: "RGBA", 8: "P", 9: "LA"}[number])
        image.save(path, **options)
        photo_list.append(str(path))
    return photo_list


def evaluated(run: Path, photos: list[str]) -> torch.Tensor:
    """Return the logits (B, K) that `hf-fasttrain predict` and `evaluate` have for the photos."""
    model, spec = load_model(run / "model")
    pre = spec.preprocessing
    assert pre is not None
    transform = EvalTransform(pre.image_size, pre.interpolation, pre.crop_pct, pre.crop_mode)
    normalize = Normalize(pre.mean, pre.std, torch.device("cpu"), channels_last=True)
    pixels = np.stack([transform(read_pixels(photo)) for photo in photos])
    with torch.inference_mode():
        return model(normalize(torch.from_numpy(pixels)))


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with the configurations of tiny transformers models."""
    from transformers import ConvNextConfig, ViTConfig

    folder = tmp_path_factory.mktemp("configs")
    size = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ViTConfig(**size, image_size=48, patch_size=16).save_pretrained(folder / "vit")
    ConvNextConfig(hidden_sizes=[8, 16, 16, 16], depths=[1, 1, 1, 1]).save_pretrained(folder / "convnext")
    return folder


def write_run(run: Path, spec: ModelSpec, result: dict[str, Any] | None = None) -> nn.Module:
    """Write a finished run: a model whose logits differ clearly between images."""
    torch.manual_seed(0)
    model = build_model(spec).eval()
    spec = replace(spec, preprocessing=spec.preprocessing or model_preprocessing(model, spec))
    assert spec.preprocessing is not None
    with torch.no_grad():
        logits = model(export.preprocess(export.sample_photos(spec.preprocessing), spec.preprocessing))
        for name, parameter in model.named_parameters():
            if name.startswith(tuple(head_names(model))):
                parameter.sub_(logits.mean(0) if name.endswith("bias") else 0).div_(logits.std(0).mean())
    save_model(model, spec, run / "model")
    (run / "result.json").write_text(json.dumps(result or {"steps": 4}))
    return model


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, configs: Path) -> dict[str, tuple[Path, ExportResult]]:
    """Return the run folder and the result of its export, for each of PARTS."""
    folder, results = tmp_path_factory.mktemp("runs"), {}
    for name, (model, pre, options) in PARTS.items():
        model = model.replace("transformers:", f"transformers:{configs}/")
        write_run(folder / name, ModelSpec(model, CLASSES, 48, preprocessing=pre, **options))

    def export_all() -> list[ExportResult]:
        with (folder / "printed").open("w") as terminal, redirect_stdout(terminal), redirect_stderr(terminal):
            os.dup2(terminal.fileno(), 1)
            os.dup2(terminal.fileno(), 2)
            return [export_run(folder / name, onnx=HAS_ONNX and name not in WITHOUT_ONNX) for name in PARTS]

    exported = in_child(export_all)
    for name, one in zip(PARTS, exported, strict=True):
        results[name] = (folder / name, one)
    return results


def require_same(actual: str, expected: torch.Tensor, label: str) -> None:
    logits = torch.tensor([json.loads(line) for line in actual.splitlines()])
    assert (logits - expected).abs().max() < 1e-4, label
    assert torch.equal(logits.topk(5).indices, expected.topk(5).indices), label
    assert expected.std(0).mean() > 0.1, f"{label}: the photos look all the same to it"


def require_named(actual: str, logits: torch.Tensor, multi_label: bool, label: str) -> None:
    scores = logits.sigmoid() if multi_label else logits.softmax(0)
    entries = [line.split("  ", 1) for line in actual.splitlines()]
    assert [name for _, name in entries] == [CLASSES[number] for number in scores.topk(5).indices], label
    shown = torch.tensor([float(score) for score, _ in entries])
    assert (shown - scores.topk(5).values).abs().max() < 1e-4, label


def test_timm_and_transformers_give_the_logits_of_evaluation(
    runs: dict[str, tuple[Path, ExportResult]], photos: list[str]
) -> None:
    jobs: list[Job] = []
    checks = []
    sample = [photos[number] for number in (0, 3, 7)]
    for name, (run, exported) in runs.items():
        expected, multi = evaluated(run, photos), bool(PARTS[name][2].get("multi_label"))
        model_dir = str(exported.folder)
        programs = {
            "timm": (TIMM_LOGITS, timm_snippet(f"local-dir:{model_dir}", multi_label=multi)),
            "transformers": (TRANSFORMERS_LOGITS, transformers_snippet(model_dir)),
        }
        for form in set(programs) & set(exported.forms):
            logits, snippet = programs[form]
            jobs += [(logits, [[model_dir, *photos]]), (snippet, [[photo] for photo in sample])]
            checks.append((f"{form}: {name}", expected, multi))
    assert len(checks) == 9
    answers = run_forked(jobs)
    for label, expected, multi in checks:
        require_same(answers.pop(0), expected, label)
        for photo in sample:
            require_named(answers.pop(0), expected[photos.index(photo)], multi, label)


@needs_onnx
def test_onnxruntime_gives_the_logits_of_evaluation(
    runs: dict[str, tuple[Path, ExportResult]], photos: list[str]
) -> None:
    print_logits = "print(json.dumps(logits.tolist()))\n"
    exports = {name: run for name, run in runs.items() if name not in WITHOUT_ONNX}
    jobs = [
        (onnx_snippet(f"{run}/model/model.onnx") + print_logits, [[photo] for photo in photos])
        for run, _ in exports.values()
    ]
    answers, imported = run_fresh(jobs)
    assert imported == []
    for name, (run, exported) in exports.items():
        expected, multi = evaluated(run, photos), bool(PARTS[name][2].get("multi_label"))
        printed = [answers.pop(0).splitlines() for _ in photos]
        require_same("\n".join(lines[-1] for lines in printed), expected, name)
        for lines, logits in zip(printed, expected, strict=True):
            require_named("\n".join(lines[:-1]), logits, multi, name)
        assert exported.onnx_difference is not None
        assert exported.onnx_difference < 1e-4


def test_each_format_writes_its_files(runs: dict[str, tuple[Path, ExportResult]]) -> None:
    for name, (run, exported) in runs.items():
        onnx = ["onnx"] if HAS_ONNX and name not in WITHOUT_ONNX else []
        formats = (
            [] if name == "small stem" else ["transformers"] if name.startswith("hf") else ["timm", "transformers"]
        )
        assert exported.forms == [*formats, *onnx, "hf_fasttrain"], (name, exported.notes)
        assert (run / "model" / "config.json").exists() == (name != "small stem")
        assert (run / "model" / "preprocessor_config.json").exists() == name.startswith("hf")
        assert exported.folder == run / "model"
        if name != "small stem":
            assert exported.notes == []
    _, stem = runs["small stem"]
    assert stem.notes == ["timm and transformers can't build this model's small-image stem; hf_fasttrain and ONNX can"]


def test_the_snippets_name_their_location() -> None:
    assert 'timm.create_model("hf-hub:me/x", pretrained=True)' in timm_snippet("hf-hub:me/x")
    assert 'model="me/x"' in transformers_snippet("me/x")
    assert 'InferenceSession(hf_hub_download("me/x", "model.onnx")' in onnx_snippet("me/x")
    assert 'InferenceSession("model.onnx"' in onnx_snippet()


def test_transformers_crops_are_rounded_down(photos: list[str]) -> None:
    from transformers import BitImageProcessorPil

    size = {"size": {"shortest_edge": 57}, "crop_size": {"height": 48, "width": 48}}
    theirs = BitImageProcessorPil(**size, resample=3, do_normalize=False, do_rescale=False)
    ours = EvalTransform(48, "bicubic", 48 / 57.5, "center_floor")
    for photo in photos:
        pixels = read_pixels(photo)
        actual = theirs(Image.fromarray(pixels), return_tensors="np")["pixel_values"][0]
        assert np.array_equal(actual.transpose(1, 2, 0), ours(pixels)), photo


def test_a_model_built_from_a_folder_is_loaded_without_it(tmp_path: Path) -> None:
    spec = ModelSpec("test_vit", CLASSES, 48, args={"global_pool": "avg"}, preprocessing=CENTER)
    write_run(tmp_path / "first", spec)
    write_run(tmp_path / "second", replace(spec, name=str(tmp_path / "first" / "model"), args={}))
    shutil.rmtree(tmp_path / "first")
    exported = export_run(tmp_path / "second")
    assert exported.forms == ["timm", "transformers", "hf_fasttrain"]
    loaded_spec = load_model(tmp_path / "second" / "model")[1]
    assert (loaded_spec.name, loaded_spec.args) == ("test_vit", {"global_pool": "avg"})


def test_a_model_that_a_tool_misreads_is_noted_and_timms_config_removed(
    tmp_path: Path, configs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torchvision rounds differently from transformers; a timm that would build another model gets no config."""
    write_run(tmp_path / "hf", ModelSpec(f"transformers:{configs / 'vit'}", CLASSES, 48, preprocessing=CENTER))
    exported = export_run(tmp_path / "hf")
    assert exported.forms == ["hf_fasttrain"]
    assert len(exported.notes) == 1
    assert exported.notes[0].startswith("transformers gives different logits (by")
    write_run(tmp_path / "timm", ModelSpec("test_resnet", CLASSES, 48, preprocessing=CENTER))
    monkeypatch.setattr(export, "timm_logits", lambda folder, photos: torch.zeros(1, 2))
    monkeypatch.setattr(export, "transformers_logits", lambda folder, photos: torch.load("no such file"))
    exported = export_run(tmp_path / "timm")
    assert exported.forms == ["hf_fasttrain"]
    assert exported.notes[0] == "timm gives different logits (by up to inf); hf_fasttrain opens it"
    assert exported.notes[1].startswith("transformers can't open it ([Errno 2] No such file")
    assert not (tmp_path / "timm" / "model" / "config.json").exists()
    assert load_model(tmp_path / "timm" / "model")[1].name == "test_resnet"


def test_a_model_with_custom_code(tmp_path: Path) -> None:
    folder = tmp_path / "own"
    folder.mkdir()
    auto = {"AutoConfig": "own.OwnConfig", "AutoModelForImageClassification": "own.OwnModel"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own-kind", "auto_map": auto}))
    (folder / "own.py").write_text(OWN_CODE)
    spec = ModelSpec(f"transformers:{folder}", CLASSES, 48, trust_remote_code=True, preprocessing=CENTER)
    write_run(tmp_path / "run", spec)
    for _ in range(2):  # also over its own files
        exported = export_run(tmp_path / "run")
    assert exported.forms == ["hf_fasttrain"]
    assert exported.notes == [
        "transformers opens this model with trust_remote_code=True only: it runs Python code of its own"
    ]
    assert (tmp_path / "run" / "model" / "own.py").exists()


OWN_CODE = """
import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ImageClassifierOutput

class OwnConfig(PreTrainedConfig):
    model_type = "own-kind"

class OwnModel(PreTrainedModel):
    config_class = OwnConfig
    def __init__(self, config):
        super().__init__(config)
        self.classifier = torch.nn.Linear(3, config.num_labels)
        self.post_init()
    def forward(self, pixel_values):
        return ImageClassifierOutput(logits=self.classifier(pixel_values.mean((2, 3))))
"""


@pytest.fixture
def trained_run(tmp_path: Path, configs: Path) -> Path:
    """Return a run with checkpoints of steps 2 and 4, of which 2 was best and has a moving average."""
    run = tmp_path / "kept"
    spec = ModelSpec(f"transformers:{configs / 'vit'}", CLASSES, 48, preprocessing=replace(CENTER, crop_mode="squash"))
    model = write_run(run, spec, {"steps": 4, "best": {"metric": "accuracy", "value": 0.5, "step": 2}})
    for step in (2, 4):
        scaled = {
            kind: {name: (value * (step + shift)).contiguous() for name, value in model.state_dict().items()}
            for kind, shift in (("model", 0), ("ema", 1))
            if step == 2 or kind == "model"
        }
        save_checkpoint(run / "checkpoints", Snapshot(step, {}, scaled, {}))
    return run


@pytest.mark.parametrize(("weights", "factor"), [("best", 3), ("step_2", 3), ("step_4", 4)])
def test_weights_of_checkpoints_are_exported(trained_run: Path, tmp_path: Path, weights: str, factor: int) -> None:
    exported = export_run(trained_run, tmp_path / "out", weights=weights)
    assert exported.folder == tmp_path / "out"
    original, actual = (load_model(folder)[0].state_dict() for folder in (trained_run / "model", tmp_path / "out"))
    assert all(torch.equal(actual[name], original[name] * factor) for name in original)


def test_the_best_evaluation_may_be_the_last(trained_run: Path, tmp_path: Path) -> None:
    (trained_run / "result.json").write_text(
        json.dumps({"steps": 9, "best": {"metric": "loss", "value": 0.5, "step": 9}})
    )
    export_run(trained_run, tmp_path / "out", weights="best")
    files = [(folder / "model.safetensors").read_bytes() for folder in (trained_run / "model", tmp_path / "out")]
    assert files[0] == files[1]


def test_wrong_requests_are_refused(trained_run: Path, tmp_path: Path) -> None:
    def refused(text: str, run: Path = trained_run, output: Path | None = tmp_path / "out", **options: Any) -> None:
        with pytest.raises(RunError, match=text) as error:
            export_run(run, output, **options)
        assert "\n" not in str(error.value)

    refused(r"nowhere: no such folder; give the run folder", tmp_path / "nowhere")
    refused(r"is not a finished run, it has no model/hf_fasttrain\.json", tmp_path)
    refused(r"no checkpoint of step 3 \(weights=step_3\); available: step_2, step_4$", weights="step_3")
    refused(r"weights=newest: allowed are last, best, average and step_N", weights="newest")
    refused(r"model holds the weights that result\.json describes; give another folder", output=None, weights="best")
    marker = trained_run / "checkpoints" / "step_00000002" / "model.safetensors"
    marker.write_bytes(marker.read_bytes()[:-1] + b"?")
    refused(r"step_00000002 is corrupt", weights="best")
    other = Snapshot(6, {}, {"model": {"model.x": torch.zeros(1)}}, {})
    save_checkpoint(trained_run / "checkpoints", other)
    refused(r"step_00000006: weights of another model: ", weights="step_6")
    shutil.rmtree(trained_run / "checkpoints")
    refused(r"no checkpoint of step 2 \(weights=best\); available: none", weights="best")
    (trained_run / "result.json").write_text("{}")
    refused(r"it has no best evaluation \(result\.json\)", weights="best")
    assert not (tmp_path / "out").exists()

    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    refused(r"mine exists and is not a model folder of hf_fasttrain", output=tmp_path / "mine")
    refused(r"thesis\.txt exists and is not a model folder", output=tmp_path / "mine" / "thesis.txt")
    refused(r"below: can't be written: Not a directory", output=tmp_path / "mine" / "thesis.txt" / "below")
    (trained_run / "model" / "notes.md").write_text("mine")
    refused(r"holds files that export did not write \(notes\.md\); move them, or give another output", output=None)
    assert (trained_run / "model" / "notes.md").exists()


@needs_onnx
def test_an_earlier_onnx_file_that_is_not_replaced_is_named(trained_run: Path) -> None:
    (trained_run / "model" / "model.onnx").write_bytes(b"an earlier one")
    assert "model.onnx of an earlier export was removed; --onnx writes it again" in export_run(trained_run).notes


def test_a_folder_with_other_files_is_not_replaced(trained_run: Path) -> None:
    (trained_run / "model" / ".git").mkdir()
    with pytest.raises(RunError, match=r"holds files that export did not write \(\.git\); move them"):
        export_run(trained_run)
    assert (trained_run / "model" / ".git").is_dir()


def test_a_link_to_a_folder_stays_a_link(trained_run: Path, tmp_path: Path) -> None:
    (trained_run / "model").rename(tmp_path / "elsewhere")
    (trained_run / "model").symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        export_run(trained_run)
    assert (trained_run / "model").is_symlink()
    assert (tmp_path / "elsewhere" / "model.safetensors").exists()


def test_the_current_directory_is_never_replaced(
    trained_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from hf_fasttrain.report.report import write_report

    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(RunError, match="here: is the current directory and would be overwritten; give a subfolder"):
        export_run(trained_run, Path("."))
    with pytest.raises(RunError, match="the report could not be written: Is a directory"):
        write_report([trained_run], Path("."))


def test_wrong_onnx_requests_are_refused(trained_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in (trained_run / "model").iterdir()}

    def refused(text: str) -> None:
        with pytest.raises(RunError, match=text):
            export_run(trained_run, onnx=True)
        assert {path.name: path.read_bytes() for path in (trained_run / "model").iterdir()} == before

    def refused_after_an_export() -> None:
        photo_list, real = [], torch.onnx.export

        def export_once(*arguments: Any, **options: Any) -> Any:
            photo_list.append(photo_list[0] if photo_list else real(*arguments, **options))
            return photo_list[0]

        monkeypatch.setattr(torch.onnx, "export", export_once)
        with monkeypatch.context() as patched:
            patched.setattr(onnx_file, "difference", lambda actual, expected: math.nan)
            refused(r"model\.onnx: onnxruntime's logits differ from torch's by nan; leave --onnx out")
        monkeypatch.setattr(onnx_file, "_verify", lambda *_: 1 / 0)
        refused(r"model\.onnx: onnxruntime can't run this model \(division by zero\)")

    def raise_error(*_: Any, **__: Any) -> None:
        raise torch.onnx.OnnxExporterError("no such operator\nand so on")

    if HAS_ONNX:
        in_child(refused_after_an_export)
        with monkeypatch.context() as patched:
            patched.setattr(onnx_file, "LARGEST_BYTES", 1000)
            refused(r"its weights are above 2 GB, the most that one ONNX file holds; leave --onnx out")
        monkeypatch.setattr(torch.onnx, "export", raise_error)
        refused(r"torch can't export this model to ONNX \(no such operator.*\); leave --onnx out")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    refused(r"--onnx needs onnx, onnxscript, onnxruntime: pip install 'hf_fasttrain\[onnx\]'")


def test_onnx_export_prints_nothing(runs: dict[str, tuple[Path, ExportResult]]) -> None:
    assert {(run.parent / "printed").read_text() for run, _ in runs.values()} == {""}
