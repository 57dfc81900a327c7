"""The folder of a build: made beside the codebook, kept when the build is interrupted, removed when it is complete."""

import datetime
import errno
import json
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from vwt.documents import replacing, write_json
from vwt.errors import CodebookError, resume_advice
from vwt.locks import locked

# A failed write, and not a lost connection or a worker that could not be started.
_OF_DISKS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ENOTDIR}

_LOCK = "lock"

# Of the folder of a build.
_VERSION = 3


@contextmanager
def work_folder(target: Path | None, *, resume: bool, overwrite: bool) -> Iterator[Path]:
    """The folder in which `target` is built, by one process at a time; a temporary one without a target.

    Raises:
        CodebookError: if another process builds there, if it holds an interrupted build and neither `resume` nor
            `overwrite` is given, or the disk refuses.
    """
    if target is None:
        with tempfile.TemporaryDirectory(prefix="vwt-build-") as scratch:
            yield Path(scratch)
        return
    folder = target.with_name(target.name + ".building")
    try:
        with locked(folder / _LOCK, folder, CodebookError):
            if not (resume or overwrite) and any(path.name != _LOCK for path in folder.iterdir()):
                raise CodebookError(
                    f"{folder} holds an interrupted build; go on with --resume, or drop it with --overwrite"
                )
            if not resume:
                _clear(folder)
            yield folder
            _clear(folder)
    except OSError as error:
        if error.errno not in _OF_DISKS:
            raise
        raise CodebookError(
            f"could not write {error.filename or folder}: {error.strerror or error}; {resume_advice(error)}"
        ) from error
    finally:
        with suppress(OSError):  # it holds an interrupted build, or that of another process
            folder.rmdir()


def _clear(folder: Path) -> None:
    """Remove all but the lock."""
    for path in folder.iterdir():
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def begin(folder: Path, what: dict[str, Any], shard_images: int) -> tuple[str, int]:
    """Record what is built in a folder, or check that an interrupted build there was of the same.

    Args:
        folder: of the build.
        what: decides the codebook; JSON types only.
        shard_images: images a shard.

    Returns:
        The day on which the build began, and its images a shard.

    Raises:
        CodebookError: if the build there is of something else or of another version, or damaged.
    """
    path = folder / "build.json"
    if path.exists():
        begun = read_json(path)
        if begun.get("version") != _VERSION:
            raise CodebookError(
                f"{folder} holds an interrupted build of another version of vwt, whose sample is drawn in another way; "
                "begin anew with --overwrite"
            )
        differing = sorted(key for key in what if what[key] != begun["what"].get(key))
        if differing:
            raise CodebookError(
                f"{folder} holds an interrupted build with another {', '.join(differing)}; resume it with the same, or "
                "drop it with --overwrite"
            )
        return str(begun["date"]), int(begun["shard images"])
    # It is written first, so that a folder that holds anything else has lost it.
    if any(other.name != _LOCK and other.suffix != ".fresh" for other in folder.iterdir()):
        raise _damaged(path)
    epoch = os.environ.get("SOURCE_DATE_EPOCH")
    date = datetime.datetime.fromtimestamp(float(epoch) if epoch else time.time(), datetime.UTC).date().isoformat()
    write_json(path, {"version": _VERSION, "what": what, "date": date, "shard images": shard_images})
    return date, shard_images


def read_json(path: Path) -> Any:
    """Read what `write_json` wrote."""
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise _damaged(path) from error


def make_matrix(path: Path, shape: tuple[int, int], dtype: type[np.generic]) -> np.memmap:
    """A matrix in a new file, made in full size, so that a small disk refuses now."""
    size = np.dtype(dtype).itemsize * shape[0] * shape[1]
    with open(path, "wb") as file:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(file.fileno(), 0, size)
        else:
            file.truncate(size)
    return np.memmap(path, dtype, "r+", 0, shape)


def open_matrix(path: Path, shape: tuple[int, int], dtype: type[np.generic]) -> np.memmap:
    """What was made with `make_matrix`."""
    if not path.exists() or path.stat().st_size != np.dtype(dtype).itemsize * shape[0] * shape[1]:
        raise _damaged(path)
    return np.memmap(path, dtype, "r", 0, shape)


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
        with replacing(self.path) as fresh:
            fresh.write_bytes(save(tensors, meta))
        self.tensors, self.meta = tensors, meta


def _damaged(path: Path) -> CodebookError:
    return CodebookError(f"{path} of the interrupted build is damaged; begin anew with --overwrite")
