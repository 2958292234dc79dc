"""A ledger as tests drive it: effects are looked at, moves ended, prompts named."""

from kvtier.core.blocks import BlockKey
from kvtier.core.ledger import HOST, Effect, Gone, Held, Ledger, Move
from kvtier.core.tiers import Tier, TierSpec
from kvtier.testing.keys import path_of

NBYTES = 100  # of a block
DISK = 1


def prompt(name: str, blocks: int = 1) -> list[BlockKey]:
    """The keys of a prompt: "a" and "ab" are a's beginnings of "abc"."""
    name += name[-1] * (blocks - len(name))
    return path_of(name.encode())


def block(name: str) -> BlockKey:
    """The last key of a prompt."""
    return prompt(name)[-1]


def spec(tier: Tier, blocks: int, drain_at: int = 0, queue: int = 64) -> TierSpec:
    return TierSpec(tier=tier, capacity=blocks * NBYTES, drain_at=drain_at * NBYTES, queue=queue)


def told_singly(effects: list[Effect]) -> list[Effect]:
    """What is told of several blocks at once, block by block."""
    return [
        single
        for effect in effects
        for single in (
            [effect._replace(keys=(key,)) for key in effect.keys]
            if isinstance(effect, Held | Gone)
            else [effect]
        )
    ]


class Node:
    """A ledger whose effects a test looks at and whose moves it ends."""

    def __init__(self, *tiers: TierSpec) -> None:
        self.ledger = Ledger(NBYTES, tiers)
        self.moves: list[Move] = []

    def effects(self) -> list[Effect]:
        effects = told_singly(self.ledger.take_effects())
        self.moves += [effect for effect in effects if isinstance(effect, Move)]
        self.ledger.check()
        return effects

    def save(self, path: list[BlockKey], client: int = 1) -> int:
        """Write and commit what is not held; how many blocks were granted."""
        lease = self.ledger.write(client, path)
        self.ledger.commit(lease.id)
        self.effects()
        return len(lease.keys)

    def touch(self, path: list[BlockKey]) -> None:
        self.ledger.release(self.ledger.read(1, path).id)
        self.effects()

    def end_moves(self, *, ok: bool = True, nbytes: int = NBYTES) -> list[Effect]:
        """End the moves that are under way now, but not those that they lead to."""
        ending, self.moves = self.moves, []
        effects = []
        for move in ending:
            self.ledger.moved(move, ok, nbytes)
            effects += self.effects()
        return effects

    def rest(self) -> None:
        """End all moves, and those that they lead to."""
        while self.moves:
            self.end_moves()

    def held(self, path: list[BlockKey]) -> tuple[int, ...]:
        return self.ledger.match(path).by_tier


def host_only(blocks: int) -> Node:
    return Node(spec(Tier.HOST, blocks))


def with_disk(host: int, disk: int, drain_at: int = 0, queue: int = 64) -> Node:
    return Node(spec(Tier.HOST, host, drain_at), spec(Tier.DISK, disk, disk, queue))


def three_tiers(host: int = 4, disk: int = 8, shared: int = 100) -> Node:
    return Node(spec(Tier.HOST, host), spec(Tier.DISK, disk), spec(Tier.SHARED, shared))


def lowered(node: Node, path: list[BlockKey]) -> None:
    """Have `path` in the lower tiers and not in host memory."""
    node.save(path)
    node.rest()
    node.ledger.clear(HOST)
    node.effects()
