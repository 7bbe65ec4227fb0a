"""Damages files of a finished run at random and calls the commands that read them: each must end with one message.

    python tests/fuzz_run_folder.py [--count 10000] [--seed N] [--jobs 2] [--keep FOLDER]

Values in JSON, JSON lines, YAML and headers of safetensors are replaced, removed and added; bytes are changed; files
become folders, FIFOs and links to what is outside of the run. A checkpoint's hashes are put right, so that what is
behind them is reached. `helpers/fuzzing.py` says what is wrong with the outcome of a command. `push` makes everything
that it would send. `run_folder/test_schemas.py` runs a short form of it.
"""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from helpers.fuzzing import Case, fuzz_from_command_line, run_watched
from PIL import Image

from hf_fasttrain.run_folder.checkpoint import MARKER
from hf_fasttrain.utils.files import digest_of
from hf_fasttrain.utils.yaml import read_yaml, write_yaml

SECRET = "what-nobody-else-may-read"
RECIPE = """\
model: {name: MODEL}
data: {dataset: photos, image_size: 32, eval_fraction: 0.3, workers: 0, cache: none, max_bad_fraction: 0.5}
train: {duration: 4 steps, batch_size: 4}
accelerate: {mixed_precision: "no"}
evaluate: {every: 2 steps}
checkpoint: {every: 2 steps, final: average, average: 2}
early_stopping: {metric: loss, patience: 100 steps}
ema: {decay: 0.5}
log: {every: 1}
"""
MODELS = {"timm": "test_resnet", "transformers": "transformers:tiny"}
VALUES = [
    None, True, False, 0, -1, 1, 2, 3.5, -0.0, 5e-324, 1e308, float("nan"), float("inf"), float("-inf"), 2**31, 2**53,
    2**63, 10**30, -(10**30), "", "x", "0", "1e3", "\0", "\u202e", "\x1b[31m", "\ud800", "<script>alert(1)</script>",
    "| a | b |\n|", "](http://x) `x` ***", "../../beside/secret.txt", "/proc/self/environ", "/dev/zero", "9" * 400,
    "x" * 50_000, "hf_" + "a" * 34, [], [1], ["a", "b"], [None], [[]], list(range(2000)), [0.5] * 3, [[1], [2]], {},
    {"a": 1}, {"step": "x"}, {"value": []}, {"": {}}, {"dict": []}, {"tensor": 0}, "nearest", "squash", "step_2",
]  # fmt: skip
KEYS = ["", "x", "__proto__", "\0", "\x1b[1m", "kind", "step", "value", "trust_remote_code", "auto_map", "args", "name"]
RAW = [
    b"", b"\0", b"[]", b"[1]", b"null", b"1", b'"x"', b"{", b"{}", b"\xff\xfe\0", b"[" * 10**5, b'{"a":' * 50_000,
    b"9" * 6000, b'{"a": ' + b"9" * 6000 + b"}", b"\xef\xbb\xbf{}", b"{}{}", b"nan", b"- a\n", b"a: &a [*a]\n",
    b"\xff" * 8, b"!!python/object/apply:os.system ['touch ../../beside/made']\n", b'{"a": NaN, "a": 1e999}',
    b"a: !!int x\n", b" " * 10**6, (2).to_bytes(8, "little") + b"{}", (10**12).to_bytes(8, "little") + b"{}",
    b"\n" * 10**5,
]  # fmt: skip
COMMANDS = {
    "report": ["report", "run"],
    "push": ["push", "run", "me/x"],
    "push best": ["push", "run", "me/x", "--weights", "best"],
    "export": ["export", "run", "--output", "out"],
    "export in place": ["export", "run"],
    "export best": ["export", "run", "--weights", "best", "--output", "out"],
    "evaluate": ["evaluate", "run"],
    "predict": ["predict", "run", "photos/cat/0.png"],
    "predict calibrated": ["predict", "run", "photos/cat/0.png", "--calibrated"],
    "predict best": ["predict", "run", "photos/cat/0.png", "--calibrated", "--weights", "best"],
    "resume": ["train", "recipe.yaml", "output_dir=run", "train.duration=5 steps", "--resume"],
    "resume run": ["run", "--resume"],
    "check": ["check", "recipe.yaml", "output_dir=run"],
    "check run": ["check", "run"],
    "weights": ["check", "recipe.yaml", "output_dir=new", "model.pretrained=run"],
    "compare": ["report", "run", "other", "--output", "both.html"],
    "predict average": ["predict", "run", "photos/cat/0.png", "--calibrated", "--weights", "average"],
    "mislabeled": ["mislabeled", "recipe.yaml", "output_dir=run", "--folds", "2"],
    "crossval": ["crossval", "recipe.yaml", "output_dir=folds", "data.folds=2", "--no-final", "--resume"],
}
CHECKPOINT, AVERAGED = "checkpoints/step_00000004", "checkpoints/averaged/step_00000002"
FILES = {
    "result.json": ["report", "push", "push best", "export best", "evaluate", "resume run", "compare"],
    "recipe.yaml": ["report", "push", "evaluate", "predict", "resume run", "check run"],
    "resolved.yaml": ["report", "push", "evaluate", "resume", "resume run", "compare"],
    "metrics.jsonl": ["report", "push", "push best", "resume", "compare"],
    "bad_images.jsonl": ["report", "resume"],
    "micro_batch.json": ["resume"],
    "hub.json": ["resume", "report"],
    "predictions.safetensors": ["report", "push", "resume run", "compare"],
    "report/gallery.json": ["report", "push", "resume"],
    "report/training_00.jpg": ["report", "push", "resume"],
    "report.html": ["resume run", "report"],
    "model/hf_fasttrain.json": ["predict", "evaluate", "export", "export in place", "push", "report", "weights"],
    "model/calibration.json": ["predict calibrated", "export", "export in place", "push", "push best", "report"],
    "model/config.json": ["predict", "evaluate", "export", "push", "weights"],
    "model/preprocessor_config.json": ["export", "push"],
    "model/model.safetensors": ["predict", "export", "push", "weights", "resume run"],
    f"{CHECKPOINT}/COMPLETE": ["resume", "export best", "push best", "resume run"],
    f"{CHECKPOINT}/state.json": ["predict best", "resume", "export best", "push best", "check"],
    f"{CHECKPOINT}/training.safetensors": ["resume"],
    f"{CHECKPOINT}/model.safetensors": ["resume", "export best", "push best"],
    f"{CHECKPOINT}/ema.safetensors": ["resume", "export best"],
    f"{AVERAGED}/COMPLETE": ["resume", "predict average"],
    f"{AVERAGED}/state.json": ["resume", "predict average"],
    f"{AVERAGED}/model.safetensors": ["resume", "predict average"],
    "mislabeled/gallery.json": ["report", "mislabeled"],
    "mislabeled/labels.csv": ["mislabeled"],
    "../folds/crossval.json": ["crossval"],
    "../folds/fold_1/predictions.safetensors": ["crossval"],
    "../folds/fold_1/result.json": ["crossval"],
}
FOLDERS = ["model", "report", "checkpoints", CHECKPOINT, "mislabeled", AVERAGED]


