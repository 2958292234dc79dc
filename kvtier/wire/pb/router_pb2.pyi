from kvtier.wire.pb import feed_pb2 as _feed_pb2
from kvtier.wire.pb import worker_pb2 as _worker_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Prompt(_message.Message):
    __slots__ = ("text", "chat", "tokens", "keys")
    TEXT_FIELD_NUMBER: _ClassVar[int]
    CHAT_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    text: str
    chat: Chat
    tokens: TokenIds
    keys: BlockKeys
    def __init__(self, text: _Optional[str] = ..., chat: _Optional[_Union[Chat, _Mapping]] = ..., tokens: _Optional[_Union[TokenIds, _Mapping]] = ..., keys: _Optional[_Union[BlockKeys, _Mapping]] = ...) -> None: ...

class Chat(_message.Message):
    __slots__ = ("messages",)
    MESSAGES_FIELD_NUMBER: _ClassVar[int]
    messages: _containers.RepeatedCompositeFieldContainer[ChatMessage]
    def __init__(self, messages: _Optional[_Iterable[_Union[ChatMessage, _Mapping]]] = ...) -> None: ...

class ChatMessage(_message.Message):
    __slots__ = ("role", "content")
    ROLE_FIELD_NUMBER: _ClassVar[int]
    CONTENT_FIELD_NUMBER: _ClassVar[int]
    role: str
    content: str
    def __init__(self, role: _Optional[str] = ..., content: _Optional[str] = ...) -> None: ...

