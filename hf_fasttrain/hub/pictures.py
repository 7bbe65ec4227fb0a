"""The pictures of a model card: which there are (PICTURES), and where they come from."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

from hf_fasttrain.run_folder.file_names import (
    CONFUSION_PICTURE,
    CURVES_PICTURE,
    GALLERY_FOLDER,
    METRICS_FILE,
    PREDICTIONS_FILE,
)

PICTURES = {  # name -> what it shows
    CURVES_PICTURE: "loss, accuracy and learning rate over training",
    CONFUSION_PICTURE: "confusion matrix",
}


def pictures_of(run: Path) -> dict[str, bytes | Path]:
    """Return name -> content of a run's pictures: those of its report if they are up to date, else new ones.

    Pictures without data are omitted.
    """

    figures = [run / name for name in (METRICS_FILE, PREDICTIONS_FILE) if (run / name).is_file()]
    if not figures:
        return {}
    newest = max(path.stat().st_mtime_ns for path in figures)
    kept = {name: run / GALLERY_FOLDER / name for name in PICTURES}
    found = {name: path for name, path in kept.items() if path.is_file() and path.stat().st_mtime_ns >= newest}
    return dict(found) if found else _drawn(run)


def _drawn(run: Path) -> dict[str, bytes | Path]:
    from hf_fasttrain.report.pictures import DRAWINGS
    from hf_fasttrain.report.record import read_record

    record = read_record(run)  # a picture that can't be drawn is omitted: it must not prevent the push
    with tempfile.TemporaryDirectory() as folder:
        drawn = {name: Path(folder) / name for name in DRAWINGS}
        for name, draw in DRAWINGS.items():
            with suppress(ArithmeticError, LookupError, RuntimeError, TypeError, ValueError):
                draw(record, drawn[name])
        return {name: path.read_bytes() for name, path in drawn.items() if path.is_file()}
