"""A ragged batch as the reference implementation of visual words runs it: padded, and its padding masked."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from peers._peer import check_model
from vwt import VWTokenizer
from vwt.errors import ArgumentError


class PadAndMask(nn.Module):
    """A VWTokenizer that pads to the longest image, and masks padding as keys; the answers are those of the packed one.

    Args:
        fast: with a strategy, around a model that `check_model` takes.
    """

    def __init__(self, fast: VWTokenizer) -> None:
        super().__init__()
        check_model(fast.model)
        if fast.strategy is None:
            raise ArgumentError("padding needs a strategy; without one all images have as many tokens")
        self.fast: Any = fast

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, H, W), normalised for the model, to its output (B, classes)."""
        model = self.fast.model
        packed, words = self.fast.pack(images)
        tokens = model.norm_pre(pad_sequence(list(packed.split()), batch_first=True))
        mask = None
        if len(set(words.lengths)) > 1:
            places = torch.arange(tokens.shape[1], device=images.device)
            mask = (places <= words.counts[:, None])[:, None, None]  # (B, 1, 1, n): which keys are tokens
        for block in model.blocks:
            tokens = block(tokens, attn_mask=mask)
        return model.forward_head(model.norm(tokens))
