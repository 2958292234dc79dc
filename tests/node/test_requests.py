"""How the daemon takes in requests: bytes, paths, when it looks for notes, and what waits."""

import asyncio
import os
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvtier.core.blocks import KEY_NBYTES, BlockKey
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.errors import RemoteProtocolError
from kvtier.node.gate import RECEIVE_NBYTES
from kvtier.node.notes import Hearing, Notes
from kvtier.node.reading import MAX_REMEMBERED, Paths
from kvtier.node.soon import Soon
from kvtier.wire import local
from kvtier.wire.local import Op
from tests.launching import DEADLINE_S, Process, node_toml
from tests.node.conftest import LAYOUT, new_keys, restore, save
from tests.node.test_hung_disk import until

KEYS = new_keys(6)


# --- paths ----------------------------------------------------------------------------


@given(st.lists(st.lists(st.sampled_from(KEYS), max_size=6), max_size=12))
def test_whatever_was_sent_before_a_path_is_what_it_says(paths: list[list[BlockKey]]) -> None:
    of_one_engine = Paths()
    for path in paths:
        keys = of_one_engine.keys(local.pack_keys(path))
        assert keys == path
        keys.clear()  # whose list it is now


def test_the_keys_of_a_path_that_goes_on_are_the_same_objects() -> None:
    paths, path = Paths(), local.pack_keys(new_keys(9))
    first = paths.keys(path[: 5 * KEY_NBYTES])
    longer, shorter = paths.keys(path), paths.keys(path[: 2 * KEY_NBYTES])
    assert all(one is other for one, other in zip(longer, first, strict=False))
    assert all(one is other for one, other in zip(shorter, first, strict=False))
    assert all(one is other for one, other in zip(paths.keys(path), longer, strict=True))


def test_of_a_long_path_only_so_much_is_remembered() -> None:
    paths, path = Paths(), new_keys(MAX_REMEMBERED + 3)
    for end in (MAX_REMEMBERED + 2, MAX_REMEMBERED + 3, MAX_REMEMBERED, 1):
        assert paths.keys(local.pack_keys(path[:end])) == path[:end]
        assert len(paths._keys) <= MAX_REMEMBERED
        assert len(paths._raw) <= MAX_REMEMBERED * KEY_NBYTES


@pytest.mark.parametrize("odd", [1, KEY_NBYTES - 1, 3 * KEY_NBYTES + 1, 9 * KEY_NBYTES + 5])
def test_half_a_key_is_refused_behind_every_path(odd: int) -> None:
    path = local.pack_keys(new_keys(10))
    for sent in (b"", path[: 4 * KEY_NBYTES], path):
        paths = Paths()
        paths.keys(sent)
        with pytest.raises(RemoteProtocolError, match=f"^{odd} bytes of keys: must be a multiple"):
            paths.keys(path[:odd])
        assert paths.keys(path) == local.unpack_keys(path)


def test_paths_that_share_a_beginning_are_told_apart(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path, host="4MiB"), tmp_path):  # 128 blocks
        client = TierClient(f"{tmp_path}/node.sock", LAYOUT)
        begin, one, other = new_keys(20), new_keys(20), new_keys(20)
        for end, new in ((10, 10), (20, 10), (40, 20)):
            assert save(client, [*begin, *one][:end]) == new
        assert client.match([*begin, *other]).blocks == 20
        assert save(client, [*begin, *other]) == 20
        assert client.match([*begin, *one, *new_keys(1)]).blocks == 40
        assert client.match(begin[:7]).blocks == 7
        assert client.match([*begin[:7], *new_keys(20)]).blocks == 7
        for path in ([*begin, *one], [*begin, *other]):
            assert restore(client, path) == [Tier.HOST] * 40
        client.close()


# --- bytes ----------------------------------------------------------------------------


class Engine:
    """One that says what it is told to, in the pieces that it is told."""

    def __init__(self, raw: socket.socket) -> None:
        self._raw, self._decoder = raw, local.Decoder()
        raw.sendall(local.encode(Op.HELLO, local.VERSION, LAYOUT.describe(), "test"))
        hello, fds, _, _ = socket.recv_fds(raw, 65536, 2)
        ((self.greeted, *_),) = self._decoder.feed(hello)
        for fd in fds:
            os.close(fd)

    def send(self, piece: bytes) -> None:
        self._raw.sendall(piece)

    def answers(self, count: int) -> list[list[local.Value]]:
        found: list[list[local.Value]] = []
        while len(found) < count:
            data = self._raw.recv(65536)
            assert data, f"hung up after {found}"
            found += self._decoder.feed(data)
        return found


@contextmanager
def engine(folder: Path) -> Iterator[Engine]:
    with socket.socket(socket.AF_UNIX) as raw:
        raw.settimeout(DEADLINE_S)
        raw.connect(f"{folder}/node.sock")
        yield Engine(raw)


