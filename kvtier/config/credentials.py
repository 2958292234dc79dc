"""Certificates and tokens: files that are checked at the start and read anew when they change."""

import hashlib
import hmac
import logging
import ssl
from pathlib import Path
from typing import Final

from kvtier.config.settings import AuthConfig, TlsConfig
from kvtier.errors import ConfigError

MIN_TOKEN: Final = 16  # characters
MAX_TOKEN: Final = 4096
MAX_TOKENS: Final = 64  # of one file

log = logging.getLogger(__name__)


class Watched:
    """A file's bytes, read anew when the file has changed.

    A change that cannot be read leaves what was there before, with a warning in the log.

    Raises:
        ConfigError: At the start: it cannot be read; the message begins with `name`.
    """

    def __init__(self, path: str, name: str) -> None:
        self.path = path
        self.name = name
        self._stamp = self._now()
        self._data = self._read()
        self._unread = ""  # why a change could not be read, as said

    def data(self) -> bytes:
        """What it holds now."""
        if (stamp := self._now()) == self._stamp:
            return self._data
        try:
            data = self._read()
        except ConfigError as error:  # the next call tries again: rights show in no stamp
            if self._unread != str(error):
                self._unread = str(error)
                log.warning("%s; what it held before is used", error)
            return self._data
        self._stamp, self._data, self._unread = stamp, data, ""
        log.info("%s %s: read anew", self.name, self.path)
        return data

    def _now(self) -> tuple[int, int, int] | None:
        """What changes with the content; None: nothing is there."""
        try:
            found = Path(self.path).stat()
        except OSError:
            return None
        return found.st_mtime_ns, found.st_size, found.st_ino

    def _read(self) -> bytes:
        try:
            return Path(self.path).read_bytes()
        except OSError as error:
            raise ConfigError(f"{self.name} {self.path}: {error.strerror}") from None


class Tokens:
    """The bearer tokens of `auth.token_file`, one a line: all are accepted, the first is sent.

    So a new one is rolled out without an interruption: add it as the second line everywhere, make
    it the first everywhere, remove the old one.

    Raises:
        ConfigError: At the start: the file cannot be read, or holds no token or a bad one. The
            message has no part of a token.
    """

    def __init__(self, auth: AuthConfig) -> None:
        self._file = Watched(auth.token_file, "auth.token_file")
        self._data = self._file.data()
        self._tokens = self._parse(self._data)

    def first(self) -> str:
        """The token to show to others."""
        return self._now()[0]

    def accepts(self, given: str) -> bool:
        """Whether `given` is one of them; the time that this takes tells nothing of which."""
        digest = hashlib.sha256(given.encode("utf-8", "surrogatepass")).digest()
        found = False
        for token in self._now():
            found |= hmac.compare_digest(hashlib.sha256(token.encode()).digest(), digest)
        return found

    def _now(self) -> list[str]:
        data = self._file.data()
        if data is not self._data:
            self._data = data
            try:
                self._tokens = self._parse(data)
            except ConfigError as error:
                log.warning("%s; the tokens before it are used", error)
        return self._tokens

    def _parse(self, data: bytes) -> list[str]:
        where = f"auth.token_file {self._file.path}"
        try:
            tokens = data.decode("ascii").split()
        except UnicodeDecodeError:
            raise ConfigError(f"{where}: a token has characters that are not ASCII") from None
        if not 1 <= len(tokens) <= MAX_TOKENS:
            raise ConfigError(f"{where}: {len(tokens)} tokens, must be 1 to {MAX_TOKENS}")
        for number, token in enumerate(tokens, 1):
            if not MIN_TOKEN <= len(token) <= MAX_TOKEN:
                raise ConfigError(
                    f"{where}: token {number} has {len(token)} characters, "
                    f"must have {MIN_TOKEN} to {MAX_TOKEN}"
                )
            if not token.isprintable():
                raise ConfigError(f"{where}: token {number} has a control character in it")
        return tokens


def check_tls(tls: TlsConfig, *, serving: bool) -> None:
    """Refuse what could only fail later, and then say less.

    Raises:
        ConfigError: A file is missing, is not PEM, does not belong to the other, or has expired;
            or a server has none. The message names the setting and the file.
    """
    if bool(tls.cert_file) != bool(tls.key_file):
        raise ConfigError("tls.cert_file and tls.key_file go together: one of them is not set")
    if serving and not tls.cert_file:
        raise ConfigError("tls.cert_file must be set where something listens with [tls]")
    for name, path in (("tls.ca_file", tls.ca_file), ("tls.client_ca_file", tls.client_ca_file)):
        if path:
            Watched(path, name)
            try:
                ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_verify_locations(path)
            except (ssl.SSLError, OSError) as error:
                raise ConfigError(f"{name} {path}: no certificate in it: {error}") from None
    if tls.cert_file:
        Watched(tls.cert_file, "tls.cert_file")
        Watched(tls.key_file, "tls.key_file")
        _check_pair(tls.cert_file, tls.key_file)


def _check_pair(cert_file: str, key_file: str) -> None:
    """By a handshake with ourselves in memory, which trusts this very certificate."""
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    try:
        server.load_cert_chain(cert_file, key_file, password=lambda: b"")
    except (ssl.SSLError, OSError) as error:
        raise ConfigError(f"tls.cert_file {cert_file}, tls.key_file {key_file}: {error}") from None
    client = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    client.check_hostname = False
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(cert_file)
    a, b = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        server.wrap_bio(a, b, server_side=True),
        client.wrap_bio(b, a, server_side=False),
    ]
    for _ in range(4):  # flights of a handshake
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
            except ssl.SSLCertVerificationError as error:
                raise ConfigError(f"tls.cert_file {cert_file}: {error.verify_message}") from None
            except ssl.SSLError as error:
                raise ConfigError(f"tls.cert_file {cert_file}: {error}") from None
