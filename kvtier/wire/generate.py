"""Generates kvtier/wire/pb from protos/: `python -m kvtier.wire.generate [--check]`."""

import re
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).parent
PROTOS = HERE.parent.parent / "protos"
# protoc writes imports after the proto package; ours live under kvtier.wire.pb.
_IMPORT = re.compile(r"^from kvtier\.v1 import", re.MULTILINE)
_MYPY_IMPORT = re.compile(r"\bkvtier\.v1\b(?=[ .]\w+_pb2)")


def generate(out: Path) -> None:
    """Write the modules for every proto below `PROTOS` into the folder `out`, flat."""
    import grpc_tools  # a build tool: only there in a development setup
    from grpc_tools import protoc

    with tempfile.TemporaryDirectory() as scratch:
        files = sorted(str(path) for path in PROTOS.rglob("*.proto"))
        known = Path(grpc_tools.__file__).parent / "_proto"  # google/protobuf/*.proto
        flags = [
            f"-I{PROTOS}",
            f"-I{known}",
            f"--python_out={scratch}",
            f"--grpc_python_out={scratch}",
        ]
        if protoc.main(["protoc", *flags, f"--pyi_out={scratch}", *files]) != 0:
            raise SystemExit("protoc failed")
        for path in sorted(Path(scratch).rglob("*.py*")):
            text = _IMPORT.sub("from kvtier.wire.pb import", path.read_text())
            (out / path.name).write_text(_MYPY_IMPORT.sub("kvtier.wire.pb", text))


def stale() -> list[str]:
    """Names of generated modules that differ from what protos/ gives now."""
    with tempfile.TemporaryDirectory() as scratch:
        generate(Path(scratch))
        fresh = {path.name: path.read_text() for path in Path(scratch).iterdir()}
    have = {p.name: p.read_text() for p in (HERE / "pb").glob("*_pb2*")}
    return sorted(name for name in fresh.keys() | have.keys() if fresh.get(name) != have.get(name))


def main() -> int:
    """Generate, or with --check only say what is stale; 1 if anything is."""
    if "--check" not in sys.argv[1:]:
        generate(HERE / "pb")
        return 0
    names = stale()
    if names:
        sys.stderr.write(f"stale generated code, run `make proto`: {', '.join(names)}\n")
    return 1 if names else 0


if __name__ == "__main__":
    raise SystemExit(main())
