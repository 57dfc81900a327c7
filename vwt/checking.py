"""The check that an adapter's parts of a model, put together, are the model.

A model whose class has another forward pass than its family, or a new release of timm that computes in another way,
would be wrong without a word. So the parts are compared with the model itself when it is wrapped.
"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vwt.errors import ModelError
from vwt.packing import run_blocks

if TYPE_CHECKING:
    from vwt.backbones import Backbone

# Parts run the same operations in the same order; only where a rotation is computed anew are they rounded otherwise.
TOLERANCE = 1e-4
COARSE = 0.05  # float16 and bfloat16


@torch.no_grad()
def check_parts(backbone: "Backbone") -> None:
    """Compare embedding, blocks, their halves and the head with what the model computes of one random image.

    It costs one forward of the model and one of its parts. Random numbers, gradients, modes and buffers are left as
    they are, and nothing happens to a model on the `meta` device, which computes nothing.

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
    # Parts that compute the same in another way differ by more than rounding in mixed precision.
    with _evaluating(model), torch.autocast(images.device.type, enabled=False):
        with _recording(backbone.blocks) as (entered, left):
            expected = backbone.family.forward(images)
        part = _first_difference(backbone, images, entered, left, expected)
    if part is not None:
        kind, family = type(model), type(backbone.family).MODEL
        raise ModelError(
            f"{kind.__module__}.{kind.__name__} does not compute what vwt makes of the parts of a "
            f"{family.__module__}.{family.__name__}: they part in {part}; wrap a model with that forward pass, or, if "
            "it is timm's own, report the versions of timm and torch"
        )


def _first_difference(
    backbone: "Backbone", images: Tensor, entered: dict[int, Any], left: dict[int, Any], expected: Any
) -> str | None:
    """The first part that is not the model's, in words."""
    blocks, family = backbone.blocks, backbone.family
    packed, words = backbone.pack_all(images)
    packed = backbone.enter(packed)
    kinds = set()
    for index, block in enumerate(blocks):
        if index not in left:
            return f"block {index} of {len(blocks)}, which its forward pass does not call once"
        if not _same(packed.dense(), entered[index]):
            return f"what enters block {index} of {len(blocks)}" if index else "what enters the first block"
        halved = packed
        for half in family.halves(block):
            halved = run_blocks(half, halved)
        outputs = [halved]
        if type(block) not in kinds:  # as a whole, once for each kind of block: what differs between them is in halves
            kinds.add(type(block))
            outputs.append(backbone.run(packed, start=index, stop=index + 1)[0])
        if not all(_same(output.dense(), left[index]) for output in outputs):
            return f"block {index} of {len(blocks)} ({type(block).__name__})"
        packed = packed.replace(left[index].flatten(0, 1))
    head = backbone.head(backbone.leave(packed), words)
    return None if _same(head, expected) else "the norm after the blocks or the head"


def _same(output: Any, expected: Any) -> bool:
    """Whether tensors, or what holds tensors, agree in shape and, but for rounding, in value."""
    if isinstance(expected, Tensor):
        if not isinstance(output, Tensor) or output.shape != expected.shape:
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
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def _recording(blocks: list[nn.Module]) -> Iterator[tuple[dict[int, Any], dict[int, Any]]]:
    """What enters and what leaves each block, by index, of those that are called once."""
    entered: dict[int, Any] = {}
    left: dict[int, Any] = {}
    places = {id(block): index for index, block in enumerate(blocks)}

    def record(block: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any], output: Any) -> None:
        index = places[id(block)]
        if index in left or index in entered:
            left.pop(index, None)
            return
        entered[index] = arguments[0] if arguments else next(iter(options.values()))
        left[index] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as stack:
        for block in blocks:
            stack.callback(block.register_forward_hook(record, with_kwargs=True).remove)
        yield entered, left
