"""Tenants and adapters of an engine of vLLM's."""

import re
from pathlib import Path

import pytest

from kvtier.config import AdapterConfig, TenantConfig, WorkerConfig
from kvtier.core.vllm_keys import prompt_keys
from kvtier.engine.vllm.spaces import Spaces, adapters_revision, spaces_of
from kvtier.errors import ConfigError, UnknownModel, UnknownTenant

NONE, ROOT = b"n" * 32, b"r" * 32
TOKENS = list(range(12))


def worker(folder: Path, *, secret: str = "0123456789abcdef", **more: object) -> WorkerConfig:
    (folder / "red").write_text(secret)
    (folder / "blue").write_text("another secret, as long")
    tenants = tuple(TenantConfig(name=n, secret_file=str(folder / n)) for n in ("red", "blue"))
    return WorkerConfig(tenants=tenants, **more)


def keys(spaces: Spaces) -> dict[tuple[str, str], tuple[bytes, ...]]:
    return {
        (adapter, tenant): tuple(prompt_keys(root, TOKENS, 4))
        for adapter, tenant, root in spaces.roots(NONE, ROOT)
    }


def test_equal_tokens_of_two_spaces_are_different_blocks(tmp_path):
    adapters = tuple(AdapterConfig(name=n, path=f"/{n}") for n in ("poet", "clerk"))
    found = keys(spaces_of(worker(tmp_path, adapters=adapters), ROOT))
    assert set(found) == {
        (adapter, tenant) for adapter in ("", "poet", "clerk") for tenant in ("", "red", "blue")
    } - {("", "")}
    every = [key for some in found.values() for key in some] + prompt_keys(NONE + ROOT, TOKENS, 4)
    assert len(set(every)) == 9 * 3


def test_a_tenants_blocks_hang_on_its_secret_and_on_the_weights(tmp_path):
    one = spaces_of(worker(tmp_path), ROOT)
    assert keys(one) == keys(spaces_of(worker(tmp_path), ROOT)), "on every node alike"
    other = spaces_of(worker(tmp_path, secret="fedcba9876543210"), ROOT)
    assert keys(one)["", "red"] != keys(other)["", "red"]
    assert keys(one)["", "blue"] == keys(other)["", "blue"]
    assert one.salts["red"] != spaces_of(worker(tmp_path), b"w" * 32).salts["red"]
    assert not any(salt in repr(one) for salt in one.salts.values())


def test_unknown_names_are_refused(tmp_path):
    spaces = spaces_of(worker(tmp_path, adapters=(AdapterConfig(name="poet", path="/p"),)), ROOT)
    spaces.check("poet", "red")
    spaces.check("", "")
    with pytest.raises(UnknownModel, match="adapter 'cook' is not served here"):
        spaces.check("cook", "red")
    with pytest.raises(UnknownTenant, match="tenant 'green' is not known"):
        spaces.check("poet", "green")


@pytest.mark.parametrize(
    ("adapters", "line"),
    [
        ([("", "/p")], "worker.adapters[0].name has 0 bytes, must have 1 to 253"),
        ([("a", "/" * 513)], "worker.adapters[0].path has 513 bytes, must have 1 to 512"),
        ([("a", "/p"), ("a", "/q")], "worker.adapters[1].name is 'a', which another has too"),
        (
            [(f"a{n}", "/p") for n in range(1366)],
            "2 worker.tenants and 1366 worker.adapters make 4100 spaces, limit 4096",
        ),
    ],
)
def test_adapters_that_make_no_sense_end_in_one_line(tmp_path, adapters, line):
    some = tuple(AdapterConfig(name=name, path=path) for name, path in adapters)
    with pytest.raises(ConfigError, match=re.escape(line)):
        spaces_of(worker(tmp_path, adapters=some), ROOT)


def test_adapters_are_known_by_their_content(tmp_path):
    def made(name: str, weights: bytes) -> AdapterConfig:
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        (folder / "adapter_config.json").write_text("{}")
        (folder / "adapter_model.safetensors").write_bytes(weights)
        return AdapterConfig(name="poet", path=str(folder))

    def revision(*adapters: AdapterConfig) -> str:
        return adapters_revision(WorkerConfig(adapters=adapters), lambda _: None)

    one = revision(made("a", b"1"))
    assert revision() == ""
    assert revision(made("b", b"1")) == one, "wherever they lie"
    assert revision(made("c", b"2")) != one
    with pytest.raises(ConfigError, match=r"no \*\.safetensors"):
        revision(AdapterConfig(name="poet", path=str(tmp_path)))
