# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The thread that advances the lanes, its limits, and the calls that wait for its answers."""

import asyncio
import time

import pytest
from reference import PROMPTS, answer_ids

from phase15.model.continuous_batching_phase15 import Phase15Lanes
from phase15.model.requests_phase15 import request_of


pytest.importorskip("prometheus_client", reason="serving needs pip install -r requirements-extra.txt")
from phase15.serving.worker import Call, LanesBusyError, LaneWorker, StoppingError


pytestmark = pytest.mark.extra


@pytest.fixture
def worker(chatter):
    worker = LaneWorker(Phase15Lanes(chatter, 2), max_waiting=1)
    worker.start()
    yield worker
    worker.stop()
    assert not worker.thread.is_alive()


def make_request(model, tokenizer, length: int = 20):
    prompt_ids = tokenizer(PROMPTS[0])["input_ids"]
    return request_of(model, prompt_ids, max_new_tokens=length, do_sample=False, eos_token_id=None)


def test_a_call_gives_the_answer_in_pieces_or_at_its_end(worker, chatter, chat_tokenizer):
    async def read(is_streamed: bool) -> list:
        call = Call(worker, [make_request(chatter, chat_tokenizer)], chat_tokenizer, [], is_streamed)
        return [piece async for piece in call.pieces()]

    prompt_ids = chat_tokenizer(PROMPTS[0])["input_ids"]
    ids = answer_ids(chatter, chat_tokenizer, prompt_ids, 20)
    for is_streamed in (True, False):
        pieces = asyncio.run(read(is_streamed))
        assert [token for piece in pieces for token in piece.tokens] == ids
        assert "".join(piece.text for piece in pieces) == chat_tokenizer.decode(ids, skip_special_tokens=True)
        assert [piece.finish_reason for piece in pieces][-1] == "length"
        assert (len(pieces) > 5) == is_streamed


def test_a_full_queue_refuses_requests(worker, chatter, chat_tokenizer):
    async def fill():
        long = [make_request(chatter, chat_tokenizer, 10**6) for _ in range(3)]
        call = Call(worker, long, chat_tokenizer, [], False)
        with pytest.raises(LanesBusyError):
            Call(worker, [make_request(chatter, chat_tokenizer)], chat_tokenizer, [], False)
        call.cancel()
        while worker.lanes.lanes or worker.lanes.waiting:
            await asyncio.sleep(0.01)
        four = [make_request(chatter, chat_tokenizer) for _ in range(4)]
        with pytest.raises(LanesBusyError):  # all or none
            Call(worker, four, chat_tokenizer, [], False)
        assert not worker.lanes.waiting

    asyncio.run(asyncio.wait_for(fill(), 60))


def test_leaving_a_call_frees_its_lane(worker, chatter, chat_tokenizer):
    async def leave():
        call = Call(worker, [make_request(chatter, chat_tokenizer, 10**6)], chat_tokenizer, [], True)
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
        call = Call(worker, [make_request(chatter, chat_tokenizer)], chat_tokenizer, [], False)
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
        call = Call(worker, [make_request(chatter, chat_tokenizer, 10**6) for _ in range(2)], chat_tokenizer, [], True)
        pieces = call.pieces()
        await anext(pieces)
        await asyncio.to_thread(worker.stop)
        with pytest.raises(StoppingError):
            async for _ in pieces:
                pass

    asyncio.run(asyncio.wait_for(read(), 60))
    assert not worker.thread.is_alive()
