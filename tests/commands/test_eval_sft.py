# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""scripts/eval_sft.py from end to end: rows, answers, exact match, and bad input."""

import contextlib
import io
import json
import runpy
import shutil
import sys
from decimal import Decimal
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from reference import LLM_SIZES, SIZES, randomise_alpha
from test_losses import ROWS, Tokenizer, close, naive
from torch.testing import assert_close
from train_here import prepare
from transformers import AutoModelForCausalLM, LlamaConfig

from phase15.commands import evaluation_run as eval_sft
from phase15.evaluation import losses as evaluation
from phase15.evaluation import recovery
from phase15.evaluation.losses import Example
from phase15.evaluation.recall import recall
from phase15.model.configuration_phase15 import Phase15Config
from phase15.model.modeling_phase15 import Phase15ForCausalLM


@pytest.fixture(scope="module")
def home(tmp_path_factory, chat_tokenizer) -> Path:
    """A base, a model of it, a baseline of each kind, and 40 records."""
    home = tmp_path_factory.mktemp("home")
    sizes = LLM_SIZES | {"vocab_size": len(chat_tokenizer), "max_position_embeddings": 128}
    sizes |= {"eos_token_id": chat_tokenizer.eos_token_id}

    def save(name: str, model, **recipe):
        model.save_pretrained(home / name)
        chat_tokenizer.save_pretrained(home / name)
        if recipe:
            (home / name / "recipe.yaml").write_text(yaml.safe_dump(recipe))

    torch.manual_seed(0)
    save("base", AutoModelForCausalLM.from_config(LlamaConfig(**sizes)))
    save("small", AutoModelForCausalLM.from_config(LlamaConfig(**sizes | {"vocab_size": 64})))
    torch.manual_seed(1)
    model = randomise_alpha(Phase15ForCausalLM.from_base(str(home / "base"), **SIZES))
    run = {"dataset_name": str(home / "data.jsonl"), "validation_split": 0.25}
    save("model", model, **run)
    model.hypernet.alpha.data.zero_()
    save("window", model, baseline="window", **run)
    torch.manual_seed(2)
    save("other", AutoModelForCausalLM.from_config(LlamaConfig(**sizes)), baseline="full_context", **run)
    adapters = {
        "lora": LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False, target_modules=["q_proj"]),
        "tuned": PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    }
    for name, config in adapters.items():
        save(name, get_peft_model(AutoModelForCausalLM.from_pretrained(home / "base"), config))
    (home / "tuned" / "recipe.yaml").write_text(yaml.safe_dump({"rival": "prompt_tuning", **run}))  # its old name
    (home / "unknown").mkdir()
    lines = [
        {"question": f"Why is {i}?", "answer": "Blue light scatters. " * (1 + i % 3) + f"#### {i}"} for i in range(40)
    ]
    (home / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return home


def arguments(home: Path, folder: Path, **flags) -> eval_sft.EvaluationArguments:
    defaults = {"dataset": str(home / "data.jsonl"), "output_dir": str(folder), "generated_records": 3}
    defaults |= {"max_new_tokens": 6, "batch_size": 3, "bootstrap_samples": 50, "device": "cpu"}
    return eval_sft.EvaluationArguments(**{"model_dir": str(home / "model"), **defaults, **flags})


@pytest.mark.parametrize(
    "text, number",
    {
        "so it is 72\n#### 72": "72",
        "####72": "72",
        "#### 1,234.": "1234",
        "#### $1,000.50 in all": "1000.5",
        "#### -$5": "-5",
        "#### 1\n#### 2": "2",
        "#### 7.0": "7",
        "#### 0.5%": "0.5",
        "#### 72<|end|>": "72",
        "72": None,
        "#### seventy-two": None,
        "#### $.": None,
        "#### 1.2.3": None,
        "### 72": None,
        "": None,
    }.items(),
)
def test_the_final_number(text, number):
    assert eval_sft.final_number(text) == (None if number is None else Decimal(number))


def test_exact_match_counts_equal_numbers():
    encode = lambda text: [ord(letter) - ord("0") for letter in text]  # noqa: E731
    asked = [Example([], encode(text)) for text in ("a#### 72", "b#### 1,000", "#### 5")]
    answers = {
        name: [encode(text) for text in texts]
        for name, texts in {
            "all": ("#### 72.0", "#### $1000", "c #### 5."),
            "one": ("72", "#### 1000", "#### 6"),
        }.items()
    }
    assert eval_sft.exact_match(answers, asked, Tokenizer(-1)) == {
        "all": {"correct": 3, "records": 3, "share": 1.0},
        "one": {"correct": 1, "records": 3, "share": 1 / 3},
    }


BASELINES = {"window": "window", "full_context": "other", "lora": "lora", "prompt_tuning": "tuned"}


@pytest.fixture(scope="module")
def evaluated(home, tmp_path_factory) -> tuple[Path, str]:
    """The command with everything: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("evaluation") / "new"
    argv = ["eval_sft.py", "--model_dir", str(home / "model"), "--dataset", str(home / "data.jsonl")]
    argv += ["--base", str(home / "base"), "--output_dir", str(folder)]
    argv += ["--baselines", *(str(home / name) for name in BASELINES.values()), "--generated_records", "3"]
    argv += ["--max_new_tokens", "6", "--bootstrap_samples", "500", "--device", "cpu"]
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as said:
        patch.setattr(sys, "argv", argv)
        runpy.run_module("scripts.eval_sft", run_name="__main__")
    return folder, said.getvalue()


def test_the_command_writes_and_prints_every_row(evaluated, home):
    folder, said = evaluated
    assert {path.name for path in folder.iterdir()} == {"evaluation.json", "loss_by_chunk.png"}
    assert (folder / "loss_by_chunk.png").read_bytes()[:4] == b"\x89PNG"
    results = json.loads((folder / "evaluation.json").read_text())
    rows = [*ROWS, "base_full_context", *(f"baseline_{name}" for name in BASELINES)]
    assert list(results["validation"]) == rows
    for name, row in results["validation"].items():
        low, high = row["interval"]
        assert (
            low < row["loss"] < high and row["tokens_by_chunk"] == results["validation"]["window"]["tokens_by_chunk"]
        )
        assert f"| {evaluation.display_label(name)} | {row['loss']:.4f} | [{low:.4f}, {high:.4f}] |" in said
    assert list(results["context_recovery"]) == [
        "same_llm",
        "same_llm_shuffled_delta",
        "free_running",
        "free_running_shuffled_delta",
        "baselines",
        "baselines_window",
        "baselines_shuffled_delta",
    ]
    for name in results["context_recovery"]:
        assert f"- context recovery, {evaluation.display_label(name)}: " in said
    assert list(results["free_running"]) == ["model", "window", "shuffled_delta", "full_context"]
    assert {name for name, match in results["exact_match"].items() if match["records"] == 3} == {*rows} - {
        "first_soft_prompt",
        "shuffled_soft_prompt",
        "shuffled_delta",
    }
    assert results["records"] == {"validation": 10, "generated": 3} and results["dataset"] == "data.jsonl"
    assert "10 records of data.jsonl, from the last 25 %" in said
    assert str(home) not in (folder / "evaluation.json").read_text()


@torch.no_grad()
def test_the_rows_of_base_and_baselines_are_theirs(evaluated, home, chat_tokenizer):
    rows = json.loads((evaluated[0] / "evaluation.json").read_text())["validation"]
    assert_close(rows["baseline_window"], rows["window"])  # the same weights without Δ
    close(rows["base_full_context"], rows["full_context"], atol=1e-5)  # α apart, it is not trained
    args = arguments(home, home)
    data, *_ = eval_sft.validation_examples(args, chat_tokenizer, Phase15Config.from_pretrained(home / "model"))
    for name, folder in (("full_context", "other"), ("lora", "lora")):
        llm = AutoModelForCausalLM.from_pretrained(home / folder)  # transformers loads an adapter's base too
        losses = [
            naive(llm(torch.tensor([r.query + r.answer])).logits[0, len(r.query) - 1 : -1], r.answer) for r in data
        ]
        close(rows[f"baseline_{name}"]["loss"], torch.cat(losses).mean().item())
    assert len({round(row["loss"], 4) for row in rows.values()}) == len(rows) - 2


def test_context_recovery_takes_its_rows(evaluated):
    results = json.loads((evaluated[0] / "evaluation.json").read_text())
    rows = {name: row["loss"] for name, row in results["validation"].items()}
    gaps = {name: result["gap"] for name, result in results["context_recovery"].items()}
    own = {name: row["loss"] for name, row in results["free_running"].items()}
    assert_close(gaps["same_llm"], rows["window"] - rows["full_context"])
    assert_close(gaps["baselines"], rows["baseline_window"] - rows["baseline_full_context"])
    assert_close(gaps["free_running"], own["window"] - own["full_context"])


def test_nothing_is_generated_where_nothing_is_asked_for(home, tmp_path, capsys):
    eval_sft.evaluate(arguments(home, tmp_path, generated_records=0, max_records=4))
    results = json.loads((tmp_path / "evaluation.json").read_text())
    assert "exact_match" not in results and not results["free_running"] and len(results["context_recovery"]) == 2
    assert list(results["validation"]) == ROWS and results["records"] == {"validation": 4, "generated": 0}
    assert "exact match" not in capsys.readouterr().out


def test_another_length_of_a_chunk_is_that_of_a_model_with_it(home, tmp_path):
    """Scored and generated: the same as of a folder whose config has the length."""
    settings = {"generated_records": 2, "max_new_tokens": 12, "max_records": 4}
    config = json.loads((home / "model" / "config.json").read_text())
    length, results = config["chunk_length"] + 3, []
    for name in ("model", "window"):
        shutil.copytree(home / name, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"chunk_length": length}))
    with_it = {"model_dir": str(tmp_path / "model"), "baselines": [str(tmp_path / "window")]}
    without = {"baselines": [str(home / "window")]}
    for name, given in (("a", {"chunk_length": length} | without), ("b", with_it), ("c", without)):
        eval_sft.evaluate(arguments(home, tmp_path / name, **settings | given))
        results.append(json.loads((tmp_path / name / "evaluation.json").read_text()))
    assert results[0]["chunk_length"] == results[1]["chunk_length"] == length
    assert results[2]["chunk_length"] == config["chunk_length"]
    assert [f"with chunks of {length} tokens" in result["evaluated"] for result in results] == [True, False, False]
    for part in ("validation", "free_running", "exact_match"):
        assert results[0][part] == results[1][part]
    for name in ("model", "baseline_window"):
        assert results[0]["validation"][name] != results[2]["validation"][name]


def test_scores_are_those_of_the_length_with_which_the_model_speaks(home, tmp_path):
    shutil.copytree(home / "model", tmp_path / "model")
    saved = json.loads((home / "model" / "generation_config.json").read_text())
    saved |= {"chunk_length": 1, "_from_model_config": False}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(saved))
    results = []
    for name, folder, given in (("a", home, {"chunk_length": 1}), ("b", tmp_path, {}), ("c", home, {})):
        flags = {"model_dir": str(folder / "model"), "generated_records": 2, "max_records": 4, **given}
        eval_sft.evaluate(arguments(home, tmp_path / name, **flags))
        results.append(json.loads((tmp_path / name / "evaluation.json").read_text()))
    asked, saved, trained = results
    assert saved["chunk_length"] == 1 != trained["chunk_length"]
    assert "; with chunks of 1 tokens, not" in saved["evaluated"]
    for part in ("validation", "free_running", "exact_match"):
        assert asked[part] == saved[part]
    assert saved["validation"]["model"] != trained["validation"]["model"]


def test_each_data_set_keeps_its_own_results(home, tmp_path):
    """A file that is not the run's is scored whole, and replaces only what it left before."""
    lines = (home / "data.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other.jsonl").write_text("".join(lines[:12]))
    folder = tmp_path / "results"
    settings = {"generated_records": 0, "max_records": None}
    other = settings | {"dataset": str(tmp_path / "other.jsonl")}

    def run(flags) -> dict:
        eval_sft.evaluate(arguments(home, folder, **flags))
        return json.loads((folder / "evaluation.json").read_text())

    own = run(settings)
    picture = (folder / "loss_by_chunk.png").read_bytes()
    both = run(other)
    assert both["dataset"] == "other.jsonl" and both["records"]["validation"] == 12, "all of it, not a tenth"
    assert both["other_datasets"] == {"data.jsonl": own}
    assert (folder / "loss_by_chunk.png").read_bytes() == picture
    assert (folder / "loss_by_chunk_other.jsonl.png").is_file()
    again = run(other | {"max_records": 5})
    assert again["records"]["validation"] == 5 and again["other_datasets"] == {"data.jsonl": own}
    last = run(settings)
    assert last == own | {"other_datasets": {"other.jsonl": {k: v for k, v in again.items() if k != "other_datasets"}}}


def test_results_of_another_model_are_not_replaced(home, tmp_path):
    eval_sft.evaluate(arguments(home, tmp_path, generated_records=0, max_records=2))
    with pytest.raises(ValueError, match="holds the evaluation of model, not of window"):
        eval_sft.evaluate(arguments(home, tmp_path, model_dir=str(home / "window")))


def test_the_picture_has_any_format_of_matplotlib(home, tmp_path):
    path = tmp_path / "new" / "losses.pdf"
    eval_sft.evaluate(arguments(home, tmp_path, generated_records=0, max_records=2, picture=str(path)))
    assert path.read_bytes().startswith(b"%PDF") and not (tmp_path / "loss_by_chunk.png").exists()


def test_the_report_ends_with_the_verdict_and_the_next_command(evaluated):
    folder, said = evaluated
    verdict = json.loads((folder / "evaluation.json").read_text())["verdict"]
    *_, sentence, following = said.strip().splitlines()
    assert sentence == verdict["sentence"] and following.startswith("Next, ") and "phase15 " in following
    rows = {"window", "shuffled_delta", *(f"baseline_{name}" for name in BASELINES)}
    assert set(verdict["differences"]) == rows and verdict["records"] == 10


def test_answers_without_numbers_have_no_exact_match(home, tmp_path):
    (tmp_path / "words.jsonl").write_text('{"prompt": "Why", "completion": " it is 4"}\n' * 3)
    eval_sft.evaluate(arguments(home, tmp_path, dataset=str(tmp_path / "words.jsonl"), validation_split=1.0))
    results = json.loads((tmp_path / "evaluation.json").read_text())
    assert "exact_match" not in results and results["free_running"]
    assert "no recipe.yaml says" in results["evaluated"]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"shuffle_records": True, "seed": 3, "validation_split": 0.3, "max_validation_records": 7},
        {"streaming": True, "max_steps": 1, "max_validation_records": 6},
    ],
)
def test_what_is_evaluated_is_what_the_run_held_out(settings, home, tmp_path):
    recipe = {"model_name_or_path": str(home / "model"), "dataset_name": str(home / "data.jsonl"), **settings}
    flags = {"output_dir": str(tmp_path / "run"), "use_cpu": True, "report_to": "none"}
    path = tmp_path / "run.yaml"
    path.write_text(yaml.safe_dump(recipe | flags))
    trainer, run = prepare([str(path)])
    trainer.processing_class.save_pretrained(tmp_path)
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(run.recipe))
    args = arguments(home, tmp_path, model_dir=str(tmp_path))
    rows, where, _ = eval_sft.validation_examples(args, trainer.processing_class, trainer.config)
    expected = [record for batch in trainer.get_eval_dataloader() for record in recovery.unbatch(batch)]
    assert rows == expected and where.endswith("held them out")
    args.max_records, args.validation_split = 2, None
    assert eval_sft.validation_examples(args, trainer.processing_class, trainer.config)[0] == expected[:2]
    args.validation_split = 0.9
    assert "NOT the split" in eval_sft.validation_examples(args, trainer.processing_class, trainer.config)[1]


