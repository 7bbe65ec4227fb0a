"""Arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

RecipeArgument = Annotated[
    str, typer.Argument(help="A recipe file, a run folder, the name of a shipped recipe, or hf://OWNER/NAME.")
]
Overrides = Annotated[list[str] | None, typer.Argument(help="section.key=value, such as train.batch_size=64")]
RunArgument = Annotated[Path, typer.Argument(help="A run folder.")]
WeightsOption = Annotated[
    str | None,
    typer.Option(help="Weights: last, best, average, or step_N of a kept checkpoint; by default those in RUN/model."),
]
ModelOption = Annotated[
    str | None,
    typer.Option(
        "--model",
        metavar="MODULE:FUNCTION",
        help="A function, imported from here, that returns the model of a run made without a recipe.",
    ),
]
PushedRunArgument = Annotated[str, typer.Argument(help="A run folder, or hf://OWNER/NAME.")]
