"""Writes docs/performance.md out of benchmarks/results/*.json: `python benchmarks/table.py`."""

import json
from pathlib import Path

ROOT = Path(__file__).parent.parent
HEAD = """# Performance

Written by `python benchmarks/table.py` from what `benchmarks/run.py NAME --json
benchmarks/results/NAME.json` measured; [benchmarks.md](benchmarks.md) says what each one is.
Times are noisy on a machine that others use: trust ratios, and CPU seconds before wall time.
"""


def page(results: list[dict]) -> str:
    return "\n".join([HEAD, *(section(each) for each in results)])


def section(result: dict) -> str:
    machine = result["machine"]
    where = f"{machine['cpu']}, {machine['cores']} cores, Python {machine['python']}; "
    where += f"load {machine['load_1min']:.1f} at the start."
    lines = [
        f"## {result['benchmark']}",
        "",
        where,
        "",
        "| case | n | min ms | median ms | p99 ms |",
        "|---|---|---|---|---|",
        *rows(result["times"]),
        "",
        "| bar | measured | wanted | |",
        "|---|---|---|---|",
    ]
    for bar in result["bars"]:
        limit = (
            f"at least {bar['at_least']}" if "at_least" in bar else f"at most {bar['at_most']:.4g}"
        )
        holds = "holds" if bar["holds"] else "**missed**"
        lines.append(f"| {bar['name']} | {bar['value']:.4g} | {limit} | {holds} |")
    return "\n".join([*lines, ""])


def rows(times: dict, prefix: str = "") -> list[str]:
    if "median_s" in times:
        values = [times[name] * 1e3 for name in ("min_s", "median_s", "p99_s")]
        return [
            f"| {prefix.strip()} | {times['n']} | " + " | ".join(f"{v:.3g}" for v in values) + " |"
        ]
    return [row for name, each in times.items() for row in rows(each, f"{prefix} {name}")]


def main() -> None:
    files = sorted((ROOT / "benchmarks/results").glob("*.json"))
    text = page([json.loads(file.read_text()) for file in files])
    (ROOT / "docs/performance.md").write_text(text)


if __name__ == "__main__":
    main()
