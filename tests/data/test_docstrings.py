# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The data set `python-docstrings`."""

import inspect
import re

from phase15.data.docstrings import docstring_records


def test_docstrings_of_the_standard_library():
    records = {record["question"]: record["answer"] for record in docstring_records()}
    assert len(records) > 1000 and len(set(records.values())) == len(list(records.values()))
    assert all(40 <= len(answer) <= 1200 for answer in records.values())
    assert records["What is the function textwrap.dedent for?"] == inspect.getdoc(__import__("textwrap").dedent)
    assert records["What is the class argparse.ArgumentParser for?"].startswith("Object for parsing command line")
    assert not any(re.search(r"\b(test|idlelib)\.|\._", question) for question in records)
