# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The work of `phase15 eval`: chooses the records, measures the models, writes evaluation.json and the picture."""

import itertools
import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable
from decimal import Decimal, InvalidOperation
from importlib.metadata import version
from pathlib import Path

import torch
from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from phase15.cli.files import write_text
from phase15.commands.evaluate import EvaluationArguments
from phase15.data.examples import Phase15Encoder, load_examples
from phase15.data.facts import FACTS, FactsArguments
from phase15.data.records import open_records, texts_of
from phase15.evaluation.answers import greedy_answers
from phase15.evaluation.losses import (
    BASE,
    FREE_RUNNING,
    FULL_CONTEXT,
    MODEL,
    WINDOW,
    Example,
    Losses,
    baseline_losses,
    free_running,
    label,
    no_delta,
    variants,
)
from phase15.evaluation.plots import plot, plot_recall
from phase15.evaluation.recall import recall
from phase15.evaluation.recovery import report
from phase15.evaluation.tables import recall_table, table
from phase15.hub.runs import held_out, read_run, same_records
from phase15.loading import CAUSAL_LM, check_kind, load_any, load_tokenizer, vocab_size_of
from phase15.model.configuration_phase15 import Phase15Config
from phase15.model.modeling_phase15 import Phase15ForCausalLM


def evaluate(args: EvaluationArguments):
    """Measures everything, and then writes."""
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    others = check_models(args)
    config = Phase15Config.from_pretrained(args.model_dir)
    if args.chunk_length is None:
        args.chunk_length = saved_chunk_length(args.model_dir)
    config.check_chunk_length(args.chunk_length)
    tokenizer = load_tokenizer(args.model_dir, config=config)
    if args.dataset == FACTS:
        return measure_facts(args, tokenizer, config)
    examples, description, seed = validation_examples(args, tokenizer, config)
    length = args.chunk_length or config.chunk_length
    description += chunk_length_note(length, config)
    print(f"Evaluating {description}.")
    asked = examples[: args.generated_records]
    numbered = [example for example in asked if final_number(tokenizer.decode(example.answer)) is not None]

    def answer(name: str, model: PreTrainedModel | PeftModel) -> list[list[int]]:
        queries = [example.query for example in numbered]
        return greedy_answers(name, model, tokenizer, queries, args.batch_size, args.max_new_tokens)

    losses, free_losses, answers = measure_model(args, examples, asked, tokenizer, answer)
    for name, folder in others.items():
        other = load(args, folder)
        losses[name] = baseline_losses(name, other, examples, args.batch_size, length)
        answers[name] = answer(name, other)
        del other  # before the next is loaded
    results = {
        "model": Path(args.model_dir).resolve().name,
        "dataset": Path(args.dataset).name if os.path.isabs(args.dataset) else args.dataset,
        "evaluated": description,
        "records": {"validation": len(examples), "generated": len(asked)},
        "chunk_length": length,
        **report(losses, free_losses, args.bootstrap_samples, seed),
    }
    if numbered:
        results["exact_match"] = exact_match(answers, numbered, tokenizer)
    results |= {
        "seed": seed,
        "command": shlex.join(Path(word).name if os.path.isabs(word) else word for word in sys.argv),
        "versions": {package: version(package) for package in ("transformers", "torch", "datasets", "peft")},
    }
    output_dir = Path(args.output_dir or args.model_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / "evaluation.json", json.dumps(results, indent=2) + "\n")
    plot(results["validation"], output_dir / "loss_by_chunk.png")
    print(f"\n{table(results)}\n")


