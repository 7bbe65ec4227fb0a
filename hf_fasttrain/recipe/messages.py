"""What is said of a value that a recipe's key does not take: what was got, what is allowed, and what to write."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from types import NoneType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from hf_fasttrain.utils.duration import Duration, MissingUnit
from hf_fasttrain.utils.errors import nearest, shortened, shown
from hf_fasttrain.utils.format import is_finite

Item = Mapping[str, Any]  # one error of pydantic
# The keys that a single value in the place of a section most likely means, the likeliest first.
MAIN_KEYS: dict[str, tuple[str, ...]] = {
    "model": ("name", "pretrained"),
    "data": ("dataset",),
    "augment": ("crop", "auto", "mixup"),
    "augment.randaugment": ("magnitude",),
    "augment.augmix": ("severity",),
    "augment.color_jitter": ("brightness contrast saturation",),
    "augment.progressive": ("start_size",),
    "train": ("duration",),
    "train.bce": ("target_threshold",),
    "train.focal": ("gamma",),
    "train.asymmetric": ("gamma_negative",),
    "probe": ("views", "strength"),
    "accelerate": ("mixed_precision",),
    "optimizer": ("lr", "name"),
    "schedule": ("name",),
    "ema": ("decay",),
    "early_stopping": ("patience", "metric"),
    "distill": ("teacher",),
    "lora": ("rank", "targets"),
    "evaluate": ("every", "metrics"),
    "checkpoint": ("every",),
    "checkpoint.best": ("metric",),
    "log": ("report", "trackers", "every"),
    "hub": ("repo",),
}
BESIDE = {"augment.progressive": {"until": "10 epochs"}}  # what a section needs beside its main key
SWITCHES: dict[tuple[str, bool], dict[str, Any]] = {
    ("augment", False): {"crop": "center", "flip": False},
    ("augment.color_jitter", True): {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4},
}
WORDS = {"on": True, "yes": True, "off": False, "no": False, "none": None}  # of other formats and of Python
MEASURES = ("px", "pixel", "pixels", "step", "steps", "epoch", "epochs", "image", "images", "gb", "thread", "threads")
LIMITS = {
    "greater_than_equal": ("at least", "ge"),
    "greater_than": ("above", "gt"),
    "less_than_equal": ("at most", "le"),
    "less_than": ("below", "lt"),
    "multiple_of": ("a multiple of", "multiple_of"),
}
TYPES = {
    "int_type": ["an integer"],
    "int_from_float": ["an integer"],
    "float_type": ["a number"],
    "finite_number": ["a finite number"],
    "string_type": ["text"],
    "bool_type": ["true", "false"],
}


def describe(value: Any, items: Sequence[Item], field: FieldInfo, section: type[BaseModel] | None) -> str:
    """Return what is wrong with the value of a key, by pydantic's errors: what it is and what it must be."""
    inside = [item for item in items if _part_of(item, value) is not None]
    items = (inside or items)[:20]
    got = f"is {value_text(value)}"
    if inside:
        of = f" for {shown(_part_of(items[0], value))}" if isinstance(value, dict) else ""
        got = f"contains {value_text(items[0]['input'])}{of}"
    for item in items:
        if isinstance(error := item.get("ctx", {}).get("error"), MissingUnit):
            return f"{got}: {error}"
    nullable = ["null"] if NoneType in get_args(field.annotation) and not inside else []
    if section is not None:
        allowed = f"{'null or ' * len(nullable)}a section with {shortened(section.model_fields)}"
    else:
        is_alone = len(items) == 1 and not nullable
        choices = [choice for item in items for choice in _choices(item, field, alone=is_alone)]
        nullable = [] if any(item["type"] == "value_error" for item in items) else nullable
        allowed = joined([*choices, *nullable])
    about = field.description or ""
    hint = nearest(value, _literals(items)) if isinstance(value, str) else ""
    is_said = not about or re.sub(r"\W+", " ", about) in re.sub(r"\W+", " ", allowed)
    return f"{got}; must be {allowed}{'' if is_said else f' ({about})'}{hint and f'.{hint}'}"


def _literals(items: Sequence[Item]) -> list[str]:
    choices = [item["ctx"]["expected"] for item in items if item["type"] == "literal_error"]
    return [choice for text in choices for choice in re.findall(r"'([^']*)'", text)]


def _part_of(item: Item, value: Any) -> int | str | None:
    """Return the index or the key that an error within a list or a mapping is at; None for one of the whole value."""
    last: int | str | None = item["loc"][-1]
    in_list = isinstance(value, list) and isinstance(last, int)
    in_mapping = isinstance(value, dict) and last in value and item["input"] == value[last]
    return last if in_list or in_mapping else None


def _choices(item: Item, field: FieldInfo, *, alone: bool) -> list[str]:
    kind, context = item["type"], item.get("ctx", {})
    if kind == "literal_error":
        return re.split(", | or ", context["expected"])
    if kind in LIMITS:
        sign, name = LIMITS[kind]
        number = "an integer " if isinstance(context[name], int) else "a number "
        number = "" if alone or kind == "multiple_of" else f"{number}of " if sign[:2] == "at" else number
        return [f"{number}{sign} {context[name]:g}"]
    if kind in ("list_type", "dict_type"):
        of_type = list if kind == "list_type" else dict
        examples = [example for example in field.examples or () if isinstance(example, of_type)]
        what = "a list" if of_type is list else "a mapping"
        return [f"{what} such as {flow_text(examples[0])}" if examples else what]
    text = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ").removeprefix("must be ")
    return TYPES.get(kind, [text])


