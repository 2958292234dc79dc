"""A cluster of simulated nodes, as a router sees it: caches, queues, and what is under way.

A node is one FIFO prefill server with an LRU cache of whole blocks. A request's service time is
the time to load its warm blocks (from the pool where that takes less time than computing them)
plus that to compute the rest; its first token comes after it, and
decoding then goes on beside the prefills without slowing them. (One with a slow queue does other
things after each prefill, for as long as that took.) Caches change when a request is
sent. With a host tier, blocks that fall out of VRAM drop into it, and blocks that are used are
taken up again (a block is in one of the two); a pool is shared by all nodes and written through.
"""

from collections import OrderedDict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

from kvtier.core.audience import Warmth
from kvtier.core.learned import Sample
from kvtier.core.score import Rates, worth
from kvtier.core.tiers import Tier
from kvtier.sim.trace import Request

_UNHEARD = 64
SPECULATIVE_S = 2.0  # so long a router expects what it sent, see kvtier.router.placement


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What the nodes are. The defaults are those of an 8B model in bf16 on one GPU.

    2 * 7.5e9 FLOPs a token and 4 * 32 * 4096 for each token before it, at 1.5e14 FLOP/s, are
    10,000 tokens a second at position 0 and half of that at position 28,610; 128 KiB of KV a token.
    """

    vram_blocks: int = 800
    host_blocks: int = 0
    pool_blocks: int = 0
    kv_bytes_per_token: int = 131_072
    prefill_tokens_per_s: float = 10_000.0
    doubles_at: float = 1.5e10 / 524_288
    host_bytes_per_s: float = 50e9
    pool_bytes_per_s: float = 2e9
    decode_s: float = 0.02  # a token
    stale_s: float = 0.0  # so late the router learns what is in a cache
    slow_nodes: float = 0.0  # this share of the nodes works at half speed
    slow_queues: float = 0.0  # of this share of the nodes queues empty half as fast as is believed
    lose_at: float = 1.0  # share of the trace's time after which the first node is lost
    join_at: float = 1.0  # and after which one more comes, with nothing in its caches

    def rates(self, slow: bool) -> Rates:
        """What a node does."""
        return Rates(
            prefill_tokens_per_s=self.prefill_tokens_per_s / (2 if slow else 1),
            doubles_at=self.doubles_at,
            host_bytes_per_s=self.host_bytes_per_s,
            disk_bytes_per_s=self.host_bytes_per_s,
            shared_bytes_per_s=self.pool_bytes_per_s,
        )


class Pool:
    """The store that all nodes share: an LRU of whole blocks."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self.blocks: OrderedDict[int, None] = OrderedDict()

    def use(self, blocks: Sequence[int]) -> None:
        """A prompt's blocks were read or written; the first of them end up as the warmest."""
        if self._capacity:
            for block in reversed(blocks):
                self.blocks[block] = None
                self.blocks.move_to_end(block)
            while len(self.blocks) > self._capacity:
                self.blocks.popitem(last=False)


@dataclass(slots=True)
class Sent:
    """A request on a node."""

    number: int
    request: Request
    asked_s: float
    matched: int  # blocks of any tier
    first_token_s: float
    service_s: float
    told: Sample  # what its first token tells the router


