# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The last lines of a report: a sentence on whether Δ helped, with intervals, and the next command."""

import shlex
from collections.abc import Callable

from phase15.evaluation.losses import MODEL, SHUFFLED_DELTA, WINDOW, display_label


# Keys of the verdicts.
CARRIES = "helps_and_carries"
CARRIES_NOTHING = "helps_carries_nothing"
HELPS_UNCERTAIN = "helps_carrying_uncertain"
NO_EFFECT = "no_effect"
UNCERTAIN = "uncertain"
HARMS = "harms"
TOO_FEW = "too_few_records"
MEANINGS = {
    CARRIES: "Δ helps, and carries something of the record",
    CARRIES_NOTHING: "Δ helps, but carries nothing of the record",
    HELPS_UNCERTAIN: "Δ helps; it is not certain that it carries something of the record",
    NO_EFFECT: "Δ has no effect",
    UNCERTAIN: "It is not certain that Δ helps",
    HARMS: "Δ harms",
    TOO_FEW: "Too few records for a verdict",
}
MIN_RECORDS = 10  # bootstrap intervals over fewer records are too narrow
NATS = "nats"  # per answer token: less is better
SHARE = "share"  # of right answers: more is better
NEGLIGIBLE = {NATS: 0.02, SHARE: 0.02}  # an interval that holds 0 excludes an effect if it ends before these bounds
SMALLEST_EFFECT = {NATS: 0.001, SHARE: 0.001}  # a smaller one may be significant, and is of no use


def choose_verdict(records: int, differences: dict[str, dict], unit: str) -> str:
    """
    Returns the key of a verdict.

    Args:
        records (`int`): number of independent records.
        differences (`dict[str, dict]`): advantage of the model over Δ = 0 and over shuffled Δ, by the keys of
            losses.py: `difference`, above 0 where the model is better, and its `interval`.
        unit (`str`): of the differences, `NATS` or `SHARE`.
    """
    if records < MIN_RECORDS or SHUFFLED_DELTA not in differences:  # a single record cannot be shuffled
        return TOO_FEW
    low, high = differences[WINDOW]["interval"]
    if is_negligible(low, high, unit):
        return NO_EFFECT
    if high < 0:
        return HARMS
    if low <= 0:
        return UNCERTAIN
    low, high = differences[SHUFFLED_DELTA]["interval"]
    if high < 0 or is_negligible(low, high, unit):
        return CARRIES_NOTHING
    if low <= 0:
        return HELPS_UNCERTAIN
    return CARRIES


def is_negligible(low: float, high: float, unit: str) -> bool:
    """Returns `True` for an interval that holds 0 and nothing far from it, or values that are all next to 0."""
    largest = max(-low, high)
    if low <= 0 <= high:
        return largest < NEGLIGIBLE[unit]
    return largest < SMALLEST_EFFECT[unit]


def judge_recall(measured: dict) -> dict | None:
    """
    Compares the right answers at one distance of `recall.recall` with those of Δ = 0 and of another record's Δ.
    Returns a verdict as [`make_verdict`]; `None` for a baseline, which has no Δ.
    """
    if MODEL not in measured["rows"]:
        return None
    return make_verdict(measured["chats"], measured["advantages"], SHARE, measured["distance"])


def make_verdict(records: int, differences: dict[str, dict], unit: str, distance: int | None = None) -> dict:
    """
    Returns a verdict for JSON.

    Args:
        records (`int`): number of independent records.
        differences (`dict[str, dict]`): as of `recovery.paired_difference`, by the key of the other row, above 0 where
            the model is better.
        unit (`str`): of the differences, `NATS` or `SHARE`.
        distance (`int`, *optional*): words between facts and questions.

    Returns:
        `dict`: the arguments; `kind`, the key of the verdict; and `sentence`.
    """
    verdict = {
        "kind": choose_verdict(records, differences, unit),
        "unit": unit,
        "records": records,
        "differences": differences,
    }
    if distance is not None:
        verdict["distance"] = distance
    verdict["sentence"] = verdict_sentence(verdict)
    return verdict


