import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from tests.matrix import matrix
from tests.reductions.cases import (
    CLOSE,
    MODELS,
    absorbed_groups,
    check_assignment,
    kept_patches,
    make_model,
    make_packed,
    random,
    sequences,
)
from tests.reductions.loops import correlation, slow_absorb, slow_apply, slow_received, slow_scores
from vwt import Merge, Prune, PruningSchedule, VWTokenizer
from vwt.models.backbone import Backbone
from vwt.reductions.absorb import Absorb, absorb, exponent
from vwt.reductions.reducing import reduce_after
from vwt.tokens.packing import Packed

# No two of them are alike: correlations are 1, 0 and -1, and 0 with the last one, whose channels are all the same.
PATTERNS = [[1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1], [-1, -1, 1, 1], [-2, 2, -2, 2], [3, 3, 3, 3]]

EARLY, LATE = 0.5, 0.49  # share of the blocks that follow


def check_absorbed(assignment, received, patches, following):
    """Kept patches have the highest scores, and no kept patch is more similar to a patch than its target."""
    for image, (one, rows) in enumerate(zip(received, patches, strict=True)):
        kept, target = kept_patches(assignment)[image], assignment.target[image].tolist()
        scores = slow_scores(rows, one, following)
        dropped = sorted(set(range(len(one))) - set(kept), key=lambda patch: -scores[patch])
        order = [scores[patch] for patch in kept + dropped]
        assert all(more >= less - 1e-3 * max(one) for more, less in itertools.pairwise(order))
        for patch in dropped:
            alike = [correlation(rows[patch], rows[keeper]) for keeper in kept]
            assert alike[target[patch]] == pytest.approx(max(alike), abs=1e-4)


@given(sequences(), st.data())
def test_absorbing_equals_a_loop(sequence, data):
    """Of equal scores the first are kept; of kept patches that are equally similar, any may be the target."""
    batch, prefix, patches, *_ = sequence
    row = st.lists(st.integers(0, 4), min_size=patches, max_size=patches)
    received = data.draw(st.lists(row, min_size=batch, max_size=batch))
    row = st.lists(st.sampled_from(PATTERNS), min_size=patches, max_size=patches)
    rows = data.draw(st.lists(row, min_size=batch, max_size=batch))
    removed, following = data.draw(st.integers(0, patches - 1)), data.draw(st.sampled_from([EARLY, LATE]))
    tensors = torch.tensor(received, dtype=torch.float32), torch.tensor(rows, dtype=torch.float32)
    assignment = absorb(*tensors, removed, prefix, following)
    check_absorbed(assignment, received, rows, following)
    expected = [slow_absorb(*image, removed, following) for image in zip(rows, received, strict=True)]
    assert kept_patches(assignment) == [[group[0] for group in image] for image in expected]
    check_assignment(assignment, absorbed_groups(assignment), sequence, Absorb)


@given(st.integers(1, 30), st.integers(2, 9), st.integers(0, 999), st.data())
def test_absorbing_any_patches_equals_a_loop(patches, width, seed, data):
    removed, prefix = data.draw(st.integers(0, patches - 1)), data.draw(st.integers(0, 5))
    rows, received = random(2, patches, width, seed=seed), random(2, patches, seed=seed + 1).exp()
    scale, following = data.draw(st.sampled_from([1.0, 100.0])), data.draw(st.sampled_from([EARLY, LATE]))
    assignment = absorb(received, scale * rows + scale, removed, prefix, following)
    check_absorbed(assignment, received.tolist(), rows.tolist(), following)
    check_assignment(assignment, absorbed_groups(assignment), (2, prefix, patches, None, None), Absorb)


def test_exponent_of_the_distance():
    """The root up to block 5 of 12, and the distance from block 6 on."""
    assert [exponent((11 - block) / 12) for block in range(12)] == [0.5] * 6 + [1.0] * 6


