"""The Linux control groups of this process, which limit a container's memory, processes and threads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

# Where Linux mounts control groups, and the file that lists those of this process.
CGROUP_ROOT, PROCESS_CGROUPS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")


class ControlGroup(NamedTuple):
    """A folder with the files of a control group; version 1 has a tree of folders for each controller."""

    folder: Path
    version: int


def control_groups(controller: str) -> Iterator[ControlGroup]:
    """Yield this process's groups of a controller (memory, pids), each followed by its parents."""
    try:
        lines = PROCESS_CGROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = CGROUP_ROOT / controllers
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            yield ControlGroup(folder, 1 if controllers else 2)
            if folder == root:
                break
