"""Stub engines and routers that end with the test."""

import pytest

from kvtier.config import MemberConfig, RouterConfig
from tests.router.stub_engine import StubSource, StubWorker
from tests.router.support import RunningRouter


@pytest.fixture
async def engines():
    """Starts stubs that are stopped at the end: `worker = await engines(StubWorker("a"))`."""
    running: list[StubSource] = []

    async def start(stub):
        running.append(stub)
        return await stub.start()

    yield start
    for stub in running:
        await stub.stop()


@pytest.fixture
def expecting(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was sent is expected for longer than any test lasts."""
    for module in ("sent", "placement"):
        monkeypatch.setattr(f"kvtier.router.{module}.SPECULATIVE_S", 600.0)


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No silence lasts long enough for a connection to be taken for dead."""
    monkeypatch.setattr("kvtier.router.link.GIVE_UP", 10_000)


@pytest.fixture
async def routers(engines):
    """Starts routers: `await routers(worker, (worker, daemon), "host:port", max_attempts=2)`."""
    running: list[RunningRouter] = []

    async def start(*members, ready: bool = True, **settings) -> RunningRouter:
        entries = []
        for i, member in enumerate(members):
            worker, daemon = member if isinstance(member, tuple) else (member, None)
            name = worker.name if isinstance(worker, StubWorker) else f"node{i}"
            entries.append(
                MemberConfig(
                    node=name,
                    worker=worker if isinstance(worker, str) else getattr(worker, "address", ""),
                    daemon=getattr(daemon, "address", ""),
                )
            )
        settings = {"listen": "127.0.0.1:0", "members": tuple(entries)} | settings
        router = await RunningRouter(RouterConfig(**{"budget_s": 60.0, **settings})).start()
        running.append(router)
        if ready and entries:
            await router.ready()
        return router

    yield start
    for router in running:
        await router.stop()
