"""Every setting with its default and its limits; docs/config.md says more about each."""

from dataclasses import dataclass, field

from kvtier.config.values import Size, limits, one_of
from kvtier.core.policies import POLICIES

_GIB = 2**30
_PORTS = limits(0, 65535)
_SHARE = limits(0.0, 1.0)
_CODECS = ("raw", "lz4", "bs-lz4", "bp4", "bp-zh", "int8-tok", "k8v4", "fp8", "int4-had", "auto")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeConfig:
    """`[node]`: the daemon of one host."""

    name: str = ""  # empty: the host's name
    socket: str = "/run/kvtier/kvtier.sock"  # where engines attach; at most 100 characters
    listen: str = "127.0.0.1:7460"  # gRPC: feed, status, admin
    max_clients: int = field(default=64, metadata=limits(1, 4096))
    max_layouts: int = field(default=1, metadata=limits(1, 16))  # share the host tier evenly
    allow_uids: tuple[int, ...] = ()  # besides the daemon's own
    metrics_port: int = field(default=0, metadata=_PORTS)  # 0: no metrics page
    metrics_host: str = "0.0.0.0"  # noqa: S104 - for its scraper


@dataclass(frozen=True, slots=True, kw_only=True)
class HostConfig:
    """`[host]`: tier 0, the arena of pinned memory."""

    bytes: Size = field(default=1 * _GIB, metadata=limits(2**20, 2**46))
    drain_at: float = field(default=0.5, metadata=_SHARE)  # used share above which copies go down
    policy: str = field(default="phd", metadata=one_of(*POLICIES))  # what leaves first


@dataclass(frozen=True, slots=True, kw_only=True)
class DiskConfig:
    """`[disk]`: a folder on a local disk."""

    path: str
    bytes: Size = field(default=10 * _GIB, metadata=limits(2**20, 2**50))
    drain_at: float = field(default=0.8, metadata=_SHARE)
    policy: str = field(default="lru", metadata=one_of(*POLICIES))  # what leaves first
    codec: str = field(default="raw", metadata=one_of(*_CODECS))
    threads: int = field(default=3, metadata=limits(1, 64))
    queue: int = field(default=64, metadata=limits(1, 4096))  # demotions under way, in blocks
    requests: int = field(default=4, metadata=limits(1, 64))  # reads, and writes, in flight
    hung_s: float = field(default=10.0, metadata=limits(0.1, 3600))  # without an answer
    write_bytes_per_day: Size = field(default=0, metadata=limits(0, 2**60))  # 0: no limit
    admission: str = field(default="all", metadata=one_of("all", "second-use"))  # what is written


@dataclass(frozen=True, slots=True, kw_only=True)
class RedisConfig:
    """`[redis]`: Redis or Valkey, shared by all nodes. Its own limits decide what it keeps."""

    url: str  # one server, a cluster's, or Sentinels: see docs/redis.md
    password_file: str = ""  # what it holds becomes the password of `url`, see redis_url()
    sentinel_user: str = ""
    sentinel_password_file: str = ""
    ca_file: str = ""  # of rediss://; empty: the host's own
    cert_file: str = ""  # the client's, where the server asks for one
    key_file: str = ""
    prefix: str = "kvtier"  # of every key
    namespace: str = "main"  # nodes of one namespace share blocks
    bytes: Size = field(default=64 * _GIB, metadata=limits(2**20, 2**50))  # tracked by this node
    ttl_s: int = field(default=86_400, metadata=limits(1, 10**8))
    timeout_s: float = field(default=1.0, metadata=limits(0.01, 60))  # of a call, for each 8 MiB
    retry_s: float = field(default=1.0, metadata=limits(0.05, 600))  # after no answer
    codec: str = field(default="raw", metadata=one_of(*_CODECS))
    threads: int = field(default=2, metadata=limits(1, 64))
    queue: int = field(default=64, metadata=limits(1, 4096))


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerConfig:
    """One entry of `peers.members`."""

    node: str  # its name, as in router.members
    address: str  # host:port of its peers.listen


@dataclass(frozen=True, slots=True, kw_only=True)
class PeersConfig:
    """`[peers]`: blocks that node daemons hand to each other. Absent: none do."""

    listen: str = ""  # where blocks are lent; empty: port 7461 beside node.listen
    any_port: bool = False  # another one where that is taken: for who tells the others which
    members: tuple[PeerConfig, ...] = ()  # that may be asked; the node's own entry is left out
    file: str = ""  # more of them, in JSON, read anew when it changes; it need not be there yet
    pulls: int = field(default=4, metadata=limits(0, 64))  # at once; 0: asks nobody
    lends: int = field(default=4, metadata=limits(0, 64))  # at once; 0: gives nothing
    retry_s: float = field(default=1.0, metadata=limits(0.05, 600))  # after no answer


