"""Pictures stored for a run's report: training images as the model saw them, and its worst mistakes."""

from __future__ import annotations

import io
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image

from hf_fasttrain.run_folder.file_names import GALLERY_FILE, GALLERY_FOLDER
from hf_fasttrain.run_folder.schemas import GalleryFile, read_file
from hf_fasttrain.utils.files import new_folder, sync_files, write_json

THUMBNAIL_PX = 160  # longer side


@dataclass(frozen=True)
class Picture:
    """One image and its caption. `file` is in the folder of gallery.json."""

    file: str
    name: str  # class/file of the image, or its row
    truth: dict[str, float]  # class -> share of the target; 1 unless mixed or smoothed
    predicted: dict[str, float | None] = field(default_factory=dict)  # class -> softmax; None if multi-label
    loss: float | None = None


@dataclass(frozen=True)
class Gallery:
    """The pictures of a run."""

    class_names: list[str] = field(default_factory=list)
    training: list[Picture] = field(default_factory=list)
    training_step: int = 0  # counted from 1
    mistakes: list[Picture] = field(default_factory=list)
    mistakes_step: int = 0  # the model's step when it made them
    mistakes_split: str = ""

    @classmethod
    def load(cls, run: Path) -> Gallery:
        """Return the gallery of a run folder; an empty one if there is none. Raises RunError for a damaged one."""
        path = run / GALLERY_FOLDER / GALLERY_FILE
        if not path.exists():
            return cls()
        values = GalleryFile.model_validate(read_file(path, GalleryFile)).model_dump()
        for name in ("training", "mistakes"):
            values[name] = [Picture(**item) for item in values[name]]
        return cls(**values)

    def save(self, run: Path, pixels: dict[str, np.ndarray]) -> None:
        """Write the gallery and its pictures: file name -> (H, W, 3) uint8. Raises OSError."""
        with new_folder(run / GALLERY_FOLDER, marks=[GALLERY_FILE]) as folder:
            for name, image in pixels.items():
                (folder / name).write_bytes(thumbnail(image))
            write_json(folder / GALLERY_FILE, asdict(self))
            sync_files(folder)


def thumbnail(pixels: np.ndarray) -> bytes:
    """Return a JPEG of pixels (H, W, 3) uint8: small images are enlarged without smoothing, large ones reduced."""
    image = Image.fromarray(pixels)
    longer = max(image.size)
    if longer > THUMBNAIL_PX:
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    elif longer <= THUMBNAIL_PX // 2:
        factor = THUMBNAIL_PX // longer
        image = image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=82)
    return buffer.getvalue()
