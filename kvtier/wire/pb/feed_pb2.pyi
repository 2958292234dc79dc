from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TIER_UNSPECIFIED: _ClassVar[Tier]
    TIER_VRAM: _ClassVar[Tier]
    TIER_HOST: _ClassVar[Tier]
    TIER_DISK: _ClassVar[Tier]
    TIER_SHARED: _ClassVar[Tier]
TIER_UNSPECIFIED: Tier
TIER_VRAM: Tier
TIER_HOST: Tier
TIER_DISK: Tier
TIER_SHARED: Tier

class WatchRequest(_message.Message):
    __slots__ = ("layout_id", "epoch", "after")
    LAYOUT_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    AFTER_FIELD_NUMBER: _ClassVar[int]
    layout_id: str
    epoch: int
    after: int
    def __init__(self, layout_id: _Optional[str] = ..., epoch: _Optional[int] = ..., after: _Optional[int] = ...) -> None: ...

class FeedMessage(_message.Message):
    __slots__ = ("epoch", "seq", "snapshot", "delta", "heartbeat")
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    DELTA_FIELD_NUMBER: _ClassVar[int]
    HEARTBEAT_FIELD_NUMBER: _ClassVar[int]
    epoch: int
    seq: int
    snapshot: Snapshot
    delta: Delta
    heartbeat: Heartbeat
    def __init__(self, epoch: _Optional[int] = ..., seq: _Optional[int] = ..., snapshot: _Optional[_Union[Snapshot, _Mapping]] = ..., delta: _Optional[_Union[Delta, _Mapping]] = ..., heartbeat: _Optional[_Union[Heartbeat, _Mapping]] = ...) -> None: ...

class Snapshot(_message.Message):
    __slots__ = ("held", "last")
    HELD_FIELD_NUMBER: _ClassVar[int]
    LAST_FIELD_NUMBER: _ClassVar[int]
    held: _containers.RepeatedCompositeFieldContainer[TierKeys]
    last: bool
    def __init__(self, held: _Optional[_Iterable[_Union[TierKeys, _Mapping]]] = ..., last: _Optional[bool] = ...) -> None: ...

class Delta(_message.Message):
    __slots__ = ("added", "removed")
    ADDED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    added: _containers.RepeatedCompositeFieldContainer[TierKeys]
    removed: _containers.RepeatedCompositeFieldContainer[TierKeys]
    def __init__(self, added: _Optional[_Iterable[_Union[TierKeys, _Mapping]]] = ..., removed: _Optional[_Iterable[_Union[TierKeys, _Mapping]]] = ...) -> None: ...

class TierKeys(_message.Message):
    __slots__ = ("tier", "keys", "starts", "parents")
    TIER_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    STARTS_FIELD_NUMBER: _ClassVar[int]
    PARENTS_FIELD_NUMBER: _ClassVar[int]
    tier: Tier
    keys: bytes
    starts: _containers.RepeatedScalarFieldContainer[int]
    parents: bytes
    def __init__(self, tier: _Optional[_Union[Tier, str]] = ..., keys: _Optional[bytes] = ..., starts: _Optional[_Iterable[int]] = ..., parents: _Optional[bytes] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("draining", "load", "pulls", "lends")
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    PULLS_FIELD_NUMBER: _ClassVar[int]
    LENDS_FIELD_NUMBER: _ClassVar[int]
    draining: bool
    load: WorkerLoad
    pulls: Pulls
    lends: bool
    def __init__(self, draining: _Optional[bool] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ..., pulls: _Optional[_Union[Pulls, _Mapping]] = ..., lends: _Optional[bool] = ...) -> None: ...

class Pulls(_message.Message):
    __slots__ = ("bytes_per_s",)
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    bytes_per_s: float
    def __init__(self, bytes_per_s: _Optional[float] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("running", "waiting", "waiting_tokens", "prefill_tokens_per_s", "host_bytes_per_s", "disk_bytes_per_s", "shared_bytes_per_s", "waiting_as_first", "computed_as_first")
    RUNNING_FIELD_NUMBER: _ClassVar[int]
    WAITING_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    HOST_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    DISK_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    SHARED_BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    WAITING_AS_FIRST_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_AS_FIRST_FIELD_NUMBER: _ClassVar[int]
    running: int
    waiting: int
    waiting_tokens: int
    prefill_tokens_per_s: float
    host_bytes_per_s: float
    disk_bytes_per_s: float
    shared_bytes_per_s: float
    waiting_as_first: float
    computed_as_first: float
    def __init__(self, running: _Optional[int] = ..., waiting: _Optional[int] = ..., waiting_tokens: _Optional[int] = ..., prefill_tokens_per_s: _Optional[float] = ..., host_bytes_per_s: _Optional[float] = ..., disk_bytes_per_s: _Optional[float] = ..., shared_bytes_per_s: _Optional[float] = ..., waiting_as_first: _Optional[float] = ..., computed_as_first: _Optional[float] = ...) -> None: ...
