# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""serve.py as a user runs it: a process of its own on a loopback port, asked by OpenAI's client."""

import asyncio
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace

import pytest
import torch
from conftest import listening, resident, wait_until_idle
from reference import LLM_SIZES, SIZES, randomise_alpha
from transformers import LlamaConfig

from configuration_phase15 import Phase15Config
from modeling_phase15 import Phase15ForCausalLM


pytest.importorskip("uvicorn", reason="serving needs pip install -r requirements-extra.txt")
fastapi = pytest.importorskip("fastapi", reason="the same")
serve = pytest.importorskip("scripts.serve", reason="the same")
openai = pytest.importorskip("openai", reason="its client asks the server: pip install -r requirements-extra.txt")

pytestmark = pytest.mark.extra
ROOT = Path(__file__).parent.parent
NAME = "saved/model"  # as in `--model_dir saved/model`
PROMPTS = ["Hello", "Why is the sky blue?", "a", "What is the function os.path.join for?"]
ENDING = "Tell me a story."  # its answer holds the end token
LENGTH = 150  # tokens of an answer: some 37 chunks, and far past the base's max_position_embeddings
NEVER_ENDING = {"generation_config": json.dumps({"min_new_tokens": 10**6, "max_new_tokens": 10**6})}


@pytest.fixture(scope="module")
def saved(chat_tokenizer, tmp_path_factory) -> tuple[Path, Phase15ForCausalLM]:
    """A tiny model with Δ ≠ 0 and the folder that `NAME` lies in; it writes printable ASCII only."""
    torch.manual_seed(1)
    text_config = LlamaConfig(**LLM_SIZES | {"vocab_size": len(chat_tokenizer)})
    model = randomise_alpha(Phase15ForCausalLM(Phase15Config(text_config=text_config, **SIZES))).eval()
    # A character cut in two at the end of an answer is "�" in the text as a whole, and left out of a stream.
    texts = [chat_tokenizer.decode([index]) for index in range(len(chat_tokenizer))]
    bad = [index for index, text in enumerate(texts) if not text.isascii() or not text.isprintable()]
    model.generation_config.suppress_tokens = bad + chat_tokenizer.all_special_ids
    model.generation_config.pad_token_id = chat_tokenizer.pad_token_id
    free, used = generate_ids(model, chat_tokenizer, ENDING)[20:], set()
    for prompt in PROMPTS:
        used |= set(generate_ids(model, chat_tokenizer, prompt))
    model.generation_config.eos_token_id = next(token for token in free if token not in used)
    folder = tmp_path_factory.mktemp("serve")
    model.save_pretrained(folder / NAME)
    chat_tokenizer.save_pretrained(folder / NAME)
    return folder, model


def chat(prompt: str) -> list[dict]:
    return [{"role": "user", "content": prompt}]


def generate_ids(model, tokenizer, prompt: str | list[int], length: int = LENGTH) -> list[int]:
    """What the model itself answers, greedily, to a chat's user or, given ids, to a text."""
    if isinstance(prompt, str):
        prompt = tokenizer.apply_chat_template(chat(prompt), add_generation_prompt=True)["input_ids"]
    ids = torch.tensor([prompt])
    output = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=length)
    return output[0, len(prompt) :].tolist()


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


@contextmanager
def serving(folder: Path, log: str = "log"):
    """A server of the saved model, as a user starts it whose Hub cache is empty: its process, and a client of it."""
    port, log = free_port(), folder / log
    environment = os.environ | {"HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "scripts.serve", "--port", str(port)]
    command += ["--model_dir", f"{NAME}/"]  # with the slash that a shell appends
    streams = {"cwd": folder, "env": environment, "stderr": subprocess.STDOUT}
    with log.open("w") as file, subprocess.Popen(command, stdout=file, **streams) as process:
        try:
            for _ in range(1000):
                assert process.poll() is None, log.read_text()
                with suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=60)
                    break
                time.sleep(0.1)
            url = f"http://127.0.0.1:{port}/v1/"
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:
                yield process, client
        finally:
            process.kill()


@pytest.fixture(scope="module")
def client(saved) -> openai.OpenAI:
    with serving(saved[0]) as (_, client):
        yield client


