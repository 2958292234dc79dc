import asyncio

import grpc
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers

from kvtier import metrics
from kvtier.core.tiers import Tier
from kvtier.router.front import MAX_FALLBACKS
from kvtier.router.text import MAX_MESSAGES, MAX_TEXT_BYTES
from kvtier.wire.pb import router_pb2
from tests.router.stub_engine import (
    MAX_TOKENS,
    VOCAB,
    StubSource,
    StubWorker,
    files,
    hangs,
    ids,
    keys,
    says,
)
from tests.router.support import PATIENCE_S, eventually, generate_request, refused, route_request

PROMPT = "a prompt of eight and more blocks, long enough that its prefill takes a while. " * 20
KEYS = keys(PROMPT)
Status = grpc.StatusCode


async def generate(router, request):
    async with asyncio.timeout(PATIENCE_S):
        return [message async for message in router.stub.Generate(request)]


async def node(engines, name: str, tier: Tier | None):
    """A worker and its daemon, with the whole prompt in one tier."""
    worker = StubWorker(name, KEYS if tier is Tier.VRAM else ())
    worker.info.kv_bytes_per_token = 100_000
    held = {} if tier in (None, Tier.VRAM) else {tier: KEYS}
    return await engines(worker), await engines(StubSource(held))


@pytest.mark.parametrize(
    ("warmer", "colder"),
    [
        (Tier.VRAM, Tier.HOST),
        (Tier.VRAM, Tier.DISK),
        (Tier.VRAM, None),
        (Tier.HOST, Tier.DISK),
        (Tier.HOST, None),
        (Tier.DISK, None),
    ],
)
async def test_the_warmest_tier_wins(engines, routers, warmer, colder):
    # The colder one is named first and is just as idle: only its tier counts against it.
    cold, warm = await node(engines, "cold", colder), await node(engines, "warm", warmer)
    router = await routers(cold, warm)
    choices = await router.explain(PROMPT)
    assert [c.worker_id for c in choices] == ["warm", "cold"]
    assert choices[0].seconds < choices[1].seconds
    assert (await router.route(PROMPT)).worker_id == "warm"


@pytest.mark.parametrize("tier", [Tier.VRAM, Tier.HOST, Tier.DISK])
async def test_what_a_node_holds_beats_what_all_can_fetch(engines, routers, tier):
    shared, own = await node(engines, "x", Tier.SHARED), await node(engines, "own", tier)
    router = await routers(shared, own)
    choices = await router.explain(PROMPT)
    assert [c.worker_id for c in choices] == ["own", "x"]
    assert [[t.tier for t in c.warm] for c in choices] == [[tier + 1], [4]]


@pytest.mark.parametrize("loads_all", [False, True])
async def test_a_worker_that_loads_all_it_finds_is_charged_for_a_slow_disk(
    engines, routers, loads_all
):
    worker, daemon = await node(engines, "w", Tier.DISK)
    worker.info.loads_all = loads_all
    worker.info.kv_bytes_per_token = 100_000
    load = worker.heartbeat.load
    load.prefill_tokens_per_s, load.disk_bytes_per_s = 2000.0, 1e6  # 0.0005 and 0.1 s a token
    router = await routers((worker, daemon))

    async def heard() -> bool:
        (choice,) = await router.explain(PROMPT)
        return choice.terms.prefill_tokens_per_s == 2000.0

    await eventually(heard, "the worker's speed was told")
    (choice,) = await router.explain(PROMPT)
    (warm,) = choice.warm
    loaded = sum(each.tokens for each in choice.terms.loads)
    assert loaded == (warm.tokens if loads_all else 0)
    assert choice.load_s == pytest.approx(loaded * 0.1)
    computed = max(1, len(ids(PROMPT)) - loaded)
    assert choice.prefill_s == pytest.approx(computed / 2000)


async def test_a_choice_tells_why(engines, routers):
    worker = await engines(StubWorker("w", KEYS[:2]))
    daemon = await engines(StubSource({Tier.HOST: KEYS[2:5]}))
    router = await routers((worker, daemon))
    response = await router.stub.Route(route_request(PROMPT))
    choice = response.choice
    assert (choice.worker_id, choice.node, choice.address) == ("w", "w", worker.address)
    assert [(t.tier, t.tokens) for t in choice.warm] == [(1, 8), (2, 12)]
    assert response.prompt_tokens == len(ids(PROMPT))
    assert "20 of 1,580 tokens warm (vram 8, host 12)" in choice.why
    assert "\n" not in choice.why
    cost = choice.load_s + choice.prefill_s
    assert choice.seconds == pytest.approx(choice.wait_s + cost), "nobody waits behind it"


