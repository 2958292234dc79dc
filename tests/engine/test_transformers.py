"""The engine: what it restores changes no answer, what ends frees all, what it refuses it names."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kvtier.config import WorkerConfig
from kvtier.core.blocks import BlockKey, block_keys
from kvtier.core.breakeven import as_first
from kvtier.core.tiers import Tier
from kvtier.engine.model import LoadedModel
from kvtier.engine.pool import Changes
from kvtier.engine.reference import Reference
from kvtier.engine.sequence import Done, Event, Failed, FinishReason, Request, Started
from kvtier.engine.transformers import Engine
from kvtier.errors import ConfigError, InvalidRequest, Overloaded, WorkerLost
from tests.engine.support import BLOCK, STEP, Answer, Tiers, ask, collect, prompt_of, small


def until(condition: Callable[[], bool]) -> None:
    """Wait for what must come about."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never came about"
        time.sleep(0.002)


@contextmanager
def running(engine: Engine) -> Iterator[Engine]:
    """Closes the engine and checks its bookkeeping once its thread has ended."""
    try:
        yield engine
    finally:
        engine.close(60)
    engine.pool.check()
    resident = len(engine.pool)
    assert engine.pool.clear() == resident, "something is still pinned"


def reference(loaded: LoadedModel) -> Reference:
    return Reference(loaded.model, STEP)


def matches(answer: Answer, prompt: list[int], ref: Reference) -> bool:
    """Whether plain Transformers, given the same past, computes the very same."""
    logits, ids = ref.next_token_logits_and_greedy(prompt, answer.hit, len(answer.ids))
    return torch.equal(answer.logits, logits) and answer.ids == ids


def keys_of(loaded: LoadedModel, prompt: list[int]) -> list[BlockKey]:
    return block_keys(loaded.namespace().root(), prompt, BLOCK)


