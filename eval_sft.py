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

train_sft.py ends with these. The command adds the untrained base, rivals that were fine-tuned on their own, R behind
the model's own words, and exact match where answers end in `#### 72`, and writes evaluation.json and the picture:

    python eval_sft.py --model_dir DIR --dataset gsm8k_train.jsonl
    python eval_sft.py --model_dir DIR --dataset gsm8k_train.jsonl --base BASE --rivals WINDOW FULL_CONTEXT LORA
    python eval_sft.py --help                             every flag

**Behind the model's own words**: the model answers each query greedily, without an end token, and chunk c of the
*reference* is then scored behind the query and the first c chunks of that answer instead of the reference's own. The
targets and what is before them are the same for the model, for Δ = 0 and for full context.
"""

import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal, InvalidOperation
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
import yaml
from huggingface_hub.errors import StrictDataclassError
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import AutoConfig, HfArgumentParser, PreTrainedModel, PreTrainedTokenizerBase

from checkpoint_sft import write_text
from configuration_phase15 import Phase15Config
from data_sft import load_records, load_tokenizer, stream_encoder, stream_records, tokenize
from modeling_phase15 import HyperNetwork, Phase15ForCausalLM, SoftPrompt


MODEL, WINDOW, FULL_CONTEXT = "the model", "Δ = 0", "full context"
FIRST_SOFT_PROMPT = "soft prompt at sp_0"
OTHER_SOFT_PROMPT, OTHER_DELTA = "another record's soft prompt", "another record's Δ"
SAME_LLM, OWN_WORDS = "same LLM", "same LLM, behind the model's own words"
NOT_CARRIED = "same LLM, with another record's Δ"
OWN_RIVALS = "rivals fine-tuned on their own"
RIVAL_WINDOW, RIVAL_FULL_CONTEXT = "rival: window", "rival: full_context"
BOOTSTRAP_SAMPLES = 10_000
WORDS = re.compile(r"[\w ',.;:%=()/+@-]*")  # what may stand in Markdown as it is, but for
MARKUP = re.compile(r"(?<!\w)_|_(?!\w)|:(?! )|@\S|www\.", re.IGNORECASE)  # emphasis, addresses, mentions, :names:
LEAST_GAP = 1e-4  # nats per token: below it, what full context gives over the window may be rounding alone


class Record(NamedTuple):
    """The token ids of a query and of what follows it."""

    query: list[int]
    answer: list[int]


class Losses(NamedTuple):
    """
    What each record's chunks cost; all intervals come from here.

    nats (`torch.DoubleTensor` of shape `(num_records, num_chunks)`): cross-entropy, summed over the chunk's tokens.
    tokens (`torch.LongTensor` of shape `(num_records, num_chunks)`): how many these are, 0 behind the answer's end.
    """

    nats: torch.Tensor
    tokens: torch.Tensor


# ------------------------------------------------------------------------------------------------------- the losses


@torch.no_grad()
def compare(model: Phase15ForCausalLM, batches: Iterable[dict[str, torch.Tensor]]) -> dict[str, dict]:
    """
    Measures the six variants, with the model in evaluation mode.

    Args:
        model (`Phase15ForCausalLM`): the trained model.
        batches (iterable of `dict`): of a [`Phase15DataCollator`].

    Returns:
        `dict`: `validation`, for each variant what `summary` says, and `context_recovery`, by the name of what is
        compared.
    """
    batches = [unbatch(batch) for batch in batches]
    losses = variants(model, [record for batch in batches for record in batch], max(map(len, batches)))
    return {
        "validation": {variant: summary(rows) for variant, rows in losses.items()},
        "context_recovery": {
            name: context_recovery(*(losses[row] for row in (WINDOW, candidate, FULL_CONTEXT)))
            for name, candidate in ((SAME_LLM, MODEL), (NOT_CARRIED, OTHER_DELTA))
            if candidate in losses
        },
    }


def compare_rival(
    model: PreTrainedModel | PeftModel, name: str, batches: Iterable[dict[str, torch.Tensor]], chunk_length: int
) -> dict[str, dict]:
    """As `compare`, of a rival alone: there is nothing that it recovers."""
    batches = [unbatch(batch) for batch in batches]
    records = [record for batch in batches for record in batch]
    losses = rival_losses(name, model.eval(), records, max(map(len, batches)), chunk_length)
    return {"validation": {name: summary(losses)}}


def unbatch(batch: dict[str, torch.Tensor]) -> list[Record]:
    rows = zip(*(batch[name] for name in ("input_ids", "attention_mask", "labels")), strict=True)
    return [
        Record(ids[mask.bool() & (labels == -100)].tolist(), ids[labels != -100].tolist())
        for ids, mask, labels in rows
    ]


def variants(model: Phase15ForCausalLM, records: list[Record], batch_size: int) -> dict[str, Losses]:
    """The rows that share the model's LLM. Without a second record there are no rows of another."""
    model.eval()

    def behind(name: str, histories: list[Record]) -> Losses:
        return measure(name, batch_size, lambda *batch: phase15_losses(model, *batch), records, histories)

    losses = {MODEL: behind(MODEL, records)}
    with no_delta(model):
        losses[WINDOW] = behind(WINDOW, records)
    unanswered = [record._replace(answer=[]) for record in records]
    losses[FIRST_SOFT_PROMPT] = behind(FIRST_SOFT_PROMPT, unanswered)
    if len(records) > 1:
        others = records[1:] + records[:1]
        losses[OTHER_SOFT_PROMPT] = behind(OTHER_SOFT_PROMPT, others)
        losses[OTHER_DELTA] = measure(
            OTHER_DELTA, batch_size, lambda *batch: other_delta_losses(model, *batch), records, others
        )
    losses[FULL_CONTEXT] = measure(
        FULL_CONTEXT, batch_size, lambda batch: llm_losses(model.llm, batch, model.config.chunk_length), records
    )
    return losses


