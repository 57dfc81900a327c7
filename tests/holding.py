"""A lock in the hands of another process."""

import multiprocessing
from contextlib import contextmanager

import pytest

from vwt.errors import VWTError
from vwt.locks import locked

pytest.importorskip("fcntl", reason="locks need Unix")


@contextmanager
def held_elsewhere(lock):
    """Another process, which holds a lock until it is killed or the block ends."""
    context = multiprocessing.get_context("fork")
    held = context.Event()

    def hold():
        with locked(lock, lock, VWTError):
            held.set()
            context.Event().wait()

    other = context.Process(target=hold, daemon=True)
    other.start()
    try:
        assert held.wait(60)
        yield other
    finally:
        other.kill()
        other.join()
