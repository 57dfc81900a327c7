import errno
import itertools
import json
import math
import os
import shutil
from contextlib import suppress
from dataclasses import replace
from zipfile import ZIP_DEFLATED, ZipFile

import fsspec
import numpy as np
import pytest
import torch
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from vwt import Codebook
from vwt.codebook import files
from vwt.errors import ArgumentError, CodebookError, MismatchError
from vwt.models.spec import PatchSpec
from vwt.tokens.patches import normalise, patchify

HALF = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
NAMES = ["w.zarr", "w.zarr.zip"]


def codebook(space="embedding", size=5, seed=0, **fields):
    random = torch.Generator().manual_seed(seed)
    default = {
        "words": torch.randn(size, 48 if space == "pixel" else 7, generator=random),
        "counts": torch.randint(0, 1 << 40, (size,), generator=random),
        "document_counts": torch.randint(0, 9, (size,), generator=random),
        "space": space,
        "patch_size": (4, 4),
        **HALF,
        "projection": {"float32": "abc", "bfloat16": "def"} if space == "embedding" else {},
        "provenance": {"model": "vit", "data set": {"name": "ä", "images": 3}, "date": "2025-01-01", "none": None},
    }
    return Codebook(**default | fields)


def spec(**fields):
    return PatchSpec(**{"model": "vit", "patch_size": (4, 4), **HALF, "projection": {"float32": "abc"}} | fields)


def assert_same(one, other):
    for name in ("words", "counts", "document_counts"):
        assert torch.equal(getattr(one, name), getattr(other, name)), name
        assert getattr(one, name).dtype == getattr(other, name).dtype
    for name in ("space", "patch_size", "mean", "std", "projection", "provenance"):
        assert getattr(one, name) == getattr(other, name), name


