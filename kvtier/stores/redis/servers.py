"""Which server has a key: one alone, the primary that Sentinels name, or a cluster's."""

import binascii
import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Final, Protocol

from kvtier import metrics
from kvtier.errors import StoreUnavailable
from kvtier.stores.redis.address import Address, Kind, Login, Target
from kvtier.stores.redis.connection import Ask, Deadline, Link, Options
from kvtier.stores.redis.resp import Reply, ReplyError

SLOTS: Final = 16384
MAX_REDIRECTS: Final = 5  # rounds in which a command is sent elsewhere
MAX_SERVERS: Final = 1024  # of one cluster


class Topology(Protocol):
    """Where keys lie now, as far as is known."""

    def find(self, name: bytes, deadline: Deadline) -> Address:
        """The server that has `name`; asks others where it isn't known.

        Raises:
            StoreUnavailable: Nobody could say.
        """
        ...

    def primaries(self, deadline: Deadline) -> list[Address]:
        """Every server that has keys of its own. Raises as `find` does."""
        ...

    def forget(self) -> None:
        """What was known has proved wrong."""
        ...

    def moved(self, name: bytes, address: Address) -> None:
        """A server said that `address` has `name` now."""
        ...

    def close(self) -> None:
        """Hang up."""
        ...


class Servers:
    """Sends commands to whoever has their keys. For any number of threads."""

    def __init__(self, target: Target, options: Options, sentinel_login: Login) -> None:
        self._options = options
        self._links: dict[Address, Link] = {}
        self._lock = threading.Lock()
        self._closed = False
        self._topology: Topology
        if target.kind is Kind.CLUSTER:
            self._topology = Slots(target.seeds, self.link)
        elif target.kind is Kind.SENTINEL:
            asking = Options(sentinel_login, options.tls, options.timeout_s, options.retry_s)
            self._topology = Sentinels(target.seeds, target.service, asking)
        else:
            self._topology = Alone(target.seeds[0])

    def run(self, asks: Sequence[Ask], deadline: Deadline) -> None:
        """Fill in the reply of each; those that must go elsewhere are sent there.

        Raises:
            StoreUnavailable: A server gave no answer, or cannot serve now.
        """
        todo: list[tuple[Ask, Address | None]] = [(ask, None) for ask in asks]
        for turn in range(MAX_REDIRECTS + 1):
            groups: dict[tuple[Address, bool], list[Ask]] = {}
            for ask, at in todo:
                address = at or self._find(ask.name, deadline)
                groups.setdefault((address, at is not None), []).append(ask)
            todo = []
            for (address, asking), group in groups.items():
                try:
                    self.link(address).pipeline(group, deadline, asking=asking)
                except StoreUnavailable:
                    if not self._moved_away(address, group, deadline) or turn == MAX_REDIRECTS:
                        raise
                    todo += [(ask, None) for ask in group]
                    continue
                todo += self._redirected(address, group, deadline)
            if not todo:
                return
        raise StoreUnavailable(f"{todo[0][0].reply!s:.200}: sent elsewhere {MAX_REDIRECTS} times")

    def primaries(self, deadline: Deadline) -> list[Link]:
        """A link to every server that has keys of its own. Raises StoreUnavailable."""
        return [self.link(address) for address in self._topology.primaries(deadline)]

    def link(self, address: Address) -> Link:
        """The link to `address`, made at its first use."""
        with self._lock:
            if self._closed:
                raise StoreUnavailable("the store is closed")
            if address not in self._links:
                if len(self._links) >= MAX_SERVERS:
                    self._links.pop(next(iter(self._links))).close()
                self._links[address] = Link(address, self._options)
            return self._links[address]

    def close(self) -> None:
        """Hang up everywhere. Idempotent."""
        with self._lock:
            self._closed = True
            links = [*self._links.values()]
            self._links.clear()
        self._topology.close()
        for each in links:
            each.close()

    def _find(self, name: bytes, deadline: Deadline) -> Address:
        try:
            return self._topology.find(name, deadline)
        except TimeoutError as error:
            raise StoreUnavailable(str(error)) from None

    def _moved_away(self, address: Address, group: list[Ask], deadline: Deadline) -> bool:
        """Whether somebody else serves a failed server's keys by now."""
        self._topology.forget()
        return self._find(group[0].name, deadline) != address

    def _redirected(
        self, address: Address, group: list[Ask], deadline: Deadline
    ) -> list[tuple[Ask, Address | None]]:
        again: list[tuple[Ask, Address | None]] = []
        for ask in group:
            if not isinstance(ask.reply, ReplyError):
                continue
            if ask.reply.code == "ASK":
                again.append((ask, _redirect(ask.reply, address)))
            elif ask.reply.code == "MOVED":
                self._topology.moved(ask.name, _redirect(ask.reply, address))
                again.append((ask, None))
            elif ask.reply.code == "READONLY" and self._moved_away(address, [ask], deadline):
                again.append((ask, None))
        if again:
            metrics.REDIS_REDIRECTS.inc(len(again))
        return again


