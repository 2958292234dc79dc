"""Tenants of one worker: equal prompts, and no block in common, in no tier."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import grpc
import pytest

from kvtier.config import TenantConfig
from kvtier.core.blocks import block_keys
from kvtier.core.tiers import Tier
from kvtier.engine.model import LoadedModel
from kvtier.engine.sequence import Request, Started
from kvtier.engine.transformers import Engine
from kvtier.errors import UnknownTenant
from kvtier.wire.pb import feed_pb2, worker_pb2
from tests.engine.support import BLOCK, Tiers, prompt_of, small
from tests.engine.test_worker import WAIT_S, answer, ask, refused, settings, worker

SECRETS = {"red": b"r" * 32, "blue": b"b" * 32}


@pytest.fixture
def tenants(tiny: LoadedModel) -> LoadedModel:
    return replace(tiny, tenants=SECRETS)


@pytest.fixture
def tiers() -> Tiers:
    return Tiers()


@pytest.fixture
def engine(tenants: LoadedModel, tiers: Tiers) -> Iterator[Engine]:
    made = Engine(tenants, small(tenants), tiers)
    yield made
    made.close(WAIT_S)
    made.pool.check()


def cached(engine: Engine, prompt: list[int], tenant: str, answer: int = 1) -> dict[Tier, int]:
    """Prompt tokens of this request that came from a cache."""
    request = Request(token_ids=prompt, max_tokens=answer, ignore_eos=True, tenant=tenant)
    started = [event for event in engine.stream(request) if isinstance(event, Started)]
    return started[0].restored


def test_each_tenant_finds_its_own_blocks_and_nobody_elses(engine: Engine) -> None:
    prompt = prompt_of(6 * BLOCK, 1, engine.loaded.vocab_size)
    for tenant in ("", "red", "blue"):
        assert cached(engine, prompt, tenant) == {}
    for tenant in ("blue", "", "red"):
        assert cached(engine, prompt, tenant) == {Tier.VRAM: 5 * BLOCK}


def test_the_tiers_below_are_kept_apart_too(engine: Engine, tiers: Tiers) -> None:
    prompt = prompt_of(4 * BLOCK, 2, engine.loaded.vocab_size)
    cached(engine, prompt, "red")
    engine.clear().result(WAIT_S)
    assert cached(engine, prompt, "blue") == {}
    engine.clear().result(WAIT_S)
    assert cached(engine, prompt, "red") == {Tier.HOST: 3 * BLOCK}
    spaces = [engine.loaded.namespace(tenant).root() for tenant in ("red", "blue")]
    assert set(tiers.only.blocks) == {
        key for root in spaces for key in block_keys(root, prompt, BLOCK)
    }


def test_what_follows_a_prompt_shorter_than_a_block_is_the_tenants_too(engine: Engine) -> None:
    prompt = prompt_of(BLOCK // 2, 3, engine.loaded.vocab_size)
    request = Request(token_ids=prompt, max_tokens=3 * BLOCK, ignore_eos=True, tenant="red")
    said = [i for event in engine.stream(request) for i in getattr(event, "ids", ())]
    longer = [*prompt, *said]
    assert cached(engine, longer, "") == {}
    assert cached(engine, longer, "red") == {Tier.VRAM: 3 * BLOCK}


def test_an_unknown_tenant_is_refused_and_no_other_is_named(engine: Engine) -> None:
    with pytest.raises(UnknownTenant, match="tenant 'green' is not known to this worker") as caught:
        cached(engine, [1], "green")
    assert "red" not in str(caught.value)


def test_another_secret_is_another_tenant(tiny: LoadedModel) -> None:
    one, other = (replace(tiny, tenants={"red": secret * 16}) for secret in (b"1", b"2"))
    assert one.namespace("red").root() != other.namespace("red").root()
    assert one.namespace("red").root() == one.namespace("red").root()
    assert "1111" not in repr(one)


async def test_over_grpc(tiny_folder: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("KVTIER_CACHE", str(tmp_path))
    (tmp_path / "red").write_text("a secret of red's own\n")
    red = TenantConfig(name="red", secret_file=str(tmp_path / "red"))
    async with worker(settings(tiny_folder, tenants=(red,))) as each:
        info = await each.stub.Describe(worker_pb2.DescribeRequest())
        (space,) = info.spaces
        assert (space.adapter, space.tenant) == ("", "red")
        assert space.root != info.root
        prompt = prompt_of(3 * BLOCK, 4, info.vocab_size)
        await answer(each, ask(prompt, 1))
        started, *_ = await answer(each, ask(prompt, 1, tenant="red"))
        assert started.computed_tokens == len(prompt)
        told = each.feed.Watch(feed_pb2.WatchRequest(), timeout=WAIT_S)
        message = await told.read()
        keys = message.snapshot.held[0].keys
        assert {keys[i : i + 16] for i in range(0, len(keys), 16)} == {
            key for root in (info.root, space.root) for key in block_keys(root, prompt, BLOCK)
        }
        told.cancel()
        for fields, status, line in (
            ({"tenant": "blue"}, grpc.StatusCode.PERMISSION_DENIED, "tenant 'blue' is not known"),
            ({"adapter": "sql"}, grpc.StatusCode.NOT_FOUND, "adapter 'sql' is not served here"),
        ):
            code, said = await refused(each.stub.Generate(ask(prompt, 1, **fields)).read())
            assert (code, line in said) == (status, True), said
