"""torch.compile: the same answers, without graph breaks where counts are fixed, compiled a bounded number of times."""

import os
import shutil

import pytest
import timm
import torch
import torch.nn.functional as F
from torch._dynamo.testing import CompileCounterWithBackend

from tests.export.cases import needs_tracing
from tests.matrix import matrix
from tests.test_tokenizer import EveryOther, make_images, make_inter
from vwt import Absorb, IntraImage, Merge, Prune, PruningSchedule, VWTokenizer
from vwt.strategies.neighbours import Neighbours

pytestmark = needs_tracing
CLOSE = {"atol": 1e-4, "rtol": 1e-4}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def make_model(**options):
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=10, **{"depth": 1, **options}).eval()


def compile_counted(fast, **options):
    counter = CompileCounterWithBackend("eager")
    return torch.compile(fast, backend=counter, **options), counter


def make_batches(batch, number=4):
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(batch, 3, 160, 160, generator=generator) for _ in range(number)]


FIXED = {"none": lambda: None, "intra": lambda: IntraImage(0.4), "neighbours": lambda: Neighbours(0.4, always=[3])}
POOLS = {"avg": {"global_pool": "avg"}, "all": {"global_pool": "", "reg_tokens": 2}}


# -- as many tokens for every image ------------------------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "dynamic", "batch"),
    matrix(
        [(name, *rest) for name in FIXED for rest in [(None, 1), (False, 3)]],
        ("intra", False, 3),
    ),
)
def test_fixed_counts_are_one_graph_for_all_images(name, dynamic, batch):
    fast = VWTokenizer(make_model(), FIXED[name]())
    compiled, counter = compile_counted(fast, fullgraph=True, dynamic=dynamic)
    for images in make_batches(batch):
        torch.testing.assert_close(compiled(images), fast(images), **CLOSE)
    assert counter.frame_count == 1


@torch.inference_mode()
@pytest.mark.parametrize("pool", matrix(POOLS))
def test_every_pooling_is_one_graph(pool):
    fast = VWTokenizer(make_model(**POOLS[pool]), IntraImage(0.4))
    compiled, counter = compile_counted(fast, fullgraph=True)
    for images in make_batches(2, 2):
        torch.testing.assert_close(compiled(images), fast(images), **CLOSE)
    assert counter.frame_count == 1


SCHEDULES = {
    "prune": PruningSchedule({0: Prune(10)}),
    "merge": PruningSchedule({0: Merge(10)}),
    "both": PruningSchedule({0: Merge(0.3), 1: Prune(5)}),
    "absorb": PruningSchedule({0: Absorb(30), 1: Prune(5)}),
    "absorb twice": PruningSchedule({0: Absorb(0.6), 1: Absorb(5)}),
}


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "schedule", "batch"),
    matrix(
        [
            ("none", "prune", 1),
            ("none", "merge", 3),
            ("none", "both", 1),
            ("none", "absorb", 1),
            ("intra", "both", 3),
            ("intra", "absorb twice", 1),
            ("neighbours", "absorb", 2),
        ],
        ("none", "absorb", 1),
    ),
)
def test_reductions_inside_the_blocks_are_one_graph_for_all_images(name, schedule, batch):
    fast = VWTokenizer(make_model(depth=2), FIXED[name](), SCHEDULES[schedule])
    compiled, counter = compile_counted(fast, fullgraph=True)
    for images in make_batches(batch):
        torch.testing.assert_close(compiled(images), fast(images), **CLOSE)
    assert counter.frame_count == 1


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("name", "schedule"), [("intra", "both"), ("neighbours", "absorb"), ("none", "absorb twice")])
def test_batches_of_any_size_are_one_graph(name, schedule, dtype):
    fast = VWTokenizer(make_model(depth=2), FIXED[name](), SCHEDULES[schedule]).to(dtype)
    compiled, counter = compile_counted(fast, fullgraph=True)
    for size in (2, 5, 3):
        (images,) = make_batches(size, 1)
        images = images.to(dtype)
        torch._dynamo.mark_dynamic(images, 0)
        torch.testing.assert_close(compiled(images), fast(images), **(CLOSE if dtype == torch.float32 else {}))
    assert counter.frame_count == 1


