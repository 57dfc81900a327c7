import pytest
import timm
import torch

from vwt import Absorb, Merge, Neighbours, PruningSchedule, VWTokenizer
from vwt.tuning.calibration import load_images


@pytest.fixture
def small_vit():
    """As elsewhere, but of two blocks: the time of an export goes with them."""
    torch.manual_seed(0)
    return timm.create_model("test_vit", num_classes=10, depth=2).eval()


@pytest.fixture
def fast(small_vit):
    return VWTokenizer(small_vit, Neighbours(0.2), PruningSchedule({0: Absorb(20), 1: Merge(5)}))


@pytest.fixture
def images():
    return torch.randn(64, 3, 160, 160, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def photographs(shared, vit_tiny):
    return load_images(shared / "eval", vit_tiny, 64, progress=False)