@dataclass(frozen=True, slots=True, kw_only=True)
class TenantConfig:
    """One entry of `worker.tenants`."""

    name: str
    secret_file: str  # the same content wherever the tenant's blocks are to be found again


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterConfig:
    """One entry of `worker.adapters`."""

    name: str  # what requests call it
    path: str  # a LoRA's folder; for vllm-http the path that vLLM was started with


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerConfig:
    """`[worker]`: one engine with one model."""

    # transformers: the worker's own; vllm: AsyncLLM in the worker; vllm-http: `vllm serve` at `url`
    engine: str = field(
        default="transformers", metadata=one_of("transformers", "vllm", "vllm-http")
    )
    model: str = "smollm2"  # a folder of a Transformers causal LM, or smollm2 for the built-in one
    name: str = ""  # what requests call the model; empty: the folder's name
    node: str = ""  # empty: the host's name
    socket: str = "/run/kvtier/kvtier.sock"  # the node daemon; empty: no lower tiers
    listen: str = "127.0.0.1:7470"
    device: str = field(default="auto", metadata=one_of("auto", "cpu", "cuda"))
    dtype: str = field(default="float32", metadata=one_of("float32", "bfloat16", "float16"))
    block_tokens: int = field(default=32, metadata=limits(1, 4096))
    vram_bytes: Size = field(default=512 * 2**20, metadata=limits(2**20, 2**46))
    policy: str = field(default="phd", metadata=one_of(*POLICIES))  # what leaves VRAM first
    learned: str = ""  # file for what `policy` has learned, over a restart; empty: none
    save: str = field(default="fill", metadata=one_of("fill", "second-use", "evict"))
    # worth: nothing is loaded from disk or Redis that is faster computed again; always: everything
    loads: str = field(default="worth", metadata=one_of("worth", "always"))
    prefill_tokens: int = field(default=512, metadata=limits(16, 65536))  # in one step
    max_running: int = field(default=4, metadata=limits(1, 256))
    max_waiting: int = field(default=64, metadata=limits(0, 65536))
    wait_s: float = field(default=2.0, metadata=limits(0.0, 60))  # for a load from lower tiers
    threads: int = field(default=0, metadata=limits(0, 1024))  # 0: torch decides
    tenants: tuple[TenantConfig, ...] = ()  # who shares no block with anybody else
    adapters: tuple[AdapterConfig, ...] = ()  # LoRA adapters, for vllm and vllm-http
    vllm: str = ""  # JSON: more of vLLM's engine arguments, as {"tensor_parallel_size": 2}
    url: str = ""  # of vLLM's HTTP API; these four are for vllm-http
    events: str = ""  # its --kv-events-config endpoint; empty: nothing is known of its VRAM
    replay: str = ""  # and replay_endpoint
    announced: str = ""  # the file of its kvtier.announce; empty: it runs without kvtier


@dataclass(frozen=True, slots=True, kw_only=True)
class MemberConfig:
    """One entry of `router.members`: a node's daemon, its worker, or both."""

    node: str
    daemon: str = ""  # host:port
    worker: str = ""  # host:port
    http: str = ""  # host:port of the engine's own OpenAI API, for the endpoint picker


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterConfig:
    """`[router]`: the gRPC front, and those beside it."""

    listen: str = "127.0.0.1:7450"
    http: str = ""  # host:port of the OpenAI-compatible API; empty: none
    epp: str = ""  # host:port of the endpoint picker for Envoy and gateways; empty: none
    epp_endpoints: int = field(default=1, metadata=limits(1, 8))  # named to the gateway, in order
    members: tuple[MemberConfig, ...] = ()  # besides those that the cluster announces
    behind: float = field(default=4.0, metadata=limits(0, 100))  # the most that lambda may be
    budget_s: float = field(default=0.002, metadata=limits(0, 60))  # of Route, then by load alone
    max_requests: int = field(default=1024, metadata=limits(1, 65536))  # under way at once
    max_waiting: int = field(default=1024, metadata=limits(0, 65536))  # for one of those places
    max_attempts: int = field(default=3, metadata=limits(1, 16))
    timeout_s: float = field(default=300.0, metadata=limits(0.1, 86400))  # where a caller set none
    stale_s: float = field(default=3.0, metadata=limits(0.2, 3600))  # silence that means trouble
    # how fast nodes pull from each other that have not measured it; 0: no source is named
    peer_bytes_per_s: Size = field(default=500 * 10**6, metadata=limits(0, 2**50))
    metrics_port: int = field(default=0, metadata=_PORTS)
    metrics_host: str = "0.0.0.0"  # noqa: S104


@dataclass(frozen=True, slots=True, kw_only=True)
class TlsConfig:
    """`[tls]`: certificates, for every TCP listener and every gRPC connection of this process."""

    cert_file: str = ""  # PEM, with the chain; what this process shows to those that connect
    key_file: str = ""
    ca_file: str = ""  # who signs the certificates of those it connects to; empty: gRPC's own list
    client_ca_file: str = ""  # gRPC callers must have a certificate of these; empty: they need none
    server_name: str = ""  # in the others' certificates; empty: the host of their address


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthConfig:
    """`[auth]`: the bearer token that callers show."""

    token_file: str
    open_metrics: bool = True  # metrics pages need no token


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """The whole file."""

    node: NodeConfig = field(default_factory=NodeConfig)
    host: HostConfig = field(default_factory=HostConfig)
    disk: DiskConfig | None = None
    redis: RedisConfig | None = None
    worker: WorkerConfig = field(default_factory=WorkerConfig)
    router: RouterConfig = field(default_factory=RouterConfig)
    peers: PeersConfig | None = None
    tls: TlsConfig | None = None
    auth: AuthConfig | None = None
