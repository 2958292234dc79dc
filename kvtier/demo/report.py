"""What the demo prints, and what it writes to a file."""

import statistics
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from kvtier.core.tiers import Tier
from kvtier.demo.record import Record

_TIERS = [tier.label for tier in Tier]


def show_header(console: Console) -> None:
    """The line over the requests."""
    names = "".join(f"{name:>7}" for name in _TIERS)
    line = f"{'request':23}{'node':>5}{names}{'computed':>10}{'1st token':>11}"
    console.print(f"[dim]{line}[/dim]")


def show_request(console: Console, record: Record) -> None:
    """One request, in two lines: what it did, and why it went there."""
    restored = "".join(f"{record.restored.get(name, 0) or '-':>7}" for name in _TIERS)
    attempts = f" (attempt {record.attempts})" if record.attempts > 1 else ""
    console.print(
        f"{record.name:23}{record.node:>5}{restored}{record.computed:>10}"
        f"{record.ttft_s:>9.2f} s{attempts}",
        highlight=False,
        soft_wrap=True,
    )
    console.print(f"  [dim]{record.why}[/dim]", highlight=False, soft_wrap=True)


def by_kind(records: Sequence[Record]) -> dict[str, dict[str, float]]:
    """Median time to first token and hit tokens of cold requests and of each tier's."""
    rows: dict[str, dict[str, float]] = {}
    for kind in ("cold", *_TIERS):
        times = [each.ttft_s for each in records if each.kind == kind and each.ids]
        tokens = sum(each.restored.get(kind, 0) for each in records)
        median = statistics.median(times) if times else 0.0
        cold = rows["cold"]["median_ttft_s"] if rows else median
        rows[kind] = {
            "requests": len(times),
            "median_ttft_s": median,
            "share_of_cold": median / cold if cold else 0.0,
            "hit_tokens": tokens,
        }
    return rows


def show_table(console: Console, rows: Mapping[str, Mapping[str, float]]) -> None:
    """Cold against restored."""
    table = Table(title="time to first token, by where most of the prompt came from")
    for name in ("from", "requests", "hit tokens", "median", "against cold"):
        table.add_column(name, justify="left" if name == "from" else "right")
    cold = rows["cold"]["median_ttft_s"]
    for kind, row in rows.items():
        median = row["median_ttft_s"]
        ratio = f"1/{cold / median:.1f}" if median and kind != "cold" else ""
        table.add_row(
            kind, f"{row['requests']:.0f}", f"{row['hit_tokens']:,.0f}",
            f"{median:.2f} s" if median else "-", ratio,
        )  # fmt: skip
    console.print()
    console.print(table)


def verdict(records: Sequence[Record], rows: Mapping[str, Mapping[str, float]]) -> dict[str, bool]:
    """What the demo promises; it ends with 0 only if all of it is true."""
    answered = [each for each in records if each.ids]
    equal = [each for each in answered if each.equal_loads]
    cut = [each for each in records if each.cut]
    return {
        "every answer is what it would have been without kvtier": bool(answered)
        and all(each.identical for each in answered),
        "every tier served at least one hit": all(rows[tier]["hit_tokens"] > 0 for tier in _TIERS),
        "the node picked was the warmest whenever loads were equal": bool(equal)
        and all(each.picked_warmest for each in equal),
        "only the stream that was cut off ended with an error": len(cut) == 1
        and all(each.ids and not each.error for each in records if not each.cut),
    }


def show_verdict(
    console: Console, verdicts: Mapping[str, bool], compared: str, seconds: float
) -> None:
    """The promises, and what the answers were compared with."""
    console.print()
    for text, holds in verdicts.items():
        mark = "[green]yes[/green]" if holds else "[red]NO [/red]"
        console.print(f"  {mark}  {text}")
    console.print(f"       ({compared})", highlight=False, soft_wrap=True)
    console.print(f"\n{seconds:.0f} s in all", highlight=False)
