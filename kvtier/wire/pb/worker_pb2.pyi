from kvtier.wire.pb import feed_pb2 as _feed_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class FinishReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FINISH_REASON_UNSPECIFIED: _ClassVar[FinishReason]
    FINISH_REASON_STOP: _ClassVar[FinishReason]
    FINISH_REASON_LENGTH: _ClassVar[FinishReason]
FINISH_REASON_UNSPECIFIED: FinishReason
FINISH_REASON_STOP: FinishReason
FINISH_REASON_LENGTH: FinishReason

class DescribeRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WorkerInfo(_message.Message):
    __slots__ = ("worker_id", "node", "model", "revision", "layout", "block_tokens", "max_tokens", "root", "eos_token_ids", "vocab_size", "kv_bytes_per_token", "http_address", "spaces", "pulls", "loads_all", "doubles_at", "key_scheme")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    EOS_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    VOCAB_SIZE_FIELD_NUMBER: _ClassVar[int]
    KV_BYTES_PER_TOKEN_FIELD_NUMBER: _ClassVar[int]
    HTTP_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    SPACES_FIELD_NUMBER: _ClassVar[int]
    PULLS_FIELD_NUMBER: _ClassVar[int]
    LOADS_ALL_FIELD_NUMBER: _ClassVar[int]
    DOUBLES_AT_FIELD_NUMBER: _ClassVar[int]
    KEY_SCHEME_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    node: str
    model: str
    revision: str
    layout: str
    block_tokens: int
    max_tokens: int
    root: bytes
    eos_token_ids: _containers.RepeatedScalarFieldContainer[int]
    vocab_size: int
    kv_bytes_per_token: int
    http_address: str
    spaces: _containers.RepeatedCompositeFieldContainer[Space]
    pulls: bool
    loads_all: bool
    doubles_at: float
    key_scheme: str
    def __init__(self, worker_id: _Optional[str] = ..., node: _Optional[str] = ..., model: _Optional[str] = ..., revision: _Optional[str] = ..., layout: _Optional[str] = ..., block_tokens: _Optional[int] = ..., max_tokens: _Optional[int] = ..., root: _Optional[bytes] = ..., eos_token_ids: _Optional[_Iterable[int]] = ..., vocab_size: _Optional[int] = ..., kv_bytes_per_token: _Optional[int] = ..., http_address: _Optional[str] = ..., spaces: _Optional[_Iterable[_Union[Space, _Mapping]]] = ..., pulls: _Optional[bool] = ..., loads_all: _Optional[bool] = ..., doubles_at: _Optional[float] = ..., key_scheme: _Optional[str] = ...) -> None: ...

class Space(_message.Message):
    __slots__ = ("adapter", "tenant", "root")
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    ROOT_FIELD_NUMBER: _ClassVar[int]
    adapter: str
    tenant: str
    root: bytes
    def __init__(self, adapter: _Optional[str] = ..., tenant: _Optional[str] = ..., root: _Optional[bytes] = ...) -> None: ...

class TokenizerRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class TokenizerFiles(_message.Message):
    __slots__ = ("files",)
    class FilesEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: bytes
        def __init__(self, key: _Optional[str] = ..., value: _Optional[bytes] = ...) -> None: ...
    FILES_FIELD_NUMBER: _ClassVar[int]
    files: _containers.ScalarMap[str, bytes]
    def __init__(self, files: _Optional[_Mapping[str, bytes]] = ...) -> None: ...

class WorkerRequest(_message.Message):
    __slots__ = ("request_id", "token_ids", "max_tokens", "temperature", "seed", "ignore_eos", "return_first_logits", "model", "adapter", "tenant", "source", "warm_tokens")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    RETURN_FIRST_LOGITS_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    WARM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    max_tokens: int
    temperature: float
    seed: int
    ignore_eos: bool
    return_first_logits: bool
    model: str
    adapter: str
    tenant: str
    source: str
    warm_tokens: int
    def __init__(self, request_id: _Optional[str] = ..., token_ids: _Optional[_Iterable[int]] = ..., max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., seed: _Optional[int] = ..., ignore_eos: _Optional[bool] = ..., return_first_logits: _Optional[bool] = ..., model: _Optional[str] = ..., adapter: _Optional[str] = ..., tenant: _Optional[str] = ..., source: _Optional[str] = ..., warm_tokens: _Optional[int] = ...) -> None: ...

class WorkerResponse(_message.Message):
    __slots__ = ("started", "tokens", "done")
    STARTED_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    started: Started
    tokens: Tokens
    done: Done
    def __init__(self, started: _Optional[_Union[Started, _Mapping]] = ..., tokens: _Optional[_Union[Tokens, _Mapping]] = ..., done: _Optional[_Union[Done, _Mapping]] = ...) -> None: ...

