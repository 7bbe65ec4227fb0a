"""The folders that every command and its libraries need: working folder, folder of temporary files, home.

Containers often run as a user id that has no entry in /etc/passwd, without HOME. Libraries then take ``~`` for the name
of a folder, or fail when they are imported.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path

from hf_fasttrain.utils.errors import RunError

_HOW = " (HOME is not set, and /etc/passwd has no entry)"


def has_home() -> bool:
    """Return whether the user has a home folder of their own."""
    return _known_home() is not None


def home_folder() -> Path:
    """Return the user's home folder, or one for temporary files if there is none. Raises RunError."""
    return _known_home() or _temporary_home()


def _known_home() -> Path | None:
    home = os.environ.get("HOME")
    if home:
        return Path(home) if home != str(_temporary_home_path()) else None
    import pwd

    try:
        return Path(pwd.getpwuid(os.getuid()).pw_dir)
    except KeyError:
        return None


def _temporary_home_path() -> Path:
    return Path(tempfile.gettempdir()) / f"hf_fasttrain-home-{os.getuid()}"


def _temporary_home() -> Path:
    """Create the folder, which only this user may enter: others could exchange what is cached in it."""
    path = _temporary_home_path()
    try:
        path.mkdir(mode=0o700, exist_ok=True)
        status = path.lstat()
    except OSError as error:
        raise RunError(f"user {os.getuid()} has no home folder{_HOW}: {path}: {error.strerror}; set HOME") from None
    if not stat.S_ISDIR(status.st_mode) or status.st_uid != os.getuid() or status.st_mode & 0o077:
        raise RunError(f"user {os.getuid()} has no home folder{_HOW}, and {path} is not only theirs; set HOME")
    return path


def set_home() -> str | None:
    """Set HOME for libraries and child processes if it is not set; return a note if the user has no home folder."""
    if os.environ.get("HOME") and _known_home() is not None:
        return None
    home = os.environ["HOME"] = str(home_folder())
    if _known_home() is not None:
        return None
    return f"user {os.getuid()} has no home folder{_HOW}: caches are kept in {home}; set HOME to keep them elsewhere"


def require_working_folder() -> None:
    """Raise RunError if the working folder is gone, or this user may not enter it."""
    try:
        folder = os.getcwd()
    except OSError:
        raise RunError("the working folder does not exist any more; change to another one (cd)") from None
    try:
        os.stat(os.path.join(folder, "."))
    except OSError as error:
        raise RunError(f"working folder {folder}: {error.strerror}; change to another one (cd)") from None


def require_temporary_folder() -> None:
    """Raise RunError if there is no folder in which temporary files can be created."""
    try:
        tempfile.gettempdir()
    except FileNotFoundError as error:
        tried = (error.strerror or "").partition(" in ")[2].strip("[]").replace("'", "")
        raise RunError(
            f"temporary files can't be created in any of {tried or 'the usual folders'}: they are missing, full or not "
            "writable; set TMPDIR to a folder that can be written to"
        ) from None
