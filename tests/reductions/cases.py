"""Models, sequences and checks that several tests of reductions share."""

import pytest
import timm
import torch
from hypothesis import strategies as st

from tests.reductions.loops import slow_apply, slow_encode, slow_key_size, slow_target
from vwt import Merge, Prune, PruningSchedule
from vwt.models.backbone import Backbone
from vwt.reductions.absorb import Absorb
from vwt.tokens.packing import Packed

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


@st.composite
def sequences(draw):
    """Batch, prefix tokens, patches, sizes or None, key sizes or None."""
    batch, prefix, patches = draw(st.integers(1, 3)), draw(st.integers(0, 5)), draw(st.integers(1, 11))
    row = st.lists(st.integers(1, 5), min_size=patches, max_size=patches).map(lambda row: [1] * prefix + row)
    rows = st.none() | st.lists(row, min_size=batch, max_size=batch)
    return batch, prefix, patches, draw(rows), draw(rows)


def as_sizes(rows):
    return None if rows is None else torch.tensor(rows, dtype=torch.float32)


def check_assignment(assignment, groups, sequence, operation):
    """An assignment against the groups of patches that it should make in each image."""
    batch, prefix, patches, sizes, key_size = sequence
    tokens = random(batch, prefix + patches, 3, dtype=torch.float64)
    fewer, total = assignment.apply(tokens, as_sizes(sizes))
    new = operation.key_size(assignment, as_sizes(key_size), as_sizes(sizes), total, 0.25)
    assert assignment.target.tolist() == [slow_target(group) for group in groups]
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
            assert new[image].tolist() == pytest.approx(slow_key_size(group, count, sums, prefix, operation, 0.25))


def kept_patches(assignment):
    """The patches of each image that count twice in their means, in the order of their tokens."""
    images = zip(assignment.target.tolist(), assignment.weight.tolist(), strict=True)
    return [
        [patch for _, patch in sorted((to, patch) for patch, to in enumerate(target) if weight[patch] == 2)]
        for target, weight in images
    ]


def absorbed_groups(assignment):
    """Which patches each token is made of, first what is kept, as the assignment says."""
    return [
        [[keeper, *(p for p, to in enumerate(target) if to == row and p != keeper)] for row, keeper in enumerate(kept)]
        for kept, target in zip(kept_patches(assignment), assignment.target.tolist(), strict=True)
    ]


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
