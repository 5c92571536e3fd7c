# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Body and head: the training form, the cached form, and loading."""

import contextlib
import copy
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from accelerate import infer_auto_device_map
from reference import (
    BASES,
    CHUNK,
    QUERY,
    SIZES,
    SLOTS,
    VOCAB,
    as_soft_prompt,
    pad,
    random_ids,
    randomise_alpha,
    reference_logits,
    window_logits,
)
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    DynamicCache,
    Gemma2Config,
    MambaConfig,
)

from phase15.model import batch_phase15, modeling_phase15
from phase15.model.cache_phase15 import Phase15Cache
from phase15.model.configuration_phase15 import Phase15Config
from phase15.model.modeling_phase15 import Phase15ForCausalLM, Phase15Model


# (tokens, query tokens) of a row: one-token answers; answers that end one before, at and one after a chunk boundary;
# no answer; one-token queries; a query of exactly one segment and longer ones; rows longer than all the slots
ROWS = [(6, 5), (8, 5), (9, 5), (10, 5), (5, 5), (1, 1), (9, 1), (12, 7), (20, 16), (50, 29), (60, 3)]


def make_batch(rows=ROWS, side="left", seed=0):
    """`input_ids`, `attention_mask`, `labels` of the answers, `query_lengths`, and the rows without padding."""
    ids = [random_ids(length, seed=seed + index) for index, (length, _) in enumerate(rows)]
    labels = [torch.cat([torch.full((query,), -100), row[query:]]) for row, (_, query) in zip(ids, rows, strict=True)]
    input_ids, attention_mask = pad(ids, side)
    batch = {"input_ids": input_ids, "attention_mask": attention_mask, "labels": pad(labels, side, value=-100)[0]}
    return batch, torch.tensor([query for _, query in rows]), ids


