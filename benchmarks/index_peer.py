"""Dynamo's RadixTree and SelectionService on prompts like those of index.py; prints JSON.

Run by index.py with a Python that has ai-dynamo-runtime (and pyzmq and msgpack); imports nothing
of ours.
"""

import json
import sys
import time
from random import Random


def main() -> None:
    chains, rounds = int(sys.argv[1]), int(sys.argv[2])
    from dynamo._core import RadixTree

    rng = Random(1)
    starts = [[rng.getrandbits(63) for _ in range(32)] for _ in range(16)]
    paths = [starts[n % 16] + [rng.getrandbits(63) for _ in range(480)] for n in range(chains)]
    tree = RadixTree()
    event = 0
    begun = time.perf_counter()
    for path in paths:
        worker, parent, chained = rng.randrange(64), None, 0
        for start in range(0, 512, 16):
            blocks = []
            for local in path[start : start + 16]:
                chained = hash((chained, local)) & (2**63 - 1)
                blocks.append({"block_hash": chained, "tokens_hash": local})
            data = {"stored": {"parent_hash": parent, "blocks": blocks}}
            tree.apply_event(worker, json.dumps({"event_id": event, "data": data}).encode())
            parent, event = chained, event + 1
    tree.find_matches(paths[-1])
    found: dict[str, object] = {"ingest_blocks_per_s": chains * 512 / (time.perf_counter() - begun)}
    for depth in (512, 256, 32, 0):
        seconds = []
        for _ in range(rounds):
            path = paths[rng.randrange(chains)][:depth]
            path = path + [rng.getrandbits(63) for _ in range(512 - depth)]
            start = time.perf_counter()
            tree.find_matches(path)
            seconds.append(time.perf_counter() - start)
        seconds.sort()
        found[f"{100 * depth // 512}% held"] = {
            "min_s": seconds[0],
            "median_s": seconds[len(seconds) // 2],
            "p99_s": seconds[int(len(seconds) * 0.99)],
        }
    found["select"] = select(rounds)
    print(json.dumps({"ai-dynamo-runtime": found}))


def select(rounds: int) -> object:
    """SelectionService.select of 8k token ids among 64 workers that hold nothing."""
    import asyncio

    import dynamo._core as core
    import zmq

    async def measure() -> dict[str, float]:
        service = core.SelectionService(indexer_threads=2)
        context, sockets = zmq.Context(), []
        for worker in range(64):
            sockets.append(context.socket(zmq.PUB))  # it wants events of every worker; none come
            port = sockets[-1].bind_to_random_port("tcp://127.0.0.1")
            made = service.upsert_worker(
                {
                    "worker_id": worker, "model_name": "m", "block_size": 16,
                    "endpoint": f"http://127.0.0.1:{9000 + worker}",
                    "kv_events_endpoints": {0: f"tcp://127.0.0.1:{port}"},
                    "total_kv_blocks": 1_000_000, "max_num_batched_tokens": 8192,
                }
            )  # fmt: skip
            if hasattr(made, "__await__"):
                await made
        await asyncio.sleep(1.0)  # until it has subscribed
        rng = Random(2)
        seconds = []
        for number in range(rounds):
            ids = [rng.randrange(128_000) for _ in range(8192)]
            start = time.perf_counter()
            await service.select({"model_name": "m", "token_ids": ids, "selection_id": str(number)})
            seconds.append(time.perf_counter() - start)
        seconds.sort()
        return {"min_s": seconds[0], "median_s": seconds[len(seconds) // 2]}

    try:
        return asyncio.run(asyncio.wait_for(measure(), 120))
    except Exception as error:  # noqa: BLE001 - the peer's errors are its own; they are reported
        return f"failed: {error}"[:300]


if __name__ == "__main__":
    main()