def test_known_answers_of_absorbing():
    """Of a copy of a patch that receives more, early a thirtieth of what it receives counts, late a thousandth."""
    strong, other, copy, weak = [1, 1, -1, -1], [1, -1, 1, -1], [2, 2, -2, -2], [1, -1, -1, 1]
    patches = torch.tensor([[weak, copy, other, strong]], dtype=torch.float32)

    def kept(*received, removed=2, following=EARLY):
        return kept_patches(absorb(torch.tensor([received]), patches, removed, 0, following))[0]

    assert kept(1.0, 9.0, 8.0, 10.0, removed=0) == [3, 2, 0, 1]
    assert kept(0.28, 9.0, 8.0, 10.0) == [3, 2]
    assert kept(0.28, 9.0, 8.0, 10.0, removed=1) == [3, 2, 1]  # 9 times the root of 0.001 is 0.285
    assert kept(0.29, 9.0, 8.0, 10.0, removed=1) == [3, 2, 0]
    assert kept(0.008, 9.0, 8.0, 10.0, removed=1, following=LATE) == [3, 2, 1]  # and times 0.001 is 0.009
    assert kept(0.010, 9.0, 8.0, 10.0, removed=1, following=LATE) == [3, 2, 0]
    assert kept(1.0, 10.0, 8.0, 9.0) == [1, 2]  # the other of the two receives more
    assert kept(1.0, 10.0, 8.0, 10.0) == [1, 3]  # neither of them receives more


def test_known_answers_of_what_absorbs():
    """A kept patch of two patches is twice in the mean, one of three that it absorbs once."""
    patches = torch.tensor([[[1.0, 1.0, -1.0, -1.0], [6.0, 6.0, -8.0, -8.0], [1.0, -1.0, 1.0, -1.0]]])
    assignment = absorb(torch.tensor([[3.0, 2.0, 1.0]]), patches, 1, 0, EARLY)
    assert absorbed_groups(assignment) == [[[0, 1], [2]]]
    fewer, total = assignment.apply(patches, torch.tensor([[2.0, 3.0, 5.0]]))
    mean = [(2 * 2 * 1 + 3 * 6) / 7, (2 * 2 * 1 + 3 * 6) / 7, -4.0, -4.0]
    torch.testing.assert_close(fewer, torch.tensor([[mean, patches[0, 2].tolist()]]))
    assert total.tolist() == [[5.0, 5.0]]
    for following, expected in {0.0: 5.0, 0.75: 3.8, 0.25: 4.6}.items():  # 1 + 4 (1 - 0.4 f)
        key_size = Absorb.key_size(assignment, None, None, total, following)
        torch.testing.assert_close(key_size, torch.full((1, 2), expected))


@given(st.integers(0, 999), st.integers(1, 4), st.integers(1, 5), st.sampled_from([EARLY, LATE]))
def test_of_patches_that_are_alike_one_is_kept(seed, kinds, copies, following):
    """The strongest of each kind, however many copies there are and wherever they stand; the copies go to it."""
    generator = torch.Generator().manual_seed(seed)
    kind = torch.arange(kinds).repeat(copies)[torch.randperm(kinds * copies, generator=generator)]
    received = 1 + torch.rand(len(kind), generator=generator)
    patches = torch.tensor(PATTERNS[:kinds], dtype=torch.float32)[kind] * (
        1 + torch.rand(len(kind), 1, generator=generator)
    )
    assignment = absorb(received[None], patches[None], len(kind) - kinds, 0, following)
    strongest = [max((kind == k).nonzero().flatten().tolist(), key=received.__getitem__) for k in range(kinds)]
    assert sorted(kept_patches(assignment)[0]) == sorted(strongest)
    for keeper, *others in absorbed_groups(assignment)[0]:
        assert all(kind[other] == kind[keeper] for other in others)
        assert len(others) == copies - 1


@pytest.mark.parametrize("bias", [None, "keys", "square"])
@pytest.mark.parametrize(("prefix", "following"), [(0, EARLY), (1, LATE), (5, EARLY)])
def test_what_absorbing_reads_of_attention(prefix, following, bias):
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
    assignment = reduction.assign(seen[0], tokens, prefix, following)
    patches = tokens[:, prefix:].tolist()
    groups = [slow_absorb(image, row, 5, following) for image, row in zip(patches, expected, strict=True)]
    check_assignment(assignment, groups, (2, prefix, 9, None, None), Absorb)


@pytest.mark.parametrize("scale", [1e-3, 1e3])
def test_likeness_does_not_depend_on_how_large_patches_are(scale):
    """As tokens differ from model to model: likeness is of their channels' correlation."""
    tokens, received = random(2, 41, 8), random(2, 40).exp()
    assignment, same = (Absorb(25).assign(received, values, 1, EARLY) for values in (tokens, scale * tokens))
    assert assignment.target.tolist() == same.target.tolist()


