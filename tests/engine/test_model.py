"""What can be served loads and is known by its content; what cannot is refused in one line."""

import json
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MistralConfig,
    PreTrainedConfig,
    T5Config,
)

from kvtier.config import WorkerConfig
from kvtier.core.blocks import Attention, BlockLayout, LayerGroup
from kvtier.engine import smollm2
from kvtier.engine.model import LoadedModel, load
from kvtier.errors import ConfigError
from tests.launching import wait_for


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    if "smollm2" not in request.fixturenames:
        monkeypatch.setenv("KVTIER_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """A copy of the tiny model that a test may spoil."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "spoiled"))


def config(path: Path | str, **settings: object) -> WorkerConfig:
    return WorkerConfig(**{"model": str(path), "device": "cpu", "block_tokens": 16, **settings})  # type: ignore[arg-type]


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


class TestLoad:
    def test_says_what_others_must_know(self, tiny: LoadedModel, tiny_folder: Path) -> None:
        assert tiny.name == "tiny-llama"
        assert tiny.layout == BlockLayout((LayerGroup(Attention.FULL, 2, 2, 16),), 16, "float32")
        assert (tiny.max_tokens, tiny.vocab_size) == (512, 300)
        assert tiny.eos_token_ids == {2}
        assert tiny.tokenizer_files == {
            "tokenizer.json": (tiny_folder / "tokenizer.json").read_bytes()
        }
        assert not tiny.model.training

    def test_a_configured_name_and_dtype_are_taken(self, tiny_folder: Path) -> None:
        loaded = load(config(tiny_folder, name="shop", dtype="bfloat16", block_tokens=8))
        assert loaded.name == loaded.namespace().model == "shop"
        assert (loaded.layout.dtype, loaded.layout.block_tokens) == ("bfloat16", 8)
        assert loaded.model.dtype == loaded.dtype == torch.bfloat16

    @pytest.mark.model
    def test_the_built_in_model_is_smollm2(self, smollm2: LoadedModel) -> None:
        assert smollm2.name == "smollm2-135m-instruct"
        assert smollm2.layout.groups == (LayerGroup(Attention.FULL, 30, 3, 64),)
        assert (smollm2.max_tokens, smollm2.vocab_size) == (8192, 49152)
        assert smollm2.eos_token_ids == {2}
        assert set(smollm2.tokenizer_files) >= {"tokenizer.json", "chat_template.jinja"}


class TestRevision:
    def test_follows_the_content_and_not_the_place(self, tiny: LoadedModel, folder: Path) -> None:
        assert load(config(folder)).revision == tiny.revision

    def test_one_changed_weight_changes_it(self, tiny: LoadedModel, folder: Path) -> None:
        before = load(config(folder)).revision
        model = LlamaForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            model.model.layers[1].mlp.up_proj.weight[3, 5] += 1e-3
        nbytes = (folder / "model.safetensors").stat().st_size
        model.save_pretrained(folder)
        assert (folder / "model.safetensors").stat().st_size == nbytes
        assert load(config(folder)).revision != before == tiny.revision

    def test_a_changed_setting_changes_it(self, tiny: LoadedModel, folder: Path) -> None:
        change_config(folder, rms_norm_eps=1e-3)
        assert load(config(folder)).revision != tiny.revision

    def test_a_file_is_read_once_and_then_remembered(self, folder: Path) -> None:
        told: list[str] = []
        first = load(config(folder), told.append).revision
        assert any("fingerprinting" in line for line in told)
        told.clear()
        assert load(config(folder), told.append).revision == first
        assert not any("fingerprinting" in line for line in told)

    def test_a_cache_folder_that_cannot_be_written_is_no_obstacle(
        self, tiny: LoadedModel, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "file").write_text("")
        monkeypatch.setenv("KVTIER_CACHE", str(tmp_path / "file"))
        assert load(config(tiny_folder)).revision == tiny.revision


class TestRefusals:
    def refused(self, path: Path | str, **settings: object) -> str:
        with pytest.raises(ConfigError) as caught:
            load(config(path, **settings))
        message = str(caught.value)
        assert "\n" not in message
        return message

    def test_no_folder(self, tmp_path: Path) -> None:
        assert f"{tmp_path}/nothing: no such folder" in self.refused(tmp_path / "nothing")

    def test_a_hub_name_is_a_folder_that_is_missing(self) -> None:
        assert "meta-llama/Llama-3.2-1B: no such folder" in self.refused("meta-llama/Llama-3.2-1B")

    def test_no_config(self, folder: Path) -> None:
        (folder / "config.json").unlink()
        assert f"{folder}: no config.json" in self.refused(folder)

    def test_a_config_that_is_not_json(self, folder: Path) -> None:
        (folder / "config.json").write_text("{")
        assert f"{folder}: config.json" in self.refused(folder)

    def test_no_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        assert f"{folder}: no *.safetensors" in self.refused(folder)

    def test_weights_that_are_cut_off(self, folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-1000])
        assert str(folder) in self.refused(folder)

    def test_weights_that_lack_a_layer(self, folder: Path) -> None:
        change_config(folder, num_hidden_layers=3)
        assert f"{folder}: weights are missing, the first: model.layers.2" in self.refused(folder)

    @pytest.mark.parametrize(
        ("settings", "why"),
        [
            (MistralConfig(sliding_window=64), "SlidingWindow"),
            (MambaConfig(), "LinearAttention"),
            (DeepseekV3Config(), "MLA"),
            (T5Config(), "encoder"),
            (
                LlamaConfig(
                    rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
                ),
                "dynamic",
            ),
        ],
        ids=["sliding", "mamba", "mla", "encoder", "rope"],
    )
    def test_other_kinds_of_attention(
        self, folder: Path, settings: PreTrainedConfig, why: str
    ) -> None:
        settings.save_pretrained(folder)
        message = self.refused(folder)
        assert why in message
        assert f"{folder}: model type {settings.model_type}" in message
        assert "full attention" in message

    @pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
    def test_a_device_that_is_not_there(self, folder: Path) -> None:
        assert "worker.device is cuda" in self.refused(folder, device="cuda")


