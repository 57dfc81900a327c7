"""KL divergence and agreement between a full and a reduced model, on unlabelled images."""

import copy
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vwt.datasets import ImageSource
from vwt.errors import ArgumentError, DataError
from vwt.models.spec import family_of, prepare
from vwt.progress import progress_bar, say
from vwt.reductions.reduction import Reduction
from vwt.strategies.strategy import Strategy
from vwt.tokenizer import VWTokenizer
from vwt.tokens.attention import run_blocks
from vwt.tokens.packing import Packed
from vwt.tokens.words import Words, keep_all

BATCH = 16


LEAST = 16  # images


ENOUGH = 256  # images, unless told otherwise


SHARPNESS, NEVER = 100.0, -1e4  # logits of embeddings: the scale of CLIP's, and that of an image for itself


def load_images(
    source: str | os.PathLike[str], model: nn.Module, count: int = ENOUGH, *, seed: int = 0, progress: bool = True
) -> Tensor:
    """Images (n, C, H, W) of a data set, drawn at random and normalised for the model, on its device.

    Args:
        source: anything that timm's dataset factory reads, see `vwt.datasets.ImageSource`.
        model: of timm or transformers.
        count: how many; fewer if there are not as many.
        seed: of the draw.
        progress: show a progress bar.

    Raises:
        DataError: if there is no such data set, or it has less than 16 images that can be read.
    """
    say(f"reading {count} images of {os.fspath(source)}", progress)
    images = ImageSource(os.fspath(source), model).sample(count, seed=seed, progress=progress)
    if len(images) < LEAST:
        if count < LEAST:
            raise ArgumentError(f"{count} images are asked for; calibration needs at least {LEAST}")
        raise DataError(f"{source} has {len(images)} images that can be read; calibration needs at least {LEAST}")
    return prepare(images, model)