@torch.inference_mode()
@pytest.mark.parametrize("pool", matrix(POOLS, "all"))
def test_reductions_under_every_pooling_are_one_graph(pool):
    fast = VWTokenizer(make_model(depth=2, **POOLS[pool]), IntraImage(0.4), SCHEDULES["both"])
    compiled, counter = compile_counted(fast, fullgraph=True)
    for images in make_batches(2, 2):
        torch.testing.assert_close(compiled(images), fast(images), **CLOSE)
    assert counter.frame_count == 1


@torch.inference_mode()
def test_compiled_blocks_that_do_not_prune_keep_fused_attention():
    fast = VWTokenizer(make_model(depth=3), None, PruningSchedule({0: Merge(10), 1: Prune(10)}))
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    torch.compile(fast, backend=keep, fullgraph=True)(make_images())
    targets = [node.target for graph in graphs for node in graph.graph.nodes]
    assert len(graphs) == 1
    assert targets.count(F.scaled_dot_product_attention) == 2


@torch.inference_mode()
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("reduction", matrix([Prune(10), Absorb(30)]), ids=repr)
def test_what_inductor_makes_of_reductions(reduction):
    fast = VWTokenizer(make_model(depth=2), None, PruningSchedule({0: reduction}))
    compiled = torch.compile(fast)
    for images in make_batches(2, 2):
        torch.testing.assert_close(compiled(images), fast(images), **CLOSE)


# -- a number of tokens of its own for every image ---------------------------------------------------------------------


@torch.inference_mode()
@pytest.mark.parametrize("space", matrix(["pixel", "embedding"], "pixel"))
def test_images_of_other_counts_are_not_compiled_again(space):
    fast = VWTokenizer(make_model(), make_inter(make_model(), space))
    compiled, counter = compile_counted(fast)
    frames = []
    for count, image in zip((100, 81, 61, 41), make_images().split(1), strict=True):
        assert fast.tokenize(image).lengths == (count,)
        torch.testing.assert_close(compiled(image), fast(image), **CLOSE)
        frames.append(counter.frame_count)
    assert frames == [frames[0], *[frames[0] + 1] * 3]  # the blocks once more, for any number of tokens


@pytest.mark.slow
@torch.inference_mode()
def test_batches_of_other_counts_are_not_compiled_again():
    images, fast = make_images(), VWTokenizer(make_model(), make_inter(make_model(), "pixel"))
    compiled, counter = compile_counted(fast)
    equal, unequal = [[1, 1], [2, 2], [3, 3], [0, 0]], [[0, 1], [2, 3], [3, 1], [1, 2], [2, 0]]
    frames = []
    for pair in [*equal, *unequal, *equal]:
        torch.testing.assert_close(compiled(images[pair]), fast(images[pair]), **CLOSE)
        frames.append(counter.frame_count)
    assert set(frames[1:]) == {frames[0] + 1}


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.parametrize("pool", POOLS)
def test_every_pooling_is_compiled_a_bounded_number_of_times(pool):
    images, fast = make_images(), VWTokenizer(make_model(**POOLS[pool]), make_inter(make_model(), "pixel"))
    compiled, counter = compile_counted(fast)
    frames = []
    for first in (1, 2, 3, 0, 1, 3):
        for order in ([first] * 2, [first, (first + 1) % 4]):
            torch.testing.assert_close(compiled(images[order]), fast(images[order]), **CLOSE)
        frames.append(counter.frame_count)
    assert len(set(frames[1:])) == 1


@pytest.mark.slow
@torch.inference_mode()
def test_reductions_of_images_of_other_counts_are_compiled_a_bounded_number_of_times():
    images, fast = make_images(), VWTokenizer(make_model(), make_inter(make_model(), "pixel"), SCHEDULES["merge"])
    compiled, counter = compile_counted(fast)
    frames = []
    for first in (1, 2, 3, 0, 1):
        for order in ([first], [first, (first + 1) % 4]):
            torch.testing.assert_close(compiled(images[order]), fast(images[order]), **CLOSE)
        frames.append(counter.frame_count)
    assert len(set(frames[-3:])) == 1


