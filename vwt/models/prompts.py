"""Prompts whose image placeholders are cut to the image tokens that are left."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vwt.errors import ArgumentError

# What a processor gives for each token of a prompt, (B, L), and what pads it; `input_ids` are padded with the model's
# own token for that.
PADDING: Mapping[str, int] = {
    "input_ids": 0,
    "attention_mask": 0,
    "position_ids": 0,
    "token_type_ids": 0,
    "mm_token_type_ids": 0,
    "labels": -100,
}


def cut_prompts(inputs: Mapping[str, Any], kept: Tensor, placeholder: int, padding: int) -> dict[str, Any]:
    """Prompts without the placeholders of image tokens that are gone.

    Padding is made anew, on the side on which the prompts had it; on the left, as for generation, where they had none.

    Args:
        inputs: `input_ids` (B, L) and, of the same shape, whatever else of `PADDING` there is; other inputs stay.
        kept: (F,) bool, which of the placeholders stay, prompt after prompt.
        placeholder: the token that stands for each image feature.
        padding: the token that pads prompts.

    Raises:
        ArgumentError: if there are not as many placeholders as image features, or an input has another shape.
    """
    ids = inputs["input_ids"]
    own = {name: value for name, value in inputs.items() if name in PADDING and value is not None}
    for name, value in own.items():
        if not isinstance(value, Tensor) or value.shape != ids.shape:
            shape = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
            raise ArgumentError(
                f"{name} is {shape}, input_ids are {tuple(ids.shape)}; expected one for each token of the prompt, as "
                "the processor gives them"
            )
    image = ids == placeholder
    found = int(image.sum())
    if found != kept.shape[0]:
        raise ArgumentError(
            f"the prompt has {found} image tokens, the images have {kept.shape[0]} features; make both with the "
            "model's processor, one placeholder (such as '<image>') for each image"
        )
    mask = own.get("attention_mask")
    keep, right = _without_padding(image, mask)
    keep[image] = kept.to(keep.device)
    lengths = keep.sum(dim=1)
    width = int(lengths.max()) if len(lengths) else 0
    if mask is None and bool((lengths < width).any()):
        own["attention_mask"] = torch.ones_like(ids)
    # A stable sort moves what is kept to one side, in its order.
    if right:
        columns = keep.long().argsort(dim=1, descending=True, stable=True)[:, :width]
    else:
        columns = keep.long().argsort(dim=1, stable=True)[:, keep.shape[1] - width :]
    real = keep.gather(1, columns)
    fill = {**PADDING, "input_ids": padding}
    cut = {name: torch.where(real, value.gather(1, columns), fill[name]) for name, value in own.items()}
    return {**inputs, **cut}


def _without_padding(image: Tensor, mask: Tensor | None) -> tuple[Tensor, bool]:
    """Tokens (B, L) that are no padding, and whether padding is on the right."""
    if mask is None:
        return torch.ones_like(image), False
    attended = mask != 0
    after_first = attended.long().cumsum(1) > 0
    before_last = attended.flip(1).long().cumsum(1).flip(1) > 0
    right = bool((~before_last).any()) and not bool((~after_first & before_last).any())
    return (after_first & before_last) | image, right
