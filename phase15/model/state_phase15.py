# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
A state that has read texts: the soft prompt after the last token, as a value that can be kept, sent and asked.

    state = model.read(document_ids)
    state.save_pretrained("contract")
    state = Phase15State.from_pretrained("contract", model)
    answer = model.generate(**question, state=state)

- `Phase15State` is the value, and its file: safetensors with digests of the model and of the text, never a pickle;
- `encode_turn` gives the tokens that a chat template adds to a conversation, without those of the turns before;
- `nearest_tokens` finds the vocabulary token that each slot resembles most.
"""

import hashlib
import os
import uuid
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.utils import cached_file

from .configuration_phase15 import VERSION, Phase15Config
from .recursion_phase15 import SoftPrompt


STATE_FILE = "state.safetensors"  # in a folder or a repository
STATE_FORMAT = "phase15-state"
STATE_FORMAT_VERSION = 1
# Fields of the config without which a soft prompt means something else. They are written into the file.
STATE_SIZES = ("num_soft_tokens", "num_sink_tokens", "max_query_length", "hidden_size")


class NearestToken(NamedTuple):
    """The vocabulary token that a slot resembles most."""

    text: str
    cosine: float  # between the slot and the token's embedding


@dataclass(frozen=True, eq=False, repr=False)
class Phase15State:
    """
    The soft prompt of each row of a batch after the texts that it has read. Its size does not depend on their length.
    [`Phase15ForCausalLM.read`] makes one, and `generate` and `forward` start from one. No call changes it.

    A text may be read in several calls. The result is exactly that of one call if every call but the last ends at a
    segment boundary, a multiple of `config.max_query_length` tokens: elsewhere the last segment is shorter, so the
    HyperNetwork reads other groups of tokens. With Δ = 0 the result does not depend on the calls.

    Args:
        soft_prompt (`SoftPrompt`): slots of shape `(batch_size, num_soft_tokens, hidden_size)` and their used number.
        num_tokens (`torch.LongTensor` of shape `(batch_size,)`): tokens that each row has read, on the CPU.
        text_digests (`tuple[str | None]`): of each row's tokens, whatever the calls; None after embeddings.
        model_digest (`str`, *optional*): of the HyperNetwork and the input embeddings, rounded to bfloat16; None if
            the weights were offloaded.
        sizes (`dict[str, int]`): the config's sizes that the soft prompt depends on.
        chunk_length (`int`): tokens of a chunk of the answers, unless a call names another length.
        model (`weakref.ref`, *optional*): the body that has read the texts; does not keep it in memory.
    """

    soft_prompt: SoftPrompt
    num_tokens: torch.LongTensor
    text_digests: tuple[str | None, ...]
    model_digest: str | None
    sizes: dict[str, int]
    chunk_length: int
    model: weakref.ref | None = field(default=None)

    format_version = STATE_FORMAT_VERSION  # by it a model knows a state of another copy of this file

    @property
    def batch_size(self) -> int:
        return len(self.num_tokens)

    @property
    def nbytes(self) -> int:
        """Size of the tensors, in bytes."""
        tensors = (*self.soft_prompt, self.num_tokens)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    @property
    def device(self) -> torch.device:
        return self.soft_prompt.embeds.device

    @property
    def dtype(self) -> torch.dtype:
        return self.soft_prompt.embeds.dtype

    def __repr__(self) -> str:
        _, num_slots, hidden_size = self.soft_prompt.embeds.shape
        rows = "" if self.batch_size == 1 else f"{self.batch_size} rows of "
        tokens = ", ".join(f"{number:,}" for number in self.num_tokens[:8].tolist())
        more = ", …" if self.batch_size > 8 else ""
        return (
            f"Phase15State({rows}{num_slots} slots × {hidden_size}, {tokens}{more} tokens read, {self.nbytes:,} bytes)"
        )

    def __getstate__(self) -> dict:
        return {**vars(self), "model": None}  # a weak reference cannot be pickled

    def __len__(self) -> int:
        return self.batch_size

    def __getitem__(self, index: int | slice) -> "Phase15State":
        """Returns one row, or a slice of the rows, as a state of its own."""
        rows = range(self.batch_size)[index]
        return self.select_rows(list(rows) if isinstance(index, slice) else [rows])

    def select_rows(self, rows: list[int]) -> "Phase15State":
        """Returns a state of these rows, in this order; a row may be repeated."""
        index = torch.tensor(rows, dtype=torch.long)
        return replace(
            self,
            soft_prompt=SoftPrompt(*(tensor[index.to(tensor.device)] for tensor in self.soft_prompt)),
            num_tokens=self.num_tokens[index],
            text_digests=tuple(self.text_digests[row] for row in rows),
        )

    @classmethod
    def stack(cls, states: Sequence["Phase15State"]) -> "Phase15State":
        """
        Returns the rows of several states as one batch, on the device and in the dtype of the first.

        Raises:
            ValueError: for no states, or states of different models.
        """
        if not states:
            raise ValueError("`states` is empty, but a batch needs at least one state.")
        first = states[0]
        for index, state in enumerate(states):
            if (state.model_digest, state.sizes) != (first.model_digest, first.sizes):
                raise ValueError(f"states[{index}] was read by another model than states[0].")
        moved = [state.to(first.device, first.dtype) for state in states]
        tensors = zip(*(state.soft_prompt for state in moved), strict=True)  # embeds of all, then length of all
        return replace(
            first,
            soft_prompt=SoftPrompt(*(torch.cat(rows) for rows in tensors)),
            num_tokens=torch.cat([state.num_tokens for state in moved]),
            text_digests=tuple(digest for state in moved for digest in state.text_digests),
        )

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> "Phase15State":
        """Returns the state on another device or in another floating-point dtype."""
        if isinstance(device, torch.dtype):  # as `torch.Tensor.to` allows
            dtype = device
            device = None
        embeds = self.soft_prompt.embeds.to(device=device, dtype=dtype)
        return replace(self, soft_prompt=SoftPrompt(embeds, self.soft_prompt.length.to(device=device)))

    @torch.no_grad()
    def nearest_tokens(self, tokenizer: PreTrainedTokenizerBase) -> list[list[NearestToken]]:
        """
        Returns the vocabulary token nearest to each used slot, by cosine, for each row.

        Raises:
            ValueError: if the model that has read the texts is not in memory.
        """
        body = self.model() if self.model is not None else None
        if body is None:
            raise ValueError("The model of this state is not in memory: load the state with its model first.")
        embeddings = body.get_input_embeddings().weight[: len(tokenizer)]
        result = []
        for slots, length in zip(self.soft_prompt.embeds, self.soft_prompt.length.tolist(), strict=True):
            tokens, cosines = nearest_tokens(slots[:length].to(embeddings.device), embeddings)
            texts = [tokenizer.decode([token]) for token in tokens.tolist()]
            result.append([NearestToken(*pair) for pair in zip(texts, cosines.tolist(), strict=True)])
        return result

    def next_turn(
        self, messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool = True
    ) -> BatchEncoding:
        """
        Returns the `input_ids` and `attention_mask` of the next turns of a chat, for `generate`. The turns that the
        state has read are not needed.

        Args:
            messages (`list[dict]`): the new messages, such as `[{"role": "user", "content": "Where do I live?"}]`.
            tokenizer (`PreTrainedTokenizerBase`): has the chat template.
            add_generation_prompt (`bool`): end with the beginning of an answer.

        Raises:
            ValueError: see [`encode_turn`].
        """
        ids = encode_turn(messages, tokenizer, is_first=False, add_generation_prompt=add_generation_prompt)
        input_ids = torch.tensor([ids] * self.batch_size, device=self.device)
        return BatchEncoding({"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)})

    def save_pretrained(self, path: str | os.PathLike):
        """
        Writes the state as safetensors: into a folder, or into a file whose name ends in `.safetensors`. The file is
        complete or absent, also after a kill.
        """
        file = Path(path)
        if file.suffix != ".safetensors":
            file = file / STATE_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        tensors = {
            "embeds": self.soft_prompt.embeds.detach().cpu().contiguous(),
            "length": self.soft_prompt.length.cpu(),
            "num_tokens": self.num_tokens,
        }
        metadata = {
            "format": STATE_FORMAT,
            "format_version": str(STATE_FORMAT_VERSION),
            "phase15_version": VERSION,
            "model_digest": self.model_digest or "",
            "text_digests": ",".join(digest or "" for digest in self.text_digests),
            "chunk_length": str(self.chunk_length),
            **{name: str(size) for name, size in self.sizes.items()},
        }
        write_bytes(file, save(tensors, metadata))

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike, model: nn.Module, **kwargs) -> "Phase15State":
        """
        Loads a state onto the device and into the dtype of a model.

        Args:
            path (`str` or `os.PathLike`): a folder, a file, or the id of a repository on the Hub.
            model (`Phase15ForCausalLM` or `Phase15Model`): the model that has read the texts, in any dtype.
            kwargs: `revision`, `token`, … of a repository.

        Raises:
            OSError: if there is no such file.
            ValueError: for a file that is cut or not a state, and for a state of another format version, of other
                sizes, or of another model.
        """
        file = Path(path)
        if file.is_dir():
            file = file / STATE_FILE
        if not file.is_file() and file.suffix != ".safetensors":
            file = Path(cached_file(str(path), STATE_FILE, **kwargs))
        body = find_body(model)
        try:
            with safe_open(file, "pt") as opened:
                metadata = opened.metadata() or {}
                check_metadata(metadata, file, body)
                tensors = {name: opened.get_tensor(name) for name in ("embeds", "length", "num_tokens")}
        except SafetensorError as error:
            raise ValueError(f"{file} is cut or damaged: {error}") from error
        sizes = state_sizes(body.config)
        digests = metadata.get("text_digests", "").split(",")
        check_tensors(tensors, sizes, len(digests), file)
        weight = body.get_input_embeddings().weight
        device = body.device if weight.is_meta else weight.device
        state = cls(
            soft_prompt=SoftPrompt(tensors["embeds"], tensors["length"]),
            num_tokens=tensors["num_tokens"],
            text_digests=tuple(digest or None for digest in digests),
            model_digest=metadata["model_digest"] or None,
            sizes=sizes,
            chunk_length=int(metadata["chunk_length"]),
            model=weakref.ref(body),
        )
        return state.to(device, weight.dtype)


def state_sizes(config: Phase15Config) -> dict[str, int]:
    """Returns the sizes that a soft prompt depends on, by name."""
    sources = {**vars(config), "hidden_size": config.text_config.hidden_size}
    return {name: sources[name] for name in STATE_SIZES}


def find_body(model: nn.Module) -> nn.Module:
    """Returns the body of a model, which may be wrapped (as by PEFT)."""
    for module in model.modules():
        if hasattr(module, "model_digest"):
            return module
    raise ValueError(f"`model` is a {type(model).__name__}, but a state belongs to a Phase15 model.")


def check_metadata(metadata: dict[str, str], file: Path, body: nn.Module):
    """Raises a ValueError for a file that is not a state of this model, by the metadata in its header."""
    if metadata.get("format") != STATE_FORMAT:
        raise ValueError(f"{file} is not a Phase15 state: its metadata lacks `format: {STATE_FORMAT}`.")
    version = metadata.get("format_version")
    if version != str(STATE_FORMAT_VERSION):
        raise ValueError(
            f"{file} has format version {version}, but Phase15 {VERSION} reads version {STATE_FORMAT_VERSION}: it was "
            f"saved by Phase15 {metadata.get('phase15_version', 'of an unknown version')}."
        )
    for name, size in state_sizes(body.config).items():
        if metadata.get(name) != str(size):
            raise ValueError(f"{file} is a state with `{name}` {metadata.get(name)}, but the model has {size}.")
    try:
        check_digest(metadata["model_digest"] or None, body)
        body.config.check_chunk_length(int(metadata["chunk_length"]))
    except (KeyError, ValueError) as error:
        reason = f"its metadata lack {error}" if isinstance(error, KeyError) else error
        raise ValueError(f"{file}: {reason}") from error


def check_digest(model_digest: str | None, body: nn.Module):
    """Raises a ValueError unless the weights of a model are those that a state was made with."""
    own_digest = body.model_digest()
    if None not in (model_digest, own_digest) and model_digest != own_digest:
        raise ValueError(
            f"the state was read by another model: the digest of its HyperNetwork and embeddings is {model_digest}, "
            f"this model's is {own_digest}."
        )


def check_tensors(tensors: dict[str, torch.Tensor], sizes: dict[str, int], batch_size: int, file: Path):
    """Raises a ValueError for tensors that no state has."""
    num_slots = sizes["num_soft_tokens"]
    expected = {
        "embeds": (batch_size, num_slots, sizes["hidden_size"]),
        "length": (batch_size,),
        "num_tokens": (batch_size,),
    }
    for name, shape in expected.items():
        tensor = tensors[name]
        if tuple(tensor.shape) != shape or tensor.is_floating_point() != (name == "embeds"):
            raise ValueError(f"{file}: `{name}` is {tensor.dtype} of shape {tuple(tensor.shape)}, expected {shape}.")
    length = tensors["length"]
    if ((length < 0) | (length > num_slots)).any() or not tensors["embeds"].isfinite().all():
        raise ValueError(
            f"{file} is damaged: it holds numbers that are not finite, or more used slots than there are."
        )


def write_bytes(file: Path, content: bytes):
    """Writes a file atomically: a reader, or a process after a kill, finds the old file, the new one, or none."""
    temporary = file.with_name(f".{file.name}.{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as opened:
            opened.write(content)
            opened.flush()
            os.fsync(opened.fileno())
        temporary.replace(file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def extend_digest(digest: str | None, ids: list[int]) -> str:
    """
    Returns the digest of a text that goes on with `ids`: a chain of SHA-256 over its tokens, which does not depend on
    how the text is split into calls. `None` is the digest of the empty text.
    """
    chain = bytes(32) if digest is None else bytes.fromhex(digest)
    for token in ids:
        chain = hashlib.sha256(chain + token.to_bytes(8, "little")).digest()
    return chain.hex()


def encode_turn(
    messages: list[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    is_first: bool,
    add_generation_prompt: bool = False,
) -> list[int]:
    """
    Returns the token ids that a chat template gives for some turns of a chat. The tokens of later turns are those
    after the turns before, so their texts are not needed.

    Args:
        messages (`list[dict]`): consecutive messages.
        tokenizer (`PreTrainedTokenizerBase`): has the chat template.
        is_first (`bool`): the chat begins with these messages.
        add_generation_prompt (`bool`): end with the beginning of an answer.

    Raises:
        ValueError: if there are no messages or no template, if the template refuses or drops a message, or if what it
            gives for a turn depends on later turns.
    """
    if not messages:
        raise ValueError("`messages` is empty, but a turn needs at least one message.")
    if tokenizer.chat_template is None:
        raise ValueError("The tokenizer has no chat template: give token ids to `read` and `generate`.")
    before = []
    if not is_first:
        # Placeholders for the turns that were read: the template sees a chat whose next role is allowed.
        before = [{"role": "user", "content": "."}]
        if messages[0].get("role") != "assistant":
            before.append({"role": "assistant", "content": "."})
    prefix = render(before, tokenizer, False) if before else ""
    text = render([*before, *messages], tokenizer, add_generation_prompt)
    prefix_ids = tokenizer(prefix, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if ids[: len(prefix_ids)] != prefix_ids:
        raise ValueError(
            "The chat template writes a turn in another way when more turns follow, so turns cannot be read one by "
            "one: give the whole chat as token ids."
        )
    for index, message in enumerate(messages):
        content = message.get("content")
        # Templates may cut the thoughts of an assistant, but drop messages of other roles in silence.
        if message.get("role") != "assistant" and isinstance(content, str) and content.strip() not in text:
            raise ValueError(f"The chat template does not render messages[{index}] ({message.get('role')}).")
    return ids[len(prefix_ids) :]


def render(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, add_generation_prompt: bool) -> str:
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template can raise any error
        raise ValueError(f"The chat template refuses the messages: {error}") from error


def nearest_tokens(slots: torch.Tensor, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Finds the token with the largest cosine to each slot.

    Args:
        slots (`torch.Tensor` of shape `(num_slots, hidden_size)`): slots of a soft prompt.
        embeddings (`torch.Tensor` of shape `(vocab_size, hidden_size)`): input embeddings of the LLM.

    Returns:
        `tuple[torch.Tensor, torch.Tensor]`: the tokens and their cosines, both of shape `(num_slots,)`.
    """
    slots = slots.float()
    embeddings = embeddings.float()
    # The norm of a slot does not change which token is the nearest, so only that of the tokens divides all scores.
    scores = slots @ embeddings.T / embeddings.norm(dim=1).clamp(min=1e-12)  # (N, V)
    best, token = scores.max(dim=1)  # (N,) each
    return token, best / slots.norm(dim=1).clamp(min=1e-12)


__all__ = [
    "STATE_FORMAT_VERSION",
    "NearestToken",
    "Phase15State",
    "check_digest",
    "encode_turn",
    "extend_digest",
    "nearest_tokens",
    "state_sizes",
    "write_bytes",
]
