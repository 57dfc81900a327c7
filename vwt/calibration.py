"""What reductions do to the answers of a model, on unlabelled images."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from vwt.datasets import ImageSource
from vwt.errors import ArgumentError, DataError
from vwt.packing import Packed
from vwt.patches import PatchSpec, normalise
from vwt.pruning import Reduction
from vwt.strategies import Strategy
from vwt.tokenizer import VWTokenizer
from vwt.words import Words

BATCH = 16
LEAST = 16  # images
ENOUGH = 256  # images, unless told otherwise


def load_images(
    source: str | os.PathLike[str], model: nn.Module, count: int = ENOUGH, *, seed: int = 0, progress: bool = True
) -> Tensor:
    """Images (n, C, H, W) of a data set, drawn at random and normalised for the model, on its device.

    Args:
        source: anything that timm's dataset factory reads, see `vwt.datasets.ImageSource`.
        model: of timm.
        count: how many; fewer if there are not as many.
        seed: of the draw.
        progress: show a progress bar.

    Raises:
        DataError: if there is no such data set, or it has less than 16 images that can be read.
    """
    images = ImageSource(os.fspath(source), model).sample(count, seed=seed, progress=progress)
    if len(images) < LEAST:
        raise DataError(f"{source} has {len(images)} images that can be read; calibration needs at least {LEAST}")
    spec, weight = PatchSpec.of(model), next(model.parameters())
    return normalise(images.to(weight.device), spec.mean, spec.std).to(weight.dtype)


@dataclass(frozen=True)
class Fidelity:
    """How near a reduced model is to the full one.

    Attributes:
        kl: (n,) KL(full ‖ reduced) of the class distributions of each image, in nats.
        agrees: (n,) bool, whether the first class is the same.
    """

    kl: Tensor
    agrees: Tensor

    @property
    def mean_kl(self) -> float:
        """Nats, mean over images."""
        return float(self.kl.mean())

    @property
    def agreement(self) -> float:
        """Share of images."""
        return float(self.agrees.float().mean())


def compare(full: Tensor, reduced: Tensor) -> Fidelity:
    """Logits (n, classes) of the full and the reduced model to how near they are."""
    target, own = full.float().log_softmax(-1), reduced.float().log_softmax(-1)
    kl = F.kl_div(own, target, reduction="none", log_target=True).sum(-1)
    return Fidelity(kl, full.argmax(-1) == reduced.argmax(-1))


@dataclass(frozen=True, eq=False)
class _Batch:
    """Images whose tokens enter the first block, and, where they are kept, each other block."""

    words: Words
    entering: list[Packed]
    full: Tensor


class Calibration:
    """A model, what it makes of images, and what reductions change of that.

    Args:
        model: see `vwt.backbones.SUPPORTED`, in eval mode.
        images: (n, C, H, W), normalised for the model, on its device; in a random order, if only the first are used.
        strategy: what is done before the blocks.
        keep: of so many of the first images, the tokens that enter every block are kept, which spares time.
        progress: show a progress bar.

    Raises:
        ArgumentError: for less than 16 images, or a model without classes.
        ImageError: for images that the model does not take.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        strategy: Strategy | None = None,
        *,
        keep: int = 0,
        progress: bool = True,
    ) -> None:
        self.fast = VWTokenizer(model, strategy)
        self.backbone = self.fast.backbone
        self.backbone.check(images)
        if len(images) < LEAST:
            raise ArgumentError(f"{len(images)} calibration images; expected at least {LEAST}")
        if model.training:
            raise ArgumentError("the model is in train mode; call .eval() first")
        self.count = len(images)
        self.batches: list[_Batch] = []
        with (
            torch.inference_mode(),
            tqdm(total=len(images), desc="full model", unit="img", disable=not progress) as bar,
        ):
            for batch in images.split(BATCH):
                self.batches.append(self._begin(batch, whole=len(self.batches) * BATCH < keep))
                bar.update(len(batch))

    def _begin(self, images: Tensor, *, whole: bool) -> _Batch:
        full = self.fast.model(images)
        if full.ndim != 2 or full.shape[1] < 2:
            raise ArgumentError(f"the model's output has shape {tuple(full.shape)}; expected logits (batch, classes)")
        packed, words = self.fast.pack(images)
        entering = [self.backbone.enter(packed)]
        for block in range(self.backbone.depth - 1 if whole else 0):
            entering.append(self.backbone.run(entering[-1], start=block, stop=block + 1)[0])
        return _Batch(words, entering, full)

    @property
    def patches(self) -> float:
        """Patch tokens that enter the first block, mean over images."""
        return float(torch.cat([batch.words.counts for batch in self.batches]).float().mean())

    @torch.inference_mode()
    def evaluate(self, reductions: Mapping[int, Reduction], images: int | None = None) -> Fidelity:
        """What reductions change, on the first images or on all."""
        reduced, full = [], []
        for batch in self.batches[: None if images is None else -(-images // BATCH)]:
            start = min(min(reductions, default=self.backbone.depth), len(batch.entering) - 1)
            reduced.append(self.backbone.answer(batch.entering[start], batch.words, reductions, start))
            full.append(batch.full)
        return compare(torch.cat(full), torch.cat(reduced))

    @torch.inference_mode()
    def removal(
        self,
        block: int,
        counts: Sequence[int],
        labels: Tensor | None = None,
        *,
        seed: int = 0,
        progress: bool = True,
    ) -> dict[int, float]:
        """Accuracy, or agreement with the full model, where patches are removed at random inside a block.

        As in Prune One More Token, section 3.1; but where they are pruned, between attention and MLP, and with the full
        count measured as any other.

        Args:
            block: index.
            counts: tokens that stay, prefix tokens included.
            labels: (n,) classes of the images; without, agreement with the full model is measured.
            seed: of what is removed.
            progress: show a progress bar.

        Raises:
            ArgumentError: for counts that there are not, or labels that do not fit.
        """
        prefix, most = self.backbone.prefix, self.backbone.prefix + self.batches[0].words.group.shape[1]
        if self.fast.strategy is not None or not counts or not all(prefix < count <= most for count in counts):
            raise ArgumentError(
                f"counts are {list(counts)}; expected some of {prefix + 1} to {most}, without a strategy"
            )
        if labels is not None and labels.shape != (self.count,):
            raise ArgumentError(f"labels have shape {tuple(labels.shape)}; expected ({self.count},)")
        generator = torch.Generator().manual_seed(seed)
        attention, mlp = self.backbone.halves(self.backbone.blocks[block])
        right: dict[int, list[Tensor]] = {count: [] for count in counts}
        for index, batch in enumerate(tqdm(self.batches, desc="random removal", unit="batch", disable=not progress)):
            own = slice(index * BATCH, index * BATCH + len(batch.full))
            target = batch.full.argmax(-1) if labels is None else labels[own].to(batch.full.device)
            packed, _ = self.backbone.run(batch.entering[0], stop=block)
            tokens = attention(packed.dense(), None)
            order = (
                torch.rand(len(tokens), most - prefix, generator=generator).argsort(dim=1).to(tokens.device) + prefix
            )
            for count in counts:
                chosen = order[:, : count - prefix].sort(dim=1).values.to(tokens.device)
                patches = tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2]))
                left = mlp(torch.cat([tokens[:, :prefix], patches], dim=1), None)
                packed, _ = self.backbone.run(Packed(left.flatten(0, 1), (count,) * len(left)), start=block + 1)
                logits = self.backbone.model.forward_head(self.backbone.leave(packed).dense())
                right[count].append(logits.argmax(-1) == target)
        return {count: float(torch.cat(flags).float().mean()) for count, flags in right.items()}
