# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Properties of every shape of the model, every batch and every split into calls, on examples that hypothesis makes up.

The examples are the same in every run. `HYPOTHESIS_PROFILE=explore` tries fifty times as many new ones. An example
that has failed stays as an `@example`.

Everything is computed in float64, except the loss and the scores by which a token is picked: they are float32 in any
model. The library's norms compute in float32, so the LLM gets torch's.
"""

import os
import random
import tempfile
from collections import deque
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from reference import (
    aligned,
    as_soft_prompt,
    reference_delta,
    reference_first_layers,
    reference_logits,
    reference_read,
    reference_step,
)
from test_decoding import Collector
from test_generation import reference_greedy, reference_turn
from torch import nn
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from phase15.model.configuration_phase15 import Phase15Config
from phase15.model.modeling_phase15 import Phase15ForCausalLM
from phase15.model.recursion_phase15 import SoftPrompt, carry
from phase15.model.state_phase15 import Phase15State


COMMON = {"deadline": None, "print_blob": True, "suppress_health_check": [HealthCheck.too_slow]}
settings.register_profile("repeatable", derandomize=True, database=None, max_examples=20, **COMMON)
settings.register_profile("explore", max_examples=1000, **COMMON)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

VOCAB, HIDDEN, PAD = 23, 16, 2  # beam search fills rows with the end token where padding's id is 0
CLOSE = {"atol": 1e-9, "rtol": 1e-9}


class Shape(NamedTuple):
    """The shape of a model. `build` makes the model, with random weights where training would have changed them."""

    slots: int = 5
    sinks: int = 2
    chunk: int = 3
    segment: int = 4
    llm: type = LlamaConfig
    llm_layers: int = 1
    kv_heads: int = 2
    tied: bool = False
    layers: int = 1
    reads: int = 0
    heads: int = 2
    alpha: float = 1.0
    seed: int = 0

    def build(self, dtype: torch.dtype = torch.float64) -> Phase15ForCausalLM:
        text_config = self.llm(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=12,
            num_hidden_layers=self.llm_layers,
            num_attention_heads=4,
            num_key_value_heads=self.kv_heads,
            tie_word_embeddings=self.tied,
            initializer_range=0.5,
            bos_token_id=1,
            eos_token_id=None,
            **({"sliding_window": self.slots + self.chunk} if self.llm is MistralConfig else {}),
        )
        config = Phase15Config(
            text_config=text_config,
            num_soft_tokens=self.slots,
            num_sink_tokens=self.sinks,
            chunk_length=self.chunk,
            max_query_length=self.segment,
            hypernet_hidden_size=8,
            hypernet_num_hidden_layers=self.layers,
            hypernet_reads_layers=self.reads,
            hypernet_num_attention_heads=self.heads,
            hypernet_intermediate_size=12,
            initializer_range=0.5,
        )
        torch.manual_seed(self.seed)
        model = Phase15ForCausalLM(config).to(dtype).eval()
        with torch.no_grad():
            model.hypernet.alpha.normal_(std=self.alpha)
            model.hypernet.embedding_scale.uniform_(0.2, 2.0)
        return exact(model)


def exact(model: Phase15ForCausalLM) -> Phase15ForCausalLM:
    """Gives the LLM norms that compute in the weights' dtype."""
    for module in [*model.llm.modules()]:
        for name, norm in module.named_children():
            if hasattr(norm, "variance_epsilon"):
                setattr(module, name, nn.RMSNorm(HIDDEN, norm.variance_epsilon, dtype=norm.weight.dtype))
                getattr(module, name).weight = norm.weight
    return model


