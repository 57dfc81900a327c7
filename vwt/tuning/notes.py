"""What an interrupted `tune` leaves behind, and goes on with."""

import functools
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from vwt.codebook.codebook import Codebook
from vwt.documents import is_number, write_json
from vwt.errors import DocumentError
from vwt.locks import locked
from vwt.models.spec import weights_checksum
from vwt.tuning.profile import LatencyProfile


def hold(path: str | os.PathLike[str] | None) -> AbstractContextManager[None]:
    """Hold the place of notes, which one process at a time writes.

    Raises:
        DocumentError: if another one holds it, or nothing can be written there.
    """
    if path is None:
        return nullcontext()
    place = Path(path)
    return locked(place.with_name(f"{place.name}.lock"), place, DocumentError)


class Notes(dict[str, float]):
    """What was measured, in a file that an interrupted call leaves behind and the next goes on with."""

    def __init__(
        self,
        path: str | os.PathLike[str] | None,
        model: nn.Module,
        images: Tensor,
        batch_size: int,
        seed: int,
        codebooks: Sequence[str | os.PathLike[str]] = (),
        runtime: str = "torch",
    ) -> None:
        super().__init__()
        self.path = None if path is None else Path(path)
        digest = hashlib.sha256(images.detach().float().cpu().numpy().tobytes())
        digest.update(f"{_source_checksum()} {weights_checksum(model.state_dict())}".encode())
        for codebook in codebooks:  # which may have been built again at the same place
            digest.update(Codebook.load(codebook).words.numpy().tobytes())
        how = [LatencyProfile.identify(model), runtime, batch_size, seed, len(images)]
        digest.update(json.dumps(how, default=str).encode())
        self.profile: LatencyProfile | None = None
        self.head: dict[str, Any] = {"of": digest.hexdigest(), "profile": None}
        if self.path is not None and self.path.exists():
            kept = read_notes(self.path)
            if kept is not None and kept[0] == self.head["of"]:
                super().update(kept[1])
                self.keep_profile(kept[2])

    def keep_profile(self, profile: LatencyProfile) -> None:
        """Latency belongs to what was measured: budgets must be the same when it goes on."""
        self.profile, self.head["profile"] = profile, asdict(profile)
        self._write()

    def __setitem__(self, name: str, value: float) -> None:
        super().__setitem__(name, value)
        self._write()

    def _write(self) -> None:
        if self.path is not None:
            try:
                write_json(self.path, {**self.head, "measured": dict(self)})
            except OSError as error:
                raise DocumentError(f"cannot write {self.path}: {error.strerror}; choose another place") from error

    def remove(self) -> None:
        """All is done."""
        if self.path is not None:
            self.path.unlink(missing_ok=True)


@functools.cache
def _source_checksum() -> str:
    """sha256 of vwt's own source: what other code measured does not count."""
    digest = hashlib.sha256()
    root = Path(__file__).parents[1]
    for file in sorted(root.rglob("*.py")):
        digest.update(f"{file.relative_to(root).as_posix()} ".encode() + file.read_bytes())
    return digest.hexdigest()


def read_notes(path: Path) -> tuple[str, dict[str, float], LatencyProfile] | None:
    """What an interrupted call left: of what, what was measured, and the profile; None where that is damaged."""
    try:
        kept = json.loads(path.read_text())
        measured = {**kept["measured"]}
        if set(kept) != {"of", "profile", "measured"} or not all(map(is_number, measured.values())):
            return None
        return kept["of"], measured, LatencyProfile.from_fields(kept["profile"], str(path))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, DocumentError):
        return None
