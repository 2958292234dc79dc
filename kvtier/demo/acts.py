"""The demo's script: what is asked, what is killed and emptied, in which order."""

from collections.abc import Callable, Sequence
from typing import Final

from rich.markup import escape

from kvtier.core.tiers import Tier
from kvtier.demo.record import Record, ask
from kvtier.demo.stage import NODES, Stage
from kvtier.demo.workload import ANSWER_TOKENS, Conversation, prompt
from kvtier.router.text import Text
from kvtier.wire.pb import feed_pb2

_LONG_ANSWER: Final = 64  # tokens: long enough for a kill in the middle

Show = Callable[[Record], None]
Say = Callable[[str], None]


class Play:
    """Runs the acts one after the other.

    `records` has every request in order, `events` what was done between them: act, text, and how
    many requests came before.
    """

    def __init__(
        self, stage: Stage, text: Text, talks: Sequence[Conversation], say: Say, show: Show,
        *, logits: bool,
    ) -> None:  # fmt: skip
        self._stage = stage
        self._text = text
        self._talks = talks
        self._say = say
        self._show = show
        self._logits = logits  # whether to ask for those of a first token
        self._act = ""
        self.records: list[Record] = []
        self.events: list[dict[str, str | int]] = []

    async def run(self) -> None:
        """All acts."""
        await self.first_turns()
        await self.later_turns()
        await self.kill_a_worker()
        await self.other_node(await self.restart_a_daemon())

    async def first_turns(self) -> None:
        """Nobody has read these documents: cold starts, spread over the nodes."""
        self._begin("1. first turns: every document is new", "cold")
        for talk in self._talks:
            await self._turn(talk)

    async def later_turns(self) -> None:
        """Conversations go on in turn, more than VRAM and host memory can hold."""
        self._begin("2. later turns, interleaved: nobody reads a document twice", "turns")
        await self._stage.settled()
        for talk in self._talks:
            await self._turn(talk)
        # Most recently used, so still in VRAM.
        await self._turn(self._talks[-1])
        await self._turn(self._talks[-2])
        # The other ones have had to make room.
        await self._turn(self._talks[0])
        await self._stage.settled()
        for node in NODES:
            await self._stage.clear(node, feed_pb2.TIER_VRAM)
        self._did("VRAM of both nodes is emptied, as when an engine restarts")
        await self._turn(await self._warm_in(Tier.HOST))

    async def kill_a_worker(self) -> None:
        """SIGKILL in the middle of a stream, and the same request again at once."""
        self._begin("3. a worker is killed (SIGKILL) in the middle of a stream", "kill")
        talk = self._talks[0]
        await self._stage.settled()
        killed: list[tuple[str, int]] = []
        record, _ = self._record(talk, "cut off")

        message, _ = prompt(self._text, talk.ask())
        agents = await self._stage.agents()

        def at_second_piece(record: Record) -> None:
            if len(record.ids) >= 2 and not killed:
                pid, _ = agents[record.node, "worker"]
                self._stage.kill_process(pid)
                killed.append((record.node, pid))
                record.cut = True

        await ask(
            self._stage.router, record, message, _LONG_ANSWER, at_second_piece,
            ignore_eos=True, logits=self._logits,
        )  # fmt: skip
        self._keep(record)
        if not killed:
            self._did("the stream ended before it could be cut")
            return
        node, pid = killed[0]
        self._did(f"killed worker {pid} of node {node}; the stream said: {record.error}")
        await self._turn(talk)
        new = await self._stage.back(node, "worker", pid)
        self._did(f"Ray has put worker {new} in its place")

    async def restart_a_daemon(self) -> Conversation:
        """SIGKILL of the daemon that owns host memory and disk: the disk is found again."""
        node = self.records[-1].node
        self._begin(f"4. the daemon of node {node} is killed and comes back", "daemon")
        await self._stage.settled()
        before = await self._on_disk(node)
        pid = await self._stage.kill(node, "node")
        new = await self._stage.back(node, "node", pid)

        async def found() -> bool:
            return await self._on_disk(node) >= before

        await self._stage.until("the disk tier to be found again", found)
        self._did(f"Ray has put daemon {new} in the place of {pid}; {before} blocks found on disk")
        for each in NODES:
            await self._stage.clear(each, feed_pb2.TIER_VRAM, feed_pb2.TIER_HOST)
        self._did("VRAM and host memory of both nodes are emptied")
        talk = await self._warm_in(Tier.DISK)
        await self._turn(talk)
        return talk

    async def other_node(self, talk: Conversation) -> None:
        """The node that knows the conversation is drained; the other one has none of it."""
        node = self.records[-1].node
        other = next(each for each in NODES if each != node)
        self._begin(f"5. node {node} is drained; node {other} has never kept this", "shared")
        await self._stage.settled()
        await self._stage.clear(other, feed_pb2.TIER_VRAM, feed_pb2.TIER_HOST, feed_pb2.TIER_DISK)
        await self._stage.drain(node)
        message, _ = prompt(self._text, talk.ask())

        async def goes_to_the_other() -> bool:
            answer = await self._stage.explain(message)
            warm = {each.tier: each.tokens for each in answer.choices[0].warm}
            return answer.choices[0].node == other and set(warm) == {feed_pb2.TIER_SHARED}

        await self._stage.until("the router to turn to the other node", goes_to_the_other)
        await self._turn(talk)

    # --- inside -----------------------------------------------------------------------

    def _begin(self, title: str, act: str) -> None:
        self._act = act
        self._say("")
        self._say(f"[bold]{title}[/bold]")

    def _did(self, text: str) -> None:
        """Tell of something that was done to the service."""
        self.events.append({"act": self._act, "text": text, "after_requests": len(self.records)})
        self._say(escape(text))

    def _record(self, talk: Conversation, note: str = "") -> tuple[Record, list[int]]:
        turn = len(talk.said) // 2 + 1
        _, ids = prompt(self._text, talk.ask())
        name = f"{talk.name} {turn}" + (f" ({note})" if note else "")
        return Record(name, talk.name, ids, act=self._act), ids

    def _keep(self, record: Record) -> None:
        self.records.append(record)
        self._show(record)

    async def _turn(self, talk: Conversation) -> None:
        """The next question of a conversation."""
        record, _ = self._record(talk)
        asked = talk.ask()
        message, _ = prompt(self._text, asked)
        stub = self._stage.router
        self._keep(await ask(stub, record, message, ANSWER_TOKENS, logits=self._logits))
        if not record.error:
            talk.answered(asked, record.text)

    async def _on_disk(self, node: str) -> int:
        status = await self._stage.node_status(node)
        return sum(
            tier.blocks
            for layout in status.layouts
            for tier in layout.tiers
            if tier.tier == feed_pb2.TIER_DISK
        )

    async def _warm_in(self, tier: Tier) -> Conversation:
        """A conversation that the router would now serve from `tier`; waits until it has heard."""
        found: list[Conversation] = []

        async def heard() -> bool:
            for talk in self._talks:
                message, _ = prompt(self._text, talk.ask())
                warm = (await self._stage.explain(message)).choices[0].warm
                most = max(warm, key=lambda each: each.tokens, default=None)
                if most is not None and most.tier == tier.value + 1:
                    found.append(talk)
            return bool(found)

        await self._stage.until(f"the router to hear of {tier.label}", heard)
        return found[0]
