"""The parts of a model whose latency makes its profile, timed in turn, in the runtime that it is made for."""

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vwt.export.runtimes import in_precision, precision_of, run_in, run_module, written_in
from vwt.measure.timing import Calls, interleave
from vwt.models.backbone import Backbone
from vwt.models.checking import check_parts
from vwt.progress import progress_bar
from vwt.reductions.kinds import KINDS
from vwt.reductions.reduction import Reduction, patches_entering
from vwt.tokenizer import VWTokenizer
from vwt.tokens.attention import run_blocks
from vwt.tokens.packing import Packed
from vwt.tokens.tensors import equal_lengths

CHECKS = 8  # forwards on which predictions are checked, and from which nothing is fitted
FITTED, FITTED_ELSEWHERE = 30, 6  # others, from which what reductions cost is fitted: in torch, and where each is built
LEAST = 0.5  # of the tokens, that these forwards leave on average
DRAWN = 60  # schedules, of which one is taken
FREE = {1: "tokens"}  # of the tokens (B, n, C) of a part

Call = Callable[[], Any]


class Parts:
    """The parts of a model that are timed for its profile.

    Args:
        model: on the device to measure, in the precision to measure.
        batch_size: images at a time.
        points: token counts, from few to all.
        image_size: (height, width); None is what the model was made for.
        seed: of the images, the schedules and the order.
        runtime: see `run_in`.

    Attributes:
        counts: the token counts, ascending.
        checks: what the forwards reduce on which predictions are checked; the first is empty.
        fitted: what those reduce from which the cost of reductions is fitted.
    """

    def __init__(
        self,
        model: nn.Module,
        batch_size: int,
        points: int,
        image_size: tuple[int, int] | None,
        seed: int,
        runtime: str = "torch",
    ) -> None:
        self.runtime, self.precision = runtime, precision_of(model)
        self.backbone = Backbone(in_precision(model, written_in(runtime, self.precision)))
        self.batch_size, self.seed = batch_size, seed
        check_parts(self.backbone)
        self.backbone.check_alone()
        weight = next(self.backbone.model.parameters())
        self.device = weight.device
        generator = torch.Generator().manual_seed(seed)
        channels, *size = self.backbone.input_shape
        self.image_size = (size[0], size[1]) if image_size is None else image_size
        self.images = torch.randn(batch_size, channels, *self.image_size, generator=generator).to(weight)
        self.backbone.check(self.images)
        with torch.no_grad():
            self.everything, self.words = self.backbone.pack_all(self.images)
        prefix, total = self.backbone.prefix, self.everything.lengths[0]
        least = min(prefix + 1, total)
        self.counts = sorted({round(count) for count in np.linspace(least, total, points)})
        draw, kinds = _Draw(self.backbone, total - prefix, seed), list(KINDS)
        self.checks = [{}, *draw.spread([kinds] * (CHECKS - 1))]
        fitted = FITTED if runtime == "torch" else FITTED_ELSEWHERE
        self.fitted = draw.spread([[kinds[index % len(kinds)]] for index in range(fitted)])

    # -- parts as functions of tensors ---------------------------------------------------------------------------------

    def _packed(self, tokens: Tensor) -> Packed:
        """Tokens (B, n, C), where the first n of the images are."""
        batch, count, _ = tokens.shape
        lengths, places = equal_lengths(count, batch), self.everything.places
        if places is not None:
            rows = places.rows.view(batch, self.counts[-1], -1)[:, :count]
            places = places.replace(rows.flatten(0, 1), lengths, whole=places.whole)
        return Packed(tokens.flatten(0, 1), lengths, places=places)

    def _embed(self, images: Tensor) -> Tensor:
        return self.backbone.pre_norm(self.backbone.pack_all(images)[0]).dense()

    def _head(self, tokens: Tensor) -> Any:
        answer = self.backbone.head(self.backbone.final_norm(self._packed(tokens)), self.words)
        return self.backbone.family.vectors(answer)

    def _block(self, tokens: Tensor) -> Tensor:
        return self.backbone.run(self._packed(tokens))[0].dense()

    def _counting(self, tokens: Tensor) -> Tensor:
        packed = self._packed(tokens)
        packed.key_size = torch.ones_like(packed.values[:, 0], dtype=torch.float32)
        return self.backbone.run(packed)[0].dense()

    def _attention(self, tokens: Tensor) -> Tensor:
        packed = self._packed(tokens)
        for block in self.backbone.blocks:
            packed = run_blocks(self.backbone.halves(block)[0], packed)
        return packed.dense()

    # -- what is timed -------------------------------------------------------------------------------------------------

    def _tokens(self, count: int) -> Tensor:
        """The first tokens of each image, (B, count, C)."""
        tokens = self.everything.dense()[:, :count].contiguous()
        torch._dynamo.maybe_mark_dynamic(tokens, 1)
        return tokens

    def _open(self, part: Callable[[Tensor], Any], example: Tensor, free: Mapping[int, str] | None = None) -> Any:
        return run_module(self.runtime, self.precision, _Part(self.backbone.model, part), example, free)

    def _forward(self, reductions: Mapping[int, Reduction]) -> Call:
        model = self.backbone.model
        reduced = VWTokenizer(model, schedule=reductions, check=False) if reductions else model
        images = self.images.float()
        return partial(run_in(self.runtime, self.precision, reduced, images), images)

    def _ends(self) -> dict[Any, Call]:
        every = self._tokens(self.counts[-1])
        return {
            "embed": partial(self._open(self._embed, self.images), self.images),
            "head": partial(self._open(self._head, every), every),
        }

    def _blocks(self) -> dict[Any, Call]:
        calls: dict[Any, Call] = {}
        for name, part in (("block", self._block), ("attention", self._attention), ("counting", self._counting)):
            run = self._open(part, self._tokens(self.counts[-1]), FREE)
            calls |= {(name, count): partial(run, self._tokens(count)) for count in self.counts}
        return calls

    def _groups(self) -> Iterator[dict[Any, Call]]:
        """What is timed together, by its place in the profile; opened when its turn comes, as each holds the weights.

        In torch, where all have the same weights, everything is one group.
        """
        reduced = [(("forward", index), made) for index, made in enumerate(self.checks + self.fitted) if made]
        if self.runtime == "torch":
            yield self._ends() | self._blocks() | {name: self._forward(made) for name, made in reduced}
            return
        yield self._ends() | self._blocks()
        for name, made in reduced:
            yield {name: self._forward(made)}

    def measure(self, runs: int, progress: bool) -> dict[Any, float]:
        """Milliseconds of each part, the median of its runs: "embed", "head", and by name and count, or index.

        Everything is timed beside the full model, in whose latency the groups agree.
        """
        full, fulls = self._forward({}), []
        parts: dict[Any, float] = {}
        single = self.runtime == "torch"
        number = 1 if single else len(self.checks + self.fitted)
        for group in progress_bar(
            self._groups(), desc="parts", total=number, unit="part", show=progress and not single
        ):
            own, *others = self._time([full, *group.values()], runs, progress and single)
            fulls.append(own)
            parts |= {name: other / own for name, other in zip(group, others, strict=True)}
        whole = float(np.median(fulls))
        return {("forward", 0): whole} | {name: whole * ratio for name, ratio in parts.items()}

    @torch.inference_mode()
    def _time(self, calls: Sequence[Call], runs: int, progress: bool) -> list[float]:
        """Milliseconds of calls, interleaved: the median of the runs of each."""
        groups: list[Calls] = [{"run": _ignoring_item(call)} for call in calls]
        seconds = interleave(groups, 1, runs, device=self.device, warmup=1, seed=self.seed, progress=progress)
        return [1e3 * float(np.median(timed["run"])) for timed in seconds]


