"""Images and words as pictures: the most frequent words of a codebook, and what a page can hold."""

import base64
import io

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from vwt.codebook.codebook import Codebook
from vwt.models.spec import PatchSpec, prepare
from vwt.tokenizer import VWTokenizer
from vwt.tokens.patches import patchify, unpatchify

SHOWN = 16  # words


SIDE = 512  # pixels of the longer side of a picture in a page, at most


NEAREST = 3  # patches for each word in embedding space


def frequent(codebook: Codebook, count: int = SHOWN) -> Tensor:
    """Numbers (n,) of the most frequent words, the most frequent first; the first ones where nothing was counted."""
    return codebook.counts.argsort(descending=True, stable=True)[:count]


@torch.inference_mode()
def word_tiles(fast: VWTokenizer, codebook: Codebook, images: Tensor) -> Tensor:
    """Pictures (k, n, 3, height, width) in [0, 1] of the n most frequent words.

    Args:
        fast: around the model.
        codebook: for that model.
        images: (m, C, H, W) uint8, in whose patches the k nearest to an embedding word are sought (fewer, if there are
            fewer); k is 1 for pixel words, which are pictures themselves.

    Raises:
        MismatchError: if the codebook was made for another model.
    """
    spec = PatchSpec.of(fast.model)
    codebook = codebook.for_model(spec)
    chosen = frequent(codebook)
    height, width = spec.patch_size
    if codebook.space == "pixel":
        channels = len(codebook.mean)
        own = codebook.normalised((0.0,) * channels, (1.0,) * channels).words[chosen]
        pictures = own.clamp(0, 1)[None]
    else:
        features, pixels = [], []
        for image in images:
            patches, _, grid = fast.backbone.embed(prepare(image[None], fast.model))
            features.append(F.normalize(patches[0].float().cpu(), dim=-1))
            pixels.append(patchify(image[None], spec.patch_size, grid)[0])
        likeness = F.normalize(codebook.words[chosen], dim=-1) @ torch.cat(features).T
        nearest = likeness.topk(min(NEAREST, likeness.shape[1]), dim=1).indices.T  # (k, n)
        pictures = torch.cat(pixels)[nearest].float() / 255
    tiles = unpatchify(pictures.flatten(0, 1)[:, None], (height, width), (1, 1))
    return torch.stack([colours(tile) for tile in tiles]).unflatten(0, pictures.shape[:2])


def colours(image: Tensor) -> Tensor:
    """An image (C, H, W), uint8 or float in [0, 1], as colours (3, H, W) float in [0, 1]; one channel makes grey."""
    image = image.cpu() / 255 if image.dtype == torch.uint8 else image.cpu()
    return image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)


def data_uri(picture: Tensor, kind: str) -> str:
    """A picture (3, H, W) in [0, 1] as text that a page can hold."""
    pixels = (picture.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
    image, file = Image.fromarray(pixels), io.BytesIO()
    image.thumbnail((SIDE, SIDE))
    image.save(file, kind, **({"quality": 88} if kind == "JPEG" else {}))
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"
