"""What is needed of a model: embed, blocks, head."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import checkpoint_seq
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from vwt.errors import ArgumentError, ImageError, ModelError
from vwt.models.family import Embedded
from vwt.models.hooks import has_hooks, with_hooks
from vwt.models.spec import family_of
from vwt.reductions.reducing import Step, follow, reduce_after
from vwt.reductions.reduction import Reduction
from vwt.tokens.attention import BlockInputs, Half, run_blocks
from vwt.tokens.packing import Packed, pack, prefix_tokens, unpack
from vwt.tokens.positions import Positions, grid_positions, word_positions
from vwt.tokens.tensors import equal_lengths, lengthen
from vwt.tokens.words import Words, fill, keep_all, merge, sum_words

NOTHING: Mapping[int, Reduction] = MappingProxyType({})


class Backbone:
    """The parts of a model, called one by one; the model itself is not changed.

    Args:
        model: see `vwt.VWTokenizer`.

    Attributes:
        model: the model itself.
        tower: the model that has the blocks: of a model of images and text its vision tower, else the same.

    Raises:
        ModelError: for any other model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.family = family_of(model)
        self.model: Any = model
        self.tower: Any = self.family.model

    @property
    def prefix(self) -> int:
        """Number of prefix tokens: class, distillation and register tokens."""
        return self.family.prefix

    @property
    def blocks(self) -> list[Any]:
        """The transformer blocks, in order."""
        return list(self.family.blocks)

    @property
    def depth(self) -> int:
        """Number of blocks."""
        return len(self.family.blocks)

    def following(self, index: int) -> float:
        """Share of the blocks that come after block `index`, in [0, 1)."""
        return (self.depth - 1 - index) / self.depth

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images that the model was made for."""
        return self.family.input_shape

    @property
    def patches(self) -> int:
        """Patches of such an image."""
        rows, columns = self.grid()
        return rows * columns

    @property
    def weight(self) -> Tensor:
        """Of the patch projection: images have its device and dtype."""
        return self.family.projection.weight

    @property
    def merges_positions(self) -> bool:
        """Whether a token may stand for patches of several places."""
        return self.family.merges_positions

    def grid(self, size: tuple[int, int] | None = None) -> tuple[int, int]:
        """Rows and columns of the patches of images of height and width; of those it was made for by default."""
        return self.family.grid(self.input_shape[1:] if size is None else size)

    # -- what enters the blocks ----------------------------------------------------------------------------------------

    def embed(self, images: Tensor) -> tuple[Tensor, Tensor, tuple[int, int]]:
        """Images (B, C, H, W) to what the blocks will see, before anything is reduced.

        Returns:
            The patch projection's output (B, N, D) without position, the tokens (B, P + N, D) with prefix tokens and
            position, and the grid (rows, columns) of the N patches.
        """
        embedded = self.family.embed(images)
        return embedded.project(), embedded.tokens, embedded.grid

    def pack_all(self, images: Tensor) -> tuple[Packed, Words]:
        """Images (B, C, H, W) to all their tokens, before anything is reduced."""
        embedded = self.family.embed(images)
        tokens = embedded.tokens
        lengths = equal_lengths(tokens.shape[1], images.shape[0])
        places = (
            Positions(embedded.grid, self.prefix, lengths, embedded.rotary) if self.family.needs_positions else None
        )
        packed = Packed(tokens.flatten(0, 1), lengths, places=places)
        return packed, keep_all(images.shape[0], embedded.grid, images.device)

    def pack(self, embedded: Embedded, words: Words, sizes: Tensor | None = None, size_exponent: float = 0.0) -> Packed:
        """Tokens of images to those of their words, prefix tokens first.

        Args:
            embedded: the images.
            words: which of their patches make which token.
            sizes: (T,) float32, patches in each token; None where all are 1.
            size_exponent: exponent of the sizes in proportional attention: a key counts size ** size_exponent times.

        Raises:
            ModelError: where the model needs a place of the grid for each token, and a word has several.
        """
        tokens, prefix = embedded.tokens, self.prefix
        places = self._place(embedded, words) if self.family.needs_positions else None
        return pack(tokens[:, :prefix], merge(tokens[:, prefix:], words), words.lengths, sizes, places, size_exponent)

    def _place(self, embedded: Embedded, words: Words) -> tuple[Positions, Tensor]:
        if words.kept is not None:
            every = Positions(words.grid, self.prefix, (), embedded.rotary)
            return every, grid_positions(words.grid, words.kept.device)[words.kept.flatten()]
        # A token is where the patch is that makes most of it, if there is one, else at the mean of its patches.
        main = (words.weight > 0.5).float()
        has_main = sum_words(main[..., None], words)[:, 0] > 0
        whole = bool(has_main.all())
        if not whole and not self.merges_positions:
            raise self._needs_places(
                "this strategy makes one token of several patches; keep patches (IntraImage, Neighbours)"
            )
        every = Positions(words.grid, self.prefix, (), embedded.rotary, whole=whole)
        weight = torch.where(has_main[words.rows.clamp(min=0)], main, words.weight)
        return every, word_positions(replace(words, weight=weight))

    def _needs_places(self, why: str) -> ModelError:
        return ModelError(
            f"{type(self.model).__name__} adds a bias for the relative position of each two patches, and a token of "
            f"several patches has no single position: {why}"
        )

    def check(self, images: Tensor | None) -> Tensor:
        """The images; raise ImageError, saying what to do, unless the model takes them."""
        if not isinstance(images, Tensor):
            raise ImageError(
                f"images are {type(images).__name__}; expected a torch.Tensor (batch, channels, height, width)"
            )
        channels = self.family.channels
        if images.ndim != 4 or images.shape[1] != channels:
            raise ImageError(
                f"images have shape {tuple(images.shape)}; expected (batch, {channels}, height, width)"
                + ("; add a batch dimension with images[None]" if images.ndim == 3 else "")
            )
        weight = self.weight
        if weight.is_meta:
            raise ModelError(
                f"this {type(self.model).__name__} is on the meta device, without weights; load them, and wrap it then"
            )
        if images.device != weight.device:
            raise ImageError(f"images are on {images.device}, the model is on {weight.device}; move one with .to()")
        autocast = torch.is_autocast_enabled(images.device.type)
        if not images.is_floating_point() or (images.dtype != weight.dtype and not autocast):
            raise ImageError(
                f"images are {images.dtype}, the model is {weight.dtype}; "
                + ("cast one to the other" if images.is_floating_point() else "scale and normalise them for the model")
            )
        self.check_size((images.shape[2], images.shape[3]))
        return images

    def check_size(self, size: tuple[int, int]) -> None:
        """Raise ImageError, saying what to do, unless the model takes images of this height and width."""
        self.family.check_size(size)

    def check_reducible(self) -> None:
        """Raise ModelError if the model itself drops patches at random, as it does in training with patch dropout."""
        if self.family.drops_patches:
            raise ModelError(
                "the model drops patches itself (patch_drop_rate) in train mode; call .eval(), or, to train it "
                "on fewer tokens, create it with patch_drop_rate=0 or set model.patch_drop = torch.nn.Identity()"
            )

    def check_alone(self) -> None:
        """Raise ArgumentError for a model of images and text, of which only the vision tower can be measured."""
        if self.family.parent is not None:
            kind = type(self.model).__name__
            raise ArgumentError(
                f"{kind} is a model of images and text; measure its vision tower, "
                f"model.{self.family.parent.tower}, and give what is found to VWTokenizer({kind}, ...)"
            )

    def check_reductions(self, reductions: Mapping[int, Reduction]) -> None:
        """Raise ModelError if the blocks cannot make fewer tokens of theirs."""
        if reductions and not self.merges_positions:
            raise self._needs_places("leave the schedule empty")

    # -- the blocks ----------------------------------------------------------------------------------------------------

    def encode(self, tokens: Tensor) -> Tensor:
        """Tokens (B, n, D) through the norm before the blocks, the blocks and the norm after them."""
        return self.family.final_norm(self._run(self.blocks, self.family.pre_norm(tokens)))

    def encode_packed(self, packed: Packed, reductions: Mapping[int, Reduction] = NOTHING) -> tuple[Packed, list[Step]]:
        """The same for packed sequences of any number of tokens; every image as if alone.

        Args:
            packed: the sequences.
            reductions: by the index of the block inside which they happen, between attention and MLP.

        Returns:
            The encoded sequences, and for each reduction how its tokens became fewer.
        """
        packed, steps = self.run(self.pre_norm(packed), reductions)
        return self.final_norm(packed), steps

    def pre_norm(self, packed: Packed) -> Packed:
        """Tokens through the norm before the blocks."""
        return packed.replace(self.family.pre_norm(packed.values))

    def final_norm(self, packed: Packed) -> Packed:
        """Tokens through the norm after the blocks."""
        return packed.replace(self.family.final_norm(packed.values))

    def run(
        self, packed: Packed, reductions: Mapping[int, Reduction] = NOTHING, start: int = 0, stop: int | None = None
    ) -> tuple[Packed, list[Step]]:
        """Tokens through the blocks from `start` to before `stop`; see `encode_packed`."""
        return self._run_and_then(packed, reductions, start, stop, None)

    def _run_and_then(
        self, packed: Packed, reductions: Mapping[int, Reduction], start: int, stop: int | None, then: Half | None
    ) -> tuple[Packed, list[Step]]:
        """The same, and then through what is given, if anything."""
        steps: list[Step] = []
        blocks = self.blocks[:stop]
        if packed.images == 0:
            return packed, steps
        self.check_reductions(reductions)
        one_by_one = self._one_by_one(packed)
        first: Half | None = None  # the rest of a block whose tokens became fewer: it runs with the blocks that follow
        for index in sorted(index for index in reductions if start <= index < len(blocks)):
            packed = run_blocks(partial(self._run, blocks[start:index], before=first), packed, one_by_one=one_by_one)
            packed, step, first = self._reduce_in(index, packed, reductions[index], one_by_one)
            steps.append(step)
            start = index + 1
        rest = partial(self._run, blocks[start:], before=first, after=then)
        return run_blocks(rest, packed, one_by_one=one_by_one), steps

    def _reduce_in(
        self, index: int, packed: Packed, reduction: Reduction, one_by_one: bool
    ) -> tuple[Packed, Step, Half | None]:
        """Tokens through block `index`, in which they become fewer; what is left to do of it comes last.

        Its hooks are called once, with (B, n, C), or (1, T, C) where images differ in their tokens.
        """
        block, following = self.blocks[index], self.following(index)
        attention, mlp = self.halves(block)
        if not has_hooks(block):
            return *reduce_after(attention, packed, reduction, self.prefix, following, one_by_one=one_by_one), mlp
        reduced: list[tuple[Packed, Step]] = []

        def forward(tokens: Tensor) -> Tensor:
            entering = packed.replace(tokens.flatten(0, 1))
            fewer, step = reduce_after(attention, entering, reduction, self.prefix, following, one_by_one=one_by_one)
            reduced.append((run_blocks(mlp, fewer, one_by_one=one_by_one), step))
            return _as_batch(reduced[0][0])

        tokens = with_hooks(block, forward)(_as_batch(packed))
        return reduced[0][0].replace(tokens.flatten(0, 1)), reduced[0][1], None

    def run_and_reduce(
        self, packed: Packed, index: int, reduction: Reduction, leave: Callable[[Tensor], Tensor]
    ) -> tuple[Packed, Step]:
        """Tokens through block `index` and `leave`, and then reduced by what the block's attention says of them."""

        def whole(tokens: Tensor, inputs: BlockInputs | None) -> Tensor:
            return leave(self._run([self.blocks[index]], tokens, inputs))

        one_by_one = self._one_by_one(packed)
        return reduce_after(whole, packed, reduction, self.prefix, self.following(index), one_by_one=one_by_one)

    def _one_by_one(self, packed: Packed) -> bool:
        """Whether images of different lengths have to run one after another."""
        # Checkpointed blocks run again in the backward pass, when nothing answers their attention image by image.
        recomputed = self.family.checkpoints and torch.is_grad_enabled()
        return not packed.is_dense and (recomputed or not self.family.packable)

    def _run(
        self,
        blocks: list[Any],
        tokens: Tensor,
        inputs: BlockInputs | None = None,
        before: Half | None = None,
        after: Half | None = None,
    ) -> Tensor:
        """Tokens (B, n, D) through blocks, with what these are given beside them, and halves before and after."""
        if before is not None:
            tokens = before(tokens, inputs)
        calls = self.family.calls(blocks, inputs)
        if self.family.checkpoints and blocks:
            tokens = checkpoint_seq(calls, tokens)
        else:
            for call in calls:
                tokens = call(tokens)
        return tokens if after is None else after(tokens, inputs)

    def halves(self, block: Any) -> tuple[Half, Half]:
        """A block up to what follows its attention, and the rest of it."""
        return self.family.halves(block)

    # -- what leaves them ----------------------------------------------------------------------------------------------

    @property
    def reads_prefix_only(self) -> bool:
        """Whether the model's output depends on encoded prefix tokens only."""
        return self.family.pool == "token" and not self.family.returns_features

    def classify(
        self, packed: Packed, words: Words, reductions: Mapping[int, Reduction] = NOTHING, start: int = 0
    ) -> Any:
        """Tokens that enter block `start` to the model's output.

        Where the head reads the prefix tokens only, what is scheduled for the last block does not happen, and nothing
        else goes through the last MLP, unless the block has hooks, which are given all that leaves it.
        """
        if not self.reads_prefix_only:
            packed, steps = self.run(packed, reductions, start)
            return self.head(self.final_norm(packed), words, steps)
        last = self.depth - 1
        block = self.family.blocks[last]
        if has_hooks(block):
            packed, _ = self.run(packed, reductions, start, last)
            prefix, _ = unpack(self.run(packed, start=last)[0], self.prefix)
            return self.family.head(self.family.final_norm(prefix))
        attention, mlp = self.halves(block)
        packed, _ = self._run_and_then(packed, reductions, start, last, attention)
        return self.family.head(self.family.final_norm(mlp(prefix_tokens(packed, self.prefix), None)))

    def to_grid(self, packed: Packed, words: Words, steps: Sequence[Step] = ()) -> Tensor:
        """Encoded tokens to the full grid (B, P + N, C): every patch takes the value of its token.

        Args:
            packed: what `encode_packed` gave.
            words: of the tokens that entered the first block.
            steps: what `encode_packed` gave.
        """
        prefix, merged = unpack(packed, self.prefix)
        return torch.cat([prefix, merged[follow(fill(words), steps).rows]], dim=1)

    def head(self, packed: Packed, words: Words, steps: Sequence[Step] = ()) -> Any:
        """Encoded tokens (see `to_grid`) to the model's output, each weighed by the patches that it stands for.

        The head is the model's own: it pools over one token that already is the pool of all. Where it attends the
        patches, or returns them, it gets them on the full grid.
        """
        pool = self.family.pool
        if not pool:
            full = self.to_grid(packed, words, steps)
            return self.family.head(full, full)
        features = self.to_grid(packed, words, steps) if self.family.returns_features else None
        return self.family.head(self._read(packed, words, steps, pool), features)

    def attended(self, packed: Packed, words: Words, steps: Sequence[Step] = ()) -> tuple[Tensor, Tensor]:
        """Encoded tokens (see `to_grid`) for another model to attend.

        A token counts as often as patches that it stands for, so that attending it is attending the full grid; what
        pads an image stands for none, and log 0 masks it.

        Returns:
            The tokens (B, n, C), n the most of an image, and what is added to the logits of attention (B, 1, 1, n).
        """
        sizes = follow(fill(words), steps).sizes.split(list(lengthen(packed.lengths, -self.prefix)))
        key_size = pad_sequence([F.pad(own, (self.prefix, 0), value=1.0) for own in sizes], batch_first=True)
        tokens = pad_sequence(list(packed.split()), batch_first=True)
        return tokens, key_size.log().to(tokens.dtype)[:, None, None]

    def _read(self, packed: Packed, words: Words, steps: Sequence[Step], pool: str) -> Tensor:
        """What a head that pools reads: prefix tokens, then the pool of all."""
        prefix = prefix_tokens(packed, self.prefix)
        if pool == "token":
            return prefix
        words = follow(fill(words), steps)
        sizes = words.sizes
        if packed.is_dense:
            images = [(packed.dense(), sizes.view(packed.images, packed.lengths[0] - self.prefix))]
        else:
            runs = zip(packed.split(), sizes.split(list(words.lengths)), strict=True)
            images = [(tokens[None], size[None]) for tokens, size in runs]
        skipped = 0 if self.family.pools_prefix else self.prefix
        pooled = torch.cat([_pool(tokens, size, self.prefix, skipped, pool) for tokens, size in images])
        pooled = pooled[:, None].to(packed.values.dtype)
        return torch.cat([prefix[:, :skipped], pooled], dim=1)


def _as_batch(packed: Packed) -> Tensor:
    """(B, n, C), or (1, T, C) where images differ in their tokens."""
    return packed.dense() if packed.is_dense else packed.values[None]


def _pool(tokens: Tensor, sizes: Tensor, prefix: int, skipped: int, kind: str) -> Tensor:
    """Pool tokens (B, P + n, C), of which n have sizes (B, n), over all but `skipped`: (B, C), float32 or wider."""
    sizes = F.pad(sizes, (prefix, 0), value=1.0)[:, skipped:, None]
    tokens = tokens[:, skipped:].to(torch.promote_types(tokens.dtype, torch.float32))
    mean = (tokens * sizes).sum(1) / sizes.sum(1)
    if kind == "avg":
        return mean
    most = tokens.amax(1)
    return most if kind == "max" else 0.5 * (most + mean)
