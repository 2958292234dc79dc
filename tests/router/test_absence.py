"""What the router's log says of members that are away."""

import logging
from itertools import pairwise

from kvtier.router.absence import AGAIN_S, RAREST_S, Absence
from tests.router.stub_engine import StubWorker
from tests.router.support import eventually


def test_an_absence_is_said_once_and_then_ever_more_rarely():
    absence = Absence()
    said = [now for now in range(20_000) if absence.missed(float(now)) is not None]
    pauses = [b - a for a, b in pairwise(said)]
    assert said[0] == 0
    assert pauses[0] == AGAIN_S
    assert pauses == [min(AGAIN_S * 2**n, RAREST_S) for n in range(len(pauses))]
    assert absence.missed(20_000.0 + RAREST_S) == 20_000.0 + RAREST_S, "for how long, by now"


def test_a_return_is_said_once_and_the_next_absence_at_once():
    absence = Absence()
    assert absence.met(1.0) is None
    assert absence.missed(2.0) == 0.0
    assert absence.missed(3.0) is None
    assert absence.met(5.0) == 3.0
    assert absence.met(6.0) is None
    assert absence.missed(7.0) == 0.0


async def test_a_worker_that_is_away_fills_no_log(engines, routers, caplog):
    caplog.set_level(logging.INFO, "kvtier.router")
    worker = StubWorker("slow")
    worker.loading = True
    await engines(worker)
    router = await routers(worker, ready=False)
    await eventually(lambda: worker.described > 3, "it was asked again and again")
    worker.loading = False
    await router.ready()
    lines = [each.getMessage() for each in caplog.records if worker.address in each.getMessage()]
    first, *again, last = lines
    assert first == f"worker at {worker.address} is away: loading the model"
    assert last.startswith(f"worker at {worker.address} is there, after ")
    assert all("is still away after " in line for line in again)
    assert len(again) < worker.described - 2


async def test_a_worker_that_was_there_from_the_first_is_not_spoken_of(engines, routers, caplog):
    caplog.set_level(logging.INFO, "kvtier.router")
    worker = await engines(StubWorker("a"))
    await routers(worker)
    assert not [each for each in caplog.records if worker.address in each.getMessage()]
