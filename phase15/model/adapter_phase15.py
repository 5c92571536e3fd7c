# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
A HyperNetwork without its base: a folder of a few megabytes, which names the LLM that it was trained on.

    model.save_hypernet("adapter")
    model = Phase15ForCausalLM.from_pretrained("adapter")                  fetches the base
    model = Phase15ForCausalLM.from_pretrained("adapter", base="elsewhere/base")
    model.merge("whole")                                                   both in one folder

The config of such a folder has `base_digest`, a digest of the base's weights: another base is refused.
"""

import copy
import os
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import GenerationConfig, PreTrainedModel
from transformers.utils import cached_file, logging

from .base_phase15 import load_base, split_gguf, weights_digest
from .configuration_phase15 import Phase15Config


logger = logging.get_logger("transformers.phase15")  # one name for all copies of this file: they warn once

WEIGHTS = "model.safetensors"
# Where a repository or a folder is found. The adapter's and the base's are fetched in the same way.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "proxies", "token")
# What is known about the adapter's folder, and says nothing about the base.
OWN_ARGUMENTS = (
    "revision",
    "code_revision",
    "adapter_kwargs",
    "subfolder",
    "ignore_mismatched_sizes",
    "output_loading_info",
    "_from_auto",
)


def base_digest(llm: PreTrainedModel) -> str | None:
    """Returns a digest of an LLM's weights, equal in float32 and bfloat16; None if they are quantised or offloaded."""
    weights = dict(llm.named_parameters())  # tied weights once
    is_readable = all(weight.is_floating_point() and not weight.is_meta for weight in weights.values())
    if getattr(llm, "is_quantized", False) or not is_readable:
        return None
    return weights_digest(weights.items())


def describe_base(
    base: str | os.PathLike,
    gguf_file: str | None = None,
    subfolder: str | None = None,
    revision: str | None = None,
    cache_dir: str | os.PathLike | None = None,
    **_,
) -> dict[str, str | None]:
    """
    Returns the fields of a config that name a base that has been loaded. A path of this machine is absolute; a part of
    a repository on the Hub has no name that `load_base` takes, so it is `None`.

    Args:
        base (`str` or `os.PathLike`): as `load_base` was given it.
        gguf_file, subfolder (`str`, *optional*): arguments of `from_pretrained` that name a part of a folder.
        revision, cache_dir (*optional*): arguments of `from_pretrained`.
    """
    name = str(base)
    if os.path.exists(name):
        path = os.path.join(name, subfolder or "", gguf_file or "")
        return {"base_model_name_or_path": os.path.abspath(path), "base_revision": None}
    if gguf_file or subfolder:
        return {"base_model_name_or_path": None, "base_revision": None}
    # From the cache, which has the files that were loaded: the branch on the Hub may have moved since.
    file = Path(cached_file(name, "config.json", revision=revision, cache_dir=cache_dir, local_files_only=True))
    return {"base_model_name_or_path": name, "base_revision": file.parent.name}  # snapshots/COMMIT/config.json


def place_of_base(config: Phase15Config, folder: str | os.PathLike) -> str:
    """
    Returns the base of a HyperNetwork's folder as `load_base` takes it. A relative path is one from the folder.

    Raises:
        ValueError: for a path of another machine, or of a base that has moved.
    """
    name = config.base_model_name_or_path
    inside = Path(folder, name)
    if inside.exists():
        return str(inside)
    path, _ = split_gguf(name)
    if os.path.isabs(name) and not os.path.exists(path):
        raise ValueError(
            f"{folder} is a HyperNetwork without its base, which was {name}; that is not on this machine: name its "
            "place with `base=`."
        )
    return name


def relative_base(name: str, folder: str | os.PathLike) -> str:
    """Returns the path of a base that lies inside a folder from there, so that both can move; else the name."""
    path = Path(name)
    root = Path(folder).resolve()
    if path.is_absolute() and path.is_relative_to(root):
        return path.relative_to(root).as_posix()
    return name


