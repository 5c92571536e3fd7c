# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Loss by example and chunk for any model, its controls, and context recovery with bootstrap intervals."""

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from phase15.model.modeling_phase15 import Phase15ForCausalLM
from phase15.model.recursion_phase15 import HyperNetwork, SoftPrompt


# Keys of the rows of results.json and evaluation.json.
MODEL, WINDOW, FULL_CONTEXT = "model", "window", "full_context"
FIRST_SOFT_PROMPT = "first_soft_prompt"
SHUFFLED_SOFT_PROMPT, SHUFFLED_DELTA = "shuffled_soft_prompt", "shuffled_delta"
BASE = "base_full_context"  # untrained
BASELINE_WINDOW, BASELINE_FULL_CONTEXT = "baseline_window", "baseline_full_context"
# Keys of the context recoveries.
SAME_LLM, NOT_CARRIED = "same_llm", "same_llm_shuffled_delta"
FREE_RUNNING, OWN_BASELINES = "free_running", "baselines"
LABELS = {
    MODEL: "the model",
    WINDOW: "Δ = 0",
    FIRST_SOFT_PROMPT: "soft prompt at sp_0",
    SHUFFLED_SOFT_PROMPT: "shuffled soft prompt",
    SHUFFLED_DELTA: "shuffled Δ",
    FULL_CONTEXT: "full context",
    BASE: "the untrained base, full context",
    SAME_LLM: "same LLM",
    NOT_CARRIED: "same LLM, with shuffled Δ",
    FREE_RUNNING: "same LLM, free-running",
    OWN_BASELINES: "baselines fine-tuned on their own",
}


def label(key: str) -> str:
    """The text that is shown for a key. A baseline's is the name of its kind or folder."""
    return LABELS.get(key) or re.sub("^baseline_", "baseline: ", key)


class Example(NamedTuple):
    """The token ids of a query and of its answer."""

    query: list[int]
    answer: list[int]


class Losses(NamedTuple):
    """
    The losses by example and chunk. All intervals come from here.

    nats (`torch.DoubleTensor` of shape `(num_examples, num_chunks)`): cross-entropy, summed over the chunk's tokens.
    tokens (`torch.LongTensor` of shape `(num_examples, num_chunks)`): their number, 0 behind the end of the answer.
    """

    nats: torch.Tensor
    tokens: torch.Tensor


def variants(model: Phase15ForCausalLM, examples: list[Example], batch_size: int) -> dict[str, Losses]:
    """The rows that share the model's LLM. A single example cannot be shuffled, and has no shuffled rows."""
    model.eval()

    def behind(name: str, histories: list[Example]) -> Losses:
        return measure(name, batch_size, lambda *batch: phase15_losses(model, *batch), examples, histories)

    losses = {MODEL: behind(MODEL, examples)}
    with no_delta(model):
        losses[WINDOW] = behind(WINDOW, examples)
    unanswered = [example._replace(answer=[]) for example in examples]
    losses[FIRST_SOFT_PROMPT] = behind(FIRST_SOFT_PROMPT, unanswered)
    if len(examples) > 1:
        others = examples[1:] + examples[:1]
        losses[SHUFFLED_SOFT_PROMPT] = behind(SHUFFLED_SOFT_PROMPT, others)
        losses[SHUFFLED_DELTA] = measure(
            SHUFFLED_DELTA, batch_size, lambda *batch: shuffled_delta_losses(model, *batch), examples, others
        )
    losses[FULL_CONTEXT] = measure(
        FULL_CONTEXT, batch_size, lambda batch: llm_losses(model.llm, batch, model.config.chunk_length), examples
    )
    return losses


def free_running(
    model: Phase15ForCausalLM, examples: list[Example], answers: list[list[int]], batch_size: int
) -> dict[str, Losses]:
    """Scores each chunk of the references behind the model's own answers, which are at least as long."""
    histories = [Example(example.query, answer) for example, answer in zip(examples, answers, strict=True)]

    def behind_phase15(*batch) -> Losses:
        return phase15_losses(model, *batch)

    def behind_llm(batch: list[Example], histories: list[Example]) -> Losses:
        return llm_losses_behind(model.llm, batch, histories, model.config.chunk_length)

    losses = {MODEL: measure(MODEL, batch_size, behind_phase15, examples, histories)}
    with no_delta(model):
        losses[WINDOW] = measure(WINDOW, batch_size, behind_phase15, examples, histories)
    losses[FULL_CONTEXT] = measure(FULL_CONTEXT, batch_size, behind_llm, examples, histories)
    return losses


