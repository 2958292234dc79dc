"""Where a prompt should go now: what each worker holds, how busy it is, and what was just sent."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from heapq import merge
from typing import Final

from kvtier import metrics
from kvtier.config import RouterConfig
from kvtier.core import score
from kvtier.core.audience import Warmth
from kvtier.core.behind import Behind
from kvtier.core.blocks import BlockKey, block_keys
from kvtier.core.breakeven import as_first
from kvtier.core.directory import Directory
from kvtier.core.learned import Learned, Sample
from kvtier.core.sessions import Sessions, Standing, hint
from kvtier.core.tiers import Tier
from kvtier.core.vllm_keys import SCHEME, prompt_keys
from kvtier.router.link import Link, State
from kvtier.router.members import Members
from kvtier.router.sent import SPECULATIVE_S, Load, Sent, Speculation
from kvtier.wire.chains import TO_WIRE
from kvtier.wire.pb import router_pb2, worker_pb2

_ON_WIRE: Final = tuple(TO_WIRE[tier] for tier in Tier)

_LAST: Final = ", and its session went there last"
_LENDER: Final = "lender of "  # an address has no spaces

Tie = Callable[[], float]
_Worker = tuple[Link, worker_pb2.WorkerInfo, bytes]  # with the root of the prompt's keys there


@dataclass(slots=True)
class Prompt:
    """A prompt in token ids; its keys are computed once for each kind of worker."""

    model: str
    ids: Sequence[int]
    adapter: str = ""  # of the model
    tenant: str = ""
    session: str = ""
    _keys: dict[tuple[bytes, int], list[BlockKey]] = field(default_factory=dict)
    _highest: int | None = None
    ready_at: float | None = None  # on the loop's clock: nothing but placing it was left to do

    @property
    def highest(self) -> int:
        """The highest token id."""
        if self._highest is None:
            self._highest = max(self.ids)
        return self._highest

    @property
    def space(self) -> tuple[str, str]:
        """Adapter and tenant: the key of `Link.roots`."""
        return self.adapter, self.tenant

    @property
    def conversation(self) -> tuple[str, str, str, str]:
        """Its session, which is another one for each model, adapter and tenant."""
        return self.model, self.adapter, self.tenant, self.session

    def keys(self, info: worker_pb2.WorkerInfo, root: bytes) -> list[BlockKey]:
        """The block keys that this worker gives the prompt; `root` is its own for our `space`."""
        kind = (root, info.block_tokens)
        if kind not in self._keys:
            chain = prompt_keys if info.key_scheme == SCHEME else block_keys
            self._keys[kind] = chain(root, self.ids, info.block_tokens)
        return self._keys[kind]


@dataclass(frozen=True, slots=True)
class Ranked:
    """One candidate, scored."""

    link: Link
    info: worker_pb2.WorkerInfo
    root: bytes  # of the prompt's keys there
    choice: score.Choice
    draining: bool
    source: str  # where the blocks come from that neither the worker nor its node has
    hinted: bool = False  # first because its session went there last

    @property
    def there_tokens(self) -> int:
        """Leading prompt tokens that are not computed there: restored, or pulled to its node."""
        return (self.choice.used + self.choice.pull_blocks) * self.info.block_tokens

    def proto(self) -> router_pb2.Choice:
        """The candidate as callers see it."""
        choice, warmth = self.choice, self.choice.warmth
        warm = [
            worker_pb2.TierTokens(tier=tier, tokens=count * self.info.block_tokens)
            for tier, count in zip(_ON_WIRE, warmth, strict=True)
            if count
        ]
        return router_pb2.Choice(
            worker_id=self.info.worker_id, node=self.link.node, address=self.link.address,
            warm=warm, seconds=choice.seconds, wait_s=choice.wait_s, load_s=choice.load_s,
            prefill_s=choice.prefill_s, draining=self.draining, hinted=self.hinted,
            why=score.why(choice, self.source) + (_LAST if self.hinted else ""),
            source=self.source, source_tokens=self.source_blocks * self.info.block_tokens,
        )  # fmt: skip

    def explained(self, behind: float) -> router_pb2.Choice:
        """The candidate with all that its score is made of; `behind` is the score's lambda."""
        told, choice, rates = self.proto(), self.choice, self.choice.rates
        nbytes = self.info.kv_bytes_per_token * self.info.block_tokens
        loads = [
            router_pb2.Load(
                tier=TO_WIRE[each.tier] if each.tier is not None else None,
                tokens=each.blocks * self.info.block_tokens, seconds=each.seconds,
                bytes_per_s=each.bytes_per_s,
            )
            for each in choice.loads(nbytes)
        ]  # fmt: skip
        told.terms.CopyFrom(
            router_pb2.Terms(
                loads=loads, waiting_tokens=choice.waiting_tokens, decoding=choice.decoding,
                drag=rates.decode_drag, prefill_tokens_per_s=rates.prefill_tokens_per_s,
                computed_tokens=max(1, choice.prompt_tokens - self.there_tokens),
                doubles_at=rates.doubles_at, behind=behind, drain=rates.drain,
            )
        )  # fmt: skip
        return told

    @property
    def pull_from(self) -> str:
        """The node that its daemon is to load blocks from, or none."""
        return self.source if self.choice.pull_from else ""

    @property
    def source_blocks(self) -> int:
        """Blocks that come from `source`."""
        return self.choice.pull_blocks or self.choice.taken.shared