def ask(client: openai.OpenAI, prompt: str, length: int = LENGTH) -> str:
    answer = client.chat.completions.create(model=NAME, messages=chat(prompt), max_tokens=length, temperature=0)
    return answer.choices[0].message.content


def ask_for_stream(client: openai.OpenAI, prompt: str) -> list[str]:
    chunks = client.chat.completions.create(
        model=NAME, messages=chat(prompt), max_tokens=LENGTH, temperature=0, stream=True
    )
    return [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]


def post(client: openai.OpenAI, path: str, body: bytes) -> int:
    """The status that the server answers with to a body which the client would not send."""
    request = urllib.request.Request(f"{client.base_url}{path}", body, {"Content-Type": "application/json"})
    try:
        return urllib.request.urlopen(request, timeout=300).status
    except urllib.error.HTTPError as error:
        return error.code


def test_an_answer_is_what_generate_gives(client, saved, chat_tokenizer):
    ids = generate_ids(saved[1], chat_tokenizer, PROMPTS[1])
    assert len(ids) == LENGTH > 2 * saved[1].config.text_config.max_position_embeddings
    answer = client.chat.completions.create(model=NAME, messages=chat(PROMPTS[1]), max_tokens=LENGTH, temperature=0)
    assert answer.choices[0].message.content == chat_tokenizer.decode(ids)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", LENGTH)
    pieces = ask_for_stream(client, PROMPTS[1])
    assert len(pieces) > 10 and "".join(pieces) == chat_tokenizer.decode(ids)


def test_an_answer_ends_at_the_end_token(client, saved, chat_tokenizer):
    ids = generate_ids(saved[1], chat_tokenizer, ENDING)
    assert 20 < len(ids) < LENGTH and ids[-1] == saved[1].generation_config.eos_token_id
    answer = client.chat.completions.create(model=NAME, messages=chat(ENDING), temperature=0)  # no max_tokens
    assert answer.choices[0].message.content == chat_tokenizer.decode(ids)
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("stop", len(ids))


def test_a_conversation_is_answered_whole(client, saved, chat_tokenizer):
    conversation = [*chat("Hello"), {"role": "assistant", "content": "Hi."}, *chat("Why is the sky blue?")]
    ids = chat_tokenizer.apply_chat_template(conversation, add_generation_prompt=True)["input_ids"]
    answer = client.chat.completions.create(model=NAME, messages=conversation, max_tokens=LENGTH, temperature=0)
    assert answer.choices[0].message.content == chat_tokenizer.decode(generate_ids(saved[1], chat_tokenizer, ids))
    assert answer.usage.prompt_tokens == len(ids)


@pytest.mark.parametrize("stream", [False, True])
def test_a_text_is_completed_without_the_chat_template(client, saved, chat_tokenizer, stream):
    prompt = "Blue light scatters"
    answers = client.completions.create(model=NAME, prompt=prompt, max_tokens=LENGTH, temperature=0, stream=stream)
    text = "".join(answer.choices[0].text for answer in (answers if stream else [answers]))
    ids = generate_ids(saved[1], chat_tokenizer, chat_tokenizer(prompt)["input_ids"])
    assert text == chat_tokenizer.decode(ids)


