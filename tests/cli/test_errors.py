# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""How commands end on errors."""

import pytest

from phase15.cli.errors import line_of, one_line_errors


def test_an_error_of_the_input_ends_in_one_line():
    with pytest.raises(SystemExit) as ended, one_line_errors("x.py"):
        raise ValueError("bad\n  input")
    assert ended.value.code == "x.py: bad input"


def test_a_bug_keeps_its_traceback():
    with pytest.raises(KeyError), one_line_errors("x.py"):
        raise KeyError("bug")
    with pytest.raises(ValueError), one_line_errors("x.py", OSError):
        raise ValueError("not among the kinds")


def test_an_interrupt_ends_with_its_status():
    with pytest.raises(SystemExit) as ended, one_line_errors("x.py"):
        raise KeyboardInterrupt
    assert ended.value.code == 130


def test_the_message_of_a_worker_is_taken_out_of_its_traceback():
    wrapped = (
        "Caught Phase15RecordError in worker.\nTraceback:\nphase15.data.records.Phase15RecordError: f, record 3: bad\n"
    )
    assert line_of(ValueError(wrapped)) == "f, record 3: bad"