def joined(choices: Sequence[str]) -> str:
    """Return different choices as `a, b or c`."""
    *others, last = dict.fromkeys(choices)
    return f"{', '.join(others)} or {last}" if others else last


def proposals(key: str, value: Any, section: type[BaseModel] | None) -> Iterator[Any]:
    """Yield what a wrong value of a dotted key may mean, the likeliest first; not all of it is allowed there."""
    if section is None:
        yield from _other_values(value)
        return
    word = WORDS.get(value.lower(), value) if isinstance(value, str) else value
    if word is True or word is False or word is None:
        yield from (SWITCHES[switch],) if (switch := (key, bool(word))) in SWITCHES else ()
        yield word
    if isinstance(value, str) and (values := _unseparated(value, section)):
        yield values
    if isinstance(value, str | int | float) and value is not True:
        for names in MAIN_KEYS.get(key, ()):
            for candidate in (value, *([str(Duration(float(value), "epochs"))] if is_finite(value) else [])):
                values = dict.fromkeys(names.split(), candidate)
                yield from (values | BESIDE.get(key, {}),) if takes(section, values) else ()


def _other_values(value: Any) -> Iterator[Any]:
    """Yield values of other types that a plain value may mean."""
    if isinstance(value, list) and value and all(each == value[0] for each in value):
        yield value[0]
    if isinstance(value, int) and not isinstance(value, bool) and value in (0, 1):
        yield bool(value)
    if not isinstance(value, str):
        return
    if (word := WORDS.get(value.lower(), value)) is not value:
        yield word
    yield from _numbers(value)
    if "," in value:
        yield [_number_or_text(part.strip()) for part in value.strip("[]() ").split(",")]


def _numbers(text: str) -> Iterator[Any]:
    """Yield the number, or the duration, that a text may mean: 1e-3, 1 e-3, 1,5, 64px, 64x64, 20%, 5 min."""
    number = _number(text.replace(" ", ""))
    if number is None and re.fullmatch(r"\d+,\d+", text):
        number = _number(text.replace(",", "."))
    if number is not None:
        yield number
    if found := re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[a-z]+|[x×]\s*\1)", text.strip().lower()):
        count, unit = found[1], found[2]
        if unit == "%":
            yield round(float(count) / 100, 6)
        if unit[0] in "x×" or unit in MEASURES:
            yield _number(count)
        yield from (f"{count} {name}" for name in ("epochs", "steps", "minutes") if name.startswith(unit))
        if unit in ("h", "hour", "hours"):
            yield f"{float(count) * 60:g} minutes"


def _unseparated(text: str, section: type[BaseModel]) -> dict[str, Any]:
    """Return keys and values of a text such as `name:resnet50` or `name resnet50`, which YAML takes for one value."""
    keys = "|".join(section.model_fields)
    start, *parts = re.split(rf"(?:^|\s)({keys})(?::\s*|\s+)", text)
    values = dict(zip(parts[::2], map(_number_or_text, parts[1::2]), strict=True))
    return values if not start and "" not in values.values() else {}


def _number_or_text(text: str) -> int | float | str:
    return text if (number := _number(text)) is None else number


def takes(section: type[BaseModel], values: dict[str, Any]) -> bool:
    """Return whether a section accepts these values, whatever others it needs beside them."""
    try:
        section.model_validate(values)
    except ValidationError as error:
        return not any(item["loc"][0] in values for item in error.errors(include_url=False))
    return True


def how_to_write(key: str, value: Any, *, as_override: bool, each_key: bool = False) -> str:
    """Return a key with its value as it stands in a recipe's file, or as an override in a shell.

    With `each_key` the keys of a section are overridden one by one, so that its others keep their values.
    """
    if not as_override:
        return f"{key.rpartition('.')[2]}: {flow_text(value)}"
    if each_key and isinstance(value, dict):
        return " ".join(shlex.quote(f"{key}.{name}={flow_text(each)}") for name, each in value.items())
    return shlex.quote(f"{key}={flow_text(value)}")


def value_text(value: Any) -> str:
    """Return a value of a recipe for a message: YAML's words for true, false and null, else its repr, cut."""
    return json.dumps(value) if value is None or isinstance(value, bool) else shown(value)


def flow_text(value: Any) -> str:
    """Return a value as YAML of one line, as it can be written in a recipe or an override."""
    if isinstance(value, dict):
        return f"{{{', '.join(f'{flow_text(name)}: {flow_text(each)}' for name, each in value.items())}}}"
    if isinstance(value, list):
        return f"[{', '.join(map(flow_text, value))}]"
    if not isinstance(value, str):
        return json.dumps(value)
    is_plain = re.fullmatch(r"[A-Za-z0-9_./~][\w ./~+%-]*(:[\w./~+%-]+)?", value) is not None
    is_other = value.lower() in ("true", "false", "null", "~") or _number(value) is not None  # for YAML
    return value if is_plain and not is_other else json.dumps(value)


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None
