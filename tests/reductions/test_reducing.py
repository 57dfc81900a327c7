import itertools

import pytest
import torch
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)

from tests.matrix import matrix
from tests.reductions.cases import (
    CLOSE,
    KINDS,
    LENGTHS,
    MODELS,
    SCHEDULES,
    absorbed_groups,
    check_encoded,
    make_model,
    make_packed,
    random,
)
from tests.reductions.loops import slow_apply, slow_encode
from tests.test_tokenizer import make_images, make_inter
from vwt import IntraImage, Merge, Prune, PruningSchedule, VWTokenizer
from vwt.errors import ModelError
from vwt.models.backbone import Backbone
from vwt.reductions.absorb import Absorb
from vwt.reductions.reducing import follow
from vwt.reductions.reduction import patches_entering
from vwt.tokens.packing import Packed
from vwt.tokens.words import keep_all, unmerge


@torch.inference_mode()
@pytest.mark.parametrize("sized", [True, False], ids=["words", "patches"])
@pytest.mark.parametrize(
    ("schedule", "lengths"),
    matrix(itertools.product(SCHEDULES, LENGTHS), *((name, "ragged") for name in SCHEDULES), ("prune", "one")),
)
def test_reductions_equal_a_loop_over_images(schedule, lengths, sized):
    model = make_model()
    check_encoded(model, make_packed(LENGTHS[lengths], 1, sized), SCHEDULES[schedule])


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "schedule"),
    matrix(
        itertools.product(MODELS, ["prune", "merge", "prune, merge, prune", "absorb", "absorb, merge, prune"]),
        *((name, "absorb, merge, prune") for name in MODELS),
    ),
)
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
    """Merges first, so that every token of it counts more than once in attention."""
    backbone, packed, merges = Backbone(make_model()), make_packed((16, 8), 1, True), {0: Merge(4), 1: Merge(2)}
    first, _ = backbone.encode_packed(packed, PruningSchedule(merges))
    twice, _ = backbone.encode_packed(packed, PruningSchedule({**merges, 2: KINDS[kind](0.1)}))
    assert (first.lengths, twice.lengths) == ((11, 3), (10, 3))
    assert (first.key_size[-2:] > 1).all()
    one, other = first.split()[1], twice.split()[1]
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
        assignment = steps[0].assignments[0 if packed.is_dense else image]
        target = assignment.target[image if packed.is_dense else 0].tolist()
        groups = [[patch for patch, to in enumerate(target) if to == token] for token in range(max(target) + 1)]
        if kind == "absorb":
            groups = absorbed_groups(assignment)[image if packed.is_dense else 0]
        fewer, sizes = slow_apply(groups, half, [1] * len(half), prefix, KINDS[kind])
        fewer = fewer + block.norm2(block.mlp(fewer))
        totals = torch.tensor(sizes)[None, None, None]
        absorbed = (0.8 * totals + 0.2).log() * (1 - torch.eye(len(sizes)))
        bias = {"prune": None, "merge": totals.log(), "absorb": absorbed}[kind]
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


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "schedule"),
    matrix(
        itertools.product(
            ["none", "intra", "inter"], [{1: Prune(20)}, {1: Merge(20)}, {1: Absorb(0.7)}, {0: Merge(15), 2: Prune(10)}]
        ),
        ("none", {1: Prune(20)}),
        ("intra", {0: Merge(15), 2: Prune(10)}),
        ("inter", {1: Absorb(0.7)}),
    ),
    ids=repr,
)
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
