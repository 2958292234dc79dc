"""What the lossy codecs do to a real model. Bars on long texts are in benchmarks/codec.py."""

from pathlib import Path

import pytest

import kvtier.demo
from kvtier.codec.codecs import by_name
from kvtier.config import WorkerConfig
from kvtier.engine.quality import Quality

pytestmark = pytest.mark.model

TEXTS = Path(kvtier.demo.__file__).parent / "documents"


@pytest.fixture(scope="module")
def quality() -> Quality:
    settings = WorkerConfig(dtype="bfloat16", block_tokens=64, device="cpu")
    text = (TEXTS / "bread.txt").read_text()
    return Quality(settings, text, prefix_tokens=512, continued_tokens=256)


def test_lossless_codecs_change_no_answer(quality: Quality) -> None:
    for name in ("bp-zh", "bp4", "bs-lz4"):
        assert (quality.through(by_name(name)) == quality.blocks).all()
    assert quality.divergence(quality.blocks).largest == 0


@pytest.mark.parametrize(
    ("name", "most"), [("int8-tok", 2e-4), ("k8v4", 1e-3), ("fp8", 2.5e-3), ("int4-had", 8e-3)]
)
def test_lossy_codecs_hardly_change_answers(quality: Quality, name: str, most: float) -> None:
    divergence = quality.divergence(quality.through(by_name(name)))
    assert 0 < divergence.mean <= most
    assert divergence.same_choice > 0.9
