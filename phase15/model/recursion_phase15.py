# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
The recursion, `step(sp, tokens) = carry(sp, E[tokens]) + Δ(sp, E[tokens])`.

- `SoftPrompt` is the state;
- `carry`, without parameters, is a sliding window with attention sinks;
- `Phase15HyperNetwork` states what a rule for Δ must provide, and `register_hypernet` names a rule;
- `HyperNetwork` is the default rule, a gated overwrite of the slots, which is exactly zero before training;
- `Phase15RecursionMixin` has the step itself, and reads texts of any length with it.
"""

import ast
import hashlib
import inspect
import textwrap
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import initialization as init
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from .configuration_phase15 import Phase15Config


class SoftPrompt(NamedTuple):
    """
    State of the recursion. Slots fill from the first to the last. A slot's position in the LLM is its index.

    embeds (`torch.Tensor` of shape `(batch_size, num_soft_tokens, hidden_size)`): the slots, zero where not used.
    length (`torch.LongTensor` of shape `(batch_size,)`): number of used slots in each row.
    """

    embeds: torch.Tensor
    length: torch.LongTensor

    @property
    def mask(self) -> torch.BoolTensor:
        """Returns which slots are used, of shape `(batch_size, num_soft_tokens)`."""
        return torch.arange(self.embeds.shape[1], device=self.length.device) < self.length[:, None]


def carry(soft_prompt: SoftPrompt, tokens: torch.Tensor, token_length: torch.LongTensor, num_sinks: int) -> SoftPrompt:
    """
    Moves tokens into a window over the stream of all tokens, with attention sinks (StreamingLLM, Xiao et al. 2023,
    arXiv 2309.17453). The stream's first `num_sinks` tokens stay in the first slots, the other slots hold the newest,
    and the oldest between them fall out. This is the residual path of the recursion.

    Args:
        soft_prompt (`SoftPrompt`): the slots so far.
        tokens (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): embeddings that enter, left-aligned.
        token_length (`torch.LongTensor` of shape `(batch_size,)`): number of tokens in each row, padding not counted.
        num_sinks (`int`): slots that are never moved.

    Returns:
        `SoftPrompt`: the slots with the tokens moved in.
    """
    batch_size, num_slots, hidden_size = soft_prompt.embeds.shape
    length = soft_prompt.length + token_length
    num_evicted = (length - num_slots).clamp(min=0)[:, None]  # (B, 1)
    slot = torch.arange(num_slots, device=tokens.device).expand(batch_size, -1)  # (B, N)
    # Position of each slot's token in the stream [used slots ; tokens]: only slots after the sinks move.
    position = slot + num_evicted * (slot >= num_sinks)
    is_old = position < soft_prompt.length[:, None]
    # The same position in [all slots ; tokens], where unused slots lie between the two parts.
    source = torch.where(is_old, position, position - soft_prompt.length[:, None] + num_slots)
    stream = torch.cat([soft_prompt.embeds, tokens], dim=1)
    source = source.clamp(max=stream.shape[1] - 1)[..., None].expand(-1, -1, hidden_size)
    carried = SoftPrompt(stream.gather(1, source), length.clamp(max=num_slots))
    return carried._replace(embeds=carried.embeds * carried.mask[..., None])


class Phase15HyperNetwork(nn.Module, ABC):
    """
    Base class of the rules that compute Δ, the learned part of a step. Register a subclass with [`register_hypernet`]
    and name it in `config.hypernet_type`; docs/hypernetworks.md has an example. A rule

    - is made of the config alone, and scales Δ by `alpha`, so that Δ is exactly zero before training and a new model
      gives its base's output;
    - gives zero in slots that are not used, and nothing that depends on rows or tokens beyond `token_length`;
    - reads at most `num_positions` tokens in a step.

    Attributes:
        alpha (`torch.nn.Parameter` of shape `(hidden_size,)`): one learned scale per channel of the LLM. It starts at
            zero (ReZero, Bachlechner et al. 2020, arXiv 2003.04887) and has a learning rate of its own. Evaluation
            sets it to zero to measure the model with Δ = 0.
        embedding_scale (`torch.Tensor` of shape `(1,)`): root mean square of the base's input embeddings, measured by
            [`Phase15ForCausalLM.from_base`]. Rules work at unit scale: inputs are divided by it, outputs multiplied.
        num_positions (`int`): maximum number of tokens of a step.
    """

    def __init__(self, config: Phase15Config):
        super().__init__()
        self.num_positions = config.num_positions
        self.alpha = nn.Parameter(torch.zeros(config.text_config.hidden_size))
        self.register_buffer("embedding_scale", torch.ones(1))

    @abstractmethod
    def forward(
        self,
        carried: SoftPrompt,
        old: SoftPrompt,
        tokens: torch.Tensor,
        token_length: torch.LongTensor,
        hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Computes Δ.

        Args:
            carried (`SoftPrompt`): `carry(old, tokens)`.
            old (`SoftPrompt`): the soft prompt before the step. It still holds the tokens that fall out.
            tokens (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): embeddings that entered,
                left-aligned.
            token_length (`torch.LongTensor` of shape `(batch_size,)`): number of tokens in each row, padding not
                counted.
            hidden_states (`torch.Tensor` of the shape of `tokens`, *optional*): their hidden states after the LLM's
                first `config.hypernet_reads_layers` layers; None if that is 0.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_soft_tokens, hidden_size)`: Δ, zero in slots that are not used.
        """

    @torch.no_grad()
    def init_weights(self, config: Phase15Config):
        """
        Initialises what transformers' generic initialisation of linear layers, embeddings and norms does not cover.
        Extend it for parameters of other kinds, with the functions of `transformers.initialization`, which do not
        touch loaded weights.
        """
        init.zeros_(self.alpha)
        # A base's own scale is measured by `from_base`. Not every config of an LLM has the field.
        init.constant_(self.embedding_scale, getattr(config.text_config, "initializer_range", 0.02))

    def check_num_tokens(self, num_tokens: int):
        """Raises a ValueError for a step over more tokens than the rule has positions."""
        if num_tokens > self.num_positions:
            raise ValueError(
                f"A step reads {self.num_positions} tokens at most, not {num_tokens}: after a model is made, its "
                "config's `chunk_length` and `max_query_length` cannot grow past that."
            )


