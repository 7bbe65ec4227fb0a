"""What a recipe's sections are made of: types of keys, and the tag of each: *result*, *speed* or *output*."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema

from hf_fasttrain.utils.duration import CLOCK_PATTERN, MINUTES_PATTERN, PATTERN, PERCENT_PATTERN, Duration


class Section(BaseModel):
    """A section of the recipe: unknown keys are refused, types are strict, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


DurationField = Annotated[
    Duration,
    BeforeValidator(Duration.parse),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "pattern": PATTERN, "examples": ["90 epochs", "5000 steps"]}),
]
IntervalField = Annotated[
    Duration,
    BeforeValidator(lambda text: Duration.parse(text, minutes=True)),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "pattern": CLOCK_PATTERN, "examples": ["1 epoch", "500 steps", "10 minutes"]}),
]
ClockField = Annotated[
    Duration,
    BeforeValidator(lambda text: Duration.parse_minutes(text)),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "pattern": MINUTES_PATTERN, "examples": ["10 minutes", "1 minute"]}),
]
Auto = Literal["auto"]


def _parse_warmup(text: object) -> object:
    try:
        return text if text == "auto" else Duration.parse_part(text)
    except ValueError as error:
        raise ValueError(str(error).replace("must be 0,", "must be auto, 0,")) from None


WarmupField = Annotated[
    Literal["auto"] | Duration,
    BeforeValidator(_parse_warmup),
    PlainSerializer(lambda value: "0" if isinstance(value, Duration) and not value.count else str(value)),
    WithJsonSchema(
        {
            "anyOf": [
                {"const": "auto"},
                {"const": 0},
                {"type": "string", "pattern": f"{PATTERN}|{PERCENT_PATTERN}|^0$"},
            ],
            "examples": ["auto", "5%", "1 epoch", "500 steps", 0],
        }
    ),
]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]

_NUMBER = r"\d+(\.\d+)?"
# What timm's parser reads; it passes over what it does not know without a word.
POLICY_PATTERN = (
    rf"^(rand(-(m\d+|n[1-9]\d*|p{_NUMBER}|mstd{_NUMBER}|mmax\d+|inc[01]|t(weights|3aw|3a)))*"
    rf"|(v0|v0r|original|originalr|3a)(-mstd{_NUMBER})?"
    rf"|augmix(-(m\d+|w[1-9]\d*|d[1-9]\d*|b[01]|a{_NUMBER}|mstd{_NUMBER}))*)$"
)
POLICIES = ["rand-m9-mstd0.5-inc1", "original", "v0", "3a", "augmix-m3-w3"]


def _parse_policy(text: object) -> object:
    if not isinstance(text, str) or not re.match(POLICY_PATTERN, text):
        raise ValueError(
            f"must be a policy of timm, such as {', '.join(POLICIES[:-1])} or {POLICIES[-1]}; rand takes -m, -n, -p, "
            "-mstd, -mmax, -inc and -t, augmix -m, -w, -d, -a, -b and -mstd, v0, v0r, original, originalr and 3a -mstd"
        )
    return text


PolicyField = Annotated[
    str,
    BeforeValidator(_parse_policy),
    WithJsonSchema({"type": "string", "pattern": POLICY_PATTERN, "examples": POLICIES}),
]


def result(default: Any, description: str, **limits: Any) -> Any:
    """Return a field that changes what is learned."""
    return _field("result", default, description, limits)


def speed(default: Any, description: str, **limits: Any) -> Any:
    """Return a field that changes only speed and memory; results are the same up to rounding."""
    return _field("speed", default, description, limits)


def output(default: Any, description: str, **limits: Any) -> Any:
    """Return a field that changes only what is measured, written and shown."""
    return _field("output", default, description, limits)


def _field(tag: str, default: Any, description: str, limits: dict[str, Any]) -> Any:
    return Field(default, description=description, json_schema_extra={"tag": tag}, **limits)
