"""The node's Unix socket, where engines attach."""

import asyncio
import contextlib
import os
import socket
from pathlib import Path

from kvtier.errors import ConfigError
from kvtier.held import HeldElsewhere, hold
from kvtier.node.connection import LINGER_S, Connection, Node
from kvtier.node.gate import Gate
from kvtier.node.manager import TierManager


class LocalServer:
    """Listens at the node's socket path until closed."""

    def __init__(
        self, node: Node, path: str, max_clients: int, allow_uids: tuple[int, ...]
    ) -> None:
        self._node = node
        self._path = Path(path)
        self._gate = Gate[Connection](max_clients)
        self._uids = {os.getuid(), *allow_uids}
        self._server: asyncio.Server | None = None
        self._bound: tuple[int, int] | None = None  # what the path is, while it is ours
        self._lock: int | None = None  # held while the path is ours

    @property
    def clients(self) -> int:
        """Engines attached now."""
        return len(self._gate.inside)

    def hear(self) -> None:
        """Act on what engines have told up to here: before whatever it matters to."""
        self._gate.hearing.now()

    def attached(self, manager: TierManager) -> bool:
        """Whether any engine uses these tiers."""
        return any(each.manager is manager for each in self._gate.inside)

    def claim(self) -> None:
        """Make the path this daemon's, before anything else of it is used. Blocks a moment.

        Of daemons that start at once over what a dead one has left, one has it. Idempotent.

        Raises:
            ConfigError: Another daemon has it, something that is no socket is there, the folder
                cannot be written, or it and the one that it should lie in are not there.
        """
        if self._lock is not None:
            return
        try:
            self._make_folder()
            self._refuse_other()
            self._lock = hold(self._path.with_name(f"{self._path.name}.lock"))
        except HeldElsewhere as other:
            raise ConfigError(f"node.socket: {other} has {self._path}") from None
        except OSError as error:
            raise ConfigError(f"node.socket: cannot listen at {self._path}: {error}") from None

    async def start(self) -> None:
        """Bind and listen, where `claim` has not failed.

        Raises:
            ConfigError: As `claim`; or something that is no daemon's socket is there.
        """
        await asyncio.to_thread(self.claim)
        try:
            if self._path.exists():
                self._take_over()
            self._server = await asyncio.get_running_loop().create_unix_server(
                lambda: Connection(self._node, self._uids.__contains__, self._gate),
                str(self._path),
            )
            self._bound = self._there()
            self._path.chmod(0o666 if len(self._uids) > 1 else 0o600)
        except OSError as error:
            raise ConfigError(f"node.socket: cannot listen at {self._path}: {error}") from None

    def _make_folder(self) -> None:
        """The socket's own folder, for nobody but us; what it lies in must be there.

        A mistyped path makes no tree of folders. Users of node.allow_uids may pass through it, but
        not look into it.
        """
        folder = self._path.parent
        if not folder.parent.is_dir():
            raise ConfigError(
                f"node.socket: there is no folder {folder.parent} to make {folder} in"
            )
        with contextlib.suppress(FileExistsError):
            folder.mkdir()
            folder.chmod(0o711 if len(self._uids) > 1 else 0o700)  # whatever the umask is

    def _refuse_other(self) -> None:
        if self._path.exists() and not self._path.is_socket():
            raise ConfigError(f"node.socket: {self._path} is there already and is no socket")

    def _take_over(self) -> None:
        """A socket that nobody answers was left by a daemon that was killed."""
        self._refuse_other()
        with socket.socket(socket.AF_UNIX) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(str(self._path))
            except ConnectionRefusedError:
                self._path.unlink()
                return
        # Of a release before this one, which held no lock.
        raise ConfigError(f"node.socket: another daemon listens at {self._path}")

    async def close(self) -> None:
        """Hang up on all engines and remove the socket."""
        # First of all: once nobody listens the next daemon may take the path over.
        if self._bound is not None and self._there() == self._bound:
            self._path.unlink(missing_ok=True)
        lock, self._lock = self._lock, None
        if lock is not None:
            os.close(lock)
        if self._server is None:
            return
        self._server.close()
        for connection in list(self._gate.inside):
            connection.close()
        try:
            async with asyncio.timeout(LINGER_S):
                await self._server.wait_closed()  # of connections, too, from Python 3.12 on
        except TimeoutError:
            for connection in list(self._gate.inside):  # it reads nothing of what it asked for
                connection.abort()

    def _there(self) -> tuple[int, int] | None:
        """What lies at the path; None: nothing."""
        try:
            found = self._path.stat()
        except OSError:
            return None
        return found.st_dev, found.st_ino
