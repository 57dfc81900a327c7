"""The folder of a build: made beside the codebook, kept when the build is interrupted, removed when it is complete."""

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vwt.errors import CodebookError

# A failed write, and not a lost connection or a worker that could not be started.
_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR}


@contextmanager
def work_folder(target: Path | None, *, resume: bool, overwrite: bool) -> Iterator[Path]:
    """The folder in which `target` is built; a temporary one without a target.

    Raises:
        CodebookError: if it holds an interrupted build and neither `resume` nor `overwrite` is given, or the disk
            refuses.
    """
    if target is None:
        with tempfile.TemporaryDirectory(prefix="vwt-build-") as scratch:
            yield Path(scratch)
        return
    folder = target.with_name(target.name + ".building")
    if folder.exists() and not resume:
        if not overwrite:
            raise CodebookError(
                f"{folder} holds an interrupted build; go on with --resume, or drop it with --overwrite"
            )
        shutil.rmtree(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield folder
    except OSError as error:
        if error.errno not in _OF_DISKS:
            raise
        raise CodebookError(
            f"could not write {error.filename or folder}: {error.strerror or error}; make room and go on with --resume"
        ) from error
    shutil.rmtree(folder)


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise _damaged(path) from error


def open_sample(path: Path, shape: tuple[int, int], *, begun: bool = False) -> np.memmap:
    """A float32 matrix in a file: as it was left if begun, else made in full size, so that a small disk refuses now."""
    size = 4 * shape[0] * shape[1]
    if begun:
        if not path.exists() or path.stat().st_size != size:
            raise _damaged(path)
    else:
        with open(path, "wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    return np.memmap(path, np.float32, "r+", 0, shape)


class SavedTensors:
    """Tensors and a few strings in a file that holds a whole state or the one before.

    Attributes:
        tensors: by name; empty where nothing was saved.
        meta: strings saved with them.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors: dict[str, Tensor] = {}
        self.meta: dict[str, str] = {}
        if path.exists():
            try:
                with safe_open(path, "pt") as file:
                    self.meta = file.metadata() or {}
                    self.tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            except SafetensorError as error:
                raise _damaged(path) from error

    def save(self, tensors: dict[str, Tensor], meta: dict[str, str]) -> None:
        """Replace what was saved."""
        fresh = self.path.with_suffix(".fresh")
        fresh.write_bytes(save(tensors, meta))
        os.replace(fresh, self.path)
        self.tensors, self.meta = tensors, meta


def check_begun(path: Path) -> None:
    """Raise CodebookError if `path`, which is written first, is missing from a folder that holds anything else."""
    if not path.exists() and any(other.suffix != ".fresh" for other in path.parent.iterdir()):
        raise _damaged(path)


def _damaged(path: Path) -> CodebookError:
    return CodebookError(f"{path} of the interrupted build is damaged; begin anew with --overwrite")
