"""A few of the damaged files of `make fuzz`."""

import random

import pytest

pytest.importorskip("resource", reason="limits time and memory, which needs Unix")

from tests import fuzz


def test_no_damaged_file_is_taken_wrongly():
    found, wrong = fuzz.fuzz(90, seed=0)
    assert wrong == []
    assert sum(found.values()) == 90
    assert {name.split()[0] for name in found} == {kind.name for kind in fuzz.KINDS}
    assert sum(count for name, count in found.items() if name.endswith("refused")) > 45


def test_what_takes_too_long_is_found(tmp_path, monkeypatch):
    def wait(path):
        while True:
            pass

    monkeypatch.setattr(fuzz, "SECONDS", 0.1)
    verdict, what = fuzz.try_file(fuzz.Kind("file", write=None, read=wait), tmp_path / "file")
    assert (verdict, what[:12]) == ("WRONG", "Overtime: mo")


def test_what_takes_too_much_memory_is_found(tmp_path):
    kind = fuzz.Kind("file", write=None, read=lambda path: bytearray(2 * fuzz.MEMORY))
    verdict, what = fuzz.try_file(kind, tmp_path / "file")
    assert (verdict, what[:11]) == ("WRONG", "MemoryError")


def test_a_mutation_is_a_function_of_its_seed(tmp_path):
    files = {"b.json": b'{"a": [1, 2, 3]}', "c": bytes(99)}
    mutated = [fuzz.mutate(files, random.Random(n)) for n in (1, 1, 2)]
    assert mutated[0] == mutated[1] != mutated[2]
