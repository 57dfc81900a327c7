"""The check that an adapter's parts of a model, put together, are the model.

A model whose class has another forward pass than its family, or a new release of timm that computes in another way,
would be wrong without a word. So the parts are compared with the model itself when it is wrapped.
"""

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from vwt.errors import ModelError
from vwt.models.backbone import Backbone
from vwt.tokens.attention import run_blocks
from vwt.tokens.packing import Packed
from vwt.tokens.words import Words

# Parts run the same operations in the same order; only where a rotation is computed anew are they rounded otherwise.
TOLERANCE = 1e-4


COARSE = 0.05  # float16 and bfloat16


# Attributes and views of tensors, which are the same tensors when they are made again.
_FREE = {"__get__", "size", "permute", "transpose", "unbind", "view", "unflatten"}


@torch.no_grad()
def check_parts(backbone: "Backbone") -> None:
    """Compare embedding, blocks, their halves and the head with what the model computes of one random image.

    It costs little more than one forward of the model: what the model has just computed of the very same tensors, the
    parts do not compute again. Random numbers, gradients, modes and buffers are left as they are, and nothing
    happens to a model on the `meta` device, which computes nothing.

    Raises:
        ModelError: where they differ; it names the first block at which they part.
    """
    model = backbone.model
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, *backbone.input_shape, generator=generator, device="cpu").to(
        backbone.family.projection.weight
    )
    with (
        _evaluating(model),
        torch.autocast(images.device.type, enabled=False),
        torch.compiler.set_stance("force_eager"),
    ):
        part = _Comparison(backbone, images).first_difference()
    if part is not None:
        kind, family = type(model), type(backbone.family).MODEL
        raise ModelError(
            f"{kind.__module__}.{kind.__name__} does not compute what vwt makes of the parts of a "
            f"{family.__module__}.{family.__name__}: they part in {part}; wrap a model with that forward pass, or, if "
            "it is timm's own, report the versions of timm and torch"
        )


