# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""States of a server: made, asked, kept on disk, forgotten; and what clients may learn of each other's texts."""

import asyncio
import contextlib
import json
import os
import threading
import time

import pytest
import torch


pytest.importorskip("fastapi", reason="serving needs pip install -r requirements-extra.txt")
pytest.importorskip("prometheus_client", reason="the same")
from reference import answer_ids  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from phase15.model.continuous_batching_phase15 import Phase15ContinuousBatchProcessor  # noqa: E402
from phase15.model.state_phase15 import Phase15State, encode_turn  # noqa: E402
from phase15.serving import states  # noqa: E402
from phase15.serving.arguments import Phase15ServerArguments  # noqa: E402
from phase15.serving.openai_api import Server, build_app  # noqa: E402
from phase15.serving.states import StateStore, StoredConversations, salt_of_key  # noqa: E402


pytestmark = pytest.mark.extra
NAME = "saved/model"
DOCUMENT = "I live in Rome. I play the cello. I work as a baker, and my favourite colour is blue. " * 3
QUESTION = [{"role": "user", "content": "Where do I live?"}]
LENGTH = 20


@contextlib.contextmanager
def serving(model, tokenizer, **arguments):
    """A client of a new server, which stops at the end of the block."""
    server = Server(model, tokenizer, Phase15ServerArguments(model_dir=NAME, num_lanes=4, **arguments))
    with TestClient(build_app(server), raise_server_exceptions=False) as client:
        client.server = server
        yield client


@pytest.fixture
def client(chatter, chat_tokenizer):
    with serving(chatter, chat_tokenizer) as client:
        yield client


def make(client, key=None, **body) -> dict:
    response = client.post("/v1/states", json=body, headers=headers(key))
    assert response.status_code == 200, response.text
    return response.json()


def headers(key: str | None) -> dict:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def ask(client, key=None, path="chat/completions", **body) -> dict:
    if path == "chat/completions":
        body = {"messages": QUESTION, **body}
    body = {"model": NAME, "temperature": 0, "max_tokens": LENGTH, **body}
    response = client.post(f"/v1/{path}", json=body, headers=headers(key))
    assert response.status_code == 200, response.text
    return response.json()


def cached(answer: dict) -> int:
    return answer["usage"]["prompt_tokens_details"]["cached_tokens"]


def expected_text(model, tokenizer, ids: list[int], state: Phase15State | None = None) -> str:
    output = model.generate(
        torch.tensor([ids]),
        state=state,
        max_new_tokens=LENGTH,
        do_sample=False,
        attention_mask=torch.ones(1, len(ids)),
    )
    return tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)


def test_questions_to_a_state_are_answered_as_by_generate(client, chatter, chat_tokenizer):
    state = make(client, messages=[{"role": "user", "content": DOCUMENT}])
    ids = encode_turn([{"role": "user", "content": DOCUMENT}], chat_tokenizer, is_first=True)
    expected = chatter.read(ids)
    assert state["object"] == "state" and state["num_tokens"] == len(ids) and state["bytes"] == expected.nbytes
    assert abs(state["created"] - time.time()) < 60
    question = encode_turn(QUESTION, chat_tokenizer, is_first=False, add_generation_prompt=True)
    for _ in range(2):  # the state is not changed
        answer = ask(client, state=state["id"])
        text = answer["choices"][0]["message"]["content"]
        assert text == expected_text(chatter, chat_tokenizer, question, expected)
        assert answer["usage"]["prompt_tokens"] == len(question)
    assert client.get(f"/v1/states/{state['id']}").json() == state


def test_a_text_and_token_ids_and_a_state_that_goes_on(client, chatter, chat_tokenizer):
    ids = chat_tokenizer(DOCUMENT)["input_ids"]
    first = make(client, input=DOCUMENT)
    second = make(client, input=ids[:9], state=first["id"])
    assert second["num_tokens"] == len(ids) + 9 and second["id"] != first["id"]
    expected = chatter.read(ids[:9], state=chatter.read(ids))
    answer = ask(client, path="completions", prompt="Where", state=second["id"])
    question = chat_tokenizer("Where", add_special_tokens=False)["input_ids"]
    assert answer["choices"][0]["text"] == expected_text(chatter, chat_tokenizer, question, expected)


def test_a_state_can_be_deleted(client):
    state = make(client, input=DOCUMENT)
    url = f"/v1/states/{state['id']}"
    assert client.delete(url).json() == {"id": state["id"], "object": "state.deleted", "deleted": True}
    for response in (
        client.get(url),
        client.delete(url),
        client.post("/v1/states", json={"input": "a", "state": "x"}),
    ):
        assert response.status_code == 404 and response.json()["error"]["code"] == "state_not_found"
    body = {"messages": QUESTION, "state": state["id"]}
    assert client.post("/v1/chat/completions", json=body).status_code == 404


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "input"),
        ({"input": "a", "messages": QUESTION}, "input"),
        ({"input": ""}, "input"),
        ({"input": [99999]}, "input"),
        ({"input": ["a"]}, "input"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"input": "a", "state": 3}, "state"),
        ({"input": "a", "echo": True}, "echo"),
        ({"input": "a " * 400}, "input"),
        ({"messages": [{"role": "user", "content": "a " * 400}]}, "messages"),
    ],
)
def test_a_bad_body_is_named(chatter, chat_tokenizer, body, param):
    with serving(chatter, chat_tokenizer, max_state_tokens=300) as client:
        response = client.post("/v1/states", json=body)
        assert response.status_code == 400 and response.json()["error"]["param"] == param
        assert not client.server.store.states


