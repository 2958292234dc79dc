import asyncio
import socket
import urllib.request

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from kvtier.config import Config, MemberConfig, RouterConfig
from kvtier.errors import ConfigError
from kvtier.router.server import serve
from kvtier.wire.pb import router_pb2
from tests.launching import fixed_ports
from tests.router.stub_engine import StubSource, StubWorker, done, hangs, ids, started, tokens
from tests.router.support import PATIENCE_S, RunningRouter, eventually, generate_request, refused

SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


def health(router):
    return health_pb2_grpc.HealthStub(router.channel)


async def until_health(router, service, wanted):
    """Follows the health until it is as wanted."""
    call = health(router).Watch(health_pb2.HealthCheckRequest(service=service))
    async with asyncio.timeout(PATIENCE_S):
        async for answer in call:
            if answer.status == wanted:
                break
    call.cancel()


@pytest.mark.parametrize("service", ["", "kvtier.v1.Router"])
async def test_healthy_means_that_a_worker_is_ready(engines, routers, service):
    worker = StubWorker("a")
    worker.loading = True
    await engines(worker)
    router = await routers(worker, ready=False)
    request = health_pb2.HealthCheckRequest(service=service)
    assert (await health(router).Check(request)).status == NOT_SERVING
    worker.loading = False
    await until_health(router, service, SERVING)
    await worker.stop()
    await until_health(router, service, NOT_SERVING)


async def test_reflection_names_the_service_and_its_types(routers):
    router = await routers()
    stub = reflection_pb2_grpc.ServerReflectionStub(router.channel)

    async def ask(**what):
        request = reflection_pb2.ServerReflectionRequest(**what)
        call = stub.ServerReflectionInfo(iter([request]))
        async with asyncio.timeout(PATIENCE_S):
            return await anext(aiter(call))

    listed = (await ask(list_services="")).list_services_response.service
    assert {"kvtier.v1.Router", "grpc.health.v1.Health"} <= {each.name for each in listed}
    for symbol in ("kvtier.v1.Router", "kvtier.v1.GenerateRequest"):
        found = await ask(file_containing_symbol=symbol)
        assert found.file_descriptor_response.file_descriptor_proto


async def test_a_taken_port_is_named(routers):
    router = await routers()
    with pytest.raises(ConfigError, match=rf"router\.listen.*{router.address}"):
        await RunningRouter(RouterConfig(listen=router.address)).start()


async def test_a_taken_metrics_port_is_named(routers):
    router = await routers()
    port = int(router.address.rpartition(":")[2])
    with pytest.raises(ConfigError, match=rf"router\.metrics_port is {port}"):
        await RunningRouter(RouterConfig(listen="127.0.0.1:0", metrics_port=port)).start()


@pytest.mark.parametrize("worker", ["nowhere", "host:port", "host:70000"])
async def test_a_bad_member_in_the_config_is_named(worker):
    settings = RouterConfig(listen="127.0.0.1:0", members=(MemberConfig(node="a", worker=worker),))
    with pytest.raises(ConfigError, match=r"router\.members\[0\]\.worker"):
        await serve(Config(router=settings), started=print, stop=asyncio.Event())


async def test_stopping_lets_running_requests_end(engines, routers):
    worker, go = await engines(StubWorker("a")), asyncio.Event()

    async def script(request):
        yield started(request)
        yield tokens(*ids("x"))
        await go.wait()
        yield done(1)

    worker.script = script
    router = await routers(worker)
    watch = router.stub.Watch(router_pb2.WatchMembersRequest())
    assert await watch.read()
    call = router.stub.Generate(generate_request("hi"))
    for _ in range(3):
        await call.read()
    router.stopping.set()
    async with asyncio.timeout(PATIENCE_S):
        while await watch.read() is not grpc.aio.EOF:  # nobody waits for those who only watch
            pass
    assert not router.task.done()
    go.set()
    assert (await call.read()).finished.completion_tokens == 1
    async with asyncio.timeout(PATIENCE_S):
        await router.task
    async with refused(grpc.StatusCode.UNAVAILABLE):
        await router.route("hi")


async def test_requests_that_never_end_are_cut_off_at_last(engines, routers, monkeypatch):
    monkeypatch.setattr("kvtier.router.server.GRACE_S", 0.2)
    worker = await engines(StubWorker("a"))
    worker.script = hangs(1)
    router = await routers(worker)
    call = router.stub.Generate(generate_request("hi"))
    for _ in range(3):
        await call.read()
    router.stopping.set()
    async with asyncio.timeout(PATIENCE_S):
        await router.task
        await worker.cancelled.wait()
    assert await call.code() is not grpc.StatusCode.OK


async def test_a_stopped_router_leaves_nothing_behind(engines, routers):
    worker = await engines(StubWorker("a"))
    router = await routers(worker)
    await router.route("hi")
    assert ours()
    await router.stop()
    await eventually(lambda: not ours(), "every task has ended")


def ours() -> list[str]:
    """The tasks that run code of the router."""
    return [
        repr(t)
        for t in asyncio.all_tasks()
        if "kvtier/router" in repr(getattr(t.get_coro(), "cr_frame", None))
    ]


async def test_the_metrics_page_tells_the_members(engines, routers, free_port):
    worker = await engines(StubWorker("a"))
    await routers(worker, metrics_port=free_port)
    url = f"http://127.0.0.1:{free_port}/metrics"
    page = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
    assert 'kvtier_members{state="ready"} 1.0' in page


async def test_the_metrics_page_is_where_the_settings_say(routers, free_port):
    await routers(metrics_port=free_port, metrics_host="127.0.0.1")
    url = f"http://127.0.0.1:{free_port}/metrics"
    page = await asyncio.to_thread(lambda: urllib.request.urlopen(url).read().decode())
    assert "kvtier_members" in page
    with socket.socket() as other:  # not at every address
        assert other.connect_ex(("127.0.0.2", free_port))


async def test_an_address_for_metrics_that_is_not_ours_is_named(free_port):
    settings = RouterConfig(
        listen="127.0.0.1:0", metrics_port=free_port, metrics_host="203.0.113.1"
    )
    with pytest.raises(ConfigError, match=r"router\.metrics_host is '203\.0\.113\.1': "):
        await RunningRouter(settings).start()


@pytest.fixture
def free_port():
    return fixed_ports(1)[0]


async def test_healthy_waits_for_a_snapshot_of_everybody_who_lives(engines, routers):
    worker, gone = await engines(StubWorker("a")), await engines(StubWorker("gone"))
    daemon = await engines(StubSource())
    await gone.stop()  # is not waited for
    daemon.answering.clear()
    router = await routers((worker, daemon), gone, ready=False)
    await router.members(lambda each: each[0].state == "ready")
    await eventually(lambda: daemon.watched, "the daemon's feed was asked for")
    request = health_pb2.HealthCheckRequest(service="kvtier.v1.Router")
    assert (await health(router).Check(request)).status == NOT_SERVING
    daemon.answering.set()
    await until_health(router, "kvtier.v1.Router", SERVING)
