"""Every codec, by the name that a setting uses and by the id that a frame carries."""

from kvtier.codec.base import Codec
from kvtier.codec.bits import BitsLZ4
from kvtier.codec.float8 import Float8PerHead
from kvtier.codec.int4 import Int4Hadamard
from kvtier.codec.int8 import Int8PerChannel, Int8PerToken
from kvtier.codec.lossy import Lossy
from kvtier.codec.lz4 import LZ4
from kvtier.codec.nibble import Nibbles
from kvtier.codec.raw import Raw
from kvtier.codec.zstd import PlanesZstd
from kvtier.errors import ConfigError, CorruptFrame

RAW = Raw()
PLANES_ZSTD = PlanesZstd()

# An id stays with its format for good: frames outlive the release that wrote them.
CODECS: tuple[Codec, ...] = (
    RAW,
    LZ4(),
    PLANES_ZSTD,
    Nibbles(),
    BitsLZ4(),
    Lossy(16, "int8-tok", Int8PerToken(), Int8PerToken()),
    Lossy(17, "k8v4", Int8PerChannel(), Int4Hadamard()),
    Lossy(18, "fp8", Float8PerHead(), Float8PerHead()),
    Lossy(19, "int4-had", Int4Hadamard(), Int4Hadamard()),
)

_BY_NAME = {codec.name: codec for codec in CODECS}
_BY_ID = {codec.id: codec for codec in CODECS}


def by_name(name: str) -> Codec:
    """The codec that a setting calls `name`.

    Raises:
        ConfigError: There is none.
    """
    if name not in _BY_NAME:
        raise ConfigError(f"no codec {name!r}; known are {', '.join(_BY_NAME)}")
    return _BY_NAME[name]


def by_id(codec_id: int) -> Codec:
    """The codec whose frames carry `codec_id`.

    Raises:
        CorruptFrame: There is none in this release.
    """
    if codec_id not in _BY_ID:
        raise CorruptFrame(f"frame check codec: {codec_id} is none of {[*_BY_ID]}")
    return _BY_ID[codec_id]
