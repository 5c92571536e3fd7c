# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Left-aligns a batch, maps predictions back to its columns, and refuses what the recursion cannot read.

Ids, masks and labels come in columns that are padded on any side. The recursion reads rows that begin at 0. The batch
is aligned once: the recursion, the LLM and the loss work in rows, and only logits go back to columns.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from .cache_phase15 import Phase15Cache


IGNORED = -100  # the label of a token that is not a target, as everywhere in transformers

# Arguments of other models that would be ignored in silence. PEFT passes them with the value None.
UNSUPPORTED_ARGUMENTS = {
    "position_ids": "a row is one text, so packed data cannot be read",
    "cu_seq_lens_q": "a row is one text, so packed data cannot be read",
    "cu_seq_lens_k": "a row is one text, so packed data cannot be read",
    "shift_labels": "`labels` are aligned with `input_ids`, and a row is not split among devices",
}


class Rows(NamedTuple):
    """
    A left-aligned batch, without padding on either side. The first `query_length` tokens of a row's `length` tokens
    are its query. Prediction p of a row follows its token `query_length - 1 + p`.
    """

    tokens: torch.Tensor  # (B, T) ids, or (B, T, d) embeddings, left-aligned
    length: torch.LongTensor  # (B,)
    query_length: torch.LongTensor  # (B,)
    position: torch.LongTensor  # (B, T), by column of the given batch: index of the token in its row, -1 at padding
    following: torch.LongTensor | None = None  # (B, T), left-aligned: the label of the token after each token

    @classmethod
    def from_batch(
        cls,
        tokens: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        query_lengths: torch.LongTensor | None = None,
        labels: torch.LongTensor | None = None,
        *,
        vocab_size: int,
        cache: Phase15Cache | None = None,
    ) -> "Rows":
        """
        Checks a batch and left-aligns it.

        Args:
            tokens (`torch.LongTensor` of shape `(batch_size, sequence_length)`, or `torch.Tensor` of shape
                `(batch_size, sequence_length, hidden_size)`): `input_ids` or `inputs_embeds`, padded on any side.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 1 for tokens, 0 for
                padding. It may also cover the tokens that the cache has seen.
            query_lengths (`torch.LongTensor` of shape `(batch_size,)`, *optional*): by default the number of tokens
                before the first label; without labels 1. With a cache the row's length, or 0 if it has seen tokens.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*): aligned with `input_ids`,
                -100 for tokens that are not targets.
            vocab_size (`int`): ids must be below it.
            cache (`Phase15Cache`, *optional*): state that the batch continues.

        Raises:
            ValueError: if a tensor has another kind or shape, an id is outside the vocabulary, the mask has values
                other than 0 and 1, a row is empty, or a query is longer than its row.
        """
        check_batch(tokens, attention_mask, cache, labels)
        shape = tokens.shape[:2]
        seen_tokens = 0 if cache is None else cache.seen_tokens
        if attention_mask is None:
            attention_mask = torch.ones(shape, dtype=torch.long, device=tokens.device)
        attention_mask = attention_mask[:, -shape[1] :]
        mask = attention_mask.bool()
        length = mask.sum(dim=1)
        order = mask.long().argsort(dim=1, descending=True, stable=True)  # (B, T): the columns of tokens first
        position = (mask.cumsum(dim=1) - 1).masked_fill(~mask, -1)

        aligned_labels = None
        following = None
        if labels is not None:
            labels = labels.masked_fill(~mask, IGNORED)
            aligned_labels = labels.gather(1, order)
            following = F.pad(aligned_labels[:, 1:], (0, 1), value=IGNORED)

        shortest_query = 0 if seen_tokens else 1
        if query_lengths is not None:
            query_length = torch.as_tensor(query_lengths, device=length.device).expand(shape[0])
        elif labels is not None:
            query_length = tokens_before_labels(aligned_labels, length)
        elif cache is not None and not seen_tokens:
            query_length = length
        else:
            query_length = torch.full_like(length, shortest_query)

        is_bad_row = (length < 1) | (query_length < shortest_query) | (query_length > length)
        is_bad = attention_mask != mask
        if tokens.dim() == 2:
            is_bad |= is_unknown(tokens, vocab_size)
        if labels is not None:
            is_bad |= is_unknown(labels, vocab_size, IGNORED)
        if (is_bad_row | is_bad.any(dim=1)).any():  # the only wait for the device if everything is right
            if tokens.dim() == 2:
                check_ids("input_ids", tokens, vocab_size)
            if labels is not None:
                check_ids("labels", labels, vocab_size, IGNORED)
            check_mask(attention_mask)
            check_queries(length, query_length, shortest_query)
        return cls(take(tokens, order), length, query_length, position, following)

    @property
    def prediction(self) -> torch.LongTensor:
        """
        Returns the index of each column's prediction in its row, of shape `(batch_size, sequence_length)`. It is
        negative where a column predicts nothing.
        """
        return self.position - (self.query_length - 1).clamp(min=0)[:, None]

    def to_columns(self, states: torch.Tensor, columns: slice | torch.LongTensor | None = None) -> torch.Tensor:
        """
        Moves states from predictions to columns.

        Args:
            states (`torch.Tensor` of shape `(batch_size, num_predictions, hidden_size)`): by prediction.
            columns (`slice` or `torch.LongTensor` of shape `(num_columns,)`, *optional*): all columns by default.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_columns, hidden_size)`: zero where nothing is predicted.
        """
        prediction = self.prediction
        if columns is not None:
            prediction = prediction[:, columns]
        prediction = prediction[..., None]
        index = prediction.clamp(0, states.shape[1] - 1)
        is_predicted = (prediction >= 0) & (prediction < states.shape[1])
        return states.gather(1, index.expand(-1, -1, states.shape[2])).where(is_predicted, 0)

    def targets(self, num_predictions: int) -> torch.LongTensor:
        """
        Returns the label of each prediction, of shape `(batch_size, num_predictions)`; -100 where there is none. Needs
        labels.
        """
        last = self.following.shape[1] - 1
        token = (self.query_length - 1)[:, None] + torch.arange(num_predictions, device=self.length.device)
        return self.following.gather(1, token.clamp(max=last)).masked_fill(token > last, IGNORED)

    def is_target(self) -> torch.BoolTensor:
        """Returns the columns whose prediction has a label, of shape `(batch_size, sequence_length)`. Needs labels."""
        has_label = self.following.gather(1, self.position.clamp(min=0)) != IGNORED
        return has_label & (self.position >= 0)

    def needed_chunks(self, chunk_length: int, predict_mask: torch.BoolTensor | None = None) -> torch.BoolTensor:
        """
        Returns the chunks that hold a requested prediction, of shape `(batch_size, num_chunks)`; at least one is True.

        Args:
            chunk_length (`int`): predictions of a chunk.
            predict_mask (`torch.BoolTensor` of shape `(batch_size, sequence_length)`, *optional*): columns whose
                predictions are requested; all by default.
        """
        prediction = self.prediction
        is_requested = prediction >= 0
        if predict_mask is not None:
            is_requested &= predict_mask
        chunk = (prediction // chunk_length).masked_fill(~is_requested, -1)  # (B, T)
        num_chunks = int(chunk.max().clamp(min=0)) + 1
        # One more column in front takes the index -1 of columns that are not requested.
        needed = torch.zeros(len(chunk), num_chunks + 1, dtype=torch.bool, device=chunk.device)
        needed = needed.scatter(1, chunk + 1, True)[:, 1:]
        # If nothing is requested the LLM still needs a chunk to be called on. Its logits are dropped.
        needed[0, 0] |= ~needed.any()
        return needed


def take(tokens: torch.Tensor, index: torch.LongTensor) -> torch.Tensor:
    """
    Returns the tokens of each row at an index of shape `(batch_size, num_tokens)`: ids of that shape, or embeddings of
    shape `(batch_size, num_tokens, hidden_size)`.
    """
    if tokens.dim() == 3:
        index = index[..., None].expand(-1, -1, tokens.shape[2])
    return tokens.gather(1, index)


def choose_tokens(input_ids: torch.LongTensor | None, inputs_embeds: torch.Tensor | None) -> torch.Tensor | None:
    """Returns the ids or the embeddings of a call. Raises a ValueError for both."""
    if input_ids is not None and inputs_embeds is not None:
        raise ValueError("`input_ids` and `inputs_embeds` are two forms of one argument: give one of them.")
    return input_ids if inputs_embeds is None else inputs_embeds


def as_batch(
    input_ids: torch.LongTensor | list[int] | list[list[int]],
    attention_mask: torch.Tensor | None,
    device: torch.device,
) -> tuple[torch.LongTensor, torch.Tensor | None]:
    """
    Returns `input_ids` and `attention_mask` of shape `(batch_size, sequence_length)`. Lists are padded on the right;
    one text becomes one row.
    """
    if torch.is_tensor(input_ids):
        if input_ids.dim() == 1:
            input_ids = input_ids[None]
            attention_mask = None if attention_mask is None else attention_mask[None]
        return input_ids, attention_mask
    if attention_mask is not None:
        raise ValueError("`attention_mask` goes with a tensor of `input_ids`: lists are not padded.")
    rows = input_ids if input_ids and isinstance(input_ids[0], list | tuple) else [input_ids]
    texts = [torch.tensor(row, dtype=torch.long, device=device) for row in rows]
    ids = pad_sequence(texts, batch_first=True)
    mask = pad_sequence([torch.ones_like(text) for text in texts], batch_first=True)
    return ids, mask


def tokens_before_labels(labels: torch.LongTensor, length: torch.LongTensor) -> torch.LongTensor:
    """
    Returns the number of tokens before the first label of each row, at least 1; the row's length if it has no label.

    Args:
        labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`): left-aligned, -100 for no label.
        length (`torch.LongTensor` of shape `(batch_size,)`): number of tokens in each row.
    """
    is_target = labels != IGNORED
    first = is_target.long().argmax(dim=1)
    return torch.where(is_target.any(dim=1), first.clamp(min=1), length)


def query_lengths_from_labels(labels: torch.LongTensor, attention_mask: torch.Tensor | None) -> torch.LongTensor:
    """
    Returns the default `query_lengths` of a batch with labels, of shape `(batch_size,)`, for callers that pass the
    labels to somebody else.
    """
    mask = torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    order = mask.long().argsort(dim=1, descending=True, stable=True)
    return tokens_before_labels(labels.masked_fill(~mask, IGNORED).gather(1, order), mask.sum(dim=1))


def add_query_lengths(model: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """
    Adds the default `query_lengths` to a call with labels. A forward pre-hook of the head: TRL's SFTTrainer replaces
    the head's `forward` by a function that keeps the labels and calls the body, which needs to know the queries.
    """
    is_replaced = "forward" in vars(model)
    if is_replaced and kwargs.get("labels") is not None and kwargs.get("query_lengths") is None:
        query_lengths = query_lengths_from_labels(kwargs["labels"], kwargs.get("attention_mask"))
        kwargs = {**kwargs, "query_lengths": query_lengths}
    return args, kwargs


def check_arguments(kwargs: dict):
    """Raises a ValueError for an argument of other models that cannot be honoured, and drops those that are None."""
    for name, reason in UNSUPPORTED_ARGUMENTS.items():
        if kwargs.pop(name, None) is not None:
            raise ValueError(f"`{name}` cannot be given: {reason}.")


def check_batch(tokens, attention_mask, cache, labels=None):
    """Raises a ValueError for arguments of `forward` that have another kind or shape."""
    shape = None if tokens is None else tuple(tokens.shape)
    is_embeds = shape is not None and len(shape) == 3 and tokens.is_floating_point()
    if shape is None:
        raise ValueError(
            "`input_ids` must have shape (batch_size, sequence_length), not None; or give `inputs_embeds`."
        )
    if len(shape) != 2 and not is_embeds:
        raise ValueError(f"`input_ids` must have shape (batch_size, sequence_length), not {shape}.")
    if len(shape) == 2 and tokens.is_floating_point():
        raise ValueError(f"`input_ids` must hold integers, not {tokens.dtype}.")
    shape = shape[:2]
    name = "inputs_embeds" if is_embeds else "input_ids"
    seen_tokens = 0 if cache is None else cache.seen_tokens
    mask_shape = None if attention_mask is None else tuple(attention_mask.shape)
    if mask_shape not in (None, shape, (shape[0], seen_tokens + shape[1])):
        raise ValueError(f"`attention_mask` has shape {mask_shape}, but `{name}` {shape}.")
    if labels is not None and labels.shape != shape:
        raise ValueError(f"`labels` has shape {tuple(labels.shape)}, but `{name}` {shape}.")
    if labels is not None and cache is not None:
        raise ValueError("`labels` cannot be given with `cache` or `use_cache=True`.")


def is_unknown(ids: torch.LongTensor, vocab_size: int, ignored: int | None = None) -> torch.BoolTensor:
    """Returns the ids outside the vocabulary, in the shape of `ids`."""
    unknown = (ids < 0) | (ids >= vocab_size)
    return unknown if ignored is None else unknown & (ids != ignored)


def check_ids(name: str, ids: torch.LongTensor, vocab_size: int, ignored: int | None = None):
    """Raises a ValueError that names the first id outside the vocabulary."""
    unknown = is_unknown(ids, vocab_size, ignored)
    if unknown.any():
        row, position = unknown.nonzero()[0].tolist()
        raise ValueError(
            f"Row {row} of `{name}` holds {int(ids[row, position])} at position {position}, but ids must be from 0 to "
            f"{vocab_size - 1}, the last of the vocabulary, also at padding."
        )


def check_mask(attention_mask: torch.Tensor):
    """Raises a ValueError that names the first value other than 0 and 1."""
    other = attention_mask[attention_mask != attention_mask.bool()]
    if other.numel():
        raise ValueError(f"`attention_mask` holds {other[0].item()}, but it must hold 1 for tokens, 0 for padding.")


def check_queries(length: torch.LongTensor, query_length: torch.LongTensor, shortest_query: int):
    """Raises a ValueError that names the first row that is empty or whose query does not fit."""
    is_bad = (length < 1) | (query_length < shortest_query) | (query_length > length)
    if is_bad.any():
        row = int(is_bad.nonzero()[0])
        raise ValueError(
            f"Row {row} has {length[row]} tokens and a query of {query_length[row]}; a row needs at least one token, "
            f"and its query {shortest_query} to all of them."
        )


__all__ = [
    "IGNORED",
    "Rows",
    "add_query_lengths",
    "as_batch",
    "check_arguments",
    "check_ids",
    "choose_tokens",
    "query_lengths_from_labels",
    "take",
]
