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
from hf_fasttrain.utils.errors import shortened, shown
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
    "accelerate": ("mixed_precision",),
    "optimizer": ("lr", "name"),
    "schedule": ("name",),
    "ema": ("decay",),
    "early_stopping": ("patience", "metric"),
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
    inside = [item for item in items if isinstance(value, list) and any(isinstance(part, int) for part in item["loc"])]
    items = (inside or items)[:20]
    got = f"contains {value_text(items[0]['input'])}" if inside else f"is {value_text(value)}"
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
        allowed = _joined([*choices, *nullable])
    about = field.description or ""
    is_said = not about or re.sub(r"\W+", " ", about) in re.sub(r"\W+", " ", allowed)
    return f"{got}; must be {allowed}{'' if is_said else f' ({about})'}"


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


def _joined(choices: Sequence[str]) -> str:
    *others, last = dict.fromkeys(choices)
    return f"{', '.join(others)} or {last}" if others else last


def proposals(key: str, value: Any, section: type[BaseModel] | None) -> Iterator[Any]:
    """Yield what a wrong value of a dotted key may mean, the likeliest first; not all of it is allowed there."""
    word = WORDS.get(value.lower(), value) if isinstance(value, str) else value
    if section is None:
        if isinstance(value, str):
            yield from () if word is value else (word,)
            yield from () if (number := _number(value)) is None else (number,)
            yield from ([part.strip() for part in value.strip("[]() ").split(",")],) if "," in value else ()
        return
    if word is True or word is False or word is None:
        yield from (SWITCHES[switch],) if (switch := (key, bool(word))) in SWITCHES else ()
        yield word
    if isinstance(value, str | int | float) and value is not True:
        for names in MAIN_KEYS.get(key, ()):
            for candidate in (value, *([str(Duration(float(value), "epochs"))] if is_finite(value) else [])):
                values: dict[str, Any] = dict.fromkeys(names.split(), candidate)
                yield from (values | BESIDE.get(key, {}),) if takes(section, values) else ()


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
    is_plain = re.fullmatch(r"[A-Za-z0-9_./~][\w ./~+-]*(:[\w./~+-]+)?", value) is not None
    is_other = value.lower() in ("true", "false", "null", "~") or _number(value) is not None  # for YAML
    return value if is_plain and not is_other else json.dumps(value)


def _number(text: str) -> int | float | None:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return None
