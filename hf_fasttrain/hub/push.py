"""Pushes a finished run to the Hub: model, recipe, metrics and card in one commit, without local paths."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_fasttrain.hub.card import model_card
from hf_fasttrain.hub.errors import Failure, explain
from hf_fasttrain.hub.pictures import PICTURES, pictures_of
from hf_fasttrain.hub.scrubbed_metrics import folder_of_copy, scrubbed_copy
from hf_fasttrain.hub.staging import staged
from hf_fasttrain.run_folder.file_names import (
    CALIBRATION_FILE,
    CONFIG_FILE,
    METRICS_FILE,
    MODEL_FOLDER,
    ONNX_FILE,
    RECIPE_FILE,
    RESULT_FILE,
    SPEC_FILE,
    WEIGHTS_FILE,
)
from hf_fasttrain.run_folder.finished import FinishedRun, read_run
from hf_fasttrain.run_folder.schemas import ConfigFile, read_file
from hf_fasttrain.run_folder.scrub import Scrubber, strings
from hf_fasttrain.utils.clean import without_secrets
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.files import MAX_JSON_BYTES, read_regular, reason
from hf_fasttrain.utils.format import format_command
from hf_fasttrain.utils.remote import is_license, is_repo_name

if TYPE_CHECKING:
    from hf_fasttrain.models.user_model import ModelArgument, UserModel

# Files that a push writes, and that a later push deletes if it does not have them. Other files are kept.
PUSHED_FILES = {
    "README.md", RESULT_FILE, RECIPE_FILE, METRICS_FILE, SPEC_FILE, CONFIG_FILE, "preprocessor_config.json",
    WEIGHTS_FILE, ONNX_FILE, CALIBRATION_FILE, *PICTURES,
}  # fmt: skip
STALLED_SECONDS = 60.0  # without a byte until a connection is given up
FIRST_PAUSE, LONGEST_PAUSE = 2.0, 60.0  # seconds between two attempts


def push_run(
    run: Path,
    repo: str,
    *,
    private: bool | None = None,
    license: str | None = None,
    weights: str | None = None,
    model: ModelArgument | None = None,
    message: str = "Push a run of hf_fasttrain",
    command: str | None = None,
    original: str | None = None,
    patience: float = 60.0,
    stalled: float = STALLED_SECONDS,
    log: Callable[[str], None] = lambda text: None,
) -> str:
    """Upload a finished run to the Hub repository OWNER/NAME, which is created if needed, and return its URL.

    One commit holds the model folder, recipe.yaml, result.json, metrics.jsonl, pictures and a model card, with local
    paths cut to their last component. Large files are sent first, and skipped if the Hub has them. Transient errors
    (429, 5xx, a broken connection, `stalled` seconds without a byte) are retried for `patience` seconds, and reported
    by `log`.

    `weights`: last, best (of the best evaluation), average or step_N; None: those in RUN/model. `model`: of a run that
    no recipe has made (see `open_user_model`). `original` is the run folder that `run` was staged from. Raises RunError
    if the run is not finished or the Hub can't be written to, with the `command` that finishes it.
    """
    folder = Path(run)
    if license is not None and not is_license(license):
        raise RunError(f"--license is '{license}'; write it as the Hub does, such as apache-2.0, mit or other")
    _require_no_links_outside(folder)
    user_model = _load_user_model(folder, model, weights) if model is not None else None
    finished = read_run(folder) if user_model is None else None
    options = ["--private"] * bool(private) + ["--license", str(license)] * bool(license)
    options += ["--weights", weights] if weights is not None else []
    command = command or format_command("push", run, repo, *options)
    upload = Upload(repo, private, message, command, stalled)
    upload.require_possible()
    training = Path(original) if original else None
    spec = user_model.spec if user_model is not None else None
    with staged(folder, weights, spec) as chosen, folder_of_copy(training) as copies:
        try:
            chosen_run = finished if finished is not None and chosen == folder else read_run(chosen)
            files = files_to_push(chosen_run, repo, copies, license, [str(training or folder), str(folder)])
        except OSError as error:
            raise RunError(f"push to {repo}: {folder} can't be read: {reason(error)}; then {command}") from None
        return upload(files, patience, log)


def _require_no_links_outside(run: Path) -> None:
    """Raise RunError for a link in what would be uploaded that leads out of the folder: to anybody's private files."""
    inside = [os.path.realpath(folder) + os.sep for folder in (run, run / MODEL_FOLDER)]
    paths = [run / name for name in (RESULT_FILE, RECIPE_FILE, METRICS_FILE)]
    for path in [*paths, *(run / MODEL_FOLDER).rglob("*")]:
        target = os.path.realpath(path)
        if path.is_symlink() and not target.startswith(tuple(inside)):
            raise RunError(
                f"{path}: is a link to {target}, outside of the run; to upload that file, put a copy of it there"
            )


