"""Vision-language models whose language model reads image tokens, small and with random weights."""

import copy

import pytest
import torch

from tests.matrix import matrix
from tests.models.test_hf import WIDE, make_decided
from vwt import Absorb, Codebook, InterImage, IntraImage, Merge, Prune, VWTokenizer
from vwt.errors import ArgumentError, ImageError, ModelError
from vwt.models.spec import PatchSpec
from vwt.tokens.patches import patchify
from vwt.tokens.words import merge, unmerge

pytest.importorskip("transformers", reason="transformers is not installed; pip install vwt[hf]")

from transformers import (
    CLIPVisionConfig,
    Dinov2Config,
    GemmaConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    SiglipVisionConfig,
)

IMAGE = 98  # the placeholder
TEXT = {
    "vocab_size": 99,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWERS = {"clip": CLIPVisionConfig, "siglip": SiglipVisionConfig}
TILES = [[64, 128], [128, 64], [128, 128]]


def make_llava(tower="clip", layer=-2, strategy="default", text=None):
    config = LlavaConfig(
        vision_config=TOWERS[tower](**WIDE),
        text_config=text or LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
    )
    return LlavaForConditionalGeneration(config)


def make_next(**options):
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**WIDE),
        text_config=LlamaConfig(**TEXT),
        image_token_id=IMAGE,
        image_grid_pinpoints=TILES,
        **options,
    )
    return LlavaNextForConditionalGeneration(config)


def make_paligemma():
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**WIDE, vision_use_head=False).to_dict(),
        text_config=GemmaConfig(**TEXT).to_dict(),
        image_token_id=IMAGE,
        projection_dim=64,
    )
    return PaliGemmaForConditionalGeneration(config)


MODELS = {
    "llava": make_llava,
    "llava-full": lambda: make_llava(layer=-1, strategy="full"),
    "llava-layers": lambda: make_llava(layer=[-3, 2]),
    "llava-siglip": lambda: make_llava("siglip", -1, "full"),
    "llava-siglip-default": lambda: make_llava("siglip", 2),
    "llava-next": make_next,
    "paligemma": make_paligemma,
}
SIZES = torch.tensor([[64, 120], [128, 100], [64, 64]])  # of LLaVA-NeXT's images: so many tiles, and some are cropped
CLOSE = {"atol": 1e-4, "rtol": 1e-4}
REDUCED = {
    "after": {"after": Absorb(0.5)},
    "after-prune": {"after": Prune(5)},
    "schedule": {"schedule": {0: Merge(4)}},
    "both": {"schedule": {0: Absorb(3)}, "after": Merge(3)},
    "intra": {"strategy": IntraImage(0.3), "after": Absorb(0.5)},
}


def make_model(name):
    return make_decided(MODELS[name])


def make_images(model, count=3):
    """Images that repeat their first patch ever more often, as the model takes them."""
    tiles = 5 if isinstance(model, LlavaNextForConditionalGeneration) else 1
    images = torch.randn(count, tiles, 3, 64, 64, generator=torch.Generator().manual_seed(3))
    for index, image in enumerate(images):
        for place in range(2 + 2 * index):
            row, column = 16 * (2 * place // 4), 16 * (2 * place % 4)
            image[..., row : row + 16, column : column + 16] = image[..., :16, :16]
    return {"pixel_values": images, "image_sizes": SIZES[:count]} if tiles > 1 else {"pixel_values": images[:, 0]}


def make_prompts(model, images, counts, side="left"):
    """Prompts as a processor makes them, with so many of the images each."""
    features = [len(own) for own in model.get_image_features(**images, return_dict=True).pooler_output]
    rows, at = [], 0
    for count in counts:
        row = [1, 5]
        for length in features[at : at + count]:
            row += [IMAGE] * length + [7]
        at += count
        rows.append([*row, 11, 12, 13 + count])
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) + row if side == "left" else row + [0] * (width - len(row)) for row in rows]
    ids = torch.tensor(ids)
    # PaliGemma's prompts attend in both directions where their type is 0.
    types = {} if model.config.model_type != "paligemma" else {"token_type_ids": torch.zeros_like(ids)}
    return {"input_ids": ids, "attention_mask": (ids != 0).long(), **types, **images}


