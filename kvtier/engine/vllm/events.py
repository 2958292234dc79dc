"""vLLM's KV events, read into what VRAM holds in kvtier's keys. Knows no socket.

The wire (vllm/distributed/kv_events.py, 0.32): three frames, the last of them a msgpack array
[time, [event, ...], data-parallel rank]; an event is a map with `type`, or in older releases an
array that begins with it. Hashes are 32 bytes, or the last 8 of them as a number.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import msgpack

from kvtier.core.blocks import BEGINS, BlockKey
from kvtier.core.vllm_keys import HASH_NBYTES, Extra, block_hash, keys_of
from kvtier.errors import RemoteProtocolError

MAX_EVENT_NBYTES: Final = 64 << 20
MAX_HELD: Final = 1 << 23  # blocks; more is a peer gone mad
VRAM: Final = ("GPU", None)  # the media that mean VRAM: older releases name none
_FIELDS: Final = {
    "BlockStored": (
        "block_hashes", "parent_block_hash", "token_ids", "block_size", "lora_id", "medium",
        "lora_name", "extra_keys", "group_idx",
    ),
    "BlockRemoved": ("block_hashes", "medium", "group_idx"),
    "AllBlocksCleared": (),
}  # fmt: skip

Hash = int | bytes
Changes = list[tuple[BlockKey, bool]]


class Batch(NamedTuple):
    """The events of one engine step."""

    events: list[dict[str, object]]
    rank: int


def decode(payload: bytes) -> Batch:
    """One message's events, each as a map with `type`.

    Raises:
        RemoteProtocolError: It is none.
    """
    if len(payload) > MAX_EVENT_NBYTES:
        raise RemoteProtocolError(f"KV events: {len(payload)} bytes, limit {MAX_EVENT_NBYTES}")
    try:
        message = msgpack.unpackb(payload, strict_map_key=False)
        _, events, *rest = message
        rank = rest[0] if rest and isinstance(rest[0], int) else 0
        return Batch([_as_map(event) for event in events], rank)
    except (ValueError, TypeError, KeyError, msgpack.exceptions.UnpackException) as error:
        raise RemoteProtocolError(f"KV events: not a batch of vLLM's: {error}") from None


def _as_map(event: object) -> dict[str, object]:
    if isinstance(event, dict):
        if not isinstance(event.get("type"), str):
            raise TypeError("an event without a type")
        return event
    if not isinstance(event, list):
        raise TypeError("an event is neither a map nor an array")
    kind, *values = event
    fields = _FIELDS.get(kind, ())
    return {"type": kind, **dict(zip(fields, values, strict=False))}


@dataclass(slots=True)
class Residency:
    """What VRAM of one engine holds, as its events tell.

    `none_hash` and `root` are those of the engine's keys, `adapters` the paths of its LoRAs by
    name: a hash holds the path, an event only the name. A block whose hash cannot be computed
    anew from its tokens (its parent was never told, its salt cannot be told from an adapter) is
    not taken: nothing is said of it. Every computed hash is compared with the one in the event.
    """

    none_hash: bytes
    root: bytes
    block_tokens: int
    adapters: Mapping[str, str] = field(default_factory=dict)
    held: dict[Hash, bytes] = field(default_factory=dict)  # to the whole hash
    before: dict[BlockKey, BlockKey] = field(default_factory=dict)  # of each, or BEGINS
    unknown: int = 0  # blocks not taken

    def apply(self, batch: Batch) -> Changes:
        """Take one batch's events.

        Raises:
            RemoteProtocolError: An event has not the fields that its type has.
        """
        changes: Changes = []
        for event in batch.events:
            try:
                self._apply(event, changes)
            except (KeyError, TypeError, ValueError, OverflowError) as error:
                text = f"KV events: {event.get('type')!s}: {type(error).__name__} {error}"
                raise RemoteProtocolError(text) from None
        return changes

    def keys(self) -> list[BlockKey]:
        """The keys of all that is held."""
        return keys_of(self.root, self.held.values())

    def clear(self) -> Changes:
        """Forget everything: the engine did, or it is another one."""
        changes = [(key, False) for key in self.keys()]
        self.held.clear()
        self.before.clear()
        return changes

    def _apply(self, event: dict[str, object], changes: Changes) -> None:
        kind = event["type"]
        if kind == "AllBlocksCleared":  # VRAM's alone, even where other media are told of
            changes += self.clear()
        elif event.get("medium") not in VRAM or event.get("group_idx") not in (0, None):
            return
        elif kind == "BlockStored":
            self._stored(event, changes)
        elif kind == "BlockRemoved":
            names = _hashes(event["block_hashes"])
            whole = [found for name in names if (found := self.held.pop(name, None)) is not None]
            for key in keys_of(self.root, whole):
                self.before.pop(key, None)
                changes.append((key, False))

    def _stored(self, event: dict[str, object], changes: Changes) -> None:
        names = _hashes(event["block_hashes"])
        tokens, size = event["token_ids"], event["block_size"]
        extras = event.get("extra_keys")
        if not isinstance(tokens, list) or not isinstance(size, int):
            raise TypeError("token_ids is no list, or block_size no number")
        if size != self.block_tokens or len(tokens) != size * len(names):
            raise ValueError(f"{len(tokens)} tokens for {len(names)} blocks of {size!s}")
        if len(self.held) + len(names) > MAX_HELD:
            raise ValueError(f"more than {MAX_HELD} blocks")
        parent = self._parent(event.get("parent_block_hash"))
        first = event.get("parent_block_hash") is None
        before = BEGINS if first or parent is None else keys_of(self.root, [parent])[0]
        lora = event.get("lora_name")
        for index, name in enumerate(names):
            if parent is not None:
                part = tokens[index * size : (index + 1) * size]
                raw = extras[index] if isinstance(extras, list) and extras else None
                parent = self._whole(name, parent, part, raw, lora)
            if parent is None:
                self.unknown += len(names) - index
                return
            (key,) = keys_of(self.root, [parent])
            self.held[name] = parent
            self.before[key], before = before, key
            changes.append((key, True))

    def _parent(self, name: object) -> bytes | None:
        if name is None:
            return self.none_hash
        (known,) = _hashes([name])
        return known if isinstance(known, bytes) else self.held.get(known)

    def _whole(
        self, name: Hash, parent: bytes, tokens: Sequence[int], raw: object, lora: object
    ) -> bytes | None:
        """The hash of one block, if it can be computed and is the one that the event names."""
        for extras in self._tagged(raw, lora):
            computed = block_hash(parent, tokens, extras)
            if _name(computed, name) == name:
                return computed
        return name if isinstance(name, bytes) else None

    def _tagged(self, raw: object, lora: object) -> list[list[Extra] | None]:
        """Extra keys as they are hashed, from the untagged ones that events carry."""
        if not raw:
            return [None]
        if not isinstance(raw, list | tuple):
            return []
        tagged: list[Extra] = []
        rest = list(raw)
        if lora is not None:
            path = self.adapters.get(lora) if isinstance(lora, str) else None
            if path is None or rest[:1] != [lora]:
                return []
            tagged.append(("lora", str(rest.pop(0)), path))
        for each in rest:
            if isinstance(each, str):
                tagged.append(("cache_salt", each))
            elif isinstance(each, list | tuple) and len(each) == 2:
                tagged.append(("mm", *each))
            else:
                return []
        return [tagged]


def _name(computed: bytes, like: Hash) -> Hash:
    return int.from_bytes(computed[-8:], "big") if isinstance(like, int) else computed


def _hashes(values: object) -> list[Hash]:
    if not isinstance(values, list):
        raise TypeError("block_hashes is no list")
    for each in values:
        good = isinstance(each, bytes) and len(each) == HASH_NBYTES
        if not good and not (isinstance(each, int) and not isinstance(each, bool)):
            raise TypeError(f"{each!r} is no block hash")
    return values
