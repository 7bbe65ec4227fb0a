"""Download of pushed runs: ``hf://OWNER/NAME[@REVISION]`` to local files in huggingface_hub's cache."""

from __future__ import annotations

import re
from pathlib import Path

from hf_fasttrain.utils.errors import RunError

PREFIX = "hf://"
MODEL_FILES = ["*.json", "*.safetensors", "*.yaml"]  # no code, no pictures, no ONNX
NESTED_FILES = ["*/*"]  # pushed runs have no folders
_PART = r"[A-Za-z0-9][\w.-]*"


def is_hub_url(value: object) -> bool:
    """Return whether a value is a Hub URL: a string that starts with hf://."""
    return isinstance(value, str) and value.startswith(PREFIX)


def is_repo_name(name: str) -> bool:
    """Return whether a name is OWNER/NAME as the Hub accepts it (huggingface_hub.utils.validate_repo_id)."""
    fits = re.fullmatch(rf"{_PART}/{_PART}", name) is not None and len(name) <= 96
    return fits and "--" not in name and ".." not in name and not name.endswith((".git", "-", "."))


def is_dataset_name(name: str) -> bool:
    """Return whether a name may be one of a dataset on the Hub: OWNER/NAME, or NAME alone as a few old ones have."""
    return is_repo_name(name if "/" in name else f"owner/{name}")


def is_license(name: str) -> bool:
    """Return whether a licence is written like the Hub's names: apache-2.0, mit, cc-by-4.0, other."""
    return re.fullmatch(r"[a-z0-9][a-z0-9.-]*", name) is not None


def parse_hub_url(url: str) -> tuple[str, str | None]:
    """Return OWNER/NAME and the revision (None for the newest) of hf://OWNER/NAME[@REVISION]. Raises RunError."""
    repo, _, revision = url.removeprefix(PREFIX).rstrip("/").partition("@")
    if not is_repo_name(repo):
        raise RunError(f"'{url}' is not a Hub URL; write hf://OWNER/NAME or hf://OWNER/NAME@REVISION")
    return repo, revision or None


def download_file(url: str, name: str) -> Path:
    """Return the local copy of a file of a pushed run. Raises RunError if it is missing or can't be downloaded."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HTTPError

    repo, revision = parse_hub_url(url)
    try:
        return Path(hf_hub_download(repo, name, revision=revision))
    except (HTTPError, OSError, ValueError, RuntimeError) as error:  # RuntimeError: the xet transport's
        raise _download_error(url, name, error) from None


def download_run(url: str) -> Path:
    """Return a local folder with the model, recipe and results of a pushed run. Raises RunError if that fails."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HTTPError

    repo, revision = parse_hub_url(url)
    try:
        return Path(
            snapshot_download(repo, revision=revision, allow_patterns=MODEL_FILES, ignore_patterns=NESTED_FILES)
        )
    except (HTTPError, OSError, ValueError, RuntimeError) as error:
        raise _download_error(url, "the model", error) from None


def _download_error(url: str, what: str, error: BaseException) -> RunError:
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    if isinstance(error, LocalEntryNotFoundError):
        reason = (
            "the Hub can't be reached and there is no local copy; check the network, HF_ENDPOINT and HF_HUB_OFFLINE"
        )
    elif isinstance(error, EntryNotFoundError):
        reason = f"{what} was not found; the repository was not pushed by hf_fasttrain, or the push did not finish"
    elif isinstance(error, RevisionNotFoundError):
        reason = "has no such revision; omit @REVISION for the newest"
    elif isinstance(error, GatedRepoError):
        reason = "is gated; request access on its page, then log in with `hf auth login`"
    elif isinstance(error, RepositoryNotFoundError):
        reason = "was not found, or is private; check the name, and log in with `hf auth login` if it is private"
    else:
        lines = str(error).splitlines() or [type(error).__name__]
        reason = f"{what} could not be downloaded: {lines[0]}; check the network and try again"
    return RunError(f"{url}: {reason}")