def make_inputs(model, counts=(2, 1), side="left"):
    return make_prompts(model, make_images(model, sum(counts)), counts, side)


def make_inter(model):
    """A strategy that leaves each image its own number of tokens."""
    spec, count = PatchSpec.of(model), torch.ones(3, dtype=torch.int64)
    words = patchify(make_images(make_model("llava"))["pixel_values"], (16, 16))[:, 0].clone()
    return InterImage(Codebook(words, count, count, "pixel", (16, 16), spec.mean, spec.std, projection={}), 1e-3)


def alone(model, inputs, counts, row):
    """The inputs of one prompt, without padding."""
    real = inputs["attention_mask"][row].bool()
    first = sum(counts[:row])
    each = ("input_ids", "attention_mask", "token_type_ids")
    own = {name: inputs[name][row][real][None] for name in each if name in inputs}
    for name in ("pixel_values", "image_sizes"):
        if name in inputs:
            own[name] = inputs[name][first : first + counts[row]]
    return own


@pytest.fixture(scope="module", params=matrix(MODELS, "llava", "llava-next", "paligemma"))
def name(request):
    return request.param


@torch.inference_mode()
def test_unreduced_is_the_model(name):
    model = make_model(name)
    fast, inputs = VWTokenizer(model), make_inputs(model)
    expected, output = model(**inputs), fast(**inputs)
    assert type(output) is type(expected)
    assert torch.equal(output.logits, expected.logits)
    ids = inputs.pop("input_ids")
    assert torch.equal(fast(ids, **inputs).logits, expected.logits)
    options = {**inputs, "max_new_tokens": 5}
    assert torch.equal(fast.generate(ids, **options), model.generate(ids, **options))


@torch.inference_mode()
def test_all_features_are_found(name):
    """The general way, of which nothing is removed, gives what the model's own methods give."""
    model = make_model(name)
    inputs = make_inputs(model)
    images = {key: inputs[key] for key in ("pixel_values", "image_sizes") if key in inputs}
    fast = VWTokenizer(model)
    whole = fast.family.parent
    assert whole.call("tokenize", fast._encode_layers, images).weight.max() == 1
    prepared = whole.call("processor_inputs", fast._encode_layers, inputs)
    assert torch.equal(prepared["input_ids"], inputs["input_ids"])
    assert "pixel_values" not in prepared
    torch.testing.assert_close(model(**prepared).logits, model(**inputs).logits, **CLOSE)


@torch.inference_mode()
@pytest.mark.parametrize(
    ("how", "side"),
    matrix([(how, side) for how in REDUCED for side in ("left", "right")], ("after", "left"), ("both", "right")),
)
def test_ragged_batch_is_each_alone(name, how, side):
    model, counts = make_model(name), (2, 1)
    inputs = make_inputs(model, counts, side)
    before = {key: value.clone() for key, value in inputs.items()}
    attributes = {module: dict(module.__dict__) for module in model.modules()}
    fast = VWTokenizer(model, **REDUCED[how])
    prepared, logits = fast.processor_inputs(**inputs), fast(**inputs).logits
    assert logits.shape[1] == prepared["input_ids"].shape[1] < inputs["input_ids"].shape[1]
    for row in range(2):
        expected = fast(**alone(model, inputs, counts, row)).logits[0]
        real = prepared["attention_mask"][row].bool()
        assert real.sum() == len(expected)
        torch.testing.assert_close(logits[row, real], expected, **CLOSE)
    assert all(torch.equal(value, before[key]) for key, value in inputs.items())
    assert all(vars(module).keys() == own.keys() for module, own in attributes.items())


