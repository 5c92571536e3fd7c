# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""batch_phase15.py against the same in plain Python, row by row, on batches whose padding is anywhere."""

import random

import pytest
import torch

from phase15.model.batch_phase15 import IGNORED, Rows, query_lengths_from_labels
from phase15.model.cache_phase15 import Phase15Cache
from phase15.model.configuration_phase15 import Phase15Config


VOCAB_SIZE, CHUNK = 50, 4
SEEDS = pytest.mark.parametrize("seed", range(20))


def batch(seed: int, num_rows: int = 3, width: int = 17) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Ids, a mask with at least one token a row, and how many tokens of each row are its query."""
    draw = random.Random(seed)
    ids = [[draw.randrange(VOCAB_SIZE) for _ in range(width)] for _ in range(num_rows)]
    mask = [[int(draw.random() < 0.7) for _ in range(width)] for _ in range(num_rows)]
    for row in mask:
        row[draw.randrange(width)] = 1
    return ids, mask, [draw.randint(1, sum(row)) for row in mask]


def tokens(values: list, mask: list[int]) -> list:
    return [value for value, is_token in zip(values, mask, strict=True) if is_token]


def predictions(mask: list[int], query_length: int) -> list[int]:
    """By column; -99 where the column is padding or inside the query."""
    of_tokens = iter(index - (query_length - 1) for index in range(sum(mask)))
    given = [next(of_tokens) if is_token else -99 for is_token in mask]
    return [number if number >= 0 else -99 for number in given]


@SEEDS
def test_rows_are_the_tokens_and_columns_know_their_prediction(seed):
    ids, mask, query_lengths = batch(seed)
    rows = Rows.from_batch(torch.tensor(ids), torch.tensor(mask), torch.tensor(query_lengths), vocab_size=VOCAB_SIZE)
    states = torch.rand(len(ids), 6, 2)
    columns = rows.to_columns(states)
    last = torch.tensor([16, 3, 0])
    assert torch.equal(rows.to_columns(states, last), columns[:, last])
    assert torch.equal(rows.to_columns(states, slice(-2, None)), columns[:, -2:])
    for index, (row, of_row, query_length) in enumerate(zip(ids, mask, query_lengths, strict=True)):
        expected = tokens(row, of_row)
        assert rows.tokens[index, : len(expected)].tolist() == expected and rows.length[index] == len(expected)
        for column, number in enumerate(predictions(of_row, query_length)):
            is_known = 0 <= number < states.shape[1]
            assert torch.equal(columns[index, column], states[index, number] if is_known else torch.zeros(2))
            if number >= 0:
                assert rows.prediction[index, column] == number


@SEEDS
def test_only_chunks_that_are_asked_for_are_needed(seed):
    ids, mask, query_lengths = batch(seed)
    draw = random.Random(seed)
    asked = [[draw.random() < 0.2 for _ in row] for row in ids]
    rows = Rows.from_batch(torch.tensor(ids), torch.tensor(mask), torch.tensor(query_lengths), vocab_size=VOCAB_SIZE)
    for predict_mask in (None, asked, [[False] * len(row) for row in ids]):
        given = None if predict_mask is None else torch.tensor(predict_mask)
        wanted = set()
        for index, of_row in enumerate(mask):
            for column, number in enumerate(predictions(of_row, query_lengths[index])):
                if number >= 0 and (predict_mask is None or predict_mask[index][column]):
                    wanted.add((index, number // CHUNK))
        wanted = wanted or {(0, 0)}  # one is computed in any case
        needed = rows.needed_chunks(CHUNK, given)
        assert needed.shape == (len(ids), 1 + max(chunk for _, chunk in wanted))
        assert {tuple(place) for place in needed.nonzero().tolist()} == wanted


@SEEDS
def test_a_label_belongs_to_the_token_before_it(seed):
    ids, mask, query_lengths = batch(seed)
    labels = []
    for row, of_row, query_length in zip(ids, mask, query_lengths, strict=True):
        rank = [sum(of_row[:column]) for column in range(len(row))]
        labels.append([token if rank[column] >= query_length else -100 for column, token in enumerate(row)])
    for dtype in (torch.long, torch.float):
        given = torch.tensor(mask, dtype=dtype)
        rows = Rows.from_batch(torch.tensor(ids), given, labels=torch.tensor(labels), vocab_size=VOCAB_SIZE)
        assert rows.query_length.tolist() == query_lengths
        targets = rows.targets(num_predictions=20)
        has_target = rows.is_target()
        for index, of_row in enumerate(mask):
            following = [*tokens(labels[index], of_row)[1:], IGNORED]
            expected = following[query_lengths[index] - 1 :]
            assert targets[index].tolist() == expected + [IGNORED] * (20 - len(expected))
            assert tokens(has_target[index].tolist(), of_row) == [label != IGNORED for label in following]
            assert not any(tokens(has_target[index].tolist(), [1 - one for one in of_row]))
    assert query_lengths_from_labels(torch.tensor(labels), torch.tensor(mask)).tolist() == query_lengths


def test_a_row_of_only_labels_keeps_its_first_token_as_the_query():
    labels = torch.tensor([[5, 6, 7], [-100, -100, -100]])
    assert query_lengths_from_labels(labels, None).tolist() == [1, 3]
    rows = Rows.from_batch(labels.clamp(min=0), labels=labels, vocab_size=VOCAB_SIZE)
    assert rows.query_length.tolist() == [1, 3]


def test_a_label_outside_the_vocabulary_is_named():
    labels = torch.tensor([[-100, 3, VOCAB_SIZE]])
    with pytest.raises(ValueError, match="Row 0 of `labels` holds 50 at position 2"):
        Rows.from_batch(torch.ones_like(labels), labels=labels, vocab_size=VOCAB_SIZE)
    mask = torch.tensor([[1, 1, 0]])  # labels at padding do not count
    assert Rows.from_batch(torch.ones_like(labels), mask, labels=labels, vocab_size=VOCAB_SIZE).length.tolist() == [2]


def after(seen_tokens: int) -> Phase15Cache | None:
    """A cache that has seen tokens."""
    if not seen_tokens:
        return None
    cache = Phase15Cache(Phase15Config())
    cache.seen_tokens = seen_tokens
    return cache


@pytest.mark.parametrize(
    "ids, mask, query_lengths, seen_tokens, message",
    [
        (
            [[1, VOCAB_SIZE]],
            None,
            None,
            0,
            "Row 0 of `input_ids` holds 50 at position 1, but ids must be from 0 to 49",
        ),
        ([[1, 2], [-1, 2]], None, None, 0, "Row 1 of `input_ids` holds -1 at position 0"),
        ([[1, 2], [3, 4]], [[1, 1], [1, 3]], None, 0, "`attention_mask` holds 3, but it must hold 1 for tokens"),
        ([[1, 2], [3, 4]], [[1, 1], [0, 0]], None, 0, "Row 1 has 0 tokens and a query of 1; .* its query 1 to all"),
        ([[1, 2], [3, 4]], None, [2, 0], 0, "Row 1 has 2 tokens and a query of 0"),
        ([[1, 2], [3, 4]], None, [3, 1], 5, "Row 0 has 2 tokens and a query of 3; .* its query 0 to all"),
    ],
)
def test_what_is_refused_is_named(ids, mask, query_lengths, seen_tokens, message):
    mask, query_lengths = (None if given is None else torch.tensor(given) for given in (mask, query_lengths))
    with pytest.raises(ValueError, match=message):
        Rows.from_batch(torch.tensor(ids), mask, query_lengths, vocab_size=VOCAB_SIZE, cache=after(seen_tokens))


def test_a_mask_may_cover_what_came_before():
    ids = torch.tensor([[7, 8]])
    mask = torch.tensor([[0, 1, 1, 0, 1]])
    rows = Rows.from_batch(ids, mask, torch.tensor([0]), vocab_size=VOCAB_SIZE, cache=after(3))
    assert rows.tokens[0, 0] == 8 and rows.length.tolist() == [1] and rows.prediction.tolist() == [[-1, 0]]
