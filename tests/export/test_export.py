"""torch.export and ONNX: what can be exported answers as eager does, what cannot says so."""

import pytest
import timm
import torch

from tests.export.cases import needs_tracing
from tests.matrix import matrix
from tests.test_tokenizer import EveryOther, make_images, make_inter
from vwt import Absorb, IntraImage, Merge, Neighbours, Prune, PruningSchedule, VWTokenizer
from vwt.errors import ArgumentError

pytestmark = needs_tracing
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
POOLS = {
    "token": {},
    "avg": {"global_pool": "avg"},
    "registers": {"global_pool": "avgmax", "reg_tokens": 2, "class_token": False},
    "all": {"global_pool": ""},
    "one_size": {"dynamic_img_size": False, "img_size": 160},
}
FIXED = {
    "none": lambda: None,
    "intra": lambda: IntraImage(0.4),
    "nothing_dropped": lambda: IntraImage(0),
    "near": lambda: Neighbours(0.4),
}
VARYING = {"inter": lambda: make_inter(make_model(), "embedding"), "own": EveryOther}
CASES = [("intra", pool) for pool in POOLS] + [("none", "token"), ("nothing_dropped", "avg"), ("near", "registers")]
SCHEDULES = {
    "none": None,
    "prune": PruningSchedule({1: Prune(10)}),
    "merge": PruningSchedule({1: Merge(10)}),
    "absorb": PruningSchedule({1: Absorb(30)}),
    "both": PruningSchedule({0: Merge(0.3), 1: Prune(5)}),
}
REDUCED = [
    ("none", "token", "prune"),
    ("none", "token", "merge"),
    ("none", "token", "absorb"),
    ("intra", "avg", "both"),
    ("intra", "all", "both"),
    ("intra", "registers", "absorb"),
]
REFUSED = r"gives every image its own number of tokens, which cannot be exported; export with .* \(IntraImage\)"


def make_model(**options):
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=10, **{"depth": 1, **options}).eval()


def make_batches(number=2):
    """Patches of distinct variance: among equal ones, another runtime may keep another."""
    return torch.randn(number, 2, 3, 160, 160, generator=torch.Generator().manual_seed(1)).unbind()


@torch.no_grad()
@pytest.mark.parametrize(("name", "pool"), matrix(CASES, ("intra", "token")))
def test_an_exported_program_answers_as_eager(name, pool):
    fast, (images, others) = VWTokenizer(make_model(**POOLS[pool]), FIXED[name]()), make_batches()
    program = torch.export.export(fast, (images,)).module()
    torch.testing.assert_close(program(images), fast(images), **CLOSE)
    torch.testing.assert_close(program(others), fast(others), **CLOSE)


def make_reduced(name, pool, schedule):
    return VWTokenizer(make_model(depth=3, **POOLS[pool]), FIXED[name](), SCHEDULES[schedule])


@torch.no_grad()
@pytest.mark.parametrize(("name", "pool", "schedule"), matrix(REDUCED, ("intra", "avg", "both")))
def test_an_exported_program_reduces_inside_its_blocks(name, pool, schedule):
    fast, (images, others) = make_reduced(name, pool, schedule), make_batches()
    program = torch.export.export(fast, (images,)).module()
    torch.testing.assert_close(program(images), fast(images), **CLOSE)
    torch.testing.assert_close(program(others), fast(others), **CLOSE)
    assert (fast(others) - VWTokenizer(fast.model, FIXED[name]())(others)).abs().max() > 1e-3


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "pool", "schedule"),
    matrix([*REDUCED, ("near", "avg", "both"), ("near", "token", "none")], ("near", "token", "none")),
)
def test_an_exported_program_takes_any_number_of_images(name, pool, schedule):
    fast, (images, others) = make_reduced(name, pool, schedule), make_batches()
    program = torch.export.export(fast, (images,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},)).module()
    for batch in (others, others[:1], torch.cat([images, others, images])):
        torch.testing.assert_close(program(batch), fast(batch), **CLOSE)


@pytest.mark.slow
@torch.no_grad()
def test_a_strict_export():
    fast, (images, others) = VWTokenizer(make_model(), IntraImage(0.4)), make_batches()
    program = torch.export.export(fast, (images,), strict=True).module()
    torch.testing.assert_close(program(others), fast(others), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_export_in_half_precision(dtype):
    fast, (images, others) = VWTokenizer(make_model(), IntraImage(0.4)).to(dtype), make_batches()
    program = torch.export.export(fast, (images.to(dtype),)).module()
    torch.testing.assert_close(program(others.to(dtype)), fast(others.to(dtype)))


@torch.no_grad()
def test_an_exported_program_is_saved_and_loaded(tmp_path):
    fast, (images, others) = VWTokenizer(make_model(), IntraImage(0.4)), make_batches()
    torch.export.save(torch.export.export(fast, (images,)), tmp_path / "fast.pt2")
    program = torch.export.load(tmp_path / "fast.pt2").module()
    torch.testing.assert_close(program(others), fast(others), **CLOSE)


def check_onnxruntime(fast):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    onnxruntime = pytest.importorskip("onnxruntime")
    images, others = make_batches()
    model = torch.onnx.export(fast, (images,), dynamo=True, verbose=False).model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    for batch in (images, others):
        (output,) = session.run(None, {session.get_inputs()[0].name: batch.numpy()})
        torch.testing.assert_close(torch.from_numpy(output), fast(batch), **CLOSE)


@torch.no_grad()
@pytest.mark.parametrize(("name", "pool"), matrix(CASES))
def test_onnxruntime_answers_as_eager(name, pool):
    check_onnxruntime(VWTokenizer(make_model(**POOLS[pool]), FIXED[name]()))


@torch.no_grad()
@pytest.mark.parametrize(("name", "pool", "schedule"), matrix(REDUCED))
def test_onnxruntime_reduces_inside_the_blocks(name, pool, schedule):
    check_onnxruntime(make_reduced(name, pool, schedule))


@torch.no_grad()
@pytest.mark.parametrize("name", VARYING)
def test_counts_that_depend_on_the_image_are_refused(name):
    fast = VWTokenizer(make_model(), VARYING[name]())
    with pytest.raises(ArgumentError, match=rf"^{type(fast.strategy).__name__} {REFUSED}") as error:
        torch.export.export(fast, (make_images(),))
    assert "\n" not in str(error.value)
    assert fast(make_images()).shape == (4, 10)  # eager as before


@torch.no_grad()
@pytest.mark.parametrize("name", matrix(VARYING, "own"))
def test_onnx_passes_the_reason_on(name):
    for package in ("onnx", "onnxscript"):
        pytest.importorskip(package)
    with pytest.raises(torch.onnx.OnnxExporterError, match=REFUSED) as error:
        torch.onnx.export(VWTokenizer(make_model(), VARYING[name]()), (make_images(),), dynamo=True, verbose=False)
    assert isinstance(error.value.__cause__, ArgumentError)


@pytest.mark.filterwarnings("ignore")
def test_a_trace_would_freeze_the_counts_of_one_image():
    """The exporters before torch.export record one run; the groups of its images would be those of all others."""
    with pytest.raises(ArgumentError, match=REFUSED):
        torch.jit.trace(VWTokenizer(make_model(), make_inter(make_model(), "pixel")), (make_images(),))
