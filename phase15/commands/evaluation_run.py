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
from phase15.data.examples import Phase15Encoder, load_examples
from phase15.data.facts import FACTS, FactsArguments
from phase15.data.records import open_records, read_texts
from phase15.evaluation.answers import greedy_answers
from phase15.evaluation.arguments import EvaluationArguments
from phase15.evaluation.losses import (
    BASE,
    FREE_RUNNING,
    FULL_CONTEXT,
    MODEL,
    WINDOW,
    Example,
    Losses,
    baseline_losses,
    display_label,
    measure_free_running,
    measure_variants,
    no_delta,
)
from phase15.evaluation.plots import check_picture, plot_losses, plot_recall
from phase15.evaluation.recall import recall
from phase15.evaluation.recovery import report
from phase15.evaluation.tables import losses_table, recall_table
from phase15.evaluation.verdict import judge_recall, next_command
from phase15.hub.runs import find_differing_setting, read_held_out, read_run
from phase15.loading import (
    CAUSAL_LM,
    Source,
    check_kind,
    load_any,
    load_tokenizer,
    read_vocab_size,
    resolve_source,
)
from phase15.model.configuration_phase15 import Phase15Config
from phase15.model.modeling_phase15 import Phase15ForCausalLM


def evaluate(args: EvaluationArguments):
    """Measures everything, and then writes."""
    if args.picture:
        check_picture(args.picture)
    earlier = read_earlier(args)
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    source, others = check_models(args)
    config = source.config
    length_choices = (args.chunk_length, read_generation_config(args.model_dir))
    chunk_length = config.resolve_chunk_length(*length_choices)
    tokenizer = load_tokenizer(source)
    if args.dataset == FACTS:
        return measure_facts(args, source, tokenizer, chunk_length, earlier)
    examples, description, seed = validation_examples(args, tokenizer, config)
    description += describe_chunk_length(chunk_length, config)
    print(f"Evaluating {description}.")
    asked = examples[: args.generated_records]
    numbered = [example for example in asked if final_number(tokenizer.decode(example.answer)) is not None]

    def answer(name: str, model: PreTrainedModel | PeftModel, chunk_length: int | None = None) -> list[list[int]]:
        queries = [example.query for example in numbered]
        return greedy_answers(
            name, model, tokenizer, queries, args.batch_size, args.max_new_tokens, chunk_length=chunk_length
        )

    losses, free_losses, answers = measure_model(args, source, examples, asked, tokenizer, answer, chunk_length)
    for name, other_source in others.items():
        other = load_any(other_source, args.dtype, others.get(BASE), args.device)
        own_length = None
        if isinstance(other, Phase15ForCausalLM):
            own_length = other.config.resolve_chunk_length(*length_choices)
        losses[name] = baseline_losses(name, other, examples, args.batch_size, chunk_length, own_length)
        answers[name] = answer(name, other, own_length)
        del other  # before the next is loaded
    results = {
        "model": Path(args.model_dir).resolve().name,
        "dataset": dataset_key(args.dataset),
        "evaluated": description,
        "records": {"validation": len(examples), "generated": len(asked)},
        "chunk_length": chunk_length,
        **report(losses, free_losses, args.bootstrap_samples, seed),
    }
    if numbered:
        results["exact_match"] = exact_match(answers, numbered, tokenizer)
    results |= {"seed": seed, **describe_call()}
    save(args, results, earlier)
    plot_losses(results["validation"], picture_path(args, "loss_by_chunk"))
    print(f"\n{losses_table(results)}\n")
    print_verdict(args, results["verdict"])


def describe_call() -> dict:
    """Returns the command without folders, and the versions of the libraries, for evaluation.json."""
    return {
        "command": shlex.join(Path(word).name if os.path.isabs(word) else word for word in sys.argv),
        "versions": {package: version(package) for package in ("transformers", "torch", "datasets", "peft")},
    }


def dataset_key(name: str) -> str:
    """Returns the name by which evaluation.json keeps the results of a data set, without private folders."""
    return Path(name).name if os.path.isabs(name) else os.path.normpath(name)


def is_own_dataset(args: EvaluationArguments) -> bool:
    """Returns `True` for the data set of the run that made the model."""
    run = read_held_out(args.model_dir) or {}
    return run.get("dataset_name") == Path(args.dataset).name


