from functools import cache, partial

import pytest
import timm
import torch
import torch.nn.functional as F

from tests.pictures.conftest import make_codebook
from vwt import Absorb, LatencyProfile, Plan, PruningSchedule
from vwt.pictures.report.front import Row
from vwt.pictures.report.report import write_report
from vwt.tuning.plan import Point

ITSELF = Point(None, PruningSchedule({}), 10.0, 1.0, 0.0, 1.0)
OTHERS = [Row("ToMe r 8", "ToMe", 9.5, 0.95, 0.06, 0.9, 80.0), Row("a </script> & co", "new", 9.0, 0.9, 0.2, 0.8)]


def make_pixels():
    """Ten images (10, 3, 160, 160) uint8, so smooth that neighbours are alike."""
    coarse = torch.rand(10, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return (F.interpolate(coarse, (160, 160), mode="bilinear") * 255).byte()


def plan_for(model, folder, kind="neighbours", **changes):
    """A plan for a small model: with visual words before the blocks, with neighbours, or with nothing."""
    codebook = folder / "words.zarr"
    make_codebook(model, make_pixels()[0], "embedding").save(codebook, overwrite=True)
    strategy = {
        "neighbours": {"name": "Neighbours", "drop": 0.2},
        "words": {"name": "InterImage", "codebook": str(codebook), "threshold": 0.2},
        "nothing": None,
    }[kind]
    schedule = PruningSchedule({} if kind == "nothing" else {1: Absorb(10), 3: 8})
    chosen = ITSELF if kind == "nothing" else Point(strategy, schedule, 8.0, 0.8, 0.05, 0.9)
    front = [ITSELF, Point(None, PruningSchedule({2: Absorb(60)}), 7.0, 0.7, 0.3, 0.7)]
    own = LatencyProfile.identify(model)
    machine = {name: own[name] for name in ("device", "cpu", "threads", "torch", "timm")}
    known = {"model": own["model"], "batch_size": 2, "precision": own["precision"], "machine": machine}
    return Plan(**known | {"goal": {"ratio": 0.8}, "chosen": chosen, "front": [*front, chosen]} | changes)


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """The plan and the file of a report, written once for each kind of plan; to be read only."""
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=10).eval()

    @cache
    def write(kind):
        file = tmp_path_factory.mktemp("report") / "out.html"
        plan = plan_for(model, file.parent, kind)
        options = {"others": OTHERS, "command": "vwt report --out a&b.html", "progress": False}
        write_report(file, plan, model, make_pixels(), **options)
        return plan, file

    return write


@pytest.fixture
def pixels():
    return make_pixels()


@pytest.fixture
def make_plan(small_vit, tmp_path):
    return partial(plan_for, small_vit, tmp_path)
