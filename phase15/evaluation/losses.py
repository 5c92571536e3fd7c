# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Losses by example and by chunk: of a Phase15 model, of its controls, and of any causal LM with full context. All
figures of an evaluation are sums of these.
"""

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
from phase15.model.recursion_phase15 import Phase15HyperNetwork, SoftPrompt


# Keys of the rows of results.json and evaluation.json.
MODEL = "model"
WINDOW = "window"
FIRST_SOFT_PROMPT = "first_soft_prompt"
SHUFFLED_SOFT_PROMPT = "shuffled_soft_prompt"
SHUFFLED_DELTA = "shuffled_delta"
FULL_CONTEXT = "full_context"
BASE = "base_full_context"  # untrained
BASELINE_WINDOW = "baseline_window"
BASELINE_FULL_CONTEXT = "baseline_full_context"
# Keys of the context recoveries.
SAME_LLM = "same_llm"
NOT_CARRIED = "same_llm_shuffled_delta"
FREE_RUNNING = "free_running"
FREE_NOT_CARRIED = "free_running_shuffled_delta"
OWN_BASELINES = "baselines"
BASELINES_WINDOW = "baselines_window"
BASELINES_NOT_CARRIED = "baselines_shuffled_delta"
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
    FREE_NOT_CARRIED: "same LLM, free-running, with shuffled Δ",
    OWN_BASELINES: "baselines fine-tuned on their own",
    BASELINES_WINDOW: "baselines fine-tuned on their own, with Δ = 0",
    BASELINES_NOT_CARRIED: "baselines fine-tuned on their own, with shuffled Δ",
}


def display_label(key: str) -> str:
    """Returns the text that is shown for a key. A baseline is shown by the name of its kind or folder."""
    return LABELS.get(key) or re.sub("^baseline_", "baseline: ", key)


class Example(NamedTuple):
    """The token ids of a query and of its answer."""

    query: list[int]
    answer: list[int]


class Losses(NamedTuple):
    """
    Losses by example and bin; a bin is a chunk of the answer unless a function is given another `bin_size`.

    nats (`torch.DoubleTensor` of shape `(num_examples, num_bins)`): cross-entropy, summed over the tokens of a bin.
    tokens (`torch.LongTensor` of shape `(num_examples, num_bins)`): tokens of a bin, 0 after the end of the answer.
    """

    nats: torch.Tensor
    tokens: torch.Tensor


def measure_variants(
    model: Phase15ForCausalLM, examples: list[Example], batch_size: int, chunk_length: int
) -> dict[str, Losses]:
    """
    Measures the rows that share the model's LLM, in evaluation mode. A single example cannot be shuffled, so it has no
    shuffled rows.

    Args:
        model (`Phase15ForCausalLM`): the model.
        examples (`list[Example]`): queries and reference answers.
        batch_size (`int`): examples at a time.
        chunk_length (`int`): answer tokens between two steps of the soft prompt.

    Returns:
        `dict[str, Losses]`: the losses by chunk of each row.
    """
    model.eval()

    def score(batch: list[Example], histories: list[Example]) -> Losses:
        return phase15_losses(model, batch, histories, chunk_length)

    def score_with_shuffled_delta(batch: list[Example], others: list[Example]) -> Losses:
        return shuffled_delta_losses(model, batch, others, chunk_length)

    def score_with_full_context(batch: list[Example]) -> Losses:
        return llm_losses(model.llm, batch, chunk_length)

    losses = {MODEL: measure(MODEL, batch_size, score, examples, examples)}
    with no_delta(model):
        losses[WINDOW] = measure(WINDOW, batch_size, score, examples, examples)
    unanswered = [example._replace(answer=[]) for example in examples]  # their soft prompts stay at sp_0
    losses[FIRST_SOFT_PROMPT] = measure(FIRST_SOFT_PROMPT, batch_size, score, examples, unanswered)
    if len(examples) > 1:
        others = examples[1:] + examples[:1]
        losses[SHUFFLED_SOFT_PROMPT] = measure(SHUFFLED_SOFT_PROMPT, batch_size, score, examples, others)
        losses[SHUFFLED_DELTA] = measure(SHUFFLED_DELTA, batch_size, score_with_shuffled_delta, examples, others)
    losses[FULL_CONTEXT] = measure(FULL_CONTEXT, batch_size, score_with_full_context, examples)
    return losses


def measure_free_running(
    model: Phase15ForCausalLM, examples: list[Example], answers: list[list[int]], batch_size: int, chunk_length: int
) -> dict[str, Losses]:
    """Scores each chunk of the references after the model's own answers, which are at least as long."""
    histories = [Example(example.query, answer) for example, answer in zip(examples, answers, strict=True)]

    def score(batch: list[Example], histories: list[Example]) -> Losses:
        return phase15_losses(model, batch, histories, chunk_length)

    def score_with_shuffled_delta(batch: list[Example], others: list[Example], histories: list[Example]) -> Losses:
        return shuffled_delta_losses(model, batch, others, chunk_length, histories=histories)

    def score_with_full_context(batch: list[Example], histories: list[Example]) -> Losses:
        return llm_losses_given(model.llm, batch, histories, chunk_length)

    losses = {MODEL: measure(MODEL, batch_size, score, examples, histories)}
    with no_delta(model):
        losses[WINDOW] = measure(WINDOW, batch_size, score, examples, histories)
    if len(examples) > 1:
        others = histories[1:] + histories[:1]
        lists = (examples, others, histories)
        losses[SHUFFLED_DELTA] = measure(SHUFFLED_DELTA, batch_size, score_with_shuffled_delta, *lists)
    losses[FULL_CONTEXT] = measure(FULL_CONTEXT, batch_size, score_with_full_context, examples, histories)
    return losses


