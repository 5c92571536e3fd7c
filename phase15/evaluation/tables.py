# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Tables in Markdown, and plots."""

import re

from phase15.evaluation.losses import label


WORDS = re.compile(r"[\w ',.;:%=()/+@-]*")  # plain words in Markdown, except for
MARKUP = re.compile(r"(?<!\w)_|_(?!\w)|:(?! )|@\S|www\.", re.IGNORECASE)  # emphasis, addresses, mentions, :names:


def table(results: dict[str, dict]) -> str:
    """Losses, with intervals and exact match where they were measured, and the context recovery below."""
    rows, exact = results["validation"], results.get("exact_match")
    has_interval = any("interval" in row for row in rows.values())
    tokens = sum(next(iter(rows.values()))["tokens_by_chunk"])
    header = [f"validation, {tokens:,} answer tokens", "nats per token"]
    header += ["95 % interval"] * has_interval + ["exact match"] * bool(exact)
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, row in rows.items():
        cells = [cell(label(name)), f"{row['loss']:.4f}"]
        if has_interval:
            cells.append("[{:.4f}, {:.4f}]".format(*row["interval"]))
        if exact:
            match = exact.get(name)
            cells.append(f"{match['correct']:d}/{match['records']:d} ({match['share']:.1%})" if match else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", *recovery_lines(results)])


def recall_table(distances: list[dict]) -> str:
    """What `recall.recall` measured, by distance."""
    names = list(distances[0]["rows"])
    lines = [f"| words between ({distances[0]['facts']:,} facts each) | tokens | {' | '.join(map(label, names))} |"]
    lines.append("|---" * (len(names) + 2) + "|")
    for at in distances:
        cells = [
            f"{row['right']:.1%}, {row['completed']:.1%} ({row['nats']:.3f})"
            if "completed" in row  # not in a folder saved before 2026-11-27
            else f"{row['right']:.1%} ({row['nats']:.3f})"
            for row in at["rows"].values()
        ]
        lines.append(f"| {at['distance']:,} | {at['tokens']:,.0f} | {' | '.join(cells)} |")
    key = "Right answers; values completed, each behind the reference's words; in brackets nats per answer token."
    return "\n".join([*lines, "", key])


def cell(text: str) -> str:
    """
    Untrusted text, such as the name of a folder, as one line of Markdown. Plain words stay. Other text becomes code,
    in which neither Markdown nor HTML works. A bar would end even code in a table.
    """
    text = " ".join(str(text).split()).replace("|", "¦")
    text = "".join(character if character.isprintable() else "�" for character in text)
    if WORDS.fullmatch(text) and not MARKUP.search(text):
        return text
    fence = fence_of(text, 1)
    space = " " if "`" in text else ""
    return f"{fence}{space}{text}{space}{fence}"


def fence_of(text: str, least: int) -> str:
    """Backticks, `least` or more, that nothing in the text can close."""
    return "`" * max(least, 1 + max(map(len, re.findall("`+", text)), default=0))


def recovery_lines(results: dict[str, dict]) -> list[str]:
    """The context recoveries, as items of a list in Markdown."""
    lines = []
    for name, result in results.get("context_recovery", {}).items():
        if result["recovery"] is None:
            low, high = result["gap_interval"]
            value = "undefined: full context is not better than the window"
            value += f" ({result['gap']:.4f} nats, 95 % interval [{low:.4f}, {high:.4f}])"
        else:
            low, high = result["interval"]
            value = f"{result['recovery']:.1%}, 95 % interval [{low:.1%}, {high:.1%}]"
        lines.append(f"- context recovery, {cell(label(name))}: {value}")
    return lines


__all__ = ["cell", "fence_of", "recall_table", "table"]
