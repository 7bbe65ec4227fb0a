"""Exports a classifier as an ONNX file, and verifies it in onnxruntime."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hf_fasttrain.models.model import ModelSpec, Preprocessing
from hf_fasttrain.run_folder.calibration import Calibration, published
from hf_fasttrain.utils.errors import RunError, first_lines

OPSET = 20  # onnxruntime 1.17 and later
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_BYTES = 2**31 - 2**20  # of weights: protobuf's limit, and room for the graph
TOLERANCE = 1e-4  # of logits, relative to the largest one if that is above 1


class _NamedInput(nn.Module):
    """Names the input of a model `images`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


def require_onnx() -> None:
    """Raise RunError unless the packages for ONNX are installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise RunError(f"--onnx needs {', '.join(missing)}: pip install 'hf_fasttrain[onnx]'")


def write_onnx(
    model: nn.Module,
    spec: ModelSpec,
    pre: Preprocessing,
    images: Tensor,
    path: Path,
    calibration: Calibration | None = None,
) -> float:
    """Write a model as one ONNX file, and return the largest difference of onnxruntime's logits from torch's.

    Input `images` (N, 3, S, S), normalised fp32 with any N; output `logits` (N, K). Its metadata hold class_names,
    preprocessing and multi_label as JSON, and temperature and thresholds where they are known. `images` (B, 3, S, S)
    are checked one by one and together. Raises RunError if the model can't be exported, or its logits differ.
    """
    import onnx

    if sum(tensor.nbytes for tensor in model.state_dict().values()) > LARGEST_BYTES:
        raise RunError(f"{spec.name}: its weights are above 2 GB, the most that one ONNX file holds; leave --onnx out")
    with quiet(), torch.no_grad():
        classifier = _NamedInput(model).eval()
        try:
            program = torch.onnx.export(
                classifier,
                (images[:2].contiguous(),),
                dynamo=True,
                input_names=["images"],
                output_names=["logits"],
                dynamic_shapes={"images": {0: torch.export.Dim("batch")}},
                opset_version=OPSET,
                external_data=False,
                verbose=False,
            )
            assert program is not None
            proto = program.model_proto
            _remove_sources(proto)
            onnx.helper.set_model_props(proto, metadata_of(spec, pre, calibration))
            onnx.save_model(proto, path)
        except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
            raise RunError(
                f"{spec.name}: torch can't export this model to ONNX ({first_lines(error)}); leave --onnx out"
            ) from None
        try:
            return _verify(path, classifier, images)
        except RunError:
            raise
        except Exception as error:  # noqa: BLE001 - onnxruntime's errors have no base class
            raise RunError(
                f"{path.name}: onnxruntime can't run this model ({first_lines(error)}); leave --onnx out"
            ) from None


def _remove_sources(proto: Any) -> None:
    """Remove the stack traces of operations, which have paths of this machine."""
    for graph in (proto.graph, *proto.functions):
        parts = [graph, *graph.node, *graph.value_info]
        parts += [*graph.input, *graph.output, *graph.initializer] if graph is proto.graph else []
        for part in parts:
            part.ClearField("metadata_props")
            part.ClearField("doc_string")


def metadata_of(spec: ModelSpec, pre: Preprocessing, calibration: Calibration | None = None) -> dict[str, str]:
    """Return the metadata of an ONNX file: classes, preprocessing and calibration."""
    steps = {
        "image_size": pre.image_size,
        "resize_px": math.floor(pre.image_size / pre.crop_pct),  # of the short side, or of both for squash
        "crop_mode": pre.crop_mode,
        "interpolation": pre.interpolation,  # Pillow's filter
        "mean": list(pre.mean),  # of pixels / 255
        "std": list(pre.std),
    }
    return {
        "class_names": json.dumps(spec.class_names),
        "preprocessing": json.dumps(steps),
        "multi_label": json.dumps(spec.multi_label),
        **{name: json.dumps(value) for name, value in (published(calibration) if calibration else {}).items()},
        "hf_fasttrain": importlib.metadata.version("hf_fasttrain"),
    }


def _verify(path: Path, model: nn.Module, images: Tensor) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    expected, differences = model(images), []
    for number in (1, len(images)):
        logits = session.run(["logits"], {"images": images[:number].contiguous().numpy()})[0]
        differences.append(difference(torch.from_numpy(logits), expected[:number]))
        if not differences[-1] <= TOLERANCE * scale_of(expected):  # also true for NaN
            raise RunError(
                f"{path.name}: onnxruntime's logits differ from torch's by {differences[-1]:.2g}; leave --onnx out"
            )
    return max(differences)


def difference(logits: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two (B, K) logits; infinite if their shapes differ."""
    return float((logits - expected).abs().max()) if logits.shape == expected.shape else math.inf


def scale_of(logits: Tensor) -> float:
    """Return the scale of the tolerance: the largest logit, at least 1."""
    return max(1.0, float(logits.abs().max()))


@contextmanager
def quiet() -> Iterator[None]:
    """Silence progress bars and warnings of other libraries."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
