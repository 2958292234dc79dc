"""A signal at any moment of `kvtier cluster up --local` and `demo`: one line, nothing left."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.cluster import local
from tests.cluster.support import RAY, nothing_left

END_S = 120  # generous: only a hang lasts so long
KVTIER = ("-m", "kvtier.cli")
TOLD = "; everything that was started has ended"


@pytest.fixture
def scratch() -> Iterator[Path]:
    """A folder with a short path: Ray puts sockets into it."""
    with tempfile.TemporaryDirectory(prefix="kvt-", dir="/tmp") as folder:
        yield Path(folder)


@contextlib.contextmanager
def started(scratch: Path, *arguments: str) -> Iterator["subprocess.Popen[str]"]:
    """`kvtier ...` with temporary files in `scratch`; killed where a test fails."""
    process = subprocess.Popen(
        [sys.executable, *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "TMPDIR": str(scratch)},
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.communicate(timeout=END_S)


def ended(scratch: Path, *arguments: str) -> tuple[int, str, str]:
    with started(scratch, *KVTIER, *arguments) as process:
        out, err = process.communicate(timeout=END_S)
        return process.returncode, out, err


def read_until(process: "subprocess.Popen[str]", words: str) -> list[str]:
    assert process.stdout is not None
    lines: list[str] = []
    while not lines or words not in lines[-1]:
        line = process.stdout.readline()
        assert line, f"ended before {words!r}: {lines}"
        lines.append(line)
    return lines


@pytest.fixture
def up(tmp_path: Path) -> list[str]:
    config = tmp_path / "kvtier.toml"
    config.write_text('[host]\nbytes = "8MiB"\n')
    return ["cluster", "up", "--local", "1", "--no-workers", "--config", str(config)]


class TestSignals:
    pytestmark = RAY

    @pytest.mark.parametrize(
        ("moment", "number"),
        [("starting", signal.SIGTERM), ("Ray at", signal.SIGINT), ("settled", signal.SIGHUP)],
    )
    def test_one_ends_all_that_was_started(self, scratch, up, moment, number):
        with nothing_left(), started(scratch, *KVTIER, *up) as process:
            read_until(process, moment)
            process.send_signal(number)
            out, err = process.communicate(timeout=END_S)
            assert process.returncode == 128 + number
            assert out.splitlines()[-1] == f"stopped by {number.name}{TOLD}"
            assert "Error" not in out + err
            assert err == ""
        assert list(scratch.iterdir()) == [], "folders, logs and sockets"

    def test_the_supervisors_own_death_ends_it_too(self, scratch, up):
        with nothing_left(), started(scratch, *KVTIER, *up) as process:
            read_until(process, "Ray at")
            process.kill()


def test_a_child_that_does_not_end_is_killed_at_the_second_signal(scratch):
    """Whatever it has started, too, also when that has left it and its session."""
    program = (
        "import subprocess, sys, time\n"
        "subprocess.Popen(['sleep', '1000'], start_new_session=True)\n"
        "print('up', flush=True)\n"
        "sys.stdin.read()\n"
        "print('asked', flush=True)\n"
        "while True: time.sleep(100)\n"
    )
    supervisor = (
        "from kvtier.cluster.supervise import supervise\n"
        "import sys\n"
        f"sys.exit(supervise([sys.executable, '-c', {program!r}], say=print))\n"
    )
    with nothing_left(), started(scratch, "-c", supervisor) as process:
        read_until(process, "up")
        process.send_signal(signal.SIGTERM)
        read_until(process, "asked")  # or both would be on their way, in any order
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate(timeout=END_S)
    assert out == f"stopped by SIGTERM{TOLD}\n"
    assert process.returncode == 143


def test_what_the_child_says_and_ends_with_is_passed_on(scratch, tmp_path):
    config = tmp_path / "kvtier.toml"
    config.write_text("[nod]\n")
    status, out, err = ended(scratch, "cluster", "up", "--local", "2", "--config", str(config))
    assert (status, out) == (2, "")
    assert err.startswith("kvtier: nod: no such setting")
    status, _, err = ended(scratch, "cluster", "up", "--local", "1000")
    assert (status, err) == (2, "kvtier: --local is 1000, must be 1 to 16\n")
    status, out, err = ended(scratch, "demo", "--json", "/no/such/folder/x")
    assert (status, out) == (2, "")
    assert err == "kvtier: --json: there is no folder /no/such/folder\n"


def test_ray_lies_in_the_scratch_folder_where_its_sockets_fit():
    assert local.environment(Path("/tmp/kvtier-abcdefgh"))["TMPDIR"] == "/tmp/kvtier-abcdefgh"
    long = Path("/tmp/" + "x" * 60)
    assert local.environment(long).get("TMPDIR") == os.environ.get("TMPDIR")
