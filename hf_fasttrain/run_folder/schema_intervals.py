"""The schema of a result's intervals, as schemas.py has those of the other parts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

MAX_METRICS = 1000
Name = Annotated[str, StringConstraints(max_length=1000)]
Ends = Annotated[list[Annotated[float, Field(allow_inf_nan=False)]], Field(min_length=2, max_length=2)]
Number = Annotated[int, Field(ge=0, lt=2**53)]


class IntervalsPart(BaseModel):
    """`Intervals` (run_folder/intervals.py)."""

    model_config = ConfigDict(strict=True, extra="ignore")
    over: Literal["images", "groups"]
    number: Number
    resamples: Number
    confidence: Annotated[float, Field(gt=0, lt=1)]
    seed: Number
    metrics: Annotated[dict[Name, Ends], Field(max_length=MAX_METRICS)] = {}
    without: Annotated[dict[Name, Name], Field(max_length=MAX_METRICS)] = {}
