import math

import pytest
import torch
from timm.data import create_transform, resolve_model_data_config

from tests.matrix import matrix
from tests.reductions.cases import make_model
from tests.strategies.test_strategies import make_codebook
from tests.test_datasets import write_images
from vwt import Absorb, InterImage, IntraImage, Merge, Neighbours, Prune, PruningSchedule, VWTokenizer
from vwt.errors import ArgumentError, DataError, ImageError
from vwt.models.spec import PatchSpec
from vwt.tuning.calibration import Calibration, Fidelity, compare, load_images

CLOSE = {"atol": 1e-5, "rtol": 1e-4}
SMALL = {"img_size": 64, "embed_dim": 48, "num_heads": 3}


def make_images(count=20, seed=0):
    """Images of large patches in plain colours, some of which repeat."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 3, (count, 3, 4, 4), generator=generator).float().repeat_interleave(16, 2)
    return images.repeat_interleave(16, 3) - 1 + 0.1 * torch.randn(count, 3, 64, 64, generator=generator)


def make_calibration(keep=0, model=None, images=None):
    model = make_model() if model is None else model
    return Calibration(model, make_images() if images is None else images, keep=keep, progress=False)


# -- how near answers are ----------------------------------------------------------------------------------------------


def test_known_fidelity():
    full = torch.tensor([[0.0, 0.0], [math.log(3), 0.0], [5.0, 1.0]])
    reduced = torch.tensor([[math.log(3), 0.0], [0.0, 0.1], [6.0, 2.0]])
    fidelity = compare(full, reduced)
    first = 0.5 * math.log(0.5 / 0.75) + 0.5 * math.log(0.5 / 0.25)
    log_sum = math.log(1 + math.exp(0.1))
    second = 0.75 * (math.log(0.75) + log_sum) + 0.25 * (math.log(0.25) + log_sum - 0.1)
    torch.testing.assert_close(fidelity.kl, torch.tensor([first, second, 0.0]), **CLOSE)
    assert fidelity.agrees.tolist() == [True, False, True]
    assert fidelity.mean_kl == pytest.approx((first + second) / 3, abs=1e-6)
    assert fidelity.agreement == pytest.approx(2 / 3)


def test_fidelity_in_half_precision_is_that_of_the_same_numbers():
    generator = torch.Generator().manual_seed(0)
    full, reduced = (torch.randn(5, 9, generator=generator).half() for _ in range(2))
    assert torch.equal(compare(full, reduced).kl, compare(full.float(), reduced.float()).kl)
    assert compare(full, reduced).kl.dtype == torch.float32


def test_means_of_fidelity():
    fidelity = Fidelity(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([True, False, True]))
    assert fidelity.mean_kl == 3.0
    assert fidelity.agreement == pytest.approx(2 / 3)


# -- what reductions change --------------------------------------------------------------------------------------------

REDUCTIONS = [
    {},
    {0: Prune(5)},
    {2: Merge(0.4)},
    {1: Absorb(4), 2: Prune(3)},
    {3: Prune(3)},
    {0: Merge(2), 3: Prune(3)},
]


BOTH = {1: Absorb(0.3), 2: Merge(0.2)}


def codebook_of(images):
    """Some patches of the first image as words."""
    model = make_model()
    spec = PatchSpec.of(model)
    with torch.no_grad():
        words = model.patch_embed(images[:1])[0, ::3]
    codebook = make_codebook(words, spec.patch_size, mean=spec.mean, std=spec.std)
    object.__setattr__(codebook, "projection", spec.projection)
    return codebook


STRATEGIES = {
    "intra": lambda: IntraImage(0.25),
    "neighbours": lambda: Neighbours(0.2),
    "near": lambda: Neighbours(threshold=0.4),
    "inter": lambda: InterImage(codebook_of(make_images()), 0.3),
}


def check_evaluated(calibration, model, strategy, reductions):
    with torch.inference_mode():
        fast = VWTokenizer(model, strategy, PruningSchedule(reductions))
        expected = compare(model(calibration.images), fast(calibration.images))
    fidelity = calibration.evaluate(reductions)
    torch.testing.assert_close(fidelity.kl, expected.kl, **CLOSE)
    assert torch.equal(fidelity.agrees, expected.agrees)
    return fidelity


@pytest.mark.parametrize("pool", ["token", "avg"])
@pytest.mark.parametrize("keep", matrix([0, 1, 64], 64))
@pytest.mark.parametrize("reductions", REDUCTIONS, ids=repr)
def test_reductions_change_what_they_change_in_the_model(reductions, keep, pool):
    model = make_model(global_pool=pool)
    calibration = make_calibration(keep, model)
    for _ in range(2):  # what is kept is not changed
        fidelity = check_evaluated(calibration, model, None, reductions)
    assert (fidelity.mean_kl > 1e-6) == (bool(reductions) and (pool == "avg" or min(reductions) < 3))


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("reductions", matrix([{}, {0: 0.2}, BOTH], BOTH), ids=repr)
def test_strategies_change_what_they_change_in_the_model(name, reductions):
    model, strategy = make_model(), STRATEGIES[name]()
    calibration = make_calibration(64, model)
    reduced = calibration.with_strategy(strategy)
    assert check_evaluated(reduced, model, strategy, PruningSchedule(reductions)).mean_kl > 1e-4
    counts = VWTokenizer(model, strategy).tokenize(make_images()).counts.float()
    assert reduced.patches() == pytest.approx(counts.mean().item())
    assert reduced.patches(1) == pytest.approx(counts[:16].mean().item())  # by batches of 16
    assert counts.max() > counts.min() or strategy.fixed_count
    # What it was made of is as it was.
    assert calibration.patches() == 16
    assert calibration.fast.strategy is None
    check_evaluated(calibration, model, None, {1: Prune(3)})


def test_only_the_first_images():
    calibration = make_calibration(16, images=make_images(40))
    everything = calibration.evaluate({1: Prune(8)})
    assert len(everything.kl) == 40
    for asked, given in ((1, 16), (16, 16), (17, 32), (33, 40), (100, 40)):
        fidelity = calibration.evaluate({1: Prune(8)}, asked)
        assert torch.equal(fidelity.kl, everything.kl[:given])


def test_too_few_images():
    with pytest.raises(ArgumentError, match="15 calibration images; expected at least 16"):
        make_calibration(images=make_images(15))
    assert len(make_calibration(images=make_images(16)).evaluate({}).kl) == 16


def test_images_of_another_size():
    with pytest.raises(ImageError, match="images are 80x80, the model takes 64x64"):
        make_calibration(images=torch.zeros(16, 3, 80, 80))


def test_a_model_in_train_mode():
    with pytest.raises(ArgumentError, match=r"train mode; call \.eval\(\)"):
        make_calibration(model=make_model().train())


@pytest.mark.parametrize("options", [{"num_classes": 1}, {"global_pool": "", "num_classes": 0}])
def test_a_model_with_neither_classes_nor_embeddings(options):
    with pytest.raises(ArgumentError, match="expected logits of classes, or embeddings"):
        make_calibration(model=make_model(**options))


# -- models that only embed images -------------------------------------------------------------------------------------


def test_other_images_are_the_classes_of_embeddings():
    """In plain code, over two batches."""
    model, images = make_model(num_classes=0), make_images(20)
    found = make_calibration(model=model, images=images).evaluate({1: Merge(6)})
    with torch.inference_mode():
        full = torch.nn.functional.normalize(model(images), dim=-1)
        reduced = torch.nn.functional.normalize(VWTokenizer(model, schedule=PruningSchedule({1: Merge(6)}))(images))
    for index, (mine, own) in enumerate(zip(full, reduced, strict=True)):
        others = [other for place, other in enumerate(full) if place != index]
        p, q = (torch.stack([100 * vector @ other for other in others]).softmax(0) for vector in (mine, own))
        assert found.kl[index].item() == pytest.approx((p * (p / q).log()).sum().item(), rel=1e-2, abs=1e-5)
        assert found.agrees[index] == (p.argmax() == q.argmax())
    assert found.mean_kl > 1e-4
    assert make_calibration(model=model).evaluate({}).mean_kl < 1e-6


def test_removal_from_a_model_that_embeds():
    calibration = make_calibration(model=make_model(num_classes=0))
    found = calibration.removal(1, [17, 3], progress=False)
    assert found[17] == 1.0 > found[3]
    with pytest.raises(ArgumentError, match="the model has no classes; leave them out"):
        calibration.removal(1, [17], torch.zeros(20, dtype=torch.int64), progress=False)


@pytest.mark.parametrize("pool", ["token", "avg", "map"])
def test_removal_leaves_what_the_head_reads(pool):
    """As timm's own head does of as many tokens."""
    model = make_model(global_pool=pool, class_token=pool == "token")
    calibration, prefix = make_calibration(images=make_images(16), model=model), int(pool == "token")
    accuracy = calibration.removal(3, [prefix + 3], seed=5, progress=False)[prefix + 3]
    order = torch.rand(16, 16, generator=torch.Generator().manual_seed(5)).argsort(1)
    with torch.inference_mode():
        tokens = calibration.backbone.embed(calibration.images)[1]
        for block in model.blocks[:3]:
            tokens = block(tokens)
        block, right = model.blocks[3], 0
        tokens = tokens + block.attn(block.norm1(tokens))
        for image, shuffled, target in zip(tokens, order, model(calibration.images), strict=True):
            x = image[[*range(prefix), *sorted((shuffled[:3] + prefix).tolist())]][None]
            x = x + block.mlp(block.norm2(x))
            right += int(model.forward_head(model.norm(x)).argmax() == target.argmax())
    assert accuracy == right / 16


