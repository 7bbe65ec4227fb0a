"""The command `evaluate`."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from hf_fasttrain.cli.arguments import ModelOption, Overrides, PushedRunArgument, WeightsOption
from hf_fasttrain.cli.terminal import is_main, print_note, wide_console


def evaluate(
    run: PushedRunArgument,
    overrides: Overrides = None,
    split: Annotated[str | None, typer.Option(help="A split of the dataset; by default the evaluation split.")] = None,
    weights: WeightsOption = None,
    model: ModelOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate a run's model on its evaluation split, or on another split or dataset."""
    from rich.table import Table
    from rich.text import Text

    from hf_fasttrain.inference import evaluate_run

    measured = evaluate_run(run, overrides or [], split=split, weights=weights, model=model, note=print_note)
    if not is_main():
        return
    if as_json:
        print(json.dumps(measured))
    else:
        table = Table("metric", "value")
        for name, value in measured.items():
            table.add_row(Text(name), Text(f"{value:.4f}" if isinstance(value, float) else str(value), overflow="fold"))
        wide_console().print(table)