@st.composite
def shapes(draw) -> Shape:
    slots = draw(st.integers(2, 7))
    return Shape(
        slots=slots,
        sinks=draw(st.integers(1, slots - 1)),
        chunk=draw(st.integers(1, 5)),
        segment=draw(st.integers(1, 7)),
        llm=draw(st.sampled_from([LlamaConfig, MistralConfig, Qwen2Config])),
        llm_layers=draw(st.integers(1, 2)),
        kv_heads=draw(st.sampled_from([1, 2, 4])),
        tied=draw(st.booleans()),
        layers=draw(st.integers(1, 2)),
        reads=draw(st.integers(0, 1)),
        heads=draw(st.sampled_from([1, 2, 4])),
        alpha=draw(st.sampled_from([1.0, 0.0, 5.0])),
        seed=draw(st.integers(0, 9)),
    )


class Padding(NamedTuple):
    """`lay` makes a padded batch of rows."""

    side: str = "left"
    extra: int = 0  # columns of padding in every row
    seed: int = 0

    def lay(self, rows: list[torch.Tensor]) -> tuple[torch.LongTensor, torch.LongTensor, list[torch.LongTensor]]:
        """`input_ids` with ordinary ids for padding, `attention_mask`, and the columns of each row's tokens."""
        generator, width = random.Random(self.seed), max(map(len, rows)) + self.extra
        ids = torch.randint(0, VOCAB, (len(rows), width), generator=torch.Generator().manual_seed(self.seed))
        mask, columns = torch.zeros_like(ids), []
        for index, row in enumerate(rows):
            gap = width - len(row)
            first = {"left": gap, "right": 0, "both": generator.randint(0, gap)}.get(self.side)
            positions = (
                range(first, first + len(row))
                if first is not None
                else sorted(generator.sample(range(width), len(row)))
            )
            columns.append(torch.tensor([*positions], dtype=torch.long))
            ids[index, columns[-1]], mask[index, columns[-1]] = row, 1
        return ids, mask, columns


SIDES = ["left", "right", "both", "scattered"]
paddings = st.builds(Padding, st.sampled_from(SIDES), st.integers(0, 3), st.integers(0, 9))
left_paddings = st.builds(Padding, st.just("left"), st.integers(0, 3), st.integers(0, 9))
queries = st.integers(1, 20)
rows_of_any_length = st.lists(st.tuples(queries, st.integers(0, 17)), min_size=1, max_size=4)  # (query, answer) tokens


def ids_of(length: int, *seed: int) -> torch.LongTensor:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(hash(seed) % 2**31))


def assert_close(got, expected, **kwargs):
    torch.testing.assert_close(got, expected, **CLOSE | kwargs)


# the recursion


@given(
    slots=st.integers(2, 9),
    sinks=st.integers(1, 8),
    messages=st.lists(st.lists(st.integers(0, 25), min_size=3, max_size=3), min_size=1, max_size=8),
    extra=st.integers(0, 3),
)
def test_carry_equals_a_deque(slots, sinks, messages, extra):
    sinks = min(sinks, slots - 1)
    state = SoftPrompt(torch.zeros(3, slots, 1), torch.zeros(3, dtype=torch.long))
    kept, recent = [[], [], []], [deque(maxlen=slots - sinks) for _ in range(3)]
    number = 0
    for lengths in messages:
        tokens = torch.full((3, max(lengths) + extra, 1), torch.nan)  # padding must not matter
        for row, length in enumerate(lengths):
            for position in range(length):
                tokens[row, position] = number = number + 1
                (kept if len(kept[row]) < sinks else recent)[row].append(float(number))
        state = carry(state, tokens.nan_to_num(-1e9), torch.tensor(lengths), sinks)
        for row in range(3):
            held = [*kept[row], *recent[row]]
            assert state.embeds[row, :, 0].tolist() == held + [0.0] * (slots - len(held))
            assert state.mask[row].tolist() == [True] * len(held) + [False] * (slots - len(held))


