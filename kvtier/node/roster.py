"""The daemons that this one may load blocks from, with how each has been of late."""

import logging
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Final

from kvtier.config import PeerConfig, PeersConfig, parse_peers
from kvtier.core.blocks import BlockLayout
from kvtier.errors import ConfigError
from kvtier.node.peer import Fetched, Peer, Result
from kvtier.node.speed import Speed
from kvtier.stores.redis.breaker import Breaker

LONGEST_S: Final = 30.0  # that a peer is left alone which fails again and again

log = logging.getLogger(__name__)


class Known:
    """A peer, with how it has been. Of the loop."""

    def __init__(self, peer: Peer, retry_s: float) -> None:
        self.peer = peer
        self.breaker = Breaker(retry_s, max(retry_s, LONGEST_S))
        self.failing = False
        self._failed_at = float("-inf")
        self.speeds: dict[str, tuple[Speed, BlockLayout]] = {}  # by the layout's id

    def speed(self, layout: BlockLayout) -> Speed:
        """How fast blocks of a layout come from there."""
        return self.speeds.setdefault(layout.id, (Speed(), layout))[0]

    def bytes_per_s(self, now: float) -> list[float]:
        """Of each layout of late, as far as it was measured."""
        blocks = ((each.seconds_a_block(now), layout) for each, layout in self.speeds.values())
        return [layout.nbytes / seconds for seconds, layout in blocks if seconds]

    def rests(self, now: float) -> bool:
        """Whether it is to be left alone."""
        return self.breaker.open and now < self.breaker.until

    def judge(self, fetched: Fetched, begun: float, now: float) -> None:
        """Leave it alone for a while where it fails again and again; say when that changes.

        Fetches that had `begun` before one failed and fail with it are one failure: a host that
        loses its power while several are under way is away once.
        """
        late = fetched.result is Result.LATE and not fetched.fidelities  # cut off: says nothing
        if late or fetched.result is Result.FAILED:
            if begun < self._failed_at:
                return
            self._failed_at = now
        if late:
            self.breaker.failed(now)
            return
        if fetched.result is not Result.FAILED:
            self.breaker.succeeded()
            if self.failing:
                log.warning("peer %s answers again", self.peer.node)
            self.failing = False
            return
        self.breaker.failed(now)
        if not self.failing:
            log.warning("peer %s: %s; going on without it", self.peer.node, fetched.why)
        self.failing = True


class Roster:
    """Peers by their names: those of the settings, and those that `peers.file` names now.

    The file is looked at (one `stat`) whenever somebody asks. Where it is bad, what it said before
    stays, with a warning; where it is not there, it says nothing. A peer whose address has changed
    is another one, and pulls from the former are cut off. Lives on the daemon's loop.

    Args:
        config: The settings; None: there are no peers.
        own: This node's name. Its own entry is left out, so that one list can serve all nodes.
        connect: Makes a peer of a name and an address.
    """

    def __init__(
        self, config: PeersConfig | None, own: str, connect: Callable[[str, str], Peer]
    ) -> None:
        self._retry_s = config.retry_s if config else 0.0
        self._own = own
        self._connect = connect
        self._settings = config.members if config else ()
        self._file = Path(config.file) if config and config.file else None
        self._stamp: tuple[int, int, int] | None = None
        self._unread = ""  # why it could not be read, as said
        self._known: dict[str, Known] = {}
        self._keep(self._settings)

    def get(self, node: str) -> Known | None:
        """The peer of that name."""
        self._look()
        return self._known.get(node)

    def all(self) -> Iterable[Known]:
        """Every peer."""
        self._look()
        return self._known.values()

    def close(self) -> None:
        """Cut off all pulls."""
        for each in self._known.values():
            each.peer.close()

    def _look(self) -> None:
        if self._file is None:
            return
        try:
            found = self._file.stat()
            stamp = found.st_mtime_ns, found.st_size, found.st_ino
            if stamp == self._stamp:
                return
            data = self._file.read_bytes()
        except FileNotFoundError:
            if self._stamp is not None:
                self._stamp = None
                self._keep(self._settings)
            return
        except OSError as error:  # the next look tries again: rights show in no stamp
            if self._unread != str(error):
                self._unread = str(error)
                log.warning("peers.file: %s; what it said before is used", error)
            return
        self._stamp, self._unread = stamp, ""
        try:
            members = parse_peers(data, f"peers.file {self._file}")
        except ConfigError as error:
            log.warning("peers.file: %s; what it said before is used", error)
            return
        self._keep([*self._settings, *members])

    def _keep(self, members: Iterable[PeerConfig]) -> None:
        wanted = {each.node: each.address for each in members if each.node != self._own}
        for node, known in list(self._known.items()):
            if wanted.get(node) != known.peer.address:
                del self._known[node]
                known.peer.close()
        for node, address in wanted.items():
            if node not in self._known:
                self._known[node] = Known(self._connect(node, address), self._retry_s)
