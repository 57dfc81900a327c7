import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import normalize

from tests.pictures.conftest import make_codebook
from vwt import VWTokenizer
from vwt.errors import MismatchError
from vwt.models.spec import PatchSpec
from vwt.pictures.tiles import NEAREST, SHOWN, SIDE, colours, data_uri, frequent, word_tiles
from vwt.tokens.patches import normalise, patchify


def test_pixel_words_are_pictures(small_vit, image):
    codebook = make_codebook(small_vit, image, "pixel")
    tiles = word_tiles(VWTokenizer(small_vit), codebook, image[None, :, :16, :16])
    assert tiles.shape == (1, SHOWN, 3, 16, 16)
    assert frequent(codebook)[:3].tolist() == [4, 3, 2]  # counted 19, 18 and 17 times
    torch.testing.assert_close(tiles[0, 0], image[:, :16, 64:80] / 255, atol=1e-5, rtol=0)


def test_embedding_words_by_their_nearest_patches(small_vit, image):
    codebook = make_codebook(small_vit, image, "embedding", 6)
    tiles = word_tiles(VWTokenizer(small_vit), codebook, torch.stack([image.flip(2), image]))
    assert tiles.shape == (NEAREST, 6, 3, 16, 16)
    for place, word in enumerate(frequent(codebook).tolist()):
        assert torch.equal(tiles[0, place], image[:, :16, 16 * word : 16 * word + 16] / 255)
    patches = torch.stack([image.flip(2), image])
    with torch.no_grad():
        spec = PatchSpec.of(small_vit)
        features = small_vit.patch_embed(normalise(patches, spec.mean, spec.std)).flatten(1, -2).flatten(0, 1)
    likeness = normalize(codebook.words[frequent(codebook)], dim=1) @ normalize(features, dim=1).T
    second = likeness.argsort(dim=1, descending=True)[0, 1]
    expected = patchify(patches, (16, 16)).flatten(0, 1)[second].view(3, 16, 16) / 255
    assert torch.equal(tiles[1, 0], expected)


def test_words_of_another_model(small_vit, image):
    codebook = make_codebook(small_vit, image, "embedding")
    with torch.no_grad():
        small_vit.patch_embed.proj.weight.add_(0.1)
    with pytest.raises(MismatchError):
        word_tiles(VWTokenizer(small_vit), codebook, image[None])


def test_colours():
    assert colours(torch.full((1, 2, 2), 255, dtype=torch.uint8)).tolist() == torch.ones(3, 2, 2).tolist()
    assert torch.equal(colours(torch.arange(20.0).view(5, 2, 2) / 20), torch.arange(12.0).view(3, 2, 2) / 20)


@pytest.mark.parametrize("size", [(3, 40, 30), (3, 1024, 512)])
def test_data_uri(size):
    """It can be read back, is as it was where a PNG holds it, and is no larger than a page needs."""
    picture = torch.rand(size, generator=torch.Generator().manual_seed(0))
    head, _, body = data_uri(picture, "PNG").partition(",")
    assert head == "data:image/png;base64"
    read = torch.from_numpy(np.array(Image.open(io.BytesIO(base64.b64decode(body)))))
    assert max(read.shape[:2]) == min(SIDE, max(size[1:]))
    if max(size) <= SIDE:
        assert torch.equal(read, (picture * 255).round().byte().permute(1, 2, 0))
    assert len(data_uri(picture, "JPEG")) < len(data_uri(picture, "PNG"))
