# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Loss by example and chunk for any model, its controls, and context recovery with bootstrap intervals."""

from collections.abc import Iterable

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel

from phase15.evaluation.losses import (
    BASELINE_FULL_CONTEXT,
    BASELINE_WINDOW,
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
    variants,
)
from phase15.model.modeling_phase15 import Phase15ForCausalLM


# Keys of the rows of results.json and evaluation.json.


BOOTSTRAP_SAMPLES = 10_000


LEAST_GAP = 1e-4  # nats per token; a smaller advantage of full context over the window may be rounding


@torch.no_grad()
def compare(model: Phase15ForCausalLM, batches: Iterable[dict[str, torch.Tensor]]) -> dict[str, dict]:
    """
    Measures the six variants of a model, in evaluation mode.

    Args:
        model (`Phase15ForCausalLM`): the trained model.
        batches (iterable of `dict`): of a [`Phase15DataCollator`].

    Returns:
        `dict`: `validation`, the `summary` of each variant, and `context_recovery`, by the keys above.
    """
    batches = [unbatch(batch) for batch in batches]
    losses = variants(model, [example for batch in batches for example in batch], max(map(len, batches)))
    return {
        "validation": {variant: summary(rows) for variant, rows in losses.items()},
        "context_recovery": {
            name: context_recovery(*(losses[row] for row in (WINDOW, candidate, FULL_CONTEXT)))
            for name, candidate in ((SAME_LLM, MODEL), (NOT_CARRIED, SHUFFLED_DELTA))
            if candidate in losses
        },
    }


def compare_baseline(
    model: PreTrainedModel | PeftModel, name: str, batches: Iterable[dict[str, torch.Tensor]], chunk_length: int
) -> dict[str, dict]:
    """Measures a baseline; there is no context recovery of it."""
    batches = [unbatch(batch) for batch in batches]
    examples = [example for batch in batches for example in batch]
    losses = baseline_losses(name, model.eval(), examples, max(map(len, batches)), chunk_length)
    return {"validation": {name: summary(losses)}}


def unbatch(batch: dict[str, torch.Tensor]) -> list[Example]:
    rows = zip(*(batch[name] for name in ("input_ids", "attention_mask", "labels")), strict=True)
    return [
        Example(ids[mask.bool() & (labels == -100)].tolist(), ids[labels != -100].tolist())
        for ids, mask, labels in rows
    ]


def summary(losses: Losses) -> dict:
    """`loss` (nats per answer token), `loss_by_chunk` (the same by chunk index) and `tokens_by_chunk`."""
    nats, tokens = losses.nats.sum(dim=0), losses.tokens.sum(dim=0)
    return {
        "loss": (nats.sum() / tokens.sum()).item(),
        "loss_by_chunk": (nats / tokens).tolist(),
        "tokens_by_chunk": tokens.tolist(),
    }


def resampled_loss(losses: Losses, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0) -> np.ndarray:
    """
    The loss of `samples` data sets of as many examples, drawn from these with replacement, of shape `(samples,)`. The
    same seed draws the same examples, so that differences of rows are paired.
    """
    nats, tokens = (values.sum(dim=1).numpy() for values in losses)
    draws = np.random.default_rng(seed).integers(len(nats), size=(samples, len(nats)))
    return nats[draws].sum(axis=1) / tokens[draws].sum(axis=1)


def interval(values: np.ndarray) -> list[float]:
    """The middle 95 %."""
    return np.quantile(values, [0.025, 0.975]).tolist()


def context_recovery(
    window: Losses, model: Losses, full_context: Losses, samples: int = BOOTSTRAP_SAMPLES, seed: int = 0
) -> dict:
    """
    The share of the advantage of full context over the window that the model has too.

    Returns:
        `dict`: `recovery` and its `interval`, None where full context is not surely better than the window (by
        `LEAST_GAP`); and the `gap` between these in nats per token, with its `gap_interval`.
    """
    rows = (window, model, full_context)
    (window, model, full_context) = (summary(row)["loss"] for row in rows)
    windows, models, full_contexts = (resampled_loss(row, samples, seed) for row in rows)
    gap, gap_interval = window - full_context, interval(windows - full_contexts)
    result = {"recovery": None, "interval": None, "gap": gap, "gap_interval": gap_interval}
    if min(gap, *gap_interval) > LEAST_GAP:
        with np.errstate(divide="ignore", invalid="ignore"):  # a few samples may have no gap
            ratios = (windows - models) / (windows - full_contexts)
        result |= {"recovery": (window - model) / gap, "interval": interval(ratios)}
    return result


def report(losses: dict[str, Losses], free_losses: dict[str, Losses], samples: int, seed: int) -> dict[str, dict]:
    """The losses as numbers for JSON, with intervals, and the context recoveries."""

    def recovery(rows: dict[str, Losses], *names: str) -> dict:
        return context_recovery(*(rows[name] for name in names), samples, seed)

    recoveries = {SAME_LLM: recovery(losses, WINDOW, MODEL, FULL_CONTEXT)}
    if SHUFFLED_DELTA in losses:
        recoveries[NOT_CARRIED] = recovery(losses, WINDOW, SHUFFLED_DELTA, FULL_CONTEXT)
    if free_losses:
        recoveries[FREE_RUNNING] = recovery(free_losses, WINDOW, MODEL, FULL_CONTEXT)
    if {BASELINE_WINDOW, BASELINE_FULL_CONTEXT} <= set(losses):
        recoveries[OWN_BASELINES] = recovery(losses, BASELINE_WINDOW, MODEL, BASELINE_FULL_CONTEXT)
    blocks = {
        block: {
            name: {**summary(row), "interval": interval(resampled_loss(row, samples, seed))}
            for name, row in rows.items()
        }
        for block, rows in (("validation", losses), ("free_running", free_losses))
    }
    return {**blocks, "context_recovery": recoveries}


__all__ = ["BOOTSTRAP_SAMPLES", "compare", "compare_baseline", "report"]
