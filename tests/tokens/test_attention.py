import pytest
import torch
import torch.nn.functional as F

from tests.reductions.cases import CLOSE, random
from vwt.errors import ArgumentError
from vwt.tokens.attention import attend_explicitly

MASKS = {
    "none": lambda: None,
    "float": lambda: random(6, 6, seed=4),
    "keys": lambda: random(2, 1, 1, 6, seed=4),
    "heads": lambda: random(2, 3, 6, 6, seed=4),
    "bool": lambda: random(2, 1, 6, 6, seed=4).abs().tril() > 0,
    "infinite": lambda: torch.zeros(6, 6).masked_fill(torch.eye(6, dtype=torch.bool), -torch.inf),
}


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("scale", [None, 0.3, 1.0])
def test_explicit_attention_equals_fused_attention(name, scale):
    query, key, value = (random(2, 3, 6, 4, seed=seed) for seed in range(3))
    mask = MASKS[name]()
    output, weights = attend_explicitly(query, key, value, attn_mask=mask, scale=scale)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(query, key, value, mask, scale=scale), **CLOSE)
    torch.testing.assert_close(weights @ value, output, **CLOSE)
    torch.testing.assert_close(weights.sum(-1), torch.ones(2, 3, 6))
    positional, _ = attend_explicitly(query, key, value, mask, 0.0, False, scale, False)
    assert torch.equal(positional, output)


def test_explicit_attention_drops_out_after_the_weights():
    query, key = random(2, 3, 40, 4), random(2, 3, 40, 4, seed=1)
    _, weights = attend_explicitly(query, key, key)
    torch.manual_seed(0)
    dropped, same = attend_explicitly(query, key, torch.eye(40).expand(2, 3, 40, 40), dropout_p=0.25)
    assert torch.equal(same, weights)
    gone = dropped == 0
    assert 0.2 < gone.float().mean() < 0.3
    torch.testing.assert_close(dropped[~gone], weights[~gone] / 0.75)


@pytest.mark.parametrize("options", [{"is_causal": True}, {"enable_gqa": True}])
def test_causal_and_grouped_attention_is_refused(options):
    with pytest.raises(ArgumentError, match="leave this block out of the schedule"):
        attend_explicitly(*random(3, 1, 2, 5, 4), **options)