def reference_loss(model, ids, query_lengths, labels=None, bptt_chunks=None):
    """Sum over the rows' tokens, and their number."""
    total, count = 0, 0
    for index, row in enumerate(ids):
        targets = row if labels is None else labels[index]
        first = int(query_lengths[index])
        logits, _ = reference_logits(model, row, first, bptt_chunks)
        total = total + F.cross_entropy(logits[first - 1 : -1], targets[first:], reduction="sum")
        count += int((targets[first:] != -100).sum())
    return total, count


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize("side", ["left", "right"])
def test_warm_start_equals_the_base_within_the_slots(pair, side):
    base, model = pair
    rows = [(SLOTS, 9), (SLOTS, 1), (13, 12), (2, 1), (7, 7)]
    batch, query_lengths, ids = make_batch(rows, side)
    logits = model(batch["input_ids"], batch["attention_mask"], query_lengths=query_lengths).logits
    for row, mask, query, tokens in zip(logits, batch["attention_mask"], query_lengths, ids, strict=True):
        expected = base(tokens[None]).logits[0]
        assert_close(row[mask.bool()][query - 1 :], expected[query - 1 :], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right"])
def test_warm_start_equals_the_base_on_sinks_and_window(pair, side):
    base, model = pair
    batch, query_lengths, ids = make_batch([(70, 9), (61, 40), (64, 1), (20, 4)], side)
    logits = model(batch["input_ids"], batch["attention_mask"], query_lengths=query_lengths).logits
    for row, mask, query, tokens in zip(logits, batch["attention_mask"], query_lengths, ids, strict=True):
        assert_close(row[mask.bool()], window_logits(base, tokens, query), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("side", ["left", "right", "both"])
def test_logits_and_soft_prompt_equal_the_reference(tiny, side):
    batch, query_lengths, ids = make_batch(side=side)
    outputs = tiny(batch["input_ids"], batch["attention_mask"], query_lengths=query_lengths)
    for index, (row, query) in enumerate(zip(ids, query_lengths, strict=True)):
        logits, slots = reference_logits(tiny, row, int(query))
        mask = batch["attention_mask"][index].bool()
        assert_close(outputs.logits[index][mask], logits, atol=1e-4, rtol=1e-4)
        assert not outputs.logits[index][~mask].any() and not outputs.logits[index][mask][: query - 1].any()
        assert outputs.logits[index][mask][query - 1 :].any(dim=-1).all()
        assert_close(outputs.soft_prompt[index], as_soft_prompt(slots, 32).embeds[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "base, bptt_chunks",
    [("llama", None), ("llama", 1), ("llama", 2), ("llama", 3), ("llama-tied", None), ("mistral", None)],
)
def test_loss_and_gradients_equal_the_reference(bases, base, bptt_chunks):
    model = randomise_alpha(Phase15ForCausalLM.from_base(bases[base], **SIZES))
    batch, query_lengths, ids = make_batch()
    outputs = model(**batch, bptt_chunks=bptt_chunks)
    total, count = reference_loss(model, ids, query_lengths, bptt_chunks=bptt_chunks)
    assert_close(outputs.loss, total / count)
    assert outputs.chunk_tokens.sum() == count
    assert_close(outputs.chunk_losses.sum(), total.detach())
    expected = gradients(model, total / count)
    got = gradients(model, outputs.loss)
    assert got.keys() == expected.keys() == dict(model.named_parameters()).keys()
    for name in expected:
        assert expected[name].any(), name
        assert_close(got[name], expected[name], atol=1e-5, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}")


def test_bptt_chunks_stops_the_gradient(tiny):
    """A loss on the last chunk alone; of the query's tokens, which occur nowhere else, only the soft prompt knows."""
    query, answer = torch.arange(3, 8), random_ids(3 * CHUNK) % 20 + 30
    ids = torch.cat([query, answer])[None]
    labels = ids.clone()
    labels[:, : -CHUNK + 1] = -100  # the last chunk but its first token

    def query_gradient(bptt_chunks):
        loss = tiny(ids, labels=labels, query_lengths=torch.tensor([5]), bptt_chunks=bptt_chunks).loss
        return gradients(tiny, loss)["model.llm.model.embed_tokens.weight"][query].abs().sum()

    assert query_gradient(None) > 1e-3 and query_gradient(3) > 1e-3
    assert query_gradient(1) == 0 and query_gradient(2) == 0
    assert gradients(tiny, tiny(ids, labels=labels, bptt_chunks=1).loss)["model.hypernet.alpha"].any()


def test_padding_of_any_side_gives_the_same_loss_and_gradients(tiny):
    losses, grads = [], []
    for side in ("left", "right", "both"):
        batch, _, _ = make_batch(side=side)
        losses.append(tiny(**batch).loss)
        grads.append(gradients(tiny, losses[-1]))
    for loss, grad in zip(losses[1:], grads[1:], strict=True):
        assert_close(loss, losses[0])
        assert_close(grad, grads[0], atol=1e-6, rtol=1e-4)


def test_a_row_is_the_same_in_any_batch(tiny):
    batch, query_lengths, ids = make_batch()
    logits = tiny(batch["input_ids"], batch["attention_mask"], query_lengths=query_lengths).logits
    for index, row in enumerate(ids):
        alone = tiny(row[None], query_lengths=query_lengths[index : index + 1]).logits[0]
        assert_close(logits[index][batch["attention_mask"][index].bool()], alone, atol=1e-4, rtol=1e-4)


def test_chunk_losses_are_by_chunk_index(tiny):
    batch, query_lengths, ids = make_batch()
    outputs = tiny(**batch)
    num_chunks = 1 + max((length - query - 1) // CHUNK for length, query in ROWS)
    losses, tokens = torch.zeros(num_chunks), torch.zeros(num_chunks, dtype=torch.long)
    for row, query in zip(ids, query_lengths.tolist(), strict=True):
        logits, _ = reference_logits(tiny, row, query)
        for place in range(query, len(row)):
            losses[(place - query) // CHUNK] += F.cross_entropy(logits[place - 1], row[place])
            tokens[(place - query) // CHUNK] += 1
    assert torch.equal(outputs.chunk_tokens, tokens)
    assert_close(outputs.chunk_losses, losses.detach(), atol=1e-4, rtol=1e-4)
    assert not outputs.chunk_losses.requires_grad


def test_targets_with_holes(tiny):
    """-100 inside the answer is read, but is no target; a row without any target gives none."""
    batch, query_lengths, ids = make_batch([(30, 5), (21, 4), (12, 3)])
    batch["labels"][0, 9:20] = -100
    batch["labels"][1] = -100
    labels = [row[mask.bool()] for row, mask in zip(batch["labels"], batch["attention_mask"], strict=True)]
    total, count = reference_loss(tiny, ids, query_lengths, labels)
    assert count == (30 - 5 - 11) + 9
    assert_close(tiny(**batch).loss, total / count)


def test_labels_under_padding_are_no_targets(tiny):
    batch, _, _ = make_batch()
    expected = tiny(**batch).loss
    batch["labels"][batch["attention_mask"] == 0] = 7
    assert_close(tiny(**batch).loss, expected)


def test_skip_logits_gives_the_same_loss_and_gradients(tiny):
    batch, _, _ = make_batch()
    full, lean = tiny(**batch), tiny(**batch, skip_logits=True)
    assert lean.logits is None and lean.last_hidden_state is None and full.logits is not None
    assert_close(lean.loss, full.loss)
    assert_close(lean.chunk_losses, full.chunk_losses)
    assert torch.equal(lean.chunk_tokens, full.chunk_tokens)
    assert_close(gradients(tiny, lean.loss), gradients(tiny, full.loss), atol=1e-6, rtol=1e-4)


def test_last_hidden_state_is_what_the_logits_are_made_of(tiny):
    """In the same columns; without labels `skip_logits` leaves it alone, and calls no output layer."""
    batch, query_lengths, _ = make_batch()
    full, seen = tiny(**batch), []
    tiny.get_output_embeddings().register_forward_hook(lambda *_: seen.append(1))
    del batch["labels"]
    lean = tiny(**batch, query_lengths=query_lengths, skip_logits=True)
    assert not seen and lean.logits is None and torch.equal(lean.last_hidden_state, full.last_hidden_state)
    assert_close(tiny.get_output_embeddings()(lean.last_hidden_state), full.logits)
    last = tiny(**batch, query_lengths=query_lengths, logits_to_keep=3).last_hidden_state
    assert torch.equal(last, full.last_hidden_state[:, -3:])


def test_a_replaced_forward_reads_hidden_states_off_the_body(tiny):
    """TRL replaces `forward`, keeps the labels and calls `base_model`. That may not call the replaced one again."""
    batch, _, _ = make_batch()
    expected, calls = tiny(**batch).last_hidden_state, []

    def fused(fused_lm_head=False, labels=None, **kwargs):
        calls.append(fused_lm_head)
        return tiny.base_model(**kwargs)

    tiny.forward = fused
    outputs = tiny(**batch, fused_lm_head=True)
    assert calls == [True] and torch.equal(outputs.last_hidden_state, expected)


def test_a_replaced_forward_gets_every_call(tiny):
    batch, _, _ = make_batch()
    calls, forward = [], tiny.forward
    tiny.forward = lambda *args, **kwargs: (calls.append(kwargs), forward(*args, **kwargs))[1]
    tiny(batch["input_ids"])
    tiny(**batch, skip_logits=True)
    tiny(batch["input_ids"], skip_logits=True)
    assert len(calls) == 3


def test_the_body_is_the_model_without_its_head(tiny):
    """The same modules, adapters and all; no head is called."""
    batch, query_lengths, _ = make_batch()
    del batch["labels"]
    full, body, seen = tiny(**batch, query_lengths=query_lengths), tiny.base_model, []
    assert type(body) is Phase15Model and body.llm is tiny.llm and body.hypernet is tiny.hypernet
    tiny.get_output_embeddings().register_forward_hook(lambda *_: seen.append(1))
    outputs = body(**batch, query_lengths=query_lengths)
    assert not seen and torch.equal(outputs.last_hidden_state, full.last_hidden_state)
    assert torch.equal(outputs.soft_prompt, full.soft_prompt)
    asked = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    asked[:, -1] = True
    last = body(**batch, query_lengths=query_lengths, predict_mask=asked).last_hidden_state
    assert_close(last[:, -1], full.last_hidden_state[:, -1], atol=1e-5, rtol=1e-5)


def test_a_batch_is_aligned_and_checked_once(tiny, monkeypatch):
    """In one training forward: one sort, one cumulative sum of the mask, one check of the cache, one of a length."""
    batch, query_lengths, _ = make_batch()
    counts = Counter()

    def counted(owner, name):
        function = getattr(owner, name)

        def count(*args, **kwargs):
            counts[name] += 1
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, count)

    for owner, name in (
        (torch.Tensor, "argsort"),
        (torch.Tensor, "cumsum"),
        (modeling_phase15, "check_cache"),
        (modeling_phase15, "one_cache"),
        (batch_phase15, "check_batch"),
        (Phase15Config, "check_chunk_length"),
    ):
        counted(owner, name)
    tiny(**batch, query_lengths=query_lengths, chunk_length=CHUNK)
    assert set(counts.values()) == {1} and len(counts) == 6, counts


def test_the_head_is_called_on_targets_or_kept_columns_only(tiny):
    batch, query_lengths, _ = make_batch()
    seen = []
    tiny.get_output_embeddings().register_forward_hook(lambda module, arguments, output: seen.append(output))
    tiny(**batch, skip_logits=True)
    tiny(batch["input_ids"], batch["attention_mask"], query_lengths=query_lengths, logits_to_keep=1)
    assert [scores.numel() for scores in seen] == [int((batch["labels"] != -100).sum()) * VOCAB, len(ROWS) * VOCAB]


def test_the_llm_is_called_once_and_on_no_empty_chunk(tiny):
    batch, _, _ = make_batch([(40, 4), (9, 8), (5, 4)])
    seen = []
    tiny.llm.model.layers[-1].register_forward_hook(lambda module, arguments, output: seen.append(len(arguments[0])))
    tiny.llm.model.register_forward_hook(lambda module, arguments, output: seen.append(output.past_key_values))
    tiny(**batch, skip_logits=True)
    assert seen == [9 + 1 + 1, None]  # and keeps no keys and values


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("keep", [1, 3, torch.tensor([-1]), torch.tensor([0, 17, 30, 5])])
def test_logits_to_keep(tiny, side, keep):
    batch, query_lengths, _ = make_batch([(31, 5), (20, 4), (9, 3)], side)
    arguments = {**batch, "query_lengths": query_lengths}
    full, kept = tiny(**arguments), tiny(**arguments, logits_to_keep=keep)
    assert_close(kept.logits, full.logits[:, -keep:] if isinstance(keep, int) else full.logits[:, keep])
    assert_close(kept.loss, full.loss)


@pytest.mark.parametrize("as_type", [int, torch.tensor])
def test_num_items_in_batch_divides_the_sum(tiny, as_type):
    """Two micro-batches of unequal size accumulate to the loss and the gradients of the whole batch."""
    batch, _, _ = make_batch()
    count = int((batch["labels"] != -100).sum())
    parts = [{name: value[rows] for name, value in batch.items()} for rows in (slice(0, 8), slice(8, None))]
    loss = sum(tiny(**part, num_items_in_batch=as_type(count)).loss for part in parts)
    whole = tiny(**batch).loss
    assert_close(loss, whole)
    assert_close(gradients(tiny, loss), gradients(tiny, whole), atol=1e-6, rtol=1e-4)


def test_query_is_what_comes_before_the_first_label(tiny):
    batch, query_lengths, _ = make_batch([(31, 5), (20, 11), (9, 3)])
    by_labels = tiny(**batch)
    by_lengths = tiny(batch["input_ids"], batch["attention_mask"], query_lengths=query_lengths)
    assert_close(by_labels.logits, by_lengths.logits)


def test_query_lengths_override_labels(tiny):
    batch, _, ids = make_batch([(31, 5), (20, 11)])
    query_lengths = torch.tensor([2, 15])
    outputs = tiny(**batch, query_lengths=query_lengths)
    masked = [torch.where(torch.arange(len(row)) < first, -100, row) for row, first in zip(ids, (5, 15), strict=True)]
    total, count = reference_loss(tiny, ids, query_lengths, masked)
    assert_close(outputs.loss, total / count)  # a target inside the query is not predicted, nor counted


def test_without_a_query_it_is_a_causal_lm_over_any_text(tiny):
    batch, _, ids = make_batch()
    logits = tiny(batch["input_ids"], batch["attention_mask"]).logits
    for index, row in enumerate(ids):
        expected, _ = reference_logits(tiny, row, 1)
        assert_close(logits[index][batch["attention_mask"][index].bool()], expected, atol=1e-4, rtol=1e-4)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    outputs = tiny(batch["input_ids"], batch["attention_mask"], labels=labels)
    total, count = reference_loss(tiny, ids, [1] * len(ids))
    assert count == sum(len(row) - 1 for row in ids)
    assert_close(outputs.loss, total / count)


@pytest.mark.parametrize("query_length", [None, 1, 6, 17])
@pytest.mark.parametrize("trained", [False, True])
def test_no_logit_depends_on_a_later_token(tiny, query_length, trained):
    if not trained:
        torch.nn.init.zeros_(tiny.hypernet.alpha)
    length = 40
    ids = random_ids(1, length).repeat(length, 1)
    ids[range(length), range(length)] = (ids[range(length), range(length)] + 1) % VOCAB  # row t differs in token t
    query_lengths = None if query_length is None else torch.full((length,), query_length)
    logits = tiny(ids, query_lengths=query_lengths).logits
    original = tiny(random_ids(1, length), query_lengths=query_lengths if query_lengths is None else query_lengths[:1])
    change = (logits - original.logits).abs().amax(dim=-1)  # by changed token and position
    assert change.tril(-1).max() < 1e-5
    assert (change.diagonal()[(query_length or 1) - 1 :] > 1e-3).all()
    # and what has fallen out of the window is forgotten by the window alone, but not by a trained model
    last, gone = length - 1, range(2, length - SLOTS - CHUNK)
    assert len(gone) and (change[gone, last] > 1e-5).all() if trained else (change[gone, last] < 1e-5).all()


def splits_of(length, query, seed):
    """Sizes of calls: the query with some of the answer, then pieces of any size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = [query + int(torch.randint(0, 7, (), generator=generator))]
    while sum(sizes) < length:
        sizes.append(int(torch.randint(1, [2, 6, 12][seed % 3], (), generator=generator)))
    return [*sizes[:-1], length - sum(sizes[:-1])]


SPLITS = [[39], [8] + [1] * 31, [12, 4, 4, 19], *(splits_of(39, 8, seed) for seed in range(9))]


@pytest.mark.parametrize("sizes", SPLITS, ids=str)
def test_cached_form_in_any_split_equals_the_uncached(tiny, sizes):
    """Rows of queries 8, 3 and 1, padded on the left, and answers of 31 tokens each."""
    batch, query_lengths, _ = make_batch([(39, 8), (34, 3), (32, 1)])
    input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    expected = tiny(input_ids, attention_mask, query_lengths=query_lengths)
    cache, logits, start = Phase15Cache(tiny.config), [], 0
    for size in sizes:
        end = start + size
        outputs = tiny(
            input_ids[:, start:end],
            attention_mask[:, :end] if len(sizes) % 2 else attention_mask[:, start:end],  # both are allowed
            query_lengths=query_lengths if start == 0 else None,
            past_key_values=cache,
        )
        assert outputs.past_key_values is cache and cache.get_seq_length() == end
        logits.append(outputs.logits)
        start = end
    assert_close(torch.cat(logits, dim=1), expected.logits, atol=1e-4, rtol=1e-4)
    assert_close(outputs.soft_prompt, expected.soft_prompt, atol=1e-4, rtol=1e-4)


def test_cached_form_reads_a_long_query_in_segments(tiny):
    batch, query_lengths, _ = make_batch([(3 * QUERY + 2, 3 * QUERY + 2), (40, 40)])
    arguments = (batch["input_ids"], batch["attention_mask"])
    cached = tiny(*arguments, query_lengths=query_lengths, use_cache=True)
    assert isinstance(cached.past_key_values, Phase15Cache)
    assert_close(cached.logits, tiny(*arguments, query_lengths=query_lengths).logits, atol=1e-4, rtol=1e-4)


def test_a_new_cache_reads_the_row_as_the_query(tiny):
    """The obvious loop with a cache gives the logits of `generate`'s first token, padding on any side."""
    batch, _, _ = make_batch([(30, 30), (25, 25)])
    arguments = (batch["input_ids"], batch["attention_mask"])
    lengths = batch["attention_mask"].sum(dim=1)
    expected = tiny(*arguments, query_lengths=lengths)
    for cached in (tiny(*arguments, use_cache=True), tiny(*arguments, cache=Phase15Cache(tiny.config))):
        assert_close(cached.logits, expected.logits, atol=1e-4, rtol=1e-4)
        assert_close(cached.soft_prompt, expected.soft_prompt, atol=1e-4, rtol=1e-4)


def test_cached_logits_to_keep(tiny):
    batch, query_lengths, _ = make_batch([(30, 11), (25, 6)])
    arguments = (batch["input_ids"], batch["attention_mask"])
    full = tiny(*arguments, query_lengths=query_lengths).logits
    kept = tiny(*arguments, query_lengths=query_lengths, use_cache=True, logits_to_keep=2).logits
    assert_close(kept, full[:, -2:], atol=1e-4, rtol=1e-4)


def test_state_lives_in_the_cache_and_not_on_the_model(tiny):
    ids, other = random_ids(1, 20), random_ids(2, 33, seed=1)
    first = torch.tensor([1])
    before = tiny(ids).logits
    cache = tiny(ids[:, :13], query_lengths=first, use_cache=True).past_key_values
    tiny(other, use_cache=True)
    after = tiny(ids[:, 13:], past_key_values=cache).logits
    assert_close(after, before[:, 13:], atol=1e-4, rtol=1e-4)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_close(tiny(ids, query_lengths=first, past_key_values=cache).logits, before, atol=1e-4, rtol=1e-4)


def test_a_cache_says_what_it_is():
    cache = Phase15Cache(Phase15Config(text_config=BASES["llama"], **SIZES))
    assert (cache.get_seq_length(), cache.get_max_length(), cache.batch_size) == (0, -1, -1)
    assert cache.is_croppable is False
    for change in (lambda: cache.reorder_cache(torch.tensor([0, 0])), lambda: cache.batch_repeat_interleave(2)):
        change()  # of no rows
        assert cache.batch_size == -1
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(1)


def test_cache_rows_can_be_picked_and_repeated(tiny):
    batch, query_lengths, _ = make_batch([(22, 9), (17, 4), (14, 1)])  # a chunk ends after the change
    ids, mask = batch["input_ids"], batch["attention_mask"]
    expected = tiny(ids, mask, query_lengths=query_lengths).logits[:, 17:]
    for change, rows in (
        (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 2])), [2, 0, 2]),
        (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
        (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    ):
        cache = tiny(ids[:, :17], mask[:, :17], query_lengths=query_lengths, use_cache=True).past_key_values
        change(cache)
        assert cache.batch_size == len(rows)
        logits = tiny(ids[rows, 17:], mask[rows], past_key_values=cache).logits
        assert_close(logits, expected[rows], atol=1e-4, rtol=1e-4)


def test_output_as_a_tuple(tiny):
    batch, _, _ = make_batch()
    loss, logits = tiny(**batch, return_dict=False)[:2]
    expected = tiny(**batch)
    assert torch.equal(loss, expected.loss) and torch.equal(logits, expected.logits)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"input_ids": random_ids(5)}, r"`input_ids` must have shape \(batch_size, sequence_length\)"),
        ({"input_ids": None}, "`input_ids` must have shape"),
        ({"attention_mask": torch.ones(2, 5)}, r"`attention_mask` has shape \(2, 5\), but `input_ids` \(2, 6\)"),
        ({"attention_mask": torch.ones(1, 6)}, r"`attention_mask` has shape \(1, 6\)"),
        ({"labels": random_ids(2, 5)}, r"`labels` has shape \(2, 5\), but `input_ids` \(2, 6\)"),
        ({"attention_mask": torch.tensor([[1] * 6, [0] * 6])}, "Row 1 has 0 tokens"),
        ({"attention_mask": torch.tensor([[1] * 6, [0] * 2 + [2] * 4])}, "`attention_mask` holds 2, but"),
        ({"attention_mask": torch.tensor([[1.0] * 6, [0.0, -1e4] + [1.0] * 4])}, "`attention_mask` holds -10000.0"),
        ({"query_lengths": torch.tensor([3, 7])}, "Row 1 has 6 tokens and a query of 7"),
        ({"query_lengths": torch.tensor([0, 7])}, "Row 0 has 6 tokens and a query of 0"),
        ({"labels": torch.full((2, 6), -100), "skip_logits": True}, "no target"),
        ({"past_key_values": DynamicCache()}, "`cache`.* DynamicCache"),
        ({"labels": random_ids(2, 6), "use_cache": True}, "`labels` cannot be given with .*cache"),
        ({"use_cache": True, "query_lengths": torch.tensor([3, 4])}, r"rows have .*\[3, 2\] tokens"),
    ],
)
def test_arguments_that_cannot_work(tiny, arguments, message):
    with pytest.raises(ValueError, match=message):
        tiny(**{"input_ids": random_ids(2, 6), **arguments})


