# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Context recovery against naive loops and on losses with a known share; the rows of a run's comparison."""

import numpy as np
import pytest
import torch
from reference import CHUNK, SIZES, randomise_alpha
from test_losses import ANSWERS, ROWS, batches_of, close, naive_variants, records
from torch.testing import assert_close

from phase15.evaluation import recovery
from phase15.evaluation.losses import Losses
from phase15.model.modeling_phase15 import Phase15ForCausalLM


def losses_of(seed: int, mean: float, num_records: int = 20, num_chunks: int = 3) -> Losses:
    random = np.random.default_rng(seed)
    tokens = random.integers(1, 17, size=(num_records, num_chunks))
    nats = tokens * (mean + 0.05 * random.standard_normal((num_records, num_chunks)))
    return Losses(torch.from_numpy(nats), torch.from_numpy(tokens))


def mixed(window: Losses, full_context: Losses, share: float) -> Losses:
    return Losses(window.nats + share * (full_context.nats - window.nats), window.tokens)


@pytest.fixture
def window() -> Losses:
    return losses_of(0, 1.5)


@pytest.fixture
def full_context(window) -> Losses:
    return window._replace(nats=window.nats - window.tokens * (0.1 + 0.02 * losses_of(1, 0).nats.sign()))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_compare_equals_naive_references(kind, bases):
    model, data = randomise_alpha(Phase15ForCausalLM.from_base(bases[kind], **SIZES)).train(), records()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    results = recovery.compare(model, batches_of(data))["validation"]
    expected = [naive_variants(model, *pair) for pair in zip(data, data[1:] + data[:1], strict=True)]
    assert list(results) == ROWS
    for variant, result in results.items():
        rows = [row[variant] for row in expected]
        chunks = [torch.cat([row[i : i + CHUNK] for row in rows]) for i in range(0, max(ANSWERS), CHUNK)]
        close(result["loss"], torch.cat(rows).mean().item())
        close(result["loss_by_chunk"], [chunk.mean().item() for chunk in chunks])
        assert result["tokens_by_chunk"] == [len(chunk) for chunk in chunks]
        assert set(result) == {"loss", "loss_by_chunk", "tokens_by_chunk"}
    assert len({round(result["loss"], 6) for result in results.values()}) == 6  # none could stand for another
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_the_interval_is_that_of_a_naive_loop(window, full_context):
    """Records drawn one by one; numerator and denominator of R from the same draw."""
    random, ratios = np.random.default_rng(7), []
    model = mixed(window, full_context, 0.6)._replace(
        nats=losses_of(3, 1.44).nats * window.tokens / losses_of(3, 1).tokens
    )
    for _ in range(200):
        drawn = [int(random.integers(20)) for _ in range(20)]
        nats = [sum(float(row.nats[i].sum()) for i in drawn) for row in (window, model, full_context)]
        tokens = sum(int(window.tokens[i].sum()) for i in drawn)
        w, m, f = (value / tokens for value in nats)
        ratios.append((w - m) / (w - f))
    result = recovery.context_recovery(window, model, full_context, samples=200, seed=7)
    assert_close(result["interval"], [float(np.percentile(ratios, 2.5)), float(np.percentile(ratios, 97.5))])
    low, high = result["interval"]
    assert low < result["recovery"] < high and high - low > 0.01
    assert recovery.context_recovery(window, model, full_context, samples=200, seed=8)["interval"] != [low, high]


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0, 1.5, -1.0])
def test_context_recovery_is_the_share_of_the_gap(share, window, full_context):
    result = recovery.context_recovery(window, mixed(window, full_context, share), full_context)
    assert_close(result["recovery"], share, atol=1e-9, rtol=0)
    assert_close(result["interval"], [share, share], atol=1e-9, rtol=0)  # in every sample


def test_tokens_weigh_the_records():
    tokens = torch.tensor([[1], [9]])
    rows = [Losses(torch.tensor(nats, dtype=torch.float64)[:, None], tokens) for nats in ([2.0, 27], [1, 20], [1, 18])]
    window, model, full_context = rows
    assert recovery.summarize(window)["loss"] == 2.9
    result = recovery.context_recovery(window, model, full_context)
    assert_close((result["gap"], result["recovery"]), (1.0, 0.8))


def test_equal_records_have_no_interval():
    rows = [losses_of(0, mean, num_records=1) for mean in (2, 1.2, 1)]
    rows = [Losses(*(values.repeat(9, 1) for values in row)) for row in rows]
    result = recovery.context_recovery(*rows)
    assert_close(result["interval"], [result["recovery"]] * 2)
    assert_close(
        recovery.confidence_interval(recovery.resampled_loss(rows[0])), [recovery.summarize(rows[0])["loss"]] * 2
    )
