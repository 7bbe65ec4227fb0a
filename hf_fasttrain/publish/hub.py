"""A finished run on the Hub: the model folder, recipe and figures, and a card, in one commit, without local paths."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from hf_fasttrain.errors import RunError
from hf_fasttrain.publish.card import model_card
from hf_fasttrain.publish.finished import (
    METRICS_FILE,
    RECIPE_FILE,
    RESULT_FILE,
    SPEC_FILE,
    FinishedRun,
    first_line,
    read_run,
)
from hf_fasttrain.publish.local_paths import Scrubber, strings

OWN_FILES = {"README.md", RESULT_FILE, RECIPE_FILE, METRICS_FILE}


def push_run(run: Path, repo: str, *, private: bool = False) -> str:
    """Upload a finished run to the Hub repository OWNER/NAME, made if there is none, and return its address.

    One commit holds the model folder, recipe.yaml, result.json, metrics.jsonl and a model card. Local paths in them
    are cut to their last component. Raises RunError if the run is not finished or the Hub can't be written to.
    """
    finished = read_run(Path(run))
    files = _files_to_push(finished, repo)
    command = f"hf-fasttrain push {shlex.quote(str(run))} {repo}{' --private' if private else ''}"
    return _upload(files, repo, private=private, command=command)


def _files_to_push(run: FinishedRun, repo: str) -> dict[str, bytes | Path]:
    """Return path in the repository -> content; a Path where the bytes go as they are."""
    scrub = Scrubber([*strings(run.recipe), *strings(run.spec), str(run.folder), str(run.folder.resolve())])
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
        return f"{endpoint} refused it ({first_line(error)}); put that right"
    if isinstance(error, HTTPError):
        return f"{endpoint} can't be reached ({first_line(error)}); check the network and HF_ENDPOINT"
    return f"the upload to {endpoint} broke off ({first_line(error)}); check the token and the network"
