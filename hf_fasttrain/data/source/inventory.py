"""What a folder holds: one listing for training, check, evaluate and predict, in which nothing is left out in silence.

Every folder is listed once, with `os.scandir` and without a system call for each file: 100,000 files need 0.2 s.
"""

from __future__ import annotations

import errno
import heapq
import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path

from hf_fasttrain.data.source.image_files import IMAGE_SUFFIXES, UNREAD_SUFFIXES, is_made_by_tool, suffix_of
from hf_fasttrain.run_folder.file_names import (
    CHECKPOINTS_FOLDER,
    GALLERY_FILE,
    GALLERY_FOLDER,
    METRICS_FILE,
    MODEL_FOLDER,
    RESOLVED_FILE,
    TRACKERS_FOLDER,
)
from hf_fasttrain.utils.clean import one_line
from hf_fasttrain.utils.errors import DataError
from hf_fasttrain.utils.files import reason
from hf_fasttrain.utils.format import format_count

_RUN_FOLDERS = {CHECKPOINTS_FOLDER, GALLERY_FOLDER, MODEL_FOLDER, TRACKERS_FOLDER}
_CACHE_FILES = {"about.json", "index", "pixels"}  # of pixels/cache.py
PERMISSION_SAMPLE = 1000  # images of a split whose permissions are looked at, at least two of each class


class Reason(Enum):
    """Why something in a folder is not read: one, and several of its kind. The most important ones first."""

    DEAD_LINK = "dead link", "dead links"
    LOOP = "link loop", "link loops"
    FORMAT = "image of a format that is not read", "images of formats that are not read"
    SPECIAL = "FIFO, device or socket", "FIFOs, devices or sockets"
    UNREADABLE = "folder that can't be listed", "folders that can't be listed"
    DENIED = "image without read permission", "images without read permission"
    MISSING = "image that metadata list, but is not there", "images that metadata list, but are not there"
    NOT_THERE = "image that the table lists, but is not there", "images that the table lists, but are not there"
    NO_LABEL = "row without a label", "rows without a label"
    NO_PATH = "row without a path", "rows without a path"
    SPLITLESS = "row without a split", "rows without a split"
    NO_CLASS = "image outside of class folders", "images outside of class folders"
    NO_SPLIT = "folder beside the splits", "folders beside the splits"
    OUTPUT = "run or cache of hf-fasttrain", "runs or caches of hf-fasttrain"
    NO_IMAGES = "table or metadata of something else", "tables or metadata of something else"
    REPEATED = "link to a folder that is read already", "links to folders that are read already"
    UNLISTED = "image that metadata do not list", "images that metadata do not list"
    OTHER = "file that is no image by its name", "files that are no images by their names"
    TOOL = "name that is hidden or a system's", "names that are hidden or a system's"


@dataclass(frozen=True)
class LeftOut:
    """Something in a folder that is not read."""

    path: str  # below the folder that was listed; of a folder with a / at its end
    reason: Reason
    is_image: bool = False  # counts towards data.max_bad_fraction
    detail: str = ""

    @property
    def text(self) -> str:
        """The path and what is known beside it, for messages."""
        return short_path(self.path) + (f": {self.detail}" if self.detail else "")


def short_path(path: str) -> str:
    """Return a path for a message: on one line, without its middle if it is long."""
    text = one_line(path)
    return text if len(text) <= 120 else f"{text[:60]} ... {text[-55:]}"


@dataclass(eq=False)
class Folder:
    """The names in a folder, listed once; a folder that several links lead to is one object."""

    images: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)  # the others: tables, metadata, anything
    folders: dict[str, Folder] = field(default_factory=dict)
    links: dict[str, Folder] = field(default_factory=dict)  # to folders; they may lead back up
    left_out: list[LeftOut] = field(default_factory=list)  # paths are names
    error: str = ""  # why it can't be listed

    @property
    def subfolders(self) -> dict[str, Folder]:
        """Folders and links to folders."""
        return {**self.folders, **self.links}

    def has_images(self) -> bool:
        """Return whether there are images in the folder or below."""
        return any(folder.images for _, folder in walk(self, []))


