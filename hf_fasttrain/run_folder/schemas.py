"""What the files of a run folder hold, as they are read back.

Such a file may be damaged, old, or a stranger's: what is used has a type and a bound, and only what every version wrote
is required. Unknown keys are ignored where they can't change what the file means.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from hf_fasttrain.run_folder.schema_calibration import CalibrationPart
from hf_fasttrain.run_folder.schema_intervals import IntervalsPart
from hf_fasttrain.utils.clean import cut, one_line
from hf_fasttrain.utils.errors import RunError
from hf_fasttrain.utils.files import read_object, read_text, reason
from hf_fasttrain.utils.validation import first_mistake
from hf_fasttrain.utils.yaml import MAX_CHARACTERS, read_yaml, read_yaml_file

MAX_CLASSES = 100_000
MAX_IMAGE_SIZE = 4096  # as in a recipe

Count = Annotated[int, Field(ge=0, lt=2**53)]  # exact as a float too
Share = Annotated[float, Field(ge=0, le=1)]
Name = Annotated[str, StringConstraints(max_length=1000)]
Text = Annotated[str, StringConstraints(max_length=100_000)]
Scalar = bool | Count | float | Text | None
ImageSize = Annotated[int, Field(ge=1, le=MAX_IMAGE_SIZE)]
ClassNames = Annotated[list[Name], Field(max_length=MAX_CLASSES)]
Interpolation = Literal["nearest", "box", "bilinear", "hamming", "bicubic", "lanczos", "mks2013", "mks2021"]
Metrics = Annotated[dict[Name, float | None], Field(max_length=1000)]


class _Part(BaseModel):
    """A file, or a part of one."""

    model_config = ConfigDict(strict=True, extra="ignore", protected_namespaces=(), allow_inf_nan=True)
    what: ClassVar[str] = "a file of a run"  # for messages


class ValueRangePart(_Part):
    """`ValueRange` (data/pixels/rgb.py)."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)
    low: Annotated[float, Field(ge=-1e12, le=1e12)]
    high: Annotated[float, Field(ge=-1e12, le=1e12)]
    clips: bool = True

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.low >= self.high:
            raise ValueError("low is not below high")
        return self


class PreprocessingPart(_Part):
    """`Preprocessing` (models/model.py)."""

    model_config = ConfigDict(extra="forbid")
    image_size: ImageSize
    mean: Annotated[list[Annotated[float, Field(ge=-1e6, le=1e6)]], Field(min_length=3, max_length=3)]
    std: Annotated[list[Annotated[float, Field(gt=0, le=1e6)]], Field(min_length=3, max_length=3)]
    interpolation: Interpolation = "bilinear"
    crop_pct: Annotated[float, Field(gt=0.1, le=10)] = 0.875
    crop_mode: Literal["center", "center_floor", "squash"] = "center"
    value_range: ValueRangePart | None = None


class SpecFile(_Part):
    """`ModelSpec` (models/model.py); an unknown key may change the model, and is refused."""

    model_config = ConfigDict(extra="forbid")
    what = "a model's description"
    name: Annotated[str, StringConstraints(min_length=1, max_length=1000)]
    class_names: Annotated[ClassNames, Field(min_length=1)]
    image_size: ImageSize
    multi_label: bool = False
    drop_path: Share = 0.0
    small_image_stem: bool = False
    trust_remote_code: bool = False
    args: dict[Name, Any] = {}
    preprocessing: PreprocessingPart | None = None


class WeightsPart(_Part):
    """Which weights RUN/model has."""

    weights: Name | None = None
    step: Count | None = None
    steps: Annotated[list[Count], Field(max_length=1000)] | None = None
    ema: bool | None = None


class BestPart(_Part):
    """The best evaluation, or the best value of early stopping."""

    metric: Name
    value: float
    step: Count
    mode: Name | None = None
    metrics: Metrics | None = None
    path: Name | None = None


class LastPart(_Part):
    """The last evaluation."""

    step: Count | None = None
    metrics: Metrics | None = None


class OutOfMemoryPart(_Part):
    """A step at which the micro-batch became smaller."""

    step: Count
    before: Count
    after: Count


