"""What a request counts as brought from another node."""

from kvtier.core.tiers import Tier
from kvtier.engine.pulling import arrived
from kvtier.engine.sequence import Request, Running


def test_what_was_pulled_counts_as_far_as_it_was_restored() -> None:
    request = Request(token_ids=[1], max_tokens=1, source="a")
    sequence = Running(request, lambda _: None, 0.0, 2, [1])
    for came, sources, pulled in (
        (5, [Tier.HOST] * 5, 5),
        (5, [Tier.HOST] * 3, 8),  # two were evicted since
        (2, [Tier.HOST, Tier.DISK, Tier.HOST, Tier.HOST], 10),  # one had been there
        (4, [], 10),  # the restore failed
        (0, [Tier.HOST] * 4, 10),  # nothing was asked for
    ):
        sequence.coming = came
        arrived(sequence, sources)
        assert sequence.pulled == pulled
        assert sequence.coming == 0
