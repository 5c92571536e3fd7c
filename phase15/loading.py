# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Loads models and tokenizers from any folder, Hub id or `.gguf` file. The name is resolved once into a [`Source`], and
weights that do not fit the model are an error.
"""

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from peft import PeftConfig, PeftModel
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from phase15.cli.files import QUICKSTART
from phase15.model.base_phase15 import split_gguf
from phase15.model.configuration_phase15 import Phase15Config
from phase15.model.modeling_phase15 import Phase15ForCausalLM


# The kinds of models.
PHASE15 = "a Phase15 model"
ADAPTER = "a PEFT adapter"
CAUSAL_LM = "a causal LM"


@dataclass(frozen=True)
class Source:
    """A model that was named, resolved once by `resolve_source` and handed on."""

    name: str | Path  # as the user gave it
    folder: str | Path  # or Hub id
    gguf_file: str | None  # the file in the folder, of a `.gguf` base
    kind: str  # PHASE15, ADAPTER or CAUSAL_LM
    config: Phase15Config | None = None  # of a Phase15 model
    revision: str | None = None  # of a Hub id; None is the main branch

    def __str__(self) -> str:
        return str(self.name)


def resolve_source(name: str | Path | Source, revision: str | None = None) -> Source:
    """
    Returns the source of a model; one that is already resolved is returned unchanged. Reads at most the config, and
    runs no code of the folder.

    Args:
        name (`str`, `Path` or `Source`): a folder, a Hub id or a `.gguf` file.
        revision (`str`, *optional*): of a Hub id.

    Raises:
        ValueError: for a missing file, a folder without a model, or a config with an error.
    """
    if isinstance(name, Source):
        return name
    folder, gguf_file = split_gguf(name)
    if gguf_file:
        if not Path(name).is_file():
            raise ValueError(f"{name}: no such file.")
        return Source(name, folder, gguf_file, CAUSAL_LM)
    if Path(folder, "adapter_config.json").is_file():
        return Source(name, folder, None, ADAPTER)
    if Path(folder).is_dir() and not Path(folder, "config.json").is_file():
        raise ValueError(f"{name} holds no model: neither config.json nor adapter_config.json.")
    values, _ = Phase15Config.get_config_dict(folder, revision=revision)
    if values.get("model_type") != Phase15Config.model_type:
        return Source(name, folder, None, CAUSAL_LM, revision=revision)
    try:
        config = Phase15Config.from_dict(values)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return Source(name, folder, None, PHASE15, config, revision)


def check_kind(name: str | Path | Source, expected: str = PHASE15) -> Source:
    """Returns the source of a model; raises a ValueError for a model of another kind."""
    source = resolve_source(name)
    kind = source.kind
    if kind == ADAPTER and expected == PHASE15:
        kind += " alone; stage lora saves the merged model with `--merge_adapter true`"
    if source.kind != expected:
        raise ValueError(f"{name} is not {expected}, but {kind}.")
    return source


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
    misfits = {
        "missing": info["missing_keys"],
        "left over": info["unexpected_keys"],
        "of another shape": {key for key, *_ in info["mismatched_keys"]},
    }
    examples = [f"{sorted(keys)[0]} is {problem}" for problem, keys in misfits.items() if keys]
    if examples:
        number = sum(map(len, misfits.values()))
        raise ValueError(
            f"{name}: {number} of the weights do not fit the model that config.json describes: {', '.join(examples)}."
        )
    return model


class StrictPhase15ForCausalLM(Phase15ForCausalLM):
    """The model for tools that load it themselves: weights that do not fit are refused."""

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        return load_strictly(super().from_pretrained, pretrained_model_name_or_path, **kwargs)


@contextmanager
def lower_case_suffix(name: str | Path):
    """Yields a name that ends in `.gguf` for a `.GGUF` file, as the library asks for; any other name unchanged."""
    path = Path(name)
    if path.suffix == ".gguf" or path.suffix.lower() != ".gguf":
        yield name
        return
    with TemporaryDirectory() as folder:
        link = Path(folder, f"{path.stem}.gguf")
        link.symlink_to(path.absolute())
        yield link


def load_phase15(
    name: str | Path | Source, dtype: str = "auto", **config_fields
) -> tuple[Phase15ForCausalLM, PreTrainedTokenizerBase]:
    """
    Returns a Phase15 model and its tokenizer.

    Args:
        name (`str`, `Path` or `Source`): a Phase15 model, or a base LLM, which gets a new HyperNetwork.
        dtype (`str`): of the weights.
        config_fields: fields of [`Phase15Config`] for a new HyperNetwork. Those of a Phase15 model must be equal.
    """
    source = resolve_source(name)
    if source.kind == PHASE15:
        check_fields(source, config_fields)
        return load_model(source, dtype), load_tokenizer(source)
    with lower_case_suffix(source.name) as readable:
        model = load_strictly(Phase15ForCausalLM.from_base, readable, dtype=dtype, **config_fields)
    if readable != source.name:  # a link that is gone
        model.config.base_model_name_or_path = str(Path(source.name).absolute())
    tokenizer = load_tokenizer(source)
    if source.gguf_file:  # transformers 5.17 mistakes its end token for the start token
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(model.config.text_config.eos_token_id)
    return model, tokenizer


def check_fields(source: Source, config_fields: dict):
    """Raises a ValueError for a field of [`Phase15Config`] that a Phase15 model was made with another value of."""
    for name, value in config_fields.items():
        own_value = getattr(source.config, name)
        if value != own_value:
            raise ValueError(f"`{name}` is {value}, but {source} was made with {own_value}.")


def load_model(source: Source, dtype: str) -> Phase15ForCausalLM:
    """Returns a Phase15 model without its tokenizer. The config has been read, so no code of the folder is run."""
    return load_strictly(
        Phase15ForCausalLM.from_pretrained,
        source.folder,
        config=source.config,
        dtype=dtype,
        revision=source.revision or "main",
    )


def load_served(
    name: str | Source, dtype: str = "auto", revision: str | None = None, chunk_length: int | None = None
) -> tuple[Phase15ForCausalLM, PreTrainedTokenizerBase]:
    """
    Returns a Phase15 model of a folder or of the Hub, and its tokenizer. None of its code is run. A `chunk_length`
    with which the model cannot generate is refused before its weights are read.
    """
    if name == QUICKSTART and not Path(name).exists():
        raise ValueError(f"{name} is not there: run python train_sft.py, or name another model.")
    try:
        source = check_kind(resolve_source(name, revision))
    except OSError as error:  # the library's error does not always name the model
        raise OSError(f"{name}: {error}") from error
    source.config.check_chunk_length(chunk_length)
    return load_model(source, dtype), load_tokenizer(source)


def load_any(
    name: str | Path | Source, dtype: str = "float32", base: str | None = None, device: str = "cpu"
) -> PreTrainedModel | PeftModel:
    """Returns a Phase15 model, a causal LM, or an adapter on `base`, in evaluation mode."""
    source = resolve_source(name)
    if source.kind == PHASE15:
        model = load_model(source, dtype)
    elif source.kind == ADAPTER:
        if not Path(source.folder, "adapter_model.safetensors").is_file():  # PEFT would load a pickle instead
            raise ValueError(f"{source} has no adapter_model.safetensors, and no pickle is loaded.")
        model = PeftModel.from_pretrained(load_any(resolve_base(source, base), dtype), source.folder)
    else:
        with lower_case_suffix(source.name) as readable:
            model = load_strictly(Phase15ForCausalLM.from_base, readable, dtype=dtype).llm
    return model.to(device).eval()


def resolve_base(adapter: Source, base: str | Source | None = None) -> Source:
    """Returns the source of the model that an adapter is loaded on: `base`, or the one that it was trained on."""
    base = base or PeftConfig.from_pretrained(adapter.folder).base_model_name_or_path
    if not base:
        raise ValueError(f"{adapter} does not say which model it adapts; give --base.")
    source = resolve_source(base)
    if source.kind != CAUSAL_LM:
        raise ValueError(f"{adapter} adapts {base}, but that is {source.kind}, where {CAUSAL_LM} was expected.")
    return source


def read_vocab_size(name: str | Path | Source, base: str | Source | None = None) -> int:
    """Returns the size of the vocabulary of any model, from its config."""
    source = resolve_source(name)
    if source.kind == ADAPTER:
        source = resolve_base(source, base)
    if source.kind == PHASE15:
        return source.config.text_config.vocab_size
    return AutoConfig.from_pretrained(source.folder, gguf_file=source.gguf_file).vocab_size


def load_tokenizer(name: str | Path | Source) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a model; raises a ValueError that names the folder."""
    source = resolve_source(name)
    kwargs = {"gguf_file": source.gguf_file, "revision": source.revision or "main"}
    if source.config is not None:  # without the config, AutoTokenizer would run code of the folder
        kwargs["config"] = source.config
    try:
        return AutoTokenizer.from_pretrained(source.folder, **kwargs)
    except Exception as error:  # tokenizers raises plain Exceptions
        raise ValueError(f"{source.folder}: the tokenizer cannot be loaded: {error}") from error


__all__ = [
    "CAUSAL_LM",
    "PHASE15",
    "Source",
    "StrictPhase15ForCausalLM",
    "check_fields",
    "check_kind",
    "load_any",
    "load_phase15",
    "load_served",
    "load_tokenizer",
    "read_vocab_size",
    "resolve_source",
]
