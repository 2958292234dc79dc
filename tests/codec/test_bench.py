"""`kvtier bench codec`: the table that a person sees, of few blocks of the real small model."""

import subprocess
import sys

import pytest

from kvtier.codec.codecs import CODECS


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "kvtier.cli", "bench", "codec", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=240)


@pytest.mark.model
def test_a_row_for_each_codec() -> None:
    done = bench("--blocks", "2", "--block-tokens", "32")
    assert done.returncode == 0, done.stderr
    blocks, header, *lines = done.stdout.splitlines()
    assert blocks.startswith("2 blocks of 737280 bytes")
    assert header.split() == ["codec", "ratio", "encode", "decode", "memcpy", "KL"]
    rows = {name: [float(each) for each in rest] for name, *rest in map(str.split, lines)}
    assert [*rows] == [codec.name for codec in CODECS]
    for codec in CODECS:
        ratio, encode, decode, memcpy, kl = rows[codec.name]
        assert min(encode, decode, memcpy) > 0
        assert (kl == 0) == codec.exact
        assert ratio > (0.99 if codec.exact else 1.9)
    assert rows["bp-zh"][0] > 1.4
    assert rows["int8-tok"][4] < rows["int4-had"][4]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--blocks", "0"), "kvtier: --blocks is 0, must be 1 to 4096\n"),
        (("--block-tokens", "5000"), "kvtier: --block-tokens is 5000, must be 1 to 4096\n"),
        (("--text", "/no/such"), "kvtier: --text /no/such: "),
    ],
)
def test_what_makes_no_sense_is_refused_in_one_line(arguments: tuple[str, ...], line: str) -> None:
    done = bench(*arguments)
    assert done.returncode == 2
    assert done.stderr.startswith(line)
    assert len(done.stderr.splitlines()) == 1
