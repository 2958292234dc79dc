"""The list of peers, and the file that it comes from."""

import errno
import logging
import os
from pathlib import Path

import pytest

from kvtier.config import Config, PeerConfig, PeersConfig, write_peers
from kvtier.node.peer import Order, Peer, Result
from kvtier.node.roster import Roster
from kvtier.wire.access import Access
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
