# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
import json

import pytest
import torch
from reference import LLM_SIZES, SIZES
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from phase15.model.configuration_phase15 import Phase15Config
from phase15.model.modeling_phase15 import Phase15ForCausalLM


def test_defaults_are_tinyllama_and_the_cards_sizes():
    config = Phase15Config()
    assert isinstance(config.text_config, LlamaConfig) and config.model_type == "phase15"
    assert (config.num_soft_tokens, config.num_sink_tokens, config.chunk_length) == (128, 4, 16)
    assert (config.max_query_length, config.max_answer_length) == (256, 256)
    assert (config.hypernet_hidden_size, config.hypernet_num_hidden_layers) == (1024, 4)
    assert (config.hypernet_num_attention_heads, config.hypernet_intermediate_size) == (16, 4096)


def test_parameter_counts_at_tinyllamas_shape():
    with torch.device("meta"):
        model = Phase15ForCausalLM(Phase15Config())
    assert sum(parameter.numel() for parameter in model.hypernet.parameters()) == 75_841_536
    assert model.llm.num_parameters() == 1_100_048_384  # TinyLlama-1.1B's


@pytest.mark.parametrize(
    "text_config, model_type",
    [
        (LLM_SIZES, "llama"),
        ({"model_type": "qwen2", **LLM_SIZES}, "qwen2"),
        (MistralConfig(**LLM_SIZES), "mistral"),
        (Qwen2Config(**LLM_SIZES, tie_word_embeddings=True), "qwen2"),
    ],
)
def test_composes_any_text_config_and_survives_saving(text_config, model_type, tmp_path):
    config = Phase15Config(text_config=text_config, max_answer_length=99, **SIZES)
    config.save_pretrained(tmp_path)
    loaded = Phase15Config.from_pretrained(tmp_path)
    assert loaded.text_config.model_type == model_type
    assert type(loaded.text_config) is type(config.text_config)
    assert loaded.text_config.to_dict() == config.text_config.to_dict()
    assert {name: getattr(loaded, name) for name in SIZES} == SIZES and loaded.max_answer_length == 99
    assert loaded.tie_word_embeddings is loaded.text_config.tie_word_embeddings
    assert loaded.get_text_config() is loaded.text_config


def test_configs_share_no_state():
    first, second = Phase15Config(), Phase15Config()
    first.text_config.vocab_size = 7
    first.auto_map["AutoModel"] = "elsewhere.Model"
    assert second.text_config.vocab_size == 32000 and second.auto_map["AutoModel"] != "elsewhere.Model"


@pytest.mark.parametrize(
    "name",
    [
        "num_soft_tokens",
        "num_sink_tokens",
        "chunk_length",
        "max_query_length",
        "max_answer_length",
        "hypernet_hidden_size",
        "hypernet_num_hidden_layers",
        "hypernet_num_attention_heads",
        "hypernet_intermediate_size",
    ],
)
@pytest.mark.parametrize("value", [0, -3, 2.5, True])
def test_sizes_are_positive_integers(name, value):
    with pytest.raises(ValueError, match=rf"{name}(?s:.*){value}"):
        Phase15Config(**{name: value})


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"num_soft_tokens": 8, "num_sink_tokens": 8}, r"`num_sink_tokens` is 8.*smaller than `num_soft_tokens`"),
        ({"num_soft_tokens": 8, "num_sink_tokens": 9}, r"`num_sink_tokens` is 9.*smaller than `num_soft_tokens`"),
        (
            {"hypernet_hidden_size": 100, "hypernet_num_attention_heads": 16},
            r"`hypernet_hidden_size` is 100.*multiple of `hypernet_num_attention_heads` \(16\)",
        ),
        ({"hypernet_slot_gate": 1}, "`hypernet_slot_gate` is 1, but it must be true or false"),
        ({"hypernet_signed_alpha": "no"}, "`hypernet_signed_alpha` is 'no', but it must be true or false"),
        ({"hypernet_reads_layers": -1}, "`hypernet_reads_layers` is -1, but it must be a number of layers, 0 to 22"),
        ({"hypernet_reads_layers": 23}, "`hypernet_reads_layers` is 23, but it must be a number of layers, 0 to 22"),
        ({"hypernet_reads_layers": True}, "`hypernet_reads_layers` is True"),
        ({"text_config": {"model_type": "no-such-model"}}, "`text_config.model_type` is 'no-such-model'"),
        (
            {"text_config": MistralConfig(sliding_window=143)},
            r"`text_config.sliding_window` is 143.*at least `num_soft_tokens` \+ `chunk_length` \(128 \+ 16\)",
        ),
    ],
)
def test_values_that_cannot_work_together(fields, message):
    with pytest.raises(ValueError, match=message):
        Phase15Config(**fields)


def test_the_smallest_values_work():
    Phase15Config(num_soft_tokens=2, num_sink_tokens=1, chunk_length=1, max_query_length=1)
    config = Phase15Config(text_config=LLM_SIZES, hypernet_hidden_size=2, hypernet_num_attention_heads=2)
    assert Phase15ForCausalLM(config).hypernet.pointer_q_proj.out_features == 1
    Phase15Config(text_config=MistralConfig(sliding_window=144))


def test_a_saved_config_that_was_broken_by_hand_is_refused(tmp_path):
    Phase15Config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"num_sink_tokens": 4', '"num_sink_tokens": 400'))
    with pytest.raises(ValueError, match="`num_sink_tokens` is 400"):
        Phase15Config.from_pretrained(tmp_path)


def test_what_is_saved_is_read_again(tmp_path):
    """Attributes that a tool sets on a config are no fields; the library writes them."""
    config = Phase15Config(text_config=LLM_SIZES, **SIZES)
    values = {
        "pretraining_tp": 1,
        "is_decoder": True,
        "max_seq_length": 77,
        "loss_type": "ForCausalLM",
        "wormhole": [3],
    }
    for name, value in values.items():
        setattr(config, name, value)
    config.save_pretrained(tmp_path)
    loaded = Phase15Config.from_pretrained(pretrained_model_name_or_path=tmp_path)
    assert {name: getattr(loaded, name) for name in values} == values
    assert {name: getattr(loaded, name) for name in SIZES} == SIZES
    loaded, unused = Phase15Config.from_pretrained(tmp_path, return_unused_kwargs=True, colour="red")
    assert loaded.wormhole == [3] and unused == {"colour": "red"}


def test_a_config_from_before_the_choice_keeps_alphas_sign(tmp_path):
    new, file = Phase15Config(), tmp_path / "config.json"
    assert new.hypernet_signed_alpha is False
    for signed in (False, True):
        Phase15Config(hypernet_signed_alpha=signed).save_pretrained(tmp_path)
        assert Phase15Config.from_pretrained(tmp_path).hypernet_signed_alpha is signed
        values = json.loads(file.read_text())
        assert values.pop("hypernet_signed_alpha") is signed
        file.write_text(json.dumps(values))
        assert Phase15Config.from_pretrained(tmp_path).hypernet_signed_alpha is True
        assert Phase15Config.from_json_file(file).hypernet_signed_alpha is True


def test_a_misspelt_field_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="`num_soft_token` is not a field .*did you mean `num_soft_tokens`"):
        Phase15Config(num_soft_token=64)
    with pytest.raises(ValueError, match="`wormhole` is not a field"):
        Phase15Config(wormhole=64)
    Phase15Config().save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"num_sink_tokens"', '"num_sinks_tokens"'))
    with pytest.raises(ValueError, match=f"^{tmp_path}: `num_sinks_tokens` is not a field .*`num_sink_tokens`"):
        Phase15Config.from_pretrained(tmp_path)