class Placement:
    """Ranks the workers for a prompt and remembers what was sent where. Lives on one loop."""

    def __init__(
        self, config: RouterConfig, members: Members, directory: Directory,
        clock: Callable[[], float],
    ) -> None:  # fmt: skip
        self._config = config
        self._members = members
        self._directory = directory
        self._clock = clock
        self._speculation = Speculation()
        self._load = Load(clock)
        self._last_cold: dict[str, float] = {}
        self._learned = Learned()
        self._behind = Behind(config.behind)
        self._sessions = Sessions()

    @property
    def behind(self) -> float:
        """Lambda of the scores, as the load has it now."""
        return self._behind.value

    def candidates(self, model: str, adapter: str = "", tenant: str = "") -> list[Link]:
        """Workers of all this that take requests: those READY, or STALE ones where none is."""
        space = adapter, tenant
        for state in (State.READY, State.STALE):
            links = [link for link in self._members.workers() if link.state is state]
            found = [
                link
                for link in links
                if link.info is not None and link.info.model == model and space in link.roots
            ]
            if found:
                return found
        return []

    def rank(
        self, prompt: Prompt, links: Collection[Link], tie: Tie | None,
        since: float | None = None, most: int | None = None,
    ) -> list[Ranked]:  # fmt: skip
        """These workers, best first, at most `most` of them.

        Without `tie` it asks only, and equals are in the order of their addresses, whoever was
        cold last; with it, how busy they all are is learned from. The worker that the prompt's
        session went to last is the first of those that are nearly as good (kvtier.core.sessions).

        Where more than the configured budget has passed `since` the request was ready to be
        placed, by load alone: an answer that is late helps nobody.
        """
        kinds: dict[tuple[bytes, int, int], dict[str, _Worker]] = {}
        space = prompt.space
        for link in sorted(links, key=lambda each: each.address):
            info, root = link.info, link.roots.get(space)
            if info is not None and root is not None:
                kind = (root, info.block_tokens, info.kv_bytes_per_token)
                kinds.setdefault(kind, {})[link.address] = (link, info, root)
        last = self._sessions.last(prompt.conversation, self._clock()) if prompt.session else ""
        orders = [self._rank(prompt, alike, tie, since, most, last) for alike in kinds.values()]
        # Not sorted: each order has its equals in an order of its own, which stays.
        merged = list(merge(*orders, key=lambda each: (each.draining, each.choice.seconds)))
        if last:
            order = [Standing(e.link.address, e.draining, e.choice.seconds) for e in merged]
            if (found := hint(order, last)) is not None:
                merged.insert(0, replace(merged.pop(found.at), hinted=found.decided))
        return merged[:most]

    def sent(self, prompt: Prompt, to: Ranked, *, followed: bool) -> Sent:
        """Remember that `prompt` goes there; `followed` if we shall see its first token."""
        now = self._clock()
        address = to.link.address
        if not to.choice.warmth.blocks:
            self._last_cold[address] = now
            known = {link.address for link in self._members.workers()}
            self._last_cold = {a: t for a, t in self._last_cold.items() if a in known}
            self._learned.keep_only(known)
            self._load.keep_only(known)
        if prompt.session:
            self._sessions.place(prompt.conversation, address, now)
        self._speculation.add(address, prompt.keys(to.info, to.root), now)
        expires = None if followed else now + SPECULATIVE_S
        tokens = as_first(to.there_tokens, len(prompt.ids), to.choice.rates.doubles_at)
        sent = self._load.send(address, round(tokens), expires)
        sent.teach = lambda sample: self._began(to, sample, now)
        return sent

    def _began(self, to: Ranked, sample: Sample, since: float) -> None:
        """A prompt that was sent to `to` got its first token; what it took besides was its wait."""
        now, choice = self._clock(), to.choice
        sample = sample._replace(
            decoding=choice.decoding,
            drag=choice.rates.decode_drag,
            believed_s=choice.believed_s,
            waited_s=now - since - sample.load_s - sample.prefill_s,
        )
        self._learned.observe(to.link.address, sample, now)

    def _rank(
        self, prompt: Prompt, alike: Mapping[str, _Worker], tie: Tie | None, since: float | None,
        most: int | None, keep: str,
    ) -> list[Ranked]:  # fmt: skip
        """Workers that give the prompt the same keys."""
        now = self._clock()
        _, info, root = next(iter(alike.values()))
        keys: Sequence[BlockKey] = ()
        if since is not None and now - since > self._config.budget_s:
            metrics.ROUTED_BY_LOAD.inc()
        else:
            keys = prompt.keys(info, root)
        sources = {name: self._members.sources(link) for name, (link, *_) in alike.items()}
        pulls = sum(self._members.pulls(link) for link, *_ in alike.values())
        if pulls:  # what a node's daemon has, without its worker's VRAM, could be pulled from it
            sources |= {f"{_LENDER}{name}": of[1:] for name, of in sources.items()}
        warmth = self._directory.warmth(keys, sources)
        candidates = [
            score.Candidate(
                name=name,
                warmth=_at_least(warmth[name], self._speculation.blocks(name, keys, now)),
                waiting_tokens=self._waiting(name, link, now),
                rates=self._learned.rates(name, link.rates, now),
                last_cold=self._last_cold.get(name, 0.0) if tie is not None else 0.0,
                draining=self._members.draining(link),
                decoding=link.heartbeat.load.running,
                loads_all=known.loads_all,
                lends=_own(warmth[f"{_LENDER}{name}"])
                if pulls and self._members.lends(link)
                else 0,
            )
            for name, (link, known, _) in alike.items()
        ]
        if tie is not None:
            open_to_all = [each for each in candidates if not each.draining]
            busy = sum(each.waiting_tokens > 0 for each in open_to_all)
            self._behind.see(busy, len(open_to_all))
        choices = score.rank(
            candidates,
            prompt_tokens=len(prompt.ids),
            block_tokens=info.block_tokens,
            block_nbytes=info.kv_bytes_per_token * info.block_tokens,
            behind=self._behind.value,
            tie=tie or _no_luck,
            most=most,
            keep=keep,
        )
        draining = {each.name for each in candidates if each.draining}
        return [
            Ranked(*alike[c.name], c, c.name in draining, self._source(c, alike)) for c in choices
        ]

    def _waiting(self, name: str, link: Link, now: float) -> int:
        """Prompt tokens that a worker has still to compute: as it says, or as we know better."""
        computed = link.computed
        said = self._load.said(name, link.waiting_tokens, computed.heard_s)
        return max(said, self._load.waiting(name, now, computed))

    def _source(self, choice: score.Choice, alike: Mapping[str, _Worker]) -> str:
        if choice.pull_from:
            return alike[choice.pull_from][0].node
        return Tier.SHARED.label if choice.taken.shared else ""


def _no_luck() -> float:
    return 0.0


def _own(warmth: Warmth) -> int:
    """What can be pulled from a node; what lies in the shared store is had from there."""
    return 0 if warmth.shared else warmth.host + warmth.disk


def _at_least(warmth: Warmth, vram: int) -> Warmth:
    """`warmth` as it will be when the first `vram` blocks are in VRAM."""
    if vram <= warmth.vram:
        return warmth
    colder, lacking = [], vram - warmth.vram
    for had in warmth[1:]:
        colder.append(max(0, had - lacking))
        lacking = max(0, lacking - had)
    return Warmth(vram, *colder)
