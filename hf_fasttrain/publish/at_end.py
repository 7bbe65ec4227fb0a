"""A report written when a run has ended: whatever goes wrong, the run itself has ended well."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from hf_fasttrain.files import reason


def report_at_end(
    run: Path,
    say: Callable[[str], None],
    not_written: Callable[[str, BaseException], None],
    show: Callable[[], object] = lambda: None,
) -> None:
    """Write what `show` writes for the report, and the report.

    `not_written` is told of what the disk does not take, and `say` of anything else that goes wrong.
    """
    try:
        show()
        from hf_fasttrain.publish.report import write_page

        write_page([run])
    except OSError as error:
        not_written(str(run / "report.html"), error)
    except Exception as error:  # noqa: BLE001 - others' drawing code
        say(f"note: no report: {reason(error)}; `hf-fasttrain report {run}` writes it later")
