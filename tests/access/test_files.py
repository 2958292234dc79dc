"""What is wrong with a certificate or a token file is said at the start, in one line."""

import errno
import resource
from pathlib import Path

import pytest

from kvtier import config
from kvtier.config import AuthConfig, Tokens, check_tls
from kvtier.errors import ConfigError
from kvtier.wire.access import Access
from kvtier.wire.contexts import Contexts
from tests.access.conftest import OTHER, TOKEN, Keys


def tls(keys: Keys, toml: str, *, serving: bool = True) -> None:
    path = keys.path("kvtier.toml")
    path.write_text(toml)
    found = config.load(path).tls
    assert found is not None
    check_tls(found, serving=serving)


def test_good_ones_are_taken(keys: Keys) -> None:
    tls(keys, keys.tls("server", client_ca="ca"))
    tls(keys, keys.tls(cert=""), serving=False)


@pytest.mark.parametrize(
    ("wrong", "line"),
    [
        (lambda k: k.tls(""), "tls.cert_file must be set where something listens with [tls]"),
        (
            lambda k: f'[tls]\ncert_file = "{k.folder}/server.pem"\n',
            "tls.cert_file and tls.key_file go together: one of them is not set",
        ),
        (lambda k: k.tls("none"), "tls.cert_file {f}/none.pem: No such file or directory"),
        (lambda k: k.tls(ca="none"), "tls.ca_file {f}/none.pem: No such file or directory"),
        (
            lambda k: k.tls(client_ca="none"),
            "tls.client_ca_file {f}/none.pem: No such file or directory",
        ),
        (lambda k: k.tls("old"), "tls.cert_file {f}/old.pem: certificate has expired"),
        (
            lambda k: k.tls().replace("server.key", "client.key"),
            "tls.cert_file {f}/server.pem, tls.key_file {f}/client.key: ",
        ),
        (lambda k: k.tls().replace("ca.pem", "token"), "tls.ca_file {f}/token: no certificate"),
        (
            lambda k: k.tls().replace("server.pem", "token"),
            "tls.cert_file {f}/token, tls.key_file {f}/server.key: ",
        ),
    ],
)
def test_a_bad_certificate_is_named(keys: Keys, wrong, line: str) -> None:
    with pytest.raises(ConfigError) as caught:
        tls(keys, wrong(keys))
    assert str(caught.value).startswith(line.format(f=keys.folder))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "line"),
    [
        (b"", "0 tokens, must be 1 to 64"),
        (b"0123456789abcdef\nshort", "token 2 has 5 characters, must have 16 to 4096"),
        (b"x" * 5000, "token 1 has 5000 characters, must have 16 to 4096"),
        ("0123456789abcdefé".encode(), "a token has characters that are not ASCII"),
        (b"0123456789abcde\x01f", "token 1 has a control character in it"),
    ],
)
def test_a_bad_token_file_is_named_and_not_quoted(
    tmp_path: Path, content: bytes, line: str
) -> None:
    path = tmp_path / "token"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        Tokens(AuthConfig(token_file=str(path)))
    assert str(caught.value) == f"auth.token_file {path}: {line}"


def test_tokens_are_told_apart(keys: Keys) -> None:
    tokens = Tokens(AuthConfig(token_file=str(keys.path("token"))))
    assert tokens.first() == TOKEN
    assert tokens.accepts(TOKEN)
    for other in (OTHER, TOKEN[:-1], TOKEN + "x", TOKEN.upper(), "", "é", "\udcff" * 3):
        assert not tokens.accepts(other), other
    keys.path("token").unlink()
    assert tokens.accepts(TOKEN), "until it can be read again"


def test_a_token_file_that_could_not_be_read_counts_once_it_can(
    keys: Keys, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = Tokens(AuthConfig(token_file=str(keys.path("token"))))
    keys.path("new").write_text(f"{OTHER}\n")
    keys.path("new").rename(keys.path("token"))

    def refuse(_: Path) -> bytes:
        raise PermissionError(errno.EACCES, "Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "read_bytes", refuse)
        assert tokens.first() == TOKEN
    assert tokens.first() == OTHER, "as after a chmod"


def test_a_token_stands_in_no_settings(keys: Keys) -> None:
    with pytest.raises(ConfigError, match=r"^auth\.token: no such setting"):
        config.from_dict({"auth": {"token": TOKEN}})
    found = config.from_dict({"auth": {"token_file": str(keys.path("token"))}})
    assert TOKEN not in repr(found)
    assert TOKEN not in repr(Access(found).tokens)


@pytest.mark.parametrize("kind", ["asking", "serving"])
def test_a_renewal_that_could_not_be_read_for_want_of_a_descriptor_is_tried_again(
    keys: Keys, kind: str
) -> None:
    path = keys.path("kvtier.toml")
    path.write_text(keys.tls("server", client_ca="ca"))
    found = config.load(path).tls
    assert found is not None
    contexts = Contexts(found)
    current, other = getattr(contexts, kind), {"asking": "serving", "serving": "asking"}[kind]
    before = current()
    keys.issue("server", keys.ca, "127.0.0.1", "localhost")
    getattr(contexts, other)()  # has read the files anew
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        assert current() is before
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert current() is not before
    assert current() is current()
