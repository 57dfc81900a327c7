"""The files of a codebook: a zarr group of format 3, in a folder (`NAME.zarr`) or a zip file (`NAME.zarr.zip`).

It has three arrays of one chunk each, and everything else in its attributes. It is written beside its place and moved
there when complete, and checked in full when it is read: zarr itself reads a missing chunk as zeros.
"""

import hashlib
import json
import os
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zarr
from zarr.storage import ZipStore

from vwt.errors import CodebookError, brief

FORMAT = "vwt-codebook"


VERSION = 1


ARRAYS = {"words": torch.float32, "counts": torch.int64, "document_counts": torch.int64}


# An array, or a zip file, of more bytes than SMALL is refused where it is more than RATIO times what is stored of it.
SMALL, RATIO = 64 << 20, 100


def check_free(path: Path, *, overwrite: bool) -> None:
    """Raise CodebookError unless a codebook may be written to `path`: nothing is there, or a codebook to overwrite."""
    if not path.exists():
        return
    if not overwrite:
        raise CodebookError(f"{path} exists; choose another name, or overwrite it (--overwrite)")
    if not (path / "zarr.json").is_file() and not (path.is_file() and zipfile.is_zipfile(path)):
        raise CodebookError(f"{path} is no codebook, and only a codebook is overwritten; choose another name")


def write_group(folder: Path, arrays: dict[str, np.ndarray], attributes: dict[str, Any]) -> None:
    """Write a group into a new folder, with what says that it is a codebook, and complete.

    Args:
        folder: to be made.
        arrays: those of `ARRAYS`.
        attributes: what else there is to say; JSON types only.
    """
    attributes = {
        "format": FORMAT,
        "version": VERSION,
        **attributes,
        "checksums": {name: _checksum(array) for name, array in arrays.items()},
    }
    group = zarr.open_group(str(folder), mode="w", zarr_format=3, attributes=attributes)
    for name, array in arrays.items():
        group.create_array(name, data=array, chunks=array.shape)
    group.attrs["complete"] = True  # last


def read_group(source: str | Path, name: str) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Arrays and attributes of a group, checked.

    Args:
        source: path of the folder or zip file, or URL of a folder.
        name: what the user calls it.

    Raises:
        CodebookError: if it is damaged, unfinished, no codebook, or written by a newer version; errors of zarr, fsspec
            and the codecs come as they are.
    """
    is_zip = isinstance(source, Path) and source.is_file()
    if is_zip:
        with zipfile.ZipFile(source) as archive:
            _check_archive(archive, Path(source))
    store: Any = ZipStore(source, mode="r") if is_zip else str(source)
    try:
        group = zarr.open_group(store, mode="r", zarr_format=3)
        attributes = json.loads(json.dumps(group.attrs.asdict()))
        _check_header(attributes, name)
        return {array: _read_array(group, array, attributes["checksums"], name) for array in ARRAYS}, attributes
    finally:
        if is_zip:
            store.close()


def _checksum(array: np.ndarray) -> str:
    little_endian = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
    return hashlib.sha256(little_endian.tobytes()).hexdigest()


def _check_header(attributes: dict[str, Any], name: str) -> None:
    if attributes.get("format") != FORMAT:
        raise CodebookError(f"{name} is a zarr group, but no codebook (format {attributes.get('format')!r})")
    version = attributes.get("version")
    if not isinstance(version, int) or version > VERSION:
        raise CodebookError(f"{name} has format version {version}, this vwt reads up to {VERSION}; upgrade vwt")
    if attributes.get("complete") is not True:
        raise CodebookError(f"{name} is unfinished: its writing was interrupted; build it anew")
    expected = {"space", "patch_size", "mean", "std", "projection", "provenance", "checksums"}
    if missing := sorted(expected - attributes.keys()):
        raise CodebookError(f"{name} is damaged: no {', '.join(missing)} in its attributes; build it anew")


def _read_array(group: zarr.Group, array: str, checksums: dict[str, str], name: str) -> np.ndarray:
    stored = group.get(array)
    if not isinstance(stored, zarr.Array):
        raise CodebookError(f"{name} is damaged: the array {array!r} is missing; build or fetch it anew")
    _check_claim(stored, array, name)
    values = np.asarray(stored[...])
    if torch.from_numpy(values).dtype != ARRAYS[array] or _checksum(values) != checksums.get(array):
        state = "altered" if stored.nchunks_initialized == stored.nchunks else "missing in part"
        raise CodebookError(f"{name} is damaged: the array {array!r} is {state}; build or fetch it anew")
    return values


def _check_claim(stored: zarr.Array, array: str, name: str) -> None:
    """Raise CodebookError, before anything is allocated, if an array claims to be larger than what is stored of it."""
    if stored.chunks != stored.shape:
        raise CodebookError(f"{name} is damaged: the array {array!r} is not one chunk; build or fetch it anew")
    if stored.nbytes > max(SMALL, stored.nbytes_stored() * RATIO):
        raise CodebookError(
            f"{name} is damaged: the array {array!r} claims to be of shape {brief(stored.shape)}, for which too little "
            "is stored; build or fetch it anew"
        )


def _check_archive(archive: zipfile.ZipFile, path: Path) -> None:
    """Raise CodebookError if a zip file claims to hold far more than its own size."""
    claimed = sum(part.file_size for part in archive.infolist())
    if claimed > max(SMALL, path.stat().st_size * RATIO):
        raise CodebookError(f"{path} is damaged: it claims to hold {claimed} bytes; build or fetch it anew")


def zip_group(folder: Path) -> Path:
    """Pack a folder store as a zip store beside it, with fixed times, so that equal codebooks are equal files."""
    target = folder.with_suffix(".zarr.zip")
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for file in sorted(p for p in folder.rglob("*") if p.is_file()):
            archive.writestr(zipfile.ZipInfo(file.relative_to(folder).as_posix()), file.read_bytes())
    return target


def move(fresh: Path, path: Path, aside: Path) -> None:
    """Put `fresh` in the place of `path`; what was there goes aside, and comes back if the move fails."""
    if path.exists() and (path.is_dir() or fresh.is_dir()):  # a rename replaces a file, but no folder
        os.replace(path, aside)
        try:
            os.replace(fresh, path)
        except OSError:
            os.replace(aside, path)
            raise
    else:
        os.replace(fresh, path)
