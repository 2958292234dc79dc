"""Tenants and adapters: each request is placed by the keys of its own space, and goes there."""

import httpx2
import openai
import pytest

from kvtier.core.blocks import block_keys
from kvtier.wire.pb import router_pb2, worker_pb2
from tests.router.stub_engine import BLOCK, StubWorker, hangs, ids
from tests.router.support import (
    PATIENCE_S,
    Status,
    eventually,
    generate_request,
    make_prompt,
    refused,
)

PROMPT = "a prompt of eight and more blocks, all of one text"


def root(adapter: str, tenant: str) -> bytes:
    return f"{adapter}/{tenant}".encode().rjust(32)


def serving(name: str, *spaces: tuple[str, str], warm: tuple[str, str] | None = None, **more):
    """A worker of these adapters and tenants that holds PROMPT for one of them."""
    held = block_keys(root(*warm), ids(PROMPT), BLOCK) if warm else ()
    worker = StubWorker(name, held, **more)
    for adapter, tenant in spaces:
        worker.info.spaces.add(adapter=adapter, tenant=tenant, root=root(adapter, tenant))
    return worker


def request(**fields) -> router_pb2.RouteRequest:
    return router_pb2.RouteRequest(prompt=make_prompt(PROMPT), **fields)


async def warm(router, **fields) -> dict[str, int]:
    """Warm tokens by worker, the best first."""
    choices = (await router.stub.Explain(request(**fields))).choices
    return {c.worker_id: sum(tier.tokens for tier in c.warm) for c in choices}


@pytest.fixture
async def two(engines):
    spaces = ("", "red"), ("", "blue")
    return [
        await engines(serving("r", *spaces, warm=("", "red"))),
        await engines(serving("b", *spaces, warm=("", "blue"))),
    ]


async def test_tenants_are_scored_by_their_own_keys(two, routers):
    router = await routers(*two)
    full = len(ids(PROMPT)) // BLOCK * BLOCK
    assert await warm(router, tenant="red") == {"r": full, "b": 0}
    assert await warm(router, tenant="blue") == {"b": full, "r": 0}
    assert set((await warm(router)).values()) == {0}
    for tenant, worker in (("red", "r"), ("blue", "b")):
        response = await router.stub.Route(request(tenant=tenant))
        assert response.choice.worker_id == worker


async def test_what_was_just_sent_for_one_tenant_is_not_expected_for_another(
    engines, routers, expecting
):
    worker = await engines(serving("w", ("", "red"), ("", "blue")))
    router = await routers(worker)
    await router.stub.Route(request(tenant="red"))
    assert (await warm(router, tenant="red"))["w"] > 0
    assert await warm(router, tenant="blue") == {"w": 0}


async def test_an_unknown_tenant_is_refused_in_one_line_that_names_no_other(two, routers):
    router = await routers(*two)
    async with refused(Status.PERMISSION_DENIED, "tenant 'green' is not known") as _:
        await router.stub.Route(request(tenant="green"))
    with pytest.raises(Exception, match="green") as caught:
        await router.stub.Generate(generate_request(PROMPT, tenant="green")).read()
    assert "red" not in caught.value.details()


async def test_only_workers_that_know_the_tenant_are_asked(engines, routers):
    knows, other = await engines(serving("k", ("", "red"))), await engines(serving("o"))
    router = await routers(knows, other)
    assert await warm(router, tenant="red") == {"k": 0}
    assert set(await warm(router)) == {"k", "o"}


