"""A classifier as an ONNX file, checked in onnxruntime."""

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
from hf_fasttrain.utils.errors import RunError, first_lines

ONNX_FILE = "model.onnx"
OPSET = 20  # onnxruntime 1.17 and later
PACKAGES = ("onnx", "onnxscript", "onnxruntime")
LARGEST_BYTES = 2**31 - 2**20  # of weights: protobuf's limit, and room for the graph
TOLERANCE = 1e-4  # of logits, or of the largest one where that is above 1


class Named(nn.Module):
    """A model whose input is called `images`."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)


def require_onnx() -> None:
    """Raise RunError unless what writes and checks an ONNX file is installed."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise RunError(f"--onnx needs {', '.join(missing)}: pip install 'hf_fasttrain[onnx]'")


def write_onnx(model: nn.Module, spec: ModelSpec, pre: Preprocessing, images: Tensor, path: Path) -> float:
    """Write a model as one ONNX file, and return how far onnxruntime's logits are from torch's at most.

    Input `images` (N, 3, S, S), normalised fp32 with any N; output `logits` (N, K). Its metadata hold class_names,
    preprocessing and multi_label as JSON. `images` (B, 3, S, S) are checked one by one and together. Raises RunError
    if the model can't be exported, or other logits come back.
    """
    import onnx

    if sum(tensor.nbytes for tensor in model.state_dict().values()) > LARGEST_BYTES:
        raise RunError(f"{spec.name}: its weights are above 2 GB, the most that one ONNX file holds; leave --onnx out")
    with quiet(), torch.no_grad():
        named = Named(model).eval()
        try:
            program = torch.onnx.export(
                named,
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
            _forget_sources(proto)
            onnx.helper.set_model_props(proto, metadata_of(spec, pre))
            onnx.save_model(proto, path)
        except (torch.onnx.errors.OnnxExporterError, RuntimeError, ValueError, TypeError) as error:
            raise RunError(
                f"{spec.name}: torch can't export this model to ONNX ({first_lines(error)}); leave --onnx out"
            ) from None
        try:
            return _checked(path, named, images)
        except RunError:
            raise
        except Exception as error:  # noqa: BLE001 - onnxruntime's errors have no base of their own
            raise RunError(
                f"{path.name}: onnxruntime can't run this model ({first_lines(error)}); leave --onnx out"
            ) from None


def _forget_sources(proto: Any) -> None:
    """Take out where in this machine's files each operation comes from: the file is for others."""
    for graph in (proto.graph, *proto.functions):
        named = [graph, *graph.node, *graph.value_info]
        named += [*graph.input, *graph.output, *graph.initializer] if graph is proto.graph else []
        for part in named:
            part.ClearField("metadata_props")
            part.ClearField("doc_string")


def metadata_of(spec: ModelSpec, pre: Preprocessing) -> dict[str, str]:
    """Return the metadata of an ONNX file: what its users need beside the model."""
    steps = {
        "image_size": pre.image_size,
        "resize_px": math.floor(pre.image_size / pre.crop_pct),  # of the short side, or of both where squashed
        "crop_mode": pre.crop_mode,
        "interpolation": pre.interpolation,  # Pillow's filter
        "mean": list(pre.mean),  # of pixels / 255
        "std": list(pre.std),
    }
    return {
        "class_names": json.dumps(spec.class_names),
        "preprocessing": json.dumps(steps),
        "multi_label": json.dumps(spec.multi_label),
        "hf_fasttrain": importlib.metadata.version("hf_fasttrain"),
    }


def _checked(path: Path, model: nn.Module, images: Tensor) -> float:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    wanted, apart = model(images), []
    for number in (1, len(images)):
        got = session.run(["logits"], {"images": images[:number].contiguous().numpy()})[0]
        apart.append(difference(torch.from_numpy(got), wanted[:number]))
        if not apart[-1] <= TOLERANCE * scale_of(wanted):  # nor if it is no number
            raise RunError(
                f"{path.name}: onnxruntime's logits differ from torch's by {apart[-1]:.2g}; leave --onnx out"
            )
    return max(apart)


def difference(got: Tensor, expected: Tensor) -> float:
    """Return the largest difference of two (B, K) logits; infinite for another shape."""
    return float((got - expected).abs().max()) if got.shape == expected.shape else math.inf


def scale_of(logits: Tensor) -> float:
    """Return what a tolerance of fp32 logits is multiplied by: the largest of them, if above 1."""
    return max(1.0, float(logits.abs().max()))


@contextmanager
def quiet() -> Iterator[None]:
    """Keep the progress and warnings of others' libraries from the terminal."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
