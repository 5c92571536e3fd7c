# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Tables and the lines of context recovery in Markdown."""

import pytest
import torch
from test_recovery import full_context, losses_of, mixed, window  # noqa: F401

from phase15.evaluation import recovery, tables


@pytest.mark.parametrize("gap", ["none", "negative", "not sure", "rounding"])
def test_no_recovery_where_full_context_is_not_better(gap, window, full_context):
    full_context = {
        "none": window,
        "negative": mixed(window, full_context, -1.0),
        "rounding": mixed(window, full_context, 1e-5),
        "not sure": window._replace(nats=window.nats - 0.3 * window.tokens * (torch.arange(20) == 0)[:, None]),
    }[gap]
    result = recovery.context_recovery(window, mixed(window, full_context, 0.5), full_context)
    assert result["recovery"] is None and result["interval"] is None
    assert (result["gap"] > 0) == (gap in ("not sure", "rounding"))
    (line,) = tables.recovery_lines({"context_recovery": {"same_llm": result}})
    assert "undefined: full context is not better than the window" in line and "%," not in line


def test_the_table_keeps_what_a_folder_is_called_in_its_cell():
    row = {"loss": 1.0, "tokens_by_chunk": [1200], "interval": [0.5, 1.5]}
    match = {"correct": 1, "records": 8, "share": 0.125}
    table = tables.losses_table(
        {"validation": {"baseline_a|b\n<b>": row}, "exact_match": {"baseline_a|b\n<b>": match}}
    )
    assert table.splitlines()[:3] == [
        "| validation, 1,200 answer tokens | nats per token | 95 % interval | exact match |",
        "|---|---|---|---|",
        "| `baseline: a¦b <b>` | 1.0000 | [0.5000, 1.5000] | 1/8 (12.5%) |",
    ]
