import itertools
import random

import pytest
from matplotlib.text import Annotation

from vwt.pictures.figures import new_figure
from vwt.pictures.labels import Label, place_labels


def boxes_of(axes):
    renderer = axes.figure.canvas.get_renderer()
    texts = [child for child in axes.get_children() if isinstance(child, Annotation)]
    return {text.get_text(): text.get_window_extent(renderer) for text in texts}


def drawn(labels):
    figure = new_figure(6, 4)
    axes = figure.subplots()
    for label in labels:
        axes.plot(*zip(*label.points, strict=True), "o")
    place_labels(axes, labels)
    return axes


@pytest.mark.parametrize("seed", range(3))
def test_labels_stand_apart_from_each_other_and_within_the_axes(seed):
    rng = random.Random(seed)
    labels = [Label(f"method {i}", "black", [(rng.random(), rng.random()) for _ in range(3)]) for i in range(9)]
    axes = drawn(labels)
    boxes = boxes_of(axes)
    assert set(boxes) == {label.text for label in labels}
    assert not any(one.overlaps(other) for one, other in itertools.combinations(boxes.values(), 2))
    frame = axes.get_window_extent()
    assert all(frame.containsx(x) and frame.containsy(y) for box in boxes.values() for x, y in box.corners())


def test_a_label_stands_beside_its_first_point_where_there_is_room():
    axes = drawn([Label("here", "black", [(0.0, 0.0), (1.0, 1.0)])])
    x, y = axes.transData.transform((0.0, 0.0))
    box = boxes_of(axes)["here"]
    assert x < box.x0 < x + 15
    assert box.y0 < y < box.y1


def test_what_is_right_of_a_point_at_the_edge_is_left_of_it():
    axes = drawn([Label("a long name of a method", "black", [(1.0, 0.5)]), Label("other", "black", [(0.0, 0.5)])])
    assert boxes_of(axes)["a long name of a method"].x1 < axes.transData.transform((1.0, 0.5))[0]
