"""Training steps of variants: forward, backward and AdamW."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from variants import Module, Variant

from vwt.errors import ArgumentError


class Step:
    """One training step of a module in train mode, as it is timed; the learning rate is 0, so that weights stay.

    Args:
        module: of a variant; the full model's weights are trained in all of them.

    Raises:
        ArgumentError: if it has no weights to train.
    """

    def __init__(self, module: Module) -> None:
        if not isinstance(module, nn.Module) or not any(weight.requires_grad for weight in module.parameters()):
            raise ArgumentError("it has no weights to train")
        self.module = module.train()
        self.optimizer = torch.optim.AdamW(module.parameters(), lr=0.0)

    def __call__(self, images: Tensor) -> Tensor:
        """The loss of images (B, C, H, W) against classes 0 to B - 1."""
        answer = self.module(images)
        loss = F.cross_entropy(answer, torch.arange(len(images), device=answer.device) % answer.shape[1])
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()


def steps(variants: Sequence[Variant]) -> list[Variant]:
    """The same variants, with their training step in the place of their forward."""
    return [replace(variant, build=partial(_step, variant.build)) for variant in variants]


def _step(build: Callable[[], Module]) -> Step:
    return Step(build())