def test_ids_cannot_be_guessed_and_belong_to_their_key(chatter, chat_tokenizer, tmp_path):
    (tmp_path / "keys").write_text("one\ntwo\n")
    with serving(
        chatter, chat_tokenizer, api_key=str(tmp_path / "keys"), state_dir=str(tmp_path / "states")
    ) as client:
        ids = {make(client, "one", input=DOCUMENT)["id"] for _ in range(3)}
        assert len(ids) == 3 and all(len(state_id) >= len("state-") + 32 for state_id in ids)
        url = f"/v1/states/{ids.pop()}"
        assert client.get(url, headers=headers("one")).status_code == 200
        assert client.get(url, headers=headers("two")).status_code == 404
        assert client.get(url).status_code == 401
        assert client.delete(url, headers=headers("two")).status_code == 404
        assert client.post("/v1/states", json={"input": "a"}, headers=headers("three")).status_code == 401
        names = "".join(os.listdir(tmp_path / "states" / "states"))
        assert "safetensors" in names and "one" not in names and url.rpartition("/")[2] not in names


def test_a_client_cannot_confirm_the_text_of_another(chatter, chat_tokenizer, tmp_path):
    (tmp_path / "keys").write_text("one\ntwo\n")
    with serving(
        chatter, chat_tokenizer, api_key=str(tmp_path / "keys"), state_dir=str(tmp_path / "states")
    ) as client:
        messages = [{"role": "user", "content": DOCUMENT}]
        assert cached(ask(client, "one", messages=messages)) == 0
        assert cached(ask(client, "two", messages=messages)) == 0
        assert cached(ask(client, "one", messages=messages)) > 0
    assert salt_of_key("one") != salt_of_key("two") and b"one" not in salt_of_key("one")


def test_clients_share_a_system_prompt(client, chatter, chat_tokenizer):
    system = {"role": "system", "content": DOCUMENT}
    numbers = []
    for name in ("Ada", "Bob", "Cyd"):
        messages = [system, {"role": "user", "content": f"My name is {name}. " * 4}]
        answer = ask(client, messages=messages)
        numbers.append(cached(answer))
        text = chat_tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = chat_tokenizer(text, add_special_tokens=False)["input_ids"]
        assert answer["choices"][0]["message"]["content"] == expected_text(chatter, chat_tokenizer, ids)
    system_tokens = len(encode_turn([system], chat_tokenizer, is_first=True))
    segment = chatter.config.max_query_length
    assert numbers[0] == 0 and all(number >= min(8, system_tokens // segment) * segment for number in numbers[1:])


def test_states_and_prefixes_survive_a_restart(chatter, chat_tokenizer, tmp_path):
    messages = [{"role": "user", "content": DOCUMENT}]
    folder = str(tmp_path / "states")
    with serving(chatter, chat_tokenizer, state_dir=folder) as client:
        state = make(client, input=DOCUMENT)
        first = ask(client, state=state["id"])
        assert cached(ask(client, messages=messages)) == 0
    with serving(chatter, chat_tokenizer, state_dir=folder) as client:
        assert client.get(f"/v1/states/{state['id']}").json() == state
        assert ask(client, state=state["id"])["choices"] == first["choices"]
        assert cached(ask(client, messages=messages)) > 0
    with serving(chatter, chat_tokenizer) as client:
        assert cached(ask(client, messages=messages)) == 0
        assert client.get(f"/v1/states/{state['id']}").status_code == 404


def test_files_that_are_damaged_or_of_another_model_are_not_used(chatter, chat_tokenizer, tmp_path):
    messages = [{"role": "user", "content": DOCUMENT}]
    folder = tmp_path / "states"
    with serving(chatter, chat_tokenizer, state_dir=str(folder)) as client:
        state = make(client, input=DOCUMENT)
        ask(client, messages=messages)
    for path in folder.rglob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-5])
    with serving(chatter, chat_tokenizer, state_dir=str(folder)) as client:
        answer = ask(client, messages=messages)
        assert cached(answer) == 0
        assert client.get(f"/v1/states/{state['id']}").status_code == 404
    with serving(chatter, chat_tokenizer, state_dir=str(folder)) as client:  # written anew
        assert cached(ask(client, messages=messages)) > 0


# the store


@pytest.fixture
def texts(chatter) -> list[Phase15State]:
    return [chatter.read([5 + number] * 9) for number in range(6)]


