"""Each figure as it would be on a slide: no text is smaller than 9 points, and texts do not cover each other."""

import itertools

import pytest
from matplotlib.text import Text

from vwt import Absorb, LatencyProfile, Neighbours, PruningSchedule, VWTokenizer
from vwt.pictures import charts, show
from vwt.pictures.charts import plot_profile, plot_utility
from vwt.pictures.show import save_stages


@pytest.fixture
def figures(monkeypatch):
    """What is saved."""
    saved = []
    for module in (charts, show):
        monkeypatch.setattr(module, "save_figure", lambda figure, path, **options: saved.append(figure))
    return saved


@pytest.fixture(scope="module")
def profile():
    counts = [*range(2, 197, 13), 197]
    per_token = {name: [share * n for n in counts] for name, share in (("block", 1.0), ("attention", 0.4))}
    checks = [{"schedule": "{}", "predicted": 9.0 + n, "measured": 10.0 + n} for n in range(3)]
    free = {"first": [0.0], **{kind: [0.0, 0.0] for kind in ("prune", "merge", "absorb")}}
    machine = {"device": "cpu", "cpu": "abacus", "threads": 2, "torch": "2", "timm": "1"}
    return LatencyProfile(
        "vit_tiny", 12, 1, 196, True, 1, "float32", machine, counts, per_token["block"], per_token["attention"],
        per_token["block"], free, 1.0, 0.1, checks,
    )  # fmt: skip


def check(figure):
    figure.draw_without_rendering()
    texts = [text for text in figure.findobj(Text) if text.get_text().strip() and text.get_visible()]
    assert min(text.get_fontsize() for text in texts) >= 9
    axes = [axis for own in figure.axes for axis in (own.xaxis, own.yaxis)]
    ticks = {label for axis in axes for label in axis.get_ticklabels(which="both")}
    boxes = {text.get_text(): text.get_window_extent().padded(-2) for text in texts if text not in ticks}
    pairs = itertools.combinations(boxes.items(), 2)
    assert not [(one, other) for (one, a), (other, b) in pairs if a.overlaps(b)]
    return set(boxes)


def test_profile(figures, profile):
    plot_profile("profile.svg", profile)
    texts = check(figures[0])
    assert {"a block", "of it, up to its attention", "a block after a merge"} <= texts


def test_utility(figures, profile):
    accuracy = {n: 1 - ((197 - n) / 197) ** 2 for n in range(197, 10, -20)}
    plot_utility("utility.svg", profile, accuracy, 0.5, 3)
    texts = check(figures[0])
    assert {"latency, ratio to the full model", "accuracy under random removal", "utility, alpha 0.5"} <= texts


def test_stages(figures, small_vit, image):
    save_stages("stages.svg", image, VWTokenizer(small_vit, Neighbours(0.2), PruningSchedule({1: Absorb(10)})))
    check(figures[0])
