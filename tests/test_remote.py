"""Images in object storage: those of a local copy, on a file system in memory and on a server that speaks S3."""

import pickle
import tarfile
from pathlib import Path

import fsspec
import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.codebook.test_codebook import bytes_of
from tests.test_datasets import collect, same, write_images
from vwt.cli import main
from vwt.codebook.building import run_build
from vwt.codebook.config import BuildConfig
from vwt.codebook.engine import Engine
from vwt.datasets import ImageSource
from vwt.errors import ArgumentError, DataError
from vwt.remote import RemoteReader

pytestmark = pytest.mark.usefixtures("in_folder")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Images, one of them unreadable, a tar file of them, weights, and the codebooks of both."""
    folder = tmp_path_factory.mktemp("remote")
    (write_images(folder / "images", 12, ["10", "a", "9"]) / "a" / "004.jpg").write_bytes(b"")
    (folder / "images" / "notes.txt").write_text("no image")
    with tarfile.open(folder / "images.tar", "w") as archive:
        archive.add(folder / "images", "images")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), folder / "weights.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SOURCE_DATE_EPOCH", "0")
        for source in ("images", "images.tar"):
            assert build(source, Path(f"{source}.zarr")) == 0
    return folder


@pytest.fixture
def memory(folder):
    """A file system in memory that holds the folder's images."""
    files = fsspec.filesystem("memory")
    files.put(str(folder / "images"), "/bucket/images", recursive=True)
    files.put_file(str(folder / "images.tar"), "/bucket/images.tar")
    yield files
    files.rm("/bucket", recursive=True)


def build(source, out, *arguments):
    common = ["--model", "test_vit", "--checkpoint", "weights.safetensors", "--words", "16", "--iterations", "2"]
    return main(["build", source, *common, "--workers", "0", "--quiet", "--out", str(out), *arguments])


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("source", ["images", "images.tar"])
def test_order_names_labels_and_pixels_are_those_of_the_local_copy(small_vit, source):
    local, remote = ImageSource(source, small_vit), ImageSource(f"memory://bucket/{source}", small_vit)
    assert remote.name == source
    assert [remote.key(index) for index in range(12)] == [local.key(index) for index in range(12)]
    assert remote.fingerprint() == local.fingerprint()
    assert remote.classes == local.classes == {"9": 0, "10": 1, "a": 2}
    (images, skipped), (expected, those) = collect(remote), collect(local)
    assert same(images, expected)
    assert skipped == those
    labels = [batch.labels for batch in remote.batches(12)]
    assert labels == [batch.labels for batch in local.batches(12)]


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize("source", ["images", "images.tar"])
def test_codebook_of_a_url_has_the_bytes_of_the_local_one(tmp_path, source):
    assert build(f"memory://bucket/{source}", tmp_path / "w.zarr") == 0
    assert bytes_of(tmp_path / "w.zarr") == bytes_of(Path(f"{source}.zarr"))


@pytest.mark.usefixtures("memory")
def test_splits_and_class_maps(tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("a\nb\n")
    assert {label for _, label in RemoteReader("memory://bucket/images", class_map=str(names)).samples} == {0}
    files = fsspec.filesystem("memory")
    files.mv("/bucket/images", "/bucket/split/validation", recursive=True)
    for split in ("validation", "val[:50%]"):
        assert RemoteReader("memory://bucket/split", split).filename(0) == "9/002.jpg"
    assert RemoteReader("memory://bucket/split", "train").filename(0) == "validation/9/002.jpg"


@pytest.mark.usefixtures("memory")
def test_reader_opens_its_storage_anew_in_another_process():
    reader = RemoteReader("memory://bucket/images")
    assert reader[0][0].read() == pickle.loads(pickle.dumps(reader))[0][0].read()
    assert b"MemoryFileSystem" not in pickle.dumps(reader)


def test_image_that_vanishes_is_skipped_and_a_lost_connection_is_not(small_vit, memory, monkeypatch):
    source = ImageSource("memory://bucket/images", small_vit)
    memory.rm("/bucket/images/9/002.jpg")
    _, skipped = collect(source)
    assert [name for _, name, _ in skipped] == ["9/002.jpg", "a/004.jpg"]

    def refuse(self, path):
        raise TimeoutError("no answer\nfor a minute")

    monkeypatch.setattr(type(memory), "cat_file", refuse)
    with pytest.raises(DataError, match=r"\Acannot fetch 9/002.jpg of memory://bucket/images: no answer; see .*\Z"):
        collect(source)


def test_lost_connection_keeps_what_was_built(tmp_path, memory, monkeypatch, capsys):
    monkeypatch.setattr("vwt.codebook.building.SHARD_IMAGES", 2)
    fetched, fetch = [], type(memory).cat_file

    def refuse(self, path):
        if len(fetched) == 6:
            raise OSError("connection reset")
        fetched.append(path)
        return fetch(self, path)

    with monkeypatch.context() as patch:
        patch.setattr(type(memory), "cat_file", refuse)
        assert build("memory://bucket/images", tmp_path / "w.zarr") == 2
    assert "connection reset" in capsys.readouterr().err
    assert len(list(tmp_path.glob("w.zarr.building/shards/sample/*.safetensors"))) == 2
    assert build("memory://bucket/images", tmp_path / "w.zarr", "--resume") == 0
    assert bytes_of(tmp_path / "w.zarr") == bytes_of(Path("images.zarr"))


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("memory://nothing/here", "no image in memory://nothing/here|there is no memory://nothing/here"),
        ("nosuch://bucket/images", "cannot list nosuch://bucket/images: Protocol not known: nosuch"),
        ("file:///no/such/folder", "no image in file:///no/such/folder"),
    ],
)
def test_source_that_is_none(small_vit, source, message):
    with pytest.raises(DataError, match=message) as caught:
        ImageSource(source, small_vit)
    assert "\n" not in str(caught.value)


