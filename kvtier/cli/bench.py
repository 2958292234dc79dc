"""`kvtier bench`: what this machine does with one's own model."""

import argparse
from importlib.resources import files
from typing import TYPE_CHECKING

from kvtier.errors import ConfigError

if TYPE_CHECKING:
    from kvtier.codec.base import Codec
    from kvtier.engine.quality import Quality


def add(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the command."""
    text = "measure parts of kvtier on this machine"
    bench = commands.add_parser("bench", help=text, description=text)
    parts = bench.add_subparsers(required=True, metavar="PART")
    text = "what each codec saves of a model's KV, how fast, and what answers it changes"
    codec = parts.add_parser("codec", help=text, description=text)
    codec.add_argument(
        "--model", default="smollm2", metavar="DIR",
        help="a folder of a Transformers causal LM, or smollm2, the built-in one",
    )  # fmt: skip
    codec.add_argument(
        "--dtype", default="bfloat16", choices=["float32", "bfloat16", "float16"],
        help="that the model computes in",
    )  # fmt: skip
    codec.add_argument("--block-tokens", type=int, default=64, metavar="N", help="tokens a block")
    codec.add_argument(
        "--blocks", type=int, default=16, metavar="N", help="blocks of KV to measure on"
    )
    codec.add_argument(
        "--text", metavar="FILE", help="what is computed (default: documents out of this package)"
    )
    codec.set_defaults(run=_codec)


def _codec(options: argparse.Namespace) -> int:
    for name, low, high in (("block_tokens", 1, 4096), ("blocks", 1, 4096)):
        if not low <= (value := getattr(options, name)) <= high:
            option = name.replace("_", "-")
            raise ConfigError(f"--{option} is {value}, must be {low} to {high}")
    from kvtier.codec.codecs import CODECS
    from kvtier.config import WorkerConfig
    from kvtier.engine.quality import Quality

    settings = WorkerConfig(
        model=options.model, dtype=options.dtype, block_tokens=options.block_tokens
    )
    prefix = options.blocks * options.block_tokens
    quality = Quality(settings, _text(options.text), prefix, min(256, prefix))
    print(f"{options.blocks} blocks of {quality.layout.nbytes} bytes; GB/s of one core")
    print(f"{'codec':10}{'ratio':>8}{'encode':>9}{'decode':>9}{'memcpy':>9}{'KL':>11}")
    for codec in CODECS:
        print(_row(codec, quality), flush=True)
    return 0


def _text(path: str | None) -> str:
    if path is None:
        folder = files("kvtier.demo") / "documents"
        return "\n".join(
            each.read_text() for each in folder.iterdir() if each.name.endswith(".txt")
        )
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path}: {error}") from None


def _row(codec: "Codec", quality: "Quality") -> str:
    from kvtier.codec.measure import measure

    found = measure(codec, quality.blocks, quality.layout, rounds=2)
    if found is None:
        return f"{codec.name:10}  not for such blocks; they are stored raw or by bp-zh"
    speeds = "".join(
        f"{found.gb_per_s(each):9.2f}" for each in (found.encode, found.decode, found.memcpy)
    )
    kl = 0.0 if codec.exact else quality.divergence(quality.through(codec)).mean
    return f"{codec.name:10}{found.ratio:8.3f}{speeds}{kl:11.6f}"
