"""Numbers of requests, by which a node daemon sees that several calls belong to one prompt.

They begin at a random place, so that no other engine of the node gives the same ones.
"""

import hashlib
import secrets
from itertools import count

_ENGINE = secrets.token_bytes(16)  # this process


def numbers() -> "count[int]":
    """Request numbers, each once: 1 to 2**64 - 1."""
    return count((secrets.randbits(31) << 32) + 1)


def number_of(name: str) -> int:
    """The number of a request that this process knows by `name`; the same at each call."""
    digest = hashlib.blake2b(name.encode(), digest_size=8, key=_ENGINE).digest()
    return int.from_bytes(digest, "big") or 1
