"""Two tenants of a whole service: a daemon, a worker and a router in processes of their own."""

import random
from contextlib import ExitStack
from pathlib import Path

import grpc
import pytest

from kvtier.wire.pb import feed_pb2, router_pb2, router_pb2_grpc
from tests.launching import Process, node_toml, wait_for
from tests.processes.conftest import VOCAB

TOKENS = 100  # six whole blocks of 16
WARM = 96
VRAM, HOST = feed_pb2.TIER_VRAM, feed_pb2.TIER_HOST


def test_a_tenant_finds_its_blocks_again_after_a_kill_and_the_other_finds_none(
    tmp_path: Path, tiny_folder: Path
) -> None:
    tenants = ""
    for name in ("red", "blue"):
        (tmp_path / name).write_text(f"the secret of {name} alone")
        tenants += f'{{ name = "{name}", secret_file = "{tmp_path / name}" }},'
    worker_toml = f"""
[worker]
model = "{tiny_folder}"
node = "a"
socket = "{tmp_path}/node.sock"
listen = "127.0.0.1:0"
device = "cpu"
block_tokens = 16
threads = 1
tenants = [{tenants}]
"""
    rng = random.Random(1)
    ids = [rng.randrange(3, VOCAB) for _ in range(TOKENS)]
    prompt = router_pb2.Prompt(tokens=router_pb2.TokenIds(ids=ids))
    with ExitStack() as stack:
        node = stack.enter_context(Process("node", node_toml(tmp_path), tmp_path))
        worker = stack.enter_context(Process("worker", worker_toml, tmp_path))
        router = stack.enter_context(
            Process("router", '[router]\nlisten = "127.0.0.1:0"', tmp_path)
        )
        channel = stack.enter_context(grpc.insecure_channel(router.address))
        stub = router_pb2_grpc.RouterStub(channel)

        def follow() -> None:
            member = router_pb2.Member(
                node="a", daemon_address=node.address, worker_address=worker.address
            )
            stub.SetMembers(router_pb2.Members(members=[member]), timeout=60)
            watch = stub.Watch(router_pb2.WatchMembersRequest(), timeout=60)
            next(each for each in watch if [m.state for m in each.members] == ["ready"])
            watch.cancel()

        def warm(tenant: str) -> dict[int, int]:
            """What the router says that the worker has of the prompt."""
            request = router_pb2.RouteRequest(prompt=prompt, tenant=tenant)
            (choice,) = stub.Explain(request, timeout=60).choices
            return {each.tier: each.tokens for each in choice.warm}

        def restored(tenant: str) -> dict[int, int]:
            """What the worker had of it, as it was asked."""
            request = router_pb2.GenerateRequest(
                prompt=prompt, tenant=tenant, max_tokens=2, ignore_eos=True
            )
            parts = list(stub.Generate(request, timeout=60))
            (started,) = (part.started for part in parts if part.HasField("started"))
            return {each.tier: each.tokens for each in started.restored if each.tokens}

        follow()
        assert restored("red") == {}
        wait_for("the router to know it", lambda: warm("red") == {VRAM: WARM})
        assert warm("blue") == warm("") == {}
        assert restored("blue") == {}
        assert restored("red") == {VRAM: WARM}

        worker.kill()
        worker.restart()
        follow()
        wait_for("what the daemon holds to be known", lambda: warm("red") == {HOST: WARM})
        assert warm("") == {}
        assert restored("") == {}
        assert restored("red") == {HOST: WARM}
        with pytest.raises(grpc.RpcError, match="tenant 'green' is not known to any worker"):
            restored("green")
