"""Coverage-guided fuzzing of one target: `python -m tests.fuzz.run NAME [libFuzzer flags]`.

Finds are written to the current folder. Seeds are tests/fuzz/corpus/NAME; what is new goes to a
folder that is given first among the flags.
"""

import sys
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["kvtier"]):
    from tests.fuzz.targets import TARGETS, once

CORPUS = Path(__file__).parent / "corpus"


def main() -> None:
    name, *flags = sys.argv[1:]
    target = TARGETS[name]
    seeds = CORPUS / name
    folders = [str(seeds)] if seeds.is_dir() else []
    limits = ["-rss_limit_mb=768", "-max_len=16384", "-print_final_stats=1"]
    atheris.Setup([sys.argv[0], *flags, *folders, *limits], lambda data: once(target, data))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
