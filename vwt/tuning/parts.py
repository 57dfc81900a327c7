"""The parts of a model whose latency makes its profile, timed in turn."""

import random
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from vwt.measure.timing import Calls, interleave
from vwt.models.backbone import Backbone
from vwt.models.checking import check_parts
from vwt.reductions.kinds import KINDS
from vwt.reductions.reduction import Reduction, patches_entering
from vwt.tokens.attention import run_blocks
from vwt.tokens.packing import Packed

FORWARDS = 40  # forwards with schedules, from which what reductions cost is fitted


class Parts:
    """The parts of a model that are timed for its profile.

    Args:
        model: on the device to measure.
        batch_size: images at a time.
        points: token counts, from few to all.
        image_size: (height, width); None is what the model was made for.
        seed: of the images, the schedules and the order.

    Attributes:
        counts: the token counts, ascending.
        schedules: what the whole forwards reduce; the first is empty.
    """

    def __init__(
        self, model: nn.Module, batch_size: int, points: int, image_size: tuple[int, int] | None, seed: int
    ) -> None:
        self.backbone, self.batch_size, self.seed = Backbone(model), batch_size, seed
        check_parts(self.backbone)
        self.backbone.check_alone()
        weight = next(model.parameters())
        self.device = weight.device
        generator = torch.Generator().manual_seed(seed)
        channels, *size = self.backbone.input_shape
        self.image_size = (size[0], size[1]) if image_size is None else image_size
        self.images = torch.randn(batch_size, channels, *self.image_size, generator=generator).to(weight)
        self.backbone.check(self.images)
        with torch.inference_mode():
            self.everything, self.words = self.backbone.pack_all(self.images)
        prefix, total = self.backbone.prefix, self.everything.lengths[0]
        least = min(prefix + 1, total)
        self.counts = sorted({round(count) for count in np.linspace(least, total, points)})
        self.schedules = _random_schedules(self.backbone.depth, total - prefix, seed)

    def packed(self, count: int) -> Packed:
        """The first tokens of each image."""
        return self.everything.take(torch.arange(count, device=self.device).expand(self.batch_size, -1))

    def calls(self) -> dict[Any, Calls]:
        """What is timed, by its place in the profile."""
        backbone, everything = self.backbone, self.everything
        calls: dict[Any, Callable[[], Any]] = {
            "embed": lambda: backbone.pre_norm(backbone.pack_all(self.images)[0]),
            "head": lambda: backbone.head(backbone.final_norm(everything), self.words),
        }
        for count in self.counts:
            packed = self.packed(count)
            key_size = replace(packed, key_size=torch.ones_like(packed.values[:, 0].float()))
            calls["block", count] = partial(backbone.run, packed)
            calls["attention", count] = partial(self._attention, packed)
            calls["counting", count] = partial(backbone.run, key_size)
        for index, reductions in enumerate(self.schedules):
            calls["forward", index] = partial(self._forward, reductions)
        return {name: {"run": _ignoring_item(call)} for name, call in calls.items()}

    def _attention(self, packed: Packed) -> None:
        for block in self.backbone.blocks:
            packed = run_blocks(self.backbone.halves(block)[0], packed)

    def _forward(self, reductions: Mapping[int, Reduction]) -> None:
        if not reductions:
            self.backbone.model(self.images)
            return
        packed, words = self.backbone.pack_all(self.images)
        self.backbone.classify(self.backbone.pre_norm(packed), words, reductions)

    @torch.inference_mode()
    def measure(self, runs: int, progress: bool) -> dict[Any, float]:
        """Milliseconds of each part, the median of its runs: "embed", "head", and by name and count, or index."""
        calls = self.calls()
        seconds = interleave(
            list(calls.values()), 1, runs, device=self.device, warmup=1, seed=self.seed, progress=progress
        )
        return {name: 1e3 * float(np.median(timed["run"])) for name, timed in zip(calls, seconds, strict=True)}


def _ignoring_item(call: Callable[[], Any]) -> Callable[[int], Any]:
    return lambda item: call()


def _random_schedules(depth: int, patches: int, seed: int) -> list[dict[int, Reduction]]:
    """The empty schedule, and schedules of one to three reductions."""
    rng = random.Random(seed)
    schedules: list[dict[int, Reduction]] = [{}]
    while len(schedules) < FORWARDS:
        blocks = rng.sample(range(depth), min(depth, rng.randint(1, 3)))
        shares = [rng.uniform(0.05, 0.45) for _ in blocks]
        made = {b: KINDS[rng.choice(list(KINDS))](share) for b, share in zip(blocks, shares, strict=True)}
        if patches_entering(made, depth, patches)[-1] < patches:
            schedules.append(made)
    return schedules
