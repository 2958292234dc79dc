import asyncio
import random
import threading
from datetime import UTC, datetime

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from kvtier.errors import InvalidRequest, RemoteProtocolError
from kvtier.router.text import (
    MAX_MESSAGES,
    MAX_TEXT_BYTES,
    SHORT,
    THREADS,
    Decoder,
    Message,
    Text,
    TextPool,
    check_chat,
    check_text,
)
from tests.router.stub_engine import files, ids, tokenizer
from tests.router.support import eventually

WORDS = "naïve café 😀👩‍👩‍👧 日本語 Привет, how are you? "


def test_a_chat_is_rendered_for_the_models_turn():
    text = Text(files())
    chat = [Message("system", "be brief"), Message("user", "hi <|x|> {{ 1 }}")]
    rendered = "<|system|>be brief<|end|><|user|>hi <|x|> {{ 1 }}<|end|><|assistant|>"
    assert text.render(chat) == rendered
    assert text.encode_chat(chat) == tokenizer().encode(rendered).ids


def test_only_plain_text_gets_the_models_own_special_tokens():
    made = tokenizer()
    end = made.token_to_id("<|end|>")
    made.post_processor = processors.TemplateProcessing(
        single="<|end|> $A", special_tokens=[("<|end|>", end)]
    )
    text = Text(files() | {"tokenizer.json": made.to_str().encode()})
    assert text.encode("hi") == [end, *ids("hi")]
    assert text.encode_chat([Message("user", "hi")]) == ids("<|user|>hi<|end|><|assistant|>")


def test_a_tokenizer_that_wants_to_cut_or_fill_prompts_does_not():
    made = tokenizer()
    made.enable_truncation(4)
    made.enable_padding(length=8)
    text = Text(files() | {"tokenizer.json": made.to_str().encode()})
    assert text.encode("a longer prompt") == ids("a longer prompt")
    assert text.encode("a") == ids("a")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ bos_token }}|{{ eos_token }}", "<s>|<|end|>"),
        ("{{ messages | tojson }}", '[{"role": "user", "content": "<é>"}]'),
        ("{{ strftime_now('%Y-%m-%d') }}", "2026-02-03"),
        ("{% for m in messages %}{% break %}{% endfor %}x", "x"),
        ("  {% if true %}\n  y{% endif %}", "  y"),
        ("{{ tools is none }}", "True"),
    ],
)
def test_templates_may_use_what_transformers_gives_them(template, expected):
    config = b'{"bos_token": {"content": "<s>"}, "eos_token": "<|end|>"}'
    given = files() | {
        "tokenizer_config.json": config,
        "chat_template.jinja": template.encode(),
    }
    text = Text(given, now=lambda: datetime(2026, 2, 3, tzinfo=UTC))
    assert text.render([Message("user", "<é>")]) == expected


def test_the_template_of_the_config_is_used_where_there_is_no_file():
    given = files()
    del given["chat_template.jinja"]
    one = given | {"tokenizer_config.json": b'{"chat_template": "one"}'}
    many = (
        b'{"chat_template": [{"name": "x", "template": "x"}, {"name": "default", "template": "d"}]}'
    )
    assert Text(one).render([Message("user", "hi")]) == "one"
    assert Text(given | {"tokenizer_config.json": many}).render([Message("user", "hi")]) == "d"
    with pytest.raises(InvalidRequest, match="no chat template"):
        Text(given).render([Message("user", "hi")])


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('only user and assistant') }}",
        "{{ messages[0].nothing.more }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",  # the sandbox
        "{{ messages.append(1) }}",  # immutable
        "{{ 1 // 0 }}",
        "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",  # would fill the memory
    ],
)
def test_what_a_template_refuses_is_the_callers_fault(template):
    text = Text(files() | {"chat_template.jinja": template.encode()})
    with pytest.raises(InvalidRequest, match="chat"):
        text.render([Message("user", "hi")])


@pytest.mark.parametrize(
    "broken",
    [
        {"tokenizer.json": b"{}"},
        {"tokenizer.json": b"\xff\x00"},
        {"tokenizer_config.json": b"["},
        {"tokenizer_config.json": b"[]"},
        {"tokenizer_config.json": b"[" * 100_000},
        {"chat_template.jinja": b"{% if %}"},
        {"chat_template.jinja": b"{% break %}"},
        {"chat_template.jinja": b"{% for x in y %}" * 30 + b"{% endfor %}" * 30},
    ],
)
def test_broken_files_are_the_workers_fault(broken):
    with pytest.raises(RemoteProtocolError):
        Text(files() | broken)


def test_a_worker_without_a_tokenizer_is_refused():
    with pytest.raises(RemoteProtocolError, match=r"tokenizer\.json"):
        Text({})


def test_text_comes_whole_and_only_in_whole_characters():
    decoder = Text(files()).decoder()
    steps = [decoder.push([each]) for each in ids(WORDS * 5)]
    assert "".join(steps) == WORDS * 5
    assert all("\N{REPLACEMENT CHARACTER}" not in step for step in steps)
    assert steps[2:4] == ["", "ï"]  # the first half of a character writes nothing


def test_a_character_that_never_ends_is_never_given():
    decoder = Text(files()).decoder()
    assert decoder.push(ids("a😀")[:-1]) == "a"


def test_special_tokens_write_nothing_and_do_not_hold_up_what_follows():
    decoder = Text(files()).decoder()
    assert decoder.push(ids("a<|end|>b<|end|>")) == "ab"


