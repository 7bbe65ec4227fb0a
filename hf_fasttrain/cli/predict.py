"""The command `predict`."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_fasttrain.cli.arguments import ModelOption, PushedRunArgument, WeightsOption
from hf_fasttrain.cli.terminal import print_note
from hf_fasttrain.utils.errors import DataError
from hf_fasttrain.utils.printing import echo_json


def predict(
    run: PushedRunArgument,
    images: Annotated[list[str], typer.Argument(help="Image files or folders of images.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 5,
    weights: WeightsOption = None,
    model: ModelOption = None,
    device: Annotated[str, typer.Option(help="auto: a GPU if there is one; cpu, cuda, cuda:1.")] = "auto",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Print the most likely classes of image files."""
    from hf_fasttrain.inference import predict_images
    from hf_fasttrain.utils.terminal import build_table, wide_terminal

    bad: list[str] = []
    predictions = predict_images(
        run, images, top=top, weights=weights, model=model, device=device, on_bad_image=bad.append, note=print_note
    )
    if as_json:
        echo_json(predictions, indent=2)
    elif predictions:
        rows = [
            ("" if number else row["image"], guess["class"], f"{guess['score']:.4f}")
            for row in predictions
            for number, guess in enumerate(row["classes"])
        ]
        wide_terminal().print(build_table(("image", "class", "score"), rows))
    if bad:
        raise DataError("\n  ".join([f"{len(bad)} of {len(bad) + len(predictions)} images skipped:", *bad]))
