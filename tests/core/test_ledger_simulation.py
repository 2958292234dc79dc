"""The ledger under a failing world, and the proof that the simulation sees what goes wrong."""

import inspect
from collections import Counter

import pytest

from kvtier.core import ledger
from kvtier.testing.ledger import STATES, simulate
from tests.core.planted import BUGS, Bug, planted

SEEDS = 300
STEPS = 250
# Which of the first seeds, of all in order, is the first to meet these bugs: a search begins
# there. Where that is no longer so, it takes longer and finds the same.
FIRST_MET_AT = {
    "a load that fails takes its copy from under a copy down": 27,
    "no answer counts as not there": 34,
    "what was found bad is kept": 27,
    "what was found bad is read again": 64,
    "a copy starts during a load": 152,
    "what was found bad stays in the store": 204,
    "the slot of a load that nobody waits for is taken": 448,
}
_met_at: dict[str, int] = {**FIRST_MET_AT}  # a bug's name: where the next search for it begins


def test_no_seed_breaks_a_promise_and_together_they_reach_every_state():
    seen = Counter[str]()
    for seed in range(SEEDS):
        simulate(seed, STEPS, seen)
    assert {state: seen[state] for state in STATES if seen[state] < 10} == {}


def test_one_seed_gives_one_run():
    runs = [Counter[str](), Counter[str]()]
    for seen in runs:
        simulate(7, STEPS, seen)
    assert runs[0] == runs[1]


def hunt(bug: Bug, buggy: type[ledger.Ledger]) -> BaseException | None:
    """What a seed that is broken by a ledger says."""
    begin, end = (
        _met_at.get(bug.name, 0),
        2 * SEEDS,
    )  # some need a host tier that is full of what moves
    for seed in [*range(begin, end), *range(begin)]:
        try:
            simulate(seed, STEPS, Counter(), buggy)
        except (AssertionError, KeyError) as error:
            _met_at[bug.name] = seed
            return error
    return None


class OneByOne(ledger.Ledger):
    """Asks of each victim whether it may go."""

    def _all_may_go(self, keys):
        return False


def all_told(seed: int, kind: type[ledger.Ledger]) -> list[ledger.Effect]:
    told: list[ledger.Effect] = []

    class Heard(kind):  # type: ignore[misc, valid-type]
        def take_effects(self) -> list[ledger.Effect]:
            effects = super().take_effects()
            told.extend(effects)
            return effects

    simulate(seed, STEPS, Counter(), Heard)
    return told


def test_victims_that_are_chosen_together_are_those_chosen_one_by_one():
    for seed in range(40):
        assert all_told(seed, ledger.Ledger) == all_told(seed, OneByOne)


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_planted_bug_is_found(bug: Bug):
    with planted(bug) as buggy:
        found = hunt(bug, buggy)
    assert found is not None
    assert any("seed" in note for note in found.__notes__)


@pytest.mark.parametrize("bug", BUGS, ids=str)
def test_a_planted_bug_is_found_without_looking_inside(bug: Bug):
    """By what clients, stores and routers see: not by the ledger's own `check`."""
    with planted(bug) as buggy:
        assert hunt(bug, type("Blind", (buggy,), {"check": lambda self: None})) is not None


def test_searches_begin_at_bugs_that_there_are():
    assert FIRST_MET_AT.keys() <= {bug.name for bug in BUGS}


def test_planting_nothing_finds_nothing():
    with planted(Bug("none", ())) as same:
        assert same is not ledger.Ledger
        for seed in range(20):
            simulate(seed, STEPS, Counter(), same)


def test_a_bug_that_no_longer_fits_its_source_is_reported():
    stale = Bug("stale", (("this text is nowhere", ""),))
    with pytest.raises(LookupError, match="stale"), planted(stale):
        pass


def test_planting_leaves_the_real_ledger_alone():
    before = inspect.getsource(ledger)
    with planted(BUGS[0]):
        pass
    assert inspect.getsource(ledger) == before
    simulate(0, STEPS, Counter())