HYPERNETS: dict[str, type[Phase15HyperNetwork]] = {}  # by `config.hypernet_type`


def register_hypernet(name: str) -> Callable[[type[Phase15HyperNetwork]], type[Phase15HyperNetwork]]:
    """
    Returns a class decorator that registers a rule for Δ as `config.hypernet_type = name`. A name that is registered
    already is replaced.

    Raises:
        TypeError: if the class is not a [`Phase15HyperNetwork`].
    """

    def register(cls: type[Phase15HyperNetwork]) -> type[Phase15HyperNetwork]:
        if not (isinstance(cls, type) and issubclass(cls, Phase15HyperNetwork)):
            raise TypeError(f"{cls!r} cannot be registered as {name!r}: it is not a subclass of Phase15HyperNetwork.")
        HYPERNETS[name] = cls
        return cls

    return register


def check_type(hypernet_type: str):
    """Raises a ValueError for a HyperNetwork that is not registered."""
    if hypernet_type not in HYPERNETS:
        registered = ", ".join(sorted(HYPERNETS))
        raise ValueError(
            f"`hypernet_type` is {hypernet_type!r}, but the registered types are {registered}. "
            "Import the file that registers it first, or load the folder with `trust_remote_code=True`."
        )


def make_hypernet(config: Phase15Config) -> Phase15HyperNetwork:
    """Returns a new HyperNetwork of the config's type."""
    check_type(config.hypernet_type)
    return HYPERNETS[config.hypernet_type](config)


