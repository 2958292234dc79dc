"""Every example runs as it stands, prints what it says, and is short."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from tests.launching import Process, fixed_ports, wait_for

EXAMPLES = Path(__file__).parent.parent / "examples"
README = EXAMPLES.parent / "README.md"


def run(name: str, *arguments: str) -> str:
    """What the example prints; it leaves nothing behind."""
    with tempfile.TemporaryDirectory(prefix="kvt-", dir="/tmp") as scratch:
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / name), *arguments],
            capture_output=True,
            text=True,
            timeout=280,
            env={**os.environ, "TMPDIR": scratch},
        )
        left = {each.name for each in Path(scratch).iterdir()}
        assert {each for each in left if not each.startswith("torchinductor_")} == set()
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_at_most_25_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 25


def test_the_readme_shows_the_example_as_it_is() -> None:
    assert (EXAMPLES / "transformers_chat.py").read_text() in README.read_text()


def test_plain_tensors_come_back_equal() -> None:
    assert run("plain_tensors.py") == "saved 8 blocks\nrestored 8 from host equal: True\n"


def test_plain_tensors_come_back_from_a_daemon_that_takes_its_time() -> None:
    """No call waits for it here, as where it takes its memory on a busy machine."""
    slow = "import kvtier.engine.tier as t; t.ATTACH_S = 0.0; import runpy, sys; "
    path = str(EXAMPLES / "plain_tensors.py")
    done = subprocess.run(
        [sys.executable, "-c", slow + "runpy.run_path(sys.argv[1])", path],
        capture_output=True, text=True, timeout=280,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "saved 8 blocks\nrestored 8 from host equal: True\n"


def test_an_openai_client_is_answered(tmp_path: Path) -> None:
    http = f"127.0.0.1:{fixed_ports(1)[0]}"
    command = [sys.executable, "-m", "tests.router.chaos_worker", "w", "0"]
    worker = subprocess.Popen(command, cwd=EXAMPLES.parent, stdout=subprocess.PIPE, text=True)
    try:
        assert worker.stdout is not None
        address = worker.stdout.readline().strip()
        members = f'[{{ node = "a", worker = "{address}" }}]'
        toml = f'[router]\nlisten = "127.0.0.1:0"\nhttp = "{http}"\nmembers = {members}\n'
        with Process("router", toml, tmp_path):

            def ready() -> bool:
                try:
                    return urlopen(f"http://{http}/health").status == 200
                except HTTPError as error:
                    error.close()
                    return False

            wait_for("the router is healthy", ready)
            answer, told = run("openai_client.py", f"http://{http}/v1").rsplit("\n", 2)[:2]
    finally:
        worker.kill()
        worker.communicate()
    assert answer
    assert told == "tiny: 8 tokens"


@pytest.mark.model
def test_a_prompt_is_read_once_and_survives_a_restart() -> None:
    lines = run("transformers_chat.py").splitlines()
    restored = [line.partition("restored ")[2] for line in lines[::2]]
    assert restored == ["{}", "{'host': 224}", "{'disk': 224}", "{'host': 224}"]
    answers = lines[1::2]
    assert answers[0] == answers[2], "the same prompt, the same answer"
    assert answers[1] == answers[3]