@torch.inference_mode()
@pytest.mark.parametrize("how", matrix(["strategy", "after"], "after"))
def test_images_of_different_counts(name, how):
    model, counts = make_model(name), (2, 1)
    inputs = make_inputs(model, counts)
    fast = VWTokenizer(model, make_inter(model), after=Absorb(0.5) if how == "after" else None)
    images = {key: inputs[key] for key in ("image_sizes",) if key in inputs}
    assert len(set(fast.tokenize(inputs["pixel_values"], **images).lengths)) > 1
    prepared, logits = fast.processor_inputs(**inputs), fast(**inputs).logits
    answers = fast.generate(**inputs, max_new_tokens=6, min_new_tokens=6)
    beams = fast.generate(**inputs, max_new_tokens=6, min_new_tokens=6, num_beams=3)
    for row in range(2):
        own = alone(model, inputs, counts, row)
        real = prepared["attention_mask"][row].bool()
        torch.testing.assert_close(logits[row, real], fast(**own).logits[0], **CLOSE)
        assert torch.equal(answers[row, -6:], fast.generate(**own, max_new_tokens=6, min_new_tokens=6)[0, -6:])
        assert torch.equal(
            beams[row, -6:], fast.generate(**own, max_new_tokens=6, min_new_tokens=6, num_beams=3)[0, -6:]
        )


@torch.inference_mode()
@pytest.mark.parametrize("how", ["after", "both"])
def test_features_are_those_of_the_words(how):
    """What is read in the place of placeholders: the projected mean of the patches of each token, in their order."""
    model = make_model("llava")
    inputs = make_inputs(model)
    fast = VWTokenizer(model, **REDUCED["after"])
    words = fast.tokenize(inputs["pixel_values"])
    assert words.counts.tolist() == [8, 8, 8]
    tower, projector = model.model.vision_tower, model.model.multi_modal_projector
    hidden = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[-2]
    expected = projector(merge(hidden[:, 1:], words))
    features = fast.get_image_features(inputs["pixel_values"])
    assert [tuple(own.shape) for own in features.pooler_output] == [(8, 64)] * 3
    torch.testing.assert_close(torch.cat(features.pooler_output), expected, **CLOSE)

    cut = torch.tensor([[1, 5] + [IMAGE] * 8 + [7] + [IMAGE] * 8 + [7, 11, 12, 15]])
    embedded = model.get_input_embeddings()(cut)
    embedded[cut == IMAGE] = expected[:16]
    logits = fast(**alone(model, inputs, (2, 1), 0)).logits
    torch.testing.assert_close(logits, model(inputs_embeds=embedded).logits, **CLOSE)


@torch.inference_mode()
def test_earlier_layers_are_averaged_over_the_same_tokens():
    model = make_model("llava-layers")
    images = make_images(model)["pixel_values"]
    fast = VWTokenizer(model, after=Merge(6))
    words, tower = fast.tokenize(images), model.model.vision_tower
    hidden = tower(images, output_hidden_states=True).hidden_states
    both = torch.cat([hidden[-3][:, 1:], hidden[2][:, 1:]], dim=-1)
    expected = model.model.multi_modal_projector(merge(both, words))
    torch.testing.assert_close(torch.cat(fast.get_image_features(images).pooler_output), expected, **CLOSE)
    assert words.counts.tolist() == [10, 10, 10]


@torch.inference_mode()
def test_schedule_in_the_tower():
    """Tokens that are left inside the tower are what the language model reads."""
    model = make_model("paligemma")
    images = make_images(model)["pixel_values"]
    fast = VWTokenizer(model, schedule={1: Absorb(10)})
    packed, words = fast.forward_features(images, unmerge=False)
    expected = model.model.multi_modal_projector(packed.dense())
    features = fast.get_image_features(images)
    assert torch.equal(features.last_hidden_state, fast.forward_features(images))
    placed = fast.tokenize(images)
    for image in range(3):
        own = features.pooler_output[image]
        for patch in range(16):
            old, new = words.group[image, patch], placed.group[image, patch]
            torch.testing.assert_close(own[new], expected[image, old], **CLOSE)