def test_any_cut_of_the_stream_gives_the_same_text():
    text, rng = Text(files()), random.Random(7)
    answer = ids(WORDS * 8)
    for _ in range(50):
        decoder, given, at = text.decoder(), "", 0
        while at < len(answer):
            step = rng.randint(1, 9)
            given += decoder.push(answer[at : at + step])
            at += step
        assert given == WORDS * 8


def test_bytes_that_are_no_character_come_out_and_hold_up_nothing():
    decoder = Text(files()).decoder()
    tail = ids("é")[1:]  # a byte that begins nothing
    given = decoder.push(tail * 100 + ids("ok 😀"))
    assert given.endswith("ok 😀")
    assert 90 <= given.count("\N{REPLACEMENT CHARACTER}") <= 100


def test_characters_that_always_straddle_two_tokens_are_never_broken():
    # Tokens of two bytes, shifted by one against characters of two bytes.
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {char: i for i, char in enumerate(alphabet)}
    first, second = (tokenizer().id_to_token(each) for each in ids("é"))
    vocab[second + first] = len(vocab)
    made = Tokenizer(models.BPE(vocab, [(second, first)]))
    made.decoder = decoders.ByteLevel()
    text = Text({"tokenizer.json": made.to_str().encode()})
    answer = [vocab[first], *[vocab[second + first]] * 299, vocab[second]]
    decoder = text.decoder()
    steps = [decoder.push([each]) for each in answer]
    assert "".join(steps) == "é" * 300
    assert steps[:3] == ["", "é", "é"]


def test_byte_fallback_runs_come_out_right():
    # As SentencePiece models do it: rare characters are runs of byte tokens.
    vocab = {"<unk>": 0, "▁hi": 1, "▁": 2} | {f"<0x{b:02X}>": 3 + b for b in range(256)}
    made = Tokenizer(models.BPE(vocab, [], unk_token="<unk>", byte_fallback=True))
    made.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    text = Text({"tokenizer.json": made.to_str().encode()})
    answer = [1]
    for _ in range(40):
        answer += [3 + b for b in "😀日é".encode()]
    answer += [1, 1]
    decoder = text.decoder()
    assert "".join(decoder.push([each]) for each in answer) == "hi" + "😀日é" * 40 + " hi hi"


def test_the_work_of_a_step_does_not_grow_with_the_answer():
    text, longest = Text(files()), 0

    def decode(window):
        nonlocal longest
        longest = max(longest, len(window))
        return text.decode(window)

    for answer in (WORDS * 40, "<|end|>" * 2000, "é" * 2000):
        decoder = Decoder(decode)
        decoder.push(ids(answer))
    assert longest <= 64
    decoder = Decoder(decode)
    decoder.push(ids("é")[1:] * 2000)
    assert longest <= 64


def test_long_texts_and_chats_are_refused_with_the_numbers():
    check_text("é" * (MAX_TEXT_BYTES // 2), "prompt.text")
    with pytest.raises(InvalidRequest, match=f"{MAX_TEXT_BYTES + 2} bytes.*{MAX_TEXT_BYTES}"):
        check_text("é" * (MAX_TEXT_BYTES // 2 + 1), "prompt.text")
    check_chat([Message("user", "hi")] * MAX_MESSAGES)
    for chat in ([], [Message("user", "hi")] * (MAX_MESSAGES + 1)):
        with pytest.raises(InvalidRequest, match=f"{len(chat)} messages"):
            check_chat(chat)
    with pytest.raises(InvalidRequest, match="bytes"):
        check_chat([Message("user", "x" * MAX_TEXT_BYTES)])


async def test_equal_files_share_one_tokenizer_and_unused_ones_are_forgotten():
    pool = TextPool()
    first, second = await asyncio.gather(pool.load(files()), pool.load(files()))
    assert first is second
    other = await pool.load(files() | {"chat_template.jinja": b"other"})
    assert other is not first
    pool.keep_only({other.digest})
    assert await pool.load(files() | {"chat_template.jinja": b"other"}) is other
    assert await pool.load(files()) is not first
    pool.close()


@pytest.mark.parametrize("kind", ["text", "chat"])
async def test_a_long_prompt_does_not_hold_up_the_loop(kind):
    pool, text, turns = TextPool(), Text(files()), 0
    long = "lorem ipsum " * 40_000

    def work() -> int:
        before = turns
        ids = text.encode(long) if kind == "text" else text.encode_chat([Message("user", long)])
        assert len(ids) >= len(long)
        return turns - before

    async def turned() -> bool:
        """Whether the loop went on during one, as far as the machine had a core for it."""
        nonlocal turns
        job = asyncio.ensure_future(pool.run(work))
        while not job.done():
            await asyncio.sleep(0)
            turns += 1
        return await job > 100

    await eventually(turned, "the loop turns while a long prompt is read")
    pool.close()


async def test_a_short_text_waits_for_no_thread_and_a_long_one_never_holds_the_loop():
    text, pool, go = Text(files()), TextPool(), threading.Event()
    busy = [asyncio.create_task(pool.run(go.wait)) for _ in range(THREADS)]
    short, long = "é" * (SHORT // 2), "é" * (SHORT // 2) + "x"
    try:
        assert await pool.encode(text, short) == text.encode(short)
        waiting = asyncio.create_task(pool.encode(text, long))
        await eventually(lambda: pool.running > THREADS, "the long text waits for a thread")
        assert not waiting.done()
    finally:
        go.set()
    assert await waiting == text.encode(long)
    await asyncio.gather(*busy)
    pool.close()