def test_four_clients_at_once_get_each_its_own_answer(client, saved, chat_tokenizer):
    expected = [chat_tokenizer.decode(generate_ids(saved[1], chat_tokenizer, prompt)) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    barrier = threading.Barrier(len(PROMPTS))

    def ask_at_once(index: int) -> str:
        barrier.wait()
        return "".join(ask_for_stream(client, PROMPTS[index])) if index % 2 else ask(client, PROMPTS[index])

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        assert list(pool.map(ask_at_once, range(len(PROMPTS)))) == expected


def test_a_client_that_leaves_does_not_keep_the_others_waiting(client, saved, chat_tokenizer):
    chunks = client.chat.completions.create(model=NAME, messages=chat("a"), stream=True, extra_body=NEVER_ENDING)
    next(chunk for chunk in chunks if chunk.choices[0].delta.content)
    chunks.close()
    assert ask(client, "Hello") == chat_tokenizer.decode(generate_ids(saved[1], chat_tokenizer, "Hello"))


def test_the_server_names_its_model_and_refuses_others(client):
    assert [model.id for model in client.models.list()] == [NAME]
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(model="another", messages=chat("Hello"))
    assert "pinned to 'saved/model'" in raised.value.response.text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("chat/completions", b"{"),
        ("chat/completions", b"[]"),
        ("chat/completions", b"{}"),
        ("chat/completions", b'{"messages": []}'),
        ("chat/completions", b'{"messages": "Hello"}'),
        ("chat/completions", b'{"messages": [{"role": "user", "content": "a"}], "max_tokens": -1}'),
        ("chat/completions", b'{"messages": [{"role": "user", "content": "a"}], "unknown": 1}'),
        ("completions", b'{"prompt": ["a", "b"]}'),
        ("completions", b'{"prompt": ""}'),
    ],
)
def test_a_bad_request_gets_an_error_and_the_server_lives_on(client, saved, chat_tokenizer, path, body):
    assert post(client, path, body) in (400, 422, 500)
    assert ask(client, "a", length=4) == chat_tokenizer.decode(generate_ids(saved[1], chat_tokenizer, "a", length=4))


def test_an_interrupt_ends_the_server_during_an_answer(saved):
    with serving(saved[0]) as (process, client):
        chunks = client.chat.completions.create(model=NAME, messages=chat("a"), stream=True, extra_body=NEVER_ENDING)
        next(chunk for chunk in chunks if chunk.choices[0].delta.content)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == -signal.SIGINT  # not SIGABRT


def test_the_server_has_no_address_that_nobody_has_looked_at(client):
    """A release that adds one, or renames one that serve.py takes away, is noticed here."""
    url = str(client.base_url).replace("/v1/", "/openapi.json")
    paths = set(json.load(urllib.request.urlopen(url, timeout=60))["paths"])
    answers = {"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/models", "/health"}
    errors = {"/v1/systemone", "/v1/audio/transcriptions"}  # for other kinds of models; the first is of 5.23
    assert answers <= paths <= answers | errors


@pytest.mark.parametrize("path", ["load_model", "reset"])
def test_no_client_can_load_or_drop_a_model(client, path):
    url = str(client.base_url).replace("/v1/", f"/{path}")
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(urllib.request.Request(url, b'{"model": "another"}'), timeout=60)


def test_the_server_listens_on_the_loopback_address_alone(client):
    assert listening(client.base_url.port) == {"127.0.0.1"}


@pytest.mark.parametrize("length", [0, 1, 3])
def test_an_answer_ends_with_its_client_whenever_that_leaves(length):
    """Starlette alone leaves some generators, which would cancel, to the garbage collector."""

    async def ask(delay: int, is_ours: bool) -> bool:
        """Whether the answer has been cancelled when the response of a client that leaves after `delay` has ended."""
        is_cancelled = False

        async def answer():  # as the library's: /v1/chat/completions sends a first message without a token
            nonlocal is_cancelled
            try:
                for _ in range(length):
                    yield "token"
                await asyncio.sleep(60)
                yield "token"
            except (GeneratorExit, asyncio.CancelledError):
                is_cancelled = True
                raise

        app = fastapi.FastAPI()

        @app.middleware("http")  # the library's server has one
        async def pass_on(request, call_next):
            return await call_next(request)

        @app.post("/")
        async def respond(body: dict):
            return fastapi.responses.StreamingResponse(answer())

        if is_ours:
            server = SimpleNamespace(config=SimpleNamespace(app=app), run=lambda: None)
            serve.command_for(NAME).start_server(SimpleNamespace(server=server))
        messages = iter([{"type": "http.request", "body": b"{}"}])

        async def receive():
            for message in messages:
                return message
            for _ in range(delay):
                await asyncio.sleep(0)
            return {"type": "http.disconnect"}

        async def send(message):
            pass

        headers = [(b"content-type", b"application/json")]
        scope = {"type": "http", "method": "POST", "path": "/", "query_string": b"", "headers": headers}
        await asyncio.wait_for(app(scope, receive, send), timeout=30)
        return is_cancelled

    gc.disable()
    try:
        alone = [asyncio.run(ask(delay, False)) for delay in range(40)]
        ours = [asyncio.run(ask(delay, True)) for delay in range(40)]
    finally:
        gc.enable()
    assert all(ours)
    assert length == 0 or not all(alone)  # or the middleware can go


