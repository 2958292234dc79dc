"""TLS for plain sockets, by the same `[tls]` as gRPC's ports: both ends of it."""

import logging
import ssl
from collections.abc import Callable
from typing import Final

from kvtier.config import TlsConfig, Watched
from kvtier.errors import ConfigError

log = logging.getLogger(__name__)
_SETTINGS: Final = ("cert_file", "key_file", "ca_file", "client_ca_file")


class Contexts:
    """What a socket is wrapped in; a changed file is used from the next connection on.

    A file that got worse leaves what was there before, with a warning. Any thread may ask.
    """

    def __init__(self, tls: TlsConfig) -> None:
        self._tls = tls
        self._files = [
            Watched(path, f"tls.{name}") for name in _SETTINGS if (path := getattr(tls, name))
        ]
        self._kept: dict[str, tuple[tuple[bytes, ...], ssl.SSLContext]] = {}
        self._said = ""  # of a renewal that failed

    def serving(self) -> ssl.SSLContext:
        """For a listener: asks for a certificate where `tls.client_ca_file` is set.

        Raises:
            ConfigError: A file cannot be used, and none could before.
        """
        return self._current("serving", self._make_serving)

    def asking(self) -> ssl.SSLContext:
        """For who connects: the other's certificate and name are checked, our own is shown.

        Raises:
            ConfigError: A file cannot be used, and none could before.
        """
        return self._current("asking", self._make_asking)

    def name_of(self, host: str) -> str:
        """The name that a certificate of `host` must be for."""
        return self._tls.server_name or host.strip("[]")

    def _current(self, kind: str, make: Callable[[], ssl.SSLContext]) -> ssl.SSLContext:
        data = tuple(each.data() for each in self._files)
        kept = self._kept.get(kind)
        if kept is not None and kept[0] == data:
            return kept[1]
        try:
            context = make()
        except (ssl.SSLError, OSError) as error:  # half of a renewal: the rest follows
            if kept is None:
                raise ConfigError(f"[tls]: a file of it cannot be used: {error}") from None
            if self._said != str(error):
                self._said = str(error)
                log.warning("tls.cert_file %s: %s", self._tls.cert_file, error)
            context = kept[1]
            if not isinstance(error, ssl.SSLError):  # no descriptor left: the next call tries again
                return context
        else:
            self._said = ""
        self._kept[kind] = data, context
        return context

    def _make_serving(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self._tls.cert_file, self._tls.key_file)
        if self._tls.client_ca_file:
            context.verify_mode = ssl.CERT_REQUIRED
            context.load_verify_locations(self._tls.client_ca_file)
        return context

    def _make_asking(self) -> ssl.SSLContext:
        context = ssl.create_default_context(cafile=self._tls.ca_file or None)
        if self._tls.cert_file:
            context.load_cert_chain(self._tls.cert_file, self._tls.key_file)
        return context
