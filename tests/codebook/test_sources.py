"""Builds from tar files, parquet and WebDataset: the same words from all of them, whoever reads them."""

import importlib.util
import io
import pickle
import tarfile

import pytest
import timm
import torch
import torch.nn.functional as F

from tests.codebook.test_codebook import bytes_of
from tests.test_datasets import write_images
from vwt.codebook import building
from vwt.codebook.building import run_build
from vwt.codebook.config import BuildConfig
from vwt.codebook.engine import Engine

pytestmark = pytest.mark.usefixtures("in_folder")
needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs Ray")
needs_datasets = pytest.mark.skipif(not importlib.util.find_spec("datasets"), reason="needs the package datasets")
needs_webdataset = pytest.mark.skipif(not importlib.util.find_spec("webdataset"), reason="needs the package webdataset")
TAR = pytest.param("images.tar", id="tar")
PARQUET = pytest.param("hfds/parquet", id="parquet", marks=[needs_datasets, pytest.mark.slow])
ENGINES = [
    pytest.param(Engine("local", 2), id="local"),
    pytest.param(Engine("ray", 2), id="ray", marks=needs_ray),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The same images as a tar file, in parquet, and as a WebDataset of two tar files."""
    folder = tmp_path_factory.mktemp("sources")
    files = sorted(write_images(folder / "images", 24, ["a"]).rglob("*.jpg"))
    with tarfile.open(folder / "images.tar", "w") as archive:
        archive.add(folder / "images", "images")
    for half in range(2):
        with tarfile.open(folder / f"words-{half}.tar", "w") as archive:
            for file in files[12 * half :][:12]:
                for name, data in ((f"{file.stem}.jpg", file.read_bytes()), (f"{file.stem}.cls", b"0")):
                    member = tarfile.TarInfo(name)
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    if importlib.util.find_spec("datasets"):
        import datasets

        rows = {"image": [{"bytes": file.read_bytes(), "path": file.name} for file in files], "label": [0] * 24}
        (folder / "parquet").mkdir()
        table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        table.to_parquet(folder / "parquet" / "train-00000-of-00001.parquet")
    return folder


@pytest.fixture(autouse=True)
def shards(monkeypatch):
    monkeypatch.setattr(building, "SHARD_IMAGES", 5)


def build(source, out, engine=None, **options):
    torch.manual_seed(0)
    model = timm.create_model("test_vit").eval()
    config = BuildConfig(words=8, iterations=2, split=options.pop("split", "train"))
    return run_build(source, model, config, out=out, workers=0, progress=False, engine=engine, **options)[0]


@pytest.mark.parametrize("source", [TAR, PARQUET])
def test_what_workers_do_is_the_same_after_a_pickle(tmp_path, monkeypatch, source):
    build(source, tmp_path / "whole.zarr")

    def run(self, work, shards):
        for shard in reversed(shards):
            yield from pickle.loads(pickle.dumps(work))([shard])

    monkeypatch.setattr(Engine, "run", run)
    build(source, tmp_path / "parts.zarr")
    assert bytes_of(tmp_path / "parts.zarr") == bytes_of(tmp_path / "whole.zarr")


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("source", [TAR, PARQUET])
def test_workers_give_the_same_bytes(tmp_path, source, engine):
    build(source, tmp_path / "one.zarr")
    build(source, tmp_path / "two.zarr", engine)
    assert bytes_of(tmp_path / "two.zarr") == bytes_of(tmp_path / "one.zarr")


@pytest.mark.slow
@needs_datasets
@pytest.mark.parametrize(
    ("source", "options"),
    [
        pytest.param("hfids/parquet", {}, id="hfids"),
        pytest.param("wds/words", {"root": ".", "split": "words-{0..1}.tar|24"}, id="wds", marks=needs_webdataset),
    ],
)
def test_streams_give_the_words_of_the_same_images_in_parquet(tmp_path, source, options):
    """An image is known by its index in all three, and hfids and wds know how many there are."""
    stream, table = build(source, None, **options), build("hfds/parquet", None)
    assert torch.equal(stream.counts, table.counts)
    torch.testing.assert_close(F.normalize(stream.words, dim=-1), F.normalize(table.words, dim=-1), rtol=0, atol=0)