def test_a_request_that_is_cut_off_ends_at_once():
    """A server that waited for the response to begin would wait for ever: there is none."""

    async def read(scope, receive, send):
        while (message := await receive())["type"] != "http.disconnect":
            assert message["more_body"]

    messages = iter([{"type": "http.request", "more_body": True}, {"type": "http.disconnect"}])

    async def receive():
        return next(messages)

    asyncio.run(asyncio.wait_for(serve.EndWithTheClient(read)({"type": "http"}, receive, None), timeout=30))


# under load

REQUESTS, CLIENTS = 200, 16
# what the log may hold once the server is up: a line per answer and a line per request that was read (a folder has had
# no revision since transformers 5.24)
ALLOWED = re.compile(r"INFO: .*|\[transformers\] \[Request received\] Model: saved/model(@main)?, CB: False")


@dataclass(frozen=True)
class Request:
    """A request with one right answer."""

    prompt: str
    length: int
    is_chat: bool
    is_streamed: bool

    def ask(self, client: openai.OpenAI) -> str:
        settings = {"model": NAME, "max_tokens": self.length, "stream": self.is_streamed}
        if self.is_chat:
            answer = client.chat.completions.create(messages=chat(self.prompt), **settings)
            if self.is_streamed:
                return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            return answer.choices[0].message.content
        answer = client.completions.create(prompt=self.prompt, **settings)
        return "".join(chunk.choices[0].text for chunk in (answer if self.is_streamed else [answer]))


def hang_up(client: openai.OpenAI, index: int):
    """Leaves in one of four ways; an answer that nobody stops would not end."""
    body = {"model": NAME, "messages": chat(PROMPTS[index % 4]), "stream": True, **NEVER_ENDING}
    way = index // 5 % 4
    if way == 0:  # in the middle of the answer
        del body["generation_config"]
        chunks = client.chat.completions.create(**body, extra_body=NEVER_ENDING)
        for _ in range(3):
            next(chunks)
        chunks.close()
        return
    if way == 1:  # without a stream the server does not notice: the answer has to be short
        body |= {"stream": False, "generation_config": "{}", "max_tokens": 8}
    data = json.dumps(body).encode()
    headers = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    data = f"POST /v1/chat/completions HTTP/1.1\r\n{headers}".encode() + data
    with socket.create_connection(("127.0.0.1", client.base_url.port)) as connection:
        connection.sendall(data if way < 3 else data[:-40])  # at once, or in the middle of the request


@pytest.mark.slow
def test_200_requests_of_16_clients_are_answered_as_alone(saved):
    requests = [
        Request(f"{PROMPTS[index % 4]} " * (1 + 7 * (index % 3)), 6 + 2 * (index % 8), index % 3 > 0, index % 2 > 0)
        for index in range(24)
    ]
    with serving(saved[0], "load.log") as (process, client):
        alone = [request.ask(client) for request in requests]
        assert len(set(alone)) > 12
        memory, answers, barrier = [], {}, threading.Barrier(CLIENTS)

        def work(first: int):
            barrier.wait()
            for index in range(first, REQUESTS, CLIENTS):
                if index % 5 == 4:
                    hang_up(client, index)
                else:
                    answers[index] = requests[index % len(requests)].ask(client)
                memory.append(resident(process.pid))

        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(work, range(CLIENTS)))
        wait_until_idle(process)
        assert requests[0].ask(client) == alone[0]
    assert len(answers) == REQUESTS * 4 // 5 and len(memory) == REQUESTS
    assert answers == {index: alone[index % len(requests)] for index in answers}
    early, late = (median(memory[start : start + 50]) for start in (REQUESTS // 2, REQUESTS - 50))
    print(f"resident: {early / 1e6:.1f} MB, then {late / 1e6:.1f} MB")
    assert late - early < 4e6
    log = (saved[0] / "load.log").read_text().partition("Application startup complete.\n")[2]
    assert log.count('HTTP/1.1" 200') >= len(answers) and 'HTTP/1.1" 5' not in log
    assert [line for line in log.splitlines() if not ALLOWED.fullmatch(line)] == []