# With a conversion that ends when told; tests of the real model use what the real one made.
ASK = """
import shutil
import sys
import time
from pathlib import Path
from kvtier.engine import smollm2

class Tiny:
    @staticmethod
    def from_pretrained(*_, **__):
        return Tiny()

    def save_pretrained(self, folder):
        while not Path(sys.argv[1], "go").exists():
            time.sleep(0.01)
        shutil.copytree(sys.argv[2], folder, dirs_exist_ok=True)

smollm2.AutoModelForCausalLM = smollm2.AutoTokenizer = Tiny
print(smollm2.folder(Path(sys.argv[1]), lambda line: print(line.split()[0])))
"""


@pytest.mark.model
def test_two_workers_that_start_at_once_convert_once(tmp_path: Path, tiny_folder: Path) -> None:
    cache = tmp_path / "models"
    killed_earlier = cache / f".{smollm2.NAME}.tmp-abc"
    killed_earlier.mkdir(parents=True)
    command = [sys.executable, "-c", ASK, str(cache), str(tiny_folder)]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    lock = str(cache / f".{smollm2.NAME}.lock")

    def at_the_lock(pid: int) -> bool:
        for each in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                if str(each.readlink()) == lock:
                    return True
        return False

    try:
        wait_for("both to be there", lambda: all(at_the_lock(each.pid) for each in both))
        (cache / "go").touch()
        told = [each.communicate(timeout=240)[0].split() for each in both]
        path = cache / smollm2.NAME
        assert [lines[-1] for lines in told] == [str(path)] * 2
        assert sorted(len(lines) for lines in told) == [1, 2]  # one of them was converting
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {
            each.name for each in path.iterdir()
        }
        assert not killed_earlier.exists()
        assert [each.name for each in cache.glob(".*.tmp*")] == []
    finally:
        for each in both:
            each.kill()