class _Comparison:
    """One forward of the model, each part of which is compared as soon as the model has computed it.

    Args:
        backbone: the parts.
        images: (1, C, H, W).
    """

    def __init__(self, backbone: "Backbone", images: Tensor) -> None:
        self.backbone, self.images, self.blocks = backbone, images, backbone.blocks
        self.memory = _Memory(images.device.type)
        self.context: Any = None
        self.start: tuple[Packed, Words] | None = None
        self.entered: dict[int, Any] = {}
        self.left: dict[int, Any] = {}
        self.alike: dict[int, bool] = {}
        self.calls: Counter[int] = Counter()
        self.kinds: set[type] = set()

    def first_difference(self) -> str | None:
        """The first part that is not the model's, in words."""
        backbone, count = self.backbone, len(self.blocks)
        with self.memory, self._watching():
            self.context = self.memory.context()
            expected = backbone.family.forward(self.images)
            with self.memory.recalling():
                packed, words = self.start = self.start or self._embed()
                before: Any = packed.dense()
                for index, block in enumerate(self.blocks):
                    if self.calls[index] != 1:
                        return f"block {index} of {count}, which its forward pass does not call once"
                    if not _same(before, self.entered[index]):
                        return f"what enters block {index} of {count}" if index else "what enters the first block"
                    if index not in self.alike:
                        self._compare(packed, index)
                    if not self.alike[index]:
                        return f"block {index} of {count} ({type(block).__name__})"
                    before = self.left[index]
                head = backbone.head(backbone.final_norm(packed.replace(before.flatten(0, 1))), words)
        return None if _same(head, expected) else "the norm after the blocks or the head"

    def _embed(self) -> tuple[Packed, Words]:
        packed, words = self.backbone.pack_all(self.images)
        return self.backbone.pre_norm(packed), words

    @contextmanager
    def _watching(self) -> Iterator[None]:
        """Hooks that call `_before` and `_after` around each block."""
        places = {id(block): index for index, block in enumerate(self.blocks)}

        def before(block: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
            if not self.memory.recalls:
                self._before(places[id(block)], arguments[0] if arguments else next(iter(options.values())))

        def after(block: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
            if not self.memory.recalls:
                self._after(places[id(block)], output[0] if isinstance(output, tuple) else output)

        with ExitStack() as stack:
            for block in self.blocks:
                stack.callback(block.register_forward_pre_hook(before, with_kwargs=True).remove)
                stack.callback(block.register_forward_hook(after).remove)
            yield

    def _before(self, index: int, tokens: Any) -> None:
        """What enters a block; before the first, the embedding is made of the parts."""
        if self.start is None and self.memory.context() == self.context:
            with self.memory.recalling():
                self.start = self._embed()
        self.memory.forget()
        self.entered[index] = tokens

    def _after(self, index: int, tokens: Any) -> None:
        """What left a block; it is compared at once, unless under autocast or the like of the model's own."""
        self.left[index] = tokens
        self.calls[index] += 1
        if self.start is not None and self.memory.context() == self.context:
            packed, _ = self.start
            if getattr(self.entered[index], "shape", None) == packed.dense().shape:
                self._compare(packed, index)
        self.memory.forget()

    def _compare(self, packed: Packed, index: int) -> None:
        """Whether a block's halves make what left it, and, once for each kind of block, the block as a whole.

        What differs between blocks of one kind is in their halves.
        """
        block, left = self.blocks[index], self.left[index]
        packed = packed.replace(self.entered[index].flatten(0, 1))
        with self.memory.recalling():
            halved = packed
            for half in self.backbone.halves(block):
                halved = run_blocks(half, halved)
            self.alike[index] = _same(halved.dense(), left)
        if type(block) not in self.kinds:
            self.kinds.add(type(block))
            with self.memory.recalling():
                whole, _ = self.backbone.run(packed, start=index, stop=index + 1)
                self.alike[index] &= _same(whole.dense(), left)


class _Memory(TorchFunctionMode):
    """Answers a function of the very tensors of which the model has computed it with what it gave then.

    Tensors that were written to since are not the same, so that no figure differs from what would be computed.

    Args:
        device: type of that of the model.

    Attributes:
        recalls: whether it answers; else it notes.
    """

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.recalls = device, False
        # By function and arguments, for each time that they were called: result, its identity, and the arguments, whose
        # memory is nobody else's while they live.
        self.calls: dict[Any, list[tuple[Any, Any, Any]]] = {}
        self.recalled: Counter[Any] = Counter()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        key = None
        if func.__name__ not in _FREE:
            key = _identity((func, args, *kwargs.items(), self._autocast()))
        if self.recalls and key in self.calls:
            results = self.calls[key]
            result, identity, _ = results[self.recalled[key] % len(results)]
            self.recalled[key] += 1
            if identity == _identity(result):
                return result
        result = func(*args, **kwargs)
        if not self.recalls and key is not None and isinstance(result, Tensor | tuple | list):
            identity = _identity(result)
            if identity is not None:
                self.calls.setdefault(key, []).append((result, identity, (args, kwargs)))
        return result

    @contextmanager
    def recalling(self) -> Iterator[None]:
        """Answer, each call of the same arguments in its turn, and note nothing."""
        before, self.recalls = self.recalls, True
        self.recalled.clear()
        try:
            yield
        finally:
            self.recalls = before

    def context(self) -> Any:
        """What else decides what a function of tensors computes: autocast, and modes like this one."""
        return *self._autocast(), len(_get_current_function_mode_stack())

    def _autocast(self) -> tuple[Any, ...]:
        return torch.is_autocast_enabled(self.device), torch.get_autocast_dtype(self.device)

    def forget(self) -> None:
        """Let go of what was noted."""
        self.calls.clear()


def _identity(value: Any) -> Any:
    """What only the same values have, of tensors where they are and how often they were written to; None if unknown."""
    if type(value) is nn.Parameter:
        return None if value.is_inference() else (id(value), value.data_ptr(), value._version)
    if isinstance(value, Tensor):
        if type(value) is not Tensor or value.layout is not torch.strided or value.is_inference():
            return None
        shape, strides = value.shape, value.stride()
        strides = strides[1:] if strides and shape[0] == 1 else strides  # any step leads to a single image
        view = (value.data_ptr(), shape, strides, value.dtype, value.is_conj(), value.is_neg())
        return value.device, view, value._version
    if isinstance(value, tuple | list):
        parts = tuple([_identity(part) for part in value])
        return None if None in parts else parts
    return (type(value), value) if getattr(value, "__hash__", None) is not None else None


def _same(output: Any, expected: Any) -> bool:
    """Whether tensors, or what holds tensors, agree in shape and, but for rounding, in value."""
    if isinstance(expected, Tensor):
        if not isinstance(output, Tensor) or (output.shape, output.dtype) != (expected.shape, expected.dtype):
            return False
        with torch._C.DisableTorchFunction():
            if (known := _identity(output)) is not None and known == _identity(expected):
                return True
        tolerance = COARSE if expected.dtype in (torch.float16, torch.bfloat16) else TOLERANCE
        scale = expected.nan_to_num(0, 0, 0).abs().max().item() if expected.numel() else 0.0
        return torch.allclose(output, expected, rtol=0, atol=tolerance * scale, equal_nan=True)
    if isinstance(expected, Mapping):
        return isinstance(output, Mapping) and all(_same(output.get(name), expected[name]) for name in expected)
    if isinstance(expected, tuple | list):
        return len(output) == len(expected) and all(map(_same, output, expected))
    return bool(output == expected)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and then each module in the mode that it was in."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