class _Part(nn.Module):
    """A part of a model as a module of one input, which runtimes take."""

    def __init__(self, model: nn.Module, part: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.model, self.part = model, part  # the weights are the model's
        self.training = model.training

    def forward(self, inputs: Tensor) -> Any:
        """See above."""
        return self.part(inputs)


def _ignoring_item(call: Call) -> Callable[[int], Any]:
    return lambda item: call()


class _Draw:
    """Draws schedules of one to three reductions for a model of so many patches."""

    def __init__(self, backbone: Backbone, patches: int, seed: int) -> None:
        self.depth, self.patches, self.rng = backbone.depth, patches, random.Random(seed)
        self.blocks = range(self.depth - backbone.reads_prefix_only)  # in which a reduction happens

    def spread(self, kinds: Sequence[Sequence[str]]) -> list[dict[int, Reduction]]:
        """One of each of these kinds, that leave from all to `LEAST` of the tokens on average."""
        found = []
        for among, share in zip(kinds, np.linspace(1, LEAST, len(kinds) + 1)[1:], strict=True):
            drawn = [made for made in (self._one(among) for _ in range(DRAWN)) if made]
            if drawn:  # else there are too few blocks or patches
                found.append(min(drawn, key=lambda made: abs(self._left(made) - share)))
        return found

    def _one(self, kinds: Sequence[str]) -> dict[int, Reduction] | None:
        """A schedule; None where the model cannot do what was drawn."""
        blocks = self.rng.sample(self.blocks, min(len(self.blocks), self.rng.randint(1, 3)))
        made = {b: KINDS[self.rng.choice(kinds)](self.rng.uniform(0.05, 0.65)) for b in sorted(blocks)}
        entering = patches_entering(made, self.depth, self.patches)
        able = all(1 <= what.wanted(entering[b]) <= what.most(entering[b]) for b, what in made.items())
        return made if able else None

    def _left(self, reductions: Mapping[int, Reduction]) -> float:
        """The share of the patch tokens that the halves of the blocks see, mean over these."""
        entering = patches_entering(reductions, self.depth, self.patches)
        return sum(entering[:-1] + entering[1:]) / (2 * self.depth * self.patches)
