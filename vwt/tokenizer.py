"""VWTokenizer: a model of timm or transformers that sees fewer tokens."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from timm.models import group_parameters
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vwt.errors import ArgumentError
from vwt.models.backbone import Backbone
from vwt.models.checking import check_parts
from vwt.models.family import Embedded
from vwt.models.layers import Layers, blocks_read, encode_layers, join_reductions
from vwt.models.spec import PatchSpec
from vwt.reductions.kinds import check_amounts
from vwt.reductions.reducing import Step, follow
from vwt.reductions.reduction import Reduction, patches_entering
from vwt.strategies.strategy import Strategy
from vwt.tokens.packing import Packed
from vwt.tokens.patches import patchify
from vwt.tokens.words import Words

# Methods of the model that mean the same on the wrapper. Those that compute are not among them: the model's own would
# silently run on all tokens.
_DELEGATED = frozenset({"get_classifier", "reset_classifier", "set_grad_checkpointing"})


class VWTokenizer(nn.Module):
    """Wraps a Vision Transformer and reduces its tokens before the first block, and inside the blocks.

    It answers like the model: the same images, the same output, attributes and state dict. The model is not changed,
    and can be used beside it. Load weights before wrapping: that is when a codebook is checked against them.

    Args:
        model: of one of the families in `vwt.models.families.FAMILIES` (timm) or `vwt.models.hf.TOWERS` (transformers).
        strategy: which patches make which token (`Neighbours`, `InterImage`, `IntraImage`); None reduces nothing, and
            returns what the model returns, bit for bit.
        schedule: which blocks make still fewer of them (`PruningSchedule`, or any mapping from blocks to reductions);
            None or an empty one leaves them alone. An image with too few tokens for it, as a strategy that gives each
            its own number may leave, loses as many as it can.
        after: a reduction of the image tokens that a language model reads in its prompt (LLaVA, PaliGemma), by the
            attention of the last block of the vision tower; of these models only.
        check: compare the parts of the model with the model itself on one random image, which takes little more than
            one forward; not on the `meta` device.

    Raises:
        ModelError: if the model is not supported, or does not compute what its parts do.
        ArgumentError: if the schedule is for more blocks or tokens than there are.
        MismatchError: if the strategy's codebook was made for another model.

    >>> fast = VWTokenizer(model, InterImage(codebook, threshold=0.1))  # doctest: +SKIP
    >>> logits = fast(images)  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        strategy: Strategy | None = None,
        schedule: Mapping[int, Reduction] | None = None,
        *,
        after: Reduction | None = None,
        check: bool = True,
    ) -> None:
        super().__init__()
        if isinstance(model, VWTokenizer):
            raise ArgumentError("the model is wrapped already; wrap its .model with the new strategy")
        if strategy is not None and (isinstance(strategy, type) or not isinstance(strategy, Strategy)):
            raise ArgumentError(
                f"strategy is {strategy!r}; expected Neighbours(...), InterImage(...), IntraImage(...) or None"
            )
        if not _is_schedule(schedule):
            raise ArgumentError(f"schedule is {schedule!r}; expected vwt.PruningSchedule({{block: tokens to remove}})")
        if not isinstance(after, Reduction | None):
            raise ArgumentError(f"after is {after!r}; expected a reduction, such as vwt.Absorb(0.5)")
        self.backbone = Backbone(model)
        self.family = self.backbone.family
        if check:
            check_parts(self.backbone)
        self.schedule: Mapping[int, Reduction] = schedule or {}
        self.after = after
        check_amounts(self.schedule, self.backbone.depth)
        self._check_after()
        self.backbone.check_reductions(self.schedule)
        self.model: Any = model
        self.strategy: Any = None
        if strategy is not None:
            spec = PatchSpec.of(model)
            self._patch_size = spec.patch_size
            weight = next(model.parameters())
            self.strategy = strategy.bind(spec).to(weight.device)
        self._unwatched = True
        self._checked: int | None = -1
        self.training = model.training  # `train()` would change frozen parts of the model too
        self.register_state_dict_post_hook(_drop_prefix)
        self.register_load_state_dict_pre_hook(_add_prefix)

    def forward(self, images: Tensor | None = None, **options: Any) -> Any:
        """Images (B, C, H, W), normalised for the model, to what `model(images)` would return.

        Models of transformers may be given them as `pixel_values`, as they are themselves, and classifiers `labels`
        too, for a loss. Models of images and text take all else by name, and answer for it: `fast(images,
        input_ids=...)`; they have their other methods beside this one, such as `fast.generate(pixel_values=images)`.
        Those whose language model reads image tokens in its prompt take what their processor gives: `fast(**inputs)`.

        Raises:
            ImageError: for images of the wrong shape, size or dtype.
        """
        if self.family.parent is not None:
            return self._call("forward", images, **options)
        labels = options.pop("labels", None)
        if labels is not None:
            return self.family.with_loss(self.forward(images, **options), labels)
        if images is None or options:
            images = self.family.arguments(images, options)
        images = self.backbone.check(images)
        if self._changes_nothing(images):
            return self.model(images)
        packed, words = self.pack(images)
        answer = self._answer if packed.is_dense else self._answer_uncompiled
        return answer(packed, words)

    def forward_features(self, images: Tensor, unmerge: bool = True) -> Tensor | tuple[Packed, Words]:
        """Images (B, C, H, W) to encoded tokens, after the model's final norm.

        Args:
            images: as in `forward`.
            unmerge: back on the full grid (B, P + N, C), as the model has it: every patch takes the value of its
                token, a dropped patch that of the nearest kept one. False gives the reduced tokens, prefix tokens
                first, and their Words.
        """
        self.backbone.check(images)
        if unmerge and self._changes_nothing(images):
            return self.family.forward_features(images)
        packed, words = self.pack(images)
        packed, steps = self.backbone.encode_packed(packed, self.schedule)
        return self.backbone.to_grid(packed, words, steps) if unmerge else (packed, follow(words, steps))

    def forward_intermediates(
        self,
        images: Tensor,
        indices: int | Sequence[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **options: Any,
    ) -> Any:
        """What the model's method of that name returns: the feature maps that leave some blocks, on the full grid.

        As in `forward_features`, each patch has the value of the token that stands for it at that depth.
        timm's `FeatureGetterNet` calls this.

        Args:
            images: as in `forward`.
            indices: of the blocks; a number for so many last ones, None for all.
            return_prefix_tokens: pairs of a map and the prefix tokens (B, P, C).
            norm: apply the model's final norm to all of them.
            stop_early: run no blocks after the last of them, though the final features are then not final.
            output_fmt: "NCHW" for maps (B, C, rows, columns), "NLC" for patches in row-major order (B, N, C).
            intermediates_only: leave out the final features (B, P + N, C), which come first otherwise.
            options: more that the model's own takes; only where nothing is reduced.

        Raises:
            ArgumentError: for another format, or options that reduced tokens do not know.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ArgumentError(f"output_fmt is {output_fmt!r}; expected 'NCHW' or 'NLC'")
        self.backbone.check(images)
        if self._changes_nothing(images) and hasattr(self.model, "forward_intermediates"):
            return self.model.forward_intermediates(
                images, indices, return_prefix_tokens, norm, stop_early, output_fmt, intermediates_only, **options
            )
        if options:
            raise ArgumentError(
                f"forward_intermediates takes no {', '.join(options)} where tokens are reduced; call it without, or as "
                ".model.forward_intermediates"
            )
        taken, _ = feature_take_indices(self.backbone.depth, indices)
        packed, words = self.pack(images)
        backbone, packed, start = self.backbone, self.backbone.pre_norm(packed), 0
        steps: list[Step] = []
        maps: list[Tensor] = []
        for index in sorted(taken):
            packed, more = backbone.run(packed, self.schedule, start, index + 1)
            steps, start = [*steps, *more], index + 1
            maps.append(backbone.to_grid(backbone.final_norm(packed) if norm else packed, words, steps))
        features: list[Any] = [tokens[:, backbone.prefix :] for tokens in maps]
        if output_fmt == "NCHW":
            features = [patches.mT.unflatten(2, words.grid).contiguous() for patches in features]
        if return_prefix_tokens and backbone.prefix:
            features = [(one, tokens[:, : backbone.prefix]) for one, tokens in zip(features, maps, strict=True)]
        if intermediates_only:
            return features
        if not stop_early:
            packed, more = backbone.run(packed, self.schedule, start)
            steps = [*steps, *more]
        return backbone.to_grid(backbone.final_norm(packed), words, steps), features

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """The model's own head on features of the full grid (B, P + N, C)."""
        return self.model.forward_head(features, pre_logits=pre_logits)

    def tokenize(self, images: Tensor, **options: Any) -> Words:
        """Which patches of images (B, C, H, W) make which token; nothing is encoded.

        Of a model whose language model reads image tokens in its prompt, these are the tokens that it reads, in their
        order, for which the images are encoded.

        Args:
            images: as the model takes them; of LLaVA-NeXT tiles (images, tiles, C, H, W), and the Words are theirs.
            options: what such a model's `get_image_features` takes beside them, such as `image_sizes`.
        """
        whole = self.family.parent
        if whole is not None and whole.reads_layers:
            return whole.call("tokenize", self._encode_layers, {"pixel_values": images, **options})
        self.backbone.check(images)
        self.backbone.check_reducible()
        _, words = self.backbone.pack_all(images) if self.strategy is None else self._reduce(images)
        return words

    def _call(self, method: str, first: Tensor | None = None, **options: Any) -> Any:
        """A method of a model of images and text, which sees fewer tokens of the images."""
        whole = self.family.parent
        assert whole is not None
        name = whole.main_input(method)
        if first is not None and name in options:
            what = "images" if name == "pixel_values" else name
            raise ArgumentError(f"{method} is given {what} twice, first and as {name}; give them once")
        given = options if first is None else {name: first, **options}
        if whole.reads_layers:
            return whole.call(method, self._encode_layers if self._reduces else None, given)
        if given.get("pixel_values") is not None:
            self.backbone.check(given["pixel_values"])
        return whole.call(method, self._encode_images, given)

    def _encode_layers(self, images: Tensor, layers: Layers) -> tuple[list[Tensor], Words]:
        """Hidden states of the vision tower of images (B, C, H, W), on the full grid, and the Words of their tokens."""
        if isinstance(images, Tensor) and images.is_floating_point():  # the tower casts them too
            images = images.to(self.family.projection.weight.dtype)
        packed, words = self.pack(self.backbone.check(images))
        return encode_layers(self.backbone, packed, words, layers, self.schedule, self.after)

    def _check_after(self) -> None:
        """Raise ArgumentError for reductions of what the language model does not read, if there is one."""
        whole = self.family.parent
        if whole is not None and whole.reads_layers:
            join_reductions(self.schedule, self.after, max(blocks_read(whole.layers, self.backbone.depth)))
        elif self.after is not None:
            raise ArgumentError(
                f"after is for models whose language model reads image tokens in its prompt, not for "
                f"{type(self.backbone.model).__name__}; name a block in the schedule"
            )

    def _encode_images(self, images: Tensor) -> tuple[Any, Callable[[], tuple[Tensor, Tensor]] | None]:
        """What the vision tower answers to images (B, C, H, W), and, if they were reduced, what gives their tokens."""
        images = self.backbone.check(images)
        if self._changes_nothing(images):
            return self.family.forward(images), None
        packed, words = self.pack(images)
        packed, steps = self.backbone.encode_packed(packed, self.schedule)
        return self.backbone.head(packed, words, steps), partial(self.backbone.attended, packed, words, steps)

    @property
    def _reduces(self) -> bool:
        return self.strategy is not None or len(self.schedule) > 0 or self.after is not None

    def _changes_nothing(self, images: Tensor) -> bool:
        return images.shape[0] == 0 or not self._reduces

    def pack(self, images: Tensor) -> tuple[Packed, Words]:
        """Images (B, C, H, W) to the tokens that enter the first block, prefix tokens first, and their Words."""
        self.backbone.check_reducible()
        if self.strategy is None:
            packed, words = self.backbone.pack_all(images)
        else:
            embedded, words = self._reduce(images)
            merge_and_pack = self._merge_and_pack_uncompiled if words.count is None else self._merge_and_pack
            packed = merge_and_pack(embedded, words)
        if torch.compiler.is_compiling():
            check_amounts(self.schedule, self.backbone.depth, words.count)
        elif words.count != self._checked or self._unwatched:
            self._check(words)
        return packed, words

    def _check(self, words: Words) -> None:
        """Raise ArgumentError where the schedule cannot be held by so many tokens; say once if nothing is removed."""
        check_amounts(self.schedule, self.backbone.depth, words.count)
        self._checked = words.count  # the next images have as many, as a rule
        if self._unwatched:
            self._watch(words)

    def _watch(self, words: Words) -> None:
        """Say so if the first images lose nothing."""
        if not words.lengths:
            return
        self._unwatched = False
        patches, depth = words.grid[0] * words.grid[1], self.backbone.depth
        idle = [] if self.strategy is None or min(words.lengths) < patches else [type(self.strategy).__name__]
        # Of a model whose head reads prefix tokens only, what the last block would reduce does not happen.
        happens = {b: what for b, what in self.schedule.items() if b < depth - self.backbone.reads_prefix_only}
        if self.schedule and all(patches_entering(happens, depth, n)[-1] == n for n in set(words.lengths)):
            idle.append(repr(self.schedule))
        for what in idle:
            warnings.warn(
                f"{what} removed none of the tokens of the first {len(words.lengths)} images ({patches} patches each), "
                "so that nothing is gained; see VWTokenizer.tokenize(images).counts, and ask for more",
                stacklevel=5,
            )

    def _merge_and_pack(self, embedded: Embedded, words: Words) -> Packed:
        size_exponent = getattr(self.strategy, "size_exponent", 0.0)
        # Without schedule too: reductions are tried on what is packed here (see `vwt.tuning.calibration`).
        sizes = words.sizes if size_exponent or words.kept is None else None
        return self.backbone.pack(embedded, words, sizes, size_exponent)

    def _answer(self, packed: Packed, words: Words) -> Any:
        return self.backbone.classify(self.backbone.pre_norm(packed), words, self.schedule)

    # torch.compile would compile these again for each list of lengths. What runs uncompiled hands on a tensor, of whose
    # length compiled code can be independent.
    _merge_and_pack_uncompiled = torch.compiler.disable(_merge_and_pack)
    _answer_uncompiled = torch.compiler.disable(_answer)

    def _reduce(self, images: Tensor) -> tuple[Embedded, Words]:
        """Tokens with position, not yet merged, and the Words that the strategy makes of them."""
        embedded = self.family.embed(images)
        pixels = self.strategy.space != "embedding"
        features = patchify(images, self._patch_size, embedded.grid) if pixels else embedded.project()
        if not self.strategy.fixed_count and (torch.compiler.is_exporting() or torch.jit.is_tracing()):
            raise ArgumentError(
                f"{type(self.strategy).__name__} gives every image its own number of tokens, which cannot be exported; "
                "export with a strategy that gives all as many (IntraImage), or with None"
            )
        return embedded, self.strategy(features, embedded.grid)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":
                raise
            whole = self.family.parent
            if whole is not None and name in whole.methods:
                return partial(self._call, name)
            value = getattr(self.model, name)
            if name in _OF_PARAMETERS:
                return partial(_OF_PARAMETERS[name], self.model)
            if callable(value) and not isinstance(value, nn.Module) and name not in _DELEGATED:
                raise AttributeError(
                    f"VWTokenizer does not pass on {name!r}: the model's own {type(self.model).__name__}.{name} knows "
                    f"nothing of reduced tokens; where that is meant, call it as .model.{name}"
                ) from None
            return value


def _no_weight_decay(model: Any) -> set[str]:
    return {f"model.{name}" for name in model.no_weight_decay()}


def _group_matcher(model: Any, coarse: bool = False) -> Callable[[str], int]:
    layers = group_parameters(model, model.group_matcher(coarse=coarse), reverse=True)
    return lambda name: layers[name.removeprefix("model.")]


# Methods of the model that speak of its parameters by name, as timm's optimizers ask for them: here these names begin
# with "model.".
_OF_PARAMETERS: dict[str, Callable[..., Any]] = {
    "no_weight_decay": _no_weight_decay,
    "group_matcher": _group_matcher,
}


def _drop_prefix(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """State dicts have the model's own names, with or without the wrapper."""
    for name in [n for n in state if n.startswith(prefix + "model.")]:
        state[prefix + name.removeprefix(prefix + "model.")] = state.pop(name)


def _add_prefix(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
    names = module.model.state_dict(keep_vars=True)  # type: ignore[union-attr]
    for name in [n for n in state if n.removeprefix(prefix) in names]:
        state[prefix + "model." + name.removeprefix(prefix)] = state.pop(name)


def _is_schedule(schedule: object) -> bool:
    """Whether it maps blocks to reductions; a bare number of tokens, which `PruningSchedule` takes, is none."""
    if not isinstance(schedule, Mapping):
        return schedule is None
    return all(isinstance(block, int) and isinstance(what, Reduction) for block, what in schedule.items())
