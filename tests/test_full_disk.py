"""Whatever is stored, on a disk that is full: one line, and what was there before stays."""

import pytest

pytest.importorskip("resource", reason="limits the size of files, which needs Unix")

from tests import fuzz
from tests.codebook.test_resuming import full_disk
from vwt.errors import VWTError
from vwt.tuning.notes import Notes

KINDS = [kind for kind in fuzz.KINDS if kind.name != "plan.json.tuning"]  # which that module writes by hand


def refused(write, place):
    with full_disk(), pytest.raises(VWTError, match=r"(could not|cannot) write") as error:
        write()
    assert "File too large" in str(error.value)
    assert "\n" not in str(error.value)
    assert list(place.iterdir()) == []


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_what_is_stored(tmp_path, kind):
    refused(lambda: kind.write(tmp_path / kind.name), tmp_path)


def test_notes(tmp_path, small_vit):
    notes = Notes(tmp_path / "plan.json.tuning", small_vit, small_vit.pos_embed, 1, 0)
    refused(lambda: notes.__setitem__("Neighbours(0.2)" * 9, 1.0), tmp_path)


def test_an_old_file_stays(tmp_path):
    for kind in KINDS:
        if kind.name.endswith(".json"):
            path = tmp_path / kind.name
            kind.write(path)
            before = path.read_bytes()
            with full_disk(), pytest.raises(VWTError):
                kind.write(path)
            assert path.read_bytes() == before
