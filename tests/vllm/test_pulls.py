"""Two nodes with vLLM: what one computed the other loads from it, and answers the same."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from kvtier.wire.pb import feed_pb2, worker_pb2
from tests.launching import wait_for
from tests.vllm.driver import BLOCK, ROW
from tests.vllm.service import Service, worker_toml

HOST = feed_pb2.TIER_HOST


@pytest.fixture(scope="module")
def service(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    folder = tmp_path_factory.mktemp("pulls")
    (folder / "red").write_text("the secret of red, long enough")

    def settings(at: Path) -> str:
        more = f'socket = "{at}/node.sock"\nvram_bytes = {400 * ROW}\nwait_s = 30.0\n'
        more += f'tenants = [{{ name = "red", secret_file = "{folder}/red" }}]\n'
        return worker_toml("vllm", model, more)

    it = Service(folder, {"a": settings, "b": settings}, lends=True)
    yield it
    it.close()


def whole(prompt: list[int]) -> int:
    """Tokens that may come from a cache: the last one is always computed."""
    return (len(prompt) - 1) // BLOCK * BLOCK


def wait_for_source(service: Service, prompt: list[int], **space: str) -> None:
    """Return when the router would have b load all full blocks from a."""
    wanted = ("a", len(prompt) // BLOCK * BLOCK)
    wait_for("the router to name a", lambda: service.source(prompt, "b", **space) == wanted)


def test_the_first_answer_of_a_node_goes_on_where_another_one_was(service, prompts):
    prompt = prompts[0]
    assert service.direct["b"].Describe(worker_pb2.DescribeRequest(), timeout=60).pulls
    _, started = service.told("a", prompt)
    assert started.computed_tokens == len(prompt)
    warm, started = service.told("a", prompt)  # as the other node will: from a block's end on
    assert started.computed_tokens == len(prompt) - whole(prompt)
    wait_for_source(service, prompt)
    answer, started = service.told("b", prompt, source="a")
    assert started.pulled_tokens == whole(prompt)
    assert {each.tier: each.tokens for each in started.restored} == {HOST: whole(prompt)}
    assert started.computed_tokens == len(prompt) - whole(prompt)
    assert answer == warm


def test_a_tenants_blocks_are_pulled_for_it_alone(service, prompts):
    prompt = prompts[1]
    service.told("a", prompt, tenant="red")
    warm, started = service.told("a", prompt, tenant="red")
    assert started.computed_tokens == len(prompt) - whole(prompt)
    wait_for_source(service, prompt, tenant="red")
    _, started = service.told("b", prompt, source="a")
    assert (started.pulled_tokens, started.computed_tokens) == (0, len(prompt))
    answer, started = service.told("b", prompt, source="a", tenant="red")
    assert started.pulled_tokens == whole(prompt)
    assert answer == warm


def test_a_source_that_is_gone_is_no_obstacle(service, prompts):
    prompt = prompts[2]
    service.told("a", prompt)
    service.nodes["a"].kill()
    answer, started = service.told("b", prompt, source="a")
    assert (started.pulled_tokens, started.computed_tokens) == (0, len(prompt))
    assert answer
