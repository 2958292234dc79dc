"""Copies between the pool and what a model computes on change no bit and no answer."""

import pytest
import torch
from transformers.cache_utils import DynamicCache

from kvtier.core.blocks import Attention, BlockLayout, LayerGroup
from kvtier.engine.kvcache import WorkingKV, allocate_storage, as_blocks
from kvtier.engine.model import LoadedModel
from kvtier.errors import ConfigError
from tests.engine.support import prompt_of

CPU = torch.device("cpu")
LAYERS, HEADS, TOKENS, DIM = 3, 2, 4, 8


def layout(dtype: str = "float32") -> BlockLayout:
    return BlockLayout((LayerGroup(Attention.FULL, LAYERS, HEADS, DIM),), TOKENS, dtype)


def filled(kv: WorkingKV, tokens: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Random KV of `tokens` tokens put into every layer as a model does; K, V, K, V..."""
    put = [torch.randn(1, HEADS, tokens, DIM).to(dtype) for _ in range(2 * LAYERS)]
    for layer in range(LAYERS):
        kv.update(put[2 * layer], put[2 * layer + 1], layer)
    return put


def contents(kv: WorkingKV) -> list[torch.Tensor]:
    return [each for layer in kv.layers for each in (layer.keys, layer.values)]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_blocks_go_to_the_pool_and_come_back_bit_for_bit(dtype: str) -> None:
    shape = layout(dtype)
    storage = allocate_storage(shape, 7, CPU)
    mine = WorkingKV(shape, 14, CPU)
    put = filled(mine, 14, getattr(torch, dtype))
    mine.store_blocks(storage, 0, [5, 0, 3])
    other = WorkingKV(shape, 12, CPU)
    other.load_blocks(storage, 0, [5, 0, 3])
    assert other.length == 12
    for got, expected in zip(contents(other), put, strict=True):
        assert torch.equal(got, expected[:, :, :12])


def test_a_block_lies_as_its_layout_says() -> None:
    shape = layout()
    storage = allocate_storage(shape, 2, CPU)
    kv = WorkingKV(shape, 8, CPU)
    put = filled(kv, 8, torch.float32)
    kv.store_blocks(storage, 1, [0])
    expected = torch.stack([each[0, :, 4:8] for each in put]).view(LAYERS, 2, HEADS, TOKENS, DIM)
    assert torch.equal(as_blocks(storage, shape)[0], expected)
    assert storage[0].numpy().tobytes() == expected.numpy().tobytes()


def test_only_the_named_blocks_are_written() -> None:
    shape = layout()
    storage = allocate_storage(shape, 3, CPU).fill_(7)
    kv = WorkingKV(shape, 8, CPU)
    filled(kv, 8, torch.float32)
    kv.store_blocks(storage, 0, [2])
    assert bool((storage[:2] == 7).all())


def test_blocks_can_be_loaded_behind_others_and_over_a_part() -> None:
    shape = layout()
    storage = allocate_storage(shape, 2, CPU)
    source, kv = WorkingKV(shape, 8, CPU), WorkingKV(shape, 12, CPU)
    put = filled(source, 8, torch.float32)
    source.store_blocks(storage, 0, [1, 0])
    kv.load_blocks(storage, 0, [1])
    filled(kv, 2, torch.float32)  # half of the second block
    kv.load_blocks(storage, 1, [0])
    assert kv.length == 8
    for got, expected in zip(contents(kv), put, strict=True):
        assert torch.equal(got, expected)


def test_what_cannot_be_right_is_refused() -> None:
    shape = layout()
    storage = allocate_storage(shape, 2, CPU)
    kv = WorkingKV(shape, 8, CPU)
    with pytest.raises(AssertionError, match="gap"):
        kv.load_blocks(storage, 1, [0])
    filled(kv, 3, torch.float32)
    with pytest.raises(AssertionError, match="not complete"):
        kv.store_blocks(storage, 0, [0])
    with pytest.raises(RuntimeError):
        filled(kv, 6, torch.float32)


def test_tokens_are_written_in_place() -> None:
    kv = WorkingKV(layout(), 8, CPU)
    filled(kv, 2, torch.float32)
    before = kv.layers[0].keys.data_ptr()
    filled(kv, 3, torch.float32)
    assert kv.layers[0].keys.data_ptr() == before
    assert kv.get_seq_length() == 5


@torch.inference_mode()
def test_a_model_computes_the_same_on_it_as_on_its_own_cache(tiny: LoadedModel) -> None:
    prompt = prompt_of(90, 1, tiny.vocab_size)
    own, ours = DynamicCache(config=tiny.model.config), WorkingKV(tiny.layout, 100, CPU)
    for start, end in ((0, 40), (40, 41), (41, 80), (80, 90)):
        ids = torch.tensor([prompt[start:end]])
        expected = tiny.model(input_ids=ids, past_key_values=own, use_cache=True).logits
        got = tiny.model(input_ids=ids, past_key_values=ours, use_cache=True).logits
        assert torch.equal(got, expected)


def test_a_pool_that_no_memory_holds_is_refused_in_one_line() -> None:
    layout = BlockLayout((LayerGroup(Attention.FULL, 1, 1, 64),), 16, "float32")
    with pytest.raises(ConfigError, match=r"^worker\.vram_bytes: \d+ bytes wanted on cpu: .+$"):
        allocate_storage(layout, 2**50 // layout.nbytes, torch.device("cpu"))
