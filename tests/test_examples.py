"""Every example runs as it stands, prints what it says, and is short."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *arguments],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_is_at_most_25_lines(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 25


def test_plain_tensors_come_back_equal() -> None:
    assert run("plain_tensors.py") == "saved 8 blocks\nrestored 8 from host equal: True\n"


@pytest.mark.model
def test_a_prompt_is_read_once_and_survives_a_restart(tmp_path: Path) -> None:
    lines = run("transformers_chat.py", str(tmp_path)).splitlines()
    restored = [line.partition("restored ")[2] for line in lines[::2]]
    assert restored == ["{}", "{'host': 224}", "{'disk': 224}", "{'host': 224}"]
    answers = lines[1::2]
    assert answers[0] == answers[2], "the same prompt, the same answer"
    assert answers[1] == answers[3]
