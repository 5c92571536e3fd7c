# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Any folder, Hub id or .gguf file to a model and its tokenizer, strictly; baselines, LoRA, compiled layers."""

from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from phase15.cli.files import QUICKSTART
from phase15.model.base_phase15 import split_gguf
from phase15.model.configuration_phase15 import Phase15Config
from phase15.model.modeling_phase15 import Phase15ForCausalLM


PHASE15, ADAPTER, CAUSAL_LM = "a Phase15 model", "a PEFT adapter", "a causal LM"


def kind_of(name: str | Path) -> str:
    """The kind of model in a folder, a `.gguf` file or a Hub id. Runs no code of the folder."""
    folder, gguf_file = split_gguf(name)
    if gguf_file:
        if not Path(name).is_file():
            raise ValueError(f"{name}: no such file.")
        return CAUSAL_LM
    if Path(folder, "adapter_config.json").is_file():
        return ADAPTER
    if Path(folder).is_dir() and not Path(folder, "config.json").is_file():
        raise ValueError(f"{name} holds no model: neither config.json nor adapter_config.json.")
    model_type = Phase15Config.get_config_dict(folder)[0].get("model_type")
    return PHASE15 if model_type == Phase15Config.model_type else CAUSAL_LM


def check_kind(name: str | Path, expected: str = PHASE15):
    """Raises a ValueError for a model of another kind."""
    kind = kind_of(name)
    if kind == ADAPTER and expected == PHASE15:
        kind += " alone; stage lora saves the merged model with `--merge_adapter true`"
    if not kind.startswith(expected):
        raise ValueError(f"{name} is not {expected}, but {kind}.")


def load_strictly(load: Callable, name: str | Path, **kwargs) -> PreTrainedModel:
    """
    Calls `load`, a `from_pretrained` or [`Phase15ForCausalLM.from_base`], and refuses pickles and weights that do not
    fit the model. The library would only warn, and go on with random weights.

    Raises:
        ValueError: for weights that cannot be read, are missing, are left over, or have another shape.
    """
    options = {"use_safetensors": True, "ignore_mismatched_sizes": True, "output_loading_info": True}
    try:
        model, info = load(name, **kwargs | options)
    except SafetensorError as error:
        files = list(Path(name).glob("*.safetensors"))
        file = files[0] if len(files) == 1 else f"{name}: its weights"
        raise ValueError(f"{file} cannot be read: {error}") from error
    wrong = {
        "missing": info["missing_keys"],
        "left over": info["unexpected_keys"],
        "of another shape": {key for key, *_ in info["mismatched_keys"]},
    }
    if found := [f"{sorted(keys)[0]} is {what}" for what, keys in wrong.items() if keys]:
        number = sum(map(len, wrong.values()))
        raise ValueError(
            f"{name}: {number} of the weights do not fit the model that config.json describes: {', '.join(found)}."
        )
    return model


