# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Tokens as text, penalties, the thread that advances the lanes, and the limits."""

import asyncio
import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import PROMPTS, answer_ids

from phase15.model.continuous_batching_phase15 import Phase15Lanes
from phase15.model.requests_phase15 import request_of


pytest.importorskip("prometheus_client", reason="serving needs pip install -r requirements-extra.txt")
from phase15.serving.arguments import Phase15ServerArguments
from phase15.serving.text_stream import TextStream
from phase15.serving.worker import Call, LanesBusyError, LaneWorker, StoppingError, TokenPenalties


pytestmark = pytest.mark.extra
TEXTS = ["Return the list of lists.", "naïve café — 日本語 🙂🙂", "<|user|> a\n\n  b\t", "\x00\x07é", "a" * 40]


def stream(tokenizer, ids: list[int], stops: list[str] = ()) -> list[str]:
    text = TextStream(tokenizer, list(stops))
    pieces = []
    for token in ids:
        pieces.append(text.add(token))
        if text.is_stopped:
            break
    return [*pieces, text.close()]


@pytest.mark.parametrize("text", TEXTS)
def test_the_pieces_are_the_text_and_hold_no_half_character(chat_tokenizer, text):
    ids = chat_tokenizer(text)["input_ids"]
    pieces = stream(chat_tokenizer, ids)
    assert "".join(pieces) == chat_tokenizer.decode(ids, skip_special_tokens=True)
    assert not any("�" in piece for piece in pieces) and sum(map(bool, pieces)) >= 3


@given(st.lists(st.integers(0, 269), max_size=30))
@settings(deadline=None)
def test_any_tokens_give_the_text_that_decode_gives(chat_tokenizer, ids):
    assert "".join(stream(chat_tokenizer, ids)) == chat_tokenizer.decode(ids, skip_special_tokens=True)


@given(st.text("ab", max_size=20), st.lists(st.text("ab", min_size=1, max_size=4), max_size=3))
@settings(deadline=None)
def test_a_stop_string_ends_the_text_before_it(chat_tokenizer, text, stops):
    pieces = stream(chat_tokenizer, chat_tokenizer(text)["input_ids"], stops)
    said = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    _, end = min(said, default=(0, len(text)))  # the first that is said whole; of those, the longest
    assert "".join(pieces) == text[:end]


def test_what_may_begin_a_stop_string_is_held_back_and_no_more(chat_tokenizer):
    text = TextStream(chat_tokenizer, ["the end", "list"])
    given = [text.add(chat_tokenizer(letter)["input_ids"][0]) for letter in "a the enough"]
    assert given == ["a", " ", "", "", "", "", "", "", "the eno", "u", "g", "h"]


def test_penalties_are_those_of_openai():
    """μ[j] − c[j] · frequency − (c[j] > 0) · presence, c counting the answer alone."""
    ids, scores = torch.tensor([[5, 5, 1, 2, 2, 2, 3]]), torch.randn(1, 7, generator=torch.Generator().manual_seed(0))
    got = TokenPenalties(2, presence=0.5, frequency=0.25)(ids, scores)
    counts = {1: 1, 2: 3, 3: 1}
    for token in range(7):
        count = counts.get(token, 0)
        assert got[0, token].item() == pytest.approx(scores[0, token].item() - 0.25 * count - 0.5 * (count > 0))


@pytest.mark.parametrize(
    "name", ["num_lanes", "max_tokens", "max_waiting", "max_body_bytes", "max_kept_conversations"]
)
def test_limits_below_their_least_are_refused(name):
    with pytest.raises(ValueError, match=f"`{name}` is -1, but it must be"):
        Phase15ServerArguments(**{name: -1})


@pytest.mark.parametrize("port", [-1, 65536, 99999])
def test_a_port_that_there_is_not_is_refused(port):
    with pytest.raises(ValueError, match=f"`port` is {port}, but it must be from 0 to 65535"):
        Phase15ServerArguments(port=port)


