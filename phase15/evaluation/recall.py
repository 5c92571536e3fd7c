# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""How many facts of the data set `facts` a model answers, by the distance between the facts and the questions."""

import itertools
from contextlib import contextmanager, nullcontext
from functools import partial

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
    llm_losses,
    measure,
    misses,
    no_delta,
    phase15_losses,
    shuffled_delta_losses,
)
from phase15.model.modeling_phase15 import Phase15ForCausalLM


def recall(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    distances: list[int],
    facts_per_chat: int,
    num_chats: int = 64,
    seed: int = 0,
    batch_size: int = 64,
    texts: list[str] | None = None,
) -> list[dict]:
    """
    Asks a model for facts in fresh chats.

    Args:
        model (`PreTrainedModel`): a Phase15 model, measured with its controls, or a causal LM.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer, with a chat template.
        distances (`list[int]`): words between facts and questions.
        facts_per_chat (`int`): facts of a chat.
        num_chats (`int`): chats at each distance; 2 or more.
        seed (`int`): of the chats.
        batch_size (`int`): chats at a time; a few more where one would be left alone, with nothing to shuffle it with.
        texts (`list[str]`, *optional*): what stands between facts and questions; only the last tenth is used.

    Returns:
        `list[dict]`: for each distance `distance`; `chunk_length`, of a Phase15 model; `tokens`, the mean number of
        tokens between facts and questions; `facts`, how many were asked for; and `rows`, by the keys of evaluation.py,
        with `right`, the share of them in the greedy answer; `completed`, the share of their values that are the most
        likely behind the reference answer up to them, as an LLM may know a fact and say it in words of its own; and
        `nats` per token of the reference.
    """
    model.eval()
    batch_size = next(size for size in itertools.count(max(batch_size, 2)) if num_chats % size != 1)
    return [
        at_distance(
            model, tokenizer, distance, fresh_chats(distance, num_chats, facts_per_chat, seed, texts), batch_size
        )
        for distance in tqdm(distances, desc="Asking for facts")
    ]


def at_distance(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, distance: int, chats: list[Chat], batch_size: int
) -> dict:
    """The rows of one distance."""
    examples, number = encoded(chats, tokenizer), sum(len(chat.answers) for chat in chats)
    places = [value_tokens(chat, example.answer, tokenizer) for chat, example in zip(chats, examples, strict=True)]
    longest = max(len(example.answer) for example in examples)
    result = {}
    for name, (answering, context, losses_of) in variants_of(model).items():
        with context:
            queries = [example.query for example in examples]
            said = greedy_answers(name, answering, tokenizer, queries, batch_size, longest)
        nats, tokens = (values.sum().item() for values in measure(name, batch_size, losses_of, examples))
        missed = measure(name, batch_size, lambda batch, of=losses_of: of(batch, 1, misses), examples).nats
        right = sum(chat.num_right(tokenizer.decode(ids)) for chat, ids in zip(chats, said, strict=True))
        completed = sum(not missed[row, place].any() for row, of_chat in enumerate(places) for place in of_chat)
        result[name] = {"right": right / number, "completed": completed / number, "nats": nats / tokens}
    num_tokens = [len(tokenizer(chat.text, add_special_tokens=False)["input_ids"]) for chat in chats]
    tokens = sum(num_tokens) / len(chats)
    measured = {"distance": distance, "tokens": tokens, "facts": number, "rows": result}
    if isinstance(model, Phase15ForCausalLM):
        measured["chunk_length"] = model.config.chunk_length
    return measured


def variants_of(model: PreTrainedModel) -> dict[str, tuple]:
    """By key: the model that answers, the context in which it does, and what scores a batch of references."""
    if not isinstance(model, Phase15ForCausalLM):
        return {FULL_CONTEXT: (model, nullcontext(), partial(llm_losses, model))}

    def losses(batch: list[Example], *settings) -> Losses:
        return phase15_losses(model, batch, batch, *settings)

    def without_delta(batch: list[Example], *settings) -> Losses:
        with no_delta(model):
            return losses(batch, *settings)

    def shuffled(batch: list[Example], *settings) -> Losses:
        return shuffled_delta_losses(model, batch, batch[1:] + batch[:1], *settings)

    return {
        MODEL: (model, nullcontext(), losses),
        WINDOW: (model, no_delta(model), without_delta),
        SHUFFLED_DELTA: (model, shuffled_delta(model), shuffled),
        FULL_CONTEXT: (model.llm, nullcontext(), partial(llm_losses, model.llm)),
    }


@contextmanager
def shuffled_delta(model: Phase15ForCausalLM):
    """Gives each row of a batch the Δ of the next row, at every step."""
    hook = model.hypernet.register_forward_hook(lambda module, inputs, delta: delta.roll(-1, dims=0))
    try:
        yield
    finally:
        hook.remove()


def encoded(chats: list[Chat], tokenizer: PreTrainedTokenizerBase) -> list[Example]:
    """The token ids of each chat: what is before the answer, and the answer."""
    records = [
        {"fields": {"messages": chat.messages}, "number": number, "where": f"facts, chat {number}"}
        for number, chat in enumerate(chats, start=1)
    ]
    encoder = Phase15Encoder(records, tokenizer, max_answer_length=10_000, source="facts")
    rows = [encoder(record) for record in records]
    return [Example(row["input_ids"][: row["query_length"]], row["input_ids"][row["query_length"] :]) for row in rows]


def value_tokens(chat: Chat, answer: list[int], tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Of each value of a chat the positions of its tokens in the reference answer."""
    ends = [len(tokenizer.decode(answer[: number + 1])) for number in range(len(answer))]
    found, start = [], 0
    for sentence, value in zip(chat.answers, chat.values, strict=True):
        end = tokenizer.decode(answer).index(sentence, start) + sentence.rindex(value) + len(value)
        begins = [0, *ends[:-1]]
        found.append([place for place, stop in enumerate(ends) if stop > end - len(value) and begins[place] < end])
        start = end
    return found


def in_short(text: str) -> str:
    """The first words of a text, and how many it has."""
    words = text.split()
    return text if len(words) < 12 else f"{' '.join(words[:5])} [… {len(words)} words …]"


def show(chat: Chat, answer: str, without_delta: str) -> str:
    """A chat as lines of text, with what the model says, and what it says with Δ = 0."""
    *before, _ = chat.messages
    shortened = f"{in_short(chat.text)} {chat.questions}"
    lines = [f"User:      {before[0]['content']}", f"Assistant: {before[1]['content']}", f"User:      {shortened}"]
    return "\n".join([*lines, f"Assistant: {answer}", f"With Δ = 0: {without_delta}"])


__all__ = ["encoded", "recall", "show"]