def read_earlier(args: EvaluationArguments) -> dict:
    """
    Returns the evaluation that the output folder holds already, empty if there is none. Raises a ValueError for one of
    another model, which would be lost.
    """
    if args.output_dir is None:
        return read_run(args.model_dir).evaluation
    earlier = read_run(args.output_dir).evaluation
    model = Path(args.model_dir).resolve().name
    if earlier and earlier.get("model", model) != model:
        raise ValueError(
            f"{args.output_dir} holds the evaluation of {earlier['model']}, not of {model}; give another --output_dir."
        )
    return earlier


def save(args: EvaluationArguments, results: dict, earlier: dict):
    """
    Writes evaluation.json. The newest results are its top level, and `other_datasets` holds those of other data sets
    by their names. Results of the same data set are replaced.
    """
    others = dict(earlier.get("other_datasets", {}))
    if earlier:
        others[earlier["dataset"]] = {name: value for name, value in earlier.items() if name != "other_datasets"}
    others.pop(results["dataset"], None)
    if others:
        results = results | {"other_datasets": others}
    output_dir = Path(args.output_dir or args.model_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    write_text(output_dir / "evaluation.json", json.dumps(results, indent=2) + "\n")


def picture_path(args: EvaluationArguments, name: str) -> Path:
    """Returns the path of the picture. A data set that is not the run's has a picture of its own."""
    if args.picture:
        path = Path(args.picture)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path
    folder = Path(args.output_dir or args.model_dir)
    if args.dataset == FACTS or is_own_dataset(args):
        return folder / f"{name}.png"
    words = re.sub(r"[^\w.-]+", "_", dataset_key(args.dataset))
    return folder / f"{name}_{words}.png"


def print_verdict(args: EvaluationArguments, verdict: dict):
    """Prints whether Δ helped, and the next command."""
    run = read_run(args.model_dir)
    recipe = run.recipes[0] if run.recipes else {}
    print(verdict["sentence"])
    print(next_command(verdict, args.model_dir, args.dataset, recipe, run.results.get("steps")), flush=True)


def measure_facts(
    args: EvaluationArguments,
    source: Source,
    tokenizer: PreTrainedTokenizerBase,
    chunk_length: int,
    earlier: dict,
):
    """Asks for facts at every distance, in chats that were drawn for it, instead of records that a run held out."""
    run = read_held_out(args.model_dir) or {}
    recipes = read_run(args.model_dir).recipes
    defaults = FactsArguments()
    texts = read_texts(args.facts_text or (recipes[0].get("facts_text") if recipes else None))
    distances = args.facts_distances or run.get("facts_distances", defaults.facts_distances)
    model = load_any(source, args.dtype, device=args.device)
    number = run.get("facts_per_chat", defaults.facts_per_chat)
    seed = args.seed or 0
    settings = {"num_chats": args.generated_records, "seed": seed, "batch_size": args.batch_size, "texts": texts}
    settings["chunk_length"] = chunk_length
    how = describe_chunk_length(chunk_length, source.config)
    print(f"Asking for {number} facts in each of {args.generated_records} chats{how}.")
    measured = recall(model, tokenizer, sorted(set(distances)), number, **settings)
    verdict = judge_recall(choose_distance(measured, run.get("facts_distances", [])))
    description = f"{number} facts in each of {args.generated_records} chats{how}"
    results = {
        "model": Path(args.model_dir).resolve().name,
        "dataset": FACTS if args.facts_text is None else f"{FACTS}, {dataset_key(args.facts_text)}",
        "evaluated": description,
        "records": {"validation": 0, "generated": args.generated_records},
        "chunk_length": chunk_length,
        "validation": {},
        "context_recovery": {},
        "recall": measured,
        "verdict": verdict,
        "seed": seed,
        **describe_call(),
    }
    save(args, results, earlier)
    output_dir = Path(args.output_dir or args.model_dir)
    write_text(output_dir / "recall_evaluation.json", json.dumps(measured, indent=2) + "\n")
    plot_recall(measured, picture_path(args, "recall_evaluation"))
    print(f"\n{recall_table(measured)}\n")
    print_verdict(args, verdict)


def choose_distance(measured: list[dict], trained: list[int]) -> dict:
    """Returns the measurement of the longest trained distance, or the longest where none was trained."""
    longest = max(trained, default=math.inf)
    in_training = [row for row in measured if row["distance"] <= longest]
    return max(in_training or measured, key=lambda row: row["distance"])


def read_generation_config(folder: str) -> GenerationConfig | None:
    """Returns the generation config of a folder, which may choose a chunk length; `None` if there is none."""
    try:
        return GenerationConfig.from_pretrained(folder)
    except OSError:
        return None


def describe_chunk_length(chunk_length: int, config: Phase15Config) -> str:
    """Returns a note on a chunk length that is not that of training, else nothing."""
    if chunk_length == config.chunk_length:
        return ""
    return f"; with chunks of {chunk_length} tokens, not the {config.chunk_length} of training"


def check_models(args: EvaluationArguments) -> tuple[Source, dict[str, Source]]:
    """
    Raises a ValueError for models that cannot be compared. Returns the source of the model, and those of the base and
    the baselines by the key of their row.
    """
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # no such device, or not on this machine
        reason = str(error).partition("\n")[0]
        raise ValueError(f"`device` is {args.device!r}, which cannot be used: {reason}") from error
    for folder in (args.model_dir, *args.baselines):
        if not Path(folder).is_dir():
            raise ValueError(f"{folder}: no such folder.")
    source = check_kind(args.model_dir)
    rows = {}
    if args.base:
        rows[BASE] = check_kind(args.base, CAUSAL_LM)
    own = read_held_out(args.model_dir)
    for folder in args.baselines:
        recipes = read_run(folder).recipes
        kind = recipes[0].get("baseline") if recipes else None
        name = f"baseline_{kind or Path(folder).resolve().name}"
        if name in rows:
            raise ValueError(f"{rows[name]} and {folder} would both be called {display_label(name)!r}.")
        rows[name] = resolve_source(folder)
        others = read_held_out(folder)
        key = find_differing_setting(own, others) if own and others else None
        if key is not None:
            raise ValueError(
                f"{folder} did not hold out the records that {args.model_dir} did: its `{key}` was {others[key]!r}, "
                f"not {own[key]!r}."
            )
    expected = read_vocab_size(source)
    for other in rows.values():
        size = read_vocab_size(other, rows.get(BASE))
        if size != expected:
            raise ValueError(f"{other} has a vocabulary of {size} tokens, but {source} has one of {expected}.")
    return source, rows


def validation_examples(
    args: EvaluationArguments, tokenizer: PreTrainedTokenizerBase, config: Phase15Config
) -> tuple[list[Example], str, int]:
    """
    The examples to evaluate, their description, and the seed. If the run that made the model read the same data, they
    are those that it held out, unless flags say otherwise.
    """
    name = args.dataset
    run = read_held_out(args.model_dir) or {}
    if run.get("dataset_name") != Path(name).name:
        run = {}
    # of other data all records are fresh, so that all are evaluated
    defaults = {"validation_split": 1.0, "shuffle_records": False, "seed": 42} | run
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
    source: Source,
    examples: list[Example],
    asked: list[Example],
    tokenizer: PreTrainedTokenizerBase,
    answer: Callable[..., list[list[int]]],
    chunk_length: int,
) -> tuple[dict[str, Losses], dict[str, Losses], dict[str, list[list[int]]]]:
    """The rows of the model's own LLM: losses, free-running losses, and answers."""
    model = load_any(source, args.dtype, device=args.device)
    losses = measure_variants(model, examples, args.batch_size, chunk_length)
    free_losses = {}
    if asked:
        num_chunks = math.ceil(max(len(example.answer) for example in asked) / chunk_length)
        longest = num_chunks * chunk_length
        queries = [example.query for example in asked]
        own = greedy_answers(
            FREE_RUNNING,
            model,
            tokenizer,
            queries,
            args.batch_size,
            max_new_tokens=longest,
            min_new_tokens=longest,
            chunk_length=chunk_length,
        )
        free_losses = measure_free_running(model, asked, own, args.batch_size, chunk_length)
    answers = {MODEL: answer(MODEL, model, chunk_length), FULL_CONTEXT: answer(FULL_CONTEXT, model.llm)}
    with no_delta(model):
        answers[WINDOW] = answer(WINDOW, model, chunk_length)
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