@given(
    shape=shapes(),
    rows=st.lists(st.tuples(st.integers(0, 7), st.integers(0, 7)), min_size=1, max_size=4),
    extra=st.integers(0, 3),
)
def test_delta_equals_one_row_without_padding(shape, rows, extra):
    """`rows`: the number of used slots and of new tokens of each row."""
    model = shape.build()
    rows = [(min(used, shape.slots), min(new, max(shape.slots, shape.segment, shape.chunk))) for used, new in rows]
    width = min(max(new for _, new in rows) + extra, max(shape.slots, shape.segment, shape.chunk))
    tokens, old = torch.randn(len(rows), width, HIDDEN).double(), torch.randn(len(rows), shape.slots, HIDDEN).double()
    used, new = torch.tensor(rows).T
    stepped = model.step(SoftPrompt(old, used), tokens, new)
    carried = carry(SoftPrompt(old, used), tokens, new, shape.sinks)
    for row, (used, new) in enumerate(rows):
        if not new:
            assert torch.equal(stepped.embeds[row], old[row]) and stepped.length[row] == used
            continue
        slots = carried.embeds[row, : carried.length[row]]
        read = reference_first_layers(model, tokens[row, :new])
        delta = reference_delta(model.hypernet, slots, old[row, :used], tokens[row, :new], read)
        assert_close(stepped.embeds[row, : len(slots)], slots + delta)
        assert not stepped.embeds[row, len(slots) :].any()


# the training form


def targets_of(ids: list, kind: str, holes: float, seed: int) -> list[torch.LongTensor]:
    """Labels with holes. `kind` "own": the ids of the rows; otherwise any ids."""
    generator = torch.Generator().manual_seed(seed)
    return [
        (row if kind == "own" else torch.randint(0, VOCAB, row.shape, generator=generator)).masked_fill(
            torch.rand(row.shape, generator=generator) < holes, -100
        )
        for row in ids
    ]


def naive_loss(model, logits: list, queries: list, labels: list) -> tuple[torch.Tensor, torch.Tensor]:
    """Summed cross-entropy, and number of targets, by index of the chunk."""
    num_chunks = (
        max(len(row) - query for row, query in zip(labels, queries, strict=True)) // model.config.chunk_length + 1
    )
    losses, counts = [torch.zeros(())] * num_chunks, torch.zeros(num_chunks, dtype=torch.long)
    for row, query, targets in zip(logits, queries, labels, strict=True):
        for position in range(query, len(targets)):
            if targets[position] != -100:
                index = (position - query) // model.config.chunk_length
                losses[index] = losses[index] - row[position - 1].float().log_softmax(dim=0)[targets[position]]
                counts[index] += 1
    return torch.stack(losses), counts


@given(
    shape=shapes(),
    rows=rows_of_any_length,
    padding=paddings,
    keep=st.one_of(st.just(0), st.integers(1, 9), st.lists(st.integers(0, 25), min_size=1, max_size=4, unique=True)),
    bptt_chunks=st.sampled_from([None, 1, 2]),
)
@example(
    shape=Shape(), rows=[(3, 2), (1, 1)], padding=Padding("right", extra=2), keep=1, bptt_chunks=None
)  # all padding
@example(shape=Shape(), rows=[(7, 2), (7, 0)], padding=Padding(), keep=[3, 5], bptt_chunks=None)  # inside the queries
def test_logits_equal_one_row_one_chunk_at_a_time(shape, rows, padding, keep, bptt_chunks):
    model = shape.build()
    ids = [ids_of(sum(row), shape.seed, index) for index, row in enumerate(rows)]
    input_ids, mask, columns = padding.lay(ids)
    if isinstance(keep, list):
        keep = torch.tensor(sorted({column % input_ids.shape[1] for column in keep}))
    queries = torch.tensor([query for query, _ in rows])
    with torch.no_grad():
        outputs = model(input_ids, mask, query_lengths=queries, logits_to_keep=keep, bptt_chunks=bptt_chunks)
        expected = torch.zeros(*input_ids.shape, VOCAB, dtype=torch.float64)
        for index, (query, _) in enumerate(rows):
            expected[index, columns[index]], slots = reference_logits(model, ids[index], query)
            if isinstance(keep, int) and keep == 0:
                assert_close(outputs.soft_prompt[index], as_soft_prompt(slots, HIDDEN, shape.slots).embeds[0].double())
    kept = slice(-keep, None) if isinstance(keep, int) else keep
    assert_close(outputs.logits, expected[:, kept])
    assert_close(model.get_output_embeddings()(outputs.last_hidden_state), outputs.logits)


