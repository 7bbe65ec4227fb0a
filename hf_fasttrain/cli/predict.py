"""The command `predict`."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import closing
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hf_fasttrain.cli.arguments import ModelOption, PushedRunArgument, WeightsOption
from hf_fasttrain.cli.terminal import print_note
from hf_fasttrain.utils.errors import DataError, UserError
from hf_fasttrain.utils.printing import JsonLines, JsonList
from hf_fasttrain.utils.streams import flush_stdout

if TYPE_CHECKING:
    from hf_fasttrain.prediction import Predictions, Row

LONGEST_SCORE = len("0.0000")
PREDICTED = "predicted"  # column of classes that reach their thresholds


def predict(
    run: PushedRunArgument,
    images: Annotated[list[str], typer.Argument(help="Image files or folders of images.")],
    top: Annotated[int, typer.Option(min=1, help="How many classes to show.")] = 5,
    weights: WeightsOption = None,
    model: ModelOption = None,
    device: Annotated[str, typer.Option(help="auto: a GPU if there is one; cpu, cuda, cuda:1.")] = "auto",
    workers: Annotated[
        int | None, typer.Option(min=0, help="Processes that decode; by default some for a long list of images.")
    ] = None,
    calibrated: Annotated[
        bool, typer.Option("--calibrated", help="Scores with the temperature fitted on the evaluation split.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON: one list.")] = False,
    as_json_lines: Annotated[bool, typer.Option("--json-lines", help="Print a line of JSON for each image.")] = False,
) -> None:
    """Print the most likely classes of image files, as they are computed."""
    from hf_fasttrain.inference import open_predictions
    from hf_fasttrain.utils.progress_bar import progress_bar

    if as_json and as_json_lines:
        raise UserError("--json and --json-lines are two forms of the same output; give one of them")
    bad: list[str] = []
    options: dict[str, Any] = {"top": top, "weights": weights, "model": model, "device": device, "workers": workers}
    options["calibrated"] = calibrated
    predictions = open_predictions(run, images, **options, on_bad_image=bad.append, note=print_note)
    printed = JsonList() if as_json else JsonLines() if as_json_lines else _Table(predictions)
    with progress_bar("predicting", len(predictions)) as advance, closing(predictions.batches()) as batches:
        for batch in batches:
            printed.add(batch.rows)
            flush_stdout()
            advance(batch.num_images)
    printed.close()
    if bad:
        raise DataError("\n  ".join([f"{len(bad)} of {len(predictions)} images skipped:", *bad]))


class _Table:
    """Prints the predictions of images in a table."""

    def __init__(self, predictions: Predictions) -> None:
        from hf_fasttrain.utils.terminal import StreamedTable, wide_terminal

        longest_class = max(map(len, predictions.spec.class_names))
        lengths, titles = [predictions.longest_name, longest_class, LONGEST_SCORE], ["image", "class", "score"]
        if predictions.thresholds is not None:
            lengths, titles = [*lengths, len(PREDICTED)], [*titles, PREDICTED]
        self._table = StreamedTable(wide_terminal(), titles, lengths)
        self.close = self._table.close

    def add(self, rows: Iterable[Row]) -> None:
        self._table.add([cells for row in rows for cells in _cells(row)])


def _cells(row: Row) -> list[tuple[str, ...]]:
    """Return a line for each class of an image, of which the first has the image's name."""
    predicted = row.get("predicted")
    return [
        (
            "" if number else row["image"],
            guess["class"],
            f"{guess['score']:.4f}",
            *([] if predicted is None else ["yes" if guess["class"] in predicted else ""]),
        )
        for number, guess in enumerate(row["classes"])
    ]