class HyperNetworkAttention(nn.Module):
    """Multi-head attention without biases: `hidden_states` attend to `memory`."""

    def __init__(self, config: Phase15Config):
        super().__init__()
        width = config.hypernet_hidden_size
        self.num_heads = config.hypernet_num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states: torch.Tensor, memory: torch.Tensor, memory_mask: torch.Tensor) -> torch.Tensor:
        query = self.split_heads(self.q_proj(hidden_states))
        key = self.split_heads(self.k_proj(memory))
        value = self.split_heads(self.v_proj(memory))
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=memory_mask[:, None, None, :])
        return self.o_proj(attended.transpose(1, 2).flatten(2))

    def split_heads(self, states: torch.Tensor) -> torch.Tensor:
        return states.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, length, width / heads)


class HyperNetworkLayer(nn.Module):
    """Pre-norm block: the slots attend to themselves, then to the memory, then pass an MLP."""

    def __init__(self, config: Phase15Config):
        super().__init__()
        width = config.hypernet_hidden_size
        self.self_norm = nn.RMSNorm(width, eps=1e-5)
        self.self_attn = HyperNetworkAttention(config)
        self.cross_norm = nn.RMSNorm(width, eps=1e-5)
        self.cross_attn = HyperNetworkAttention(config)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-5)
        self.up_proj = nn.Linear(width, config.hypernet_intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.hypernet_intermediate_size, width, bias=False)

    def forward(
        self, slots: torch.Tensor, slot_mask: torch.Tensor, memory: torch.Tensor, memory_mask: torch.Tensor
    ) -> torch.Tensor:
        normed = self.self_norm(slots)
        slots = slots + self.self_attn(normed, normed, slot_mask)
        slots = slots + self.cross_attn(self.cross_norm(slots), memory, memory_mask)
        return slots + self.down_proj(F.gelu(self.up_proj(self.mlp_norm(slots))))