# -- random removal ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [0, 2, 3])
def test_all_tokens_are_the_model(block):
    accuracy = make_calibration().removal(block, [17, 5], progress=False)
    assert accuracy[17] == 1.0
    assert list(accuracy) == [17, 5]
    assert (accuracy[5] == 1.0) == (block == 3)  # after the last attention, patches say no more


def test_removal_is_drawn_by_its_seed():
    calibration = make_calibration(images=make_images(32))
    counts = [12, 8, 5, 3, 2]
    first = calibration.removal(0, counts, seed=1, progress=False)
    assert calibration.removal(0, counts, seed=1, progress=False) == first
    assert any(calibration.removal(0, counts, seed=seed, progress=False) != first for seed in (2, 3, 4))


def test_accuracy_by_labels():
    calibration = make_calibration()
    right = torch.cat(calibration.full).argmax(1)
    wrong = (right + 1) % 10
    assert calibration.removal(1, [17], right, progress=False) == {17: 1.0}
    assert calibration.removal(1, [17], wrong, progress=False) == {17: 0.0}
    mixed = torch.where(torch.arange(20) < 15, right, wrong)
    assert calibration.removal(1, [17], mixed, progress=False)[17] == pytest.approx(0.75)


def test_removal_happens_between_attention_and_mlp():
    """In plain code, with one image a batch's worth of draws."""
    calibration, model = make_calibration(images=make_images(16)), make_model()
    accuracy = calibration.removal(1, [6], seed=5, progress=False)
    order = torch.rand(16, 16, generator=torch.Generator().manual_seed(5)).argsort(1)
    right = 0
    with torch.inference_mode():
        for image, shuffled, target in zip(calibration.images, order, model(calibration.images), strict=True):
            x = model.blocks[0](model._pos_embed(model.patch_embed(image[None])))
            block = model.blocks[1]
            x = x + block.attn(block.norm1(x))
            x = x[:, [0, *sorted((shuffled[:5] + 1).tolist())]]
            x = x + block.mlp(block.norm2(x))
            right += int(model.forward_head(model.norm(model.blocks[2:](x))).argmax() == target.argmax())
    assert accuracy == {6: right / 16}
    assert 0 < right < 16