class EarlyStopPart(_Part):
    """How early stopping ended a run."""

    metric: Name
    mode: Name
    value: float
    step: Count
    patience: Count
    waited: Count
    stopped_at: Count
    num_steps: Count
    min_delta: float = 0.0


class ResultFile(_Part):
    """`Result` (run_folder/result.py), and what is pushed while a run is still training."""

    what = "a run's result"
    metrics: Metrics | None = None
    test_metrics: Metrics | None = None
    model: WeightsPart | None = None
    best: BestPart | None = None
    last: LastPart | None = None
    steps: Count | None = None
    num_steps: Count | None = None
    weights_of_step: Count | None = None
    skipped_steps: Count | None = None
    micro_batch_size: Count | None = None
    out_of_memory: list[OutOfMemoryPart] | None = None
    resumed_at: list[Count] | None = None
    not_written: list[Text] | None = None
    images: Count | None = None
    train_seconds: float | None = None
    images_per_second: float | None = None
    data_wait_fraction: float | None = None
    bad_images: Count | None = None
    peak_memory_bytes: Count | None = None
    stopped_early: bool | None = None
    early_stopping: EarlyStopPart | None = None
    machine: dict[Name, Scalar] | None = None
    versions: dict[Name, Name] | None = None
    notes: list[Text] | None = None
    own_metrics: list[Name] | None = None
    predict: Name | None = None
    intervals: IntervalsPart | None = None
    test_intervals: IntervalsPart | None = None
    probe: dict[Name, Any] | None = None


class ConfigFile(_Part):
    """What is read of config.json, beside timm and transformers."""

    class PretrainedPart(_Part):
        """Of the published weights."""

        tag: Name | None = None

    what = "a model's configuration"
    architecture: Name | None = None
    pretrained_cfg: PretrainedPart | None = None


class MarkerFile(_Part):
    """COMPLETE: the files of a checkpoint."""

    class Entry(_Part):
        """Size and xxh3-128 of a file."""

        bytes: Count
        xxh3: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{32}$")]

    what = "a checkpoint's list of files"
    format: int
    files: Annotated[dict[Name, Entry], Field(min_length=1, max_length=1000)]


class TrainingState(_Part):
    """`State` (train/checkpoint_state.py)."""

    model_config = ConfigDict(extra="forbid")
    step: Count
    updates: Count = 0
    images: Count = 0
    train_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    wait_seconds: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    lr: float = 0.0
    base_lr: float = 0.0
    num_steps: Count = 0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**64)] | None = None
    evaluated_at: Annotated[int, Field(ge=-1, lt=2**53)] = -1
    metrics: Metrics = {}
    best: BestPart | None = None
    watched: BestPart | None = None
    patience_from: Count = 0
    resumed_at: list[Count] = []
    out_of_memory: list[OutOfMemoryPart] = []
    calibration: CalibrationPart | None = None


class StateFile(_Part):
    """state.json of a checkpoint; `training` is what `tensor_tree.pack` returned."""

    what = "a checkpoint's state"
    step: Count
    state: TrainingState | None = None
    learnt: dict[Name, Any] = {}
    processes: Annotated[int, Field(ge=1, le=1_000_000)] = 1
    callbacks: list[Any] | dict[str, Any] | None = None
    trackers: dict[Name, Name] | None = None
    training: dict[str, Any]


class CalibrationFile(_Part, CalibrationPart):
    """`Calibration` (run_folder/calibration.py), in a model's folder."""

    what = "a model's calibration"


class PicturePart(_Part):
    """`Picture` (run_folder/gallery.py)."""

    file: Name
    name: Name
    truth: Annotated[dict[Name, Annotated[float, Field(allow_inf_nan=False)]], Field(max_length=MAX_CLASSES)]
    predicted: Metrics = {}
    loss: float | None = None


class GalleryFile(_Part):
    """`Gallery` (run_folder/gallery.py)."""

    what = "a list of pictures"
    class_names: ClassNames = []
    training: Annotated[list[PicturePart], Field(max_length=1000)] = []
    training_step: Count = 0
    mistakes: Annotated[list[PicturePart], Field(max_length=1000)] = []
    mistakes_step: Count = 0
    mistakes_split: Name = ""


