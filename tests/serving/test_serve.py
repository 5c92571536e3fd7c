# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""serve.py as a user runs it: a process of its own on a loopback port, asked by OpenAI's client."""

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
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import pytest
from conftest import listening, resident, wait_until_idle
from reference import ENDING, PROMPTS, answer_ids


pytest.importorskip("fastapi", reason="serving needs pip install -r requirements-extra.txt")
pytest.importorskip("uvicorn", reason="the same")
pytest.importorskip("prometheus_client", reason="the same")
openai = pytest.importorskip("openai", reason="its client asks the server: pip install -r requirements-extra.txt")

pytestmark = pytest.mark.extra
ROOT = Path(__file__).parents[2]
NAME = "saved/model"  # as in `--model_dir saved/model`
LENGTH = 150  # tokens of an answer: some 37 chunks, and far past the base's max_position_embeddings
LONG = {"max_tokens": 100_000, "extra_body": {"ignore_eos": True}}  # minutes; nobody waits for its end


@pytest.fixture(scope="module")
def saved(chatter, chat_tokenizer, tmp_path_factory) -> Path:
    """The folder that `NAME` lies in."""
    folder = tmp_path_factory.mktemp("serve")
    chatter.save_pretrained(folder / NAME)
    chat_tokenizer.save_pretrained(folder / NAME)
    return folder


def chat(prompt: str) -> list[dict]:
    return [{"role": "user", "content": prompt}]


@contextmanager
def serving(folder: Path, *flags: str, log: str = "log"):
    """A server of the saved model, as a user starts it whose Hub cache is empty: its process, and a client of it."""
    log = folder / log
    environment = os.environ | {"HF_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "scripts.serve", "--port", "0", *flags]
    command += ["--model_dir", f"{NAME}/", "--max_tokens", "100000"]  # with the slash that a shell appends
    streams = {"cwd": folder, "env": environment, "stderr": subprocess.STDOUT}
    with log.open("w") as file, subprocess.Popen(command, stdout=file, **streams) as process:
        try:
            for _ in range(1000):
                assert process.poll() is None, log.read_text()
                match = re.search(r"running on http://127.0.0.1:(\d+)", log.read_text())
                if match:
                    break
                time.sleep(0.1)
            url = f"http://127.0.0.1:{match[1]}/v1/"
            with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=300) as client:
                yield process, client
        finally:
            process.kill()


@pytest.fixture(scope="module")
def server(saved):
    with serving(saved) as pair:
        yield pair


@pytest.fixture
def client(server) -> openai.OpenAI:
    return server[1]


def ask(client: openai.OpenAI, prompt: str, length: int = LENGTH) -> str:
    answer = client.chat.completions.create(model=NAME, messages=chat(prompt), max_tokens=length, temperature=0)
    return answer.choices[0].message.content


def ask_for_stream(client: openai.OpenAI, prompt: str) -> list[str]:
    chunks = client.chat.completions.create(
        model=NAME, messages=chat(prompt), max_tokens=LENGTH, temperature=0, stream=True
    )
    return [chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content]


def begin(client: openai.OpenAI):
    """A streamed answer that has begun and goes on for minutes."""
    chunks = client.chat.completions.create(model=NAME, messages=chat("a"), stream=True, **LONG)
    next(chunk for chunk in chunks if chunk.choices[0].delta.content)
    return chunks


def metric(client: openai.OpenAI, name: str) -> float:
    text = urllib.request.urlopen(str(client.base_url).replace("/v1/", "/metrics"), timeout=60).read().decode()
    return float(re.search(rf"^{name} (\S+)$", text, re.M)[1])


def wait_for_free_lanes(client: openai.OpenAI):
    deadline = time.monotonic() + 30
    while metric(client, "phase15_lanes_in_use"):
        assert time.monotonic() < deadline, "a lane is still in use"
        time.sleep(0.05)


def expected_answer(model, tokenizer, prompt: str, length: int = LENGTH) -> str:
    return tokenizer.decode(answer_ids(model, tokenizer, prompt, length), skip_special_tokens=True)


