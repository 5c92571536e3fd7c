# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""lm-evaluation-harness on tasks made here: a context is the query, and nothing is cut."""

import contextlib
import copy
import io
import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from reference import CHUNK, LLM_SIZES, QUERY, SIZES, SLOTS, random_ids, randomise_alpha, reference_logits
from torch.testing import assert_close
from transformers import AutoModelForCausalLM, LlamaConfig

from phase15.model.modeling_phase15 import Phase15ForCausalLM


lm_eval = pytest.importorskip("lm_eval", reason="requirements-extra.txt")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from phase15.commands import lm_harness  # noqa: E402
from phase15.commands.eval_lm import evaluate as evaluate_words  # noqa: E402


pytestmark = pytest.mark.extra
ROOT = Path(__file__).parents[2]
BOS = 1
EOS = 59
NEW_TOKENS = 10
close = partial(assert_close, atol=1e-4, rtol=1e-4)


def text(length: int, seed: int) -> str:
    return "".join(chr(65 + index) for index in random_ids(length, seed=seed).clamp(max=EOS - 1).tolist())


# Contexts of one and of several query segments; choices of one token and of several chunks. The first two fit in the
# slots together with their choices.
CONTEXT_LENGTHS = [3, 6, 2 * QUERY, 4 * QUERY, 50]
CHOICE_LENGTHS = [1, 1, 1, 3 * CHUNK + 1]
DOCUMENTS = [
    {
        "context": text(length, seed=length),
        "choices": [text(choice, seed=100 * length + index) for index, choice in enumerate(CHOICE_LENGTHS)],
        "label": index % len(CHOICE_LENGTHS),
        "document": text(length + 20, seed=7 * length),
    }
    for index, length in enumerate(CONTEXT_LENGTHS)
]
assert CONTEXT_LENGTHS[1] + max(CHOICE_LENGTHS) <= SLOTS < CONTEXT_LENGTHS[2] + max(CHOICE_LENGTHS)
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_text": "context",
        "doc_to_choice": "choices",
        "doc_to_target": "label",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    },
    "rolling": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "document",
        "metric_list": [{"metric": "byte_perplexity"}],
    },
    "answer": {
        "output_type": "generate_until",
        "doc_to_text": "context",
        "doc_to_target": "answer",
        "generation_kwargs": {"max_gen_toks": NEW_TOKENS, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
}


@pytest.fixture(scope="module")
def model_tokenizer(tokenizer):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.bos_token = chr(65 + BOS)
    tokenizer.eos_token = chr(65 + EOS)
    return tokenizer


@pytest.fixture(scope="module")
def trained(bases) -> Phase15ForCausalLM:
    """As training would leave it: Δ ≠ 0."""
    torch.manual_seed(1)
    return randomise_alpha(Phase15ForCausalLM.from_base(bases["llama"], **SIZES))


@pytest.fixture(scope="module")
def folders(bases, trained, model_tokenizer, tmp_path_factory) -> dict[str, str]:
    """A base model, the new Phase15 model made of it, and the trained one."""
    models = {
        "base": AutoModelForCausalLM.from_pretrained(bases["llama"]),
        "new": Phase15ForCausalLM.from_base(bases["llama"], **SIZES),
        "trained": trained,
    }
    folder = tmp_path_factory.mktemp("models")
    for name, model in models.items():
        model.save_pretrained(folder / name)
        model_tokenizer.save_pretrained(folder / name)
    return {name: str(folder / name) for name in models}


@pytest.fixture(scope="module")
def answers(trained, model_tokenizer) -> list[str]:
    """What the model's own `generate` answers to each context, one at a time."""
    ids = [model_tokenizer(document["context"], return_tensors="pt").input_ids for document in DOCUMENTS]
    ids = [trained.generate(row, max_new_tokens=NEW_TOKENS, do_sample=False)[0, row.shape[1] :] for row in ids]
    answers = [model_tokenizer.decode(row).split(chr(65 + EOS))[0].replace(chr(65 + BOS), "") for row in ids]
    assert len(set(answers)) == len(answers) and all(answers)
    return answers


@pytest.fixture(scope="module")
def task_folder(answers, tmp_path_factory) -> Path:
    """The tasks, and their data in a JSONL file; every other record expects what the model answers."""
    folder = tmp_path_factory.mktemp("tasks")
    with open(folder / "data.jsonl", "w", encoding="utf-8") as file:
        for index, (document, answer) in enumerate(zip(DOCUMENTS, answers, strict=True)):
            file.write(json.dumps({**document, "answer": "other" if index % 2 else answer}) + "\n")
    for name, task in TASKS.items():
        data = {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": {"test": str(folder / "data.jsonl")}},
            "test_split": "test",
        }
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(data | task))
    return folder