@given(
    shape=shapes(),
    rows=rows_of_any_length,
    padding=paddings,
    kind=st.sampled_from(["own", "any"]),
    holes=st.sampled_from([0.0, 0.3, 0.9]),
    says=st.sampled_from(["labels", "query_lengths"]),
    skip_logits=st.booleans(),
    bptt_chunks=st.sampled_from([None, 1, 2, 3]),
    divisor=st.sampled_from([None, 7]),
)
def test_loss_and_gradients_are_the_sums_over_rows_and_chunks(
    shape, rows, padding, kind, holes, says, skip_logits, bptt_chunks, divisor
):
    model = shape.build()
    ids = [ids_of(sum(row), shape.seed, index) for index, row in enumerate(rows)]
    queries, labels = [query for query, _ in rows], targets_of(ids, kind, holes, padding.seed)
    if says == "labels":
        labels = [row.index_fill(0, torch.arange(query), -100) for row, query in zip(labels, queries, strict=True)]
        queries = [next((i for i, label in enumerate(row.tolist()) if label != -100), len(row)) for row in labels]
    input_ids, mask, columns = padding.lay(ids)
    batch_labels = torch.full_like(input_ids, 5)  # labels under padding are no targets
    for index, row in enumerate(labels):
        batch_labels[index, columns[index]] = row
    logits = [reference_logits(model, row, query, bptt_chunks)[0] for row, query in zip(ids, queries, strict=True)]
    losses, counts = naive_loss(model, logits, queries, labels)
    arguments = {"skip_logits": skip_logits, "bptt_chunks": bptt_chunks, "num_items_in_batch": divisor}
    if says == "query_lengths":
        arguments["query_lengths"] = torch.tensor(queries)
    if not counts.sum():
        if skip_logits:
            with pytest.raises(ValueError, match="no target"):
                model(input_ids, mask, batch_labels, **arguments)
        return
    outputs = model(input_ids, mask, batch_labels, **arguments)
    expected = losses.sum() / (divisor or counts.sum())
    assert_close(outputs.loss, expected, rtol=1e-5, atol=1e-6)
    used = len(outputs.chunk_tokens)
    assert torch.equal(outputs.chunk_tokens, counts[:used]) and not counts[used:].any()
    assert_close(outputs.chunk_losses, losses[:used].detach(), rtol=1e-5, atol=1e-5)
    weights = list(model.parameters())
    got, naive = (torch.autograd.grad(loss, weights, allow_unused=True) for loss in (outputs.loss, expected))
    for a, b in zip(got, naive, strict=True):
        a, b = (torch.zeros(()) if gradient is None else gradient for gradient in (a, b))
        assert (a - b).abs().max() <= 1e-5 * max(1.0, float(b.abs().max()))