class Started(_message.Message):
    __slots__ = ("prompt_tokens", "restored", "computed_tokens", "queue_s", "restore_s", "prefill_s", "first_logits", "pulled_tokens")
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    RESTORED_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    RESTORE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_LOGITS_FIELD_NUMBER: _ClassVar[int]
    PULLED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    prompt_tokens: int
    restored: _containers.RepeatedCompositeFieldContainer[TierTokens]
    computed_tokens: int
    queue_s: float
    restore_s: float
    prefill_s: float
    first_logits: bytes
    pulled_tokens: int
    def __init__(self, prompt_tokens: _Optional[int] = ..., restored: _Optional[_Iterable[_Union[TierTokens, _Mapping]]] = ..., computed_tokens: _Optional[int] = ..., queue_s: _Optional[float] = ..., restore_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., first_logits: _Optional[bytes] = ..., pulled_tokens: _Optional[int] = ...) -> None: ...

class TierTokens(_message.Message):
    __slots__ = ("tier", "tokens")
    TIER_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    tier: _feed_pb2.Tier
    tokens: int
    def __init__(self, tier: _Optional[_Union[_feed_pb2.Tier, str]] = ..., tokens: _Optional[int] = ...) -> None: ...

class Tokens(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class Done(_message.Message):
    __slots__ = ("finish_reason", "completion_tokens", "saved_tokens")
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    COMPLETION_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SAVED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    finish_reason: FinishReason
    completion_tokens: int
    saved_tokens: int
    def __init__(self, finish_reason: _Optional[_Union[FinishReason, str]] = ..., completion_tokens: _Optional[int] = ..., saved_tokens: _Optional[int] = ...) -> None: ...

class MuxRequest(_message.Message):
    __slots__ = ("opens", "credits", "cancels")
    OPENS_FIELD_NUMBER: _ClassVar[int]
    CREDITS_FIELD_NUMBER: _ClassVar[int]
    CANCELS_FIELD_NUMBER: _ClassVar[int]
    opens: _containers.RepeatedCompositeFieldContainer[MuxOpen]
    credits: _containers.RepeatedCompositeFieldContainer[MuxCredit]
    cancels: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, opens: _Optional[_Iterable[_Union[MuxOpen, _Mapping]]] = ..., credits: _Optional[_Iterable[_Union[MuxCredit, _Mapping]]] = ..., cancels: _Optional[_Iterable[int]] = ...) -> None: ...

class MuxOpen(_message.Message):
    __slots__ = ("id", "request", "timeout_s", "credit")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    CREDIT_FIELD_NUMBER: _ClassVar[int]
    id: int
    request: WorkerRequest
    timeout_s: float
    credit: int
    def __init__(self, id: _Optional[int] = ..., request: _Optional[_Union[WorkerRequest, _Mapping]] = ..., timeout_s: _Optional[float] = ..., credit: _Optional[int] = ...) -> None: ...

class MuxCredit(_message.Message):
    __slots__ = ("id", "tokens")
    ID_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    id: int
    tokens: int
    def __init__(self, id: _Optional[int] = ..., tokens: _Optional[int] = ...) -> None: ...

class MuxResponse(_message.Message):
    __slots__ = ("hello", "parts", "draining")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PARTS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    hello: MuxHello
    parts: _containers.RepeatedCompositeFieldContainer[MuxPart]
    draining: bool
    def __init__(self, hello: _Optional[_Union[MuxHello, _Mapping]] = ..., parts: _Optional[_Iterable[_Union[MuxPart, _Mapping]]] = ..., draining: _Optional[bool] = ...) -> None: ...

class MuxHello(_message.Message):
    __slots__ = ("max_open",)
    MAX_OPEN_FIELD_NUMBER: _ClassVar[int]
    max_open: int
    def __init__(self, max_open: _Optional[int] = ...) -> None: ...

class MuxPart(_message.Message):
    __slots__ = ("id", "started", "token_ids", "done", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    DONE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: int
    started: Started
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    done: Done
    error: MuxError
    def __init__(self, id: _Optional[int] = ..., started: _Optional[_Union[Started, _Mapping]] = ..., token_ids: _Optional[_Iterable[int]] = ..., done: _Optional[_Union[Done, _Mapping]] = ..., error: _Optional[_Union[MuxError, _Mapping]] = ...) -> None: ...

class MuxError(_message.Message):
    __slots__ = ("status", "message", "retry_s")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_S_FIELD_NUMBER: _ClassVar[int]
    status: str
    message: str
    retry_s: float
    def __init__(self, status: _Optional[str] = ..., message: _Optional[str] = ..., retry_s: _Optional[float] = ...) -> None: ...

class ClearRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ClearResponse(_message.Message):
    __slots__ = ("blocks",)
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    blocks: int
    def __init__(self, blocks: _Optional[int] = ...) -> None: ...
