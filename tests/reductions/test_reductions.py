import itertools
import math

import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.test_tokenizer import make_images, make_inter
from vwt import IntraImage, Merge, Prune, PruningSchedule, VWTokenizer
from vwt.errors import ArgumentError, ModelError
from vwt.models.backbone import Backbone
from vwt.reductions.absorb import Absorb, absorb
from vwt.reductions.merge import match
from vwt.reductions.prune import importance, prune
from vwt.reductions.reducing import follow, reduce_between
from vwt.reductions.reduction import patches_entering
from vwt.tokens.attention import attend_explicitly
from vwt.tokens.packing import Packed
from vwt.tokens.words import keep_all, unmerge

CLOSE = {"atol": 1e-5, "rtol": 1e-5}
KINDS = {"prune": Prune, "merge": Merge, "absorb": Absorb}
WIDTH = 48


def random(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def make_model(**options):
    """A model of 64 x 64 pixels in 4 x 4 patches, whose heads differ and whose attention is far from uniform."""
    torch.manual_seed(0)
    arguments = {"img_size": 64, "depth": 4, "embed_dim": WIDTH, "num_heads": 3, "num_classes": 10}
    model = timm.create_model("vit_tiny_patch16_224", **{**arguments, **options}).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


# -- the same in plain loops, for one image ----------------------------------------------------------------------------


def slow_received(query, key, prefix, bias=None):
    """The attention that each patch of one image (H, n, d) receives from all patches, each time of the strongest head.

    bias (n,) or (n, n) is added to the logits.
    """
    heads, count, width = query.shape
    rows = []  # rows[h][i][j]: attention of token i to token j
    for h in range(heads):
        rows.append([])
        for i in range(count):
            logits = [query[h, i].double().dot(key[h, j].double()).item() / math.sqrt(width) for j in range(count)]
            added = bias[i] if bias is not None and isinstance(bias[0], list) else bias
            logits = [logit + (0 if added is None else added[j]) for j, logit in enumerate(logits)]
            terms = [math.exp(logit - max(logits)) for logit in logits]
            rows[h].append([term / sum(terms) for term in terms])
    patches = range(prefix, count)
    return [sum(max(rows[h][i][j] for h in range(heads)) for i in patches) for j in patches]


def slow_importance(query, key, value, prefix, bias=None):
    """Prune One More Token's score of each patch of one image (H, n, d); bias as in `slow_received`."""
    heads, count, width = value.shape
    received = slow_received(query, key, prefix, bias)
    sums = [sum(max(value[h, j, d].item() for h in range(heads)) for d in range(width)) for j in range(count)]
    terms = [math.exp(one - max(sums)) for one in sums]
    return [one / max(received) + term / sum(terms) for one, term in zip(received, terms[prefix:], strict=True)]


def slow_prune(scores, removed):
    """The patches of each token that is left, in order."""
    order = sorted(range(len(scores)), key=lambda patch: -scores[patch])
    kept, dropped = order[: len(scores) - removed - 1], order[len(scores) - removed - 1 :]
    return [[patch] for patch in sorted(kept)] + [dropped]


def slow_merge(metric, removed):
    """The patches of each token that is left, in order; of equal similarities the first counts."""

    def cosine(a, b):
        norms = [max(math.sqrt(sum(x * x for x in one)), 1e-12) for one in (a, b)]
        return sum(x * y for x, y in zip(a, b, strict=True)) / norms[0] / norms[1]

    odd, even = range(1, len(metric), 2), range(0, len(metric), 2)
    partner = {a: max(even, key=lambda b: cosine(metric[a], metric[b])) for a in odd}
    order = sorted(odd, key=lambda a: -cosine(metric[a], metric[partner[a]]))
    source = order[:removed]
    return [[a] for a in odd if a not in source] + [[b, *(a for a in source if partner[a] == b)] for b in even]


def correlation(a, b):
    """Of the channels of two patches; 0 where those of one are all the same."""
    a, b = ([x - sum(one) / len(one) for x in one] for one in (a, b))
    norm = math.sqrt(sum(x * x for x in a) * sum(x * x for x in b))
    return sum(x * y for x, y in zip(a, b, strict=True)) / norm if norm else 0.0


def slow_telling(patches, received):
    """What a patch receives, times the square root of its distance from the likest one that receives more."""

    def distance(a):
        likest = max(
            (correlation(patches[a], patches[b]) for b, more in enumerate(received) if more > received[a]), default=0
        )
        return min(1 - likest, 1)  # of one that is unlike all of them as well

    return [one * math.sqrt(max(distance(a), 1e-3)) for a, one in enumerate(received)]


def slow_absorb(patches, received, removed):
    """The patches of each token that is left, first the one that is kept; the most telling token first."""
    scores = slow_telling(patches, received)
    order = sorted(range(len(scores)), key=lambda patch: -scores[patch])
    kept, dropped = order[: len(order) - removed], order[len(order) - removed :]
    target = {b: max(kept, key=lambda a: correlation(patches[a], patches[b])) for b in dropped}
    return [[a, *(b for b in dropped if target[b] == a)] for a in kept]


def slow_apply(groups, tokens, sizes, prefix, operation):
    """Tokens (n, C) and sizes to those of the groups: the mean of each, weighted by size, and the sum of the sizes.

    What absorbs the others, the first of its group, is twice in the mean.
    """
    fewer, total = list(tokens[:prefix]), list(sizes[:prefix])
    for group in groups:
        total.append(sum(sizes[prefix + patch] for patch in group))
        terms = [prefix + patch for patch in (group[:1] + group if operation is Absorb else group)]
        fewer.append(sum(sizes[term] * tokens[term] for term in terms) / sum(sizes[term] for term in terms))
    return torch.stack(fewer), total


def slow_places(groups):
    return [place for _, place in sorted((patch, place) for place, group in enumerate(groups) for patch in group)]


def slow_counted(groups, key_size, total, prefix, operation):
    """How often attention counts each token: a merged one as often as its parts, the mean of several once.

    After absorbing, by what it stands for, whatever came before.
    """
    if operation is Absorb:
        return [size**0.8 for size in total]
    new = key_size[:prefix] + [sum(key_size[prefix + patch] for patch in group) for group in groups]
    if operation is Prune and len(groups[-1]) > 1:
        new[-1] = 1
    return new


def slow_encode(model, tokens, sizes, schedule):
    """Encode tokens (n, C) of one image, of which each patch token stands for some patches.

    Returns the encoded tokens, their sizes, and which of the patch tokens that entered make each.
    """
    prefix, key_size, itself = model.num_prefix_tokens, [1] * len(tokens), True
    sizes, parts = [1] * prefix + list(sizes), [[patch] for patch in range(len(tokens) - prefix)]
    tokens = model.norm_pre(tokens)
    for index, block in enumerate(model.blocks):
        bias, normed = [[math.log(count) for count in key_size] for _ in key_size], block.norm1(tokens)
        if not itself:
            bias = [[0.0 if i == j else one for j, one in enumerate(row)] for i, row in enumerate(bias)]
        mixed = block.attn(normed[None], attn_mask=tokens.new_tensor(bias)[None, None])[0]
        tokens = tokens + block.ls1(mixed)
        if index in schedule:
            attn, reduction = block.attn, schedule[index]
            query, key, value = attn.qkv(normed).view(len(tokens), 3, attn.num_heads, -1).permute(1, 2, 0, 3)
            query, key = attn.q_norm(query), attn.k_norm(key)
            operation = type(reduction)
            if operation is Prune:
                removed = max(0, min(reduction.wanted(len(parts)), len(parts) - 2))
                groups = slow_prune(slow_importance(query, key, value, prefix, bias), removed)
            elif operation is Merge:
                removed = min(reduction.wanted(len(parts)), len(parts) // 2)
                groups = slow_merge(key.mean(0)[prefix:].tolist(), removed)
            else:
                removed = min(reduction.wanted(len(parts)), len(parts) - 1)
                groups = slow_absorb(tokens[prefix:].tolist(), slow_received(query, key, prefix, bias), removed)
            tokens, sizes = slow_apply(groups, tokens, sizes, prefix, operation)
            key_size = slow_counted(groups, key_size, sizes, prefix, operation)
            itself = itself and operation is not Absorb
            parts = [[part for patch in group for part in parts[patch]] for group in groups]
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return model.norm(tokens), sizes, parts


# -- how much to remove ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("amount", [1, 56, 10**6, 1e-9, 0.3, 0.999])
def test_amounts(kind, amount):
    reduction = KINDS[kind](amount)
    assert reduction.amount == amount
    assert reduction.kind == kind
    assert repr(reduction) == f"{kind.capitalize()}({amount!r})"
    assert eval(repr(reduction), {"Prune": Prune, "Merge": Merge, "Absorb": Absorb}) == reduction
    assert hash(reduction) == hash(KINDS[kind](amount))
    assert reduction != KINDS["merge" if kind == "prune" else "prune"](amount)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "amount", [0, -1, 0.0, -0.5, 1.0, 1.5, 56.0, True, False, math.nan, math.inf, "56", "a", None, [1], 1j], ids=repr
)
def test_other_amounts_are_refused(kind, amount):
    with pytest.raises(ArgumentError) as error:
        KINDS[kind](amount)
    start = f"{kind.capitalize()}({amount!r}): "
    assert str(error.value) == start + "expected a number of tokens to remove, at least 1, or a share in (0, 1)"


def test_an_amount_cannot_be_changed():
    with pytest.raises(AttributeError):
        Prune(3).amount = 4


@pytest.mark.parametrize(
    ("reduction", "patches", "wanted", "removed"),
    [
        (Prune(3), 10, 3, 3),
        (Prune(8), 10, 8, 8),
        (Prune(9), 10, 9, 8),
        (Prune(100), 10, 100, 8),
        (Prune(1), 3, 1, 1),
        (Prune(1), 2, 1, 0),
        (Prune(1), 1, 1, 0),
        (Prune(0.29), 100, 29, 29),  # 0.29 * 100 is less than 29
        (Prune(0.3), 9, 2, 2),
        (Prune(0.99), 10, 9, 8),
        (Prune(0.01), 10, 0, 0),
        (Merge(3), 10, 3, 3),
        (Merge(5), 10, 5, 5),
        (Merge(6), 10, 6, 5),
        (Merge(6), 11, 6, 5),
        (Merge(1), 2, 1, 1),
        (Merge(1), 1, 1, 0),
        (Merge(0.5), 11, 5, 5),
        (Merge(0.9), 10, 9, 5),
        (Absorb(3), 10, 3, 3),
        (Absorb(9), 10, 9, 9),
        (Absorb(10), 10, 10, 9),
        (Absorb(1), 2, 1, 1),
        (Absorb(1), 1, 1, 0),
        (Absorb(0.95), 20, 19, 19),
        (Absorb(0.99), 10, 9, 9),
        (Absorb(0.01), 10, 0, 0),
    ],
    ids=repr,
)
def test_how_many_of_so_many(reduction, patches, wanted, removed):
    assert reduction.wanted(patches) == wanted
    assert reduction.removed(patches) == removed
    assert removed == max(0, min(wanted, reduction.most(patches)))


@pytest.mark.parametrize(
    ("reductions", "entering"),
    [
        ({}, [20, 20, 20, 20, 20]),
        ({1: Prune(5)}, [20, 20, 15, 15, 15]),
        ({0: Merge(15), 3: Prune(0.5)}, [20, 10, 10, 10, 5]),
        ({0: Prune(30), 2: Prune(1), 3: Merge(1)}, [20, 2, 2, 2, 1]),
        ({0: Absorb(0.6), 1: Absorb(30), 2: Absorb(1)}, [20, 8, 1, 1, 1]),
        ({9: Prune(5)}, [20, 20, 20, 20, 20]),
    ],
    ids=repr,
)
def test_how_many_enter_each_block(reductions, entering):
    assert patches_entering(reductions, 4, 20) == entering


# -- importance and explicit attention ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("heads", [1, 2, 5])
def test_importance_equals_a_loop(heads, prefix):
    query, key, value = (random(3, heads, prefix + 7, 4, seed=seed) for seed in range(3))
    scores = importance(query, key, value, prefix)
    assert scores.shape == (3, 7)
    expected = [slow_importance(*image, prefix) for image in zip(query, key, value, strict=True)]
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-6, rtol=1e-6)