@dataclass(frozen=True)
class Fidelity:
    """KL divergence and agreement of a reduced model with the full one.

    Attributes:
        kl: (n,) KL(full ‖ reduced) of the class distributions of each image, in nats.
        agrees: (n,) bool, whether the first class is the same.

    A model without classes is given some, see `Calibration`.
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


def check_enough(images: Tensor) -> None:
    """Raise ArgumentError for less than 16 images."""
    if len(images) < LEAST:
        raise ArgumentError(f"{len(images)} calibration images; expected at least {LEAST}")


def compare(full: Tensor, reduced: Tensor) -> Fidelity:
    """KL divergence and agreement of logits (n, classes) of the full and the reduced model."""
    target, own = full.float().log_softmax(-1), reduced.float().log_softmax(-1)
    kl = F.kl_div(own, target, reduction="none", log_target=True).sum(-1)
    return Fidelity(kl, full.argmax(-1) == reduced.argmax(-1))


@dataclass(frozen=True, eq=False)
class _Batch:
    """Images whose tokens enter the first block, and, where they are kept, each other block."""

    words: Words
    entering: list[Packed]


class Calibration:
    """A model with calibration images, on which strategies and reductions are compared with the full model.

    For a model that only embeds images (a timm model without classifier, a vision tower of transformers) the other
    images are the classes: the logits of an embedding are 100 times its cosines with the full model's embeddings of
    these, as CLIP compares an image with labels. Two embeddings agree where the same image is nearest.

    Args:
        model: see `VWTokenizer`, in eval mode.
        images: (n, C, H, W), normalised for the model, on its device; in a random order, if only the first are used.
        keep: of so many of the first images, the tokens that enter every block are kept, which spares time.
        progress: show a progress bar.

    Raises:
        ArgumentError: for less than 16 images, a model in train mode, one of images and text, or one that answers with
            neither logits nor embeddings.
        ImageError: for images that the model does not take.
    """

    def __init__(self, model: nn.Module, images: Tensor, *, keep: int = 0, progress: bool = True) -> None:
        check_enough(images)
        if model.training:
            raise ArgumentError("the model is in train mode; call .eval() first")
        self.images, self.keep = images, keep
        self._enter(VWTokenizer(model))
        self.backbone.check_alone()
        self.backbone.check(images)
        self.family = family_of(model)
        self._anchors: Tensor | None = None
        with torch.inference_mode():
            batches = progress_bar(images.split(BATCH), desc="the model itself", unit="batch", show=progress)
            vectors = [self.family.vectors(model(batch)) for batch in batches]
            if vectors[0].ndim != 2 or vectors[0].shape[1] < 2:
                raise ArgumentError(
                    f"the model's output has shape {tuple(vectors[0].shape)}; expected logits of classes, or embeddings"
                )
            if not self.family.has_classes:
                self._anchors = _unit(torch.cat(vectors))
            self.full = [self._logits(own, index) for index, own in enumerate(vectors)]

    def _logits(self, vectors: Tensor, index: int) -> Tensor:
        """Of one batch, logits as they are; or of embeddings (n, D), those of being like each other image."""
        if self._anchors is None:
            return vectors
        logits = SHARPNESS * _unit(vectors) @ self._anchors.T
        logits.diagonal(index * BATCH).fill_(NEVER)
        return logits

    def _enter(self, fast: VWTokenizer) -> None:
        self.fast, self.backbone = fast, fast.backbone
        self._batches: list[_Batch] = []

    def with_strategy(self, strategy: Strategy) -> "Calibration":
        """The same images, reduced before the blocks."""
        other = copy.copy(self)
        other._enter(VWTokenizer(self.fast.model, strategy, check=False))  # as it was by the first
        other.keep = 0
        return other

    def _batch(self, index: int) -> _Batch:
        """Computed when first asked for."""
        while len(self._batches) <= index:
            start = len(self._batches) * BATCH
            packed, words = self.fast.pack(self.images[start : start + BATCH])
            entering = [self.backbone.pre_norm(packed)]
            for block in range(self.backbone.depth - 1 if start < self.keep else 0):
                entering.append(self.backbone.run(entering[-1], start=block, stop=block + 1)[0])
            self._batches.append(_Batch(words, entering))
        return self._batches[index]

    @torch.inference_mode()
    def patches(self, images: int | None = None) -> float:
        """Patch tokens that enter the first block, mean over the first images or all."""
        counts = [self._batch(index).words.counts for index in self._range(images)]
        return float(torch.cat(counts).float().mean())

    def _range(self, images: int | None) -> range:
        return range(len(self.full) if images is None else min(len(self.full), -(-images // BATCH)))

    @torch.inference_mode()
    def evaluate(self, reductions: Mapping[int, Reduction], images: int | None = None) -> Fidelity:
        """What reductions change, on the first images or on all."""
        reduced = []
        for index in self._range(images):
            batch = self._batch(index)
            start = min(min(reductions, default=self.backbone.depth), len(batch.entering) - 1)
            answer = self.backbone.classify(batch.entering[start], batch.words, reductions, start)
            reduced.append(self._logits(self.family.vectors(answer), index))
        return compare(torch.cat(self.full[: len(reduced)]), torch.cat(reduced))

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
            labels: (n,) classes of the images, if the model has classes; without, agreement with the full model is
                measured.
            seed: of what is removed.
            progress: show a progress bar.

        Raises:
            ArgumentError: for counts that there are not, or labels that do not fit.
        """
        if not 0 <= block < self.backbone.depth:
            raise ArgumentError(f"block is {block}; expected an index from 0 to {self.backbone.depth - 1}")
        rows, columns = self.backbone.grid((self.images.shape[2], self.images.shape[3]))
        prefix, most = self.backbone.prefix, self.backbone.prefix + rows * columns
        if self.fast.strategy is not None or not counts or not all(prefix < count <= most for count in counts):
            raise ArgumentError(
                f"counts are {list(counts)}; expected some of {prefix + 1} to {most}, without a strategy"
            )
        if labels is not None and self._anchors is not None:
            raise ArgumentError("labels are given, and the model has no classes; leave them out")
        if labels is not None and labels.shape != (len(self.images),):
            raise ArgumentError(f"labels have shape {tuple(labels.shape)}; expected ({len(self.images)},)")
        generator = torch.Generator().manual_seed(seed)
        attention, mlp = self.backbone.halves(self.backbone.blocks[block])
        right: dict[int, list[Tensor]] = {count: [] for count in counts}
        for index, full in enumerate(progress_bar(self.full, desc="removing at random", unit="batch", show=progress)):
            own = slice(index * BATCH, index * BATCH + len(full))
            target = full.argmax(-1) if labels is None else labels[own].to(full.device)
            packed, _ = self.backbone.run(self._batch(index).entering[0], stop=block)
            packed = run_blocks(attention, packed)
            order = torch.rand(len(full), most - prefix, generator=generator).argsort(dim=1) + prefix
            for count in counts:
                chosen = F.pad(order[:, : count - prefix].sort(dim=1).values, (prefix, 0))
                chosen[:, :prefix] = torch.arange(prefix)
                left = run_blocks(mlp, packed.take(chosen.to(full.device)))
                packed_left, _ = self.backbone.run(left, start=block + 1)
                words = keep_all(len(full), (1, count - prefix), full.device)  # as if there had been no others
                answer = self.backbone.head(self.backbone.final_norm(packed_left), words)
                right[count].append(self._logits(self.family.vectors(answer), index).argmax(-1) == target)
        return {count: float(torch.cat(flags).float().mean()) for count, flags in right.items()}


def _unit(vectors: Tensor) -> Tensor:
    return F.normalize(vectors.float(), dim=-1)