async def test_explain_gives_every_term_and_they_add_up(engines, routers):
    worker = await engines(StubWorker("w", KEYS[:2]))
    worker.info.kv_bytes_per_token = 100_000
    load = worker.heartbeat.load
    load.prefill_tokens_per_s, load.waiting_tokens, load.running = 2000.0, 500, 3
    load.host_bytes_per_s, load.disk_bytes_per_s, load.shared_bytes_per_s = 4e9, 2e9, 1e9
    held = {Tier.HOST: KEYS[2:5], Tier.DISK: KEYS[5:9], Tier.SHARED: KEYS[9:10]}
    lender = await engines(StubSource({Tier.HOST: KEYS[:40]}))
    lender.heartbeat.lends = True
    daemon = await engines(StubSource(held))
    daemon.heartbeat.pulls.bytes_per_s = 8e9
    worker.info.pulls = True
    other = await engines(StubWorker("lender"))
    other.info.kv_bytes_per_token = 100_000
    router = await routers((worker, daemon), (other, lender), behind=1.5)

    async def heard() -> bool:
        choices = {c.worker_id: c for c in await router.explain(PROMPT)}
        w = choices["w"]
        return (w.terms.waiting_tokens, w.source) == (500, "lender")

    await eventually(heard, "the worker's load and the daemons' words were told")
    assert (await router.route("else")).worker_id == "lender", "one of two was busy"
    choices = {c.worker_id: c for c in await router.explain(PROMPT)}
    choice, terms = choices["w"], choices["w"].terms
    assert terms.behind == pytest.approx(0.5)
    bytes_per_token = 100_000
    assert [(each.tier, each.tokens, each.bytes_per_s) for each in terms.loads] == [
        (2, 12, 4e9), (3, 16, 2e9), (4, 4, 1e9), (0, 120, 8e9),
    ]  # fmt: skip
    assert (choice.source, choice.source_tokens) == ("lender", 120)
    for each in terms.loads:
        assert each.seconds == pytest.approx(each.tokens * bytes_per_token / each.bytes_per_s)
    assert choice.load_s == pytest.approx(sum(each.seconds for each in terms.loads))
    slow = 1 + terms.decoding * terms.drag
    assert terms.decoding == 3
    assert choice.wait_s == pytest.approx(500 / 2000 * slow)
    assert terms.computed_tokens == len(ids(PROMPT)) - 160
    assert choice.prefill_s == pytest.approx(
        terms.computed_tokens / terms.prefill_tokens_per_s * slow
    )
    assert choice.seconds == pytest.approx(
        choice.wait_s + (1 + terms.behind) * (choice.load_s + choice.prefill_s)
    )
    assert not (await router.route(PROMPT)).HasField("terms")


