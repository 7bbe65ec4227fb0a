"""Files of a run folder that are read back: what is written fits its schema, and so does what older versions wrote."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from hf_fasttrain.data.pixels.bad_images import BadImage
from hf_fasttrain.data.pixels.resize import FILTERS
from hf_fasttrain.models.model import ModelSpec, Preprocessing
from hf_fasttrain.run_folder import schemas
from hf_fasttrain.run_folder.gallery import Gallery, Picture
from hf_fasttrain.run_folder.result import Result
from hf_fasttrain.train.checkpoint_state import State
from hf_fasttrain.train.early_stopping import EarlyStop


@pytest.mark.parametrize(
    ("written", "schema"),
    [
        (ModelSpec, schemas.SpecFile), (Preprocessing, schemas.PreprocessingPart), (State, schemas.TrainingState),
        (Result, schemas.ResultFile), (EarlyStop, schemas.EarlyStopPart), (Gallery, schemas.GalleryFile),
        (Picture, schemas.PicturePart), (BadImage, schemas.BadImagePart),
    ],
)  # fmt: skip
def test_every_field_that_is_written_has_a_type_and_a_bound(written: Any, schema: Any) -> None:
    missing = {each.name for each in fields(written)} - schema.model_fields.keys()
    assert not missing


def test_filters_are_those_that_resize_has() -> None:
    allowed = schemas.PreprocessingPart.model_fields["interpolation"].annotation
    assert set(allowed.__args__) == set(FILTERS)
