"""transformers' vision towers, small and with random weights: what they return, from fewer tokens."""

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from PIL import Image

from tests.matrix import matrix
from vwt import (
    Absorb,
    Codebook,
    InterImage,
    IntraImage,
    LatencyProfile,
    Merge,
    Prune,
    PruningSchedule,
    VWTokenizer,
    build_codebook,
)
from vwt.errors import ArgumentError, ImageError, ModelError
from vwt.models.spec import PatchSpec, prepare
from vwt.tokens.patches import patchify
from vwt.tuning.calibration import Calibration

pytest.importorskip("transformers", reason="transformers is not installed; pip install vwt[hf]")

from transformers import (
    BlipVisionConfig,
    BlipVisionModel,
    CLIPConfig,
    CLIPForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    DeiTConfig,
    DeiTForImageClassification,
    DeiTForImageClassificationWithTeacher,
    DeiTModel,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersForImageClassification,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    IJepaConfig,
    IJepaForImageClassification,
    IJepaModel,
    SiglipConfig,
    SiglipForImageClassification,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTForImageClassification,
    ViTModel,
)

SMALL = {"hidden_size": 48, "num_hidden_layers": 3, "num_attention_heads": 3, "image_size": 64, "patch_size": 16}
WIDE = {**SMALL, "intermediate_size": 96}
NORMALISATION = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
MODELS = {
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**WIDE)),
    "clip-projection": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**WIDE, projection_dim=20)),
    "clip-classifier": lambda: CLIPForImageClassification(CLIPConfig(vision_config=WIDE, num_labels=10)),
    "blip": lambda: BlipVisionModel(BlipVisionConfig(**WIDE)),
    "vit": lambda: ViTModel(ViTConfig(**WIDE)),
    "vit-classifier": lambda: ViTForImageClassification(ViTConfig(**WIDE, num_labels=10)),
    "vit-unpooled": lambda: ViTModel(ViTConfig(**WIDE), add_pooling_layer=False),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SMALL, mlp_ratio=2)),
    "dinov2-classifier": lambda: Dinov2ForImageClassification(
        Dinov2Config(**SMALL, use_swiglu_ffn=True, num_labels=10)
    ),
    "deit": lambda: DeiTModel(DeiTConfig(**WIDE)),
    "deit-classifier": lambda: DeiTForImageClassification(DeiTConfig(**WIDE, num_labels=10)),
    "deit-distilled-classifier": lambda: DeiTForImageClassificationWithTeacher(DeiTConfig(**WIDE, num_labels=10)),
    "ijepa": lambda: IJepaModel(IJepaConfig(**WIDE)),
    "ijepa-pooled": lambda: IJepaModel(IJepaConfig(**WIDE), add_pooling_layer=True),
    "ijepa-classifier": lambda: IJepaForImageClassification(IJepaConfig(**WIDE, num_labels=10)),
    "dinov2-registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2)),
    "dinov2-registers-classifier": lambda: Dinov2WithRegistersForImageClassification(
        Dinov2WithRegistersConfig(**SMALL, mlp_ratio=2, num_labels=10)
    ),
    "dinov3": lambda: DINOv3ViTModel(DINOv3ViTConfig(**WIDE, num_register_tokens=4)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**WIDE)),
    "siglip-classifier": lambda: SiglipForImageClassification(SiglipConfig(vision_config=WIDE, num_labels=10)),
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def make_model(name):
    """A model of `MODELS`; see `make_decided`."""
    return make_decided(MODELS[name])


def make_decided(make):
    """Attention far from uniform, so that equally important tokens are not a matter of rounding."""
    torch.manual_seed(0)
    model = make().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.pretrained_cfg = NORMALISATION
    return model.requires_grad_(False)