class Alone:
    """One server has everything. See `Topology`."""

    def __init__(self, address: Address) -> None:
        self._address = address

    def find(self, name: bytes, deadline: Deadline) -> Address:
        """See `Topology.find`."""
        return self._address

    def primaries(self, deadline: Deadline) -> list[Address]:
        """See `Topology.primaries`."""
        return [self._address]

    def forget(self) -> None:
        """See `Topology.forget`."""

    def moved(self, name: bytes, address: Address) -> None:
        """See `Topology.moved`; a server alone says no such thing."""

    def close(self) -> None:
        """See `Topology.close`."""


class Sentinels:
    """The primary that the Sentinels name. See `Topology`.

    https://redis.io/docs/latest/develop/reference/sentinel-clients/
    """

    def __init__(self, seeds: Sequence[Address], service: str, options: Options) -> None:
        self._links = [Link(each, options) for each in seeds]
        self._service = service.encode()
        self._lock = threading.Lock()
        self._primary: Address | None = None

    def find(self, name: bytes, deadline: Deadline) -> Address:
        """See `Topology.find`."""
        with _held(self._lock, deadline):
            if self._primary is None:
                self._primary = self._ask_all(deadline)
            return self._primary

    def primaries(self, deadline: Deadline) -> list[Address]:
        """See `Topology.primaries`."""
        return [self.find(b"", deadline)]

    def forget(self) -> None:
        """See `Topology.forget`."""
        with self._lock:
            self._primary = None

    def moved(self, name: bytes, address: Address) -> None:
        """See `Topology.moved`; only a cluster says so."""

    def close(self) -> None:
        """See `Topology.close`."""
        for each in self._links:
            each.close()

    def _ask_all(self, deadline: Deadline) -> Address:
        why = "no Sentinel"
        for link in [*self._links]:
            try:
                reply = _call(
                    link, deadline, b"SENTINEL", b"GET-MASTER-ADDR-BY-NAME", self._service
                )
            except StoreUnavailable as error:
                why = f"sentinel {error}"
                continue
            match reply:
                case [bytes(host), bytes(port)] if port.isdigit():
                    # The one that answered is asked first the next time.
                    self._links.remove(link)
                    self._links.insert(0, link)
                    return Address(host.decode(errors="replace"), int(port))
            why = f"sentinel {link.address} names no server: {reply!r:.200}"
        raise StoreUnavailable(why)


