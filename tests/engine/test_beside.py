"""A lower tier that does not answer holds up nobody, and no block changes hands under its copy."""

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch

from kvtier.core.blocks import BlockKey, Namespace
from kvtier.core.breakeven import ComputeCost
from kvtier.core.policy import NO_USE, Use
from kvtier.core.tiers import Tier
from kvtier.engine.model import LoadedModel
from kvtier.engine.sequence import Done, Event, Failed, Request, Started, Tokens
from kvtier.engine.transformers import Engine, Handle
from kvtier.errors import WorkerLost
from tests.engine.support import BLOCK, DictTier, ask, collect, prompt_of, small
from tests.engine.test_transformers import matches, reference, running, until


class GatedTier(DictTier):
    """Answers only while its gates are open; notes who calls it and in which order."""

    def __init__(self, storage: torch.Tensor) -> None:
        super().__init__(storage)
        self.broken = ""
        self.restores, self.saves = threading.Event(), threading.Event()
        self.restores.set()
        self.saves.set()
        self.asked = queue.SimpleQueue[tuple[str, list[int]]]()
        self.threads: set[int] = set()

    def restore(
        self,
        keys: Sequence[BlockKey],
        first: int,
        block_ids: Sequence[int],
        compute: ComputeCost | None = None,
        use: Use = NO_USE,
    ) -> list[Tier]:
        self.threads.add(threading.get_ident())
        self.asked.put(("restore", list(block_ids)))
        assert self.restores.wait(60)
        assert self.broken != "restore"
        return super().restore(keys, first, block_ids, compute, use)

    def save(
        self, keys: Sequence[BlockKey], first: int, block_ids: Sequence[int], use: Use = NO_USE
    ) -> int:
        self.threads.add(threading.get_ident())
        self.asked.put(("save", list(block_ids)))
        assert self.saves.wait(60)
        assert self.broken != "save"
        return super().save(keys, first, block_ids, use)

    def close(self) -> None:
        self.threads.add(threading.get_ident())
        super().close()

    def next_asked(self, what: str) -> list[int]:
        """The blocks of the next call, which must be `what`."""
        call, ids = self.asked.get(timeout=60)
        assert call == what
        return ids


@dataclass
class Told:
    """Passed as `deliver`; with the event number `stop_at` the engine goes on after `go`."""

    stop_at: int = 0
    events: list[Event] = field(default_factory=list)
    go: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)

    def __call__(self, event: Event) -> None:
        self.events.append(event)
        if len(self.events) == self.stop_at:
            assert self.go.wait(60)
        if isinstance(event, Done | Failed):
            self.ended.set()


class Gated:
    """An engine over a `GatedTier` that holds `prompt`, which the pool does not hold."""

    def __init__(self, loaded: LoadedModel, blocks: int = 64, **settings: object) -> None:
        self.loaded = loaded
        self.tiers: list[GatedTier] = []
        self.engine = Engine(loaded, small(loaded, blocks, **settings), self._make)
        self.prompt = prompt_of(130, 70, loaded.vocab_size)
        ask(self.engine, self.prompt)
        if settings.get("save") == "evict":
            ask(self.engine, prompt_of(16 * blocks, 71, loaded.vocab_size), 1)
        assert self.engine.clear().result(60)
        while not self.tier.asked.empty():
            self.tier.asked.get()

    @property
    def tier(self) -> GatedTier:
        """The one that restores; a second one, if any, takes what is evicted."""
        return self.tiers[0]

    def _make(self, namespace: Namespace, storage: torch.Tensor) -> DictTier:
        self.tiers.append(GatedTier(storage))
        self.tiers[-1].blocks = self.tier.blocks
        return self.tiers[-1]

    def submit(
        self, prompt: list[int], max_tokens: int = 8, stop_at: int = 0
    ) -> tuple[Handle, Told]:
        told = Told(stop_at)
        request = Request(
            token_ids=prompt, max_tokens=max_tokens, ignore_eos=True, return_first_logits=True
        )
        return self.engine.submit(request, told), told


@contextmanager
def gated(loaded: LoadedModel, blocks: int = 64, **settings: object) -> Iterator[Gated]:
    """Opens the gates at the end, closes the engine and checks its bookkeeping."""
    each = Gated(loaded, blocks, **settings)
    with running(each.engine):
        try:
            yield each
        finally:
            each.tier.restores.set()
            each.tier.saves.set()
    for tier in each.tiers:
        assert tier.closed
        assert len(tier.threads) == 1, "one thread alone calls the tiers"
        assert tier.threads != {threading.get_ident()}


