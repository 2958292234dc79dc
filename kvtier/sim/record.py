"""From recorded requests to a trace: keys become numbers, so that no prompt can be guessed."""

from collections.abc import Sequence

from kvtier.errors import ConfigError
from kvtier.sim.trace import Request

MAX_BLOCKS = 1 << 25  # that one recording tells apart: about 5 GB of memory


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
