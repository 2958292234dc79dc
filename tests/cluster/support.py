"""What the tests with a real Ray have in common."""

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

DEADLINE_S = 120.0  # generous: only a hang lasts so long
RAY = [
    pytest.mark.cluster,
    # Ray leaves sockets and files of its own to the garbage collector.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning:ray.*"),
]
_MARK = "KVTIER_TEST_CLUSTER"


def until(true: Callable[[], object], what: str) -> None:
    end = time.monotonic() + DEADLINE_S
    while not true():
        assert time.monotonic() < end, f"never: {what}"
        threading.Event().wait(0.1)


@contextlib.contextmanager
def nothing_left() -> Iterator[None]:
    """Every process that is started inside, however deep, has ended soon after."""
    os.environ[_MARK] = str(os.getpid())
    try:
        yield
    finally:
        until(lambda: not _marked(), "all processes of the cluster have ended")
        del os.environ[_MARK]


def _marked() -> set[int]:
    """Processes that were started in the context, found by what they inherited."""
    mine = set()
    for folder in Path("/proc").iterdir():
        if not folder.name.isdigit():
            continue
        try:
            environment = (folder / "environ").read_bytes()
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            continue
        marked = f"{_MARK}={os.getpid()}".encode() in environment
        if marked and state != "Z" and int(folder.name) != os.getpid():
            mine.add(int(folder.name))
    return mine
