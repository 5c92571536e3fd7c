# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The ASGI application in this process: the form of answers and errors, streams, limits, the key, metrics."""

import json
import time

import pytest
import torch
from reference import ENDING, PROMPTS, answer_ids


pytest.importorskip("fastapi", reason="serving needs pip install -r requirements-extra.txt")
pytest.importorskip("prometheus_client", reason="the same")
from starlette.testclient import TestClient  # noqa: E402

from phase15.model.requests_phase15 import request_of  # noqa: E402
from phase15.serving.arguments import Phase15ServerArguments  # noqa: E402
from phase15.serving.openai_api import Server, build_app  # noqa: E402


pytestmark = pytest.mark.extra
NAME = "saved/model"
LENGTH = 60
LIMITS = {"num_lanes": 4, "max_tokens": 200, "default_tokens": 120, "max_prompt_tokens": 300, "max_body_bytes": 9000}


@pytest.fixture(scope="module")
def server(chatter, chat_tokenizer) -> Server:
    return Server(chatter, chat_tokenizer, Phase15ServerArguments(model_dir=NAME, **LIMITS))


@pytest.fixture(scope="module")
def client(server) -> TestClient:
    with TestClient(build_app(server), raise_server_exceptions=False) as client:
        yield client


def chat(prompt: str) -> list[dict]:
    return [{"role": "user", "content": prompt}]


def ask(client, path: str = "chat/completions", **body) -> dict:
    if path == "chat/completions":
        body = {"messages": chat(PROMPTS[1]), **body}
    body = {"model": NAME, "temperature": 0, "max_tokens": LENGTH, **body}
    response = client.post(f"/v1/{path}", json={name: value for name, value in body.items() if value != "left out"})
    assert response.status_code == 200, response.text
    if not body.get("stream"):
        return response.json()
    events = response.text.split("\n\n")
    assert events[-1] == "" and events[-2] == "data: [DONE]"
    assert response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]


def text_of(answer: dict | list, index: int = 0) -> str:
    if isinstance(answer, list):
        choices = [choice for chunk in answer for choice in chunk["choices"] if choice["index"] == index]
        return "".join(choice["delta"].get("content") or "" for choice in choices)
    return answer["choices"][index]["message"]["content"]


def decoded(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True)


@pytest.fixture(scope="module")
def expected(chatter, chat_tokenizer) -> list[int]:
    return answer_ids(chatter, chat_tokenizer, PROMPTS[1], LENGTH)


# answers