class MicroBatchFile(_Part):
    """The micro-batch that was found when memory ran out."""

    what = "a micro-batch size"
    wished: Name
    micro_batch_size: Annotated[int, Field(ge=1, le=10_000_000)]


class PushedFile(_Part):
    """The last push."""

    what = "a push"
    repo: Name
    step: Count
    finished: bool = True


class BadImagePart(_Part):
    """A line of bad_images.jsonl."""

    split: Name
    index: Count
    path: Text | None = None
    error: Text = ""
    substitute: Count | None = None


class TuningFile(_Part):
    """`Tuning` (from_recipe/tunings.py)."""

    what = "a stored tuning"
    machine: dict[Name, Any]
    versions: dict[Name, Name]
    model: dict[Name, Any]
    data: dict[Name, Any]
    values: dict[Name, Any]
    date: Name
    images_per_second: float
    duration: Name


class CacheFile(_Part):
    """about.json of a cache of pixels, or of a model's features."""

    class CenterPart(_Part):
        """How images are cut to the size of evaluation."""

        crop_mode: Name | None = None
        image_size: Count | None = None

    what = "a cache's description"
    format: int
    num_rows: Count
    dataset: Text | None = None
    split: Name | None = None
    center: CenterPart | None = None
    short_side: Count | None = None
    stored_quality: Count | None = None
    features: Name | None = None


class SettingPart(_Part):
    """A setting in resolved.yaml."""

    value: Any = None
    origin: Text = ""
    tag: Name = "fact"
    kind: Name | None = None
    kept: bool = False


class RecipePart(_Part):
    """What a model card needs of a run's recipe, which another version may have written."""

    class ModelPart(_Part):
        """The section `model`."""

        name: Name | None = None
        pretrained: bool | Text | None = None

    class DataPart(_Part):
        """The section `data`."""

        dataset: Text | None = None
        config: Name | None = None
        revision: Name | None = None
        eval_split: Name | None = None
        test_split: Name | None = None

    class HubPart(_Part):
        """The section `hub`."""

        repo: Name | None = None
        private: bool | None = None
        license: Name | None = None

    what = "a recipe"
    model: ModelPart | None = None
    data: DataPart | None = None
    hub: HubPart | None = None


def require(schema: type[_Part], values: Any) -> Any:
    """Return the values as they are. Raises ValueError, with one line, unless they are of the schema."""
    try:
        schema.model_validate(values)
    except ValidationError as error:
        raise ValueError(first_mistake(error)) from None
    return values


def fits(schema: type[_Part], values: Any) -> bool:
    """Return whether values are of a schema."""
    try:
        schema.model_validate(values)
    except ValidationError:
        return False
    return True


def read_file(path: Path, schema: type[_Part]) -> dict[str, Any]:
    """Return the object of a JSON file that fits its schema. Raises RunError, with one message."""
    try:
        values: dict[str, Any] = require(schema, read_object(path))
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: can't be read as {schema.what} ({reason(error)}); fix it or train again") from None
    return values


def read_recipe_file(path: Path) -> tuple[str, dict[str, Any]]:
    """Return a run's recipe as text and as a tree; both are empty if there is none. Raises RunError."""
    if not path.is_file():
        return "", {}
    try:
        text = read_text(path, 4 * MAX_CHARACTERS)
        return text, require(RecipePart, read_yaml(text)[0] or {})
    except (OSError, ValueError) as error:
        raise RunError(f"{path}: can't be read ({reason(error)}); fix it or train again") from None


def read_if_sound(path: Path, schema: type[_Part]) -> dict[str, Any]:
    """Return the object of a JSON file; an empty dict if the file is missing, damaged or not of the schema."""
    try:
        return dict(require(schema, read_object(path)))
    except (OSError, ValueError):
        return {}


def read_settings_file(path: Path) -> dict[str, dict[str, Any]]:
    """Return key -> entry of a resolved.yaml. Raises OSError or ValueError."""
    tree = read_yaml_file(path)
    if not isinstance(tree, dict):
        raise ValueError("is not a mapping of settings")
    for key, entry in tree.items():
        try:
            require(SettingPart, entry)
        except ValueError as error:
            raise ValueError(f"{one_line(cut(key, 100))}: {error}") from None
    return tree