def test_importance_where_attention_counts_tokens_more_than_once():
    query, key, value = (random(2, 3, 9, 4, seed=seed) for seed in range(3))
    bias = torch.randint(1, 9, (9,), generator=torch.Generator().manual_seed(3)).log()
    _, weights = attend_explicitly(query, key, value, attn_mask=bias[None, None, None])
    expected = [slow_importance(*image, 2, bias.tolist()) for image in zip(query, key, value, strict=True)]
    scores = importance(query, key, value, 2, weights)
    torch.testing.assert_close(scores, torch.tensor(expected), atol=1e-6, rtol=1e-6)
    assert (scores - importance(query, key, value, 2)).abs().max() > 1e-2


def test_the_scores_of_an_image_are_its_own():
    """Neither its batch mates nor their scale matters: the largest attention is the image's own."""
    query, key, value = (random(4, 2, 11, 8, seed=seed) for seed in range(3))
    alone = torch.cat([importance(query[i : i + 1], key[i : i + 1], value[i : i + 1], 1) for i in range(4)])
    scores = importance(query, key, value, 1)
    torch.testing.assert_close(scores, alone, **CLOSE)
    query[1:] *= 30
    value[1:] *= 30
    torch.testing.assert_close(importance(query, key, value, 1)[0], alone[0], **CLOSE)
    assert (importance(query, key, value, 1)[1:] - alone[1:]).abs().max() > 1e-2


def test_the_largest_attention_of_each_image_is_one():
    query, key = random(4, 2, 11, 8), random(4, 2, 11, 8, seed=1)
    scores = importance(query, key, torch.zeros(4, 2, 11, 8), 1)
    torch.testing.assert_close(scores.amax(1), torch.full((4,), 1 + 1 / 11))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_importance_in_half_precision_is_summed_in_float32(dtype):
    """A sum of 4096 equal weights in half precision would stop growing."""
    query, key, value = (torch.zeros(1, 1, 4097, 1, dtype=dtype) for _ in range(3))
    value[0, 0, 1:, 0] = 1
    scores = importance(query, key, value, 1)
    assert scores.dtype == torch.float32
    share = math.e / (1 + 4096 * math.e)
    torch.testing.assert_close(scores, torch.full((1, 4096), 1 + share), atol=1e-7, rtol=1e-7)


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


# -- plans -------------------------------------------------------------------------------------------------------------


