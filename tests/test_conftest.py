# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The marks that tests/conftest.py sets."""

import re
from pathlib import Path

import pytest
from conftest import MARKS, QUICK


TESTS = {path.stem: path.read_text("utf-8") for path in Path(__file__).parent.rglob("test_*.py")}


@pytest.mark.parametrize("mark", MARKS)
def test_every_pattern_names_a_test(mark):
    """A test that is renamed or moved would lose its mark, and with it a run under other versions, in silence."""
    for file, pattern in MARKS[mark].items():
        names = re.findall(r"^def (test_\w+)", TESTS.get(file, ""), re.M)
        for part in pattern.split("|"):
            assert any(re.search(part, name) for name in names), f"{file}: no test is called {part}"


def test_every_quick_file_is_there():
    assert not QUICK - TESTS.keys()
