"""Which allocator runs, and how many page faults a call has."""

import mmap

import memory
import pytest


@pytest.mark.parametrize(
    ("loaded", "name"), [("/usr/lib/libjemalloc.so.2", "jemalloc"), ("/opt/libtcmalloc_minimal.so.4", "tcmalloc")]
)
def test_another_allocator(tmp_path, monkeypatch, loaded, name):
    (tmp_path / "maps").write_text(f"7f00-7f01 r-xp 00000000 00:00 0 {loaded}\n")
    monkeypatch.setattr(memory, "_SETTINGS", ())
    assert memory.allocator(tmp_path / "maps") == name


def test_settings_are_named(monkeypatch):
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "1000000000")
    assert "MALLOC_TRIM_THRESHOLD_=1000000000" in memory.allocator()


def test_page_faults():
    def touch(pages):
        with mmap.mmap(-1, (pages + 1) * 100 * mmap.PAGESIZE) as fresh:
            for page in range((pages + 1) * 100):
                fresh[page * mmap.PAGESIZE] = 1

    assert memory.page_faults(lambda item: None, 3) <= 1
    assert memory.page_faults(touch, 3) >= 100  # 100, 200 and 300; fewer only with large pages
