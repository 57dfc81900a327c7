"""Reduced models are trained like any other: gradients, stochastic depth, checkpointing, autocast."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call

from tests.matrix import matrix
from tests.reductions.cases import make_model
from vwt import Absorb, Codebook, InterImage, IntraImage, Merge, Neighbours, Prune, PruningSchedule, VWTokenizer
from vwt.models.spec import PatchSpec

SMALL = {"img_size": 32, "patch_size": 8, "depth": 3, "embed_dim": 24, "num_classes": 4}
STRATEGIES = {
    "none": lambda model: None,
    "Neighbours": lambda model: Neighbours(0.25),
    "Neighbours, ragged": lambda model: Neighbours(threshold=0.9),
    "IntraImage": lambda model: IntraImage(0.25),
    "InterImage": lambda model: InterImage(codebook_of(model), 0.9),
}
SCHEDULES = {
    "none": {},
    "Prune": {1: Prune(3)},
    "Merge": {1: Merge(3)},
    "Absorb": {1: Absorb(3)},
    "all": {0: Absorb(2), 1: Prune(0.2), 2: Merge(2)},
}
WEIGHT = "model.blocks.0.attn.qkv.weight"


def make_images(count=3):
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(5))


def codebook_of(model):
    """A few patches of the first image as words."""
    spec = PatchSpec.of(model)
    with torch.no_grad():
        words = model.patch_embed(make_images(1))[0, ::4]
    counts = torch.ones(len(words), dtype=torch.int64)
    return Codebook(words, counts, counts, "embedding", spec.patch_size, spec.mean, spec.std, spec.projection)


def make_reduced(strategy, schedule, **options):
    model = make_model(**SMALL | options)
    return VWTokenizer(model, STRATEGIES[strategy](model), PruningSchedule(SCHEDULES[schedule]))


PAIRS = [(strategy, schedule) for strategy in STRATEGIES for schedule in SCHEDULES]
QUICK = [("Neighbours", "Absorb"), ("Neighbours, ragged", "all"), ("InterImage", "Prune"), ("none", "Merge")]
pairs = pytest.mark.parametrize(("strategy", "schedule"), matrix(PAIRS, *QUICK))


@pytest.mark.parametrize("pool", ["token", "avg"])
@pairs
def test_gradients_are_those_of_finite_differences(strategy, schedule, pool):
    fast = make_reduced(strategy, schedule, global_pool=pool).double()
    images = make_images().double().requires_grad_()
    weight = dict(fast.named_parameters())[WEIGHT].detach().clone().requires_grad_()
    if strategy != "none":
        assert min(fast.tokenize(images).counts) < 16

    def answer(images, weight):
        return functional_call(fast, {WEIGHT: weight}, images)

    assert torch.autograd.gradcheck(answer, (images, weight), fast_mode=True)


@pairs
def test_checkpointing_changes_no_gradient(strategy, schedule):
    fast, images = make_reduced(strategy, schedule), make_images()
    weight = fast.model.blocks[0].attn.qkv.weight
    expected = torch.autograd.grad(fast(images).square().sum(), weight)[0]
    fast.set_grad_checkpointing()
    gradient = torch.autograd.grad(fast(images).square().sum(), weight)[0]
    assert expected.any()
    torch.testing.assert_close(gradient, expected, atol=1e-4, rtol=1e-4)


@pairs
def test_gradients_in_autocast(strategy, schedule):
    # Not compared: in bfloat16 other tokens may be chosen.
    fast, images = make_reduced(strategy, schedule), make_images()
    with torch.autocast("cpu", torch.bfloat16):
        loss = F.cross_entropy(fast(images), torch.arange(3))
    loss.backward()
    for name, parameter in fast.named_parameters():
        assert parameter.grad.dtype == torch.float32, name
        assert parameter.grad.isfinite().all(), name
    assert dict(fast.named_parameters())[WEIGHT].grad.any()


@pairs
def test_stochastic_depth(strategy, schedule):
    fast, images = make_reduced(strategy, schedule, drop_path_rate=0.5).train(), make_images()
    whole = make_reduced(strategy, schedule)
    torch.manual_seed(0)
    first = fast(images)
    assert not torch.equal(fast(images), first)
    torch.manual_seed(0)
    assert torch.equal(fast(images), first)
    F.cross_entropy(first, torch.arange(3)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in fast.parameters())
    assert torch.equal(fast.eval()(images), whole(images))


@pytest.mark.parametrize(("strategy", "schedule"), matrix(QUICK, QUICK[0], QUICK[1]))
def test_a_reduced_model_learns(strategy, schedule):
    fast, images, labels = make_reduced(strategy, schedule).train(), make_images(), torch.tensor([2, 0, 1])
    optimizer = torch.optim.AdamW(fast.parameters(), lr=1e-3)
    for _ in range(30):
        optimizer.zero_grad()
        F.cross_entropy(fast(images), labels).backward()
        optimizer.step()
    assert torch.equal(fast.eval()(images).argmax(-1), labels)
