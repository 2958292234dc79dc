"""kvtier inside one Python program: a node daemon of its own, and a model that uses it."""

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from tokenizers import Tokenizer

from kvtier.config import WorkerConfig
from kvtier.core.blocks import Namespace
from kvtier.engine import child
from kvtier.engine import model as models
from kvtier.engine.copier import BlockTensor
from kvtier.engine.credit import Met
from kvtier.engine.sequence import Failed, Request, Started, Tokens
from kvtier.engine.tier import EngineTier
from kvtier.engine.transformers import Engine
from kvtier.errors import ConfigError


@contextlib.contextmanager
def node(
    *, host: str = "256MiB", disk: str | Path = "", disk_bytes: str = "4GiB", redis: str = ""
) -> Iterator[str]:
    """A node daemon in a process of its own, for this program; gives the path of its socket.

    It ends with the context, and with this process, however that ends. `disk` is a folder for the
    disk tier, which a later daemon finds again; `redis` the URL of a shared tier; empty: none.

    Raises:
        ConfigError: The daemon did not start; the message is its own.
    """
    with tempfile.TemporaryDirectory(prefix="kvtier-") as folder:
        socket = f"{folder}/node.sock"
        config = Path(folder) / "kvtier.toml"
        tables = f'[node]\nsocket = "{socket}"\nlisten = "127.0.0.1:0"\n[host]\nbytes = "{host}"\n'
        if disk:
            path = Path(disk).absolute()
            tables += f'[disk]\npath = "{path}"\nbytes = "{disk_bytes}"\ndrain_at = 0.0\n'
        if redis:
            tables += f'[redis]\nurl = "{redis}"\n'
        config.write_text(tables)
        command = [sys.executable, "-m", "kvtier.cli", "node", "--until-eof", "--config"]
        with (Path(folder) / "log").open("w+") as log:
            process = subprocess.Popen(  # noqa: S603 - this very program
                [*command, str(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
            )
            try:
                assert process.stdout is not None
                if "ready at" not in process.stdout.readline():
                    process.wait(child.STOP_S)
                    log.seek(0)
                    raise ConfigError(log.read().strip().rpartition("\n")[2])
                yield socket
            finally:
                child.end(process)  # which gives the daemon time to save what it holds


@dataclass(frozen=True, slots=True)
class Generation:
    """An answer, and where its prompt's KV came from."""

    text: str
    token_ids: list[int]
    prompt_tokens: int
    restored: dict[str, int]  # prompt tokens that were not computed, by tier
    computed: int  # prompt tokens


class Model:
    """A Transformers causal LM whose prompts are not computed twice. A context manager.

    Args:
        model: A folder, or "smollm2" for the built-in small one.
        socket: Of the node daemon; empty: only the VRAM pool.
        config: Everything else; its `model` and `socket` are replaced.

    Raises:
        ConfigError: The model cannot be loaded.
    """

    def __init__(
        self, model: str = "smollm2", *, socket: str = "", config: WorkerConfig | None = None
    ) -> None:
        given = config or WorkerConfig()
        self._config = WorkerConfig(
            **{name: getattr(given, name) for name in given.__slots__}
            | {"model": model, "socket": socket}
        )
        self.loaded = models.load(self._config)
        self._met = Met()
        self._tokenizer = Tokenizer.from_buffer(self.loaded.tokenizer_files["tokenizer.json"])
        self._engine = Engine(self.loaded, self._config, self._tiers)

    def _tiers(self, namespace: Namespace, storage: torch.Tensor) -> EngineTier | None:
        return attach(self._config, self._met, namespace, storage)

    def generate(
        self, prompt: str | Sequence[int], max_tokens: int = 64, *, temperature: float = 0.0,
        tenant: str = "",
    ) -> Generation:  # fmt: skip
        """Answer a prompt of text or token ids; greedy at temperature 0.

        Raises:
            InvalidRequest: The model cannot compute this.
            UnknownTenant: `tenant` is none of the config's.
        """
        ids = self._tokenizer.encode(prompt).ids if isinstance(prompt, str) else list(prompt)
        request = Request(
            token_ids=ids, max_tokens=max_tokens, temperature=temperature, tenant=tenant
        )
        answer: list[int] = []
        started: Started | None = None
        for event in self._engine.stream(request):
            match event:
                case Started():
                    started = event
                case Tokens():
                    answer += event.ids
                case Failed():
                    raise event.error
        assert started is not None
        return Generation(
            self._tokenizer.decode(answer),
            answer,
            started.prompt_tokens,
            {tier.label: tokens for tier, tokens in started.restored.items()},
            started.computed_tokens,
        )

    def forget(self) -> int:
        """Empty VRAM; the lower tiers keep what they have. The number of blocks dropped."""
        return self._engine.clear().result()

    def close(self) -> None:
        """Free the model. Idempotent."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def attach(
    config: WorkerConfig, met: Met, namespace: Namespace, storage: torch.Tensor
) -> EngineTier | None:
    """The tiers under a pool of blocks, reached through the daemon that `config` names, if any.

    An engine that does so more than once, for a thread each, gives the same `met`.
    """
    if not config.socket:
        return None
    paged = BlockTensor(namespace.layout, storage)
    return EngineTier(
        config.socket, namespace, paged, wait_s=config.wait_s, pin=storage.is_cuda, met=met
    )