def test_an_answer_is_what_generate_gives(client, chatter, chat_tokenizer):
    assert LENGTH > 2 * chatter.config.text_config.max_position_embeddings
    expected = expected_answer(chatter, chat_tokenizer, PROMPTS[1])
    answer = client.chat.completions.create(model=NAME, messages=chat(PROMPTS[1]), max_tokens=LENGTH, temperature=0)
    assert answer.choices[0].message.content == expected and answer.model == NAME
    assert (answer.choices[0].finish_reason, answer.usage.completion_tokens) == ("length", LENGTH)
    pieces = ask_for_stream(client, PROMPTS[1])
    assert len(pieces) > 10 and "".join(pieces) == expected
    answer = client.chat.completions.create(model=NAME, messages=chat(ENDING), temperature=0)  # no max_tokens
    assert answer.choices[0].message.content == expected_answer(chatter, chat_tokenizer, ENDING)
    assert answer.choices[0].finish_reason == "stop"
    answer = client.completions.create(model=NAME, prompt="Blue light", max_tokens=LENGTH, temperature=0)
    ids = answer_ids(chatter, chat_tokenizer, chat_tokenizer("Blue light")["input_ids"])
    assert answer.choices[0].text == chat_tokenizer.decode(ids, skip_special_tokens=True)


def test_twenty_turns_are_answered_as_if_each_were_read_afresh(client, chatter, chat_tokenizer):
    messages = []
    cached_tokens = []
    for turn in range(20):
        messages += chat(f"Question {turn}?")
        ids = chat_tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        answer = client.chat.completions.create(model=NAME, messages=messages, max_tokens=9, temperature=0)
        expected = chat_tokenizer.decode(answer_ids(chatter, chat_tokenizer, ids, 9), skip_special_tokens=True)
        assert answer.choices[0].message.content == expected
        cached_tokens.append(answer.usage.prompt_tokens_details.cached_tokens)
        assert answer.usage.prompt_tokens == len(ids)
        messages.append({"role": "assistant", "content": "Yes."})  # not the answer, as when a client edits it
    assert cached_tokens[0] == 0 and cached_tokens == sorted(cached_tokens)
    assert cached_tokens[-1] > 0.8 * len(ids)


def test_many_clients_at_once_get_each_its_own_answer(client, chatter, chat_tokenizer):
    expected = [expected_answer(chatter, chat_tokenizer, prompt) for prompt in PROMPTS]
    assert len(set(expected)) == len(PROMPTS)
    barrier = threading.Barrier(20)  # more than lanes

    def ask_at_once(index: int) -> str:
        barrier.wait()
        prompt = PROMPTS[index % len(PROMPTS)]
        return "".join(ask_for_stream(client, prompt)) if index % 2 else ask(client, prompt)

    with ThreadPoolExecutor(20) as pool:
        assert list(pool.map(ask_at_once, range(20))) == 5 * expected


def test_answers_grow_beside_each_other(client):
    """The second does not wait for the first, which goes on."""
    first = begin(client)
    assert ask(client, "Hello", length=9)
    assert next(chunk for chunk in first if chunk.choices[0].delta.content)
    first.close()
    wait_for_free_lanes(client)


def test_a_client_that_leaves_frees_its_lane_streamed_or_not(server, client):
    begin(client).close()
    wait_for_free_lanes(client)
    with pytest.raises(openai.APITimeoutError):
        client.with_options(timeout=1).chat.completions.create(model=NAME, messages=chat("a"), **LONG)
    wait_for_free_lanes(client)
    wait_until_idle(server[0])


def test_a_full_server_refuses_and_names_a_time_to_retry(saved):
    with serving(saved, "--num_lanes", "1", "--max_waiting", "0", log="full.log") as (_, client):
        chunks = begin(client)
        with pytest.raises(openai.RateLimitError) as raised:
            ask(client, "Hello")
        assert raised.value.response.headers["retry-after"] == "1"
        chunks.close()
        wait_for_free_lanes(client)
        assert ask(client, "Hello", length=3)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_lets_what_is_under_way_end_within_the_time(saved, chatter, chat_tokenizer, number):
    with serving(saved, "--shutdown_seconds", "60", log="term.log") as (process, client):
        chunks = client.chat.completions.create(
            model=NAME, messages=chat(PROMPTS[0]), max_tokens=3000, temperature=0, stream=True
        )
        text = next(chunk.choices[0].delta.content for chunk in chunks if chunk.choices[0].delta.content)
        process.send_signal(number)
        text += "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
        assert text == expected_answer(chatter, chat_tokenizer, PROMPTS[0], 3000)
        assert process.wait(timeout=60) == 0
        with pytest.raises(openai.APIConnectionError):
            ask(client, "Hello")


