"""The page of likely label errors, in the style of the report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hf_fasttrain.report.report import to_html
from hf_fasttrain.report.sections import Page, Section
from hf_fasttrain.report.tables import Column, Table, integer_cell, label_error_pictures, text_cells
from hf_fasttrain.run_folder.file_names import LABEL_ERRORS_FILE, LABEL_ERRORS_PAGE
from hf_fasttrain.run_folder.gallery import Gallery
from hf_fasttrain.utils.files import write_atomically

MAX_PAIRS = 30  # of classes


def write_label_error_page(folder: Path, subtitle: str, pairs: Sequence[tuple[str, str, int]]) -> None:
    """Write the page of a folder that has the pictures. `pairs`: given and suggested label, number of images.

    Raises OSError.
    """
    pictures = label_error_pictures(folder, Gallery.load(folder))
    rows = [[*text_cells(given, suggested), integer_cell(number)] for given, suggested, number in pairs[:MAX_PAIRS]]
    columns = [Column("label"), Column("suggested"), Column("images", True)]
    table = Table("pairs-table", "Which labels would become which", columns, rows)
    text = (
        "The likeliest first. Probabilities are by models that were fitted without the image. Look before you correct: "
        f"hard and unusual images are here too. {LABEL_ERRORS_FILE} has all images; its column label is the one to "
        "correct."
    )
    none = "No label is probably wrong."
    sections = [
        Section("label-errors", "Likely label errors", text if pictures else none, pictures=pictures),
        *([Section("pairs", "Classes", tables=[table])] if rows else []),
    ]
    page = Page("Likely label errors", subtitle, sections=sections)
    write_atomically(folder / LABEL_ERRORS_PAGE, to_html(page))
