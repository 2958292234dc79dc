"""Slots on credit of a real daemon: filled first, and put without waking anybody."""

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from kvtier.core.blocks import BlockKey
from kvtier.core.tiers import Tier
from kvtier.engine.client import TierClient
from kvtier.errors import RemoteProtocolError
from kvtier.node.credit import SHARE
from kvtier.wire import local
from tests.launching import Process, disk_toml, node_toml, wait_for
from tests.node.conftest import (
    BLOCK,
    LAYOUT,
    blocks,
    content,
    new_keys,
    restore,
    save,
    status,
    wait_for_blocks,
)

CREDIT = 8
SLOTS = SHARE * CREDIT
HOST = f"{SLOTS * BLOCK}"


def connect(folder: Path) -> TierClient:
    return TierClient(f"{folder}/node.sock", LAYOUT)


def heard(client: TierClient) -> None:
    """Let the daemon act on all that this engine has told it, and say so."""
    client.match(new_keys(1))


def on_credit(client: TierClient, slots: int = CREDIT) -> None:
    """Ask for credit; it is there when this returns, if the daemon gives any."""
    with client.write(new_keys(1)) as lease:
        client.ask_credit(slots)
        lease.filled = 0
    heard(client)


def put(client: TierClient, path: Sequence[BlockKey], first: int = 0) -> None:
    """Save the blocks path[first:] without a question."""
    with client.write(path, first) as lease:
        assert lease.id == 0, "it was asked for"
        for index, slot in zip(lease.indexes, lease.slots, strict=True):
            client.arena.slot(slot)[:] = content(path[index])
        lease.filled = len(lease.slots)


def test_what_was_put_any_engine_finds_and_the_credit_is_made_up_for(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path, host=HOST), tmp_path) as node:
        one, two = connect(tmp_path), connect(tmp_path)
        on_credit(one)
        paths = [new_keys(CREDIT) for _ in range(2 * SHARE)]
        for path in paths:
            put(one, path)
            assert restore(two, path) == [Tier.HOST] * CREDIT
            heard(one)
        assert blocks(node)[Tier.HOST] == SLOTS - CREDIT, "full, but for what is on credit"
        assert sum(two.match(path).blocks for path in paths) == SLOTS - CREDIT
        one.close()
        two.close()


def test_the_rest_of_a_path_is_put_below_what_is_there(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path, host=HOST), tmp_path) as node:
        one, two = connect(tmp_path), connect(tmp_path)
        path = new_keys(7)
        save(two, path[:3])
        on_credit(one)
        put(one, path[:5], 2)  # one of them is there
        with one.write(path, 5) as lease:
            one.arena.slot(lease.slots[0])[:] = content(path[5])
            lease.filled = 1  # of two
        heard(one)
        assert restore(two, path) == [Tier.HOST] * 6
        assert blocks(node)[Tier.HOST] == 6
        put(one, [*path[:6], *new_keys(CREDIT)], 6)  # all of its credit
        assert blocks(node)[Tier.HOST] == 6 + CREDIT
        one.close()
        two.close()