class TokenIds(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class BlockKeys(_message.Message):
    __slots__ = ("keys", "block_tokens", "prompt_tokens")
    KEYS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    keys: bytes
    block_tokens: int
    prompt_tokens: int
    def __init__(self, keys: _Optional[bytes] = ..., block_tokens: _Optional[int] = ..., prompt_tokens: _Optional[int] = ...) -> None: ...

class RouteStreamRequest(_message.Message):
    __slots__ = ("tag", "request")
    TAG_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    tag: int
    request: RouteRequest
    def __init__(self, tag: _Optional[int] = ..., request: _Optional[_Union[RouteRequest, _Mapping]] = ...) -> None: ...

class RouteStreamResponse(_message.Message):
    __slots__ = ("tag", "response", "error")
    TAG_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    tag: int
    response: RouteResponse
    error: RouteError
    def __init__(self, tag: _Optional[int] = ..., response: _Optional[_Union[RouteResponse, _Mapping]] = ..., error: _Optional[_Union[RouteError, _Mapping]] = ...) -> None: ...

class RouteError(_message.Message):
    __slots__ = ("status", "message", "retry_s")
    STATUS_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    RETRY_S_FIELD_NUMBER: _ClassVar[int]
    status: str
    message: str
    retry_s: float
    def __init__(self, status: _Optional[str] = ..., message: _Optional[str] = ..., retry_s: _Optional[float] = ...) -> None: ...

class RouteRequest(_message.Message):
    __slots__ = ("model", "prompt", "adapter", "tenant", "session")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    model: str
    prompt: Prompt
    adapter: str
    tenant: str
    session: str
    def __init__(self, model: _Optional[str] = ..., prompt: _Optional[_Union[Prompt, _Mapping]] = ..., adapter: _Optional[str] = ..., tenant: _Optional[str] = ..., session: _Optional[str] = ...) -> None: ...

class RouteResponse(_message.Message):
    __slots__ = ("choice", "fallbacks", "prompt_tokens")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    FALLBACKS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    choice: Choice
    fallbacks: _containers.RepeatedCompositeFieldContainer[Choice]
    prompt_tokens: int
    def __init__(self, choice: _Optional[_Union[Choice, _Mapping]] = ..., fallbacks: _Optional[_Iterable[_Union[Choice, _Mapping]]] = ..., prompt_tokens: _Optional[int] = ...) -> None: ...

class ExplainResponse(_message.Message):
    __slots__ = ("choices", "prompt_tokens")
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    choices: _containers.RepeatedCompositeFieldContainer[Choice]
    prompt_tokens: int
    def __init__(self, choices: _Optional[_Iterable[_Union[Choice, _Mapping]]] = ..., prompt_tokens: _Optional[int] = ...) -> None: ...

class Choice(_message.Message):
    __slots__ = ("worker_id", "node", "address", "warm", "seconds", "wait_s", "load_s", "prefill_s", "why", "draining", "source", "source_tokens", "terms", "hinted")
    WORKER_ID_FIELD_NUMBER: _ClassVar[int]
    NODE_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    WARM_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    WHY_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    SOURCE_FIELD_NUMBER: _ClassVar[int]
    SOURCE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TERMS_FIELD_NUMBER: _ClassVar[int]
    HINTED_FIELD_NUMBER: _ClassVar[int]
    worker_id: str
    node: str
    address: str
    warm: _containers.RepeatedCompositeFieldContainer[_worker_pb2.TierTokens]
    seconds: float
    wait_s: float
    load_s: float
    prefill_s: float
    why: str
    draining: bool
    source: str
    source_tokens: int
    terms: Terms
    hinted: bool
    def __init__(self, worker_id: _Optional[str] = ..., node: _Optional[str] = ..., address: _Optional[str] = ..., warm: _Optional[_Iterable[_Union[_worker_pb2.TierTokens, _Mapping]]] = ..., seconds: _Optional[float] = ..., wait_s: _Optional[float] = ..., load_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., why: _Optional[str] = ..., draining: _Optional[bool] = ..., source: _Optional[str] = ..., source_tokens: _Optional[int] = ..., terms: _Optional[_Union[Terms, _Mapping]] = ..., hinted: _Optional[bool] = ...) -> None: ...

class Terms(_message.Message):
    __slots__ = ("loads", "waiting_tokens", "decoding", "drag", "prefill_tokens_per_s", "computed_tokens", "doubles_at", "behind", "drain")
    LOADS_FIELD_NUMBER: _ClassVar[int]
    WAITING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DECODING_FIELD_NUMBER: _ClassVar[int]
    DRAG_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_PER_S_FIELD_NUMBER: _ClassVar[int]
    COMPUTED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    DOUBLES_AT_FIELD_NUMBER: _ClassVar[int]
    BEHIND_FIELD_NUMBER: _ClassVar[int]
    DRAIN_FIELD_NUMBER: _ClassVar[int]
    loads: _containers.RepeatedCompositeFieldContainer[Load]
    waiting_tokens: int
    decoding: int
    drag: float
    prefill_tokens_per_s: float
    computed_tokens: int
    doubles_at: float
    behind: float
    drain: float
    def __init__(self, loads: _Optional[_Iterable[_Union[Load, _Mapping]]] = ..., waiting_tokens: _Optional[int] = ..., decoding: _Optional[int] = ..., drag: _Optional[float] = ..., prefill_tokens_per_s: _Optional[float] = ..., computed_tokens: _Optional[int] = ..., doubles_at: _Optional[float] = ..., behind: _Optional[float] = ..., drain: _Optional[float] = ...) -> None: ...

class Load(_message.Message):
    __slots__ = ("tier", "tokens", "bytes_per_s", "seconds")
    TIER_FIELD_NUMBER: _ClassVar[int]
    TOKENS_FIELD_NUMBER: _ClassVar[int]
    BYTES_PER_S_FIELD_NUMBER: _ClassVar[int]
    SECONDS_FIELD_NUMBER: _ClassVar[int]
    tier: _feed_pb2.Tier
    tokens: int
    bytes_per_s: float
    seconds: float
    def __init__(self, tier: _Optional[_Union[_feed_pb2.Tier, str]] = ..., tokens: _Optional[int] = ..., bytes_per_s: _Optional[float] = ..., seconds: _Optional[float] = ...) -> None: ...

class GenerateRequest(_message.Message):
    __slots__ = ("request_id", "model", "prompt", "max_tokens", "temperature", "seed", "ignore_eos", "return_first_logits", "resume", "adapter", "tenant", "session", "together")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    PROMPT_FIELD_NUMBER: _ClassVar[int]
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    RETURN_FIRST_LOGITS_FIELD_NUMBER: _ClassVar[int]
    RESUME_FIELD_NUMBER: _ClassVar[int]
    ADAPTER_FIELD_NUMBER: _ClassVar[int]
    TENANT_FIELD_NUMBER: _ClassVar[int]
    SESSION_FIELD_NUMBER: _ClassVar[int]
    TOGETHER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    model: str
    prompt: Prompt
    max_tokens: int
    temperature: float
    seed: int
    ignore_eos: bool
    return_first_logits: bool
    resume: bool
    adapter: str
    tenant: str
    session: str
    together: bool
    def __init__(self, request_id: _Optional[str] = ..., model: _Optional[str] = ..., prompt: _Optional[_Union[Prompt, _Mapping]] = ..., max_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., seed: _Optional[int] = ..., ignore_eos: _Optional[bool] = ..., return_first_logits: _Optional[bool] = ..., resume: _Optional[bool] = ..., adapter: _Optional[str] = ..., tenant: _Optional[str] = ..., session: _Optional[str] = ..., together: _Optional[bool] = ...) -> None: ...

class GenerateResponse(_message.Message):
    __slots__ = ("routed", "started", "chunk", "finished", "then")
    ROUTED_FIELD_NUMBER: _ClassVar[int]
    STARTED_FIELD_NUMBER: _ClassVar[int]
    CHUNK_FIELD_NUMBER: _ClassVar[int]
    FINISHED_FIELD_NUMBER: _ClassVar[int]
    THEN_FIELD_NUMBER: _ClassVar[int]
    routed: Routed
    started: _worker_pb2.Started
    chunk: Chunk
    finished: _worker_pb2.Done
    then: _containers.RepeatedCompositeFieldContainer[GenerateResponse]
    def __init__(self, routed: _Optional[_Union[Routed, _Mapping]] = ..., started: _Optional[_Union[_worker_pb2.Started, _Mapping]] = ..., chunk: _Optional[_Union[Chunk, _Mapping]] = ..., finished: _Optional[_Union[_worker_pb2.Done, _Mapping]] = ..., then: _Optional[_Iterable[_Union[GenerateResponse, _Mapping]]] = ...) -> None: ...

class Routed(_message.Message):
    __slots__ = ("choice", "others", "attempt", "resumed_tokens")
    CHOICE_FIELD_NUMBER: _ClassVar[int]
    OTHERS_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RESUMED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    choice: Choice
    others: _containers.RepeatedCompositeFieldContainer[Choice]
    attempt: int
    resumed_tokens: int
    def __init__(self, choice: _Optional[_Union[Choice, _Mapping]] = ..., others: _Optional[_Iterable[_Union[Choice, _Mapping]]] = ..., attempt: _Optional[int] = ..., resumed_tokens: _Optional[int] = ...) -> None: ...

class Chunk(_message.Message):
    __slots__ = ("ids", "text")
    IDS_FIELD_NUMBER: _ClassVar[int]
    TEXT_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    text: str
    def __init__(self, ids: _Optional[_Iterable[int]] = ..., text: _Optional[str] = ...) -> None: ...

class WatchMembersRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Members(_message.Message):
    __slots__ = ("version", "members")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    MEMBERS_FIELD_NUMBER: _ClassVar[int]
    version: int
    members: _containers.RepeatedCompositeFieldContainer[Member]
    def __init__(self, version: _Optional[int] = ..., members: _Optional[_Iterable[_Union[Member, _Mapping]]] = ...) -> None: ...

class Member(_message.Message):
    __slots__ = ("node", "daemon_address", "worker_address", "draining", "state")
    NODE_FIELD_NUMBER: _ClassVar[int]
    DAEMON_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    WORKER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DRAINING_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    node: str
    daemon_address: str
    worker_address: str
    draining: bool
    state: str
    def __init__(self, node: _Optional[str] = ..., daemon_address: _Optional[str] = ..., worker_address: _Optional[str] = ..., draining: _Optional[bool] = ..., state: _Optional[str] = ...) -> None: ...

class SetMembersResponse(_message.Message):
    __slots__ = ("applied",)
    APPLIED_FIELD_NUMBER: _ClassVar[int]
    applied: bool
    def __init__(self, applied: _Optional[bool] = ...) -> None: ...

class RecordRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RecordedRequest(_message.Message):
    __slots__ = ("at_s", "input_tokens", "output_tokens", "block_tokens", "keys", "dropped")
    AT_S_FIELD_NUMBER: _ClassVar[int]
    INPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_TOKENS_FIELD_NUMBER: _ClassVar[int]
    KEYS_FIELD_NUMBER: _ClassVar[int]
    DROPPED_FIELD_NUMBER: _ClassVar[int]
    at_s: float
    input_tokens: int
    output_tokens: int
    block_tokens: int
    keys: _containers.RepeatedScalarFieldContainer[bytes]
    dropped: int
    def __init__(self, at_s: _Optional[float] = ..., input_tokens: _Optional[int] = ..., output_tokens: _Optional[int] = ..., block_tokens: _Optional[int] = ..., keys: _Optional[_Iterable[bytes]] = ..., dropped: _Optional[int] = ...) -> None: ...
