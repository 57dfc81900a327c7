"""Which image features are read, against a loop over tokens."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vwt.models.image_tokens import place_tokens
from vwt.tokens.words import Words


def make_words(labels, generator):
    """Words of patches (B, N) with any labels, -1 for none; each patch has its own weight."""
    group = torch.full_like(labels, -1)
    for image, own in enumerate(labels):
        for number, label in enumerate(own[own >= 0].unique()):
            group[image][own == label] = number
    weight = torch.rand(group.shape, generator=generator).round(decimals=1) * (group >= 0)
    return Words(group, weight, group.amax(1) + 1, (1, labels.shape[1]))


@settings(deadline=None)
@given(st.integers(0, 2**31), st.integers(1, 3), st.integers(1, 8), st.booleans())
def test_place_tokens(seed, images, patches, shuffled):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, 4, (images, patches), generator=generator)
    labels[:, 0].clamp_(min=0)  # a strategy leaves one token at least
    words = make_words(labels, generator)
    patch = torch.arange(images * patches)
    if shuffled:  # tiles that are arranged anew and cropped, with ends of rows
        patch = torch.cat(
            [patch[torch.randperm(len(patch), generator=generator)][: len(patch) * 2 // 3], -patch[:2] - 1]
        )
        patch = patch.clamp(min=-1)
    found = place_tokens(words, patch)

    expected, first = patch < 0, {}
    for image in range(images):
        for token in range(int(words.counts[image])):
            members = [
                (-float(words.weight[image, p % patches]), place)
                for place, p in enumerate(patch.tolist())
                if p >= 0 and p // patches == image and words.group[image, p % patches] == token
            ]
            if members:
                first[image, token] = min(members)[1]
                expected[min(members)[1]] = True
    assert torch.equal(found.kept, expected)
    assert found.words.counts.tolist() == [sum(own == image for own, _ in first) for image in range(images)]
    starts = found.words.counts.cumsum(0) - found.words.counts
    rows = dict(zip(patch[found.kept].tolist(), found.rows.tolist(), strict=True))
    for image in range(images):
        order = sorted((place, token) for (own, token), place in first.items() if own == image)
        numbers = {token: number for number, (_, token) in enumerate(order)}
        assert found.words.group[image].tolist() == [numbers.get(int(token), -1) for token in words.group[image]]
        for place, token in order:
            assert rows[int(patch[place])] == int(starts[image]) + numbers[token]
    assert all(rows[p] == -1 for p in rows if p < 0)
