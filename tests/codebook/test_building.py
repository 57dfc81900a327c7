import os
import shutil
import tarfile

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from PIL import Image

import vwt
from tests.codebook.test_codebook import assert_same, bytes_of
from tests.matrix import matrix
from tests.test_datasets import write_images
from vwt.codebook import building
from vwt.codebook.building import first_of_twins, run_build
from vwt.codebook.config import BuildConfig
from vwt.codebook.passes import RESOLUTION, CountPass
from vwt.datasets import ImageSource
from vwt.errors import ArgumentError, CodebookError, DataError, ModelError, VWTError
from vwt.models.spec import PatchSpec
from vwt.tokens.patches import normalise, patchify

KINDS = [
    {"space": space, "backend": backend, "spherical": spherical}
    for space in ("embedding", "pixel")
    for backend in ("faiss", "sklearn")
    for spherical in (True, False)
]
QUICK_KINDS = [KINDS[0], KINDS[3], KINDS[4]]  # either space and backend, spherical or not
kinds = pytest.mark.parametrize("kind", matrix(KINDS, *QUICK_KINDS), ids=lambda kind: "-".join(map(str, kind.values())))


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 12 images, of 100 patches each."""
    return write_images(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture
def ours(tmp_path):
    """The same, to be damaged."""
    return write_images(tmp_path / "images")


@pytest.fixture(autouse=True)
def a_day(monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "86400")


def build(source, model, out=None, *, words=16, strict=False, resume=False, overwrite=False, workers=0, **config):
    return run_build(
        str(source),
        model,
        BuildConfig(words=words, **config),
        out=out,
        strict=strict,
        resume=resume,
        overwrite=overwrite,
        workers=workers,
        progress=False,
    )


def features_of(source, model, space):
    """Features (images, 100, D) of all images."""
    [batch] = ImageSource(str(source), model).batches(100)
    images = normalise(batch.images, (0.5,) * 3, (0.5,) * 3)
    if space == "pixel":
        return patchify(images, (16, 16))
    with torch.inference_mode():
        return model.patch_embed(images).flatten(1, -2)


def nearest(features, words):
    return (F.normalize(features.double(), dim=-1) @ F.normalize(words.double(), dim=-1).T).max(-1)


def interrupt(monkeypatch, *arguments, calls=2, **options):
    """Begin a build of three shards, and leave it in the second pass."""
    result, left = CountPass.result, [calls]

    def interrupted(*arguments):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        return result(*arguments)

    monkeypatch.setattr("vwt.codebook.building.SHARD_IMAGES", 4)
    with monkeypatch.context() as patch:
        patch.setattr(CountPass, "result", interrupted)
        with pytest.raises(KeyboardInterrupt):
            build(*arguments, **options)


# -- what is built -----------------------------------------------------------------------------------------------------


@kinds
def test_counts_are_those_of_a_recount(images, small_vit, kind):
    codebook, report = build(images, small_vit, threshold=0.2, **kind)
    similarity, word = nearest(features_of(images, small_vit, kind["space"]), codebook.words)
    assert torch.equal(codebook.counts, torch.bincount(word.flatten(), minlength=16))
    documents = [sum(k in image for image in word.tolist()) for k in range(16)]
    assert codebook.document_counts.tolist() == documents
    assert (report.images, report.skipped, report.patches, report.sampled) == (12, {}, 1200, 1200)
    assert int(codebook.counts.sum()) == report.patches
    assert report.distance == pytest.approx(float((1 - similarity).mean()), abs=1e-5)
    assert report.matched == pytest.approx(float((similarity >= 0.8).double().mean()), abs=1e-3)
    assert (report.empty, report.effective) == (int((codebook.counts == 0).sum()), 16 - report.empty)
    assert {"decode", "cluster", "count"} <= report.seconds.keys()


@kinds
def test_words_lie_among_their_patches(images, small_vit, kind):
    codebook, report = build(images, small_vit, **kind)
    features = features_of(images, small_vit, kind["space"]).flatten(0, 1)
    _, word = nearest(features, codebook.words)
    means = torch.stack([features[word == k].mean(0) for k in range(16)])
    distance = (codebook.words - means).norm(dim=-1) / means.norm(dim=-1)
    assert report.empty == 0
    assert distance.median() < 0.2
    assert report.distance < build(images, small_vit, words=2, **kind)[1].distance


@pytest.mark.parametrize("spherical", [True, False])
def test_pixel_words_are_images_of_0_to_1_on_disk(images, small_vit, tmp_path, spherical):
    codebook, _ = build(images, small_vit, tmp_path / "w.zarr", space="pixel", spherical=spherical)
    stored = vwt.Codebook.load(tmp_path / "w.zarr")
    assert -0.1 < stored.words.min() < 0.3 < 0.7 < stored.words.max() < 1.1
    torch.testing.assert_close(stored.for_model(PatchSpec.of(small_vit)).words, codebook.words, atol=1e-5, rtol=0)


def test_codebook_serves_the_model_it_was_built_for(images, small_vit):
    codebook = vwt.build_codebook(images, small_vit, words=16, progress=False, workers=0)
    assert codebook.for_model(PatchSpec.of(small_vit)) is codebook
    assert_same(codebook, build(images, small_vit)[0])


def test_words_of_a_naflex_model(images):
    """It has no patch_embed: its family knows its projection."""
    cfg = {"input_size": (3, 160, 160)}
    small = {"depth": 2, "embed_dim": 48, "num_heads": 3, "num_classes": 10, "pretrained_cfg_overlay": cfg}
    model = timm.create_model("naflexvit_base_patch16_gap", **small).eval()
    codebook, report = build(images, model)
    assert report.images == 12
    fast = vwt.VWTokenizer(model, vwt.InterImage(codebook, threshold=1.0))
    assert fast.tokenize(torch.ones(1, *fast.backbone.input_shape)).counts[0] < fast.backbone.patches


def test_models_that_cannot_be_wrapped_get_no_codebook(images, small_vit):
    swin = timm.create_model("swin_tiny_patch4_window7_224")
    with pytest.raises(ModelError, match="SwinTransformer is not supported"):
        build(images, swin, space="pixel")


def test_codebook_says_where_it_comes_from(images, small_vit):
    codebook, report = build(images, small_vit, seed=3)
    assert codebook.projection == PatchSpec.of(small_vit).projection
    assert codebook.provenance["date"] == "1970-01-02"
    assert codebook.provenance["model"].startswith("test_vit")
    data, clustering = codebook.provenance["data set"], codebook.provenance["clustering"]
    assert (data["name"], data["images"], data["patches"]) == ("images", 12, 1200)
    assert (clustering["backend"], clustering["seed"], clustering["sampled"]) == ("faiss", 3, 1200)
    assert clustering["mean cosine distance"] == pytest.approx(report.distance, abs=1e-6)
    assert codebook.provenance["versions"]["torch"] == torch.__version__.split("+")[0]
    assert str(images.parent) not in str(codebook.provenance)


@pytest.mark.parametrize("backend", ["faiss", "sklearn"])
def test_seed_decides_the_bytes(images, small_vit, tmp_path, backend):
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        build(images, small_vit, tmp_path / name, seed=seed, backend=backend)
    assert bytes_of(tmp_path / "one") == bytes_of(tmp_path / "same")
    words = [vwt.Codebook.load(tmp_path / name).words for name in ("one", "other")]
    assert not torch.equal(*words)


def test_workers_do_not_decide_the_bytes(ours, small_vit, tmp_path, monkeypatch):
    monkeypatch.setattr("vwt.codebook.features._BATCH", 5)
    (ours / "a" / "004.jpg").write_bytes(b"")
    for workers in (0, 1, 2):
        build(ours, small_vit, tmp_path / f"{workers}", workers=workers)
    assert bytes_of(tmp_path / "0") == bytes_of(tmp_path / "1") == bytes_of(tmp_path / "2")


def test_zip_holds_the_same_codebook(images, small_vit, tmp_path):
    for name in ("w.zarr", "w.zarr.zip"):
        build(images, small_vit, tmp_path / name)
    assert_same(vwt.Codebook.load(tmp_path / "w.zarr"), vwt.Codebook.load(tmp_path / "w.zarr.zip"))
    assert sorted(os.listdir(tmp_path)) == ["w.zarr", "w.zarr.zip"]


def test_tar_file_holds_the_same_patches(images, small_vit, tmp_path):
    with tarfile.open(tmp_path / "images.tar", "w") as archive:
        archive.add(images, "images")
    _, report = build(tmp_path / "images.tar", small_vit, workers=2)
    assert (report.images, report.patches, report.empty) == (12, 1200, 0)


@pytest.mark.parametrize(
    ("limits", "room", "size"), [((2, 4), 1 << 20, 64), ((2, 4), 0, 32), ((2, 4), 4 * 64 * 16 * 3, 48)]
)
def test_sample_is_bounded_and_counts_are_of_everything(images, small_vit, monkeypatch, limits, room, size):
    kmeans, samples = building.kmeans, []
    monkeypatch.setattr("vwt.codebook.building._PATCHES_PER_WORD", limits)
    monkeypatch.setattr("vwt.codebook.building._SAMPLE_BYTES", room)
    monkeypatch.setattr(
        "vwt.codebook.building.kmeans", lambda sample, *a, **k: samples.append(sample) or kmeans(sample, *a, **k)
    )
    codebook, report = build(images, small_vit)
    assert (report.sampled, int(codebook.counts.sum())) == (size, 1200)
    features = F.normalize(features_of(images, small_vit, "embedding"), dim=-1)
    similarity, image = (torch.from_numpy(np.array(samples[0])) @ features.mT).amax(-1).max(0)
    assert similarity.min() > 0.9999  # each one is a patch
    assert len(set(image.tolist())) > 6  # of images all over the stream


@pytest.mark.parametrize("shard_images", matrix([1, 5, 32], 5))
def test_words_are_counted_in_some_images_if_asked(images, small_vit, monkeypatch, shard_images):
    monkeypatch.setattr(building, "SHARD_IMAGES", shard_images)
    whole, _ = build(images, small_vit)
    part, report = build(images, small_vit, count_images=5)
    torch.testing.assert_close(F.normalize(part.words, dim=-1), F.normalize(whole.words, dim=-1))
    assert report.images == 5
    assert part.counts.sum() == report.patches == 500
    assert part.document_counts.max() <= 5
    assert (part.counts <= whole.counts).all()
    counted = [book.provenance["data set"]["counted"] for book in (whole, part)]
    assert counted == ["all images", "some, drawn at random"]
    assert build(images, small_vit, count_images=12)[1].images == 12
    vwt.VWTokenizer(small_vit, vwt.InterImage(part, threshold=2.0))(torch.rand(1, 3, 160, 160))


def test_images_to_count_that_cannot_be_read(ours, small_vit):
    for path in sorted(ours.rglob("*.jpg"))[1:]:
        path.write_bytes(b"")
    with pytest.raises(DataError, match="none of the images that were drawn to be counted can be read; count more"):
        build(ours, small_vit, words=4, count_images=1, seed=1)


def test_many_words_are_assigned_approximately_from_a_sample_of_half_precision(images, small_vit, monkeypatch):
    exact, before = build(images, small_vit, words=64)
    for module in ("clustering", "finishing"):
        monkeypatch.setattr(f"vwt.codebook.{module}.APPROXIMATE", 64)
    monkeypatch.setattr("vwt.codebook.clustering._PROBES", 8)
    near, after = build(images, small_vit, words=64)
    assert after.distance < 1.05 * before.distance
    assert not torch.equal(near.words, exact.words)
    assert near.provenance["clustering"]["assignment"] == "approximate"
    assert exact.provenance["clustering"]["assignment"] == "exact"


def test_words_without_patches_and_twins_are_counted(tmp_path, small_vit):
    """Patches of constant grey have one of two directions, whatever their grey."""
    for grey in range(0, 240, 20):
        Image.new("RGB", (160, 160), (grey,) * 3).save(tmp_path / f"{grey:03}.png")
    codebook, report = build(tmp_path, small_vit, space="pixel")
    assert (report.effective, report.empty + report.duplicate) == (2, 14)
    assert sorted(codebook.counts.tolist()) == [0] * 14 + [500, 700]
    assert codebook.words.norm(dim=-1).min() > 0  # a direction, even where it is nobody's
    assert codebook.provenance["clustering"]["effective words"] == 2


def test_twins_point_the_way_of_an_earlier_word():
    directions = F.normalize(torch.randn(2100, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    twins = {5: 3, 1023: 0, 1024: 1023, 1500: 1023, 2099: 7}
    for later, earlier in twins.items():
        directions[later] = directions[earlier]
    chains = twins | {1024: 0, 1500: 0}  # by way of 1023
    assert first_of_twins(directions).tolist() == [chains.get(word, word) for word in range(2100)]


def test_patches_of_twins_count_to_the_first():
    """Words that faiss made of one: which of them a patch is nearer to is a matter of rounding."""
    signs = torch.ones(64)
    signs[1::2] = -1
    split = F.normalize(torch.stack([1 + signs / 1024, 1 - signs / 1024, -torch.ones(64)]), dim=-1)
    work = CountPass("count", None, None, 1, 4, directions=split, counted_as=first_of_twins(split), threshold=0.1)
    arrays, values = work.result([(0, work.each(2 * split[[0, 1, 1, 2]]))])
    assert arrays["counts"].tolist() == [3, 0, 1]
    assert arrays["document_counts"].tolist() == [1, 0, 1]
    assert (arrays["projections"] * RESOLUTION).tolist() == pytest.approx([6, 0, 2], abs=1e-5)
    assert values == {"distance": pytest.approx(0, abs=2), "matched": 4}


@pytest.fixture
def four_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("four_threads")
def test_model_and_threads_are_left_as_they_were(images, small_vit):
    state = {name: t.clone() for name, t in small_vit.state_dict().items()}
    attributes = set(vars(small_vit))
    build(images, small_vit.train())
    assert small_vit.training
    assert set(vars(small_vit)) == attributes
    assert all(torch.equal(t, state[name]) for name, t in small_vit.state_dict().items())
    assert torch.get_num_threads() == 4


def test_model_of_low_precision(images, small_vit):
    codebook, _ = build(images, small_vit.bfloat16())
    assert codebook.words.dtype == torch.float32
    assert codebook.for_model(PatchSpec.of(small_vit)) is codebook


# -- bad input ---------------------------------------------------------------------------------------------------------


def damage(folder):
    """Truncate one image and empty another."""
    truncated, empty = folder / "a" / "002.jpg", folder / "b" / "007.jpg"
    truncated.write_bytes(truncated.read_bytes()[:-200])
    empty.write_bytes(b"")


@pytest.mark.parametrize("backend", ["faiss", "sklearn"])
def test_images_that_cannot_be_read_are_named_and_counted(ours, small_vit, backend):
    damage(ours)
    codebook, report = build(ours, small_vit, backend=backend)
    assert list(report.skipped) == ["a/002.jpg", "b/007.jpg"]
    assert "truncated" in report.skipped["a/002.jpg"]
    assert (report.images, report.patches, int(codebook.counts.sum())) == (10, 1000, 1000)
    assert codebook.provenance["data set"]["skipped"] == 2


def test_strict_stops_at_the_first_of_them(ours, small_vit, tmp_path):
    damage(ours)
    with pytest.raises(DataError, match=r"cannot read a/002.jpg: .*truncated.*without --strict it is skipped"):
        build(ours, small_vit, tmp_path / "w.zarr", strict=True)
    assert not (tmp_path / "w.zarr").exists()


def test_folder_of_unreadable_images(tmp_path, small_vit):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(b"")
    with pytest.raises(DataError, match=r"no readable image in .*a\.jpg: not an image, or empty"):
        build(folder, small_vit, tmp_path / "w.zarr")
    assert os.listdir(tmp_path) == ["images"]


@pytest.mark.parametrize("backend", ["faiss", "sklearn"])
def test_fewer_patches_than_words(images, small_vit, tmp_path, backend):
    with pytest.raises(DataError, match="1200 patches are fewer than 1201 words; give more images or ask for fewer"):
        build(images, small_vit, tmp_path / "w.zarr", words=1201, backend=backend)
    assert os.listdir(tmp_path) == []


def test_as_many_words_as_patches(images, small_vit):
    codebook, report = build(images, small_vit, words=1200, iterations=1)
    assert (len(codebook), report.patches) == (1200, 1200)
    assert report.distance < 0.01


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite(images, small_vit, value):
    small_vit.patch_embed.proj.weight.data[5, 1] = value
    with pytest.raises(
        DataError, match=r"NaN or infinity in the patches of image 0 .*are the model's weights finite\?"
    ):
        build(images, small_vit)
    assert torch.get_num_threads() == 4


def test_sources_and_models_that_are_none(images, small_vit, tmp_path):
    with pytest.raises(DataError, match="no such folder or file"):
        build(tmp_path / "missing", small_vit)
    with pytest.raises(DataError, match=r"no image|Found 0 images"):
        build(tmp_path, small_vit)
    with pytest.raises(ModelError, match="ResNet is not supported"):
        build(images, timm.create_model("test_resnet"))
    assert os.listdir(tmp_path) == []


def test_model_of_other_channels_than_its_config_says(images):
    with pytest.raises(VWTError, match="channel"):
        build(images, timm.create_model("test_vit", in_chans=1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"words": 0}, "words is 0; expected an integer of at least 1"),
        ({"words": 2.5}, "words is 2.5"),
        ({"iterations": 0}, "iterations is 0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1 << 31}, "seed is 2147483648"),
        ({"count_images": 0}, "count_images is 0"),
        ({"space": "sound"}, "space is 'sound'; expected one of pixel, embedding"),
        ({"backend": "abacus"}, "backend is 'abacus'; expected one of faiss, sklearn"),
        ({"threshold": 2.1}, r"threshold is 2.1; expected a cosine distance in \[0, 2\]"),
        ({"threshold": float("nan")}, "threshold is nan"),
        ({"workers": -1}, "workers is -1"),
    ],
)
def test_options_out_of_range(images, small_vit, options, message):
    with pytest.raises(ArgumentError, match=message):
        build(images, small_vit, **options)


# -- what is there already ---------------------------------------------------------------------------------------------


def test_codebook_that_exists_is_kept(images, small_vit, tmp_path):
    build(images, small_vit, tmp_path / "w.zarr")
    before = bytes_of(tmp_path / "w.zarr")
    with pytest.raises(CodebookError, match=r"w.zarr exists; choose another name, or overwrite it \(--overwrite\)"):
        build(images, small_vit, tmp_path / "w.zarr", seed=1)
    assert bytes_of(tmp_path / "w.zarr") == before
    build(images, small_vit, tmp_path / "w.zarr", seed=1, overwrite=True)
    assert bytes_of(tmp_path / "w.zarr") != before
    assert os.listdir(tmp_path) == ["w.zarr"]


def test_old_codebook_survives_until_the_new_one_is_complete(images, small_vit, tmp_path, monkeypatch):
    build(images, small_vit, tmp_path / "w.zarr")
    before = bytes_of(tmp_path / "w.zarr")
    interrupt(monkeypatch, images, small_vit, tmp_path / "w.zarr", seed=1, overwrite=True)
    assert bytes_of(tmp_path / "w.zarr") == before


def test_interrupted_build_is_neither_mixed_with_another_nor_dropped_unasked(images, small_vit, tmp_path, monkeypatch):
    out, folder = tmp_path / "w.zarr", tmp_path / "w.zarr.building"
    interrupt(monkeypatch, images, small_vit, out)
    before = bytes_of(folder)
    with pytest.raises(CodebookError, match="holds an interrupted build; go on with --resume"):
        build(images, small_vit, out)
    fewer = write_images(tmp_path / "images", 11)
    torch.manual_seed(1)
    other = timm.create_model("test_vit", num_classes=10)
    for options, name in (
        ({"words": 8}, "words"),
        ({"space": "pixel"}, "space"),
        ({"backend": "sklearn"}, "backend"),
        ({"spherical": False}, "spherical"),
        ({"iterations": 6}, "iterations"),
        ({"seed": 1}, "seed"),
        ({"threshold": 0.2}, "threshold"),
        ({"source": fewer}, "data set"),
        ({"model": other}, "projection"),
    ):
        with pytest.raises(
            CodebookError, match=f"interrupted build with another .*{name}.*; .*or drop it with --overwrite"
        ):
            build(**{"source": images, "model": small_vit, "out": out} | options, resume=True)
    assert bytes_of(folder) == before
    build(images, small_vit, out, words=8, overwrite=True)
    assert len(vwt.Codebook.load(out)) == 8
    assert not folder.exists()


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_interrupted_build_goes_on_to_the_same_bytes(ours, small_vit, tmp_path, monkeypatch, calls):
    damage(ours)
    interrupt(monkeypatch, ours, small_vit, tmp_path / "w.zarr", calls=calls)
    _, resumed = build(ours, small_vit, tmp_path / "w.zarr", resume=True)
    _, whole = build(ours, small_vit, tmp_path / "whole.zarr")
    assert bytes_of(tmp_path / "w.zarr") == bytes_of(tmp_path / "whole.zarr")
    assert resumed.skipped == whole.skipped
    resumed.seconds = whole.seconds
    assert resumed == whole


def test_resume_without_an_interrupted_build_begins_one(images, small_vit, tmp_path):
    build(images, small_vit, tmp_path / "w.zarr", resume=True)
    assert len(vwt.Codebook.load(tmp_path / "w.zarr")) == 16


def halve(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def unlink(path):
    path.unlink()


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("build.json", halve),
        ("build.json", unlink),
        ("centres.safetensors", halve),
        ("sample.json", halve),
        ("sample.raw", halve),
        ("sample.raw", unlink),
    ],
)
def test_damaged_folder_of_a_build_is_refused(images, small_vit, tmp_path, monkeypatch, name, damage):
    """Above all, no state is taken for that of another build, and no sample for one of zeros."""
    folder = tmp_path / "w.zarr.building"
    interrupt(monkeypatch, images, small_vit, tmp_path / "w.zarr", calls=3)
    damage(folder / name)
    with pytest.raises(CodebookError, match=r"\A.*w.zarr.building.*damaged; begin anew with --overwrite\Z"):
        build(images, small_vit, tmp_path / "w.zarr", resume=True)
    build(images, small_vit, tmp_path / "w.zarr", overwrite=True)
    assert not folder.exists()


@pytest.mark.parametrize("lost", ["centres.safetensors", "sample.json", "shards/count/0000000.safetensors"])
def test_lost_state_is_made_anew(images, small_vit, tmp_path, monkeypatch, lost):
    interrupt(monkeypatch, images, small_vit, tmp_path / "w.zarr", calls=3)
    (tmp_path / "w.zarr.building" / lost).unlink()
    build(images, small_vit, tmp_path / "w.zarr", resume=True)
    build(images, small_vit, tmp_path / "whole.zarr")
    assert bytes_of(tmp_path / "w.zarr") == bytes_of(tmp_path / "whole.zarr")


def test_damaged_result_of_a_shard_is_made_anew(images, small_vit, tmp_path, monkeypatch):
    interrupt(monkeypatch, images, small_vit, tmp_path / "w.zarr", calls=3)
    halve(tmp_path / "w.zarr.building" / "shards" / "count" / "0000001.safetensors")
    with pytest.raises(CodebookError, match=r"0000001.safetensors was damaged, and is removed; go on with --resume"):
        build(images, small_vit, tmp_path / "w.zarr", resume=True)
    build(images, small_vit, tmp_path / "w.zarr", resume=True)
    build(images, small_vit, tmp_path / "whole.zarr")
    assert bytes_of(tmp_path / "w.zarr") == bytes_of(tmp_path / "whole.zarr")


def test_interrupted_build_of_the_former_format_is_refused(images, small_vit, tmp_path):
    folder = tmp_path / "w.zarr.building"
    folder.mkdir()
    (folder / "build.json").write_text('{"what": {"words": 16}, "date": "2026-01-01"}')
    (folder / "first_pass.json").write_text('{"next": 4, "patches": 400, "shape": [400, 64], "skipped": []}')
    with pytest.raises(CodebookError, match=r"\A.*another version of vwt.*; begin anew with --overwrite\Z"):
        build(images, small_vit, tmp_path / "w.zarr", resume=True)
    build(images, small_vit, tmp_path / "w.zarr", overwrite=True)


def test_folder_that_was_moved_goes_on_where_it_is(images, small_vit, tmp_path, monkeypatch):
    interrupt(monkeypatch, images, small_vit, tmp_path / "w.zarr")
    shutil.move(tmp_path / "w.zarr.building", tmp_path / "new.zarr.building")
    build(images, small_vit, tmp_path / "new.zarr", resume=True)
    build(images, small_vit, tmp_path / "whole.zarr")
    assert bytes_of(tmp_path / "new.zarr") == bytes_of(tmp_path / "whole.zarr")
