"""The adapter of transformers' BLIP vision tower, which computes its attention explicitly."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.blip.modeling_blip import BlipAttention, BlipEncoderLayer, BlipVisionModel

from vwt.errors import ModelError
from vwt.models.hooks import with_hooks
from vwt.models.tower import Tower
from vwt.models.towers import CLIP_NORMALISATION
from vwt.tokens.attention import BlockInputs, Half, drops_paths


class BlipTower(Tower):
    """BLIP: its attention takes no mask, so that it is called as the fused attention that it amounts to."""

    MODEL = BlipVisionModel
    ABOUT = "BLIP; images of one size"
    BLOCK = BlipEncoderLayer
    PROJECTION = "patch_embedding"
    NORMALISATION = CLIP_NORMALISATION

    def _check_attention(self) -> None:
        for block in self.blocks:
            if type(block) is not BlipEncoderLayer or type(block.self_attn) is not BlipAttention:
                raise ModelError(
                    f"a block of this {type(self.model).__name__} is {type(block).__name__} with "
                    f"{type(block.self_attn).__name__}, which vwt cannot tell where an image ends; expected "
                    "BlipEncoderLayer with BlipAttention"
                )

    @property
    def checkpoints(self) -> bool:
        """Its blocks would see to it themselves, but only their parts are called."""
        return any(block.training and block.gradient_checkpointing for block in self.blocks)

    @property
    def packable(self) -> bool:
        """See `Family`."""
        return not drops_paths(self.blocks)

    def final_norm(self, tokens: Tensor) -> Tensor:
        """See `Family`."""
        return self.tower.post_layernorm(tokens)

    def calls(self, blocks: Sequence[nn.Module], inputs: BlockInputs | None) -> Sequence[Callable[[Tensor], Tensor]]:
        """See `Family`; half after half."""

        def call(block: nn.Module, tokens: Tensor) -> Tensor:
            for half in self.halves(block):
                tokens = half(tokens, inputs)
            return tokens

        return [with_hooks(block, partial(call, block)) for block in blocks]

    def halves(self, block: Any) -> tuple[Half, Half]:
        """See `Family`."""

        def attention(tokens: Tensor, inputs: BlockInputs | None) -> Tensor:
            bias = None if inputs is None else inputs.bias
            return tokens + attend(block.self_attn, block.layer_norm1(tokens), bias)

        def mlp(tokens: Tensor, inputs: BlockInputs | None) -> Tensor:
            return tokens + block.mlp(block.layer_norm2(tokens))

        return attention, mlp

    def pooled(self, tokens: Tensor) -> Tensor:
        """See `Tower`; normed once more."""
        return self.tower.post_layernorm(tokens[:, 0])

    def vectors(self, output: Any) -> Tensor:
        """The mean of what its text models attend."""
        return output[0].mean(dim=1)


def attend(attention: Any, tokens: Tensor, bias: Tensor | None) -> Tensor:
    """BLIP's attention over tokens (b, n, C), fused, with what is added to its logits (b, 1, 1, n)."""
    query, key, value = attention.qkv(tokens).unflatten(-1, (3, attention.num_heads, -1)).permute(2, 0, 3, 1, 4)
    dropout = attention.dropout.p if attention.training else 0.0
    output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias, dropout_p=dropout, scale=attention.scale)
    return attention.projection(output.transpose(1, 2).flatten(2))
