"""transformers' models of images and text, small and with random weights: what they say of fewer tokens."""

import copy

import pytest
import torch

from tests.matrix import matrix
from tests.models.test_hf import CLOSE, NORMALISATION, SCHEDULES, STRATEGIES, WIDE, make_images
from vwt import IntraImage, LatencyProfile, Merge, PruningSchedule, VWTokenizer
from vwt.errors import ArgumentError, ImageError, ModelError
from vwt.tuning.calibration import Calibration

pytest.importorskip("transformers", reason="transformers is not installed; pip install vwt[hf]")

from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    BlipForImageTextRetrieval,
    BlipForQuestionAnswering,
    CLIPConfig,
    CLIPModel,
    SiglipConfig,
    SiglipModel,
)

TEXT = {
    "vocab_size": 60,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BLIP = {"encoder_hidden_size": 48, "sep_token_id": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
PARTS = {"vision_config": WIDE, "text_config": TEXT}
BLIP_PARTS = {"vision_config": WIDE, "text_config": TEXT | BLIP, "image_text_hidden_size": 16}
IDS = torch.randint(3, 60, (5, 6), generator=torch.Generator().manual_seed(7))
MASK = (torch.arange(6) < torch.tensor([6, 4, 5, 6, 3])[:, None]).long()
MODELS = {
    "caption": (lambda: BlipForConditionalGeneration(BlipConfig(**BLIP_PARTS)), {"input_ids": IDS}),
    "question": (
        lambda: BlipForQuestionAnswering(BlipConfig(**BLIP_PARTS)),
        {"input_ids": IDS, "attention_mask": MASK, "decoder_input_ids": IDS[:, :3], "labels": IDS[:, 3:]},
    ),
    "retrieval": (
        lambda: BlipForImageTextRetrieval(BlipConfig(**BLIP_PARTS)),
        {"input_ids": IDS, "attention_mask": MASK},
    ),
    "clip": (lambda: CLIPModel(CLIPConfig(**PARTS, projection_dim=20)), {"input_ids": IDS}),
    "siglip": (lambda: SiglipModel(SiglipConfig(**PARTS)), {"input_ids": IDS}),
}
REDUCED = [("intra", "none"), ("pixel", "none"), ("none", "merge"), ("pixel", "prune"), ("pixel", "merge")]


def make_model(name):
    torch.manual_seed(0)
    model = MODELS[name][0]().eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    model.pretrained_cfg = NORMALISATION
    return model.requires_grad_(False)


def make_fast(name, strategy, schedule):
    model, images = make_model(name), make_images()
    return model, VWTokenizer(model, STRATEGIES[strategy](model, images), PruningSchedule(SCHEDULES[schedule]))


def of_image(inputs, index):
    return {name: value[index : index + 1] for name, value in inputs.items()}


def tensors(output, batch):
    """What an output says of each image by itself."""
    shared = ("logits_per_image", "logits_per_text", "loss")
    return {k: v for k, v in output.items() if isinstance(v, torch.Tensor) and k not in shared and len(v) == batch}


@pytest.fixture(scope="module", params=MODELS)
def name(request):
    return request.param


@torch.inference_mode()
def test_unreduced_is_the_model(name):
    model, images, inputs = make_model(name), make_images(), MODELS[name][1]
    expected = model(pixel_values=images, **inputs)
    for output in (VWTokenizer(model)(images, **inputs), VWTokenizer(model)(pixel_values=images, **inputs)):
        assert type(output) is type(expected)
        assert list(output) == list(expected)
        assert all(torch.equal(output[k], v) for k, v in expected.items() if isinstance(v, torch.Tensor))


@torch.inference_mode()
@pytest.mark.parametrize(("strategy", "schedule"), matrix(REDUCED, ("none", "merge"), ("pixel", "prune")))
def test_reduced(name, strategy, schedule):
    model, fast = make_fast(name, strategy, schedule)
    images, inputs = make_images(), MODELS[name][1]
    state = {k: v.clone() for k, v in model.state_dict().items()}
    attributes = {module: dict(module.__dict__) for module in model.modules()}
    expected, output = model(pixel_values=images, **inputs), fast(images, **inputs)
    assert type(output) is type(expected)
    assert list(output) == list(expected)
    assert all(output[k].shape == v.shape for k, v in expected.items() if isinstance(v, torch.Tensor))
    every = tensors(output, 5)
    assert every
    if "last_hidden_state" in output:
        assert torch.equal(output.last_hidden_state, fast.forward_features(images))
    alone = [tensors(fast(images[i : i + 1], **of_image(inputs, i)), 1) for i in range(5)]
    for key, value in every.items():
        torch.testing.assert_close(value, torch.cat([one[key] for one in alone]), **CLOSE)
    changed = [k for k, v in tensors(expected, 5).items() if (v - every[k]).abs().max() > 1e-4]
    assert set(changed) == set(every) - {"text_embeds"}

    assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items())
    assert all(vars(module) == own for module, own in attributes.items())


@torch.inference_mode()
@pytest.mark.parametrize(("strategy", "schedule"), matrix(REDUCED, ("pixel", "merge")))
def test_captions_are_those_of_the_image_alone(strategy, schedule):
    model, fast = make_fast("caption", strategy, schedule)
    images, asked = make_images(), {"max_new_tokens": 8, "output_scores": True, "return_dict_in_generate": True}
    output = fast.generate(pixel_values=images, **asked)
    for index, image in enumerate(images):
        alone = fast.generate(image[None], **asked)
        steps = len(alone.scores)
        assert torch.equal(output.sequences[index, : steps + 1], alone.sequences[0])
        for together, one in zip(output.scores, alone.scores, strict=False):
            torch.testing.assert_close(together[index], one[0], **CLOSE)
    full = model.generate(pixel_values=images, **asked)
    assert (full.scores[0] - output.scores[0]).abs().max() > 1e-4


@torch.inference_mode()
@pytest.mark.parametrize(("strategy", "schedule"), REDUCED)
def test_text_attends_the_full_grid(strategy, schedule, monkeypatch):
    """Tokens count as the patches that they stand for, so that captions are those of the feature map; but fewer are
    attended."""
    model, fast = make_fast("caption", strategy, schedule)
    images, seen = make_images(), []
    key = model.text_decoder.bert.encoder.layer[0].crossattention.self.key
    hook = key.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    output = fast(images, input_ids=IDS)
    hook.remove()
    expected = model.text_decoder(input_ids=IDS, encoder_hidden_states=fast.forward_features(images)).logits
    torch.testing.assert_close(output.logits, expected, **CLOSE)
    _, words = fast.forward_features(images, unmerge=False)
    assert [tuple(one.shape) for one in seen] == [(5, 1 + max(words.lengths), 48)]


@torch.inference_mode()
@pytest.mark.parametrize(
    "options", [{"num_beams": 3}, {"num_beams": 4, "num_return_sequences": 2}, {"use_cache": False}]
)
def test_ways_of_generating(options):
    model, fast = make_fast("caption", "pixel", "merge")
    images = make_images()
    prompt = {"input_ids": IDS[:, :3], "max_new_tokens": 6, **options}
    output = fast.generate(images, **copy.deepcopy(prompt))
    decoder = model.text_decoder
    ids = IDS[:, :3].clone()
    ids[:, 0] = 1
    expected = decoder.generate(
        input_ids=ids[:, :-1],
        eos_token_id=2,
        pad_token_id=0,
        encoder_hidden_states=fast.forward_features(images),
        **{k: v for k, v in prompt.items() if k != "input_ids"},
    )
    assert torch.equal(output, expected)


@torch.inference_mode()
def test_answers_are_those_of_the_image_alone():
    _, fast = make_fast("question", "pixel", "none")
    images = make_images()
    answers = fast.generate(pixel_values=images, input_ids=IDS, max_new_tokens=5, min_new_tokens=5)
    for index, answer in enumerate(answers):
        alone = fast.generate(
            pixel_values=images[index][None], input_ids=IDS[index][None], max_new_tokens=5, min_new_tokens=5
        )
        assert torch.equal(alone[0], answer)


@torch.inference_mode()
def test_retrieval_by_embedding():
    model, fast = make_fast("retrieval", "pixel", "none")
    images = make_images()
    scores = fast(images, input_ids=IDS, use_itm_head=False).itm_score
    assert scores.shape == (5, 5)
    embeds = torch.nn.functional.normalize(model.vision_proj(fast.forward_features(images)[:, 0]), dim=-1)
    texts = model.text_encoder(input_ids=IDS).last_hidden_state[:, 0]
    expected = embeds @ torch.nn.functional.normalize(model.text_proj(texts), dim=-1).T
    torch.testing.assert_close(scores, expected, **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_features_of_images_and_texts(name):
    model, fast = make_fast(name, "pixel", "merge")
    images = make_images()
    features = fast.get_image_features(pixel_values=images)
    assert type(features) is type(model.get_image_features(pixel_values=images))
    assert torch.equal(features.last_hidden_state[:, 0], fast.forward_features(images)[:, 0])
    texts = fast.get_text_features(input_ids=IDS).pooler_output
    assert torch.equal(texts, model.get_text_features(input_ids=IDS).pooler_output)
    unit = [value / value.norm(dim=-1, keepdim=True) for value in (features.pooler_output, texts)]
    output = fast(images, input_ids=IDS)
    torch.testing.assert_close(output.image_embeds, unit[0], **CLOSE)
    torch.testing.assert_close(output.text_embeds, unit[1], **CLOSE)


def test_training():
    model = make_model("caption").train().requires_grad_(True)
    loss = VWTokenizer(model, IntraImage(0.3))(make_images(), input_ids=IDS, labels=IDS).loss
    loss.backward()
    assert model.vision_model.encoder.layers[0].self_attn.qkv.weight.grad.abs().max() > 0
    assert model.text_decoder.bert.encoder.layer[0].crossattention.self.key.weight.grad.abs().max() > 0


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    _, fast = make_fast("caption", "pixel", "merge")
    images = make_images()
    expected = fast(images, input_ids=IDS).logits
    with torch.autocast("cpu", dtype):
        fast = VWTokenizer(fast.model, fast.strategy, fast.schedule)  # it can be wrapped there too
        mixed = fast(images, input_ids=IDS).logits
    half = fast.to(dtype)(images.to(dtype), input_ids=IDS).logits
    assert half.dtype == dtype
    for logits in (mixed, half):
        torch.testing.assert_close(logits.float(), expected, atol=0.15, rtol=0)


@torch.inference_mode()
def test_a_copy_has_its_own_weights():
    _, fast = make_fast("caption", "pixel", "none")
    other, images = copy.deepcopy(fast), make_images()
    expected = fast.generate(images, max_new_tokens=4)
    for parameter in fast.model.parameters():
        parameter.zero_()
    assert torch.equal(other.generate(images, max_new_tokens=4), expected)


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_wrong_images():
    fast = VWTokenizer(make_model("caption"), IntraImage(0.3))
    with pytest.raises(ImageError, match="images are 48x80, the model takes 64x64; resize them"):
        fast.generate(pixel_values=torch.randn(2, 3, 48, 80))
    with pytest.raises(ImageError, match="add a batch dimension"):
        fast.generate(torch.randn(3, 64, 64))
    with pytest.raises(ImageError, match=r"images are list; expected a torch\.Tensor"):
        fast(pixel_values=[1, 2], input_ids=IDS)
    with pytest.raises(TypeError, match="pixel_values"):
        fast.generate()


def test_wrong_options():
    fast = VWTokenizer(make_model("caption"), IntraImage(0.3))
    with pytest.raises(ArgumentError, match="without interpolate_pos_encoding"):
        fast.generate(make_images(), interpolate_pos_encoding=True)
    with pytest.raises(ArgumentError, match="generate is given images twice"):
        fast.generate(make_images(), pixel_values=make_images())
    with pytest.raises(ArgumentError, match="without output_hidden_states"):
        fast(make_images(), input_ids=IDS, output_hidden_states=True)


def test_methods_that_there_are_not():
    fast = VWTokenizer(make_model("caption"), IntraImage(0.3))
    with pytest.raises(AttributeError, match="does not pass on 'save_pretrained'"):
        _ = fast.save_pretrained
    with pytest.raises(AttributeError, match="get_image_features"):
        _ = fast.get_image_features
    assert not hasattr(VWTokenizer(make_model("clip")), "generate")


def test_towers_are_what_is_measured():
    model, images = make_model("caption"), torch.randn(16, 3, 64, 64)
    message = (
        r"BlipForConditionalGeneration is a model of images and text; measure its vision tower, model\.vision_model"
    )
    with pytest.raises(ArgumentError, match=message):
        LatencyProfile.measure(model, points=2, runs=1, progress=False)
    with pytest.raises(ArgumentError, match=message):
        Calibration(model, images, progress=False)
    assert LatencyProfile.identify(model) == LatencyProfile.identify(model.vision_model)
    found = Calibration(model.vision_model, images, progress=False).evaluate({1: Merge(4)})
    assert found.mean_kl > 1e-4


def test_other_blocks_are_refused():
    model = make_model("caption")
    model.vision_model.encoder.layers[1].self_attn = torch.nn.Identity()
    with pytest.raises(ModelError, match="a block of this BlipVisionModel is BlipEncoderLayer with Identity"):
        VWTokenizer(model)
