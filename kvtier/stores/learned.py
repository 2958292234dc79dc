"""What eviction has learned, in a small file: a restart need not begin blind.

The file is a msgpack map: "version", and "tiers" with the state of each tier's policy by the tier's
name. It is a help and nothing more: one that is missing, damaged, or of another version or policy
is left aside, and eviction learns from nothing.
"""

import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgpack

from kvtier.core.policy import Learning
from kvtier.core.tiers import Tier

VERSION: Final = 1
MAX_NBYTES: Final = 4 << 20  # a few times what the largest state takes

log = logging.getLogger(__name__)


def restore(path: Path, policies: Mapping[Tier, Learning]) -> None:
    """Let the policies go on with what the file has; warns of a file that is of no use."""
    if not policies:
        return
    try:
        states = _read(path)
        for tier, policy in policies.items():
            if tier.label in states:
                policy.restore(states[tier.label])
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        log.warning("%s: %s; eviction learns from nothing", path, _line(error))


def pack(policies: Mapping[Tier, Learning]) -> bytes:
    """What the policies have learned by now, for `write`; about a millisecond for each."""
    states = {tier.label: policy.save() for tier, policy in policies.items()}
    body: bytes = msgpack.packb({"version": VERSION, "tiers": states})
    return body


def write(path: Path, body: bytes) -> None:
    """Put it there, whole or not at all; warns where that fails."""
    beside = path.with_name(path.name + ".tmp")
    try:
        with beside.open("wb") as file:
            file.write(body)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        log.warning("%s: what eviction has learned is not saved: %s", path, error.strerror)


def _read(path: Path) -> dict[str, object]:
    with path.open("rb") as file:
        body = file.read(MAX_NBYTES + 1)
    if len(body) > MAX_NBYTES:
        raise ValueError(f"more than {MAX_NBYTES} bytes")
    try:
        state = msgpack.unpackb(body)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise ValueError(f"not msgpack ({_line(error)})") from None
    tiers = state.get("tiers") if isinstance(state, dict) else None
    if not isinstance(tiers, dict) or state.get("version") != VERSION:
        raise ValueError(f"not what eviction has learned, version {VERSION}")
    return tiers


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
