"""Mutates recipes at random and checks them, and trains those that are valid: each must end with one message, or well.

    python tests/fuzz_recipes.py [--count 10000] [--seed N] [--jobs 2] [--keep FOLDER]

Values come from the recipe's own schema (allowed ones, those at the limits and beyond) and from a list of hostile
ones; texts are changed as YAML, line by line and byte by byte; overrides too. `helpers/fuzzing.py` says what is wrong
with the outcome of a command. `recipe/test_recipes.py` runs a short form of it.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from helpers.fuzzing import Case, fuzz_from_command_line
from PIL import Image

from hf_fasttrain.recipe.find import shipped_recipes
from hf_fasttrain.recipe.schema import Recipe
from hf_fasttrain.utils.yaml import MAX_CHARACTERS, read_yaml_file, write_yaml

Tree = dict[str, Any]
BASE: Tree = {
    "model": {"name": "test_resnet"},
    "data": {"dataset": "photos", "image_size": 32, "eval_fraction": 0.3, "workers": 0, "cache": "none"},
    "train": {"duration": "2 steps", "batch_size": 4},
    "accelerate": {"mixed_precision": "no"},
    "log": {"report": False},
}
SMALL = ["train.duration=2 steps", "output_dir=run", "data.image_size=32", "train.batch_size=4"]  # of what is trained
SMALL += ["accelerate.compile=false"]  # which takes minutes, and writes into the folder of temporary files
MODELS = ["test_resnet", "test_vit", "test_efficientnet", "test_convnext", "transformers:tiny", "tiny", "resnet18"]
NUMBERS = [
    0, 1, -1, 2, 3, 7, 255, 10**6, 2**31, 2**53, 2**63 - 1, 2**64, 10**30, -(10**30), 0.0, -0.0, 0.5, 1.5, -1.5,
    5e-324, 1e-45, 1e38, 1e308, float("nan"), float("inf"), float("-inf"),
]  # fmt: skip
TEXTS = [
    "", " ", "auto", "no", "null", "~", "true", "1", "1e3", "0x10", "nan", "-1 epochs", "0 epochs", "1 epoch",
    "3 steps", "1.5 epochs", "99999999999999999999 epochs", "1e9 steps", "5 minutes", "5%", "101%", "1 lightyear",
    "\u0663 epochs", "\uff11 epochs", "\0", "a\0b", "\u202etxt", "\u200b", "\x1b[31mred", "\x9b31m", "\r", "a\nb",
    "\u2028", "\U0001f4a5", "e\u0301" * 200, "x" * 50_000, "../beside", "../beside/secret.txt", "photos",
    "photos/cat", "photos/cat/0.png", "/dev/zero", "/dev/null", "/proc/self/mem", "/proc/self/fd/0", "fifo", "loop",
    "~", "~root", "~nosuch/x", "hf://a/b", "hf://../..", "hf://a/b@c:d", "file:///etc/passwd",
    "https://example.invalid/x", "transformers:", "transformers:/etc", "timm/", "hf-hub:", "local-dir:/etc",
    "timm/../../x", "-", "--help", "%s%n{0}", "{x}", "[bold]x[/bold]", "$(id)", "rand-m9", "rand-m99999999999",
    "augmix-m3-w99999999", "accuracy", "top5_accuracy", "loss", "f1_macro", "a.b:c", "os:system", "__main__:x",
    "helpers.programs:x", "tensorboard", "sgd", "adamw", "cosine", "resnet18", "test_vit", "hf_" + "a" * 34,
]  # fmt: skip
OTHERS = [
    None, True, False, [], {}, [None], [[]], [1, 2], [0.0, 0.0, 0.0], [1e308] * 3, ["a"], [True], [0.5, 0.4],
    [-1.0, 2.0], list(range(1000)), ["accuracy"] * 3, [float("nan")] * 3, {"a": 1}, {"": ""}, {"x" * 3000: 1},
    {"num_ops": 10**9}, {"severity": 3}, {"start_size": 8, "until": "1 epoch"}, {"metric": "x"},
    {"metric": "accuracy", "mode": "sideways"}, {"repo": "../../x"}, {"repo": "me/x"}, {"decay": 1.0},
    {"brightness": 1e9}, {"drop_rate": 2.0}, {"embed_dim": -1}, {"img_size": 10**6}, {"num_classes": 3},
    {"pretrained": True}, {"depth": 10**6}, {"depth": 10**9}, {"layers": [0]}, {"layers": [10**5] * 4},
    {"embed_dim": 10**8}, {"hidden_size": 10**9}, {"num_hidden_layers": 10**7}, {"betas": [2, 3]}, {"betas": "x"},
    {"eps": -1}, {"lr": "x"}, {"foreach": True}, {"fused": True}, {"norm_layer": "x"}, {"act_layer": []},
    {"attn_implementation": "a/b"}, {"quantization_config": {"load_in_4bit": True}}, {"pretrained_cfg": {"url": "x"}},
]  # fmt: skip
SNIPPETS = [
    "\t", "\0", "&a ", "*a", "<<: *a\n", "<<: {a: 1}\n", "---\n", "...\n", "%YAML 9.9\n", "%TAG ! tag:x,2000:\n",
    "\ufeff", "\x85", "{", "}", "[", "]", ": ", "- ", "? ", "'", '"', "#", "|", ">", "|9\n", "!x ", "!!binary ",
    "!!int ", "!!set ", "!!omap ", "!!python/object/apply:os.system ['touch ../beside/x']\n",
    "!!python/name:os.system ", "\r", "\x1b[0m", "'\\ud800'", '"\\ud800"', '"\\U0010ffff"', "2020-13-45", "1:30:00",
    "0b11", "0o17", "1_0", "=", "<<", "9" * 5000, "0x" + "f" * 3000, "1e400", "!!timestamp x", "!!float x",
    "null: 1\n", "1: 2\n", "? [a]\n: 1\n", "&a [*a]", "*nope",
]  # fmt: skip
SIGNS = {"minimum": 0, "exclusiveMinimum": 1, "maximum": 0, "exclusiveMaximum": -1}


@dataclass(frozen=True)
class Written:
    """A recipe as it is given to a command."""

    text: bytes
    overrides: list[str] = field(default_factory=list)


@cache
def keys() -> dict[str, dict[str, Any]]:
    """Return the JSON schema of each key of a recipe, sections too."""
    whole = Recipe.model_json_schema()

    def below(name: str, schema: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
        for key, each in schema.get("properties", {}).items():
            path = f"{name}.{key}".lstrip(".")
            yield path, each
            for option in (each, *each.get("anyOf", ())):
                if "$ref" in option:
                    yield from below(path, whole["$defs"][option["$ref"].rsplit("/", 1)[-1]])

    return dict(below("", whole))


@cache
def shipped_trees() -> list[Tree]:
    """Return the shipped recipes."""
    return [read_yaml_file(path) for path in shipped_recipes().values()]


def sound_value(schema: dict[str, Any], rng: random.Random) -> Any:
    """Return a value that a key may have, or one at its limits or just beyond."""
    options = [option for option in schema.get("anyOf", (schema,)) if "$ref" not in option]
    option = rng.choice(options or [{}])
    if "const" in option:
        return option["const"]
    found = [*schema.get("examples", ()), *option.get("examples", ()), *option.get("enum", ()), schema.get("default")]
    step = 1 if option.get("type") == "integer" else 1e-6
    for limit, sign in SIGNS.items():
        if limit in option:
            found += [option[limit] + sign * step, option[limit], option[limit] - step, option[limit] + step]
    kind = option.get("type")
    if kind == "boolean":
        return rng.random() < 0.5
    if kind == "array":
        found += [[sound_value(option.get("items", {}), rng) for _ in range(rng.choice((0, 1, 2, 3, 3, 4)))]]
    elif kind in ("integer", "number"):
        found += [rng.choice((1, 2, 3, 8, 16, 100)), rng.random() if kind == "number" else 5]
    return rng.choice(found)


def any_value(key: str, rng: random.Random, sound: float = 0.5) -> Any:
    """Return a value for a key: with a probability one of its form, but no size that takes gigabytes rightly."""
    if rng.random() < sound and key in keys():
        value = rng.choice(MODELS) if key == "model.name" else sound_value(keys()[key], rng)
        return 64 if key.endswith("_size") and isinstance(value, int) and 256 < value <= 4096 else value
    return rng.choice(rng.choice((NUMBERS, TEXTS, OTHERS)))


def put(tree: Tree, key: str, value: Any) -> None:
    """Set a dotted key."""
    *above, last = key.split(".")
    for part in above:
        tree[part] = dict(inner) if isinstance(inner := tree.get(part), dict) else {}
        tree = tree[part]
    tree[last] = value


def base(rng: random.Random) -> Tree:
    """Return a valid recipe: a small one, or a section or more of a shipped one in it."""
    tree = {name: dict(section) for name, section in BASE.items()}
    if rng.random() < 0.3:
        shipped = rng.choice(shipped_trees())
        for name in rng.sample(sorted(shipped.keys() - {"data", "model", "train", "output_dir"}), 2):
            tree[name] = shipped[name]
    return tree


def dumped(tree: Tree, rng: random.Random) -> str:
    """Return a tree as YAML, in block or in flow style (JSON)."""
    if rng.random() < 0.2:
        return json.dumps(tree, ensure_ascii=rng.random() < 0.5)
    return write_yaml(tree)


def _values(rng: random.Random) -> Written:
    tree = base(rng)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        key = rng.choice(list(keys()))
        put(tree, key, any_value(key, rng))
    return Written(dumped(tree, rng).encode("utf-8", "surrogatepass"))


def _sound_values(rng: random.Random) -> Written:
    """Set several keys to values that each is allowed to have: what is wrong then is their combination."""
    tree = base(rng)
    for key in rng.sample([key for key in keys() if not key.startswith(("hub", "output_dir", "model.name"))], 4):
        put(tree, key, any_value(key, rng, sound=1.0))
    put(tree, "model.name", rng.choice(MODELS))
    return Written(dumped(tree, rng).encode())


def _names(rng: random.Random) -> Written:
    tree = base(rng)
    key = rng.choice(list(keys()))
    letters = list(key)
    for _ in range(rng.choice((1, 1, 2, 5))):
        letters[rng.randrange(len(letters))] = rng.choice(("", ".", "_", "x", "\x1b", "\u202e", "\0", "A", "-", " "))
    name = rng.choice(("".join(letters), key + ".x", "__class__", "_source", "model_fields", "", "copy", *TEXTS))
    put(tree, name, any_value(key, rng))
    return Written(dumped(tree, rng).encode("utf-8", "surrogatepass"))


def _overrides(rng: random.Random) -> Written:
    overrides = []
    for _ in range(rng.choice((1, 1, 2, 3))):
        key = rng.choice(
            (*keys(), *keys(), "", ".", "..", "a..b", "data.", "data.dataset.x", "model.args.a.b.c", "_source")
        )
        value = any_value(key, rng)
        text = rng.choice((str(value), json.dumps(value), rng.choice(SNIPPETS), str(value) + rng.choice(SNIPPETS)))
        override = f"{key}{rng.choice(('=', '=', '=', '=', '', '==', ': ', '+='))}{text}"
        overrides.append(override.replace("\0", "\\0")[:100_000].encode("utf-8", "replace").decode())
    return Written(write_yaml(base(rng)).encode(), overrides)


def _snippets(rng: random.Random) -> Written:
    text = dumped(base(rng), rng)
    for _ in range(rng.choice((1, 1, 2, 3))):
        place = rng.randrange(len(text) + 1)
        text = text[:place] + rng.choice(SNIPPETS) + text[place + rng.choice((0, 0, 1, 5)) :]
    return Written(text.encode("utf-8", "surrogatepass"))


def _bombs(rng: random.Random) -> Written:
    """Add aliases of aliases, merged mappings, nesting or length, wide or deep, in a section or beside them."""
    width, depth = rng.choice((2, 3, 9, 30)), rng.choice((2, 5, 10, 24, 70))
    start, end = rng.choice((("{x: 1}", "{%s}"), ("[x]", "[%s]"), ("x", "[%s]")))
    names = (lambda i: f"*a{i}") if end[0] == "[" else (lambda i: f"k{rng.random()}: *a{i}")
    levels = range(1, depth)
    lines = [f"a{i}: &a{i} {end % ', '.join(names(i - 1) for _ in range(width))}" for i in levels]
    merged = [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * width)}], x{i}: 1}}" for i in levels]
    many = rng.choice((50, 500, 5000, 60_000))
    opening, closing = rng.choice((("[", "]"), ("{a: ", "}"), ("- ", ""), ("? ", ""), ("[[a],", "]"), ("!!seq [", "]")))
    extra = rng.choice((
        "\n".join([f"a0: &a0 {start}", *lines]),
        "\n".join(["a0: &a0 {x: 1}", *merged]),
        f"x: {opening * many}1{closing * rng.choice((many, many, 3))}",
        "x:\n" + "".join(" " * i + "a:\n" for i in range(1, min(many, 900))),
        "\n".join(f"k{i}: {i}" for i in range(many)),
        f"{'k' * many}: 1",
        f"x: {'9' * many}",
        "x: " + "&" * many,
        " " * min(many * 9, MAX_CHARACTERS) + "\n",
        "#" * many,
    ))  # fmt: skip
    tree = base(rng)
    if rng.random() < 0.3:
        extra = "model:\n  name: test_resnet\n  args:\n" + "\n".join(f"    {line}" for line in extra.splitlines())
        del tree["model"]
    return Written(f"{extra}\n{write_yaml(tree)}".encode())


def _lines(rng: random.Random) -> Written:
    lines = write_yaml(base(rng)).splitlines()
    for _ in range(rng.choice((1, 1, 2, 4))):
        line = lines.pop(rng.randrange(len(lines))) if lines else ""
        change = rng.choice(
            (lambda x: [x, x], lambda x: [], lambda x: [f"  {x}"], lambda x: [x.strip()], lambda x: [x[:-3]])
        )
        lines[(place := rng.randrange(len(lines) + 1)) : place] = change(line)
    return Written(rng.choice(("\n", "\r\n", "\r", "\u2028")).join(lines).encode())


def _bytes(rng: random.Random) -> Written:
    data = bytearray(write_yaml(base(rng)).encode())
    for _ in range(rng.choice((1, 1, 2, 5, 20))):
        place = rng.randrange(len(data) + 1)
        match rng.choice(("flip", "cut", "drop", "insert", "repeat")):
            case "flip" if place < len(data):
                data[place] ^= 1 << rng.randrange(8)
            case "cut" if rng.random() < 0.3:
                del data[place:]
            case "drop":
                del data[place : place + rng.randint(1, 20)]
            case "insert":
                data[place:place] = rng.randbytes(rng.choice((1, 2, 30)))
            case "repeat":
                data[place:place] = data[place : place + 40] * rng.choice((1, 3, 1000))
    encoding = rng.choice((None,) * 6 + ("utf-16", "utf-32", "latin-1", "utf-8-sig"))
    return Written(bytes(data) if encoding is None else data.decode(errors="replace").encode(encoding, "replace"))


CHANGES: tuple[Callable[[random.Random], Written], ...] = (
    _values, _values, _values, _sound_values, _sound_values, _names, _overrides, _overrides, _snippets, _bombs, _lines,
    _bytes,
)  # fmt: skip


def prepare(place: Path) -> None:
    """Write what recipes may name: photos, a FIFO, a link to itself, and files outside of the folder."""
    given, beside = place / "given", place / "beside"
    for folder in (given / "photos" / "cat", given / "photos" / "dog", given / "tiny", beside):
        folder.mkdir(parents=True)
    for number in range(6):
        for name, grey in (("cat", 40), ("dog", 200)):
            Image.new("RGB", (34, 36), (grey, 20 * number, 99)).save(given / "photos" / name / f"{number}.png")
    vit = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    vit |= {"intermediate_size": 16, "patch_size": 8, "architectures": ["ViTForImageClassification"]}
    (given / "tiny" / "config.json").write_text(json.dumps(vit))
    (beside / "secret.txt").write_text("secret")
    os.mkfifo(given / "fifo")
    (given / "loop").symlink_to("loop")


def case(seed: int, index: int, place: Path) -> Case:
    """Write the recipe of a number, and return how to check it; a third of the valid ones are trained."""
    rng = random.Random(f"{seed} {index}")
    change = rng.choice(CHANGES)
    written = change(rng)
    shutil.rmtree(place / "given" / "run", ignore_errors=True)
    (place / "given" / "recipe.yaml").write_bytes(written.text)
    check = ["check", "recipe.yaml", *written.overrides]
    description = " ".join([change.__name__.strip("_"), *written.overrides])[:200]
    then = [["train", "recipe.yaml", *written.overrides, *SMALL]] if rng.random() < 0.34 else []
    return Case(description, [check, *then], [place / "given" / "recipe.yaml"])


def main() -> None:
    """Print the seed, what went wrong, and the counts; exit status 1 if anything went wrong."""
    fuzz_from_command_line(__doc__ or "", prepare, case)


if __name__ == "__main__":
    main()
