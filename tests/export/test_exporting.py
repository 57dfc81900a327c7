"""Exported files: they answer as the model on photographs, say how images are prepared, or are not written."""

import json
import warnings
from dataclasses import replace

import pytest
import timm
import torch
import torch.nn.functional as F

from tests.export.cases import needs_tracing
from tests.test_tokenizer import make_inter
from vwt import Absorb, IntraImage, Merge, Neighbours, Plan, Prune, PruningSchedule, VWTokenizer
from vwt.cli import main
from vwt.errors import ArgumentError, ExportError, ImageError, MismatchError
from vwt.export import exporting
from vwt.export.exporting import Parity, check_target, export
from vwt.export.formats import FORMATS, write_onnx
from vwt.export.runtimes import Answer, check_runtime
from vwt.tuning.plan import Point
from vwt.tuning.profile import LatencyProfile

pytestmark = needs_tracing
MIXED = PruningSchedule({0: Absorb(20), 1: Merge(5)})
# Small variants with random weights; of DINOv2 without classes.
FAMILIES = {
    "dinov2": lambda: timm.create_model("vit_small_patch14_reg4_dinov2", img_size=112, depth=3, num_classes=0),
    "eva02": lambda: timm.create_model("eva02_tiny_patch14_224", img_size=112, depth=3, num_classes=10),
    "siglip": lambda: timm.create_model("vit_base_patch16_siglip_224", img_size=112, depth=2, embed_dim=192),
}


def need(suffix, precision="float32"):
    try:
        check_runtime(FORMATS[suffix].runtime, precision)
    except ArgumentError as error:
        pytest.skip(str(error))


def make_plan(small_vit, /, batch_size=1, **changes):
    own = LatencyProfile.identify(small_vit)
    point = Point({"name": "Neighbours", "drop": 0.2}, MIXED, 7.5, 0.75, 0.0125, 0.9375)
    machine = {name: own[name] for name in ("cpu", "device", "threads")}
    known = {"model": own["model"], "batch_size": batch_size, "precision": own["precision"], "machine": machine}
    known |= {"goal": {"ratio": 0.75}, "chosen": point, "front": [point], "runtime": "onnxruntime"}
    return Plan(**{**known, **changes})


# -- what is written ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_answers_photographs_as_the_model(suffix, vit_tiny, photographs, tmp_path):
    need(suffix)
    fast = VWTokenizer(vit_tiny, Neighbours(0.2), PruningSchedule({3: Absorb(60)}))
    parity = export(fast, tmp_path / f"fast{suffix}", photographs, progress=False)
    assert parity.images == 64
    assert parity.agreement >= 0.98  # where two patches are as good as equal, either may be kept
    assert parity.median < 1e-3
    assert parity.milliseconds > 0
    assert str(parity).startswith(f"{tmp_path / 'fast'}{suffix}: for {FORMATS[suffix].runtime}, float32, any number")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_in_every_format(family, suffix, photographs, tmp_path):
    need(suffix)
    torch.manual_seed(0)
    model = FAMILIES[family]().eval()
    fast = VWTokenizer(model, Neighbours(0.2), PruningSchedule({0: Absorb(10), 1: Prune(5)}))
    images = F.interpolate(photographs, 112)
    parity = export(fast, tmp_path / f"fast{suffix}", images, batch_size=3, progress=False)
    assert parity.agreement >= 0.98
    assert parity.median < 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("suffix", [".xml", ".pt2"])
def test_bfloat16(suffix, fast, images, tmp_path):
    need(suffix, "bfloat16")
    fast = fast.to(torch.bfloat16)
    parity = export(fast, tmp_path / f"fast{suffix}", images.bfloat16(), progress=False)
    assert parity.precision == "bfloat16"
    assert parity.agreement >= 0.9


@pytest.mark.slow
@pytest.mark.parametrize("name", ["near", "intra"])
def test_runtimes_get_no_sums_by_index(name, images, tmp_path):
    """They have no fast kernels for scatters that add, and some none at all."""
    onnx = pytest.importorskip("onnx")
    need(".onnx")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=10, depth=3, global_pool="avg").eval()
    strategy = Neighbours(0.3) if name == "near" else IntraImage(0.3)
    fast = VWTokenizer(model, strategy, PruningSchedule({0: Absorb(10), 1: Merge(5), 2: Prune(5)}))
    write_onnx(Answer(fast), images[:2], tmp_path / "fast.onnx")
    nodes = onnx.load(tmp_path / "fast.onnx").graph.node
    scatters = [node for node in nodes if node.op_type.startswith("Scatter")]
    assert "ScatterND" not in [node.op_type for node in scatters]
    assert {a.s for node in scatters for a in node.attribute if a.name == "reduction"} <= {b"none"}


