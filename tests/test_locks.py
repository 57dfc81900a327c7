import errno
import os

import pytest

from tests.holding import held_elsewhere
from vwt.errors import ArgumentError, DocumentError
from vwt.locks import locked


def test_a_second_process_is_told_who_holds_it_until_that_one_dies(tmp_path):
    lock, place = tmp_path / "new" / "x.lock", tmp_path / "x"
    with held_elsewhere(lock) as other:
        with pytest.raises(DocumentError, match=rf"\A.*/x is held by process {other.pid} on .*; wait for it.*\Z"):
            locked(lock, place, DocumentError).__enter__()
        other.kill()
        other.join()
        assert lock.exists()
    with locked(lock, place, DocumentError):
        assert lock.read_text().startswith(f"process {os.getpid()} on ")
    assert not lock.exists()


def test_it_is_given_up_where_the_work_fails(tmp_path):
    with pytest.raises(KeyboardInterrupt), locked(tmp_path / "x.lock", tmp_path / "x", DocumentError):
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("make", [lambda path: path.touch(), lambda path: path.symlink_to("nowhere/at/all")])
def test_a_place_that_cannot_be_written(tmp_path, make):
    make(tmp_path / "file")
    with pytest.raises(ArgumentError, match=r"cannot write .*/w: (File exists|Not a directory); choose another place"):
        locked(tmp_path / "file" / "x.lock", tmp_path / "w", ArgumentError).__enter__()


def test_a_full_disk_leaves_no_lock(tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(DocumentError, match=r"cannot write .*/w: No space left on device; choose another place"):
        locked(tmp_path / "x.lock", tmp_path / "w", DocumentError).__enter__()
    assert os.listdir(tmp_path) == []
