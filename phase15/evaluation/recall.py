# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The share of facts of the data set `facts` that a model answers, by the distance between facts and questions."""

from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from phase15.data.examples import Phase15Encoder
from phase15.data.facts import Chat, fresh_chats
from phase15.evaluation.answers import greedy_answers
from phase15.evaluation.losses import (
    FULL_CONTEXT,
    MODEL,
    SHUFFLED_DELTA,
    WINDOW,
    Example,
    Losses,
    cross_entropy,
    llm_losses,
    measure,
    misses,
    no_delta,
    phase15_losses,
    shuffled_delta_losses,
)
from phase15.evaluation.recovery import confidence_interval, paired_difference, resampled_loss
from phase15.model.modeling_phase15 import Phase15ForCausalLM


class Variant(NamedTuple):
    """A row of the measurement."""

    model: PreTrainedModel  # generates the answers
    context: AbstractContextManager  # in which it generates them
    score_batch: Callable[[list[Example], Callable], Losses]  # scores a batch of references, by answer token


def recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    distances: list[int],
    facts_per_chat: int,
    num_chats: int = 64,
    seed: int = 0,
    batch_size: int = 64,
    texts: list[str] | None = None,
    chunk_length: int | None = None,
) -> list[dict]:
    """
    Measures how many facts a model answers in fresh chats.

    Args:
        model (`PreTrainedModel`): a Phase15 model, measured with its controls, or a causal LM.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, with a chat template.
        distances (`list[int]`): words between facts and questions.
        facts_per_chat (`int`): facts of a chat.
        num_chats (`int`): chats at each distance, at least 2.
        seed (`int`): of the chats.
        batch_size (`int`): chats at a time. A batch grows by one chat that would be left to a batch of its own, since
            a single chat cannot be shuffled.
        texts (`list[str]`, *optional*): the text between facts and questions; only the last tenth is used.
        chunk_length (`int`, *optional*): the chunk length of a Phase15 model; its config's by default.

    Returns:
        `list[dict]`: for each distance `distance`; `chunk_length`, of a Phase15 model; `tokens`, the mean number of
        tokens between facts and questions; `facts` and `chats`, the numbers of questions and of chats; `rows`, by the
        keys of losses.py; and `advantages`, of a Phase15 model over its controls, by their keys, as
        `recovery.paired_difference` of shares of right answers. A row has `right`, the share of facts in the greedy
        answer, and its 95 % `right_interval` from a bootstrap over the chats; `completed`, the share of values that
        are the most likely tokens after the reference answer up to them, since an LLM may know a fact and phrase it
        otherwise; and `nats` per token of the reference.
    """
    model.eval()
    if isinstance(model, Phase15ForCausalLM):
        chunk_length = model.config.resolve_chunk_length(chunk_length)
    else:
        chunk_length = None
    batch_size = max(batch_size, 2)
    while num_chats % batch_size == 1:
        batch_size += 1
    measured = []
    for distance in tqdm(distances, desc="Asking for facts"):
        chats = fresh_chats(distance, num_chats, facts_per_chat, seed, texts)
        measured.append(measure_distance(model, tokenizer, distance, chats, batch_size, chunk_length))
    return measured


def measure_distance(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    distance: int,
    chats: list[Chat],
    batch_size: int,
    chunk_length: int | None,
) -> dict:
    """Returns the measurement of one distance."""
    examples = encode_chats(chats, tokenizer)
    queries = [example.query for example in examples]
    longest = max(len(example.answer) for example in examples)
    num_facts = sum(len(chat.answers) for chat in chats)
    values = [find_values(chat, example.answer, tokenizer) for chat, example in zip(chats, examples, strict=True)]
    facts_by_chat = torch.tensor([[len(chat.answers)] for chat in chats])
    right_by_row = {}
    rows = {}
    for name, variant in make_variants(model, chunk_length).items():
        with variant.context:
            answers = greedy_answers(
                name, variant.model, tokenizer, queries, batch_size, longest, chunk_length=chunk_length
            )
        counts = []
        for chat, answer in zip(chats, answers, strict=True):
            counts.append([chat.count_right(tokenizer.decode(answer))])
        right = Losses(torch.tensor(counts, dtype=torch.float64), facts_by_chat)  # right answers in place of nats
        right_by_row[name] = right
        losses = measure(name, batch_size, partial(variant.score_batch, score=cross_entropy), examples)
        missed = measure(name, batch_size, partial(variant.score_batch, score=misses), examples).nats  # (B, longest)
        num_completed = 0
        for row, chat_values in zip(missed, values, strict=True):
            num_completed += sum(not row[positions].any() for positions in chat_values)
        rows[name] = {
            "right": right.nats.sum().item() / num_facts,
            "right_interval": confidence_interval(resampled_loss(right)),
            "completed": num_completed / num_facts,
            "nats": losses.nats.sum().item() / losses.tokens.sum().item(),
        }
    num_tokens = sum(len(tokenizer(chat.text, add_special_tokens=False)["input_ids"]) for chat in chats)
    result = {
        "distance": distance,
        "tokens": num_tokens / len(chats),
        "facts": num_facts,
        "chats": len(chats),
        "rows": rows,
    }
    if chunk_length is not None:
        result["chunk_length"] = chunk_length
        result["advantages"] = {
            name: paired_difference(right_by_row[MODEL], right_by_row[name]) for name in (WINDOW, SHUFFLED_DELTA)
        }
    return result


