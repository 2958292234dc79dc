"""What the demo promises is false wherever it should be."""

from dataclasses import replace

import pytest

from kvtier.core.tiers import Tier
from kvtier.demo.record import Record, _routed, is_warmer
from kvtier.demo.report import by_kind, verdict
from kvtier.wire.chains import TO_WIRE
from kvtier.wire.pb import router_pb2, worker_pb2

SAME, EVERY, WARMEST, ERRORS = range(4)  # as `verdict` has them


def answered(name: str, tier: str) -> Record:
    return Record(
        name, "talk", [1] * 100, "turns", restored={tier: 64}, ids=[1], identical=True,
        equal_loads=True, picked_warmest=True,
    )  # fmt: skip


GOOD = [
    *(answered(tier.label, tier.label) for tier in Tier),
    replace(answered("cut", "vram"), act="kill", cut=True, error="UNAVAILABLE: worker was lost"),
]


def promises(records: list[Record]) -> list[bool]:
    return [*verdict(records, by_kind(records)).values()]


def test_a_good_run_keeps_every_promise() -> None:
    assert promises(GOOD) == [True] * 4
    went_on = [*GOOD[:-1], replace(GOOD[-1], error="")]
    assert promises(went_on) == [True] * 4, "a stream may also go on elsewhere"


@pytest.mark.parametrize(
    ("at", "change", "broken"),
    [
        (0, {"identical": False}, SAME),
        (0, {"identical": None}, SAME),
        (1, {"restored": {"vram": 64}}, EVERY),
        (2, {"picked_warmest": False}, WARMEST),
        (3, {"error": "UNAVAILABLE: no worker"}, ERRORS),
        (3, {"act": "kill", "error": "UNAVAILABLE: no worker"}, ERRORS),
        (-1, {"cut": False}, ERRORS),
        (0, {"cut": True}, ERRORS),
    ],
)
def test_one_request_breaks_its_promise(at: int, change: dict[str, object], broken: int) -> None:
    records = [*GOOD]
    records[at] = replace(records[at], **change)
    assert [number for number, kept in enumerate(promises(records)) if not kept] == [broken]


def test_an_answer_that_never_came_is_an_error_and_no_answers_are_no_promise_kept() -> None:
    silent = replace(GOOD[0], name="silent", ids=[], identical=None)
    assert promises([*GOOD, silent]) == [True, True, True, False]
    assert promises([]) == [False] * 4
    unequal = [replace(each, equal_loads=False) for each in GOOD]
    assert promises(unequal) == [True, True, False, True]


def choice(
    *tokens: int, wait_s: float = 0.0, pace: float = 0.01, draining: bool = False
) -> router_pb2.Choice:
    """One of a prompt of 100 tokens, of which so many are warm in each tier."""
    held = [
        worker_pb2.TierTokens(tier=TO_WIRE[tier], tokens=count)
        for tier, count in zip(Tier, tokens, strict=False)
        if count
    ]
    prefill_s = pace * (100 - sum(tokens))
    return router_pb2.Choice(warm=held, wait_s=wait_s, prefill_s=prefill_s, draining=draining)


def routed(mine: router_pb2.Choice, *others: router_pb2.Choice) -> tuple[bool, bool]:
    record = Record("one", "talk", [1] * 100)
    _routed(record, router_pb2.Routed(choice=mine, others=others, attempt=1))
    return record.equal_loads, record.picked_warmest


def test_warm_is_what_lies_there_and_not_what_the_router_thinks_it_costs() -> None:
    assert routed(choice(0, 64), choice(64)) == (True, False), "VRAM is warmer than host memory"
    assert routed(choice(64), choice(0, 64)) == (True, True)
    assert routed(choice(0, 0, 64), choice(0, 0, 32)) == (True, True)
    assert routed(choice(0, 0, 32), choice(0, 0, 64)) == (True, False), "more is warmer"
    assert routed(choice(0, 64), choice(0, 0, 0, 96)) == (True, True), "neither is"
    assert routed(choice(0, 0, 0, 96), choice(0, 64)) == (True, True)
    assert routed(choice(), choice()) == (True, True)
    assert routed(choice(), choice(64, draining=True)) == (True, True)
    assert not is_warmer([1, 2, 3, 4], [1, 2, 3, 4])


def test_loads_are_equal_where_nobody_waits_and_nodes_are_about_as_fast() -> None:
    assert routed(choice(0, 64), choice(64, wait_s=1.0))[0] is False
    assert routed(choice(0, 64), choice(64, pace=0.02))[0] is False
    assert routed(choice(0, 64), choice(64, pace=0.011))[0] is True
    assert routed(choice(0, 64, wait_s=1.0), choice(64, wait_s=1.0))[0] is True
