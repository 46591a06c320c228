"""Locks on open files and directories, so that processes do not write over one another."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def lock(descriptor: int, *, wait: bool = True) -> bool:
    """Whether this process now holds an open file or directory alone, until it is closed; True where there are no such locks."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # some network file systems
        pass
    return True


@contextlib.contextmanager
def held(directory: Path) -> Iterator[bool]:
    """Whether this process alone holds a directory, until the end of the block."""
    if fcntl is None:  # and directories cannot be opened
        yield True
        return
    place = os.open(directory, os.O_RDONLY)
    try:
        yield lock(place, wait=False)
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(place, fcntl.LOCK_UN)  # a process forked meanwhile has it open too
        os.close(place)