def own_words(
    model: Phase15ForCausalLM, records: list[Record], answers: list[list[int]], batch_size: int
) -> dict[str, Losses]:
    """As `variants`, each chunk of a record behind the model's own answer, which is at least as long."""
    histories = [Record(record.query, answer) for record, answer in zip(records, answers, strict=True)]

    def behind_phase15(*batch) -> Losses:
        return phase15_losses(model, *batch)

    def behind_llm(batch: list[Record], histories: list[Record]) -> Losses:
        return llm_losses_behind(model.llm, batch, histories, model.config.chunk_length)

    losses = {MODEL: measure(f"{MODEL}, own words", batch_size, behind_phase15, records, histories)}
    with no_delta(model):
        losses[WINDOW] = measure(f"{WINDOW}, own words", batch_size, behind_phase15, records, histories)
    losses[FULL_CONTEXT] = measure(f"{FULL_CONTEXT}, own words", batch_size, behind_llm, records, histories)
    return losses


@torch.no_grad()
def measure(name: str, batch_size: int, losses_of: Callable[..., Losses], *lists: list[Record]) -> Losses:
    """`losses_of` over the batches of lists that run side by side, with a progress bar."""
    starts = tqdm(range(0, len(lists[0]), batch_size), desc=name)
    parts = [losses_of(*(rows[start : start + batch_size] for rows in lists)) for start in starts]
    num_chunks = max(part.nats.shape[1] for part in parts)
    parts = [[F.pad(values, (0, num_chunks - values.shape[1])) for values in part] for part in parts]
    losses = Losses(*map(torch.cat, zip(*parts, strict=True)))
    if not torch.isfinite(losses.nats).all():
        index = int((~torch.isfinite(losses.nats).all(dim=1)).nonzero()[0])
        raise FloatingPointError(
            f"{name}: the loss of validation record {index + 1} is not finite; the weights are damaged, or too large "
            "for their dtype."
        )
    return losses


@contextmanager
def no_delta(model: Phase15ForCausalLM) -> Iterator[None]:
    """Sets Δ to zero, exactly: only the window of `carry` is left."""
    alphas = [module.alpha for module in model.modules() if isinstance(module, HyperNetwork)]
    kept = [alpha.detach().clone() for alpha in alphas]
    for alpha in alphas:
        alpha.data.zero_()
    try:
        yield
    finally:
        for alpha, value in zip(alphas, kept, strict=True):
            alpha.data.copy_(value)