@register_hypernet("gated_overwrite")
class HyperNetwork(Phase15HyperNetwork):
    """
    The default rule. The carried slots attend to the memory: the old soft prompt, which still holds the tokens that
    fall out, and the new tokens. The result is y, and

        Δ = tanh|α| · σ(G y) · (O y + P(y, memory) − carry)

    overwrites the slots through a gate. O y is free. P is a pointer, an attention whose values are the memory's own
    embeddings (pointer networks, Vinyals et al. 2015, arXiv 1506.03134): it can copy a token that falls out, in an
    embedding that the LLM knows already. The sign of α does not count, so the factor is from 0 to 1, a step gives a
    mean of what was carried and what is written, and what is carried does not grow.

    - `config.hypernet_signed_alpha`: the factor is tanh(α), as for weights trained before 2026-11-27. If it is
      negative, what is carried grows at every step.
    - `config.hypernet_slot_gate`: the gate is σ(G y + g·y), where g·y opens and closes all channels of a slot
      together.
    - `config.hypernet_reads_layers`: the new tokens' entries in the memory also get a projection of their hidden
      states after the LLM's first layers.
    """

    def __init__(self, config: Phase15Config):
        super().__init__(config)
        width = config.hypernet_hidden_size
        hidden_size = config.text_config.hidden_size
        self.slot_proj = nn.Linear(hidden_size, width, bias=False)
        self.token_proj = nn.Linear(hidden_size, width, bias=False)
        if config.hypernet_reads_layers:
            self.hidden_norm = nn.RMSNorm(hidden_size, eps=1e-5)
            self.hidden_proj = nn.Linear(hidden_size, width, bias=False)
        self.position_embeddings = nn.Embedding(config.num_positions, width)
        self.memory_norm = nn.RMSNorm(width, eps=1e-5)
        self.layers = nn.ModuleList(HyperNetworkLayer(config) for _ in range(config.hypernet_num_hidden_layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.output_proj = nn.Linear(width, hidden_size, bias=False)  # O
        self.gate_proj = nn.Linear(width, hidden_size, bias=False)  # G
        self.slot_gate_proj = nn.Linear(width, 1, bias=False) if config.hypernet_slot_gate else None  # g
        pointer_size = max(width // config.hypernet_num_attention_heads // 2, 1)
        self.pointer_q_proj = nn.Linear(width, pointer_size, bias=False)
        self.pointer_k_proj = nn.Linear(width, pointer_size, bias=False)
        self.signed_alpha = config.hypernet_signed_alpha

    @torch.no_grad()
    def init_weights(self, config: Phase15Config):
        super().init_weights(config)
        # As large as the projections of embeddings at unit scale, which they are added to.
        std = config.initializer_range * config.text_config.hidden_size**0.5
        init.normal_(self.position_embeddings.weight, mean=0.0, std=std)

    def forward(
        self,
        carried: SoftPrompt,
        old: SoftPrompt,
        tokens: torch.Tensor,
        token_length: torch.LongTensor,
        hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """See [`Phase15HyperNetwork.forward`]. Raises a ValueError for more tokens than the network has positions."""
        num_slots = carried.embeds.shape[1]
        num_tokens = tokens.shape[1]
        self.check_num_tokens(num_tokens)
        # The embedding is called and not sliced: an offloaded weight is in memory only during its module's call.
        position = self.position_embeddings(torch.arange(max(num_slots, num_tokens), device=tokens.device))
        # FSDP computes in bfloat16, but leaves buffers in float32.
        scale = self.embedding_scale.to(position.dtype)

        slots = self.slot_proj(carried.embeds / scale) + position[:num_slots]  # (B, N, h)
        old_embeds = old.embeds / scale
        new_embeds = tokens / scale
        old_memory = self.slot_proj(old_embeds) + position[:num_slots]  # (B, N, h)
        new_memory = self.token_proj(new_embeds) + position[:num_tokens]  # (B, T, h)
        if hidden_states is not None:
            new_memory = new_memory + self.hidden_proj(self.hidden_norm(hidden_states.to(scale.dtype)))
        memory = self.memory_norm(torch.cat([old_memory, new_memory], dim=1))  # (B, N + T, h)
        token_mask = torch.arange(num_tokens, device=tokens.device) < token_length[:, None]
        memory_mask = torch.cat([old.mask, token_mask], dim=1)  # (B, N + T)

        slot_mask = carried.mask
        for layer in self.layers:
            slots = layer(slots, slot_mask, memory, memory_mask)
        y = self.norm(slots)

        # The pointer's values are the embeddings themselves, not projections: a copied token stays that token.
        embeds = torch.cat([old_embeds, new_embeds], dim=1)  # (B, N + T, d)
        pointed = F.scaled_dot_product_attention(
            self.pointer_q_proj(y), self.pointer_k_proj(memory), embeds, attn_mask=memory_mask[:, None, :]
        )  # (B, N, d)
        written = (self.output_proj(y) + pointed) * scale
        gate = self.gate_proj(y)
        if self.slot_gate_proj is not None:
            gate = gate + self.slot_gate_proj(y)
        # Not abs(), whose gradient is zero at zero, where α starts.
        alpha = self.alpha if self.signed_alpha else torch.where(self.alpha < 0, -self.alpha, self.alpha)
        delta = torch.tanh(alpha) * torch.sigmoid(gate) * (written - carried.embeds)
        return delta.to(carried.embeds.dtype) * slot_mask[..., None]


class Phase15RecursionMixin:
    """
    The step of the recursion and what is built on it, for a module with an LLM (`llm`), a HyperNetwork (`hypernet`),
    a config and `get_input_embeddings`. Training, generation and evaluation all step here.
    """

    def empty_soft_prompt(self, batch_size: int, like: torch.Tensor | None = None) -> SoftPrompt:
        """
        Returns the state before the first token, in which no slot is used.

        Args:
            batch_size (`int`): number of rows.
            like (`torch.Tensor` of shape `(…, hidden_size)`, *optional*): embeddings with the dtype and the device of
                the state. The default is the embedding weight, which an offloaded model does not have in memory.
        """
        like = self.get_input_embeddings().weight if like is None else like
        return SoftPrompt(
            like.new_zeros(batch_size, self.config.num_soft_tokens, like.shape[-1]),
            torch.zeros(batch_size, dtype=torch.long, device=like.device),
        )

    def step(
        self,
        soft_prompt: SoftPrompt,
        tokens: torch.Tensor,
        token_length: torch.LongTensor,
        hidden_states: torch.Tensor | None = None,
    ) -> SoftPrompt:
        """
        Computes `step(sp, tokens) = carry(sp, tokens) + Δ(sp, tokens)`. A row without tokens keeps its soft prompt.

        Args:
            soft_prompt (`SoftPrompt`): the state before.
            tokens (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): embeddings, left-aligned.
            token_length (`torch.LongTensor` of shape `(batch_size,)`): number of tokens in each row, padding not
                counted.
            hidden_states (`torch.Tensor` of the shape of `tokens`, *optional*): their `first_layers`, if known.
        """
        if hidden_states is None and tokens.shape[1]:
            (hidden_states,) = self.first_layers(tokens, tokens.shape[1])
        carried = carry(soft_prompt, tokens, token_length, self.config.num_sink_tokens)
        delta = self.hypernet(carried, soft_prompt, tokens, token_length, hidden_states)
        has_tokens = (token_length > 0)[:, None, None]
        stepped = carried.embeds + delta.to(tokens.device)
        return carried._replace(embeds=torch.where(has_tokens, stepped, soft_prompt.embeds))

    def read_segments(
        self,
        soft_prompt: SoftPrompt,
        tokens: torch.Tensor,
        length: torch.LongTensor,
        hidden_states: list[torch.Tensor] | None = None,
    ) -> SoftPrompt:
        """
        Steps over a text of any length, `max_query_length` tokens at a time.

        Args:
            soft_prompt (`SoftPrompt`): the state before.
            tokens (`torch.LongTensor` of shape `(batch_size, num_tokens)`, or `torch.Tensor` of shape
                `(batch_size, num_tokens, hidden_size)`): ids or embeddings, left-aligned.
            length (`torch.LongTensor` of shape `(batch_size,)`): number of tokens in each row, padding not counted.
            hidden_states (`list[torch.Tensor]`, *optional*): `first_layers` of the segments, if known.

        Returns:
            `SoftPrompt`: the state after the last token of each row.
        """
        segments = tokens.split(self.config.max_query_length, dim=1)
        if hidden_states is None:
            hidden_states = [None] * len(segments)
        for segment, states in zip(segments, hidden_states, strict=True):
            segment_length = length.clamp(max=segment.shape[1])
            embeds = segment if segment.is_floating_point() else self.get_input_embeddings()(segment)
            soft_prompt = self.step(soft_prompt, embeds, segment_length, states)
            length = length - segment_length
        return soft_prompt

    def first_layers(self, tokens: torch.Tensor, segment_length: int) -> list[torch.Tensor | None]:
        """
        Computes the hidden states of tokens after the LLM's first `config.hypernet_reads_layers` layers.

        Args:
            tokens (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): embeddings of consecutive
                segments.
            segment_length (`int`): tokens of a segment; the last may be shorter.

        Returns:
            `list[torch.Tensor]`: the hidden states of each segment, of the shape of its embeddings, or a None for each
            if the HyperNetwork reads no layers. A segment sees only itself, causally, with positions from 0.
        """
        num_layers = self.config.hypernet_reads_layers
        batch_size, num_tokens, hidden_size = tokens.shape
        if not num_layers:
            return [None] * -(-num_tokens // segment_length)
        size = min(segment_length, num_tokens)
        # All segments of all rows are one batch, padded to whole segments: (B · S, size, d).
        states = F.pad(tokens, (0, 0, 0, -num_tokens % size)).reshape(-1, size, hidden_size)
        body = self.llm.base_model
        position = torch.arange(size, device=tokens.device)[None]
        rotary = body.rotary_emb(states, position_ids=position)
        for layer, mask in zip(body.layers[:num_layers], causal_masks(body, states, position), strict=False):
            states = layer(states, attention_mask=mask, position_ids=position, position_embeddings=rotary)
        states = states.to(tokens.device).view(batch_size, -1, hidden_size)
        return list(states[:, :num_tokens].split(size, dim=1))


def causal_masks(body: nn.Module, embeds: torch.Tensor, position: torch.LongTensor) -> list:
    """Returns the mask of each layer of an LLM's body for embeddings `(batch_size, num_tokens, hidden_size)`."""
    config = body.config
    num_tokens = embeds.shape[1]
    window = getattr(config, "sliding_window", None)
    fits = window is None or num_tokens <= window
    if fits and config._attn_implementation in ("sdpa", "eager"):
        # transformers' own function makes the host wait for the device, which a CUDA graph cannot record.
        lowest = torch.finfo(embeds.dtype).min
        mask = embeds.new_full((1, 1, num_tokens, num_tokens), lowest).triu(1)
        return [mask] * config.num_hidden_layers
    full = create_causal_mask(config, embeds, None, None, position)
    if window is None:
        return [full] * config.num_hidden_layers
    sliding = create_sliding_window_causal_mask(config, embeds, None, None, position)
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [sliding if kind == "sliding_attention" else full for kind in kinds]


def check_first_layers(llm: nn.Module, num_layers: int):
    """Raises a ValueError if an LLM's body is not one whose first layers `first_layers` can run, as Llama's is."""
    missing = [name for name in ("layers", "norm", "rotary_emb") if not hasattr(llm.base_model, name)]
    if num_layers and missing:
        raise ValueError(
            f"`hypernet_reads_layers` is {num_layers}, but {type(llm.base_model).__name__} has no `{missing[0]}`: "
            "give 0."
        )


def formula_digest(hypernet: Phase15HyperNetwork) -> str | None:
    """
    Returns a digest of the source of a step: `carry`, the step itself, and the classes of the HyperNetwork. Comments,
    docstrings and layout do not count. None if the source is not in a file (a notebook).
    """
    rule = next(module for module in hypernet.modules() if isinstance(module, Phase15HyperNetwork))  # PEFT wraps it
    files = {cls.__module__ for cls in type(rule).__mro__ if issubclass(cls, Phase15HyperNetwork)}
    classes = {cls for module in rule.modules() for cls in type(module).__mro__ if cls.__module__ in files}
    parts = [carry, Phase15RecursionMixin.step, *sorted(classes, key=lambda cls: cls.__qualname__)]
    digest = hashlib.sha256()
    try:
        for part in parts:
            tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
            digest.update(repr(syntax(tree)).encode())
    except (OSError, TypeError):
        return None
    return digest.hexdigest()[:16]


def syntax(node) -> object:
    """
    Returns a syntax tree as nested tuples, without docstrings and empty fields, so that every release of Python gives
    the same.
    """
    if isinstance(node, list):
        return tuple(syntax(item) for item in node if not is_docstring(item))
    if not isinstance(node, ast.AST):
        return node
    fields = [(name, value) for name, value in ast.iter_fields(node) if value not in (None, [])]
    return (type(node).__name__, *((name, syntax(value)) for name, value in fields))


def is_docstring(node) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


__all__ = [
    "HYPERNETS",
    "HyperNetwork",
    "HyperNetworkLayer",
    "Phase15HyperNetwork",
    "Phase15RecursionMixin",
    "SoftPrompt",
    "carry",
    "check_first_layers",
    "check_type",
    "formula_digest",
    "make_hypernet",
    "register_hypernet",
]
