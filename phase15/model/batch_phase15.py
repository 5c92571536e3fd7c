# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
A batch as rows: padding removed, the query of each row, and which prediction stands in which column.

Ids, masks and labels come with columns that are padded on any side. The recursion reads rows that begin at 0.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .cache_phase15 import check_cache


class Rows(NamedTuple):
    """
    A batch, left-aligned: padding removed from either side. The query is the first `query_length` of a row's `length`
    tokens. `position` says where each column's token stands in its row, and is -1 at padding.
    """

    input_ids: torch.LongTensor  # (B, T), left-aligned
    length: torch.LongTensor  # (B,)
    query_length: torch.LongTensor  # (B,)
    position: torch.LongTensor  # (B, T), by column of the batch as it was given

    @property
    def prediction(self) -> torch.LongTensor:
        """The index of each column's prediction in its row `(B, T)`; the query's last token makes the first."""
        return self.position - (self.query_length - 1).clamp(min=0)[:, None]

    def to_columns(self, states: torch.Tensor) -> torch.Tensor:
        """From states of predictions `(B, P, d)` to states of columns `(B, T, d)`, zero where nothing is predicted."""
        prediction = self.prediction[..., None]
        columns = states.gather(1, prediction.clamp(0, states.shape[1] - 1).expand(-1, -1, states.shape[2]))
        return columns.where((prediction >= 0) & (prediction < states.shape[1]), 0)

    def needed_chunks(self, chunk_length: int, predict_mask: torch.BoolTensor | None = None) -> torch.BoolTensor:
        """Which chunks hold a prediction that `predict_mask` `(B, T)` asks for: `(B, num_chunks)`, one at least."""
        asked = self.prediction >= 0 if predict_mask is None else (self.prediction >= 0) & predict_mask
        chunk = (self.prediction // chunk_length).masked_fill(~asked, -1)  # (B, T)
        num_chunks = int(chunk.max().clamp(min=0)) + 1
        needed = torch.zeros(len(chunk), num_chunks + 1, dtype=torch.bool, device=chunk.device)
        needed = needed.scatter(1, chunk + 1, True)[:, 1:]
        needed[0, 0] |= ~needed.any()  # no position was asked for: compute one dummy, whose logits are dropped
        return needed


def left_align(
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None,
    query_lengths: torch.LongTensor | None,
    vocab_size: int,
    seen_tokens: int = 0,
) -> Rows:
    """
    The rows of a batch.

    Args:
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): padded on any side.
        attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*): 1 for tokens, 0 for
            padding. It may also cover tokens before these.
        query_lengths (`torch.LongTensor` of shape `(batch_size,)`, *optional*): by default 1, or 0 behind seen tokens.
        vocab_size (`int`): ids must be below it.
        seen_tokens (`int`): how many tokens of each row came before.

    Raises:
        ValueError: for an id outside the vocabulary, a mask of other numbers, a row without a token, or a query longer
            than its row.
    """
    given = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
    mask = given.bool()
    length, shortest = mask.sum(dim=1), 0 if seen_tokens else 1
    query_length = torch.as_tensor(shortest if query_lengths is None else query_lengths, device=length.device)
    query_length = query_length.expand(len(input_ids))
    bad = (length < 1) | (query_length < shortest) | (query_length > length)
    wrong = (input_ids < 0) | (input_ids >= vocab_size) | (given != mask)
    if (bad | wrong.any(dim=1)).any():  # one device sync for all checks
        check_ids("input_ids", input_ids, vocab_size)
        if (odd := given[given != mask]).numel():
            raise ValueError(f"`attention_mask` holds {odd[0].item()}, but it must hold 1 for tokens, 0 for padding.")
        index = int(bad.nonzero()[0])
        raise ValueError(
            f"Row {index} has {length[index]} tokens and a query of {query_length[index]}; a row needs at least "
            f"one token, and its query {shortest} to all of them."
        )
    order = mask.long().argsort(dim=1, descending=True, stable=True)  # (B, T): tokens first
    position = (mask.cumsum(dim=1) - 1).masked_fill(~mask, -1)
    return Rows(input_ids.gather(1, order), length, query_length, position)


def query_lengths_of(labels: torch.LongTensor, attention_mask: torch.Tensor | None) -> torch.LongTensor:
    """How many tokens of each row come before its first label: all of them, if it has none, and one at least."""
    mask = zeros_and_ones(labels, attention_mask)
    is_target = (labels != -100) & mask.bool()
    before = (mask.cumsum(dim=1) - mask).gather(1, is_target.long().argmax(dim=1, keepdim=True)).squeeze(1)  # (B,)
    return torch.where(is_target.any(dim=1), before.clamp(min=1), mask.sum(dim=1))


def shift_labels(labels: torch.LongTensor, attention_mask: torch.Tensor | None, vocab_size: int) -> torch.LongTensor:
    """
    The label of each column's next token, -100 for none, of shape `(batch_size, sequence_length)`. Raises a ValueError
    for a label outside the vocabulary.
    """
    mask = zeros_and_ones(labels, attention_mask)
    labels = labels.masked_fill(mask == 0, -100)
    check_ids("labels", labels, vocab_size, ignored=-100)
    order = mask.argsort(dim=1, descending=True, stable=True)
    following = F.pad(labels.gather(1, order)[:, 1:], (0, 1), value=-100)  # left-aligned
    position = (mask.cumsum(dim=1) - 1).clamp(min=0)
    return following.gather(1, position).masked_fill(mask == 0, -100)


def zeros_and_ones(ids: torch.LongTensor, attention_mask: torch.Tensor | None) -> torch.LongTensor:
    """The mask of a batch in integers, all ones where none is given."""
    return torch.ones_like(ids) if attention_mask is None else attention_mask.bool().long()


def check_ids(name: str, ids: torch.LongTensor, vocab_size: int, ignored: int | None = None):
    """Raises a ValueError that names the first id outside the vocabulary."""
    unknown = ((ids < 0) | (ids >= vocab_size)) & (ids != ignored)
    if unknown.any():
        row, position = unknown.nonzero()[0].tolist()
        raise ValueError(
            f"Row {row} of `{name}` holds {int(ids[row, position])} at position {position}, but ids must be from 0 to "
            f"{vocab_size - 1}, the last of the vocabulary, also at padding."
        )


# Arguments of other models that would be ignored in silence; PEFT gives None.
UNSUPPORTED_ARGUMENTS = {
    "inputs_embeds": "the recursion reads `input_ids`",
    "position_ids": "a row is one text, so packed data cannot be read",
    "cu_seq_lens_q": "a row is one text, so packed data cannot be read",
    "cu_seq_lens_k": "a row is one text, so packed data cannot be read",
    "shift_labels": "`labels` are aligned with `input_ids`, and a row is not split among devices",
}


def check_arguments(kwargs: dict):
    """Raises a ValueError for an argument that cannot be honoured."""
    for name, reason in UNSUPPORTED_ARGUMENTS.items():
        if kwargs.pop(name, None) is not None:
            raise ValueError(f"`{name}` cannot be given: {reason}.")


def check_batch(input_ids, attention_mask, cache, labels=None):
    """Raises a ValueError for arguments of `forward` that have another kind or shape."""
    check_cache(cache)
    shape, mask_shape = (None if tensor is None else tuple(tensor.shape) for tensor in (input_ids, attention_mask))
    if shape is None or len(shape) != 2:
        raise ValueError(f"`input_ids` must have shape (batch_size, sequence_length), not {shape}.")
    if input_ids.is_floating_point():
        raise ValueError(f"`input_ids` must hold integers, not {input_ids.dtype}.")
    seen_tokens = 0 if cache is None else cache.seen_tokens
    if mask_shape not in (None, shape, (shape[0], seen_tokens + shape[1])):
        raise ValueError(f"`attention_mask` has shape {mask_shape}, but `input_ids` {shape}.")
    if labels is not None and labels.shape != shape:
        raise ValueError(f"`labels` has shape {tuple(labels.shape)}, but `input_ids` {shape}.")
    if labels is not None and cache is not None:
        raise ValueError("`labels` cannot be given with `cache` or `use_cache=True`.")


__all__ = [
    "Rows",
    "check_arguments",
    "check_batch",
    "check_ids",
    "left_align",
    "query_lengths_of",
    "shift_labels",
    "zeros_and_ones",
]
