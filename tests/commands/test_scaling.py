# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""docs/scaling.md has the tables that its script prints, and the script counts what a step computes."""

from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig

from phase15.commands.benchmarks import scaling
from phase15.model.configuration_phase15 import Phase15Config
from phase15.model.modeling_phase15 import Phase15ForCausalLM


@pytest.mark.parametrize("argv", [[], ["--chunk_length", "64"]], ids=str)
def test_the_page_has_the_tables_of_the_script(argv, capsys):
    scaling.main(argv)
    page = (Path(__file__).parents[2] / "docs" / "scaling.md").read_text("utf-8")
    tables = capsys.readouterr().out.strip().split("\n\n")
    assert len(tables) == 2 and all(f"\n{table}\n" in page for table in tables)


@pytest.mark.parametrize("chunk_length", [16, 32, 64])
def test_the_work_of_a_row_is_what_torch_counts(chunk_length):
    """Without attention scores, which the formula leaves out. They cost little if the layers are wide."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2, "num_attention_heads": 4}
    shape |= {"vocab_size": 300}
    sizes = {"hypernet_hidden_size": 256, "hypernet_intermediate_size": 1024, "hypernet_num_attention_heads": 4}
    config = Phase15Config(text_config=LlamaConfig(**shape), chunk_length=chunk_length, **sizes)
    model = Phase15ForCausalLM(config)
    ids = torch.randint(300, (1, 2 * scaling.TOKENS))
    labels = ids.clone()
    labels[:, : scaling.TOKENS] = -100
    parts = (model.llm.model.layers, model.llm.lm_head, model.hypernet, model)
    numbers = [sum(parameter.numel() for parameter in part.parameters()) for part in parts]
    full, frozen, positions = scaling.work(scaling.Parameters(*numbers, config), chunk_length)
    num_chunks = scaling.TOKENS // chunk_length
    assert positions == num_chunks * (128 + chunk_length - 1) and frozen < full
    with FlopCounterMode(display=False) as counter:
        model(ids, labels=labels, skip_logits=True).loss.backward()
    assert full == pytest.approx(counter.get_total_flops(), rel=0.25)


def test_some_chunks_of_each_record_cost_their_share():
    parameters = scaling.count(scaling.TINYLLAMA)
    whole = scaling.work(parameters, 16)
    some = scaling.work(parameters, 16, 4)
    assert some.positions == whole.positions / 4 and scaling.work(parameters, 16, 99) == whole
    recursion = 6 * parameters.hypernet * 16 * 128
    assert some.full_flop - recursion == pytest.approx((whole.full_flop - recursion) / 4)


@pytest.mark.parametrize("argv", [["--chunk_length", "0"], ["--chunk_length", "257"], ["--chunks_per_record", "0"]])
def test_impossible_numbers_are_refused(argv, capsys):
    with pytest.raises(SystemExit):
        scaling.main(argv)
    assert "is not possible" in capsys.readouterr().err
