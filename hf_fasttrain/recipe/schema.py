"""The recipe's schema: every key with type, default, limits and description, as frozen pydantic models.

Every field has a tag: *result* (changes what is learned), *speed* (only speed and memory) or *output* (only what is
measured, written and shown). `hf-fasttrain explain` and editors show the description and the examples. Files and
overrides are read in load.py; the sections `data`, `augment`, `optimizer`, `schedule`, `ema`, `distill` and `lora`
are in schema_data.py, schema_augment.py, schema_optimizer.py and schema_transfer.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr

from hf_fasttrain.recipe.fields import (
    Auto,
    ClockField,
    DurationField,
    IntervalField,
    NeverField,
    OneOrMore,
    OnOrOff,
    OrOff,
    Section,
    TrainField,
    Weight,
    output,
    result,
    speed,
)
from hf_fasttrain.recipe.schema_augment import AugmentSection
from hf_fasttrain.recipe.schema_data import DataSection
from hf_fasttrain.recipe.schema_loss import AsymmetricSection, BinaryCrossEntropy, FocalSection
from hf_fasttrain.recipe.schema_optimizer import EmaSection, OptimizerSection, ScheduleSection
from hf_fasttrain.recipe.schema_probe import ProbeSection
from hf_fasttrain.recipe.schema_transfer import DistillSection, LoraSection
from hf_fasttrain.utils.duration import Duration
from hf_fasttrain.utils.train_phases import TrainPhases


class ModelSection(Section):
    name: str = result(
        ...,
        "a timm name, timm/... on the Hub, a local folder, or transformers:<Hub name or folder>",
        examples=["resnet50", "efficientnet_b0", "vit_base_patch16_224", "transformers:google/vit-base-patch16-224"],
    )
    pretrained: bool | str = result(
        False,
        "true: the model's published weights from the Hub; or a local folder or .safetensors file, or hf://OWNER/NAME",
        examples=[True, "weights.safetensors", "runs/earlier", "hf://OWNER/NAME"],
    )
    head: Literal["auto", "keep", "new"] = result(
        "auto",
        "the head of pretrained weights; auto: kept if it has the same class names, else new; new: initialised to zero",
    )
    drop_path: float = result(0.0, "stochastic depth rate", ge=0.0, lt=1.0, examples=[0.1])
    small_image_stem: bool = result(False, "ResNets: 3x3 stem with stride 1, no max-pool (for 32 px images)")
    train: TrainField = result(
        "all",
        "what is trained; norm: norm layers and the head, last N blocks: these and the head; or phases: "
        "{head: 2 epochs, then: all}",
        validate_default=True,
        examples=["head", "norm", "last 3 blocks", {"head": "2 epochs", "then": "all"}],
    )
    freeze_backbone: bool = result(False, "older name of train: head")
    keep_features: Auto | bool = speed(
        "auto",
        "while only the head is trained, compute its inputs once per image and keep them; auto: if they are the same "
        "in each of several epochs (no augmentation, no dropout before them) and memory suffices",
    )
    batch_norm: Literal["train", "frozen"] = result(
        "train",
        "train: statistics of each batch; frozen: the pretrained running statistics are used and kept; weights are "
        "trained",
    )
    gradient_checkpointing: bool = speed(False, "compute activations twice to save memory")
    trust_remote_code: bool = result(False, "run the Python code that comes with a transformers model on the Hub")
    args: dict[str, Any] = result({}, "passed on to the model's constructor", examples=[{"drop_rate": 0.2}])

    @property
    def trained(self) -> TrainPhases:
        """The phases of the training: those of `train`, or of its older name."""
        return TrainPhases.parse("head") if self.freeze_backbone else self.train


SamplingPower = dict[Literal["power"], Annotated[float, Field(ge=0.0, le=1.0)]]


class TrainSection(Section):
    duration: DurationField = result(..., "length of the training: '90 epochs' or '5000 steps'")
    batch_size: int = result(..., "images per optimizer step, all processes together", ge=1, examples=[256])
    max_images: int | None = result(
        None,
        "maximum number of training images, a stratified subset that seed determines; null: all",
        ge=1,
        examples=[10000],
    )
    drop_last: bool = result(False, "skip the last step of an epoch if it is short")
    probe_first: bool = result(
        False, "before the first step, fit the head to features of all training images, computed once: see probe"
    )
    sampling: Literal["uniform", "balanced", "sqrt"] | SamplingPower | None = result(
        None,
        "draw images with replacement; balanced: all classes equally often, sqrt: each class in proportion to the "
        "square root of its number of images, {power: 0.3}: to this power of it; null or uniform: each image once per "
        "epoch",
        examples=["balanced", {"power": 0.3}],
    )
    class_weights: Literal["balanced", "effective_number"] | list[Weight] | dict[str, Weight] | None = result(
        None,
        "weight of each class in the loss, or of some by name (others: 1), scaled to mean 1 over the training set; "
        "balanced: 1 / frequency; effective_number: 0.001 / (1 - 0.999^n) for n images (arXiv 1901.05555)",
        examples=["balanced", [1.0, 2.5], {"cat": 2.5}],
    )
    loss: Literal["auto", "cross_entropy", "bce", "focal", "asymmetric"] = result(
        "auto",
        "auto: bce, focal or asymmetric if that section is set, else cross_entropy, with several labels per image bce",
    )
    bce: Annotated[BinaryCrossEntropy | None, OnOrOff] = result(
        None,
        "binary cross-entropy over the classes (timm's --bce-loss), by default with several labels per image: "
        "{sum: false}",
    )
    focal: Annotated[FocalSection | None, OnOrOff] = result(
        None, "focal loss (arXiv 1708.02002), which counts well classified images less: {gamma: 2}"
    )
    asymmetric: Annotated[AsymmetricSection | None, OnOrOff] = result(
        None, "asymmetric loss (arXiv 2009.14119), for many classes of which an image has few: {gamma_negative: 4}"
    )

    @property
    def loss_sections(self) -> list[str]:
        """The names of the sections of losses that are set."""
        return [name for name in ("bce", "focal", "asymmetric") if getattr(self, name) is not None]


class AccelerateSection(Section):
    mixed_precision: Literal["no", "fp16", "bf16", "auto"] = speed(
        "auto",
        "no: fp32; auto: the launcher's bf16 or fp16, else a stored tuning, else bf16 on a GPU that has it, else fp16 "
        "on a GPU; no on a CPU",
    )
    gradient_accumulation_steps: Auto | Annotated[int, Field(ge=1)] = speed(
        "auto",
        "micro-batches per process and step; auto: by micro_batch_size if set, else 1, on a CPU as memory allows",
        examples=[4],
    )
    micro_batch_size: Annotated[int, Field(ge=2, multiple_of=2)] | None = speed(
        None, "maximum number of images per process and forward pass; even, since mixup pairs neighbours", examples=[64]
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
    cpu_threads: Auto | Annotated[int, Field(ge=1, le=4096)] = speed(
        "auto",
        "threads of each process on a CPU; auto: a stored tuning, else your OMP_NUM_THREADS, else cores / processes",
        examples=[2],
    )


class EarlyStoppingSection(Section):
    metric: str = result("accuracy", "evaluation metric to watch", examples=["f1_macro"])
    mode: Literal["auto", "max", "min"] = result(
        "auto", "whether higher or lower is better; auto: by the metric's name"
    )
    patience: DurationField = result(Duration(5, "epochs"), "how long to train without a better value before stopping")
    min_delta: float = result(
        0.0, "by how much a value must exceed the best one to count as better", ge=0.0, examples=[0.001]
    )


class EvaluateSection(Section):
    every: NeverField = result(
        Duration(1, "epochs"),
        "how often; always at the end; never: for a custom step_loss whose model has no logits",
    )
    start: DurationField = result(Duration(0, "epochs"), "no evaluation before this point, such as '10 epochs'")
    max_images: int | None = result(
        None, "maximum number of evaluation images, chosen like train.max_images; null: all", ge=1, examples=[5000]
    )
    metrics: Annotated[Auto | list[str], OneOrMore] = output(
        "auto",
        "auto: loss, accuracy, f1_macro, and top5_accuracy with more than 5 classes. Others: balanced_accuracy, "
        "precision_macro, recall_macro, f1_micro, mcc, cohen_kappa, auroc, map, ece, brier; recall/CLASS, "
        "precision/CLASS and f1/CLASS; any evaluate metric by Hub name or local path",
        examples=[["accuracy", "f1_macro"]],
    )
    thresholds: Literal["fixed", "tuned"] = output(
        "fixed",
        "with several labels per image, the probability from which a class is predicted; fixed: 0.5; tuned: beside "
        "that, each class's best for its F1 on the evaluation split, measured as f1_macro_tuned and f1_micro_tuned and "
        "kept with the weights, for predict and exports",
    )
    batch_size: Auto | Annotated[int, Field(ge=1)] = speed("auto", "images per process and forward", examples=[128])


class BestSection(Section):
    metric: str = output("accuracy", "evaluation metric to watch", examples=["f1_macro"])
    mode: Literal["auto", "max", "min"] = output(
        "auto", "whether higher or lower is better; auto: by the metric's name"
    )


class CheckpointSection(Section):
    every: IntervalField = output(Duration(1, "epochs"), "how often, also in minutes; always at the end and on signals")
    keep: int = output(2, "newest checkpoints to keep, in addition to the best", ge=1, examples=[5])
    best: BestSection = output(BestSection(), "{metric: accuracy, mode: auto}")
    final: Literal["auto", "best", "last", "average"] = output(
        "auto",
        "weights saved in model/ at the end; auto: best with early_stopping, else last; average: the mean of the last "
        "evaluated ones",
    )
    average: int = output(
        5, "how many evaluated states final=average averages, each kept on disk", ge=2, le=100, examples=[3]
    )


class LogSection(Section):
    every: int = output(10, "steps between two lines of metrics.jsonl", ge=1, examples=[50])
    report: bool = output(True, "write report.html, its pictures and predictions.safetensors at the end")
    trackers: Annotated[list[Literal["tensorboard", "wandb", "trackio", "mlflow"]], OneOrMore] = output(
        [], "experiment trackers, used through Accelerate", examples=[["tensorboard"]]
    )
    project: str = output("hf_fasttrain", "project name for the trackers", examples=["flowers"])


class HubSection(Section):
    repo: str = output(..., "OWNER/NAME on the Hub, created if it does not exist", examples=["me/flowers"])
    every: Literal["best", "end"] | DurationField = output(
        "end", "best: each best evaluation's weights; end: the finished run; or how often, such as '5 epochs'"
    )
    private: bool | None = output(
        None, "whether a new repository is private; null: the owner's default", examples=[True]
    )
    license: str | None = output(
        None,
        "licence of the model, for its card: a name that the Hub knows, such as apache-2.0",
        examples=["apache-2.0"],
    )
    wait: ClockField = output(
        Duration(10, "minutes"), "how long to wait at the end for an upload before it is cancelled"
    )


class Recipe(Section):
    """A complete recipe. `load_recipe` reads it from a file; `source` records where each value came from."""

    seed: int = result(
        0, "seed of order, augmentation, mixing, initial weights and dropout", ge=0, lt=2**63, examples=[1]
    )
    output_dir: str | None = output(None, "run folder; null: runs/<recipe name>", examples=["runs/first"])
    model: ModelSection
    data: DataSection
    augment: AugmentSection = AugmentSection()
    train: TrainSection
    probe: ProbeSection = ProbeSection()
    accelerate: AccelerateSection = AccelerateSection()
    optimizer: OptimizerSection = OptimizerSection()
    schedule: ScheduleSection = ScheduleSection()
    ema: Annotated[EmaSection | None, OnOrOff] = result(
        None, "exponential moving average of the weights; evaluated and saved instead"
    )
    early_stopping: Annotated[EarlyStoppingSection | None, OnOrOff] = result(
        None, "{metric: accuracy, patience: 5 epochs}"
    )
    distill: Annotated[DistillSection | None, OrOff] = result(
        None, "learn from a teacher's logits too: {teacher: runs/large, weight: 0.5, temperature: 2.0}"
    )
    lora: Annotated[LoraSection | None, OnOrOff] = result(
        None, "train the head, and small matrices beside frozen layers (LoRA): {rank: 8, alpha: 16}"
    )
    evaluate: EvaluateSection = EvaluateSection()
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    hub: Annotated[HubSection | None, OrOff] = output(None, "push while training: {repo: me/flowers, every: best}")

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
    argument: str = ""  # what `load_recipe` found it by: a path, a shipped recipe's name, hf://OWNER/NAME