def load_hypernet(
    cls: type[PreTrainedModel],
    folder: str | os.PathLike,
    config: Phase15Config,
    base: str | os.PathLike | None,
    check_base: bool,
    **kwargs,
) -> tuple[PreTrainedModel, dict]:
    """
    Puts the HyperNetwork of a folder and its base together.

    Args:
        cls (`type`): class of the model.
        folder (`str` or `os.PathLike`): of the HyperNetwork, or an id on the Hub.
        config (`Phase15Config`): of the folder.
        base (`str` or `os.PathLike`, *optional*): another place of the base: an id, a folder or a `.gguf` file.
        check_base (`bool`): refuse a base with another digest.
        kwargs: of `from_pretrained`. Those that are not about the folder go to the base.

    Returns:
        the model, and the loading info of the HyperNetwork and the base.

    Raises:
        ValueError: for a base that is missing, of other sizes or of other weights.
    """
    fetch = {name: kwargs[name] for name in HUB_ARGUMENTS if name in kwargs}
    own = {name: kwargs.pop(name) for name in OWN_ARGUMENTS if name in kwargs}
    location = {name: own[name] for name in ("revision", "subfolder") if own.get(name) is not None}
    config = copy.deepcopy(config)
    for name in [name for name in kwargs if name in Phase15Config.__annotations__]:
        setattr(config, name, kwargs.pop(name))  # as the library does for a folder that holds both
    file = cached_file(str(folder), WEIGHTS, **fetch, **location)
    weights = read_weights(file)

    if base is None:
        base = place_of_base(config, folder)
        kwargs["revision"] = config.base_revision or "main"
    dtype = kwargs.pop("dtype", kwargs.pop("torch_dtype", None))
    if dtype in (None, "auto"):
        dtype = config.dtype  # as for a folder that holds both
    if dtype is not None:
        kwargs["dtype"] = dtype
    try:
        llm, info = load_base(base, **kwargs)
    except SafetensorError as error:
        raise ValueError(f"The weights of the base {base} cannot be read: {error}") from error
    check_shape(llm, config, base)
    is_checked = check_base and check_base_digest(llm, config, base)
    # The id of a base on the Hub stays, if the one on this machine is a copy: other machines know it.
    is_copy = is_checked and config.base_revision is not None and os.path.exists(base)
    if not is_copy:
        config.update(describe_base(base, **kwargs))
    config.base_digest = None  # the model has its base
    config.text_config = llm.config
    model = cls.from_llm(config, llm)
    info = info | load_weights(model, weights, file, bool(own.get("ignore_mismatched_sizes")), info)
    if model.can_generate():
        try:
            model.generation_config = GenerationConfig.from_pretrained(folder, **fetch, **location)
        except OSError:
            pass  # the base's own, which `from_llm` has set
    return model, info


def read_weights(file: str) -> dict[str, torch.Tensor]:
    """Returns the weights of a safetensors file. Raises a ValueError that names a damaged file."""
    try:
        return load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} cannot be read: {error}") from error


def load_weights(
    model: PreTrainedModel, weights: dict[str, torch.Tensor], file: str, ignore_mismatched_sizes: bool, info: dict
) -> dict[str, set]:
    """
    Loads the HyperNetwork's weights into a model.

    Returns:
        the loading info, with that of the base in it.

    Raises:
        ValueError: for a weight of another shape, unless `ignore_mismatched_sizes`.
    """
    prefix = f"{model.base_model_prefix}.hypernet."
    expected = model.hypernet.state_dict()
    weights = {name.removeprefix(prefix): weight for name, weight in weights.items()}
    shared = expected.keys() & weights.keys()
    mismatched = {name for name in shared if expected[name].shape != weights[name].shape}
    if mismatched and not ignore_mismatched_sizes:
        raise ValueError(f"{file}: {sorted(mismatched)[0]} has another shape than config.json describes.")
    fitting = {name: weights[name] for name in shared - mismatched}
    model.hypernet.load_state_dict(fitting, strict=False)
    misfits = {(prefix + name, weights[name].shape, expected[name].shape) for name in mismatched}
    return {
        "missing_keys": {prefix + name for name in expected.keys() - weights.keys()} | set(info["missing_keys"]),
        "unexpected_keys": {prefix + name for name in weights.keys() - expected.keys()} | set(info["unexpected_keys"]),
        "mismatched_keys": misfits | set(info["mismatched_keys"]),
    }


