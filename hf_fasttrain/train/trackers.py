"""Trackers (TensorBoard, Weights & Biases, ...) through Accelerate; a resumed run continues its tracker runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from accelerate import Accelerator

from hf_fasttrain.train.distributed import on_main
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.files import reason
from hf_fasttrain.utils.private_apis import trackio_last_step

# The parameter for the id of a tracker's run, and how to read it.
ID_KEYS = {"wandb": "id", "mlflow": "run_id", "trackio": "name"}
READ_ID: dict[str, Callable[[Any], str]] = {
    "wandb": lambda run: run.id,
    "mlflow": lambda run: run.info.run_id,
    "trackio": lambda run: run.name,
}
KEEP_CONFIG = ("mlflow", "tensorboard")  # writing the configuration again is an error (mlflow) or starts another run


class Trackers:
    """Sends (values, step) to the trackers of an Accelerator. A tracker that fails is removed."""

    def __init__(
        self,
        accelerator: Accelerator,
        project: str,
        config: dict[str, Any],
        *,
        ids: dict[str, str],
        step: int,
        sent: Mapping[str, int] | None = None,
    ) -> None:
        """Start the trackers; `ids` are the tracker runs to continue from `step`.

        `sent`: the last step that was logged before the run was resumed, by the prefix of the values' names ("train",
        "eval"). Earlier steps are not sent again to trackers that would show them twice. Raises RunError if a tracker
        can't be started.
        """
        options: dict[str, dict[str, Any]] = {"tensorboard": {"purge_step": step + 1}} if step else {}
        for name, run in ids.items():
            options[name] = {ID_KEYS[name]: run, **({} if name == "mlflow" else {"resume": "allow"})}

        def start() -> None:
            try:
                accelerator.init_trackers(project, init_kwargs=options)
                for tracker in accelerator.trackers:
                    if tracker.name not in options or tracker.name not in KEEP_CONFIG:
                        tracker.store_init_configuration(config)
            except Exception as error:  # noqa: BLE001 - others' code: login, network, versions
                raise RunError(
                    f"log.trackers can't be started: {reason(error)}; log in, fix the connection or leave it out"
                ) from None

        on_main(start)
        self.trackers = list(accelerator.trackers)
        self._ids = {t.name: str(READ_ID[t.name](t.tracker)) for t in self.trackers if t.name in READ_ID}
        self._sent = {t.name: _logged_steps(t, sent or {}) for t in self.trackers if t.name in ids}

    def __call__(self, values: dict[str, float], step: int) -> None:
        """Send values to all trackers; raises RunError for those that fail, which are removed."""
        failed = []
        kind = next(iter(values), "").split("/")[0]
        for tracker in list(self.trackers):
            if step <= self._sent.get(tracker.name, {}).get(kind, 0):
                continue
            try:
                tracker.log(values, step=step)
            except Exception as error:  # noqa: BLE001 - others' code, and training does not depend on it
                self.trackers.remove(tracker)
                failed.append(f"{tracker.name}: {reason(error)}")
        if failed:
            raise RunError("; ".join(failed))

    def ids(self) -> dict[str, str]:
        """Return tracker name -> id of its run for trackers that resume by an id, including failed ones."""
        return dict(self._ids)


def _logged_steps(tracker: Any, sent: Mapping[str, int]) -> dict[str, int]:
    """Return the last steps of a tracker run that would appear twice if they were sent again.

    TensorBoard purges steps that it has, and Weights & Biases ignores them; MLflow writes at once, trackio twice a
    second.
    """
    if tracker.name == "mlflow":
        return dict(sent)
    if tracker.name == "trackio":
        last = trackio_last_step(tracker.tracker)
        return {kind: min(step, last) for kind, step in sent.items()}
    return {}