def list_folder(root: str) -> Folder:
    """Return what is in a folder and below it. Raises DataError if it can't be listed.

    Links are followed, those to a folder that contains them excepted. Hidden folders and those of systems and programs
    are not entered, runs and caches of this package are left out.
    """
    top, listed = Folder(), list[tuple[str, Folder]]()
    links = _list_real(root, top, listed)
    if top.error:
        raise DataError(f"{one_line(root)}: can't be listed: {top.error}")
    if links:
        _follow(links, root, listed)
    _leave_out_outputs(top, listed)
    return top


def _follow(links: list[tuple[Folder, str, str]], root: str, listed: list[tuple[str, Folder]]) -> None:
    """List the folders that links, as `_list_real` returns them, lead to; those above `root` are loops."""
    known = {_identity(path): folder for path, folder in listed}
    above = {_identity(str(path)) for path in Path(os.path.realpath(root)).parents}
    while links:
        parent, name, path = links.pop()
        identity = _identity(path)
        if identity in above:
            del parent.links[name]
            parent.left_out.append(LeftOut(f"{name}/", Reason.LOOP))
            continue
        if identity not in known:
            known[identity] = Folder()
            links += _list_real(path, known[identity], listed, known)
        parent.links[name] = known[identity]


def _leave_out_outputs(top: Folder, listed: Sequence[tuple[str, Folder]]) -> None:
    """Leave out what this package has written: the pictures of a report would become a class called `run`."""
    for _, folder in reversed(listed):  # those below come first
        is_run = folder is top and _is_run(folder)
        for below in (folder.folders, folder.links):
            for name, inner in list(below.items()):
                if _is_output(inner) or (is_run and name in _RUN_FOLDERS and _may_be_of_run(inner)):
                    del below[name]
                    folder.left_out.append(LeftOut(f"{name}/", Reason.OUTPUT))


def _is_output(folder: Folder) -> bool:
    """Return whether a folder is a run or a cache of pixels, or holds nothing but these."""
    if _is_run(folder) or (_CACHE_FILES.issubset(folder.files) and not folder.images):
        return True
    others = [*folder.images, *folder.files, *folder.folders, *folder.links]
    return not others and any(entry.reason is Reason.OUTPUT for entry in folder.left_out)


def _may_be_of_run(folder: Folder) -> bool:
    return not folder.images or GALLERY_FILE in folder.files


def _is_run(folder: Folder) -> bool:
    if folder.images or METRICS_FILE not in folder.files:
        return False
    return RESOLVED_FILE in folder.files or CHECKPOINTS_FOLDER in folder.folders


def _list_real(
    root: str, top: Folder, listed: list[tuple[str, Folder]], known: dict[tuple[int, int], Folder] | None = None
) -> list[tuple[Folder, str, str]]:
    """List a folder and the real folders below it; return the links to folders: (where, name, path).

    Folders below it that are `known` are not listed again.
    """
    links: list[tuple[Folder, str, str]] = []
    stack = [(root, top)]
    while stack:  # not recursive: folders may be nested deeper than calls
        path, folder = stack.pop()
        listed.append((path, folder))
        try:
            with os.scandir(path) as entries:
                for entry in entries:
                    _sort_in(entry, folder)
        except OSError as error:
            folder.error = reason(error)
        links += [(folder, name, os.path.join(path, name)) for name in folder.links]
        for name in folder.folders:
            below = os.path.join(path, name)
            if known is not None:
                identity = _identity(below)
                if identity in known:
                    folder.folders[name] = known[identity]
                    continue
                known[identity] = folder.folders[name]
            stack.append((below, folder.folders[name]))
    return links


def _identity(path: str) -> tuple[int, int]:
    try:
        status = os.stat(path)
    except OSError:  # removed, or replaced, since it was listed
        return (-1, hash(path))
    return status.st_dev, status.st_ino