def read_onnx(path):
    session = pytest.importorskip("onnxruntime").InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.get_modelmeta().custom_metadata_map["vwt"]


def read_openvino(path):
    return pytest.importorskip("openvino").Core().read_model(path).get_rt_info("vwt").value


def read_package(path):
    return torch._inductor.aoti_load_package(str(path)).get_metadata()["vwt"]


READERS = {".onnx": read_onnx, ".xml": read_openvino, ".pt2": read_package}


@pytest.mark.slow
@pytest.mark.parametrize("suffix", FORMATS)
def test_a_file_says_how_images_are_prepared_and_what_was_planned(suffix, small_vit, images, tmp_path):
    need(suffix)
    plan = make_plan(small_vit, batch_size=2, runtime=FORMATS[suffix].runtime)
    parity = plan.export(small_vit, tmp_path / f"fast{suffix}", images, progress=False)
    assert parity.batch_size == 2
    said = json.loads(READERS[suffix](tmp_path / f"fast{suffix}"))
    assert said["model"] == plan.model
    assert said["precision"] == "float32"
    mean, std = ([0.5] * 3 for _ in range(2))
    preparation = {"interpolation": "bicubic", "crop_pct": 0.95, "crop_mode": "center"}
    assert said["preprocessing"] == {"input_size": [3, 160, 160], "mean": mean, "std": std, **preparation}
    assert said["strategy"] == "Neighbours(drop=0.2)"
    assert said["schedule"] == {"0": "Absorb(20)", "1": "Merge(5)"}
    assert said["plan"]["chosen"] == plan.chosen.to_json()
    left = {f"fast{suffix}", "fast.bin"} if suffix == ".xml" else {f"fast{suffix}"}
    assert {file.name for file in tmp_path.iterdir()} == left


