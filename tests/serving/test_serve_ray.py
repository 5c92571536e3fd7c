# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""serve_ray.py as a user runs it: two replicas on this machine's CPUs, one of which dies."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from reference import PROMPTS, answer_ids
from test_serve import NAME, ROOT, chat, expected_answer


pytest.importorskip("ray", reason="serving on several machines needs pip install -r requirements-extra.txt")
openai = pytest.importorskip("openai", reason="the same")

pytestmark = [pytest.mark.extra, pytest.mark.slow]


def replicas() -> set[int]:
    """Returns the process ids of the replicas (Linux)."""
    pids = set()
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if b"ServeReplica:phase15:Lanes" in (folder / "cmdline").read_bytes():
                pids.add(int(folder.name))
    return pids


@pytest.fixture(scope="module")
def client(chatter, chat_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ray")
    chatter.save_pretrained(folder / NAME)
    chat_tokenizer.save_pretrained(folder / NAME)
    (folder / "key").write_text("secret")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, "-m", "scripts.serve_ray", "--model_dir", f"{NAME}/", "--port", port]
    command += ["--min_replicas", "2", "--max_replicas", "2", "--num_lanes", "4", "--api_key", "key"]
    command += ["--state_dir", "states"]
    log = folder / "log"
    with (
        log.open("w") as file,
        subprocess.Popen(command, cwd=folder, env=environment, stdout=file, stderr=subprocess.STDOUT) as process,
    ):
        try:
            deadline = time.monotonic() + 150
            while True:
                assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-5000:]
                with suppress(OSError):
                    urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                time.sleep(0.5)
            url = f"http://127.0.0.1:{port}/v1/"
            with openai.OpenAI(base_url=url, api_key="secret", max_retries=0, timeout=120) as client:
                yield client
        finally:
            process.send_signal(signal.SIGINT)
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=60)
            process.kill()


def ask(client, messages: list[dict], **settings):
    return client.chat.completions.create(model=NAME, messages=messages, temperature=0, max_tokens=20, **settings)


def test_two_replicas_serve_and_one_dies_and_no_later_request_fails(client, chatter, chat_tokenizer):
    expected = [expected_answer(chatter, chat_tokenizer, prompt, 20) for prompt in PROMPTS]

    def right(index: int) -> bool:
        prompt = PROMPTS[index % len(PROMPTS)]
        if index % 2:
            text = "".join(chunk.choices[0].delta.content or "" for chunk in ask(client, chat(prompt), stream=True))
        else:
            text = ask(client, chat(prompt)).choices[0].message.content
        return text == expected[index % len(PROMPTS)]

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, range(24)))
    pids = replicas()
    assert len(pids) == 2
    os.kill(min(pids), signal.SIGKILL)
    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(right, range(40)))
    deadline = time.monotonic() + 120
    while len(replicas()) < 2:  # another takes its place
        assert time.monotonic() < deadline
        time.sleep(0.5)
    assert all(map(right, range(8)))


def test_a_conversation_goes_back_to_the_replica_that_keeps_it(client, chatter, chat_tokenizer):
    # They differ from the first token on: a prefix that they shared would be kept.
    talks = [chat(f"{index}. {PROMPTS[index % len(PROMPTS)]}") for index in range(8)]
    for turn in range(4):
        for talk in talks:
            answer = ask(client, talk)
            ids = chat_tokenizer.apply_chat_template(talk, add_generation_prompt=True)["input_ids"]
            text = chat_tokenizer.decode(answer_ids(chatter, chat_tokenizer, ids, 20), skip_special_tokens=True)
            assert answer.choices[0].message.content == text
            cached_tokens = answer.usage.prompt_tokens_details.cached_tokens
            assert cached_tokens == 0 if turn == 0 else cached_tokens > 0
            talk += [{"role": "assistant", "content": "Yes."}, *chat(f"Turn {turn}?")]


def test_a_state_that_one_replica_made_is_found_by_all(client, chatter, chat_tokenizer):
    state = client.post("/states", body={"messages": chat("I live in Rome. " * 9)}, cast_to=object)
    own = chatter.read_chat(chat("I live in Rome. " * 9), chat_tokenizer)
    assert state["num_tokens"] == int(own.num_tokens[0])
    question = own.next_turn(chat("Where?"), chat_tokenizer)
    output = chatter.generate(**question, state=own, max_new_tokens=20, do_sample=False)
    text = chat_tokenizer.decode(output[0, question["input_ids"].shape[1] :], skip_special_tokens=True)
    with ThreadPoolExecutor(8) as pool:  # more than one replica answers at a time
        answers = pool.map(lambda _: ask(client, chat("Where?"), extra_body={"state": state["id"]}), range(16))
        assert {answer.choices[0].message.content for answer in answers} == {text}
    for _ in range(4):
        assert client.get(f"/states/{state['id']}", cast_to=object) == state
    assert client.delete(f"/states/{state['id']}", cast_to=object)["deleted"]
    for _ in range(9):  # on every replica, also on those that have it in memory
        with pytest.raises(openai.NotFoundError):
            ask(client, chat("Where?"), extra_body={"state": state["id"]})


def test_errors_are_those_of_one_server(client):
    with pytest.raises(openai.BadRequestError) as raised:
        ask(client, chat("a"), n=9)
    assert raised.value.param == "n"
    with pytest.raises(openai.NotFoundError):
        client.chat.completions.create(model="another", messages=chat("a"))
    with pytest.raises(openai.AuthenticationError):
        ask(client.with_options(api_key="wrong"), chat("a"))
    assert re.fullmatch(NAME, client.models.list().data[0].id)
