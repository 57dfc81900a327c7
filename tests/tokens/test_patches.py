import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from vwt.models.family import embed
from vwt.tokens.patches import normalise, patchify, unpatchify

few = st.integers(1, 4)


@given(few, few, few, few, few, few)
def test_unpatchify_undoes_patchify(batch, channels, ph, pw, rows, columns):
    images = torch.rand(batch, channels, rows * ph, columns * pw)
    patches = patchify(images, (ph, pw))
    assert patches.shape == (batch, rows * columns, channels * ph * pw)
    assert torch.equal(unpatchify(patches, (ph, pw), (rows, columns)), images)


@given(few, few, few, st.integers(1, 14), st.integers(1, 14))
def test_patches_are_what_the_projection_sees(batch, ph, pw, height, width):
    """Where the image is no multiple of the patch, padded with zeros as by `dynamic_img_pad`, or cut."""
    torch.manual_seed(0)
    images, conv = torch.rand(batch, 2, height, width), nn.Conv2d(2, 3, (ph, pw), (ph, pw))
    padded = F.pad(images, (0, -width % pw, 0, -height % ph))
    grids = {(-(-height // ph), -(-width // pw)): conv(padded)}
    if height >= ph and width >= pw:
        grids[height // ph, width // pw] = conv(images)
    for grid, seen in grids.items():
        projected = F.linear(patchify(images, (ph, pw), grid), conv.weight.flatten(1), conv.bias)
        torch.testing.assert_close(projected, seen.flatten(2).mT)


@pytest.mark.parametrize("dynamic", [True, False])
def test_patches_are_in_the_order_of_the_models_own(dynamic):
    patch_embed = timm.create_model("test_vit", dynamic_img_size=dynamic).patch_embed
    images = torch.randn(2, 3, 160, 160)
    output, grid = embed(patch_embed, images)
    projected = F.linear(patchify(images, (16, 16)), patch_embed.proj.weight.flatten(1), patch_embed.proj.bias)
    torch.testing.assert_close(projected, output.flatten(1, -2), atol=1e-5, rtol=1e-5)
    assert grid == (10, 10)


def test_embed_gives_the_grid_of_any_image_size(small_vit):
    output, grid = embed(small_vit.patch_embed, torch.rand(1, 3, 64, 96))
    assert output.shape == (1, 4, 6, 64)
    assert grid == (4, 6)


def test_normalise_is_what_the_model_was_trained_with():
    images = torch.arange(256).byte().view(1, 1, 16, 16).expand(2, 3, 16, 16)
    mean, std = (0.48, 0.45, 0.4), (0.2, 0.25, 0.3)
    column = (1, 3, 1, 1)
    expected = (images / 255 - torch.tensor(mean).view(column)) / torch.tensor(std).view(column)
    torch.testing.assert_close(normalise(images, mean, std), expected, atol=1e-5, rtol=1e-5)
    assert images.dtype == torch.uint8