@pytest.mark.parametrize("grows", [False, True])
async def test_a_worker_says_how_much_more_later_tokens_take(engines, routers, grows):
    """Half of a prompt is warm behind a queue of three quarters: worth it where attention tells."""
    count = len(ids(PROMPT))
    warm, cold = StubWorker("warm", KEYS[: len(KEYS) // 2]), StubWorker("cold")
    for each in (warm, cold):
        each.heartbeat.load.prefill_tokens_per_s = 1000.0
        each.info.doubles_at = count / 8 if grows else 0.0
    warm.heartbeat.load.waiting_tokens = count * 3 // 4
    router = await routers(await engines(warm), await engines(cold))

    async def heard() -> bool:
        choices = {c.worker_id: c for c in await router.explain(PROMPT)}
        return choices["warm"].terms.waiting_tokens > 0 and all(
            c.terms.prefill_tokens_per_s == 1000.0 for c in choices.values()
        )

    await eventually(heard, "both workers' load was told")
    choices = await router.explain(PROMPT)
    assert [c.worker_id for c in choices] == (["warm", "cold"] if grows else ["cold", "warm"])
    for each in choices:
        terms, start = each.terms, count - each.terms.computed_tokens
        tokens = float(terms.computed_tokens)
        if grows:
            assert terms.doubles_at == count / 8
            tokens += (count**2 - start**2) / (2 * terms.doubles_at)
        assert each.prefill_s == pytest.approx(tokens / 1000)


async def test_more_of_the_prefix_beats_less(engines, routers):
    less, more = await engines(StubWorker("a", KEYS[:100])), await engines(StubWorker("b", KEYS))
    router = await routers(less, more)
    response = await router.stub.Route(route_request(PROMPT))
    assert response.choice.worker_id == "b"
    assert [c.worker_id for c in response.fallbacks] == ["a"]


async def test_a_large_fleet_is_named_only_as_far_as_it_helps(engines, routers):
    fleet = [await engines(StubWorker(f"w{i}", keys(PROMPT)[: 20 * i])) for i in range(20)]
    router = await routers(*fleet)
    best = [f"w{i}" for i in reversed(range(20))]
    response = await router.stub.Route(route_request(PROMPT))
    named = [response.choice, *response.fallbacks]
    assert [c.worker_id for c in named][:10] == best[:10]
    assert len(response.fallbacks) == MAX_FALLBACKS == 16
    messages = await generate(router, generate_request(PROMPT))
    assert len(messages[0].routed.others) == MAX_FALLBACKS
    assert len(await router.explain(PROMPT)) == 20


async def test_a_busy_warm_worker_loses_to_an_idle_cold_one(engines, routers):
    warm, idle = await engines(StubWorker("warm", KEYS)), await engines(StubWorker("idle"))
    warm.heartbeat.load.waiting_tokens = 100_000
    router = await routers(warm, idle)

    async def first() -> str:
        return (await router.explain(PROMPT))[0].worker_id

    async def idle_first() -> bool:
        return await first() == "idle"

    await eventually(idle_first, "the idle one is chosen")
    warm.heartbeat.load.waiting_tokens = 0

    async def warm_first() -> bool:
        return await first() == "warm"

    await eventually(warm_first, "the warm one is chosen")


async def test_equally_warm_workers_share_the_requests(engines, routers):
    workers = [await engines(StubWorker(name, KEYS)) for name in "abcd"]
    router = await routers(*workers)
    chosen = {(await router.route(PROMPT)).worker_id for _ in range(100)}
    assert chosen == set("abcd")


async def test_new_prompts_spread(engines, routers):
    workers = [await engines(StubWorker(name)) for name in "abcd"]
    router = await routers(*workers)
    chosen = [(await router.route(f"{i} is new and short")).worker_id for i in range(4)]
    assert sorted(chosen) == list("abcd")


async def test_what_was_routed_counts_as_load_for_a_moment(engines, routers):
    router = await routers(await engines(StubWorker("a")))

    async def counted() -> bool:
        await router.route(PROMPT)  # dispatched by the caller: its first token is not seen here
        told = (await router.explain("else"))[0].wait_s
        return told == pytest.approx(len(ids(PROMPT)) / 4000)

    await eventually(counted, "it counts")  # unless the moment was over before we had asked

    async def forgotten() -> bool:
        return (await router.explain("else"))[0].wait_s == 0

    await eventually(forgotten, "it counts no more")
    assert await router.warmth(PROMPT) == {"a": {}}


async def test_new_prompts_spread_also_when_nobody_is_busy(engines, routers):
    # Nothing is under way any more, so only who was cold last tells the workers apart.
    workers = [await engines(StubWorker(name)) for name in "abcd"]
    router = await routers(*workers)
    chosen = []
    for i in range(12):
        messages = await generate(router, generate_request(f"{i} is new and short"))
        chosen.append(messages[0].routed.choice.worker_id)
    for start in range(0, 12, 4):
        assert sorted(chosen[start : start + 4]) == list("abcd")


async def test_text_chat_and_tokens_route_alike(engines, routers):
    chat = [("system", "be brief " * 20), ("user", "hi")]
    rendered = "".join(f"<|{role}|>{content}<|end|>" for role, content in chat) + "<|assistant|>"
    one, two = await engines(StubWorker("a")), await engines(StubWorker("b", keys(rendered)))
    router = await routers(one, two)
    answers = [await router.explain(each) for each in (chat, rendered, ids(rendered))]
    assert answers[0] == answers[1] == answers[2]
    assert answers[0][0].worker_id == "b"
    assert answers[0][0].warm[0].tokens == len(ids(rendered)) // 4 * 4


async def test_routers_explain_alike(engines, routers):
    sizes = {"a": 0, "b": 0, "c": 9, "d": 9}
    workers = [await engines(StubWorker(name, KEYS[:n])) for name, n in sizes.items()]
    first, second = await routers(*workers), await routers(*reversed(workers))
    for prompt in (PROMPT, "cold", ids(PROMPT[:60])):
        assert await first.explain(prompt) == await second.explain(prompt)
        assert await first.explain(prompt) == await first.explain(prompt)


async def test_explain_changes_nothing(engines, routers, expecting):
    worker = await engines(StubWorker("a"))
    router = await routers(worker)
    before = metrics.REQUESTS.labels("OK")._value.get()
    first = await router.explain(PROMPT)
    assert await router.explain(PROMPT) == first
    assert not first[0].warm
    assert metrics.REQUESTS.labels("OK")._value.get() == before
    await router.route(PROMPT)
    assert (await router.explain(PROMPT))[0].warm  # a route is expected to be followed
    assert metrics.REQUESTS.labels("OK")._value.get() == before + 1


async def test_workers_with_other_weights_have_other_keys(engines, routers):
    # A new revision under the same name, and one with other blocks.
    old = await engines(StubWorker("old", KEYS))
    new = await engines(StubWorker("new", keys(PROMPT, root=b"n" * 32)[:9], root=b"n" * 32))
    wide = await engines(StubWorker("wide", keys(PROMPT, block=16)[:50], block=16))
    wrong = await engines(StubWorker("wrong", KEYS, root=b"x" * 32))
    router = await routers(wrong, old, new, wide)
    expected = {"old": {1: 1580}, "new": {1: 36}, "wide": {1: 800}, "wrong": {}}
    assert await router.warmth(PROMPT) == expected
    assert [c.worker_id for c in await router.explain(PROMPT)] == ["old", "wide", "new", "wrong"]


async def test_draining_workers_come_last_among_all_kinds(engines, routers):
    old = await engines(StubWorker("old", KEYS))
    new = await engines(StubWorker("new", root=b"n" * 32))
    router = await routers(old, new)
    old.heartbeat.draining = True
    await router.members(lambda each: each[0].draining)
    assert [c.worker_id for c in await router.explain(PROMPT)] == ["new", "old"]


async def test_requests_go_to_the_model_they_name(engines, routers):
    one, two = await engines(StubWorker("a", model="x")), await engines(StubWorker("b", model="y"))
    router = await routers(one, two)
    assert (await router.route(PROMPT, "y")).worker_id == "b"
    async with refused(Status.NOT_FOUND, "'z'", "x, y"):
        await router.route(PROMPT, "z")
    async with refused(Status.INVALID_ARGUMENT, "model", "x, y"):
        await router.route(PROMPT)
    await two.stop()
    await router.members(lambda each: each[1].state == "connecting")
    async with refused(Status.UNAVAILABLE, "no worker of 'y' is ready"):
        await router.route(PROMPT, "y")


async def test_text_goes_to_those_who_read_it_alike(engines, routers):
    odd = StubWorker("odd", KEYS)
    odd.files = files() | {"chat_template.jinja": b"another"}
    members = [await engines(each) for each in (odd, StubWorker("b"), StubWorker("c"))]
    router = await routers(*members)
    assert {c.worker_id for c in await router.explain("a text")} == {"b", "c"}
    assert {c.worker_id for c in await router.explain([1, 2, 3])} == {"odd", "b", "c"}


async def test_without_members_there_is_no_worker(routers):
    router = await routers()
    async with refused(Status.UNAVAILABLE, "no worker is ready"):
        await router.route(PROMPT)
    async with refused(Status.UNAVAILABLE, "no worker is ready"):
        await generate(router, generate_request(PROMPT))


NO_CHAT = router_pb2.Prompt(chat=router_pb2.Chat())
LONG_CHAT = router_pb2.Prompt(
    chat=router_pb2.Chat(messages=[router_pb2.ChatMessage(role="user")] * (MAX_MESSAGES + 1))
)
ODD_CHAT = router_pb2.Prompt(
    chat=router_pb2.Chat(messages=[router_pb2.ChatMessage(role="nobody", content="hi")])
)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        (router_pb2.Prompt(), ["prompt", "text, chat, tokens or keys"]),
        (router_pb2.Prompt(text=""), ["prompt: no tokens"]),
        (router_pb2.Prompt(tokens=router_pb2.TokenIds()), ["prompt: no tokens"]),
        (router_pb2.Prompt(tokens=router_pb2.TokenIds(ids=[1, VOCAB])), [f"{VOCAB}", "token id"]),
        (router_pb2.Prompt(tokens=router_pb2.TokenIds(ids=[2**32 - 1])), ["4294967295"]),
        (router_pb2.Prompt(tokens=router_pb2.TokenIds(ids=[1] * 10)), ["10 tokens", "takes 10"]),
        (router_pb2.Prompt(text="0123456789"), ["10 tokens", "takes 10"]),
        (router_pb2.Prompt(text="x" * (MAX_TEXT_BYTES + 1)), [f"limit {MAX_TEXT_BYTES}"]),
        (NO_CHAT, ["0 messages"]),
        (LONG_CHAT, [f"{MAX_MESSAGES + 1} messages"]),
        (ODD_CHAT, ["template", "who?"]),
    ],
)
async def test_bad_prompts_get_one_clear_line(engines, routers, prompt, words):
    worker = await engines(StubWorker("a", max_tokens=10))
    router = await routers(worker)
    request = router_pb2.RouteRequest(prompt=prompt)
    for call in (router.stub.Route, router.stub.Explain):
        async with refused(Status.INVALID_ARGUMENT, *words):
            await call(request)
    async with refused(Status.INVALID_ARGUMENT, *words):
        await generate(router, router_pb2.GenerateRequest(prompt=prompt))
    assert worker.requests == []