def measure_facts(args: EvaluationArguments, tokenizer: PreTrainedTokenizerBase, config: Phase15Config):
    """Asks for facts at every distance, in chats that were drawn for it, instead of records that a run held out."""
    run = held_out(args.model_dir) or {}
    recipes = read_run(args.model_dir).recipes
    defaults = FactsArguments()
    texts = texts_of(args.facts_text or (recipes[0].get("facts_text") if recipes else None))
    distances = args.facts_distances or run.get("facts_distances", defaults.facts_distances)
    model = load(args, args.model_dir)
    number = run.get("facts_per_chat", defaults.facts_per_chat)
    seed = args.seed or 0
    settings = {"num_chats": args.generated_records, "seed": seed, "batch_size": args.batch_size, "texts": texts}
    how = chunk_length_note(model.config.chunk_length, config)
    print(f"Asking for {number} facts in each of {args.generated_records} chats{how}.")
    measured = recall(model, tokenizer, sorted(set(distances)), number, **settings)
    output_dir = Path(args.output_dir or args.model_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / "recall_evaluation.json", json.dumps(measured, indent=2) + "\n")
    plot_recall(measured, output_dir / "recall_evaluation.png")
    print(f"\n{recall_table(measured)}\n")


def saved_chunk_length(folder: str) -> int | None:
    """Returns the chunk length of `generate`, if the generation config of the folder has one."""
    try:
        return getattr(GenerationConfig.from_pretrained(folder), "chunk_length", None)
    except OSError:  # it has none
        return None


def chunk_length_note(length: int, config: Phase15Config) -> str:
    """Returns the part of a description about a chunk length other than that of training."""
    if length == config.chunk_length:
        return ""
    return f"; with chunks of {length} tokens, not the {config.chunk_length} of training"


def load(args: EvaluationArguments, name: str) -> PreTrainedModel | PeftModel:
    """A model; if it is a Phase15 model, with chunks of the length that is asked for."""
    model = load_any(name, args.dtype, args.base, args.device)
    if args.chunk_length is not None and isinstance(model, Phase15ForCausalLM):
        model.config.check_chunk_length(args.chunk_length)
        model.config.chunk_length = args.chunk_length
    return model


def check_models(args: EvaluationArguments) -> dict[str, str]:
    """Refuses models that cannot be compared; returns the base and the baselines by the key of their row."""
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # no such device, or not on this machine
        reason = str(error).partition("\n")[0]
        raise ValueError(f"`device` is {args.device!r}, which cannot be used: {reason}") from error
    for folder in (args.model_dir, *args.baselines):
        if not Path(folder).is_dir():
            raise ValueError(f"{folder}: no such folder.")
    check_kind(args.model_dir)
    if args.base:
        check_kind(args.base, CAUSAL_LM)
    rows = {BASE: args.base} if args.base else {}
    own = held_out(args.model_dir)
    for folder in args.baselines:
        recipes = read_run(folder).recipes
        kind = recipes[0].get("baseline") if recipes else None
        name = f"baseline_{kind or Path(folder).resolve().name}"
        if name in rows:
            raise ValueError(f"{rows[name]} and {folder} would both be called {label(name)!r}.")
        rows[name] = folder
        others = held_out(folder)
        key = same_records(own, others) if own and others else None
        if key is not None:
            raise ValueError(
                f"{folder} did not hold out the records that {args.model_dir} did: its `{key}` was {others[key]!r}, "
                f"not {own[key]!r}."
            )
    expected = vocab_size_of(args.model_dir)
    for folder in rows.values():
        size = vocab_size_of(folder, args.base)
        if size != expected:
            raise ValueError(
                f"{folder} has a vocabulary of {size} tokens, but {args.model_dir} has one of {expected}."
            )
    return rows


