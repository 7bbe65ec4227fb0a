"""Explains errors of the Hub: the reason, the remedy, and whether a retry may help."""

from __future__ import annotations

from dataclasses import dataclass

from hf_fasttrain.utils.errors import first_lines
from hf_fasttrain.utils.library_errors import is_card_refused

TRANSIENT = (408, 409, 412, 423, 425, 429)  # 409 and 412: another commit was made at the same time


@dataclass(frozen=True)
class Failure:
    """The reason of a failed push and its remedy, as the middle of a sentence."""

    reason: str
    is_transient: bool  # whether a retry may help
    retry_after: float = 0.0  # seconds to wait, as requested by the Hub


def explain(error: BaseException, repo: str, endpoint: str) -> Failure:
    """Return the reason and the remedy of an error, by the Hub's HTTP status."""
    from huggingface_hub.errors import HTTPError, OfflineModeIsEnabled

    while isinstance(error, RuntimeError) and error.__cause__ is not None:  # wraps the error of a file's upload
        error = error.__cause__
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, OfflineModeIsEnabled):
        return Failure("HF_HUB_OFFLINE is set; unset it", is_transient=False)
    if status is not None:
        return _refused(status, error, repo, endpoint, _retry_after(response))
    if isinstance(error, HTTPError):
        reason = f"{endpoint} can't be reached ({first_lines(error)}); check the network and HF_ENDPOINT"
        return Failure(reason, is_transient=True)
    if is_card_refused(error):
        reason = f"the Hub rejects the model card ({first_lines(error)}); correct its license, dataset or model names"
        return Failure(reason, is_transient=False)
    is_transient = isinstance(error, ConnectionError | TimeoutError | RuntimeError)  # RuntimeError: the xet transport's
    reason = f"the upload to {endpoint} failed ({first_lines(error)}); check the token and the network"
    return Failure(reason, is_transient=is_transient)


def _refused(status: int, error: BaseException, repo: str, endpoint: str, wait: float) -> Failure:
    if status == 401:
        reason = f"{endpoint} does not accept the token (401); log in with `hf auth login` or set HF_TOKEN"
        return Failure(reason, is_transient=False)
    if status in (403, 404):
        detail = getattr(error, "server_message", None)  # such as a quota that is used up
        detail = f": {detail}" if detail else ""
        reason = (
            f"the token has no write access ({status}{detail}); log in with `hf auth login` with a token "
            f"that has write access to {repo.split('/')[0]}, or give another OWNER/NAME"
        )
        return Failure(reason, is_transient=False)
    if status >= 500 or status in TRANSIENT:
        return Failure(
            f"{endpoint} is unavailable ({status}); the run is complete on disk, try later", True, retry_after=wait
        )
    return Failure(f"{endpoint} refused it ({first_lines(error)}); correct that", is_transient=False)


def _retry_after(response: object) -> float:
    """Return the seconds that the header Retry-After asks to wait, at most an hour; 0 without it."""
    value = getattr(response, "headers", {}).get("Retry-After", "")
    return min(3600.0, float(value)) if value.isdigit() else 0.0
