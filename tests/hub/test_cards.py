# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The card's version and its signature; tests/hub/test_security.py has its untrusted texts."""

import contextlib
import io
import json
import re

import pytest
from reference import answer_ids

from phase15.evaluation.verdict import NATS, make_verdict
from phase15.hub import cards
from phase15.hub.arguments import PushArguments
from phase15.hub.runs import Run
from phase15.model.configuration_phase15 import VERSION


def test_the_card_names_the_version_of_the_code(tiny, tokenizer):
    args = PushArguments(model_dir=".", repo_id="alice/tiny")
    card = str(cards.model_card(args, Run([], {}, {}), tiny, tokenizer, []))
    assert f"Staged with Phase15 {VERSION} and transformers" in card


@pytest.mark.parametrize("edit", ["x{}", "{}x", "\n{}"])
def test_a_signed_card_notices_edits(edit):
    card = cards.sign_card("# a card\n\ntext\n")
    assert cards.is_unmodified(card) and card.startswith("# a card\n\ntext\n")
    assert not cards.is_unmodified(edit.format(card)) and not cards.is_unmodified(card.replace("text", "test"))
    assert not cards.is_unmodified("# a card\n")


ARGUMENTS = PushArguments(model_dir=".", repo_id="alice/tiny")
CHAT = [{"role": "user", "content": "Why is the sky blue?"}]
ROW = {"loss": 1.25, "loss_by_chunk": [1.25], "tokens_by_chunk": [8]}
FACTS_RECIPE = {"dataset_name": "facts", "facts_distances": [0, 32, 512]}
PYTHON = re.compile(r"(?ms)^(`{3,})python\n(.*?)\n\1$")


def run_of(recipe: dict, evaluation: dict | None = None, **results) -> Run:
    basis = {"records": {"training": 2, "validation": 1}, "steps": 3, "train": {"epoch": 1.0, "train_runtime": 2.0}}
    basis |= {"processes": 1, "device": "cpu", "versions": {}, "validation": {}}
    return Run([recipe], basis | results, evaluation or {})


def execute(card: str, folder) -> str:
    """What the example of a card prints, with the repository's name replaced by a folder."""
    code = PYTHON.search(card)[2].replace('"alice/tiny"', json.dumps(str(folder)))
    with contextlib.redirect_stdout(io.StringIO()) as output:
        exec(code, {})
    return output.getvalue().removesuffix("\n")


@pytest.mark.parametrize("prompt", [CHAT, "Blue light"])
def test_the_example_runs_as_it_stands(chatter, chat_tokenizer, tmp_path, prompt):
    """It asks what the run saved, and prints what the card says that the model answers."""
    chatter.save_pretrained(tmp_path)
    chat_tokenizer.save_pretrained(tmp_path)
    ids = chat_tokenizer(prompt)["input_ids"] if isinstance(prompt, str) else prompt[0]["content"]
    expected = chat_tokenizer.decode(answer_ids(chatter, chat_tokenizer, ids, 8), skip_special_tokens=True)
    saved = {"prompt": prompt, "max_new_tokens": 8, "answer": expected}
    run = run_of({"dataset_name": "x.jsonl"}, example=saved)
    card = str(cards.model_card(ARGUMENTS, run, chatter, chat_tokenizer, []))
    assert execute(card, tmp_path) == expected
    assert f"This model answers: {cards.cell(expected)}\n" in card


def test_without_a_saved_example_the_data_choose_the_question(chat_tokenizer, tokenizer):
    for recipe, expected in (
        (FACTS_RECIPE, r"What|Where"),
        ({"dataset_name": "python-docstrings"}, r"What is the (class|function) \S+ for\?"),
        ({"dataset_name": "x.jsonl"}, r"What is a soft prompt\?"),
    ):
        example = cards.choose_example(run_of(recipe), chat_tokenizer)
        assert example.prompt[-1]["role"] == "user" and re.search(expected, example.prompt[-1]["content"])
        assert example.answer is None
    assert isinstance(cards.choose_example(Run([], {}, {}), tokenizer).prompt, str)


HOSTILE = ["`" * 5 + "\n```\n# x", "'); import os; os.system('x') #", "a\u2028b\x00\u202e", "{{ 7 * 7 }} <b>"]


@pytest.mark.parametrize("text", HOSTILE)
def test_an_example_of_others_stays_a_literal(tiny, chat_tokenizer, text):
    saved = {"prompt": [{"role": "user", "content": text}], "max_new_tokens": 8, "answer": text}
    card = cards.model_card(ARGUMENTS, run_of({"dataset_name": "x.jsonl"}, example=saved), tiny, chat_tokenizer, [])
    code = PYTHON.search(card.text)[2]
    line = next(line for line in code.splitlines() if line.startswith("chat = "))
    assert eval(line.removeprefix("chat = ")) == saved["prompt"] and code.replace("\n", "").isprintable()
    assert f"This model answers: {cards.cell(text)}\n" in card.text


def test_one_metric_of_this_model_is_in_the_metadata(tiny, chat_tokenizer):
    rows = {"model": ROW, "window": ROW | {"loss": 2.0}, "full_context": ROW | {"loss": 0.5}}
    run = run_of({"dataset_name": "x.jsonl"}, validation=rows)
    (result,) = cards.model_card(ARGUMENTS, run, tiny, chat_tokenizer, []).data.eval_results
    assert (result.metric_value, result.dataset_name) == (1.25, "x.jsonl")
    baseline = run_of({"dataset_name": "x.jsonl", "baseline": "window"}, validation={"baseline_window": ROW})
    (result,) = cards.model_card(ARGUMENTS, baseline, tiny, chat_tokenizer, []).data.eval_results
    assert result.metric_value == 1.25
    assert cards.model_card(ARGUMENTS, Run([], {}, {}), tiny, chat_tokenizer, []).data.eval_results is None


