"""Parts of a model that are trained, as people write them (`head`, `last 3 blocks`), and phases of training them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from hf_fasttrain.utils.duration import PATTERN, Duration

PART_PATTERN = r"^\s*(all|head|norm|last\s+0*[1-9]\d{0,5}\s+blocks?)\s*$"
AFTERWARDS = "then"  # key of the part that is trained to the end
PARTS = "all, head, norm or 'last 3 blocks'"
PHASES = "phases such as {head: 2 epochs, then: all}"


@dataclass(frozen=True)
class TrainedPart:
    """A part of a model: "all", its "head", its "norm" layers and head, or its last "blocks" and head."""

    kind: str
    num_blocks: int = 0

    @classmethod
    def parse(cls, text: object) -> TrainedPart:
        """Read ``all``, ``head``, ``norm`` or ``last 3 blocks``; ValueError otherwise."""
        match = re.match(PART_PATTERN, text) if isinstance(text, str) else None
        if match is None:
            raise ValueError(f"must be {PARTS}")
        number = re.search(r"\d+", match[1])
        return cls("blocks", int(number[0])) if number else cls(match[1])

    def __str__(self) -> str:
        if self.kind != "blocks":
            return self.kind
        return f"last {self.num_blocks} block{'s' if self.num_blocks > 1 else ''}"


@dataclass(frozen=True)
class Phase:
    """A part of a model that is trained for a duration; None: to the end."""

    part: TrainedPart
    duration: Duration | None = None


@dataclass(frozen=True)
class TrainPhases:
    """The phases of a training, one after the other; the last one has no duration."""

    phases: tuple[Phase, ...]

    @classmethod
    def parse(cls, value: object) -> TrainPhases:
        """Read ``PART``, ``{PART: DURATION, then: PART}`` or ``[{PART: DURATION}, ..., PART]``; else ValueError."""
        if isinstance(value, TrainPhases):
            return value
        if isinstance(value, Mapping):
            phases = cls(_of_mapping(value))
        elif isinstance(value, list) and value:
            phases = cls(tuple(_of_list(value)))
        elif isinstance(value, str) and re.match(PART_PATTERN, value):
            phases = cls((Phase(TrainedPart.parse(value)),))
        else:
            raise ValueError(f"must be {PARTS}, or {PHASES}")
        for before, after in zip(phases.phases, phases.phases[1:], strict=False):
            if before.part == after.part:
                raise ValueError(f"must be phases that train different parts; '{before.part}' is followed by itself")
        return phases

    @property
    def is_gradual(self) -> bool:
        """Whether there is more than one phase."""
        return len(self.phases) > 1

    def to_yaml(self) -> Any:
        """Return the phases as `parse` reads them."""
        *timed, last = self.phases
        if len(timed) <= 1:
            pairs = {str(phase.part): str(phase.duration) for phase in timed}
            return {**pairs, AFTERWARDS: str(last.part)} if pairs else str(last.part)
        return [*({str(phase.part): str(phase.duration)} for phase in timed), str(last.part)]

    def __str__(self) -> str:
        *timed, last = self.phases
        return ", then ".join([*(f"{phase.part} for {phase.duration}" for phase in timed), str(last.part)])


def _of_mapping(value: Mapping[Any, Any]) -> tuple[Phase, ...]:
    timed = {part: duration for part, duration in value.items() if part != AFTERWARDS}
    if len(timed) > 1:  # the keys of a mapping have no order
        raise ValueError("must be a list for more than two phases: [{head: 2 epochs}, {last 2 blocks: 5 epochs}, all]")
    if len(timed) != 1 or AFTERWARDS not in value:
        raise ValueError("must be one part with its duration, and what is trained then: {head: 2 epochs, then: all}")
    return *_timed(timed), Phase(TrainedPart.parse(value[AFTERWARDS]))


def _of_list(value: list[Any]) -> Iterator[Phase]:
    *timed, last = value
    if not isinstance(last, str) or not all(isinstance(each, Mapping) and len(each) == 1 for each in timed):
        raise ValueError(
            "must be a list of parts with their durations, and last the part that is trained to the end: "
            "[{head: 2 epochs}, {last 2 blocks: 5 epochs}, all]"
        )
    for each in timed:
        yield from _timed(each)
    yield Phase(TrainedPart.parse(last))


def _timed(value: Mapping[Any, Any]) -> Iterator[Phase]:
    for part, text in value.items():
        duration = Duration.parse(text)
        if not duration.count:
            raise ValueError(f"must be phases of at least 1 step; '{part}' has {duration}")
        yield Phase(TrainedPart.parse(part), duration)


def json_schema() -> dict[str, Any]:
    """Return the JSON schema of what `TrainPhases.parse` reads."""
    part = {"type": "string", "pattern": PART_PATTERN, "examples": ["all", "head", "norm", "last 3 blocks"]}
    timed = {"type": "object", "patternProperties": {PART_PATTERN: {"type": "string", "pattern": PATTERN}}}
    two = {**timed, "properties": {AFTERWARDS: part}, "required": [AFTERWARDS], "minProperties": 2, "maxProperties": 2}
    one = {**timed, "minProperties": 1, "maxProperties": 1}
    lists = {"type": "array", "items": {"anyOf": [one, part]}, "minItems": 1}
    return {"anyOf": [part, {**two, "additionalProperties": False}, lists]}