@pytest.fixture(scope="module")
def manager(task_folder):
    return TaskManager(include_path=str(task_folder), include_defaults=False)  # the defaults take ten seconds to list


def load(folder: str, model_class=lm_harness.Phase15LM, **kwargs):
    return model_class(pretrained=folder, device="cpu", **kwargs)


def requests_of(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, argument, 0) for argument in arguments]


def reference_score(model, query: list[int], continuation: list[int]) -> tuple[float, bool]:
    ids = torch.tensor(query + continuation)
    with torch.no_grad():
        logits = reference_logits(model, ids, len(query))[0][len(query) - 1 : -1]
    targets = ids[len(query) :]
    logprobs = logits.log_softmax(dim=-1).gather(1, targets[:, None])
    return logprobs.sum().item(), bool((logits.argmax(dim=-1) == targets).all())


def ids_of(string: str) -> list[int]:
    return [ord(character) - 65 for character in string]


def reference_scores(model, pairs: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    return [reference_score(model, ids_of(context) or [BOS], ids_of(continuation)) for context, continuation in pairs]


def assert_same(scores, expected):
    assert [is_greedy for _, is_greedy in scores] == [is_greedy for _, is_greedy in expected]
    close([logprob for logprob, _ in scores], [logprob for logprob, _ in expected])


def pairs_of(documents=DOCUMENTS) -> list[tuple[str, str]]:
    return [(document["context"], choice) for document in documents for choice in document["choices"]]


@pytest.fixture(scope="module")
def pairs(trained) -> list[tuple[str, str]]:
    """All that can differ between two requests of one context, and what greedy decoding gives."""
    context = DOCUMENTS[3]["context"]
    other = DOCUMENTS[2]["context"]

    def best(query: str, continuation: str) -> str:
        with torch.no_grad():
            logits = reference_logits(trained, torch.tensor(ids_of(query + continuation)), len(query))[0]
        return chr(65 + int(logits[-1].argmax()))

    greedy = ""
    for _ in range(2 * CHUNK + 1):
        greedy += best(context, greedy)
    wrong = text(2, seed=5)
    return [
        *pairs_of(),
        (context, greedy),
        (context, greedy[:-1] + wrong[0]),
        (context, wrong + best(context, wrong)),  # its last token is what greedy decoding gives, the others are not
        (other, best(other, "")),
        (context[:9], context[9:]),  # the same text as the next, with the query ending elsewhere
        (context[:-1], context[-1]),
        (context, greedy),  # asked twice
        ("", text(2 * CHUNK, seed=6)),
    ]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_scores_are_those_of_the_reference(trained, folders, pairs, batch_size):
    expected = reference_scores(trained, pairs)
    assert {is_greedy for _, is_greedy in expected} == {True, False}
    scores = load(folders["trained"], batch_size=batch_size).loglikelihood(requests_of("loglikelihood", *pairs))
    assert_same(scores, expected)


def test_scores_do_not_depend_on_the_predictions_at_a_time(trained, folders, pairs, monkeypatch):
    monkeypatch.setattr(lm_harness, "PREDICTIONS", 6)
    scores = load(folders["trained"], batch_size=2).loglikelihood(requests_of("loglikelihood", *pairs))
    assert_same(scores, reference_scores(trained, pairs))


def test_requests_that_differ_in_their_last_token_share_a_row(folders, monkeypatch):
    model = load(folders["trained"], batch_size=100)
    score = model._score
    rows = []

    def record(batch):
        rows.extend(batch)
        return score(batch)

    monkeypatch.setattr(model, "_score", record)
    model.loglikelihood(requests_of("loglikelihood", *pairs_of()))
    assert len(rows) == 2 * len(DOCUMENTS)  # one for the three choices of one token, and one for the long choice


def test_an_automatic_batch_size_changes_no_answer(trained, folders, pairs, answers, monkeypatch):
    model = load(folders["trained"], batch_size="auto", max_batch_size=5)
    score = model._score
    sizes = []

    def score_in_little_memory(batch):
        if len(batch) > 3:
            raise RuntimeError("CUDA out of memory.")
        sizes.append(len(batch))
        return score(batch)

    monkeypatch.setattr(model, "_score", score_in_little_memory)
    assert_same(model.loglikelihood(requests_of("loglikelihood", *pairs)), reference_scores(trained, pairs))
    assert max(sizes) == 3
    documents = [document["document"] for document in DOCUMENTS]
    rolling = model.loglikelihood_rolling(requests_of("loglikelihood_rolling", *((text,) for text in documents)))
    close(rolling, [logprob for logprob, _ in reference_scores(trained, [("", text) for text in documents])])
    sizes.clear()
    requests = [(document["context"], {"max_gen_toks": NEW_TOKENS, "do_sample": False}) for document in DOCUMENTS]
    lanes_class = lm_harness.Phase15ContinuousBatchProcessor
    numbers = []

    def make_lanes(model, num_lanes, **kwargs):
        numbers.append(num_lanes)
        return lanes_class(model, num_lanes, **kwargs)

    monkeypatch.setattr(lm_harness, "Phase15ContinuousBatchProcessor", make_lanes)
    assert model.generate_until(requests_of("generate_until", *requests)) == answers
    assert (sizes, numbers, model.batch_size) == ([3], [3], "auto")


def test_an_automatic_batch_size_counts_the_longest_chunk(folders, monkeypatch):
    model = load(folders["trained"], batch_size="auto", max_batch_size=2)
    tried = []
    monkeypatch.setattr(model, "_score", lambda batch: tried.append(len(batch[0][2])))
    settings = [{"do_sample": False}, {"do_sample": False, "chunk_length": 7}, {"do_sample": False, "chunk_length": 5}]
    requests = [("some text", {"max_gen_toks": NEW_TOKENS, **kwargs}) for kwargs in settings]
    model.generate_until(requests_of("generate_until", *requests))
    assert tried == [7]


@pytest.mark.parametrize("kwargs", [{"num_beams": 2}, {"repetition_penalty": 1.8}, {"chunk_length": 7}])
def test_settings_of_a_task_are_those_of_generate(trained, folders, tokenizer, kwargs):
    contexts = [document["context"] for document in DOCUMENTS]
    requests = [(text, {"max_gen_toks": NEW_TOKENS, "do_sample": False, **kwargs}) for text in contexts]
    model = load(folders["trained"], batch_size=2)
    answers = model.generate_until(requests_of("generate_until", *requests))
    for text, answer in zip(contexts, answers, strict=True):
        ids = torch.tensor([ids_of(text)])
        settings = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW_TOKENS, "do_sample": False}
        output = trained.generate(ids, **settings, **kwargs, eos_token_id=tokenizer.eos_token_id, pad_token_id=0)
        assert model.tok_decode(output[0, ids.shape[1] :]).startswith(answer) and answer