def _load_user_model(folder: Path, model: ModelArgument, weights: str | None) -> UserModel | None:
    from hf_fasttrain.models.user_model import load_user_model  # imports torch, which a recipe's run does not need

    return load_user_model(folder, model, weights)


def hub_section(run: Path, model: ModelArgument | None = None) -> dict[str, Any]:
    """Return the `hub` section of a run's recipe, an empty dict without one; `model`: see `push_run`."""
    if model is not None and not (run / RECIPE_FILE).is_file():
        return {}
    hub = read_run(Path(run)).recipe.get("hub")
    return dict(hub) if isinstance(hub, dict) else {}


def require_login(repo: str) -> None:
    """Raise RunError unless a Hub token is found; the Hub itself is not contacted."""
    from huggingface_hub import constants

    remedy = "the same command again, or leave hub out"
    if constants.HF_HUB_OFFLINE:
        raise RunError(f"push to {repo}: HF_HUB_OFFLINE is set; unset it, then {remedy}")
    Upload(repo, None, "", remedy, STALLED_SECONDS).require_possible()


def _json_of(path: Path) -> bytes:
    """Return the bytes of a JSON file. Raises RunError if it can't be read, or is too large for one."""
    try:
        return read_regular(path, MAX_JSON_BYTES)
    except OSError as error:
        raise RunError(f"{path}: can't be read: {reason(error)}") from None


def files_to_push(
    run: FinishedRun, repo: str, copies: Path, license: str | None = None, private_paths: Sequence[str] = ()
) -> dict[str, bytes | Path]:
    """Return path in the repository -> content; a Path for a file that is uploaded as it is.

    `copies` is a folder for the scrubbed copy of metrics.jsonl, which the next push of this training extends.
    `private_paths` are folders whose paths are removed from the texts, beside those of the run.
    """
    folders = _outermost([str(run.folder), *private_paths])
    known = [path for folder in folders for path in (folder, str(Path(folder).resolve()))]
    local = [str(value) for key in run.local or () if (value := run.setting(key)) is not None]
    scrub = Scrubber([*strings(run.recipe), *strings(run.spec), *known], local)
    model = run.folder / MODEL_FOLDER
    paths = [path for path in sorted(model.rglob("*")) if path.is_file() and not path.name.startswith(".")]
    files: dict[str, bytes | Path] = {path.relative_to(model).as_posix(): path for path in paths}
    for name, path in files.items():
        if name.endswith(".json") and isinstance(path, Path):
            files[name] = scrub.json(_json_of(path))
    files[SPEC_FILE] = _loadable_spec(run, scrub, files[SPEC_FILE])
    files[RESULT_FILE] = scrub.json(_json_of(run.folder / RESULT_FILE))
    if run.recipe_text:
        files[RECIPE_FILE] = scrub.yaml(run.recipe_text, run.recipe).encode()
    if (run.folder / METRICS_FILE).is_file():
        files[METRICS_FILE] = scrubbed_copy(run.folder / METRICS_FILE, copies, scrub)
    if "num_steps" not in run.result:  # not while training: drawing would take its cores
        files |= pictures_of(run.folder)
    files["README.md"] = model_card(run, scrub.tree(run.recipe), repo, files, license).encode()
    texts = {name: content for name, content in files.items() if isinstance(content, bytes) and name not in PICTURES}
    return files | {name: without_secrets(content.decode(errors="replace")).encode() for name, content in texts.items()}


