"""The trainings that end_to_end.py compares; runs one of them for a given time.

    python benchmarks/end_to_end_sides.py SIDE DIR --model NAME --size 128 [...]

Prints a line "step" after each optimizer step, for which end_to_end.py keeps the time.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

MEAN, STD, LR = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225], 1e-3
MANY_STEPS = 100_000  # end_to_end.py ends the training


def announce_step(*_: Any, **__: Any) -> None:
    """Print that an optimizer step is done."""
    os.write(1, b"step\n")  # at once, also through a pipe


def image_folder(args: argparse.Namespace) -> tuple[Any, Callable[[list[dict[str, Any]]], dict[str, Any]]]:
    """Return the images of DIR/train as in transformers' image classification example, and its collate function."""
    import datasets
    import torch
    from torchvision import transforms

    datasets.disable_progress_bars()
    dataset = datasets.load_dataset("imagefolder", data_dir=str(args.folder), split="train")
    steps = [transforms.RandomResizedCrop(args.size), transforms.RandomHorizontalFlip(), transforms.ToTensor()]
    transform = transforms.Compose([*steps, transforms.Normalize(MEAN, STD)])

    def transformed(rows: dict[str, list[Any]]) -> dict[str, list[Any]]:
        rows["pixel_values"] = [transform(image.convert("RGB")) for image in rows["image"]]
        return rows

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        labels = torch.tensor([row["label"] for row in rows])
        return {"pixel_values": torch.stack([row["pixel_values"] for row in rows]), "labels": labels}

    return dataset.with_transform(transformed), collate


def bare(args: argparse.Namespace) -> None:
    """A plain loop in PyTorch with a DataLoader."""
    import timm
    import torch
    from torch.utils.data import DataLoader

    dataset, collate = image_folder(args)
    options: dict[str, Any] = {"shuffle": True, "drop_last": True, "num_workers": args.workers}
    loader = DataLoader(dataset, args.batch, collate_fn=collate, **options)
    model = timm.create_model(args.model, num_classes=args.classes, **args.model_args)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    while True:
        for batch in loader:
            loss = torch.nn.functional.cross_entropy(model(batch["pixel_values"]), batch["labels"])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            announce_step()


def model_alone(args: argparse.Namespace) -> None:
    """The plain loop without its data: one batch in memory again and again. What the model takes."""
    import timm
    import torch

    images, labels = torch.rand(args.batch, 3, args.size, args.size), torch.arange(args.batch) % args.classes
    model = timm.create_model(args.model, num_classes=args.classes, **args.model_args)
    if args.channels_last:
        images = images.contiguous(memory_format=torch.channels_last)
        model = model.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), LR)
    while True:
        torch.nn.functional.cross_entropy(model(images), labels).backward()
        optimizer.step()
        optimizer.zero_grad()
        announce_step()


def hf_trainer(args: argparse.Namespace) -> None:
    """transformers.Trainer, with the data of its image classification example."""
    import timm
    import torch
    import transformers

    class Classifier(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = timm.create_model(args.model, num_classes=args.classes, **args.model_args)

        def forward(self, pixel_values: Any, labels: Any) -> dict[str, Any]:
            logits = self.model(pixel_values)
            return {"loss": torch.nn.functional.cross_entropy(logits, labels), "logits": logits}

    class Steps(transformers.TrainerCallback):
        on_step_end = announce_step

    dataset, collate = image_folder(args)
    arguments = transformers.TrainingArguments(
        str(args.scratch / "hf_trainer"),
        per_device_train_batch_size=args.batch,
        max_steps=MANY_STEPS,
        learning_rate=LR,
        report_to=[],
        save_strategy="no",
        remove_unused_columns=False,
        dataloader_num_workers=args.workers,
        dataloader_drop_last=True,
        disable_tqdm=True,
    )
    options: dict[str, Any] = {"train_dataset": dataset, "data_collator": collate, "callbacks": [Steps()]}
    transformers.Trainer(Classifier(), arguments, **options).train()


def ours(args: argparse.Namespace) -> None:
    """hf_fasttrain with its defaults, which include the number of loader processes and the cache."""
    from hf_fasttrain import Trainer

    trainer = Trainer.from_recipe(args.recipe)
    with trainer.running():
        for _ in trainer.iterate():
            announce_step()


SIDES = {side.__name__: side for side in (bare, model_alone, hf_trainer, ours)}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("side", choices=SIDES)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--model", required=True)
    parser.add_argument("--size", type=int, required=True)
    parser.add_argument("--batch", type=int, required=True)
    parser.add_argument("--workers", type=int, required=True)
    parser.add_argument("--classes", type=int, required=True)
    parser.add_argument("--recipe", type=Path)
    parser.add_argument("--channels-last", action="store_true")
    args = parser.parse_args()
    args.model_args = {"img_size": args.size} if args.model.startswith("vit") else {}
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as scratch:
        args.scratch = Path(scratch)
        SIDES[args.side](args)


if __name__ == "__main__":
    main()
