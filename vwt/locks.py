"""Places that one process at a time writes to."""

import errno
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from vwt.errors import VWTError

try:
    import fcntl
except ImportError:  # Windows has other locks; processes there are not kept apart
    fcntl = None  # type: ignore[assignment]

_TRIES = 100  # to make a lock that others remove meanwhile


@contextmanager
def locked(path: Path, place: Path, refusal: type[VWTError]) -> Iterator[None]:
    """Hold a lock, a file that is made if need be with the folder it is in, as long as this process lives.

    A record lock is given up by the system when its process dies, and is not inherited by the processes it starts.

    Args:
        path: of the lock; it is removed in the end.
        place: what is held by it, for messages.
        refusal: raised if another process holds it, or it cannot be written.
    """
    try:
        file = _acquire(path, place, refusal)
    except OSError as error:
        raise refusal(f"cannot write {place}: {error.strerror}; choose another place") from error
    with file:
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


def _acquire(path: Path, place: Path, refusal: type[VWTError]) -> IO[str]:
    for left in reversed(range(_TRIES)):
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+")  # noqa: SIM115, who asked for it closes it
        except (FileNotFoundError, FileExistsError):  # who held it has just removed the folder
            if not left:
                raise
            continue
        try:
            _lock(file, place, refusal)
            if not left or _is_there(file, path):  # else who held it has just removed it
                _sign(file, path)
                return file
        except BaseException:
            file.close()
            raise
        file.close()
    raise AssertionError("the last attempt returns or raises")


def _sign(file: IO[str], path: Path) -> None:
    """Write who holds a lock; it is removed where the disk is full."""
    try:
        os.ftruncate(file.fileno(), 0)
        os.write(file.fileno(), f"process {os.getpid()} on {socket.gethostname()}".encode())
    except OSError:
        path.unlink(missing_ok=True)
        raise


def _is_there(file: IO[str], path: Path) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock(file: IO[str], place: Path, refusal: type[VWTError]) -> None:
    if fcntl is None:
        return
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EAGAIN):
            warnings.warn(
                f"{place} cannot be locked ({error.strerror}); see that no other process writes there", stacklevel=2
            )
            return
        file.seek(0)
        raise refusal(
            f"{place} is held by {file.read() or 'another process'}, which writes there; wait for it, or choose "
            "another name"
        ) from error