@torch.inference_mode()
def test_blocks_that_nobody_reads_do_not_run():
    model = make_model("llava")
    fast, inputs, calls = VWTokenizer(model, after=Absorb(0.5)), make_inputs(model), []
    for layer in model.model.vision_tower.encoder.layers:
        layer.self_attn.register_forward_hook(lambda *_: calls.append(1))
    fast(**inputs)
    assert len(calls) == 2  # of three


@torch.inference_mode()
def test_the_layer_of_a_call():
    model = make_model("llava")
    inputs = make_inputs(model)
    fast = VWTokenizer(model, after=Absorb(0.5))
    expected = VWTokenizer(_with_layer(model, -1), after=Absorb(0.5))(**inputs).logits
    assert torch.equal(fast(**inputs, vision_feature_layer=-1).logits, expected)
    assert not torch.equal(fast(**inputs).logits, expected)


def _with_layer(model, layer):
    other = copy.deepcopy(model)
    other.config.vision_feature_layer = layer
    return other


@torch.inference_mode()
@pytest.mark.parametrize("name", ["llava", "paligemma"])
def test_image_tokens_of_a_prompt_on_the_grid(name):
    model = make_model(name)
    inputs = make_inputs(model)
    fast = VWTokenizer(model, make_inter(model), after=Absorb(0.5))
    words, prompt = fast.tokenize(inputs["pixel_values"]), fast.processor_inputs(**inputs)
    read = model(**prompt, output_hidden_states=True).hidden_states[0][prompt["input_ids"] == IMAGE]
    features = fast.get_image_features(inputs["pixel_values"])
    grid = features.last_hidden_state[:, 1:] if name == "llava" else features.last_hidden_state
    expected = model.model.multi_modal_projector(grid)
    torch.testing.assert_close(unmerge(read, words), expected, **CLOSE)


@torch.inference_mode()
def test_tiles():
    """LLaVA-NeXT: the ends of rows stay, and tokens of patches that are cropped away are not read."""
    model = make_model("llava-next")
    images = make_images(model)
    full = [len(own) for own in model.get_image_features(**images, return_dict=True).pooler_output]
    assert full == [16 + 32 + 4, 16 + 48 + 8, 16 + 16 + 4][: len(full)] or len(set(full)) > 1
    fast = VWTokenizer(model, after=Absorb(8))
    words = fast.tokenize(images["pixel_values"], image_sizes=SIZES)
    assert words.group.shape[0] == 3 + 5 + 3  # tiles: two images of two and one of four, and each as a whole
    features = fast.get_image_features(**images).pooler_output
    newlines = sum(int((own == model.model.image_newline).all(1).sum()) for own in features)
    assert sum(map(len, features)) == words.counts.sum() + newlines
    expected = model.get_image_features(**images, return_dict=True).pooler_output
    assert newlines == sum(int((own == model.model.image_newline).all(1).sum()) for own in expected) > 0


# -- generation --------------------------------------------------------------------------------------------------------


