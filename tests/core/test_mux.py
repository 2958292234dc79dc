"""Many requests over one stream, as a machine without I/O: what one side says, the other obeys."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from kvtier.core.mux import MAX_CREDIT, MAX_HELD, WINDOW, Answering, Asking, Part
from kvtier.errors import LocalProtocolError, Overloaded, RemoteProtocolError, WorkerLost


def asking(max_open: int = 8) -> Asking[str, str]:
    made = Asking[str, str]()
    made.hello(max_open)
    return made


def test_nothing_can_be_asked_before_the_hello_nor_while_it_drains_nor_when_it_is_broken():
    mux = Asking[str, str]()
    with pytest.raises(WorkerLost):
        mux.ask()
    mux.hello(1)
    number = mux.ask()
    mux.drain()
    with pytest.raises(WorkerLost, match="stopping"):
        mux.ask()
    assert mux.receive(Part(number, "s", [1], "done")), "what was open goes on"
    assert mux.broken("gone") == [], "it has ended already"
    assert mux.take(number) == Part(number, "s", [1], "done")
    with pytest.raises(WorkerLost):
        mux.ask()


def test_no_more_are_open_than_the_other_side_takes():
    mux = asking(2)
    first, _ = mux.ask(), mux.ask()
    with pytest.raises(Overloaded, match="2 requests"):
        mux.ask()
    mux.cancel(first)
    assert mux.ask() == 3, "no number comes again"


@pytest.mark.parametrize("hellos", [[0], [3, 3]])
def test_a_hello_that_makes_no_sense_is_refused(hellos):
    mux = Asking[str, str]()
    *before, last = hellos
    for max_open in before:
        mux.hello(max_open)
    with pytest.raises(RemoteProtocolError):
        mux.hello(last)


def test_what_waits_is_merged_and_the_end_comes_last():
    mux = asking()
    number = mux.ask()
    assert not mux.take(number)
    for part in (Part(number, "s"), Part(number, None, [1, 2]), Part(number, None, [3])):
        mux.receive(part)
    assert mux.take(number) == Part(number, "s", [1, 2, 3])
    mux.receive(Part(number, None, [4], "done"))
    assert mux.take(number) == Part(number, None, [4], "done")
    assert len(mux) == 0
    with pytest.raises(LocalProtocolError):
        mux.take(number)


@pytest.mark.parametrize(("parts", "why"), [
    ([Part(2, "s")], "opened: 1"),
    ([Part(0, "s")], "opened: 1"),
    ([Part(1, "s"), Part(1, "s")], "starts after it began"),
    ([Part(1, None, [1]), Part(1, "s")], "starts after it began"),
    ([Part(1, None, [], "done"), Part(1, None, [1])], "after its end"),
    ([Part(1, None, [0] * (WINDOW + 1))], "allowed"),
    ([Part(1, None, [0] * WINDOW), Part(1, None, [1])], "allowed 0"),
])  # fmt: skip
def test_an_answering_side_that_breaks_the_protocol_is_told(parts, why):
    mux = asking()
    mux.ask()
    *before, last = parts
    for part in before:
        mux.receive(part)
    with pytest.raises(RemoteProtocolError, match=why):
        mux.receive(last)


def test_what_comes_for_a_cancelled_request_is_dropped():
    mux = asking()
    number = mux.ask()
    assert mux.cancel(number)
    assert not mux.cancel(number)
    assert mux.outgoing() == ({}, [number])
    assert not mux.receive(Part(number, "s", [1], "done"))
    assert not mux.owes


def test_a_request_that_was_never_sent_is_cancelled_in_silence():
    mux = asking()
    assert mux.cancel(mux.ask(), sent=False)
    assert not mux.owes


def test_credit_is_granted_as_tokens_are_taken_and_never_beyond_the_window():
    mux = asking()
    number = mux.ask()
    mux.receive(Part(number, None, [0] * WINDOW))
    assert not mux.owes, "nothing was read yet"
    mux.take(number)
    assert mux.outgoing() == ({number: WINDOW}, [])
    mux.receive(Part(number, None, [0] * (WINDOW // 2 - 1)))
    mux.take(number)
    assert not mux.owes, "not yet worth a message"


def test_a_stream_that_breaks_ends_all_that_is_open_behind_what_had_come():
    mux = asking()
    one, two, three = mux.ask(), mux.ask(), mux.ask()
    mux.receive(Part(one, "s", [1, 2]))
    mux.receive(Part(two, None, [3], "done"))
    assert mux.broken("gone") == [one, three]
    assert mux.take(one) == Part(one, "s", [1, 2], "gone")
    assert mux.take(two) == Part(two, None, [3], "done")
    assert mux.take(three) == Part(three, None, [], "gone")


def answering(credit: int = 4) -> Answering[str, str]:
    made = Answering[str, str]()
    made.opened(1, credit)
    return made


def test_no_more_is_sent_than_was_granted_and_the_end_waits_behind_it():
    mux = answering(credit=1)
    mux.credit(1, 1)
    assert mux.take() == [], "there is nothing to send"
    mux.start(1, "s")
    mux.tokens(1, [1, 2, 3])
    mux.end(1, "done")
    assert mux.take() == [Part(1, "s", [1, 2])]
    assert mux.take() == []
    mux.credit(1, 5)
    assert mux.take() == [Part(1, None, [3], "done")]
    assert 1 not in mux


def test_a_request_without_credit_holds_up_no_other():
    mux = answering(credit=0)
    mux.opened(2, 100)
    for number in (1, 2):
        mux.tokens(number, [7])
        mux.end(number, "done")
    assert mux.take() == [Part(2, None, [7], "done")]


def test_those_that_wait_longest_are_sent_first():
    mux = Answering[str, str]()
    for number in range(1, 6):
        mux.opened(number, 10)
    for number in (3, 1, 2):
        mux.tokens(number, [number])
    assert [part.id for part in mux.take(2)] == [3, 1]
    mux.tokens(3, [9])
    assert [part.id for part in mux.take(2)] == [2, 3]


def test_a_source_is_told_when_what_it_made_has_no_room():
    mux = answering(credit=0)
    assert mux.tokens(1, range(MAX_HELD - 1))
    assert not mux.tokens(1, [0])
    assert not mux.room(1)
    mux.credit(1, 1)
    mux.take()
    assert mux.room(1)


@pytest.mark.parametrize("broken", [
    lambda mux: mux.opened(1, 1),
    lambda mux: mux.opened(0, 1),
    lambda mux: mux.credit(2, 1),
    lambda mux: mux.credit(1, MAX_CREDIT),
    lambda mux: mux.cancelled(2),
    lambda mux: [mux.opened(n, 1) for n in range(2, mux.max_open + 2)],
])  # fmt: skip
def test_an_asking_side_that_breaks_the_protocol_is_told(broken):
    with pytest.raises(RemoteProtocolError):
        broken(answering())


def test_credit_and_cancels_that_come_late_mean_nothing():
    mux = answering()
    mux.end(1, "done")
    mux.take()
    mux.credit(1, 100)
    assert not mux.cancelled(1)
    assert mux.take() == []


class Both(RuleBasedStateMachine):
    """Two sides and a wire between them that keeps the order: every reader gets its own answer."""

    def __init__(self) -> None:
        super().__init__()
        self.ask = Asking[str, str]()
        self.ask.hello(4)
        self.answer = Answering[str, str](4)
        self.to_answer: list[tuple[str, int, int]] = []
        self.to_ask: list[Part[str, str]] = []
        self.made: dict[int, list[int]] = {}  # what each source has said
        self.read: dict[int, list[int]] = {}
        self.started: dict[int, int] = {}
        self.ended: set[int] = set()  # by their source
        self.over: dict[int, str] = {}  # as the reader saw it
        self.cancelled: set[int] = set()
        self.unsent: set[int] = set()
        self.tokens = itertools.count()

    def sources(self) -> list[int]:
        return [n for n in self.made if n in self.answer and n not in self.ended]

    def readers(self) -> list[int]:
        return [n for n in self.read if n not in self.over and n not in self.cancelled]

    @rule()
    def open(self) -> None:
        try:
            number = self.ask.ask()
        except Overloaded:
            assert len(self.readers()) == 4
            return
        self.read[number] = []
        self.unsent.add(number)

    @rule()
    def write(self) -> None:
        granted, cancels = self.ask.outgoing()
        self.to_answer += [("cancel", n, 0) for n in cancels]
        self.to_answer += [("credit", n, tokens) for n, tokens in granted.items()]
        self.to_answer += [("open", n, WINDOW) for n in sorted(self.unsent)]
        self.unsent.clear()

    @precondition(lambda self: self.to_answer)
    @rule()
    def arrive(self) -> None:
        what, number, tokens = self.to_answer.pop(0)
        if what == "open":
            self.answer.opened(number, tokens)
            self.made[number] = []
        elif what == "credit":
            self.answer.credit(number, tokens)
        else:
            self.answer.cancelled(number)

    @precondition(lambda self: self.sources())
    @rule(data=st.data(), count=st.integers(1, 2 * WINDOW))
    def generate(self, data, count) -> None:
        number = data.draw(st.sampled_from(self.sources()))
        if number not in self.started:
            self.started[number] = 0
            self.answer.start(number, f"s{number}")
        if self.answer.room(number):
            ids = list(itertools.islice(self.tokens, count))
            self.made[number] += ids
            self.answer.tokens(number, ids)

    @precondition(lambda self: self.sources())
    @rule(data=st.data())
    def finish(self, data) -> None:
        number = data.draw(st.sampled_from(self.sources()))
        self.answer.end(number, f"e{number}")
        self.ended.add(number)

    @rule(most=st.integers(1, 3))
    def send(self, most) -> None:
        self.to_ask += self.answer.take(most)

    @precondition(lambda self: self.to_ask)
    @rule()
    def receive(self) -> None:
        self.ask.receive(self.to_ask.pop(0))

    @precondition(lambda self: self.readers())
    @rule(data=st.data())
    def take(self, data) -> None:
        number = data.draw(st.sampled_from(self.readers()))
        part = self.ask.take(number)
        assert part.id == number
        if part.started is not None:
            assert part.started == f"s{number}"
            assert not self.read[number]
            self.started[number] += 1
        self.read[number] += part.token_ids
        if part.end is not None:
            assert part.end == f"e{number}"
            self.over[number] = part.end

    @precondition(lambda self: self.readers())
    @rule(data=st.data())
    def cancel(self, data) -> None:
        number = data.draw(st.sampled_from(self.readers()))
        self.ask.cancel(number, sent=number not in self.unsent)
        self.unsent.discard(number)
        self.cancelled.add(number)

    @invariant()
    def each_has_its_own_and_in_order(self) -> None:
        for number, ids in self.read.items():
            made = self.made.get(number, [])
            assert ids == made[: len(ids)]
            if number in self.over:
                assert ids == made
            assert self.started.get(number, 0) <= 1

    @invariant()
    def memory_is_bounded(self) -> None:
        for number, call in self.ask._calls.items():
            assert len(call.part.token_ids) <= WINDOW, number
        assert len(self.ask) <= 4
        assert len(self.answer) <= 4

    def teardown(self) -> None:
        """Whoever is still there gets all of it."""
        for _ in range(100):
            self.write()
            while self.to_answer:
                self.arrive()
            for number in self.sources():
                self.answer.end(number, f"e{number}")
                self.ended.add(number)
            self.send(4)
            while self.to_ask:
                self.receive()
            for number in self.readers():
                part = self.ask.take(number)
                self.read[number] += part.token_ids
                if part.end is not None:
                    self.over[number] = part.end
        assert self.readers() == []
        assert len(self.answer) == 0
        self.each_has_its_own_and_in_order()


Both.TestCase.settings = settings(max_examples=60, stateful_step_count=60, deadline=None)
TestBoth = Both.TestCase


@given(st.lists(st.integers(1, 400), max_size=30), st.integers(0, 50))
@settings(max_examples=50, deadline=None)
def test_a_slow_reader_never_has_more_than_its_window(sizes, every):
    ask, answer = asking(1), Answering[str, str](1)
    number = ask.ask()
    answer.opened(number, WINDOW)
    made = read = held = 0
    for i, size in enumerate(sizes):
        if answer.room(number):
            answer.tokens(number, range(size))
            made += size
        for part in answer.take():
            held += len(part.token_ids)
            ask.receive(part)
        assert held <= WINDOW
        if every and i % every == 0:
            taken = len(ask.take(number).token_ids)
            read, held = read + taken, held - taken
            for of, tokens in ask.outgoing()[0].items():
                answer.credit(of, tokens)
    assert made - read <= WINDOW + MAX_HELD + 400
