# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The models that a run trains: a Phase15 model, new or loaded, ready for its stage; and the baselines made of it."""

import importlib.util
import json
import sys
from dataclasses import fields
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, PromptTuningConfig, get_peft_model
from transformers import AutoConfig, LlamaConfig, PreTrainedModel, PreTrainedTokenizerBase

from phase15.cli.errors import did_you_mean
from phase15.data.tokenizer import train_tokenizer
from phase15.loading import CAUSAL_LM, PHASE15, check_fields, load_phase15, resolve_source
from phase15.model.configuration_phase15 import Phase15Config
from phase15.model.modeling_phase15 import Phase15ForCausalLM
from phase15.model.recursion_phase15 import check_type
from phase15.training.arguments import Phase15ModelArguments


DEFAULT_VOCAB_SIZE = 2048  # of a new tokenizer


def make_model(args: Phase15ModelArguments, records) -> tuple[Phase15ForCausalLM, PreTrainedTokenizerBase]:
    """Returns the model that `args` describe, ready for its stage, and its tokenizer."""
    if args.model_name_or_path is None:
        model, tokenizer = new_model(args, records)
    else:
        model, tokenizer = load_phase15(args.model_name_or_path, args.dtype, **args.config_fields)
    if args.stage == "hypernet":
        model.llm.requires_grad_(False)
        model.saves_base = not saves_only_hypernet(args)
        if not model.saves_base:
            model.llm_digest()  # a base without a digest is an error now, not at the first checkpoint
    elif args.stage == "lora":
        model = get_peft_model(
            model, lora_config(args, target_modules=r".*llm\..*_proj", modules_to_save=["hypernet"])
        )
    return model, tokenizer


def saves_only_hypernet(args: Phase15ModelArguments) -> bool:
    """
    Returns `True` if a run of stage hypernet saves no base: by default, if it starts from a base, or from a
    HyperNetwork that was saved without one.

    Raises:
        ValueError: if it is asked for where loading would find no base.
    """
    has_base = False
    if args.model_name_or_path is not None:
        source = resolve_source(args.model_name_or_path)
        has_base = source.kind == CAUSAL_LM or (source.kind == PHASE15 and source.config.base_digest is not None)
    if args.save_only_hypernet and not has_base:
        start = args.model_name_or_path or "a new model"
        raise ValueError(f"`save_only_hypernet` needs a base that loading can fetch, but the run starts from {start}.")
    return has_base if args.save_only_hypernet is None else args.save_only_hypernet


def check_config(args: Phase15ModelArguments):
    """
    Raises a ValueError for a model that cannot be made of `args`, before any weight is read: a missing base, sizes
    that do not fit it, an unknown HyperNetwork.
    """
    if args.hypernet_file:
        import_file(args.hypernet_file)
    if args.save_only_hypernet:
        saves_only_hypernet(args)
    if args.model_name_or_path is None:
        return
    source = resolve_source(args.model_name_or_path)
    config = source.config
    if source.kind == PHASE15:
        check_fields(source, args.config_fields)
    elif source.gguf_file:  # reading its config takes as long as reading its weights
        sizes = {name: value for name, value in args.config_fields.items() if name != "hypernet_reads_layers"}
        config = Phase15Config(**sizes)
    else:
        text_config = AutoConfig.from_pretrained(source.folder).get_text_config()
        config = Phase15Config(text_config=text_config, **args.config_fields)
    check_type(config.hypernet_type)


def import_file(path: str):
    """Imports a Python file, which registers a HyperNetwork. Raises a ValueError if it is missing."""
    if not Path(path).is_file():
        raise ValueError(f"`hypernet_file` is {path}, but there is no such file.")
    name = Path(path).stem
    if name in sys.modules:
        return
    spec = importlib.util.spec_from_file_location(name, path)
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])


def new_model(args: Phase15ModelArguments, records) -> tuple[Phase15ForCausalLM, PreTrainedTokenizerBase]:
    """Returns a model with random weights of the size of `base_config`, and a tokenizer trained on the records."""
    if not args.base_config:
        raise ValueError(
            "`model_name_or_path` is missing: a base LLM or a Phase15 model (or `base_config` for a new one)."
        )
    try:
        base_config = json.loads(args.base_config) if isinstance(args.base_config, str) else args.base_config
    except ValueError as error:
        raise ValueError(f"`base_config` is not JSON: {error}") from error
    check_base_config(base_config)
    texts = (record["fields"] for record in records)
    tokenizer = train_tokenizer(texts, base_config.get("vocab_size", DEFAULT_VOCAB_SIZE))
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    text_config = LlamaConfig(**base_config | ids | {"vocab_size": len(tokenizer)})
    return Phase15ForCausalLM(Phase15Config(text_config=text_config, **args.config_fields)), tokenizer


def check_base_config(base_config: dict):
    """Raises a ValueError for unknown fields, which LlamaConfig would accept and ignore."""
    if not isinstance(base_config, dict):
        raise ValueError(
            f"`base_config` is a {type(base_config).__name__}, but fields of a LlamaConfig were expected."
        )
    names = [f.name for f in fields(LlamaConfig)]
    for name in base_config:
        if name not in names:
            raise ValueError(f"`base_config`: unknown field {name!r}{did_you_mean(name, names)}")
    size = base_config.get("vocab_size", DEFAULT_VOCAB_SIZE)
    if not isinstance(size, int) or size < 1:
        raise ValueError(f"`base_config`: `vocab_size` is {size!r}, but it must be a positive integer.")


def lora_config(args: Phase15ModelArguments, **kwargs) -> LoraConfig:
    return LoraConfig(
        task_type="CAUSAL_LM", r=args.lora_r, lora_alpha=args.lora_alpha, lora_dropout=args.lora_dropout, **kwargs
    )


def make_baseline(model: Phase15ForCausalLM, args: Phase15ModelArguments) -> PreTrainedModel | PeftModel:
    """Returns the baseline that `args.baseline` names, made of the weights of `model`."""
    if args.baseline == "window":
        model.hypernet.requires_grad_(False)
        model.hypernet.alpha.data.zero_()
        # α = 0 makes Δ zero, so its computation is skipped
        model.hypernet.forward = lambda carried, *_: torch.zeros_like(carried.embeds)
        return model
    if args.baseline == "full_context":
        return model.llm
    if args.baseline == "lora":
        return get_peft_model(model.llm, lora_config(args, target_modules=r".*_proj"))
    prompt = PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=model.config.num_soft_tokens,
        prompt_tuning_init="SAMPLE_VOCAB",  # the default starts far larger than embeddings are
    )
    return get_peft_model(model.llm, prompt)


__all__ = ["check_config", "make_baseline", "make_model"]
