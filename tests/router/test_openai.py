"""Whatever JSON comes, it is read or refused in one line."""

from hypothesis import given, settings
from hypothesis import strategies as st

from kvtier.router.http.openai import BadRequest, Stops, error_body, prompt_of, read

FIELDS = [
    "model", "prompt", "messages", "max_tokens", "max_completion_tokens", "temperature", "seed",
    "n", "best_of", "stop", "stream", "stream_options", "include_usage", "ignore_eos", "role",
    "content", "type", "text", "tools", "top_p", "logit_bias", "tool_calls",
]  # fmt: skip
LEAVES = (
    st.none() | st.booleans() | st.integers() | st.integers(0, 20) | st.floats()
    | st.text(max_size=5) | st.sampled_from(["user", "text", "hi"])
)  # fmt: skip
JSON = st.recursive(
    LEAVES,
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(FIELDS), inner, max_size=6)
    ),
    max_leaves=12,
)
TABLES = st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=8)


@given(body=JSON | TABLES, chat=st.booleans())
@settings(max_examples=200, deadline=None)
def test_any_json_is_read_or_refused(body, chat):
    try:
        asked = read(body, chat=chat, request_id="r", luck=lambda: 1)
    except BadRequest as error:
        told = error_body(error)["error"]["message"]
    else:
        told = "read"
        assert 1 <= len(asked.requests) <= 16
        assert all(each.prompt.WhichOneof("kind") for each in asked.requests)
    assert told
    assert "\n" not in told
    prompt_of(body)


@given(
    pieces=st.lists(st.text("abc", max_size=4), max_size=12),
    stops=st.lists(st.text("abc", min_size=1, max_size=4), min_size=1, max_size=3),
)
@settings(max_examples=200, deadline=None)
def test_an_answer_ends_before_its_first_stop_however_it_comes_in_pieces(pieces, stops):
    stopper = Stops(tuple(stops))
    shown = "".join(stopper.push(piece) for piece in pieces)
    if not stopper.met:
        shown += stopper.rest()
    whole = "".join(pieces)
    at = [whole.find(stop) for stop in stops if stop in whole]
    assert stopper.met == bool(at)
    if not at:
        assert shown == whole
    else:
        # The stop that is complete first ends it.
        ends = min(whole.find(stop) + len(stop) for stop in stops if stop in whole)
        assert whole.startswith(shown)
        assert len(shown) <= ends
        assert not any(stop in shown for stop in stops)
