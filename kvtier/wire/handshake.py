"""What a TLS handshake with somebody founders on: gRPC names no setting, and no reason at times."""

import socket
import ssl
from typing import Final

from kvtier.config import TlsConfig, parse_address

DIAGNOSE_S: Final = 3.0
_WRONG_NAME: Final = (62, 64)  # X509_V_ERR_HOSTNAME_MISMATCH, X509_V_ERR_IP_ADDRESS_MISMATCH


def diagnose(tls: TlsConfig, address: str) -> str:
    """What a TLS handshake with `address` founders on, in one line; '' where it does not.

    gRPC says this in lines of its own that name no setting. Blocks for DIAGNOSE_S at most, or what
    the name server takes.
    """
    host, port = parse_address(address, "address")
    host = host.strip("[]")
    try:
        context = ssl.create_default_context(cafile=tls.ca_file or None)
        context.set_alpn_protocols(["h2"])
        if tls.cert_file:
            context.load_cert_chain(tls.cert_file, tls.key_file)
    except OSError as error:  # SSLError is one
        return f"the files of [tls] can no longer be used: {error}"
    secure: ssl.SSLSocket | None = None
    try:
        with (
            socket.create_connection((host, port), timeout=DIAGNOSE_S) as plain,
            context.wrap_socket(plain, server_hostname=tls.server_name or host) as secure,
        ):
            # Only now a server says that it does not take our certificate, by hanging up; one
            # that does speaks first in HTTP/2.
            refused = not secure.recv(1)
    except ssl.SSLCertVerificationError as error:
        if error.verify_code in _WRONG_NAME:
            name = tls.server_name or host
            return f"the certificate of {address} is not for {name!r}; see tls.server_name"
        by = f"tls.ca_file {tls.ca_file}" if tls.ca_file else "the list of well-known authorities"
        return f"the certificate of {address} is not accepted by {by}: {error.verify_message}"
    except (ssl.SSLError, ConnectionResetError):
        if secure is None:
            return f"{address} speaks no TLS, and [tls] is set here"
        refused = True
    except OSError:
        return ""  # nobody there: gRPC says that well enough
    mine = f"tls.cert_file {tls.cert_file}" if tls.cert_file else "no tls.cert_file is set"
    return f"{address} takes no connection of ours: {mine}" if refused else ""


def speaks_tls(address: str) -> bool:
    """Whether somebody answers a TLS handshake there. Blocks for DIAGNOSE_S at most."""
    host, port = parse_address(address, "address")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # only looked at; nothing is sent there
    context.set_alpn_protocols(["h2"])
    try:
        with (
            socket.create_connection((host.strip("[]"), port), timeout=DIAGNOSE_S) as plain,
            context.wrap_socket(plain),
        ):
            return True
    except OSError:  # SSLError is one
        return False