def make_images():
    """Five images that repeat their first patch ever more often."""
    images = torch.randn(5, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    for image, repeats in zip(images, (2, 4, 5, 3, 5), strict=True):
        for place in range(repeats):
            row, column = 16 * (2 * place // 4), 16 * (2 * place % 4)
            image[:, row : row + 16, column : column + 16] = image[:, :16, :16]
    return images


def make_inter(space, model, images):
    spec, count = PatchSpec.of(model), torch.ones(len(images), dtype=torch.int64)
    fast = VWTokenizer(model)
    words = patchify(images, (16, 16)) if space == "pixel" else fast.backbone.embed(images)[0]
    projection = {} if space == "pixel" else spec.projection
    book = Codebook(words[:, 0].clone(), count, count, space, (16, 16), spec.mean, spec.std, projection=projection)
    return InterImage(book, 1e-3)


VARIANTS = {
    "clip-classifier", "vit", "vit-unpooled", "dinov2-classifier", "deit", "deit-classifier", "ijepa", "ijepa-pooled",
    "dinov2-registers", "siglip",
}  # fmt: skip


@pytest.fixture(scope="module", params=matrix(MODELS, *(MODELS.keys() - VARIANTS)))
def model(request):
    return make_model(request.param)


STRATEGIES = {
    "none": lambda *_: None,
    "intra": lambda *_: IntraImage(0.3),
    "pixel": lambda *given: make_inter("pixel", *given),
    "embedding": lambda *given: make_inter("embedding", *given),
}
SCHEDULES = {"none": {}, "prune": {1: Prune(2)}, "merge": {1: Merge(2)}, "absorb": {1: Absorb(2)}}
REDUCED = [(strategy, schedule) for strategy in STRATEGIES for schedule in SCHEDULES][1:]


@torch.inference_mode()
@pytest.mark.parametrize("batch", matrix([1, 5], 5))
def test_unreduced_is_the_model(model, batch):
    images = make_images()[:batch]
    fast, expected = VWTokenizer(model), model(images)
    packed, words = fast.pack(images)
    answers = (fast(images), fast(pixel_values=images), fast.backbone.classify(fast.backbone.pre_norm(packed), words))
    for answer, close in zip(answers, (0, 0, 1e-5), strict=True):
        assert type(answer) is type(expected)
        assert list(answer) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(answer[name], value, rtol=close, atol=close)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("strategy", "schedule"),
    matrix(REDUCED, ("none", "merge"), ("intra", "prune"), ("pixel", "none"), ("embedding", "absorb")),
)
def test_reduced(model, strategy, schedule):
    images = make_images()
    fast = VWTokenizer(model, STRATEGIES[strategy](model, images), PruningSchedule(SCHEDULES[schedule]))
    entering = fast.tokenize(images).lengths
    assert (len(set(entering)) > 1) == (strategy in ("pixel", "embedding"))

    output, expected = fast(pixel_values=images), model(images)
    assert type(output) is type(expected)
    assert list(output) == list(expected)
    features = fast.forward_features(images)
    for name, value in expected.items():
        assert output[name].shape == value.shape
        assert (output[name] - value).abs().max() > 1e-4
    if "last_hidden_state" in output:
        assert torch.equal(output.last_hidden_state, features)

    packed, words = fast.forward_features(images, unmerge=False)
    removed = 0 if schedule == "none" else 2
    assert words.lengths == tuple(count - removed for count in entering)
    for run, image in zip(packed.split(), features, strict=True):
        assert {tuple(row.tolist()) for row in run} >= {tuple(row.tolist()) for row in image[::5]}

    alone = [fast(image[None]) for image in images]
    for name, value in output.items():
        torch.testing.assert_close(value, torch.cat([one[name] for one in alone]), **CLOSE)


@torch.inference_mode()
def test_images_of_different_counts_run_packed(model, monkeypatch):
    images = make_images()
    fast = VWTokenizer(model, make_inter("pixel", model, images))
    calls = []
    fast.backbone.blocks[0].mlp.register_forward_pre_hook(lambda _, given: calls.append(given[0].shape[0]))
    fast(images)
    assert calls == [1]
    fast.backbone.blocks[0].mlp._forward_pre_hooks.clear()


@torch.inference_mode()
def test_feature_maps(model):
    images = make_images()[:2]
    maps = VWTokenizer(model, IntraImage(0.3)).forward_intermediates(images, [0, 2], intermediates_only=True)
    assert [tuple(one.shape) for one in maps] == [(2, 48, 4, 4)] * 2
    (whole,) = VWTokenizer(model).forward_intermediates(images, 1, norm=True, intermediates_only=True, output_fmt="NLC")
    torch.testing.assert_close(whole, VWTokenizer(model).forward_features(images)[:, -16:], **CLOSE)


EMBEDDING = {
    "clip-projection": lambda output: output.image_embeds,
    "blip": lambda output: output.last_hidden_state.mean(1),
    "vit-unpooled": lambda output: output.last_hidden_state.mean(1),
    "ijepa": lambda output: output.last_hidden_state.mean(1),
}


@torch.inference_mode()
def test_calibration(model, request):
    kind = request.node.callspec.params["model"]
    images, schedule = torch.randn(20, 3, 64, 64, generator=torch.Generator().manual_seed(5)), {1: Merge(6)}
    fast = VWTokenizer(model, schedule=PruningSchedule(schedule))
    read = EMBEDDING.get(kind, lambda output: output.logits if "classifier" in kind else output.pooler_output)
    full, reduced = read(model(images)), read(fast(images))
    if "classifier" not in kind:
        reduced, full = (torch.nn.functional.normalize(one, dim=-1) for one in (reduced, full))
        reduced, full = ((100 * one @ full.T).fill_diagonal_(-torch.inf) for one in (reduced, full))
    kl = (full.softmax(1) * (full.log_softmax(1) - reduced.log_softmax(1)).nan_to_num()).sum(1)

    calibration = Calibration(model, images, progress=False)
    found, exact = calibration.evaluate(schedule), calibration.evaluate({})
    torch.testing.assert_close(found.kl, kl, atol=1e-3, rtol=1e-2)
    assert found.agrees.tolist() == (full.argmax(1) == reduced.argmax(1)).tolist()
    assert found.mean_kl > 1e-4
    assert exact.mean_kl < 1e-5
    assert exact.agreement == 1
    assert calibration.removal(1, [calibration.backbone.prefix + 16], progress=False).popitem()[1] == 1


@pytest.mark.parametrize("model", matrix(MODELS, "clip", "vit-classifier", "dinov2"), indirect=True)
def test_profiles(model):
    profile = LatencyProfile.measure(model, points=2, runs=1, progress=False)
    assert profile.model == type(model).__name__
    assert profile.patches == 16
    assert profile.depth == 3
    reads_class_token = ViTForImageClassification | DeiTForImageClassification | DeiTForImageClassificationWithTeacher
    assert profile.reads_prefix_only == isinstance(model, reads_class_token)
    assert min(profile.head, profile.embed, *profile.block) > 0
    profile.check(model)


def test_a_schedule_for_a_budget():
    model, images = make_model("vit-classifier"), torch.randn(16, 3, 64, 64)
    profile = LatencyProfile.measure(model, points=2, runs=1, progress=False)
    known = {"counts": [2, 17], "block": [0.1, 1.6], "attention": [0.04, 0.7], "counting": [0.1, 1.6]}
    free = {name: [0.0] * len(cost) for name, cost in profile.reductions.items()}
    profile = replace(profile, **known, embed=0.1, head=0.1, reductions=free)
    schedule = PruningSchedule.for_budget(profile, model, images, ratio=0.8, progress=False)
    assert profile.predict(schedule) <= 0.8 * profile.predict()
    assert VWTokenizer(model, schedule=schedule)(images).logits.shape == (16, 10)


@torch.inference_mode()
def test_dinov2_takes_images_of_any_size():
    fast = VWTokenizer(make_model("dinov2"), IntraImage(0.3))
    assert fast(torch.randn(2, 3, 48, 85)).last_hidden_state.shape == (2, 1 + 3 * 5, 48)
    with pytest.raises(ImageError, match="less than one patch 16x16"):
        fast(torch.randn(2, 3, 48, 8))


def test_other_sizes_are_refused():
    with pytest.raises(ImageError, match="images are 48x80, the model takes 64x64; resize them"):
        VWTokenizer(make_model("clip"))(torch.randn(2, 3, 48, 80))


@torch.inference_mode()
def test_inside_a_larger_model():
    model = make_model("clip-projection")
    inner = model.vision_model
    inner.pretrained_cfg = NORMALISATION
    images = make_images()
    expected = VWTokenizer(model, IntraImage(0.3))(images).image_embeds
    model.vision_model = VWTokenizer(inner, IntraImage(0.3))
    assert torch.equal(model(pixel_values=images).image_embeds, expected)


def test_tuples():
    model = make_model("vit")
    model.config.return_dict = False
    output = VWTokenizer(model, IntraImage(0.3))(make_images())
    assert [type(output), len(output)] == [tuple, 2]
    calibration = Calibration(model, torch.randn(16, 3, 64, 64), progress=False)
    assert calibration.evaluate({}).mean_kl < 1e-5


def test_gradients_flow():
    model = make_model("vit-classifier").train().requires_grad_(True)
    VWTokenizer(model, IntraImage(0.3))(make_images()).logits.sum().backward()
    assert model.vit.layers[0].attention.q_proj.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    "name", [name for name in MODELS if "classifier" in name and name != "deit-distilled-classifier"]
)
def test_labels_give_the_models_own_loss(name):
    model, images, labels = make_model(name), make_images(), torch.arange(5)
    fast = VWTokenizer(model)
    assert torch.equal(fast(pixel_values=images, labels=labels).loss, model(images, labels=labels).loss)
    fast = VWTokenizer(model, IntraImage(0.3))
    output = fast(images, labels=labels)
    assert torch.equal(output.logits, fast(images).logits)
    torch.testing.assert_close(output.loss, torch.nn.functional.cross_entropy(output.logits, labels))
    model.config.return_dict = False
    assert [one.shape for one in fast(images, labels=labels)] == [(), (5, 10)]


