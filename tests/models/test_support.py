import re
import sys
from pathlib import Path

import pytest
import timm
import torch

from vwt import Absorb, Codebook, InterImage, IntraImage, VWTokenizer
from vwt.cli import main
from vwt.errors import ModelError
from vwt.models.families import FAMILIES
from vwt.models.support import find_support, list_families


@pytest.mark.parametrize(
    ("name", "facts"),
    [
        ("vit_tiny_patch16_224", "VisionTransformer: 12 blocks, 1 prefix tokens, 196 patches of 224x224 pixels"),
        ("vit_giant_patch14_dinov2.lvd142m", "VisionTransformer: 40 blocks, 1 prefix tokens, 1369 patches"),
        ("vit_small_patch16_dinov3", "Eva: 12 blocks, 5 prefix tokens, 256 patches of 256x256 pixels"),
        ("beit_base_patch16_224", "Beit: .* only strategies that keep patches in their places, and no schedule"),
        ("naflexvit_base_patch16_siglip", "NaFlexVit: 12 blocks, 0 prefix tokens, 576 patches of 384x384 pixels"),
    ],
)
def test_supported(capsys, name, facts):
    assert find_support(name).reason is None
    assert main(["models", name]) == 0
    assert re.match(rf"{name}: supported, {facts}", capsys.readouterr().out)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("swin_tiny_patch4_window7_224", "SwinTransformer is not supported: it is of no family"),
        ("test_convnext", "ConvNeXt is not supported"),
        ("samvit_base_patch16", "its blocks attend within windows"),
    ],
)
def test_not_supported_and_why(capsys, name, reason):
    assert reason in find_support(name).reason
    assert main(["models", name, "vit_tiny_patch16_224"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith(f"{name}: no. ")
    assert reason in lines[0]
    assert lines[1].startswith("vit_tiny_patch16_224: supported")


def test_the_families(capsys):
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert out == list_families() + "\n"
    assert all(f"| timm {family.MODEL.__name__} " in out for family in FAMILIES)


def test_the_table_of_the_docs():
    pytest.importorskip("transformers")
    page = Path(__file__).parents[2] / "docs" / "models.md"
    assert f"\n\n{list_families()}\n\n" in page.read_text()


SMALL = {"num_classes": 10, "img_size": 64, "depth": 2, "embed_dim": 48, "num_heads": 3}
MADE = {
    "VisionTransformer": "vit_tiny_patch16_224",
    "Eva": "vit_small_patch16_rope_mixed_224",
    "Beit": "beit_base_patch16_224",
    "VisionTransformerRelPos": "vit_relpos_base_patch16_cls_224",
    "NaFlexVit": "naflexvit_base_patch16_gap",
}


def accepted(call):
    try:
        call()
    except ModelError:
        return False
    return True


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.MODEL.__name__)
def test_what_can_be_done(family):
    model, can = timm.create_model(MADE[family.MODEL.__name__], **SMALL).eval(), family.ABILITIES
    images = torch.ones(2, 3, 64, 64)  # all patches are one word
    fast, keeping = VWTokenizer(model, InterImage(one_word(), 1.0)), VWTokenizer(model, IntraImage(0.5))
    assert accepted(lambda: fast(images)) == (can.strategies == "all")
    assert accepted(lambda: VWTokenizer(model, schedule={0: Absorb(2)})) == can.schedules
    assert (keeping.forward_features(images).shape == model.forward_features(images).shape) == can.features
    keeping(images).sum().backward()
    assert (model.blocks[0].attn.proj.weight.grad is not None) == can.training


def one_word():
    count = torch.ones(1, dtype=torch.int64)
    return Codebook(torch.ones(1, 3 * 16 * 16), count, count, "pixel", (16, 16), (0.5,) * 3, (0.5,) * 3)


def test_classes_of_transformers(capsys):
    pytest.importorskip("transformers")
    assert main(["models", "BlipForConditionalGeneration", "Dinov2Model", "PaliGemmaForConditionalGeneration"]) == 0
    expected = [
        "BlipForConditionalGeneration: supported, BLIP; images of one size; tuned by its vision_model",
        "Dinov2Model: supported, DINOv2",
        "PaliGemmaForConditionalGeneration: supported, PaliGemma; images of one size; tuned on prompts",
    ]
    assert capsys.readouterr().out.splitlines() == expected
    assert main(["models", "SwinModel"]) == 1
    assert re.match(
        r"SwinModel: no\. transformers\.models\.swin\.modeling_swin\.SwinModel is not supported; of transformers, vwt "
        r"takes CLIPVisionModel, .*LlavaForConditionalGeneration, .*; of a model that holds one of these, wrap that "
        r"part; .*timm.*\n$",
        capsys.readouterr().out,
    )
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    for kind in ("ViTModel", "BlipForConditionalGeneration", "LlavaForConditionalGeneration"):
        assert f"\n| transformers {kind} " in out
    for name in ("pipeline", "ViTmodel", "ViTConfig"):
        with pytest.raises(
            ModelError, match=f"no model '{name}'.* nor has transformers a class of models of that name"
        ):
            find_support(name)


def test_without_transformers(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "vwt.models.hf", None)
    assert main(["models", "ViTModel"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "no model 'ViTModel'" in error
    assert "to ask for a class of transformers, pip install 'vwt[hf]'" in error
    assert main(["models"]) == 0
    assert re.search(
        r"\n\| transformers +\| some of its models too: pip install 'vwt\[hf\]' +\|", capsys.readouterr().out
    )


def test_an_unknown_name(capsys):
    with pytest.raises(ModelError, match="no model 'vit_giant_patch0'"):
        find_support("vit_giant_patch0")
    assert main(["models", "vit_giant_patch0"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_an_unknown_tag():
    with pytest.raises(
        ModelError, match=r"no weights 'test_vit.nonsense'; see timm.list_pretrained\('test_vit\.\*'\)\Z"
    ):
        find_support("test_vit.nonsense")


def test_a_model_that_cannot_be_made_without_memory(monkeypatch):
    def fail(*arguments, **options):
        raise RuntimeError("no kernel\nfor meta")

    monkeypatch.setattr(timm, "create_model", fail)
    with pytest.raises(ModelError, match=r"vit_tiny_patch16_224 cannot be made on the meta device: no kernel; wrap it"):
        find_support("vit_tiny_patch16_224")