@pytest.mark.slow
@torch.inference_mode()
def test_the_blocks_are_compiled_for_any_number_of_tokens():
    fast = VWTokenizer(make_model(), make_inter(make_model(), "pixel"))
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph

    compiled = torch.compile(fast, backend=keep)
    for image in make_images().split(1):
        compiled(image)
    kernels = [[node.target for node in graph.graph.nodes].count(F.scaled_dot_product_attention) for graph in graphs]
    assert [count for count in kernels if count] == [1, 1]  # with the one block, for one number of tokens and for any


@pytest.mark.slow
@torch.inference_mode()
@pytest.mark.skipif(not shutil.which(os.environ.get("CXX", "g++")), reason="inductor needs a C++ compiler")
def test_what_inductor_makes_of_any_number_of_tokens():
    fast = VWTokenizer(make_model(), make_inter(make_model(), "pixel"))
    compiled = torch.compile(fast, dynamic=True)
    for image in make_images().split(1):
        torch.testing.assert_close(compiled(image), fast(image), **CLOSE)


@pytest.mark.slow
@torch.inference_mode()
def test_a_strategy_of_ones_own():
    fast = VWTokenizer(make_model(), EveryOther())
    compiled, _ = compile_counted(fast)
    for images in make_batches(2, 2):
        torch.testing.assert_close(compiled(images), fast(images), **CLOSE)


# -- precision and training --------------------------------------------------------------------------------------------

STRATEGIES = {
    "intra": FIXED["intra"],
    "inter": lambda: make_inter(make_model(), "pixel"),
    "neighbours": FIXED["neighbours"],
    "near": lambda: Neighbours(threshold=0.7),
}


@torch.inference_mode()
@pytest.mark.parametrize(
    ("name", "dtype"),
    matrix(
        [(name, dtype) for name in STRATEGIES for dtype in (torch.float16, torch.bfloat16)],
        ("intra", torch.float16),
    ),
)
def test_half_precision(name, dtype):
    fast = VWTokenizer(make_model(), STRATEGIES[name]()).to(dtype)
    images = make_images().to(dtype)
    compiled, _ = compile_counted(fast)
    for batch in (images, images[3:]):
        assert torch.equal(compiled(batch), fast(batch))


@torch.inference_mode()
@pytest.mark.parametrize("name", matrix(STRATEGIES))
def test_autocast(name):
    fast = VWTokenizer(make_model(), STRATEGIES[name]())
    compiled, _ = compile_counted(fast)
    with torch.autocast("cpu", torch.bfloat16):
        for batch in (make_images(), make_images()[1:2]):
            output = compiled(batch)
            assert output.dtype == torch.bfloat16
            torch.testing.assert_close(output, fast(batch))


@pytest.mark.parametrize(
    ("name", "size"), matrix([(name, size) for name in STRATEGIES for size in (1, 4)], ("intra", 1))
)
def test_gradients(name, size):
    fast = VWTokenizer(make_model(), STRATEGIES[name]())
    weight, images = fast.model.blocks[0].attn.qkv.weight, make_images()[-size:]
    expected = torch.autograd.grad(fast(images).square().sum(), weight)[0]
    compiled = torch.compile(fast, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(images).square().sum(), weight)[0], expected, **CLOSE)


@pytest.mark.slow
def test_gradients_through_reductions():
    fast = VWTokenizer(make_model(depth=2), IntraImage(0.4), SCHEDULES["both"])
    weight, images = fast.model.blocks[0].attn.qkv.weight, make_images()
    expected = torch.autograd.grad(fast(images).square().sum(), weight)[0]
    compiled = torch.compile(fast, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(images).square().sum(), weight)[0], expected, **CLOSE)


@pytest.mark.parametrize("name", matrix(STRATEGIES))
def test_training_with_dropout(name):
    fast = VWTokenizer(make_model(proj_drop_rate=0.2, drop_path_rate=0.2, attn_drop_rate=0.2), STRATEGIES[name]())
    compiled = torch.compile(fast.train(), backend="aot_eager")
    for images in (make_images(), make_images()[1:2]):
        F.cross_entropy(compiled(images), torch.zeros(len(images), dtype=torch.int64)).backward()
    assert all(parameter.grad.isfinite().all() for parameter in fast.model.parameters())
