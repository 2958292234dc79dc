"""What of a request goes to the node daemon as plain numbers."""

from kvtier.core.breakeven import ComputeCost
from kvtier.core.policy import Use
from kvtier.wire import local


def costs(compute: ComputeCost | None) -> tuple[int, int]:
    """What a block costs to be computed: us, and ns more for each before it; 0: not known."""
    if compute is None:
        return 0, 0
    return max(1, int(compute.block_s * 1e6)), int(compute.growth_s * 1e9)


def told(use: Use) -> tuple[int, int]:
    """Whose request it is, 0: nobody's, and its tokens of output, -1: not known. Not its time."""
    output = -1 if use.output_tokens is None else min(use.output_tokens, local.MAX_OUTPUT)
    return use.request or 0, output