def test_rows_that_a_cache_cannot_hold_side_by_side(tiny):
    cache = tiny(random_ids(2, 6), use_cache=True).past_key_values
    with pytest.raises(ValueError, match=r"rows have .*\[3, 2\] tokens"):  # a right-padded answer
        tiny(random_ids(2, 3), torch.tensor([[1, 1, 1], [1, 1, 0]]), past_key_values=cache)
    with pytest.raises(ValueError, match="Row 1 has 0 tokens"):
        tiny(random_ids(2, 1), torch.tensor([[1], [0]]), past_key_values=cache)
    with pytest.raises(ValueError, match="Row 0 has 3 tokens and a query of -1"):
        tiny(random_ids(2, 3), query_lengths=torch.tensor([-1, -1]), past_key_values=cache)
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)


SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.mark.parametrize(
    "config, message",
    [
        (BloomConfig(**SMALL), "BloomForCausalLM cannot be a base of Phase15: .*takes no position_ids"),
        (MambaConfig(**SMALL), "MambaForCausalLM cannot be .* takes no position_ids"),
        (
            Gemma2Config(**SMALL, head_dim=16, num_key_value_heads=1, intermediate_size=32),  # caps its logits
            "Gemma2ForCausalLM cannot be .* its logits are ",
        ),
    ],
)
def test_a_base_that_takes_no_soft_prompt_is_refused_by_name(config, message, tmp_path):
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        Phase15ForCausalLM.from_base(tmp_path, **SIZES)