@pytest.mark.parametrize("prefix", [0, 1, 5])
@pytest.mark.parametrize("sized", [True, False])
def test_one_patch_absorbs_all(sized, prefix):
    tokens, received = random(2, prefix + 9, 5), random(2, 9).exp()
    sizes = F.pad(torch.arange(1.0, 10.0).expand(2, -1), (prefix, 0), value=1.0) if sized else None
    fewer, total = Absorb(100).assign(received, tokens, prefix, LATE).apply(tokens, sizes)
    assert fewer.shape == (2, prefix + 1, 5)
    assert total[:, prefix].tolist() == [45 if sized else 9] * 2
    weight = torch.ones(2, 9) if sizes is None else sizes[:, prefix:].clone()
    weight[range(2), received.argmax(1)] *= 2  # it receives most, so that its score is the highest
    mean = (tokens[:, prefix:] * weight[..., None]).sum(1) / weight.sum(1, keepdim=True)
    torch.testing.assert_close(fewer[:, prefix], mean)
    assert torch.equal(fewer[:, :prefix], tokens[:, :prefix])


@pytest.mark.parametrize("patches", ["equal", "constant", "zero"])
@pytest.mark.parametrize("receive", ["alike", "nothing", "unlike"])
@pytest.mark.parametrize("following", [EARLY, LATE])
def test_absorbing_among_equals_is_finite_and_the_same_again(receive, patches, following):
    """Equal patches that receive as much, or nothing; patches whose channels are all the same."""
    tokens = (
        random(1, 1, 8).expand(3, 9, 8) if patches == "equal" else torch.full((3, 9, 8), 2.0 * (patches == "constant"))
    )
    received = {"alike": torch.ones(3, 9), "nothing": torch.zeros(3, 9), "unlike": torch.arange(27.0).view(3, 9)}[
        receive
    ]
    assignment, again = (Absorb(6).assign(received, tokens, 0, following) for _ in range(2))
    fewer, total = assignment.apply(tokens, None)
    torch.testing.assert_close(fewer, tokens[:, :3])
    assert total.sum(1).tolist() == [9] * 3
    assert assignment.target.tolist() == again.target.tolist()
    for image in range(3):
        alone = Absorb(6).assign(received[image : image + 1], tokens[image : image + 1], 0, following)
        assert kept_patches(alone) == kept_patches(assignment)[image : image + 1]
    if receive != "unlike":
        assert kept_patches(assignment) == [[0, 1, 2]] * 3
    else:
        assert kept_patches(assignment) == [[8, 7, 6]] * 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_patches_in_half_precision_are_compared_in_float32(dtype):
    """Patches that have much in common, whose correlations are equal in half precision."""
    tokens, received = (random(2, 1, 64) + 0.1 * random(2, 41, 64, seed=1)).to(dtype), random(2, 40).exp()
    assignment, same = (Absorb(25).assign(received, values, 1, EARLY) for values in (tokens, tokens.float()))
    assert assignment.target.tolist() == same.target.tolist()
    fewer, _ = assignment.apply(tokens, None)
    assert fewer.dtype == dtype
    assert fewer.isfinite().all()


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
@pytest.mark.parametrize("name", matrix(["class_token", "no_prefix", "registers"], "registers"))
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
        return reduce_after(attend, some, Absorb(amount), prefix, 0.5, one_by_one=False)[0]

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
        groups = slow_absorb(tokens[prefix:].tolist(), slow_received(heads, heads, prefix), removed, 0.5)
        expected, sums = slow_apply(groups, tokens, size.tolist(), prefix, Absorb)
        torch.testing.assert_close(found, expected, **CLOSE)
        assert total.tolist() == sums
        torch.testing.assert_close(key_size, 1 + 0.8 * (total - 1))


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
    if name == "no_positions":  # nothing is lost: all patches are the same
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
def test_absorbing_compares_the_same_under_autocast():
    tokens, received = random(3, 40, 16, seed=1), random(3, 40, seed=2).exp()
    expected = absorb(received, tokens, 20, 1, EARLY)
    with torch.autocast("cpu", torch.bfloat16):
        assignment = absorb(received, tokens, 20, 1, EARLY)
    assert torch.equal(assignment.weight, expected.weight)
    assert torch.equal(assignment.target, expected.target)