BAD = {
    "missing": ({"model_dir": "{home}/missing"}, r"missing: no such folder"),
    "not Phase15": ({"model_dir": "{home}/base"}, r"base is not a Phase15 model, but a causal LM"),
    "no model": ({"model_dir": "{home}/unknown"}, r"unknown holds no model"),
    "no data": ({"dataset": "{home}/none.jsonl"}, r"none\.jsonl: no such file"),
    "small base": ({"base": "{home}/small"}, r"small has a vocabulary of 64 tokens.*/model has one of 2\d\d"),
    "Phase15 as base": ({"base": "{home}/window"}, r"window is not a causal LM, but a Phase15 model"),
    "no base": ({"base": "{home}/none.gguf"}, r"none\.gguf: no such file"),
    "missing baseline": ({"baselines": ["{home}/missing"]}, r"missing: no such folder"),
    "unknown baseline": ({"baselines": ["{home}/unknown"]}, r"unknown holds no model"),
    "small baseline": ({"baselines": ["{home}/small"]}, r"small has a vocabulary"),
    "adapter on a small base": ({"baselines": ["{home}/lora"], "base": "{home}/small"}, r"small has a vocabulary"),
    "one baseline twice": ({"baselines": ["{home}/lora", "{home}/lora"]}, r"'baseline: lora'"),
    "no split": ({"validation_split": 0.0}, r"validation_split.* 0"),
    "a split above 1": ({"validation_split": 1.5}, r"validation_split.* 1\.5"),
    "no records": ({"max_records": 0}, r"no record to evaluate"),
    "no batch": ({"batch_size": 0}, r"batch_size.* 0"),
    "too long a chunk": ({"chunk_length": 9999}, r"`chunk_length` is 9999, but it must be an integer from 1 to"),
    "no picture": ({"picture": "losses.doc"}, r"`picture` is losses\.doc, but it must end in one of: .*pdf.*png"),
    "a file": ({"output_dir": "{home}/data.jsonl"}, r"output_dir.*file"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named_before_anything_is_written(case, home, tmp_path):
    flags, message = BAD[case]
    fill = lambda value: value.format(home=home) if isinstance(value, str) else value  # noqa: E731
    flags = {key: [*map(fill, v)] if isinstance(v, list) else fill(v) for key, v in flags.items()}
    with pytest.raises(ValueError, match=message):
        eval_sft.evaluate(arguments(home, tmp_path / "new", **flags))
    assert not (tmp_path / "new").exists()


def test_facts_are_asked_for_by_distance(talker, tmp_path, capsys):
    """The rows are those of `recall`, which tests/evaluation/test_recall.py holds against references."""
    (model, tokenizer), folder = talker, tmp_path
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    arguments = {"model_dir": str(folder), "dataset": "facts", "facts_distances": [6, 3], "generated_records": 2}
    eval_sft.evaluate(eval_sft.EvaluationArguments(**arguments, device="cpu"))
    measured = json.loads((folder / "recall_evaluation.json").read_text())
    assert measured == recall(model, tokenizer, [3, 6], 4, 2) and (folder / "recall_evaluation.png").is_file()
    assert "| words between (8 facts each) |" in (output := capsys.readouterr().out)
    evaluation = json.loads((folder / "evaluation.json").read_text())
    assert evaluation["recall"] == measured and evaluation["dataset"] == "facts"
    assert "Too few records for a verdict (2 of at least 10): " in output and evaluation["verdict"]["distance"] == 6
    settings, spoken = folder / "generation_config.json", 2 * model.config.chunk_length
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chunk_length": spoken}))
    for given, expected in (({}, spoken), ({"chunk_length": 5}, 5)):
        eval_sft.evaluate(eval_sft.EvaluationArguments(**arguments, device="cpu", **given))
        measured = json.loads((folder / "recall_evaluation.json").read_text())
        assert {row["chunk_length"] for row in measured} == {expected}
        assert f"with chunks of {expected} tokens, not the {model.config.chunk_length}" in capsys.readouterr().out
    for wrong in ({"facts_distances": [-1]}, {"generated_records": 1}, {"base": "x"}):
        with pytest.raises(ValueError, match="facts"):
            eval_sft.EvaluationArguments(**arguments | wrong)
