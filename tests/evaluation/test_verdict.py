# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The sentence at the end of a report, on losses with a known answer, and the next command."""

import numpy as np
import pytest
import torch

from phase15.evaluation import verdict
from phase15.evaluation.losses import Losses
from phase15.evaluation.recovery import judge_losses, paired_difference


def rows_with(window: float, shuffled: float, noise: float = 0.005, num_records: int = 40, **others: float) -> dict:
    """Losses of a model, and of rows that are higher by the given nats per token, with noise by record."""
    random = np.random.default_rng(0)
    tokens = torch.from_numpy(random.integers(8, 17, size=(num_records, 2)))
    base = torch.from_numpy(1.0 + random.random((num_records, 1)))  # differs more between records than between rows
    rows = {"model": Losses(tokens * base, tokens)}
    for name, difference in {"window": window, "shuffled_delta": shuffled, **others}.items():
        wobble = torch.from_numpy(noise * random.standard_normal((num_records, 1)))
        rows[name] = Losses(tokens * (base + difference + wobble), tokens)
    return rows


CASES = {
    "helps_and_carries": (rows_with(0.12, 0.05), "Δ helps, and carries something of the record: 0.1"),
    "helps_carries_nothing": (rows_with(0.12, 0.0), "Δ helps, but carries nothing of the record: 0.00"),
    "helps_carrying_uncertain": (rows_with(0.9, 0.0, noise=0.3), "Δ helps; it is not certain that it carries"),
    "no_effect": (rows_with(0.0, 0.0), "Δ has no effect: "),
    "uncertain": (rows_with(0.0, 0.0, noise=0.3), "It is not certain that Δ helps: "),
    "harms": (rows_with(-0.1, 0.0), "Δ harms: 0.1"),
    "too_few_records": (rows_with(0.12, 0.05, num_records=9), "Too few records for a verdict (9 of at least 10): "),
}


@pytest.mark.parametrize("kind", CASES)
def test_each_verdict_has_its_sentence(kind):
    rows, beginning = CASES[kind]
    result = judge_losses(rows, samples=500)
    assert result["kind"] == kind and result["sentence"].startswith(beginning)
    assert set(result["differences"]) == {"window", "shuffled_delta"}


def test_an_effect_that_is_sure_but_of_no_use_is_none():
    assert judge_losses(rows_with(1e-4, 1e-4, noise=0), samples=50)["kind"] == "no_effect"
    assert judge_losses(rows_with(0.1, 1e-4, noise=0), samples=50)["kind"] == "helps_carries_nothing"


def test_the_difference_that_decides_comes_first_with_its_sign():
    result = judge_losses(rows_with(0.1, -0.05, noise=0, baseline_window=-0.03), samples=50)
    assert result["sentence"] == (
        "Δ helps, but carries nothing of the record: 0.050 nats [0.050, 0.050] more than another record's Δ, "
        "0.100 nats [0.100, 0.100] less than Δ = 0, 0.030 nats [0.030, 0.030] more than baseline: window."
    )


def test_an_interval_that_crosses_zero_keeps_its_sign():
    measured = {"difference": -0.01, "interval": [-0.03, 0.02]}
    assert verdict.describe_difference(measured, "x", verdict.NATS) == "0.010 nats [−0.020, 0.030] more than x"


def test_differences_are_paired():
    """Records differ by 1 nat, rows by 0.1 with little noise: without pairs the interval would cross zero."""
    rows = rows_with(0.1, 0.1)
    low, high = paired_difference(rows["window"], rows["model"], samples=500)["interval"]
    assert 0.09 < low < high < 0.11
    assert paired_difference(rows["model"], rows["window"], samples=500)["interval"] == pytest.approx([-high, -low])


def test_recall_is_compared_in_points():
    advantages = {
        "window": {"difference": 0.875, "interval": [0.8, 0.95]},
        "shuffled_delta": {"difference": 0.9, "interval": [0.85, 0.97]},
    }
    measured = {"distance": 2048, "chats": 64, "rows": {"model": {}}, "advantages": advantages}
    result = verdict.judge_recall(measured)
    assert result["kind"] == "helps_and_carries"
    assert result["sentence"] == (
        "After 2,048 words: Δ helps, and carries something of the record: 87.5 points [80.0, 95.0] more right answers "
        "than Δ = 0, 90.0 points [85.0, 97.0] more right answers than another record's Δ."
    )
    assert verdict.judge_recall({"distance": 1, "chats": 64, "rows": {"full_context": {}}}) is None


def test_a_label_replaces_the_names_of_others():
    result = judge_losses(rows_with(0.1, 0.05, **{"baseline_<b>": 0.1}), samples=50)
    assert verdict.verdict_sentence(result, lambda key: "`x`").endswith(" less than `x`.")


RECIPE = {"stage": "hypernet", "learning_rate": 2e-3}


@pytest.mark.parametrize(
    "kind, recipe, expected",
    [
        ("helps_and_carries", RECIPE, "phase15 push --model_dir 'my run' --repo_id USER/NAME --dry_run"),
        ("helps_and_carries", {}, "phase15 push --model_dir 'my run'"),
        ("helps_and_carries", {"stage": "full"}, "--stage full --baseline window --output_dir 'my run_window' && "),
        ("helps_carries_nothing", RECIPE, "phase15 train 'my run/recipe.yaml' --max_steps 60 --output_dir"),
        ("no_effect", RECIPE, "phase15 train 'my run/recipe.yaml' --max_steps 60 --output_dir 'my run_longer'"),
        ("no_effect", {}, "phase15 train --model_name_or_path 'my run' --dataset_name x.jsonl"),
        ("harms", RECIPE, "--learning_rate 0.001 --output_dir"),
        ("uncertain", RECIPE, "phase15 eval --model_dir 'my run' --dataset x.jsonl --validation_split"),
        ("too_few_records", RECIPE, "phase15 eval --model_dir 'my run' --dataset x.jsonl --validation_split"),
    ],
)
def test_the_next_command_fits_the_verdict(kind, recipe, expected):
    given = judge_losses(CASES[kind][0], samples=50) | {"kind": kind}
    assert expected in verdict.next_command(given, "my run", "x.jsonl", recipe, steps=30)


def test_with_a_baseline_the_next_command_is_push():
    given = judge_losses(rows_with(0.1, 0.05, baseline_window=0.1), samples=50)
    assert "phase15 push" in verdict.next_command(given, "run", "x.jsonl", {"stage": "full"}, steps=30)


def test_too_few_chats_are_asked_for_more():
    given = {"kind": "uncertain", "unit": "share", "records": 16, "differences": {}}
    command = verdict.next_command(given, "run", "facts", {}, steps=30)
    assert command.endswith("phase15 eval --model_dir run --dataset facts --generated_records 64")
