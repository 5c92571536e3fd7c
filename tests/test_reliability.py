# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""What docs/reliability.md says about the code and its tests, held against both."""

import re
from pathlib import Path

import pytest
from private_names import private_names


ROOT = Path(__file__).parent.parent
DOC = (ROOT / "docs" / "reliability.md").read_text("utf-8")
SECTION = DOC.split("## Names that others have not promised")[1].split("\n## ")[0]
ROWS = {cells[0]: cells[1:] for cells in re.findall(r"^\| `(.+?)` \| (.+?) \| (.+?) \| (.+?) \|$", SECTION, re.M)}


@pytest.mark.extra
def test_the_list_of_private_names_is_complete():
    for package in ("gradio", "lm_eval", "uvicorn", "openai"):
        pytest.importorskip(package, reason="requirements-extra.txt")
    found = private_names(ROOT)
    assert {name: ", ".join(f"`{file}`" for file in sorted(files)) for name, files in found.items()} == {
        name: where for name, (where, *_) in ROWS.items()
    }
    assert f"The code uses {len(ROWS)} names" in SECTION


@pytest.mark.parametrize("name", ROWS)
def test_the_test_that_would_fail_first_exists(name):
    tests = re.findall(r"`(\w+)` in `(tests/[\w/]+\.py)`", ROWS[name][-1])
    assert tests
    for test, file in tests:
        assert re.search(rf"def test_\w*{test}", (ROOT / file).read_text("utf-8")), (test, file)
