"""Who may connect, and how this process shows who it is: TLS and bearer tokens.

Certificates and tokens come from the files that `[tls]` and `[auth]` name, and are read anew when
these change. Health checks need no token: Kubernetes has none to show.
"""

import asyncio
import logging
import ssl
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

import grpc

from kvtier import metrics
from kvtier.config import (
    AuthConfig,
    Config,
    TlsConfig,
    Tokens,
    Watched,
    check_tls,
    is_loopback,
    parse_address,
)
from kvtier.errors import ConfigError, Unauthenticated, one_line
from kvtier.wire.contexts import Contexts
from kvtier.wire.handshake import diagnose, speaks_tls

HEADER: Final = "authorization"
SCHEME: Final = "bearer"
OPEN: Final = "/grpc.health.v1.Health/"  # needs no token
LOOKS: Final = 2  # at once, into what is wrong with an address: its threads are for others, too

Options = Sequence[tuple[str, object]]

log = logging.getLogger(__name__)


class Access:
    """The credentials of one process. Without `[tls]` and `[auth]` everything is plain and open.

    Args:
        config: The settings.
        serving: Whether this process listens, so that it must have a certificate.

    Raises:
        ConfigError: A file cannot be used; one line that names the setting and the file.
    """

    def __init__(self, config: Config, *, serving: bool = True) -> None:
        self._tls: TlsConfig | None = config.tls
        self._auth: AuthConfig | None = config.auth
        self.tokens = Tokens(config.auth) if config.auth else None
        self._looks = asyncio.Semaphore(LOOKS)
        self._pair: tuple[Watched, Watched] | None = None
        self._ca: Watched | None = None
        if tls := config.tls:
            check_tls(tls, serving=serving)
            if tls.cert_file:
                self._pair = (
                    Watched(tls.cert_file, "tls.cert_file"), Watched(tls.key_file, "tls.key_file")
                )  # fmt: skip
            self._ca = Watched(tls.ca_file, "tls.ca_file") if tls.ca_file else None
        self.contexts = Contexts(config.tls) if config.tls else None  # for sockets without gRPC

    # --- to serve -----------------------------------------------------------------------

    @property
    def interceptors(self) -> list[grpc.aio.ServerInterceptor]:
        """For grpc.aio.server: refuse calls that show no token."""
        return [_Gate(self.check)] if self.tokens else []

    def check(self, header: str) -> None:
        """Let pass whoever shows a token in the header `authorization`.

        Raises:
            Unauthenticated: There is none, or a wrong one; counted.
        """
        if self.tokens is None:
            return
        scheme, _, token = header.strip().partition(" ")
        if scheme.lower() != SCHEME or not token:
            metrics.UNAUTHENTICATED.labels("missing").inc()
            raise Unauthenticated("no bearer token in the header 'authorization'")
        self.check_token(token.strip())

    def check_token(self, token: str) -> None:
        """Let pass whoever shows one of our tokens, and everybody where there are none.

        Raises:
            Unauthenticated: It is empty, or a wrong one; counted.
        """
        if self.tokens is None:
            return
        if not token:
            metrics.UNAUTHENTICATED.labels("missing").inc()
            raise Unauthenticated("no bearer token")
        if not self.tokens.accepts(token):
            metrics.UNAUTHENTICATED.labels("wrong").inc()
            raise Unauthenticated("the bearer token is none that is accepted here")

    @property
    def open_metrics(self) -> bool:
        """Whether metrics pages need no token."""
        return self._auth is None or self._auth.open_metrics

    @property
    def _metrics_check(self) -> Callable[[str], bool] | None:
        """Whether a header `authorization` opens the metrics pages; None: they are open."""
        if self.open_metrics:
            return None

        def allowed(header: str) -> bool:
            try:
                self.check(header)
            except Unauthenticated:
                return False
            return True

        return allowed

    def serve_metrics(self, host: str, port: int, table: str) -> None:
        """`metrics.serve` with our certificate, and the token where `auth.open_metrics` is off."""
        metrics.serve(host, port, table, self.tls_context(), self._metrics_check)
        if port:
            self.warn_if_open(f"{table}.metrics_port", f"{host}:{port}")

    def tls_context(self) -> ssl.SSLContext | None:
        """For a listener of HTTPS, which asks for no client certificate; None: no TLS.

        A new certificate is used at the next handshake.
        """
        if self._pair is None:
            return None
        cert, key = self._pair

        def loaded() -> ssl.SSLContext:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(cert.path, key.path)
            return context

        used, current = (cert.data(), key.data()), loaded()

        def choose(connection: ssl.SSLObject, *_: object) -> None:
            nonlocal used, current
            if (found := (cert.data(), key.data())) != used:
                try:
                    current, used = loaded(), found
                except ssl.SSLError as error:  # half of a renewal: the rest follows
                    used = found
                    log.warning("tls.cert_file %s: %s", cert.path, error)
                except OSError as error:  # no descriptor left: the next handshake tries again
                    log.warning("tls.cert_file %s: %s", cert.path, error)
            connection.context = current

        first = loaded()  # each handshake begins with it, and chooses
        first.sni_callback = choose
        return first

    def server_credentials(self) -> grpc.ServerCredentials | None:
        """For a gRPC port; None: a plain one. A new certificate is used as soon as it is there."""
        if self._tls is None or self._pair is None:
            return None
        client_ca_file = self._tls.client_ca_file
        client_ca = Watched(client_ca_file, "tls.client_ca_file") if client_ca_file else None
        told: list[tuple[bytes, ...]] = []

        def now() -> grpc.ServerCertificateConfiguration | None:
            files = [*(self._pair or ()), *([client_ca] if client_ca else [])]
            data = tuple(each.data() for each in files)
            if told and told[-1] == data:
                return None  # as before
            told[:] = [data]
            return grpc.ssl_server_certificate_configuration(
                [(data[1], data[0])], root_certificates=data[2] if client_ca else None
            )

        return grpc.dynamic_ssl_server_credentials(
            now(), now, require_client_authentication=client_ca is not None
        )

    def warn_if_open(self, name: str, address: str) -> None:
        """One line where other hosts can reach a listener that has no TLS or asks for no token."""
        host, _ = parse_address(address, name)
        asks = self._auth or (self._tls and self._tls.client_ca_file)
        missing = [*([] if self._tls else ["TLS"]), *([] if asks else ["token"])]
        if missing and not is_loopback(host):
            lack = " and no ".join(missing)
            log.warning("%s: %s has no %s; see docs/security.md", name, address, lack)

    # --- to connect ---------------------------------------------------------------------

    @property
    def token(self) -> str:
        """What we show to others; empty where there is no `[auth]`."""
        return self.tokens.first() if self.tokens else ""

    @property
    def secure(self) -> bool:
        """Whether connections are by TLS; a channel has the certificates of when it was made."""
        return self._tls is not None

    def channel(self, address: str, options: Options = ()) -> grpc.aio.Channel:
        """A channel of grpc.aio that shows our token and certificate, where we have them."""
        credentials = self._channel_credentials()
        if credentials is None:
            return self._showing(grpc.aio.insecure_channel(address, options=options))
        options = [*options, *self._name_option()]
        return self._showing(grpc.aio.secure_channel(address, credentials, options=options))

    def blocking_channel(self, address: str, options: Options = ()) -> grpc.Channel:
        """The same of grpc."""
        credentials = self._channel_credentials()
        if credentials is None:
            return self._showing(grpc.insecure_channel(address, options=options))
        options = [*options, *self._name_option()]
        return self._showing(grpc.secure_channel(address, credentials, options=options))

    async def why(self, address: str, error: Exception) -> str:
        """What a person must change for calls to `address` to work, or ''; as `explain`.

        Whoever asks waits for those that have asked before. Of one loop.
        """
        async with self._looks:
            return await asyncio.to_thread(self.explain, address, error)

    def preflight(self, address: str) -> None:
        """For a command line: look at the certificates first, since gRPC writes of them itself.

        Raises:
            ConfigError: They do not fit; one line. Blocks for some seconds at most.
        """
        if self._tls is not None and (why := diagnose(self._tls, address)):
            raise ConfigError(why)

    def explain(self, address: str, error: Exception) -> str:
        """What a person must change for calls to `address` to work, in one line, or ''.

        Only where certificates or tokens are to blame for `error`. Blocks for some seconds.
        """
        if not isinstance(error, grpc.RpcError):
            return ""
        code = error.code()
        if code is grpc.StatusCode.UNAUTHENTICATED:
            shown = f"auth.token_file {self._auth.token_file}" if self._auth else "no [auth] is set"
            return one_line(f"{address} refuses us ({shown}): {error.details()}")
        if code is not grpc.StatusCode.UNAVAILABLE:
            return ""
        if self._tls is not None:
            return diagnose(self._tls, address)
        if speaks_tls(address):
            return f"{address} speaks TLS, and no [tls] is set here"
        return ""

    def _channel_credentials(self) -> grpc.ChannelCredentials | None:
        if self._tls is None:
            return None
        cert, key = (each.data() for each in self._pair) if self._pair else (None, None)
        root = self._ca.data() if self._ca else None
        return grpc.ssl_channel_credentials(root, private_key=key, certificate_chain=cert)

    def _name_option(self) -> list[tuple[str, object]]:
        name = self._tls.server_name if self._tls else ""
        return [("grpc.ssl_target_name_override", name)] if name else []

    def _showing(self, channel: grpc.aio.Channel) -> grpc.aio.Channel:
        return _Showing(channel, self.tokens.first) if self.tokens else channel


