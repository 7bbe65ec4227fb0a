"""The upload process beside training: `python -m hf_fasttrain.hub.worker`.

It reads what to push from its standard input, as JSON (the arguments of `push_run`), and answers on its standard
output, as JSON: {"address"} or {"error", "is_transient", "retry_after"}. huggingface_hub finds the token.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from hf_fasttrain.hub.push import STALLED_SECONDS, NotPushed, push_run
from hf_fasttrain.utils.clean import without_secrets
from hf_fasttrain.utils.errors import UserError
from hf_fasttrain.utils.private_apis import hub_client_factory


def main() -> None:
    """Read a request from standard input, push, and write the answer to standard output."""
    from huggingface_hub import set_client_factory
    from huggingface_hub.utils import disable_progress_bars, logging

    lower_priority()
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    disable_progress_bars()
    logging.set_verbosity(logging.CRITICAL)
    request = json.load(sys.stdin)
    set_client_factory(partial(_client, float(request.get("stalled", STALLED_SECONDS))))
    answer: dict[str, Any]
    try:
        answer = {"address": push_run(Path(request.pop("run")), request.pop("repo"), **request)}
    except UserError as error:
        is_transient = isinstance(error, NotPushed) and error.failure.is_transient
        wait = error.failure.retry_after if isinstance(error, NotPushed) else 0.0
        answer = {"error": without_secrets(str(error)), "is_transient": is_transient, "retry_after": wait}
    json.dump(answer, sys.stdout)


def lower_priority() -> None:
    """Lower the priority: run on idle cores only, if the system supports that, else niced."""
    os.nice(19)
    if hasattr(os, "SCHED_IDLE"):
        with suppress(OSError):
            os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))


def _end_with_parent(parent: int) -> None:
    """Exit when the training process is gone: a resumed run pushes newer checkpoints."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _client(stalled: float) -> Any:
    """Return huggingface_hub's client with a timeout for stalled connections."""
    client = hub_client_factory()()
    client.timeout = stalled
    return client


if __name__ == "__main__":
    main()