def make_variants(model: PreTrainedModel, chunk_length: int | None) -> dict[str, Variant]:
    """Returns the rows of a model by their keys: a Phase15 model and its controls, or any other model."""
    if not isinstance(model, Phase15ForCausalLM):
        return {FULL_CONTEXT: full_context_variant(model)}

    def score_batch(batch: list[Example], score: Callable) -> Losses:
        return phase15_losses(model, batch, batch, chunk_length, bin_size=1, score=score)

    def without_delta(batch: list[Example], score: Callable) -> Losses:
        with no_delta(model):
            return score_batch(batch, score)

    def with_shuffled_delta(batch: list[Example], score: Callable) -> Losses:
        others = batch[1:] + batch[:1]
        return shuffled_delta_losses(model, batch, others, chunk_length, bin_size=1, score=score)

    return {
        MODEL: Variant(model, nullcontext(), score_batch),
        WINDOW: Variant(model, no_delta(model), without_delta),
        SHUFFLED_DELTA: Variant(model, shuffled_delta(model), with_shuffled_delta),
        FULL_CONTEXT: full_context_variant(model.llm),
    }


def full_context_variant(llm: PreTrainedModel) -> Variant:
    def score_batch(batch: list[Example], score: Callable) -> Losses:
        return llm_losses(llm, batch, bin_size=1, score=score)

    return Variant(llm, nullcontext(), score_batch)


@contextmanager
def shuffled_delta(model: Phase15ForCausalLM):
    """Gives each row of a batch the Δ of the next row at every step, while the block runs."""
    hook = model.hypernet.register_forward_hook(lambda module, inputs, delta: delta.roll(-1, dims=0))
    try:
        yield
    finally:
        hook.remove()


def encode_chats(chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """Returns the token ids of each chat: all turns before the answer, and the answer."""
    records = [
        {"fields": {"messages": chat.messages}, "number": number, "where": f"facts, chat {number}"}
        for number, chat in enumerate(chats, start=1)
    ]
    encoder = Phase15Encoder(records, tokenizer, max_answer_length=10_000, source="facts")
    examples = []
    for record in records:
        row = encoder(record)
        query_length = row["query_length"]
        examples.append(Example(row["input_ids"][:query_length], row["input_ids"][query_length:]))
    return examples


def find_values(chat: Chat, answer: list[int], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns, for each value of a chat, the positions of its tokens in the reference answer."""
    text = tokenizer.decode(answer)
    # character at which each token ends; it begins where the one before ends
    ends = [len(tokenizer.decode(answer[: number + 1])) for number in range(len(answer))]
    begins = [0, *ends[:-1]]
    positions = []
    search_from = 0
    for sentence, value in zip(chat.answers, chat.values, strict=True):
        value_begin = text.index(sentence, search_from) + sentence.rindex(value)
        value_end = value_begin + len(value)
        overlaps = [begin < value_end and end > value_begin for begin, end in zip(begins, ends, strict=True)]
        positions.append([position for position, is_value in enumerate(overlaps) if is_value])
        search_from = value_end
    return positions


def shorten(text: str) -> str:
    """Returns the first words of a long text, and its number of words."""
    words = text.split()
    if len(words) < 12:
        return text
    return f"{' '.join(words[:5])} [… {len(words)} words …]"


def format_chat(chat: Chat, answer: str, answer_without_delta: str) -> str:
    """Returns a chat as lines of text, with the model's answer and its answer with Δ = 0."""
    first_turn, second_turn, *_ = chat.messages
    lines = [
        f"User:      {first_turn['content']}",
        f"Assistant: {second_turn['content']}",
        f"User:      {shorten(chat.text)} {chat.questions}",
        f"Assistant: {answer}",
        f"With Δ = 0: {answer_without_delta}",
    ]
    return "\n".join(lines)


__all__ = ["encode_chats", "format_chat", "recall"]
