"""What vLLM answers from restored KV is what it answers from its own prefix cache.

Each answer is compared with that of a device-prefix hit with the same boundary: another split of
a prefill gives other last bits in bfloat16, with or without kvtier.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.wire.pb import feed_pb2
from tests.launching import disk_toml, redis_toml, wait_for
from tests.vllm.conftest import Node
from tests.vllm.driver import BLOCK, Engine, transfer

HOST = feed_pb2.TIER_HOST
PATIENT = {"lookup_s": 30.0, "load_s": 30.0, "store_s": 50.0}  # slow machines are no misses here
Answers = list[list[int]]


def start(model: Path, folder: Path, node: Node, *, cpu_blocks: int = 96) -> Engine:
    return Engine(model, folder, transfer(node.socket, cpu_blocks=cpu_blocks, **PATIENT))


@pytest.fixture(scope="module")
def first(model: Path, folder: Path, node: Node) -> Iterator[Engine]:
    with start(model, folder, node) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(first: Engine, node: Node, prompts: Answers) -> dict[str, Answers]:
    """Of each salt, the answers from VRAM; all prompts are in every tier by then."""
    found = {}
    for salt in ("", "tenant"):
        cold = first.answers(prompts, salt=salt)
        assert [cached for _, cached in cold] == [0] * len(prompts), "a salt shares nothing"
        # One by one: then every hit goes as deep as it can.
        warm = [first.answers([each], salt=salt)[0] for each in prompts]
        assert all(
            cached >= whole(each) - BLOCK for (_, cached), each in zip(warm, prompts, strict=True)
        )
        found[salt] = [ids for ids, _ in warm]
        # One salt after the other: vLLM drops stores that take more than a part of its region.
        node.settled(len(found) * sum(whole(each) // BLOCK for each in prompts))
    return found


def whole(prompt: list[int]) -> int:
    """Tokens of a prompt that a cache can give: full blocks, and not the last token."""
    return (len(prompt) - 1) // BLOCK * BLOCK


def check(engine: Engine, prompts: Answers, expected: dict[str, Answers]) -> None:
    """Every prompt with every salt, one by one: restored, and the same answer."""
    for salt, answers in expected.items():
        for prompt, answer in zip(prompts, answers, strict=True):
            ((ids, cached),) = engine.answers([prompt], salt=salt)
            assert cached == whole(prompt), engine.metrics()
            assert ids == answer


def test_its_own_region_after_reset_prefix_cache(first, prompts, expected):
    first.forget(all_of_vllm=False)
    check(first, prompts, expected)


def test_from_host(first, prompts, expected):
    before = first.metrics().get("vllm:kvtier_blocks load ok", 0)
    first.forget()
    check(first, prompts, expected)
    assert first.metrics()["vllm:kvtier_blocks load ok"] > before


def test_from_disk(first, node, prompts, expected):
    first.forget()
    node.clear(HOST)
    check(first, prompts, expected)


def test_all_at_once_through_a_tiny_region(first, node, prompts, expected):
    first.forget()
    assert first.generate(prompts, salt="tenant") == expected["tenant"]
    first.forget()
    many = [prompts[n % len(prompts)] for n in range(12)]
    assert first.generate(many) == [expected[""][n % len(prompts)] for n in range(12)]


def test_a_second_engine_that_never_saw_the_prompts(first, model, folder, node, prompts, expected):
    # With little VRAM: what it restores it must give up again, and running requests too.
    config = transfer(node.socket, cpu_blocks=24, **PATIENT)
    with Engine(model, folder, config, num_gpu_blocks_override=40, max_model_len=1024) as second:
        check(second, prompts, expected)
        answers = second.answers([prompts[n % len(prompts)] for n in range(8)])
        assert [ids for ids, _ in answers] == [expected[""][n % len(prompts)] for n in range(8)]
        assert second.said("keys sha256_cbor")


@pytest.fixture(scope="module")
def third(first: Engine, model: Path, folder: Path, node: Node) -> Iterator[Engine]:
    """A new engine on a new daemon; of the old ones only disk and Redis are left."""
    first.close()
    node.replace(disk_toml(folder, "1GiB"))
    with start(model, folder, node) as engine:
        yield engine


def test_from_disk_after_a_restart_of_engine_and_daemon(third, prompts, expected):
    check(third, prompts, expected)


def test_from_redis_on_a_node_that_has_nothing(third, node, prompts, expected):
    third.forget()
    node.replace(redis_toml(node.valkey.url, 60.0))
    # The engine finds the new daemon at its next try.
    wait_for("the new daemon", lambda: third.answers(prompts[:1])[0][1] or third.forget())
    third.forget()
    check(third, prompts, expected)
