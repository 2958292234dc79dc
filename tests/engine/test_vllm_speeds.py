"""What a worker on vLLM tells routers of its speed."""

from kvtier.core.tiers import Tier
from kvtier.engine.newest import FEW
from kvtier.engine.sequence import Started
from kvtier.engine.vllm.speeds import Speeds


def started(
    computed: int, prefill_s: float, restored: dict[Tier, int], restore_s: float
) -> Started:
    return Started(
        prompt_tokens=computed + sum(restored.values()), restored=restored,
        computed_tokens=computed, queue_s=0.0, restore_s=restore_s, prefill_s=prefill_s,
    )  # fmt: skip


def test_a_few_tokens_teach_nothing():
    speeds = Speeds(1000)
    speeds.measure(started(24, 0.1, {Tier.HOST: 32}, 0.1))
    assert (speeds.prefill, speeds.restore(Tier.HOST)) == (0.0, 0.0)


def test_prefill_and_restores_are_measured_apart():
    speeds = Speeds(1000)
    for _ in range(FEW):
        assert (speeds.prefill, speeds.restore(Tier.DISK)) == (0.0, 0.0)
        speeds.measure(started(1000, 2.0, {}, 0.0))
        speeds.measure(started(24, 0.1, {Tier.VRAM: 500, Tier.DISK: 2000}, 0.5))
    assert speeds.prefill == 500.0
    assert speeds.restore(Tier.DISK) == 2000 * 1000 / 0.5
    assert speeds.restore(Tier.HOST) == 0.0
    speeds.measure(started(1000, 60.0, {}, 0.0))
    assert speeds.prefill == 500.0, "one that was held up changes nothing"
    for _ in range(FEW + 2):
        speeds.measure(started(1000, 1.0, {}, 0.0))
    assert speeds.prefill == 1000.0


def test_prefill_is_told_as_at_the_start_of_a_prompt():
    """Where a token at 1,000 takes twice as long as the first, 500 from 2,000 on are 1,625."""
    speeds = Speeds(1000, doubles_at=1000)
    for _ in range(FEW):
        speeds.measure(started(500, 2.0, {Tier.VRAM: 2000}, 0.0))
    assert speeds.prefill == 1625 / 2.0


def test_a_restore_from_two_tiers_teaches_of_neither():
    speeds = Speeds(1000)
    speeds.measure(started(24, 0.1, {Tier.HOST: 1000, Tier.DISK: 1000}, 0.5))
    assert not speeds.restore(Tier.HOST)
    assert not speeds.restore(Tier.DISK)
