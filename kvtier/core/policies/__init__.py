"""Every eviction policy by name; one module each, with its source."""

from typing import Final

from kvtier.core.phd import PHD
from kvtier.core.policy import LRU, PolicyFactory

POLICIES: Final[dict[str, PolicyFactory]] = {
    "phd": PHD,
    "lru": LRU,
}