def places_in(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of each value in a tree, of lists only the first six."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value[:6]) if isinstance(value, list) else ()
    for key, each in items:
        yield from places_in(each, (*path, key))


def changed_value(value: Any, rng: random.Random) -> Any:
    """Return a tree in which one to three values are replaced, removed, added, or moved."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        found = [path for path in places_in(value) if path]
        if not found or rng.random() < 0.03:
            return rng.choice(VALUES)
        *above, last = rng.choice(found)
        node = value
        for key in above:
            node = node[key]
        change = rng.choice(("set", "set", "set", "set", "remove", "add", "wrap", "move"))
        if change == "remove":
            del node[last]
        elif change == "add" and isinstance(node, dict):
            node[rng.choice(KEYS)] = rng.choice(VALUES)
        elif change == "add":
            node.append(rng.choice(VALUES))
        elif change == "wrap":
            node[last] = rng.choice(([node[last]], {"x": node[last]}, str(node[last])))
        else:
            others = list(node.values()) if isinstance(node, dict) else node
            node[last] = rng.choice(VALUES) if change == "set" else copy.deepcopy(rng.choice(others))
    return value


def changed_text(text: str, name: str, rng: random.Random) -> str:
    """Return a file's text with changed values, in the file's own format."""
    if name.endswith(".jsonl"):
        lines = text.splitlines()
        for _ in range(rng.choice((1, 1, 3))):
            place = rng.randrange(len(lines))
            lines[place] = json.dumps(changed_value(json.loads(lines[place]), rng))
        return "\n".join(lines) + rng.choice(("\n", ""))
    if name.endswith(".yaml"):
        value = changed_value(read_yaml(text)[0], rng)
        return write_yaml(value) if isinstance(value, dict) and rng.random() < 0.7 else json.dumps(value)
    return json.dumps(changed_value(json.loads(text), rng))


def changed_header(data: bytes, rng: random.Random) -> bytes:
    """Return a safetensors file with changed values in its header."""
    size = int.from_bytes(data[:8], "little")
    header = json.dumps(changed_value(json.loads(data[8 : 8 + size]), rng)).encode()
    return len(header).to_bytes(8, "little") + header + data[8 + size :]


def changed_bytes(data: bytes, rng: random.Random) -> bytes:
    """Return other bytes: quite others, fewer, more, or some that are flipped."""
    match rng.choice(("raw", "cut", "twice", "flip", "flip", "insert")):
        case "raw":
            return rng.choice(RAW)
        case "cut":
            return data[: rng.randrange(len(data) + 1)]
        case "twice":
            return data + data
        case "insert":
            place = rng.randrange(min(len(data), 300) + 1)
            return data[:place] + rng.choice((rng.randbytes(5), rng.choice(RAW[:14]))) + data[place:]
    changed = bytearray(data)
    for _ in range(rng.randint(1, 8) if changed else 0):
        changed[rng.randrange(rng.choice((len(changed), min(300, len(changed)))))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def replaced(path: Path, rng: random.Random) -> str:
    """Put something else in the place of a file or folder: nothing, a folder, a FIFO, a link. Return what."""
    outside = path.parents[len(path.parts) - path.parts.index("given")] / "beside"  # the folder beside `given`
    kept = path.with_name(f"kept_{path.name}")
    path.rename(kept)
    change = rng.choice(
        ("nothing", "folder", "fifo", "device", "outside", "outside", "loop", "dead", "huge", "partial")
    )
    match change:
        case "folder":
            path.mkdir()
        case "fifo":
            os.mkfifo(path)
        case "device":
            path.symlink_to(rng.choice(("/dev/zero", "/dev/null", "/proc/self/mem", "/proc/kcore")))
        case "outside":
            path.symlink_to(
                outside / (kept.name if kept.is_dir() else rng.choice(("secret.txt", "kept.json", "nothing")))
            )
        case "loop":
            path.symlink_to(path.name)
        case "huge":
            path.touch()
            os.truncate(path, 5 << 30)
        case "partial":  # what a command would write first is a link to what is outside
            kept.rename(path)
            path.with_name(f".{path.name}.partial").symlink_to(outside / "secret.txt")
    if kept.exists() and not kept.is_symlink():
        shutil.rmtree(kept) if kept.is_dir() else kept.unlink()
    return change


def put_hashes_right(folder: Path) -> None:
    """Let a checkpoint's list of files have the sizes and hashes of its files as they are."""
    marker = json.loads((folder / MARKER).read_text())
    for name, entry in marker["files"].items():
        if (folder / name).is_file():
            entry["bytes"], entry["xxh3"] = (folder / name).stat().st_size, digest_of(folder / name)
    (folder / MARKER).write_text(json.dumps(marker))


def prepare(place: Path, libraries: Sequence[str] = tuple(MODELS)) -> None:
    """Train a run of a model of each library; write files outside that links may lead to."""
    given, beside = place / "given", place / "beside"
    for folder in (
        given / "photos" / "cat",
        given / "photos" / "dog",
        given / "photos" / "owl",
        given / "tiny",
        beside,
    ):
        folder.mkdir(parents=True)
    for number in range(5):
        for name, grey in (("cat", 40), ("dog", 120), ("owl", 200)):
            Image.new("RGB", (34, 36), (grey, 20 * number, 99)).save(given / "photos" / name / f"{number}.png")
    (given / "photos" / "cat" / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\n and nothing")
    vit = {"model_type": "vit", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 32}
    vit |= {"intermediate_size": 16, "patch_size": 8, "architectures": ["ViTForImageClassification"]}
    (given / "tiny" / "config.json").write_text(json.dumps(vit))
    for name in libraries:
        (given / "recipe.yaml").write_text(RECIPE.replace("MODEL", MODELS[name]))
        outcome = run_watched(["train", "recipe.yaml", "output_dir=run"], place)
        assert (outcome.status, outcome.problems) == (0, ()), f"{outcome.problems} {outcome.output}"
        (given / "run" / "micro_batch.json").write_text('{"wished": "auto", "micro_batch_size": 2}')
        pushed = {"repo": "me/x", "address": "a", "step": 2, "date": "d", "finished": True}
        (given / "run" / "hub.json").write_text(json.dumps(pushed))
        for command in (COMMANDS["mislabeled"], COMMANDS["crossval"][:-1]):
            outcome = run_watched(command, place)
            assert (outcome.status, outcome.problems) == (0, ()), f"{outcome.problems} {outcome.output}"
        shutil.move(given / "run", place / f"ref_{name}")
        shutil.move(given / "folds", place / f"folds_{name}")
        for folder in FOLDERS[:3]:  # as a link may lead to a folder like it
            shutil.copytree(place / f"ref_{name}" / folder, beside / f"kept_{folder}", dirs_exist_ok=True)
    shutil.copytree(place / "ref_timm", given / "other")
    (beside / "secret.txt").write_text(SECRET)
    (beside / "kept.json").write_text(json.dumps({"a": SECRET}))


def collect_push() -> None:
    """Let `push` write what it would send into a file, instead of sending it."""
    from hf_fasttrain.hub.push import Upload

    def write(self: Upload, files: dict[str, bytes | Path], *options: Any) -> str:
        small = (path for path in files.values() if isinstance(path, bytes) or path.stat().st_size < 1 << 28)
        texts = (content if isinstance(content, bytes) else content.read_bytes() for content in small)
        Path("pushed").write_bytes(b"\n".join(texts))
        return "https://example.invalid/me/x"

    Upload.__call__ = write  # type: ignore[method-assign]
    os.environ["HF_TOKEN"] = "hf_" + "T" * 34


def leak_in(place: Path) -> str | None:
    """Return where a command has written what is in a file outside of the folder."""
    for name in ("run/report.html", "both.html", "pushed"):
        path = place / "given" / name
        if path.is_file() and path.stat().st_size < 1 << 28 and SECRET.encode() in path.read_bytes():
            return f"{name} has what is in a file outside of the run"
    return None


def damage(run: Path, rng: random.Random) -> tuple[str, str, str]:
    """Damage a file of a run. Return its name, the kind of damage, and a command that reads it."""
    name = rng.choice([name for name in FILES if (run / name).exists()])
    path, command = run / name, rng.choice(FILES[name])
    kind = rng.choices(("values", "bytes", "replaced"), (7, 2, 1))[0]
    if kind == "replaced":
        if rng.random() < 0.2:
            name = rng.choice(FOLDERS)
        return name, replaced(run / name, rng), command
    data = path.read_bytes()
    if kind == "bytes" or name.endswith((".jpg", ".html", ".csv")):
        path.write_bytes(changed_bytes(data, rng))
    elif name.endswith(".safetensors"):
        path.write_bytes(changed_header(data, rng))
    else:
        text = changed_text(data.decode(), name, rng)
        path.write_bytes(text.encode("utf-8", "surrogatepass"))
    if name.startswith((CHECKPOINT, AVERAGED)) and not name.endswith(MARKER) and rng.random() < 0.8:
        put_hashes_right(path.parent)
        kind += ", hashes put right"
    return name, kind, command


def case(seed: int, index: int, place: Path) -> Case:
    """Damage a file of a new copy of a run, and return a command that reads it."""
    rng = random.Random(f"{seed} {index}")
    given, library = place / "given", rng.choice([name for name in MODELS if (place / f"ref_{name}").is_dir()])
    for name in ("run", "folds", "out", "new", "both.html", "pushed"):
        path = given / name
        path.unlink() if path.is_symlink() or path.is_file() else shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(place / f"ref_{library}", given / "run")
    shutil.copytree(place / f"folds_{library}", given / "folds")
    (given / "recipe.yaml").write_text(RECIPE.replace("MODEL", MODELS[library]))
    name, kind, command = damage(given / "run", rng)
    files = [given / "run" / name] if name not in FOLDERS else []
    description = f"{library}, {name}: {kind}; {command}"
    return Case(description, [COMMANDS[command]], files, collect_push, lambda: leak_in(place))


def main() -> None:
    """Print the seed, what went wrong, and the counts; exit status 1 if anything went wrong."""
    fuzz_from_command_line(__doc__ or "", prepare, case)


if __name__ == "__main__":
    main()
