# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
What the soft prompt carries, and whether the recursion earns its keep: loss on the same validation records, in nats
per answer token and by chunk index, of

    the model                      what was trained
    Δ = 0                          its LLM behind the sliding window alone
    soft prompt at sp_0            every chunk predicted from the query's soft prompt: no recursion
    another record's soft prompt   chunk c predicted from sp_c of the next record: a negative control
    another record's Δ             its own window, but at every step the Δ of the next record
    full context                   its LLM on the whole query and answer, as an ordinary causal LM

and of them **context recovery**, with 95 % intervals from a bootstrap over the records:

    R = (loss of the window − loss of the model) / (loss of the window − loss of full context)

The same with another record's Δ is what Δ does for any text, as a static prompt could; only the rest was carried.

train_sft.py ends with these. The command adds the untrained base, baselines that were fine-tuned on their own, R
behind the model's own words, and exact match where answers end in `#### 72`, and
writes evaluation.json and the picture:

    python -m scripts.eval_sft --model_dir DIR --dataset gsm8k_train.jsonl
    python -m scripts.eval_sft --model_dir DIR --dataset gsm8k_train.jsonl --base BASE --baselines WINDOW LORA
    python -m scripts.eval_sft --help                             every flag

**Behind the model's own words**: the model answers each query greedily, without an end token, and chunk c of the
*reference* is then scored behind the query and the first c chunks of that answer instead of the reference's own. The
targets and what is before them are the same for the model, for Δ = 0 and for full context.
"""

import json
import math
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from importlib.metadata import version
from pathlib import Path

import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError
from tqdm.auto import tqdm
from transformers import HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase

from configuration_phase15 import Phase15Config
from phase15.arguments import check_dtype, check_output_dir
from phase15.checkpoints import write_text
from phase15.evaluation import (
    BOOTSTRAP_SAMPLES,
    FULL_CONTEXT,
    MODEL,
    WINDOW,
    Losses,
    Record,
    baseline_losses,
    no_delta,
    own_words,
    pad,
    report,
    variants,
)
from phase15.examples import stream_encoder, tokenize
from phase15.models import CAUSAL_LM, PHASE15, kind_of, load, load_tokenizer, vocab_size
from phase15.records import load_records, stream_records
from phase15.reports import plot, table
from phase15.runs import RUN_DEFAULTS, held_out, read_recipe


@dataclass
class EvaluationArguments:
    model_dir: str = field(metadata={"help": "A Phase15 model's folder, as train_sft.py leaves it."})
    dataset: str = field(metadata={"help": "What train_sft.py takes as dataset_name."})
    base: str | None = field(
        default=None, metadata={"help": "The untrained base (Hub id, folder or .gguf file); adapters go on it too."}
    )
    baselines: list[str] = field(
        default_factory=list,
        metadata={"help": "Folders of models trained on the same records: Phase15, causal LM or PEFT adapter."},
    )
    validation_split: float | None = field(
        default=None,
        metadata={"help": "Share of the records, the last, that is evaluated; the run's own by default, else 0.1."},
    )
    max_records: int | None = field(
        default=None, metadata={"help": "Evaluate the first so many of them; as the run did by default."}
    )
    shuffle_records: bool | None = field(
        default=None, metadata={"help": "Shuffle the records before they are split; as the run did by default."}
    )
    seed: int | None = field(
        default=None, metadata={"help": "Of the shuffling and the bootstrap; the run's own by default, else 42."}
    )
    batch_size: int = field(default=8, metadata={"help": "Records at a time."})
    generated_records: int = field(default=32, metadata={"help": "Generate answers to the first so many records."})
    max_new_tokens: int = field(default=256, metadata={"help": "Length of these answers, at most."})
    bootstrap_samples: int = field(default=BOOTSTRAP_SAMPLES, metadata={"help": "Samples behind each interval."})
    dtype: str = field(default="float32", metadata={"help": "Of the weights."})
    device: str = field(
        default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "Where to compute."}
    )
    output_dir: str | None = field(default=None, metadata={"help": "For evaluation.json and the picture: model_dir."})


def main(args: EvaluationArguments):
    """Measures everything, and then writes."""
    baselines = check_arguments(args)
    config = Phase15Config.from_pretrained(args.model_dir)
    tokenizer = load_tokenizer(args.model_dir, config=config)
    records, where, seed = validation_records(args, tokenizer, config.max_answer_length, config.text_config.vocab_size)
    print(f"Evaluating {where}.")
    asked = records[: args.generated_records]
    numbered = [record for record in asked if final_number(tokenizer.decode(record.answer)) is not None]

    def answer(name: str, model: PreTrainedModel | PeftModel) -> list[list[int]]:
        queries = [record.query for record in numbered]
        return generate(name, model, tokenizer, queries, args.batch_size, args.max_new_tokens)

    losses, own_losses, answers = measure_model(args, records, asked, tokenizer, answer)
    for name, folder in baselines.items():
        baseline = load(folder, args)
        losses[name] = baseline_losses(name, baseline, records, args.batch_size, config.chunk_length)
        answers[name] = answer(name, baseline)
        del baseline  # before the next is loaded
    results = {
        "model": Path(args.model_dir).resolve().name,
        "dataset": Path(args.dataset).name if os.path.isabs(args.dataset) else args.dataset,
        "evaluated": where,
        "records": {"validation": len(records), "generated": len(asked)},
        **report(losses, own_losses, args.bootstrap_samples, seed),
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


def check_arguments(args: EvaluationArguments) -> dict[str, str]:
    """Refuses what cannot be evaluated; returns where the base and the baselines are, by the names of their rows."""
    for name, least in {"batch_size": 1, "generated_records": 0, "max_new_tokens": 1, "bootstrap_samples": 1}.items():
        if getattr(args, name) < least:
            raise ValueError(f"`{name}` is {getattr(args, name)}, but it must be {least} or more.")
    check_dtype(args.dtype)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # not the name of a device, or one that is not here
        reason = str(error).partition("\n")[0]
        raise ValueError(f"`device` is {args.device!r}, which cannot be used: {reason}") from error
    for folder in (args.model_dir, *args.baselines):
        if not Path(folder).is_dir():
            raise ValueError(f"{folder}: no such folder.")
    if (kind := kind_of(args.model_dir)) != PHASE15:
        raise ValueError(f"{args.model_dir} is not the folder of {PHASE15}, but of {kind}.")
    if args.base and (kind := kind_of(args.base)) != CAUSAL_LM:
        raise ValueError(f"`base` is {args.base}, but that is {kind}, where {CAUSAL_LM} was expected.")
    if args.output_dir:
        check_output_dir(args.output_dir)
    rows = {"the untrained base, full context": args.base} if args.base else {}
    for folder in args.baselines:
        name = f"baseline: {read_recipe(folder).get('baseline') or Path(folder).resolve().name}"
        if name in rows:
            raise ValueError(f"{rows[name]} and {folder} would both be called {name!r}.")
        rows[name] = folder
        if (others := held_out(folder)) and (own := held_out(args.model_dir)):
            for key, value in own.items():
                if others[key] != value:
                    raise ValueError(
                        f"{folder} did not hold out the records that {args.model_dir} did: its `{key}` was "
                        f"{others[key]!r}, not {value!r}."
                    )
    expected = vocab_size(args.model_dir, args.base)
    for name in rows.values():
        if (found := vocab_size(name, args.base)) != expected:
            raise ValueError(f"{name} has a vocabulary of {found} tokens, but {args.model_dir} has one of {expected}.")
    return rows


def validation_records(
    args: EvaluationArguments,
    tokenizer: PreTrainedTokenizerBase,
    max_answer_length: int,
    vocab_size: int | None = None,
) -> tuple[list[Record], str, int]:
    """
    The records to evaluate, which they are in words, and the seed. Where the run that made the model read the same
    data they are, unless flags say otherwise, those that it held out.
    """
    name, recipe = args.dataset, read_recipe(args.model_dir)
    if Path(str(recipe.get("dataset_name"))).name != Path(name).name:
        recipe = {}
    run = {**RUN_DEFAULTS, **recipe}
    flags = {key: getattr(args, key) for key in ("validation_split", "shuffle_records", "seed")}
    share, is_shuffled, seed = (run[key] if flag is None else flag for key, flag in flags.items())
    most = recipe.get("max_validation_records") if args.max_records is None else args.max_records
    if not 0 < share <= 1:
        raise ValueError(f"`validation_split` is {share}, but it must be above 0, and 1 at most.")
    is_held_out = share == run["validation_split"] and is_shuffled == run["shuffle_records"]
    is_held_out &= seed == run["seed"] or not is_shuffled
    source = (name, recipe.get("dataset_config"), recipe.get("dataset_train_split", "train"))
    if recipe.get("streaming") and is_held_out:
        stream = stream_records(*source)
        encode = stream_encoder(stream, tokenizer, max_answer_length, name, vocab_size)
        rows = [encode(row) for row in stream.take(min(max(most, 0), recipe["max_validation_records"]))]
        which = "the first"
    else:
        rows = tokenize(load_records(*source), tokenizer, max_answer_length, name, vocab_size)
        rows = rows.shuffle(seed=seed) if is_shuffled else rows
        start = len(rows) - math.ceil(len(rows) * share)
        rows = rows.select(range(start, len(rows) if most is None else min(start + max(most, 0), len(rows))))
        which = f"from the last {100 * share:g} %" + (f", shuffled with seed {seed}" if is_shuffled else "")
    if not len(rows):
        raise ValueError(f"{name}: there is no record to evaluate; `max_records` is {most}.")
    if not recipe:
        held_out = "no recipe.yaml says whether the model was trained on them"
    elif is_held_out:
        held_out = "the run that made the model held them out"
    else:
        held_out = "NOT the split of the run that made the model, which may have trained on them"
    records = [
        Record(row["input_ids"][: row["query_length"]], row["input_ids"][row["query_length"] :]) for row in rows
    ]
    return records, f"{len(rows)} records of {Path(name).name}, {which}; {held_out}", seed


def measure_model(
    args: EvaluationArguments,
    records: list[Record],
    asked: list[Record],
    tokenizer: PreTrainedTokenizerBase,
    answer: Callable[[str, PreTrainedModel], list[list[int]]],
) -> tuple[dict[str, Losses], dict[str, Losses], dict[str, list[list[int]]]]:
    """The rows of the model's own LLM: their losses, those behind its own words, and their answers."""
    model = load(args.model_dir, args)
    losses, own_losses = variants(model, records, args.batch_size), {}
    if asked:
        length = model.config.chunk_length
        longest = math.ceil(max(len(record.answer) for record in asked) / length) * length
        queries = [record.query for record in asked]
        words = generate("own words", model, tokenizer, queries, args.batch_size, longest, min_new_tokens=longest)
        own_losses = own_words(model, asked, words, args.batch_size)
    answers = {MODEL: answer(MODEL, model), FULL_CONTEXT: answer(FULL_CONTEXT, model.llm)}
    with no_delta(model):
        answers[WINDOW] = answer(WINDOW, model)
    return losses, own_losses, answers


