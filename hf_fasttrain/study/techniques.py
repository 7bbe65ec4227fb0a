"""The arms of an ablation: a plain baseline, and techniques that should make training faster."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hf_fasttrain.recipe.messages import flow_text
from hf_fasttrain.study.bench import Arm
from hf_fasttrain.study.messages import Ready
from hf_fasttrain.train.launcher import uses_gpu
from hf_fasttrain.utils.errors import RunError, nearest


class Hardware(NamedTuple):
    """Properties of the machine that techniques depend on."""

    gpu: bool
    bf16: bool  # whether autocast supports it
    compiler: bool  # whether torch.compile finds a C++ compiler


def hardware() -> Hardware:
    """Return the properties of this machine."""
    gpu = uses_gpu()
    compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    return Hardware(gpu, not gpu or torch.cuda.is_bf16_supported(including_emulation=False), compiler)


@dataclass(frozen=True)
class Technique:
    """A technique that is switched on and off by overrides."""

    name: str
    label: str
    on: dict[str, Any]  # dotted key -> value; the baseline has `off`
    off: dict[str, Any]
    not_applicable: str = ""
    in_everything: bool = True  # False for a second form of a technique that is in it already
    note: str = ""


class PlannedArm(NamedTuple):
    """An arm of an ablation, and its kind of row in the table."""

    arm: Arm
    kind: str  # baseline, again, alone, everything or removed
    technique: Technique | None


NAMES = (
    "ga_larger_step",
    "ga_pieces",
    "amp_bf16",
    "amp_fp16",
    "pinned_memory",
    "fp32_math",
    "channels_last",
    "compile",
    "workers",
    "decoder",
    "cache",
)
NO_GPU = "no GPU"


def techniques(ready: Ready, hardware: Hardware) -> list[Technique]:
    """Return the techniques for a recipe; `ready` has its resolved settings."""
    settings = ready.settings
    steps = int(settings["accelerate.gradient_accumulation_steps"])
    micro, pieces = ready.micro_batch_size, max(2, steps)
    unsplit = {
        "train.batch_size": micro,
        "accelerate.gradient_accumulation_steps": 1,
        "accelerate.micro_batch_size": None,
    }
    in_pieces = {"accelerate.gradient_accumulation_steps": "auto"}
    half = 2 * max(1, micro // 4)
    workers = max(1, int(settings["data.workers"]))
    cache_mode = settings["data.cache"] if settings["data.cache"] in ("disk", "device") else "memory"
    math = "high" if hardware.gpu else "medium"
    fp32 = {"accelerate.matmul_precision": "highest", "accelerate.conv_precision": "highest"}
    return [
        Technique(
            "ga_larger_step",
            f"GA: steps of {pieces} x {micro}",
            {"train.batch_size": pieces * micro, **in_pieces, "accelerate.micro_batch_size": micro},
            unsplit,
            "" if ready.num_images >= pieces * micro else f"there are only {ready.num_images:,} training images",
            note="the same micro-batch with a larger step, which changes what is learned",
        ),
        Technique(
            "ga_pieces",
            f"GA: steps of {micro} in micro-batches of {half}",
            {**in_pieces, "accelerate.micro_batch_size": half},
            unsplit,
            "" if half < micro else f"steps of {micro} images can't be split",
            in_everything=False,
            note="the same step in smaller micro-batches, which saves memory",
        ),
        Technique(
            "amp_bf16",
            "AMP: bf16",
            {"accelerate.mixed_precision": "bf16"},
            {"accelerate.mixed_precision": "no"},
            "" if hardware.bf16 else "the GPU has no bf16",
        ),
        Technique(
            "amp_fp16",
            "AMP: fp16",
            {"accelerate.mixed_precision": "fp16"},
            {"accelerate.mixed_precision": "no"},
            "" if hardware.gpu else NO_GPU,
            in_everything=not hardware.bf16,
        ),
        Technique(
            "pinned_memory",
            "PM: pinned memory",
            {"data.pin_memory": True},
            {"data.pin_memory": False},
            "" if hardware.gpu else NO_GPU,
        ),
        Technique(
            "fp32_math",
            "fp32 products by TF32" if hardware.gpu else "fp32 products by bf16 (oneDNN)",
            {"accelerate.matmul_precision": math, "accelerate.conv_precision": math},
            fp32,
        ),
        Technique(
            "channels_last", "channels_last", {"accelerate.channels_last": True}, {"accelerate.channels_last": False}
        ),
        Technique(
            "compile",
            "torch.compile",
            {"accelerate.compile": True},
            {"accelerate.compile": False},
            "" if hardware.compiler else "torch.compile finds no C++ compiler here",
        ),
        Technique("workers", f"loader processes: {workers}", {"data.workers": workers}, {"data.workers": 0}),
        Technique(
            "decoder",
            "decoder: libjpeg-turbo",
            {"data.decoder": "simplejpeg"},
            {"data.decoder": "pillow"},
            "" if ready.is_jpeg else "no image of a sample is a JPEG",
        ),
        Technique(
            "cache",
            f"cache: {cache_mode}",
            {"data.cache": cache_mode},
            {"data.cache": "none"},
            "" if ready.steps > ready.steps_per_epoch else "each image is read once",
        ),
    ]


def select_techniques(available: Sequence[Technique], only: Iterable[str], without: Iterable[str]) -> list[Technique]:
    """Return the techniques in `only` (all if empty) and not in `without`; RunError for an unknown name."""
    only, without = list(only), list(without)
    for name in [*only, *without]:
        if name not in NAMES:
            raise RunError(f"unknown technique '{name}'; available: {', '.join(NAMES)}.{nearest(name, NAMES)}")
    selected = [t for t in available if (not only or t.name in only) and t.name not in without]
    if not selected:
        raise RunError("no technique is left to compare; name fewer in --without")
    return selected


def build_arms(available: Sequence[Technique]) -> list[PlannedArm]:
    """Return the arms: baseline, baseline again, each technique alone, all of them, all but each."""
    baseline: dict[str, Any] = {}
    for technique in available:
        baseline |= technique.off
    applicable = [technique for technique in available if not technique.not_applicable]
    combined = [technique for technique in applicable if technique.in_everything]
    arms = [
        PlannedArm(Arm("baseline", settings(baseline)), "baseline", None),
        PlannedArm(Arm("baseline, again", settings(baseline)), "again", None),
    ]
    for technique in available:
        values = settings({**baseline, **technique.on})
        arm = Arm(f"+ {technique.label}", values, technique.not_applicable)
        arms.append(PlannedArm(arm, "alone", technique))
    everything = dict(baseline)
    for technique in combined:
        everything |= technique.on
    if len(combined) > 1:
        arms.append(PlannedArm(Arm("everything", settings(everything)), "everything", None))
        for technique in combined:
            removed = settings({**everything, **technique.off})
            arms.append(PlannedArm(Arm(f"everything - {technique.label}", removed), "removed", technique))
    return arms


def settings(values: dict[str, Any]) -> tuple[str, ...]:
    """Return overrides `key=value` for dotted keys."""
    return tuple(f"{key}={flow_text(value)}" for key, value in values.items())
