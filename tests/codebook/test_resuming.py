import errno
import multiprocessing
import os
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.holding import held_elsewhere
from vwt.codebook.resuming import SavedTensors, make_matrix, open_matrix, read_json, work_folder
from vwt.documents import write_json
from vwt.errors import CodebookError

resource = pytest.importorskip("resource", reason="limits the size of files, which needs Unix")


@contextmanager
def full_disk():
    """No file can grow beyond 100 bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def begin(target, **options):
    return work_folder(target, **({"resume": False, "overwrite": False} | options))


def interrupt(target):
    with pytest.raises(KeyboardInterrupt), begin(target) as folder:  # noqa: PT012
        (folder / "state").write_text("half")
        raise KeyboardInterrupt


def test_folder_of_a_complete_build_is_removed(tmp_path):
    with begin(tmp_path / "new" / "w.zarr") as folder:
        assert folder == tmp_path / "new" / "w.zarr.building"
    assert not folder.exists()


def test_folder_of_a_build_that_had_not_begun_is_removed(tmp_path):
    with pytest.raises(KeyboardInterrupt), begin(tmp_path / "w.zarr"):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


def test_folder_of_a_build_in_memory_is_removed():
    with begin(None) as folder:
        (folder / "state").touch()
    assert not folder.exists()


def test_folder_of_an_interrupted_build_is_kept(tmp_path):
    target = tmp_path / "w.zarr"
    interrupt(target)
    with pytest.raises(CodebookError, match=r"interrupted build; go on with --resume, or drop it with --overwrite"):
        begin(target).__enter__()
    with begin(target, resume=True) as folder:
        assert (folder / "state").read_text() == "half"


@pytest.mark.parametrize("resume", [True, False])
def test_overwrite_drops_an_interrupted_build_unless_it_is_resumed(tmp_path, resume):
    interrupt(tmp_path / "w.zarr")
    with begin(tmp_path / "w.zarr", resume=resume, overwrite=True) as folder:
        assert (folder / "state").exists() == resume


def test_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CodebookError, match="cannot write"):
        begin(tmp_path / "file" / "w.zarr").__enter__()


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: write_json(folder / "state.json", ["new"] * 100),
        lambda folder: SavedTensors(folder / "state.safetensors").save({"new": torch.ones(100)}, {}),
        lambda folder: make_matrix(folder / "sample.raw", (10, 10), np.float32),
    ],
    ids=["json", "tensors", "sample"],
)
def test_full_disk_is_one_line_and_keeps_what_was_saved(tmp_path, write):
    line = pytest.raises(CodebookError, match=r"\Acould not write .*make room and go on with --resume\Z")
    with line, begin(tmp_path / "w.zarr") as folder:
        write_json(folder / "state.json", "old")
        SavedTensors(folder / "state.safetensors").save({"old": torch.ones(1)}, {})
        with full_disk():
            write(folder)
    with begin(tmp_path / "w.zarr", resume=True) as folder:  # room was made
        assert read_json(folder / "state.json") == "old"
        assert SavedTensors(folder / "state.safetensors").tensors.keys() == {"old"}
        write(folder)


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EPERM])
def test_a_place_that_cannot_be_written_is_not_told_to_make_room(tmp_path, monkeypatch, number):
    def refuse(self, *arguments, **options):
        raise OSError(number, os.strerror(number), str(self))

    advice = rf"could not write .*{os.strerror(number)}; see that this place can be written and go on with --resume, or"
    with pytest.raises(CodebookError, match=advice), begin(tmp_path / "w.zarr") as folder:
        refuse(folder)
    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(CodebookError, match=rf"cannot write .*{os.strerror(number)}; choose another place"):
        begin(tmp_path / "v.zarr").__enter__()


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root writes everywhere")
def test_a_read_only_folder(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CodebookError, match=r"Permission denied; choose another place"):
        begin(tmp_path / "w.zarr").__enter__()
    tmp_path.chmod(0o700)


def test_json_is_whole_or_damaged(tmp_path):
    path = tmp_path / "state.json"
    write_json(path, {"next": 3, "skipped": [[1, ["ä.jpg", "empty"]]]})
    assert read_json(path) == {"next": 3, "skipped": [[1, ["ä.jpg", "empty"]]]}
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CodebookError, match=r"state.json .*damaged; begin anew with --overwrite"):
            read_json(path)


def test_tensors_are_whole_or_damaged(tmp_path):
    path = tmp_path / "state.safetensors"
    empty = SavedTensors(path)
    assert (empty.tensors, empty.meta) == ({}, {})
    empty.save({"counts": torch.arange(5)}, {"next": "64"})
    saved = SavedTensors(path)
    assert saved.meta == {"next": "64"}
    assert torch.equal(saved.tensors["counts"], torch.arange(5))
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        with pytest.raises(CodebookError, match=r"state.safetensors .*damaged"):
            SavedTensors(path)


def test_interrupted_save_leaves_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    write_json(path, "old")

    def refuse(*_):
        raise OSError(errno.EIO, "input/output error")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(OSError, match="input/output"):
        write_json(path, "new")
    assert read_json(path) == "old"


def test_sample_is_as_it_was_left(tmp_path):
    path = tmp_path / "sample.raw"
    make_matrix(path, (3, 2), np.float16)[1] = 7
    assert (open_matrix(path, (3, 2), np.float16) == np.float32([[0, 0], [7, 7], [0, 0]])).all()
    with pytest.raises(CodebookError, match=r"sample.raw .*damaged"):
        open_matrix(path, (4, 2), np.float16)


def test_a_second_build_is_told_who_holds_the_folder_until_that_one_dies(tmp_path):
    target = tmp_path / "w.zarr"
    with held_elsewhere(tmp_path / "w.zarr.building" / "lock") as other:
        (tmp_path / "w.zarr.building" / "state").write_text("half")
        (tmp_path / "link").symlink_to(tmp_path)
        for place in (target, tmp_path / "link" / "w.zarr", Path(os.path.relpath(target))):
            for options in ({}, {"resume": True}, {"overwrite": True}):
                with pytest.raises(CodebookError, match=rf"\A.*w.zarr.building is held by process {other.pid} on .*\Z"):
                    begin(place, **options).__enter__()
        (tmp_path / "link").unlink()
    with begin(target, resume=True) as folder:
        assert (folder / "state").read_text() == "half"
    assert os.listdir(tmp_path) == []


def test_another_build_may_begin_while_this_one_ends(tmp_path, monkeypatch):
    target, rmdir = tmp_path / "w.zarr", os.rmdir

    def late(path, **options):
        (tmp_path / "w.zarr.building" / "lock").touch()
        rmdir(path, **options)

    with begin(target) as folder:
        (folder / "state").write_text("half")
        monkeypatch.setattr(os, "rmdir", late)
    assert os.listdir(folder) == ["lock"]


@pytest.mark.slow
def test_builds_that_begin_and_end_all_the_time(tmp_path):
    """None is told anything but that another one holds the folder."""

    def build(wrong):
        for _ in range(150):
            try:
                with begin(tmp_path / "w.zarr") as folder:
                    (folder / "state").touch()
            except Exception as error:
                if "is held by" not in str(error):
                    wrong.put(repr(error))
        wrong.put(None)

    context = multiprocessing.get_context("fork")
    wrong = context.Queue()
    others = [context.Process(target=build, args=(wrong,)) for _ in range(3)]
    for other in others:
        other.start()
    assert [wrong.get(timeout=60) for _ in others] == [None] * len(others)
    for other in others:
        other.join()
    assert os.listdir(tmp_path) == []


def test_a_file_in_the_place_of_the_folder(tmp_path):
    (tmp_path / "w.zarr.building").touch()
    with pytest.raises(CodebookError, match=r"cannot write .*w.zarr.building: File exists; choose another place"):
        begin(tmp_path / "w.zarr").__enter__()
