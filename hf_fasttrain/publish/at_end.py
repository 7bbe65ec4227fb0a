"""A report written when a run has ended: whatever goes wrong, the run itself has ended well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hf_fasttrain.files import reason
from hf_fasttrain.predictions import PREDICTIONS_FILE, Predictions


def report_at_end(
    run: Path,
    predictions: Predictions | None,
    say: Callable[[str], None],
    show: Callable[[], object] = lambda: None,
) -> None:
    """Write predictions, what `show` writes for the report, and the report; `say` is told of what can't be written."""
    try:
        if predictions is not None:
            predictions.save(run / PREDICTIONS_FILE)
        show()
        from hf_fasttrain.publish.report import write_report

        write_report([run])
    except Exception as error:  # noqa: BLE001 - others' drawing code
        say(f"note: no report: {reason(error)}; `hf-fasttrain report {run}` writes it later")
