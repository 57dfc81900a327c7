import pytest
import torch

from vwt import Codebook
from vwt.models.spec import PatchSpec
from vwt.tokens.patches import normalise, patchify


@pytest.fixture
def image():
    return torch.randint(0, 256, (3, 160, 160), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def make_codebook(model, image, space, count=20):
    """Words that are patches of the image."""
    spec = PatchSpec.of(model)
    inputs = normalise(image[None], spec.mean, spec.std)
    with torch.no_grad():
        features = patchify(inputs, spec.patch_size) if space == "pixel" else model.patch_embed(inputs).flatten(1, -2)
    counts = torch.arange(count).roll(5)
    projection = spec.projection if space == "embedding" else {}
    return Codebook(
        features[0, :count].float(), counts, counts, space, spec.patch_size, spec.mean, spec.std, projection
    )
