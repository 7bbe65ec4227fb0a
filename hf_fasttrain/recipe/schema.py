"""The recipe's schema: every key with type, default, limits and description, as frozen pydantic models.

Every field has a tag: *result* (changes what is learned), *speed* (only speed and memory) or *output* (only what is
measured, written and shown). `hf-fasttrain check` and editors show the description. Files and overrides are read in
load.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, PrivateAttr

from hf_fasttrain.recipe.fields import (
    Auto,
    ClockField,
    DurationField,
    IntervalField,
    PolicyField,
    Probability,
    WarmupField,
    output,
    result,
    speed,
)
from hf_fasttrain.utils.duration import Duration


class Section(BaseModel):
    """A section of the recipe: unknown keys are refused, types are strict, values are frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class ModelSection(Section):
    name: str = result(..., "a timm name, timm/... on the Hub, a local folder, or transformers:<Hub name or folder>")
    pretrained: bool | str = result(
        False,
        "true: the model's own weights from the Hub; or a local folder or .safetensors file, or hf://OWNER/NAME",
    )
    head: Literal["auto", "keep", "new"] = result(
        "auto",
        "the head of pretrained weights; auto: kept if it has the same class names, else new; new: starts at zero",
    )
    drop_path: float = result(0.0, "stochastic depth rate", ge=0.0, lt=1.0)
    small_image_stem: bool = result(False, "ResNets: 3x3 stem with stride 1, no max-pool (for 32 px images)")
    freeze_backbone: bool = result(False, "train only the head")
    gradient_checkpointing: bool = speed(False, "compute activations twice to save memory")
    trust_remote_code: bool = result(False, "run the Python code that comes with a transformers model on the Hub")
    args: dict[str, Any] = result({}, "passed on to the model's constructor")


class DataSection(Section):
    dataset: str = result(..., "digits, an image folder, parquet/arrow files or a folder of them, or a Hub name")
    config: str | None = result(None, "configuration of a Hub dataset")
    revision: str | None = result(None, "git revision of a Hub dataset")
    train_split: str = result("auto", "split to train on; auto: train, or the only split")
    eval_split: str = result("auto", "auto: validation, val, valid or dev; never test; else a held-out part of train")
    eval_fraction: float = result(0.1, "held-out part of train if there is no validation split", gt=0.0, lt=1.0)
    test_split: str | None = result(None, "evaluated once, at the end")
    image_column: str = result("auto", "auto: the image column found by type and name")
    label_column: str = result("auto", "auto: the label column found by type and name")
    multi_label: bool | None = result(
        None, "whether an image may have several classes; null: if labels are lists, and not all with exactly one class"
    )
    image_size: int = result(224, "height and width in pixels; the model's input too", ge=8, le=4096)
    train_size: int | None = result(
        None, "height and width in training, in pixels; null: image_size, which evaluations always have", ge=8, le=4096
    )
    views: int = result(
        1, "training: augmentations of each image, as images (B, V, 3, H, W); above 1 for a step_loss of your own", ge=1
    )
    mean: Auto | list[float] = result("auto", "per channel, of 0-1 pixels; auto: the pretrained configuration's")
    std: Auto | list[float] = result("auto", "per channel, of 0-1 pixels; auto: the pretrained configuration's")
    interpolation: Auto | Literal["bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"] = result(
        "auto", "resize filter (Pillow's); auto: the pretrained configuration's"
    )
    crop_pct: Auto | Annotated[float, Field(gt=0.0, le=1.0)] = result(
        "auto",
        "evaluation: image_size / short side before the centre crop; auto: the pretrained configuration's",
    )
    short_side: int | None = result(
        None, "training: larger images are resized to this short side before any crop; null: not resized", ge=8
    )
    stored_quality: int | None = result(
        None,
        "training: images are stored as JPEGs (4:2:0) of this quality after short_side; null: not stored as JPEGs",
        ge=1,
        le=100,
    )
    reduced_decode: bool = result(
        False, "decode JPEGs at least twice as large as short_side at 1/2, 1/4 or 1/8 of their size: faster"
    )
    cache: Literal["auto", "none", "memory", "disk", "device"] = speed(
        "auto", "where decoded pixels are kept after the first epoch; auto: by data size, free memory and free disk"
    )
    cache_dir: str | None = speed(None, "folder for cache=disk; null: $HF_FASTTRAIN_CACHE or ~/.cache/hf_fasttrain")
    cache_gb: Auto | Annotated[float, Field(gt=0.0)] = speed(
        "auto", "most GB of pixels kept; auto: half of the free memory, or half of the free disk"
    )
    max_bad_fraction: float = output(
        0.01, "bad images are replaced by others; above this share of a split the run stops", ge=0.0, le=1.0
    )
    decoder: Literal["simplejpeg", "pillow"] = speed(
        "simplejpeg",
        "JPEG decoder; both give the same pixels, simplejpeg (libjpeg-turbo) in three quarters of the time",
    )
    workers: Auto | Annotated[int, Field(ge=0)] = speed("auto", "loader processes for each training process")
    pin_memory: Auto | bool = speed("auto", "page-locked buffers for copies to a GPU; auto: if there is a GPU")

    @property
    def size_in_training(self) -> int:
        """Height and width of training images, in pixels."""
        return self.train_size or self.image_size


