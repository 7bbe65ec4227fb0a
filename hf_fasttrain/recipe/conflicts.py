"""Settings of a recipe that are valid one by one but contradict each other, found before anything is loaded."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Collection, Iterator

from hf_fasttrain.recipe.fixed_pixels import without_kept_features
from hf_fasttrain.recipe.messages import WORDS
from hf_fasttrain.recipe.schema import BestSection, EarlyStoppingSection, Recipe, ScheduleSection
from hf_fasttrain.run_folder.result import BUILT_IN_METRICS, PER_CLASS, TUNED_METRICS, metric_name, resolve_mode
from hf_fasttrain.utils.clean import holds_secret
from hf_fasttrain.utils.duration import Duration
from hf_fasttrain.utils.remote import is_license, is_repo_name
from hf_fasttrain.utils.train_phases import TrainPhases

LONGEST_WAIT = 7 * 24 * 60  # minutes
Mistake = tuple[str, str]  # dotted key; what is wrong and what to do


def conflicts(recipe: Recipe, metrics: Collection[str] | None = ()) -> list[Mistake]:
    """Return every conflict in the recipe; `metrics` may be watched beside those of evaluate.metrics, None: any."""
    return [mistake for check in CHECKS for mistake in check(recipe)] + [*_watched_metrics(recipe, metrics)]


def _model(recipe: Recipe) -> Iterator[Mistake]:
    model = recipe.model
    if model.small_image_stem and model.pretrained is True:
        yield (
            "model.small_image_stem",
            "published weights have the 7x7 stem; set model.pretrained=false or small_image_stem=false",
        )
    if model.batch_norm == "frozen" and not model.pretrained:
        yield "model.batch_norm", "frozen needs pretrained statistics; set model.pretrained to weights to start from"
    if model.batch_norm == "frozen" and recipe.accelerate.sync_batch_norm:
        yield "accelerate.sync_batch_norm", "has no effect with model.batch_norm=frozen; leave one of them out"
    if "trust_remote_code" in model.args:
        yield "model.args", "contains trust_remote_code; set model.trust_remote_code: true instead"
    if isinstance(location := model.pretrained, str) and location.lower() in WORDS and not os.path.exists(location):
        write = "true" if WORDS[location.lower()] else "false"
        yield "model.pretrained", f"is '{location}'; write {write}, or ./{location} for a folder of that name"
    if model.keep_features is True and (reason := without_kept_features(recipe)) is not None:
        yield (
            "model.keep_features",
            f"true needs the same features in every epoch while the head is trained, which {reason} rules out; leave "
            "keep_features at auto",
        )
    yield from _trained_part(recipe)


def _trained_part(recipe: Recipe) -> Iterator[Mistake]:
    model, head = recipe.model, TrainPhases.parse("head")
    key = "model.freeze_backbone" if model.freeze_backbone else "model.train"
    if model.freeze_backbone and "train" in model.model_fields_set and model.train != head:
        yield (
            "model.freeze_backbone",
            f"is an older name of model.train: head, and model.train is '{model.train}'; leave freeze_backbone out",
        )
    if model.trained != TrainPhases.parse("all") and not model.pretrained:
        yield key, "would freeze random weights; set model.pretrained to weights to start from"
    if recipe.lora is not None and not model.pretrained:
        yield "lora", "would adapt random weights; set model.pretrained to weights to start from"
    if recipe.lora is not None and model.trained != TrainPhases.parse("all"):
        yield key, "and lora exclude each other: lora trains its own part of the model; leave one of them out"
    if model.trained == head and recipe.optimizer.layer_decay is not None:
        yield "optimizer.layer_decay", f"has no effect with {_head_only(recipe)}; leave one of them out"


def _head_only(recipe: Recipe) -> str:
    return "model.freeze_backbone=true" if recipe.model.freeze_backbone else "model.train=head"


def _data(recipe: Recipe) -> Iterator[Mistake]:
    data = recipe.data
    splits = {"train_split": data.train_split, "eval_split": data.eval_split, "test_split": data.test_split}
    named = [(key, value) for key, value in splits.items() if value not in ("auto", None)]
    for number, (key, value) in enumerate(named):
        for other, same in named[:number]:
            if value == same:
                yield f"data.{key}", f"is '{value}', as data.{other} is; give each its own split"
    for key in ("mean", "std"):
        values = getattr(data, key)
        if values != "auto" and len(values) not in (1, 3):
            yield f"data.{key}", f"has {len(values)} numbers; give 3 (red, green, blue) or 1 for all"
        if values != "auto" and max(map(abs, values), default=0) > 1e6:
            yield f"data.{key}", f"is {values}; of 0-1 pixels it is about 0.5, and at most 1e6"
    levels = data.value_range
    if levels != "auto" and (len(levels) != 2 or levels[0] >= levels[1]):
        yield "data.value_range", f"is {levels}; give two numbers, the smaller one (black) first, such as [0, 4095]"
    if data.reduced_decode is True and data.short_side is None:
        yield "data.reduced_decode", "true needs data.short_side; leave it at auto, or give the pixels that sides keep"
    if data.cache == "device" and recipe.augment.crop == "random_resized":
        yield (
            "data.cache",
            "device needs augment.crop=padded or center: only these give the same pixels on a device; "
            "use memory, or another crop",
        )
    fill = recipe.augment.erase_fill
    if data.cache == "device" and recipe.augment.erase > 0 and fill not in ("black", "mean"):
        yield "augment.erase_fill", f"{fill} is not available on the device; use black or mean, or data.cache=memory"
    if data.std != "auto" and any(value <= 0 for value in data.std):
        yield "data.std", "must be above 0"
    yield from _folds(recipe)


def _folds(recipe: Recipe) -> Iterator[Mistake]:
    data = recipe.data
    if data.folds is None:
        if data.fold is not None:
            yield "data.fold", f"is {data.fold}, and data.folds is not set; set data.folds=5, or leave data.fold out"
        return
    if data.fold is not None and data.fold >= data.folds:
        yield "data.fold", f"is {data.fold}; of data.folds={data.folds}, folds are numbered 0 to {data.folds - 1}"
    if "eval_fraction" in data.model_fields_set:
        yield "data.folds", "and data.eval_fraction exclude each other: a fold is held out; leave one of them out"
    if data.eval_split != "auto":
        yield "data.folds", f"and data.eval_split={data.eval_split} exclude each other; leave one of them out"


def _augment(recipe: Recipe) -> Iterator[Mistake]:
    augment = recipe.augment
    policies = {name: getattr(augment, name) for name in ("auto", "randaugment", "trivialaugment", "augmix")}
    first, *others = [*(name for name, value in policies.items() if value), ""]
    for name in others[:-1]:
        yield f"augment.{name}", f"and augment.{first} exclude each other; leave one of them out"
    progressive = augment.progressive
    if progressive and augment.crop != "random_resized":
        yield "augment.progressive", f"needs augment.crop=random_resized; it is {augment.crop}"
    if progressive and progressive.start_size >= recipe.data.size_in_training:
        full = "train_size" if recipe.data.train_size else "image_size"
        yield "augment.progressive.start_size", f"is not below data.{full}={recipe.data.size_in_training}"
    if augment.repeats > recipe.train.batch_size:
        yield "augment.repeats", f"is {augment.repeats}, but train.batch_size is only {recipe.train.batch_size}"
    for key, least in (("crop_scale", 0.0), ("crop_ratio", 0.0)):
        values = getattr(augment, key)
        if len(values) != 2 or not least < values[0] <= values[1]:
            yield f"augment.{key}", f"is {values}; give two numbers above 0, the smaller first"
    if len(augment.crop_scale) == 2 and augment.crop_scale[1] > 1:
        yield "augment.crop_scale", "is a share of the image's area; at most 1"


def _train(recipe: Recipe) -> Iterator[Mistake]:
    accelerate, train = recipe.accelerate, recipe.train
    accumulation = accelerate.gradient_accumulation_steps
    if train.duration.count == 0:
        yield "train.duration", "is 0; give at least 1 step"
    if accumulation != "auto" and accelerate.micro_batch_size is not None:
        yield (
            "accelerate.micro_batch_size",
            "and accelerate.gradient_accumulation_steps set the same thing; leave one of them out",
        )
    losses = train.loss_sections
    if len(losses) > 1:
        yield f"train.{losses[1]}", f"and train.{losses[0]} are two losses; leave one of them out"
    elif losses and train.loss not in ("auto", losses[0]):
        yield "train.loss", f"is {train.loss}, and train.{losses[0]} is set; leave one of them out"
    if train.sampling == {}:
        yield "train.sampling", "is empty; give {power: 0.3}, balanced, sqrt or uniform"
    is_drawn = train.sampling not in (None, "uniform")
    if is_drawn and train.class_weights in ("balanced", "effective_number"):
        yield (
            "train.class_weights",
            f"{train.class_weights} and train.sampling correct the classes' frequencies twice; leave one of them out",
        )
    if train.probe_first and recipe.model.head == "keep":
        yield "train.probe_first", "replaces the head, and model.head=keep keeps it; leave one of them out"
    if accumulation != "auto" and accumulation > train.batch_size:
        yield (
            "accelerate.gradient_accumulation_steps",
            f"is {accumulation}, but train.batch_size is only {train.batch_size}",
        )


def _optimizer(recipe: Recipe) -> Iterator[Mistake]:
    if recipe.optimizer.layer_decay is not None and recipe.optimizer.backbone_lr_scale != 1.0:
        yield (
            "optimizer.layer_decay",
            "and optimizer.backbone_lr_scale exclude each other; leave one of them out",
        )

    clips = [name for name in ("clip_norm", "clip_value", "clip_agc") if getattr(recipe.optimizer, name) is not None]
    for name in clips[1:]:
        yield f"optimizer.{name}", f"and optimizer.{clips[0]} exclude each other; leave one of them out"


def _schedule(recipe: Recipe) -> Iterator[Mistake]:
    every: dict[str, Duration | str] = {
        "schedule.every": recipe.schedule.every,
        "schedule.patience": recipe.schedule.patience,
        "evaluate.every": recipe.evaluate.every,
        "checkpoint.every": recipe.checkpoint.every,
    }
    for key, value in every.items():
        if isinstance(value, Duration) and value.count == 0:
            yield key, "is 0; give at least 1 step"
    if recipe.schedule.name == "multistep" and not recipe.schedule.milestones:
        yield "schedule.milestones", "is empty; multistep needs them, such as [30 epochs, 60 epochs]"
    if recipe.schedule.name == "plateau" and recipe.schedule.gamma == 1:
        yield "schedule.gamma", "is 1, with which lr stays as it is; give a smaller factor, or schedule.name=constant"
    if any(milestone.count == 0 for milestone in recipe.schedule.milestones):
        yield "schedule.milestones", "contains 0; lower optimizer.lr instead"


def _without_evaluation(recipe: Recipe) -> Iterator[Mistake]:
    """Yield what needs evaluations where there are none."""
    if recipe.evaluate.every != "never":
        return
    needing = {
        "early_stopping": recipe.early_stopping is not None,
        "schedule.name": recipe.schedule.name == "plateau",
        "checkpoint.final": recipe.checkpoint.final in ("best", "average"),
        "hub.every": recipe.hub is not None and recipe.hub.every == "best",
        "data.test_split": recipe.data.test_split is not None,
    }
    for key, is_set in needing.items():
        if is_set:
            yield key, "needs evaluations, and evaluate.every is never; leave one of them out"


def _secrets(recipe: Recipe) -> Iterator[Mistake]:
    """A recipe is stored in the run folder and pushed with the model: it must not contain secrets."""
    for section, values in recipe.model_dump(mode="json").items():
        if holds_secret(str(values)):
            yield (
                section,
                "contains an access token; remove it: log in with `hf auth login` or the variable HF_TOKEN",
            )


def _hub(recipe: Recipe) -> Iterator[Mistake]:
    hub = recipe.hub
    if hub is None:
        return
    if not is_repo_name(hub.repo):
        yield "hub.repo", f"is '{hub.repo}'; write OWNER/NAME in letters, digits, '-', '_' and '.', such as me/flowers"
    if isinstance(hub.every, Duration) and hub.every.count == 0:
        yield "hub.every", "is 0; give at least 1 step"
    if not 0 < hub.wait.count <= LONGEST_WAIT:
        yield "hub.wait", f"is {hub.wait}; give more than 0 and at most {LONGEST_WAIT:,} minutes (a week)"
    if hub.license is not None and not is_license(hub.license):
        yield "hub.license", f"is '{hub.license}'; write it as the Hub does, such as apache-2.0, mit or other"


def _tuned_metrics(recipe: Recipe) -> Iterator[Mistake]:
    measured = recipe.evaluate.metrics
    names = [name for name in TUNED_METRICS if measured != "auto" and name in measured]
    if names and recipe.evaluate.thresholds != "tuned":
        verb = "is" if len(names) == 1 else "are"
        yield "evaluate.metrics", f"{' and '.join(names)} {verb} measured with evaluate.thresholds=tuned; set that too"


def _watched_metrics(recipe: Recipe, others: Collection[str] | None) -> Iterator[Mistake]:
    metrics = recipe.evaluate.metrics
    known = list(BUILT_IN_METRICS) if metrics == "auto" else ["loss", *metrics]
    known += TUNED_METRICS if recipe.evaluate.thresholds == "tuned" else ()
    known = [*dict.fromkeys((*map(metric_name, known), *(others or ())))]
    watched: dict[str, BestSection | EarlyStoppingSection | ScheduleSection | None] = {
        "checkpoint.best": recipe.checkpoint.best,
        "early_stopping": recipe.early_stopping,
        "schedule": recipe.schedule if recipe.schedule.name == "plateau" else None,
    }
    for key, watch in watched.items():
        if watch is None:
            continue
        if watch.metric not in known and not (metrics == "auto" and watch.metric.startswith(PER_CLASS)):
            default = "" if "metric" in watch.model_fields_set else ", the default"
            if watch.metric in TUNED_METRICS:
                yield (
                    f"{key}.metric",
                    f"is {watch.metric}, which is measured with evaluate.thresholds=tuned; set that too",
                )
            elif others is not None:
                yield (
                    f"{key}.metric",
                    f"is '{watch.metric}'{default}, which evaluate.metrics does not measure; "
                    f"{'set it to' if default else 'choose'} one of {', '.join(known)}, or pass it as a function: "
                    "Trainer.from_recipe(..., metrics={...})",
                )
            continue
        try:
            resolve_mode(watch.metric, watch.mode)
        except ValueError as error:
            yield f"{key}.mode", str(error)


def _pushed_more_rarely(recipe: Recipe) -> Iterator[str]:
    saved, pushed = recipe.checkpoint.every, recipe.hub.every if recipe.hub else None
    if isinstance(pushed, Duration) and pushed.unit == saved.unit and pushed.count < saved.count:
        yield f"hub.every={pushed}: only checkpoints are pushed, and they are saved only every {saved}"


def _capped_magnitude(recipe: Recipe) -> Iterator[str]:
    """Yield a note if timm caps the magnitude of a policy at 10, as it does unless told another maximum."""
    policy = (recipe.augment.auto or "").split("-")
    magnitude = max((int(part[1:]) for part in policy if re.match(r"m\d", part)), default=0)
    if policy[0] == "rand" and magnitude > 10 and not any(part.startswith("mmax") for part in policy):
        yield f"augment.auto: timm caps m{magnitude} at 10; -mmax{magnitude} in it raises the cap"


def without_effect(recipe: Recipe) -> list[str]:
    """Return a note for each setting of the user that has no effect in this recipe."""
    schedule, crop = recipe.schedule.name, recipe.augment.crop
    mixup, cutmix = recipe.augment.mixup > 0, recipe.augment.cutmix > 0
    used = {
        "checkpoint.average": recipe.checkpoint.final == "average",
        "schedule.gamma": schedule in ("step", "exponential", "multistep", "plateau"),
        "schedule.every": schedule in ("step", "exponential"),
        "schedule.milestones": schedule == "multistep",
        "schedule.min_lr_ratio": schedule in ("cosine", "linear", "polynomial", "plateau"),
        **{f"schedule.{key}": schedule == "plateau" for key in ("metric", "mode", "patience", "min_delta")},
        "schedule.power": schedule == "polynomial",
        "schedule.cycles": schedule == "cosine",
        "schedule.div": schedule == "onecycle",
        "schedule.final_div": schedule == "onecycle",
        "schedule.start_ratio": schedule != "onecycle",
        "augment.crop_padding": crop == "padded",
        "augment.crop_scale": crop == "random_resized",
        "augment.crop_ratio": crop == "random_resized",
        "augment.erase_fill": recipe.augment.erase > 0,
        "augment.mixup_prob": mixup or cutmix,
        "augment.mixup_until": mixup or cutmix,
        "augment.mixup_mode": mixup or cutmix,
        "augment.mixup_switch_prob": mixup and cutmix,
        "model.head": bool(recipe.model.pretrained),
        "data.cache_dir": recipe.data.cache in ("disk", "auto"),
        "data.cache_gb": recipe.data.cache in ("memory", "disk", "auto"),
        "optimizer.backbone_lr_scale": recipe.model.trained != TrainPhases.parse("head"),
        "optimizer.momentum": not recipe.optimizer.name.startswith("adam"),
        **{f"probe.{key}": recipe.train.probe_first for key in ("views", "strength", "neighbors")},
    }
    origins = recipe.source.origins
    rivals = {"schedule": f"schedule.name={schedule}", "augment": f"augment.crop={crop}"}
    rivals["optimizer"] = f"optimizer.name={recipe.optimizer.name}"
    rivals["data"] = f"data.cache={recipe.data.cache}"
    rivals["probe"] = "train.probe_first=false"
    partners = {"augment.erase_fill": "augment.erase=0.0", "model.head": "model.pretrained=false"}
    partners["checkpoint.average"] = f"checkpoint.final={recipe.checkpoint.final}"
    partners["optimizer.backbone_lr_scale"] = f"{_head_only(recipe)}: only the head is trained"
    mixing = ("augment.mixup_prob", "augment.mixup_until", "augment.mixup_mode")
    partners |= dict.fromkeys(mixing, "augment.mixup=0 and augment.cutmix=0")
    partners["augment.mixup_switch_prob"] = "augment.mixup=0 or augment.cutmix=0"
    return [*_pushed_more_rarely(recipe), *_capped_magnitude(recipe)] + [
        f"{key} has no effect with {partners.get(key) or rivals[key.split('.')[0]]}"
        for key, is_used in used.items()
        if not is_used and key in origins
    ]


CHECKS: tuple[Callable[[Recipe], Iterator[Mistake]], ...] = (
    _model,
    _data,
    _augment,
    _train,
    _optimizer,
    _schedule,
    _without_evaluation,
    _tuned_metrics,
    _hub,
    _secrets,
)
