"""Every eviction policy by name; one module each, with its source."""

from functools import partial
from typing import Final

from kvtier.core.phd import PHD
from kvtier.core.policies.arc import ARC
from kvtier.core.policies.gdsf import GDSF
from kvtier.core.policies.lirs import LIRS
from kvtier.core.policies.s3fifo import S3FIFO
from kvtier.core.policies.sieve import SIEVE
from kvtier.core.policies.wtinylfu import WTinyLFU
from kvtier.core.policy import LRU, PolicyFactory

POLICIES: Final[dict[str, PolicyFactory]] = {
    "phd": PHD,
    "lru": LRU,
    "s3fifo": S3FIFO,
    "sieve": SIEVE,
    "arc": ARC,
    "lirs": LIRS,
    "wtinylfu": WTinyLFU,
    "gdsf": GDSF,
}


def sized(name: str, most: int) -> PolicyFactory:
    """The policy `name`, for a tier of at most `most` blocks."""
    policy = POLICIES[name]
    return partial(PHD, most) if policy is PHD else policy