@st.composite
def sequences(draw):
    """Batch, prefix tokens, patches, sizes or None, how often each token is key_size or None."""
    batch, prefix, patches = draw(st.integers(1, 3)), draw(st.integers(0, 5)), draw(st.integers(1, 11))
    row = st.lists(st.integers(1, 5), min_size=patches, max_size=patches).map(lambda row: [1] * prefix + row)
    rows = st.none() | st.lists(row, min_size=batch, max_size=batch)
    return batch, prefix, patches, draw(rows), draw(rows)


def as_sizes(rows):
    return None if rows is None else torch.tensor(rows, dtype=torch.float32)


def check_plan(plan, groups, sequence, operation):
    """A plan against the groups of patches that it should make in each image."""
    batch, prefix, patches, sizes, key_size = sequence
    tokens = random(batch, prefix + patches, 3, dtype=torch.float64)
    fewer, total = plan.apply(tokens, as_sizes(sizes))
    new = operation.key_size(plan, as_sizes(key_size), as_sizes(sizes), total)
    assert plan.target.tolist() == [slow_places(group) for group in groups]
    assert torch.equal(fewer[:, :prefix], tokens[:, :prefix])
    for image, group in enumerate(groups):
        size = [1] * (prefix + patches) if sizes is None else sizes[image]
        expected, sums = slow_apply(group, tokens[image], size, prefix, operation)
        torch.testing.assert_close(fewer[image], expected, atol=1e-6, rtol=1e-6)  # sizes are float32
        assert total[image].tolist() == sums
        if operation is Prune and key_size is None:
            assert new is None
        else:
            count = [1] * (prefix + patches) if key_size is None else key_size[image]
            assert new[image].tolist() == pytest.approx(slow_counted(group, count, sums, prefix, operation))


@given(sequences(), st.data())
def test_pruning_equals_a_loop(sequence, data):
    batch, prefix, patches, *_ = sequence
    row = st.lists(st.integers(0, 4), min_size=patches, max_size=patches)  # equal scores: the first are kept
    scores = data.draw(st.lists(row, min_size=batch, max_size=batch))
    removed = data.draw(st.integers(1 if patches > 2 else 0, max(0, Prune.most(patches))))
    plan = prune(torch.tensor(scores, dtype=torch.float32), removed, prefix)
    groups = [slow_prune(image, removed) for image in scores]
    check_plan(plan, groups, sequence, Prune)


# Along the axes, where cosines are exact and ties are many; and nowhere.
DIRECTIONS = [[0, 0, 0], [2, 0, 0], [-1, 0, 0], [0, 3, 0], [0, -1, 0], [0, 0, 1], [0, 0, -2]]


