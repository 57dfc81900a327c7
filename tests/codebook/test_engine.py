"""One build on one process, on many, and on Ray: the same bytes, whoever is killed."""

import contextlib
import importlib.util
import os
import random
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import psutil
import pytest
import timm
import torch
from safetensors.torch import save_file

from tests.codebook.test_codebook import bytes_of
from tests.matrix import matrix
from tests.test_datasets import write_images
from vwt.cli import main
from vwt.codebook import building
from vwt.codebook.config import BuildConfig
from vwt.codebook.engine import Engine
from vwt.codebook.passes import Done, SamplePass
from vwt.codebook.store import ShardStore
from vwt.errors import ArgumentError, CodebookError, DataError

pytestmark = pytest.mark.usefixtures("in_folder")
needs_ray = pytest.mark.skipif(not importlib.util.find_spec("ray"), reason="needs Ray")
COMMON = ["images", "--model", "test_vit", "--checkpoint", "weights.safetensors", "--words", "16", "--iterations", "2"]
RAY = ["--engine", "ray", "--num-workers"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with images, one of them unreadable, weights, and the codebook that one process builds."""
    folder = tmp_path_factory.mktemp("engine")
    (write_images(folder / "images", 90) / "a" / "004.jpg").write_bytes(b"")
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), folder / "weights.safetensors")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SOURCE_DATE_EPOCH", "0")
        assert main(["build", *COMMON, "--quiet", "--out", "whole.zarr"]) == 0
    return folder


def build(out, *arguments):
    """The exit status, once the codebook is complete checked to be that of one process."""
    status = main(["build", *COMMON, "--quiet", "--out", str(out), *arguments])
    if status == 0:
        assert bytes_of(Path(out)) == bytes_of(Path("whole.zarr"))
    return status


# -- the same bytes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("images", "order"),
    matrix(
        product([1, 7, 32, 1000], ["backwards", "shuffled", "twice"]),
        (7, "shuffled"),
        (32, "backwards"),
        (1000, "twice"),
    ),
)
def test_order_and_size_of_shards_do_not_matter(tmp_path, monkeypatch, order, images):
    def run(self, work, shards):
        shards = list(shards)[::-1] if order == "backwards" else random.Random(0).sample(shards, len(shards))
        for shard in [*shards, *(shards if order == "twice" else [])]:
            yield from work([shard])

    monkeypatch.setattr(Engine, "run", run)
    monkeypatch.setattr(building, "SHARD_IMAGES", images)
    assert build(tmp_path / "w.zarr", "--workers", "0") == 0


@pytest.mark.slow
def test_local_processes_give_the_same_bytes(tmp_path):
    assert build(tmp_path / "w.zarr", "--num-workers", "2") == 0


def test_results_on_another_file_system(tmp_path):
    """In memory, and in a folder that is removed in the end."""
    assert build(tmp_path / "w.zarr", "--work", "memory://shards") == 0
    assert build(tmp_path / "x.zarr", "--work", f"file://{tmp_path}/shards") == 0
    assert not any((tmp_path / "shards").iterdir())


def test_builds_into_two_places_may_share_the_folder_for_results(tmp_path, monkeypatch):
    shared, others = ["--work", f"file://{tmp_path}/shards"], [tmp_path / "x.zarr"]

    def run(self, work, shards):
        for shard in shards:
            yield from work([shard])
            if others:
                assert build(others.pop(), *shared) == 0

    monkeypatch.setattr(Engine, "run", run)
    assert build(tmp_path / "w.zarr", *shared) == 0
    assert others == []
    assert not any((tmp_path / "shards").iterdir())


@needs_ray
@pytest.mark.slow
@pytest.mark.parametrize("workers", ["1", "2"])
def test_ray_gives_the_same_bytes(tmp_path, workers):
    assert build(tmp_path / "w.zarr", *RAY, workers) == 0


# -- killed ------------------------------------------------------------------------------------------------------------


def start(out, *arguments):
    command = [sys.executable, "-m", "vwt.cli", "build", *COMMON, "--out", str(out), "--quiet", *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for_results(out, name="sample"):
    """Until some shard has a result."""
    results = Path(f"{out}.building", "shards", name)
    deadline = time.monotonic() + 300
    while not results.is_dir() or not any(path.suffix == ".safetensors" for path in results.iterdir()):
        assert time.monotonic() < deadline
        time.sleep(0.01)


SLOW = """
import importlib.abc, importlib.machinery, sys, time

class Slow(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "vwt.codebook.passes":
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        spec.loader.exec_module = lambda module, run=spec.loader.exec_module: (run(module), change(module))
        return spec

def change(passes):
    passes.SHARD_IMAGES = 2
    for kind in (passes.SamplePass, passes.CountPass):
        kind.result = lambda self, items, result=kind.result: (time.sleep(0.1), result(self, items))[1]

sys.meta_path.insert(0, Slow())
"""


@pytest.fixture
def many_shards(in_folder, monkeypatch, tmp_path):
    """Small shards, and images that take their time, in child processes too."""
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)


def workers_of(process):
    return [
        child
        for child in psutil.Process(process.pid).children(recursive=True)
        if any("spawn_main" in word for word in child.cmdline()) or "ray::_Worker" in " ".join(child.cmdline())
    ]


ENGINES = [
    pytest.param(["--num-workers", "2"], id="local"),
    pytest.param([*RAY, "2"], id="ray", marks=needs_ray),
]


@pytest.mark.usefixtures("many_shards")
@pytest.mark.parametrize("arguments", ENGINES)
@pytest.mark.slow
@pytest.mark.parametrize("name", ["sample", "count"])
def test_killed_worker_is_replaced(tmp_path, arguments, name):
    out = tmp_path / "w.zarr"
    with start(out, *arguments) as process:
        wait_for_results(out, name)
        os.kill(workers_of(process)[0].pid, signal.SIGKILL)
        _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert "a worker was lost" in errors
    assert "Traceback" not in errors
    assert bytes_of(out) == bytes_of(Path("whole.zarr"))


@pytest.mark.usefixtures("many_shards")
@pytest.mark.slow
@pytest.mark.parametrize("arguments", ENGINES)
@pytest.mark.parametrize("name", ["sample", "count"])
def test_killed_driver_is_followed_by_its_workers_and_can_be_resumed(tmp_path, arguments, name):
    out = tmp_path / "w.zarr"
    with start(out, *arguments) as process:
        wait_for_results(out, name)
        workers = workers_of(process)
        process.kill()
    assert workers
    _, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive
    assert build(out, *arguments, "--resume") == 0


@pytest.mark.slow
@pytest.mark.usefixtures("many_shards")
@pytest.mark.parametrize("arguments", ENGINES)
@pytest.mark.parametrize("moment", range(int(os.environ.get("VWT_TEST_MOMENTS", "2"))))
def test_killed_at_random_moments(tmp_path, arguments, moment):
    """A worker, or the driver; half of the moments each."""
    out, chance = tmp_path / "w.zarr", random.Random(moment)
    with start(out, *arguments) as process:
        wait_for_results(out)
        time.sleep(chance.uniform(0, 8))
        workers = []
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended by itself
            workers = workers_of(process)
            if moment % 2:
                process.kill()
            elif workers:
                chance.choice(workers).kill()
        _, errors = process.communicate(timeout=300)
    psutil.wait_procs(workers, timeout=60)
    assert "Traceback" not in errors
    if process.returncode:
        assert build(out, *arguments, "--resume") == 0
    assert bytes_of(out) == bytes_of(Path("whole.zarr"))


# -- what goes wrong ---------------------------------------------------------------------------------------------------


class Failing:
    """Work that fails or dies, in another process too."""

    def __init__(self, dies):
        self.dies = dies

    def __call__(self, shards):
        for shard in shards:
            if self.dies:
                os.kill(os.getpid(), signal.SIGKILL)
            raise DataError(f"shard {shard} is bad")
            yield Done(shard, 0, {})


@pytest.mark.parametrize(
    "engine",
    [
        Engine(),
        pytest.param(Engine("local", 2), marks=pytest.mark.slow),
        pytest.param(Engine("ray", 1), marks=[needs_ray, pytest.mark.slow]),
    ],
)
def test_errors_of_workers_are_those_of_one_process(engine):
    with pytest.raises(DataError, match=r"\Ashard 3 is bad\Z"):
        list(engine.run(Failing(dies=False), [3]))


@pytest.mark.slow
def test_workers_that_die_again_and_again():
    with (
        pytest.warns(UserWarning, match="a worker was lost; 2 shards are left"),
        pytest.raises(CodebookError, match="workers were lost 3 times before any finished a shard; is there enough"),
    ):
        list(Engine("local", 2).run(Failing(dies=True), [0, 1]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "abacus"}, "engine is 'abacus'; expected one of local, ray"),
        ({"workers": 0}, "num_workers is 0; expected at least 1"),
        ({"kind": "ray", "gpus": -1.0}, "gpus_per_worker is -1.0"),
        ({"address": "auto"}, "are of Ray; leave them out, or take the engine ray"),
        ({"gpus": 1.0}, "are of Ray"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ArgumentError, match=message):
        Engine(**options)


def test_what_workers_cannot_share(tmp_path, capsys, monkeypatch):
    assert build(tmp_path / "w.zarr", "--num-workers", "2", "--backend", "sklearn") == 2
    assert "take the backend faiss to share a build" in capsys.readouterr().err
    monkeypatch.setattr("vwt.datasets.ImageSource.__len__", lambda self: 0)
    assert build(tmp_path / "w.zarr", "--num-workers", "2") == 2
    assert "is a stream, which workers cannot share" in capsys.readouterr().err


def test_ray_that_is_not_installed(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert build(tmp_path / "w.zarr", *RAY, "1") == 2
    assert "the engine ray cannot be imported" in capsys.readouterr().err


@needs_ray
def test_address_where_no_cluster_answers(tmp_path, capsys):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    assert build(tmp_path / "w.zarr", *RAY, "1", "--address", address) == 2
    assert f"no Ray cluster answers at {address}" in capsys.readouterr().err


@needs_ray
@pytest.mark.parametrize(
    ("answer", "reason"), [(b"HTTP/1.1 400 Bad", "something else listens there"), (b"", "timed out")]
)
def test_address_where_something_else_answers(tmp_path, capsys, monkeypatch, answer, reason):
    monkeypatch.setattr("vwt.codebook.ray_engine._SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as pool:
        accepted = pool.submit(lambda: (connection := server.accept()[0], connection.sendall(answer)))
        address = f"127.0.0.1:{server.getsockname()[1]}"
        assert build(tmp_path / "w.zarr", *RAY, "1", "--address", address) == 2
        accepted.result()[0].close()
    assert f"no Ray cluster answers at {address}: {reason}; start one" in capsys.readouterr().err


def test_file_system_that_refuses_half_way(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(building, "SHARD_IMAGES", 10)
    write, left = ShardStore.write, iter(range(5))

    def full(self, *arguments):
        if next(left, None) is None:
            monkeypatch.setattr(self.files, "pipe_file", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
        write(self, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(ShardStore, "write", full)
        assert build(tmp_path / "w.zarr") == 2
    assert "no space left; what was written before is kept" in capsys.readouterr().err
    monkeypatch.undo()
    assert len(list((tmp_path / "w.zarr.building" / "shards" / "sample").glob("*.safetensors"))) == 5


def test_store_that_workers_do_not_share(tmp_path):
    store = ShardStore(str(tmp_path / "shards"))
    assert store.shards("sample") == set()
    with pytest.raises(CodebookError, match=r"shard 3 is not in .*; if workers run on other machines, give a folder"):
        store.read("sample", 3)
    with pytest.raises(CodebookError, match="cannot open nosuch://shards"):
        ShardStore("nosuch://shards")


# -- the passes --------------------------------------------------------------------------------------------------------


def test_images_without_a_sampled_patch_are_not_read(folder, small_vit, tmp_path, monkeypatch):
    """And where images that cannot be read leave the sample short, it is drawn again with a higher limit."""
    monkeypatch.setattr(building, "_PATCHES_PER_WORD", (2, 4))
    read = []
    result = SamplePass.result
    monkeypatch.setattr(
        SamplePass, "result", lambda self, items: read.extend(index for index, _ in items) or result(self, items)
    )
    config = BuildConfig(words=4)
    options = {"progress": False, "workers": 0}
    one, report = building.run_build("images", small_vit, config, **options)
    assert report.sampled == 16
    assert 0 < len(read) < 60
    assert report.images == 89
    monkeypatch.setattr(building, "_READABLE", 100.0)
    again, _ = building.run_build("images", small_vit, config, **options)
    assert torch.equal(one.words, again.words)
