"""A model's layers from input to output: the stem or embeddings, each block, and the head."""

from __future__ import annotations

from collections.abc import Sequence

from torch import nn

from hf_fasttrain.models.model import head_names
from hf_fasttrain.models.transformers_model import TransformersClassifier
from hf_fasttrain.models.weights import is_within
from hf_fasttrain.utils.errors import ModelError
from hf_fasttrain.utils.format import format_count
from hf_fasttrain.utils.train_phases import TrainedPart, TrainPhases

LISTS = (nn.ModuleList, nn.Sequential)


def is_norm(module: nn.Module) -> bool:
    """Return whether a module is a normalisation layer, by the name of its class or a base class."""
    return any("norm" in cls.__name__.lower() for cls in type(module).__mro__)


def layer_numbers(model: nn.Module, key: str) -> dict[str, int]:
    """Return parameter name -> number of its layer: 0 for the stem or embeddings, then each block, last the head.

    timm models list their layers. Those of transformers are found by the order of their modules. Raises ModelError for
    another model; `key` is the setting that needs the layers.
    """
    if hasattr(model, "group_matcher"):
        return _timm_layers(model)
    if not isinstance(model, TransformersClassifier):
        raise ModelError(
            f"{key} needs a model of timm or transformers; {type(model).__name__} does not list its layers"
        )
    if isinstance(inner := getattr(model.model, "timm_model", None), nn.Module):
        return {f"model.timm_model.{name}": number for name, number in _timm_layers(inner).items()}
    return _transformers_layers(model)


def _timm_layers(model: nn.Module) -> dict[str, int]:
    from timm.models import group_parameters

    numbers: dict[str, int] = group_parameters(model, model.group_matcher(coarse=False), reverse=True)  # type: ignore[operator]
    return numbers


def _transformers_layers(model: TransformersClassifier) -> dict[str, int]:
    """Return the numbers of layers by the order in which a model registers its modules, which is that of forward.

    What comes before the blocks is layer 0. What comes after a block (a last norm or pooler, the downsampling at the
    end of a stage) counts to that block, as in timm; what a stage has before its first block counts to the first one.
    """
    head, stages = head_names(model), _stages(model)
    if not stages:
        raise ModelError(f"{type(model.model).__name__}: no list of blocks was found in it, so its layers are unknown")
    block_of: dict[int, int] = {}  # by the parameter's id
    first_of: dict[int, int] = {}  # the first block of the parameter's stage
    last = 0
    for stage, blocks in stages:
        first_of |= dict.fromkeys(map(id, stage.parameters()), last + 1)
        for block in blocks:
            last += 1
            block_of |= dict.fromkeys(map(id, block.parameters()), last)
    current, numbers = 0, dict[str, int]()
    for name, parameter in model.named_parameters():
        current = block_of.get(id(parameter), max(current, first_of.get(id(parameter), 0)))
        numbers[name] = last + 1 if is_within(name, head) else current
    return numbers


def _stages(model: TransformersClassifier) -> list[tuple[nn.Module, list[nn.Module]]]:
    """Return the stages of a model with their blocks; in a model without stages each block is one.

    The items of the list with the most parameters are stages if they are or have lists themselves.
    """
    head = head_names(model)
    outermost: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, LISTS) and not is_within(f"{name}.", [*outermost, *head]):
            outermost[name] = module
    if not outermost:
        return []
    stages = [each for each in max(outermost.values(), key=_size).children() if _size(each)]
    return [(stage, _blocks_of(stage)) for stage in stages]


def _blocks_of(stage: nn.Module) -> list[nn.Module]:
    """Return the blocks of a stage: the items of its largest list of modules that are not single layers."""
    found = [stage] if isinstance(stage, LISTS) else [each for each in stage.children() if isinstance(each, LISTS)]
    lists = [[each for each in modules.children() if _size(each)] for modules in found]
    lists = [blocks for blocks in lists if blocks and all(any(True for _ in block.children()) for block in blocks)]
    return max(lists, key=lambda blocks: sum(map(_size, blocks))) if lists else [stage]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def trained_names(model: nn.Module, part: TrainedPart, num_classes: int = 0) -> set[str]:
    """Return the names of a model's parameters that a part of it has; each part but `all` includes the head.

    `num_classes` is used to find the head if the model has no such attribute. Parameters that do not require gradients
    are only in the part `head`. Raises ModelError for a part that the model does not have.
    """
    head, setting = head_names(model, num_classes), f"model.train={part}"
    parameters = dict(model.named_parameters())
    names = {name for name in parameters if is_within(name, head)}
    if part.kind != "all" and not names:
        raise ModelError(f"{setting}: the head of {type(model).__name__} was not found")
    if part.kind == "norm":
        names |= _norm_names(model, setting)
    elif part.kind == "blocks":
        names |= _last_layers(layer_numbers(model, setting), head, part.num_blocks, setting)
    elif part.kind == "all":
        names = set(parameters)
    return {name for name in names if parameters[name].requires_grad or part.kind == "head"}


def _norm_names(model: nn.Module, setting: str) -> set[str]:
    norms = {name: module for name, module in model.named_modules() if is_norm(module)}
    names = {f"{prefix}.{name}" for prefix, norm in norms.items() for name, _ in norm.named_parameters()}
    if not names:
        raise ModelError(f"{setting}: {type(model).__name__} has no norm layers; use head, all or last N blocks")
    return names


def _last_layers(numbers: dict[str, int], head: Sequence[str], num_blocks: int, setting: str) -> set[str]:
    """Return the names of the parameters in the last blocks and after them."""
    output = min((number for name, number in numbers.items() if is_within(name, head)), default=max(numbers.values()))
    blocks = sorted({number for number in numbers.values() if 0 < number < output})
    if num_blocks > len(blocks):
        raise ModelError(
            f"{setting}: the model has {format_count(len(blocks), 'block')}; give at most {len(blocks)}, or all"
        )
    return {name for name, number in numbers.items() if number >= blocks[-num_blocks]}


def names_by_phase(model: nn.Module, phases: TrainPhases, num_classes: int = 0) -> list[set[str]]:
    """Return the names of the parameters that are trained in each phase; see `trained_names`."""
    return [trained_names(model, phase.part, num_classes) for phase in phases.phases]


def freeze_untrained(model: nn.Module, phases: TrainPhases, num_classes: int = 0) -> str | None:
    """Freeze the parameters that are trained in no phase; return how many of how many are trained in which phase.

    Returns None if all are trained in the only phase.
    """
    if phases == TrainPhases.parse("all"):
        return None
    names, sizes = names_by_phase(model, phases, num_classes), {n: p.numel() for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(any(name in each for each in names))
    counts = [sum(sizes[name] for name in each) for each in names]
    texts = [
        f"{phase.part}{f' for {phase.duration}' if phase.duration else ''}, {count:,} parameters"
        for phase, count in zip(phases.phases, counts, strict=True)
    ]
    return f"{', then '.join(texts)} of the model's {sum(sizes.values()):,}"
