"""Images that could not be decoded in training: counted, reported with their place, and too many of them an error."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

from hf_fasttrain.run_folder.file_names import BAD_IMAGES_FILE
from hf_fasttrain.run_folder.metrics_file import read_new_bad_images
from hf_fasttrain.utils.errors import DataError
from hf_fasttrain.utils.files import reason
from hf_fasttrain.utils.json_lines import append_line


@dataclass(frozen=True)
class BadImage:
    """An image that can't be decoded, and its substitute from the same split."""

    split: str
    index: int  # in the split
    path: str | None
    error: str
    substitute: int  # index in the split


Event = BadImage | str  # a str is a note, which is shown once


class BadImages:
    """The bad images of a run, as listed in bad_images.jsonl; stops the run if there are too many.

    Every process appends its own lines, and reads those of others from where it has read before; `count` counts each
    image once.
    """

    def __init__(self, folder: Path | None, max_fraction: float, note: Callable[[str], None]) -> None:
        self.path = folder / BAD_IMAGES_FILE if folder is not None else None
        self.max_fraction, self.note = max_fraction, note
        self._bad: dict[tuple[str, int], BadImage] = {}  # met by this process
        self._listed: set[tuple[str, int]] = set()  # in the file
        self._number: Counter[str] = Counter()  # of bad images, by split: met or listed
        self._read_to = 0  # bytes of the file

    def report(self, event: Event, num_images: int) -> None:
        """Record an event of a split with `num_images` images; DataError if too many of them are bad."""
        if isinstance(event, str):
            self.note(event)
            return
        key = (event.split, event.index)
        if key in self._bad:
            return
        if not self._bad:
            self.note(f"bad images are replaced by others: {_describe(event)}; {self.where}")
        self._bad[key] = event
        self._number[event.split] += key not in self._listed
        self._read_new_lines()
        self._write(event)
        self._require_few(event.split, num_images)

    def _write(self, event: BadImage) -> None:
        if self.path is None or (event.split, event.index) in self._listed:
            return
        try:
            append_line(self.path, json.dumps(asdict(event)))
        except OSError as error:
            self.note(f"{self.path} can't be written ({reason(error)}): not all bad images are listed there")

    def _read_new_lines(self) -> None:
        if self.path is None:
            return
        lines, self._read_to = read_new_bad_images(self.path, self._read_to)
        for line in lines:
            key = (line["split"], line["index"])
            self._number[key[0]] += key not in self._listed and key not in self._bad
            self._listed.add(key)

    def _require_few(self, split: str, num_images: int) -> None:
        number = self._number[split]
        if number <= self.max_fraction * num_images:
            return
        bad = [event for event in self._bad.values() if event.split == split]
        first = "\n".join(f"  {_describe(event)}" for event in bad[:10])
        more = f"\n  ... and {number - len(bad[:10])} more" if number > len(bad[:10]) else ""
        error = DataError(
            f"data.max_bad_fraction={self.max_fraction}: {number} of {num_images:,} images of split '{split}' "
            f"can't be decoded; `hf-fasttrain check RECIPE --images` finds them all; repair them, remove them or "
            f"raise data.max_bad_fraction:\n{first}{more}"
        )
        error.on_every_process = False
        raise error

    @property
    def where(self) -> str:
        """Where bad images are listed, for messages."""
        return f"{self.path} lists them" if self.path else "`hf-fasttrain check RECIPE --images` lists them"

    @property
    def count(self) -> int:
        """Number of bad images on all processes, including runs that this one has resumed."""
        self._read_new_lines()
        return self._number.total()


def _describe(event: BadImage) -> str:
    return f"split '{event.split}', row {event.index}: {event.error}"
