# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Tables of losses and of recall in Markdown, safe for untrusted names."""

import re

from phase15.evaluation.losses import (
    BASELINES_NOT_CARRIED,
    BASELINES_WINDOW,
    FREE_NOT_CARRIED,
    FREE_RUNNING,
    NOT_CARRIED,
    OWN_BASELINES,
    SAME_LLM,
    display_label,
)


# Context recoveries that are shown only together with those of the controls. Within one LLM, Δ = 0 has 0 % itself.
CONTROLS = {
    SAME_LLM: (NOT_CARRIED,),
    FREE_RUNNING: (FREE_NOT_CARRIED,),
    OWN_BASELINES: (BASELINES_WINDOW, BASELINES_NOT_CARRIED),
}


WORDS = re.compile(r"[\w ',.;:%=()/+@-]*")  # plain words in Markdown, except for
MARKUP = re.compile(r"(?<!\w)_|_(?!\w)|:(?! )|@\S|www\.", re.IGNORECASE)  # emphasis, addresses, mentions, :names:


def losses_table(results: dict[str, dict]) -> str:
    """Returns losses, with intervals and exact match where they were measured, and the context recovery below."""
    rows = results["validation"]
    matches = results.get("exact_match")
    has_interval = any("interval" in row for row in rows.values())
    num_tokens = sum(next(iter(rows.values()))["tokens_by_chunk"])  # the same in every row
    header = [f"validation, {num_tokens:,} answer tokens", "nats per token"]
    if has_interval:
        header.append("95 % interval")
    if matches:
        header.append("exact match")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, row in rows.items():
        cells = [cell(display_label(name)), f"{row['loss']:.4f}"]
        if has_interval:
            cells.append("[{:.4f}, {:.4f}]".format(*row["interval"]))
        if matches and name in matches:
            match = matches[name]
            cells.append(f"{match['correct']:d}/{match['records']:d} ({match['share']:.1%})")
        elif matches:
            cells.append("")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *recovery_lines(results)])


def recall_table(distances: list[dict]) -> str:
    """Returns the measurements of `recall.recall` by distance."""
    names = list(distances[0]["rows"])
    labels = " | ".join(map(display_label, names))
    lines = [f"| words between ({distances[0]['facts']:,} facts each) | tokens | {labels} |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for measured in distances:
        cells = [f"{measured['distance']:,}", f"{measured['tokens']:,.0f}"]
        for row in measured["rows"].values():
            shares = f"{row['right']:.1%}"
            if "completed" in row:  # not in a folder saved before 2026-11-27
                shares += f", {row['completed']:.1%}"
            cells.append(f"{shares} ({row['nats']:.3f})")
        lines.append(f"| {' | '.join(cells)} |")
    key = "Right answers; values completed, each after the reference's words; in brackets nats per answer token."
    return "\n".join([*lines, "", key])


def cell(text: str) -> str:
    """
    Returns untrusted text, such as the name of a folder, as one line of Markdown. Plain words stay. Other text becomes
    code, in which neither Markdown nor HTML works.
    """
    text = " ".join(str(text).split()).replace("|", "¦")  # a bar would end even code in a table
    text = "".join(character if character.isprintable() else "�" for character in text)
    if WORDS.fullmatch(text) and not MARKUP.search(text):
        return text
    fence = code_fence(text, 1)
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def code_fence(text: str, min_length: int) -> str:
    """Returns at least `min_length` backticks, and more than any run in the text, which could close the code."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    return "`" * max(min_length, longest + 1)


def recovery_lines(results: dict[str, dict]) -> list[str]:
    """
    Returns the context recoveries as items of a list in Markdown, each before those of Δ = 0 and shuffled Δ in the
    same measure. A recovery without these, as of a folder saved before 2026-12-01, is not shown.
    """
    recoveries = results.get("context_recovery", {})
    lines = []
    for name, result in recoveries.items():
        missing = [control for control in CONTROLS.get(name, ()) if control not in recoveries]
        if missing and result["recovery"] is not None:
            controls = " and ".join(display_label(control) for control in missing)
            lines.append(
                f"- context recovery, {display_label(name)}: not shown, since this was not measured: {controls}"
            )
            continue
        if result["recovery"] is None:
            low, high = result["gap_interval"]
            value = "undefined: full context is not better than the window"
            value += f" ({result['gap']:.4f} nats, 95 % interval [{low:.4f}, {high:.4f}])"
        else:
            low, high = result["interval"]
            value = f"{result['recovery']:.1%}, 95 % interval [{low:.1%}, {high:.1%}]"
            if name in (SAME_LLM, FREE_RUNNING):
                value += " (Δ = 0: 0 % by definition)"
        lines.append(f"- context recovery, {cell(display_label(name))}: {value}")
    return lines


__all__ = ["cell", "code_fence", "losses_table", "recall_table"]