async def test_a_prompt_that_just_fits_is_taken(engines, routers):
    worker = await engines(StubWorker("a", max_tokens=10))
    router = await routers(worker)
    assert await router.route([VOCAB - 1] * 9)


async def test_a_prompt_goes_only_where_it_fits(engines, routers):
    small = await engines(StubWorker("small", KEYS, max_tokens=10))
    large = await engines(StubWorker("large"))
    router = await routers(small, large)
    assert [c.worker_id for c in await router.explain(PROMPT)] == ["large"]
    messages = await generate(router, generate_request(PROMPT))
    assert messages[0].routed.choice.worker_id == "large"
    assert not messages[0].routed.others


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"temperature": -0.5}, ["temperature is -0.5"]),
        ({"temperature": float("nan")}, ["temperature is nan"]),
        ({"temperature": float("inf")}, ["temperature is inf"]),
        ({"temperature": 101.0}, ["temperature is 101", "0 to 100"]),
        ({"request_id": "x" * 129}, ["129 characters", "limit 128"]),
        ({"max_tokens": 0}, ["max_tokens is 0", "at least 1"]),
    ],
)
async def test_bad_settings_get_one_clear_line(engines, routers, fields, words):
    worker = await engines(StubWorker("a"))
    router = await routers(worker)
    async with refused(Status.INVALID_ARGUMENT, *words):
        await generate(router, generate_request(PROMPT, **fields))
    assert worker.requests == []


