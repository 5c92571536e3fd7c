# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The table of benchmarks/recovery_gpu.sh; .ci/run runs the whole of it at a tiny shape."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from phase15.commands.benchmarks.recovery import evaluations, plot_losses, recovery_table


ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path) -> Path:
    """As a run that was cut off leaves it: one comparison with baselines, one without, and one that has not come."""
    for name, rows in {"joint_128": 5, "stage1_64": 3}.items():
        losses = [2.0, 3.0, 1.0, 2.5, 0.5][:rows]
        names = ["model", "window", "full_context", "baseline_window", "baseline_full_context"]
        known = {"recovery": 0.25, "interval": [0.2, 0.3], "gap": 2.0, "gap_interval": [1.5, 2.5]}
        results = {
            "validation": {
                row: {"loss": loss, "loss_by_chunk": [loss, loss]} for row, loss in zip(names, losses, strict=False)
            },
            "context_recovery": {"same_llm": {**known, "recovery": None}}
            | ({"baselines": known} if rows == 5 else {}),
        }
        (tmp_path / name).mkdir()
        (tmp_path / name / "evaluation.json").write_text(json.dumps(results))
    (tmp_path / "joint_distilled_64").mkdir()
    return tmp_path


def test_the_table_has_what_there_is(folder):
    lines = recovery_table(evaluations(folder)).splitlines()
    assert lines[2] == "| stage1_64 | 2.0000 | 3.0000 | 1.0000 |  |  |  | undefined |"
    assert lines[3] == "| joint_128 | 2.0000 | 3.0000 | 1.0000 | 2.5000 | 0.5000 | 25.0% [20.0%, 30.0%] | undefined |"
    assert len(lines) == 4


def test_table_and_picture_are_left_in_the_folder(folder):
    found = evaluations(folder)
    plot_losses(found, folder / "again.png")
    command = [sys.executable, "-m", "benchmarks.recovery", str(folder)]
    said = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert said.strip() == recovery_table(found) == (folder / "recovery.md").read_text().strip()
    assert (folder / "recovery.png").read_bytes() == (folder / "again.png").read_bytes()


def test_a_folder_without_results_is_an_error(tmp_path):
    command = [sys.executable, "-m", "benchmarks.recovery", str(tmp_path)]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.strip().splitlines()[-1].endswith(
        "no evaluation.json in any folder of it."
    )
