"""Fine-tune a classifier whose tokens are reduced: time of a training step and accuracy beside the full model's.

    python scripts/finetune.py FOLDER [--model MODEL] [--checkpoint FILE] [--epochs 2]

FOLDER holds a sub-folder of images for each class; --class-map names the model's own classes, so that its head stays.
Every other image is trained on, the rest is what accuracy is of.
A head of another number of classes is replaced. The training step is plain PyTorch: a wrapped
model is a module like any other.
"""

import argparse
import copy
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vwt
from vwt.cli import run_script
from vwt.datasets import ImageSource
from vwt.errors import ArgumentError
from vwt.models.create import create_model
from vwt.models.spec import prepare
from vwt.progress import progress_bar

Pairs = tuple[Tensor, Tensor]  # images (n, C, H, W) uint8, labels (n,) int64


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options."""
    parser.add_argument("images", metavar="FOLDER", help="a sub-folder of images for each class")
    parser.add_argument("--model", default="vit_tiny_patch16_224.augreg_in21k_ft_in1k", help="timm model")
    parser.add_argument("--checkpoint", help="file of weights; by default the pretrained ones from the hub")
    parser.add_argument("--class-map", metavar="FILE", help="names of the model's classes; by default the sub-folders")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=16, metavar="N")
    parser.add_argument("--lr", type=float, default=1e-5, help="of AdamW")
    parser.add_argument("--seed", type=int, default=0, help="of the order, and of a new head")
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def run(arguments: argparse.Namespace) -> None:
    """What the options ask for."""
    model: Any = create_model(arguments.model, arguments.checkpoint)
    (images, labels), classes = read(arguments, model)
    train, test = ((images[first::2], labels[first::2]) for first in (0, 1))
    if len(train[0]) < arguments.batch_size:
        raise ArgumentError(f"{len(train[0])} images to train on do not fill a batch of {arguments.batch_size}")
    torch.manual_seed(arguments.seed)
    if model.get_classifier().out_features != classes:
        model.reset_classifier(classes)
    print(f"{len(train[0])} images to train on, {len(test[0])} others, {classes} classes")
    print("| model | step, ms | ratio | accuracy before | after |\n| --- | ---: | ---: | ---: | ---: |")
    full = 0.0
    for name, wrapped in wrap(model).items():
        before = accuracy(wrapped, test, arguments)
        milliseconds = finetune(wrapped, train, arguments)
        full = full or milliseconds
        after = accuracy(wrapped, test, arguments)
        print(
            f"| {name} | {milliseconds:.0f} | {milliseconds / full:.2f} | {100 * before:.1f} % | {100 * after:.1f} % |"
        )


def read(arguments: argparse.Namespace, model: nn.Module) -> tuple[Pairs, int]:
    """All images of the folder with their labels, and how many classes there are."""
    source = ImageSource(arguments.images, model, class_map=arguments.class_map)
    batches = list(progress_bar(source.batches(64), desc="reading", unit="batch", show=not arguments.quiet))
    labels = torch.tensor([label for batch in batches for label in batch.labels])
    return (torch.cat([batch.images for batch in batches]), labels), len(source.classes)


def wrap(model: nn.Module) -> dict[str, vwt.VWTokenizer]:
    """The full model, and two that are reduced, each with weights of its own."""
    absorb = vwt.PruningSchedule({3: vwt.Absorb(60)})
    return {
        "full": vwt.VWTokenizer(copy.deepcopy(model)),
        "Neighbours(0.25)": vwt.VWTokenizer(copy.deepcopy(model), vwt.Neighbours(0.25)),
        "{3: Absorb(60)}": vwt.VWTokenizer(copy.deepcopy(model), schedule=absorb),
        "Neighbours(0.25), {3: Absorb(60)}": vwt.VWTokenizer(copy.deepcopy(model), vwt.Neighbours(0.25), absorb),
    }


def finetune(model: vwt.VWTokenizer, pairs: Pairs, arguments: argparse.Namespace) -> float:
    """Train on full batches; the median of a step in milliseconds."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=arguments.lr, weight_decay=0.05)
    generator = torch.Generator().manual_seed(arguments.seed)
    model.train()
    seconds = []
    steps = list(epochs(pairs, generator, arguments))
    for images, labels in progress_bar(steps, desc="training", unit="step", show=not arguments.quiet):
        pixels = prepare(images, model.model)
        begun = time.perf_counter()
        F.cross_entropy(model(pixels), labels, label_smoothing=0.1).backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - begun)
    model.eval()
    return 1e3 * statistics.median(seconds)


def epochs(pairs: Pairs, generator: torch.Generator, arguments: argparse.Namespace) -> Iterator[Pairs]:
    """Full batches in a random order, a new one each epoch."""
    for _ in range(arguments.epochs):
        order = torch.randperm(len(pairs[0]), generator=generator)
        for chosen in order.split(arguments.batch_size):
            if len(chosen) == arguments.batch_size:
                yield pairs[0][chosen], pairs[1][chosen]


@torch.inference_mode()
def accuracy(model: vwt.VWTokenizer, pairs: Pairs, arguments: argparse.Namespace) -> float:
    """Share of images whose class is right."""
    batches = zip(*(part.split(arguments.batch_size) for part in pairs), strict=True)
    right = [(model(prepare(images, model.model)).argmax(-1) == labels).sum() for images, labels in batches]
    return float(sum(right)) / len(pairs[0])


main = partial(run_script, "finetune", __doc__, add_options, run)

if __name__ == "__main__":
    sys.exit(main())