@torch.no_grad()
def measure(name: str, batch_size: int, losses_of: Callable[..., Losses], *lists: list[Example]) -> Losses:
    """Calls `losses_of` on batches of parallel lists, with a progress bar."""
    starts = range(0, len(lists[0]), batch_size)
    starts = tqdm(starts, desc=label(name), disable=len(starts) == 1)
    parts = [losses_of(*(rows[start : start + batch_size] for rows in lists)) for start in starts]
    num_chunks = max(part.nats.shape[1] for part in parts)
    parts = [[F.pad(values, (0, num_chunks - values.shape[1])) for values in part] for part in parts]
    losses = Losses(*map(torch.cat, zip(*parts, strict=True)))
    if not torch.isfinite(losses.nats).all():
        index = int((~torch.isfinite(losses.nats).all(dim=1)).nonzero()[0])
        raise FloatingPointError(
            f"{label(name)}: the loss of validation record {index + 1} is not finite; the weights are damaged, or too "
            "large for their dtype."
        )
    return losses


@contextmanager
def no_delta(model: Phase15ForCausalLM) -> Iterator[None]:
    """Sets Δ to exactly zero: only the window of `carry` is left."""
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


def cross_entropy(logits: torch.Tensor, targets: torch.LongTensor) -> torch.Tensor:
    """In nats, of each target `(num_targets,)`."""
    return F.cross_entropy(logits.float(), targets, reduction="none").double()


def misses(logits: torch.Tensor, targets: torch.LongTensor) -> torch.Tensor:
    """1 for each target `(num_targets,)` that is not the most likely token, 0 for the others."""
    return (logits.argmax(dim=-1) != targets).double()


def phase15_losses(
    model: Phase15ForCausalLM,
    examples: list[Example],
    histories: list[Example],
    chunk_length: int | None = None,
    score: Callable = cross_entropy,
) -> Losses:
    """
    Scores chunk c of each example behind sp_c of its history: the example itself, or another text. Where a history has
    fewer chunks, its last soft prompt is used. `chunk_length` divides the result; the default is the model's own.
    """
    length, embed = model.config.chunk_length, model.get_input_embeddings()
    (query, query_length), (history, history_length), (answer, answer_length) = (
        pad(rows, model.device)
        for rows in ([h.query for h in histories], [h.answer for h in histories], [r.answer for r in examples])
    )
    soft_prompt = model.read(model.empty_soft_prompt(len(examples)), query, query_length)
    losses = torch.zeros(answer.shape, dtype=torch.float64, device=model.device)
    for start in range(0, answer.shape[1], length):
        chunk, has_chunk = answer[:, start : start + length], answer_length > start
        seen = SoftPrompt(*(state[has_chunk] for state in soft_prompt))
        hidden_states, _ = model.predict(seen, embed(chunk[has_chunk, :-1]))
        is_target = torch.arange(start, start + chunk.shape[1], device=model.device) < answer_length[:, None]  # (B, K)
        logits = model.get_output_embeddings()(hidden_states[is_target[has_chunk]])
        losses[:, start : start + length][is_target] = score(logits, chunk[is_target])
        goes_on = history_length > start + length
        if goes_on.any():
            soft_prompt = model.step(soft_prompt, embed(history[:, start : start + length]), goes_on * length)
    return by_chunk(losses, answer_length, chunk_length or length)


def shuffled_delta_losses(
    model: Phase15ForCausalLM,
    examples: list[Example],
    others: list[Example],
    chunk_length: int | None = None,
    score: Callable = cross_entropy,
) -> Losses:
    """
    Scores each example behind its own window, but with the Δ of another example at every step. The recursion of the
    other runs beside it; after its end, Δ is computed from its last soft prompt and no token.
    """

    def use_the_other_delta(module, inputs, delta: torch.Tensor) -> torch.Tensor:
        return delta[len(examples) :].repeat(2, 1, 1)

    hook = model.hypernet.register_forward_hook(use_the_other_delta)
    try:
        losses = phase15_losses(model, examples + others, examples + others, chunk_length, score)
    finally:
        hook.remove()
    return Losses(*(values[: len(examples)] for values in losses))