def baseline_losses(
    name: str,
    baseline: PreTrainedModel | PeftModel,
    examples: list[Example],
    batch_size: int,
    bin_size: int,
    chunk_length: int | None = None,
) -> Losses:
    """
    Measures a Phase15 baseline with its soft prompt, any other baseline with full context.

    Args:
        name (`str`): the key of the row.
        baseline (`PreTrainedModel` or `PeftModel`): the model.
        examples (`list[Example]`): queries and reference answers.
        batch_size (`int`): examples at a time.
        bin_size (`int`): answer tokens of a bin: the chunk length of the evaluated model, so that rows are comparable.
        chunk_length (`int`, *optional*): the chunk length of a Phase15 baseline; its config's by default.
    """
    if not isinstance(baseline, Phase15ForCausalLM):
        return measure(name, batch_size, lambda batch: llm_losses(baseline, batch, bin_size), examples)
    chunk_length = baseline.config.resolve_chunk_length(chunk_length)

    def score(batch: list[Example]) -> Losses:
        return phase15_losses(baseline, batch, batch, chunk_length, bin_size)

    return measure(name, batch_size, score, examples)


@torch.no_grad()
def measure(name: str, batch_size: int, score_batch: Callable[..., Losses], *lists: list[Example]) -> Losses:
    """Returns the losses of all examples: `score_batch` on batches of parallel lists, with a progress bar."""
    starts = range(0, len(lists[0]), batch_size)
    parts = []
    for start in tqdm(starts, desc=display_label(name), disable=len(starts) == 1):
        batch = [examples[start : start + batch_size] for examples in lists]
        parts.append(score_batch(*batch))
    num_bins = max(part.nats.shape[1] for part in parts)  # batches with shorter answers have fewer
    nats = torch.cat([F.pad(part.nats, (0, num_bins - part.nats.shape[1])) for part in parts])
    tokens = torch.cat([F.pad(part.tokens, (0, num_bins - part.tokens.shape[1])) for part in parts])
    is_finite = torch.isfinite(nats).all(dim=1)
    if not is_finite.all():
        index = int((~is_finite).nonzero()[0])
        raise FloatingPointError(
            f"{display_label(name)}: the loss of validation record {index + 1} is not finite; the weights are "
            "damaged, or too large for their dtype."
        )
    return Losses(nats, tokens)


@contextmanager
def no_delta(model: Phase15ForCausalLM) -> Iterator[None]:
    """Sets Δ to exactly zero while the block runs: only the window of `carry` is left."""
    alphas = [module.alpha for module in model.modules() if isinstance(module, Phase15HyperNetwork)]
    saved = [alpha.detach().clone() for alpha in alphas]
    warned = model.model.warns_untrained
    model.model.warns_untrained = False
    for alpha in alphas:
        alpha.data.zero_()
    try:
        yield
    finally:
        model.model.warns_untrained = warned
        for alpha, value in zip(alphas, saved, strict=True):
            alpha.data.copy_(value)