class StrictPhase15ForCausalLM(Phase15ForCausalLM):
    """The model for tools that load it themselves: weights that do not fit are refused."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        return load_strictly(super().from_pretrained, pretrained_model_name_or_path, **kwargs)


@contextmanager
def lower_case(name: str | Path):
    """A name that ends in `.gguf` for a `.GGUF` file, because the library asks for it; any other name unchanged."""
    path = Path(name)
    if path.suffix == ".gguf" or path.suffix.lower() != ".gguf":
        yield name
        return
    with TemporaryDirectory() as folder:
        link = Path(folder, f"{path.stem}.gguf")
        link.symlink_to(path.absolute())
        yield link


def load_phase15(
    name: str | Path, dtype: str = "auto", **config_fields
) -> tuple[Phase15ForCausalLM, PreTrainedTokenizerBase]:
    """A Phase15 model and its tokenizer. A base LLM gets a new HyperNetwork, of a shape that `config_fields` says."""
    folder, gguf_file = split_gguf(name)
    if kind_of(name) == PHASE15:
        model = load_strictly(Phase15ForCausalLM.from_pretrained, name, dtype=dtype)
        for key, value in config_fields.items():
            if value != getattr(model.config, key):
                raise ValueError(f"`{key}` is {value}, but {name} was made with {getattr(model.config, key)}.")
        return model, load_tokenizer(name, config=model.config)  # given the config, no code of the folder is run
    with lower_case(name) as readable:
        model = load_strictly(Phase15ForCausalLM.from_base, readable, dtype=dtype, **config_fields)
    tokenizer = load_tokenizer(folder, gguf_file=gguf_file)
    if gguf_file:  # transformers 5.17 mistakes its end token for the start token
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.text_config.eos_token_id)
    return model, tokenizer


def load_served(
    name: str, dtype: str = "auto", revision: str | None = None, chunk_length: int | None = None
) -> tuple[Phase15ForCausalLM, PreTrainedTokenizerBase]:
    """
    A Phase15 model of a folder or of the Hub, and its tokenizer. None of its code is run. A `chunk_length` that it
    cannot speak with is refused before its weights are read.
    """
    if name == QUICKSTART and not Path(name).exists():
        raise ValueError(f"{name} is not there: run python train_sft.py, or name another model.")
    try:
        check_kind(name)
    except OSError as error:  # the library's does not always name it
        raise OSError(f"{name}: {error}") from error
    revision = revision or "main"
    Phase15Config.from_pretrained(name, revision=revision).check_chunk_length(chunk_length)
    model = load_strictly(Phase15ForCausalLM.from_pretrained, name, dtype=dtype, revision=revision)
    return model, load_tokenizer(name, config=model.config, revision=revision)


def load_any(
    name: str, dtype: str = "float32", base: str | None = None, device: str = "cpu"
) -> PreTrainedModel | PeftModel:
    """A Phase15 model, a causal LM, or an adapter on `base`, in evaluation mode."""
    kind = kind_of(name)
    if kind == PHASE15:
        model = load_strictly(Phase15ForCausalLM.from_pretrained, name, dtype=dtype)
    elif kind == ADAPTER:
        if not Path(name, "adapter_model.safetensors").is_file():  # PEFT would load a pickle instead
            raise ValueError(f"{name} has no adapter_model.safetensors, and no pickle is loaded.")
        model = PeftModel.from_pretrained(load_any(base_of(name, base), dtype), name)
    else:
        with lower_case(name) as readable:
            model = load_strictly(Phase15ForCausalLM.from_base, readable, dtype=dtype).llm
    return model.to(device).eval()


def base_of(adapter: str, base: str | None = None) -> str:
    """The model that an adapter is loaded on: `base`, or the one that it was trained on."""
    base = base or PeftConfig.from_pretrained(adapter).base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter} does not say which model it adapts; give --base.")
    if (kind := kind_of(base)) != CAUSAL_LM:
        raise ValueError(f"{adapter} adapts {base}, but that is {kind}, where {CAUSAL_LM} was expected.")
    return base


def vocab_size_of(name: str, base: str | None = None) -> int:
    """The vocabulary of any model, read from its config."""
    kind = kind_of(name)
    if kind == ADAPTER:
        return vocab_size_of(base_of(name, base))
    if kind == PHASE15:
        return Phase15Config.from_pretrained(name).text_config.vocab_size
    folder, gguf_file = split_gguf(name)
    return AutoConfig.from_pretrained(folder, gguf_file=gguf_file).vocab_size


def load_tokenizer(name: str | Path, **kwargs) -> PreTrainedTokenizerBase:
    """`AutoTokenizer.from_pretrained`; raises a ValueError that names the folder."""
    try:
        return AutoTokenizer.from_pretrained(name, **kwargs)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ValueError(f"{name}: the tokenizer cannot be loaded: {error}") from error


__all__ = [
    "CAUSAL_LM",
    "PHASE15",
    "StrictPhase15ForCausalLM",
    "check_kind",
    "kind_of",
    "load_any",
    "load_phase15",
    "load_served",
    "load_tokenizer",
    "vocab_size_of",
]