def bytes_of(path):
    if path.is_file():
        return path.read_bytes()
    return {file.relative_to(path).as_posix(): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def flip(path, place=-1):
    data = bytearray(path.read_bytes())
    data[place] ^= 0xFF
    path.write_bytes(data)


def edit(path, change):
    """Change the attributes of a codebook on disk."""
    document = json.loads((path / "zarr.json").read_text())
    change(document["attributes"])
    (path / "zarr.json").write_text(json.dumps(document))


# -- on disk -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("space", ["pixel", "embedding"])
def test_load_gives_what_was_saved(tmp_path, name, space):
    saved = codebook(space)
    if space == "pixel":
        saved = saved.normalised((0.0,) * 3, (1.0,) * 3)
    saved.save(tmp_path / "new folder" / name)
    assert_same(Codebook.load(tmp_path / "new folder" / name), saved)
    assert_same(Codebook.load(str(tmp_path / "new folder" / name)), saved)


@settings(max_examples=30)
@given(size=st.integers(1, 40), seed=st.integers(0, 99), name=st.sampled_from(NAMES))
def test_any_codebook_survives_the_disk(tmp_path_factory, size, seed, name):
    path, saved = tmp_path_factory.mktemp("any") / name, codebook(size=size, seed=seed)
    saved.save(path)
    assert_same(Codebook.load(path), saved)


def test_pixel_words_are_stored_for_images_of_0_to_1(tmp_path):
    images = torch.rand(1, 3, 8, 8)
    plain, half = (patchify(images * scale - shift, (4, 4))[0] for scale, shift in ((1, 0), (2, 1)))
    codebook("pixel", size=4, words=half).save(tmp_path / "w.zarr")
    stored = Codebook.load(tmp_path / "w.zarr")
    assert (stored.mean, stored.std) == ((0.0,) * 3, (1.0,) * 3)
    torch.testing.assert_close(stored.words, plain, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_same_codebook_is_the_same_bytes(tmp_path, name):
    for folder in ("one", "other"):
        codebook().save(tmp_path / folder / name)
    assert bytes_of(tmp_path / "one" / name) == bytes_of(tmp_path / "other" / name)
    if name.endswith(".zip"):
        assert {info.date_time for info in ZipFile(tmp_path / "one" / name).infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_one_chunk_an_array(tmp_path):
    codebook(size=2000).save(tmp_path / "w.zarr")
    group = zarr.open_group(tmp_path / "w.zarr", mode="r", zarr_format=3)
    assert {name: array.nchunks for name, array in group.arrays()} == {"words": 1, "counts": 1, "document_counts": 1}


@pytest.mark.parametrize("name", NAMES)
def test_existing_path_is_kept(tmp_path, name):
    path = tmp_path / name
    codebook().save(path)
    before = bytes_of(path)
    with pytest.raises(CodebookError, match=r"exists; choose another name, or overwrite it"):
        codebook(seed=1).save(path)
    assert bytes_of(path) == before


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("found", ["folder", "file"])
def test_existing_path_is_overwritten_on_demand(tmp_path, name, found):
    codebook().save(tmp_path / NAMES[found == "file"])
    path = (tmp_path / NAMES[found == "file"]).rename(tmp_path / name)
    codebook(seed=1).save(path, overwrite=True)
    assert_same(Codebook.load(path), codebook(seed=1))
    assert os.listdir(tmp_path) == [name]


@pytest.mark.parametrize(
    ("name", "culprit"),
    [*itertools.product(NAMES, ["write", "move in"]), ("w.zarr", "move aside")],  # a file is replaced as it is
)
def test_full_disk_leaves_the_old_codebook_and_nothing_else(tmp_path, monkeypatch, name, culprit):
    path, write, rename = tmp_path / name, Codebook._write, os.replace
    codebook().save(path)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    def half_full(source, target):
        moves = {"move aside": source == path, "move in": target == path and source.name.startswith("codebook.zarr")}
        return full() if moves.get(culprit) else rename(source, target)

    monkeypatch.setattr(os, "replace", half_full)
    if culprit == "write":
        monkeypatch.setattr(Codebook, "_write", lambda self, folder: full(write(self, folder)))
    with pytest.raises(CodebookError, match=r"could not write .*No space left on device; nothing was changed"):
        codebook(seed=1).save(path, overwrite=True)
    assert_same(Codebook.load(path), codebook())
    assert os.listdir(tmp_path) == [name]


def test_path_below_a_file(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CodebookError, match="could not write"):
        codebook().save(tmp_path / "file" / "w.zarr")


@pytest.mark.parametrize("name", NAMES)
def test_load_from_a_url(tmp_path, name):
    codebook().save(tmp_path / name)
    memory = fsspec.filesystem("memory")
    memory.put(str(tmp_path / name), f"/vwt-test/{name}", recursive=True)
    try:
        assert_same(Codebook.load(f"memory://vwt-test/{name}"), codebook())
        if name == "w.zarr":
            memory.rm("/vwt-test/w.zarr/words/c/0/0")
            with pytest.raises(CodebookError, match=r"memory://vwt-test/w.zarr is damaged.*'words' is missing in part"):
                Codebook.load("memory://vwt-test/w.zarr")
    finally:
        memory.rm("/vwt-test", recursive=True)
    with pytest.raises(CodebookError, match=f"memory://vwt-test/{name}"):
        Codebook.load(f"memory://vwt-test/{name}")


DAMAGES = {
    "newer": (lambda path: edit(path, lambda a: a.update(version=99)), "format version 99, .* upgrade vwt"),
    "no format": (lambda path: edit(path, lambda a: a.pop("format")), "no codebook"),
    "incomplete": (lambda path: edit(path, lambda a: a.pop("complete")), "unfinished"),
    "no mean": (lambda path: edit(path, lambda a: a.pop("mean")), "damaged: no mean in its attributes"),
    "no checksum": (lambda path: edit(path, lambda a: a["checksums"].pop("counts")), "'counts' is altered"),
    "odd patch": (lambda path: edit(path, lambda a: a.update(patch_size=4)), "no readable codebook"),
    "odd space": (lambda path: edit(path, lambda a: a.update(space="sound")), "damaged: space is 'sound'"),
    "no array": (lambda path: shutil.rmtree(path / "counts"), "array 'counts' is missing"),
    "no chunk": (lambda path: (path / "words" / "c" / "0" / "0").unlink(), "array 'words' is missing in part"),
    "empty chunk": (lambda path: (path / "counts" / "c" / "0").write_bytes(b""), "no readable codebook|damaged"),
    "altered chunk": (lambda path: flip(path / "words" / "c" / "0" / "0"), "no readable codebook|'words' is altered"),
    "no metadata": (lambda path: (path / "zarr.json").unlink(), "no readable codebook"),
    "half metadata": (lambda path: (path / "zarr.json").write_text('{"zarr_'), "no readable codebook"),
    "other zarr": (
        lambda path: (shutil.rmtree(path), zarr.open_group(path, mode="w")),
        "a zarr group, but no codebook",
    ),
}


@pytest.mark.parametrize(("damage", "message"), DAMAGES.values(), ids=DAMAGES)
def test_damaged_folder(tmp_path, damage, message):
    path = tmp_path / "w.zarr"
    codebook().save(path)
    damage(path)
    with pytest.raises(CodebookError, match=message) as caught:
        Codebook.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("array", ["words", "counts", "document_counts"])
def test_altered_array(tmp_path, array):
    codebook().save(tmp_path / "w.zarr")
    group = zarr.open_group(tmp_path / "w.zarr", mode="r+")
    group[array][0] += 1
    with pytest.raises(CodebookError, match=f"'{array}' is altered"):
        Codebook.load(tmp_path / "w.zarr")


def test_no_damaged_chunk_is_taken_for_a_codebook(tmp_path):
    path = tmp_path / "w.zarr"
    codebook(size=3).save(path)
    for chunk in path.glob("*/c/**/0"):
        if chunk.is_file():
            for place in range(chunk.stat().st_size):
                flip(chunk, place)
                with suppress(CodebookError):
                    assert_same(Codebook.load(path), codebook(size=3))  # as where a codec ignores a byte
                flip(chunk, place)
    assert_same(Codebook.load(path), codebook(size=3))


@pytest.mark.parametrize("share", [0, 0.3, 0.7, 0.99])
def test_truncated_zip(tmp_path, share):
    path = tmp_path / "w.zarr.zip"
    codebook().save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(CodebookError, match=r"w.zarr.zip is no readable codebook"):
        Codebook.load(path)


def test_altered_zip(tmp_path):
    path = tmp_path / "w.zarr.zip"
    codebook(size=100).save(path)
    flip(path, path.read_bytes().index(b"words/c/0/0") + 200)
    with pytest.raises(CodebookError, match=r"no readable codebook|altered"):
        Codebook.load(path)


def claim(path, array, **changes):
    """Change the metadata of an array on disk."""
    document = json.loads((path / array / "zarr.json").read_text())
    (path / array / "zarr.json").write_text(json.dumps(document | changes))


def chunks_of(*shape):
    return {"name": "regular", "configuration": {"chunk_shape": shape}}


@pytest.mark.parametrize(
    ("array", "shape", "chunks", "message"),
    [
        (
            "words",
            (10**12, 7),
            (10**12, 7),
            r"claims to be of shape \(1000000000000, 7\), for which too little is stored",
        ),
        ("words", (10**12, 7), (5, 7), "not one chunk"),
        ("words", (5, 7), (10**12, 7), "not one chunk"),
        ("counts", (10**12,), (10**12,), "too little is stored"),
        ("counts", (0,), (1,), "not one chunk|altered"),
    ],
)
def test_an_array_that_claims_more_than_is_stored_is_refused_before_it_is_read(
    tmp_path, monkeypatch, array, shape, chunks, message
):
    path = tmp_path / "w.zarr"
    codebook().save(path)
    claim(path, array, shape=shape, chunk_grid=chunks_of(*chunks))
    read = []
    monkeypatch.setattr(zarr.Array, "__getitem__", lambda self, _: read.append(self.name) or np.zeros(1))
    with pytest.raises(CodebookError, match=message):
        files._read_array(zarr.open_group(path, mode="r"), array, {}, "w.zarr")
    assert read == []


def test_counts_that_compress_well_are_no_claim(tmp_path):
    zeros = torch.zeros(200_000, dtype=torch.int64)
    large = codebook(words=torch.arange(200_000.0)[:, None], counts=zeros, document_counts=zeros.clone())
    large.save(tmp_path / "w.zarr")
    assert_same(Codebook.load(tmp_path / "w.zarr"), large)


def test_a_zip_file_that_claims_far_more_than_its_size_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "w.zarr.zip"
    with ZipFile(path, "w", ZIP_DEFLATED) as archive, archive.open("zarr.json", "w") as part:
        for _ in range(70):
            part.write(bytes(1 << 20))
    with pytest.raises(CodebookError, match="it claims to hold 73400320 bytes; build or fetch it anew"):
        Codebook.load(path)


def test_paths_of_a_zip_file_do_not_leave_it(tmp_path):
    path = tmp_path / "below" / "w.zarr.zip"
    codebook().save(path)
    with ZipFile(path, "a") as archive:
        archive.writestr("../../evil", "evil")
        archive.writestr("/evil", "evil")
    assert_same(Codebook.load(path), codebook())
    assert not list(tmp_path.rglob("evil"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mean", [[0.0], 0.0, 0.0]),
        ("std", ["1", 1, 1]),
        ("mean", [math.nan] * 3),
        ("projection", []),
        ("provenance", "vit"),
    ],
)
def test_attributes_of_another_type(tmp_path, name, value):
    codebook().save(tmp_path / "w.zarr")
    edit(tmp_path / "w.zarr", lambda attributes: attributes.update({name: value}))
    with pytest.raises(CodebookError, match=f"w.zarr is damaged: {name} is .*; expected"):
        Codebook.load(tmp_path / "w.zarr")


def test_the_message_on_a_damaged_file_is_short(tmp_path):
    codebook(size=1000).save(tmp_path / "w.zarr.zip")
    data = bytearray((tmp_path / "w.zarr.zip").read_bytes())
    at = data.index(b"words/c/0/0") - 4  # the length of its name
    data[at : at + 2] = b"\xff\x0f"
    (tmp_path / "w.zarr.zip").write_bytes(data)
    with pytest.raises(CodebookError, match="is no readable codebook") as error:
        Codebook.load(tmp_path / "w.zarr.zip")
    assert len(str(error.value)) < 500


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing.zarr", "no codebook at .*missing.zarr; build one with `vwt build`"),
        ("missing.zarr.zip", "no codebook at .*missing.zarr.zip"),
        ("", "no readable codebook"),
        ("notes.txt", "no readable codebook"),
    ],
)
def test_path_of_no_codebook(tmp_path, name, message):
    (tmp_path / "notes.txt").write_text("notes")
    with pytest.raises(CodebookError, match=message):
        Codebook.load(tmp_path / name)


def test_url_of_an_unknown_kind():
    with pytest.raises(CodebookError, match="carrier-pigeon"):
        Codebook.load("carrier-pigeon://w.zarr")


# -- in terms of a model -----------------------------------------------------------------------------------------------


@given(st.integers(0, 1000))
def test_pixel_words_in_another_normalisation_are_its_patches(seed):
    images = torch.randint(0, 256, (1, 3, 8, 8), generator=torch.Generator().manual_seed(seed)).byte()
    one, other = (patchify(normalise(images, **norm), (4, 4))[0] for norm in (HALF, IMAGENET))
    words = codebook("pixel", size=4, words=one)
    expressed = words.for_model(spec(**IMAGENET))
    assert (expressed.mean, expressed.std) == (IMAGENET["mean"], IMAGENET["std"])
    torch.testing.assert_close(expressed.words, other, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(expressed.for_model(spec()).words, one, atol=1e-5, rtol=1e-5)
    assert torch.equal(words.words, one)


def test_embedding_words_stay_as_they_are():
    words = codebook()
    assert words.for_model(spec()) is words
    with pytest.raises(ArgumentError, match="only pixel words"):
        words.normalised(**IMAGENET)


def test_embedding_words_serve_the_model_in_another_dtype():
    words = codebook()
    assert words.for_model(spec(projection={"bfloat16": "def"})) is words


@pytest.mark.parametrize(
    ("space", "fields", "message"),
    [
        ("pixel", {"patch_size": (8, 8)}, r"patches of \(4, 4\) pixels, vit of \(8, 8\); build a codebook"),
        ("embedding", {"patch_size": (8, 8)}, r"patches of \(4, 4\) pixels, vit of \(8, 8\); build a codebook"),
        ("pixel", {"mean": (0.5,), "std": (0.5,)}, "has 3 channels, vit 1"),
        (
            "embedding",
            {"projection": {"float32": "xyz"}},
            "space of vit.*not that of this vit.*pixel codebook",
        ),
        ("embedding", {"projection": {}}, "patch projection is not that"),
        ("embedding", {"mean": IMAGENET["mean"]}, r"mean \(0.5, 0.5, 0.5\).*vit expects mean \(0.485"),
        ("embedding", {"std": IMAGENET["std"]}, r"std \(0.5, 0.5, 0.5\).*std \(0.229"),
    ],
)
def test_codebook_of_another_model(space, fields, message):
    with pytest.raises(MismatchError, match=message):
        codebook(space).for_model(spec(**fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"space": "sound"}, "space is 'sound'; expected one of pixel, embedding"),
        ({"words": torch.zeros(5)}, r"words have shape \(5,\)"),
        ({"words": torch.zeros(0, 7)}, r"words have shape \(0, 7\)"),
        ({"words": torch.full((5, 7), torch.nan)}, "NaN or infinity"),
        ({"words": torch.zeros(5, 7).double()}, "float64"),
        ({"counts": torch.zeros(4).long()}, r"counts have shape \(4,\); expected \(5,\)"),
        ({"counts": torch.zeros(5).int()}, "int32"),
        ({"document_counts": torch.zeros(5, 1).long()}, r"document_counts have shape \(5, 1\)"),
        ({"space": "pixel", "words": torch.zeros(5, 7)}, "pixel words of width 7 do not fit .* 48 wide"),
    ],
)
def test_fields_that_do_not_fit(fields, message):
    with pytest.raises(ArgumentError, match=message):
        codebook(**fields)


