"""What a node's eviction has learned, in a small file beside the disk tier.

The file is a msgpack map: "version", and "tiers" with the state of each tier's policy by the tier's
name. It is a help and nothing more: one that is missing, damaged, or of another version or policy
is left aside, and eviction learns from nothing.
"""

import asyncio
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgpack

from kvtier.core.policy import Learning
from kvtier.core.tiers import Tier

LEARNED_FILE: Final = "learned.msgpack"
VERSION: Final = 1
SAVE_S: Final = 300.0
MAX_NBYTES: Final = 4 << 20  # a few times what the largest state takes

log = logging.getLogger(__name__)


class LearnedFile:
    """Keeps the state of `policies` in the file at `path`. Lives on one loop."""

    def __init__(self, path: Path, policies: Mapping[Tier, Learning]) -> None:
        self._path = path
        self._policies = policies
        self._timer: asyncio.TimerHandle | None = None
        self._saving: asyncio.Future[None] | None = None

    async def open(self) -> None:
        """Let the policies go on with what the file has, and save it every SAVE_S from now on."""
        if not self._policies:
            return
        try:
            states = await asyncio.to_thread(_read, self._path)
            for tier, policy in self._policies.items():
                if tier in states:
                    policy.restore(states[tier])
        except FileNotFoundError:
            pass
        except (OSError, ValueError) as error:
            log.warning("%s: %s; eviction learns from nothing", self._path, _line(error))
        self._later()

    async def close(self) -> None:
        """Save a last time."""
        if self._timer is None:
            return
        self._timer.cancel()
        self._timer = None
        if self._saving is not None:
            await self._saving
        await asyncio.to_thread(self._write, self._pack())

    def _later(self) -> None:
        self._timer = asyncio.get_running_loop().call_later(SAVE_S, self._save)

    def _save(self) -> None:
        loop = asyncio.get_running_loop()
        self._saving = loop.run_in_executor(None, self._write, self._pack())
        self._later()

    def _pack(self) -> bytes:
        states = {tier.label: policy.save() for tier, policy in self._policies.items()}
        body: bytes = msgpack.packb({"version": VERSION, "tiers": states})
        return body

    def _write(self, body: bytes) -> None:
        """Old or new, never half: a rename at the end."""
        beside = self._path.with_suffix(".tmp")
        try:
            with beside.open("wb") as file:
                file.write(body)
                file.flush()
                os.fsync(file.fileno())
            beside.replace(self._path)
        except OSError as error:
            log.warning("%s: not saved: %s", self._path, error)


def _read(path: Path) -> dict[Tier, object]:
    """The states in a file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is no such file.
    """
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
    known = {tier.label: tier for tier in Tier}
    return {known[name]: each for name, each in tiers.items() if name in known}


def _line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
