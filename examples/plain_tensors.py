"""Save and restore blocks of any engine's KV by token ids: plain torch tensors, no model."""

import torch

from kvtier.core.blocks import Attention, BlockLayout, LayerGroup, Namespace
from kvtier.engine.copier import BlockTensor
from kvtier.engine.embedded import node
from kvtier.engine.tier import EngineTier

layers = LayerGroup(Attention.FULL, layers=16, kv_heads=8, head_dim=64)
layout = BlockLayout((layers,), block_tokens=16, dtype="bfloat16")
kv = torch.randint(0, 255, (8, layout.nbytes), dtype=torch.uint8)  # this engine's 8 blocks
before = kv.clone()
token_ids = range(1000, 1000 + 8 * 16)

with node(host="64MiB") as socket:
    tier = EngineTier(socket, Namespace("my-model", "weights-1", layout), BlockTensor(layout, kv))
    tier.wait(60)  # engines would not: while a daemon takes its memory they have misses
    keys = tier.keys(token_ids)
    print("saved", tier.save(keys, 0, range(8)), "blocks")
    kv.zero_()
    restored = tier.restore(keys, 0, range(tier.match(keys)))
    print("restored", len(restored), "from", *{each.label for each in restored}, end=" ")
    print("equal:", torch.equal(kv, before))
    tier.close()