class RandAugment(Section):
    num_ops: int = result(2, "operations for each image", ge=1)
    magnitude: int = result(9, "strength, 0 to 30", ge=0, le=30)


class AugMix(Section):
    severity: int = result(3, "strength of the operations, 1 to 10", ge=1, le=10)
    mixture_width: int = result(3, "chains of operations that are mixed", ge=1)
    chain_depth: int = result(-1, "operations in a chain; -1: 1 to 3 at random", ge=-1)
    alpha: float = result(1.0, "of the Dirichlet and Beta distributions that mix them", gt=0.0)


class ColorJitter(Section):
    brightness: float = result(0.0, "factor from 1 - x to 1 + x", ge=0.0)
    contrast: float = result(0.0, "factor from 1 - x to 1 + x", ge=0.0)
    saturation: float = result(0.0, "factor from 1 - x to 1 + x", ge=0.0)
    hue: float = result(0.0, "hue shift from -x to x, as a share of the colour circle", ge=0.0, le=0.5)


class Progressive(Section):
    start_size: int = result(..., "image size in the first epoch, in pixels", ge=8)
    until: DurationField = result(..., "when the full size is reached, such as '10 epochs'")
    multiple: int = result(32, "sizes in between are multiples of this", ge=1)


class AugmentSection(Section):
    crop: Literal["random_resized", "padded", "center"] = result(
        "random_resized", "padded: pad by crop_padding and cut; center: as in evaluation"
    )
    crop_scale: list[float] = result([0.08, 1.0], "random_resized: share of the image's area, least and most")
    crop_ratio: list[float] = result([0.75, 1.3333333333333333], "random_resized: width / height, least and most")
    crop_padding: int = result(4, "padded: black pixels at each side", ge=0)
    flip: bool | Probability = result(True, "mirror left-right: true: half of the time; or with this probability")
    vflip: Probability = result(0.0, "probability that an image is mirrored top-bottom")
    auto: PolicyField | None = result(None, "a policy of timm (--aa), by timm's parser: rand-m9-mstd0.5-inc1")
    randaugment: RandAugment | None = result(None, "{num_ops: 2, magnitude: 9}")
    trivialaugment: bool = result(False, "one random operation of random strength for each image")
    augmix: AugMix | None = result(None, "chains of operations mixed with the image: {severity: 3}")
    three_augment: bool = result(False, "one of greyscale, solarise and blur for each image (DeiT III)")
    color_jitter: ColorJitter | None = result(None, "{brightness: 0.4, contrast: 0.4, saturation: 0.4, hue: 0.0}")
    repeats: int = result(1, "times that an image appears in a step, each differently augmented", ge=1)
    progressive: Progressive | None = result(None, "image size by epoch: {start_size: 128, until: 10 epochs}")
    mixup: float = result(0.0, "alpha of mixup's Beta distribution; 0: off", ge=0.0)
    cutmix: float = result(0.0, "alpha of cutmix's Beta distribution; 0: off", ge=0.0)
    mixup_prob: Probability = result(1.0, "probability that a step's images are mixed, by mixup or cutmix")
    mixup_switch_prob: Probability = result(0.5, "with both mixup and cutmix: probability of cutmix")
    mixup_mode: Literal["batch", "pair", "elem"] = result(
        "batch", "whether mixup and cutmix are drawn for a whole step, each pair of images or each image"
    )
    mixup_until: DurationField | None = result(
        None, "when mixup and cutmix end (timm's --mixup-off-epoch), such as '80 epochs'; null: never"
    )
    label_smoothing: float = result(0.0, "share of each target spread over all classes", ge=0.0, lt=1.0)
    erase: Probability = result(0.0, "probability that a random box of an image is erased")
    erase_fill: Literal["black", "mean", "noise", "pixel", "color"] = result(
        "black",
        "what erased boxes are filled with; mean: data.mean; noise: uniform; pixel: normal noise of data.mean and "
        "data.std, color: one such colour for a box (timm's --remode pixel and rand)",
    )


class BinaryCrossEntropy(Section):
    target_threshold: Probability | None = result(
        None, "targets above it count as 1, others as 0, after mixup, cutmix and label smoothing; null: as they are"
    )
    sum: bool = result(False, "sum over the classes instead of their mean")


