"""`kvtier check` and `kvtier inspect` on folders that real stores have written."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from kvtier.cli import main
from kvtier.core.blocks import BlockKey
from kvtier.testing.stores import frames, key
from tests.stores.disk_support import at, blocks, opened, overwrite


def fill(path: Path, count: int) -> list[BlockKey]:
    with opened(path) as store:
        assert all(store.write(blocks(range(count))))
    return [key(n) for n in range(count)]


def test_a_whole_store_passes_and_can_be_listed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = fill(tmp_path / "disk" / "layout", 5)
    assert main(["check", str(tmp_path / "disk")]) == 0
    assert f"{tmp_path}/disk/layout: 5 blocks whole (0.2 MiB), 0 damaged" in capsys.readouterr().out
    assert main(["check", "--blocks", str(tmp_path / "disk" / "layout")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert {line.split()[0] for line in lines[:-1]} == {each.hex() for each in keys}
    assert all(line.endswith("ok, begins a prompt") for line in lines[:-1])
    assert main(["inspect", str(tmp_path / "disk")]) == 0
    shown = capsys.readouterr().out
    assert "5 blocks 0.2 MiB" in shown
    assert "0 damaged headers" in shown
    assert "another version" not in shown
    with opened(tmp_path / "disk" / "layout") as store:
        store.write(frames(["of another version"], 1000))
    assert main(["inspect", str(tmp_path / "disk")]) == 0
    assert "1 blocks with a frame of another version" in capsys.readouterr().out


def test_what_is_damaged_is_named_with_its_place_and_the_check_that_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = fill(tmp_path, 5)
    file, record = at(tmp_path, keys[1])
    overwrite(file, record + 6000, b"rot")
    with opened(tmp_path) as store:
        store.write(frames(["no frame at all"], 1000))
    assert main(["check", str(tmp_path)]) == 1
    *bad, last = capsys.readouterr().out.splitlines()
    assert "4 blocks whole" in last
    shown = "\n".join(bad)
    assert f"{keys[1].hex()}  segments/{file.name} slot" in shown
    assert "damaged: frame check payload checksum" in shown
    assert f"{key('no frame at all').hex()}" in shown
    assert "damaged: frame check magic" in shown


def test_a_garbled_header_is_damage_until_its_slot_is_used_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keys = fill(tmp_path, 3)
    file, record = at(tmp_path, keys[0])
    overwrite(file, record + 25, b"rot")
    assert main(["check", str(tmp_path)]) == 1
    shown = capsys.readouterr().out
    assert f"no block that can be named  segments/{file.name} slot {0}  damaged: header" in shown
    assert "2 blocks whole" in shown


def test_a_store_that_is_in_use_or_not_there_is_refused_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path / "a", 1)
    with opened(tmp_path / "a"):
        assert main(["check", str(tmp_path / "a")]) == 2
        process = f"another kvtier process (pid {os.getpid()})"
        error = f"kvtier: disk.path {tmp_path}/a: {process} uses it\n"
        assert capsys.readouterr().err == error
        assert main(["inspect", str(tmp_path / "a")]) == 0
    (tmp_path / "b").mkdir()
    for command in ("check", "inspect"):
        assert main([command, str(tmp_path / "b")]) == 2
        assert capsys.readouterr().err == f"kvtier: {tmp_path}/b: holds no disk tier\n"
        assert main([command, str(tmp_path / "c")]) == 2
        assert "c: No such file or directory\n" in capsys.readouterr().err
    assert not [*(tmp_path / "b").iterdir()]


def test_the_command_needs_neither_torch_nor_grpc(tmp_path: Path) -> None:
    fill(tmp_path, 1)
    code = "import sys; from kvtier.cli import main; status = main(sys.argv[1:]); "
    code += "print([n for n in ('torch', 'ray', 'grpc') if n in sys.modules]); sys.exit(status)"
    done = subprocess.run(
        [sys.executable, "-c", code, "check", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("[]\n")
