"""A file that one process holds: what it stands for is used by that process alone.

The kernel lets go of it when the process ends, in whatever way, so nothing is left to clean up. The
file itself stays: one that is removed while another process opens it would be held twice.
"""

import fcntl
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Final

TRIES: Final = 50  # where whoever holds it has not said yet who it is, or is just ending
_EACH_S: Final = 0.02


class HeldElsewhere(Exception):
    """Another process holds the file; `pid` is what that one calls itself, None: not known."""

    def __init__(self, pid: int | None) -> None:
        super().__init__(pid)
        self.pid = pid

    def __str__(self) -> str:
        return "another kvtier process" + (f" (pid {self.pid})" if self.pid else "")


def hold(path: Path) -> int:
    """A descriptor that holds the file `path`, made where it was not there, until it is closed.

    Blocks for at most a second. A second call in one process is refused like another process's.

    Raises:
        HeldElsewhere: Somebody else holds it.
        OSError: It cannot be made, opened or locked.
    """
    flags = os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW
    fd = os.open(path, flags, 0o600)
    try:
        _lock(fd)
    except BaseException:
        os.close(fd)
        raise
    with suppress(OSError):  # a full disk: it is held all the same
        os.ftruncate(fd, 0)
        os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    return fd


def _lock(fd: int) -> None:
    for tries in range(1, TRIES + 1):
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            pid = _living(fd)
            if pid is not None or tries == TRIES:
                raise HeldElsewhere(pid) from None
            time.sleep(_EACH_S)  # it says who it is right after it has locked
        else:
            return


def _living(fd: int) -> int | None:
    """Who says that it holds the file; None: nobody that is there."""
    try:
        pid = int(os.pread(fd, 20, 0))
        os.kill(pid, 0)
    except PermissionError:  # another user's
        return pid
    except (OSError, ValueError, OverflowError):
        return None
    return pid
