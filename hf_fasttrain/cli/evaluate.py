"""The command `evaluate`."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_fasttrain.cli.arguments import ModelOption, Overrides, PushedRunArgument, WeightsOption
from hf_fasttrain.cli.terminal import is_main, print_note
from hf_fasttrain.utils.printing import echo_json


def evaluate(
    run: PushedRunArgument,
    overrides: Overrides = None,
    split: Annotated[str | None, typer.Option(help="A split of the dataset; by default the evaluation split.")] = None,
    weights: WeightsOption = None,
    model: ModelOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Evaluate a run's model on its evaluation split, or on another split or dataset."""
    from hf_fasttrain.inference import evaluate_run
    from hf_fasttrain.utils.terminal import build_table, wide_terminal

    measured = evaluate_run(run, overrides or [], split=split, weights=weights, model=model, note=print_note)
    if not is_main():
        return
    if as_json:
        echo_json(measured)
    else:
        rows = [(name, f"{v:.4f}" if isinstance(v, float) else str(v)) for name, v in measured.items()]
        wide_terminal().print(build_table(("metric", "value"), rows))