@pytest.mark.parametrize("counts", [[], [1], [17, 0], [18], [-3]], ids=repr)
def test_counts_that_there_are_not(counts):
    with pytest.raises(ArgumentError, match="expected some of 2 to 17, without a strategy"):
        make_calibration().removal(1, counts, progress=False)


def test_removal_is_of_the_model_itself():
    with pytest.raises(ArgumentError, match="without a strategy"):
        make_calibration().with_strategy(IntraImage(0.25)).removal(1, [10], progress=False)


@pytest.mark.parametrize("block", [-1, 4, 99])
def test_a_block_that_there_is_not(block):
    with pytest.raises(ArgumentError, match=f"block.*{block}"):
        make_calibration().removal(block, [10], progress=False)


def test_labels_that_do_not_fit():
    with pytest.raises(ArgumentError, match=r"labels have shape \(19,\); expected \(20,\)"):
        make_calibration().removal(1, [17], torch.zeros(19, dtype=torch.int64), progress=False)


# -- images of a data set ----------------------------------------------------------------------------------------------


def test_images_as_the_model_takes_them(tmp_path):
    model = make_model()
    images = load_images(write_images(tmp_path / "images", 18), model, progress=False)
    assert images.shape == (18, 3, 64, 64)
    assert images.dtype == torch.float32
    config = {**resolve_model_data_config(model), "input_size": (3, 64, 64)}
    transform = create_transform(**config)
    from PIL import Image

    expected = torch.stack([transform(Image.open(path)) for path in sorted((tmp_path / "images").rglob("*.jpg"))])
    distance = (images[:, None] - expected[None]).abs().amax((2, 3, 4))
    assert sorted(distance.argmin(1).tolist()) == list(range(18))
    assert distance.min(1).values.max() < 1e-4


def test_images_are_drawn_by_a_seed(tmp_path):
    source, model = write_images(tmp_path / "images", 24), make_model()
    first = load_images(str(source), model, 16, seed=1, progress=False)
    assert len(first) == 16
    assert torch.equal(load_images(source, model, 16, seed=1, progress=False), first)
    assert not torch.equal(load_images(source, model, 16, seed=2, progress=False), first)


def test_images_have_the_dtype_of_the_model(tmp_path):
    source = write_images(tmp_path / "images", 16)
    assert load_images(source, make_model().to(torch.bfloat16), progress=False).dtype == torch.bfloat16


def test_too_few_images_of_a_data_set(tmp_path):
    write_images(tmp_path / "images", 16)
    (tmp_path / "images" / "a" / "000.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match="has 15 images that can be read; calibration needs at least 16"):
        load_images(tmp_path / "images", make_model(), progress=False)
    with pytest.raises(DataError, match="no such folder or file"):
        load_images(tmp_path / "absent", make_model(), progress=False)


def test_removal_from_images_of_another_size():
    model = make_model(dynamic_img_size=True)
    images = torch.nn.functional.interpolate(make_images(16), (80, 80))
    found = make_calibration(model=model, images=images).removal(1, [26, 9], progress=False)
    assert found[26] == 1  # nothing is removed
    with pytest.raises(ArgumentError, match="expected some of 2 to 26"):
        make_calibration(model=model, images=images).removal(1, [27], progress=False)
