"""What reductions see of a block's attention."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vwt.tokens.attention import Attend, attend_explicitly


def attention_received(weights: Tensor, prefix: int) -> Tensor:
    """The attention (B, H, n, n) that each patch receives from all patches, of the strongest head: (B, m) float32."""
    return weights.amax(dim=1)[:, prefix:, prefix:].sum(dim=1, dtype=torch.float32)


def explicitly(seen: list[Tensor], score: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]) -> Attend:
    """Explicit attention that appends to `seen` what is made of query, key, value and weights."""

    def attend(query: Tensor, key: Tensor, value: Tensor, *rest: Any, **options: Any) -> Tensor:
        output, weights = attend_explicitly(query, key, value, *rest, **options)
        seen.append(score(query, key, value, weights))
        return output

    return attend