def test_others_are_answered_while_a_restore_waits(tiny: LoadedModel) -> None:
    with gated(tiny) as each:
        each.tier.restores.clear()
        _, slow = each.submit(each.prompt)
        each.tier.next_asked("restore")
        # Too short for a block that could be restored, so it asks the tiers for nothing.
        short = prompt_of(BLOCK, 72, tiny.vocab_size)
        _, quick = each.submit(short, 40)
        until(lambda: len(quick.events) == 41)
        assert not slow.events
        assert each.engine.load().running == 2
        each.tier.restores.set()
        assert slow.ended.wait(60)
        assert quick.ended.wait(60)
        answer = collect(slow.events)
        assert answer.started.restored == {Tier.HOST: 128}
        assert matches(answer, each.prompt, reference(tiny))
        assert matches(collect(quick.events), short, reference(tiny))


def test_one_that_decodes_already_goes_on(tiny: LoadedModel) -> None:
    with gated(tiny) as each:
        each.tier.restores.clear()
        _, first = each.submit([5, 6, 7], 400, stop_at=3)
        until(lambda: len(first.events) == 3)
        _, slow = each.submit(each.prompt)
        first.go.set()
        each.tier.next_asked("restore")
        until(lambda: len(first.events) == 401)
        assert not slow.events


def test_equal_prompts_that_wait_are_restored_once(tiny: LoadedModel) -> None:
    with gated(tiny) as each:
        each.tier.restores.clear()
        _, one = each.submit(each.prompt)
        each.tier.next_asked("restore")
        _, two = each.submit(each.prompt)
        until(lambda: each.engine.load().running == 2)
        each.tier.restores.set()
        assert one.ended.wait(60)
        assert two.ended.wait(60)
        assert collect(one.events).started.restored == {Tier.HOST: 128}
        assert collect(two.events).started.restored == {Tier.VRAM: 128}
        assert each.tier.asked.empty()


def test_long_restores_take_turns_piece_by_piece(tiny: LoadedModel) -> None:
    loaded = replace(tiny, layout=replace(tiny.layout, block_tokens=4))
    with gated(loaded, 200) as each:
        long = prompt_of(400, 79, tiny.vocab_size)  # more blocks than one piece
        cold = ask(each.engine, long)
        each.engine.clear().result(60)
        while not each.tier.asked.empty():
            each.tier.asked.get()
        each.tier.restores.clear()
        _, slow = each.submit(long)
        assert len(each.tier.next_asked("restore")) == 64
        _, quick = each.submit(each.prompt)
        until(lambda: each.engine.load().running == 2)
        each.tier.restores.set()
        assert slow.ended.wait(60)
        assert quick.ended.wait(60)
        assert [len(each.tier.next_asked("restore")) for _ in range(2)] == [32, 35]
        assert collect(slow.events).started.restored == {Tier.HOST: 396}
        assert collect(slow.events).ids == cold.ids


def test_a_tier_that_fails_is_a_miss(tiny: LoadedModel) -> None:
    with gated(tiny) as each:
        each.tier.restores.clear()
        _, slow = each.submit(each.prompt)
        each.tier.next_asked("restore")
        each.tier.away = True
        each.tier.restores.set()
        assert slow.ended.wait(60)
        answer = collect(slow.events)
        assert answer.hit == 0
        assert matches(answer, each.prompt, reference(tiny))


def test_what_others_compute_meanwhile_is_not_kept_twice(tiny: LoadedModel) -> None:
    with gated(tiny) as each:
        each.tier.restores.clear()
        _, slow = each.submit(each.prompt)
        each.tier.next_asked("restore")
        # Computes the very block that is being restored: it is too short to ask for it.
        each.submit(each.prompt[:BLOCK], 1)
        until(lambda: len(each.engine.pool) == 1)
        each.tier.restores.set()
        assert slow.ended.wait(60)
        answer = collect(slow.events)
        assert answer.hit == 128
        assert matches(answer, each.prompt, reference(tiny))


def test_a_cancelled_one_keeps_its_blocks_until_the_copy_has_ended(tiny: LoadedModel) -> None:
    with gated(tiny, 12) as each:
        each.tier.restores.clear()
        handle, slow = each.submit(each.prompt)
        under_way = set(each.tier.next_asked("restore"))
        assert len(under_way) == 8
        handle.cancel()
        until(lambda: not each.engine.load().running)
        # Wants the whole pool, and gets what no copy is written to.
        other = prompt_of(BLOCK, 73, tiny.vocab_size)
        _, quick = each.submit(other, 200)
        until(lambda: len(quick.events) == 201)
        assert len(each.engine.pool) == 4
        each.tier.restores.set()
        assert quick.ended.wait(60)
        assert not slow.events
        assert matches(collect(quick.events), other, reference(tiny))
        saved = each.tier.next_asked("save")
        assert not set(saved) & under_way
        each.tier.restores.set()
        again = ask(each.engine, each.prompt)
        assert again.started.restored == {Tier.HOST: 128}, "all blocks are there again"


