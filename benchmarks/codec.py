"""What do codecs save of a real model's KV, how fast, and what do they do to its answers?

Blocks are coded in turn with plain copies of them, from and to memory that is not fresh: what
movers do. Speeds are in units of that copy (`memcpy`), in processor time of one core.
"""

from pathlib import Path

import kvtier.demo
from benchmarks.common import Bar, summary
from kvtier.codec.codecs import CODECS
from kvtier.codec.measure import measure
from kvtier.config import WorkerConfig
from kvtier.engine.quality import Quality

DOCUMENTS = Path(kvtier.demo.__file__).parent / "documents"
RATIO = {
    "bp-zh": 1.47, "bs-lz4": 1.34, "bp4": 1.32,
    "int8-tok": 1.93, "k8v4": 2.45, "fp8": 1.99, "int4-had": 3.5,
}  # fmt: skip
KL = {"int8-tok": 2e-4, "k8v4": 1e-3, "fp8": 2.5e-3, "int4-had": 8e-3}
# Encode and decode in GB/s where a copy does 42 and 39: the floors of the measurements that these
# codecs were chosen by. None was set for k8v4.
FLOOR = {
    "bp-zh": (1.0, 1.8), "bs-lz4": (1.5, 1.7), "bp4": (1.3, 2.5),
    "int8-tok": (1.5, 6.0), "fp8": (2.4, 2.2), "int4-had": (0.3, 0.45),
}  # fmt: skip
COPY = (42.0, 39.0)


def run(*, tiny: bool) -> dict[str, object]:
    prefix, continued, rounds = (128, 32, 1) if tiny else (2048, 1024, 3)
    text = "\n".join(path.read_text() for path in sorted(DOCUMENTS.glob("*.txt")))
    settings = WorkerConfig(dtype="bfloat16", block_tokens=64, device="cpu")
    quality = Quality(settings, text, prefix, continued)
    times: dict[str, dict] = {}
    table, bars = {}, []
    for codec in CODECS:
        if codec.name in ("raw", "lz4"):
            continue
        found = measure(codec, quality.blocks, quality.layout, rounds)
        assert found is not None
        ways = {"memcpy": found.memcpy, "encode": found.encode, "decode": found.decode}
        times[codec.name] = {way: summary(each) for way, each in ways.items()}
        row = table[codec.name] = {
            "ratio": found.ratio,
            **{f"{way}_gb_per_s": found.gb_per_s(each) for way, each in ways.items()},
            **{way: found.of_memcpy(each) for way, each in ways.items()},
        }
        bars.append(Bar(f"{codec.name} ratio", row["ratio"], at_least=RATIO[codec.name]))
        for way, floor, copy in zip(
            ("encode", "decode"), FLOOR.get(codec.name, ()), COPY, strict=False
        ):
            bars.append(Bar(f"{codec.name} {way}, of memcpy", row[way], at_least=floor / copy))
        if codec.exact:
            same = (quality.through(codec) == quality.blocks).all()
            bars.append(Bar(f"{codec.name} blocks bit for bit", float(same), at_least=1.0))
        else:
            row["kl"] = quality.divergence(quality.through(codec)).mean
            bars.append(Bar(f"{codec.name} KL", row["kl"], at_most=KL[codec.name]))
    return {
        "layout": quality.layout.describe(),
        "bytes": quality.blocks.nbytes,
        "codecs": table,
        "times": times,
        "bars": [bar.as_dict() for bar in bars],
    }
