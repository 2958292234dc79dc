"""From recorded requests to a trace: keys become numbers, so that no prompt can be guessed."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final

from kvtier.errors import ConfigError
from kvtier.sim.trace import Request

MAX_BLOCKS = 1 << 25  # that one recording tells apart: about 5 GB of memory

TOLD_S: Final = 60.0  # a prompt of which a node daemon told nothing for so long is told of whole
TOLD: Final = 1 << 14  # and the oldest one, where there are more than so many


class Numbering:
    """Numbers block keys in the order in which they come up.

    A key says something about a prompt to who can guess it; its number says nothing.
    `block_tokens` 0 keeps the blocks as they are; else it must be a multiple of theirs: the key of
    the last of several blocks stands for all of them, since keys are chained.
    """

    def __init__(self, block_tokens: int = 0) -> None:
        self._block_tokens = block_tokens
        self._numbers: dict[bytes, int] = {}

    def request(
        self, at_s: float, tokens: tuple[int, int], keys: Sequence[bytes], block_tokens: int
    ) -> Request:
        """One request; `tokens` are those of its prompt and of its answer.

        Raises:
            ConfigError: The wanted block size is no multiple of `block_tokens`, or there are more
                than MAX_BLOCKS different blocks.
        """
        wanted = self._block_tokens or block_tokens
        step, rest = divmod(wanted, block_tokens)
        if rest or not step:
            raise ConfigError(
                f"--block-tokens is {wanted}, must be a multiple of {block_tokens}, "
                "which is what the workers use"
            )
        numbers = self._numbers
        ids = tuple(numbers.setdefault(key, len(numbers)) for key in keys[step - 1 :: step])
        if len(numbers) > MAX_BLOCKS:
            raise ConfigError(f"trace: over {MAX_BLOCKS} different blocks; record for less long")
        return Request(at_s, *tokens, ids, wanted)


@dataclass(slots=True)
class _Told:
    at_s: float
    keys: Sequence[bytes]
    block_tokens: int
    output_tokens: int = 0
    last_s: float = 0.0


class Pieces:
    """Puts prompts together that a node daemon tells of in pieces: reads and writes.

    A piece is a path from the prompt's first block on, or, as vLLM tells it, from where the piece
    before ends: together they are the prompt. A daemon knows full blocks only, so a prompt is as
    long as these, and an answer as long as an engine has said, 0 where none did.
    """

    def __init__(self, numbering: Numbering) -> None:
        self._numbering = numbering
        self._told: dict[int, _Told] = {}  # by request, in the order of their last pieces
        self._unnamed = 0

    def __len__(self) -> int:
        """Prompts that may not be whole."""
        return len(self._told)

    def knows(self, request: int) -> bool:
        """Whether a piece of `request` was told, and may not have been the last."""
        return request in self._told

    def add(
        self, at_s: float, request: int, keys: Sequence[bytes], block_tokens: int, output: int
    ) -> Iterator[Request]:
        """A piece of `request`, 0: of one that nobody numbered. Gives the prompts that are whole.

        Raises:
            ConfigError: See `Numbering.request`.
        """
        if not request:
            self._unnamed -= 1
            request = self._unnamed
        told = self._told.pop(request, None) or _Told(at_s, keys, block_tokens)
        self._told[request] = told
        told.keys = _joined(told.keys, keys)
        told.output_tokens = max(told.output_tokens, output)
        told.last_s = at_s
        while len(self._told) > TOLD or next(iter(self._told.values())).last_s < at_s - TOLD_S:
            yield self._whole(next(iter(self._told)))

    def rest(self) -> Iterator[Request]:
        """All others, when nothing more comes."""
        for request in [*self._told]:
            yield self._whole(request)

    def _whole(self, request: int) -> Request:
        told = self._told.pop(request)
        tokens = len(told.keys) * told.block_tokens, told.output_tokens
        return self._numbering.request(told.at_s, tokens, told.keys, told.block_tokens)


def _joined(told: Sequence[bytes], keys: Sequence[bytes]) -> Sequence[bytes]:
    """What was told of a prompt, and those of `keys` that were not."""
    shared = min(len(told), len(keys))
    if told[:shared] == keys[:shared]:
        return max(told, keys, key=len)
    known = set(told)
    return [*told, *(key for key in keys if key not in known)]