@given(sequences(), st.data())
def test_merging_equals_a_loop(sequence, data):
    batch, prefix, patches, *_ = sequence
    row = st.lists(st.sampled_from(DIRECTIONS), min_size=patches, max_size=patches)
    metric = data.draw(st.lists(row, min_size=batch, max_size=batch))
    removed = data.draw(st.integers(min(1, patches // 2), patches // 2))
    plan = match(torch.tensor(metric, dtype=torch.float32), removed, prefix)
    check_plan(plan, [slow_merge(image, removed) for image in metric], sequence, Merge)


@given(st.integers(1, 30), st.data())
def test_merging_by_any_cosines_equals_a_loop(patches, data):
    removed = data.draw(st.integers(0, patches // 2))
    metric = random(2, patches, 5, seed=patches, dtype=torch.float64)
    plan = match(metric, removed, 1)
    groups = [slow_merge(image, removed) for image in metric.tolist()]
    check_plan(plan, groups, (2, 1, patches, None, None), Merge)


@pytest.mark.parametrize("kind", KINDS)
@given(sequences(), st.data())
def test_totals_are_conserved(kind, sequence, data):
    batch, prefix, patches, sizes, _ = sequence
    tokens, removed = random(batch, prefix + patches, 3), data.draw(st.integers(0, max(0, KINDS[kind].most(patches))))
    plan = make_plan(kind, random(batch, patches, 3, seed=1), removed, prefix)
    fewer, total = plan.apply(tokens, as_sizes(sizes))
    size = torch.ones(batch, prefix + patches) if sizes is None else as_sizes(sizes)
    assert fewer.shape == (batch, prefix + patches - removed, 3)
    assert torch.equal(total.sum(1), size.sum(1))
    if kind != "absorb":  # which has what is kept twice in the mean
        torch.testing.assert_close((fewer * total[..., None]).sum(1), (tokens * size[..., None]).sum(1), **CLOSE)
    places = plan.target
    assert [sorted(set(image)) for image in places.tolist()] == [list(range(patches - removed))] * batch


def make_plan(kind, metric, removed, prefix):
    if kind == "prune":
        return prune(metric[..., 0], removed, prefix)
    if kind == "merge":
        return match(metric, removed, prefix)
    return absorb(metric[..., 0].exp(), metric, removed, prefix)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sized", [True, False])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_in_half_precision_are_summed_in_float32(kind, sized, dtype):
    tokens = random(2, 4002, 3, dtype=torch.float32).to(dtype) + 1
    sizes = torch.full((2, 4002), 3.0) if sized else None
    metric = torch.ones(2, 4001, 3)
    plan = make_plan(kind, metric, 2000, 1)
    fewer, total = plan.apply(tokens, sizes)
    assert fewer.dtype == dtype
    assert total.dtype == torch.float32
    expected, same = plan.apply(tokens.double(), sizes)
    torch.testing.assert_close(fewer.double(), expected, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)
    assert torch.equal(total, same)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sized", [True, False])
def test_the_gradient_flows_through_plans(kind, sized):
    plan = make_plan(kind, random(2, 7, 3), 3, 2)
    sizes = torch.arange(1, 19, dtype=torch.float64).view(2, 9) if sized else None
    tokens = random(2, 9, 2, seed=1, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: plan.apply(t, sizes)[0], tokens)


@pytest.mark.parametrize("kind", KINDS)
def test_plans_of_an_image_do_not_depend_on_its_batch_mates(kind):
    metric, tokens = random(4, 20, 3), random(4, 22, 5, seed=1)
    together = make_plan(kind, metric, 7, 2)
    for image in range(4):
        alone = make_plan(kind, metric[image : image + 1], 7, 2)
        assert torch.equal(together.target[image : image + 1], alone.target)
        values = together.apply(tokens, None)[0][image : image + 1]
        assert torch.equal(values, alone.apply(tokens[image : image + 1], None)[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patches", [1, 2, 7])
def test_removing_nothing_of_an_image_changes_nothing_of_it(kind, patches):
    """As happens to an image of a ragged batch that has too few tokens: only their order may change."""
    tokens, sizes = random(1, 1 + patches, 3), torch.arange(1.0, 2 + patches)[None]
    key_size = sizes.flip(1)
    plan = make_plan(kind, random(1, patches, 3, seed=1), 0, 1)
    fewer, total = plan.apply(tokens, sizes)
    back = plan.target[0] + 1
    torch.testing.assert_close(fewer[0, back], tokens[0, 1:])
    torch.testing.assert_close(total[0, back], sizes[0, 1:])
    expected = sizes**0.8 if kind == "absorb" else key_size  # by what they stand for
    torch.testing.assert_close(KINDS[kind].key_size(plan, key_size, sizes, total)[0, back], expected[0, 1:])


# No two of them are alike: correlations are 1, 0 and -1, and 0 with the last one, whose channels are all the same.
PATTERNS = [[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1], [-1, -1, 1, 1], [-2, 2, -2, 2], [3, 3, 3, 3]]


def kept_patches(plan):
    """The patches of each image that count twice in their means, in the order of their tokens."""
    images = zip(plan.target.tolist(), plan.weight.tolist(), strict=True)
    return [
        [patch for _, patch in sorted((to, patch) for patch, to in enumerate(target) if weight[patch] == 2)]
        for target, weight in images
    ]


def check_absorbed(plan, received, patches):
    """What is kept tells at least as much as what is not, and nothing kept is more like a patch than its target."""
    for image, (one, rows) in enumerate(zip(received, patches, strict=True)):
        kept, target = kept_patches(plan)[image], plan.target[image].tolist()
        scores = slow_telling(rows, one)
        dropped = sorted(set(range(len(one))) - set(kept), key=lambda patch: -scores[patch])
        order = [scores[patch] for patch in kept + dropped]
        assert all(more >= less - 1e-3 * max(one) for more, less in itertools.pairwise(order))
        for patch in dropped:
            alike = [correlation(rows[patch], rows[keeper]) for keeper in kept]
            assert alike[target[patch]] == pytest.approx(max(alike), abs=1e-4)


def absorbed_groups(plan):
    """Which patches each token is made of, first what is kept, by the assignment's own account."""
    return [
        [[keeper, *(p for p, to in enumerate(target) if to == row and p != keeper)] for row, keeper in enumerate(kept)]
        for kept, target in zip(kept_patches(plan), plan.target.tolist(), strict=True)
    ]


@given(sequences(), st.data())
def test_absorbing_equals_a_loop(sequence, data):
    """Of patches that tell as much, the first are kept; of kept ones that are as like, any will do."""
    batch, prefix, patches, *_ = sequence
    row = st.lists(st.integers(0, 4), min_size=patches, max_size=patches)
    received = data.draw(st.lists(row, min_size=batch, max_size=batch))
    row = st.lists(st.sampled_from(PATTERNS), min_size=patches, max_size=patches)
    rows = data.draw(st.lists(row, min_size=batch, max_size=batch))
    removed = data.draw(st.integers(0, patches - 1))
    tensors = torch.tensor(received, dtype=torch.float32), torch.tensor(rows, dtype=torch.float32)
    plan = absorb(*tensors, removed, prefix)
    check_absorbed(plan, received, rows)
    expected = [slow_absorb(*image, removed) for image in zip(rows, received, strict=True)]
    assert kept_patches(plan) == [[group[0] for group in image] for image in expected]
    check_plan(plan, absorbed_groups(plan), sequence, Absorb)


@given(st.integers(1, 30), st.integers(2, 9), st.integers(0, 999), st.data())
def test_absorbing_any_patches_equals_a_loop(patches, width, seed, data):
    removed, prefix = data.draw(st.integers(0, patches - 1)), data.draw(st.integers(0, 5))
    rows, received = random(2, patches, width, seed=seed), random(2, patches, seed=seed + 1).exp()
    scale = data.draw(st.sampled_from([1.0, 100.0]))
    plan = absorb(received, scale * rows + scale, removed, prefix)
    check_absorbed(plan, received.tolist(), rows.tolist())
    check_plan(plan, absorbed_groups(plan), (2, prefix, patches, None, None), Absorb)


def test_known_answers_of_absorbing():
    """A copy of a stronger patch tells a thirtieth of what it receives; of others, nothing is taken off."""
    strong, other, copy, weak = [1, 1, -1, -1], [1, -1, 1, -1], [2, 2, -2, -2], [1, -1, -1, 1]
    patches = torch.tensor([[weak, copy, other, strong]], dtype=torch.float32)

    def kept(*received, removed=2):
        return kept_patches(absorb(torch.tensor([received]), patches, removed, 0))[0]

    assert kept(1.0, 9.0, 8.0, 10.0, removed=0) == [3, 2, 0, 1]
    assert kept(0.28, 9.0, 8.0, 10.0) == [3, 2]
    assert kept(0.28, 9.0, 8.0, 10.0, removed=1) == [3, 2, 1]  # 9 times the root of 0.001 is 0.285
    assert kept(0.29, 9.0, 8.0, 10.0, removed=1) == [3, 2, 0]
    assert kept(1.0, 10.0, 8.0, 9.0) == [1, 2]  # the other of the two is the stronger
    assert kept(1.0, 10.0, 8.0, 10.0) == [1, 3]  # neither of them receives more


def test_known_answers_of_what_absorbs():
    """A kept patch of two patches is twice in the mean, one of three that it absorbs once."""
    patches = torch.tensor([[[1.0, 1.0, -1.0, -1.0], [6.0, 6.0, -8.0, -8.0], [1.0, -1.0, 1.0, -1.0]]])
    plan = absorb(torch.tensor([[3.0, 2.0, 1.0]]), patches, 1, 0)
    assert absorbed_groups(plan) == [[[0, 1], [2]]]
    fewer, total = plan.apply(patches, torch.tensor([[2.0, 3.0, 5.0]]))
    mean = [(2 * 2 * 1 + 3 * 6) / 7, (2 * 2 * 1 + 3 * 6) / 7, -4.0, -4.0]
    torch.testing.assert_close(fewer, torch.tensor([[mean, patches[0, 2].tolist()]]))
    assert total.tolist() == [[5.0, 5.0]]
    torch.testing.assert_close(Absorb.key_size(plan, None, None, total), torch.tensor([[5**0.8, 5**0.8]]))


@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 5))
def test_of_patches_that_are_alike_one_is_kept(seed, kinds, copies):
    """The strongest of each kind, however many copies there are and wherever they stand; the copies go to it."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.arange(kinds).repeat(copies)[torch.randperm(kinds * copies, generator=generator)]
    received = 1 + torch.rand(len(kind), generator=generator)
    patches = torch.tensor(PATTERNS[:kinds], dtype=torch.float32)[kind] * (
        1 + torch.rand(len(kind), 1, generator=generator)
    )
    plan = absorb(received[None], patches[None], len(kind) - kinds, 0)
    strongest = [max((kind == k).nonzero().flatten().tolist(), key=received.__getitem__) for k in range(kinds)]
    assert sorted(kept_patches(plan)[0]) == sorted(strongest)
    for keeper, *others in absorbed_groups(plan)[0]:
        assert all(kind[other] == kind[keeper] for other in others)
        assert len(others) == copies - 1


@pytest.mark.parametrize("bias", [None, "keys", "square"])
@pytest.mark.parametrize("prefix", [0, 1, 5])
def test_what_absorbing_reads_of_attention(prefix, bias):
    query, key, value = random(3, 2, 2, prefix + 9, 4)
    shape = {"keys": (1, 1, 1, prefix + 9), "square": (1, 1, prefix + 9, prefix + 9)}
    mask = None if bias is None else random(*shape[bias], seed=2)
    seen, reduction = [], Absorb(5)
    output = reduction.watch(prefix, seen)(query, key, value, attn_mask=mask)
    torch.testing.assert_close(output, F.scaled_dot_product_attention(query, key, value, mask), **CLOSE)
    added = None if mask is None else mask.squeeze().tolist()
    expected = [slow_received(q, k, prefix, added) for q, k in zip(query, key, strict=True)]
    torch.testing.assert_close(seen[0], torch.tensor(expected), **CLOSE)
    tokens = random(2, prefix + 9, 6, seed=1)
    plan = reduction.assign(seen[0], tokens, prefix)
    patches = tokens[:, prefix:].tolist()
    groups = [slow_absorb(image, row, 5) for image, row in zip(patches, expected, strict=True)]
    check_plan(plan, groups, (2, prefix, 9, None, None), Absorb)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_likeness_does_not_depend_on_how_large_patches_are(scale):
    """As tokens differ from model to model: likeness is of their channels' correlation."""
    tokens, received = random(2, 41, 8), random(2, 40).exp()
    plan, same = (Absorb(25).assign(received, values, 1) for values in (tokens, scale * tokens))
    assert plan.target.tolist() == same.target.tolist()


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("sized", [True, False])
def test_one_patch_absorbs_all(sized, prefix):
    tokens, received = random(2, prefix + 9, 5), random(2, 9).exp()
    sizes = F.pad(torch.arange(1.0, 10.0).expand(2, -1), (prefix, 0), value=1.0) if sized else None
    fewer, total = Absorb(100).assign(received, tokens, prefix).apply(tokens, sizes)
    assert fewer.shape == (2, prefix + 1, 5)
    assert total[:, prefix].tolist() == [45 if sized else 9] * 2
    weight = torch.ones(2, 9) if sizes is None else sizes[:, prefix:].clone()
    weight[range(2), received.argmax(1)] *= 2  # it receives most, so that there is no stronger one
    mean = (tokens[:, prefix:] * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    torch.testing.assert_close(fewer[:, prefix], mean)
    assert torch.equal(fewer[:, :prefix], tokens[:, :prefix])


@pytest.mark.parametrize("patches", ["equal", "constant", "zero"])
@pytest.mark.parametrize("receive", ["alike", "nothing", "unlike"])
def test_absorbing_among_equals_is_finite_and_the_same_again(receive, patches):
    """Equal patches that receive as much, or nothing; patches whose channels are all the same."""
    tokens = (
        random(1, 1, 8).expand(3, 9, 8) if patches == "equal" else torch.full((3, 9, 8), 2.0 * (patches == "constant"))
    )
    received = {"alike": torch.ones(3, 9), "nothing": torch.zeros(3, 9), "unlike": torch.arange(27.0).view(3, 9)}[
        receive
    ]
    plan, again = (Absorb(6).assign(received, tokens, 0) for _ in range(2))
    fewer, total = plan.apply(tokens, None)
    torch.testing.assert_close(fewer, tokens[:, :3])
    assert total.sum(1).tolist() == [9] * 3
    assert plan.target.tolist() == again.target.tolist()
    for image in range(3):
        alone = Absorb(6).assign(received[image : image + 1], tokens[image : image + 1], 0)
        assert kept_patches(alone) == kept_patches(plan)[image : image + 1]
    if receive != "unlike":
        assert kept_patches(plan) == [[0, 1, 2]] * 3
    else:
        assert kept_patches(plan) == [[8, 7, 6]] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_patches_in_half_precision_are_compared_in_float32(dtype):
    """Patches that have much in common, whose likeness half precision cannot tell apart."""
    tokens, received = (random(2, 1, 64) + 0.1 * random(2, 41, 64, seed=1)).to(dtype), random(2, 40).exp()
    plan, same = (Absorb(25).assign(received, values, 1) for values in (tokens, tokens.float()))
    assert plan.target.tolist() == same.target.tolist()
    fewer, _ = plan.apply(tokens, None)
    assert fewer.dtype == dtype
    assert fewer.isfinite().all()


# -- inside the blocks -------------------------------------------------------------------------------------------------

SCHEDULES = {
    "prune": {1: Prune(5)},
    "merge": {1: Merge(4)},
    "shares": {0: Prune(0.25), 2: Merge(0.4)},
    "prune, merge, prune": {0: Prune(3), 1: Merge(4), 3: Prune(3)},
    "merge, prune, merge": {0: Merge(5), 1: Prune(3), 2: Merge(2)},
    "merge in every block": {block: Merge(2) for block in range(4)},
    "absorb": {1: Absorb(6)},
    "absorb, merge, prune": {0: Absorb(3), 1: Merge(2), 2: Prune(2)},
    "prune, merge, absorb": {0: Prune(3), 1: Merge(0.3), 2: Absorb(0.4)},
    "absorb in every block": {block: Absorb(2) for block in range(4)},
    "absorb all": {2: Absorb(15)},
    "more than there are": {1: Prune(11), 2: Merge(3), 3: Prune(1)},
}
MODELS = {
    "class_token": {},
    "registers": {"reg_tokens": 4},
    "no_prefix": {"class_token": False, "global_pool": "avg"},
    "pre_norm": {"pre_norm": True},
    "layer_scale": {"init_values": 0.5, "qk_norm": True},
}
LENGTHS = {"dense": (14, 14, 14), "one": (16,), "ragged": (16, 9, 14, 16), "as long": (12, 12)}


def make_packed(patches, prefix, sized):
    lengths = tuple(prefix + count for count in patches)
    sizes = torch.randint(1, 5, (sum(lengths),), generator=torch.Generator().manual_seed(1)).float()
    for start, length in zip(Packed(sizes, lengths).offsets.tolist(), lengths, strict=False):
        sizes[start : start + min(prefix, length)] = 1
    return Packed(random(sum(lengths), WIDTH), lengths, sizes if sized else None)


def check_encoded(model, packed, schedule):
    """Packed sequences, reduced inside the blocks, against each image alone in plain loops."""
    encoded, steps = Backbone(model).encode_packed(packed, PruningSchedule(schedule))
    prefix, sizes = model.num_prefix_tokens, torch.ones(len(packed.values)) if packed.sizes is None else packed.sizes
    assert [step.counts for step in steps][-1] == tuple(length - prefix for length in encoded.lengths)
    runs = zip(packed.split(), sizes.split(list(packed.lengths)), strict=True)
    new_sizes = encoded.sizes.split(list(encoded.lengths))
    for image, (tokens, size) in enumerate(runs):
        expected, total, _ = slow_encode(model, tokens, size[prefix:].tolist(), schedule)
        torch.testing.assert_close(encoded.split()[image], expected, atol=1e-4, rtol=1e-4)
        assert new_sizes[image].tolist() == total


@torch.inference_mode()
@pytest.mark.parametrize("sized", [True, False], ids=["words", "patches"])
@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_reductions_equal_a_loop_over_images(schedule, lengths, sized):
    model = make_model()
    check_encoded(model, make_packed(LENGTHS[lengths], 1, sized), SCHEDULES[schedule])


@torch.inference_mode()
@pytest.mark.parametrize("schedule", ["prune", "merge", "prune, merge, prune", "absorb", "absorb, merge, prune"])
@pytest.mark.parametrize("name", MODELS)
def test_any_model_equals_a_loop_over_images(name, schedule):
    """Any number of prefix tokens, which are never reduced, and any norms."""
    model = make_model(**MODELS[name])
    check_encoded(model, make_packed(LENGTHS["ragged"], model.num_prefix_tokens, True), SCHEDULES[schedule])


@torch.inference_mode()
@pytest.mark.parametrize(
    "schedule",
    [
        {1: Prune(10)},
        {1: Merge(10)},
        {1: Absorb(10)},
        {0: Merge(4), 1: Prune(5), 2: Merge(9)},
        {0: Absorb(4), 1: Absorb(9)},
        {0: Absorb(14), 1: Prune(1), 2: Merge(1)},
    ],
    ids=repr,
)
def test_images_too_small_for_the_count_lose_what_they_can(schedule):
    model, lengths = make_model(), (15, 1, 2, 3, 4, 5)
    packed = make_packed(lengths, 1, True)
    encoded, _ = Backbone(model).encode_packed(packed, PruningSchedule(schedule))
    expected = [patches_entering(schedule, 4, length)[-1] + 1 for length in lengths]
    assert list(encoded.lengths) == expected
    alone = [
        Backbone(model).encode_packed(Packed(tokens, (len(tokens),), size), PruningSchedule(schedule))[0].values
        for tokens, size in zip(packed.split(), packed.sizes.split(list(packed.lengths)), strict=True)
    ]
    torch.testing.assert_close(encoded.values, torch.cat(alone), **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize("kind", ["prune", "merge"])
def test_an_image_of_too_few_tokens_for_a_share_is_as_if_not_reduced(kind):
    """Merges first, so that every token of it is key_size more than once."""
    backbone, packed, merges = Backbone(make_model()), make_packed((16, 8), 1, True), {0: Merge(4), 1: Merge(2)}
    lazy_property, _ = backbone.encode_packed(packed, PruningSchedule(merges))
    twice, _ = backbone.encode_packed(packed, PruningSchedule({**merges, 2: KINDS[kind](0.1)}))
    assert (lazy_property.lengths, twice.lengths) == ((11, 3), (10, 3))
    assert (lazy_property.key_size[-2:] > 1).all()
    one, other = lazy_property.split()[1], twice.split()[1]
    torch.testing.assert_close(other[0], one[0], **CLOSE)
    torch.testing.assert_close(other.sort(0).values, one.sort(0).values, **CLOSE)


@torch.inference_mode()
def test_lengths_that_become_equal_or_cease_to_be():
    """A batch may be dense before a reduction and ragged after it, or the other way round."""
    model = make_model()
    check_encoded(model, make_packed((3, 4), 1, True), {0: Prune(2), 2: Merge(1)})
    check_encoded(model, make_packed((5, 4), 1, True), {0: Merge(3), 2: Prune(1)})
    check_encoded(model, make_packed((3, 4, 9), 1, True), {0: Absorb(8), 2: Merge(1)})
    check_encoded(model, make_packed((9, 8), 1, True), {0: Absorb(0.12), 2: Absorb(0.13)})


@torch.inference_mode()
@pytest.mark.parametrize("block", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_first_and_the_last_block(kind, block):
    check_encoded(make_model(), make_packed((9, 12), 1, False), {block: KINDS[kind](3)})


@torch.inference_mode()
def test_prefix_tokens_are_never_reduced():
    """Prefix tokens so alike, and so unimportant, that they would be the first to go."""
    model = make_model(reg_tokens=4)
    packed = make_packed((14, 14), 5, False)
    dense = packed.dense()
    dense[:, :5] = dense[:, :1]
    for schedule in ({0: Prune(12)}, {0: Merge(7)}, {0: Absorb(13)}):
        encoded, steps = Backbone(model).encode_packed(packed, PruningSchedule(schedule))
        assert encoded.lengths == (5 + steps[0].counts[0],) * 2
        for image, tokens in enumerate(packed.split()):
            expected, _, parts = slow_encode(model, tokens, [1] * 14, schedule)
            torch.testing.assert_close(encoded.split()[image][:5], expected[:5], atol=1e-4, rtol=1e-4)
            assert sum(len(part) for part in parts) == 14


@pytest.mark.parametrize("schedule", ["prune, merge, prune", "absorb", "prune, merge, absorb"])
def test_gradients_are_those_of_a_loop_over_images(schedule):
    model, packed, schedule = make_model(), make_packed((14, 9), 1, True), SCHEDULES[schedule]
    weight = model.blocks[0].attn.qkv.weight
    encoded, _ = Backbone(model).encode_packed(packed, PruningSchedule(schedule))
    gradient = torch.autograd.grad(encoded.values.square().sum(), weight)[0]
    sizes = [size[1:].tolist() for size in packed.sizes.split(list(packed.lengths))]
    alone = [slow_encode(model, *pair, schedule)[0] for pair in zip(packed.split(), sizes, strict=True)]
    expected = torch.autograd.grad(sum(one.square().sum() for one in alone), weight)[0]
    assert gradient.abs().max() > 1e-2
    torch.testing.assert_close(gradient, expected, atol=1e-3, rtol=1e-3)


# -- what is computed --------------------------------------------------------------------------------------------------


class Attention(TorchFunctionMode):
    """Lists the calls of fused attention, with their masks, and of softmax over weights."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            self.calls.append(("fused", (kwargs or {}).get("attn_mask")))
        elif func in (torch.softmax, F.softmax, torch.Tensor.softmax) and args[0].ndim == 4:
            self.calls.append(("explicit", None))
        return func(*args, **(kwargs or {}))

    @property
    def kinds(self):
        return [kind for kind, _ in self.calls]


class Kernels(TorchDispatchMode):
    """Counts what reaches the kernels: fused attention, softmax over weights, and products as large as the weights."""

    def __init__(self, tokens):
        super().__init__()
        self.tokens, self.fused, self.softmax, self.products = tokens, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        output = func(*args, **(kwargs or {}))
        name = func.name()
        self.fused += "scaled_dot_product" in name
        self.softmax += name == "aten::_softmax" and args[0].ndim == 4
        self.products += name == "aten::bmm" and output.shape[-2:] == (self.tokens, self.tokens)
        return output


CALLS = {
    "nothing": ({}, ["fused"] * 4),
    "prune": ({1: Prune(5)}, ["fused", "explicit", "fused", "fused"]),
    "prune twice": ({0: Prune(5), 3: Prune(5)}, ["explicit", "fused", "fused", "explicit"]),
    "merge": ({1: Merge(5)}, ["fused"] * 4),
    "absorb": ({1: Absorb(5)}, ["fused", "explicit", "fused", "fused"]),
    "both": ({0: Merge(5), 2: Prune(5)}, ["fused", "fused", "explicit", "fused"]),
}


@torch.inference_mode()
@pytest.mark.parametrize("patches", [(14,), (14, 14), (14, 12, 16)], ids=repr)
@pytest.mark.parametrize("name", CALLS)
def test_only_blocks_that_rank_patches_compute_explicit_attention_and_none_computes_it_twice(name, patches):
    schedule, expected = CALLS[name]
    packed, backbone = make_packed(patches, 1, False), Backbone(make_model())
    with Attention() as attention:
        backbone.encode_packed(packed, PruningSchedule(schedule))
    times = 1 if len(set(patches)) == 1 else len(patches)  # one call a dense batch, or one an image
    assert attention.kinds == [kind for kind in expected for _ in range(times)]


@torch.no_grad()
@pytest.mark.parametrize("name", CALLS)
def test_what_reaches_the_kernels(name):
    schedule, expected = CALLS[name]
    backbone, packed = Backbone(make_model()), make_packed((14,), 1, False)
    with Kernels(15) as kernels:
        backbone.encode_packed(packed, PruningSchedule(schedule))
    assert kernels.fused == expected.count("fused")
    assert kernels.softmax == expected.count("explicit")
    if name in ("nothing", "prune", "merge", "absorb"):
        assert kernels.products == expected.count("explicit")


@torch.inference_mode()
@pytest.mark.parametrize("patches", [(14, 14), (14, 11)], ids=["dense", "ragged"])
def test_a_merge_adds_log_sizes_in_later_blocks_only(patches):
    packed, backbone = make_packed(patches, 1, True), Backbone(make_model())
    with Attention() as attention:
        encoded, steps = backbone.encode_packed(packed, PruningSchedule({1: Merge(5)}))
    times = len(attention.calls) // 4
    masks = [mask for _, mask in attention.calls]
    assert masks[: 2 * times] == [None] * 2 * times
    runs = encoded.runs(encoded.key_size)
    for later, mask in enumerate(masks[2 * times :]):
        torch.testing.assert_close(mask, runs[later % times].log()[:, None, None])
    places = [image for plan in steps[0].assignments for image in plan.target]
    for image, key_size in zip(places, encoded.key_size.split(list(encoded.lengths)), strict=True):
        assert key_size.tolist() == [1.0, *image.bincount().tolist()]
        assert key_size.sum() == 1 + len(image)


@torch.inference_mode()
@pytest.mark.parametrize("patches", [(14, 14), (14, 11)], ids=["dense", "ragged"])
def test_absorbing_adds_log_sizes_but_for_a_token_itself(patches):
    """In later blocks only, whatever merged before; and pruning after it leaves it so."""
    packed, backbone = make_packed(patches, 1, True), Backbone(make_model())
    schedule = PruningSchedule({0: Merge(3), 1: Absorb(5)})
    with Attention() as attention:
        encoded, _ = backbone.encode_packed(packed, schedule)
    masks = [mask for kind, mask in attention.calls if kind == "fused"]
    runs = encoded.runs(encoded.sizes)
    times = len(runs)
    assert len(masks) == 3 * times
    for later, mask in enumerate(masks[times:]):
        bias = 0.8 * runs[later % times].log()[:, None, None, :].expand(-1, 1, runs[later % times].shape[1], -1)
        torch.testing.assert_close(mask.expand(bias.shape), bias * (1 - torch.eye(bias.shape[-1])))
    assert not encoded.bias_on_self
    pruned, _ = backbone.encode_packed(packed, PruningSchedule({**schedule, 2: Prune(1)}))
    assert not pruned.bias_on_self


@torch.inference_mode()
def test_pruning_adds_nothing_to_attention():
    packed, backbone = make_packed((14, 11), 1, True), Backbone(make_model())
    with Attention() as attention:
        encoded, _ = backbone.encode_packed(packed, PruningSchedule({0: Prune(5), 2: Prune(3)}))
    assert encoded.key_size is None
    assert [mask for _, mask in attention.calls] == [None] * 8


# -- blocks of other kinds ---------------------------------------------------------------------------------------------


def unfuse(model, *blocks):
    for index in blocks:
        model.blocks[index].attn.fused_attn = False
    return model


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patches", [(14, 14), (14, 11)], ids=["dense", "ragged"])
def test_a_block_without_fused_attention_is_refused(kind, patches):
    backbone, packed = Backbone(unfuse(make_model(), 1)), make_packed(patches, 1, False)
    with pytest.raises(ModelError, match=r"not 0 times; .*leave this block out .*set_fused_attn\(True\)") as error:
        backbone.encode_packed(packed, PruningSchedule({1: KINDS[kind](3)}))
    assert "\n" not in str(error.value)


@torch.inference_mode()
@pytest.mark.parametrize("schedule", ["prune", "merge", "prune, merge, prune", "absorb, merge, prune"])
def test_other_blocks_may_be_without_fused_attention(schedule):
    model, reduced = make_model(), SCHEDULES[schedule]
    unfuse(model, *(block for block in range(4) if block not in reduced))
    check_encoded(model, make_packed((14, 11), 1, True), reduced)
    check_encoded(model, make_packed((14, 14), 1, True), reduced)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patches", [(14, 14), (14, 11)], ids=["dense", "ragged"])
def test_differential_attention_is_refused(kind, patches):
    backbone, packed = Backbone(make_model(attn_layer="diff", num_heads=2)), make_packed(patches, 1, False)
    with pytest.raises(ModelError, match="not 2 times"):
        backbone.encode_packed(packed, PruningSchedule({1: KINDS[kind](3)}))


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("patches", [(14, 14), (14, 11)], ids=["dense", "ragged"])
def test_a_block_that_norms_after_its_halves(kind, patches):
    """The first half of a reducing block is all up to its first residual sum, the second the rest of it."""
    model = make_model(block_fn=ResPostBlock, init_values=0.5, depth=2)
    packed, prefix = make_packed(patches, 1, False), 1
    encoded, steps = Backbone(model).encode_packed(packed, PruningSchedule({0: KINDS[kind](3)}))
    block, last = model.blocks
    for image, tokens in enumerate(packed.split()):
        half = tokens + block.norm1(block.attn(tokens[None])[0])
        plan = steps[0].assignments[0 if packed.is_dense else image]
        places = plan.target[image if packed.is_dense else 0].tolist()
        groups = [[patch for patch, place in enumerate(places) if place == token] for token in range(max(places) + 1)]
        if kind == "absorb":
            groups = absorbed_groups(plan)[image if packed.is_dense else 0]
        fewer, sizes = slow_apply(groups, half, [1] * len(half), prefix, KINDS[kind])
        fewer = fewer + block.norm2(block.mlp(fewer))
        logs = torch.tensor(sizes).log()[None, None, None]
        bias = {"prune": None, "merge": logs, "absorb": 0.8 * logs * (1 - torch.eye(len(sizes)))}[kind]
        fewer = fewer + last.norm1(last.attn(fewer[None], attn_mask=bias)[0])
        expected = model.norm(fewer + last.norm2(last.mlp(fewer)))
        torch.testing.assert_close(encoded.split()[image], expected, **CLOSE)


SEVERAL = [ParallelThingsBlock, DiffParallelScalingBlock]


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block", SEVERAL, ids=lambda block: block.__name__)
def test_a_block_of_several_attentions_is_refused(block, kind):
    model = make_model(block_fn=block, num_heads=2)
    with pytest.raises(ModelError) as error:
        VWTokenizer(model, None, PruningSchedule({1: KINDS[kind](3)}))(random(2, 3, 64, 64))
    assert "\n" not in str(error.value)


@torch.inference_mode()
@pytest.mark.parametrize("kind", KINDS)
def test_attention_and_mlp_side_by_side(kind):
    """There is no place between the two: tokens go after both."""
    model, images = make_model(block_fn=ParallelScalingBlock, num_heads=2), random(2, 3, 64, 64)
    fast = VWTokenizer(model, None, PruningSchedule({1: KINDS[kind](3)}))
    torch.testing.assert_close(fast(images), torch.cat([fast(image[None]) for image in images]), atol=1e-5, rtol=1e-5)
    packed, words = fast.forward_features(images, unmerge=False)
    assert packed.lengths == (14, 14)
    assert words.counts.tolist() == [13, 13]


# -- with words --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize(
    "schedule", [{1: Prune(20)}, {1: Merge(20)}, {1: Absorb(0.7)}, {0: Merge(15), 2: Prune(10)}], ids=repr
)
@pytest.mark.parametrize("name", ["none", "intra", "inter"])
def test_words_weigh_by_their_patches(small_vit, name, schedule):
    """From images to tokens: words of several patches count as several in every mean, dropped patches not at all."""
    for parameter in small_vit.parameters():
        parameter.data.add_(0.1 * random(*parameter.shape, seed=parameter.numel()))
    strategy = {"none": lambda: None, "intra": lambda: IntraImage(0.4), "inter": lambda: make_inter(small_vit, "pixel")}
    images = make_images()[[1, 3]]
    fast = VWTokenizer(small_vit, strategy[name](), PruningSchedule(schedule))
    before = fast.tokenize(images)
    packed, after = fast.forward_features(images, unmerge=False)
    tokens = small_vit._pos_embed(small_vit.patch_embed(images))
    encoded, full = packed.split(), fast.forward_features(images)
    for image, group in enumerate(before.group):
        members = [(group == word).nonzero().flatten() for word in range(before.lengths[image])]
        words = torch.stack([tokens[image, 1 + patches].mean(0) for patches in members])
        sizes = [len(patches) for patches in members]
        assert (name == "inter") == (max(sizes) > 1)
        alone, _, parts = slow_encode(small_vit, torch.cat([tokens[image, :1], words]), sizes, schedule)
        torch.testing.assert_close(encoded[image], alone, atol=1e-4, rtol=1e-4)
        for token, words_of_it in enumerate(parts):
            patches = torch.cat([members[word] for word in words_of_it])
            assert set(patches.tolist()) == set((after.group[image] == token).nonzero().flatten().tolist())
            expected = alone[1 + token].expand(len(patches), -1)
            torch.testing.assert_close(full[image, 1 + patches], expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(unmerge(torch.cat([run[1:] for run in encoded]), after), full[:, 1:])


# -- absorbing, image by image -----------------------------------------------------------------------------------------

ABSORBING = {
    "one": {1: Absorb(4)},
    "several": {0: Absorb(4), 2: Absorb(0.5), 3: Merge(1)},
    "after others": {0: Merge(2), 1: Prune(1), 2: Absorb(2)},
    "all": {1: Absorb(0.999)},
}


def check_images_alone(encode, packed):
    """What becomes of packed images, and of each alone."""
    encoded = encode(packed)
    for index, run in enumerate(packed.split()):
        size = None if packed.sizes is None else packed.sizes.split(list(packed.lengths))[index]
        alone = encode(Packed(run, (len(run),), size))
        assert alone.lengths == encoded.lengths[index : index + 1]
        torch.testing.assert_close(encoded.split()[index], alone.values, **CLOSE)
        assert encoded.sizes.split(list(encoded.lengths))[index].tolist() == alone.sizes.tolist()


@torch.inference_mode()
@pytest.mark.parametrize("patches", [(9, 9), (3, 9, 1), (16, 2)], ids=repr)
@pytest.mark.parametrize("name", ["class_token", "no_prefix", "registers"])
@pytest.mark.parametrize("schedule", ABSORBING)
def test_absorbing_image_by_image(schedule, name, patches):
    model = make_model(**MODELS[name])
    packed, backbone = make_packed(patches, model.num_prefix_tokens, True), Backbone(model)
    check_images_alone(lambda some: backbone.encode_packed(some, PruningSchedule(ABSORBING[schedule]))[0], packed)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(1, 14), st.integers(0, 5), st.booleans())
@torch.inference_mode()
def test_absorbing_between_halves(patches, amount, prefix, sized):
    """Of a block that passes tokens on as they are, whose attention is that of their first channels."""
    packed = make_packed(patches, prefix, sized)

    def attend(tokens, inputs):
        heads = tokens.unflatten(-1, (3, 16)).transpose(1, 2)
        F.scaled_dot_product_attention(heads, heads, heads)
        return tokens

    def encode(some):
        return reduce_between(attend, lambda tokens, inputs: tokens, some, Absorb(amount), prefix, one_by_one=False)[0]

    check_images_alone(encode, packed)
    encoded = encode(packed)
    sizes = torch.ones(len(packed.values)) if packed.sizes is None else packed.sizes
    for tokens, size, found, total, key_size in zip(
        packed.split(),
        sizes.split(list(packed.lengths)),
        encoded.split(),
        encoded.sizes.split(list(encoded.lengths)),
        encoded.key_size.split(list(encoded.lengths)),
        strict=True,
    ):
        heads, removed = tokens.unflatten(-1, (3, 16)).transpose(0, 1), min(amount, len(tokens) - prefix - 1)
        groups = slow_absorb(tokens[prefix:].tolist(), slow_received(heads, heads, prefix), removed)
        expected, sums = slow_apply(groups, tokens, size.tolist(), prefix, Absorb)
        torch.testing.assert_close(found, expected, **CLOSE)
        assert total.tolist() == sums
        torch.testing.assert_close(key_size, total**0.8)


@torch.inference_mode()
@pytest.mark.parametrize("constant", [0.0, 1.0])
@pytest.mark.parametrize("name", ["class_token", "no_prefix", "no_positions"])
def test_constant_images_are_absorbed_alike(name, constant):
    """Among patches that differ in nothing, or in their position only, in a batch with an image that is none."""
    model = make_model(**{**MODELS, "no_positions": {"pos_embed": "none"}}[name])
    fast = VWTokenizer(model, None, PruningSchedule({0: Absorb(6), 2: Absorb(0.5)}))
    images = torch.cat([torch.full((2, 3, 64, 64), constant), random(1, 3, 64, 64)])
    logits = fast(images)
    assert logits.isfinite().all()
    assert torch.equal(logits, fast(images))
    # Which of equal patches absorbs another is a matter of rounding, and how often they count in all of how many each.
    close = {"atol": 3e-3, "rtol": 0} if name == "no_positions" else CLOSE
    torch.testing.assert_close(logits[0], logits[1], **close)
    torch.testing.assert_close(logits, torch.cat([fast(image[None]) for image in images]), **close)
    if name == "no_positions":  # nothing is lost: what is counted less is more of the same
        assert fast(images[:1]).argmax() == model(images[:1]).argmax()


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("cast", ["weights", "autocast"])
def test_absorbing_in_half_precision(cast, dtype):
    """Near what float32 answers, nearer than that is to the model's own answer; an image's answer is its own."""
    model, images = make_model(), random(3, 3, 64, 64)
    schedule = PruningSchedule({1: Absorb(8), 2: Absorb(0.5)})
    expected, full = VWTokenizer(model, None, schedule)(images), model(images)
    fast = VWTokenizer(model.to(dtype) if cast == "weights" else model, None, schedule)
    with torch.autocast("cpu", dtype, enabled=cast == "autocast"):
        images = images.to(dtype) if cast == "weights" else images
        logits, alone = fast(images), torch.cat([fast(image[None]) for image in images])
    assert logits.isfinite().all()
    torch.testing.assert_close(logits.float(), alone.float(), atol=0.1, rtol=0.1)
    assert (logits.float() - expected).norm() < (expected - full).norm()


@torch.inference_mode()
@pytest.mark.parametrize(
    "schedule", [{1: Absorb(5)}, {0: Merge(3), 1: Absorb(4), 2: Absorb(2)}, {0: Absorb(4), 2: Prune(3)}]
)
def test_shares_are_those_of_the_means(schedule):
    images, (rows, columns) = 2, (7, 2)
    _, steps = Backbone(make_model()).encode_packed(make_packed((14, 14), 1, False), PruningSchedule(schedule))
    words = follow(keep_all(images, (rows, columns), torch.device("cpu")), steps)
    made, sizes = torch.eye(15).expand(images, -1, -1), None
    for step in steps:
        made, sizes = step.assignments[0].apply(made, sizes)
    for image, patch in itertools.product(range(images), range(14)):
        share = made[image, 1 + words.group[image, patch], 1 + patch]
        torch.testing.assert_close(words.weight[image, patch], share)


@torch.inference_mode()
def test_absorbing_compares_the_same_under_autocast():
    tokens, received = random(3, 40, 16, seed=1), random(3, 40, seed=2).exp()
    expected = absorb(received, tokens, 20, 1)
    with torch.autocast("cpu", torch.bfloat16):
        plan = absorb(received, tokens, 20, 1)
    assert torch.equal(plan.weight, expected.weight)
    assert torch.equal(plan.target, expected.target)
