"""The check that an adapter's parts of a model, put together, are the model.

Without it, a subclass with another forward pass, or a new release of timm that computes otherwise, would give wrong
results silently. So the parts are compared with the model itself when it is wrapped.
"""

import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vwt.errors import ModelError
from vwt.models.backbone import Backbone
from vwt.models.hooks import with_hooks
from vwt.tokens.attention import run_blocks
from vwt.tokens.packing import Packed

# Parts run the same operations in the same order; only where a rotation is computed anew are they rounded otherwise.
TOLERANCE = 1e-4


COARSE = 0.05  # float16 and bfloat16


_LOCK = threading.Lock()  # one check at a time: modes and the stance of torch.compile are set and restored


@torch.no_grad()
def check_parts(backbone: Backbone) -> None:
    """Compare embedding, blocks, their halves and the head with what the model computes of one random image.

    It costs two forwards of that image. Random numbers, gradients, modes and buffers are left as they are, and nothing
    happens to a model on the `meta` device, which computes nothing. Other threads may call the model meanwhile.

    Raises:
        ModelError: where they differ; it names the first part that does.
    """
    model = backbone.model
    if any(parameter.is_meta for parameter in model.parameters()):
        return
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(1, *backbone.input_shape, generator=generator, device="cpu").to(backbone.weight)
    with (
        _LOCK,
        _evaluating(model),
        torch.autocast(images.device.type, enabled=False),
        torch.compiler.set_stance("force_eager"),
    ):
        part = _first_difference(backbone, images)
    if part is not None:
        kind, family = type(model), type(backbone.family).MODEL
        raise ModelError(
            f"{kind.__module__}.{kind.__name__} does not compute what vwt makes of the parts of a "
            f"{family.__module__}.{family.__name__}: they part in {part}; wrap a model with that forward pass, or, if "
            "it is timm's own, report the versions of timm and torch"
        )


def _first_difference(backbone: Backbone, images: Tensor) -> str | None:
    """The first part that computes something else of images (1, C, H, W) than the model does, in words."""
    blocks, count = backbone.blocks, backbone.depth
    with _recording(blocks) as calls:
        expected = backbone.family.forward(images)
    packed, words = backbone.pack_all(images)
    packed = backbone.pre_norm(packed)
    before, kinds = packed.dense(), set()
    for index, block in enumerate(blocks):
        if len(calls[index]) != 1:
            return f"block {index} of {count}, which its forward pass does not call once"
        entered, left = calls[index][0]
        if not _same(before, entered):
            return f"what enters block {index} of {count}" if index else "what enters the first block"
        packed = packed.replace(entered.flatten(0, 1))
        alike = _same(with_hooks(block, partial(_run_halves, backbone, block, packed))(entered), left)
        if type(block) not in kinds:  # what differs between blocks of one kind is in their halves
            kinds.add(type(block))
            alike = alike and _same(backbone.run(packed, start=index, stop=index + 1)[0].dense(), left)
        if not alike:
            return f"block {index} of {count} ({type(block).__name__})"
        before = left
    head = backbone.head(backbone.final_norm(packed.replace(before.flatten(0, 1))), words)
    return None if _same(head, expected) else "the norm after the blocks or the head"


def _run_halves(backbone: Backbone, block: nn.Module, packed: Packed, tokens: Tensor) -> Tensor:
    """Tokens (1, n, C) in the place of those that are packed through both halves of a block."""
    packed = packed.replace(tokens.flatten(0, 1))
    for half in backbone.halves(block):
        packed = run_blocks(half, packed)
    return packed.dense()


@contextmanager
def _recording(blocks: list[nn.Module]) -> Iterator[list[list[tuple[Any, Any]]]]:
    """What enters and what leaves each block with its hooks, call by call, in this thread only.

    As copies, since a model may write into its tokens.
    """
    calls: list[list[tuple[Any, Any]]] = [[] for _ in blocks]
    thread = threading.get_ident()

    def watch(block: nn.Module, own: list[tuple[Any, Any]]) -> Iterator[Any]:
        # A call in another thread that is under way when a hook is set or removed may give it no options.
        def before(block: nn.Module, arguments: Any, options: Any = None) -> None:
            if threading.get_ident() == thread:
                own.append((_copy(arguments[0] if arguments else next(iter(options.values()))), None))

        def after(block: nn.Module, arguments: Any, output: Any) -> None:
            if threading.get_ident() == thread:
                own[-1] = (own[-1][0], _copy(output[0] if isinstance(output, tuple) else output))

        yield block.register_forward_pre_hook(before, with_kwargs=True, prepend=True)
        yield block.register_forward_hook(after)

    with ExitStack() as stack:
        for block, own in zip(blocks, calls, strict=True):
            for handle in watch(block, own):
                stack.callback(handle.remove)
        yield calls


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _same(output: Any, expected: Any) -> bool:
    """Whether tensors, or what holds tensors, agree in shape and, but for rounding, in value."""
    if isinstance(expected, Tensor):
        if not isinstance(output, Tensor) or (output.shape, output.dtype) != (expected.shape, expected.dtype):
            return False
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
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode
