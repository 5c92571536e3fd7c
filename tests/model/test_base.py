# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Arguments and bases that are refused or work, and weights that lie elsewhere than in memory."""

import copy
import shutil

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reference import SIZES, VOCAB, random_ids, randomise_alpha
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from phase15.model.base_phase15 import SIZES as CHECKED
from phase15.model.base_phase15 import check_sizes
from phase15.model.modeling_phase15 import Phase15ForCausalLM


@pytest.mark.parametrize("known", [4, 5, 6])
def test_sizes_of_an_adapter_from_before_a_choice(known, bases):
    """Four numbers: without a slot gate, α with its sign, no layer read. Five: with its sign. Six: no layer read."""
    earlier = {"hypernet_slot_gate": False, "hypernet_signed_alpha": True, "hypernet_reads_layers": 0}
    old = SIZES | {"hypernet_signed_alpha": False} | dict(list(earlier.items())[known - 4 :])
    state = {"hypernet.sizes": torch.tensor([old[name] for name in CHECKED[:known]])}
    check_sizes(Phase15ForCausalLM.from_base(bases["llama"], **old), state, "")
    fields = ", ".join(f"{name}={old[name]}" for name in earlier)
    with pytest.raises(ValueError, match=fields):
        check_sizes(Phase15ForCausalLM.from_base(bases["llama"], **SIZES), state, "")


# weights that were saved before 0.6.0, when the head was its own body


def earlier(name: str) -> str:
    """The name of a weight before 0.6.0."""
    return name.replace("model.llm.", "llm.", 1).replace("model.hypernet.", "hypernet.", 1)


def test_folders_and_checkpoints_of_before_load(tiny, tmp_path):
    """A folder by `from_pretrained`, a checkpoint by `load_state_dict` as Trainer does; strictly."""
    ids = random_ids(2, 20)
    tiny.save_pretrained(tmp_path / "model")
    weights = {earlier(name): weight for name, weight in load_file(tmp_path / "model" / "model.safetensors").items()}
    assert not any(name.startswith("model.") for name in weights)
    save_file(weights, tmp_path / "model" / "model.safetensors", metadata={"format": "pt"})
    loaded, info = Phase15ForCausalLM.from_pretrained(tmp_path / "model", output_loading_info=True)
    assert not any(info.values()) and torch.equal(loaded(ids).logits, tiny(ids).logits)
    fresh = Phase15ForCausalLM(tiny.config).eval()
    assert not torch.equal(fresh(ids).logits, tiny(ids).logits)
    fresh.load_state_dict({earlier(name): weight for name, weight in tiny.state_dict().items()}, strict=True)
    assert torch.equal(fresh(ids).logits, tiny(ids).logits)


def test_an_adapter_of_before_loads(tiny, bases, tmp_path):
    """Its weights by PEFT's own renaming; a pattern of whole names by the edit that CHANGELOG.md gives."""
    ids = random_ids(2, 20)
    settings = LoraConfig(
        task_type="CAUSAL_LM",
        r=2,
        target_modules=r".*llm\..*_proj",
        modules_to_save=["hypernet"],
        init_lora_weights=False,
    )
    adapted = get_peft_model(copy.deepcopy(tiny), settings).eval()
    adapted.save_pretrained(tmp_path / "adapter")
    file = tmp_path / "adapter" / "adapter_model.safetensors"
    save_file({earlier(name): weight for name, weight in load_file(file).items()}, file, metadata={"format": "pt"})
    loaded = PeftModel.from_pretrained(copy.deepcopy(tiny), tmp_path / "adapter").eval()
    assert torch.equal(loaded(ids).logits, adapted(ids).logits)
    assert not torch.equal(loaded(ids).logits, tiny(ids).logits)


# offloaded weights


PLACES = [
    {"model.hypernet": "disk", "model.llm": "cpu"},
    {"model.hypernet": "cpu", "model.llm.lm_head": "cpu", "model.llm.model": "disk"},
    {"model.hypernet": "disk", "model.llm": "disk"},
    0.5,
    0.7,
    0.9,
]