@pytest.mark.parametrize(
    ("name", "kind"),
    [("clip", "CLIPVisionModel"), ("deit-distilled-classifier", "DeiTForImageClassificationWithTeacher")],
)
def test_labels_of_what_computes_no_loss_are_refused(name, kind):
    with pytest.raises(ArgumentError, match=f"{kind} computes no loss; call it without labels"):
        VWTokenizer(make_model(name))(make_images(), labels=torch.arange(5))


def test_eager_attention_is_refused():
    model = ViTModel._from_config(ViTConfig(**WIDE), attn_implementation="eager")
    with pytest.raises(ModelError, match=r"attends with 'eager'.*attn_implementation=\"sdpa\""):
        VWTokenizer(model)
    model.set_attn_implementation("sdpa")
    VWTokenizer(model)


def test_more_outputs_are_refused():
    model = make_model("clip")
    with pytest.raises(ArgumentError, match=r"without output_hidden_states; .* call forward_intermediates"):
        VWTokenizer(model)(make_images(), output_hidden_states=True)
    with pytest.raises(ArgumentError, match="without attention_mask"):
        VWTokenizer(model)(make_images(), attention_mask=torch.ones(5, 17), return_dict=True)
    model.config.output_hidden_states = True
    with pytest.raises(ModelError, match=r"set model.config.output_hidden_states = False"):
        VWTokenizer(model)


