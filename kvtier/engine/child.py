"""A process of our own that ends when its input does."""

import contextlib
import subprocess
from typing import Final

STOP_S: Final = 30.0


def end(process: "subprocess.Popen[str]", wait_s: float = STOP_S) -> None:
    """Let it hear that its input has ended, and wait; after `wait_s` it is killed.

    Both its standard input and its standard output are pipes, and closed then.
    """
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.close()
    with contextlib.suppress(subprocess.TimeoutExpired):  # killed then
        process.wait(wait_s)
    process.kill()
    process.wait()
    process.stdout.close()
