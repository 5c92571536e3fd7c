# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The card's version and its signature; tests/hub/test_security.py has its untrusted texts."""

import pytest

from phase15.hub import cards
from phase15.hub.arguments import PushArguments
from phase15.hub.runs import Run
from phase15.model.configuration_phase15 import VERSION


def test_the_card_names_the_version_of_the_code(tiny, tokenizer):
    args = PushArguments(model_dir=".", repo_id="alice/tiny")
    card = str(cards.model_card(args, Run([], {}, {}), tiny, tokenizer, []))
    assert f"Staged with Phase15 {VERSION} and transformers" in card


@pytest.mark.parametrize("edit", ["x{}", "{}x", "\n{}"])
def test_a_signed_card_notices_edits(edit):
    card = cards.sign_card("# a card\n\ntext\n")
    assert cards.is_unmodified(card) and card.startswith("# a card\n\ntext\n")
    assert not cards.is_unmodified(edit.format(card)) and not cards.is_unmodified(card.replace("text", "test"))
    assert not cards.is_unmodified("# a card\n")
