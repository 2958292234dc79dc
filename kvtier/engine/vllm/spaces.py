"""Whose requests an engine takes: tenants and LoRA adapters, as vLLM keeps them apart.

A tenant is a `cache_salt`, which goes into the hash of a prompt's first block and so into all that
are chained to it. An adapter is a LoRA, whose name and path go into the hash of every block.
"""

import hmac
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Final

from kvtier.config import WorkerConfig, tenant_secrets
from kvtier.core.vllm_keys import space_root
from kvtier.engine.revision import revision
from kvtier.errors import ConfigError, UnknownModel, UnknownTenant

MAX_SPACES: Final = 4096  # as routers take them
MAX_NAME: Final = 253  # characters, of an adapter's name
MAX_PATH: Final = 512  # characters
WEIGHTS: Final = ("*.safetensors", "*.bin", "*.pt")
SETTINGS: Final = "adapter_config.json"


@dataclass(frozen=True, slots=True)
class Spaces:
    """Salts by tenant, paths by adapter; with neither, everybody's alone."""

    salts: Mapping[str, str] = field(default_factory=dict, repr=False)
    adapters: Mapping[str, str] = field(default_factory=dict)

    def roots(self, none_hash: bytes, root: bytes) -> Iterator[tuple[str, str, bytes]]:
        """Adapter, tenant and root of each space but everybody's."""
        for adapter in ("", *self.adapters):
            for tenant in ("", *self.salts):
                if adapter or tenant:
                    yield adapter, tenant, self.root(none_hash, root, adapter, tenant)

    def root(self, none_hash: bytes, root: bytes, adapter: str, tenant: str) -> bytes:
        """The root of one space; with neither, everybody's. Both names are known, or empty."""
        lora = (adapter, self.adapters[adapter]) if adapter else None
        salt = self.salts[tenant] if tenant else ""
        return space_root(none_hash, root, adapter=lora, salt=salt)

    def check(self, adapter: str, tenant: str) -> None:
        """Refuse a request of a space that is none of these.

        Raises:
            UnknownModel: There is no such adapter.
            UnknownTenant: There is no such tenant.
        """
        if adapter and adapter not in self.adapters:
            raise UnknownModel(f"adapter {adapter[:200]!r} is not served here")
        if tenant and tenant not in self.salts:
            raise UnknownTenant(f"tenant {tenant[:200]!r} is not known to this worker")


def spaces_of(worker: WorkerConfig, root: bytes) -> Spaces:
    """The spaces of a worker whose engine has this namespace.

    A salt is made of the tenant's secret and the namespace: who learns it cannot name the tenant's
    blocks of another model, nor find the secret.

    Raises:
        ConfigError: See `tenant_secrets`; or an adapter's name or path makes no sense.
    """
    salts = {
        name: hmac.new(secret, root + name.encode(), sha256).hexdigest()
        for name, secret in tenant_secrets(worker).items()
    }
    adapters: dict[str, str] = {}
    for i, adapter in enumerate(worker.adapters):
        for what, text, limit in (
            ("name", adapter.name, MAX_NAME),
            ("path", adapter.path, MAX_PATH),
        ):
            if not 1 <= len(text.encode()) <= limit:
                raise ConfigError(
                    f"worker.adapters[{i}].{what} has {len(text.encode())} bytes, "
                    f"must have 1 to {limit}"
                )
        if adapter.name in adapters:
            raise ConfigError(
                f"worker.adapters[{i}].name is {adapter.name!r}, which another has too"
            )
        adapters[adapter.name] = adapter.path
    count = (1 + len(salts)) * (1 + len(adapters)) - 1
    if count > MAX_SPACES:
        raise ConfigError(
            f"{len(salts)} worker.tenants and {len(adapters)} worker.adapters make {count} spaces, "
            f"limit {MAX_SPACES}"
        )
    return Spaces(salts, adapters)


def adapters_revision(worker: WorkerConfig, progress: Callable[[str], None]) -> str:
    """A fingerprint of the content of a worker's adapters; empty where it has none.

    Raises:
        ConfigError: An adapter's files are not there.
    """
    if not worker.adapters:
        return ""
    whole = sha256()
    for each in sorted(worker.adapters, key=lambda each: each.name):
        try:
            content = revision(Path(each.path), progress, WEIGHTS, SETTINGS)
        except OSError as error:
            raise ConfigError(f"worker.adapters {each.name!r}: {error}") from None
        whole.update(f"{each.name} {content}\n".encode())
    return whole.hexdigest()[:16]