class _Gate(grpc.aio.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Ends calls that show no token, before their messages are read."""

    def __init__(self, check: Callable[[str], None]) -> None:
        self._check = check

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler]],
        details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler:
        """Pass the call on, or put a refusal in its place."""
        if not details.method.startswith(OPEN):
            shown = [value for name, value in details.invocation_metadata if name == HEADER]
            try:
                self._check(shown[0] if len(shown) == 1 else "")
            except Unauthenticated as error:
                return _refusal(str(error))
        return await continuation(details)


def _refusal(text: str) -> grpc.RpcMethodHandler:
    async def refuse(_requests: object, context: grpc.aio.ServicerContext) -> None:
        await context.abort(grpc.StatusCode.UNAUTHENTICATED, text)

    return grpc.stream_stream_rpc_method_handler(refuse)  # whatever the kind of the call is


class _Showing:
    """A channel whose calls carry the token that is the first one then."""

    def __init__(self, channel: grpc.aio.Channel, token: Callable[[], str]) -> None:
        self._channel = channel
        self._token = token

    def __getattr__(self, name: str) -> object:
        made = getattr(self._channel, name)
        if name not in ("unary_unary", "unary_stream", "stream_unary", "stream_stream"):
            return made
        return lambda *given, **more: self._call(made(*given, **more))

    def _call(self, method: Callable[..., object]) -> Callable[..., object]:
        def call(
            *given: object, metadata: Sequence[tuple[str, str]] | None = None, **more: object
        ) -> object:
            shown = (*(metadata or ()), (HEADER, f"Bearer {self._token()}"))
            return method(*given, metadata=shown, **more)

        return call

    async def __aenter__(self) -> "_Showing":
        await self._channel.__aenter__()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._channel.__aexit__(*error)

    def __enter__(self) -> "_Showing":
        self._channel.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._channel.__exit__(*error)
