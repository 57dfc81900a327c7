"""Where the time of a forward goes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vwt.measure.timing import Calls, interleave
from vwt.models.spec import prepare
from vwt.tokenizer import VWTokenizer
from vwt.tokens.packing import Packed
from vwt.tokens.words import Words

RUNS = 10  # of each part
COUNTS = 10  # of tokens, for the profile


@dataclass(frozen=True)
class Part:
    """A part of a forward, with the whole model's tokens and with those that the plan leaves.

    Attributes:
        name: "patches", "block 0" and so on, "head".
        full: milliseconds a batch of the model itself.
        reduced: of the reduced model.
        tokens: that leave it in the reduced model, prefix tokens included, mean over the images.
    """

    name: str
    full: float
    reduced: float
    tokens: float


@dataclass(frozen=True)
class Costs:
    """Milliseconds a batch, measured in one run.

    Attributes:
        full: of a forward of the model.
        reduced: of the reduced model.
        tokens: of an image in the model, prefix tokens included.
        parts: in their order.
        profile: milliseconds of all blocks by tokens of each image.
    """

    full: float
    reduced: float
    tokens: int
    parts: list[Part]
    profile: dict[int, float]


@torch.inference_mode()
def measure_costs(fast: VWTokenizer, pixels: Tensor, batch_size: int, *, progress: bool = True) -> Costs:
    """Time a model and what was made of it, part by part, in turn.

    Args:
        fast: the reduced model.
        pixels: (n, C, H, W) uint8; of fewer than a batch, some are taken again.
        batch_size: images at a time.
        progress: show a progress bar.
    """
    images = prepare(pixels[torch.arange(batch_size) % len(pixels)], fast.model)
    backbone = fast.backbone
    everything = backbone.pre_norm(backbone.pack_all(images)[0])
    full = _parts(VWTokenizer(fast.model, check=False), images)
    reduced = _parts(fast, images)
    counts = sorted({round(n) for n in np.linspace(backbone.prefix + 1, everything.lengths[0], COUNTS)})
    packed = {n: everything.take(torch.arange(n, device=images.device).expand(batch_size, -1)) for n in counts}
    calls: dict[Any, Callable[[], Any]] = {"full": lambda: fast.model(images), "reduced": lambda: fast(images)}
    calls |= {("full", name): call for name, (call, _) in full.items()}
    calls |= {("reduced", name): call for name, (call, _) in reduced.items()}
    calls |= {n: partial(backbone.run, own) for n, own in packed.items()}
    groups: list[Calls] = [{"run": partial(_ignoring_item, call)} for call in calls.values()]
    seconds = interleave(groups, 1, RUNS, device=images.device, warmup=1, progress=progress)
    ms = {name: 1e3 * float(np.median(timed["run"])) for name, timed in zip(calls, seconds, strict=True)}
    parts = [Part(name, ms["full", name], ms["reduced", name], tokens) for name, (_, tokens) in reduced.items()]
    return Costs(ms["full"], ms["reduced"], everything.lengths[0], parts, {n: ms[n] for n in counts})


def _ignoring_item(call: Callable[[], Any], item: int) -> Any:
    return call()


def _parts(fast: VWTokenizer, images: Tensor) -> dict[str, tuple[Callable[[], Any], float]]:
    """Calls of each part of a forward, and the tokens that leave it, by name."""
    backbone = fast.backbone

    def enter() -> Any:
        packed, words = fast.pack(images)
        return backbone.pre_norm(packed), words

    packed, words = enter()
    parts: dict[str, tuple[Callable[[], Any], float]] = {"patches": (enter, _mean(packed.lengths))}
    last = backbone.depth - 1
    for block in range(last):
        run = partial(backbone.run, packed, fast.schedule, block, block + 1)
        packed, _ = run()
        parts[f"block {block}"] = run, _mean(packed.lengths)
    # What the head does not read is spared the last MLP, so that these two belong together.
    end = partial(_end, fast, packed, words)
    parts[f"block {last}, head"] = end, _mean(packed.lengths)
    return parts


def _end(fast: VWTokenizer, packed: Packed, words: Words) -> Any:
    """The last block and the head, on all tokens where nothing is reduced, as the model itself has it."""
    backbone = fast.backbone
    last = backbone.depth - 1
    if fast.strategy is not None or fast.schedule:
        return backbone.classify(packed, words, fast.schedule, last)
    return backbone.head(backbone.final_norm(backbone.run(packed, start=last)[0]), words)


def _mean(lengths: Sequence[int]) -> float:
    return sum(lengths) / len(lengths)
