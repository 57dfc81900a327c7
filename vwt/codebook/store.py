"""Results of shards in a folder of any file system that fsspec knows; each one is there as a whole, or not at all."""

import json
import uuid
from typing import Any

import fsspec
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from vwt.errors import CodebookError, first_line, resume_advice


class ShardStore:
    """Arrays and a few JSON values for each shard of each pass.

    Args:
        url: of the folder, which is made when something is written.

    Raises:
        CodebookError: if there is no such file system; by all methods, if it refuses.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        try:
            self.files, self.root = fsspec.core.url_to_fs(url)
        except (ImportError, ValueError) as error:
            raise CodebookError(f"cannot open {url}: {first_line(error)}") from error

    def write(self, name: str, shard: int, arrays: dict[str, np.ndarray], values: dict[str, Any]) -> None:
        """Put a shard's result in its place, under a name of its own first, so that two writers do no harm."""
        path = self._path(name, shard)
        fresh = f"{path}.{uuid.uuid4().hex}"
        data = save(arrays, {"values": json.dumps(values)})
        try:
            self.files.makedirs(self._folder(name), exist_ok=True)
            self.files.pipe_file(fresh, data)
            self.files.mv(fresh, path)
        # Every file system raises errors of its own.
        except Exception as error:
            raise CodebookError(
                f"could not write {path}: {first_line(error)}; what was written before is kept, {resume_advice(error)}"
            ) from error

    def read(self, name: str, shard: int) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """A shard's arrays and values; what is damaged is removed, so that it is made anew."""
        path = self._path(name, shard)
        try:
            data = self.files.cat_file(path)
            length = int.from_bytes(data[:8], "little")
            return load(data), json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["values"])
        except FileNotFoundError as error:
            raise CodebookError(
                f"the result of shard {shard} is not in {self.url}; if workers run on other machines, give a folder "
                "that all of them reach with --work, and go on with --resume"
            ) from error
        except (SafetensorError, ValueError, KeyError) as error:
            self.files.rm(path)
            raise CodebookError(f"{path} was damaged, and is removed; go on with --resume") from error
        except Exception as error:
            raise CodebookError(f"could not read {path}: {first_line(error)}; go on with --resume") from error

    def shards(self, name: str) -> set[int]:
        """Numbers of the shards that have a result."""
        try:
            self.files.invalidate_cache()
            paths = self.files.ls(self._folder(name), detail=False)
        except FileNotFoundError:
            return set()
        except Exception as error:
            raise CodebookError(f"could not list {self.url}: {first_line(error)}; go on with --resume") from error
        names = (str(path).rsplit("/", 1)[-1] for path in paths)
        return {int(stem) for stem, dot, rest in (name.partition(".") for name in names) if rest == "safetensors"}

    def remove(self, name: str = "") -> None:
        """Remove all results, or those of one pass."""
        folder = self._folder(name) if name else self.root
        try:
            if self.files.exists(folder):
                self.files.rm(folder, recursive=True)
        except Exception as error:
            raise CodebookError(f"could not remove {self.url}: {first_line(error)}; remove it yourself") from error

    def _folder(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _path(self, name: str, shard: int) -> str:
        return f"{self._folder(name)}/{shard:07}.safetensors"
