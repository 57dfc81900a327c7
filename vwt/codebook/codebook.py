"""Codebook: visual words and where they come from; zarr on disk.

What its files are is in `vwt.codebook.files`.
"""

import os
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import torch
from torch import Tensor

from vwt import hub
from vwt.codebook.card import make_card
from vwt.codebook.files import ARRAYS, check_free, move, read_group, write_group, zip_group
from vwt.documents import is_number
from vwt.errors import ArgumentError, CodebookError, MismatchError, brief, first_line
from vwt.models.spec import PatchSpec
from vwt.tokens.patches import SPACES, Space

STORED = "codebook.zarr"  # in a repository


# Two float32 normalisations that agree to this are one.
_SAME = 1e-6


@dataclass(frozen=True, eq=False)
class Codebook:
    """K visual words and where they come from.

    Attributes:
        words: (K, D) float32. Pixel words are flattened patches, channel first; embedding words have the width of
            the model.
        counts: (K,) int64, patches of the data set that are nearest to the word; of words that are equal, the first
            has the patches of all.
        document_counts: (K,) int64, images of the data set in which the word occurs.
        space: "pixel" or "embedding".
        patch_size: (height, width) in pixels.
        mean: per channel, of the normalisation of the images that the words stand for. Pixel words are stored for
            images in [0, 1] (mean 0, std 1), and expressed in a model's own normalisation by `for_model`.
        std: per channel, likewise.
        projection: checksums of the patch projection (embedding space), see `vwt.models.spec.projection_checksums`.
        provenance: model, data set, clustering and its seed, versions, date; JSON types only.
    """

    words: Tensor
    counts: Tensor
    document_counts: Tensor
    space: Space
    patch_size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    projection: dict[str, str] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.space not in SPACES:
            raise ArgumentError(f"space is {self.space!r}; expected one of {', '.join(SPACES)}")
        if self.words.ndim != 2 or 0 in self.words.shape:
            raise ArgumentError(f"words have shape {tuple(self.words.shape)}; expected (K, D) with K, D of at least 1")
        for name in ("counts", "document_counts"):
            shape = tuple(getattr(self, name).shape)
            if shape != (len(self.words),):
                raise ArgumentError(f"{name} have shape {shape}; expected ({len(self.words)},), one for each word")
        for name, dtype in ARRAYS.items():
            if getattr(self, name).dtype != dtype:
                raise ArgumentError(f"{name} are {getattr(self, name).dtype}; expected {dtype}")
        for name in ("patch_size", "mean", "std"):
            if not isinstance(getattr(self, name), tuple | list):
                raise ArgumentError(f"{name} is {getattr(self, name)!r}; expected a tuple")
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if len(self.patch_size) != 2 or not all(isinstance(n, int) and n > 0 for n in self.patch_size):
            raise ArgumentError(f"patch_size is {self.patch_size}; expected (height, width) in pixels")
        for name in ("mean", "std"):
            if not all(map(is_number, getattr(self, name))):
                raise ArgumentError(f"{name} is {brief(getattr(self, name))}; expected numbers, one for each channel")
        for name in ("projection", "provenance"):
            if not isinstance(getattr(self, name), dict):
                raise ArgumentError(f"{name} is {brief(getattr(self, name))}; expected a dictionary")
        if len(self.mean) != len(self.std) or not all(s > 0 for s in self.std):
            raise ArgumentError(
                f"mean {self.mean} and std {self.std} do not fit; expected one of each a channel, std above 0"
            )
        if not torch.isfinite(self.words).all():
            raise ArgumentError("words hold NaN or infinity; build the codebook anew")
        width = len(self.mean) * self.patch_size[0] * self.patch_size[1]
        if self.space == "pixel" and self.words.shape[1] != width:
            raise ArgumentError(
                f"pixel words of width {self.words.shape[1]} do not fit patches of {self.patch_size} pixels with "
                f"{len(self.mean)} channels, which are {width} wide"
            )

    def __len__(self) -> int:
        return len(self.words)

    def __repr__(self) -> str:
        height, width = self.patch_size
        return f"Codebook({len(self)} words, {self.space} space, patch {height}x{width})"

    # -- use with a model ------------------------------------------------------------------------------------------

    def for_model(self, spec: PatchSpec) -> "Codebook":
        """This codebook in the model's terms: checked, and pixel words expressed in the model's normalisation.

        Raises:
            MismatchError: if patch size, projection or normalisation are not the model's.
            ModelError: if the model's normalisation is unknown.
        """
        if self.patch_size != spec.patch_size:
            raise MismatchError(
                f"the codebook has patches of {self.patch_size} pixels, {spec.model} of {spec.patch_size}; "
                "build a codebook for this model with `vwt build`"
            )
        mean, std = spec.normalisation
        if len(self.mean) != len(mean):
            raise MismatchError(f"the codebook has {len(self.mean)} channels, {spec.model} {len(mean)}")
        if self.space == "pixel":
            return self.normalised(mean, std)
        if not _agree(self.projection, spec.projection):
            raise MismatchError(
                f"the codebook lies in the embedding space of {self.provenance.get('model', 'another model')}, whose "
                f"patch projection is not that of this {spec.model}; build one for these weights with `vwt build`, or "
                "use a pixel codebook, which serves every model of its patch size"
            )
        if not (np.allclose(self.mean, mean, atol=_SAME) and np.allclose(self.std, std, atol=_SAME)):
            raise MismatchError(
                f"the codebook was built from images of mean {self.mean} and std {self.std}, {spec.model} expects "
                f"mean {mean} and std {std}; build one with this model's normalisation"
            )
        return self

    def normalised(self, mean: tuple[float, ...], std: tuple[float, ...]) -> "Codebook":
        """The same pixel words, for images of another normalisation; embedding words cannot be expressed anew."""
        if self.space != "pixel":
            raise ArgumentError("only pixel words can be expressed in another normalisation")
        if (mean, std) == (self.mean, self.std):
            return self
        cells = self.words.double().view(len(self), len(self.mean), -1)
        column = (1, -1, 1)
        cells = cells * cells.new_tensor(self.std).view(column) + cells.new_tensor(self.mean).view(column)
        cells = (cells - cells.new_tensor(mean).view(column)) / cells.new_tensor(std).view(column)
        return replace(self, words=cells.view(len(self), -1).float(), mean=tuple(mean), std=tuple(std))

    # -- on disk ---------------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str], *, overwrite: bool = False) -> None:
        """Write a zarr group to `path`: a folder, or a zip file if the name ends in `.zip`.

        Written to a temporary neighbour and moved into place, so that `path` holds a whole codebook or what it held
        before. The same codebook gives the same bytes. Pixel words are stored for images in [0, 1].

        Raises:
            CodebookError: if `path` exists and `overwrite` is False, or the disk refuses.
        """
        path = Path(path)
        check_free(path, overwrite=overwrite)
        channels = len(self.mean)
        stored = self.normalised((0.0,) * channels, (1.0,) * channels) if self.space == "pixel" else self
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as scratch:
                fresh = Path(scratch) / "codebook.zarr"
                stored._write(fresh)
                if path.name.endswith(".zip"):
                    fresh = zip_group(fresh)
                move(fresh, path, Path(scratch) / "old")
        except OSError as error:
            raise CodebookError(
                f"could not write {path}: {error.strerror or error}; nothing was changed there"
            ) from error

    def _write(self, folder: Path) -> None:
        arrays = {name: getattr(self, name).cpu().numpy() for name in ARRAYS}
        attributes = {
            "space": self.space,
            "patch_size": list(self.patch_size),
            "mean": list(self.mean),
            "std": list(self.std),
            "projection": self.projection,
            "provenance": self.provenance,
        }
        write_group(folder, arrays, attributes)

    @classmethod
    def load(cls, source: str | os.PathLike[str]) -> "Codebook":
        """Read a codebook from a path, read-only from any URL that fsspec knows, or as `from_pretrained` does.

        Args:
            source: a path, a URL, or a repository as `hf-hub:user/name` or `local-dir:FOLDER`.

        Raises:
            CodebookError: if there is none, or it is damaged, unfinished, or written by a newer version.
            HubError: see `from_pretrained`.
        """
        name = os.fspath(source)
        if hub.has_prefix(name):
            return cls.from_pretrained(name)
        try:
            if "://" in name and name.endswith(".zip"):
                with tempfile.TemporaryDirectory() as scratch:
                    local = Path(scratch) / "codebook.zarr.zip"
                    with fsspec.open(name, "rb") as remote:
                        local.write_bytes(remote.read())
                    return cls._read(local, name)
            return cls._read(name if "://" in name else Path(name), name)
        except CodebookError:
            raise
        except ImportError as error:
            raise CodebookError(f"cannot open {name}: {error}") from error
        # zarr, fsspec and the codecs raise errors of many kinds over damaged stores.
        except Exception as error:
            if "://" not in name and not Path(name).exists():
                raise CodebookError(f"no codebook at {name}; build one with `vwt build`") from error
            raise CodebookError(
                f"{name} is no readable codebook ({first_line(error)}); build or fetch it anew"
            ) from error

    @classmethod
    def _read(cls, source: str | Path, name: str) -> "Codebook":
        arrays, attributes = read_group(source, name)
        try:
            return cls(
                **{array: torch.from_numpy(values) for array, values in arrays.items()},
                space=attributes["space"],
                patch_size=tuple(attributes["patch_size"]),
                mean=tuple(attributes["mean"]),
                std=tuple(attributes["std"]),
                projection=attributes["projection"],
                provenance=attributes["provenance"],
            )
        except ArgumentError as error:
            raise CodebookError(f"{name} is damaged: {error}") from error

    @classmethod
    def from_pretrained(cls, source: str | os.PathLike[str], *, revision: str | None = None) -> "Codebook":
        """Download a codebook from the Hugging Face hub, or take it from the cache.

        Args:
            source: `user/name` or `hf-hub:user/name`, either with `@revision` behind it; or the folder of such a
                repository, with or without `local-dir:`.
            revision: a branch, tag or commit.

        Raises:
            HubError: if there is none, it is private, or out of reach and not in the cache.
            CodebookError: if it is damaged.
        """
        return cls.load(hub.fetch(os.fspath(source), "codebook", [f"{STORED}/*"], revision) / STORED)

    def push_to_hub(self, repository: str, *, private: bool | None = None) -> str:
        """Upload to the Hugging Face hub, with a model card made from the provenance.

        Args:
            repository: `user/name`; made if there is none.
            private: whether a new repository is; by default as the account has it.

        Returns:
            The address of the commit.

        Raises:
            HubError: if the hub refuses, or is out of reach.
        """
        name = repository.removeprefix(hub.HUB)
        card = make_card(name, tuple(self.words.shape), self.space, self.patch_size, self.provenance)
        with tempfile.TemporaryDirectory(prefix="vwt-hub-") as scratch:
            self.save(Path(scratch) / STORED)
            return hub.push(Path(scratch), name, "codebook", card, private)

    @classmethod
    def from_vwt(
        cls,
        path: str | os.PathLike[str],
        *,
        patch_size: int | tuple[int, int],
        mean: tuple[float, ...],
        std: tuple[float, ...],
        spec: PatchSpec | None = None,
    ) -> "Codebook":
        """Import the bare `vocab.pt` that the authors of the Visual Word Tokenizer publish (arXiv 2411.15397).

        The file holds one tensor (K, D), and says nothing of what it was made for; you must. Counts are unknown and
        set to zero.

        Args:
            path: the file; loaded with `weights_only=True`.
            patch_size: (height, width) in pixels, or one number for both.
            mean: per channel, of the normalisation of the images.
            std: per channel, likewise.
            spec: `PatchSpec.of(model)` if the words lie in that model's embedding space; None for pixel words.

        Raises:
            CodebookError: if the file holds something else.
        """
        try:
            words = torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # pickle, zip and OS errors alike
            raise CodebookError(f"{path} is no tensor file that can be loaded safely ({first_line(error)})") from error
        if not isinstance(words, Tensor) or words.ndim < 2:
            got = tuple(words.shape) if isinstance(words, Tensor) else type(words).__name__
            raise CodebookError(f"{path} holds {got}; expected one tensor (K, D) of words")
        none = torch.zeros(len(words), dtype=torch.int64)
        return cls(
            words=words.detach().flatten(1).float(),
            counts=none,
            document_counts=none.clone(),
            space="embedding" if spec else "pixel",
            patch_size=(patch_size, patch_size) if isinstance(patch_size, int) else patch_size,
            mean=mean,
            std=std,
            projection=spec.projection if spec else {},
            provenance={"imported": "vocab.pt", "model": spec.model if spec else None},
        )


def pin(source: str | os.PathLike[str]) -> str:
    """The name of a codebook that holds from any folder and at any time: a full path, a URL, or a commit on the hub."""
    name = os.fspath(source)
    if hub.has_prefix(name):
        return hub.pin(name, hub.fetch(name, "codebook", [f"{STORED}/*"]))
    return name if "://" in name else str(Path(name).resolve())


def _agree(mine: dict[str, str], theirs: dict[str, str]) -> bool:
    """Whether two sets of checksums by dtype agree in the highest precision that both have."""
    common = [dtype for dtype in ("float64", "float32", "float16", "bfloat16") if dtype in mine and dtype in theirs]
    return bool(common) and mine[common[0]] == theirs[common[0]]
