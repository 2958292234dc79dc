"""The pipe that an engine tells the daemon things by: whole messages, or none of one."""

import fcntl
import os
import threading
from collections.abc import Iterator

import pytest

from kvtier.engine.notes import note

PAGE = os.sysconf("SC_PAGE_SIZE")
WAIT_S = 60.0


@pytest.fixture
def pipe() -> Iterator[tuple[int, int]]:
    read, write = os.pipe2(os.O_NONBLOCK)
    yield read, write
    os.close(read)
    os.close(write)


def fill(write: int, free: int = 0) -> bytes:
    """Write to the pipe until it is full but for `free` pages; what was written."""
    count = fcntl.fcntl(write, fcntl.F_GETPIPE_SZ) // PAGE
    pages = [bytes([65 + number]) * PAGE for number in range(count)]
    for page in pages[: len(pages) - free]:
        os.write(write, page)
    return b"".join(pages[: len(pages) - free])


def read_all(read: int, nbytes: int) -> bytes:
    data = b""
    os.set_blocking(read, True)
    while len(data) < nbytes:
        data += os.read(read, PAGE)
    return data


def test_a_message_of_several_pages_lies_there_as_a_whole(pipe: tuple[int, int]) -> None:
    read, write = pipe
    message = os.urandom(5 * PAGE + 7)
    assert note(write, message, WAIT_S)
    assert read_all(read, len(message)) == message


def test_where_there_is_no_room_nothing_is_written(pipe: tuple[int, int]) -> None:
    read, write = pipe
    before = fill(write)
    assert not note(write, b"x" * 2 * PAGE, WAIT_S)
    assert read_all(read, len(before)) == before
    os.set_blocking(read, False)
    with pytest.raises(BlockingIOError):
        os.read(read, 1)


def test_what_begins_and_finds_no_end_waits_for_the_reader(pipe: tuple[int, int]) -> None:
    read, write = pipe
    before, message = fill(write, free=2), os.urandom(20 * PAGE + 7)
    got = list[bytes]()
    reader = threading.Thread(target=lambda: got.append(read_all(read, len(before) + len(message))))
    reader.start()
    assert note(write, message, WAIT_S)
    reader.join(WAIT_S)
    assert got == [before + message]


def test_a_reader_that_reads_nothing_is_not_waited_for_for_ever(pipe: tuple[int, int]) -> None:
    _, write = pipe
    fill(write, free=1)
    with pytest.raises(TimeoutError):
        note(write, b"x" * 2 * PAGE, 0.01)


def test_nor_is_one_that_is_gone() -> None:
    read, write = os.pipe2(os.O_NONBLOCK)
    fill(write, free=1)
    gone = threading.Thread(target=os.close, args=[read])
    gone.start()
    with pytest.raises(BrokenPipeError):
        note(write, b"x" * 2 * PAGE, WAIT_S)
    gone.join(WAIT_S)
    os.close(write)
