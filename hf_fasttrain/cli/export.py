"""The command `export`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from hf_fasttrain.cli.arguments import ModelOption, RunArgument, WeightsOption
from hf_fasttrain.utils.printing import echo


def export(
    run: RunArgument,
    output: Annotated[Path | None, typer.Option(help="Output folder; by default the run's model folder.")] = None,
    onnx: Annotated[bool, typer.Option("--onnx", help="Also write model.onnx, checked in onnxruntime.")] = False,
    weights: WeightsOption = None,
    model: ModelOption = None,
) -> None:
    """Write a finished run's model for other tools: timm, transformers, onnxruntime."""
    from hf_fasttrain.export.export import export_run

    exported = export_run(run, output, onnx=onnx, weights=weights, model=model)
    echo(f"{exported.folder}: opened by {', '.join(exported.forms)}")
    for note in exported.notes:
        echo(f"note: {note}")
    if exported.onnx_difference is not None:
        echo(f"model.onnx: logits differ by at most {exported.onnx_difference:.1e} in onnxruntime")