@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_answer_is_that_of_generate(client, chat_tokenizer, expected, is_streamed):
    answer = ask(client, stream=is_streamed)
    assert text_of(answer) == decoded(chat_tokenizer, expected)
    if is_streamed:
        assert len(answer) > 5 and answer[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        reasons = [chunk["choices"][0]["finish_reason"] for chunk in answer]
        assert reasons == [None] * (len(answer) - 1) + ["length"] and not any("usage" in chunk for chunk in answer)
        assert len({chunk["id"] for chunk in answer}) == 1
        assert {chunk["object"] for chunk in answer} == {"chat.completion.chunk"}
    else:
        assert answer["choices"][0]["finish_reason"] == "length" and answer["object"] == "chat.completion"
        assert answer["choices"][0]["message"]["role"] == "assistant"


def test_usage_counts_prompt_and_answer(client, chat_tokenizer):
    prompt = chat_tokenizer.apply_chat_template(chat(PROMPTS[1]), add_generation_prompt=True)["input_ids"]
    usage = ask(client)["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(prompt), LENGTH)
    assert usage["total_tokens"] == len(prompt) + LENGTH
    chunks = ask(client, stream=True, stream_options={"include_usage": True})
    assert chunks[-1]["choices"] == [] and chunks[-1]["usage"]["completion_tokens"] == LENGTH
    assert all(chunk["usage"] is None for chunk in chunks[:-1])
    options = {"include_usage": True, "continuous_usage_stats": True}  # of vLLM; guidellm sends it
    counts = [chunk["usage"]["completion_tokens"] for chunk in ask(client, stream=True, stream_options=options)]
    assert counts == sorted(counts) and counts[0] == 0 and counts[-1] == LENGTH and len(set(counts)) > 3
    three = ask(client, n=3)
    assert (three["usage"]["prompt_tokens"], three["usage"]["completion_tokens"]) == (len(prompt), 3 * LENGTH)


def test_the_end_token_is_counted_and_not_shown(client, chatter, chat_tokenizer):
    ids = answer_ids(chatter, chat_tokenizer, ENDING, 120)
    answer = ask(client, messages=chat(ENDING), max_tokens="left out")
    assert ids[-1] == chatter.generation_config.eos_token_id and len(ids) < 120
    assert answer["choices"][0]["finish_reason"] == "stop" and answer["usage"]["completion_tokens"] == len(ids)
    assert text_of(answer) == decoded(chat_tokenizer, ids)
    longer = ask(client, messages=chat(ENDING), ignore_eos=True, max_tokens=len(ids) + 9)
    assert longer["usage"]["completion_tokens"] == len(ids) + 9


def test_a_longer_chunk_is_that_of_generate(chatter, chat_tokenizer):
    length = chatter.config.chunk_length + 3
    settings = Phase15ServerArguments(model_dir=NAME, chunk_length=length, **LIMITS)
    server = Server(chatter, chat_tokenizer, settings)
    assert server.worker.lanes.chunk_length == length
    with TestClient(build_app(server)) as client:
        expected = answer_ids(chatter, chat_tokenizer, PROMPTS[1], LENGTH, chunk_length=length)
        assert text_of(ask(client)) == decoded(chat_tokenizer, expected)
    assert expected != answer_ids(chatter, chat_tokenizer, PROMPTS[1], LENGTH)
    with pytest.raises(ValueError, match="`chunk_length` is 9999"):
        Server(chatter, chat_tokenizer, Phase15ServerArguments(model_dir=NAME, chunk_length=9999))


def test_a_chunk_length_is_refused_before_the_weights_are_read(chatter, tmp_path):
    chatter.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="`chunk_length` is 9999"):
        Server.load(Phase15ServerArguments(model_dir=str(tmp_path), chunk_length=9999))


@pytest.mark.parametrize("is_streamed", [False, True])
def test_n_is_the_number_of_choices(client, is_streamed):
    answer = ask(client, n=3, temperature=1, seed=5, stream=is_streamed)
    texts = [text_of(answer, index) for index in range(3)]
    assert len(set(texts)) == 3
    again = ask(client, n=3, temperature=1, seed=5)
    assert [text_of(again, index) for index in range(3)] == texts
    assert len({text_of(ask(client, n=3, seed=5), index) for index in range(3)}) == 1


@pytest.mark.parametrize("is_streamed", [False, True])
def test_the_text_ends_before_a_stop_string(client, chat_tokenizer, expected, is_streamed):
    whole = decoded(chat_tokenizer, expected)
    for stop in (whole[20:24], [whole[30:31], "never said"], whole[:2]):
        answer = ask(client, stop=stop, stream=is_streamed)
        first = stop if isinstance(stop, str) else stop[0]
        assert text_of(answer) == whole[: whole.index(first)]
        choice = answer[-1]["choices"][0] if is_streamed else answer["choices"][0]
        assert choice["finish_reason"] == "stop"
    assert text_of(ask(client, stop=["never said"], stream=is_streamed)) == whole


@pytest.mark.parametrize("is_streamed", [False, True])
def test_log_probabilities_are_given_for_every_token(client, chatter, chat_tokenizer, expected, is_streamed):
    answer = ask(client, logprobs=True, top_logprobs=3, stream=is_streamed)
    if is_streamed:
        entries = [entry for chunk in answer[1:] for entry in chunk["choices"][0]["logprobs"]["content"]]
    else:
        entries = answer["choices"][0]["logprobs"]["content"]
    prompt = chat_tokenizer.apply_chat_template(chat(PROMPTS[1]), add_generation_prompt=True)["input_ids"]
    with torch.no_grad():
        logits = chatter(torch.tensor([prompt + expected]), query_lengths=torch.tensor([len(prompt)])).logits
    scores = logits[0, len(prompt) - 1 : -1].log_softmax(dim=-1)
    assert [entry["token"] for entry in entries] == [chat_tokenizer.decode([token]) for token in expected]
    for entry, token, row in zip(entries, expected, scores, strict=True):
        assert entry["logprob"] == pytest.approx(row[token].item(), abs=1e-3)
        best = row.topk(3)
        assert [top["logprob"] for top in entry["top_logprobs"]] == pytest.approx(best.values.tolist(), abs=1e-3)
    assert "logprobs" not in body_of(ask(client)) or body_of(ask(client))["logprobs"] is None


def body_of(answer: dict) -> dict:
    return answer["choices"][0]


def test_completions_take_texts_and_ids_and_lists_of_them(client, chatter, chat_tokenizer):
    texts = ["Blue light scatters", "a"]
    ids = [chat_tokenizer(text)["input_ids"] for text in texts]
    answers = [decoded(chat_tokenizer, answer_ids(chatter, chat_tokenizer, prompt, LENGTH)) for prompt in ids]
    for prompt, right in ((texts[0], answers[:1]), (texts, answers), (ids[0], answers[:1]), (ids, answers)):
        answer = ask(client, "completions", prompt=prompt)
        assert [choice["text"] for choice in answer["choices"]] == right and answer["object"] == "text_completion"
        assert answer["usage"]["completion_tokens"] == LENGTH * len(right)
        chunks = ask(client, "completions", prompt=prompt, stream=True)
        for index, text in enumerate(right):
            pieces = [choice["text"] for chunk in chunks for choice in chunk["choices"] if choice["index"] == index]
            assert "".join(pieces) == text
    two = ask(client, "completions", prompt=texts, n=2, temperature=1, seed=1)
    assert [choice["index"] for choice in two["choices"]] == [0, 1, 2, 3]
    scored = ask(client, "completions", prompt=texts[0], logprobs=2, max_tokens=6)["choices"][0]
    assert "".join(scored["logprobs"]["tokens"][:1]) == answers[0][: len(scored["logprobs"]["tokens"][0])]
    assert len(scored["logprobs"]["token_logprobs"]) == len(scored["logprobs"]["text_offset"]) == 6
    assert all(len(top) <= 2 for top in scored["logprobs"]["top_logprobs"])


def test_an_answer_can_be_sent_back(client):
    """The model's name and the whole message, as clients do."""
    answer = ask(client)
    messages = [*chat(PROMPTS[1]), answer["choices"][0]["message"] | {"tool_calls": None}, *chat("More?")]
    assert ask(client, model=answer["model"], messages=messages, max_tokens=3)["model"] == NAME


# errors and limits


CHAT = {"messages": chat("a")}
TOO_DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"3", b"\xff", b'{"\\ud800": "\\ud800"}', TOO_DEEP[:8000].encode()]
)
def test_a_body_that_is_no_object_is_a_400(client, body):
    response = client.post("/v1/chat/completions", content=body)
    assert response.status_code == 400 and response.json()["error"]["type"] == "invalid_request_error"


