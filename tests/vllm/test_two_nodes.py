"""Two nodes with vLLM: tenants and LoRA adapters are kept apart by the engines, and named alike by
engines and router; and what one node computed the other loads from it, and answers the same.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
import torch
from safetensors.torch import save_file

from kvtier.wire.pb import feed_pb2, worker_pb2
from tests.launching import wait_for
from tests.vllm.driver import BLOCK, ROW
from tests.vllm.service import Service, worker_toml

VRAM, HOST = feed_pb2.TIER_VRAM, feed_pb2.TIER_HOST
SPACES: list[dict[str, str]] = [
    {}, {"tenant": "red"}, {"tenant": "blue"}, {"adapter": "poet"},
    {"adapter": "poet", "tenant": "red"},
]  # fmt: skip


def lora(folder: Path) -> Path:
    """An adapter of SmolLM2-135M that changes what it says."""
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 64, "target_modules": ["q_proj", "v_proj"],
              "bias": "none", "task_type": "CAUSAL_LM", "lora_dropout": 0.0}  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    tensors = {}
    for layer in range(30):
        for name, width in (("q_proj", 576), ("v_proj", 192)):
            at = f"base_model.model.model.layers.{layer}.self_attn.{name}"
            tensors[f"{at}.lora_A.weight"] = torch.randn(8, 576) * 0.05
            tensors[f"{at}.lora_B.weight"] = torch.randn(width, 8) * 0.05
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@pytest.fixture(scope="module")
def service(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """Two nodes, each with an engine that takes two tenants and an adapter."""
    folder = tmp_path_factory.mktemp("spaces")
    poet = lora(folder / "poet")
    for name in ("red", "blue"):
        (folder / name).write_text(f"the secret of {name}, long enough")
    tenants = ", ".join(
        f'{{ name = "{n}", secret_file = "{folder}/{n}" }}' for n in ("red", "blue")
    )

    def settings(at: Path) -> str:
        more = f'''
socket = "{at}/node.sock"
vram_bytes = {400 * ROW}
wait_s = 30.0
tenants = [{tenants}]
adapters = [{{ name = "poet", path = "{poet}" }}]
'''
        return worker_toml("vllm", model, more)

    it = Service(folder, {"a": settings, "b": settings}, lends=True)
    yield it
    it.close()


def whole(prompt: list[int]) -> int:
    """Tokens of its full blocks."""
    return len(prompt) // BLOCK * BLOCK


def test_a_prompt_is_warm_for_its_own_space_only(service, prompts):
    prompt = prompts[0]
    first: list[tuple[list[int], str]] = []
    for space in SPACES:
        assert not service.warm(prompt, **space), "nothing of another space"
        ids, started, node = service.routed(prompt, **space)
        assert started.computed_tokens == len(prompt), f"{space} has found another's blocks"
        wait_for(
            "the router to hear",
            lambda space=space, node=node: (
                {n: service.warm(prompt, n, **space) for n in service.nodes}
                == {n: {VRAM: whole(prompt)} if n == node else {} for n in service.nodes}
            ),
        )
        first.append((ids, node))
    assert first[0][0] != first[3][0], "the adapter says something else"
    for space, (ids, node) in zip(SPACES, first, strict=True):
        again, started = service.told(node, prompt, **space)
        assert started.computed_tokens < 2 * BLOCK, f"{space} is warm where the router says so"
        assert again[:1] == ids[:1]


def test_and_so_it_is_in_the_tiers_below(service, prompts):
    prompt = prompts[0]
    wait_for("host memory", lambda: service.in_host(len(SPACES) * (len(prompt) // BLOCK)))
    warm = []
    for space in SPACES:
        node = next(n for n in service.nodes if service.warm(prompt, n, **space).get(VRAM))
        warm.append((node, service.told(node, prompt, **space)[0]))
    service.clear()
    for space, (node, before) in zip(SPACES, warm, strict=True):
        wait_for(
            "the router to hear",
            lambda space=space, node=node: (
                service.warm(prompt, node, **space) == {HOST: whole(prompt)}
            ),
        )
        ids, started = service.told(node, prompt, **space)
        assert {each.tier for each in started.restored} == {HOST}
        assert started.computed_tokens < 2 * BLOCK
        assert ids == before, "as from VRAM"


def test_a_space_that_nobody_serves_is_refused(service, prompts):
    for space, code in (
        ({"tenant": "green"}, grpc.StatusCode.PERMISSION_DENIED),
        ({"adapter": "clerk"}, grpc.StatusCode.NOT_FOUND),
    ):
        with pytest.raises(grpc.RpcError) as raised:
            service.ask(prompts[0], **space)
        assert raised.value.code() is code


def cacheable(prompt: list[int]) -> int:
    """Tokens of it that may come from a cache: the last one is always computed."""
    return (len(prompt) - 1) // BLOCK * BLOCK


def wait_for_source(service: Service, prompt: list[int], **space: str) -> None:
    """Return when the router would have b load all full blocks from a."""
    wanted = ("a", len(prompt) // BLOCK * BLOCK)
    wait_for("the router to name a", lambda: service.source(prompt, "b", **space) == wanted)


def test_the_first_answer_of_a_node_goes_on_where_another_one_was(service, prompts):
    prompt = prompts[3]
    assert service.direct["b"].Describe(worker_pb2.DescribeRequest(), timeout=60).pulls
    _, started = service.told("a", prompt)
    assert started.computed_tokens == len(prompt)
    warm, started = service.told("a", prompt)  # as the other node will: from a block's end on
    assert started.computed_tokens == len(prompt) - cacheable(prompt)
    wait_for_source(service, prompt)
    answer, started = service.told("b", prompt, source="a")
    assert started.pulled_tokens == cacheable(prompt)
    assert {each.tier: each.tokens for each in started.restored} == {HOST: cacheable(prompt)}
    assert started.computed_tokens == len(prompt) - cacheable(prompt)
    assert answer == warm


def test_a_tenants_blocks_are_pulled_for_it_alone(service, prompts):
    prompt = prompts[1]
    service.told("a", prompt, tenant="red")
    warm, started = service.told("a", prompt, tenant="red")
    assert started.computed_tokens == len(prompt) - cacheable(prompt)
    wait_for_source(service, prompt, tenant="red")
    _, started = service.told("b", prompt, source="a")
    assert (started.pulled_tokens, started.computed_tokens) == (0, len(prompt))
    answer, started = service.told("b", prompt, source="a", tenant="red")
    assert started.pulled_tokens == cacheable(prompt)
    assert answer == warm


def test_a_source_that_is_gone_is_no_obstacle(service, prompts):
    prompt = prompts[2]
    service.told("a", prompt)
    service.nodes["a"].kill()
    answer, started = service.told("b", prompt, source="a")
    assert (started.pulled_tokens, started.computed_tokens) == (0, len(prompt))
    assert answer
