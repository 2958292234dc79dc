"""What a save has told is there for whoever asks afterwards, also of a very long path."""

import os
import signal
from pathlib import Path

import pytest

from kvtier.engine.client import TierClient
from kvtier.wire.local import Op, pack_keys
from tests.launching import Process, node_toml
from tests.node.conftest import LAYOUT, new_keys


@pytest.mark.parametrize("blocks", [3000, 6000])
def test_a_put_of_a_long_path_is_heard_before_a_later_request(tmp_path: Path, blocks: int) -> None:
    with Process("node", node_toml(tmp_path, host="64MiB"), tmp_path) as node:
        one, two = (TierClient(f"{tmp_path}/node.sock", LAYOUT) for _ in range(2))
        with one.write(new_keys(1)) as lease:
            one.ask_credit(32)
            lease.filled = 1
        one.match(new_keys(1))
        keys = new_keys(blocks)
        os.kill(node.pid, signal.SIGSTOP)  # as a daemon that is busy for a moment
        with one.write(keys, blocks - 16) as lease:
            lease.filled = len(lease.slots)
        two._send(Op.MATCH, pack_keys(keys[-16:]))
        os.kill(node.pid, signal.SIGCONT)
        blocks_found = two._answer(120.0, Op.MATCH)[0]
        assert blocks_found == 16
        one.close()
        two.close()
