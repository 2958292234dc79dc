"""Which codec `auto` takes, with the figures that docs/codecs.md and its sources give."""

from dataclasses import fields

import pytest

from kvtier.codec.auto import MARGIN, Cost, Device, Timing, choose
from kvtier.codec.base import Codec
from kvtier.codec.codecs import CODECS, RAW, by_name
from kvtier.config import DiskConfig, RedisConfig

BLOCK = 2 << 20
COPY = 20.0
BF16 = {  # ratio; GB/s of encode and decode, one thread
    "raw": (1.0, 1e6, COPY),
    "lz4": (1.001, 12.9, 19.8),
    "bp-zh": (1.477, 1.63, 2.56),
    "bp4": (1.329, 3.78, 4.65),
    "bs-lz4": (1.348, 1.93, 1.75),
    "int8-tok": (1.939, 1.85, 3.4),
}


def timings(table: dict[str, tuple[float, float, float]] = BF16) -> list[Timing]:
    return [
        Timing(by_name(name), BLOCK / ratio, BLOCK / encode / 1e9, BLOCK / decode / 1e9)
        for name, (ratio, encode, decode) in table.items()
    ]


def device(
    gb_per_s: float, *, read: float = 0.0, block_s: float = 0.0, threads: int = 2, cores: int = 8
) -> Device:
    write = Cost(block_s, 1 / gb_per_s / 1e9)
    return Device(write, Cost(block_s, 1 / (read or gb_per_s) / 1e9), threads, cores)


def name(
    at: Device, current: str = "raw", table: dict[str, tuple[float, float, float]] = BF16
) -> str:
    return choose(timings(table), BLOCK, at, by_name(current)).name


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (device(0.1), "bp-zh"),  # a network of 1 Gb/s
        (device(1.2), "bp-zh"),  # a shared Redis
        (device(4.0, threads=2), "bp4"),  # bp-zh cannot decode as fast as such a disk reads
        (device(4.0, threads=8), "bp-zh"),  # unless there are threads for it
        (device(12.5, threads=2), "raw"),
        (device(40.0, threads=8), "raw"),
    ],
)
def test_a_slow_store_is_worth_more_work_than_a_fast_one(at: Device, expected: str) -> None:
    assert name(at) == expected


def test_threads_without_cores_do_not_count() -> None:
    assert name(device(4.0, threads=8, cores=8)) == "bp-zh"
    assert name(device(4.0, threads=8, cores=1)) == "raw"
    assert name(device(0.1, threads=8, cores=1)) == "bp-zh"


def test_reads_decide_where_the_two_differ() -> None:
    # Encoding costs more than the store takes, but what is read comes sooner.
    assert name(device(3.0, read=1.0)) == "bp-zh"
    # Writes would gain, reads would lose: nobody waits for a write.
    assert name(device(0.5, read=30.0)) == "raw"


def test_bytes_that_cost_nothing_are_not_saved() -> None:
    """A store that takes its time for each block, whatever the size."""
    assert name(device(50.0, block_s=0.005)) == "raw"


def test_raw_where_a_codec_saves_too_little() -> None:
    saves_little = {"raw": (1.0, 1e6, COPY), "lz4": (64.5 / 63.5, 1e3, 1e3)}
    assert name(device(0.001), table=saves_little) == "raw"
    assert name(device(0.001), current="lz4", table=saves_little) == "raw"
    saves_enough = {**saves_little, "lz4": (1.2, 1e3, 1e3)}
    assert name(device(0.001), table=saves_enough) == "lz4"


def test_other_dtypes_have_other_codecs() -> None:
    # float32: three of four bytes are noise. float16: bp4 is none.
    fp32 = {"raw": BF16["raw"], "bp-zh": (1.19, 2.4, 3.4), "bp4": (1.14, 5.0, 6.0)}
    assert name(device(0.1), table=fp32) == "bp-zh"
    assert name(device(6.0), table=fp32) == "raw"
    fp16 = {"raw": BF16["raw"], "bp-zh": (1.16, 1.2, 2.0)}
    assert name(device(0.1), table=fp16) == "bp-zh"


def test_settings_know_every_codec_and_auto() -> None:
    for tier in (DiskConfig, RedisConfig):
        codec = next(each for each in fields(tier) if each.name == "codec")
        known = {each.name for each in CODECS}
        assert {*codec.metadata["values"]} == {*known, "auto"}
        assert codec.default == "raw"


@pytest.mark.parametrize("codec", [each for each in CODECS if not each.exact], ids=lambda c: c.name)
def test_a_lossy_codec_is_never_chosen(codec: Codec) -> None:
    free = Timing(codec, 1.0, 1e-9, 1e-9)
    assert choose([*timings(), free], BLOCK, device(0.01), RAW).exact
    raw = next(each for each in timings() if each.codec is RAW)
    assert choose([raw, free], BLOCK, device(0.01), codec) is RAW


def test_what_is_in_use_stays_where_little_is_gained() -> None:
    """Along all speeds, there and back: at each at most one change, and not at the same place."""
    speeds = [0.05 * 1.01**step for step in range(700)]
    current, changed_up = "raw", []
    for speed in speeds:
        found = name(device(speed), current)
        if found != current:
            changed_up.append((speed, found))
        current = found
    assert current == "raw"
    changed_down = []
    for speed in reversed(speeds):
        found = name(device(speed), current)
        if found != current:
            changed_down.append((speed, found))
        current = found
    assert [each for _, each in changed_up] == ["bp-zh", "bp4", "raw"]
    assert [each for _, each in changed_down] == ["bp4", "bp-zh"]
    assert changed_down[0][0] * (1 + MARGIN) < changed_up[2][0]
    assert changed_down[1][0] * (1 + MARGIN) < changed_up[1][0]


@pytest.mark.parametrize("edge", [0.05 * 1.2**step for step in range(38)])
def test_noise_does_not_make_it_change_again_and_again(edge: float) -> None:
    current, changes = "raw", 0
    for step in range(40):
        found = name(device(edge * (1.015 if step % 2 else 0.985)), current)
        changes += found != current
        current = found
    assert changes <= 2
