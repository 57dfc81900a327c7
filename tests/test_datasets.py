import io
import tarfile

import numpy as np
import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.utils.data import IterableDataset

from vwt.datasets import ImageSource, _decode
from vwt.errors import DataError


def picture(seed: int, width: int = 200, height: int = 180) -> Image.Image:
    """Smooth noise, always the same."""
    noise = np.random.default_rng(seed).integers(0, 256, (7, 7, 3), np.uint8)
    return Image.fromarray(noise).resize((width, height), Image.Resampling.BICUBIC)


def write_images(folder, count=12, classes=("a", "b")):
    """A folder of `count` pictures in folders of classes."""
    for index in range(count):
        path = folder / classes[index % len(classes)] / f"{index:03}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(index).save(path)
    return folder


def collect(source, batch_size=5, **options):
    """All batches as one: images by index, and what was skipped."""
    images, skipped, place = {}, [], options.get("start", 0)
    for batch in source.batches(batch_size, **options):
        assert batch.start == place
        place = batch.stop
        images |= dict(zip(batch.indices, batch.images, strict=True))
        skipped += batch.skipped
    return images, skipped


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[index], other[index]) for index in one)


def test_images_are_those_of_the_models_own_config(tmp_path, small_vit):
    source = ImageSource(str(write_images(tmp_path, 3, ["a"])), small_vit)
    images, skipped = collect(source)
    config = timm.data.resolve_model_data_config(small_vit)
    transform = timm.data.create_transform(**config, is_training=False)
    assert (len(source), source.input_size, skipped) == (3, (3, 160, 160), [])
    for index, image in images.items():
        assert image.dtype == torch.uint8
        expected = transform(Image.open(tmp_path / "a" / f"{index:03}.jpg"))
        torch.testing.assert_close((image / 255 - 0.5) / 0.5, expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_in_order_from_any_start(tmp_path, small_vit, workers):
    source = ImageSource(str(write_images(tmp_path)), small_vit)
    images, _ = collect(source, batch_size=12)
    assert list(images) == [*range(12)]
    rest, _ = collect(source, start=7, workers=workers)
    assert list(rest) == [*range(7, 12)]
    assert same(rest, {index: images[index] for index in rest})
    assert list(source.batches(5, start=12, workers=workers)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_tar_file_holds_the_same_images(tmp_path, small_vit, workers):
    folder = write_images(tmp_path / "images")
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(folder, "images")
    source = ImageSource(str(tmp_path / "images.tar"), small_vit)
    assert source.name == "images.tar"
    found, _ = collect(source, batch_size=2, workers=workers)
    expected, _ = collect(ImageSource(str(folder), small_vit))
    assert sorted(map(hash_of, found.values())) == sorted(map(hash_of, expected.values()))


def hash_of(image):
    return image.numpy().tobytes()


def test_torchvision_data_set_is_read_like_the_folder(tmp_path, small_vit):
    folder = write_images(tmp_path)
    (folder / "b" / "001.jpg").write_bytes(b"")
    found, skipped = collect(ImageSource("torch/folder", small_vit, root=str(folder)))
    expected, _ = collect(ImageSource(str(folder), small_vit))
    assert same(found, expected)
    assert [(index, name) for index, name, _ in skipped] == [(6, "image 6")]


@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_cannot_be_read_are_named_and_the_others_kept(tmp_path, small_vit, workers):
    folder = write_images(tmp_path, classes=["a"])
    whole, _ = collect(ImageSource(str(folder), small_vit))
    truncated, empty, text = (folder / "a" / f"{index:03}.jpg" for index in (2, 5, 6))
    truncated.write_bytes(truncated.read_bytes()[:-200])
    empty.write_bytes(b"")
    text.write_text("no image")
    images, skipped = collect(ImageSource(str(folder), small_vit), workers=workers)
    assert same(images, {index: image for index, image in whole.items() if index not in (2, 5, 6)})
    assert [(index, name) for index, name, _ in skipped] == [(2, "a/002.jpg"), (5, "a/005.jpg"), (6, "a/006.jpg")]
    assert "truncated" in skipped[0][2]
    assert all("\n" not in reason for _, _, reason in skipped)


def test_image_that_vanishes_is_skipped(tmp_path, small_vit):
    source = ImageSource(str(write_images(tmp_path, 2, ["a"])), small_vit)
    (tmp_path / "a" / "000.jpg").unlink()
    images, [(index, name, reason)] = collect(source)
    assert (list(images), index, name) == ([1], 0, "a/000.jpg")
    assert "No such file" in reason


def test_batch_without_a_readable_image(tmp_path, small_vit):
    for index in range(2):
        (tmp_path / f"{index}.png").write_bytes(b"")
    [batch] = ImageSource(str(tmp_path), small_vit).batches(4)
    assert batch.images.shape == (0, 3, 160, 160)
    assert batch.images.dtype == torch.uint8
    assert (batch.indices, len(batch.skipped)) == ([], 2)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_images_of_any_mode_become_those_of_the_model(tmp_path, small_vit, mode):
    data = picture(0).convert("L")
    image = Image.fromarray(np.asarray(data).astype(np.uint16) * 257) if mode == "I;16" else data.convert(mode)
    image.save(tmp_path / "0.jpg", "JPEG" if mode == "CMYK" else "PNG")
    images, skipped = collect(ImageSource(str(tmp_path), small_vit))
    assert (images[0].shape, skipped) == ((3, 160, 160), [])


def test_grey_images_for_a_model_of_one_channel(tmp_path):
    cfg = {"input_size": (1, 160, 160), "mean": (0.5,), "std": (0.5,)}
    model = timm.create_model("test_vit", in_chans=1, pretrained_cfg_overlay=cfg)
    images, _ = collect(ImageSource(str(write_images(tmp_path, 2)), model))
    assert images[0].shape == (1, 160, 160)


@given(st.sampled_from(["JPEG", "PNG", "GIF", "BMP", "TIFF", "WEBP"]), st.data())
def test_damaged_image_is_read_or_has_a_reason(kind, data):
    whole = io.BytesIO()
    picture(0, 20, 18).save(whole, kind)
    damaged = bytearray(whole.getvalue()[: data.draw(st.integers(0, len(whole.getvalue())), "length")])
    for place in data.draw(st.lists(st.integers(0, max(0, len(damaged) - 1)), max_size=4), "places"):
        damaged[place : place + 1] = b"\xff"
    result = _decode(io.BytesIO(bytes(damaged)), np.array, "RGB")
    assert result.shape[-1] == 3 if isinstance(result, torch.Tensor) else result


class Endless(IterableDataset):
    """A stream that does not know its length, one picture of which is broken."""

    def __iter__(self):
        for index in range(7):
            yield (io.BytesIO(b"") if index == 3 else picture(index)), 0


def test_stream_without_a_length(tmp_path, small_vit, monkeypatch):
    monkeypatch.setattr("vwt.datasets.create_dataset", lambda *_, **__: Endless())
    source = ImageSource("hfids/endless", small_vit)
    assert (len(source), source.name) == (0, "hfids/endless")
    images, skipped = collect(source, batch_size=3)
    assert list(images) == [0, 1, 2, 4, 5, 6]
    assert skipped == [(3, "image 3", "not an image, or empty")]
    rest, _ = collect(source, batch_size=3, start=5)
    assert same(rest, {index: images[index] for index in (5, 6)})


def test_stream_that_knows_its_length_has_no_image_of_an_index(tmp_path, small_vit, monkeypatch):
    monkeypatch.setattr(Endless, "__len__", lambda self: 3, raising=False)
    monkeypatch.setattr("vwt.datasets.create_dataset", lambda *_, **__: Endless())
    source = ImageSource(str(write_images(tmp_path, 1)), small_vit)
    assert len(source) == 0


def test_fingerprint_knows_the_names_but_not_the_place(tmp_path, small_vit):
    def fingerprint(folder):
        return ImageSource(str(folder), small_vit).fingerprint()

    one, other = write_images(tmp_path / "one" / "set"), write_images(tmp_path / "other" / "set")
    assert fingerprint(one) == fingerprint(other)
    (other / "a" / "000.jpg").rename(other / "a" / "renamed.jpg")
    assert fingerprint(one) != fingerprint(other)
    (other / "a" / "renamed.jpg").unlink()
    assert fingerprint(one) != fingerprint(other)


def test_name_has_none_of_the_folders_above(tmp_path, small_vit, monkeypatch):
    write_images(tmp_path / "secret" / "set", 1)
    monkeypatch.chdir(tmp_path / "secret" / "set")
    assert ImageSource(".", small_vit).name == "set"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("missing", "no such folder or file: .*missing; expected a folder of images, a tar file"),
        ("empty", "no image|[Ff]ound 0 images"),
        ("notes.txt", "is a file, but no tar file"),
        ("broken.tar", "cannot read the data set"),
        ("torch/unheard_of", "cannot read the data set torch/unheard_of: .*unheard_of"),
    ],
)
def test_source_that_is_none(tmp_path, small_vit, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("notes")
    (tmp_path / "broken.tar").write_bytes(b"no archive" * 100)
    with pytest.raises(DataError, match=message) as caught:
        ImageSource(source, small_vit)
    assert "\n" not in str(caught.value)
