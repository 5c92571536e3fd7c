# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Context recovery, losses as numbers for JSON, the verdict, and the bootstrap intervals of all of them."""

import itertools
from collections.abc import Iterable

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from phase15.evaluation.losses import (
    BASELINE_FULL_CONTEXT,
    BASELINE_WINDOW,
    BASELINES_NOT_CARRIED,
    BASELINES_WINDOW,
    FREE_NOT_CARRIED,
    FREE_RUNNING,
    FULL_CONTEXT,
    MODEL,
    NOT_CARRIED,
    OWN_BASELINES,
    SAME_LLM,
    SHUFFLED_DELTA,
    WINDOW,
    Example,
    Losses,
    baseline_losses,
    measure_variants,
)
from phase15.evaluation.verdict import NATS, make_verdict
from phase15.model.modeling_phase15 import Phase15ForCausalLM


BOOTSTRAP_SAMPLES = 10_000
BAND_SAMPLES = 1000  # for the bands of a picture, whose intervals are by chunk
MIN_GAP = 1e-4  # nats per token; a smaller advantage of full context over the window may be rounding


@torch.no_grad()
def compare(model: Phase15ForCausalLM, batches: Iterable[dict[str, torch.Tensor]]) -> dict[str, dict]:
    """
    Measures the six variants of a model, with the chunk length of its training.

    Args:
        model (`Phase15ForCausalLM`): the trained model.
        batches (iterable of `dict`): of a [`Phase15DataCollator`].

    Returns:
        `dict`: `validation`, the summary of each variant, and `context_recovery`, by the keys of losses.py; and
        `verdict`.
    """
    examples, batch_size = unbatch_all(batches)
    losses = measure_variants(model, examples, batch_size, model.config.resolve_chunk_length())
    recoveries = {SAME_LLM: context_recovery(losses[WINDOW], losses[MODEL], losses[FULL_CONTEXT])}
    if SHUFFLED_DELTA in losses:
        recoveries[NOT_CARRIED] = context_recovery(losses[WINDOW], losses[SHUFFLED_DELTA], losses[FULL_CONTEXT])
    return {
        "validation": {variant: summarize(rows) for variant, rows in losses.items()},
        "context_recovery": recoveries,
        "verdict": judge_losses(losses),
    }


def compare_baseline(
    model: PreTrainedModel | PeftModel, name: str, batches: Iterable[dict[str, torch.Tensor]], bin_size: int
) -> dict[str, dict]:
    """Measures a baseline by bins of answer tokens; a baseline has no context recovery."""
    examples, batch_size = unbatch_all(batches)
    losses = baseline_losses(name, model.eval(), examples, batch_size, bin_size)
    return {"validation": {name: summarize(losses)}}


def unbatch_all(batches: Iterable[dict[str, torch.Tensor]]) -> tuple[list[Example], int]:
    """Returns the examples of all batches, and the size of the largest batch."""
    lists = [unbatch(batch) for batch in batches]
    return list(itertools.chain.from_iterable(lists)), max(map(len, lists))


def unbatch(batch: dict[str, torch.Tensor]) -> list[Example]:
    """Returns the examples of a collated batch, without padding."""
    examples = []
    for ids, mask, labels in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], strict=True):
        is_answer = labels != -100
        is_query = mask.bool() & ~is_answer
        examples.append(Example(ids[is_query].tolist(), ids[is_answer].tolist()))
    return examples


def summarize(losses: Losses) -> dict:
    """Returns `loss` (nats per answer token), `loss_by_chunk` (by chunk index) and `tokens_by_chunk`."""
    nats = losses.nats.sum(dim=0)
    tokens = losses.tokens.sum(dim=0)
    return {
        "loss": (nats.sum() / tokens.sum()).item(),
        "loss_by_chunk": (nats / tokens).tolist(),
        "tokens_by_chunk": tokens.tolist(),
    }


def resampled_loss(losses: Losses, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0) -> np.ndarray:
    """
    Returns the losses of bootstrap samples, of shape `(samples,)`. Each sample draws as many examples as there are,
    with replacement. The same seed draws the same examples for every row, so that differences of rows are paired.
    """
    nats = losses.nats.sum(dim=1).numpy()
    tokens = losses.tokens.sum(dim=1).numpy()
    draws = np.random.default_rng(seed).integers(len(nats), size=(samples, len(nats)))
    return nats[draws].sum(axis=1) / tokens[draws].sum(axis=1)


def confidence_interval(values: np.ndarray) -> list[float]:
    """Returns the bounds of the middle 95 %."""
    return np.quantile(values, [0.025, 0.975]).tolist()


def interval_by_chunk(losses: Losses, samples: int, seed: int) -> list[list[float]]:
    """Returns the bounds of the middle 95 % of bootstrap losses by chunk, without samples that miss the chunk."""
    num_examples = len(losses.nats)
    draws = np.random.default_rng(seed).integers(num_examples, size=(min(samples, BAND_SAMPLES), num_examples))
    # how often each sample draws each example, `(samples, num_examples)`: sums over a sample are a matrix product
    counts = np.stack([np.bincount(draw, minlength=num_examples) for draw in draws])
    with np.errstate(invalid="ignore"):  # 0 / 0 for a sample without an answer of this length
        samples_by_chunk = (counts @ losses.nats.numpy()) / (counts @ losses.tokens.numpy())
    return np.nanquantile(samples_by_chunk, [0.025, 0.975], axis=0).T.tolist()