class TrainSection(Section):
    duration: DurationField = result(..., "'90 epochs' or '5000 steps'")
    batch_size: int = result(..., "images per optimizer step, all processes together", ge=1)
    max_images: int | None = result(
        None,
        "most images to train on: the first of a shuffle by the seed that keeps the classes' shares; null: all",
        ge=1,
    )
    drop_last: bool = result(False, "skip the last step of an epoch if it is short")
    sampling: Literal["balanced", "sqrt"] | None = result(
        None,
        "draw images with replacement; balanced: each class equally often, sqrt: as often as the root of its number of "
        "images; null: each image once an epoch",
    )
    class_weights: Literal["balanced"] | list[float] | None = result(
        None,
        "weight of each class in the loss, scaled to mean 1 over the training set; balanced: 1 / frequency",
    )
    bce: BinaryCrossEntropy | None = result(
        None,
        "binary cross-entropy over the classes (timm's --bce-loss), which several labels always have: {sum: false}",
    )


class AccelerateSection(Section):
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] = speed(
        "auto",
        "auto: the launcher's bf16 or fp16, else a stored tuning, else bf16 on a GPU that has it, else fp16 on a GPU; "
        "no on a CPU",
    )
    gradient_accumulation_steps: Auto | Annotated[int, Field(ge=1)] = speed(
        "auto",
        "micro-batches of each process per step; auto: as micro_batch_size says, else 1, on a CPU as memory allows",
    )
    micro_batch_size: Annotated[int, Field(ge=2, multiple_of=2)] | None = speed(
        None, "largest number of images per process and forward; even, since mixup pairs neighbours"
    )
    sync_batch_norm: bool = result(False, "batch-norm statistics over all GPUs")
    channels_last: Auto | bool = speed("auto", "memory layout NHWC; auto: a stored tuning, else true")
    compile: Auto | bool = speed("auto", "torch.compile the model; auto: a stored tuning, else false")
    matmul_precision: Auto | Literal["highest", "high", "medium"] = speed(
        "auto",
        "precision of fp32 matrix products: highest: fp32, high: TF32 where the GPU has it, medium: bf16 where the "
        "CPU has it; auto: a stored tuning, else high",
    )
    conv_precision: Auto | Literal["highest", "high", "medium"] = speed(
        "auto", "precision of fp32 convolutions, as matmul_precision; auto: a stored tuning, else high"
    )
    deterministic: bool = speed(
        False, "bitwise reproducible runs on a GPU: slower, without cudnn.benchmark; on a CPU they always are"
    )
    cpu_threads: Auto | Annotated[int, Field(ge=1)] = speed(
        "auto",
        "threads of each process on a CPU; auto: a stored tuning, else your OMP_NUM_THREADS, else cores / processes",
    )


class OptimizerSection(Section):
    name: str = result("adamw", "any optimizer of timm: adamw, sgd (Nesterov), momentum, lamb, lion, ...")
    lr: float = result(1e-3, "the schedule's highest learning rate", gt=0.0)
    weight_decay: float = result(0.05, "not applied to norms, biases and position embeddings", ge=0.0)
    momentum: float = result(0.9, "momentum of SGD-like optimizers", ge=0.0, lt=1.0)
    clip_norm: float | None = result(None, "largest norm of all gradients together", gt=0.0)
    clip_value: float | None = result(None, "largest absolute value of a gradient's elements", gt=0.0)
    clip_agc: float | None = result(
        None,
        "adaptive clipping (timm's agc): largest norm of a unit's gradient / that of its weights, without the head",
        gt=0.0,
    )
    backbone_lr_scale: float = result(1.0, "learning rate of everything but the head, as a share of lr", gt=0.0)
    layer_decay: float | None = result(None, "learning rate of each layer as a share of the next one's", gt=0.0, le=1.0)
    args: dict[str, Any] = result({}, "passed on to the optimizer's constructor, like betas or eps")


class ScheduleSection(Section):
    name: Literal["cosine", "linear", "polynomial", "onecycle", "exponential", "step", "multistep", "constant"] = (
        result("cosine", "learning rate schedule")
    )
    warmup: WarmupField = result(
        "auto", "rise to lr: 5% of the training, 500 steps, 1 epoch or 0: none; auto: onecycle 30%, else none"
    )
    start_ratio: float | None = result(
        None,
        "first lr of the warmup / lr; null: 1 / its steps, linear and polynomial: 0, as in transformers",
        ge=0.0,
        le=1.0,
    )
    min_lr_ratio: float = result(0.0, "cosine, linear, polynomial: last lr / lr", ge=0.0, lt=1.0)
    gamma: float = result(0.1, "step, exponential: factor per `every`; multistep: at each milestone", gt=0.0, le=1.0)
    every: DurationField = result(Duration(30, "epochs"), "step, exponential: how often lr is multiplied by gamma")
    milestones: list[DurationField] = result([], "multistep: when lr is multiplied by gamma: [30 epochs, 60 epochs]")
    power: float = result(1.0, "polynomial: power of the share of the training that is left", gt=0.0)
    cycles: int = result(1, "cosine: how often lr falls; it starts again in between (warm restarts)", ge=1)
    div: float = result(25.0, "onecycle: lr / first lr", ge=1.0)
    final_div: float = result(1e4, "onecycle: first lr / last lr", ge=1.0)


