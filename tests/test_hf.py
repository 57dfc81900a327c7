"""transformers' vision towers, small and with random weights: what they return, from fewer tokens."""

import subprocess
import sys

import pytest
import torch
from PIL import Image

from vwt import Codebook, InterImage, IntraImage, Merge, Prune, PruningSchedule, VWTokenizer, build_codebook
from vwt.errors import ArgumentError, ImageError, ModelError
from vwt.patches import PatchSpec, patchify

pytest.importorskip("transformers", reason="transformers is not installed; pip install vwt[hf]")

from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
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
    "vit": lambda: ViTModel(ViTConfig(**WIDE)),
    "vit-classifier": lambda: ViTForImageClassification(ViTConfig(**WIDE, num_labels=10)),
    "vit-unpooled": lambda: ViTModel(ViTConfig(**WIDE), add_pooling_layer=False),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**SMALL, mlp_ratio=2)),
    "dinov2-classifier": lambda: Dinov2ForImageClassification(
        Dinov2Config(**SMALL, use_swiglu_ffn=True, num_labels=10)
    ),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**WIDE)),
}
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def make_model(name):
    """Attention far from uniform, so that equally important tokens are not a matter of rounding."""
    torch.manual_seed(0)
    model = MODELS[name]().eval()
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


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return make_model(request.param)


STRATEGIES = {
    "none": lambda *_: None,
    "intra": lambda *_: IntraImage(0.3),
    "pixel": lambda *given: make_inter("pixel", *given),
    "embedding": lambda *given: make_inter("embedding", *given),
}
SCHEDULES = {"none": {}, "prune": {1: Prune(2)}, "merge": {1: Merge(2)}}
REDUCED = [(strategy, schedule) for strategy in STRATEGIES for schedule in SCHEDULES][1:]


@torch.inference_mode()
@pytest.mark.parametrize("batch", [1, 5])
def test_unreduced_is_the_model(model, batch):
    images = make_images()[:batch]
    fast, expected = VWTokenizer(model), model(images)
    packed, words = fast.pack(images)
    answers = (fast(images), fast(pixel_values=images), fast.backbone.answer(fast.backbone.enter(packed), words))
    for answer, close in zip(answers, (0, 0, 1e-5), strict=True):
        assert type(answer) is type(expected)
        assert list(answer) == list(expected)
        for name, value in expected.items():
            torch.testing.assert_close(answer[name], value, rtol=close, atol=close)


@torch.inference_mode()
@pytest.mark.parametrize(("strategy", "schedule"), REDUCED)
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


def test_gradients_flow():
    model = make_model("vit-classifier").train().requires_grad_(True)
    VWTokenizer(model, IntraImage(0.3))(make_images()).logits.sum().backward()
    assert model.vit.layers[0].attention.q_proj.weight.grad.abs().max() > 0


def test_eager_attention_is_refused():
    model = ViTModel._from_config(ViTConfig(**WIDE), attn_implementation="eager")
    with pytest.raises(ModelError, match=r"attends with 'eager'.*attn_implementation=\"sdpa\""):
        VWTokenizer(model)
    model.set_attn_implementation("sdpa")
    VWTokenizer(model)


def test_more_outputs_are_refused():
    model = make_model("clip")
    with pytest.raises(ArgumentError, match="takes pixel_values alone, without output_hidden_states"):
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
    with pytest.raises(ModelError, match=r"normalisation of this ViTModel is unknown; save its image processor"):
        VWTokenizer(model, IntraImage(0.3))
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.1, 0.2, 0.3], "image_std": [1, 1, 2]}')
    model.config.name_or_path = str(tmp_path)
    assert PatchSpec.of(model).mean == (0.1, 0.2, 0.3)
    assert PatchSpec.of(CLIPVisionModel(CLIPVisionConfig(**WIDE))).mean[0] == pytest.approx(0.48145466)


def test_unsupported():
    from transformers import ResNetConfig, ResNetModel

    with pytest.raises(ModelError, match=r"ResNetModel is not supported; of transformers, vwt takes CLIPVisionModel"):
        VWTokenizer(ResNetModel(ResNetConfig()))


def test_transformers_is_not_imported_without_need():
    code = (
        "import sys, timm, vwt; vwt.VWTokenizer(timm.create_model('test_vit'), vwt.IntraImage(0.3));"
        "sys.exit('transformers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
