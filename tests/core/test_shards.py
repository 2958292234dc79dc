"""Maps, lines and ghosts against the plain containers that they stand for."""

from collections import OrderedDict
from random import Random

import pytest

from kvtier.core.blocks import BlockKey
from kvtier.core.ghosts import Ghosts
from kvtier.core.shards import KeyMap, Line


def key(n: int) -> BlockKey:
    return BlockKey(n.to_bytes(16, "big"))


@pytest.mark.parametrize("most", [None, 3000, 1 << 20])
def test_a_map_is_a_dict(most):
    rng, ours, theirs = Random(1), KeyMap[int](most), {}
    for n in range(20_000):
        each = key(rng.randrange(3000))
        assert (each in ours) == (each in theirs)
        assert ours.get(each) == theirs.get(each)
        if each in theirs and rng.random() < 0.5:
            assert ours.pop(each) == theirs.pop(each)
        else:
            ours[each] = theirs[each] = n
    assert dict(ours.items()) == theirs
    assert {*ours} == theirs.keys()
    assert len(ours) == len(theirs)
    del ours[each]
    with pytest.raises(KeyError):
        ours.pop(each)


@pytest.mark.parametrize("keys", [3, 700, 5000])
def test_a_line_is_an_ordered_dict(keys):
    rng, ours, theirs = Random(keys), Line(), OrderedDict()
    for n in range(30_000):
        each = key(rng.randrange(keys))
        if rng.random() < 0.4:
            assert ours.remove(each) == theirs.pop(each, None)
        else:
            ours.put(each, n)
            theirs[each] = n
            theirs.move_to_end(each)
        if not n % 1000:
            assert [*ours.items()] == [*theirs.items()]
            assert [*ours] == [*theirs]
        assert len(ours) == len(theirs)
        assert (each in ours) == (each in theirs)
    while theirs:  # from the front, as a tier that is cleared
        assert next(iter(ours)) == next(iter(theirs))
        assert ours.remove(next(iter(ours))) == theirs.popitem(last=False)[1]
    assert [*ours] == []


def test_a_line_keeps_no_more_bundles_than_it_has_keys():
    line = Line()
    for n in range(100_000):
        line.put(key(n % 7))  # the same few, for ever
    line.put(key(1000))
    assert len(line._bundles) <= len(line) + 1


@pytest.mark.parametrize("limit", [1, 50, 3000])
def test_ghosts_are_the_last_departures_less_those_that_came_back(limit):
    rng, ghosts = Random(limit), Ghosts()
    left: list[tuple[BlockKey, float, int, int]] = []  # in order; the key's last one counts
    back: set[int] = set()
    for n in range(20_000):
        each = key(rng.randrange(5000))
        last = max((i for i in range(max(0, len(left) - limit), len(left)) if left[i][0] == each),
                   default=-1) if not n % 50 else None  # fmt: skip
        if not n % 50:
            expected = left[last][1:] if last >= 0 and last not in back else None
            assert (each in ghosts) == (expected is not None)
            found = ghosts.take([key(5000), each])  # the first was never there
            assert found == (2, [(1, expected)] if expected else [])
            back.add(last)
        else:
            cls = rng.randrange(-1, 37)
            ghosts.put([each], n / 7, cls, n // 3, limit)
            left.append((each, n / 7, cls, n // 3))
        assert len(ghosts) <= limit
    assert len(ghosts) == len([*ghosts])
