# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The loader of all commands: a name resolved once, kinds of models, and weights that do not fit."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from reference import SIZES, VOCAB
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from phase15.loading import (
    ADAPTER,
    CAUSAL_LM,
    PHASE15,
    check_kind,
    load_any,
    load_phase15,
    load_served,
    load_strictly,
    load_tokenizer,
    read_vocab_size,
    resolve_source,
)
from phase15.model.base_phase15 import split_gguf
from phase15.model.configuration_phase15 import Phase15Config
from phase15.model.modeling_phase15 import Phase15ForCausalLM


@pytest.fixture
def folders(tiny, bases, tmp_path) -> dict[str, str]:
    """A folder of each kind of model."""
    tiny.save_pretrained(tmp_path / "phase15")
    adapter = get_peft_model(
        AutoModelForCausalLM.from_pretrained(bases["llama"]), LoraConfig(target_modules=["q_proj"])
    )
    adapter.save_pretrained(tmp_path / "adapter")
    shutil.copytree(bases["llama"], tmp_path / "base")
    return {PHASE15: str(tmp_path / "phase15"), ADAPTER: str(tmp_path / "adapter"), CAUSAL_LM: str(tmp_path / "base")}


def test_kinds(folders, tmp_path):
    for kind, folder in folders.items():
        source = resolve_source(folder)
        assert (source.kind, source.folder, source.gguf_file, str(source)) == (kind, folder, None, folder)
        assert (source.config is not None) == (kind == PHASE15)
    (tmp_path / "model.GGUF").write_bytes(b"GGUF")
    source = resolve_source(tmp_path / "model.GGUF")
    assert (source.kind, source.folder, source.gguf_file) == (CAUSAL_LM, str(tmp_path), "model.GGUF")
    with pytest.raises(ValueError, match=r"none\.gguf: no such file"):
        resolve_source(tmp_path / "none.gguf")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty holds no model"):
        resolve_source(tmp_path / "empty")


def test_a_bad_config_is_named_with_its_folder(folders):
    path = Path(folders[PHASE15], "config.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chunk_length": 0}))
    with pytest.raises(ValueError, match=rf"^{folders[PHASE15]}: `chunk_length` is 0"):
        resolve_source(folders[PHASE15])


def test_a_source_is_resolved_once(folders, chat_tokenizer, monkeypatch):
    """The config of a Phase15 model is read by its source, and by nothing that takes the source."""
    chat_tokenizer.save_pretrained(folders[PHASE15])
    source = resolve_source(folders[PHASE15])
    assert resolve_source(source) is source and check_kind(source) is source
    reads = []
    read = Phase15Config.get_config_dict.__func__
    monkeypatch.setattr(
        Phase15Config,
        "get_config_dict",
        classmethod(lambda cls, *args, **kwargs: (reads.append(args), read(cls, *args, **kwargs))[1]),
    )
    model, tokenizer = load_phase15(source)
    assert load_any(source).config.to_dict() == model.config.to_dict()
    assert load_served(source)[0].config.to_dict() == model.config.to_dict()
    assert load_tokenizer(source).get_vocab() == tokenizer.get_vocab() == chat_tokenizer.get_vocab()
    assert read_vocab_size(source) == model.config.text_config.vocab_size
    assert not reads
    assert load_any(folders[PHASE15]).config.to_dict() == model.config.to_dict() and len(reads) == 1


def test_a_models_config_is_not_that_of_its_source(folders):
    """Or whoever changes the model's would change what is loaded next."""
    source = resolve_source(folders[PHASE15])
    load_any(source).config.chunk_length = 1
    assert load_any(source).config.chunk_length == source.config.chunk_length == SIZES["chunk_length"]


def test_the_vocabulary_is_read_from_the_config(folders, bases):
    sizes = {read_vocab_size(folders[kind], bases["llama"]) for kind in (PHASE15, ADAPTER, CAUSAL_LM)}
    assert sizes == {VOCAB}
    with pytest.raises(ValueError, match="adapts .*phase15, but that is a Phase15 model, where a causal LM was"):
        read_vocab_size(folders[ADAPTER], folders[PHASE15])


def test_another_kind_is_refused(folders):
    check_kind(folders[PHASE15])
    check_kind(folders[CAUSAL_LM], CAUSAL_LM)
    with pytest.raises(ValueError, match="base is not a Phase15 model, but a causal LM"):
        check_kind(folders[CAUSAL_LM])
    with pytest.raises(ValueError, match="adapter is not a Phase15 model, but a PEFT adapter alone; .*merge_adapter"):
        check_kind(folders[ADAPTER])
    with pytest.raises(ValueError, match="phase15 is not a causal LM, but a Phase15 model"):
        check_kind(folders[PHASE15], CAUSAL_LM)


def test_the_gguf_split(tmp_path):
    assert split_gguf("USER/NAME") == ("USER/NAME", None) and split_gguf(tmp_path) == (tmp_path, None)
    assert split_gguf(tmp_path / "a.b.GGUF") == (str(tmp_path), "a.b.GGUF")


@pytest.mark.parametrize("kind", [PHASE15, CAUSAL_LM])
def test_weights_that_do_not_fit_are_refused(kind, folders):
    """The library would go on with random ones."""
    folder = folders[kind]
    load = Phase15ForCausalLM.from_pretrained if kind == PHASE15 else from_base
    path = f"{folder}/model.safetensors"
    whole = load_file(path)
    name = sorted(name for name in whole if "norm" in name)[0]
    lacking = {key: value for key, value in whole.items() if key != name}
    for weights, problem in (
        (lacking, rf"1 of the weights .*{name} is missing\."),
        (whole | {"more.b": torch.ones(1), "more.a": torch.ones(1)}, r"2 of the weights .* more\.a is left over\."),
        (whole | {name: torch.ones(3)}, rf"1 of the weights .*{name} is of another shape\."),
        (lacking | {"more": torch.ones(1)}, rf"2 of the weights .*{name} is missing, more is left over\."),
    ):
        save_file(weights, path, {"format": "pt"})
        with pytest.raises(ValueError, match=rf"^{folder}: {problem}$"):
            load_strictly(load, folder)
    save_file(whole, path, {"format": "pt"})
    load_strictly(load, folder)


def from_base(folder: str, **kwargs):
    return Phase15ForCausalLM.from_base(folder, **SIZES, **kwargs)


def test_damaged_files_are_named(folders, tiny, tmp_path):
    path = tmp_path / "phase15" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"^{path} cannot be read: "):
        load_any(folders[PHASE15])
    tiny.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    shard = sorted((tmp_path / "shards").glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(ValueError, match=f"^{tmp_path}/shards: its weights cannot be read: "):
        load_any(str(tmp_path / "shards"))
