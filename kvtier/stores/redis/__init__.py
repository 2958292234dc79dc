"""The shared tier: Redis or Valkey, alone, behind Sentinels, or as a cluster.

    store.py       frames by key: what a node calls
    trial.py       values of a process's own, to measure the way there
    purge.py       the one thing that removes what is shared, on a person's word
    parts.py       a frame as the values that it is kept in (pure)
    servers.py     which server has a key
    connection.py  one connection; the connections to one server
    breaker.py     when to leave a server alone (pure)
    address.py     the URL
    resp.py        the protocol

docs/redis.md is the operator's side; docs/decisions/0007-own-redis-client.md says why it is not
a client library.
"""

from kvtier.stores.redis.store import RedisStore
from kvtier.stores.redis.trial import RedisTrial

__all__ = ["RedisStore", "RedisTrial"]