async def test_how_long_an_answer_is_where_nobody_says_is_left_to_the_worker(engines, routers):
    worker = await engines(StubWorker("a"))
    router = await routers(worker)
    await generate(router, generate_request(PROMPT))
    assert not worker.requests[0].HasField("max_tokens")


async def test_a_huge_message_is_refused(engines, routers):
    router = await routers(await engines(StubWorker("a")))
    async with refused(Status.RESOURCE_EXHAUSTED):
        await router.route("x" * (100 << 20))
    assert await router.route("x")


async def test_too_many_requests_at_once_are_refused(engines, routers):
    worker = await engines(StubWorker("a"))
    worker.script = hangs()
    router = await routers(worker, max_requests=2, max_waiting=0)
    calls = [router.stub.Generate(generate_request(PROMPT)) for _ in range(2)]
    await eventually(lambda: len(worker.requests) == 2, "both reach the worker")
    async with refused(Status.RESOURCE_EXHAUSTED, "2 requests", "max_requests"):
        await router.route(PROMPT)
    for call in calls:
        call.cancel()
    async with asyncio.timeout(PATIENCE_S):
        while True:
            try:
                assert await router.route(PROMPT)
            except grpc.aio.AioRpcError as error:
                assert error.code() is Status.RESOURCE_EXHAUSTED  # noqa: PT017
                continue
            break


