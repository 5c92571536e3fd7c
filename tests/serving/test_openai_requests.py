# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The fields of OpenAI's requests: their effects, and refusals that name the field."""

import copy

import pytest
import torch
from reference import PROMPTS, answer_ids
from transformers import LogitsProcessorList


pytest.importorskip("fastapi", reason="serving needs pip install -r requirements-extra.txt")
pytest.importorskip("prometheus_client", reason="the same")
from starlette.testclient import TestClient  # noqa: E402
from test_openai_api import CHAT, LENGTH, LIMITS, NAME, ask, chat, decoded, text_of  # noqa: E402

from phase15.serving.arguments import Phase15ServerArguments  # noqa: E402
from phase15.serving.openai_api import Server, build_app  # noqa: E402
from phase15.serving.openai_requests import TokenPenalties  # noqa: E402


pytestmark = pytest.mark.extra


@pytest.fixture(scope="module")
def client(chatter, chat_tokenizer) -> TestClient:
    server = Server(chatter, chat_tokenizer, Phase15ServerArguments(model_dir=NAME, **LIMITS))
    with TestClient(build_app(server), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture(scope="module")
def expected(chatter, chat_tokenizer) -> list[int]:
    return answer_ids(chatter, chat_tokenizer, PROMPTS[1], LENGTH)


# effects


def test_limits_of_the_answer_have_two_names_and_a_default(client):
    for body, length in (
        ({"max_tokens": 7}, 7),
        ({"max_tokens": "left out", "max_completion_tokens": 8}, 8),
        ({"max_tokens": 9, "max_completion_tokens": 9}, 9),
        ({"max_tokens": None}, LIMITS["default_tokens"]),
    ):
        assert ask(client, **body)["usage"]["completion_tokens"] == length


def test_temperature_samples_whatever_the_folders_config_says(client, chatter):
    assert not chatter.generation_config.do_sample
    texts = {text_of(ask(client, temperature=1, max_tokens=9)) for _ in range(4)}
    assert len(texts) > 1
    greedy = text_of(ask(client, max_tokens=9))
    assert greedy == text_of(ask(client, temperature="left out", max_tokens=9))
    assert greedy == text_of(ask(client, temperature=1, top_p=0, max_tokens=9))
    assert greedy == text_of(ask(client, temperature=2, top_k=1, max_tokens=9))
    assert greedy == text_of(ask(client, temperature="left out", top_p=1e-6, max_tokens=9))
    seeds = [text_of(ask(client, temperature=1, seed=seed, max_tokens=9)) for seed in (3, 3, -3, 4)]
    assert seeds[0] == seeds[1] and len(set(seeds)) == 3


def test_a_bias_bans_and_forces_tokens(client, chat_tokenizer, expected):
    (token,) = chat_tokenizer("Q")["input_ids"]
    assert text_of(ask(client, logit_bias={token: 100}, max_tokens=5)) == "QQQQQ"
    banned = ask(client, logit_bias={str(expected[0]): -100}, logprobs=True, max_tokens=5)
    first = banned["choices"][0]["logprobs"]["content"][0]["token"]
    assert first != chat_tokenizer.decode([expected[0]])
    assert text_of(ask(client, logit_bias={}, max_tokens=5)) == text_of(ask(client, max_tokens=5))


def test_penalties_are_honoured(client, chatter, chat_tokenizer):
    for body, penalties in (({"presence_penalty": 2}, (2, 0)), ({"frequency_penalty": 1.5}, (0, 1.5))):
        prompt = chat_tokenizer.apply_chat_template(chat(PROMPTS[1]), add_generation_prompt=True)["input_ids"]
        processors = LogitsProcessorList([TokenPenalties(len(prompt), *penalties)])
        ids = answer_ids(chatter, chat_tokenizer, PROMPTS[1], LENGTH, logits_processor=processors)
        assert text_of(ask(client, **body)) == decoded(chat_tokenizer, ids) != text_of(ask(client))
    ids = answer_ids(chatter, chat_tokenizer, PROMPTS[1], LENGTH, repetition_penalty=1.7)
    assert text_of(ask(client, repetition_penalty=1.7)) == decoded(chat_tokenizer, ids)


def test_contents_are_texts_or_text_parts_and_system_messages_are_read(client, chatter, chat_tokenizer):
    conversation = [
        {"role": "system", "content": "Be short."},
        *chat("Hello"),
        {"role": "assistant", "content": "Hi."},
    ]
    conversation += chat("Why?")
    ids = chat_tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
    expected = decoded(chat_tokenizer, answer_ids(chatter, chat_tokenizer, ids, LENGTH))
    assert text_of(ask(client, messages=conversation)) == expected
    parts = [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]
    assert text_of(ask(client, messages=[*conversation[:-1], {"role": "user", "content": parts}])) == expected


def test_fields_without_an_effect_are_accepted(client):
    neutral = {
        "tools": [],
        "tool_choice": "none",
        "response_format": {"type": "text"},
        "user": "me",
        "metadata": {"a": "b"},
        "store": False,
        "seed": None,
        "stop": None,
        "logprobs": False,
        "n": 1,
        "parallel_tool_calls": True,
    }
    assert text_of(ask(client, **neutral)) == text_of(ask(client))


def test_penalties_are_those_of_openai():
    """μ[j] − c[j] · frequency − (c[j] > 0) · presence, where c counts only tokens of the answer."""
    ids = torch.tensor([[5, 5, 1, 2, 2, 2, 3]])
    scores = torch.randn(1, 7, generator=torch.Generator().manual_seed(0))
    penalised = TokenPenalties(2, presence_penalty=0.5, frequency_penalty=0.25)(ids, scores)
    counts = {1: 1, 2: 3, 3: 1}
    for token in range(7):
        count = counts.get(token, 0)
        expected = scores[0, token].item() - 0.25 * count - 0.5 * (count > 0)
        assert penalised[0, token].item() == pytest.approx(expected)


# refusals


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools", "`tools` is not supported"),
        ({"response_format": {"type": "json_object"}}, "response_format", "`response_format` is not supported"),
        ({"response_format": {"type": "json_schema", "json_schema": {}}}, "response_format", "not supported"),
        ({"modalities": ["audio"]}, "modalities", "not supported"),
        ({"audio": {"voice": "a"}}, "audio", "not supported"),
        ({"functions": [{"name": "f"}]}, "functions", "not supported"),
        ({"reasoning_effort": "high"}, "reasoning_effort", "not supported"),
        ({"web_search_options": {}}, "web_search_options", "not supported"),
        ({"store": True}, "store", "not supported"),
        ({"unknown": 1}, "unknown", "`unknown` is not a field of this request"),
        ({"generation_config": "{}"}, "generation_config", "is not a field"),
        ({"n": 0}, "n", "`n` is 0, but it must be an integer from 1 to 4"),
        ({"n": 5}, "n", "from 1 to 4"),
        ({"n": True}, "n", "`n` is True"),
        ({"max_tokens": 0}, "max_tokens", "from 1"),
        ({"max_tokens": -1}, "max_tokens", "from 1"),
        ({"max_tokens": 201}, "max_tokens", "`max_tokens` is 201, but this server generates 200 tokens at most"),
        ({"max_completion_tokens": 201}, "max_completion_tokens", "200 tokens at most"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differ"),
        ({"max_tokens": "3"}, "max_tokens", "'3'"),
        ({"temperature": 2.1}, "temperature", "from 0 to 2"),
        ({"temperature": -0.1}, "temperature", "from 0 to 2"),
        ({"temperature": "hot"}, "temperature", "'hot'"),
        ({"top_p": 1.1}, "top_p", "from 0 to 1"),
        ({"seed": 1.5}, "seed", "an integer"),
        ({"stop": [""]}, "stop", "none empty"),
        ({"stop": 3}, "stop", "a list of texts"),
        ({"logprobs": 3}, "logprobs", "true or false"),
        ({"top_logprobs": 3}, "top_logprobs", "is for requests with `logprobs`"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "from 0 to 20"),
        ({"logit_bias": {"5": 101}}, "logit_bias", "from -100 to 100"),
        ({"logit_bias": {"five": 1}}, "logit_bias", "'five', but its keys"),
        ({"logit_bias": {"100000": 1}}, "logit_bias", "its keys must be token ids below 270"),
        ({"logit_bias": [5]}, "logit_bias", "an object of numbers"),
        ({"presence_penalty": 3}, "presence_penalty", "from -2 to 2"),
        ({"stream": "yes"}, "stream", "true or false"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "is for requests with `stream`"),
        (
            {"stream": True, "stream_options": {"x": 1}},
            "stream_options",
            "only continuous_usage_stats and include_usage",
        ),
        ({"stream": True, "stream_options": {"include_obfuscation": True}}, "stream_options", "only"),
        ({"stream": True, "stream_options": 3}, "stream_options", "only"),
        ({"messages": []}, "messages", "one message or more"),
        ({"messages": "a"}, "messages", "one message or more"),
        ({"messages": None}, "messages", "one message or more"),
        ({"messages": [1]}, "messages[0]", "role"),
        ({"messages": [{"role": "robot", "content": "a"}]}, "messages[0]", "'robot'"),
        ({"messages": [{"role": "tool", "content": "a"}]}, "messages[0]", "'tool'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "None"),
        ({"messages": [{"role": "user", "content": 3}]}, "messages[0].content", "a text or a list of text parts"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content",
            "'image_url', but this server reads only text",
        ),
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "messages[0].content", "None"),
        ({"messages": [{"role": "user", "content": "a", "name": "b"}]}, "messages[0].name", "not supported"),
        ({"messages": chat("a " * 400)}, "messages", "but this server reads 300 at most"),
    ],
)
def test_what_cannot_be_honoured_is_a_400_that_names_it(client, body, param, message):
    response = client.post("/v1/chat/completions", json=CHAT | body)
    error = response.json()["error"]
    assert response.status_code == 400 and error["param"] == param and message in error["message"], error
    assert set(error) == {"message", "type", "param", "code"}


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": ""}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": [3, "a"]}, "prompt"),
        ({}, "prompt"),
        ({"prompt": "a", "messages": chat("a")}, "messages"),
        ({"prompt": "a", "echo": True}, "echo"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "best_of": 3}, "best_of"),
        ({"prompt": "a", "logprobs": True}, "logprobs"),
        ({"prompt": ["a"] * 99}, "prompt"),
    ],
)
def test_bad_completions_are_a_400_that_names_it(client, body, param):
    response = client.post("/v1/completions", json=body)
    assert response.status_code == 400 and response.json()["error"]["param"] == param


def test_ids_outside_the_vocabulary_are_named(client):
    response = client.post("/v1/completions", json={"prompt": [3, 10**6]})
    assert response.status_code == 400 and "1000000 at position 1" in response.json()["error"]["message"]


def test_a_template_that_drops_or_refuses_a_message_is_a_400(chatter, chat_tokenizer):
    tokenizer = copy.deepcopy(chat_tokenizer)
    only_user = "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    server = Server(chatter, tokenizer, Phase15ServerArguments(model_dir=NAME, num_lanes=1))
    with TestClient(build_app(server)) as client:
        for template, message in (
            (only_user, "does not render `messages[0]`"),
            ("{{ raise_exception('no system here') }}", "no system here"),
            (None, "has no chat template"),
        ):
            tokenizer.chat_template = template
            body = {"messages": [{"role": "system", "content": "Be short."}, *chat("a")]}
            response = client.post("/v1/chat/completions", json=body)
            assert response.status_code == 400 and message in response.json()["error"]["message"]
