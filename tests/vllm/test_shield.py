"""What vLLM's scheduler calls: a bug of ours there, or another release's shapes, is a miss."""

import importlib
import warnings
from collections.abc import Iterator
from types import SimpleNamespace
from typing import TYPE_CHECKING

import numpy as np
import pytest

from tests.launching import wait_for

if TYPE_CHECKING:
    from vllm.v1.kv_offload.tiering.base import JobResult

    from kvtier.engine.vllm.tier import KvtierTier

KEYS = [bytes([n]) * 32 + bytes(4) for n in range(2)]


@pytest.fixture(scope="module")
def made() -> "type[KvtierTier]":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's and vLLM's own, as they are loaded
        made: type[KvtierTier] = importlib.import_module("kvtier.engine.vllm.tier").KvtierTier
        return made


@pytest.fixture
def tier(tmp_path, made) -> "Iterator[KvtierTier]":
    spec = SimpleNamespace(tokens_per_hash=16, blocks_per_chunk=1)
    region = memoryview(np.zeros((8, 4096), np.int8))
    it = made(spec, region, "kvtier", socket=str(tmp_path / "node.sock"))
    yield it
    it.shutdown()


def job(number: int, **other: object) -> SimpleNamespace:
    context = SimpleNamespace(req_id="r", get_offload_key_position=lambda key: 0)
    shape = {"job_id": number, "keys": KEYS, "chunk_ids": np.array([0, 1]), "req_context": context}
    return SimpleNamespace(**(shape | other))


def ended(tier: "KvtierTier", numbers: set[int]) -> "dict[int, JobResult]":
    found: list[JobResult] = []

    def all_there() -> bool:
        found.extend(tier.get_finished_jobs())
        return {each.job_id for each in found} >= numbers

    wait_for("jobs to end", all_there)
    assert len(found) == len(numbers), "each is told once: vLLM asserts it"
    return {each.job_id: each for each in found}


def test_jobs_of_another_shape_are_missed_and_counted(tier, caplog):
    tier.submit_load(job(1, chunk_ids=None))
    tier.submit_load(job(2, chunk_ids=None))
    tier.submit_store(job(3, req_context=SimpleNamespace()))
    tier.submit_load(SimpleNamespace(job_id=4))
    results = ended(tier, {1, 2, 3, 4})
    assert not any(each.success for each in results.values())
    assert list(tier.get_finished_jobs()) == []
    said = [line for line in caplog.messages if "a bug of kvtier's is a miss" in line]
    assert len(said) == 2, "each kind once: " + "; ".join(said)
    assert tier.get_stats() is not None


def test_a_result_that_cannot_be_made_is_a_miss_told_once(tier, monkeypatch):
    monkeypatch.setattr(tier, "_stats", SimpleNamespace())  # another release's
    tier.submit_load(job(1))
    tier.submit_store(job(2))
    results = ended(tier, {1, 2})
    assert not any(each.success for each in results.values())
    assert tier.get_stats() is None


def test_a_request_of_another_shape_ends(tier):
    tier.on_request_finished(SimpleNamespace())
    assert tier.lookup(KEYS[0], SimpleNamespace()).name == "MISS"
