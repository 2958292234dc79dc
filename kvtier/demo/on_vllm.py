"""The demo's workers on vLLM, and vLLM without kvtier to compare with."""

import json
import logging
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Final

from kvtier.config import WorkerConfig, cache_dir
from kvtier.demo.engines import Progress
from kvtier.demo.record import Record
from kvtier.engine import child, smollm2
from kvtier.engine.vllm.served import alone, describe
from kvtier.engine.vllm.spaces import Spaces
from kvtier.errors import KVTierError

_ITEMSIZES: Final = {"float32": 4, "bfloat16": 2, "float16": 2}
_TAIL: Final = 2000  # characters of a log


class OnVllm:
    """vLLM's engine in the worker's process. Nothing is loaded here: an engine takes memory."""

    gives_logits = False

    def __init__(self, model: str, progress: Progress) -> None:
        folder = smollm2.folder(cache_dir(), progress) if model == "smollm2" else Path(model)
        worker = WorkerConfig(model=model)
        said = describe(
            folder, worker.name, alone(folder), block_tokens=worker.block_tokens, max_tokens=0,
            events="", replay="", spaces=Spaces(),
        )  # fmt: skip
        self._folder = folder
        self.tokenizer_files = said.tokenizer_files
        self.max_tokens = said.max_tokens
        self.block_tokens = worker.block_tokens
        # `describe` counts two bytes a number.
        nbytes = said.kv_bytes_per_token * _ITEMSIZES[worker.dtype] // 2
        self.block_nbytes = nbytes * worker.block_tokens
        self.line = f"model {said.model}, {worker.dtype}, on vLLM"

    def check(self, worker: WorkerConfig, records: Sequence[Record], progress: Progress) -> str:
        """See `DemoEngine`.

        vLLM without kvtier gets the same requests in the same order, and its own prefix cache
        gives it what the workers found or restored; see `kvtier.engine.vllm.reference`.
        """
        compared = same = 0
        # Nothing of it may be pushed out: the cache is the history.
        tokens = sum(len(record.prompt_ids) + len(record.ids) for record in records)
        vram = tokens // self.block_tokens * self.block_nbytes + (64 << 20)
        with _reference(self._folder, worker, vram) as ask:
            for record in records:
                if not record.ids:
                    continue
                progress(record.name)
                ids, cached = ask(record)
                record.identical = ids == record.ids
                compared += 1
                same += cached == record.hit_tokens
        return (
            f"{compared} answers compared token by token, {same} of them with vLLM's own prefix "
            "cache ending where the restored tokens did"
        )


class _Ask:
    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def send(self, value: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(value) + "\n")
        self._process.stdin.flush()

    def __call__(self, record: Record) -> tuple[list[int], int]:
        """The greedy answer that vLLM alone gives, and its hit in tokens."""
        self.send(
            {"prompt": record.prompt_ids, "hit": record.hit_tokens, "tokens": len(record.ids)}
        )
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise KVTierError("vLLM without kvtier ended")
        ids, cached = json.loads(line)
        return [int(each) for each in ids], int(cached)


@contextmanager
def _reference(folder: Path, worker: WorkerConfig, vram_bytes: int) -> Iterator[_Ask]:
    """An engine without kvtier, in a process of its own."""
    settings = {
        **{key: value for key, value in asdict(worker).items() if not isinstance(value, tuple)},
        "vram_bytes": vram_bytes,
    }
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "kvtier.engine.vllm.reference"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        )  # fmt: skip
        try:
            ask = _Ask(process)
            ask.send({"model": str(folder), "worker": settings})
            yield ask
        except (KVTierError, BrokenPipeError, ValueError) as error:
            log.seek(0)
            logging.getLogger(__name__).warning(
                "vLLM without kvtier wrote:\n%s", log.read()[-_TAIL:]
            )
            raise KVTierError(str(error)) from None
        finally:
            child.end(process)
