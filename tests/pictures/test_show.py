import itertools

import pytest
import timm
import torch
from PIL import Image

from tests.matrix import matrix
from tests.pictures.conftest import make_codebook
from vwt import InterImage, Merge, Neighbours, PruningSchedule, VWTokenizer
from vwt.errors import ArgumentError
from vwt.pictures import show
from vwt.pictures.figures import SLIDE, new_figure, subplots
from vwt.pictures.show import save_stages, tint
from vwt.pictures.stages import DROPPED, Stage


def stage_of(keeper, grid):
    return Stage(None, "", 0, torch.tensor(keeper), grid)


def drawn_lines(stage, size):
    _, ((axes,),) = subplots(1, 1)
    show._outline(axes, stage, size)
    return [tuple(map(tuple, segment.round(2).tolist())) for segment in axes.collections[0].get_segments()]


def test_outline_is_around_tokens_of_several_patches(monkeypatch):
    """Of the patches a a / b a, the three of a have eight edges; b, alone, has none of its own."""
    monkeypatch.setattr(show, "INSET", 0.0)
    lines = drawn_lines(stage_of([0, 0, 2, 0], (2, 2)), (40, 20))
    left, middle, right, top, centre, bottom = -0.5, 9.5, 19.5, -0.5, 19.5, 39.5
    assert sorted(lines) == sorted(
        [
            ((left, top), (middle, top)),
            ((middle, top), (right, top)),
            ((left, top), (left, centre)),
            ((left, centre), (middle, centre)),
            ((middle, centre), (middle, bottom)),
            ((right, top), (right, centre)),
            ((right, centre), (right, bottom)),
            ((middle, bottom), (right, bottom)),
        ]
    )


def test_outlines_of_neighbours_lie_beside_each_other():
    lines = drawn_lines(stage_of([0, 0, 2, 2], (2, 2)), (40, 40))
    assert not any(first == second for first, second in itertools.combinations(lines, 2))


@pytest.mark.parametrize("keeper", [[0, DROPPED, 2, DROPPED], [0, 1, 2, 3]])
def test_nothing_is_outlined_where_all_are_alone(keeper):
    assert not drawn_lines(stage_of(keeper, (2, 2)), (4, 4))


def test_tint():
    """A keeper is shown as it is, what merged into it has its colour, and what is dropped is dark."""
    image = torch.ones(3, 4, 4)
    tinted = tint(image, stage_of([0, 0, DROPPED, 3], (2, 2)))
    assert torch.equal(tinted[:, :2, :2], image[:, :2, :2])
    assert torch.equal(tinted[:, 2:, 2:], image[:, 2:, 2:])
    torch.testing.assert_close(tinted[:, 0, 2], torch.tensor([1, 1 - show.TINT, 1 - show.TINT]))
    torch.testing.assert_close(tinted[:, 2:, :2], torch.full((3, 2, 2), show.DIM))


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    made = []

    def keep(*arguments, **options):
        made.append(new_figure(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(show, "new_figure", keep)
    return made


@pytest.mark.parametrize("space", matrix(["pixel", "embedding"], "embedding"))
def test_picture(small_vit, image, space, tmp_path, figures):
    codebook = make_codebook(small_vit, image, space)
    fast = VWTokenizer(small_vit, InterImage(codebook, 0.3), PruningSchedule({1: 10, 2: Merge(5), 3: 5}))
    for shown, name in ((codebook, "with"), (None, "without")):
        save_stages(tmp_path / f"{name}.png", image, fast, shown, heading="heading")
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 1000
    titles = [axes.get_title() for axes in figures[0].axes]
    assert [title.split(":")[0] for title in titles[:5]] == [
        "the image", "enter the blocks", "pruned in block 1", "merged in block 2", "pruned in block 3",
    ]  # fmt: skip
    assert titles[5] in ("the same first class", "another first class")
    assert titles[6].startswith("the most frequent of 20 words")
    assert len(figures[1].axes) == 6


def test_text_is_legible_on_a_slide(small_vit, image, tmp_path, figures):
    """A figure is as wide as a slide at most, and its text has at least 9 points."""
    codebook = make_codebook(small_vit, image, "pixel")
    fast = VWTokenizer(small_vit, InterImage(codebook, 0.3), PruningSchedule({1: 10, 2: Merge(5), 3: 5}))
    save_stages(tmp_path / "out.svg", image, fast, codebook, heading="heading")
    (figure,) = figures
    assert figure.get_figwidth() <= SLIDE
    shown = [text for text in figure.findobj(lambda one: hasattr(one, "get_fontsize")) if text.get_text()]
    assert min(text.get_fontsize() for text in shown) >= 9


def test_picture_of_one_channel_of_a_model_without_classes(tmp_path, figures):
    model = timm.create_model("test_vit", in_chans=1, num_classes=0).eval()
    model.pretrained_cfg = model.pretrained_cfg | {"mean": (0.5,), "std": (0.5,)}
    save_stages(tmp_path / "grey.png", torch.zeros(1, 160, 160, dtype=torch.uint8), VWTokenizer(model, Neighbours(0.1)))
    assert (tmp_path / "grey.png").stat().st_size > 1000
    assert len(figures[0].axes) == 2


def test_without_matplotlib(small_vit, image, monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    with pytest.raises(ArgumentError, match=r"pip install 'vwt\[plots\]'"):
        save_stages(tmp_path / "out.png", image, VWTokenizer(small_vit, Neighbours(0.1)))
