"""What an ablation compares: a plain baseline, and techniques that are said to make training fast."""

from __future__ import annotations

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from hf_fasttrain.from_recipe.accelerator import uses_gpu
from hf_fasttrain.recipe.load import plain
from hf_fasttrain.study.bench import Arm
from hf_fasttrain.study.messages import Ready
from hf_fasttrain.utils.errors import RunError, nearest


class Hardware(NamedTuple):
    """What of the machine decides which techniques make sense."""

    gpu: bool
    bf16: bool  # autocast to it is possible
    compiler: bool  # torch.compile finds what it needs


def hardware() -> Hardware:
    """Return what of this machine decides which techniques make sense."""
    gpu = uses_gpu()
    compiler = any(shutil.which(name) for name in ("c++", "g++", "clang++"))
    return Hardware(gpu, not gpu or torch.cuda.is_bf16_supported(including_emulation=False), compiler)


@dataclass(frozen=True)
class Technique:
    """One of the things that are switched on and off."""

    name: str
    label: str
    on: dict[str, Any]  # dotted key -> value; the baseline has `off`
    off: dict[str, Any]
    not_applicable: str = ""
    in_everything: bool = True  # not so for a second form of something that is in it already
    note: str = ""


class Planned(NamedTuple):
    """An arm of an ablation and its place in the table."""

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


def techniques(asked: Ready, hardware: Hardware) -> list[Technique]:
    """Return the techniques for a recipe, of which `asked` says what its settings became."""
    settings = asked.settings
    steps = int(settings["accelerate.gradient_accumulation_steps"])
    micro, pieces = asked.micro_batch_size, max(2, steps)
    whole = {
        "train.batch_size": micro,
        "accelerate.gradient_accumulation_steps": 1,
        "accelerate.micro_batch_size": None,
    }
    in_pieces = {"accelerate.gradient_accumulation_steps": "auto"}
    half = 2 * max(1, micro // 4)
    workers = max(1, int(settings["data.workers"]))
    kept = settings["data.cache"] if settings["data.cache"] in ("disk", "device") else "memory"
    math = "high" if hardware.gpu else "medium"
    fp32 = {"accelerate.matmul_precision": "highest", "accelerate.conv_precision": "highest"}
    return [
        Technique(
            "ga_larger_step",
            f"GA: steps of {pieces} x {micro}",
            {"train.batch_size": pieces * micro, **in_pieces, "accelerate.micro_batch_size": micro},
            whole,
            "" if asked.num_images >= pieces * micro else f"there are only {asked.num_images:,} training images",
            note="the same micro-batch with a larger step, which changes what is learnt",
        ),
        Technique(
            "ga_pieces",
            f"GA: steps of {micro} in micro-batches of {half}",
            {**in_pieces, "accelerate.micro_batch_size": half},
            whole,
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
            {"data.decoder": "simplejpeg" if settings["data.reduced_decode"] else "pillow"},
            "" if asked.is_jpeg and not settings["data.reduced_decode"] else _no_decoder(asked),
        ),
        Technique(
            "cache",
            f"cache: {kept}",
            {"data.cache": kept},
            {"data.cache": "none"},
            "" if asked.steps > asked.steps_per_epoch else "each image is read once",
        ),
    ]


def _no_decoder(asked: Ready) -> str:
    return "data.reduced_decode has one decoder only" if asked.is_jpeg else "no image of a sample is a JPEG"


def chosen(all_of_them: Sequence[Technique], only: Iterable[str], without: Iterable[str]) -> list[Technique]:
    """Return the techniques that were asked for; RunError for a name that is none."""
    only, without = list(only), list(without)
    for name in [*only, *without]:
        if name not in NAMES:
            raise RunError(f"unknown technique '{name}'; available: {', '.join(NAMES)}.{nearest(name, NAMES)}")
    found = [t for t in all_of_them if (not only or t.name in only) and t.name not in without]
    if not found:
        raise RunError("no technique is left to compare; name fewer in --without")
    return found


def planned(all_of_them: Sequence[Technique]) -> list[Planned]:
    """Return the arms: baseline, baseline again, each technique alone, all of them, all but each."""
    baseline: dict[str, Any] = {}
    for technique in all_of_them:
        baseline |= technique.off
    able = [technique for technique in all_of_them if not technique.not_applicable]
    together = [technique for technique in able if technique.in_everything]
    arms = [
        Planned(Arm("baseline", settings(baseline)), "baseline", None),
        Planned(Arm("baseline, again", settings(baseline)), "again", None),
    ]
    for technique in all_of_them:
        values = settings({**baseline, **technique.on})
        arm = Arm(f"+ {technique.label}", values, technique.not_applicable)
        arms.append(Planned(arm, "alone", technique))
    everything = dict(baseline)
    for technique in together:
        everything |= technique.on
    if len(together) > 1:
        arms.append(Planned(Arm("everything", settings(everything)), "everything", None))
        for technique in together:
            removed = settings({**everything, **technique.off})
            arms.append(Planned(Arm(f"everything - {technique.label}", removed), "removed", technique))
    return arms


def settings(values: dict[str, Any]) -> tuple[str, ...]:
    """Return overrides for dotted keys."""
    return tuple(f"{key}={plain(value)}" for key, value in values.items())