def test_length_and_name():
    assert len(codebook()) == 5
    assert repr(codebook()) == "Codebook(5 words, embedding space, patch 4x4)"


# -- the authors' files ------------------------------------------------------------------------------------------------


def test_import_of_a_bare_tensor(tmp_path):
    words = torch.randn(9, 48)
    torch.save(words.half(), tmp_path / "vocab.pt")
    imported = Codebook.from_vwt(tmp_path / "vocab.pt", patch_size=(4, 4), **HALF)
    assert (imported.space, imported.patch_size, imported.mean) == ("pixel", (4, 4), HALF["mean"])
    assert torch.equal(imported.words, words.half().float())
    assert imported.counts.sum() == imported.document_counts.sum() == 0
    imported.save(tmp_path / "w.zarr")
    assert len(Codebook.load(tmp_path / "w.zarr")) == 9


def test_import_with_one_number_for_the_patch_size(tmp_path):
    torch.save(torch.randn(9, 48), tmp_path / "vocab.pt")
    assert Codebook.from_vwt(tmp_path / "vocab.pt", patch_size=4, **HALF).patch_size == (4, 4)


def test_import_of_words_that_are_patches_by_channel(tmp_path):
    torch.save(words := torch.randn(9, 3, 4, 4), tmp_path / "vocab.pt")
    assert torch.equal(Codebook.from_vwt(tmp_path / "vocab.pt", patch_size=(4, 4), **HALF).words, words.flatten(1))