class TestReuse:
    def test_a_conversation_is_computed_as_without_us(self, tiny: LoadedModel) -> None:
        ref = reference(tiny)
        prompt = prompt_of(100, 1, tiny.vocab_size)
        with running(Engine(tiny, small(tiny))) as engine:
            for turn in range(4):
                answer = ask(engine, prompt, 20)
                assert matches(answer, prompt, ref)
                # All full blocks of what was computed so far, the last answer's too.
                assert answer.hit == (0 if not turn else (len(prompt) - 10 - 1) // BLOCK * BLOCK)
                prompt = prompt + answer.ids + prompt_of(10, turn, tiny.vocab_size)

    def test_the_last_prompt_token_is_always_computed(self, tiny: LoadedModel) -> None:
        prompt = prompt_of(3 * BLOCK, 2, tiny.vocab_size)
        with running(Engine(tiny, small(tiny))) as engine:
            cold, warm = ask(engine, prompt), ask(engine, prompt)
        assert warm.started.restored == {Tier.VRAM: 2 * BLOCK}
        assert warm.started.computed_tokens == BLOCK
        assert warm.ids == cold.ids

    def test_equal_tokens_after_another_beginning_are_no_hit(self, tiny: LoadedModel) -> None:
        prompt = prompt_of(60, 3, tiny.vocab_size)
        other = [prompt[0] ^ 1, *prompt[1:]]
        with running(Engine(tiny, small(tiny))) as engine:
            ask(engine, prompt)
            answer = ask(engine, other)
        assert answer.hit == 0
        assert matches(answer, other, reference(tiny))

    def test_branches_share_their_beginning(self, tiny: LoadedModel) -> None:
        stem = prompt_of(4 * BLOCK, 4, tiny.vocab_size)
        left, right = stem + [5] * 20, stem + [6] * 20
        with running(Engine(tiny, small(tiny))) as engine:
            ask(engine, left)
            answer = ask(engine, right)
        assert answer.started.restored == {Tier.VRAM: 4 * BLOCK}
        ref = reference(tiny)
        ref.next_token_logits_and_greedy(left, 0, 1)
        assert matches(answer, right, ref)

    @pytest.mark.parametrize("tier", [Tier.HOST, Tier.DISK, Tier.SHARED])
    def test_what_comes_from_lower_tiers_is_what_was_computed(
        self, tiny: LoadedModel, tier: Tier
    ) -> None:
        tiers = Tiers(tier)
        ref = reference(tiny)
        prompt = prompt_of(130, 5, tiny.vocab_size)
        with running(Engine(tiny, small(tiny), tiers)) as engine:
            cold = ask(engine, prompt)
            assert matches(cold, prompt, ref)
            assert engine.clear().result(60) > 0
            warm = ask(engine, prompt)
            assert warm.started.restored == {tier: 128}
            assert matches(warm, prompt, ref)
            assert ask(engine, prompt).started.restored == {Tier.VRAM: 128}
        assert tiers.only.closed

    def test_pool_and_lower_tier_each_give_their_part(self, tiny: LoadedModel) -> None:
        tiers = Tiers()
        prompt = prompt_of(130, 6, tiny.vocab_size)
        with running(Engine(tiny, small(tiny), tiers)) as engine:
            cold = ask(engine, prompt)
            engine.clear().result(60)
            ask(engine, prompt[:40], 1)  # two blocks come back into the pool
            warm = ask(engine, prompt)
        assert warm.started.restored == {Tier.VRAM: 32, Tier.HOST: 96}
        assert warm.ids == cold.ids

    def test_a_gap_in_the_lower_tier_ends_what_is_restored(self, tiny: LoadedModel) -> None:
        tiers = Tiers()
        prompt = prompt_of(130, 7, tiny.vocab_size)
        ref = reference(tiny)
        with running(Engine(tiny, small(tiny), tiers)) as engine:
            ask(engine, prompt)
            ref.next_token_logits_and_greedy(prompt, 0, 1)
            engine.clear().result(60)
            del tiers.only.blocks[keys_of(tiny, prompt)[3]]
            warm = ask(engine, prompt)
        assert warm.started.restored == {Tier.HOST: 3 * BLOCK}
        assert matches(warm, prompt, ref)

    @pytest.mark.model
    def test_smollm2_answers_the_same_from_the_pool_and_from_a_tier(
        self, smollm2: LoadedModel
    ) -> None:
        tiers, ref = Tiers(), reference(smollm2)
        prompt = prompt_of(150, 8, smollm2.vocab_size)
        with running(Engine(smollm2, small(smollm2, 32), tiers)) as engine:
            cold = ask(engine, prompt)
            assert matches(cold, prompt, ref)
            longer = prompt + cold.ids + prompt_of(20, 9, smollm2.vocab_size)
            warm = ask(engine, longer)
            assert warm.started.restored == {Tier.VRAM: 144}
            assert matches(warm, longer, ref)
            engine.clear().result(60)
            restored = ask(engine, longer)
            assert restored.started.restored == {Tier.HOST: 176}
            assert matches(restored, longer, ref)


class TestSmallPool:
    def test_what_was_evicted_comes_back_from_below(self, tiny: LoadedModel) -> None:
        tiers, ref = Tiers(), reference(tiny)
        one, two = prompt_of(130, 10, tiny.vocab_size), prompt_of(130, 11, tiny.vocab_size)
        with running(Engine(tiny, small(tiny, 9, save="evict"), tiers)) as engine:
            assert matches(ask(engine, one), one, ref)
            assert not tiers.only.blocks, "nothing is saved before it is evicted"
            ask(engine, two)
            assert set(keys_of(tiny, one)[1:]) <= set(tiers.only.blocks)
            again = ask(engine, one)
        assert again.hit == 128
        assert matches(again, one, ref)

    def test_a_prompt_larger_than_the_pool_is_answered_all_the_same(
        self, tiny: LoadedModel
    ) -> None:
        prompt = prompt_of(200, 12, tiny.vocab_size)
        with running(Engine(tiny, small(tiny, 4), Tiers())) as engine:
            ref = reference(tiny)
            assert matches(ask(engine, prompt), prompt, ref)
            again = ask(engine, prompt)
        assert again.hit == 4 * BLOCK
        assert matches(again, prompt, ref)

    def test_a_pool_that_others_have_pinned_only_costs_the_reuse(self, tiny: LoadedModel) -> None:
        long, short = prompt_of(120, 13, tiny.vocab_size), prompt_of(60, 14, tiny.vocab_size)
        with running(Engine(tiny, small(tiny, 7))) as engine:
            first = engine.stream(Request(token_ids=long, max_tokens=390, ignore_eos=True))
            next(first)
            other = ask(engine, short)  # while the first goes on
            assert matches(other, short, reference(tiny))
            assert isinstance(list(first)[-1], Done)

    def test_one_block_must_fit(self, tiny: LoadedModel) -> None:
        layout = replace(tiny.layout, block_tokens=4096)
        with pytest.raises(ConfigError, match="vram_bytes is 1048576, must be at least 2097152"):
            Engine(replace(tiny, layout=layout), WorkerConfig(vram_bytes=2**20))


class TestSave:
    def test_fill_saves_each_full_block_once_its_token_was_told(self, tiny: LoadedModel) -> None:
        tiers = Tiers()
        prompt = prompt_of(100, 20, tiny.vocab_size)
        told: list[str] = []
        ended = threading.Event()

        def deliver(event: Event) -> None:
            told.append(type(event).__name__)
            if isinstance(event, Done):
                ended.set()

        with running(Engine(tiny, small(tiny, save="fill"), tiers)) as engine:
            tiers.only.on_save = lambda: told.append("save")
            engine.submit(Request(token_ids=prompt, max_tokens=40, ignore_eos=True), deliver)
            assert ended.wait(60)
            answer = ask(engine, prompt, 40)
        assert told.index("save") > 1, "the first token is told before"
        assert told[:2] == ["Started", "Tokens"]
        assert told[-1] == "Done"
        # 139 tokens have KV: the last of the answer was never computed on.
        assert set(tiers.only.blocks) == set(keys_of(tiny, (prompt + answer.ids)[:139]))
        assert answer.done.saved_tokens == 0, "all of it was saved before"

    def test_what_the_tier_holds_are_the_bytes_that_were_computed(self, tiny: LoadedModel) -> None:
        tiers = Tiers()
        prompt = prompt_of(100, 21, tiny.vocab_size)
        with running(Engine(tiny, small(tiny), tiers)) as engine:
            ask(engine, prompt)
            first = dict(tiers.only.blocks)
            tiers.only.blocks.clear()
            engine.clear().result(60)
            ask(engine, prompt)
        assert first.keys() == tiers.only.blocks.keys()
        assert all(torch.equal(first[key], block) for key, block in tiers.only.blocks.items())

    def test_fill_tries_again_after_the_tier_was_away(self, tiny: LoadedModel) -> None:
        tiers = Tiers()
        prompt = prompt_of(100, 22, tiny.vocab_size)
        with running(Engine(tiny, small(tiny), tiers)) as engine:
            tiers.only.away = True
            assert ask(engine, prompt).done.saved_tokens == 0
            tiers.only.away = False
            assert ask(engine, prompt).done.saved_tokens == 6 * BLOCK
        assert set(tiers.only.blocks) == set(keys_of(tiny, prompt))

    def test_second_use_saves_what_was_hit_and_nothing_before(self, tiny: LoadedModel) -> None:
        tiers = Tiers()
        prompt = prompt_of(100, 23, tiny.vocab_size)
        with running(Engine(tiny, small(tiny, save="second-use"), tiers)) as engine:
            ask(engine, prompt, 30)
            assert not tiers.only.blocks
            used = prompt[:50]
            assert ask(engine, used, 30).done.saved_tokens == 3 * BLOCK
            assert ask(engine, used, 30).hit == 3 * BLOCK
        assert set(tiers.only.blocks) == set(keys_of(tiny, used))

    def test_evict_saves_whole_runs_in_the_place_they_had(self, tiny: LoadedModel) -> None:
        tiers = Tiers()
        prompt = prompt_of(100, 24, tiny.vocab_size)
        with running(Engine(tiny, small(tiny, 7, save="evict"), tiers)) as engine:
            ask(engine, prompt, 1)
            engine.clear().result(60)  # drops, and saves nothing
            assert not tiers.only.blocks
            ask(engine, prompt, 1)
            ask(engine, prompt_of(120, 25, tiny.vocab_size), 1)
        assert set(tiers.only.blocks) == set(keys_of(tiny, prompt))


class TestTogether:
    def test_who_else_runs_changes_no_number(self, tiny: LoadedModel) -> None:
        prompts = [prompt_of(50 + 30 * i, 30 + i, tiny.vocab_size) for i in range(5)]
        with running(Engine(tiny, small(tiny, max_running=3))) as engine:
            streams = [engine.stream(request(prompt, 30)) for prompt in prompts]
            answers = [collect(list(stream)) for stream in streams]
        for answer, prompt in zip(answers, prompts, strict=True):
            assert answer.hit == 0
            assert matches(answer, prompt, reference(tiny))

    def test_equal_prompts_at_once_share_the_work(self, tiny: LoadedModel) -> None:
        prompt = prompt_of(400, 40, tiny.vocab_size)
        with running(Engine(tiny, small(tiny))) as engine:
            streams = [engine.stream(request(prompt, 4)) for _ in range(3)]
            answers = [collect(list(stream)) for stream in streams]
        computed = sum(answer.started.computed_tokens for answer in answers)
        assert computed <= 400 + 3 * STEP, "the prompt was computed about once"
        assert len({tuple(answer.ids) for answer in answers}) == 1

    def test_a_long_prompt_does_not_hold_up_a_short_one(self, tiny: LoadedModel) -> None:
        order: list[str] = []
        ended = threading.Semaphore(0)

        def deliver(name: str) -> Callable[[Event], None]:
            def told(event: Event) -> None:
                if isinstance(event, Started):
                    order.append(name)
                if isinstance(event, Done | Failed):
                    ended.release()

            return told

        long, short = prompt_of(480, 41, tiny.vocab_size), prompt_of(20, 42, tiny.vocab_size)
        with running(Engine(tiny, small(tiny))) as engine:
            with held_up(engine):
                engine.submit(request(long, 4), deliver("long"))
                engine.submit(request(short, 4), deliver("short"))
            assert ended.acquire(timeout=60)
            assert ended.acquire(timeout=60)
        assert order == ["short", "long"]

    def test_more_than_max_running_wait_and_more_than_max_waiting_are_refused(
        self, tiny: LoadedModel
    ) -> None:
        prompt = prompt_of(20, 43, tiny.vocab_size)
        settings = small(tiny, max_running=2, max_waiting=1)
        with running(Engine(tiny, settings)) as engine:
            with held_up(engine):
                streams = [engine.stream(request(prompt, 5)) for _ in range(2)]
                with pytest.raises(Overloaded, match=r"max_running 2 .*max_waiting 1"):
                    engine.stream(request(prompt, 5))
                load = engine.load()
                assert (load.running, load.waiting, load.waiting_tokens) == (1, 2, 40)
                assert load.waiting_as_first == pytest.approx(
                    2 * as_first(0, 20, engine.doubles_at)
                )
                assert load.waiting_as_first > 40
            assert [len(collect(list(each)).ids) for each in streams] == [5, 5]
            assert ask(engine, prompt).ids  # there is room again

    @pytest.mark.parametrize(("warm", "waiting"), [(0, 20), (15, 5), (20, 1), (10**6, 1)])
    def test_a_prompt_that_is_not_restored_yet_waits_as_its_router_thinks(
        self, tiny: LoadedModel, warm: int, waiting: int
    ) -> None:
        """Or a prompt that will take a moment is told of as one to be computed whole."""
        asked = replace(request(prompt_of(20, 43, tiny.vocab_size), 5), warm_tokens=warm)
        with running(Engine(tiny, small(tiny))) as engine:
            with held_up(engine):
                stream = engine.stream(asked)
                load = engine.load()
                assert load.waiting_tokens == waiting
                assert load.waiting_as_first == pytest.approx(
                    as_first(20 - waiting, 20, engine.doubles_at)
                )
            assert len(collect(list(stream)).ids) == 5, "though nothing was there"
            assert engine.load().waiting_tokens == 0

    @pytest.mark.parametrize("loads", ["worth", "always"])
    def test_tiers_hear_what_computing_costs_once_it_is_measured(
        self, tiny: LoadedModel, loads: str
    ) -> None:
        tiers = Tiers()
        settings = small(tiny, prefill_tokens=64, loads=loads)
        with running(Engine(tiny, settings, tiers)) as engine:
            ask(engine, prompt_of(200, 45, tiny.vocab_size), 2)
            ask(engine, prompt_of(200, 46, tiny.vocab_size), 2)
        first, *_, last = tiers.only.told
        assert first is None, "nothing was measured yet"
        if loads == "always":
            assert last is None
        else:
            assert last is not None
            assert last.block_s > 0
            assert last.growth_s > 0, "later blocks cost more"

    def test_the_load_says_how_far_a_prefill_is(self, tiny: LoadedModel) -> None:
        there, go = threading.Event(), threading.Event()
        events: list[Event] = []

        def deliver(event: Event) -> None:
            events.append(event)
            if len(events) == 6:  # the other prompt had a turn between two tokens
                there.set()
                assert go.wait(60)

        with running(Engine(tiny, small(tiny, prefill_tokens=64))) as engine:
            ask(engine, prompt_of(480, 44, tiny.vocab_size)[:100], 1)
            with held_up(engine):
                engine.submit(request(prompt_of(20, 45, tiny.vocab_size), 8), deliver)
                long = engine.stream(request(prompt_of(480, 44, tiny.vocab_size), 2))
            assert there.wait(60)
            load, twice = engine.load(), engine.doubles_at
            go.set()
            begun = collect(list(long)).started
        done, cached = 480 - load.waiting_tokens, 480 - begun.computed_tokens
        assert cached, "what was restored is not counted as computed"
        assert cached < done < 480
        assert (done - cached) % 64 == 0
        assert load.computed_as_first == pytest.approx(as_first(cached, done, twice))
        assert load.waiting_as_first == pytest.approx(as_first(done, 480, twice))

    def test_the_load_says_what_is_left(self, tiny: LoadedModel) -> None:
        with running(Engine(tiny, small(tiny, prefill_tokens=64), Tiers())) as engine:
            ask(engine, prompt_of(200, 44, tiny.vocab_size), 2)
            until(lambda: not engine.load().running)
            load = engine.load()
            assert (load.running, load.waiting, load.waiting_tokens) == (0, 0, 0)
            assert load.waiting_as_first == 0
            assert load.prefill_tokens_per_s > 0
            assert load.bytes_per_s == {Tier.HOST: 1e9}


@contextmanager
def held_up(engine: Engine) -> Iterator[None]:
    """The engine's thread is busy inside with one request: telling it to who does not return."""
    there, go = threading.Event(), threading.Event()

    def deliver(event: Event) -> None:
        there.set()
        assert go.wait(60)

    engine.submit(request([5], 1), deliver)
    assert there.wait(60)
    try:
        yield
    finally:
        go.set()


def request(prompt: list[int], max_tokens: int) -> Request:
    return Request(
        token_ids=prompt, max_tokens=max_tokens, ignore_eos=True, return_first_logits=True
    )


class TestEnding:
    def test_cancelling_frees_all_and_tells_nothing_more(self, tiny: LoadedModel) -> None:
        told: list[Event] = []
        begun, go = threading.Event(), threading.Event()

        def deliver(event: Event) -> None:
            told.append(event)
            begun.set()
            assert go.wait(60)

        with running(Engine(tiny, small(tiny), Tiers())) as engine:
            prompt = prompt_of(100, 50, tiny.vocab_size)
            handle = engine.submit(request(prompt, 400), deliver)
            assert begun.wait(60)
            handle.cancel()
            handle.cancel()
            go.set()
            until(lambda: not engine.load().running)
            count = len(told)
            assert count < 400
            assert engine.clear().result(60) >= 6, "its blocks stayed, and nothing is pinned"
            assert ask(engine, prompt).ids
            assert len(told) == count

    def test_one_that_waits_can_be_cancelled(self, tiny: LoadedModel) -> None:
        told: list[Event] = []
        with running(Engine(tiny, small(tiny, max_running=1))) as engine, held_up(engine):
            engine.submit(request([5], 300), lambda _: None)
            handle = engine.submit(request([5], 3), told.append)
            assert engine.load().waiting == 2
            handle.cancel()
            assert engine.load().waiting == 1
        assert not told

    def test_leaving_a_stream_cancels(self, tiny: LoadedModel) -> None:
        with running(Engine(tiny, small(tiny))) as engine:
            for _ in engine.stream(request([5, 6, 7], 400)):
                break
            until(lambda: not engine.load().running)

    def test_want_of_memory_fails_one_request_and_no_other(
        self, tiny: LoadedModel, tiny_folder: Path
    ) -> None:
        boundless = replace(tiny, max_tokens=2**50)
        with running(Engine(boundless, small(tiny))) as engine:
            events = list(engine.stream(request([5], 2**49)))
            assert isinstance(events[-1], Failed)
            assert "memory" in str(events[-1].error)
            assert events[-1].error.grpc_status == "INTERNAL"
            assert ask(engine, [5]).ids

    def test_closing_lets_requests_end_and_takes_no_more(self, tiny: LoadedModel) -> None:
        tiers = Tiers()
        engine = Engine(tiny, small(tiny, max_running=1), tiers)
        streams = [engine.stream(request([5, i], 60)) for i in range(3)]
        engine.close(60)
        assert [len(collect(list(each)).ids) for each in streams] == [60] * 3
        assert tiers.only.closed
        with pytest.raises(WorkerLost, match="stopping"):
            engine.submit(request([5], 1), lambda _: None)
        with pytest.raises(WorkerLost, match="stopping"):
            engine.clear()

    def test_what_does_not_end_in_time_fails(self, tiny: LoadedModel) -> None:
        engine = Engine(tiny, small(tiny, max_running=1))
        told: list[Event] = []
        begun, go = threading.Event(), threading.Event()

        def deliver(event: Event) -> None:
            told.append(event)
            begun.set()
            assert go.wait(60)

        def stopping() -> bool:
            try:
                engine.submit(request([5], 1), lambda _: None).cancel()
            except WorkerLost:
                return True
            return False

        engine.submit(request([5, 0], 500), deliver)
        assert begun.wait(60)
        waiting = engine.stream(request([5, 1], 500))
        closing = threading.Thread(target=engine.close, args=(0,))
        closing.start()
        until(stopping)
        go.set()
        closing.join(60)
        for last in (told[-1], list(waiting)[-1]):
            assert isinstance(last, Failed)
            assert isinstance(last.error, WorkerLost)
        engine.pool.check()

    def test_a_bug_fails_the_requests_and_is_not_hidden(self, tiny: LoadedModel) -> None:
        engine = Engine(tiny, small(tiny), Tiers(), on_change=lambda _: 1 // 0)  # type: ignore[arg-type, return-value]
        events = list(engine.stream(request(prompt_of(40, 51, tiny.vocab_size), 400)))
        assert isinstance(events[-1], Failed)
        with pytest.raises(ZeroDivisionError):
            engine.close(1)


class TestTokens:
    def test_an_end_token_ends_the_answer_unless_it_is_ignored(self, tiny: LoadedModel) -> None:
        prompt = prompt_of(30, 60, tiny.vocab_size)
        with running(Engine(tiny, small(tiny))) as engine:
            plain = ask(engine, prompt, 12)
        assert plain.done.finish_reason is FinishReason.LENGTH
        stop = plain.ids[5]
        end = plain.ids.index(stop) + 1
        with running(Engine(replace(tiny, eos_token_ids=frozenset([stop])), small(tiny))) as engine:
            stopped = ask(engine, prompt, 12, ignore_eos=False)
            ignored = ask(engine, prompt, 12)
        assert stopped.ids == plain.ids[:end]
        assert stopped.done.finish_reason is FinishReason.STOP
        assert ignored.ids == plain.ids

    def test_an_answer_is_cut_to_the_room_there_is(self, tiny: LoadedModel) -> None:
        prompt = prompt_of(500, 61, tiny.vocab_size)
        with running(Engine(tiny, small(tiny))) as engine:
            answer = ask(engine, prompt, 10**9)
            assert len(answer.ids) == 12
            assert answer.done.finish_reason is FinishReason.LENGTH
            assert len(ask(engine, prompt_of(511, 61, tiny.vocab_size), 5).ids) == 1

    def test_a_seed_means_the_same_answer_cold_or_warm(self, tiny: LoadedModel) -> None:
        prompt = prompt_of(50, 62, tiny.vocab_size)
        with running(Engine(tiny, small(tiny))) as engine:
            greedy = ask(engine, prompt, 20)
            one, again, other = (
                ask(engine, prompt, 20, temperature=1.5, seed=seed) for seed in (1, 1, 2**64 - 1)
            )
            nearly = ask(engine, prompt, 20, temperature=1e-40)
        assert one.ids == again.ids
        assert len({tuple(each.ids) for each in (greedy, one, other)}) == 3
        assert nearly.ids == greedy.ids

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"token_ids": []}, "token_ids is empty"),
            ({"token_ids": [5] * 512}, "token_ids has 512, must be at most 511"),
            ({"token_ids": [5, 300]}, r"token_ids\[1\] is 300, must be 0 to 299"),
            ({"token_ids": [-1]}, r"token_ids\[0\] is -1"),
            ({"max_tokens": 0}, "max_tokens is 0"),
            ({"temperature": -0.5}, "temperature is -0.5"),
            ({"temperature": float("nan")}, "temperature is nan"),
            ({"temperature": float("inf")}, "temperature is inf"),
            ({"seed": -1}, "seed is -1"),
        ],
    )
    def test_what_cannot_be_computed_is_refused_at_once(
        self, tiny: LoadedModel, changes: dict[str, object], message: str
    ) -> None:
        with (
            running(Engine(tiny, small(tiny))) as engine,
            pytest.raises(InvalidRequest, match=message),
        ):
            engine.stream(replace(request([5], 1), **changes))  # type: ignore[arg-type]


def test_changes_told_add_up_to_what_the_pool_holds(tiny: LoadedModel) -> None:
    held: set[BlockKey] = set()

    def told(changes: Changes) -> None:
        assert not held & set(changes.added)
        assert held >= set(changes.removed)
        held.update(changes.added)
        held.difference_update(changes.removed)

    with running(Engine(tiny, small(tiny, 20), on_change=told)) as engine:
        for seed in range(6):
            ask(engine, prompt_of(150, seed, tiny.vocab_size), 30)
        until(lambda: not engine.load().running)
        assert held == set(engine.pool)
        assert len(held) == 20
