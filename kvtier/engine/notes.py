"""The engine's end of the pipe for requests that have no answer."""

import os
import select


def note(fd: int, message: bytes, wait_s: float) -> bool:
    """Write a message to the pipe; False, and nothing of it is there, where the pipe is full.

    One of more than a page may begin where it finds no end: then this waits until the daemon has
    read what lies before it, which it does every some milliseconds.

    Raises:
        OSError: The daemon is gone, or has read nothing for `wait_s`.
    """
    try:
        sent = os.write(fd, message)
    except BlockingIOError:
        return False
    if sent < len(message):
        room = select.poll()
        room.register(fd, select.POLLOUT)
        while sent < len(message):
            if not room.poll(wait_s * 1000):
                raise TimeoutError("it reads nothing of what it is told")
            sent += os.write(fd, message[sent:])
    return True
