"""What reductions do, in plain loops, for one image."""

import math

import torch

from vwt import Merge, Prune
from vwt.reductions.absorb import Absorb


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


def slow_scores(patches, received, following):
    """Attention received times the distance to the most similar patch that receives more, early times its root."""

    def distance(a):
        nearest = max(
            (correlation(patches[a], patches[b]) for b, more in enumerate(received) if more > received[a]), default=0
        )
        return min(1 - nearest, 1)  # also where none is similar

    distances = [max(distance(a), 1e-3) for a in range(len(received))]
    if following >= 0.5:
        distances = [math.sqrt(one) for one in distances]
    return [one * far for one, far in zip(received, distances, strict=True)]


def slow_absorb(patches, received, removed, following):
    """The patches of each token that is left, first the one that is kept; in the order of their scores."""
    scores = slow_scores(patches, received, following)
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


def slow_target(groups):
    """The token of each patch."""
    return [token for _, token in sorted((patch, token) for token, group in enumerate(groups) for patch in group)]


def slow_key_size(groups, key_size, total, prefix, operation, following):
    """How often attention counts each token: a merged one as often as its parts, the mean of several once.

    After absorbing, by what it stands for and the share of the blocks that follow, whatever came before.
    """
    if operation is Absorb:
        return [1 + (1 - 0.4 * following) * (size - 1) for size in total]
    new = key_size[:prefix] + [sum(key_size[prefix + patch] for patch in group) for group in groups]
    if operation is Prune and len(groups[-1]) > 1:
        new[-1] = 1
    return new


def slow_encode(model, tokens, sizes, schedule):
    """Encode tokens (n, C) of one image, of which each patch token stands for some patches.

    Returns the encoded tokens, their sizes, and which of the patch tokens that entered make each.
    """
    prefix, key_size, bias_on_self = model.num_prefix_tokens, [1] * len(tokens), True
    sizes, parts = [1] * prefix + list(sizes), [[patch] for patch in range(len(tokens) - prefix)]
    tokens = model.norm_pre(tokens)
    for index, block in enumerate(model.blocks):
        bias, normed = [[math.log(count) for count in key_size] for _ in key_size], block.norm1(tokens)
        if not bias_on_self:
            bias = [[0.0 if i == j else one for j, one in enumerate(row)] for i, row in enumerate(bias)]
        mixed = block.attn(normed[None], attn_mask=tokens.new_tensor(bias)[None, None])[0]
        tokens = tokens + block.ls1(mixed)
        if index in schedule:
            attn, reduction = block.attn, schedule[index]
            following = (len(model.blocks) - 1 - index) / len(model.blocks)
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
                received = slow_received(query, key, prefix, bias)
                groups = slow_absorb(tokens[prefix:].tolist(), received, removed, following)
            tokens, sizes = slow_apply(groups, tokens, sizes, prefix, operation)
            key_size = slow_key_size(groups, key_size, sizes, prefix, operation, following)
            bias_on_self = bias_on_self and operation is not Absorb
            parts = [[part for patch in group for part in parts[patch]] for group in groups]
        tokens = tokens + block.ls2(block.mlp(block.norm2(tokens)))
    return model.norm(tokens), sizes, parts