class Node:
    """One node with its caches and its queue, and what the router knows of it."""

    def __init__(
        self, name: str, setup: Setup, pool: Pool, *, slow: bool = False, slow_queue: bool = False
    ) -> None:
        self.name = name
        self.rates = setup.rates(slow)
        self.free_at = 0.0
        self.busy_s = 0.0
        self.last_cold = 0.0
        self.waiting: deque[Sent] = deque()  # for their first token
        self.begun: deque[Sent] = deque(maxlen=_UNHEARD)  # got it, and the router did not hear yet
        self.prefill_blocks = 0.0  # of those: blocks to be computed
        self.decode_blocks = 0.0  # of all that are under way: prompt and answer
        self._setup = setup
        self._pace = 2.0 if slow_queue else 1.0  # seconds of its time that a second of work takes
        self._pool = pool
        self._vram: OrderedDict[int, None] = OrderedDict()
        self._host: OrderedDict[int, None] = OrderedDict()
        self._seen: dict[int, int] = {}  # tier of a block, as told
        self._untold: deque[tuple[float, int, int]] = deque()
        self._expected: dict[int, float] = {}
        self._decoding: list[tuple[float, float]] = []

    def wait_s(self, now: float) -> float:
        """Until its queue is empty, by the work that waits in it."""
        return max(0.0, self.free_at - now) / self._pace

    def advance(self, now: float) -> None:
        """Prefills and answers end, and news arrive, up to `now`."""
        while self.waiting and self.waiting[0].first_token_s <= now:
            sent = self.waiting.popleft()
            self.begun.append(sent)
            self.prefill_blocks -= _blocks(sent)
        while self._decoding and self._decoding[0][0] <= now:
            self.decode_blocks -= heappop(self._decoding)[1]
        while self._untold and self._untold[0][0] <= now:
            _, block, tier = self._untold.popleft()
            if tier < 0:
                self._seen.pop(block, None)
            else:
                self._seen[block] = tier

    def warmth(self, blocks: Sequence[int], now: float) -> Warmth:
        """What the router believes that the node has of these leading blocks."""
        if not self._setup.stale_s:
            return self._truth(blocks)
        counts = [0, 0, 0, 0]
        for block in blocks:
            tier = self._seen.get(block, 3 if block in self._pool.blocks else -1)
            if self._expected.get(block, -1.0) > now:
                tier = 0
            if tier < 0:
                break
            counts[tier] += 1
        return Warmth(*counts)

    def send(self, number: int, request: Request, asked_s: float, now: float) -> Sent:
        """The request goes here: its service time, and its first token's."""
        blocks = request.full_blocks
        warmth = self._truth(blocks)
        rates = self.rates
        nbytes = self._setup.kv_bytes_per_token * request.block_tokens
        used, load_s, prefill_s = worth(
            warmth, rates, prompt_tokens=max(1, request.input_tokens),
            block_tokens=request.block_tokens, block_nbytes=nbytes,
        )  # fmt: skip
        load_s += nbytes * warmth.host / rates.host_bytes_per_s
        believed_s, waited_s = self.wait_s(now), max(0.0, self.free_at - now)
        service_s = load_s + prefill_s
        first = now + waited_s + service_s
        pooled = max(0, used - warmth.vram - warmth.host)
        told = Sample(
            prefill_s * rates.prefill_tokens_per_s, prefill_s,
            tuple(
                (tier, nbytes * blocks)
                for tier, blocks in ((Tier.HOST, warmth.host), (Tier.SHARED, pooled))
                if blocks
            ),
            load_s, believed_s=believed_s, waited_s=waited_s,
        )  # fmt: skip
        sent = Sent(number, request, asked_s, used, first, service_s, told)
        self.free_at = now + waited_s + self._pace * service_s
        self.busy_s += self._pace * service_s
        if not warmth.blocks:
            self.last_cold = now
        self.waiting.append(sent)
        self.prefill_blocks += _blocks(sent)
        total = (request.input_tokens + request.output_tokens) / request.block_tokens
        self.decode_blocks += total
        ends = first + self._setup.decode_s * request.output_tokens
        heappush(self._decoding, (ends, total))
        self._fill(blocks, now)
        return sent

    def lose(self, now: float) -> list[Sent]:
        """The node is gone: what waited on it has to go elsewhere."""
        lost = list(self.waiting)
        self.busy_s -= sum(min(each.service_s, each.first_token_s - now) for each in lost)
        return lost

    def _truth(self, blocks: Sequence[int]) -> Warmth:
        vram = host = shared = 0
        in_vram, in_host, in_pool = self._vram, self._host, self._pool.blocks
        for block in blocks:
            if block in in_vram:
                vram += 1
            elif block in in_host:
                host += 1
            elif block in in_pool:
                shared += 1
            else:
                break
        return Warmth(vram, host, 0, shared)

    def _fill(self, blocks: Sequence[int], now: float) -> None:
        setup, told = self._setup, self._setup.stale_s > 0
        vram, host = self._vram, self._host
        for block in reversed(blocks):
            if block not in vram:
                host.pop(block, None)
                if told:
                    self._tell(now, block, 0)
            vram[block] = None
            vram.move_to_end(block)
            if told:
                self._expected[block] = now + SPECULATIVE_S
        while len(vram) > setup.vram_blocks:
            block, _ = vram.popitem(last=False)
            if setup.host_blocks:
                host[block] = None
                host.move_to_end(block)
            if told:
                self._tell(now, block, 1 if setup.host_blocks else -1)
        while len(host) > setup.host_blocks:
            block, _ = host.popitem(last=False)
            if told:
                self._tell(now, block, -1)
        if len(self._expected) > 16 * setup.vram_blocks:
            self._expected = {b: until for b, until in self._expected.items() if until > now}
        self._pool.use(blocks)

    def _tell(self, now: float, block: int, tier: int) -> None:
        self._untold.append((now + self._setup.stale_s, block, tier))


def _blocks(sent: Sent) -> float:
    return sent.request.input_tokens / sent.request.block_tokens - sent.matched
