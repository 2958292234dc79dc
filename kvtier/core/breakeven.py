"""Whether loading blocks from a lower tier beats computing them again.

A prefix is restored from its root on, so the question is not asked of single blocks but of how
many leading ones: early blocks may cost more to load than to compute and still pay, by giving
access to later ones. Attention makes later blocks dearer to compute, never dearer to load.
"""

from collections.abc import Sequence
from dataclasses import dataclass


def doubles_at(*, parameters: float, layers: float, width: float) -> float:
    """The position whose token takes twice as long to compute as a prompt's first; 0: none does.

    There attention's operations, `4 layers width position`, are as many as the parameters',
    `2 parameters` (Kaplan et al. 2020, section 2.1). `width` is that of all query heads together.
    """
    return parameters / (2 * layers * width) if layers and width else 0.0


def as_first(start: int, stop: int, doubles_at: float) -> float:
    """How many tokens at the start of a prompt take as long as those from `start` to `stop`.

    As many as they are where `doubles_at` is 0, which means that it is not known.
    """
    tokens = float(stop - start)
    return tokens + (stop * stop - start * start) / (2 * doubles_at) if doubles_at else tokens


@dataclass(frozen=True, slots=True)
class ComputeCost:
    """Seconds to compute a prompt's block number i: `block_s + i * growth_s`.

    Raises:
        ValueError: One of them is negative or no number.
    """

    block_s: float
    growth_s: float = 0.0

    def __post_init__(self) -> None:
        for name in self.__slots__:
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise ValueError(f"{name} is {value}, must be 0 or more")

    @classmethod
    def of_model(
        cls, *, flops_per_s: float, parameters: float, layers: int, width: int, block_tokens: int
    ) -> "ComputeCost":
        """Of a dense transformer: a token at position p takes `2 parameters + 4 layers width p`.

        `flops_per_s` is what a prefill reaches, `width` the model's hidden size.
        """
        attention = 4.0 * layers * width
        first = 2.0 * parameters + attention * (block_tokens - 1) / 2
        return cls(
            block_s=block_tokens * first / flops_per_s,
            growth_s=block_tokens * attention * block_tokens / flops_per_s,
        )

    def mean(self, first: int, stop: int) -> "ComputeCost":
        """The same for each of the blocks [first, stop), at least one: their average."""
        return ComputeCost(self.block_s + (first + stop - 1) / 2 * self.growth_s)


def worth_loading(
    sources: Sequence[int], first: int, compute: ComputeCost, load_s: Sequence[float]
) -> int:
    """How many leading blocks to load: the number that saves the most time, 0 if none does.

    Args:
        sources: For each block that could be had, the tier that it would come from.
        first: Number of the first of them in its prompt.
        compute: What computing them again costs.
        load_s: Seconds that a block takes from each tier; 0 where nothing was measured yet, so
            that a tier is tried before it is judged.
    """
    best, most, saved = 0, 0.0, 0.0
    for index, source in enumerate(sources):
        saved += compute.block_s + (first + index) * compute.growth_s - load_s[source]
        if saved >= most:
            best, most = index + 1, saved
    return best
