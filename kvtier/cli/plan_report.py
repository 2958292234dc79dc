"""How `kvtier plan` prints what it found."""

from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from kvtier.sim.plan import Outcome, TierSize
from kvtier.sim.shapes import Shape


def show(
    shape: Shape,
    token_nbytes: float,
    tiers: Sequence[TierSize],
    present: Outcome | None,
    more: Mapping[str, Outcome | None],
) -> None:
    """Print the tiers, the times, and what 100 GB more of each would change."""
    console = Console(highlight=False)
    console.print(
        f"{shape.name}: {token_nbytes / 1024:,.6g} KiB of KV a token, "
        f"{shape.weights / 1e9:,.3g} billion weights"
    )
    console.print(_tiers(token_nbytes, tiers, present))
    if present is None:
        console.print("give --trace FILE or --workload for hit ratios and times to first token")
        return
    console.print(
        f"{present.requests:,} requests, {present.tokens:,} prompt tokens, "
        f"{present.hit_ratio:.1%} of them need no computing"
    )
    console.print(_times(present))
    console.print(_more(present, more))
    console.print(
        "Assumed: the router finds the node that has a prefix, so that the nodes' memories count "
        "as one; lower tiers also keep what is warmer; a load and the prefill after it do not "
        "overlap; no request waits for another (times are of an idle engine)."
    )


def _tiers(token_nbytes: float, tiers: Sequence[TierSize], present: Outcome | None) -> Table:
    table = Table("tier", "size", "tokens")
    for column in table.columns[1:]:
        column.justify = "right"
    if present:
        table.add_column("of all tokens found here", justify="right")
    for n, tier in enumerate(tiers):
        row = [tier.name, f"{tier.nbytes / 1e9:,.1f} GB", f"{int(tier.nbytes / token_nbytes):,}"]
        table.add_row(*row, *([f"{present.hits[n]:.1%}"] if present else []))
    return table


def _times(present: Outcome) -> Table:
    table = Table("time to first token", "mean", "p50", "p99")
    for column in table.columns[1:]:
        column.justify = "right"
    rows = {
        "without any cache": (present.cold_mean_s, present.cold_p50_s, present.cold_p99_s),
        "with these tiers": (present.mean_s, present.p50_s, present.p99_s),
    }
    for name, values in rows.items():
        table.add_row(name, *(f"{value:.3f} s" for value in values))
    return table


def _more(present: Outcome, more: Mapping[str, Outcome | None]) -> Table:
    table = Table("100 GB more of", "tokens found", "mean time to first token")
    for column in table.columns[1:]:
        column.justify = "right"
    for name, outcome in more.items():
        if outcome:
            gained = outcome.hit_ratio - present.hit_ratio
            share = 1 - outcome.mean_s / present.mean_s if present.mean_s else 0.0
            change = _signed(-share, 1)
            table.add_row(name, _signed(gained, 2), f"{outcome.mean_s:.3f} s ({change})")
    return table


def _signed(share: float, digits: int) -> str:
    """A change in percent; what rounds to nothing has no minus."""
    return f"{round(share, digits + 2) + 0.0:+.{digits}%}"
