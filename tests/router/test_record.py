"""A trace recorded from a real router: what was asked, and nothing of what was said."""

import asyncio
import contextlib
import json
import signal
import sys
from pathlib import Path

import pytest

from kvtier.cli.trace_record import in_order
from kvtier.sim.record import Numbering
from kvtier.sim.trace import Request, read_trace
from tests.router.stub_engine import StubWorker
from tests.router.support import RunningRouter, eventually, generate_request, route_request

COMMAND = [sys.executable, "-m", "kvtier.cli", "trace", "record"]


@pytest.fixture
async def recording():
    """Starts recorders, and waits until they have begun; none is left at the end."""
    running: list[asyncio.subprocess.Process] = []

    async def start(router: RunningRouter, out: Path, *more: str) -> asyncio.subprocess.Process:
        process = await asyncio.create_subprocess_exec(
            *COMMAND, router.address, "--out", str(out), *more,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        running.append(process)
        assert process.stderr is not None
        async with asyncio.timeout(60):
            line = await process.stderr.readline()
        assert line.startswith(b"recording"), line
        return process

    yield start
    for process in running:
        if process.returncode is None:
            process.kill()
            await process.communicate()


async def has_read(process: asyncio.subprocess.Process) -> None:
    """It has taken in what it was sent: again and again, each of its threads only waits.

    One that is behind because it finds no core is ready to run, and does not wait.
    """
    seen = 0

    def waits() -> bool:
        nonlocal seen
        states = []
        for each in Path(f"/proc/{process.pid}/task").glob("*/stat"):
            with contextlib.suppress(OSError):  # a thread that has ended
                states.append(each.read_text().rpartition(")")[2].split()[0])
        seen = seen + 1 if set(states) == {"S"} else 0
        return seen > 10

    await eventually(waits, "it has read all that it was sent")


async def generate(router: RunningRouter, ids: list[int]) -> None:
    async for _ in router.stub.Generate(generate_request(ids, max_tokens=5)):
        pass


async def test_a_trace_has_lengths_and_shared_prefixes_and_no_text(
    engines, routers, recording, tmp_path
):
    worker = await engines(StubWorker("a"))  # answers everything with the five tokens of hello
    router = await routers(worker)
    size = worker.info.block_tokens
    shared, own = list(range(1, 2 * size + 1)), list(range(50, 50 + size))
    out = tmp_path / "trace.jsonl"
    process = await recording(router, out, "--requests", "3")
    await generate(router, [*shared, *own])
    await generate(router, [*shared, 9])
    await router.stub.Route(route_request([*own, *own]))
    async with asyncio.timeout(60):
        stdout, _ = await process.communicate()
    assert process.returncode == 0
    assert b"3 requests" in stdout
    first, second, third = read_trace(out)
    assert (first.input_tokens, first.output_tokens) == (3 * size, len("hello"))
    assert (second.input_tokens, second.output_tokens) == (2 * size + 1, len("hello"))
    assert (third.input_tokens, third.output_tokens) == (2 * size, 0)
    assert first.blocks == (0, 1, 2)
    assert second.blocks == (0, 1)
    assert third.blocks == (3, 4)  # the same tokens after another prefix are other blocks
    assert {each.block_tokens for each in (first, second, third)} == {size}
    fields = [json.loads(line).keys() for line in out.read_text().splitlines()]
    known = {"timestamp", "input_length", "output_length", "hash_ids", "block_size"}
    assert all(keys <= known for keys in fields)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
async def test_what_was_recorded_is_kept_when_it_is_told_to_stop(
    engines, routers, recording, tmp_path, number
):
    router = await routers(await engines(StubWorker("a")))
    out = tmp_path / "trace.jsonl.gz"
    process = await recording(router, out)
    await generate(router, [1, 2, 3])
    await generate(router, [1, 2, 3])
    second = await recording(router, tmp_path / "other.jsonl", "--requests", "1")
    await generate(router, [4])
    async with asyncio.timeout(60):
        await second.communicate()  # so the first has been told of three as well
    await has_read(process)
    process.send_signal(number)
    async with asyncio.timeout(60):
        await process.communicate()
    assert process.returncode == 0
    assert 2 <= len([*read_trace(out)]) <= 3


async def test_no_number_of_signals_loses_what_was_recorded(engines, routers, recording, tmp_path):
    """Requests are held back to be sorted; a signal while they are written leaves them all there.

    A second reader has been told of each request when the signals begin: so has this one.
    """
    router = await routers(await engines(StubWorker("a")))
    out, count = tmp_path / "trace.jsonl", 200
    process = await recording(router, out)
    second = await recording(router, tmp_path / "other.jsonl", "--requests", str(count))
    for _ in range(count):
        await generate(router, [1, 2, 3])
    async with asyncio.timeout(60):
        await second.communicate()
    await has_read(process)
    ended = asyncio.create_task(process.communicate())
    async with asyncio.timeout(60):
        while not ended.done():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGINT)
            await asyncio.wait([ended], timeout=0.002)
    assert count - 1 <= len([*read_trace(out)]) <= count  # it may well die of one when it is done


async def test_a_fifth_reader_is_refused_and_a_place_is_free_again_afterwards(
    engines, routers, recording, tmp_path
):
    router = await routers(await engines(StubWorker("a")))
    four = [await recording(router, tmp_path / f"{n}") for n in range(4)]
    fifth = await asyncio.create_subprocess_exec(
        *COMMAND, router.address, "--out", str(tmp_path / "x"), stderr=asyncio.subprocess.PIPE
    )
    async with asyncio.timeout(60):
        _, stderr = await fifth.communicate()
    assert fifth.returncode == 2
    assert b"4 readers record already" in stderr
    for process in four:
        process.send_signal(signal.SIGINT)
        async with asyncio.timeout(60):
            await process.communicate()
    again = await recording(router, tmp_path / "again", "--requests", "1")
    await generate(router, [1])
    async with asyncio.timeout(60):
        await again.communicate()
    assert again.returncode == 0


def test_larger_blocks_are_named_by_their_last() -> None:
    keys = [bytes([n]) for n in range(7)]
    request = Numbering(64).request(1.0, (230, 4), keys, 32)
    assert request == Request(1.0, 230, 4, (0, 1, 2), 64)


@pytest.mark.parametrize("wanted", [16, 48])
def test_blocks_that_do_not_fit_are_refused(wanted: int) -> None:
    with pytest.raises(Exception, match=rf"--block-tokens is {wanted}, must be a multiple of 32"):
        Numbering(wanted).request(1.0, (230, 4), [], 32)


def test_requests_that_end_in_another_order_are_sorted() -> None:
    ends = [Request(at, 1, 1, ()) for at in (103.0, 100.0, 101.0, 900.0, 102.5, 901.0)]
    assert [each.at_s for each in in_order(ends)] == [0.0, 1.0, 3.0, 3.0, 800.0, 801.0]
