# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
The two parts of a step of the recursion, `step(sp, tokens) = carry(sp, E[tokens]) + Δ(sp, E[tokens])`.

- `SoftPrompt` is the state;
- `carry`, without parameters, is a sliding window with attention sinks;
- `HyperNetwork` computes Δ, a gated overwrite of the slots, which is exactly zero before training.
"""

import copy
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

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
        """`torch.BoolTensor` of shape `(batch_size, num_soft_tokens)`: which slots are used."""
        return torch.arange(self.embeds.shape[1], device=self.length.device) < self.length[:, None]


def carry(soft_prompt: SoftPrompt, tokens: torch.Tensor, token_length: torch.LongTensor, num_sinks: int) -> SoftPrompt:
    """
    The residual path of the recursion: a window over the stream of all tokens, with attention sinks (StreamingLLM,
    Xiao et al. 2023, arXiv 2309.17453). The stream's first `num_sinks` tokens stay in the first slots, the other slots
    hold the newest, and the oldest between them fall out.

    Args:
        soft_prompt (`SoftPrompt`): the slots so far.
        tokens (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): embeddings that enter, left-aligned.
        token_length (`torch.LongTensor` of shape `(batch_size,)`): how many of them are real in each row.
        num_sinks (`int`): slots that are never moved.

    Returns:
        `SoftPrompt`: the slots with the tokens moved in.
    """
    batch_size, num_slots, hidden_size = soft_prompt.embeds.shape
    length = soft_prompt.length + token_length
    evicted = (length - num_slots).clamp(min=0)[:, None]  # (B, 1)
    slot = torch.arange(num_slots, device=tokens.device).expand(batch_size, -1)  # (B, N)
    position = slot + evicted * (slot >= num_sinks)  # of the slot's token in the stream [used slots ; tokens]
    is_old = position < soft_prompt.length[:, None]
    source = torch.where(
        is_old, position, position - soft_prompt.length[:, None] + num_slots
    )  # in [all slots ; tokens]
    stream = torch.cat([soft_prompt.embeds, tokens], dim=1)
    source = source.clamp(max=stream.shape[1] - 1)[..., None].expand(-1, -1, hidden_size)
    carried = SoftPrompt(stream.gather(1, source), length.clamp(max=num_slots))
    return carried._replace(embeds=carried.embeds * carried.mask[..., None])


class HyperNetworkAttention(nn.Module):
    """Multi-head attention without biases, from `hidden_states` to `memory`."""

    def __init__(self, config: Phase15Config):
        super().__init__()
        width = config.hypernet_hidden_size
        self.num_heads = config.hypernet_num_attention_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.o_proj = nn.Linear(width, width, bias=False)

    def forward(self, hidden_states: torch.Tensor, memory: torch.Tensor, memory_mask: torch.Tensor) -> torch.Tensor:
        query, key, value = (
            projection(states).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, length, width / heads)
            for projection, states in ((self.q_proj, hidden_states), (self.k_proj, memory), (self.v_proj, memory))
        )
        attended = F.scaled_dot_product_attention(query, key, value, attn_mask=memory_mask[:, None, None, :])
        return self.o_proj(attended.transpose(1, 2).flatten(2))


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


class HyperNetwork(nn.Module):
    """
    Computes Δ, the learned part of a step. The carried slots attend to the memory: the old soft prompt, which still
    holds the tokens that fall out, and the new tokens. The result is y, and

        Δ = tanh|α| · σ(G y) · (O y + P(y, memory) − carry)

    overwrites the slots through a gate. O y is free. P is a pointer, an attention whose values are the memory's own
    embeddings (pointer networks, Vinyals et al. 2015, arXiv 1506.03134): it can copy a token that falls out, in an
    embedding that the LLM knows already. α is one learned number per channel of the LLM. It starts at zero (ReZero,
    Bachlechner et al. 2020, arXiv 2003.04887), so Δ is exactly zero before training. Its sign does not count, so the
    factor is from 0 to 1, a step gives a mean of what was carried and what is written, and what is carried does not
    grow. With `config.hypernet_signed_alpha` the factor is tanh(α), as for weights trained before 2026-11-27: below
    zero, what is carried grows at every step. With `config.hypernet_slot_gate` the gate is σ(G y + g·y), and g·y opens
    and closes all channels of a slot together.

    With `config.hypernet_reads_layers` the new tokens' entries in the memory also get a projection of their hidden
    states after the LLM's first layers ([`FirstLayers`]).

    `embedding_scale` is the root mean square of the base's input embeddings, measured by
    [`Phase15ForCausalLM.from_base`]. Inputs are divided by it and outputs multiplied, so the network works at unit
    scale, and the slots stay at the scale of the embeddings.
    """

    def __init__(self, config: Phase15Config):
        super().__init__()
        width, hidden_size = config.hypernet_hidden_size, config.text_config.hidden_size
        self.slot_proj = nn.Linear(hidden_size, width, bias=False)
        self.token_proj = nn.Linear(hidden_size, width, bias=False)
        if config.hypernet_reads_layers:
            self.hidden_norm = nn.RMSNorm(hidden_size, eps=1e-5)
            self.hidden_proj = nn.Linear(hidden_size, width, bias=False)
        self.num_positions = config.num_positions
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
        self.alpha = nn.Parameter(torch.zeros(hidden_size))
        self.signed_alpha = config.hypernet_signed_alpha
        self.register_buffer("embedding_scale", torch.ones(1))

    def forward(
        self,
        carried: SoftPrompt,
        old: SoftPrompt,
        tokens: torch.Tensor,
        token_length: torch.LongTensor,
        hidden_states: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Args:
            carried (`SoftPrompt`): `carry(old, tokens)`.
            old (`SoftPrompt`): the soft prompt before the step.
            tokens (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): embeddings that entered.
            token_length (`torch.LongTensor` of shape `(batch_size,)`): how many of them are real in each row.
            hidden_states (`torch.Tensor` of the shape of `tokens`): after the LLM's first layers; only with
                `config.hypernet_reads_layers`.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_soft_tokens, hidden_size)`: Δ, zero in slots that are not used.

        Raises:
            ValueError: for more tokens than the network has positions.
        """
        num_slots, num_tokens = carried.embeds.shape[1], tokens.shape[1]
        if num_tokens > self.num_positions:
            raise ValueError(
                f"A step reads {self.num_positions} tokens at most, not {num_tokens}: after a model is made, its "
                "config's `chunk_length` and `max_query_length` cannot grow past that."
            )
        # called, not sliced: an offloaded weight is there only during its module's call
        position = self.position_embeddings(torch.arange(max(num_slots, num_tokens), device=tokens.device))
        scale = self.embedding_scale.to(position.dtype)  # FSDP computes in bfloat16, but leaves buffers in float32
        slots = self.slot_proj(carried.embeds / scale) + position[:num_slots]  # (B, N, h)
        old_embeds, new_embeds = old.embeds / scale, tokens / scale
        read = self.token_proj(new_embeds) + position[:num_tokens]  # (B, T, h)
        if hidden_states is not None:
            read = read + self.hidden_proj(self.hidden_norm(hidden_states.to(scale.dtype)))
        memory = torch.cat([self.slot_proj(old_embeds) + position[:num_slots], read], dim=1)  # (B, N + T, h)
        token_mask = torch.arange(num_tokens, device=tokens.device) < token_length[:, None]
        memory_mask = torch.cat([old.mask, token_mask], dim=1)
        memory, slot_mask = self.memory_norm(memory), carried.mask
        for layer in self.layers:
            slots = layer(slots, slot_mask, memory, memory_mask)
        y = self.norm(slots)
        embeds = torch.cat([old_embeds, new_embeds], dim=1)  # (B, N + T, d)
        pointed = F.scaled_dot_product_attention(
            self.pointer_q_proj(y), self.pointer_k_proj(memory), embeds, attn_mask=memory_mask[:, None, :]
        )  # (B, N, d)
        written = (self.output_proj(y) + pointed) * scale
        gate = self.gate_proj(y)
        if self.slot_gate_proj is not None:
            gate = gate + self.slot_gate_proj(y)
        # not abs(): its gradient is zero at zero, where α starts
        alpha = self.alpha if self.signed_alpha else torch.where(self.alpha < 0, -self.alpha, self.alpha)
        delta = torch.tanh(alpha) * torch.sigmoid(gate) * (written - carried.embeds)
        return delta.to(carried.embeds.dtype) * slot_mask[..., None]


