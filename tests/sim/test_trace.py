"""Reading and writing traces: the format, its variants, and what is refused."""

import gzip
import json
from pathlib import Path

import pytest

from kvtier.errors import ConfigError
from kvtier.sim.trace import Request, load_trace, read_trace, write_trace

LINE = {"timestamp": 3052, "input_length": 1100, "output_length": 7, "hash_ids": [4, 9, 10]}


def trace_of(folder: Path, *lines: object) -> Path:
    path = folder / "trace.jsonl"
    path.write_text("".join(
        f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines
    ))  # fmt: skip
    return path


def test_reads_mooncakes_lines(tmp_path: Path) -> None:
    first, second = read_trace(trace_of(tmp_path, LINE, "", {**LINE, "timestamp": 4000.5}))
    assert first == Request(3.052, 1100, 7, (4, 9, 10), 512)
    assert first.full_blocks == (4, 9)  # the last block holds 76 tokens of 512
    assert second.at_s == 4.0005


def test_other_fields_are_left_alone_and_output_may_be_absent(tmp_path: Path) -> None:
    line = {"timestamp": 0, "input_length": 512, "hash_ids": [1], "chat_id": 7, "type": "text"}
    assert [*read_trace(trace_of(tmp_path, line))] == [Request(0.0, 512, 0, (1,), 512)]


@pytest.mark.parametrize("heading", [True, False])
def test_the_block_size_may_stand_in_a_heading_or_in_a_line(tmp_path: Path, heading: bool) -> None:
    line = {"timestamp": 0, "input_length": 40, "output_length": 1, "hash_ids": [1, 2, 3]}
    lines = [{"block_size": 16}, line] if heading else [{**line, "block_size": 16}, line]
    for request in read_trace(trace_of(tmp_path, *lines)):
        assert request.block_tokens == 16
        assert request.full_blocks == (1, 2)


def test_the_block_size_may_be_given_for_a_trace_without_one(tmp_path: Path) -> None:
    path = trace_of(tmp_path, {"timestamp": 0, "input_length": 40, "hash_ids": [1, 2, 3]})
    assert next(read_trace(path, block_tokens=16)).full_blocks == (1, 2)
    with pytest.raises(ConfigError, match="40 tokens are at most 2 blocks of 32"):
        next(read_trace(path, block_tokens=32))


def test_a_block_size_that_the_trace_contradicts_is_refused(tmp_path: Path) -> None:
    said = trace_of(tmp_path, {**LINE, "block_size": 512})
    assert len([*read_trace(said, block_tokens=512)]) == 1
    with pytest.raises(ConfigError, match="line 1: block_size is 512, not 16 as given"):
        next(read_trace(said, block_tokens=16))
    counted = trace_of(tmp_path, LINE)
    with pytest.raises(ConfigError, match="has 3 blocks, but 1100 tokens fill 68 of 16 tokens"):
        next(read_trace(counted, block_tokens=16))


def test_the_block_size_is_guessed_where_512_can_not_be(tmp_path: Path) -> None:
    lines = [
        {"timestamp": 0, "input_length": 40, "hash_ids": [1, 2, 3]},
        {"timestamp": 1, "input_length": 64, "hash_ids": [1, 2, 4, 5]},
    ]
    first, second = read_trace(trace_of(tmp_path, *lines))
    assert (first.full_blocks, second.full_blocks) == ((1, 2), (1, 2, 4, 5))
    odd = {"timestamp": 0, "input_length": 40, "hash_ids": [*range(100)]}
    with pytest.raises(ConfigError, match="40 tokens are at most 1 blocks of 512"):
        next(read_trace(trace_of(tmp_path, odd)))


def test_a_trace_is_put_in_the_order_of_its_times(tmp_path: Path) -> None:
    lines = ({**LINE, "timestamp": at} for at in (9000, -5000, 2000, 1000, 3000))
    path = trace_of(tmp_path, *lines)
    assert [each.at_s for each in read_trace(path)] == [9.0, -5.0, 2.0, 1.0, 3.0]
    assert [each.at_s for each in load_trace(path)] == [-5.0, 1.0, 2.0, 3.0, 9.0]


@pytest.mark.parametrize("times", [{"timestamp": 7}, {"timestamp": None}, {}])
def test_requests_without_times_are_a_second_apart(tmp_path: Path, times: dict) -> None:
    line = {"input_length": 1024, "hash_ids": [1, 2]}
    requests = load_trace(trace_of(tmp_path, *[{**line, **times}] * 3))
    assert [each.at_s for each in requests] == [0.0, 1.0, 2.0]


def test_a_missing_time_is_that_of_the_line_above(tmp_path: Path) -> None:
    late = {"input_length": 1024, "hash_ids": [1, 2]}
    requests = load_trace(trace_of(tmp_path, {**LINE, "timestamp": 2000}, late, LINE))
    assert [each.at_s for each in requests] == [2.0, 2.0, 3.052]


def test_whole_numbers_with_a_point_and_nulls_are_read(tmp_path: Path) -> None:
    line = {"timestamp": 1.5, "input_length": 1100.0, "output_length": None, "hash_ids": [1.0, 2]}
    assert [*read_trace(trace_of(tmp_path, line))] == [Request(0.0015, 1100, 0, (1, 2), 512)]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[1]", "must be a JSON object"),
        ({**LINE, "timestamp": "now"}, "timestamp is 'now', must be a number of milliseconds"),
        ('{"timestamp": NaN, "input_length": 1, "hash_ids": []}', "timestamp is nan"),
        ({**LINE, "input_length": -1}, "input_length is -1, must be an integer of 0 to 2147483648"),
        ({**LINE, "input_length": 1.5}, "input_length is 1.5"),
        ({**LINE, "output_length": True}, "output_length is True"),
        ({**LINE, "hash_ids": "4"}, "hash_ids is '4', must be a list of integers"),
        ({**LINE, "hash_ids": [4, None]}, "hash_ids holds None"),
        (
            {**LINE, "hash_ids": [1, 2, 3, 4]},
            "hash_ids has 4 blocks, but 1100 tokens are at most 3",
        ),
        ({**LINE, "block_size": 0}, "block_size is 0, must be an integer of 1 to 1048576"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: object, said: str) -> None:
    path = trace_of(tmp_path, LINE, line)
    with pytest.raises(ConfigError) as caught:
        list(read_trace(path))
    assert str(caught.value).startswith(f"trace {path}, line 2: ")
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="No such file"):
        list(read_trace(tmp_path / "absent.jsonl"))
    for content in (b"not packed", gzip.compress(json.dumps(LINE).encode() * 100)[:40]):
        (tmp_path / "bad.jsonl.gz").write_bytes(content)
        with pytest.raises(ConfigError, match="bad"):
            list(read_trace(tmp_path / "bad.jsonl.gz"))


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_what_is_written_is_read(tmp_path: Path, name: str) -> None:
    requests = [Request(0.0, 600, 3, (1, 2)), Request(1.5, 40, 0, (1, 5, 6), 16)]
    assert write_trace(tmp_path / name, requests) == 2
    assert [*read_trace(tmp_path / name)] == requests


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="Is a directory"):
        write_trace(tmp_path, [])
