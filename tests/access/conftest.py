"""Certificates made for a test, and the settings that name them."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import trustme

TOKEN, OTHER = "token-0123456789abcdef", "other-0123456789abcdef"
NAME = "kvtier.test"


@dataclass
class Keys:
    """Two authorities, and files below `folder`."""

    folder: Path
    ca: trustme.CA = field(default_factory=trustme.CA)
    stranger: trustme.CA = field(default_factory=trustme.CA)

    def __post_init__(self) -> None:
        self.ca.cert_pem.write_to_path(str(self.path("ca.pem")))
        self.stranger.cert_pem.write_to_path(str(self.path("stranger.pem")))
        self.issue("server", self.ca, "127.0.0.1", "localhost", NAME)
        self.issue("elsewhere", self.ca, NAME)
        self.issue("client", self.ca, "client.test")
        self.issue("strange", self.stranger, "127.0.0.1")
        self.issue("old", self.ca, "127.0.0.1", age=timedelta(days=-2))
        self.path("token").write_text(f"{TOKEN}\n")
        self.path("other").write_text(f"{OTHER}\n")

    def path(self, name: str) -> Path:
        return self.folder / name

    def issue(
        self, name: str, ca: trustme.CA, *names: str, age: timedelta = timedelta(days=2)
    ) -> None:
        cert = ca.issue_cert(*names, not_after=datetime.now(UTC) + age)
        chain = b"".join(each.bytes() for each in cert.cert_chain_pems)
        self.path(f"{name}.pem").write_bytes(chain)
        self.path(f"{name}.key").write_bytes(cert.private_key_pem.bytes())

    def tls(self, cert: str = "server", ca: str = "ca", client_ca: str = "", name: str = "") -> str:
        lines = ["[tls]"]
        if cert:
            lines.append(f'cert_file = "{self.path(cert)}.pem"\nkey_file = "{self.path(cert)}.key"')
        if ca:
            lines.append(f'ca_file = "{self.path(ca)}.pem"')
        if client_ca:
            lines.append(f'client_ca_file = "{self.path(client_ca)}.pem"')
        if name:
            lines.append(f'server_name = "{name}"')
        return "\n".join(lines) + "\n"

    def auth(self, file: str = "token", more: str = "") -> str:
        return f'[auth]\ntoken_file = "{self.path(file)}"\n{more}\n'


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path)
