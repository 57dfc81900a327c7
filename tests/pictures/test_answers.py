import pytest
import timm
import torch

from tests.test_datasets import write_images
from vwt import IntraImage, VWTokenizer
from vwt.errors import DataError
from vwt.models.spec import prepare
from vwt.pictures.answers import DRAWN, Answers, Photographs, answer, class_names, load_photographs
from vwt.tuning.calibration import Fidelity


def some(count):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (count, 3, 160, 160), dtype=torch.uint8, generator=generator)


def test_normalised_images_become_the_pixels_that_they_were(small_vit):
    pixels = some(3)
    shown = load_photographs(prepare(pixels, small_vit), small_vit)
    assert torch.equal(shown.pixels, pixels)
    assert torch.equal(load_photographs(pixels, small_vit).pixels, pixels)
    assert shown.names == ["image 0", "image 1", "image 2"]
    assert not shown.drawn


def test_images_of_a_folder_are_drawn_and_those_that_cannot_be_read_are_named(small_vit, tmp_path):
    write_images(tmp_path, 4)
    (tmp_path / "b" / "001.jpg").write_bytes(b"no image")
    shown = load_photographs(tmp_path, small_vit, progress=False)
    assert shown.drawn
    assert sorted(shown.names) == ["a/000.jpg", "a/002.jpg", "b/003.jpg"]
    assert shown.skipped == ["b/001.jpg (not an image, or empty)"]
    again = load_photographs(tmp_path, small_vit, progress=False)
    assert (again.names, again.pixels.tolist()) == (shown.names, shown.pixels.tolist())
    assert DRAWN >= 12


@pytest.mark.parametrize("kind", ["folder", "tensor"])
def test_no_image_at_all(small_vit, tmp_path, kind):
    write_images(tmp_path, 1)
    (tmp_path / "a" / "000.jpg").write_bytes(b"")
    images = tmp_path if kind == "folder" else some(0)
    with pytest.raises(DataError, match="no image"):
        load_photographs(images, small_vit, progress=False)


def test_answers_are_those_of_both_models(small_vit):
    pixels = some(3)
    fast = VWTokenizer(small_vit, IntraImage(0.5))
    answers = answer(fast, Photographs(pixels, list("abc"), [], False))
    inputs = prepare(pixels, small_vit)
    with torch.inference_mode():
        full, reduced = (module(inputs).softmax(-1) for module in (small_vit, fast))
    torch.testing.assert_close(answers.full, full)
    torch.testing.assert_close(answers.reduced, reduced)
    assert answers.fidelity.agrees.tolist() == (full.argmax(1) == reduced.argmax(1)).tolist()
    assert answers.names[3] == "class 3"


def test_the_classes_of_embeddings_are_the_other_images():
    torch.manual_seed(0)
    model = timm.create_model("test_vit", num_classes=0).eval()
    answers = answer(VWTokenizer(model, IntraImage(0.2)), Photographs(some(4), list("abcd"), [], False))
    assert answers.full.shape == (4, 4)
    assert answers.full.diagonal().max() == answers.reduced.diagonal().max() == 0
    assert "b" not in [name for name, full, _ in answers.first(1) if full > 0]


def made(full, reduced, kl, agrees):
    names = [f"class {index}" for index in range(len(full[0]))]
    return Answers(torch.tensor(full), torch.tensor(reduced), Fidelity(torch.tensor(kl), torch.tensor(agrees)), names)


def test_first_classes_are_those_of_either_model():
    full = [[0.5, 0.3, 0.1, 0.06, 0.03, 0.01, 0.0]]
    reduced = [[0.0, 0.1, 0.2, 0.03, 0.06, 0.01, 0.6]]
    answers = made(full, reduced, [1.0], [False])
    assert [name for name, _, _ in answers.first(0)] == [f"class {index}" for index in (0, 1, 2, 3, 4, 6)]
    assert answers.first(0)[-1][1:] == pytest.approx((0.0, 0.6))


def test_images_whose_answer_changed_come_first():
    answers = made([[1.0]] * 4, [[1.0]] * 4, [0.5, 0.1, 0.9, 0.7], [True, False, True, False])
    assert answers.by_change() == [3, 1, 0, 2]


def test_names_of_classes():
    assert class_names(timm.create_model("test_vit"), 1000)[281] == "tabby"
    assert class_names(timm.create_model("test_vit", num_classes=3), 3) == ["class 0", "class 1", "class 2"]
    model = timm.create_model("test_vit", num_classes=2)
    model.config = type("Config", (), {"id2label": {0: "cat", 1: "dog"}})()
    assert class_names(model, 2) == ["cat", "dog"]
