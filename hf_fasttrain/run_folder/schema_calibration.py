"""The schema of a calibration, in a model's folder and in the state of a checkpoint."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, model_validator

MAX_BINS, MAX_THRESHOLDS = 100, 100_000
Count = Annotated[int, Field(ge=0, lt=2**53)]
Share = Annotated[float, Field(ge=0, le=1)]
Text = Annotated[str, StringConstraints(max_length=1000)]
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 100.0


class ReliabilityPart(BaseModel):
    """`Reliability` (run_folder/calibration.py)."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    loss: Annotated[float, Field(ge=0)]
    ece: Share
    brier: Annotated[float, Field(ge=0)]
    counts: Annotated[list[Count], Field(min_length=1, max_length=MAX_BINS)]
    confidence: Annotated[list[Share], Field(max_length=MAX_BINS)]
    correct: Annotated[list[Share], Field(max_length=MAX_BINS)]

    @model_validator(mode="after")
    def _of_the_same_bins(self) -> Self:
        if not len(self.counts) == len(self.confidence) == len(self.correct):
            raise ValueError("counts, confidence and correct are not of the same bins")
        return self


class CalibrationPart(BaseModel):
    """`Calibration` (run_folder/calibration.py)."""

    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)
    step: Count
    split: Text
    images: Count
    temperature: Annotated[float, Field(ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE)] | None = None
    thresholds: Annotated[list[Share], Field(max_length=MAX_THRESHOLDS)] | None = None
    before: ReliabilityPart | None = None
    after: ReliabilityPart | None = None
    remark: Text = ""