async def test_a_long_prompt_holds_nobody_up(engines, routers):
    # Looking up a long word letter by letter takes this kind of tokenizer seconds.
    model = models.WordPiece({"[UNK]": 0}, unk_token="[UNK]", max_input_chars_per_word=10**6)
    slow = Tokenizer(model)
    slow.pre_tokenizer = pre_tokenizers.Whitespace()
    worker = StubWorker("a")
    worker.files = {"tokenizer.json": slow.to_str().encode()}
    worker.script = hangs()
    router = await routers(await engines(worker), max_requests=2, max_waiting=0)
    other = router.stub.Generate(generate_request("hi"))
    await other.read()

    async def route(text: str) -> Status:
        try:
            await router.route(text)
        except grpc.aio.AioRpcError as error:
            return error.code()
        return Status.OK

    async def route_long() -> None:
        while await route(" ".join(["x" * 50_000] * 10)) is not Status.OK:
            pass  # a short one took its place

    # No room for a short one means that the long one is inside the router ...
    long = asyncio.create_task(route_long())
    while await route("hi") is Status.OK:
        assert not long.done()
    # ... and it still is when there is room again and short ones have passed.
    other.cancel()
    passed = 0
    while passed < 5:
        passed += await route("hi") is Status.OK
        assert not long.done()
    await long


async def test_a_prompt_as_long_as_the_model_takes_is_routed(engines, routers):
    prompt = [1] * (MAX_TOKENS // 4)
    worker = await engines(StubWorker("a", keys(prompt)))
    router = await routers(worker)
    assert (await router.route(prompt)).warm[0].tokens == len(prompt)


async def test_requests_are_counted_by_how_they_end(engines, routers):
    worker = await engines(StubWorker("a"))
    router = await routers(worker)

    def counts():
        statuses = ("OK", "INVALID_ARGUMENT", "CANCELLED", "DEADLINE_EXCEEDED")
        return [metrics.REQUESTS.labels(status)._value.get() for status in statuses]

    before = counts()
    await generate(router, generate_request(PROMPT))
    async with refused(Status.INVALID_ARGUMENT):
        await router.route("")
    worker.script = hangs()
    call = router.stub.Generate(generate_request(PROMPT))
    await call.read()
    call.cancel()
    await eventually(lambda: counts()[2] > before[2], "the cancelled request is counted")
    assert [now - then for now, then in zip(counts(), before, strict=True)] == [1, 1, 1, 0]


async def test_answers_in_parts_keep_their_characters_whole(engines, routers):
    worker = await engines(StubWorker("a"))
    worker.script = says("日本語 😀 ok")
    router = await routers(worker)
    messages = await generate(router, generate_request("hi"))
    chunks = [m.chunk.text for m in messages]
    assert "".join(chunks) == "日本語 😀 ok"
    assert not any("\N{REPLACEMENT CHARACTER}" in each for each in chunks)


async def test_a_route_that_is_late_goes_by_load_alone(engines, routers):
    warm = await engines(StubWorker("warm", KEYS))
    router = await routers(warm, await engines(StubWorker("cold")), budget_s=0.0)
    await router.until_warmth(PROMPT, lambda each: each["warm"] != {})
    before = metrics.ROUTED_BY_LOAD._value.get()
    choice = await router.route(PROMPT)
    assert not choice.warm
    assert metrics.ROUTED_BY_LOAD._value.get() == before + 1
    assert (await router.warmth(PROMPT))["warm"] != {}  # Explain takes its time


async def test_the_shared_store_is_named_as_a_source(engines, routers):
    worker, daemon = await engines(StubWorker("a")), await engines(StubSource())
    daemon.held = {Tier.SHARED: KEYS[:3]}
    router = await routers((worker, daemon))
    await router.until_warmth(PROMPT, lambda each: each["a"] != {})
    (choice,) = await router.explain(PROMPT)
    assert (choice.source, choice.source_tokens) == ("shared", 12)
    worker.heartbeat.load.shared_bytes_per_s = 1e5  # so slow that computing them is faster

    async def unnamed() -> bool:
        (choice,) = await router.explain(PROMPT)
        assert [(each.tier, each.tokens) for each in choice.warm] == [(4, 12)]
        return (choice.source, choice.source_tokens, list(choice.terms.loads)) == ("", 0, [])

    await eventually(unnamed, "nothing is loaded from there")
