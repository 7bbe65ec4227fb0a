"""What a recipe's sections are made of: types of keys, and the tag of each: *result*, *speed* or *output*."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer, WithJsonSchema
from pydantic_core import CoreSchema, core_schema

from hf_fasttrain.utils import train_phases
from hf_fasttrain.utils.duration import CLOCK_PATTERN, MINUTES_PATTERN, PATTERN, PERCENT_PATTERN, Duration, MissingUnit
from hf_fasttrain.utils.train_phases import TrainPhases


class Section(BaseModel):
    """A section of the recipe: unknown keys are refused, types are strict, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


DurationField = Annotated[
    Duration,
    BeforeValidator(Duration.parse),
    PlainSerializer(str),
    WithJsonSchema({"type": "string", "pattern": PATTERN, "examples": ["90 epochs", "5000 steps"]}),
]
NeverField = Annotated[
    Literal["never"] | Duration,
    BeforeValidator(lambda text: text if text == "never" else Duration.parse(text)),
    PlainSerializer(str),
    WithJsonSchema(
        {
            "anyOf": [{"const": "never"}, {"type": "string", "pattern": PATTERN}],
            "examples": ["1 epoch", "500 steps", "never"],
        }
    ),
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
TrainField = Annotated[
    TrainPhases,
    BeforeValidator(TrainPhases.parse),
    PlainSerializer(TrainPhases.to_yaml),
    WithJsonSchema(train_phases.json_schema()),
]
Auto = Literal["auto"]


@dataclass(frozen=True)
class ShortForm:
    """Annotation of a type: a shorter form is accepted too, by the validation and by the JSON schema."""

    lengthen: Callable[[Any], Any]  # short form -> value; other values stay as they are
    options: Callable[[list[dict[str, Any]]], list[dict[str, Any]]]  # the type's JSON schemas -> those of the form

    def __get_pydantic_core_schema__(self, source: Any, handler: Callable[[Any], CoreSchema]) -> CoreSchema:
        return core_schema.no_info_before_validator_function(self.lengthen, handler(source))

    def __get_pydantic_json_schema__(self, core: CoreSchema, handler: Callable[[Any], dict[str, Any]]) -> Any:
        written = handler(core)
        options = written.get("anyOf", [written])
        return {"anyOf": [*options, *self.options(options)]}


def _as_list(value: Any) -> Any:
    is_single = isinstance(value, str | int | float | Duration) and value not in ("auto", "balanced")
    return [value] if is_single else value


def _as_section(value: Any) -> Any:
    return {} if value is True else None if value is False else value


# A single value is a list of one; true is a section with its defaults, false is null.
OneOrMore = ShortForm(_as_list, lambda options: [option["items"] for option in options if "items" in option])
OnOrOff = ShortForm(_as_section, lambda options: [{"type": "boolean"}])
OrOff = ShortForm(_as_section, lambda options: [{"const": False}])  # a section with a required key


def _parse_warmup(text: object) -> object:
    try:
        return text if text == "auto" else Duration.parse_part(text)
    except MissingUnit:
        raise
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
Weight = Annotated[float, Field(ge=0.0)]

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