def cut(wire: bytes, *ends: int) -> Sequence[bytes]:
    return [wire[at:end] for at, end in zip((0, *ends), (*ends, len(wire)), strict=True)]


MATCH = local.encode(Op.MATCH, local.pack_keys(KEYS))
CREDIT, USED = local.encode(Op.CREDIT, 40), local.encode(Op.USED, local.pack_keys(KEYS), 0, -1)
LONG = local.encode(Op.MATCH, local.pack_keys([*KEYS, *new_keys(RECEIVE_NBYTES // 5)]))


@pytest.mark.parametrize(
    ("pieces", "credit"),
    [
        ([MATCH], 0),
        (cut(MATCH, 2), 0),
        (cut(MATCH, 4, 20), 0),
        ([MATCH[at : at + 1] for at in range(len(MATCH))], 0),
        ([USED + CREDIT + MATCH], 1),
        (cut(CREDIT + USED + MATCH, 3, len(CREDIT) + 7), 1),
        ([CREDIT + CREDIT + MATCH[:-1], MATCH[-1:]], 2),
        ([LONG], 0),
        ([CREDIT + LONG[:5], LONG[5:]], 1),
    ],
)
def test_requests_are_understood_however_they_are_cut(
    tmp_path: Path, pieces: Sequence[bytes], credit: int
) -> None:
    with Process("node", node_toml(tmp_path), tmp_path):
        client = TierClient(f"{tmp_path}/node.sock", LAYOUT)
        save(client, KEYS)
        with engine(tmp_path) as it:
            assert it.greeted
            for _ in range(2):  # nothing of the first is left over
                for piece in pieces:
                    it.send(piece)
                *told, answer = it.answers(credit + 1)
                assert told == [[Op.CREDIT, b""]] * credit, "there are not so many"
                assert answer[:2] == [True, len(KEYS)]
        client.close()


# --- when notes are looked for --------------------------------------------------------


class Noted:
    """An engine as `Hearing` sees it."""

    def __init__(self, hearing: Hearing) -> None:
        self.notes, self.heard = Notes(), b""
        hearing.listen(self.notes.fd, self)

    def hear(self) -> None:
        self.heard += bytes(self.notes.read())

    def note(self, word: bytes) -> None:
        os.write(self.notes.write_fd, word)

    async def has(self, words: bytes) -> None:
        await until(f"{words!r}", lambda: self.heard == words)

    def close(self, hearing: Hearing) -> None:
        hearing.leave(self)
        self.notes.given()
        self.notes.close()


async def test_a_note_is_heard_by_itself_however_many_requests_came_before() -> None:
    hearing = Hearing()
    one, other = Noted(hearing), Noted(hearing)
    for number in range(60):
        hearing.now()
        one.note(b"%d" % (number % 10))
        hearing.now()
        assert one.heard == b"0123456789" * (number // 10) + b"0123456789"[: number % 10 + 1]
        await asyncio.sleep(0.001)  # some come when it is nearly time to look, some at once
    one.heard = b""
    for words in (b"a", b"ab", b"abc"):
        one.note(words[-1:])
        await one.has(words)
    other.note(b"x")
    one.note(b"d")
    await one.has(b"abcd")
    assert other.heard == b"x", "of all engines at once"
    hearing.leave(one)
    one.note(b"e")
    hearing.now()
    assert one.heard == b"abcd", "it has left"
    for each in (one, other):
        each.close(hearing)


async def test_notes_are_looked_for_as_long_as_anybody_may_note_something() -> None:
    hearing = Hearing()
    assert hearing._due is None
    one = Noted(hearing)
    due = hearing._due
    assert due is not None
    other = Noted(hearing)
    assert hearing._due is due, "once for all"
    one.close(hearing)
    assert hearing._due is due, "the other one may still note something"
    other.close(hearing)
    assert due.cancelled()
    assert hearing._due is None


# --- what waits for the answer --------------------------------------------------------


async def test_work_waits_for_the_answer_and_never_for_longer() -> None:
    soon, done = Soon(), []
    soon.hold()
    soon(lambda: done.append("held"))
    await asyncio.sleep(0)
    assert not done, "the answer is not given yet"
    soon.now()
    assert done == ["held"]
    soon(lambda: done.append("by itself"))
    await until("the loop's next turn", lambda: len(done) == 2)
    soon.hold()
    soon(lambda: soon(lambda: done.append("of work")))
    soon(lambda: done.append("more"))
    soon.now()
    await until("what work has left", lambda: len(done) == 4)


async def test_a_bug_in_what_waits_loses_nothing_else_that_waits() -> None:
    soon, done = Soon(), []

    def fails() -> None:
        raise ArithmeticError

    soon.hold()
    for work in (fails, lambda: done.append(1), fails, lambda: done.append(2), fails):
        soon(work)
    for _ in range(3):
        with pytest.raises(ArithmeticError):
            soon.now()
    assert sorted(done) == [1, 2]
