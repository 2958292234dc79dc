"""Which weights a model folder holds: a fingerprint of their content."""

import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

from kvtier.config import cache_dir
from kvtier.errors import ConfigError

KINDS: Final = ("*.safetensors",)


def revision(
    path: Path,
    progress: Callable[[str], None],
    kinds: Sequence[str] = KINDS,
    settings: str = "config.json",
) -> str:
    """A fingerprint of the folder's weights and settings, by content and not by name or date.

    `kinds` are patterns of weight files; of the first that any file matches, all count. `settings`
    is the file beside them.

    Raises:
        ConfigError: There are no weights, or a file cannot be read.
    """
    weights = next((found for kind in kinds if (found := sorted(path.glob(kind)))), [])
    if not weights:
        raise ConfigError(f"worker.model {path}: no {' or '.join(kinds)}")
    whole = hashlib.sha256((path / settings).read_bytes())
    for file in weights:
        whole.update(f"{file.name} {_digest(file, progress)}\n".encode())
    return whole.hexdigest()[:16]


def _digest(file: Path, progress: Callable[[str], None]) -> str:
    """SHA-256 of a file; remembered in the cache folder while its size and date stay the same."""
    stat = file.stat()
    identity = json.dumps([str(file.resolve()), stat.st_size, stat.st_mtime_ns])
    name = hashlib.sha256(identity.encode()).hexdigest()
    known = cache_dir() / "digests" / name
    try:
        text = known.read_text()
        if len(text) == hashlib.sha256().digest_size * 2:
            return text
    except OSError:
        pass  # not known yet
    progress(f"fingerprinting {file}")
    with file.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    try:
        known.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=known.parent, delete=False) as scratch:
            scratch.write(digest)
        Path(scratch.name).replace(known)
    except OSError as error:
        progress(f"fingerprint of {file} not remembered: {error}")
    return digest
