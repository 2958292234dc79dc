from kvtier.core import fidelity
from kvtier.core.fidelity import Fidelity, Lineage
from kvtier.testing.stores import key

PATH = [key(f"block {n}") for n in range(6)]
OTHER = [PATH[0], *(key(f"other {n}") for n in range(5))]


def test_blocks_are_exact_until_something_says_otherwise() -> None:
    lineage = Lineage()
    lineage.written(PATH, PATH)
    lineage.loaded(PATH[0], Fidelity.EXACT)
    assert all(lineage.of(each) == Fidelity.EXACT for each in PATH)


def test_what_is_computed_on_a_lossy_block_is_derived_and_so_is_what_follows() -> None:
    lineage = Lineage()
    lineage.loaded(PATH[1], Fidelity.CODED)
    lineage.written(PATH[:4], PATH[2:4])
    lineage.written(PATH, PATH[4:])
    assert [lineage.of(each) for each in PATH] == [
        Fidelity.EXACT, Fidelity.CODED, *[Fidelity.DERIVED] * 4
    ]  # fmt: skip
    lineage.written(OTHER, OTHER[1:])
    assert all(lineage.of(each) == Fidelity.EXACT for each in OTHER)


def test_it_is_known_after_the_block_itself_has_gone() -> None:
    """The engine may still compute on it."""
    lineage = Lineage()
    lineage.loaded(PATH[1], Fidelity.CODED)
    lineage.gone(PATH[1])
    assert lineage.of(PATH[1]) == Fidelity.EXACT
    lineage.written(PATH, PATH)
    assert lineage.of(PATH[1]) == Fidelity.EXACT  # computed again, on what is exact
    assert lineage.of(PATH[2]) == Fidelity.DERIVED


def test_an_exact_copy_takes_the_mark_off() -> None:
    lineage = Lineage()
    lineage.loaded(PATH[1], Fidelity.CODED | Fidelity.DERIVED)
    lineage.loaded(PATH[1], Fidelity.EXACT)
    assert lineage.of(PATH[1]) == Fidelity.EXACT


def test_more_than_can_be_remembered_makes_everything_doubtful(monkeypatch) -> None:
    monkeypatch.setattr(fidelity, "MOST_INEXACT", 3)
    lineage = Lineage()
    for each in PATH[:3]:
        lineage.loaded(each, Fidelity.CODED)
    lineage.written(OTHER[1:], OTHER[1:])
    assert all(lineage.of(each) == Fidelity.DERIVED for each in OTHER[1:])
