"""What the demo must know of an engine, and how its answers are checked without kvtier."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Protocol

from kvtier.config import WorkerConfig
from kvtier.demo import identity
from kvtier.demo.record import Record
from kvtier.engine import model as models
from kvtier.engine.model import LoadedModel
from kvtier.errors import ConfigError

Progress = Callable[[str], None]


class DemoEngine(Protocol):
    """One kind of engine with the demo's model."""

    tokenizer_files: dict[str, bytes]
    max_tokens: int  # of prompt and answer
    block_tokens: int
    block_nbytes: int
    line: str  # what is served, for people
    gives_logits: bool  # with an answer's first token

    def check(self, worker: WorkerConfig, records: Sequence[Record], progress: Progress) -> str:
        """Fill in `identical` of every request that gave tokens; what was compared, in words."""
        ...


def demo_engine(name: str, model: str, progress: Progress) -> DemoEngine:
    """The engine of that name.

    Raises:
        ConfigError: It is not installed, or takes no such model.
    """
    if name == "vllm":
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError(
                "--engine vllm: vLLM is not installed in this Python; run the demo from an "
                "environment that has it, see docs/vllm.md"
            )
        from kvtier.demo.on_vllm import OnVllm

        return OnVllm(model, progress)
    return OnTransformers(models.load(WorkerConfig(model=model), progress))


class OnTransformers:
    """The worker's own engine; the model is loaded here too, to compute every answer again."""

    gives_logits = True

    def __init__(self, loaded: LoadedModel) -> None:
        layout = loaded.layout
        self._loaded = loaded
        self.tokenizer_files = loaded.tokenizer_files
        self.max_tokens = loaded.max_tokens
        self.block_tokens = layout.block_tokens
        self.block_nbytes = layout.nbytes
        self.line = f"model {loaded.name}, {layout.dtype} on {loaded.device}"

    def check(self, worker: WorkerConfig, records: Sequence[Record], progress: Progress) -> str:
        """See `DemoEngine`."""
        identity.check(
            self._loaded, records, worker.prefill_tokens, lambda record: progress(record.name)
        )
        answered = [each for each in records if each.identical is not None]
        exact = sum(each.logits_difference == 0.0 for each in answered)
        worst = max((each.logits_difference for each in answered), default=0.0)
        return (
            f"{len(answered)} answers compared, {exact} with bit-identical logits; "
            f"largest difference of a logit {worst:.2g}"
        )