@given(shape=shapes(), rows=rows_of_any_length, paddings=st.tuples(paddings, paddings), seed=st.integers(0, 9))
def test_a_row_is_the_same_in_any_company_at_any_position(shape, rows, paddings, seed):
    model, generator = shape.build(), random.Random(seed)
    ids = [ids_of(sum(row), shape.seed, index) for index, row in enumerate(rows)]
    company = [(ids_of(sum(row), seed, 99), row) for row in rows[:2]]
    others = [(row, sizes, None) for row, sizes in company]
    placed = [(row, sizes, index) for index, (row, sizes) in enumerate(zip(ids, rows, strict=True))]
    second = generator.sample(placed + others, len(placed + others))
    results = []
    for batch, padding in ((placed, paddings[0]), (second, paddings[1])):
        input_ids, mask, columns = padding.lay([row for row, _, _ in batch])
        labels = torch.full_like(input_ids, -100)
        for index, (row, (query, _), _) in enumerate(batch):
            labels[index, columns[index][query:]] = row[query:]
        queries = torch.tensor([query for _, (query, _), _ in batch])
        with torch.no_grad():
            logits = model(input_ids, mask, query_lengths=queries).logits
        results.append({index: logits[i, columns[i]] for i, (_, _, index) in enumerate(batch) if index is not None})
    for index in range(len(rows)):
        assert_close(results[1][index], results[0][index])


@given(shape=shapes(), rows=rows_of_any_length, padding=paddings, share=st.floats(0, 1), cut=st.booleans())
def test_no_logit_sees_the_future(shape, rows, padding, share, cut):
    """Gives every row another future: other tokens from some position on, or none."""
    model = shape.build()
    ids = [ids_of(sum(row), shape.seed, index) for index, row in enumerate(rows)]
    ends = [query + int(share * answer) for query, answer in rows]
    other = [
        row[:end] if cut else torch.cat([row[:end], (row[end:] + 1) % VOCAB])
        for row, end in zip(ids, ends, strict=True)
    ]
    queries, logits = torch.tensor([query for query, _ in rows]), []
    for batch in (ids, other):
        input_ids, mask, columns = padding.lay(batch)
        with torch.no_grad():
            got = model(input_ids, mask, query_lengths=queries).logits
        logits.append([row[positions] for row, positions in zip(got, columns, strict=True)])
    for now, then, end in zip(*logits, ends, strict=True):
        assert_close(then[:end], now[:end])


# the cached form


@given(
    shape=shapes(),
    queries=st.lists(queries, min_size=1, max_size=4),
    calls=st.lists(st.integers(1, 9), min_size=0, max_size=6),
    prefilled=st.integers(0, 9),
    padding=paddings,
    whole_mask=st.booleans(),
    reorders=st.booleans(),
)
def test_any_split_into_calls_equals_one_call_without_a_cache(
    shape, queries, calls, prefilled, padding, whole_mask, reorders
):
    """
    The first call takes the queries and `prefilled` tokens of the answers, the others take `calls` tokens each. Rows
    may be reordered in between.
    """
    model, cache, generator = shape.build(), None, random.Random(padding.seed)
    length = prefilled + sum(calls)
    rows = [(query, ids_of(query + length, shape.seed, index)) for index, query in enumerate(queries)]
    with torch.no_grad():
        expected = [reference_logits(model, row, query)[0] for query, row in rows]
    order, masks, done = [*range(len(rows))], None, 0
    for size in [prefilled, *calls]:
        first = cache is None
        pieces = [
            rows[i][1][: rows[i][0] + prefilled] if first else rows[i][1][rows[i][0] + done :][:size] for i in order
        ]
        input_ids, mask, columns = padding.lay(pieces)
        masks = mask if first else torch.cat([masks, mask], dim=1)
        with torch.no_grad():
            outputs = model(
                input_ids,
                masks if whole_mask else mask,
                query_lengths=torch.tensor(queries) if first else None,
                past_key_values=cache,
                use_cache=True,
            )
        cache, start, done = outputs.past_key_values, done, done + size
        assert cache.get_seq_length() == masks.shape[1] and cache.chunk.shape[1] == done % shape.chunk
        for index, row in enumerate(order):
            begin = 0 if first else queries[row] + start
            assert_close(outputs.logits[index, columns[index]], expected[row][begin : queries[row] + done])
        if reorders:
            chosen = torch.tensor([generator.randrange(len(order)) for _ in order])
            cache.reorder_cache(chosen)
            order, masks = [order[i] for i in chosen], masks[chosen]