def test_a_model_of_facts_has_recall_at_a_named_distance(tiny, chat_tokenizer):
    rows = {name: {"right": share, "nats": 1.0} for name, share in (("model", 0.988), ("window", 0.05))}
    measured = [{"distance": words, "tokens": words, "facts": 8, "rows": rows} for words in (0, 32, 512, 1024)]
    measured[3] = measured[3] | {"rows": {"model": {"right": 0.5, "nats": 1.0}, "window": rows["window"]}}
    run = run_of(FACTS_RECIPE, recall=measured)
    (result,) = cards.model_card(ARGUMENTS, run, tiny, chat_tokenizer, []).data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_name) == ("accuracy", 0.988, "facts")
    assert result.metric_name == "facts recalled after 512 words"


def test_a_recovery_needs_its_controls_beside_it(tiny, chat_tokenizer):
    measured = {"recovery": 0.15, "interval": [0.1, 0.2], "gap": 1.0, "gap_interval": [0.9, 1.1]}
    control = measured | {"recovery": 0.115}
    for recoveries, is_shown in (({"same_llm": measured, "same_llm_shuffled_delta": control}, True), ({}, False)):
        recoveries = recoveries or {"same_llm": measured}
        run = run_of({"dataset_name": "x.jsonl"}, validation={"model": ROW}, context_recovery=recoveries)
        text = cards.model_card(ARGUMENTS, run, tiny, chat_tokenizer, []).text
        assert ("15.0%" in text) == ("11.5%" in text) == ("Δ = 0: 0 % by definition" in text) == is_shown


def test_the_verdict_is_in_the_card_with_names_as_code(tiny, chat_tokenizer):
    names = ("window", "shuffled_delta", "baseline_<b>")
    differences = {name: {"difference": 0.1, "interval": [0.05, 0.15]} for name in names}
    run = run_of({"dataset_name": "x.jsonl"}, verdict=make_verdict(20, differences, NATS))
    text = cards.model_card(ARGUMENTS, run, tiny, chat_tokenizer, []).text
    assert "Δ helps, and carries something of the record: 0.100 nats [0.050, 0.150] less than Δ = 0, " in text
    assert "less than `baseline: <b>`." in text


def test_the_licence_is_given_or_that_of_the_base(tiny, chat_tokenizer, tmp_path, monkeypatch):
    def card(**flags):
        arguments = PushArguments(model_dir=".", repo_id="alice/tiny", **flags)
        return cards.model_card(arguments, Run([], {}, {}), tiny, chat_tokenizer, []).data

    monkeypatch.setattr(tiny.config, "base_model_name_or_path", str(tmp_path))
    assert "license" not in card().to_dict(), "never guessed"
    (tmp_path / "README.md").write_text("---\nlanguage: en\n---\n# A base\n")
    assert "license" not in card().to_dict()
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n# A base\n")
    assert card().license == "mit"
    assert card(license="apache-2.0").license == "apache-2.0"


def test_a_language_is_given_or_that_of_embedded_data(tiny, chat_tokenizer):
    def language(recipe, **flags):
        arguments = PushArguments(model_dir=".", repo_id="alice/tiny", **flags)
        return cards.model_card(arguments, run_of(recipe), tiny, chat_tokenizer, []).data.language

    assert language({"dataset_name": "python-docstrings"}) == language({"dataset_name": "facts"}) == ["en"]
    assert language({"dataset_name": "facts", "facts_text": "de.jsonl"}) is None
    assert language({"dataset_name": "x.jsonl"}) is None
    assert language({"dataset_name": "x.jsonl"}, language=["de"]) == ["de"]


def test_a_card_without_the_base_says_what_is_fetched(tiny, chat_tokenizer, monkeypatch):
    monkeypatch.setattr(tiny.config, "base_model_name_or_path", "bob/base")
    monkeypatch.setattr(tiny.config, "base_revision", "abc123")
    whole, adapter = (
        cards.model_card(ARGUMENTS, Run([], {}, {}), tiny, chat_tokenizer, [], has_base=has_base)
        for has_base in (True, False)
    )
    assert "Loading fetches the base, bob/base, revision abc123." in adapter.text
    assert "fetches the base" not in whole.text and adapter.data.base_model == "bob/base"


def test_the_card_names_version_and_commit_of_the_training(tiny, chat_tokenizer):
    run = run_of({"dataset_name": "x.jsonl"}, phase15={"version": "0.6.0", "commit": "abc123-dirty"})
    text = cards.model_card(ARGUMENTS, run, tiny, chat_tokenizer, []).text
    assert "Trained with Phase15 0.6.0, commit abc123-dirty." in text
    run = run_of({"dataset_name": "x.jsonl"}, phase15={"version": "0.6.0", "commit": None})
    assert "Trained with Phase15 0.6.0." in cards.model_card(ARGUMENTS, run, tiny, chat_tokenizer, []).text


def test_evaluations_of_other_data_have_tables_of_their_own(tiny, chat_tokenizer):
    other = {"dataset": "b.jsonl", "evaluated": "9 records of b.jsonl", "validation": {"model": ROW | {"loss": 3.5}}}
    newest = {"dataset": "a.jsonl", "evaluated": "8 records of a.jsonl", "validation": {"model": ROW}}
    newest |= {"records": {}, "context_recovery": {}, "other_datasets": {"b.jsonl": other}}
    card = cards.model_card(ARGUMENTS, run_of({"dataset_name": "x.jsonl"}, newest), tiny, chat_tokenizer, [])
    assert "| the model | 1.2500 |" in card.text
    assert "9 records of b.jsonl" in card.text and "| the model | 3.5000 |" in card.text
