"""Locks on open files and directories, so that processes do not write over one another."""

from __future__ import annotations

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