def test_import_into_an_embedding_space(tmp_path):
    torch.save(torch.randn(9, 7), tmp_path / "vocab.pt")
    imported = Codebook.from_vwt(tmp_path / "vocab.pt", patch_size=(4, 4), **HALF, spec=spec())
    assert imported.for_model(spec()) is imported
    with pytest.raises(MismatchError):
        imported.for_model(spec(projection={"float32": "xyz"}))


class Trap:
    """A pickle that would run code."""

    def __reduce__(self):
        return os.mkdir, ("sprung",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Trap(), "no tensor file that can be loaded safely"),
        ({"words": torch.zeros(5, 48)}, r"holds dict; expected one tensor \(K, D\)"),
        (torch.zeros(5), r"holds \(5,\); expected one tensor \(K, D\)"),
        (b"", "no tensor file"),
        (b"notes", "no tensor file"),
        (None, "vocab.pt"),
    ],
    ids=["trap", "dict", "vector", "empty", "text", "missing"],
)
def test_import_of_something_else(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / "vocab.pt").write_bytes(content)
    elif content is not None:
        torch.save(content, tmp_path / "vocab.pt")
    with pytest.raises(CodebookError, match=message) as caught:
        Codebook.from_vwt("vocab.pt", patch_size=(4, 4), **HALF)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "sprung").exists()


def test_import_of_words_of_another_width(tmp_path):
    torch.save(torch.zeros(5, 47), tmp_path / "vocab.pt")
    with pytest.raises(ArgumentError, match=r"width 47 do not fit .* 48 wide"):
        Codebook.from_vwt(tmp_path / "vocab.pt", patch_size=(4, 4), **HALF)


def test_words_on_disk_are_little_endian_whatever_the_machine(tmp_path):
    words = replace(codebook(), words=torch.ones(5, 7))
    words.save(tmp_path / "w.zarr")
    [codec, *_] = json.loads((tmp_path / "w.zarr" / "words" / "zarr.json").read_text())["codecs"]
    assert codec == {"name": "bytes", "configuration": {"endian": "little"}}
    assert np.asarray(zarr.open_group(tmp_path / "w.zarr", mode="r")["words"]).sum() == 35