def test_a_body_that_is_too_long_is_a_413_with_or_without_its_length(client):
    body = json.dumps({"messages": chat("a" * 9000)}).encode()
    assert client.post("/v1/chat/completions", content=body).status_code == 413

    def parts():
        for start in range(0, len(body), 1000):
            yield body[start : start + 1000]

    assert client.post("/v1/chat/completions", content=parts()).status_code == 413


def test_another_model_and_another_address_are_404s(client):
    response = client.post("/v1/chat/completions", json=CHAT | {"model": "another"})
    assert response.status_code == 404 and response.json()["error"]["code"] == "model_not_found"
    for path in ("/", "/v1/nothing", "/docs", "/openapi.json", "/load_model", "/v1/models/another"):
        response = client.get(path)
        assert response.status_code == 404 and "error" in response.json()
    assert client.get("/v1/chat/completions").status_code == 405


def test_models_and_health_and_metrics(client):
    models = client.get("/v1/models").json()
    assert [model["id"] for model in models["data"]] == [NAME] and client.get(f"/v1/models/{NAME}").json()[
        "id"
    ] == NAME
    assert client.get("/health").json() == {"status": "ok"}
    before = metrics_of(client)
    ask(client, max_tokens=11, stream=True)
    deadline = time.monotonic() + 10  # the thread of the lanes counts after the answer
    while time.monotonic() < deadline:
        after = metrics_of(client)
        if after["phase15_generated_tokens_total"] - before["phase15_generated_tokens_total"] == 11:
            break
    assert after["phase15_generated_tokens_total"] - before["phase15_generated_tokens_total"] == 11
    assert after["phase15_first_token_seconds_count"] - before["phase15_first_token_seconds_count"] == 1
    assert after["phase15_lanes"] == 4 and after["phase15_lanes_in_use"] == after["phase15_requests_waiting"] == 0
    assert after["phase15_tokens_per_second"] > 0 and after["phase15_kept_conversations"] > 0
    assert after['phase15_requests_total{reason="length"}'] > before.get('phase15_requests_total{reason="length"}', 0)