def test_scores_of_a_new_model_are_those_of_its_base(folders, manager):
    results = {}
    for name, model_class in (("base", HFLM), ("new", lm_harness.Phase15LM)):
        model = load(folders[name], model_class, batch_size=3)
        results[name] = lm_eval.simple_evaluate(model, tasks=["choice"], task_manager=manager, limit=2)
    ours = results["new"]
    theirs = results["base"]
    assert ours["results"]["choice"]["acc,none"] == theirs["results"]["choice"]["acc,none"]
    for sample, expected in zip(ours["samples"]["choice"], theirs["samples"]["choice"], strict=True):
        assert len(sample["resps"]) == len(CHOICE_LENGTHS)
        assert_same([resp for (resp,) in sample["resps"]], [resp for (resp,) in expected["resps"]])


def test_rolling_reads_whole_documents_after_the_bos_token(trained, folders, manager):
    documents = [document["document"] for document in DOCUMENTS]
    assert max(map(len, documents)) > LLM_SIZES["max_position_embeddings"]  # where lm_eval would begin a new window
    expected = [logprob for logprob, _ in reference_scores(trained, [("", document) for document in documents])]
    model = load(folders["trained"], batch_size=2)
    requests = requests_of("loglikelihood_rolling", *((document,) for document in ["", *documents]))
    close(model.loglikelihood_rolling(requests), [0.0, *expected])
    results = lm_eval.simple_evaluate(model, tasks=["rolling"], task_manager=manager, bootstrap_iters=0)
    perplexity = math.exp(-sum(expected) / sum(map(len, documents)))
    assert results["results"]["rolling"]["byte_perplexity,none"] == pytest.approx(perplexity, rel=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_generated_answers_are_those_of_generate(folders, manager, answers, batch_size):
    model = load(folders["trained"], batch_size=batch_size)
    results = lm_eval.simple_evaluate(model, tasks=["answer"], task_manager=manager, bootstrap_iters=0)
    assert [sample["filtered_resps"] for sample in results["samples"]["answer"]] == [[answer] for answer in answers]
    right = len(answers) - len(answers) // 2
    assert results["results"]["answer"]["exact_match,none"] == pytest.approx(right / len(answers))


def test_generation_ends_at_stop_strings(folders, answers):
    stops = [answers[-1][3:5], answers[0][4]]
    requests = [(document["context"], {"until": stops, "max_gen_toks": NEW_TOKENS}) for document in DOCUMENTS]
    generated = load(folders["trained"], batch_size=5).generate_until(requests_of("generate_until", *requests))
    assert generated == [answer.split(stops[0])[0].split(stops[1])[0] for answer in answers]
    assert generated != answers


def test_a_chat_template_gives_the_query_that_training_saw(chat_tokenizer, task_folder, manager, tmp_path):
    sizes = LLM_SIZES | {"vocab_size": len(chat_tokenizer), "bos_token_id": None}
    AutoModelForCausalLM.from_config(LlamaConfig(**sizes)).save_pretrained(tmp_path / "base")
    model = randomise_alpha(Phase15ForCausalLM.from_base(tmp_path / "base", **SIZES))
    model.save_pretrained(tmp_path / "chat")
    chat_tokenizer.save_pretrained(tmp_path / "chat")
    results = lm_eval.simple_evaluate(
        load(str(tmp_path / "chat"), batch_size=2),
        tasks=["choice"],
        task_manager=manager,
        apply_chat_template=True,
        limit=2,
    )
    for sample, document in zip(results["samples"]["choice"], DOCUMENTS, strict=False):
        chat = [{"role": "user", "content": document["context"]}]
        query = chat_tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        for ((logprob, _),), choice in zip(sample["resps"], document["choices"], strict=True):
            answer = chat_tokenizer(choice, add_special_tokens=False)["input_ids"]
            labels = torch.tensor([[-100] * len(query) + answer])
            loss = model(torch.tensor([query + answer]), labels=labels, skip_logits=True).loss
            close(logprob, -loss.item() * len(answer))


def test_a_tokenizer_without_an_end_token_is_refused(trained, tokenizer, tmp_path):
    trained.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no end token"):
        load(str(tmp_path))


@pytest.mark.parametrize("context", ["A B ", "A B \n", " ", "A\n\nB"])
def test_only_a_line_break_stays_at_the_end_of_a_context(folders, monkeypatch, context):
    """White space that ends a context goes to the continuation otherwise, as everywhere in lm_eval."""
    model = load(folders["trained"])
    monkeypatch.setattr(model, "tok_encode", lambda string, **kwargs: list(map(ord, string)))
    query, continuation = model.encode(context, "C")
    assert query + continuation == list(map(ord, context + "C"))
    assert len(query) == (len(context) if context.endswith("\n") else len(context.rstrip()))


def test_thinking_is_refused_where_the_continuation_is_given(folders):
    model = load(folders["trained"], enable_thinking=True, think_end_token="Z")
    with pytest.raises(ValueError, match="`enable_thinking` is for tasks that generate"):
        model.loglikelihood(requests_of("loglikelihood", ("A", "B")))


# the command lines


@pytest.fixture(scope="module")
def runs(folders, task_folder, tmp_path_factory) -> dict[str, tuple[Path, str]]:
    """Folder and output of both commands: lm_eval in a process that knows nothing of us, ours meanwhile in this."""
    plain = tmp_path_factory.mktemp("hf")
    ours = tmp_path_factory.mktemp("phase15")
    options = ["--tasks", ",".join(TASKS), "--include_path", str(task_folder), "--batch_size", "2", "--device", "cpu"]
    options += ["--log_samples", "--output_path"]
    paths = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and Path(path) != ROOT]
    environment = {"PYTHONPATH": os.pathsep.join(paths), "HF_HOME": str(plain / "hf"), "OMP_NUM_THREADS": "1"}
    environment["HF_MODULES_CACHE"] = str(plain / "modules")
    command = [sys.executable, "-m", "lm_eval", "--model", "hf", *options, str(plain / "out"), "--model_args"]
    command += [f"pretrained={folders['trained']},trust_remote_code=True,max_length=1000"]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, cwd=plain, env=os.environ | environment, **streams) as process:
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as stdout:
            patch.setattr(sys, "argv", sys.argv)  # main replaces it
            evaluate_words(["--model_dir", folders["trained"], *options, str(ours / "out")], "phase15 eval-lm")
        output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    return {"hf": (plain, output), "phase15": (ours, stdout.getvalue())}


