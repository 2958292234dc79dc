"""`Each part by hand` of the README, done as it stands there: only places and the model differ."""

import re
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from kvtier import config
from tests.launching import Process, fixed_ports, wait_for

README = Path(__file__).parents[2] / "README.md"
SECTION = README.read_text().partition("## Each part by hand")[2].partition("\n## ")[0]
PORTS = ("7450", "7460", "7470")  # router, daemon, worker

# The same once more, and how much of the prompt was not computed.
AND_SAY = """
for part in stub.Generate(router_pb2.GenerateRequest(prompt=prompt, max_tokens=1)):
    if part.WhichOneof("body") == "started":
        print("\\n", sum(each.tokens for each in part.started.restored), sep="", end="")
"""


def code(language: str) -> str:
    (found,) = re.findall(rf"```{language}\n(.*?)```", SECTION, re.DOTALL)
    return found


def commands() -> list[list[str]]:
    """What is to be typed, without the comments."""
    lines = re.findall(r"^    \.venv/bin/kvtier (.*?) +#", SECTION, re.MULTILINE)
    return [line.split() for line in lines]


def test_the_parts_find_each_other_at_their_usual_addresses(tmp_path: Path) -> None:
    path = tmp_path / "kvtier.toml"
    path.write_text(code("toml"))
    loaded = config.load(path)
    (member,) = loaded.router.members
    assert loaded.node.socket == loaded.worker.socket
    listens = (loaded.router.listen, loaded.node.listen, loaded.worker.listen)
    assert listens == tuple(f"127.0.0.1:{port}" for port in PORTS)
    assert (member.daemon, member.worker) == listens[1:]
    assert commands() == [
        *([name, "--config", "kvtier.toml"] for name in ("node", "worker", "router")),
        ["inspect", loaded.node.listen],
    ]


@pytest.mark.timeout(400)
def test_the_second_answer_is_found_in_the_tiers(tmp_path: Path, tiny_folder: Path) -> None:
    elsewhere = dict(zip(PORTS, map(str, fixed_ports(3)), strict=True))

    def moved(text: str) -> str:
        text = text.replace("/tmp/kvtier", f"{tmp_path}/kvtier")
        return re.sub("|".join(PORTS), lambda found: elsewhere[found[0]], text)

    listen = 'listen = "127.0.0.1:{}"\n'
    toml = moved(code("toml"))
    for table, port in zip(("router", "node", "worker"), PORTS, strict=True):
        toml = toml.replace(f"[{table}]\n", f"[{table}]\n" + listen.format(elsewhere[port]))
    tiny = f'model = "{tiny_folder}"\nthreads = 1\nvram_bytes = "4MiB"\n'
    toml = toml.replace("[worker]\n", "[worker]\n" + tiny).replace("1GiB", "16MiB")

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def held() -> int:
        """Blocks of the host tier, as `kvtier inspect` tells them."""
        told = python("-m", "kvtier.cli", *moved(" ".join(commands()[-1])).split())
        found = re.search(r"^  host +(\d+) blocks", told, re.MULTILINE)
        assert found, told
        return int(found[1])

    with ExitStack() as stack:
        for name, *_ in commands()[:3]:
            stack.enter_context(Process(name, toml, tmp_path))
        first = python("-c", moved(code("python")))
        assert first
        wait_for("blocks in host memory", lambda: held() > 0)
        again, restored = python("-c", moved(code("python")) + AND_SAY).rsplit("\n", 1)
        assert again == first
        assert int(restored) > 200, "of 240 tokens"