def test_a_signal_ends_what_takes_longer(saved):
    with serving(saved, "--shutdown_seconds", "1", log="late.log") as (process, client):
        begin(client)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0


def test_the_server_listens_on_the_loopback_address_only(client):
    assert listening(client.base_url.port) == {"127.0.0.1"}


def test_the_memory_of_the_lanes_is_logged(server, saved):
    log = (saved / "log").read_text()
    assert re.search(
        r"saved/model on cpu: 16 lanes of 0\.0 MB, chunks of \d+ tokens, and up to 64 kept conversations of 0\.00 MB",
        log,
    )


# under load

REQUESTS = 400
CLIENTS = 16
ALLOWED = re.compile(r"INFO: .*")  # what the log may hold once the server is up: a line per answer


@dataclass(frozen=True)
class Ask:
    """A request with one right answer."""

    prompt: str
    length: int
    is_chat: bool
    is_streamed: bool

    def ask(self, client: openai.OpenAI) -> str:
        settings = {"model": NAME, "max_tokens": self.length, "stream": self.is_streamed, "temperature": 0}
        if self.is_chat:
            answer = client.chat.completions.create(messages=chat(self.prompt), **settings)
            if self.is_streamed:
                return "".join(chunk.choices[0].delta.content or "" for chunk in answer)
            return answer.choices[0].message.content
        answer = client.completions.create(prompt=self.prompt, **settings)
        return "".join(chunk.choices[0].text for chunk in (answer if self.is_streamed else [answer]))


def hang_up(client: openai.OpenAI, index: int):
    """Leaves in one of four ways; an answer that nobody stops would take minutes."""
    body = {"model": NAME, "messages": chat(PROMPTS[index % 4]), "stream": True, "max_tokens": 100_000}
    way = index // 5 % 4
    if way == 0:  # in the middle of the answer
        chunks = client.chat.completions.create(**body, extra_body={"ignore_eos": True})
        for _ in range(3):
            next(chunks)
        chunks.close()
        return
    data = json.dumps({**body, "ignore_eos": True, "stream": way > 1}).encode()
    headers = f"Host: x\r\nContent-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    data = f"POST /v1/chat/completions HTTP/1.1\r\n{headers}".encode() + data
    with socket.create_connection(("127.0.0.1", client.base_url.port)) as connection:
        connection.sendall(data if way < 3 else data[:-40])  # at once, or in the middle of the request


@pytest.mark.slow
def test_400_requests_of_16_clients_are_answered_as_alone(saved):
    requests = [
        Ask(f"{PROMPTS[index % 4]} " * (1 + 7 * (index % 3)), 6 + 2 * (index % 8), index % 3 > 0, index % 2 > 0)
        for index in range(24)
    ]
    with serving(saved, "--max_kept_conversations", "8", log="load.log") as (process, client):
        alone = [request.ask(client) for request in requests]
        assert len(set(alone)) > 12
        memory = []
        answers = {}
        barrier = threading.Barrier(CLIENTS)

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
        wait_for_free_lanes(client)
        wait_until_idle(process)
        assert requests[0].ask(client) == alone[0]
    assert len(answers) == REQUESTS * 4 // 5 and len(memory) == REQUESTS
    assert answers == {index: alone[index % len(requests)] for index in answers}
    early = median(memory[REQUESTS // 2 : REQUESTS // 2 + 50])
    late = median(memory[-50:])
    print(f"resident: {early / 1e6:.1f} MB, then {late / 1e6:.1f} MB")
    assert late - early < 4e6
    log = (saved / "load.log").read_text().partition("Application startup complete.\n")[2]
    assert log.count('HTTP/1.1" 200') >= len(answers) and 'HTTP/1.1" 5' not in log
    assert [line for line in log.splitlines() if not ALLOWED.fullmatch(line)] == []
