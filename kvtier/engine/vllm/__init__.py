"""kvtier under vLLM: a secondary tier of vLLM's own tiering, and what makes it one flag.

Modules that import vLLM: `connector`, `spec`, `tier`. The others know only memory and sockets, so
that they are tested without it. Nothing is imported here: vLLM loads `connector` in every process.
"""


def register() -> None:
    """Tell vLLM of `KvtierConnector`; vLLM calls this in every process (its plug-in group)."""
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    name = "KvtierConnector"
    if name not in KVConnectorFactory._registry:
        KVConnectorFactory.register_connector(name, "kvtier.engine.vllm.connector", name)
