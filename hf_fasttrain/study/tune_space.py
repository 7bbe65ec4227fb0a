"""The search space of `tune`: values of machine keys, block by block, each around the best settings so far."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from hf_fasttrain.from_recipe.tunings import TUNED_KEYS
from hf_fasttrain.study.messages import Ready
from hf_fasttrain.study.techniques import Hardware, settings

Config = dict[str, Any]  # key -> value, with all TUNED_KEYS
MIN_MICRO_BATCH = 4
MATH_KEYS = ("accelerate.mixed_precision", "accelerate.matmul_precision", "accelerate.conv_precision")


def first_config(ready: Ready) -> Config:
    """Return the settings of the recipe, with `auto` resolved by the fixed rules."""
    config = {key: ready.settings.get(key) for key in TUNED_KEYS}
    unsplit = int(ready.settings["accelerate.gradient_accumulation_steps"]) == 1
    config["accelerate.micro_batch_size"] = None if unsplit else ready.micro_batch_size
    return config


def overrides_of(config: Config) -> tuple[str, ...]:
    """Return a config as overrides; gradient accumulation follows from the micro-batch."""
    unsplit = config["accelerate.micro_batch_size"] is None  # only `auto` may split a step
    return settings({"accelerate.gradient_accumulation_steps": 1 if unsplit else "auto", **config})


def difference(config: Config, base: Config) -> str:
    """Return the differences of a config from another, as text."""
    changed = {key: value for key, value in config.items() if value != base[key]}
    return " ".join(settings({key.rpartition(".")[2]: value for key, value in changed.items()})) or "as it is"


def math_of(config: Config) -> tuple[Any, ...]:
    """Return the settings that determine rounding."""
    return tuple(config[key] for key in MATH_KEYS)


def is_plain(config: Config) -> bool:
    """Return whether products are as exact as fp32's usual ones (TF32's on a GPU): no guard is needed."""
    return config[MATH_KEYS[0]] == "no" and all(config[key] != "medium" for key in MATH_KEYS[1:])


def precisions(config: Config, hardware: Hardware) -> list[Config]:
    """Return fp32 and the precisions that are faster on some machines."""
    default = {"accelerate.matmul_precision": "high", "accelerate.conv_precision": "high"}
    options = [{"accelerate.mixed_precision": "no", **default}]
    if hardware.bf16:
        options.append({"accelerate.mixed_precision": "bf16", **default})
    if hardware.gpu:
        options.append({"accelerate.mixed_precision": "fp16", **default})
    else:  # oneDNN's, in place of autocast
        rounded = dict.fromkeys(default, "medium")
        options.append({"accelerate.mixed_precision": "no", **rounded})
    return [{**config, **option} for option in options]


def precision_name(config: Config, gpu: bool) -> str:
    """Return the difference of a config's precision from fp32 with default settings, as text."""
    plain = precisions(config, Hardware(gpu, bf16=False, compiler=False))[0]
    return difference({**plain, **{key: config[key] for key in MATH_KEYS}}, plain)


def layouts(config: Config) -> list[Config]:
    """Return the other memory layout."""
    return [{**config, "accelerate.channels_last": not config["accelerate.channels_last"]}]


def micro_batches(config: Config, ready: Ready) -> list[Config]:
    """Return smaller micro-batches: half, a quarter, an eighth of the current one, and the whole step if it fits."""
    current = config["accelerate.micro_batch_size"] or ready.micro_batch_size
    sizes: list[int | None] = [2 * (current // share // 2) for share in (2, 4, 8)]
    sizes = [size for size in sizes if size and size >= MIN_MICRO_BATCH]
    if config["accelerate.micro_batch_size"] is not None and whole_fits(ready):
        sizes.insert(0, None)
    return [{**config, "accelerate.micro_batch_size": size} for size in sizes]


def whole_fits(ready: Ready) -> bool:
    """Return whether an unsplit step is worth a try: on a CPU only if it fits into memory."""
    largest = ready.settings.get("largest_micro_batch")
    return largest is None or int(ready.settings["train.batch_size"]) <= int(largest)


def loaders(config: Config, hardware: Hardware, cores: int) -> list[Config]:
    """Return other numbers of loader processes, and on a CPU of threads for training."""
    current = int(config["data.workers"])
    if hardware.gpu:
        numbers = sorted({max(1, current // 2), current, min(cores, 2 * current)} - {current})
        return [{**config, "data.workers": number} for number in numbers]
    threads = config["accelerate.cpu_threads"]
    pairs: list[tuple[int, int | str]] = [(0, "auto"), (1, "auto"), (min(2, cores), "auto")]
    if cores > 1:
        pairs += [(1, cores - 1), (min(2, cores), cores - 1)]
        pairs += [(0, 1), (min(2, cores), 1)]  # on a busy machine one thread waits for nobody
    return [
        {**config, "data.workers": workers, "accelerate.cpu_threads": number}
        for workers, number in dict.fromkeys(pairs)
        if (workers, number) != (current, threads)
    ]


def caches(config: Config, ready: Ready) -> list[Config]:
    """Return other caches for decoded pixels; none for a single pass over the data."""
    if ready.steps <= ready.steps_per_epoch:
        return []
    return [{**config, "data.cache": mode} for mode in ("none", "memory") if mode != config["data.cache"]]


def pinning(config: Config, hardware: Hardware) -> list[Config]:
    """Return the other kind of host memory, if there is a GPU."""
    return [{**config, "data.pin_memory": not config["data.pin_memory"]}] if hardware.gpu else []


def compiled(config: Config, runners_up: Iterator[Config], hardware: Hardware) -> list[Config]:
    """Return the best settings compiled, then those of the other precisions."""
    if not hardware.compiler or config["accelerate.compile"]:
        return []
    configs = [{**config, "accelerate.compile": True}]
    for other in runners_up:
        math = {key: other[key] for key in MATH_KEYS}
        if all(math_of({**config, **math}) != math_of(one) for one in configs):
            configs.append({**config, **math, "accelerate.compile": True})
    return configs