def _sort_in(entry: os.DirEntry[str], folder: Folder) -> None:
    name = entry.name
    suffix = suffix_of(name)
    looks_like_image = suffix in IMAGE_SUFFIXES and not name.startswith((".", "~$"))
    if looks_like_image and entry.is_file(follow_symlinks=False):
        folder.images.append(name)
        return
    is_folder = entry.is_dir(follow_symlinks=False)
    if is_made_by_tool(name):
        folder.left_out.append(LeftOut(f"{name}/" if is_folder else name, Reason.TOOL))
    elif is_folder:
        folder.folders[name] = Folder()
    elif entry.is_file(follow_symlinks=False):
        _sort_in_file(name, folder)
    else:
        _sort_in_special(entry, folder, is_image=looks_like_image)


def _sort_in_file(name: str, folder: Folder) -> None:
    suffix = suffix_of(name)
    if suffix in UNREAD_SUFFIXES:
        folder.left_out.append(LeftOut(name, Reason.FORMAT, is_image=True))
    else:
        (folder.images if suffix in IMAGE_SUFFIXES else folder.files).append(name)


def _sort_in_special(entry: os.DirEntry[str], folder: Folder, *, is_image: bool) -> None:
    """Sort in a link, or what is neither a file nor a folder."""
    try:
        mode = entry.stat().st_mode
    except OSError as error:
        loop = error.errno == errno.ELOOP
        why = Reason.LOOP if loop else Reason.DEAD_LINK
        detail = "" if loop else f"links to {one_line(_target(entry.path))}"
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            detail += f": {reason(error)}"
        # A link without a suffix may have led to a folder of images.
        counts = is_image or "." not in entry.name
        folder.left_out.append(LeftOut(entry.name, why, counts, detail))
        return
    if stat.S_ISDIR(mode):
        folder.links[entry.name] = Folder()  # replaced by what it leads to
    elif not stat.S_ISREG(mode):
        folder.left_out.append(LeftOut(entry.name, Reason.SPECIAL, is_image))
    else:
        _sort_in_file(entry.name, folder)


def _target(path: str) -> str:
    try:
        return os.readlink(path)
    except OSError:
        return "?"


def walk(
    folder: Folder, left_out: list[LeftOut], *, at: str = "", above: Iterable[Folder] = ()
) -> Iterator[tuple[str, Folder]]:
    """Yield (path with a / at its end, folder) of a folder and those below it, each once, real ones before links.

    What is not entered is appended to `left_out`: link loops (also to the folders `above`), and links to folders that
    are yielded already.
    """
    seen: set[int] = set()
    stack = [(at, folder, frozenset(map(id, above)))]
    links: list[tuple[str, Folder, frozenset[int]]] = []
    while stack or links:
        if not stack:
            stack.append(heapq.heappop(links))
        path, inner, line = stack.pop()
        if id(inner) in line or id(inner) in seen:
            left_out.append(LeftOut(path, Reason.LOOP if id(inner) in line else Reason.REPEATED))
            continue
        seen.add(id(inner))
        yield path, inner
        line |= {id(inner)}
        for name, target in inner.links.items():
            heapq.heappush(links, (f"{path}{name}/", target, line))
        stack += [(f"{path}{name}/", below, line) for name, below in sorted(inner.folders.items(), reverse=True)]


def images_below(folder: Folder, *, at: str = "", above: Iterable[Folder] = ()) -> tuple[list[str], list[LeftOut]]:
    """Return the paths of the images in a folder and below, in their order, and what is left out; both begin with `at`.

    Sorted by the names of folders and files, level by level: as `load_dataset("imagefolder")` for one level.
    """
    names: list[str] = []
    left_out: list[LeftOut] = []
    for path, inner in walk(folder, left_out, at=at, above=above):
        names += [path + name for name in inner.images]
        left_out += here(inner, path)
    return sorted(names, key=(lambda name: name.split("/")) if folder.subfolders else None), left_out