def verdict_sentence(verdict: dict, label: Callable[[str], str] = display_label) -> str:
    """
    Returns the sentence of a verdict.

    Args:
        verdict (`dict`): of [`make_verdict`].
        label (`Callable`): the text for the key of a row. A model card escapes names of folders.
    """
    names = sorted(verdict["differences"], key=display_order)
    if verdict["kind"] in (CARRIES_NOTHING, HELPS_UNCERTAIN):  # the difference that the verdict is about comes first
        names.sort(key=lambda name: name != SHUFFLED_DELTA)
    clauses = []
    for name in names:
        other = {WINDOW: "Δ = 0", SHUFFLED_DELTA: "another record's Δ"}.get(name) or label(name)
        clauses.append(describe_difference(verdict["differences"][name], other, verdict["unit"]))
    meaning = MEANINGS[verdict["kind"]]
    if verdict["kind"] == TOO_FEW:
        meaning += f" ({verdict['records']} of at least {MIN_RECORDS})"
    if "distance" in verdict:
        meaning = f"After {verdict['distance']:,} words: {meaning}"
    return f"{meaning}: {', '.join(clauses)}."


def display_order(name: str) -> int:
    """Returns the position of a row in the sentence: Δ = 0, another record's Δ, the baselines."""
    order = (WINDOW, SHUFFLED_DELTA)
    return order.index(name) if name in order else len(order)


def describe_difference(measured: dict, other: str, unit: str) -> str:
    """Returns a difference with its interval: "0.12 nats [0.10, 0.14] less than Δ = 0"."""
    values = [measured["difference"], *measured["interval"]]
    is_better = values[0] >= 0
    if not is_better:
        values = [-values[0], -values[2], -values[1]]
    if unit == SHARE:
        value, low, high = (format_number(100 * number, 1) for number in values)
        return f"{value} points [{low}, {high}] {'more' if is_better else 'less'} right answers than {other}"
    value, low, high = (format_number(number, 3) for number in values)
    return f"{value} nats [{low}, {high}] {'less' if is_better else 'more'} than {other}"


def format_number(number: float, digits: int) -> str:
    """Returns a number with the minus sign of the report's other figures."""
    return f"{number:.{digits}f}".replace("-", "−")


def next_command(verdict: dict, folder: str, dataset: str, recipe: dict, steps: int | None = None) -> str:
    """
    Returns the command that a verdict suggests, after the reason for it.

    Args:
        verdict (`dict`): of [`make_verdict`].
        folder (`str`): of the model.
        dataset (`str`): the data set of the evaluation.
        recipe (`dict`): of the run that made the model; empty if it is not known.
        steps (`int`, *optional*): number of steps of the run.
    """
    kind = verdict["kind"]
    has_baseline = any(name.startswith("baseline_") for name in verdict["differences"])
    model = shlex.quote(folder)
    if kind in (TOO_FEW, UNCERTAIN, HELPS_UNCERTAIN):
        command = f"phase15 eval --model_dir {model} --dataset {shlex.quote(dataset)}"
        if verdict["unit"] == SHARE:
            return f"Next, ask in more chats: {command} --generated_records {4 * verdict['records']}"
        return f"Next, evaluate more records: {command} --validation_split SHARE, or --dataset another file"
    if kind == CARRIES:
        if recipe and recipe.get("stage", "full") != "hypernet" and not has_baseline:
            # the LLM was trained together with Δ, so that its own window is not a fair comparison
            other = shlex.quote(f"{folder}_window")
            train = f"phase15 train {shlex.quote(f'{folder}/recipe.yaml')} --stage full --baseline window"
            compare = f"phase15 eval --model_dir {model} --dataset {shlex.quote(dataset)} --baselines {other}"
            return f"Next, compare with a baseline: {train} --output_dir {other} && {compare}"
        staged = shlex.quote(f"{folder}_staged")
        return (
            f"Next, look at its model card: phase15 push --model_dir {model} --repo_id USER/NAME "
            f"--dry_run --output_dir {staged}"
        )
    longer = shlex.quote(f"{folder}_longer")
    if recipe and steps:
        command = f"phase15 train {shlex.quote(f'{folder}/recipe.yaml')} --max_steps {2 * steps}"
    else:
        command = f"phase15 train --model_name_or_path {model} --dataset_name {shlex.quote(dataset)}"
    if kind == HARMS and "learning_rate" in recipe:
        command += f" --learning_rate {recipe['learning_rate'] / 2:g}"
        return f"Next, train with smaller updates: {command} --output_dir {longer}"
    return f"Next, train longer: {command} --output_dir {longer}"


__all__ = ["NATS", "SHARE", "judge_recall", "make_verdict", "next_command", "verdict_sentence"]