class Slots:
    """The table of a cluster's 16384 slots. See `Topology`.

    https://redis.io/docs/latest/operate/oss_and_stack/reference/cluster-spec/
    """

    def __init__(self, seeds: Sequence[Address], link: Callable[[Address], Link]) -> None:
        self._known = [*seeds]
        self._link = link
        self._lock = threading.Lock()
        self._table: list[Address | None] = []
        self._moved: dict[int, Address] = {}  # said by servers, since the table was read

    def find(self, name: bytes, deadline: Deadline) -> Address:
        """See `Topology.find`."""
        with _held(self._lock, deadline):
            if not self._table:
                self._table = self._read_table(deadline)
            found = self._moved.get(slot(name), self._table[slot(name)])
        if found is None:
            self.forget()
            raise StoreUnavailable(f"slot {slot(name)} of the cluster is served by nobody")
        return found

    def primaries(self, deadline: Deadline) -> list[Address]:
        """See `Topology.primaries`."""
        with _held(self._lock, deadline):
            self._table = self._read_table(deadline)
            return sorted({each for each in self._table if each is not None})

    def forget(self) -> None:
        """See `Topology.forget`."""
        with self._lock:
            self._table = []
            self._moved = {}

    def moved(self, name: bytes, address: Address) -> None:
        """See `Topology.moved`; the whole table is read anew, from the one who has it now."""
        with self._lock:
            self._table = []
            self._moved[slot(name)] = address
            self._known = [address, *(each for each in self._known if each != address)]

    def close(self) -> None:
        """See `Topology.close`; its links are the store's."""

    def _read_table(self, deadline: Deadline) -> list[Address | None]:
        why = "no server"
        for address in self._known:
            try:
                reply = _call(self._link(address), deadline, b"CLUSTER", b"SLOTS")
            except StoreUnavailable as error:
                why = str(error)
                continue
            table = _table(reply, address)
            if table is not None:
                found = dict.fromkeys(each for each in table if each is not None)
                known = [*found, *(each for each in self._known if each not in found)]
                self._known = known[:MAX_SERVERS]
                return table
            why = f"{address}: {reply!r:.200} is no table of slots"
        raise StoreUnavailable(why)


def slot(name: bytes) -> int:
    """The slot of a key: of what stands between its first "{" and the next "}", if there is."""
    start = name.find(b"{")
    end = name.find(b"}", start + 1)
    if start >= 0 and end > start + 1:
        name = name[start + 1 : end]
    return binascii.crc_hqx(name, 0) % SLOTS


def _table(reply: Reply, teller: Address) -> list[Address | None] | None:
    """The primary of each slot out of CLUSTER SLOTS; None where it is no such reply."""
    table: list[Address | None] = [None] * SLOTS
    if not isinstance(reply, list) or not reply:
        return None
    for each in reply:
        match each:
            case [int(first), int(last), [host, int(port), *_], *_] if (
                0 <= first <= last < SLOTS and 0 < port < 65536
            ):
                # A server that does not know its own name leaves it out.
                name = host.decode(errors="replace") if isinstance(host, bytes) else ""
                address = Address(teller.host if name in ("", "?") else name, port)
                table[first : last + 1] = [address] * (last + 1 - first)
            case _:
                return None
    return table


def _redirect(error: ReplyError, teller: Address) -> Address:
    """The address in "MOVED 3999 127.0.0.1:6381"."""
    host, _, port = error.detail.rpartition(" ")[2].rpartition(":")
    if not port.isdecimal() or not 0 < int(port) < 65536:
        raise StoreUnavailable(f"{teller}: {error}")
    return Address(host.strip("[]") or teller.host, int(port))


def _call(link: Link, deadline: Deadline, *command: bytes) -> Reply:
    ask = Ask(b"", command)
    try:
        link.pipeline([ask], deadline)
    except TimeoutError as error:
        raise StoreUnavailable(str(error)) from None
    return ask.reply


@contextlib.contextmanager
def _held(lock: threading.Lock, deadline: Deadline) -> Iterator[None]:
    if not lock.acquire(timeout=deadline.left()):
        raise TimeoutError("nobody could say in time where the keys lie")
    try:
        yield
    finally:
        lock.release()