@torch.inference_mode()
def test_generation_step_by_step(name):
    """With its cache and without, and as a forward pass of the growing prompt says."""
    model = make_model(name)
    inputs = make_inputs(model, (2,))
    fast = VWTokenizer(model, after=Absorb(0.5))
    asked = {"max_new_tokens": 5, "min_new_tokens": 5, "suppress_tokens": [IMAGE]}
    answer = fast.generate(**inputs, **asked)
    assert torch.equal(answer[:, :-5], inputs["input_ids"])  # the prompt as it was given
    assert torch.equal(fast.generate(**inputs, **asked, use_cache=False), answer)
    if name == "paligemma":
        return  # its mask is another for generated tokens
    for _ in range(5):
        forbidden = torch.zeros(99).index_fill(0, torch.tensor([2, IMAGE]), -torch.inf)  # the end, and images
        following = (fast(**inputs).logits[:, -1] + forbidden).argmax(-1, keepdim=True)
        inputs["input_ids"] = torch.cat([inputs["input_ids"], following], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    assert torch.equal(inputs["input_ids"], answer)


@torch.inference_mode()
def test_lengths_count_the_prompt_as_given():
    model = make_model("llava")
    inputs = make_inputs(model)
    fast, length = VWTokenizer(model, after=Absorb(0.5)), inputs["input_ids"].shape[1]
    assert fast.generate(**inputs, max_length=length + 4, min_length=length + 4).shape == (2, length + 4)
    output = fast.generate(**inputs, max_new_tokens=3, num_return_sequences=2, do_sample=True, output_scores=True,
                           return_dict_in_generate=True)  # fmt: skip
    assert output.sequences.shape[0] == 4
    assert torch.equal(output.sequences[:, :length], inputs["input_ids"].repeat_interleave(2, dim=0))


@torch.inference_mode()
def test_prompts_without_images(name):
    model, fast = make_model(name), VWTokenizer(make_model(name), after=Absorb(0.5))
    ids = torch.tensor([[1, 5, 6, 7]])
    assert torch.equal(fast(input_ids=ids).logits, model(input_ids=ids).logits)
    assert torch.equal(fast.generate(ids, max_new_tokens=4), model.generate(ids, max_new_tokens=4))
    assert fast.processor_inputs(input_ids=ids)["input_ids"] is ids


@torch.inference_mode()
def test_a_batch_with_a_prompt_without_images():
    model, counts = make_model("llava"), (1, 0)
    inputs = make_inputs(model, counts)
    fast = VWTokenizer(model, after=Absorb(0.5))
    logits = fast(**inputs).logits
    ids = inputs["input_ids"][1][inputs["attention_mask"][1].bool()][None]
    torch.testing.assert_close(logits[1, -ids.shape[1] :], model(ids).logits[0], **CLOSE)


def test_training():
    model = make_model("llava").train().requires_grad_(True)
    inputs = make_inputs(model)
    labels = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, -100)
    loss = VWTokenizer(model, after=Absorb(0.5))(**inputs, labels=labels).loss
    loss.backward()
    assert model.model.vision_tower.encoder.layers[0].self_attn.q_proj.weight.grad.abs().max() > 0
    assert model.lm_head.weight.grad.abs().max() > 0


@torch.inference_mode()
def test_token_types_are_cut():
    model = make_model("paligemma")
    inputs = make_inputs(model)
    types = inputs["input_ids"].ge(11).long() * inputs["input_ids"].ne(IMAGE)
    inputs = {**inputs, "token_type_ids": types}
    fast = VWTokenizer(model, after=Absorb(0.5))
    prepared, logits = fast.processor_inputs(**inputs), fast(**inputs).logits
    ids, real = prepared["input_ids"], prepared["attention_mask"].bool()
    assert torch.equal(prepared["token_type_ids"], ids.ge(11).long() * ids.ne(IMAGE))
    torch.testing.assert_close(logits[real], model(**prepared).logits[real], **CLOSE)
    inputs["token_type_ids"] = torch.zeros_like(types)
    assert not torch.allclose(logits[real], fast(**inputs).logits[real], **CLOSE)


@torch.inference_mode()
def test_half_precision_takes_the_processors_float32():
    model = make_model("llava")
    inputs = make_inputs(model)
    expected = VWTokenizer(model, after=Prune(8))(**inputs).logits
    logits = VWTokenizer(model.bfloat16(), after=Prune(8))(**inputs).logits
    assert logits.dtype == torch.bfloat16
    assert logits.shape == expected.shape


# -- what is refused ---------------------------------------------------------------------------------------------------


