"""The two ends of the stream between nodes' daemons, made by hand: they do what they like."""

import socket
import struct
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence

from kvtier.codec import frame
from kvtier.codec.codecs import RAW
from kvtier.core.blocks import BEGINS, BlockKey, BlockLayout
from kvtier.core.fidelity import Fidelity
from kvtier.wire import lending, local
from kvtier.wire.lending import Head, Kind
from kvtier.wire.local import Value
from tests.launching import DEADLINE_S
from tests.node.conftest import LAYOUT, content

HELLO = local.encode(lending.VERSION, "")
WELCOME = local.encode(True, lending.VERSION, "a")


class Asker:
    """A connection to a lender."""

    def __init__(self, address: str, hello: bytes | None = HELLO, source: str = "") -> None:
        host, _, port = address.rpartition(":")
        self.socket = socket.create_connection(
            (host, int(port)), timeout=DEADLINE_S, source_address=(source, 0)
        )
        self.welcome: list[Value] | None = None
        if hello is not None:
            self.socket.sendall(hello)
            self.welcome = self.message()

    def message(self) -> list[Value] | None:
        """What it says; None: it hung up."""
        prefix = self.take(4)
        if not prefix:
            return None
        (message,) = local.Decoder().feed(prefix + self.take(*struct.unpack("<I", prefix)))
        return message

    def take(self, count: int) -> bytes:
        """So many, or none where it hung up before."""
        got = b""
        while len(got) < count:
            try:
                more = self.socket.recv(count - len(got))
            except ConnectionResetError:
                more = b""
            if not more:
                return b""
            got += more
        return got

    def ask(
        self, keys: Sequence[bytes], *, first: int = 0, blocks: int = lending.MAX_BLOCKS,
        layout: str = LAYOUT.id, wait_ms: int = 60_000,
    ) -> None:  # fmt: skip
        self.socket.sendall(local.encode(layout, b"".join(keys), first, blocks, wait_ms))

    def head(self) -> Head:
        return lending.parse_head(bytearray(self.take(lending.HEAD_NBYTES)))

    def answer(self) -> tuple[int, Kind, str]:
        """How many blocks came, how it ended, and what was said."""
        count = 0
        while (head := self.head()).kind is Kind.BLOCK:
            assert len(self.take(head.nbytes)) == head.nbytes
            count += 1
        return count, head.kind, self.take(head.nbytes).decode()

    def __enter__(self) -> "Asker":
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()


Sends = Callable[[list[BlockKey]], Iterable[bytes]]


class HangUp(Exception):
    """Raised by what a rogue sends: close the connection."""


class Rogue:
    """A lender that says `welcome`, and to each request what `sends` makes of the wanted keys."""

    def __init__(self) -> None:
        self.sends: Sends = honest
        self.welcome = WELCOME
        self.requests = 0
        self.connections = 0
        self.over = threading.Event()
        self.greets = threading.Event()
        self.greets.set()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def close(self) -> None:
        self.over.set()
        self.greets.set()
        socket.create_connection(self._listener.getsockname()).close()  # wakes it
        self._threads[0].join()
        for each in self._sockets:
            each.close() if each.fileno() < 0 else _cut(each)
        for thread in self._threads:
            thread.join()
        self._listener.close()

    def hangs(self, keys: list[BlockKey]) -> Iterator[bytes]:
        """Two blocks and a half, and then nothing."""
        yield from sent(keys[0])
        yield from sent(keys[1])
        yield b"".join(sent(keys[2]))[:1000]
        self.over.wait()

    def _accept(self) -> None:
        while True:
            sock, _ = self._listener.accept()
            if self.over.is_set():
                sock.close()
                return
            self.connections += 1
            self._sockets.append(sock)
            self._threads.append(threading.Thread(target=self._serve, args=(sock,)))
            self._threads[-1].start()

    def _serve(self, sock: socket.socket) -> None:
        decoder, greeted = local.Decoder(), False
        with sock:
            try:
                while data := sock.recv(65536):
                    for message in decoder.feed(data):
                        if not greeted:
                            lending.parse_hello(message)
                            self.greets.wait()
                            sock.sendall(self.welcome)
                            greeted = True
                            continue
                        wanted = lending.parse_wanted(message)
                        self.requests += 1
                        for each in self.sends(wanted.keys[wanted.first :]):
                            sock.sendall(each)
            except (HangUp, OSError):
                return


def _cut(sock: socket.socket) -> None:
    try:
        sock.shutdown(socket.SHUT_RDWR)
    except OSError:
        return


END = lending.pack_end()


def sent(
    key: BlockKey, layout: BlockLayout = LAYOUT, fidelity: Fidelity = Fidelity.EXACT
) -> tuple[bytes, bytes]:
    """A block: its head, and itself."""
    block = memoryview(content(key))
    header, _ = frame.encode(key, BEGINS, block, layout, RAW, fidelity)
    return lending.pack_block(header, block.nbytes), bytes(block)


def honest(keys: list[BlockKey]) -> list[bytes]:
    return [*(part for key in keys for part in sent(key)), END]


def turned(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def with_payload_bit_turned(keys: list[BlockKey]) -> list[bytes]:
    parts = honest(keys)
    parts[5] = turned(parts[5], LAYOUT.nbytes - 1)
    return parts


def with_header_bit_turned(keys: list[BlockKey]) -> list[bytes]:
    parts = honest(keys)
    parts[4] = turned(parts[4], 8 + 20)
    return parts


def with_another_key(keys: list[BlockKey]) -> list[bytes]:
    return [*honest(keys[:2])[:-1], *sent(keys[3]), *honest(keys[3:])]


def too_long(keys: list[BlockKey]) -> list[bytes]:
    header = sent(keys[2])[0][8:]
    return [*honest(keys[:2])[:-1], lending.pack_block(header, LAYOUT.nbytes + 1), bytes(40_000)]


def too_short(keys: list[BlockKey]) -> list[bytes]:
    header = sent(keys[2])[0][8:]
    return [*honest(keys[:2])[:-1], lending.pack_block(header, 1), b"x", END]


def of_no_kind(keys: list[BlockKey]) -> list[bytes]:
    return [*honest(keys[:2])[:-1], struct.pack("<II80x", 9, 0)]


def with_a_long_speech(keys: list[BlockKey]) -> list[bytes]:
    return [*honest(keys[:2])[:-1], struct.pack("<II80x", Kind.REFUSED, 2**31)]