async def test_an_adapter_is_named_as_the_model_or_beside_it(engines, routers):
    worker = await engines(serving("w", ("sql", ""), ("sql", "red"), warm=("sql", "red")))
    router = await routers(worker, await engines(serving("plain")))
    full = len(ids(PROMPT)) // BLOCK * BLOCK
    assert await warm(router, model="sql", tenant="red") == {"w": full}
    assert await warm(router, model="tiny", adapter="sql", tenant="red") == {"w": full}
    assert await warm(router, adapter="sql") == {"w": 0}
    async with refused(Status.NOT_FOUND, "adapter 'law' of 'tiny' is not served; served: sql"):
        await router.stub.Route(request(adapter="law"))
    async with refused(Status.NOT_FOUND, "model 'law' is not served; served: tiny, sql"):
        await router.stub.Route(request(model="law"))
    async with refused(Status.PERMISSION_DENIED, "tenant 'blue'", "sql"):
        await router.stub.Route(request(model="sql", tenant="blue"))


async def test_an_adapter_of_two_models_needs_its_model(engines, routers):
    one = await engines(serving("one", ("sql", ""), model="small"))
    other = await engines(serving("other", ("sql", ""), model="large"))
    router = await routers(one, other)
    async with refused(Status.INVALID_ARGUMENT, "'sql' is an adapter of large, small"):
        await router.stub.Route(request(model="sql"))
    assert await warm(router, model="small", adapter="sql") == {"one": 0}


async def test_the_worker_is_told_and_so_is_who_goes_on(engines, routers):
    workers = [await engines(serving(name, ("sql", "red"))) for name in "ab"]
    for worker in workers:
        worker.script = hangs(2)
    router = await routers(*workers)
    asked = generate_request(ids(PROMPT), model="sql", tenant="red", resume=True, max_tokens=9)
    call = router.stub.Generate(asked, timeout=PATIENCE_S)
    await eventually(lambda: any(worker.requests for worker in workers), "one was asked")
    first, second = workers if workers[0].requests else workers[::-1]
    while (await call.read()).WhichOneof("body") != "chunk":
        pass
    await first.stop()
    await eventually(lambda: bool(second.requests), "the other one goes on")
    for worker in (first, second):
        told = worker.requests[0]
        assert (told.model, told.adapter, told.tenant) == ("tiny", "sql", "red")
    call.cancel()


async def test_openais_clients_name_the_tenant_in_a_header(engines, routers):
    worker = await engines(serving("w", ("sql", ""), ("sql", "red")))
    router = await routers(worker, http="127.0.0.1:0")
    base = f"http://{router.http}/v1"
    async with (
        openai.AsyncOpenAI(
            base_url=base, api_key="none", max_retries=0,
            default_headers={"X-Kvtier-Tenant": "red"},
        ) as client,
        httpx2.AsyncClient(trust_env=False) as raw,
    ):  # fmt: skip
        answer = await client.completions.create(model="sql", prompt=PROMPT)
        assert answer.model == "sql"
        told = worker.requests[0]
        assert (told.model, told.adapter, told.tenant) == ("tiny", "sql", "red")
        with pytest.raises(openai.PermissionDeniedError, match="tenant 'green' is not known"):
            await client.completions.create(
                model="sql", prompt=PROMPT, extra_headers={"X-Kvtier-Tenant": "green"}
            )
        models = (await raw.get(f"{base}/models")).json()["data"]
        assert [(each["id"], each.get("parent")) for each in models] == [
            ("tiny", None), ("sql", "tiny"),
        ]  # fmt: skip
        assert (await raw.get(f"{base}/models/sql")).json()["parent"] == "tiny"


async def test_a_worker_with_too_many_spaces_or_a_bad_root_is_not_used(engines, routers):
    many, bad = serving("many"), serving("bad", ("", "red"))
    many.info.spaces.extend(worker_pb2.Space(tenant=str(n), root=b"r" * 32) for n in range(4097))
    bad.info.spaces[0].root = b""
    good = await engines(serving("good"))
    router = await routers(good, await engines(many), await engines(bad), ready=False)
    await router.members(lambda each: [m.state for m in each].count("ready") == 1)
    await eventually(lambda: many.described > 1 and bad.described > 1, "both were asked twice")
    assert list(await warm(router)) == ["good"]
