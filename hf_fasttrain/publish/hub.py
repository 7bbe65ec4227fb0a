"""A finished run on the Hub: the model folder, recipe and figures, and a card, in one commit, without local paths."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from hf_fasttrain.errors import RunError, shortened

SPEC_FILE, RESULT_FILE, RECIPE_FILE, METRICS_FILE = (
    "hf_fasttrain.json", "result.json", "recipe.yaml", "metrics.jsonl",
)  # fmt: skip
OWN_FILES = {"README.md", RESULT_FILE, RECIPE_FILE, METRICS_FILE}
CLASS_KEYS = {"class_names", "label_names", "id2label", "label2id"}  # may look like paths, and must stay as they are
CARD_METRICS = {"accuracy": "accuracy", "top5_accuracy": "accuracy", "f1_macro": "f1"}  # ours -> the Hub's types


def push_run(run: Path, repo: str, *, private: bool = False) -> str:
    """Upload a finished run to the Hub repository OWNER/NAME, made if there is none, and return its address.

    One commit holds the model folder, recipe.yaml, result.json, metrics.jsonl and a model card. Local paths in them
    are cut to their last component. Raises RunError if the run is not finished or the Hub can't be written to.
    """
    finished = _read_run(Path(run))
    files = _files_to_push(finished, repo)
    command = f"hf-fasttrain push {shlex.quote(str(run))} {repo}{' --private' if private else ''}"
    return _upload(files, repo, private=private, command=command)


# --- the run -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FinishedRun:
    """What a run folder holds, as written there."""

    folder: Path
    spec: dict[str, Any]
    result: dict[str, Any]
    recipe: dict[str, Any]  # empty for a run without a recipe
    recipe_text: str


def _read_run(run: Path) -> FinishedRun:
    missing = [name for name in (f"model/{SPEC_FILE}", RESULT_FILE) if not (run / name).is_file()]
    if missing:
        raise RunError(
            f"{run}: is no finished run, it has no {' and no '.join(missing)}; give the run folder of a training that "
            "has ended, or end it first: the same training command with --resume"
        )
    path = run / "model" / SPEC_FILE
    try:
        spec = json.loads(path.read_text(encoding="utf-8"))
        path = run / RESULT_FILE
        result = json.loads(path.read_text(encoding="utf-8"))
        path = run / RECIPE_FILE
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        recipe = YAML(typ="safe", pure=True).load(text) or {}
    except (OSError, ValueError, YAMLError) as error:
        raise RunError(f"{path}: can't be read ({_first_line(error)}); put it right or train again") from None
    return FinishedRun(run, spec, result, recipe, text)


def _files_to_push(run: FinishedRun, repo: str) -> dict[str, bytes | Path]:
    """Return path in the repository -> content; a Path where the bytes go as they are."""
    scrub = Scrubber([*_strings(run.recipe), *_strings(run.spec), str(run.folder), str(run.folder.resolve())])
    model = run.folder / "model"
    paths = [path for path in sorted(model.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    files: dict[str, bytes | Path] = {path.relative_to(model).as_posix(): path for path in paths}
    for name, path in files.items():
        if name.endswith(".json") and isinstance(path, Path):
            files[name] = scrub.json(path.read_bytes())
    files[SPEC_FILE] = _loadable_spec(run, scrub, files[SPEC_FILE])
    files[RESULT_FILE] = scrub.json((run.folder / RESULT_FILE).read_bytes())
    if run.recipe_text:
        files[RECIPE_FILE] = scrub.yaml(run.recipe_text, run.recipe).encode()
    if (run.folder / METRICS_FILE).is_file():
        lines = (run.folder / METRICS_FILE).read_bytes().splitlines(keepends=True)
        files[METRICS_FILE] = b"".join(scrub.json(line) for line in lines)
    files["README.md"] = model_card(run, scrub.tree(run.recipe), repo).encode()
    return files


def _loadable_spec(run: FinishedRun, scrub: Scrubber, pushed: bytes | Path) -> bytes | Path:
    """Return the pushed spec; a timm model built from a local folder is named by its architecture.

    The folder's last component would be no model's name, and `load_model` could not build it elsewhere.
    """
    name, config = str(run.spec["name"]), run.folder / "model" / "config.json"
    if scrub.value(name) == name or name.startswith("transformers:") or not config.is_file():
        return pushed
    architecture = json.loads(config.read_text(encoding="utf-8")).get("architecture")
    spec = {**scrub.tree(run.spec), "name": architecture or scrub.value(name)}
    return (json.dumps(spec, indent=2) + "\n").encode()


def _strings(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        for key, value in tree.items():
            if key not in CLASS_KEYS:
                yield from _strings(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _strings(value)


# --- without local paths -----------------------------------------------------------------------------------

_PATH_END = r"[^\s'\"`,;:=()\[\]{}<>|]+"
# /x, ~/x, ./x, ../x, file:///x and C:\x, but not a/b, images/s and https://x
_PATH_IN_TEXT = re.compile(
    rf"(?<!\w)[A-Za-z]:[\\/](?!/){_PATH_END}"
    rf"|(?:file://|(?<![\w./~:\\-])|(?<=\w:)(?!//))(?:~\w*|\.{{1,2}})?/{_PATH_END}"
)
_PREFIX = re.compile(r"(?:transformers|local-dir):")


def is_local_path(value: str) -> bool:
    """Return whether a setting means a file or folder of this machine: by its looks, or because it is there."""
    if value.startswith((".", "/", "~", "file://")) or re.match(r"[A-Za-z]:[\\/](?!/)", value):
        return True
    return ("/" in value or os.sep in value) and os.path.exists(value)


def _last_component(path: str) -> str:
    return PureWindowsPath(path.rstrip("/\\")).name or "."


class Scrubber:
    """Cuts local paths to their last component, also where those among `known` strings are mentioned in texts."""

    def __init__(self, known: list[str]) -> None:
        bare = {_PREFIX.sub("", text, count=1) for text in known}
        local = {text.rstrip("/") for text in bare if is_local_path(text) and "/" in text.strip("/.~")}
        words = "|".join(re.escape(text) for text in sorted(local, key=len, reverse=True))
        self._known = re.compile(rf"(?<![\w./~-])(?:{words})(?:/{_PATH_END})?(?![\w-])/?") if words else None

    def value(self, value: str) -> str:
        """Return a setting or text without local paths."""
        prefix = match.group() if (match := _PREFIX.match(value)) else ""
        if is_local_path(value.removeprefix(prefix)) and "\n" not in value:
            return prefix + _last_component(value.removeprefix(prefix))
        return self.text(value)

    def text(self, text: str) -> str:
        """Return a text in which each local path is cut to its last component."""
        if self._known is not None:
            text = self._known.sub(lambda found: _last_component(found.group()), text)
        return _PATH_IN_TEXT.sub(lambda found: _last_component(found.group()), text)

    def tree(self, tree: Any) -> Any:
        """Return a JSON or YAML tree without local paths; class names stay."""
        if isinstance(tree, str):
            return self.value(tree)
        if isinstance(tree, list):
            return [self.tree(value) for value in tree]
        if isinstance(tree, dict):
            return {key: value if key in CLASS_KEYS else self.tree(value) for key, value in tree.items()}
        return tree

    def json(self, content: bytes) -> bytes:
        """Return a JSON text without local paths: the same bytes if it has none."""
        try:
            tree = json.loads(content)
        except ValueError:  # a line cut short when the run was killed
            return self.text(content.decode(errors="replace")).encode()
        clean = self.tree(tree)
        if clean == tree or json.dumps(clean) == json.dumps(tree):  # nan is not equal to itself
            return content
        return (json.dumps(clean, indent=2 if content.count(b"\n") > 1 else None) + "\n").encode()

    def yaml(self, text: str, tree: dict[str, Any]) -> str:
        """Return a YAML text without local paths, with its comments unless cutting would change other values."""
        clean, wanted = self.text(text), self.tree(tree)
        yaml = YAML(typ="safe", pure=True)
        try:
            if yaml.load(clean) == wanted:
                return clean
        except YAMLError:
            pass
        yaml.default_flow_style, stream = False, io.StringIO()
        yaml.dump(wanted, stream)
        return stream.getvalue()


# --- the card ----------------------------------------------------------------------------------------------


def model_card(run: FinishedRun, recipe: dict[str, Any], repo: str) -> str:
    """Return README.md: what the model is, its figures, how to load it and how it was trained.

    `recipe` is the recipe without local paths.
    """
    from huggingface_hub import ModelCard, ModelCardData

    asked, dataset = run.recipe.get("model") or {}, _dataset(run)
    source = str(run.spec["name"]).removeprefix("transformers:").removeprefix("hf-hub:")
    data = ModelCardData(
        library_name=_library(run.spec),
        pipeline_tag="image-classification",
        tags=["image-classification", "hf_fasttrain"],
        base_model=source if asked.get("pretrained") is True and is_hub_name(source) else None,
        datasets=[dataset] if is_hub_name(dataset) else None,
        model_name=repo.split("/")[-1],
        eval_results=_eval_results(run, dataset) or None,
    )
    name = Scrubber([]).value(str(run.spec["name"])).removeprefix("transformers:")
    classes, multi = run.spec["class_names"], ", any number of them true of an image" if run.spec["multi_label"] else ""
    body = [
        f"# {repo.split('/')[-1]}",
        f"`{name}` for {run.spec['image_size']} px images and {len(classes)} classes{multi}: {shortened(classes, 20)}.",
        _figures(run.result),
        f"## Load it\n\n```python\n{_snippet(run.spec, repo)}```",
        _training(run.result, recipe, _is_own(dataset)),
    ]
    return str(ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(part for part in body if part) + "\n"))


def is_hub_name(name: str) -> bool:
    """Return whether a name is OWNER/NAME on the Hub rather than a folder here."""
    return re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None and not is_local_path(name)


def _library(spec: dict[str, Any]) -> str:
    if spec["name"].startswith("transformers:"):
        return "transformers"
    return "hf_fasttrain" if spec.get("small_image_stem") else "timm"  # timm can't build the other stem


def _dataset(run: FinishedRun) -> str:
    return str((run.recipe.get("data") or {}).get("dataset", ""))


def _is_own(dataset: str) -> bool:
    """Return whether the data set is a folder or file of the one who trained, or unknown."""
    return dataset != "digits" and (not dataset or is_local_path(dataset) or os.path.exists(dataset))


def _eval_results(run: FinishedRun, dataset: str) -> list[Any]:
    from huggingface_hub import EvalResult

    data, local = run.recipe.get("data") or {}, _is_own(dataset)
    return [
        EvalResult(
            task_type="image-classification",
            dataset_type="imagefolder" if local else dataset,
            dataset_name="own images" if local else dataset,
            dataset_config=None if local else data.get("config"),
            dataset_revision=None if local else data.get("revision"),
            metric_type=CARD_METRICS[name],
            metric_name=name,
            metric_value=value,
        )
        for name, value in (run.result.get("metrics") or {}).items()
        if name in CARD_METRICS and value is not None and math.isfinite(value)
    ]


def _figures(result: dict[str, Any]) -> str:
    metrics, test = result.get("metrics") or {}, result.get("test_metrics") or {}
    if not metrics and not test:
        return ""
    rows = ["| metric | evaluation split | test split |", "| --- | ---: | ---: |"]
    for name in dict.fromkeys([*metrics, *test]):
        shown = [f"{values[name]:.4f}" if name in values else "-" for values in (metrics, test)]
        rows.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(rows)


def _snippet(spec: dict[str, Any], repo: str) -> str:
    if _library(spec) == "timm":
        return (
            "import timm\n\n"
            f'model = timm.create_model("hf-hub:{repo}", pretrained=True).eval()\n'
            "config = timm.data.resolve_model_data_config(model)\n"
            "transform = timm.data.create_transform(**config, is_training=False)\n"
        )
    return (
        "from pathlib import Path\n\nfrom huggingface_hub import snapshot_download\n"
        "from hf_fasttrain.model import load_model\n\n"
        f'model, spec = load_model(Path(snapshot_download("{repo}")))\n'
    )


def _training(result: dict[str, Any], recipe: dict[str, Any], own_images: bool) -> str:
    device = (result.get("machine") or {}).get("device", "?")
    facts = (
        f"{result.get('steps', 0):,} steps, {result.get('images', 0):,} images in "
        f"{result.get('train_seconds', 0):,.0f} s of training steps on {device}."
    )
    if not recipe:
        return f"## How it was trained\n\n{facts}"
    override = " data.dataset=FOLDER" if own_images else ""
    command = f"accelerate launch -m hf_fasttrain {RECIPE_FILE}{override}"
    return f"## How it was trained\n\nBy [{RECIPE_FILE}]({RECIPE_FILE}):\n\n```\n{command}\n```\n\n{facts}"


# --- the upload --------------------------------------------------------------------------------------------


def _upload(files: dict[str, bytes | Path], repo: str, *, private: bool, command: str) -> str:
    from huggingface_hub import CommitOperationAdd, HfApi, get_token
    from huggingface_hub.errors import HFValidationError, HTTPError
    from huggingface_hub.utils import validate_repo_id

    api, token = HfApi(), get_token()
    try:
        validate_repo_id(repo if "/" in repo else "")
    except HFValidationError:
        raise RunError(
            f"'{repo}' is no name for a Hub repository; write OWNER/NAME in letters, digits, '-', '_' and '.' "
            "(no '--' or '..', at most 96), such as me/flowers"
        ) from None
    if token is None:
        raise RunError(
            f"push to {repo}: there is no token; log in with `hf auth login` or set HF_TOKEN, then {command}"
        )
    try:
        address = api.create_repo(repo, token=token, private=private or None, exist_ok=True)
        if private and not api.repo_info(repo, token=token).private:
            raise RunError(
                f"push to {repo}: it is there already and public, and --private only makes a new repository private; "
                "make it private in its settings, give another name or leave --private out"
            )
        operations = [CommitOperationAdd(name, content) for name, content in files.items()]
        api.create_commit(repo, operations, commit_message="Push a run of hf_fasttrain", token=token)
    except RunError:
        raise
    except (HTTPError, OSError, RuntimeError, ValueError) as error:
        why = _explain(error, repo, api.endpoint).replace(token, "***")
        raise RunError(f"push to {repo}: {why}; then {command}") from None
    return str(address)


def _explain(error: BaseException, repo: str, endpoint: str) -> str:
    """Return what went wrong and what to do about it, by the status that the Hub answered with."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # raised around a file's upload
        error = error.__cause__
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set; unset it"
    if status == 401:
        return f"{endpoint} does not accept the token (401); log in with `hf auth login` or set HF_TOKEN"
    if status in (403, 404):
        return (
            f"the token may not write there ({status}); log in with `hf auth login` with a token that has write "
            f"access to {repo.split('/')[0]}, or give another OWNER/NAME"
        )
    if status is not None and (status >= 500 or status == 429):
        return f"{endpoint} can't answer now ({status}); the run is whole on disk, wait a little"
    if status is not None:
        return f"{endpoint} refused it ({_first_line(error)}); put that right"
    if isinstance(error, HTTPError):
        return f"{endpoint} can't be reached ({_first_line(error)}); check the network and HF_ENDPOINT"
    return f"the upload to {endpoint} broke off ({_first_line(error)}); check the token and the network"


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