@torch.no_grad()
def generate(
    name: str,
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    queries: list[list[int]],
    batch_size: int,
    max_new_tokens: int,
    min_new_tokens: int = 0,
) -> list[list[int]]:
    """Greedy answers to queries, up to their end token; before `min_new_tokens` there is none."""
    ends, answers = tokenizer.eos_token_id, []
    is_prompt = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    if is_prompt:
        batch_size = 1  # PEFT puts virtual tokens in front of the padding, which then counts as positions
    for start in tqdm(range(0, len(queries), batch_size), desc=f"{name}, answering"):
        batch = queries[start : start + batch_size]
        ids, length = pad([query[::-1] for query in batch], model.device)
        place = torch.arange(ids.shape[1], device=model.device)
        output = model.generate(
            input_ids=ids.flip(1),  # padded on the left
            attention_mask=(place < length[:, None]).long().flip(1),
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            do_sample=False,
            num_beams=1,
            use_cache=not is_prompt,  # PEFT 0.21 does not find transformers 5.24's, and puts them before every token
            eos_token_id=ends,
            pad_token_id=ends,
        )
        rows = output[:, ids.shape[1] :].tolist()
        answers += [row[: row.index(ends)] if ends in row else row for row in rows]
    return answers


def final_number(text: str) -> Decimal | None:
    """The last number behind `####`, where GSM8K's answers have it."""
    found = re.findall(r"####\s*([-$0-9.,]+)", text)
    try:
        return Decimal(re.sub(r"[$,]", "", found[-1]).rstrip(".")) if found else None
    except InvalidOperation:  # "$." say
        return None


def exact_match(
    answers: dict[str, list[list[int]]], records: list[Record], tokenizer: PreTrainedTokenizerBase
) -> dict[str, dict]:
    """How many of each row's answers end in the number that the record's does."""
    expected = [final_number(tokenizer.decode(record.answer)) for record in records]
    result = {}
    for name, rows in answers.items():
        numbers = [final_number(tokenizer.decode(row)) for row in rows]
        correct = sum(number == right for number, right in zip(numbers, expected, strict=True))
        result[name] = {"correct": correct, "records": len(records), "share": correct / len(records)}
    return result


if __name__ == "__main__":
    try:
        main(*HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses())
    except (ValueError, OSError, FloatingPointError, StrictDataclassError, SafetensorError) as error:
        raise SystemExit(f"eval_sft.py: {' '.join(str(error).split())}") from error