def pad_right(rows: list[list[int]], device: torch.device) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Returns token ids `(batch_size, longest)`, padded on the right, and the lengths `(batch_size,)`."""
    ids = pad_sequence([torch.tensor(row, dtype=torch.long) for row in rows], batch_first=True)
    lengths = torch.tensor([len(row) for row in rows], device=device)
    return ids.to(device), lengths


def cross_entropy(logits: torch.Tensor, targets: torch.LongTensor) -> torch.Tensor:
    """Returns the loss in nats of each target, of shape `(num_targets,)`."""
    return F.cross_entropy(logits.float(), targets, reduction="none").double()


def misses(logits: torch.Tensor, targets: torch.LongTensor) -> torch.Tensor:
    """Returns 1 for each target that is not the most likely token, else 0, of shape `(num_targets,)`."""
    return (logits.argmax(dim=-1) != targets).double()


def phase15_losses(
    model: Phase15ForCausalLM,
    examples: list[Example],
    histories: list[Example],
    chunk_length: int,
    bin_size: int | None = None,
    score: Callable = cross_entropy,
) -> Losses:
    """
    Scores chunk c of each example given sp_c of its history: the example itself, or another text. If a history has
    fewer chunks, its last soft prompt is used.

    Args:
        model (`Phase15ForCausalLM`): the model.
        examples (`list[Example]`): the answers that are scored.
        histories (`list[Example]`): the texts that the soft prompts have read, one for each example.
        chunk_length (`int`): answer tokens between two steps of the soft prompt.
        bin_size (`int`, *optional*): answer tokens of a bin of the result; `chunk_length` by default.
        score (`Callable`): the score of each target, from logits `(num_targets, vocab_size)` and targets.
    """
    embed = model.get_input_embeddings()
    query, query_length = pad_right([history.query for history in histories], model.device)
    history, history_length = pad_right([history.answer for history in histories], model.device)
    answer, answer_length = pad_right([example.answer for example in examples], model.device)
    soft_prompt = model.read_segments(model.empty_soft_prompt(len(examples)), query, query_length)
    losses = torch.zeros(answer.shape, dtype=torch.float64, device=model.device)
    for start in range(0, answer.shape[1], chunk_length):
        chunk = answer[:, start : start + chunk_length]  # (B, K)
        position = torch.arange(start, start + chunk.shape[1], device=model.device)
        is_target = position < answer_length[:, None]  # (B, K)
        # the LLM runs only on rows whose answer reaches this chunk
        has_chunk = answer_length > start
        soft_prompt_seen = SoftPrompt(*(state[has_chunk] for state in soft_prompt))
        hidden_states, _ = model.predict(soft_prompt_seen, embed(chunk[has_chunk, :-1]))
        logits = model.get_output_embeddings()(hidden_states[is_target[has_chunk]])  # (num_targets, V)
        # the slice is a view, so that the assignment writes into `losses`
        losses[:, start : start + chunk_length][is_target] = score(logits, chunk[is_target])
        # a history steps after each chunk except its last; a token length of 0 leaves a row as it is
        goes_on = history_length > start + chunk_length
        if goes_on.any():
            tokens = embed(history[:, start : start + chunk_length])
            soft_prompt = model.step(soft_prompt, tokens, goes_on * chunk_length)
    return sum_bins(losses, answer_length, bin_size or chunk_length)


def shuffled_delta_losses(
    model: Phase15ForCausalLM,
    examples: list[Example],
    others: list[Example],
    chunk_length: int,
    bin_size: int | None = None,
    score: Callable = cross_entropy,
    histories: list[Example] | None = None,
) -> Losses:
    """
    Scores each example given its own window, but with the Δ of another example at every step. The recursion of the
    other example runs beside it. After its end, Δ is computed from its last soft prompt and no token. The arguments
    are those of [`phase15_losses`]; the histories are the examples by default.
    """
    histories = histories or examples

    def use_the_other_delta(module, inputs, delta: torch.Tensor) -> torch.Tensor:
        return delta[len(examples) :].repeat(2, 1, 1)  # the second half of the batch holds the others

    both = examples + others
    hook = model.hypernet.register_forward_hook(use_the_other_delta)
    try:
        losses = phase15_losses(model, both, histories + others, chunk_length, bin_size, score)
    finally:
        hook.remove()
    return Losses(losses.nats[: len(examples)], losses.tokens[: len(examples)])


def llm_losses(
    llm: PreTrainedModel | PeftModel, examples: list[Example], bin_size: int, score: Callable = cross_entropy
) -> Losses:
    """Scores answers with a causal LM that sees the query and the answer so far, by bins of `bin_size` tokens."""
    ids, length = pad_right([example.query + example.answer for example in examples], llm.device)
    query_length = torch.tensor([len(example.query) for example in examples], device=llm.device)
    position = torch.arange(ids.shape[1], device=llm.device)
    mask = (position < length[:, None]).long()
    # logits from the column before the first target on, counted from the end: adapters put virtual tokens in front
    first = int(query_length.min())
    num_columns = ids.shape[1] - first + 1
    outputs = llm(input_ids=ids, attention_mask=mask, logits_to_keep=num_columns, use_cache=False)
    logits = outputs.logits[:, :-1]  # (B, T - first, V); the last column predicts nothing
    is_target = (position >= query_length[:, None]) & (position < length[:, None])  # (B, T)
    losses = torch.zeros(ids.shape, dtype=torch.float64, device=llm.device)
    losses[is_target] = score(logits[is_target[:, first:]], ids[is_target])
    # left-align the answers; `sum_bins` ignores the clamped columns after an answer's end
    answer_length = length - query_length
    column = query_length[:, None] + torch.arange(int(answer_length.max()), device=llm.device)
    losses = losses.gather(1, column.clamp(max=ids.shape[1] - 1))
    return sum_bins(losses, answer_length, bin_size)


def llm_losses_given(
    llm: PreTrainedModel, examples: list[Example], histories: list[Example], chunk_length: int
) -> Losses:
    """Scores chunk c of each example with a causal LM, given the query and the first c chunks of a history."""
    parts = []
    for start in range(0, max(len(example.answer) for example in examples), chunk_length):
        chunks = [
            Example(history.query + history.answer[:start], example.answer[start : start + chunk_length])
            for example, history in zip(examples, histories, strict=True)
        ]
        parts.append(llm_losses(llm, chunks, bin_size=chunk_length))
    nats = torch.cat([part.nats for part in parts], dim=1)
    tokens = torch.cat([part.tokens for part in parts], dim=1)
    return Losses(nats, tokens)


def sums_by_chunk(
    logits: torch.Tensor, targets: torch.LongTensor, bin_size: int
) -> tuple[torch.Tensor, torch.LongTensor]:
    """
    Sums the cross-entropy of an ordinary causal LM by the index of the chunk that each answer token would be in.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_columns, vocab_size)`): all columns with a target.
        targets (`torch.LongTensor` of shape `(batch_size, num_columns)`): the tokens that they predict, -100 for none.
        bin_size (`int`): answer tokens of a bin.

    Returns:
        sums in nats and numbers of answer tokens, each of shape `(num_bins,)`.
    """
    is_target = targets != -100
    losses = F.cross_entropy(logits[is_target].float(), targets[is_target], reduction="none")
    # the n-th target of a row is in bin n // bin_size
    index = ((is_target.cumsum(dim=1) - 1) // bin_size)[is_target]
    sums = losses.new_zeros(int(index.max()) + 1).index_add_(0, index, losses)
    return sums, torch.bincount(index)


def sum_bins(losses: torch.Tensor, answer_length: torch.LongTensor, bin_size: int) -> Losses:
    """Sums left-aligned losses `(batch_size, longest)` over bins, without columns after an answer's end."""
    is_target = torch.arange(losses.shape[1], device=losses.device) < answer_length[:, None]
    padding = (0, -losses.shape[1] % bin_size)  # up to a whole number of bins

    def sums(values: torch.Tensor) -> torch.Tensor:
        return F.pad(values, padding).unflatten(1, (-1, bin_size)).sum(dim=2).cpu()

    return Losses(sums(losses * is_target), sums(is_target.long()))


__all__ = [
    "BASE",
    "BASELINES_NOT_CARRIED",
    "BASELINES_WINDOW",
    "BASELINE_FULL_CONTEXT",
    "BASELINE_WINDOW",
    "FIRST_SOFT_PROMPT",
    "FREE_NOT_CARRIED",
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
    "cross_entropy",
    "display_label",
    "llm_losses",
    "measure",
    "measure_free_running",
    "measure_variants",
    "misses",
    "no_delta",
    "pad_right",
    "phase15_losses",
    "shuffled_delta_losses",
    "sums_by_chunk",
]