def test_the_least_recently_used_states_go_first(chatter, texts, tmp_path):
    size = texts[0].nbytes
    for folder in (None, tmp_path):
        limit = 3 * size + size // 2 if folder is None else 3 * file_size(texts[0], tmp_path) + 10
        store = StateStore(chatter, folder, limit)
        for number, state in enumerate(texts[:3]):
            store.put(f"state-{number}", state)
            store.flush()
            time.sleep(0.02)  # the files have different times
        assert store.get("state-0") is not None
        time.sleep(0.02)
        store.put("state-3", texts[3])
        store.flush()
        store.states.clear() if folder else None
        kept = [number for number in range(4) if store.get(f"state-{number}") is not None]
        assert kept == [0, 2, 3]


def file_size(state: Phase15State, folder) -> int:
    state.save_pretrained(folder / "size.safetensors")
    size = (folder / "size.safetensors").stat().st_size
    (folder / "size.safetensors").unlink()
    return size


def test_a_disk_that_cannot_be_written_loses_only_the_file(chatter, texts, tmp_path, monkeypatch):
    store = StateStore(chatter, tmp_path, 10**9)
    with monkeypatch.context() as patch:
        patch.setattr(Phase15State, "save_pretrained", raises)
        store.put("state-0", texts[0])
        store.flush()
    assert store.get("state-0") is not None and not list(tmp_path.iterdir())
    store.put("state-1", texts[1])
    store.flush()
    assert [path.name for path in tmp_path.iterdir()] == ["state-1.safetensors"]


def raises(*_):
    raise OSError(28, "No space left on device")


def test_what_one_server_deletes_is_gone_for_another(chatter, texts, tmp_path):
    first = StateStore(chatter, tmp_path, 10**9)
    second = StateStore(chatter, tmp_path, 10**9)
    first.put("state-0", texts[0])
    first.flush()
    assert second.get("state-0") is not None  # now in the memory of both
    assert first.delete("state-0")
    assert second.get("state-0") is None and first.get("state-0") is None
    assert second.num_bytes == 0 and not second.delete("state-0")


def test_a_prefix_in_use_stays_on_disk(chatter, tmp_path):
    lanes = Phase15ContinuousBatchProcessor(chatter, 1, max_kept_conversations=9)
    store = StateStore(chatter, tmp_path, 10**9)
    kept = StoredConversations(lanes, store)
    soft_prompt = chatter.read([5] * 7).soft_prompt
    for key in (b"hot", b"cold"):
        kept.add(key, soft_prompt)
        store.flush()
        time.sleep(0.02)
    assert kept.find(b"hot") is not None
    times = {key: store.path(kept.name(key)).stat().st_mtime for key in (b"hot", b"cold")}
    assert times[b"hot"] > times[b"cold"] and list(store.states)[-1] == kept.name(b"hot")


def test_the_size_in_memory_is_a_running_total(chatter, texts):
    store = StateStore(chatter, None, 10**9)
    for name, state in (("a", texts[0]), ("b", texts[1]), ("a", texts[2])):
        store.put(name, state)
    assert store.num_bytes == sum(state.nbytes for state in store.states.values()) == 2 * texts[0].nbytes
    store.delete("a")
    assert store.num_bytes == texts[1].nbytes


def test_what_a_killed_server_left_is_removed(chatter, tmp_path, monkeypatch):
    left = tmp_path / ".state-0.safetensors.0123"
    left.write_bytes(b"half")
    StateStore(chatter, tmp_path, 10**9)
    assert left.exists()  # another server may be writing it
    monkeypatch.setattr(states, "STALE_SECONDS", -1)
    StateStore(chatter, tmp_path, 10**9)
    assert not left.exists()


def test_a_client_that_leaves_frees_the_lane_that_reads(chatter, chat_tokenizer):
    server = Server(chatter, chat_tokenizer, Phase15ServerArguments(model_dir=NAME, num_lanes=1))
    body = json.dumps({"input": DOCUMENT * 200}).encode()
    messages = [{"type": "http.request", "body": body}, {"type": "http.disconnect"}]
    scope = {"type": "http", "method": "POST", "path": "/v1/states", "headers": [], "query_string": b""}
    statuses = []

    async def receive():
        if len(messages) == 1:  # the client waits until its text has a lane
            while not server.worker.lanes.lanes:
                await asyncio.sleep(0.01)
        return messages.pop(0)

    async def send(message):
        statuses.append(message.get("status"))

    async def leave():
        await server.start()
        await build_app(server)(scope, receive, send)
        while server.worker.lanes.has_requests:
            await asyncio.sleep(0.01)
        await server.stop()

    asyncio.run(leave())
    assert statuses[0] == 400 and not server.store.states
    assert 'phase15_requests_total{reason="cancelled"} 1.0' in server.metrics().decode()


def test_a_lane_goes_on_while_a_long_text_is_read(client, chatter, chat_tokenizer):
    """Both are done, and the answer is that of `generate`."""
    made = []
    thread = threading.Thread(target=lambda: made.append(make(client, input=DOCUMENT * 20)))
    thread.start()
    answer = ask(client)
    thread.join()
    ids = answer_ids(chatter, chat_tokenizer, QUESTION[0]["content"], LENGTH)
    assert answer["choices"][0]["message"]["content"] == chat_tokenizer.decode(ids, skip_special_tokens=True)
    assert made[0]["num_tokens"] > 1000
