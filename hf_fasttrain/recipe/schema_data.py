"""The recipe's section `data`: where images and labels are, and how images are read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from hf_fasttrain.recipe.fields import Auto, OneOrMore, Section, output, result, speed


class DataSection(Section):
    dataset: str = result(
        ...,
        "digits, an image folder, a table of paths and labels, parquet/arrow files or a folder of them, or a Hub name",
        examples=["path/to/photos", "path/to/labels.csv", "digits", "path/to/files.parquet", "uoft-cs/cifar10"],
    )
    config: str | None = result(None, "configuration of a Hub dataset", examples=["default"])
    revision: str | None = result(None, "git revision of a Hub dataset", examples=["main"])
    train_split: str = result("auto", "split to train on; auto: train, or the only split", examples=["train"])
    eval_split: str = result(
        "auto",
        "auto: validation, val, valid or dev; never test; else a held-out part of train",
        examples=["validation"],
    )
    eval_fraction: float = result(
        0.1,
        "held-out part of train if there is no validation split; 0: none, if evaluate.every is never",
        ge=0.0,
        lt=1.0,
        examples=[0.2],
    )
    folds: int | None = result(
        None,
        "the training images are divided into so many parts, with the classes' shares and whole groups; each is the "
        "evaluation split of one fold (hf-fasttrain crossval); null: eval_fraction is held out",
        ge=2,
        le=1000,
        examples=[5],
    )
    fold: int | None = result(
        None, "the part that is the evaluation split, from 0 to folds - 1; crossval sets it", ge=0, examples=[0]
    )
    test_split: str | None = result(None, "evaluated once, at the end", examples=["test"])
    image_column: str = result("auto", "auto: the image column found by type and name", examples=["image"])
    label_column: str | list[str] = result(
        "auto",
        "auto: the label column found by type and name; a list of columns of a table: each is a class, with 0 or 1 for "
        "every image",
        examples=["label", ["cat", "dog", "bird"]],
    )
    label_separator: str | None = result(
        None,
        "tables: what separates several labels in one cell; null: a cell is one label",
        min_length=1,
        max_length=10,
        examples=["|", ","],
    )
    image_root: str | None = result(
        None,
        "tables: folder of the images' relative paths, itself relative to the table's; null: the table's own",
        examples=["../photos"],
    )
    split_column: str | None = result(
        "auto",
        "tables: column with each image's split; auto: one called split, subset, fold or the like whose values are "
        "names of splits, such as train and val; null: none",
        examples=["subset"],
    )
    group_column: str | None = result(
        None,
        "column with each image's patient, camera or video: images are held out in whole groups; null: each by itself",
        examples=["patient"],
    )
    multi_label: bool | None = result(
        None,
        "whether an image may have several classes; null: if labels are lists that do not all have exactly one class",
    )
    image_size: int = result(
        224, "height and width of images in pixels, also the model's input size", ge=8, le=4096, examples=[224, 128]
    )
    train_size: int | None = result(
        None,
        "image size in training, in pixels; null: image_size, which evaluations always use",
        ge=8,
        le=4096,
        examples=[176],
    )
    views: int = result(
        1,
        "training: augmented views per image, as images (B, V, 3, H, W); above 1 needs a custom step_loss",
        ge=1,
        examples=[2],
    )
    mean: Annotated[Auto | list[float], OneOrMore] = result(
        "auto", "per channel, of 0-1 pixels; auto: the pretrained configuration's", examples=[[0.485, 0.456, 0.406]]
    )
    std: Annotated[Auto | list[float], OneOrMore] = result(
        "auto", "per channel, of 0-1 pixels; auto: the pretrained configuration's", examples=[[0.229, 0.224, 0.225]]
    )
    value_range: Auto | list[float] = result(
        "auto",
        "grey images of 16 or 32 bits: the values that become black and white, such as [0, 4095]; auto: by a sample of "
        "the training images",
        examples=[[0, 4095]],
    )
    interpolation: Auto | Literal["bilinear", "bicubic", "nearest", "lanczos", "box", "hamming"] = result(
        "auto", "resize filter (Pillow's); auto: the pretrained configuration's"
    )
    crop_pct: Auto | Annotated[float, Field(gt=0.1, le=1.0)] = result(
        "auto",
        "evaluation: image_size / short side before the centre crop; auto: the pretrained configuration's",
        examples=[0.875],
    )
    short_side: int | None = result(
        None,
        "training: larger images are resized to this short side before any crop; null: not resized",
        ge=8,
        examples=[256],
    )
    stored_quality: int | None = result(
        None,
        "training: images are stored as JPEGs (4:2:0) of this quality after short_side; null: not stored as JPEGs",
        ge=1,
        le=100,
        examples=[90],
    )
    reduced_decode: Auto | bool | Annotated[int, Field(ge=8, strict=True)] = result(
        "auto",
        "training: JPEGs are decoded at 1/2, 1/4 or 1/8 of their size while both sides keep this many pixels (true: "
        "short_side); auto: what the smallest random crop, or twice short_side, needs",
        examples=[512],
    )
    cache: Literal["auto", "none", "memory", "disk", "device"] = speed(
        "auto", "where decoded pixels are cached from the first epoch on; auto: by data size, free memory and free disk"
    )
    cache_dir: str | None = speed(
        None, "folder for cache=disk; null: $HF_FASTTRAIN_CACHE or ~/.cache/hf_fasttrain", examples=["/big/disk/pixels"]
    )
    cache_gb: Auto | Annotated[float, Field(gt=0.0)] = speed(
        "auto",
        "maximum size of the cache in GB; auto: half of the free memory, or half of the free disk",
        examples=[20],
    )
    max_bad_fraction: float = output(
        0.01,
        "bad images are replaced by others; the run stops above this share of a split, of bad or of left out ones",
        ge=0.0,
        le=1.0,
        examples=[0.001],
    )
    inventory: Literal["full", "old"] = result(
        "full",
        "what of a folder is read, see docs/data.md; old: by the rules of older versions, to resume a run of one",
        examples=["old"],
    )
    decoder: Literal["simplejpeg", "pillow"] = speed(
        "simplejpeg",
        "JPEG decoder; both give the same pixels, simplejpeg (libjpeg-turbo) in three quarters of the time",
    )
    workers: Auto | Annotated[int, Field(ge=0, le=1024)] = speed(
        "auto", "loader processes for each training process", examples=[4]
    )
    pin_memory: Auto | bool = speed("auto", "page-locked buffers for copies to a GPU; auto: if there is a GPU")

    @property
    def size_in_training(self) -> int:
        """Height and width of training images, in pixels."""
        return self.train_size or self.image_size
