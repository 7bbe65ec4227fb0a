"""Teachers for distillation: a finished run's model or a timm model with its published weights, frozen."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash
from torch import nn

from hf_fasttrain.data.source.classes import match_names
from hf_fasttrain.models.limits import building
from hf_fasttrain.models.model import ModelSpec, Preprocessing, model_preprocessing
from hf_fasttrain.models.saved import load_model, model_folder, open_run, read_spec
from hf_fasttrain.models.weights import names_in, update_digest
from hf_fasttrain.run_folder.file_names import MODEL_FOLDER, SPEC_FILE, WEIGHTS_FILE
from hf_fasttrain.utils.errors import ModelError, RunError, UserError, first_line, nearest, shortened
from hf_fasttrain.utils.files import existing_path, expand_user
from hf_fasttrain.utils.remote import is_hub_url, parse_hub_url

KEY = "distill.teacher"
ALLOWED = "a run folder, hf://OWNER/NAME of a pushed run, or a timm name with published weights"


@dataclass(frozen=True)
class Teacher:
    """A frozen model in evaluation mode, on the CPU, and how its logits become those of the student's classes."""

    model: nn.Module
    preprocessing: Preprocessing  # what the model expects
    columns: list[int] | None  # of its logits, one for each class of the student; None: all, in this order
    description: str  # name and a digest of everything that determines its logits

    @property
    def num_bytes(self) -> int:
        """Bytes of parameters and buffers."""
        return sum(tensor.nbytes for tensor in (*self.model.parameters(), *self.model.buffers()))


def require_teacher(location: str) -> None:
    """Raise UserError for a location that can't be a teacher, without asking the Hub or loading anything."""
    if is_hub_url(location):
        try:
            parse_hub_url(location)
        except RunError as error:
            raise RunError(f"{KEY}: {error}") from None
    elif existing_path(location) is not None:
        _folder_of(location)
    else:
        _published_name(location)


def load_teacher(location: str, class_names: Sequence[str], *, multi_label: bool) -> Teacher:
    """Return the teacher at a location for a student's classes, which are matched by name.

    Raises UserError if there is none, or if it does not know all classes.
    """
    if is_hub_url(location) or existing_path(location) is not None:
        try:
            model, spec = load_model(_folder_of(location))
        except ModelError as error:
            raise ModelError(f"{KEY}: {error}") from None
        names = [spec.class_names]
    else:
        model, spec, names = _published(location)
    if spec.multi_label != multi_label:
        kinds = {True: "several labels per image", False: "one label per image"}
        raise ModelError(
            f"{KEY}: {location} was trained for {kinds[spec.multi_label]}, and the data have {kinds[multi_label]}; "
            "give a teacher of the same kind"
        )
    columns = _columns(location, class_names, names)
    pre = spec.preprocessing or model_preprocessing(model, spec)
    model = model.eval().requires_grad_(False)
    inputs = (pre.image_size, pre.mean, pre.std, columns)
    is_same = columns == list(range(len(spec.class_names)))
    return Teacher(model, pre, None if is_same else columns, f"{spec.name}, {_digest(model, inputs)}")


def _folder_of(location: str) -> Path:
    """Return the model folder of a run, of a model folder or of a pushed run, which is downloaded."""
    path = expand_user(location)
    try:
        has_no_recipe = (path / MODEL_FOLDER / WEIGHTS_FILE).is_file() and not (
            path / MODEL_FOLDER / SPEC_FILE
        ).is_file()
        if not has_no_recipe:
            folder = model_folder(open_run(location), pushed=is_hub_url(location))
            has_no_recipe = read_spec(folder / SPEC_FILE).is_user_model
    except UserError as error:
        raise type(error)(f"{KEY}: {error}") from None
    if has_no_recipe:
        raise ModelError(
            f"{KEY}: the model of {location} was built by your own code, which is not in the folder; distil from it by "
            "a step_loss: docs/your-loop.md"
        )
    return folder


def _published_name(location: str) -> str:
    """Return timm's name of a model with published weights."""
    import timm

    name = location.removeprefix("timm/")
    if timm.is_model(name) and timm.is_model_pretrained(name):
        return name
    if timm.is_model(name):
        raise ModelError(f"{KEY}: timm has no published weights of '{location}'; allowed are {ALLOWED}")
    looks_like_path = "/" in location or location.startswith((".", "~"))
    hint = (
        ""
        if looks_like_path
        else nearest(name, [known.partition(".")[0] for known in timm.list_models(pretrained=True)])
    )
    found = f"there is no folder {location}" if looks_like_path else f"'{location}' is neither a folder nor in timm"
    raise ModelError(f"{KEY}: {found}.{hint or ''} Allowed are {ALLOWED}")


def _published(location: str) -> tuple[nn.Module, ModelSpec, list[list[str]]]:
    """Return a timm model with its published weights, its spec, and lists of names that its classes may have."""
    import timm
    from huggingface_hub.errors import HfHubHTTPError
    from timm.data import ImageNetInfo, infer_imagenet_subset

    name = _published_name(location)
    config = timm.get_pretrained_cfg(name)
    assert config is not None
    number = int(config.num_classes)
    if not number:
        raise ModelError(f"{KEY}: {location} has no head, so it gives no logits; allowed are {ALLOWED}")
    names = [named] if (named := names_in(config.to_dict())) else []
    if subset := infer_imagenet_subset({"num_classes": number}):
        info = ImageNetInfo(subset)
        names += [list(info.label_names()), list(info.label_descriptions())]
    if not names:
        raise ModelError(f"{KEY}: the classes of {location} are not known; give a run that was fine-tuned on the data")
    spec = ModelSpec(name, [str(index) for index in range(number)], int(config.input_size[-1]))
    with building(f"{KEY} {location}"):
        try:
            return timm.create_model(name, pretrained=True), spec, names
        except (HfHubHTTPError, OSError) as error:
            raise ModelError(
                f"{KEY}: the published weights of {location} could not be downloaded: {first_line(error)}; check the "
                "network, or give a run folder"
            ) from None


def _columns(location: str, class_names: Sequence[str], candidates: Sequence[Sequence[str]]) -> list[int]:
    """Return the teacher's output of each class, by the names that lack the fewest. Raises ModelError if some do."""
    lacking: list[str] = list(class_names)
    for names in candidates:
        counts = Counter(names)  # a name that two outputs have tells nothing: ImageNet has two cranes
        matched = match_names(class_names, [name if counts[name] == 1 else f"\0{i}" for i, name in enumerate(names)])
        unknown = [name for name in class_names if name not in matched.numbers]
        if not unknown:
            return [matched.numbers[name] for name in class_names]
        lacking = min(lacking, unknown, key=len)
    raise ModelError(
        f"{KEY}: {location} does not know {len(lacking)} of the {len(class_names)} classes of the data "
        f"({shortened(lacking, 5)}); it knows {shortened(candidates[0], 5)}. Give a teacher of these classes, such as "
        "a run with the same data"
    )


def _digest(model: nn.Module, inputs: object) -> str:
    """Return a digest of a model's tensors and of `inputs`, which have a stable repr."""
    hashed = xxhash.xxh3_64(repr(inputs).encode())
    update_digest(hashed, model.state_dict().items())
    return hashed.hexdigest()