@pytest.mark.parametrize("blocked", ["restores", "saves"])
def test_closing_tells_at_once_and_ends_when_the_copy_has(tiny: LoadedModel, blocked: str) -> None:
    each = Gated(tiny)
    getattr(each.tier, blocked).clear()
    prompt = each.prompt if blocked == "restores" else prompt_of(60, 74, tiny.vocab_size)
    _, told = each.submit(prompt, 8)
    each.tier.next_asked("restore")
    if blocked == "saves":
        until(lambda: len(told.events) == 9)
    closing = threading.Thread(target=each.engine.close)
    closing.start()
    if blocked == "restores":
        assert told.ended.wait(60)
        (failed,) = told.events
        assert isinstance(failed, Failed)
        assert isinstance(failed.error, WorkerLost)
    assert not each.tier.closed
    getattr(each.tier, blocked).set()
    closing.join(60)
    assert not closing.is_alive()
    assert each.tier.closed
    if blocked == "saves":
        assert collect(told.events).done.saved_tokens == 4 * BLOCK, "the answer was complete"
    each.engine.pool.check()
    resident = len(each.engine.pool)
    assert each.engine.pool.clear() == resident
    assert len(each.engine.pool.allocate(64)[0]) == 64, "no block is lost"


@pytest.mark.parametrize("call", ["restore", "save"])
def test_a_bug_in_a_tier_fails_the_requests_and_is_not_hidden(tiny: LoadedModel, call: str) -> None:
    each = Gated(tiny)
    each.tier.broken = call
    _, told = each.submit(prompt_of(60, 80, tiny.vocab_size), 1)
    assert told.ended.wait(60)
    assert isinstance(told.events[-1], Failed)
    with pytest.raises(AssertionError):
        each.engine.close()
    assert each.tier.closed
    each.engine.pool.check()


def test_draining_waits_for_a_restore(tiny: LoadedModel) -> None:
    each = Gated(tiny)
    each.tier.restores.clear()
    _, told = each.submit(each.prompt)
    each.tier.next_asked("restore")
    closing = threading.Thread(target=each.engine.close, args=(60,))
    closing.start()
    each.tier.restores.set()
    closing.join(60)
    assert collect(told.events).hit == 128


def test_tokens_are_told_while_a_save_waits_and_done_says_what_was_saved(
    tiny: LoadedModel,
) -> None:
    with gated(tiny) as each:
        each.tier.saves.clear()
        prompt = prompt_of(60, 75, tiny.vocab_size)
        _, told = each.submit(prompt, 40)
        until(lambda: len(told.events) == 41)
        assert isinstance(told.events[0], Started)
        assert all(isinstance(event, Tokens) for event in told.events[1:])
        each.tier.saves.set()
        assert told.ended.wait(60)
        assert collect(told.events).done.saved_tokens == (60 + 39) // BLOCK * BLOCK


def test_blocks_that_are_being_saved_stay_when_their_request_is_cancelled(
    tiny: LoadedModel,
) -> None:
    with gated(tiny) as each:
        each.tier.saves.clear()
        handle, told = each.submit(prompt_of(60, 76, tiny.vocab_size), 400, stop_at=21)
        each.tier.next_asked("restore")
        saving = each.tier.next_asked("save")
        until(lambda: len(told.events) == 21)
        handle.cancel()
        told.go.set()
        until(lambda: not each.engine.load().running)
        each.engine.clear().result(60)
        assert len(each.engine.pool) == len(saving) == 3
        each.tier.saves.set()
        until(lambda: each.engine.clear().result(60) == 3)


def test_evict_saves_before_the_blocks_are_written_again(tiny: LoadedModel) -> None:
    with gated(tiny, 9, save="evict") as each:
        one, two = (prompt_of(130, seed, tiny.vocab_size) for seed in (77, 78))
        cold = ask(each.engine, one)
        ask(each.engine, two)  # computed: its blocks take the place of the first's
        assert matches(ask(each.engine, each.prompt), each.prompt, reference(tiny))  # restored
        warm = ask(each.engine, one)
        assert warm.hit == 128
        assert matches(warm, one, reference(tiny))
        assert warm.ids == cold.ids
        assert ask(each.engine, two).hit == 128


def test_what_is_evicted_is_saved_beside_a_restore_that_waits(tiny: LoadedModel) -> None:
    with gated(tiny, 20, save="evict") as each:
        each.tier.restores.clear()
        _, slow = each.submit(each.prompt)
        each.tier.next_asked("restore")
        # Too short to be restored; its answer takes more blocks than are left.
        short = prompt_of(BLOCK, 81, tiny.vocab_size)
        _, quick = each.submit(short, 150)
        assert quick.ended.wait(60)
        shorter = prompt_of(BLOCK, 82, tiny.vocab_size)
        _, second = each.submit(shorter, 150)
        assert second.ended.wait(60), "an eviction waits for another request's restore"
        assert each.tiers[1].next_asked("save")
        assert not slow.events
        each.tier.restores.set()
        assert slow.ended.wait(60)
        assert matches(collect(second.events), shorter, reference(tiny))
        answer = collect(slow.events)
        assert answer.hit == 128
        assert matches(answer, each.prompt, reference(tiny))