@torch.inference_mode()
@pytest.mark.parametrize("space", ["pixel", "embedding"])
def test_codebooks_are_built_for_them(tmp_path, space):
    (tmp_path / "one").mkdir()
    for index in range(4):
        noise = torch.randint(256, (80, 80, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(index))
        Image.fromarray(noise.numpy()).save(tmp_path / "one" / f"{index}.png")
    model = make_model("siglip")
    book = build_codebook(tmp_path, model, words=8, space=space, workers=0, progress=False)
    assert VWTokenizer(model, InterImage(book, 2.0)).tokenize(make_images()).counts.max() <= 8


class Louder(ViTModel):
    def forward(self, pixel_values, **options):
        output = super().forward(pixel_values, **options)
        output.pooler_output = 2 * output.pooler_output
        return output


def test_check_refuses_another_forward_pass():
    with pytest.raises(ModelError, match=r"Louder does not compute .* the norm after the blocks or the head"):
        VWTokenizer(Louder(ViTConfig(**WIDE)))


def test_check_names_the_block():
    model = make_model("siglip")
    block = model.encoder.layers[1]
    own = block.forward
    block.forward = lambda *given, **options: own(*given, **options) * 2
    with pytest.raises(ModelError, match="block 1 of 3"):
        VWTokenizer(model)


def test_unknown_normalisation(tmp_path):
    model = ViTModel(ViTConfig(**WIDE))
    VWTokenizer(model, IntraImage(0.3))
    with pytest.raises(ModelError, match=r"normalisation of ViTModel is unknown.*save its image processor"):
        prepare(torch.zeros(1, 3, 64, 64, dtype=torch.uint8), model)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 2]}')
    model.config.name_or_path = str(tmp_path)
    assert PatchSpec.of(model).mean == (0.1, 0.2, 0.3)
    assert PatchSpec.of(CLIPVisionModel(CLIPVisionConfig(**WIDE))).mean[0] == pytest.approx(0.48145466)


def test_unsupported():
    from transformers import ResNetConfig, ResNetModel

    with pytest.raises(ModelError, match=r"ResNetModel is not supported; of transformers, vwt takes CLIPVisionModel"):
        VWTokenizer(ResNetModel(ResNetConfig()))


def make_wrapper():
    from transformers import TimmWrapperConfig, TimmWrapperModel

    return TimmWrapperModel(TimmWrapperConfig(architecture="test_vit"))


@pytest.mark.parametrize(
    ("make", "part"),
    [
        (make_wrapper, "'timm_model' is, a VisionTransformer"),
    ],
)
def test_a_model_that_holds_a_supported_one_is_told_which(make, part):
    model = make()
    with pytest.raises(
        ModelError, match=rf"{type(model).__name__} is not supported, but its part {part}: wrap that"
    ) as e:
        VWTokenizer(model)
    VWTokenizer(model.get_submodule(str(e.value).split("'")[1]))


@pytest.mark.slow
def test_transformers_is_not_imported_without_need():
    code = (
        "import sys, timm, vwt; vwt.VWTokenizer(timm.create_model('test_vit'), vwt.IntraImage(0.3));"
        "sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
