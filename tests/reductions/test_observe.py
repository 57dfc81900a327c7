import pytest
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from tests.reductions.cases import make_model, make_packed
from vwt import Merge, Prune, PruningSchedule
from vwt.models.backbone import Backbone
from vwt.reductions.absorb import Absorb


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
    targets = [image for assignment in steps[0].assignments for image in assignment.target]
    for image, key_size in zip(targets, encoded.key_size.split(list(encoded.lengths)), strict=True):
        assert key_size.tolist() == [1.0, *image.bincount().tolist()]
        assert key_size.sum() == 1 + len(image)


@torch.inference_mode()
@pytest.mark.parametrize("patches", [(14, 14), (14, 11)], ids=["dense", "ragged"])
def test_absorbing_adds_log_key_sizes_but_for_a_token_itself(patches):
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
        total = runs[later % times]
        bias = (0.8 * total + 0.2).log()[:, None, None].expand(-1, 1, total.shape[1], -1)
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
