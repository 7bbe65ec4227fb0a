"""Published weights of timm that are on this machine: what loads with HF_HUB_OFFLINE=1."""

from __future__ import annotations

from pathlib import Path

from hf_fasttrain.models.model import timm_name
from hf_fasttrain.utils.files import expand_user

WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # as timm looks for them


def has_published_weights(name: str) -> bool:
    """Return whether published weights of a model exist; of a timm model only, others are taken to have some."""
    import timm

    if name.startswith("transformers:") or timm_name(name).startswith(("hf-hub:", "local-dir:")):
        return True
    config = timm.get_pretrained_cfg(name)
    return config is not None and bool(config.hf_hub_id or config.url or config.file)


def is_on_this_machine(name: str) -> bool:
    """Return whether `model.pretrained: true` loads a model's weights without a network."""
    if name.startswith("transformers:"):
        name = name.removeprefix("transformers:")
        return expand_user(name).is_dir() or is_in_cache(name)
    known = timm_name(name)
    if known.startswith("local-dir:"):
        return True
    if known.startswith("hf-hub:"):
        return is_in_cache(known.removeprefix("hf-hub:"))
    import timm

    config = timm.get_pretrained_cfg(known)
    if config is None or not config.hf_hub_id:
        return False
    return is_in_cache(config.hf_hub_id, config.hf_hub_filename)


def is_in_cache(repo: str, file: str | None = None) -> bool:
    """Return whether the local cache of the Hub has the weights of a repository, NAME or NAME@REVISION."""
    from huggingface_hub import constants, try_to_load_from_cache

    repo_id, _, revision = repo.partition("@")
    files = [file] if file else WEIGHT_FILES
    cache = constants.HF_HUB_CACHE
    found = (try_to_load_from_cache(repo_id, name, cache_dir=cache, revision=revision or None) for name in files)
    return any(isinstance(path, str) for path in found)


def cached_timm_models() -> list[str]:
    """Return the names of timm models whose weights are in the local cache of the Hub, sorted.

    The name has its tag unless it is the default one: resnet50, resnet50.tv_in1k.
    """
    import timm
    from huggingface_hub import constants

    prefix = "models--timm--"
    folders = sorted(path.name for path in Path(constants.HF_HUB_CACHE).glob(f"{prefix}*"))
    names = []
    for full_name in (folder.removeprefix(prefix) for folder in folders):
        name = full_name.partition(".")[0]
        if timm.is_model(name) and is_in_cache(f"timm/{full_name}"):
            default = timm.get_pretrained_cfg(name)
            is_default = default is not None and default.hf_hub_id == f"timm/{full_name}"
            names.append(name if is_default else full_name)
    return names