def test_prompts_that_do_not_match_the_images():
    model = make_model("llava")
    inputs = make_inputs(model)
    fast = VWTokenizer(model, after=Absorb(0.5))
    for call in (fast, fast.generate, fast.processor_inputs):
        with pytest.raises(ArgumentError, match="the prompt has 48 image tokens, the images have 32 features; make"):
            call(**{**inputs, "pixel_values": inputs["pixel_values"][:2]})
    with pytest.raises(ValueError, match="Image features and image tokens do not match"):
        VWTokenizer(model)(**{**inputs, "pixel_values": inputs["pixel_values"][:2]})
    with pytest.raises(ArgumentError, match=r"attention_mask is \(2, 3\), input_ids are \(2, .*\); expected one for"):
        fast(**{**inputs, "attention_mask": torch.ones(2, 3)})


@pytest.mark.parametrize("reduced", [True, False])
def test_images_without_a_prompt(reduced):
    model = make_model("llava")
    fast = VWTokenizer(model, after=Absorb(0.5) if reduced else None)
    images = make_images(model)
    for call in (fast, fast.generate, fast.processor_inputs):
        with pytest.raises(ArgumentError, match="is given pixel_values without input_ids, the prompt with its image"):
            call(**images)


def test_wrong_images():
    model = make_model("llava")
    inputs = make_inputs(model)
    fast = VWTokenizer(model, after=Absorb(0.5))
    with pytest.raises(ImageError, match="images are 48x80, the model takes 64x64"):
        fast(**{**inputs, "pixel_values": torch.randn(3, 3, 48, 80)})
    with pytest.raises(ImageError, match=r"images are list; expected a torch\.Tensor"):
        fast(**{**inputs, "pixel_values": [1, 2]})
    with pytest.raises(ArgumentError, match="forward is given input_ids twice, first and as input_ids"):
        fast(inputs["input_ids"], **inputs)


def test_towers_that_are_not_supported():
    config = LlavaConfig(
        vision_config=Dinov2Config(**{**WIDE, "intermediate_size": 96}), text_config=LlamaConfig(**TEXT)
    )
    config.image_token_id = IMAGE
    message = (
        "this LlavaForConditionalGeneration has a Dinov2Model as its vision tower, which is not supported; expected"
    )
    with pytest.raises(ModelError, match=message):
        VWTokenizer(LlavaForConditionalGeneration(config))


def test_reductions_that_leave_nothing():
    model = make_model("llava")
    fast = VWTokenizer(model, after=Absorb(16))
    message = r"Absorb\(16\) in block 1 removes 16 of the 16 patch tokens that enter it; expected 1 to 15"
    with pytest.raises(ArgumentError, match=message):
        fast(**make_inputs(model))
    with pytest.raises(ArgumentError, match=r"Prune\(8\) in block 1 removes 8 of the 8 patch tokens"):
        VWTokenizer(model, schedule={0: Absorb(8)}, after=Prune(8))(**make_inputs(model))


def test_wrong_reductions():
    model = make_model("llava")
    with pytest.raises(ArgumentError, match=r"the schedule names block 2, but the language model reads what leaves"):
        VWTokenizer(model, schedule={2: Merge(2)})
    with pytest.raises(ArgumentError, match="schedule and after both reduce in block 1"):
        VWTokenizer(model, schedule={1: Merge(2)}, after=Absorb(2))
    with pytest.raises(ArgumentError, match=r"after is 0\.5; expected a reduction, such as vwt\.Absorb\(0\.5\)"):
        VWTokenizer(model, after=0.5)
    with pytest.raises(ArgumentError, match="after is for models whose language model reads image tokens"):
        VWTokenizer(model.model.vision_tower, after=Absorb(0.5))
    with pytest.raises(ArgumentError, match="after reduces by the attention of the last block that is read, and none"):
        VWTokenizer(_with_layer(model, [0]), after=Absorb(0.5))
    with pytest.raises(ArgumentError, match=r"vision_feature_layer is \[7\]; expected numbers from -4 to 3"):
        VWTokenizer(_with_layer(model, 7), after=Absorb(0.5))


def test_methods_that_there_are_not():
    with pytest.raises(AttributeError, match="does not pass on 'save_pretrained'"):
        _ = VWTokenizer(make_model("llava")).save_pretrained
