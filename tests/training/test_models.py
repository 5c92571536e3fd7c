# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""What is refused before weights are read, and a HyperNetwork that a flag names."""

import json
import re
import sys
from pathlib import Path

import pytest
from reference import SIZES
from train_here import prepare

from phase15.model.recursion_phase15 import HYPERNETS


ROOT = Path(__file__).parents[2]
RECORDS = [{"question": f"Why {number}?", "answer": "Because of that."} for number in range(6)]
SHORT = "--max_steps 1 --use_cpu --report_to none --validation_split 0 --per_device_train_batch_size 2".split()


@pytest.fixture
def folder(tmp_path, bases, chat_tokenizer):
    """Records, and a base beside its tokenizer that has no weights: reading them would be another error."""
    (tmp_path / "data.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    base = tmp_path / "base"
    base.mkdir()
    config = json.loads(Path(bases["llama"], "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"vocab_size": len(chat_tokenizer)}))
    chat_tokenizer.save_pretrained(base)
    return tmp_path


def words(folder: Path, **flags) -> list[str]:
    flags = {**SIZES, "dataset_name": folder / "data.jsonl", "model_name_or_path": folder / "base", **flags}
    flags["output_dir"] = folder / "run"
    return [*SHORT, *(word for name, value in flags.items() for word in (f"--{name}", str(value)))]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"num_sink_tokens": 24}, "`num_sink_tokens` is 24, but it must be smaller than `num_soft_tokens`"),
        ({"hypernet_reads_layers": 9}, "`hypernet_reads_layers` is 9, but it must be a number of layers, 0 to 2"),
        ({"hypernet_type": "wishful"}, "`hypernet_type` is 'wishful', but the registered types are"),
        ({"hypernet_file": "no/such.py"}, "`hypernet_file` is no/such.py, but there is no such file"),
        ({"model_name_or_path": "no/such/base"}, "no/such/base"),
    ],
)
def test_a_model_that_cannot_be_made_is_refused_before_weights_are_read(flags, message, folder):
    with pytest.raises((ValueError, OSError), match=re.escape(message)):
        prepare(words(folder, **flags))


def test_columns_are_refused_before_weights_are_read(folder):
    (folder / "data.jsonl").write_text(json.dumps({"frage": "Warum?", "antwort": "Darum."}))
    with pytest.raises(ValueError, match="data.jsonl, record 1: unknown format with columns"):
        prepare(words(folder))


def test_a_hypernetwork_of_a_file(folder, bases, chat_tokenizer):
    """The command of docs/hypernetworks.md."""
    page = (ROOT / "docs" / "hypernetworks.md").read_text("utf-8")
    (folder / "gru_slots.py").write_text(re.search(r"```python\n(\"\"\"A GRU.*?)```", page, re.S)[1], encoding="utf-8")
    base = "{vocab_size: 300, hidden_size: 32, intermediate_size: 48, num_hidden_layers: 2, num_attention_heads: 4}"
    (folder / "recipe.yaml").write_text(
        f"base_config: {base}\ndataset_name: {folder / 'data.jsonl'}\noutput_dir: {folder / 'run'}\n"
    )
    flags = {**SIZES, "hypernet_file": folder / "gru_slots.py", "hypernet_type": "gru_slots"}
    argv = [str(folder / "recipe.yaml"), *SHORT, *(w for n, v in flags.items() for w in (f"--{n}", str(v)))]
    try:
        trainer, *_ = prepare(argv)
        before = trainer.model.hypernet.alpha.clone()
        trainer.train()
        assert type(trainer.model.hypernet).__name__ == "GRUSlots" and (trainer.model.hypernet.alpha != before).any()
        trainer.save_model(folder / "saved")
        assert (folder / "saved" / "gru_slots.py").is_file()
        assert json.loads((folder / "saved" / "config.json").read_text())["hypernet_type"] == "gru_slots"
    finally:
        HYPERNETS.pop("gru_slots", None)
        sys.modules.pop("gru_slots", None)