def llm_losses(
    llm: PreTrainedModel | PeftModel, examples: list[Example], chunk_length: int = 16, score: Callable = cross_entropy
) -> Losses:
    """Scores answers with a causal LM that sees the query and the answer so far."""
    ids, length = pad([example.query + example.answer for example in examples], llm.device)
    query_length = torch.tensor([len(example.query) for example in examples], device=llm.device)
    position = torch.arange(ids.shape[1], device=llm.device)
    first = int(query_length.min())  # position of the first target
    kept = ids.shape[1] - first + 1  # counted from the end, since adapters put virtual tokens in front
    mask = (position < length[:, None]).long()
    logits = llm(input_ids=ids, attention_mask=mask, logits_to_keep=kept, use_cache=False).logits[:, :-1]
    is_target = (position >= query_length[:, None]) & (position < length[:, None])
    losses = torch.zeros(ids.shape, dtype=torch.float64, device=llm.device)
    losses[is_target] = score(logits[is_target[:, first:]], ids[is_target])
    answer_length = length - query_length
    answer = query_length[:, None] + torch.arange(int(answer_length.max()), device=llm.device)
    return by_chunk(losses.gather(1, answer.clamp(max=ids.shape[1] - 1)), answer_length, chunk_length)


def sums_by_chunk(
    logits: torch.Tensor, targets: torch.LongTensor, chunk_length: int
) -> tuple[torch.Tensor, torch.LongTensor]:
    """
    Cross-entropy of an ordinary causal LM, by the index of the chunk that each answer token would be in.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_columns, vocab_size)`): all columns with a target.
        targets (`torch.LongTensor` of shape `(batch_size, num_columns)`): the tokens that they predict, -100 for none.
        chunk_length (`int`): answer tokens of a chunk.

    Returns:
        sums in nats and numbers of answer tokens, each of shape `(num_chunks,)`.
    """
    is_target = targets != -100
    losses = F.cross_entropy(logits[is_target].float(), targets[is_target], reduction="none")
    chunk = ((is_target.cumsum(dim=1) - 1) // chunk_length)[is_target]
    return losses.new_zeros(int(chunk.max()) + 1).index_add_(0, chunk, losses), torch.bincount(chunk)


def llm_losses_behind(
    llm: PreTrainedModel, examples: list[Example], histories: list[Example], chunk_length: int
) -> Losses:
    """Scores chunk c of each example with a causal LM behind the query and the first c chunks of a history."""
    parts = []
    for start in range(0, max(len(example.answer) for example in examples), chunk_length):
        chunk = [
            Example(history.query + history.answer[:start], example.answer[start : start + chunk_length])
            for example, history in zip(examples, histories, strict=True)
        ]
        parts.append(llm_losses(llm, chunk, chunk_length))
    return Losses(*(torch.cat(kind, dim=1) for kind in zip(*parts, strict=True)))


def by_chunk(losses: torch.Tensor, answer_length: torch.LongTensor, chunk_length: int) -> Losses:
    """Sums over chunks of losses `(batch_size, longest)` that are left-aligned; none behind an answer's end."""
    is_target = torch.arange(losses.shape[1], device=losses.device) < answer_length[:, None]
    kinds = (losses * is_target, is_target.long())
    padding = (0, -losses.shape[1] % chunk_length)
    return Losses(*(F.pad(values, padding).unflatten(1, (-1, chunk_length)).sum(2).cpu() for values in kinds))


def baseline_losses(
    name: str, baseline: PreTrainedModel | PeftModel, examples: list[Example], batch_size: int, chunk_length: int
) -> Losses:
    """Measures a Phase15 baseline as such, any other with full context, by the chunks of the evaluated model."""
    if isinstance(baseline, Phase15ForCausalLM):
        return measure(name, batch_size, lambda batch: phase15_losses(baseline, batch, batch, chunk_length), examples)
    return measure(name, batch_size, lambda batch: llm_losses(baseline, batch, chunk_length), examples)


__all__ = [
    "BASE",
    "BASELINE_FULL_CONTEXT",
    "BASELINE_WINDOW",
    "FIRST_SOFT_PROMPT",
    "FREE_RUNNING",
    "FULL_CONTEXT",
    "MODEL",
    "NOT_CARRIED",
    "OWN_BASELINES",
    "SAME_LLM",
    "SHUFFLED_DELTA",
    "SHUFFLED_SOFT_PROMPT",
    "WINDOW",
    "Example",
    "Losses",
    "baseline_losses",
    "free_running",
    "label",
    "llm_losses",
    "measure",
    "misses",
    "no_delta",
    "pad",
    "phase15_losses",
    "shuffled_delta_losses",
    "sums_by_chunk",
    "variants",
]