@pytest.mark.parametrize("place", PLACES, ids=str)
@pytest.mark.parametrize("base", ["llama", "llama-tied"])
def test_an_offloaded_model_is_the_model_in_memory(base, place, bases, tmp_path):
    """By a device map, or by a limit of memory, a share of the model's size."""
    if base == "llama-tied" and place == PLACES[1]:
        return  # transformers itself cannot: the head is the embeddings
    model = randomise_alpha(Phase15ForCausalLM.from_base(bases[base], **SIZES))
    model.save_pretrained(tmp_path / "model")
    ids, query_lengths = random_ids(2, 20), torch.tensor([9, 12])
    kwargs = {"device_map": place}
    if isinstance(place, float):
        size = sum(parameter.nbytes for parameter in model.parameters())
        kwargs = {"device_map": "auto", "max_memory": {"cpu": int(size * place)}}
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", trust_remote_code=True, offload_folder=tmp_path / "offload", **kwargs
    )
    assert any(parameter.is_meta for parameter in offloaded.parameters())
    settings = {"max_new_tokens": 10, "do_sample": False, "pad_token_id": 0}
    with torch.no_grad():
        expected, actual = (each(ids, query_lengths=query_lengths).logits for each in (model, offloaded))
    assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(offloaded.generate(ids, **settings), model.generate(ids, **settings))


def test_the_attention_of_both_parts_is_set(tiny, caplog):
    with caplog.at_level("WARNING"):
        tiny.set_attn_implementation("eager")
    assert tiny.config._attn_implementation == tiny.llm.config._attn_implementation == "eager" and not caplog.text
    assert tiny(random_ids(1, 9), output_attentions=True).attentions


@pytest.mark.parametrize("name", ["position_ids", "shift_labels", "cu_seq_lens_q"])
def test_arguments_that_would_be_ignored_are_refused(name, tiny):
    ids = random_ids(1, 9)
    with pytest.raises(ValueError, match=f"`{name}` cannot be given"):
        tiny(ids, labels=ids, **{name: ids})
    assert torch.equal(tiny(ids, **{name: None}).logits, tiny(ids).logits)  # PEFT gives None


# bases


@pytest.mark.parametrize(
    ("kind", "fields", "reason"),
    [
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 32}, None),
        ("opt", {"ffn_dim": 48, "word_embed_proj_dim": 16}, "embeddings are 16 wide, and its hidden states 32"),
        ("gpt2", {"n_embd": 32, "n_layer": 2, "n_head": 4}, None),
        ("llama4_text", {"num_local_experts": 2, "head_dim": 8, "num_key_value_heads": 2}, "embeddings alone"),
        ("bloom", {}, "takes no position_ids"),
        ("cohere", {"num_key_value_heads": 4}, "logits are more than"),
    ],
)
def test_other_architectures_work_or_are_refused(kind, fields, reason, tmp_path):
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = AutoConfig.for_model(kind, **sizes, **fields, **({"intermediate_size": 48} if "opt" not in kind else {}))
    AutoModelForCausalLM.from_config(config).eval().save_pretrained(tmp_path)
    if reason is not None:
        with pytest.raises(ValueError, match=f"ForCausalLM cannot be a base of Phase15: .*{reason}"):
            Phase15ForCausalLM.from_base(tmp_path, **SIZES)
        return
    ids, base = random_ids(1, 12), AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    with pytest.raises(ValueError, match="`hypernet_reads_layers` is 1, but .* has no `"):
        Phase15ForCausalLM.from_base(tmp_path, **SIZES)
    model = Phase15ForCausalLM.from_base(tmp_path, **SIZES | {"hypernet_reads_layers": 0})
    assert_close(model(ids).logits, base(ids).logits, atol=1e-5, rtol=1e-5)


def test_settings_of_a_base_that_cannot_be_honoured_are_dropped(bases, caplog, tmp_path):
    shutil.copytree(bases["llama"], tmp_path / "base")
    GenerationConfig(cache_implementation="hybrid", do_sample=True, top_k=7).save_pretrained(tmp_path / "base")
    with caplog.at_level("WARNING"):
        model = Phase15ForCausalLM.from_base(tmp_path / "base", **SIZES)
    assert "cannot honour are dropped: cache_implementation." in caplog.text
    assert model.generation_config.top_k == 7
    model.save_pretrained(tmp_path / "model")
    loaded = Phase15ForCausalLM.from_pretrained(tmp_path / "model")
    assert loaded.generate(random_ids(1, 5), max_new_tokens=3, pad_token_id=0).shape == (1, 8)


def test_a_cut_gguf_file_is_named(tmp_path):
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\0\0\0" + b"\0" * 20)
    with pytest.raises(ValueError, match="cut.gguf cannot be read: "):
        Phase15ForCausalLM.from_base(tmp_path / "cut.gguf")
    with pytest.raises(ValueError, match="cut.gguf cannot be read: "):
        Phase15ForCausalLM.from_base(tmp_path, gguf_file="cut.gguf")
