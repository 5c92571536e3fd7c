# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
How many facts a model answers, against row-by-row references; and the quickstart's model, which has to remember over
512 words what its window has long lost.

    python -m pytest -s tests/evaluation/test_recall.py     trains the quickstart unless outputs/quickstart is its run
"""

import copy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from train_here import parse

from phase15.data.facts import fresh_chats
from phase15.evaluation.recall import encode_chats, format_chat, recall, shorten
from phase15.hub.runs import read_run
from phase15.loading import load_phase15


ROOT = Path(__file__).parents[2]


def nats(model, examples) -> float:
    """Per answer token, row by row, with the model's own `forward`."""
    total = tokens = 0
    for query, answer in examples:
        ids = torch.tensor([query + answer])
        labels = ids.clone()
        labels[:, : len(query)] = -100
        total += model(input_ids=ids, labels=labels).loss.item() * len(answer)
        tokens += len(answer)
    return total / tokens


@torch.no_grad()
def test_losses_are_those_of_forward(talker):
    model, tokenizer = talker
    examples = encode_chats(fresh_chats(5, 3, 2), tokenizer)
    window = copy.deepcopy(model)
    window.hypernet.alpha.zero_()
    (at,) = recall(model, tokenizer, [5], 2, num_chats=3)
    assert at["distance"] == 5 and at["facts"] == 6 and at["tokens"] >= 5
    measured = {name: row["nats"] for name, row in at["rows"].items()}
    assert measured["model"] == pytest.approx(nats(model, examples), rel=1e-5)
    assert measured["window"] == pytest.approx(nats(window, examples), rel=1e-5)
    assert measured["full_context"] == pytest.approx(nats(model.llm, examples), rel=1e-5)
    assert len({round(value, 5) for value in measured.values()}) == 4
    (alone,) = recall(model.llm, tokenizer, [5], 2, num_chats=3)
    assert alone["rows"] == {"full_context": at["rows"]["full_context"]}


def test_values_are_completed_after_the_reference(talker):
    """Chat by chat, with `forward`. A random model knows no value, so this one has learned one chat by heart."""
    model, tokenizer = copy.deepcopy(talker[0]), talker[1]
    chats = fresh_chats(5, 3, 2)
    examples = encode_chats(chats, tokenizer)
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)

    def forward(asked, query, answer):
        ids = torch.tensor([query + answer])
        return asked(input_ids=ids, labels=ids.masked_fill(torch.arange(ids.shape[1]) < len(query), -100))

    for _ in range(80):
        for asked in (model, model.llm):
            forward(asked, *examples[1]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    (at,) = recall(model, tokenizer, [5], 2, num_chats=3)
    window = copy.deepcopy(model)
    window.hypernet.alpha.data.zero_()
    for name, asked in (("model", model), ("window", window), ("full_context", model.llm)):
        completed = 0
        for chat, (query, answer) in zip(chats, examples, strict=True):
            logits = forward(asked, query, answer).logits[0]
            said = [int(logits[len(query) + place - 1].argmax()) for place in range(len(answer))]
            for value in chat.values:
                text = tokenizer(f" {value}", add_special_tokens=False)["input_ids"]
                (start,) = [n for n in range(len(answer)) if answer[n : n + len(text)] == text]
                completed += said[start : start + len(text)] == text
        assert at["rows"][name]["completed"] == completed / 6, name
        assert completed < 6 and (completed > 0 or name == "window"), (name, completed)


def test_answers_are_generated_under_each_control(talker, monkeypatch):
    """Each variant's own greedy answers are what is counted."""
    model, tokenizer = talker
    said = {}

    def count(chat, text):
        said.setdefault(chat.statements, []).append(text)
        return len(text) > 0

    monkeypatch.setattr("phase15.data.facts.Chat.count_right", count)
    (at,) = recall(model, tokenizer, [5], 2, num_chats=3)
    window = copy.deepcopy(model)
    window.hypernet.alpha.data.zero_()
    chats = fresh_chats(5, 3, 2)
    examples = encode_chats(chats, tokenizer)
    longest = max(len(example.answer) for example in examples)
    for index, (chat, example) in enumerate(zip(chats, examples, strict=True)):
        ids = torch.tensor([example.query])
        for place, answering in ((0, model), (1, window), (3, model.llm)):
            settings = {"max_new_tokens": longest, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
            output = answering.generate(ids, attention_mask=torch.ones_like(ids), **settings, pad_token_id=0)
            answer = output[0, len(example.query) :].tolist()
            answer = answer[: answer.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in answer else answer
            assert said[chat.statements][place] == tokenizer.decode(answer), (index, place)
    assert at["rows"]["model"]["right"] == 3 / 6


def test_no_chat_is_left_alone(talker):
    """Shuffled with itself it would keep its own Δ."""
    whole, parts = (recall(*talker, [5], 2, num_chats=5, batch_size=size)[0]["rows"] for size in (5, 2))
    assert whole["shuffled_delta"] != whole["model"] != parts["shuffled_delta"]
    for name in ("model", "window", "full_context"):
        assert parts[name]["nats"] == pytest.approx(whole[name]["nats"], rel=1e-5)
    alone = recall(*talker, [5], 2, num_chats=3, batch_size=1)
    assert alone == recall(*talker, [5], 2, num_chats=3, batch_size=3), "one batch of three, not two and one"


def test_what_is_shown(talker):
    _, tokenizer = talker
    (chat,) = fresh_chats(40, 1, 2)
    lines = format_chat(chat, "all", "nothing").splitlines()
    assert lines[0].endswith(chat.statements) and lines[2].endswith(chat.questions) and "[… 40 words …]" in lines[2]
    assert lines[3:] == ["Assistant: all", "With Δ = 0: nothing"]
    assert shorten("a b c") == "a b c"


@pytest.mark.slow
def test_the_quickstart_remembers_over_512_words():
    """The run that README.md begins with. Its model is measured here, not read from its results."""
    folder, recipe = ROOT / "outputs" / "quickstart", parse([])[-1]
    if not (folder / "results.json").is_file() or read_run(folder).recipes[0] != recipe:
        subprocess.run([sys.executable, "train_sft.py"], cwd=ROOT, check=True)
    model, tokenizer = load_phase15(folder)
    (at,) = recall(model, tokenizer, [512], 4, num_chats=64, seed=2)
    shares = {name: row["right"] for name, row in at["rows"].items()}
    print(shares)
    assert shares["model"] >= 0.95 and shares["full_context"] >= 0.95
    assert shares["window"] < 0.15 and shares["shuffled_delta"] < 0.15, "a guess is right one time in 16"