def test_package_that_is_not_installed(small_vit, monkeypatch):
    def missing(url):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(fsspec.core, "url_to_fs", missing)
    with pytest.raises(DataError, match="cannot open s3://bucket/images: Install s3fs to access S3"):
        ImageSource("s3://bucket/images", small_vit)


@pytest.mark.usefixtures("memory")
@pytest.mark.parametrize(("source", "work"), [("memory://bucket/images", None), ("images", "memory://work")])
def test_memory_of_this_process_is_not_shared_with_workers(small_vit, source, work):
    with pytest.raises(ArgumentError, match=r"memory://.* is in the memory of this process, which workers"):
        run_build(source, small_vit, BuildConfig(words=4), engine=Engine("local", 2), work=work)


# -- a server that speaks S3 -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(folder):
    """A server on the loopback, with a bucket that holds the images, and credentials in the environment."""
    pytest.importorskip("s3fs")
    moto = pytest.importorskip("moto.server", reason="needs moto, flask and flask-cors for a server that speaks S3")
    own = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    own.start()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "name")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_ENDPOINT_URL", "http://{}:{}".format(*own.get_host_and_port()))
        files = fsspec.filesystem("s3", skip_instance_cache=True)
        files.mkdir("bucket")
        files.put(str(folder / "images"), "bucket/images", recursive=True)
        files.put_file(str(folder / "images.tar"), "bucket/images.tar")
        yield files
    own.stop()


@pytest.mark.slow
@pytest.mark.usefixtures("server")
@pytest.mark.parametrize(
    ("source", "arguments"),
    [
        ("images", []),
        ("images", ["--workers", "2"]),
        ("images", ["--num-workers", "2", "--work", "s3://bucket/work"]),
        ("images.tar", ["--workers", "2"]),
    ],
)
def test_codebook_of_a_bucket_has_the_bytes_of_the_local_one(tmp_path, server, source, arguments):
    assert build(f"s3://bucket/{source}", tmp_path / "w.zarr", *arguments) == 0
    assert bytes_of(tmp_path / "w.zarr") == bytes_of(Path(f"{source}.zarr"))
    server.invalidate_cache()
    assert not server.exists("bucket/work")


@pytest.mark.slow
@pytest.mark.usefixtures("server")
def test_buckets_and_credentials_that_are_missing(tmp_path, capsys, monkeypatch):
    fsspec.filesystem("s3").clear_instance_cache()
    assert build("s3://absent/images", tmp_path / "w.zarr") == 2
    assert capsys.readouterr().err == "vwt: there is no s3://absent/images: The specified bucket does not exist\n"
    assert build("s3://bucket/nothing", tmp_path / "w.zarr") == 2
    assert capsys.readouterr().err == "vwt: no image in s3://bucket/nothing\n"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    fsspec.filesystem("s3").clear_instance_cache()
    assert build("s3://bucket/images", tmp_path / "w.zarr") == 2
    assert "cannot list s3://bucket/images: Unable to locate credentials; see that" in capsys.readouterr().err