def test_from_base_keeps_weights_config_and_generation_config(bases, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(bases["qwen2"])
    base.generation_config.update(do_sample=True, temperature=0.3, eos_token_id=[4, 5], pad_token_id=4)
    base.save_pretrained(tmp_path)
    model = Phase15ForCausalLM.from_base(tmp_path, **SIZES)
    assert not model.training
    assert model.config.text_config.model_type == "qwen2"
    assert {name: getattr(model.config, name) for name in SIZES} == SIZES
    assert model.generation_config.eos_token_id == [4, 5] and model.generation_config.temperature == 0.3
    assert_close(model.llm.state_dict(), base.state_dict(), atol=0, rtol=0)


def enable_checkpointing(model):  # transformers 5.23 renamed it
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()


def test_gradient_checkpointing_changes_nothing(tiny):
    batch, _, _ = make_batch()
    calls = []
    tiny.llm.model.layers[-1].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    tiny.train()
    plain = tiny(**batch).loss
    expected = gradients(tiny, plain)
    assert len(calls) == 1
    enable_checkpointing(tiny)
    loss = tiny(**batch).loss
    got = gradients(tiny, loss)
    assert len(calls) == 3  # once more forward, and once in the backward pass
    assert_close(loss, plain)
    assert_close(got, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("frozen", ["llm", "hypernet"])
def test_a_frozen_half_still_lets_the_other_learn(tiny, frozen):
    getattr(tiny, frozen).requires_grad_(False)
    tiny.train()
    enable_checkpointing(tiny)
    batch, _, _ = make_batch()
    got = gradients(tiny, tiny(**batch).loss)
    assert {name.split(".")[1] for name in got} == {"llm", "hypernet"} - {frozen}
    assert all(gradient.any() for gradient in got.values())


def test_bfloat16(bases):
    model = randomise_alpha(Phase15ForCausalLM.from_base(bases["llama"], dtype=torch.bfloat16, **SIZES))
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    batch, query_lengths, _ = make_batch()
    outputs = model(**batch)
    grads = gradients(model, outputs.loss)
    assert outputs.logits.dtype == outputs.soft_prompt.dtype == torch.bfloat16 and outputs.loss.dtype == torch.float32
    assert all(gradient.isfinite().all() and gradient.any() for gradient in grads.values())
    exact = copy.deepcopy(model).float()(**batch)
    assert_close(outputs.loss, exact.loss, atol=0.05, rtol=0.02)
    model.hypernet.alpha.data.zero_()
    base = AutoModelForCausalLM.from_pretrained(bases["llama"], dtype=torch.bfloat16)
    ids = random_ids(2, SLOTS)
    assert_close(model(ids).logits, base(ids).logits, atol=0.1, rtol=0.1)


def test_autocast(tiny):
    batch, _, _ = make_batch()
    expected = tiny(**batch).loss
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = tiny(**batch).loss
    assert_close(loss, expected, atol=0.05, rtol=0.02)
    assert all(gradient.isfinite().all() for gradient in gradients(tiny, loss).values())


@pytest.mark.parametrize("argument", ["dtype", "torch_dtype"])
@pytest.mark.parametrize("value", [torch.bfloat16, torch.float32, "auto", "bfloat16"])
def test_dtype_argument(tiny, argument, value, tmp_path):
    tiny.to(torch.bfloat16).save_pretrained(tmp_path)
    loaded = Phase15ForCausalLM.from_pretrained(tmp_path, **{argument: value})
    expected = torch.float32 if value == torch.float32 else torch.bfloat16
    assert {tensor.dtype for tensor in loaded.state_dict().values()} == {expected}
    assert loaded.dtype == expected


def test_device_map_auto(tiny, bases, tmp_path):
    tiny.save_pretrained(tmp_path)
    ids = random_ids(2, 30)
    loaded = Phase15ForCausalLM.from_pretrained(tmp_path, device_map="auto")
    assert_close(loaded(ids.to(loaded.device)).logits.cpu(), tiny(ids).logits, atol=1e-3, rtol=1e-3)
    model = Phase15ForCausalLM.from_base(bases["llama"], device_map="auto", **SIZES)
    base = AutoModelForCausalLM.from_pretrained(bases["llama"])
    ids = ids[:, :SLOTS]
    assert_close(model(ids.to(model.device)).logits.cpu(), base(ids).logits, atol=1e-3, rtol=1e-3)


def test_device_map_never_splits_the_hypernet(tiny):
    """It adds the outputs of its parts, so these must be on one device; the LLM may be spread by layers."""
    total = tiny.num_parameters() * 4
    for share in (7, 8, 9, 10):
        device_map = infer_auto_device_map(
            tiny, {"cpu": total * share // 10, "disk": total}, no_split_module_classes=list(tiny._no_split_modules)
        )
        assert len(device_map) > 1 and not [name for name in device_map if name.startswith("model.hypernet.")]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_attention_implementations_agree(tiny, tmp_path, implementation):
    tiny.save_pretrained(tmp_path)
    batch, _, _ = make_batch()
    loaded = Phase15ForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
    assert loaded.llm.config._attn_implementation == implementation
    assert_close(loaded(**batch).loss, tiny(**batch).loss)


def test_attention_implementations_are_the_bases(tiny):
    tiny.set_attn_implementation("flex_attention")
    assert tiny.llm.config._attn_implementation == "flex_attention" and tiny.is_backend_compatible()


def test_loading_initialises_nothing_that_the_file_fills(tiny, tmp_path, monkeypatch):
    tiny.save_pretrained(tmp_path)
    initialised = []
    monkeypatch.setattr(torch.nn.init, "kaiming_uniform_", lambda weight, *_, **__: initialised.append(weight))
    Phase15ForCausalLM.from_pretrained(tmp_path)
    assert not initialised


@pytest.mark.parametrize("implementation", ["flex_attention", "flash_attention_2"])
def test_the_models_class_refuses_no_attention_implementation(tiny, tmp_path, implementation):
    """A class without the library's flag for it is a ValueError; an ImportError says that a package is missing."""
    tiny.save_pretrained(tmp_path)
    with contextlib.suppress(ImportError):
        loaded = Phase15ForCausalLM.from_pretrained(tmp_path, attn_implementation=implementation)
        assert loaded.llm.config._attn_implementation == implementation


@pytest.mark.parametrize("base", ["llama", "llama-tied"])
def test_resize_token_embeddings(bases, base, tmp_path):
    model = randomise_alpha(Phase15ForCausalLM.from_base(bases[base], **SIZES))
    ids = random_ids(2, 30)
    before = model(ids).logits
    model.resize_token_embeddings(VOCAB + 5)
    after = model(ids).logits
    assert model.config.text_config.vocab_size == model.llm.config.vocab_size == VOCAB + 5
    assert_close(after[..., :VOCAB], before)
    model.save_pretrained(tmp_path)
    loaded = Phase15ForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(ids).logits, after)
    loaded(torch.full((1, 4), VOCAB + 4))


def test_hidden_states_and_attentions_are_the_llms(tiny):
    tiny.set_attn_implementation("eager")
    outputs = tiny(random_ids(2, 10), output_hidden_states=True, output_attentions=True)
    assert len(outputs.hidden_states) == BASES["llama"].num_hidden_layers + 1
    assert len(outputs.attentions) == BASES["llama"].num_hidden_layers
    ids = random_ids(1, 1 + CHUNK + 2)
    outputs = tiny(ids, query_lengths=torch.tensor([1]), use_cache=True, output_hidden_states=True)
    assert outputs.hidden_states[0].shape[1] == 2  # of its last call alone


def test_the_first_and_the_last_id_of_the_vocabulary_are_ids(tiny):
    ids = torch.tensor([[VOCAB - 1, 0, VOCAB - 1, 0]])
    outputs = tiny(ids, labels=ids)
    assert int(outputs.chunk_tokens.sum()) == 3 and outputs.loss.isfinite()
    for labels in (False, True):
        for wrong in (-1, VOCAB):
            bad = torch.tensor([[0, 1, 2, wrong]])
            given = {"input_ids": ids, "labels": bad} if labels else {"input_ids": bad}
            with pytest.raises(
                ValueError, match=f"Row 0 of `.*` holds {wrong} at position 3, but ids must be from 0 to {VOCAB - 1}"
            ):
                tiny(**given)


def test_from_pretrained_behaves_as_the_librarys(tiny, tmp_path):
    """It warns of weights that are missing, left over or misshapen; phase15/loading.py refuses them."""
    tiny.save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    loaded, info = Phase15ForCausalLM.from_pretrained(pretrained_model_name_or_path=tmp_path, output_loading_info=True)
    assert torch.equal(loaded.hypernet.alpha, tiny.hypernet.alpha) and not any(info.values())
    weights = load_file(path)
    del weights["model.hypernet.alpha"]
    save_file(weights | {"more": torch.ones(1)}, path, {"format": "pt"})
    loaded, info = Phase15ForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert set(info["missing_keys"]) == {"model.hypernet.alpha"} and set(info["unexpected_keys"]) == {"more"}
    assert not loaded.hypernet.alpha.any()


def test_from_base_gives_the_loading_info_of_the_base(bases):
    model, info = Phase15ForCausalLM.from_base(bases["llama"], output_loading_info=True, **SIZES)
    assert isinstance(model, Phase15ForCausalLM) and not any(info.values())


def test_the_output_of_the_body(tiny):
    ids = random_ids(2, 9)
    outputs, values = tiny.base_model(ids), tiny.base_model(ids, return_dict=False)
    assert list(outputs) == ["last_hidden_state", "soft_prompt", "prediction"]
    assert isinstance(values, tuple) and all(map(torch.equal, values, outputs.values()))
