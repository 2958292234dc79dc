from kvtier.wire.pb import feed_pb2 as _feed_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class NodeStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class NodeStatus(_message.Message):
    __slots__ = ("node", "epoch", "draining", "layouts", "clients", "counters", "lends_at")
    class CountersEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: float
        def __init__(self, key: _Optional[str] = ..., value: _Optional[float] = ...) -> None: ...
    NODE_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    LAYOUTS_FIELD_NUMBER: _ClassVar[int]
    CLIENTS_FIELD_NUMBER: _ClassVar[int]
    COUNTERS_FIELD_NUMBER: _ClassVar[int]
    LENDS_AT_FIELD_NUMBER: _ClassVar[int]
    node: str
    epoch: int
    draining: bool
    layouts: _containers.RepeatedCompositeFieldContainer[LayoutStatus]
    clients: int
    counters: _containers.ScalarMap[str, float]
    lends_at: str
    def __init__(self, node: _Optional[str] = ..., epoch: _Optional[int] = ..., draining: _Optional[bool] = ..., layouts: _Optional[_Iterable[_Union[LayoutStatus, _Mapping]]] = ..., clients: _Optional[int] = ..., counters: _Optional[_Mapping[str, float]] = ..., lends_at: _Optional[str] = ...) -> None: ...

class LayoutStatus(_message.Message):
    __slots__ = ("layout", "tiers", "leases", "moves")
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TIERS_FIELD_NUMBER: _ClassVar[int]
    LEASES_FIELD_NUMBER: _ClassVar[int]
    MOVES_FIELD_NUMBER: _ClassVar[int]
    layout: str
    tiers: _containers.RepeatedCompositeFieldContainer[TierStatus]
    leases: int
    moves: int
    def __init__(self, layout: _Optional[str] = ..., tiers: _Optional[_Iterable[_Union[TierStatus, _Mapping]]] = ..., leases: _Optional[int] = ..., moves: _Optional[int] = ...) -> None: ...

class TierStatus(_message.Message):
    __slots__ = ("tier", "blocks", "used_bytes", "capacity_bytes", "available", "codec", "codec_chosen", "write_bytes_per_s", "read_bytes_per_s", "measured_by")
    TIER_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    USED_BYTES_FIELD_NUMBER: _ClassVar[int]
    CAPACITY_BYTES_FIELD_NUMBER: _ClassVar[int]
    AVAILABLE_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CODEC_CHOSEN_FIELD_NUMBER: _ClassVar[int]
    WRITE_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    READ_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    MEASURED_BY_FIELD_NUMBER: _ClassVar[int]
    tier: _feed_pb2.Tier
    blocks: int
    used_bytes: int
    capacity_bytes: int
    available: bool
    codec: str
    codec_chosen: bool
    write_bytes_per_s: float
    read_bytes_per_s: float
    measured_by: str
    def __init__(self, tier: _Optional[_Union[_feed_pb2.Tier, str]] = ..., blocks: _Optional[int] = ..., used_bytes: _Optional[int] = ..., capacity_bytes: _Optional[int] = ..., available: _Optional[bool] = ..., codec: _Optional[str] = ..., codec_chosen: _Optional[bool] = ..., write_bytes_per_s: _Optional[float] = ..., read_bytes_per_s: _Optional[float] = ..., measured_by: _Optional[str] = ...) -> None: ...

class NodeClearRequest(_message.Message):
    __slots__ = ("tiers",)
    TIERS_FIELD_NUMBER: _ClassVar[int]
    tiers: _containers.RepeatedScalarFieldContainer[_feed_pb2.Tier]
    def __init__(self, tiers: _Optional[_Iterable[_Union[_feed_pb2.Tier, str]]] = ...) -> None: ...

class NodeClearResponse(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    def __init__(self, blocks: _Optional[int] = ...) -> None: ...

class NodeDrainRequest(_message.Message):
    __slots__ = ("deadline_s", "stay")
    DEADLINE_S_FIELD_NUMBER: _ClassVar[int]
    STAY_FIELD_NUMBER: _ClassVar[int]
    deadline_s: float
    stay: bool
    def __init__(self, deadline_s: _Optional[float] = ..., stay: _Optional[bool] = ...) -> None: ...

class NodeDrainResponse(_message.Message):
    __slots__ = ("undrained_blocks",)
    UNDRAINED_BLOCKS_FIELD_NUMBER: _ClassVar[int]
    undrained_blocks: int
    def __init__(self, undrained_blocks: _Optional[int] = ...) -> None: ...

class NodeRecordRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RecordedUse(_message.Message):
    __slots__ = ("at_s", "request", "output_tokens", "block_tokens", "keys", "dropped")
    AT_S_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    at_s: float
    request: int
    output_tokens: int
    block_tokens: int
    keys: bytes
    dropped: int
    def __init__(self, at_s: _Optional[float] = ..., request: _Optional[int] = ..., output_tokens: _Optional[int] = ..., block_tokens: _Optional[int] = ..., keys: _Optional[bytes] = ..., dropped: _Optional[int] = ...) -> None: ...
