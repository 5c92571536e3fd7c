# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Any folder, Hub id or .gguf file to a model and its tokenizer; baselines, LoRA, compiled layers."""

import json
import os
from dataclasses import fields
from pathlib import Path

import torch
from peft import LoraConfig, PeftConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import (
    AutoConfig,
    AutoTokenizer,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GradientCheckpointingLayer

from configuration_phase15 import Phase15Config
from modeling_phase15 import HyperNetworkLayer, Phase15ForCausalLM
from phase15.arguments import Phase15ModelArguments, did_you_mean
from phase15.quickstart import train_tokenizer


PHASE15, ADAPTER, CAUSAL_LM = "a Phase15 model", "a PEFT adapter", "a causal LM"


def kind_of(name: str) -> str:
    """What a folder, a .gguf file or a Hub id holds."""
    if name.endswith(".gguf"):
        if not Path(name).is_file():
            raise ValueError(f"{name}: no such file.")
        return CAUSAL_LM
    if Path(name, "adapter_config.json").is_file():
        return ADAPTER
    if Path(name).is_dir() and not Path(name, "config.json").is_file():
        raise ValueError(f"{name} holds no model that is known here: neither config.json nor adapter_config.json.")
    model_type = Phase15Config.get_config_dict(name)[0].get("model_type")
    return PHASE15 if model_type == Phase15Config.model_type else CAUSAL_LM


def base_of(adapter: str, base: str | None) -> str:
    """What an adapter is loaded on: `base`, or what it was trained on."""
    base = base or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter} does not say which model it adapts; give --base.")
    if (kind := kind_of(base)) != CAUSAL_LM:
        raise ValueError(f"{adapter} adapts {base}, but that is {kind}, where {CAUSAL_LM} was expected.")
    return base


def vocab_size(name: str, base: str | None) -> int:
    kind = kind_of(name)
    if kind == ADAPTER:
        return vocab_size(base_of(name, base), base)
    if kind == PHASE15:
        return Phase15Config.from_pretrained(name).text_config.vocab_size
    folder, gguf_file = os.path.split(os.path.abspath(name)) if name.endswith(".gguf") else (name, None)
    return AutoConfig.from_pretrained(folder, gguf_file=gguf_file).vocab_size


def load(name: str, args) -> PreTrainedModel | PeftModel:
    kind = kind_of(name)
    if kind == PHASE15:
        model = Phase15ForCausalLM.from_pretrained(name, dtype=args.dtype)
    elif kind == ADAPTER:
        if not Path(name, "adapter_model.safetensors").is_file():  # PEFT would take a pickle instead
            raise ValueError(f"{name} has no adapter_model.safetensors, and no pickle is loaded.")
        model = PeftModel.from_pretrained(load(base_of(name, args.base), args), name)
    else:
        model = Phase15ForCausalLM.from_base(name, dtype=args.dtype).llm
    return model.to(args.device).eval()


def load_tokenizer(name: str | Path, **kwargs) -> PreTrainedTokenizerBase:
    """`AutoTokenizer.from_pretrained`; raises a ValueError that names what cannot be loaded."""
    try:
        return AutoTokenizer.from_pretrained(name, **kwargs)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ValueError(f"{name}: the tokenizer cannot be loaded: {error}") from error


def load_model(args: Phase15ModelArguments, records) -> tuple[Phase15ForCausalLM, PreTrainedTokenizerBase]:
    """The model that `args` describe, ready for its stage, and its tokenizer."""
    name = args.model_name_or_path
    if name is None and not args.base_config:
        raise ValueError(
            "`model_name_or_path` is missing: a base LLM or a Phase15 model (or `base_config` for a new one)."
        )
    if name is None:
        try:
            base_config = json.loads(args.base_config) if isinstance(args.base_config, str) else args.base_config
        except ValueError as error:
            raise ValueError(f"`base_config` is not JSON: {error}") from error
        check_base_config(base_config)
        tokenizer = train_tokenizer(records, base_config.get("vocab_size", 2048))
        ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        text_config = LlamaConfig(**base_config | ids | {"vocab_size": len(tokenizer)})
        model = Phase15ForCausalLM(Phase15Config(text_config=text_config, **args.config_fields))
    elif name.endswith(".gguf") and not Path(name).is_file():
        raise ValueError(f"{name}: no such file.")
    elif is_phase15(name):
        model = Phase15ForCausalLM.from_pretrained(name, dtype=args.dtype)
        tokenizer = load_tokenizer(name, config=model.config)  # with it, no code of the folder is run
        for key, value in args.config_fields.items():
            if value != getattr(model.config, key):
                raise ValueError(f"`{key}` is {value}, but {name} was made with {getattr(model.config, key)}.")
    else:
        model = Phase15ForCausalLM.from_base(name, dtype=args.dtype, **args.config_fields)
        folder, gguf_file = os.path.split(os.path.abspath(name)) if name.endswith(".gguf") else (name, None)
        tokenizer = load_tokenizer(folder, gguf_file=gguf_file)
        if gguf_file:  # whose end token transformers 5.17 takes for the start token
            tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.text_config.eos_token_id)
    if args.stage == "hypernet":
        model.llm.requires_grad_(False)
    elif args.stage == "lora":
        model = get_peft_model(model, lora_config(args, target_modules=r"llm\..*_proj", modules_to_save=["hypernet"]))
    return model, tokenizer


def check_base_config(base_config: dict):
    """Refuses what is no field of a LlamaConfig, which would take it and not use it."""
    if not isinstance(base_config, dict):
        raise ValueError(
            f"`base_config` is a {type(base_config).__name__}, but fields of a LlamaConfig were expected."
        )
    names = [f.name for f in fields(LlamaConfig)]
    for name in base_config:
        if name not in names:
            raise ValueError(f"`base_config`: unknown field {name!r}{did_you_mean(name, names)}")
    if not isinstance(size := base_config.get("vocab_size", 2048), int) or size < 1:
        raise ValueError(f"`base_config`: `vocab_size` is {size!r}, but it must be a positive integer.")


def lora_config(args: Phase15ModelArguments, **kwargs) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM", r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, **kwargs
    )


def make_baseline(model: Phase15ForCausalLM, args: Phase15ModelArguments) -> PreTrainedModel | PeftModel:
    """The baseline that `args` ask for, made of `model`'s own weights."""
    if args.baseline == "window":
        model.hypernet.requires_grad_(False)
        model.hypernet.alpha.data.zero_()
        # the Δ that α = 0 gives, without the work
        model.hypernet.forward = lambda carried, *_: torch.zeros_like(carried.embeds)
        return model
    if args.baseline == "full_context":
        return model.llm
    if args.baseline == "lora":
        return get_peft_model(model.llm, lora_config(args, target_modules=r".*_proj"))
    prompt = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=model.config.num_soft_tokens,
        prompt_tuning_init="SAMPLE_VOCAB",  # by default it starts far larger than embeddings are
    )
    return get_peft_model(model.llm, prompt)


def compile_layers(model: torch.nn.Module):
    """
    Compiles the layers of LLM and HyperNetwork, in place: one compilation each, since all layers of a kind share it,
    and none of what is between them, whose shapes change with the batch.
    """
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer | HyperNetworkLayer):
            module.compile()


def is_phase15(name: str) -> bool:
    if name.endswith(".gguf"):
        return False
    return Phase15Config.get_config_dict(name)[0].get("model_type") == Phase15Config.model_type