def split_by_permission(root: str, images: Sequence[str], sample: int) -> tuple[list[str], list[LeftOut]]:
    """Return the images below `root` that this user may read, and what is left out.

    To ask for each file takes 0.2 s for 100,000, on a file server minutes. So `sample` of them are looked at, evenly
    spaced with the last, and all of them only if one of those can't be read.
    """

    def may_read(image: str) -> bool:
        return os.access(os.path.join(root, image), os.R_OK)

    if all(map(may_read, [*images[:: -(-len(images) // sample)], images[-1]] if images else ())):
        return list(images), []
    readable = set(filter(may_read, images))
    denied = [LeftOut(image, Reason.DENIED, is_image=True) for image in images if image not in readable]
    return [image for image in images if image in readable], denied


def here(folder: Folder, at: str) -> list[LeftOut]:
    """Return what is left out of a folder itself, as paths that begin with `at`: other files, dead links."""
    left_out = [replace(entry, path=at + entry.path) for entry in folder.left_out]
    left_out += [LeftOut(at + name, Reason.OTHER) for name in folder.files]
    if folder.error:
        left_out.append(LeftOut(at, Reason.UNREADABLE, is_image=True, detail=folder.error))
    return left_out


@dataclass
class Inventory:
    """What was found in a folder and what was left out, by split; "" is the key of what belongs to no split."""

    root: str
    found: dict[str, int] = field(default_factory=dict)  # images
    left_out: dict[str, list[LeftOut]] = field(default_factory=dict)
    advice: str = "repair, convert or move them"

    def add(self, split: str, found: int, left_out: Iterable[LeftOut]) -> None:
        """Add what a split, or the rest (""), holds."""
        self.found[split] = self.found.get(split, 0) + found
        known = {entry.path for entries in self.left_out.values() for entry in entries}
        self.left_out.setdefault(split, []).extend(entry for entry in left_out if entry.path not in known)

    @property
    def all(self) -> list[LeftOut]:
        """Everything left out, sorted by reason and path."""
        order = list(Reason)
        everything = [entry for entries in self.left_out.values() for entry in entries]
        return sorted(everything, key=lambda entry: (order.index(entry.reason), entry.path))

    def note(self, where_all: str = "; `hf-fasttrain check RECIPE` lists all") -> list[str]:
        """Return one note with the counts of what is left out, and an example of each kind; none if nothing is."""
        everything = self.all
        if not everything:
            return []
        number = sum(self.found.values())
        found = f"{format_count(number, 'image')}; " if number else ""
        more = where_all if len({entry.reason for entry in everything}) < len(everything) else ""
        return [f"{one_line(self.root)}: {found}left out: {described(everything)}{more}"]

    def require_few(self, splits: Iterable[str], limit: float) -> None:
        """Raise TooManyLeftOut if more than a share of a split's images is left out."""
        for split in splits:
            images = [entry for entry in self.left_out.get(split, []) if entry.is_image]
            total = len(images) + self.found.get(split, 0)
            if len(images) > limit * total:
                raise TooManyLeftOut(self, split, sorted(images, key=lambda entry: entry.path), total, limit)


class TooManyLeftOut(DataError):
    """More images are left out than data.max_bad_fraction allows; `inventory` has them all."""

    def __init__(self, inventory: Inventory, split: str, images: Sequence[LeftOut], total: int, limit: float) -> None:
        first = "".join(f"\n  {entry.text}" for entry in images[:10])
        more = f"\n  ... and {len(images) - 10:,} more" if len(images) > 10 else ""
        permit = "permit to read them (chmod), " if any(entry.reason is Reason.DENIED for entry in images) else ""
        super().__init__(
            f"{one_line(inventory.root)}: {len(images):,} of {total:,} images of split '{split}' are left out "
            f"({described(images)}), and data.max_bad_fraction is {limit}; {permit}{inventory.advice}, or "
            f"raise data.max_bad_fraction:{first}{more}"
        )
        self.inventory = inventory


def described(left_out: Sequence[LeftOut]) -> str:
    """Return how much is left out for which reason, each with an example."""
    by_reason: dict[Reason, list[LeftOut]] = {}
    for entry in left_out:
        by_reason.setdefault(entry.reason, []).append(entry)
    return ", ".join(f"{format_count(len(some), *why.value)} ({some[0].text})" for why, some in by_reason.items())