def logged(folder: Path, task: str) -> list[dict]:
    (path,) = folder.glob(f"out/**/samples_{task}_*.jsonl")
    return sorted(map(json.loads, path.read_text().splitlines()), key=lambda sample: sample["doc_id"])


def logged_scores(folder: Path) -> list[tuple[float, bool]]:
    return [
        (float(logprob), str(is_greedy) == "True")
        for sample in logged(folder, "choice")
        for ((logprob, is_greedy),) in sample["resps"]
    ]


def test_the_command_writes_results_and_samples(runs, trained, answers):
    folder, output = runs["phase15"]
    assert all(f"|{task}" in output for task in TASKS) and "phase15 (" in output
    (path,) = folder.glob("out/**/results_*.json")
    results = json.loads(path.read_text())["results"]
    scores = reference_scores(trained, pairs_of())
    assert_same(logged_scores(folder), scores)
    lists = torch.tensor([logprob for logprob, _ in scores]).view(len(DOCUMENTS), -1)
    labels = torch.tensor([document["label"] for document in DOCUMENTS])
    assert results["choice"]["acc,none"] == pytest.approx((lists.argmax(dim=1) == labels).float().mean().item())
    assert [sample["filtered_resps"] for sample in logged(folder, "answer")] == [[answer] for answer in answers]