def test_the_key_is_read_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv("PHASE15_API_KEY", raising=False)
    assert Phase15ServerArguments().read_key() is None
    monkeypatch.setenv("PHASE15_API_KEY", "one")
    assert Phase15ServerArguments().read_key() == "one"
    (tmp_path / "key").write_text("two\n")
    assert Phase15ServerArguments(api_key=str(tmp_path / "key")).read_key() == "two"
    (tmp_path / "key").write_text("\n")
    with pytest.raises(ValueError, match="holds no API key"):
        Phase15ServerArguments(api_key=str(tmp_path / "key")).read_key()
    with pytest.raises(OSError):
        Phase15ServerArguments(api_key=str(tmp_path / "none")).read_key()


# the thread


@pytest.fixture
def worker(chatter):
    worker = LaneWorker(Phase15Lanes(chatter, 2), max_waiting=1)
    worker.start()
    yield worker
    worker.stop()
    assert not worker.thread.is_alive()


def asked(model, tokenizer, length: int = 20, prompt: str = PROMPTS[0]):
    return request_of(model, tokenizer(prompt)["input_ids"], max_new_tokens=length, do_sample=False, eos_token_id=None)


def test_a_call_gives_the_answer_in_pieces_or_at_its_end(worker, chatter, chat_tokenizer):
    async def read(is_streamed: bool) -> list:
        call = Call(worker, [asked(chatter, chat_tokenizer)], chat_tokenizer, [], is_streamed)
        return [piece async for piece in call.pieces()]

    expected = asked(chatter, chat_tokenizer)
    ids = answer_ids(chatter, chat_tokenizer, expected.prompt_ids, 20)
    for is_streamed in (True, False):
        pieces = asyncio.run(read(is_streamed))
        assert [token for piece in pieces for token in piece.tokens] == ids
        assert "".join(piece.text for piece in pieces) == chat_tokenizer.decode(ids, skip_special_tokens=True)
        assert [piece.finish_reason for piece in pieces][-1] == "length"
        assert (len(pieces) > 5) == is_streamed


def test_no_more_than_may_wait_do(worker, chatter, chat_tokenizer):
    async def fill():
        long = [asked(chatter, chat_tokenizer, 10**6) for _ in range(3)]
        call = Call(worker, long, chat_tokenizer, [], False)
        with pytest.raises(LanesBusyError):
            Call(worker, [asked(chatter, chat_tokenizer)], chat_tokenizer, [], False)
        call.cancel()
        while worker.lanes.lanes or worker.lanes.waiting:
            await asyncio.sleep(0.01)
        four = [asked(chatter, chat_tokenizer) for _ in range(4)]
        with pytest.raises(LanesBusyError):  # all or none
            Call(worker, four, chat_tokenizer, [], False)
        assert not worker.lanes.waiting

    asyncio.run(asyncio.wait_for(fill(), 60))


def test_leaving_a_call_frees_its_lane(worker, chatter, chat_tokenizer):
    async def leave():
        call = Call(worker, [asked(chatter, chat_tokenizer, 10**6)], chat_tokenizer, [], True)
        pieces = call.pieces()
        await anext(pieces)
        await pieces.aclose()
        assert call.choices[0].request.finish_reason == "cancelled"
        deadline = time.monotonic() + 30
        while worker.lanes.lanes:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)

    asyncio.run(leave())


def test_an_error_of_the_lanes_ends_what_is_under_way_and_no_more(worker, chatter, chat_tokenizer, monkeypatch):
    async def read():
        call = Call(worker, [asked(chatter, chat_tokenizer)], chat_tokenizer, [], False)
        return [piece async for piece in call.pieces()]

    with monkeypatch.context() as patch:
        patch.setattr(type(worker.lanes), "_decode_chunk", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            asyncio.run(read())
    assert asyncio.run(read())[-1].finish_reason == "length"


def test_a_stop_ends_what_is_under_way(chatter, chat_tokenizer):
    worker = LaneWorker(Phase15Lanes(chatter, 1), max_waiting=1)
    worker.start()

    async def read():
        call = Call(worker, [asked(chatter, chat_tokenizer, 10**6) for _ in range(2)], chat_tokenizer, [], True)
        pieces = call.pieces()
        await anext(pieces)
        await asyncio.to_thread(worker.stop)
        with pytest.raises(StoppingError):
            async for _ in pieces:
                pass

    asyncio.run(asyncio.wait_for(read(), 60))
    assert not worker.thread.is_alive()