def test_the_command(small_vit, images, tmp_path, monkeypatch, capsys):
    need(".onnx")
    plan = make_plan(small_vit)
    plan.save(tmp_path / "plan.json")
    monkeypatch.setattr("vwt.commands.exporting.open_model", lambda arguments: small_vit)
    monkeypatch.setattr("vwt.commands.exporting.load_images", lambda source, model, count, **options: images[:count])
    (tmp_path / "images").mkdir()
    call = ["export", "--plan", f"{tmp_path}/plan.json", "--model", "test_vit", "--images", f"{tmp_path}/images"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert main([*call, "--to", f"{tmp_path}/fast.onnx", "--count", "64", "--quiet"]) == 0
    first, second, third, last = capsys.readouterr().out.splitlines()
    assert first == f"{tmp_path}/fast.onnx: for onnxruntime, float32, any number of images"
    assert second.startswith("64 images: agreement 100.0 %, largest difference ")
    assert third.startswith("latency ")
    assert last == f"{tmp_path}/fast.onnx"
    assert main([*call, "--to", f"{tmp_path}/fast.onnx", "--count", "63"]) == 2
    assert capsys.readouterr().err == "vwt: --count is 63; expected at least 64\n"
    assert main([*call, "--to", f"{tmp_path}/fast.engine"]) == 2
    assert "expected a name that ends in .onnx, .xml, .pt2" in capsys.readouterr().err


# -- what is not written -----------------------------------------------------------------------------------------------


def test_a_file_that_answers_otherwise_is_not_left_behind(fast, images, tmp_path, monkeypatch):
    def write(answer, example, path, metadata=None):
        path.write_text("new")

    def wrong(path, precision, shape):
        return lambda batch: fast(batch).flip(1)

    (tmp_path / "fast.onnx").write_text("old")
    monkeypatch.setitem(exporting.FORMATS, ".onnx", replace(FORMATS[".onnx"], write=write, open=wrong))
    with pytest.raises(ExportError, match=r"not written, as it answers otherwise than the model: agreement [\d.]+ %"):
        export(fast, tmp_path / "fast.onnx", images, progress=False)
    assert [file.read_text() for file in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize(("median", "agreement"), [(0.02, 1.0), (float("nan"), 1.0), (0.0, 0.97)])
def test_tolerance(median, agreement):
    parity = Parity("fast.onnx", "onnxruntime", "float32", 64, 0.0, 0.001, 0.99, 1.0, 0.7, 1)
    exporting._check(parity, exporting.TOLERANCE["float32"])
    with pytest.raises(ExportError, match="try another format"):
        exporting._check(replace(parity, median=median, agreement=agreement), exporting.TOLERANCE["float32"])


def test_counts_of_their_own_are_refused(small_vit, images, tmp_path):
    need(".onnx")
    with pytest.raises(ArgumentError, match="InterImage gives every image its own number of tokens"):
        export(VWTokenizer(small_vit, make_inter(small_vit, "pixel")), tmp_path / "fast.onnx", images)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["beit_base_patch16_224", "vit_relpos_base_patch16_cls_224"])
def test_a_bias_for_relative_positions_is_refused(name, images, tmp_path):
    """Its file would take as many images as it was traced with."""
    need(".onnx")
    model = timm.create_model(name, img_size=160, depth=2, embed_dim=48, num_heads=3).eval()
    with pytest.raises(ExportError, match=r"on fewer tokens cannot be exported for any number of images .*run it in"):
        export(VWTokenizer(model, IntraImage(0.5)), tmp_path / "m.onnx", images)
    assert not list(tmp_path.iterdir())


def test_places_where_nothing_can_be_written(tmp_path):
    need(".onnx")
    with pytest.raises(ArgumentError, match=r"cannot export to model\.engine; expected a name that ends in \.onnx, "):
        check_target("model.engine")
    with pytest.raises(ExportError, match=r"no/model\.onnx: No such file or directory; choose another folder"):
        check_target(tmp_path / "no" / "model.onnx")
    (tmp_path / "taken.onnx").mkdir()
    with pytest.raises(ExportError, match="it is a folder"):
        check_target(tmp_path / "taken.onnx")
    with pytest.raises(ArgumentError, match="batch size is 0; expected at least 1"):
        check_target(tmp_path / "model.onnx", 0)
    assert [file.name for file in tmp_path.iterdir()] == ["taken.onnx"]


@pytest.mark.parametrize(
    ("suffix", "error"),
    [(".onnx", OSError(28, "No space left on device")), (".xml", RuntimeError("No space left on device"))],
)
def test_a_disk_that_is_full(suffix, error, fast, images, tmp_path, monkeypatch):
    need(suffix)

    def fill(*arguments, **options):
        raise error

    if suffix == ".onnx":
        monkeypatch.setitem(exporting.FORMATS, ".onnx", replace(FORMATS[".onnx"], write=fill))
    else:
        monkeypatch.setattr("vwt.export.formats.write_onnx", lambda *_: None)
        monkeypatch.setattr("openvino.Core.read_model", fill)
    with pytest.raises(ExportError, match="No space left on device"):
        export(fast, tmp_path / f"fast{suffix}", images, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_what_does_not_fit_is_said_before_the_work(fast, images, tmp_path, monkeypatch):
    need(".onnx")
    unused = replace(FORMATS[".onnx"], write=None, open=None)
    monkeypatch.setitem(exporting.FORMATS, ".onnx", unused)
    target = tmp_path / "fast.onnx"
    with pytest.raises(ArgumentError, match="63 images; an exported model is checked on at least 64"):
        export(fast, target, images[:63])
    with pytest.raises(ArgumentError, match="64 images; an exported model is checked on at least 65"):
        export(fast, target, images, batch_size=65)
    with pytest.raises(ImageError, match="150"):
        export(fast, target, images[..., :150])
    with pytest.raises(ArgumentError, match="onnxruntime has no bfloat16"):
        export(fast.to(torch.bfloat16), target, images.bfloat16())
    with pytest.raises(ArgumentError, match="train mode"):
        export(fast.train(), target, images)


@pytest.mark.parametrize(
    ("runtime", "advice"),
    [
        ("torch", r"call plan\.apply\(model\)"),
        ("compile", r"call plan\.apply\(model\), or export it to NAME\.pt2"),
        ("openvino", r"export it to NAME\.xml \(plan\.export, vwt export\)"),
    ],
)
def test_a_plan_for_another_runtime_is_refused(runtime, advice, small_vit, images, tmp_path):
    need(".onnx")
    plan, message = make_plan(small_vit, runtime=runtime), f"runtime '{runtime}', here 'onnxruntime'; {advice}, or tune"
    with pytest.raises(MismatchError, match=message) as error:
        plan.export(small_vit, tmp_path / "fast.onnx", images)
    assert "\n" not in str(error.value)
    plan.check(small_vit, "onnxruntime", force=True)


def test_a_plan_for_another_model_is_refused(small_vit, images, tmp_path):
    need(".onnx")
    with pytest.raises(MismatchError, match="the plan was tuned for model 'vit_other', here "):
        make_plan(small_vit, model="vit_other").export(small_vit, tmp_path / "fast.onnx", images)
    with pytest.raises(MismatchError, match="precision 'bfloat16', here 'float32'"):
        make_plan(small_vit, precision="bfloat16").export(small_vit, tmp_path / "fast.onnx", images)
    with pytest.raises(ExportError, match="choose another folder"):
        make_plan(small_vit, model="vit_other").export(small_vit, tmp_path / "no" / "fast.onnx", images)
