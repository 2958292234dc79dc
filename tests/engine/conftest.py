"""Models for the engine's tests: a tiny random one, and the real small one."""

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from kvtier.config import WorkerConfig
from kvtier.engine.model import LoadedModel, load
from tests.engine.support import BLOCK
from tests.launching import DEADLINE_S

VOCAB = 300


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A daemon that takes an engine in slowly, on a busy machine, costs these tests no call."""
    monkeypatch.setattr("kvtier.engine.tier.ATTACH_S", DEADLINE_S)


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Transformers folder of a random model of two layers."""
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        eos_token_id=2,
        bos_token_id=1,
        initializer_range=0.2,  # far from uniform, so that a wrong number changes the answer
    )
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    LlamaForCausalLM(config).save_pretrained(path)
    (path / "tokenizer.json").write_bytes(b'{"version": "1.0"}')
    return path


@pytest.fixture(scope="session")
def tiny(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    """The tiny model, loaded in float32 on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVTIER_CACHE", str(tmp_path_factory.mktemp("cache")))
        return load(WorkerConfig(model=str(tiny_folder), device="cpu", block_tokens=BLOCK))


@pytest.fixture(scope="session")
def smollm2() -> LoadedModel:
    """SmolLM2-135M-Instruct in float32 on the CPU; converted once into the user's cache folder."""
    return load(WorkerConfig(device="cpu", block_tokens=BLOCK))