class EmaSection(Section):
    decay: float = result(0.9999, "share of the old average kept in each step", ge=0.0, lt=1.0)
    warmup: bool = result(True, "at step t no more than (1 + t) / (10 + t)")


class EarlyStoppingSection(Section):
    metric: str = result("accuracy", "watched metric of the evaluation")
    mode: Literal["auto", "max", "min"] = result(
        "auto", "whether higher or lower is better; auto: by the metric's name"
    )
    patience: DurationField = result(Duration(5, "epochs"), "training without a better value before it stops")
    min_delta: float = result(0.0, "by how much a value must exceed the best one to count as better", ge=0.0)


class EvaluateSection(Section):
    every: DurationField = result(Duration(1, "epochs"), "how often; always at the end")
    start: DurationField = result(Duration(0, "epochs"), "no evaluation before it, such as '10 epochs'")
    max_images: int | None = result(
        None, "most images of the evaluation split, chosen as train.max_images are; null: all", ge=1
    )
    metrics: Auto | list[str] = output(
        "auto", "loss, accuracy, top5_accuracy, f1_macro; any evaluate metric by Hub name or local path"
    )
    batch_size: Auto | Annotated[int, Field(ge=1)] = speed("auto", "images per process and forward")


class BestSection(Section):
    metric: str = output("accuracy", "watched metric of the evaluation")
    mode: Literal["auto", "max", "min"] = output(
        "auto", "whether higher or lower is better; auto: by the metric's name"
    )


class CheckpointSection(Section):
    every: IntervalField = output(Duration(1, "epochs"), "how often, also in minutes; always at the end and on signals")
    keep: int = output(2, "newest checkpoints kept, beside the best", ge=1)
    best: BestSection = output(BestSection(), "{metric: accuracy, mode: auto}")
    final: Literal["auto", "best", "last"] = output(
        "auto", "weights saved in model/ at the end; auto: best with early_stopping, else last"
    )


class LogSection(Section):
    every: int = output(10, "steps between two lines of metrics.jsonl", ge=1)
    report: bool = output(True, "write report.html, its pictures and predictions.safetensors at the end")
    trackers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = output(
        [], "experiment trackers, used through Accelerate"
    )
    project: str = output("hf_fasttrain", "project name for the trackers")


class HubSection(Section):
    repo: str = output(..., "OWNER/NAME on the Hub, created if it does not exist")
    every: Literal["best", "end"] | DurationField = output(
        "end", "best: each best evaluation's weights; end: the finished run; or how often, such as '5 epochs'"
    )
    private: bool | None = output(None, "whether a new repository is private; null: as its owner's settings say")
    license: str | None = output(
        None, "licence of the model, for its card: a name that the Hub knows, such as apache-2.0"
    )
    wait: ClockField = output(
        Duration(10, "minutes"), "how long to wait at the end for an upload, before it is stopped"
    )


class Recipe(Section):
    """A complete recipe. `load_recipe` reads it from a file; `source` records where each value came from."""

    seed: int = result(0, "seed of order, augmentation, mixing, initial weights and dropout", ge=0, lt=2**63)
    output_dir: str | None = output(None, "run folder; null: runs/<recipe name>")
    model: ModelSection
    data: DataSection
    augment: AugmentSection = AugmentSection()
    train: TrainSection
    accelerate: AccelerateSection = AccelerateSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    ema: EmaSection | None = result(None, "exponential moving average of the weights; evaluated and saved instead")
    early_stopping: EarlyStoppingSection | None = result(None, "{metric: accuracy, patience: 5 epochs}")
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    hub: HubSection | None = output(None, "push while training: {repo: me/flowers, every: best}")

    _source: RecipeSource | None = PrivateAttr(default=None)

    @property
    def source(self) -> RecipeSource:
        """The recipe's source; an empty one for a recipe built in Python."""
        return self._source or RecipeSource(name="recipe", text="", origins={})


@dataclass(frozen=True)
class RecipeSource:
    """The source of a recipe: name, text, and where each value came from."""

    name: str  # the file's stem
    text: str  # of the file as the user wrote it
    origins: dict[str, str]  # dotted key -> "recipe" | "override"; absent: default
    overrides: tuple[str, ...] = ()