def check_shape(llm: PreTrainedModel, config: Phase15Config, base: str | os.PathLike):
    """Raises a ValueError for a base whose sizes are not those of the HyperNetwork's LLM."""
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size"):
        own = getattr(config.text_config, name)
        other = getattr(llm.config, name)
        if own != other:
            raise ValueError(f"The base {base} has `{name}` {other}, but the HyperNetwork's LLM has {own}.")


def check_base_digest(llm: PreTrainedModel, config: Phase15Config, base: str | os.PathLike) -> bool:
    """
    Compares the weights of a base with those that the HyperNetwork was saved with.

    Returns:
        `False` after a warning, if they cannot be compared.

    Raises:
        ValueError: for other weights.
    """
    digest = base_digest(llm)
    if digest is None:
        logger.warning_once(f"The digest of {base} is not checked: its weights are quantised or offloaded.")
        return False
    if (llm.dtype == torch.float16) != (config.text_config.dtype in (torch.float16, "float16")):
        # float16 has more digits than bfloat16 and a smaller range: rounding by way of it gives other values.
        logger.warning_once(f"The digest of {base} is not checked: float16 does not hold the same weights.")
        return False
    if digest != config.base_digest:
        raise ValueError(
            f"The weights of the base {base} are not those that the HyperNetwork was trained on (digest "
            f"{digest[:16]}, expected {config.base_digest[:16]}); `check_base=False` takes them nevertheless."
        )
    return True


class Phase15HypernetMixin:
    """Saves the HyperNetwork without its base, for a model with `llm` and `hypernet`."""

    @property
    def saves_base(self) -> bool:
        """
        `False`: `save_pretrained` and Trainer's checkpoints hold no weight of the LLM. Set it before training with a
        frozen LLM.
        """
        return not any(name.startswith(self._llm_prefix) for name in self._keys_to_ignore_on_save or ())

    @saves_base.setter
    def saves_base(self, value: bool):
        names = {name for name in self._keys_to_ignore_on_save or () if not name.startswith(self._llm_prefix)}
        if not value:
            names |= {name for name in self.state_dict() if name.startswith(self._llm_prefix)}
        self._keys_to_ignore_on_save = names

    @property
    def _llm_prefix(self) -> str:
        return f"{self.base_model_prefix}.llm."

    def save_hypernet(self, save_directory: str | os.PathLike, **kwargs):
        """
        Saves the HyperNetwork without its base: config, code, weights, and the base's id, revision and digest.
        `from_pretrained` fetches the base.

        Args:
            save_directory (`str` or `os.PathLike`): a folder.
            kwargs: of `save_pretrained`. The weights are always one file.

        Raises:
            ValueError: for a model whose base is not known, or whose weights have no digest.
        """
        before = self.saves_base
        self.saves_base = False
        try:
            self.save_pretrained(save_directory, **kwargs | {"max_shard_size": "1TB"})
        finally:
            self.saves_base = before

    def merge(self, save_directory: str | os.PathLike, **kwargs):
        """Saves the HyperNetwork and its base in one folder. `kwargs` are those of `save_pretrained`."""
        before = self.saves_base
        self.saves_base = True
        try:
            self.save_pretrained(save_directory, **kwargs)
        finally:
            self.saves_base = before

    def check_base_is_known(self):
        """Raises a ValueError if a folder without the base could not be loaded again."""
        if self.config.base_model_name_or_path is None:
            raise ValueError(
                "The HyperNetwork cannot be saved without its base: nothing says where the base is. Make the model "
                "with `from_base`, or set `config.base_model_name_or_path`."
            )

    def llm_digest(self) -> str:
        """Returns the digest of the LLM's weights, computed again only if they have changed."""
        weights = list(self.llm.parameters())
        key = tuple((w.data_ptr(), w.dtype, 0 if w.is_inference() else w._version) for w in weights)
        cached = vars(self).get("_llm_digest")
        if cached is None or cached[0] != key:
            digest = base_digest(self.llm)
            if digest is None:
                raise ValueError(
                    "The HyperNetwork cannot be saved without its base, whose weights are quantised or offloaded and "
                    "have no digest: save both (`--save_only_hypernet false`, `save_pretrained`)."
                )
            cached = (key, digest)
            self._llm_digest = cached
        return cached[1]


__all__ = ["HUB_ARGUMENTS", "Phase15HypernetMixin", "describe_base", "load_hypernet", "relative_base"]