def validation_examples(
    args: EvaluationArguments, tokenizer: PreTrainedTokenizerBase, config: Phase15Config
) -> tuple[list[Example], str, int]:
    """
    The examples to evaluate, their description, and the seed. If the run that made the model read the same data, they
    are those that it held out, unless flags say otherwise.
    """
    name = args.dataset
    run = held_out(args.model_dir) or {}
    if run.get("dataset_name") != Path(name).name:
        run = {}
    defaults = {"validation_split": 0.1, "shuffle_records": False, "seed": 42} | run
    share, is_shuffled, seed = (
        defaults[key] if getattr(args, key) is None else getattr(args, key)
        for key in ("validation_split", "shuffle_records", "seed")
    )
    most = run.get("max_validation_records") if args.max_records is None else args.max_records
    if not 0 < share <= 1:
        raise ValueError(f"`validation_split` is {share}, but it must be above 0, and 1 at most.")
    is_held_out = (share, is_shuffled) == (defaults["validation_split"], defaults["shuffle_records"])
    is_held_out &= seed == defaults["seed"] or not is_shuffled
    streaming = bool(run.get("streaming"))
    split = run.get("dataset_train_split") or "train"
    records = open_records(name, run.get("dataset_config"), split, streaming)
    encoder = Phase15Encoder(records, tokenizer, config.max_answer_length, name, config.text_config.vocab_size)
    if streaming and is_held_out:
        number = min(max(most, 0), run["max_validation_records"])
        rows = [encoder(record) for record in itertools.islice(records, number)]
        part = "the first"
    else:
        rows = load_examples(records, encoder)
        rows = rows.shuffle(seed=seed) if is_shuffled else rows
        start = len(rows) - math.ceil(len(rows) * share)
        rows = rows.select(range(start, len(rows) if most is None else min(start + max(most, 0), len(rows))))
        part = f"from the last {100 * share:g} %" + (f", shuffled with seed {seed}" if is_shuffled else "")
    if not len(rows):
        raise ValueError(f"{name}: there is no record to evaluate; `max_records` is {most}.")
    if not run:
        origin = "no recipe.yaml says whether the model was trained on them"
    elif is_held_out:
        origin = "the run that made the model held them out"
    else:
        origin = "NOT the split of the run that made the model, which may have trained on them"
    examples = [
        Example(row["input_ids"][: row["query_length"]], row["input_ids"][row["query_length"] :]) for row in rows
    ]
    return examples, f"{len(rows)} records of {Path(name).name}, {part}; {origin}", seed


def measure_model(
    args: EvaluationArguments,
    examples: list[Example],
    asked: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    answer: Callable[[str, PreTrainedModel], list[list[int]]],
) -> tuple[dict[str, Losses], dict[str, Losses], dict[str, list[list[int]]]]:
    """The rows of the model's own LLM: losses, free-running losses, and answers."""
    model = load(args, args.model_dir)
    losses = variants(model, examples, args.batch_size)
    free_losses = {}
    if asked:
        length = model.config.chunk_length
        longest = math.ceil(max(len(example.answer) for example in asked) / length) * length
        queries = [example.query for example in asked]
        own = greedy_answers(FREE_RUNNING, model, tokenizer, queries, args.batch_size, longest, min_new_tokens=longest)
        free_losses = free_running(model, asked, own, args.batch_size)
    answers = {MODEL: answer(MODEL, model), FULL_CONTEXT: answer(FULL_CONTEXT, model.llm)}
    with no_delta(model):
        answers[WINDOW] = answer(WINDOW, model)
    return losses, free_losses, answers


def final_number(text: str) -> Decimal | None:
    """Returns the last number after `####`, as in the answers of GSM8K."""
    numbers = re.findall(r"####\s*([-$0-9.,]+)", text)
    try:
        return Decimal(re.sub(r"[$,]", "", numbers[-1]).rstrip(".")) if numbers else None
    except InvalidOperation:  # such as "$."
        return None


def exact_match(
    answers: dict[str, list[list[int]]], examples: list[Example], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict]:
    """Returns the number of answers of each row that end in the number of the reference."""
    expected = [final_number(tokenizer.decode(example.answer)) for example in examples]
    result = {}
    for name, rows in answers.items():
        numbers = [final_number(tokenizer.decode(row)) for row in rows]
        correct = sum(number == right for number, right in zip(numbers, expected, strict=True))
        result[name] = {"correct": correct, "records": len(examples), "share": correct / len(examples)}
    return result


__all__ = ["evaluate"]