def test_a_path_too_long_for_the_pipe_is_told_all_the_same(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path, host=HOST), tmp_path):
        one, two = connect(tmp_path), connect(tmp_path)
        path = new_keys(local.MAX_NOTE // 16 + 1)
        on_credit(one)
        put(one, path, len(path) - 2)
        put(one, path[:3], 1)
        put(one, path[:1])
        assert restore(two, path) == [Tier.HOST] * 3
        assert two.match(path[-2:]).blocks == 2
        one.close()
        two.close()


LONG = 4096 // 16 + 1  # blocks of a path that is longer than a page


def test_no_request_sees_the_world_as_it_was_before_a_long_path_was_put(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path, host=HOST), tmp_path) as node:
        one, two = connect(tmp_path), connect(tmp_path)
        on_credit(one, CREDIT // 2)
        on_credit(two, CREDIT // 2)
        for writer, reader in [(one, two), (two, one)] * 5:
            path = new_keys(LONG)
            heard(writer)
            heard(reader)
            os.kill(node.pid, signal.SIGSTOP)
            try:
                put(writer, path, LONG - 2)
                reader._send(local.Op.MATCH, local.pack_keys(path[-2:]))
            finally:
                os.kill(node.pid, signal.SIGCONT)
            assert reader._answer(60.0, local.Op.MATCH)[0] == 2
        one.close()
        two.close()


@pytest.mark.parametrize("length", [2, LONG, local.MAX_NOTE // 16 + 1])
def test_an_engine_that_died_had_saved_all_that_it_had_told(tmp_path: Path, length: int) -> None:
    """Also what was told behind words that have an answer, which it no longer hears."""
    with Process("node", node_toml(tmp_path, host=HOST), tmp_path) as node:
        one, two = connect(tmp_path), connect(tmp_path)
        on_credit(one)
        short, path, other = new_keys(2), new_keys(length), new_keys(length)
        heard(two)
        os.kill(node.pid, signal.SIGSTOP)
        try:
            put(one, short)
            put(one, path, length - 2)
            put(one, other, length - 2)
            one.close()
        finally:
            os.kill(node.pid, signal.SIGCONT)
        wait_for("it is gone", lambda: status(node).clients == 1)
        found = [two.match(each[-2:]).blocks for each in (short, path, other)]
        assert found == [2, 2, 2]
        assert save(two, new_keys(SLOTS)) == SLOTS, "every slot can be had"
        two.close()


def test_all_engines_together_have_a_share_of_the_arena_and_it_comes_back(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path, host=HOST), tmp_path) as node:
        one, two = connect(tmp_path), connect(tmp_path)
        on_credit(one)
        on_credit(two, 1)
        with two.write(new_keys(1)) as lease:
            assert lease.id, "nothing was left for it"
        assert save(two, new_keys(SLOTS)) == SLOTS - CREDIT
        one.close()
        wait_for("it is gone", lambda: status(node).clients == 1)
        assert save(two, new_keys(SLOTS)) == SLOTS
        two.close()


def test_a_save_that_fails_puts_nothing_and_keeps_its_slots(tmp_path: Path) -> None:
    with Process("node", node_toml(tmp_path, host=HOST), tmp_path) as node:
        client = connect(tmp_path)
        on_credit(client)
        with pytest.raises(ZeroDivisionError), client.write(new_keys(CREDIT)):
            raise ZeroDivisionError
        put(client, new_keys(CREDIT))
        heard(client)
        assert blocks(node)[Tier.HOST] == CREDIT
        client.close()


@pytest.mark.parametrize("told", [True, False])
def test_an_engine_killed_has_saved_what_it_had_put_and_nothing_else(
    tmp_path: Path, told: bool
) -> None:
    keys = new_keys(CREDIT)
    code = f"""
import os
from pathlib import Path
from tests.node.test_credit import connect, content, on_credit
client = connect(Path({str(tmp_path)!r}))
on_credit(client)
keys = {keys!r}
with client.write(keys) as lease:
    for index, slot in zip(lease.indexes, lease.slots):
        client.arena.slot(slot)[:] = content(keys[index])
    if not {told}:
        os.kill(os.getpid(), 9)
    lease.filled = len(lease.slots)
os.kill(os.getpid(), 9)
"""
    with Process("node", node_toml(tmp_path, host=HOST), tmp_path) as node:
        done = subprocess.run([sys.executable, "-c", code], timeout=120, check=False)
        assert done.returncode == -signal.SIGKILL
        wait_for("the engine is gone", lambda: status(node).clients == 0)
        client = connect(tmp_path)
        assert restore(client, keys) == [Tier.HOST] * CREDIT * told
        assert save(client, new_keys(SLOTS)) == SLOTS, "every slot can be had"
        client.close()


def test_what_was_put_goes_down_without_a_request(tmp_path: Path) -> None:
    toml = node_toml(tmp_path, host=HOST, more=disk_toml(tmp_path))
    with Process("node", toml, tmp_path) as node:
        client = connect(tmp_path)
        on_credit(client)
        put(client, new_keys(CREDIT))
        wait_for_blocks(node, Tier.DISK, CREDIT)
        client.close()


@pytest.mark.parametrize(
    ("raw", "said"),
    [
        (local.encode(local.Op.PUT, b"k" * 16, bytes(4), 0, -1), "not on credit"),
        (local.encode(local.Op.PUT, b"", bytes(4), 0, -1), "not on credit"),
        (local.encode(local.Op.PUT, b"k" * 16, b"abc", 0, -1), "multiple of 4"),
        (local.encode(local.Op.CREDIT, 0), "CREDIT of 0 slots"),
        (local.encode(local.Op.CREDIT, 1 << 40), "slots: 1 to"),
    ],
)
def test_an_engine_that_puts_what_it_has_not_is_refused(
    tmp_path: Path, raw: bytes, said: str
) -> None:
    with Process("node", node_toml(tmp_path, host=HOST), tmp_path) as node:
        good, bad = connect(tmp_path), connect(tmp_path)
        keys = new_keys(2)
        save(good, keys)
        with bad.read(keys):
            os.write(bad._notes, raw)
            with pytest.raises(RemoteProtocolError, match=said):
                bad.match(keys)
        wait_for("it is gone", lambda: status(node).clients == 1)
        assert restore(good, keys) == [Tier.HOST] * 2
        good.close()
        bad.close()
