"""Request traces: who asked when, with which prefix blocks. No text is in them.

The format is that of Mooncake (FAST'25, github.com/kvcache-ai/Mooncake, FAST25-release/traces):
JSON, one object a line, of which these fields are read:

    timestamp      milliseconds since any moment; absent: as in the line above, at first 0
    input_length   tokens of the prompt
    output_length  tokens generated; absent: 0
    hash_ids       one integer a block of the prompt; equal ids mean equal prompts up to there
    block_size     tokens a block; absent: as in the line above, at first 512, or, where a line
                   has more blocks than 512 allow, the power of two that its lengths speak of

A line with a `block_size` and nothing else that is known here is a heading: it says the size for
the lines that follow. Only full blocks can be cached: the partly filled last one never is.
Where all times are the same, and so say nothing, `load_trace` takes requests to be a second apart.
"""

import gzip
import json
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple, cast

from kvtier.errors import ConfigError

BLOCK_TOKENS = 512  # of Mooncake's own traces
_MAX_LINE = 64 * 2**20  # bytes
_MAX_TOKENS = 2**31
_MAX_MS = 2**53
_MAX_BLOCK = 2**20


class Request(NamedTuple):
    """One request of a trace. `blocks` has an id for each block, the partly filled last included.

    `at_s` is in seconds, on the trace's own clock.
    """

    at_s: float
    input_tokens: int
    output_tokens: int
    blocks: tuple[int, ...]
    block_tokens: int = BLOCK_TOKENS

    @property
    def full_blocks(self) -> tuple[int, ...]:
        """The ids of the full blocks: all that a cache can hold of this prompt."""
        return self.blocks[: self.input_tokens // self.block_tokens]


def read_trace(path: str | Path, block_tokens: int | None = None) -> Iterator[Request]:
    """The requests of a trace file, one by one; `.gz` is unpacked on the way.

    `block_tokens` is the size of a block where the trace names none; one that the trace
    contradicts is refused. See `load_trace` for requests in the order of their times.

    Raises:
        ConfigError: The file cannot be read, or a line breaks the format: names file, line, field.
    """
    size, known = block_tokens or BLOCK_TOKENS, block_tokens is not None
    number, at_ms = 0, 0.0
    with _opened(Path(path)) as file:
        while line := file.readline(_MAX_LINE + 1):
            number += 1
            where = f"trace {path}, line {number}"
            if len(line) > _MAX_LINE:
                raise ConfigError(f"{where}: longer than {_MAX_LINE} bytes")
            if line.isspace():
                continue
            fields = _object(line, where)
            if "block_size" in fields:
                size, known = _integer(fields, "block_size", where, 1, _MAX_BLOCK), True
                if block_tokens not in (None, size):
                    raise ConfigError(f"{where}: block_size is {size}, not {block_tokens} as given")
                if "hash_ids" not in fields and "input_length" not in fields:
                    continue
            if not known and (guessed := _guessed_size(fields, size)):
                size, known = guessed, True
            at_ms = _time(fields, where, at_ms)
            request = _request(fields, where, size, at_ms)
            if block_tokens is not None and len(request.blocks) < request.input_tokens // size:
                tokens, count = request.input_tokens, len(request.blocks)
                raise ConfigError(
                    f"{where}: hash_ids has {count} blocks, but {tokens} tokens fill "
                    f"{tokens // size} of {size} tokens, the block size given"
                )
            known = known or len(request.blocks) > 1  # it fits: later lines are held to it
            yield request


def load_trace(path: str | Path, block_tokens: int | None = None) -> list[Request]:
    """All requests of a trace file, those that came earlier first; see `read_trace`."""
    requests = sorted(read_trace(path, block_tokens), key=lambda request: request.at_s)
    if len(requests) > 1 and requests[0].at_s == requests[-1].at_s:
        return [request._replace(at_s=float(n)) for n, request in enumerate(requests)]
    return requests


def _guessed_size(fields: dict[str, object], size: int) -> int | None:
    """The block size that a line's lengths speak of, where `size` can't be it."""
    tokens, ids = fields.get("input_length"), fields.get("hash_ids")
    if type(tokens) is not int or not isinstance(ids, list) or len(ids) <= -(-tokens // size):
        return None
    powers = [1 << n for n in range(size.bit_length())]
    return next((p for p in reversed(powers) if len(ids) in (tokens // p, -(-tokens // p))), None)


def write_trace(path: str | Path, requests: Iterable[Request]) -> int:
    """Write a trace file, packed if its name ends in `.gz`; how many requests it has.

    Raises:
        ConfigError: The file cannot be written.
    """
    path, count = Path(path), 0
    packed = path.suffix == ".gz"
    try:
        with gzip.open(path, "wb") if packed else path.open("wb") as file:
            size = BLOCK_TOKENS
            for request in requests:
                fields: dict[str, object] = {
                    "timestamp": round(request.at_s * 1000, 3),
                    "input_length": request.input_tokens,
                    "output_length": request.output_tokens,
                    "hash_ids": request.blocks,
                }
                if request.block_tokens != size:
                    fields["block_size"] = size = request.block_tokens
                file.write(json.dumps(fields).encode() + b"\n")
                count += 1
    except OSError as error:
        raise ConfigError(f"trace {path}: {error.strerror or error}") from None
    return count


@contextmanager
def _opened(path: Path) -> Iterator[IO[bytes]]:
    try:
        with cast(
            "IO[bytes]", gzip.open(path) if path.suffix == ".gz" else path.open("rb")
        ) as file:
            yield file
    except (OSError, EOFError, zlib.error) as error:  # the latter two: of a torn .gz
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"trace {path}: {reason}") from None


def _object(line: bytes, where: str) -> dict[str, object]:
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        raise ConfigError(f"{where}: not JSON: {line[:60]!r}") from None
    if not isinstance(fields, dict):
        raise ConfigError(f"{where}: must be a JSON object: {line[:60]!r}")
    return fields


def _time(fields: dict[str, object], where: str, before: float) -> float:
    at = fields.get("timestamp")
    if at is None:
        return before
    if isinstance(at, bool) or not isinstance(at, int | float) or not abs(at) <= _MAX_MS:
        raise ConfigError(f"{where}: timestamp is {at!r}, must be a number of milliseconds")
    return at


def _request(fields: dict[str, object], where: str, size: int, at_ms: float) -> Request:
    tokens = _integer(fields, "input_length", where, 0, _MAX_TOKENS)
    output = _integer(fields, "output_length", where, 0, _MAX_TOKENS, default=0)
    ids = fields.get("hash_ids")
    if not isinstance(ids, list):
        raise ConfigError(f"{where}: hash_ids is {ids!r:.60}, must be a list of integers")
    ids = [int(x) if isinstance(x, float) and x.is_integer() else x for x in ids]
    if not all(type(each) is int for each in ids):
        wrong = next(each for each in ids if type(each) is not int)
        raise ConfigError(f"{where}: hash_ids holds {wrong!r:.60}, must be a list of integers")
    most = -(-tokens // size)
    if len(ids) > most:
        raise ConfigError(
            f"{where}: hash_ids has {len(ids)} blocks, but {tokens} tokens are at most {most} "
            f"blocks of {size}; give the trace's own block size"
        )
    return Request(at_ms / 1000, tokens, output, tuple(ids), size)


def _integer(
    fields: dict[str, object],
    name: str,
    where: str,
    low: int,
    high: int,
    default: int | None = None,
) -> int:
    value = fields.get(name)
    value = default if value is None else value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if type(value) is not int or not low <= value <= high:
        raise ConfigError(
            f"{where}: {name} is {value!r:.60}, must be an integer of {low} to {high}"
        )
    return value
