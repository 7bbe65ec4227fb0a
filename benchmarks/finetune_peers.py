"""Common ways to fine-tune, for finetune.py: a plain script and transformers.Trainer. Runs one of them once.

    python benchmarks/finetune_peers.py plain|hf_trainer DIR --weights FILE [...]

The last line of the output is JSON: {"accuracy": of the last epoch's weights on the evaluation split}.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchvision import transforms
from torchvision.datasets import ImageFolder

LR, WEIGHT_DECAY, LABEL_SMOOTHING = 1e-3, 0.01, 0.1
CLOSEST_CROP = 0.35  # share of the area; torchvision's default of 0.08 ended lower here


def build_model(args: argparse.Namespace, num_classes: int) -> nn.Module:
    """Return the published model with a new head: that of `reset_classifier`, with nn.Linear's initialisation.

    timm initialises the head of the EfficientNet family from U(-1/sqrt(K), 1/sqrt(K)), which trains worse. Most scripts
    replace the classifier by a new nn.Linear.
    """
    model: Any = timm.create_model(args.model)
    model.load_state_dict(load_file(args.weights))
    model.reset_classifier(num_classes)
    if not args.timm_head:
        model.get_classifier().reset_parameters()
    built: nn.Module = model
    return built


def datasets(args: argparse.Namespace, model: nn.Module) -> tuple[ImageFolder, ImageFolder]:
    """Return the training and the evaluation images, with the transforms of torchvision's tutorials."""
    config = timm.data.resolve_model_data_config(model)
    to_tensor = [transforms.ToTensor(), transforms.Normalize(config["mean"], config["std"])]
    filter_ = transforms.InterpolationMode(config["interpolation"])
    resize = round(args.size / config["crop_pct"])
    crop = transforms.RandomResizedCrop(args.size, scale=(args.crop_scale, 1.0))
    training = [crop, transforms.RandomHorizontalFlip(), *to_tensor]
    evaluation = [transforms.Resize(resize, filter_), transforms.CenterCrop(args.size), *to_tensor]
    return (
        ImageFolder(args.folder / "train", transforms.Compose(training)),
        ImageFolder(args.folder / "validation", transforms.Compose(evaluation)),
    )


def accuracy(model: nn.Module, loader: DataLoader[Any]) -> float:
    """Return the share of a loader's images that the model classifies correctly."""
    model.eval()
    with torch.inference_mode():
        right = sum((model(images).argmax(1) == labels).sum().item() for images, labels in loader)
    return right / len(loader.dataset)  # type: ignore[arg-type]


def plain(args: argparse.Namespace) -> float:
    """Train with a plain loop: AdamW, one cycle, label smoothing; evaluate after every epoch."""
    model = build_model(args, len(ImageFolder(args.folder / "train").classes))
    train_set, eval_set = datasets(args, model)
    train_loader = DataLoader(train_set, args.batch, shuffle=True, num_workers=args.workers)
    eval_loader = DataLoader(eval_set, 2 * args.batch, num_workers=args.workers)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LR, epochs=args.epochs, steps_per_epoch=len(train_loader))
    criterion = nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)
    final_accuracy = 0.0
    for _ in range(args.epochs):
        model.train()
        for images, labels in train_loader:
            optimizer.zero_grad()
            criterion(model(images), labels).backward()
            optimizer.step()
            schedule.step()
        final_accuracy = accuracy(model, eval_loader)
    return final_accuracy


class WithLoss(nn.Module):
    """A timm model in the form that transformers.Trainer expects."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, pixel_values: Tensor, labels: Tensor) -> dict[str, Tensor]:
        logits = self.model(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels, label_smoothing=LABEL_SMOOTHING), "logits": logits}


def hf_trainer(args: argparse.Namespace) -> float:
    """Train with transformers.Trainer, its AdamW and its linear schedule; evaluate after every epoch."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    model = build_model(args, len(ImageFolder(args.folder / "train").classes))
    train_set, eval_set = datasets(args, model)

    def collate(rows: list[tuple[Tensor, int]]) -> dict[str, Tensor]:
        images, labels = zip(*rows, strict=True)
        return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}

    def measure(predicted: Any) -> dict[str, float]:
        return {"accuracy": float((predicted.predictions.argmax(1) == predicted.label_ids).mean())}

    with tempfile.TemporaryDirectory() as folder:
        options = transformers.TrainingArguments(
            folder,
            num_train_epochs=args.epochs,
            per_device_train_batch_size=args.batch,
            per_device_eval_batch_size=2 * args.batch,
            learning_rate=LR,
            weight_decay=WEIGHT_DECAY,
            eval_strategy="epoch",
            save_strategy="no",
            dataloader_num_workers=args.workers,
            dataloader_pin_memory=False,
            remove_unused_columns=False,
            label_names=["labels"],
            use_cpu=True,
            seed=args.seed,
            report_to=[],
            disable_tqdm=True,
        )
        trainer = transformers.Trainer(
            WithLoss(model),
            options,
            train_dataset=train_set,
            eval_dataset=eval_set,
            data_collator=collate,
            compute_metrics=measure,
        )
        trainer.train()
        return float(trainer.evaluate()["eval_accuracy"])


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("side", choices=["plain", "hf_trainer"])
    parser.add_argument("folder", type=Path, metavar="DIR", help="image folder with the splits train and validation")
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--model", default="tf_efficientnet_lite0")
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--crop-scale", type=float, default=CLOSEST_CROP)
    parser.add_argument("--timm-head", action="store_true", help="keep the head's initialisation by reset_classifier")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    print(json.dumps({"accuracy": {"plain": plain, "hf_trainer": hf_trainer}[args.side](args)}), flush=True)


if __name__ == "__main__":
    main()