def _outermost(folders: Sequence[str]) -> list[str]:
    """Return the folders that are in none of the others, whose paths cover theirs: staged runs are in their run."""
    return [
        folder for folder in dict.fromkeys(folders) if not any(Path(other) in Path(folder).parents for other in folders)
    ]


def _loadable_spec(run: FinishedRun, scrub: Scrubber, pushed: bytes | Path) -> bytes | Path:
    """Return the pushed spec; a timm model built from a local folder is named by its architecture.

    The folder's last component is not a model name, so `load_model` could not build it elsewhere.
    """
    name, config = str(run.spec["name"]), run.folder / MODEL_FOLDER / CONFIG_FILE
    if scrub.value(name) == name or name.startswith("transformers:") or not config.is_file():
        return pushed
    architecture = read_file(config, ConfigFile).get("architecture")
    spec = {**scrub.tree(run.spec), "name": architecture or scrub.value(name)}
    return (json.dumps(spec, indent=2) + "\n").encode()


class Upload:
    """One push to a repository: at most one commit, with retries.

    The token is left to huggingface_hub, which looks it up each time; it is not stored here.
    """

    def __init__(self, repo: str, private: bool | None, message: str, command: str, stalled: float) -> None:
        self.repo, self.private, self.message, self.command = repo, private, message, command
        self.stalled = stalled

    def require_possible(self) -> None:
        """Raise RunError for an invalid repository name or a missing token."""
        from huggingface_hub import get_token

        if not is_repo_name(self.repo):
            raise RunError(
                f"'{self.repo}' is not a valid Hub repository name; write OWNER/NAME in letters, digits, '-', '_' "
                "and '.' (no '--' or '..', at most 96), such as me/flowers"
            )
        if get_token() is None:
            raise RunError(
                f"push to {self.repo}: no token found; log in with `hf auth login` or set HF_TOKEN, then {self.command}"
            )

    def __call__(self, files: dict[str, bytes | Path], patience: float, log: Callable[[str], None]) -> str:
        """Upload the files and return the repository's URL; RunError if that fails or takes too long."""
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HTTPError

        api, deadline, pause = HfApi(), time.monotonic() + patience, FIRST_PAUSE
        while True:
            try:
                with _timeout(self.stalled):
                    return self._once(api, files)
            except RunError:
                raise
            except (HTTPError, OSError, RuntimeError, ValueError) as error:
                failure = explain(error, self.repo, api.endpoint)
            pause, why = max(pause, failure.retry_after), self._without_token(failure.reason)
            if not failure.is_transient or time.monotonic() + pause > deadline:
                raise NotPushed(f"push to {self.repo}: {why}; then {self.command}", failure)
            log(f"push to {self.repo}: {why}; retrying in {pause:.0f} s")
            time.sleep(pause)
            pause = min(LONGEST_PAUSE, 2 * pause)

    def _once(self, api: Any, files: dict[str, bytes | Path]) -> str:
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        address = api.create_repo(self.repo, private=self.private, exist_ok=True)
        if self.private and not api.repo_info(self.repo).private:
            raise RunError(
                f"push to {self.repo}: the repository exists and is public, and --private only makes a new one "
                "private; make it private in its settings, give another name or leave --private out"
            )
        add = [CommitOperationAdd(name, content) for name, content in files.items()]
        existing = set(api.list_repo_files(self.repo)) & PUSHED_FILES
        delete = [CommitOperationDelete(name) for name in sorted(existing - set(files))]
        api.create_commit(self.repo, [*add, *delete], commit_message=self.message)
        return str(address)

    @staticmethod
    def _without_token(text: str) -> str:
        from huggingface_hub import get_token

        token = get_token()
        return text.replace(token, "***") if token else text


class NotPushed(RunError):
    """The Hub refused the push; `failure` says whether a retry may help."""

    def __init__(self, text: str, failure: Failure) -> None:
        super().__init__(text)
        self.failure = failure


@contextmanager
def _timeout(seconds: float) -> Iterator[None]:
    """Set the timeout of the client's connections; by default they wait forever."""
    from huggingface_hub import get_session

    session = get_session()
    before, session.timeout = session.timeout, seconds
    try:
        yield
    finally:
        session.timeout = before
