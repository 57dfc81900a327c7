"""A uniform sample of patches that does not depend on who draws it: the patches of lowest hash (bottom-k sampling).

Every patch has a 64-bit hash of the seed, its image's key and its place in the image. The sample is the k patches of
lowest hash, so that the order of the images, their division among workers, and a part that is read twice change
nothing: the k lowest of a union are the k lowest of the k lowest of each part. Sorted by hash, every beginning of the
sample is itself a uniform sample.
"""

import hashlib
import math
import os

import numpy as np

HIGHEST = 2**64 - 1


def patch_hashes(seed: int, key: str, patches: int) -> np.ndarray:
    """Hashes (patches,) uint64 of an image's patches.

    BLAKE2b of seed and key, once an image, starts a SplitMix64 sequence (Steele et al. 2014) over its patches.

    >>> patch_hashes(0, "a/001.jpg", 2)
    array([4311545386007333028, 4752300815433817395], dtype=uint64)
    """
    digest = hashlib.blake2b(os.fsencode(key), digest_size=8, key=seed.to_bytes(8, "little")).digest()
    mixed = np.arange(1, patches + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    mixed += np.frombuffer(digest, "<u8")
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def image_hash(seed: int, key: str) -> int:
    """Hash of an image, by which some are drawn to be counted; it says nothing about those of its patches."""
    return int(patch_hashes(seed, f"image {key}", 1)[0])


def lowest(hashes: np.ndarray, numbers: np.ndarray, size: int) -> np.ndarray:
    """Places (at most size,) int64 of the lowest hashes, in ascending order; ties go to the lower number.

    Args:
        hashes: (n,) uint64.
        numbers: (n,) int64 of the patches, all different.
        size: k.
    """
    return np.lexsort((numbers, hashes))[:size]


def hash_limit(size: int, patches: int, *, readable: float = 1.0) -> int:
    """A hash that the `size` lowest of so many patches are not above, but for bad luck: six standard deviations.

    Args:
        size: of the sample.
        patches: in the data set; 0 if unknown.
        readable: the share of them that can be expected to be read.
    """
    if not patches:
        return HIGHEST
    share = (size + 6 * math.sqrt(size)) / (patches * readable)
    return HIGHEST if share >= 1 else int(share * 2**64)
