"""JSON files that say what they are: schedules, profiles and plans."""

import json
import os
import tempfile
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vwt.errors import DocumentError, VWTError, brief


def is_number(value: Any) -> bool:
    """Whether a value of a file is a finite number, of a size that figures have."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def write_json(path: Path, value: Any, indent: int | None = None) -> None:
    """Write JSON so that `path` holds either the old or the new value, never half of one."""
    with replacing(path) as fresh:
        fresh.write_text(json.dumps(value, indent=indent))


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside `path`, to be written, that then takes its place; it goes where writing fails."""
    fresh = path.parent / f".{path.name}.fresh"
    try:
        yield fresh
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise


def check_writable(path: str | os.PathLike[str], kind: str) -> None:
    """Raise DocumentError, before long work, unless a document may be written to `path`."""
    path = Path(path)
    if path.suffix != ".json":
        raise DocumentError(f"cannot write the {kind} {path}; expected a name that ends in .json")
    if not path.absolute().parent.is_dir() or path.is_dir():
        raise DocumentError(
            f"cannot write the {kind} {path}: there is no such folder, or it is one; choose another file"
        )
    check_folder(path, f"the {kind} {path}")


def check_folder(path: Path, name: str, refusal: type[VWTError] = DocumentError) -> None:
    """Raise `refusal`, before long work, unless files can be made in the folder of `path`; `name` is what it is called.

    A file is made there for a moment, as a folder's mode says nothing of disks that are mounted for reading only.
    """
    try:
        with tempfile.TemporaryFile(dir=path.absolute().parent):
            pass
    except OSError as error:
        raise refusal(f"cannot write {name}: {error.strerror}; choose another folder") from error


def make_document(kind: str, version: int, fields: dict[str, Any]) -> dict[str, Any]:
    """Fields after those that say what they are."""
    return {"format": f"vwt {kind}", "version": version, **fields}


def save_document(path: str | os.PathLike[str], kind: str, version: int, fields: dict[str, Any]) -> None:
    """Write fields with a first line that says what they are.

    Raises:
        DocumentError: if the file cannot be written.
    """
    try:
        write_json(Path(path), make_document(kind, version, fields), indent=1)
    except OSError as error:
        raise DocumentError(f"cannot write the {kind} {path}: {error.strerror}; choose another file") from error


def load_document(
    path: str | os.PathLike[str],
    kind: str,
    version: int,
    fields: Collection[str],
    renew: Callable[[dict[str, Any]], dict[str, Any]] = dict,
) -> dict[str, Any]:
    """Read what `save_document` wrote.

    Args:
        path: the file.
        kind: "schedule", "profile", "plan".
        version: the only one that is known.
        fields: that it must have, and no others.
        renew: fields of an older file to those of today.

    Raises:
        DocumentError: if the file is missing, cut short, of another kind or version, or has other fields.
    """
    try:
        content = json.loads(Path(path).read_text())
    except OSError as error:
        raise DocumentError(f"cannot read the {kind} {path}: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # no JSON, no text, or nested without end
        raise DocumentError(f"{path} is damaged or no {kind}: {error}; write it again") from error
    if not isinstance(content, dict) or content.get("format") != f"vwt {kind}":
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise DocumentError(f"{path} is no {kind} of vwt (its format is {brief(found)}); expected 'vwt {kind}'")
    if type(content.get("version")) is not int or content["version"] != version:  # True equals 1
        raise DocumentError(
            f"{path} is of version {brief(content.get('version'))}, this vwt reads version {version}; write it again"
        )
    found = renew({name: value for name, value in content.items() if name not in ("format", "version")})
    unknown, missing = sorted(set(found) - set(fields)), sorted(set(fields) - set(found))
    if unknown or missing:
        names = [name if name.isidentifier() and len(name) < 80 else brief(name) for name in unknown[:8]]
        faults = [f"unknown {', '.join(names)}"] * bool(names) + [f"without {', '.join(missing)}"] * bool(missing)
        raise DocumentError(f"the {kind} {path} has not the fields of one: {'; '.join(faults)}; write it again")
    return found