def paired_difference(first: Losses, second: Losses, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0) -> dict:
    """Returns the `difference` of two rows on the same examples, first − second, per token, and its `interval`."""
    differences = resampled_loss(first, samples, seed) - resampled_loss(second, samples, seed)
    return {
        "difference": summarize(first)["loss"] - summarize(second)["loss"],
        "interval": confidence_interval(differences),
    }


def judge_losses(losses: dict[str, Losses], samples: int = BOOTSTRAP_SAMPLES, seed: int = 0) -> dict:
    """
    Compares a model with Δ = 0, with another record's Δ, and with baselines, in nats per answer token.

    Args:
        losses (`dict[str, Losses]`): losses of the model and of the other rows, by the keys of losses.py.
        samples (`int`): bootstrap samples.
        seed (`int`): of the bootstrap.

    Returns:
        `dict`: the verdict, as `verdict.make_verdict`. Its intervals are from a paired bootstrap over the records.
    """
    differences = {}
    for name, row in losses.items():
        if name in (WINDOW, SHUFFLED_DELTA) or name.startswith("baseline_"):
            differences[name] = paired_difference(row, losses[MODEL], samples, seed)
    return make_verdict(len(losses[MODEL].nats), differences, NATS)


def context_recovery(
    window: Losses, model: Losses, full_context: Losses, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0
) -> dict:
    """
    Measures the share of the advantage of full context over the window that the model has too.

    Returns:
        `dict`: `recovery` and its `interval`, `None` where full context is not surely better than the window (by
        `MIN_GAP`); and the `gap` between these in nats per token, with its `gap_interval`.
    """
    window_loss = summarize(window)["loss"]
    gap = window_loss - summarize(full_context)["loss"]
    window_samples = resampled_loss(window, samples, seed)
    gap_samples = window_samples - resampled_loss(full_context, samples, seed)
    gap_interval = confidence_interval(gap_samples)
    result = {"recovery": None, "interval": None, "gap": gap, "gap_interval": gap_interval}
    if min(gap, *gap_interval) > MIN_GAP:
        gain_samples = window_samples - resampled_loss(model, samples, seed)
        with np.errstate(divide="ignore", invalid="ignore"):  # a few samples may have no gap
            ratios = gain_samples / gap_samples
        result["recovery"] = (window_loss - summarize(model)["loss"]) / gap
        result["interval"] = confidence_interval(ratios)
    return result


def report(losses: dict[str, Losses], free_losses: dict[str, Losses], samples: int, seed: int) -> dict[str, dict]:
    """Returns the losses as numbers for JSON, with intervals, the context recoveries, and the verdict."""

    def recover(window: Losses, model: Losses, full_context: Losses) -> dict:
        return context_recovery(window, model, full_context, samples, seed)

    def summarize_all(rows: dict[str, Losses]) -> dict[str, dict]:
        result = {}
        for name, row in rows.items():
            result[name] = summarize(row)
            result[name]["interval"] = confidence_interval(resampled_loss(row, samples, seed))
            result[name]["interval_by_chunk"] = interval_by_chunk(row, samples, seed)
        return result

    recoveries = {SAME_LLM: recover(losses[WINDOW], losses[MODEL], losses[FULL_CONTEXT])}
    if SHUFFLED_DELTA in losses:
        recoveries[NOT_CARRIED] = recover(losses[WINDOW], losses[SHUFFLED_DELTA], losses[FULL_CONTEXT])
    if free_losses:
        recoveries[FREE_RUNNING] = recover(free_losses[WINDOW], free_losses[MODEL], free_losses[FULL_CONTEXT])
    if SHUFFLED_DELTA in free_losses:
        free_window = free_losses[WINDOW]
        recoveries[FREE_NOT_CARRIED] = recover(free_window, free_losses[SHUFFLED_DELTA], free_losses[FULL_CONTEXT])
    if {BASELINE_WINDOW, BASELINE_FULL_CONTEXT} <= set(losses):
        baseline_window = losses[BASELINE_WINDOW]
        baseline_full_context = losses[BASELINE_FULL_CONTEXT]
        recoveries[OWN_BASELINES] = recover(baseline_window, losses[MODEL], baseline_full_context)
        # the model's LLM is another than the baselines': a part of R may stay without Δ
        recoveries[BASELINES_WINDOW] = recover(baseline_window, losses[WINDOW], baseline_full_context)
        if SHUFFLED_DELTA in losses:
            shuffled = recover(baseline_window, losses[SHUFFLED_DELTA], baseline_full_context)
            recoveries[BASELINES_NOT_CARRIED] = shuffled
    return {
        "validation": summarize_all(losses),
        "free_running": summarize_all(free_losses),
        "context_recovery": recoveries,
        "verdict": judge_losses(losses, samples, seed),
    }


__all__ = [
    "BOOTSTRAP_SAMPLES",
    "compare",
    "compare_baseline",
    "confidence_interval",
    "judge_losses",
    "paired_difference",
    "report",
    "resampled_loss",
]
