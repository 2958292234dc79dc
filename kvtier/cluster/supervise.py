"""Runs a command that starts Ray as a child of its own, and takes all of it down at a signal.

Ray's processes and libraries answer signals in ways of their own: they write stack traces, leave
in the middle of a start, or outlive whoever started them. So nobody but this process hears of a
signal: the child lives in a session of its own, is asked to stop by the end of its input, and what
it leaves behind comes to this process as its reaper, which ends it.
"""

import contextlib
import ctypes
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Final

from kvtier.cluster.local import environment

STOP_S: Final = 60.0  # for the child to end in order once it was asked to
_SWEEP_S: Final = 10.0  # for what was killed to be gone
_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_CHILD_SUBREAPER: Final = 36


def supervise(command: Sequence[str], *, say: Callable[[str], None], greeting: str = "") -> int:
    """Run `command` until it ends or a signal comes; nothing that it started is left then.

    The child must end when its standard input does, which also happens when this process is
    killed. At the first SIGINT, SIGTERM or SIGHUP it has STOP_S for that; at a second one it is
    killed. What it writes to standard error is passed on until then. Its temporary files, and
    Ray's, lie in a folder that is removed.

    Args:
        command: The program and its arguments.
        say: Gets the lines for people.
        greeting: The first of them.

    Returns:
        The child's status; after a signal 128 + its number, and `say` gets one line.
    """
    _adopt_orphans()
    with (
        tempfile.TemporaryDirectory(prefix="kvtier-", ignore_cleanup_errors=True) as folder,
        _signals() as wake,
    ):
        heard: list[int] = []
        if greeting:  # not before signals are heard
            say(greeting)
        child = subprocess.Popen(  # noqa: S603 - this very program
            command,
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C at the terminal is for this process alone
            env=environment(Path(folder)),
        )
        assert child.stdin is not None
        assert child.stderr is not None
        passing = threading.Thread(
            target=_pass_on, args=(child.stderr, lambda: not heard), daemon=True
        )
        passing.start()
        try:
            _until_over(child, wake, heard)
        finally:
            with contextlib.suppress(OSError):
                child.stdin.close()
            child.kill()
            child.wait()
            _sweep()
            passing.join(_SWEEP_S)
            if not passing.is_alive():
                child.stderr.close()
    if not heard:
        return child.returncode
    with contextlib.suppress(OSError):  # after SIGHUP there may be nobody to read it
        say(f"stopped by {signal.Signals(heard[0]).name}; everything that was started has ended")
    return 128 + heard[0]


def _until_over(child: "subprocess.Popen[bytes]", wake: int, heard: list[int]) -> None:
    """Until the child has ended, was asked to in vain, or a second signal came."""
    assert child.stdin is not None
    ended = os.pidfd_open(child.pid)
    try:
        ready, _, _ = select.select([ended, wake], [], [])
        if wake not in ready:
            return
        heard += os.read(wake, 64)
        with contextlib.suppress(OSError):
            child.stdin.close()
        if len(heard) < 2:
            select.select([ended, wake], [], [], STOP_S)
    finally:
        os.close(ended)


@contextlib.contextmanager
def _signals() -> Iterator[int]:
    """A pipe in which each signal becomes a byte, its number, whichever thread the kernel picks."""
    wake, wakes = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
    before_fd = signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    before = {each: signal.signal(each, lambda *_: None) for each in _SIGNALS}
    try:
        yield wake
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)
        signal.set_wakeup_fd(before_fd)
        os.close(wake)
        os.close(wakes)


def _pass_on(source: IO[bytes], wanted: Callable[[], bool]) -> None:
    for line in source:
        if wanted():
            with contextlib.suppress(OSError):
                sys.stderr.buffer.write(line)
                sys.stderr.buffer.flush()


def _adopt_orphans() -> None:
    """What a descendant leaves behind becomes a child of this process, not of init."""
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _sweep() -> None:
    """Kill every descendant and reap it. What a child of theirs starts meanwhile is found, too."""
    give_up_at = time.monotonic() + _SWEEP_S
    while (found := _descendants()) and time.monotonic() < give_up_at:
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.02)


def _descendants() -> set[int]:
    """All processes below this one, zombies too: they are to be reaped."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                # pid (name) state ppid ...; a name may have spaces and brackets in it
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
                parents[int(entry.name)] = int(fields[1])
    below: set[int] = set()
    grown = {os.getpid()}
    while grown:
        grown = {pid for pid, parent in parents.items() if parent in grown}
        below |= grown
    return below


@contextlib.contextmanager
def until_input_ends() -> Iterator[threading.Event]:
    """In the child: KeyboardInterrupt in the main thread when standard input ends.

    That is when the supervisor asks for it, or is gone. The event is set then, for what may not be
    interrupted; Ray's own handlers of signals are never called.
    """
    over = threading.Event()
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            ready, _, _ = select.select([0], [], [], 1.0)
            if ready and not os.read(0, 4096):
                over.set()
                if not done.is_set():
                    os.kill(os.getpid(), signal.SIGINT)
                return

    signal.signal(signal.SIGINT, signal.default_int_handler)
    threading.Thread(target=watch, name="kvtier-input", daemon=True).start()
    try:
        yield over
    finally:
        done.set()
        signal.signal(signal.SIGINT, signal.SIG_IGN)