# generation


def end_tokens(free: list[list[int]], how: str) -> list[int] | None:
    """End tokens: none, one that ends the first row in the middle of its answer, or some that end every row."""
    return {"never": None, "first": [free[0][len(free[0]) // 2]], "all": sorted({row[-1] for row in free})}[how]


def until_end(row: list[int], eos: list[int] | None) -> list[int]:
    return row[: next((index + 1 for index, token in enumerate(row) if token in (eos or [])), len(row))]


HOW = {
    "cached": {},
    "without a cache": {"use_cache": False},
    "compiled": {"compile": True},
    "beams of size 1": {"custom_generate": Phase15ForCausalLM._beam_search, "early_stopping": True},
}


@given(
    shape=shapes(),
    queries=st.lists(queries, min_size=1, max_size=3),
    padding=left_paddings,
    length=st.integers(1, 17),
    how=st.sampled_from([*HOW]),
    eos=st.sampled_from(["never", "first", "all"]),
)
def test_greedy_search_equals_one_row_one_token_at_a_time(shape, queries, padding, length, how, eos):
    model = shape.build()
    prompts = [ids_of(query, shape.seed, index) for index, query in enumerate(queries)]
    with torch.no_grad():
        free = [reference_greedy(model, reference_read(model, [], prompt), length)[0] for prompt in prompts]
    eos = end_tokens(free, eos)
    input_ids, mask, _ = padding.lay(prompts)
    streamer = Collector() if len(prompts) == 1 and how != "beams of size 1" else None
    with torch.compiler.set_stance("force_eager"):
        output = model.generate(
            input_ids,
            attention_mask=mask,
            max_new_tokens=length,
            eos_token_id=eos,
            pad_token_id=PAD,
            streamer=streamer,
            **HOW[how],
        )
    expected = [until_end(row, eos) for row in free]
    width = max(map(len, expected))
    assert output[:, input_ids.shape[1] :].tolist() == [row + [PAD] * (width - len(row)) for row in expected]
    if streamer is not None:
        assert sum(streamer.pieces, []) == output[0].tolist() and streamer.ended


MODES = {
    "sample": {"do_sample": True, "top_k": 0},
    "warped": {"do_sample": True, "temperature": 0.7, "top_k": 9, "top_p": 0.9, "min_p": 0.01},
    "sample-2": {"do_sample": True, "num_return_sequences": 2},
    "beam": {"num_beams": 3},
    "beam-2-of-4": {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.4},
    "beam-sample": {"num_beams": 2, "do_sample": True},
}


@given(
    shape=shapes(),
    queries=st.lists(queries, min_size=1, max_size=3),
    padding=left_paddings,
    length=st.integers(1, 11),
    mode=st.sampled_from([*MODES]),
    eos=st.sampled_from([None, 3, [4, 5]]),
    seed=st.integers(0, 9),
)
def test_sampling_and_beams_are_the_same_without_a_cache(shape, queries, padding, length, mode, eos, seed):
    """
    Sampling with the same seed is the same with a cache, and on static buffers that of continuous batching; beams of
    one row are those of a batch.
    """
    model = shape.build()
    prompts = [ids_of(query, shape.seed, index) for index, query in enumerate(queries)]
    input_ids, mask, _ = padding.lay(prompts)
    settings = {"max_new_tokens": length, "eos_token_id": eos, "pad_token_id": PAD, **MODES[mode]}

    def answers(input_ids=input_ids, mask=mask, **kwargs):
        torch.manual_seed(seed)
        with torch.compiler.set_stance("force_eager"):
            output = model.generate(input_ids, attention_mask=mask, **settings, **kwargs)
        return output[:, input_ids.shape[1] :].tolist()

    expected = answers(use_cache=False)
    assert answers() == expected
    if "beam" not in mode:
        torch.manual_seed(seed)
        outputs = model.generate_batch([prompt.tolist() for prompt in prompts], compile=False, **settings)
        rows = [output.generated_tokens for output in outputs.values()]
        width = max(map(len, rows))
        assert answers(compile=True) == [row + [PAD] * (width - len(row)) for row in rows]
    elif mode != "beam-sample":
        number = settings.get("num_return_sequences", 1)
        for index, prompt in enumerate(prompts):
            alone = answers(prompt[None], torch.ones_like(prompt[None]))
            together = expected[index * number : (index + 1) * number]
            assert [row + [PAD] * (len(together[0]) - len(row)) for row in alone] == together


@given(
    shape=shapes(),
    turns=st.lists(
        st.tuples(st.lists(st.integers(0, 12), min_size=2, max_size=2), st.integers(1, 9), st.booleans()),
        min_size=1,
        max_size=3,
    ),
    rows=st.integers(1, 2),
    padding=left_paddings,
)
@example(shape=Shape(), turns=[([11, 0], 1, False), ([9, 0], 8, False)], rows=2, padding=Padding())
def test_a_conversation_equals_one_row_one_token_at_a_time(shape, turns, rows, padding):
    """
    A turn holds the lengths of the messages, the length of the answers, and whether generation is compiled. A message
    is read together with the last token of the answer before it. If no row has a message, the answer goes on. If only
    some rows have one, the turn is refused.
    """
    model, cache = shape.build(), None
    sequences, mask = torch.empty(rows, 0, dtype=torch.long), torch.empty(rows, 0, dtype=torch.long)
    states = [([], torch.tensor([], dtype=torch.long))] * rows  # slots, tokens of the open chunk
    for turn, (lengths, length, compile) in enumerate(turns):
        if turn == 0:
            lengths = [number + 1 for number in lengths]
        messages = [ids_of(number, shape.seed, turn, row) for row, number in enumerate(lengths[:rows])]
        goes_on, has_gap = not any(map(len, messages)), len({len(message) > 0 for message in messages}) > 1
        ids, new_mask, _ = (Padding() if goes_on else padding).lay(messages)
        sequences, mask = torch.cat([sequences, ids], dim=1), torch.cat([mask, new_mask], dim=1)
        refusal = pytest.raises(ValueError, match="ends in padding") if has_gap else nullcontext()
        with torch.compiler.set_stance("force_eager"), refusal:
            output = model.generate(
                sequences,
                attention_mask=mask,
                past_key_values=cache,
                max_new_tokens=length,
                pad_token_id=PAD,
                return_dict_in_generate=True,
                compile=True if compile and not goes_on else None,
            )
        if has_gap:
            return
        answers = output.sequences[:, sequences.shape[1] :]
        for row, (slots, chunk) in enumerate(states):
            if goes_on:
                answer, slots, chunk = reference_greedy(model, slots, length, chunk)
            else:
                answer, slots, chunk = reference_turn(model, slots, chunk, messages[row], length)
            states[row] = (slots, chunk)
            assert answers[row].tolist() == answer
        sequences, cache = output.sequences, output.past_key_values
        mask = torch.cat([mask, torch.ones_like(answers)], dim=1)


# states


@given(
    shape=shapes(),
    rows=st.lists(st.tuples(st.integers(1, 3), queries), min_size=1, max_size=3),  # segments of a text, question
    padding=left_paddings,
    length=st.integers(1, 11),
    mode=st.sampled_from(["greedy", "compiled", "uncached", *MODES]),
    eos=st.sampled_from([None, 3, [4, 5]]),
    seed=st.integers(0, 9),
)
def test_any_split_into_read_and_generate_equals_one_call(shape, rows, padding, length, mode, eos, seed):
    """At a segment boundary, for each row its own, whose text is read in one call or in two."""
    model = shape.build()
    texts = [ids_of(number * shape.segment, shape.seed, index) for index, (number, _) in enumerate(rows)]
    questions = [ids_of(number, shape.seed, index, 1) for index, (_, number) in enumerate(rows)]
    states = []
    for text in texts:
        first = model.read(text[: shape.segment])
        states.append(model.read(text[shape.segment :], state=first) if len(text) > shape.segment else first)
    kinds = {"greedy": {}, "compiled": {"compile": True}, "uncached": {"use_cache": False}, **MODES}
    settings = {"max_new_tokens": length, "eos_token_id": eos, "pad_token_id": PAD, **kinds[mode]}

    def answers(prompts, **kwargs):
        input_ids, mask, _ = padding.lay(prompts)
        torch.manual_seed(seed)
        with torch.compiler.set_stance("force_eager"):
            output = model.generate(input_ids, attention_mask=mask, **settings, **kwargs)
        return output[:, input_ids.shape[1] :].tolist()

    whole = [torch.cat(pair) for pair in zip(texts, questions, strict=True)]
    assert answers(questions, state=Phase15State.stack(states)) == answers(whole)

    input_ids, mask, columns = padding.lay(questions)
    lengths = torch.tensor([len(question) for question in questions])
    with torch.no_grad():
        logits = model(input_ids, mask, query_lengths=lengths, state=Phase15State.stack(states)).logits
        for index, row in enumerate(whole):
            expected = model(row[None], query_lengths=torch.tensor([len(row)])).logits[0, -1]
            assert_close(logits[index, columns[index][-1]], expected)


@given(
    shape=shapes(),
    turns=st.lists(st.tuples(queries, st.integers(1, 9), st.booleans()), min_size=1, max_size=3),
    rows=st.integers(1, 2),
    padding=left_paddings,
)
def test_the_state_after_an_answer_equals_one_row_one_step_at_a_time(shape, turns, rows, padding):
    """A turn: the length of the messages, that of the answers, and whether generation is compiled."""
    model, state = shape.build(), None
    slots = [[]] * rows
    for turn, (number, length, compile) in enumerate(turns):
        messages = [ids_of(number + row, shape.seed, turn, row) for row in range(rows)]
        input_ids, mask, _ = padding.lay(messages)
        with torch.compiler.set_stance("force_eager"):
            output = model.generate(
                input_ids,
                attention_mask=mask,
                state=state,
                max_new_tokens=length,
                pad_token_id=PAD,
                return_dict_in_generate=True,
                compile=compile or None,
            )
        state = output.state
        for row, answer in enumerate(output.sequences[:, input_ids.shape[1] :]):
            slots[row] = reference_read(model, slots[row], messages[row])
            for chunk in answer.split(shape.chunk):
                slots[row] = reference_step(model, slots[row], chunk)
            used = state.soft_prompt.embeds[row, : state.soft_prompt.length[row]]
            assert_close(used, torch.stack(slots[row]).detach())


# folders


@given(
    shape=shapes(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64]),
    shards=st.booleans(),
    rows=rows_of_any_length,
)
def test_a_saved_model_is_the_same_when_loaded(shape, dtype, shards, rows):
    model = shape.build(dtype)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder, max_shard_size="5KB" if shards else "1GB")
        loaded = Phase15ForCausalLM.from_pretrained(folder)
    expected, got = model.state_dict(), loaded.state_dict()
    assert got.keys() == expected.keys()
    for name, weight in expected.items():
        assert got[name].dtype == dtype and torch.equal(got[name], weight), name
    for name in Phase15Config.__annotations__.keys() - {"text_config"}:
        assert getattr(loaded.config, name) == getattr(model.config, name)
    input_ids, mask, _ = Padding().lay([ids_of(sum(row), shape.seed, index) for index, row in enumerate(rows)])
    lengths = torch.tensor([query for query, _ in rows])
    with torch.no_grad():
        logits = [aligned(m)(input_ids, mask, query_lengths=lengths).logits for m in (model, exact(loaded))]
    assert torch.equal(*logits)