class FirstLayers:
    """
    The LLM's first `config.hypernet_reads_layers` layers, without its last norm. They share the modules of `body`, so
    what happens to them (a cast, a move, an adapter, sharding) happens here too. This is no module: their weights are
    the LLM's.

    Raises:
        ValueError: if the body has no `layers` and `norm`, as Llama's has.
    """

    def __init__(self, body: nn.Module, config: Phase15Config):
        if not {"layers", "norm"} <= body._modules.keys():
            number, kind = config.hypernet_reads_layers, type(body).__name__
            raise ValueError(
                f"`hypernet_reads_layers` is {number}, but {kind} has no `layers` with a `norm` behind them: give 0."
            )
        self.body, self.window = copy.copy(body), getattr(config.text_config, "sliding_window", None)
        layers = body.layers[: config.hypernet_reads_layers]
        self.body.__dict__["_modules"] = body._modules | {"layers": layers, "norm": nn.Identity()}

    def __call__(self, tokens: torch.Tensor, segment_length: int) -> list[torch.Tensor]:
        """
        Args:
            tokens (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): embeddings of segments in a row.
            segment_length (`int`): tokens of a segment; the last may be shorter.

        Returns:
            `list[torch.Tensor]`: each segment's hidden states, of the shape of its embeddings. A segment sees itself
            alone, causally, with positions from 0.
        """
        batch_size, num_tokens, hidden_size = tokens.shape
        size = min(segment_length, num_tokens)
        segments = F.pad(tokens, (0, 0, 0, -num_tokens % size)).reshape(-1, size, hidden_size)
        mask, position = None, torch.arange(size, device=tokens.device).expand(len(segments), -1)
        fits = self.window is None or size <= self.window
        if fits and self.body.config._attn_implementation in ("sdpa", "eager"):
            # while the library makes a mask the host waits for the device
            mask = tokens.new_full((1, 1, size, size), torch.finfo(tokens.dtype).min).triu(1)
        hidden_states = self.body.forward(  # hooks on the whole body are for its own calls
            inputs_embeds=segments, position_ids=position, attention_mask=mask, use_cache=False
        ).last_hidden_state
        return hidden_states.to(tokens.device).view(batch_size, -1, hidden_size)[:, :num_tokens].split(size, dim=1)


__all__ = ["FirstLayers", "HyperNetwork", "HyperNetworkLayer", "SoftPrompt", "carry"]
