"""Runs benchmarks: `python benchmarks/run.py NAME [--json FILE] [--tiny]`; NAME may be `all`.

One file a question. Each prints a table, and a line for each bar; 1 if a bar does not hold.
"""

import argparse
import importlib
import inspect
import sys
from pathlib import Path

# In place of this folder, where a benchmark may have the name of a package.
sys.path.pop(0)
sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.common import machine, write_json

NAMES = (
    "evict",
    "ledger",
    "match",
    "host_path",
    "disk",
    "redis",
    "peer",
    "cascade",
    "codec",
    "restore",
    "demo",
    "index",
    "route",
    "route_growth",
    "route_sim",
)
ALONE = ("vllm",)  # each needs a venv of its own, so `all` leaves it out


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("name", choices=[*NAMES, *ALONE, "all"])
    parser.add_argument("--json", type=Path, help="write the figures there (of `all`: a folder)")
    parser.add_argument("--tiny", action="store_true", help="a size that only shows that it runs")
    parser.add_argument(
        "--peers", default="", metavar="PYTHON", help="see route.py, index.py and vllm.py here"
    )
    options = parser.parse_args()
    failed = False
    for name in NAMES if options.name == "all" else (options.name,):
        before = machine()
        benchmark = importlib.import_module(f"benchmarks.{name}").run
        takes = inspect.signature(benchmark).parameters
        more = {"peers": options.peers} if options.peers and "peers" in takes else {}
        result = benchmark(tiny=options.tiny, **more)
        result = {"benchmark": name, "machine": before, **result}
        show(result)
        failed |= not all(bar["holds"] for bar in result["bars"])
        if options.json:
            folder = options.name == "all"
            if folder:
                options.json.mkdir(parents=True, exist_ok=True)
            write_json(options.json / f"{name}.json" if folder else options.json, result)
    return int(failed and not options.tiny)


def show(result: dict) -> None:
    print(f"== {result['benchmark']}")
    for name, times in _rows(result["times"]):
        print(
            f"  {name:26} min {times['min_s'] * 1e3:10.3f} ms   median "
            f"{times['median_s'] * 1e3:10.3f} ms   p99 {times['p99_s'] * 1e3:10.3f} ms"
        )
    for bar in result["bars"]:
        limit = f">= {bar['at_least']}" if "at_least" in bar else f"<= {bar['at_most']:.4g}"
        print(
            f"  {'holds ' if bar['holds'] else 'MISSED'} {bar['name']}: {bar['value']:.4g} {limit}"
        )


def _rows(times: dict, prefix: str = "") -> list:
    if "median_s" in times:
        return [(prefix.strip(), times)]
    return [row for name, each in times.items() for row in _rows(each, f"{prefix} {name}")]


if __name__ == "__main__":
    raise SystemExit(main())