def pad(rows: list[list[int]], device: torch.device) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Token ids `(batch_size, longest)`, padded on the right, and the lengths `(batch_size,)`."""
    ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
    return ids.to(device), torch.tensor([len(row) for row in rows], device=device)


def phase15_losses(
    model: Phase15ForCausalLM, records: list[Record], histories: list[Record], chunk_length: int | None = None
) -> Losses:
    """
    Chunk c of each record, predicted from sp_c of a history: the record itself, or what is to be put in its place. Of
    a history with fewer chunks it is the last soft prompt that predicts one of them. `chunk_length` divides the
    result, and is the model's own by default.
    """
    length, embed = model.config.chunk_length, model.get_input_embeddings()
    (query, query_length), (history, history_length), (answer, answer_length) = (
        pad(rows, model.device)
        for rows in ([h.query for h in histories], [h.answer for h in histories], [r.answer for r in records])
    )
    soft_prompt = model.read(model.empty_soft_prompt(len(records)), query, query_length)
    losses = torch.zeros(answer.shape, dtype=torch.float64, device=model.device)
    for start in range(0, answer.shape[1], length):
        chunk, has_chunk = answer[:, start : start + length], answer_length > start
        seen = SoftPrompt(*(state[has_chunk] for state in soft_prompt))
        hidden_states, _ = model.predict(seen, embed(chunk[has_chunk, :-1]))
        is_target = torch.arange(start, start + chunk.shape[1], device=model.device) < answer_length[:, None]  # (B, K)
        logits = model.get_output_embeddings()(hidden_states[is_target[has_chunk]])
        losses[:, start : start + length][is_target] = cross_entropy(logits, chunk[is_target])
        goes_on = history_length > start + length
        if goes_on.any():
            soft_prompt = model.step(soft_prompt, embed(history[:, start : start + length]), goes_on * length)
    return by_chunk(losses, answer_length, chunk_length or length)


def other_delta_losses(model: Phase15ForCausalLM, records: list[Record], others: list[Record]) -> Losses:
    """
    As `phase15_losses`, but at every step of a record's soft prompt Δ is the one of another record's recursion, which
    runs beside it. Where that has ended, it is what Δ makes of its last soft prompt and no token.
    """

    def use_the_others(module, inputs, delta: torch.Tensor) -> torch.Tensor:
        return delta[len(records) :].repeat(2, 1, 1)

    hook = model.hypernet.register_forward_hook(use_the_others)
    try:
        losses = phase15_losses(model, records + others, records + others)
    finally:
        hook.remove()
    return Losses(*(values[: len(records)] for values in losses))


def llm_losses(llm: PreTrainedModel | PeftModel, records: list[Record], chunk_length: int) -> Losses:
    """Each answer, predicted by a causal LM with the query and the answer so far in its context."""
    ids, length = pad([record.query + record.answer for record in records], llm.device)
    query_length = torch.tensor([len(record.query) for record in records], device=llm.device)
    place = torch.arange(ids.shape[1], device=llm.device)
    first = int(query_length.min())  # place of the first target
    kept = ids.shape[1] - first + 1  # counted from the end, for adapters put virtual tokens in front
    mask = (place < length[:, None]).long()
    logits = llm(input_ids=ids, attention_mask=mask, logits_to_keep=kept, use_cache=False).logits[:, :-1]
    is_target = (place >= query_length[:, None]) & (place < length[:, None])
    losses = torch.zeros(ids.shape, dtype=torch.float64, device=llm.device)
    losses[is_target] = cross_entropy(logits[is_target[:, first:]], ids[is_target])
    answer_length = length - query_length
    answer = query_length[:, None] + torch.arange(int(answer_length.max()), device=llm.device)
    return by_chunk(losses.gather(1, answer.clamp(max=ids.shape[1] - 1)), answer_length, chunk_length)


def sums_by_chunk(
    logits: torch.Tensor, labels: torch.LongTensor, chunk_length: int
) -> tuple[torch.Tensor, torch.LongTensor]:
    """
    Cross-entropy of an ordinary causal LM, by the index of the chunk that each answer token would be in.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_virtual_tokens + sequence_length, vocab_size)`):
            Of `labels` behind the virtual tokens of prompt tuning, or behind none.
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): -100 for no target.
        chunk_length (`int`): answer tokens of a chunk.

    Returns:
        sums in nats and numbers of answer tokens, each of shape `(num_chunks,)`.
    """
    logits, targets = logits[:, -labels.shape[1] : -1], labels[:, 1:]
    is_target = targets != -100
    losses = F.cross_entropy(logits[is_target].float(), targets[is_target], reduction="none")
    chunk = ((is_target.cumsum(dim=1) - 1) // chunk_length)[is_target]
    return losses.new_zeros(int(chunk.max()) + 1).index_add_(0, chunk, losses), torch.bincount(chunk)


def llm_losses_behind(
    llm: PreTrainedModel, records: list[Record], histories: list[Record], chunk_length: int
) -> Losses:
    """Chunk c of each record, predicted by a causal LM behind a history's query and first c chunks."""
    parts = []
    for start in range(0, max(len(record.answer) for record in records), chunk_length):
        chunk = [
            Record(history.query + history.answer[:start], record.answer[start : start + chunk_length])
            for record, history in zip(records, histories, strict=True)
        ]
        parts.append(llm_losses(llm, chunk, chunk_length))
    return Losses(*(torch.cat(kind, dim=1) for kind in zip(*parts, strict=True)))


def cross_entropy(logits: torch.Tensor, targets: torch.LongTensor) -> torch.Tensor:
    """In nats, of each target `(num_targets,)`."""
    return F.cross_entropy(logits.float(), targets, reduction="none").double()


def by_chunk(losses: torch.Tensor, answer_length: torch.LongTensor, chunk_length: int) -> Losses:
    """Sums over chunks of losses `(batch_size, longest)` that are left-aligned; none behind an answer's end."""
    is_target = torch.arange(losses.shape[1], device=losses.device) < answer_length[:, None]
    kinds = (losses * is_target, is_target.long())
    padding = (0, -losses.shape[1] % chunk_length)
    return Losses(*(F.pad(values, padding).unflatten(1, (-1, chunk_length)).sum(2).cpu() for values in kinds))


# -------------------------------------------------------------------------------------------------- what they say


def summary(losses: Losses) -> dict:
    """`loss` (nats per answer token), `loss_by_chunk` (the same by chunk index) and `tokens_by_chunk`."""
    nats, tokens = losses.nats.sum(dim=0), losses.tokens.sum(dim=0)
    return {
        "loss": (nats.sum() / tokens.sum()).item(),
        "loss_by_chunk": (nats / tokens).tolist(),
        "tokens_by_chunk": tokens.tolist(),
    }


def resampled_loss(losses: Losses, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0) -> np.ndarray:
    """
    The loss of `samples` data sets of as many records, drawn from these with replacement, of shape `(samples,)`. The
    same seed draws the same records, so that differences of rows are paired.
    """
    nats, tokens = (values.sum(dim=1).numpy() for values in losses)
    draws = np.random.default_rng(seed).integers(len(nats), size=(samples, len(nats)))
    return nats[draws].sum(axis=1) / tokens[draws].sum(axis=1)


def interval(values: np.ndarray) -> list[float]:
    """The middle 95 %."""
    return np.quantile(values, [0.025, 0.975]).tolist()


def context_recovery(
    window: Losses, model: Losses, full_context: Losses, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0
) -> dict:
    """
    The share of what full context gives over the window that the model gives too.

    Returns:
        `dict`: `recovery` and its `interval`, None where full context is not surely better than the window (by
        `LEAST_GAP`); and the `gap` between these in nats per token, with its `gap_interval`.
    """
    rows = (window, model, full_context)
    (window, model, full_context) = (summary(row)["loss"] for row in rows)
    windows, models, full_contexts = (resampled_loss(row, samples, seed) for row in rows)
    gap, gap_interval = window - full_context, interval(windows - full_contexts)
    result = {"recovery": None, "interval": None, "gap": gap, "gap_interval": gap_interval}
    if min(gap, *gap_interval) > LEAST_GAP:
        with np.errstate(divide="ignore", invalid="ignore"):  # a few samples may have no gap
            ratios = (windows - models) / (windows - full_contexts)
        result |= {"recovery": (window - model) / gap, "interval": interval(ratios)}
    return result


def table(results: dict[str, dict]) -> str:
    """Losses, intervals and exact match where there are any, in Markdown, and below them the context recovery."""
    rows, exact = results["validation"], results.get("exact_match")
    has_interval = any("interval" in row for row in rows.values())
    tokens = sum(next(iter(rows.values()))["tokens_by_chunk"])
    header = [f"validation, {tokens:,} answer tokens", "nats per token"]
    header += ["95 % interval"] * has_interval + ["exact match"] * bool(exact)
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, row in rows.items():
        cells = [cell(name), f"{row['loss']:.4f}"]
        if has_interval:
            cells.append("[{:.4f}, {:.4f}]".format(*row["interval"]))
        if exact:
            match = exact.get(name)
            cells.append(f"{match['correct']:d}/{match['records']:d} ({match['share']:.1%})" if match else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *recovery_lines(results)])


def cell(text: str) -> str:
    """
    Text that may be anybody's, the name of a rival's folder say, as one line of Markdown: plain words as they are,
    anything else as code, in which neither Markdown nor HTML means anything. In a table a bar would end even code.
    """
    text = " ".join(str(text).split()).replace("|", "¦")
    text = "".join(character if character.isprintable() else "�" for character in text)
    if WORDS.fullmatch(text) and not MARKUP.search(text):
        return text
    fence = fence_of(text, 1)
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def fence_of(text: str, least: int) -> str:
    """Backticks, `least` or more, that nothing in the text can close."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def recovery_lines(results: dict[str, dict]) -> list[str]:
    """What each context recovery says, as items of a list in Markdown."""
    lines = []
    for name, result in results.get("context_recovery", {}).items():
        if result["recovery"] is None:
            low, high = result["gap_interval"]
            value = "undefined: full context is not better than the window"
            value += f" ({result['gap']:.4f} nats, 95 % interval [{low:.4f}, {high:.4f}])"
        else:
            low, high = result["interval"]
            value = f"{result['recovery']:.1%}, 95 % interval [{low:.1%}, {high:.1%}]"
        lines.append(f"- context recovery, {cell(name)}: {value}")
    return lines


def plot(results: dict[str, dict], path: str | Path):
    """Draws the loss by chunk index into a picture file, without the two controls that are far above the rest."""
    with picture(path) as axes:
        for variant, result in results.items():
            if variant in (FIRST_SOFT_PROMPT, OTHER_SOFT_PROMPT):
                continue
            axes.plot(
                result["loss_by_chunk"],
                marker="o",
                markersize=3,
                label=f"{variant} ({result['loss']:.3f})".replace("$", r"\$"),
            )
        axes.set(xlabel="chunk index", ylabel="nats per answer token", title="Validation loss by chunk")
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1))


def plot_training(log_history: list[dict], path: str | Path):
    """Draws the loss and the share of Δ in the soft prompt's norm, by step, into a picture file."""
    logs = [log for log in log_history if "loss" in log and "delta_share" in log]
    evaluations = [log for log in log_history if "eval_loss" in log]
    with picture(path) as axes:
        axes.plot([log["step"] for log in logs], [log["loss"] for log in logs], label="training loss")
        if evaluations:
            steps, losses = [log["step"] for log in evaluations], [log["eval_loss"] for log in evaluations]
            axes.plot(steps, losses, marker="o", label="validation loss")
        axes.set(xlabel="step", ylabel="nats per answer token", title="Training")
        share = axes.twinx()
        share.plot([log["step"] for log in logs], [log["delta_share"] for log in logs], "--", color="grey")
        share.set(ylabel="share of Δ in the soft prompt's norm (dashed)", ylim=(0, None))
        axes.legend(loc="center right")


@contextmanager
def picture(path: str | Path):
    """The axes of a new picture, which is saved when the block ends; the same drawing gives the same bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    yield axes
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


# ------------------------------------------------------------------------------------------------------- generation


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


# --------------------------------------------------------------------------------------------- the saved folder

LOAD_AND_ANSWER = """
import json, sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, query, max_new_tokens = sys.argv[1], torch.tensor([json.loads(sys.argv[2])]), int(sys.argv[3])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
assert torch.isfinite(model(query).logits).all(), "the logits are not finite"
mask = torch.ones_like(query)
output = model.generate(query, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False)
tokenizer.decode(output[0])
print(json.dumps(output[0, query.shape[1]:].tolist()))
"""


def answer_in_new_process(folder: str | Path, query: list[int], max_new_tokens: int) -> list[int]:
    """
    What a saved model answers, greedily, where nothing is known of this repository: in a new process, in another
    folder, with an empty module cache and no network.

    Args:
        folder (`str` or `Path`): where the model, its code and its tokenizer are.
        query (`list[int]`): token ids.
        max_new_tokens (`int`): tokens of the answer, at most.

    Returns:
        `list[int]`: the answer's token ids.

    Raises:
        ValueError: if the folder cannot be loaded or does not answer, with the last line of the process's error.
    """
    here = Path(__file__).resolve().parent
    python_path = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    with TemporaryDirectory() as elsewhere:
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(path for path in python_path if Path(path).resolve() != here),
            "HF_MODULES_CACHE": elsewhere,
            "HF_HUB_OFFLINE": "1",
        }
        arguments = [str(Path(folder).resolve()), json.dumps(query), str(max_new_tokens)]
        command = [sys.executable, "-c", LOAD_AND_ANSWER, *arguments]
        done = subprocess.run(command, cwd=elsewhere, env=environment, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or f"exit code {done.returncode}").splitlines()[-1]
        raise ValueError(f"{folder} cannot be loaded and used in a new process: {reason}")
    return json.loads(done.stdout.splitlines()[-1])


# ------------------------------------------------------------------------------------------------------ the command


RUN_DEFAULTS = {  # of what train_sft.py holds out
    "validation_split": 0.1,
    "shuffle_records": False,
    "seed": 42,
    "streaming": False,
    "dataset_config": None,
    "dataset_train_split": "train",
}


@dataclass
class EvaluationArguments:
    model_dir: str = field(metadata={"help": "A Phase15 model's folder, as train_sft.py leaves it."})
    dataset: str = field(metadata={"help": "What train_sft.py takes as dataset_name."})
    base: str | None = field(
        default=None, metadata={"help": "The untrained base (Hub id, folder or .gguf file); adapters go on it too."}
    )
    rivals: list[str] = field(
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
    rivals = check_arguments(args)
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
    for name, folder in rivals.items():
        rival = load(folder, args)
        losses[name] = rival_losses(name, rival, records, args.batch_size, config.chunk_length)
        answers[name] = answer(name, rival)
        del rival  # before the next is loaded
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
    """Refuses what cannot be evaluated; returns where the base and the rivals are, by the names of their rows."""
    for name, least in {"batch_size": 1, "generated_records": 0, "max_new_tokens": 1, "bootstrap_samples": 1}.items():
        if getattr(args, name) < least:
            raise ValueError(f"`{name}` is {getattr(args, name)}, but it must be {least} or more.")
    check_dtype(args.dtype)
    try:
        torch.empty(0, device=args.device)
    except (RuntimeError, AssertionError) as error:  # not the name of a device, or one that is not here
        reason = str(error).partition("\n")[0]
        raise ValueError(f"`device` is {args.device!r}, which cannot be used: {reason}") from error
    for folder in (args.model_dir, *args.rivals):
        if not Path(folder).is_dir():
            raise ValueError(f"{folder}: no such folder.")
    if (kind := kind_of(args.model_dir)) != PHASE15:
        raise ValueError(f"{args.model_dir} is not the folder of {PHASE15}, but of {kind}.")
    if args.base and (kind := kind_of(args.base)) != CAUSAL_LM:
        raise ValueError(f"`base` is {args.base}, but that is {kind}, where {CAUSAL_LM} was expected.")
    if args.output_dir:
        check_output_dir(args.output_dir)
    rows = {"the untrained base, full context": args.base} if args.base else {}
    for folder in args.rivals:
        name = f"rival: {read_recipe(folder).get('rival') or Path(folder).resolve().name}"
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


def check_dtype(name: str):
    if name != "auto" and not getattr(getattr(torch, str(name), None), "is_floating_point", False):
        raise ValueError(f"`dtype` is {name!r}, but it must be float32, bfloat16, float16 or auto.")


def check_output_dir(name: str | Path):
    """Raises an error for a folder that cannot be written to; makes nothing."""
    path = Path(name).absolute()
    there = next(parent for parent in (path, *path.parents) if parent.exists())
    if not there.is_dir():
        raise ValueError(f"`output_dir` is {name}, but {there} is a file.")
    try:
        with TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise ValueError(f"`output_dir` is {name}, but {there} cannot be written to: {error.strerror}.") from error


PHASE15, ADAPTER, CAUSAL_LM = "a Phase15 model", "a PEFT adapter", "a causal LM"


def kind_of(name: str) -> str:
    """What a folder, a .gguf file or a Hub id holds."""
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise ValueError(f"{name}: no such file.")
        return CAUSAL_LM
    if Path(name, "adapter_config.json").is_file():
        return ADAPTER
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        raise ValueError(f"{name} holds no model that is known here: neither config.json nor adapter_config.json.")
    model_type = Phase15Config.get_config_dict(name)[0].get("model_type")
    return PHASE15 if model_type == Phase15Config.model_type else CAUSAL_LM


def base_of(adapter: str, base: str | None) -> str:
    """What an adapter is loaded on: `base`, or what it was trained on."""
    base = base or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter} does not say which model it adapts; give --base.")
    if (kind := kind_of(base)) != CAUSAL_LM:
        raise ValueError(f"{adapter} adapts {base}, but that is {kind}, where {CAUSAL_LM} was expected.")
    return base


def vocab_size(name: str, base: str | None) -> int:
    kind = kind_of(name)
    if kind == ADAPTER:
        return vocab_size(base_of(name, base), base)
    if kind == PHASE15:
        return Phase15Config.from_pretrained(name).text_config.vocab_size
    folder, gguf_file = os.path.split(os.path.abspath(name)) if name.endswith(".gguf") else (name, None)
    return AutoConfig.from_pretrained(folder, gguf_file=gguf_file).vocab_size


def load(name: str, args: EvaluationArguments) -> PreTrainedModel | PeftModel:
    kind = kind_of(name)
    if kind == PHASE15:
        model = Phase15ForCausalLM.from_pretrained(name, dtype=args.dtype)
    elif kind == ADAPTER:
        if not Path(name, "adapter_model.safetensors").is_file():  # PEFT would take a pickle instead
            raise ValueError(f"{name} has no adapter_model.safetensors, and no pickle is loaded.")
        model = PeftModel.from_pretrained(load(base_of(name, args.base), args), name)
    else:
        model = Phase15ForCausalLM.from_base(name, dtype=args.dtype).llm
    return model.to(args.device).eval()


def read_recipe(folder: str) -> dict:
    """The recipe.yaml that train_sft.py left in a model's folder; empty where it did not run."""
    path = Path(folder, "recipe.yaml")
    try:
        recipe = yaml.safe_load(path.read_text("utf-8")) if path.is_file() else {}
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from error
    if not isinstance(recipe, dict):
        raise ValueError(f"{path} was not written by train_sft.py: it is no mapping.")
    return recipe


def held_out(folder: str) -> dict | None:
    """What says which records the run that made a folder held out, None where there was no run."""
    recipe = read_recipe(folder)
    if "dataset_name" not in recipe:
        return None
    run = {**RUN_DEFAULTS, **recipe, "dataset_name": Path(str(recipe["dataset_name"])).name}
    keys = ["dataset_name", *RUN_DEFAULTS]
    if not run["shuffle_records"]:
        keys.remove("seed")
    if run["streaming"]:
        keys.append("max_validation_records")
    return {key: run[key] for key in keys}


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


def rival_losses(
    name: str, rival: PreTrainedModel | PeftModel, records: list[Record], batch_size: int, chunk_length: int
) -> Losses:
    """A Phase15 rival is measured as such, any other with full context; chunks are those of the evaluated model."""
    if isinstance(rival, Phase15ForCausalLM):
        return measure(name, batch_size, lambda batch: phase15_losses(rival, batch, batch, chunk_length), records)
    return measure(name, batch_size, lambda batch: llm_losses(rival, batch, chunk_length), records)


def report(losses: dict[str, Losses], own_losses: dict[str, Losses], samples: int, seed: int) -> dict[str, dict]:
    """The losses in numbers that JSON holds, and what follows from them."""

    def recovery(rows: dict[str, Losses], *names: str) -> dict:
        return context_recovery(*(rows[name] for name in names), samples, seed)

    recoveries = {SAME_LLM: recovery(losses, WINDOW, MODEL, FULL_CONTEXT)}
    if OTHER_DELTA in losses:
        recoveries[NOT_CARRIED] = recovery(losses, WINDOW, OTHER_DELTA, FULL_CONTEXT)
    if own_losses:
        recoveries[OWN_WORDS] = recovery(own_losses, WINDOW, MODEL, FULL_CONTEXT)
    if {RIVAL_WINDOW, RIVAL_FULL_CONTEXT} <= set(losses):
        recoveries[OWN_RIVALS] = recovery(losses, RIVAL_WINDOW, MODEL, RIVAL_FULL_CONTEXT)
    blocks = {
        block: {
            name: {**summary(row), "interval": interval(resampled_loss(row, samples, seed))}
            for name, row in rows.items()
        }
        for block, rows in (("validation", losses), ("own_words", own_losses))
    }
    return {**blocks, "context_recovery": recoveries}


if __name__ == "__main__":
    try:
        main(*HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses())
    except (ValueError, OSError, FloatingPointError, StrictDataclassError, SafetensorError) as error:
        raise SystemExit(f"eval_sft.py: {' '.join(str(error).split())}") from error
