"""What `pip install kvtier` gets is all of kvtier, wherever it is installed to."""

import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path
from shutil import copy, copytree, ignore_patterns

import pytest

ROOT = Path(__file__).parent.parent
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """Built out of a copy, as building leaves files beside its source; without a network."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    copytree(ROOT / "kvtier", source / "kvtier", ignore=ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        copy(ROOT / name, source)
    done = subprocess.run(
        [sys.executable, "-c", BUILD, str(out)],
        cwd=source, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = out.glob("*.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_it_holds_every_file_of_the_package(wheel: zipfile.ZipFile) -> None:
    files = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "kvtier").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    held = {name for name in wheel.namelist() if ".dist-info/" not in name}
    assert held == files


def test_it_says_what_starts_it_and_what_it_needs(wheel: zipfile.ZipFile) -> None:
    def told(name: str) -> bytes:
        (found,) = (each for each in wheel.namelist() if each.endswith(f".dist-info/{name}"))
        return wheel.read(found)

    entries = told("entry_points.txt").decode()
    assert "kvtier = kvtier.cli:main" in entries
    assert "[vllm.general_plugins]\nkvtier = kvtier.engine.vllm:register" in entries
    extras = message_from_bytes(told("METADATA")).get_all("Provides-Extra") or []
    assert {"worker", "cluster", "http", "vllm", "demo"} <= set(extras)


def test_it_says_how_to_get_what_an_extra_brings(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    config = tmp_path / "kvtier.toml"
    config.write_text('[router]\nlisten = "127.0.0.1:0"\nhttp = "127.0.0.1:0"\n')
    code = (
        "import sys; sys.path.insert(0, sys.argv[1]); sys.modules['uvicorn'] = None\n"
        "import kvtier.cli\n"
        "sys.exit(kvtier.cli.main(['router', '--config', sys.argv[2]]))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path), str(config)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packages = " ".join(f"'{each}'" for each in extras["optional-dependencies"]["http"])
    told = f"kvtier: uvicorn is missing: pip install {packages}"
    assert done.stderr.splitlines()[-1] == f"{told}, or pip install '.[http]' in the repository"


def test_it_runs_from_where_it_was_unpacked(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import kvtier, kvtier.cli\n"
        "assert kvtier.__path__[0].startswith(sys.argv[1]), kvtier.__path__\n"
        "sys.exit(kvtier.cli.main(['--help']))"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, str(tmp_path)],
        cwd=tmp_path, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "usage: kvtier" in done.stdout