def metrics_of(client) -> dict[str, float]:
    lines = [line for line in client.get("/metrics").text.splitlines() if not line.startswith("#")]
    return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}


def test_too_many_requests_get_429_and_when_to_try_again(chatter, chat_tokenizer):
    limits = Phase15ServerArguments(model_dir=NAME, num_lanes=1, max_waiting=0, retry_after=7, max_tokens=10**6)
    server = Server(chatter, chat_tokenizer, limits)
    with TestClient(build_app(server)) as client:
        endless = request_of(chatter, [3], max_new_tokens=10**6, eos_token_id=None)
        server.worker.submit([endless])
        busy = client.post("/v1/chat/completions", json=CHAT)
        assert busy.status_code == 429 and busy.headers["retry-after"] == "7"
        assert busy.json()["error"]["code"] == "rate_limit_exceeded"
        endless.finish("cancelled")


def test_a_key_is_asked_for_everywhere_but_health(chatter, chat_tokenizer, tmp_path):
    (tmp_path / "key").write_text("secret")
    arguments = Phase15ServerArguments(model_dir=NAME, api_key=str(tmp_path / "key"), num_lanes=1)
    server = Server(chatter, chat_tokenizer, arguments)
    with TestClient(build_app(server)) as client:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            for path in ("/v1/models", "/metrics"):
                assert client.get(path, headers=headers).status_code == 401
            assert client.post("/v1/chat/completions", json=CHAT, headers=headers).status_code == 401
        right = {"Authorization": "Bearer secret"}
        assert client.get("/v1/models", headers=right).status_code == client.get("/health").status_code == 200
        assert client.post("/v1/chat/completions", json=CHAT | {"max_tokens": 2}, headers=right).status_code == 200


def test_an_error_of_the_model_is_a_500_and_the_next_request_is_answered(client, server, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(type(server.worker.lanes), "_decode_chunk", lambda *args: 1 / 0)
        assert client.post("/v1/chat/completions", json=CHAT).status_code == 500
        response = client.post("/v1/chat/completions", json=CHAT | {"stream": True})
        events = response.text.split("\n\n")
        assert '"error"' in events[1] and events[-2] == "data: [DONE]"
    assert ask(client, max_tokens=2)["usage"]["completion_tokens"] == 2
