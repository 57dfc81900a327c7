import errno

import pytest

from vwt.errors import DocumentError
from vwt.pictures.figures import save_figure, subplots


def test_a_disk_that_is_full_leaves_the_old_picture(tmp_path, monkeypatch):
    figure, _ = subplots(1, 1)
    path = tmp_path / "picture.png"
    save_figure(figure, path)
    before = path.read_bytes()

    def fill(self, fresh, **options):
        fresh.write_bytes(before[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(type(figure), "savefig", fill)
    with pytest.raises(DocumentError, match=r"cannot draw .*picture\.png: No space left on device"):
        save_figure(figure, path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
