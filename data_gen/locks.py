"""Locks that keep two commands from writing the same files."""

import fcntl

from lens.errors import LensError


def take(file, message: str) -> None:
    """Locks an open file until it is closed. Raises LensError with `message` where another process has it locked.

    A file system without locks is written without.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise LensError(message) from None
    except OSError:
        pass