def test_plain_lm_eval_takes_the_first_token_as_query(runs, trained, answers):
    folder, output = runs["hf"]
    assert all(f"|{task}" in output for task in TASKS) and "hf (" in output
    expected = []
    for context, choice in pairs_of():
        ids = torch.tensor(ids_of(context + choice))
        with torch.no_grad():
            logits = reference_logits(trained, ids)[0][len(context) - 1 : -1]
        logprobs = logits.log_softmax(dim=-1).gather(1, ids[len(context) :, None])
        expected.append((logprobs.sum().item(), bool((logits.argmax(dim=-1) == ids[len(context) :]).all())))
    assert_same(logged_scores(folder), expected)
    assert [sample["filtered_resps"] for sample in logged(folder, "answer")] == [[answer] for answer in answers]


def test_an_empty_continuation_is_certain(folders):
    """As in lm_eval's own models, with a context and without one."""
    model = load(folders["trained"])
    requests = requests_of("loglikelihood", ("ABC", ""), ("ABC", "DE"), ("", ""))
    answers = model.loglikelihood(requests, disable_tqdm=True)
    assert answers[0] == answers[2] == (0.0, True) and answers[1][0] < 0


def test_an_unknown_task_and_another_model_are_named(folders, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)  # main replaces it
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    with pytest.raises(ValueError, match="Tasks not found: nonsense"):
        evaluate_words(["--model_dir", folders["trained"], "--tasks", "nonsense"], "phase15 eval-lm")
    with pytest.raises(ValueError, match="is not a Phase15 model, but a causal LM"):
        evaluate_words(["--model_dir", folders["base"], "--tasks", "nonsense"], "phase15 eval-lm")
    with pytest.raises(ValueError, match="`--model` cannot be given"):
        evaluate_words(["--model_dir", folders["trained"], "--tasks", "nonsense", "--model", "hf"], "phase15 eval-lm")
    with pytest.raises(ValueError, match="`--model` cannot be given"):
        evaluate_words([f"--model_dir={folders['trained']}", "--tasks", "nonsense", "-M", "hf"], "phase15 eval-lm")


def test_the_models_arguments_are_lm_evals_beside_the_folder(monkeypatch, tmp_path):
    """Also a folder whose name lm_eval would take for several arguments."""
    folder = tmp_path / "a,dtype=b [c"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "phase15"}))
    calls = []
    monkeypatch.setattr(sys, "argv", sys.argv)
    monkeypatch.setattr("lm_eval.simple_evaluate", lambda **kwargs: calls.append(kwargs))
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"task": "mine", **TASKS["choice"], "dataset_path": "json"}))
    options = ["--tasks", "mine", "--include_path", str(tmp_path), "--model_args", "dtype=bfloat16", "--limit", "2"]
    evaluate_words([*options[:4], "--model_dir", str(folder), *options[4:]], "phase15 eval-lm")
    (arguments,) = calls
    assert arguments["model"] == "phase15" and arguments["limit"] == 2 and arguments["tasks"] == ["mine"]
    assert arguments["model_args"] == {"dtype": "bfloat16", "pretrained": str(folder)}


def test_help_shows_the_flags_of_both(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", sys.argv)
    with pytest.raises(SystemExit) as raised:
        evaluate_words(["--help"], "phase15 eval-lm")
    output = capsys.readouterr().out
    assert raised.value.code == 0 and "usage: phase15 eval-lm --model_dir DIR" in output
    assert all(flag in output for flag in ("--model_dir", "--tasks", "--batch_size", "--output_path"))
