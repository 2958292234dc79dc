"""The list of peers, and the file that it comes from."""

import asyncio
import errno
import logging
import os
from pathlib import Path

import pytest

from kvtier import metrics
from kvtier.arena import Arena
from kvtier.config import Config, PeerConfig, PeersConfig, write_peers
from kvtier.core.tiers import Tier, TierSpec
from kvtier.node.manager import TierManager
from kvtier.node.peer import Order, Peer, Result
from kvtier.node.peers import Peers
from kvtier.node.reading import Reading
from kvtier.node.roster import Roster
from kvtier.wire.access import Access
from tests.launching import DEADLINE_S, fixed_ports
from tests.node.conftest import BLOCK, LAYOUT, new_keys
from tests.node.nodes import WAIT_S


def plain(node: str, address: str) -> Peer:
    return Peer(node, address, Access(Config(), serving=False))


def test_a_file_that_could_not_be_read_counts_once_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "peers.json"
    write_peers(str(path), [PeerConfig(node="a", address="h:1")])
    roster = Roster(PeersConfig(file=str(path)), "b", plain)

    def refuse(_: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    with caplog.at_level(logging.WARNING):
        monkeypatch.setattr(Path, "read_bytes", refuse)
        assert [roster.get("a") for _ in range(3)] == [None] * 3
        assert caplog.text.count("Permission denied") == 1, "said once"
        monkeypatch.undo()  # as after a chmod
        known = roster.get("a")
        assert known is not None
        assert known.peer.address == "h:1"
    roster.close()


@pytest.mark.parametrize("host", ["a..b", "x" * 64])
def test_a_name_that_no_host_can_have_is_a_failure_like_any(host: str) -> None:
    peer = plain("a", f"{host}:7461")
    places = [memoryview(bytearray(BLOCK))]
    fetched = peer.fetch(Order(LAYOUT, new_keys(1), 0, places, lossy=False), WAIT_S)
    assert fetched.result is Result.FAILED
    assert "is no name of a host" in fetched.why
    peer.close()


async def test_a_bug_of_ours_while_a_peer_is_tried_again_does_not_leave_it_alone_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (port,) = fixed_ports(1)  # nobody listens there
    member = PeerConfig(node="a", address=f"127.0.0.1:{port}")
    config = Config(peers=PeersConfig(members=(member,), retry_s=0.05))
    peers = Peers(config.peers, "b", Access(config, serving=False), {})
    tiers = [TierSpec(tier=Tier.HOST, capacity=4 * BLOCK, drain_at=0)]
    manager = TierManager(LAYOUT, Arena.create(BLOCK, 4), tiers, [], lambda _: None)

    def failed() -> float:
        return metrics.PEER_PULLS.labels(Result.FAILED)._value.get()

    async def pull() -> None:
        keys = new_keys(1)
        await peers.pull(manager, Reading(1, keys, 0, 1, DEADLINE_S), "a")

    async def fails_anew() -> None:
        before = failed()
        while failed() == before:
            await pull()
            await asyncio.sleep(0.01)

    def bug(*_: object) -> None:
        raise ZeroDivisionError

    async with asyncio.timeout(DEADLINE_S):
        for _ in range(3):
            await fails_anew()
        monkeypatch.setattr(Peer, "connect", bug)
        with pytest.raises(ZeroDivisionError):
            await fails_anew()
        monkeypatch.undo()
        await fails_anew()
    await peers.close()
    await manager.close()
