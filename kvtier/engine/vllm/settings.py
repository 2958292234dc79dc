"""What `kv_connector_extra_config` may say about kvtier."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Final

from kvtier.errors import ConfigError

MODULE: Final = "kvtier.engine.vllm"
# Engine arguments that the worker sets, and by which of its settings.
DECIDED: Final = {
    "model": "worker.model", "served_model_name": "worker.name", "dtype": "worker.dtype",
    "block_size": "worker.block_tokens", "kv_cache_memory_bytes": "worker.vram_bytes",
    "max_num_seqs": "worker.max_running", "enable_lora": "worker.adapters",
    "max_loras": "worker.adapters", "prefix_caching_hash_algo": "the worker",
    "enable_prefix_caching": "the worker", "kv_transfer_config": "worker.socket",
    "kv_events_config": "the worker",
}  # fmt: skip
FILL: Final = "fill"
SECOND_USE: Final = "second-use"
CPU_BYTES: Final = 1 << 30  # of vLLM's own region, where none is given


@dataclass(frozen=True, slots=True, kw_only=True)
class TierSettings:
    """The keys of the tier's table; times in seconds.

    Raises:
        ConfigError: A value is out of range; the message names it and its limits.
    """

    socket: str = "/run/kvtier/kvtier.sock"  # the node daemon
    lookup_s: float = 1.0  # that a request waits to hear what is held; then it is a miss
    load_s: float = 2.0  # that it waits for its blocks; then it computes the missing ones
    store_s: float = 10.0  # that a store may pin vLLM's region; then it is dropped
    drain_s: float = 5.0  # that an engine which stops waits for its stores
    save: str = FILL  # when blocks leave VRAM: once they are full, or at their "second-use"
    revision: str = ""  # of the weights; empty: a fingerprint of their content
    adapters_revision: str = ""  # see docs/vllm.md
    tenant: str = ""
    announce: str = ""  # a file to write who this engine is into, for a worker beside it
    owner: str = ""  # the socket of the worker that started this engine; see `owner`

    def __post_init__(self) -> None:
        for name in ("lookup_s", "load_s", "store_s", "drain_s"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ConfigError(f"kvtier: {name} is {value!r}, must be a number of seconds")
            if not 0 < value <= 60:
                raise ConfigError(f"kvtier: {name} is {value:g}, must be more than 0, at most 60")
        if self.save not in (FILL, SECOND_USE):
            raise ConfigError(f"kvtier: save is {self.save!r}, must be {FILL!r} or {SECOND_USE!r}")
        for name in ("socket", "revision", "adapters_revision", "tenant", "announce", "owner"):
            value = getattr(self, name)
            if not isinstance(value, str) or len(value) > 256:
                raise ConfigError(f"kvtier: {name} must be text of at most 256 characters")

    @classmethod
    def parse(cls, table: Mapping[str, object]) -> "TierSettings":
        """The settings of a table.

        Raises:
            ConfigError: It has a key that is none, or a value out of range.
        """
        known = {field.name for field in fields(cls)}
        if strange := sorted(set(table) - known):
            raise ConfigError(f"kvtier: no setting {strange[0]!r}; known: {', '.join(known)}")
        return cls(**table)  # type: ignore[arg-type]  # checked just above, and by the class


def engine_table(text: str) -> dict[str, object]:
    """What `worker.vllm` says: arguments for vLLM's engine besides those that the worker sets.

    Raises:
        ConfigError: It is no JSON table, or has a key that the worker's other settings decide.
    """
    try:
        table = json.loads(text or "{}")
    except ValueError as error:
        raise ConfigError(f"worker.vllm is not JSON: {error}") from None
    if not isinstance(table, dict):
        raise ConfigError("worker.vllm must be a JSON table of vLLM's engine arguments")
    if ours := sorted(set(table) & set(DECIDED)):
        raise ConfigError(f"worker.vllm: {ours[0]} is for {DECIDED[ours[0]]} to say")
    return table


def completed(extra: Mapping[str, object]) -> dict[str, object]:
    """`kv_connector_extra_config` with all that vLLM's tiering needs, out of what a user gave.

    A user gives nothing, or the settings above in a table `kvtier`, and vLLM's own keys.
    """
    table = extra.get("kvtier", {})
    if not isinstance(table, Mapping):
        raise ConfigError("kvtier: kv_connector_extra_config.kvtier must be a table")
    TierSettings.parse(table)
    whole: dict[str, object] = {
        "cpu_bytes_to_use": CPU_BYTES,
        "offload_prompt_only": False,  # the next turn of a chat holds this one's answer
        **extra,
        "spec_name": "KvtierSpec",
        "spec_module_path": f"{MODULE}.spec",
    }
    tier = {"type": "KvtierTier", "module_path": f"{MODULE}.tier", **table}
    whole.setdefault("secondary_tiers", [tier])
    return whole
