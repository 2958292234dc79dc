"""What the tests with whole processes share: ports that last, servers, a tiny model, leftovers."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM

from kvtier.testing.valkey import ValkeyServer
from tests.launching import fixed_ports, wait_for

VOCAB = 300


def processes_in(folder: Path) -> dict[int, str]:
    """The processes, this one left out, that have to do with `folder`: command lines by id."""
    found = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit() or int(entry.name) == os.getpid():
            continue
        try:
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            where = str((entry / "cwd").readlink())
        except OSError:  # gone, or none of ours
            continue
        if str(folder) in command or where.startswith(str(folder)):
            found[int(entry.name)] = command
    return found


def fds(pid: int) -> int:
    """Descriptors that a process has open."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@pytest.fixture(autouse=True)
def nothing_stays(tmp_path: Path) -> Iterator[None]:
    """Whatever a test starts has ended by its end; if not, it does here, and the test fails."""
    yield
    try:
        wait_for("every process to be gone", lambda: not processes_in(tmp_path))
    finally:
        for pid in processes_in(tmp_path):
            os.kill(pid, signal.SIGKILL)


@pytest.fixture(autouse=True)
def one_thread_each(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Many processes share few cores; and none writes into the user's cache folder."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("KVTIER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def valkey(tmp_path: Path, nothing_stays: None) -> Iterator[ValkeyServer]:
    (port,) = fixed_ports(1)
    with ValkeyServer(port, tmp_path / "valkey") as server:
        yield server


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Transformers folder: a random model with 2 KiB of KV a token, and a tokenizer of words."""
    torch.manual_seed(7)
    config = LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCAB,
        max_position_embeddings=512,
        eos_token_id=2,
        bos_token_id=1,
        initializer_range=0.2,  # far from uniform, so that a wrong number changes the answer
    )
    path = tmp_path_factory.mktemp("models") / "tiny-llama"
    LlamaForCausalLM(config).save_pretrained(path)
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"w{n}": n for n in range(3, VOCAB)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(path / "tokenizer.json"))
    return path
