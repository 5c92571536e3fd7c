# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Phase15: a language model with a recursive soft prompt.

    sp_0     = step(empty, query)
    sp_{c+1} = step(sp_c, chunk_c)                     step(sp, tokens) = carry(sp, E[tokens]) + Δ(sp, E[tokens])
    p(chunk_c) = LLM([sp_c ; chunk_c])

- the LLM (any Llama-like causal LM) sees the N slots of the soft prompt and the current chunk, and nothing else, so
  memory and time per token are constant whatever the length;
- `carry` has no parameters: S sink slots keep the first tokens of the stream, the others hold the newest;
- Δ, the HyperNetwork's gated overwrite of the slots, is exactly zero when training starts: a new model *is* its base
  model behind a sliding window with attention sinks;
- training runs the recursion first and then the LLM once over all chunks of all rows;
- generation is transformers' own loop: the state of the recursion is a `Cache`.

The first half of this file is the recursion, the second the language model around it.
"""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    Cache,
    DynamicCache,
    GenerationConfig,
    GenerationMixin,
    GgufConfig,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import can_return_tuple


try:  # inside a package: how transformers loads this file from a Hub repository or a saved folder
    from .compat_phase15 import CACHE_NAME, both_cache_names, give_both_cache_names, one_cache, pop_cache
    from .configuration_phase15 import Phase15Config
    from .decoding_phase15 import decode, is_compiled
except ImportError:  # at the root of this repository
    from compat_phase15 import CACHE_NAME, both_cache_names, give_both_cache_names, one_cache, pop_cache
    from configuration_phase15 import Phase15Config
    from decoding_phase15 import decode, is_compiled


# ---------------------------------------------------------------------------------------------------- the recursion


class SoftPrompt(NamedTuple):
    """
    State of the recursion. Slots fill from the first to the last; position in the LLM is the slot's index.

    embeds (`torch.Tensor` of shape `(batch_size, num_soft_tokens, hidden_size)`): the slots, zero where not used.
    length (`torch.LongTensor` of shape `(batch_size,)`): used slots of each row.
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
    place = slot + evicted * (slot >= num_sinks)  # which token of the stream [used slots ; tokens] the slot holds
    old = place < soft_prompt.length[:, None]
    source = torch.where(old, place, place - soft_prompt.length[:, None] + num_slots)  # index in [all slots ; tokens]
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
    Δ, what a step writes into the slots besides what `carry` puts there: the carried slots attend to the memory, which
    is the old soft prompt, so that they see what falls out, and the new tokens, giving y, and

        Δ = tanh(α) · σ(G y) · (O y + P(y, memory) − carry)

    overwrites them by a gate. O y is new; P is a pointer, an attention whose values are the memory's own embeddings
    (pointer networks, Vinyals et al. 2015, arXiv 1506.03134), so that what is about to fall out can be kept in words
    that the LLM knows already. α is one learned number per channel of the LLM and starts at zero (a zero-initialised
    residual: ReZero, Bachlechner et al. 2020, arXiv 2003.04887), so Δ is exactly zero before training.

    `embedding_scale` is the root mean square of the base's input embeddings, measured by
    [`Phase15ForCausalLM.from_base`]: inputs are divided by it and what is written is multiplied, so that the network
    works at unit scale and writes in the embeddings' own.
    """

    def __init__(self, config: Phase15Config):
        super().__init__()
        width, hidden_size = config.hypernet_hidden_size, config.text_config.hidden_size
        num_positions = max(config.num_soft_tokens, config.max_query_length, config.chunk_length)
        self.slot_proj = nn.Linear(hidden_size, width, bias=False)
        self.token_proj = nn.Linear(hidden_size, width, bias=False)
        self.position_embeddings = nn.Embedding(num_positions, width)
        self.memory_norm = nn.RMSNorm(width, eps=1e-5)
        self.layers = nn.ModuleList(HyperNetworkLayer(config) for _ in range(config.hypernet_num_hidden_layers))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.output_proj = nn.Linear(width, hidden_size, bias=False)  # O
        self.gate_proj = nn.Linear(width, hidden_size, bias=False)  # G
        pointer_size = max(width // config.hypernet_num_attention_heads // 2, 1)
        self.pointer_q_proj = nn.Linear(width, pointer_size, bias=False)
        self.pointer_k_proj = nn.Linear(width, pointer_size, bias=False)
        self.alpha = nn.Parameter(torch.zeros(hidden_size))
        self.register_buffer("embedding_scale", torch.ones(1))

    def forward(
        self, carried: SoftPrompt, old: SoftPrompt, tokens: torch.Tensor, token_length: torch.LongTensor
    ) -> torch.Tensor:
        """
        Args:
            carried (`SoftPrompt`): what `carry` made of `old` and `tokens`.
            old (`SoftPrompt`): the soft prompt before the step.
            tokens (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): embeddings that entered.
            token_length (`torch.LongTensor` of shape `(batch_size,)`): how many of them are real in each row.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_soft_tokens, hidden_size)`: Δ, zero in slots that are not used.
        """
        position = self.position_embeddings.weight
        scale = self.embedding_scale.to(position.dtype)  # FSDP computes in bfloat16, but leaves buffers in float32
        num_slots, num_tokens = carried.embeds.shape[1], tokens.shape[1]
        slots = self.slot_proj(carried.embeds / scale) + position[:num_slots]  # (B, N, h)
        old_embeds, new_embeds = old.embeds / scale, tokens / scale
        memory = torch.cat(
            [
                self.slot_proj(old_embeds) + position[:num_slots],
                self.token_proj(new_embeds) + position[:num_tokens],
            ],
            dim=1,
        )  # (B, N + T, h)
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
        delta = torch.tanh(self.alpha) * torch.sigmoid(self.gate_proj(y)) * (written - carried.embeds)
        return delta.to(carried.embeds.dtype) * slot_mask[..., None]


class Phase15Cache(Cache):
    """
    State of one generation: the soft prompt, the tokens of the open chunk, and the LLM's key-value cache of
    [soft prompt ; open chunk]. Its size does not depend on how many tokens were seen.

    Attributes:
        soft_prompt (`SoftPrompt`, *optional*): None before the first token.
        chunk (`torch.Tensor` of shape `(batch_size, open, hidden_size)`): embeddings of the open chunk, with
            `0 <= open < chunk_length`. Chunks of all rows open and close together.
        llm_cache (`DynamicCache`): of the `soft_prompt` and `chunk` above.
        seen_tokens (`int`): columns of `input_ids` consumed, padding included.

    A cache that `generate(..., return_dict_in_generate=True)` returned can be given to a second call, with the whole
    conversation as `input_ids`: its new tokens are read as the next message.
    """

    def __init__(self, config: Phase15Config):
        super().__init__(layers=[])
        self.config = config
        self.reset()

    def reset(self):
        self.soft_prompt: SoftPrompt | None = None
        self.chunk: torch.Tensor | None = None
        self.llm_cache: DynamicCache | None = None
        self.seen_tokens = 0

    def open_chunk(self, soft_prompt: SoftPrompt):
        """Starts an empty chunk behind a new soft prompt, for which the LLM's old keys and values are useless."""
        self.soft_prompt = soft_prompt
        self.chunk = soft_prompt.embeds[:, :0]
        self.llm_cache = DynamicCache(config=self.config.text_config)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.seen_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1  # unlimited

    @property
    def batch_size(self) -> int:
        return -1 if self.soft_prompt is None else self.soft_prompt.length.shape[0]

    @property
    def is_croppable(self) -> bool:
        return False

    @property
    def is_linear(self) -> list[bool]:
        return [False]  # it has no layers; of none, all would be linear attention, whose positions generate ignores

    def crop(self, tokens_to_remove: int):
        raise ValueError("A Phase15Cache cannot be cropped: the recursion does not keep what it has replaced.")

    def reorder_cache(self, beam_idx: torch.LongTensor):
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: torch.Tensor):
        if self.soft_prompt is not None:
            self.soft_prompt = SoftPrompt(*(state.index_select(0, indices) for state in self.soft_prompt))
            self.chunk = self.chunk.index_select(0, indices)
            self.llm_cache.batch_select_indices(indices)

    def batch_repeat_interleave(self, repeats: int):
        if self.soft_prompt is not None:
            self.soft_prompt = SoftPrompt(*(state.repeat_interleave(repeats, dim=0) for state in self.soft_prompt))
            self.chunk = self.chunk.repeat_interleave(repeats, dim=0)
            self.llm_cache.batch_repeat_interleave(repeats)


# ----------------------------------------------------------------------------------------------- the language model


@both_cache_names
@dataclass
class Phase15CausalLMOutputWithPast(CausalLMOutputWithPast):
    """
    A [`~transformers.modeling_outputs.CausalLMOutputWithPast`] with the recursion's state.

    Args:
        loss (`torch.Tensor` of shape `()`, *optional*, returned when `labels` is given):
            Cross-entropy in nats, summed over target tokens and divided by their number or by `num_items_in_batch`.
        logits (`torch.Tensor` of shape `(batch_size, sequence_length, vocab_size)`, *optional*):
            Scores of the token after each position; zeros at positions inside the query and at padding.
        cache (`Phase15Cache`, *optional*):
            The cache given, or made because of `use_cache=True`; `past_key_values` is the same.
        last_hidden_state (`torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`, *optional*):
            What the output embeddings turn into `logits`; not returned with `labels` and `skip_logits`.
        hidden_states, attentions (`tuple(torch.Tensor)`, *optional*):
            Of the LLM's last call, whose rows are chunks and whose positions are slots and chunk tokens.
        soft_prompt (`torch.Tensor` of shape `(batch_size, num_soft_tokens, hidden_size)`):
            The soft prompt behind each row's last prediction.
        chunk_losses, chunk_tokens (`torch.Tensor` of shape `(num_chunks,)`, *optional*, returned with `labels`):
            By index of the chunk: summed cross-entropy in nats, without gradient, and number of target tokens.
    """

    last_hidden_state: torch.Tensor | None = None
    soft_prompt: torch.Tensor | None = None
    chunk_losses: torch.Tensor | None = None
    chunk_tokens: torch.LongTensor | None = None


class Rows(NamedTuple):
    """
    A batch with its padding compacted away, wherever it was. All of shape `(batch_size, sequence_length)` or
    `(batch_size,)`; the query is the first `query_length` of a row's `length` tokens.
    """

    input_ids: torch.LongTensor
    column: torch.LongTensor  # where each token stood in the batch as it was given
    length: torch.LongTensor
    query_length: torch.LongTensor
    labels: torch.LongTensor | None


class Phase15PreTrainedModel(PreTrainedModel):
    config: Phase15Config
    config_class = Phase15Config
    base_model_prefix = "phase15"  # no attribute: recursion and LLM are one, and `base_model` is the model itself
    supports_gradient_checkpointing = True
    _no_split_modules = ["HyperNetwork"]  # it adds what its parts give
    _keep_in_fp32_modules = ["hypernet"]  # in float16; and quantizers convert the LLM alone
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _is_stateful = True  # a step of the recursion cannot be undone, so candidate tokens cannot be rolled back

    @classmethod
    def get_init_context(cls, *args, **kwargs) -> list:
        """As the library's, but `from_pretrained` initialises only what it has not filled."""
        return [*super().get_init_context(*args, **kwargs), init.no_init_weights()]

    @classmethod
    def from_pretrained(cls, name, *args, output_loading_info: bool = False, **kwargs):
        """
        As the library's, but all weights must be there and fit, and pickles need `use_safetensors=False`.

        Raises:
            ValueError: for weights that cannot be read, are missing, are left over or have another shape.
        """
        kwargs.setdefault("use_safetensors", True)
        model, info = load_whole(super().from_pretrained, name, *args, **kwargs)
        return (model, info) if output_loading_info else model

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        if isinstance(module, HyperNetwork):
            # as large as what the projections make of embeddings at unit scale
            position_std = self.config.initializer_range * self.config.text_config.hidden_size**0.5
            init.normal_(module.position_embeddings.weight, mean=0.0, std=position_std)
            init.zeros_(module.alpha)
            init.constant_(module.embedding_scale, self.config.text_config.initializer_range)


class Phase15ForCausalLM(Phase15PreTrainedModel, GenerationMixin):
    """
    A causal language model whose LLM sees a recursive soft prompt and the current chunk of 16 tokens.

    Args:
        config (`Phase15Config`): its `text_config` says which LLM is built.
        llm (`PreTrainedModel`, *optional*): the LLM to wrap; built from `config.text_config` when not given.

    ```python
    >>> model = Phase15ForCausalLM.from_base("TinyLlama/TinyLlama-1.1B-Chat-v1.0")  # equals its base, until trained
    >>> model = AutoModelForCausalLM.from_pretrained("path/or/repo", trust_remote_code=True)
    ```"""

    def __init__(self, config: Phase15Config, llm: PreTrainedModel | None = None):
        super().__init__(config)
        self.llm = AutoModelForCausalLM.from_config(config.text_config) if llm is None else llm
        self.hypernet = HyperNetwork(config)
        self.post_init()

    @classmethod
    def from_base(cls, base: str | os.PathLike, **kwargs) -> "Phase15ForCausalLM":
        """
        Wraps a causal LM with a new HyperNetwork. Until it is trained, the model gives its base's output.

        Args:
            base (`str` or `os.PathLike`): Hub id, local folder, or `.gguf` file of a Llama, Mistral, Qwen2 or alike.
            kwargs: fields of [`Phase15Config`]; all others go to `AutoModelForCausalLM.from_pretrained` (`dtype`,
                `device_map`, `revision`, …). Weights that are pickles need `use_safetensors=False`.

        Raises:
            ValueError: if the base cannot be given a soft prompt, or its weights are not whole.
        """
        config_kwargs = {name: kwargs.pop(name) for name in list(kwargs) if name in Phase15Config.__annotations__}
        if str(base).endswith(".gguf"):
            base, kwargs["gguf_file"] = os.path.split(os.path.abspath(base))
            kwargs.setdefault("quantization_config", GgufConfig(dequantize=True))
        kwargs.setdefault("use_safetensors", True)
        llm, _ = load_whole(AutoModelForCausalLM.from_pretrained, base, **kwargs)
        check_base(llm)
        if os.path.isdir(base):
            llm.config.name_or_path = ""  # a path says nothing where the model is loaded later
        attention = llm.config._attn_implementation
        model = cls(Phase15Config(text_config=llm.config, attn_implementation=attention, **config_kwargs), llm=llm)
        embeddings = llm.get_input_embeddings().weight
        dtype = torch.float32 if embeddings.dtype == torch.float16 else embeddings.dtype  # as when it is loaded again
        model.hypernet.to(device=embeddings.device, dtype=dtype)
        model.hypernet.embedding_scale.fill_(embeddings.detach().float().square().mean().sqrt())
        model.generation_config = llm.generation_config
        if getattr(llm, "is_quantized", False):
            model.hf_quantizer = llm.hf_quantizer  # which knows how to save what it made
        return model.eval()

    def get_input_embeddings(self) -> nn.Module:
        return self.llm.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.llm.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.llm.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module):
        self.llm.set_output_embeddings(new_embeddings)

    # the parts of a step, shared by training, generation and evaluation

    def empty_soft_prompt(self, batch_size: int, like: torch.Tensor | None = None) -> SoftPrompt:
        """The state before the first token: no slot is used. `like` is embeddings, if the weight is a shard."""
        like = self.get_input_embeddings().weight if like is None else like
        return SoftPrompt(
            like.new_zeros(batch_size, self.config.num_soft_tokens, like.shape[-1]),
            torch.zeros(batch_size, dtype=torch.long, device=like.device),
        )

    def step(self, soft_prompt: SoftPrompt, tokens: torch.Tensor, token_length: torch.LongTensor) -> SoftPrompt:
        """
        `step(sp, tokens) = carry(sp, tokens) + Δ(sp, tokens)`; a row without a token keeps its soft prompt.

        Args:
            soft_prompt (`SoftPrompt`): the state before.
            tokens (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): embeddings, left-aligned.
            token_length (`torch.LongTensor` of shape `(batch_size,)`): how many of them are real in each row.
        """
        carried = carry(soft_prompt, tokens, token_length, self.config.num_sink_tokens)
        delta = self.hypernet(carried, soft_prompt, tokens, token_length)
        reads = (token_length > 0)[:, None, None]
        return carried._replace(embeds=torch.where(reads, carried.embeds + delta, soft_prompt.embeds))

    def read(self, soft_prompt: SoftPrompt, tokens: torch.Tensor, length: torch.LongTensor) -> SoftPrompt:
        """Steps over a message of any length, given by ids or by embeddings, `max_query_length` tokens at a time."""
        for segment in tokens.split(self.config.max_query_length, dim=1):
            segment_length = length.clamp(max=segment.shape[1])
            embeds = segment if segment.is_floating_point() else self.get_input_embeddings()(segment)
            soft_prompt = self.step(soft_prompt, embeds, segment_length)
            length = length - segment_length
        return soft_prompt

    def predict(
        self,
        soft_prompt: SoftPrompt,
        chunk: torch.Tensor,
        llm_cache: DynamicCache | None = None,
        num_opened: int = 0,
        **kwargs,
    ) -> tuple[torch.Tensor, CausalLMOutputWithPast]:
        """
        Calls the LLM on `[soft_prompt ; chunk]`.

        Args:
            soft_prompt (`SoftPrompt`): of `batch_size` chunks.
            chunk (`torch.Tensor` of shape `(batch_size, num_tokens, hidden_size)`): embeddings of chunk tokens.
            llm_cache (`DynamicCache`, *optional*): keys and values of the soft prompt and of the chunk's `num_opened`
                tokens before these; filled with the soft prompt's first when empty.

        Returns:
            the hidden states that predict the tokens after the soft prompt (unless it was in the cache) and after each
            chunk token, of shape `(batch_size, (1 +) num_tokens, hidden_size)`, and the LLM's output.
        """
        shortest, used = torch.stack(torch.aminmax(soft_prompt.length)).tolist()
        batch_size, num_tokens, hidden_size = chunk.shape
        past = 0 if llm_cache is None else llm_cache.get_seq_length()
        if past:
            used = past - num_opened  # the longest row may have left since
        last_slot = soft_prompt.length[:, None] - 1
        position = last_slot + 1 + torch.arange(num_opened, num_opened + num_tokens, device=chunk.device)
        inputs_embeds, predicting = chunk, torch.arange(num_tokens, device=chunk.device).expand(batch_size, -1)
        if past == 0:
            inputs_embeds = torch.cat([soft_prompt.embeds[:, :used], chunk], dim=1)
            position = torch.cat([torch.arange(used, device=chunk.device).expand(batch_size, -1), position], dim=1)
            predicting = torch.cat([last_slot, used + predicting], dim=1)
        visible = None  # slots of shorter rows that are not used are hidden
        if shortest < used:
            visible = F.pad(soft_prompt.mask[:, :used], (0, num_opened + num_tokens), value=True)
        outputs = self.llm.base_model(
            inputs_embeds=inputs_embeds,
            position_ids=position,
            attention_mask=visible,
            use_cache=llm_cache is not None,
            **{CACHE_NAME: llm_cache},
            **kwargs,
        )
        return outputs.last_hidden_state.gather(1, predicting[..., None].expand(-1, -1, hidden_size)), outputs

    # forward: the training form and the cached form

    def __call__(self, *args, **kwargs):
        # TRL's trainers replace `forward` by one that keeps the labels, calls `base_model`, which is this model again,
        # for the hidden states, and applies the LM head itself.
        if kwargs.get("fused_lm_head"):
            query_lengths = query_lengths_of(kwargs["labels"], kwargs.get("attention_mask"))
            kwargs |= {"query_lengths": query_lengths, "skip_logits": True}
        elif kwargs.get("skip_logits") and kwargs.get("labels") is None:
            return Phase15ForCausalLM.forward(self, *args, **kwargs)  # the other holds an autocast: no second entry
        return super().__call__(*args, **kwargs)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        query_lengths: torch.LongTensor | None = None,
        cache: Phase15Cache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        skip_logits: bool = False,
        bptt_chunks: int | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        past_key_values: Phase15Cache | None = None,
        **kwargs,
    ) -> Phase15CausalLMOutputWithPast:
        r"""
        Reads each row's query into the soft prompt and predicts the tokens after it, chunk by chunk.

        Without a cache this is the training form: the recursion runs first, which depends on the given tokens alone,
        then the LLM once over all chunks of all rows. With one it continues from the cache's state, and any split of
        the same tokens into calls gives the same logits.

        Args:
            input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Query and answer. Padding may be on any side; it is compacted away.
            attention_mask (`torch.Tensor` of shape `(batch_size, sequence_length)`, *optional*):
                1 for tokens, 0 for padding. With a cache it may cover the tokens before too, as in transformers.
            labels (`torch.LongTensor` of shape `(batch_size, sequence_length)`, *optional*):
                Target ids aligned with `input_ids`, -100 for none. What comes before a row's first label is its query.
            query_lengths (`torch.LongTensor` of shape `(batch_size,)`, *optional*):
                How many tokens of each row are its query, padding not counted; goes before what `labels` say. Without
                both the query is the first token (none, if the cache has seen tokens): a causal LM over any text.
            cache (`Phase15Cache`, *optional*):
                State to continue from, updated in place. Its rows must have equally many answer tokens.
            use_cache (`bool`, *optional*): make a `Phase15Cache` when none is given; unlike elsewhere not the default.
            logits_to_keep (`int` or `torch.Tensor` of shape `(num_columns,)`, defaults to 0):
                Compute logits for so many last columns, or for these columns; 0 is all.
            skip_logits (`bool`, defaults to `False`):
                Save the memory of the logits: with `labels` compute the loss alone, without them `last_hidden_state`.
            bptt_chunks (`int`, *optional*): stop the gradient through the recursion after every so many chunks.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                Divisor of the loss: the target tokens of the whole accumulated batch. Defaults to this batch's.
            past_key_values (`Phase15Cache`, *optional*): the same as `cache`; its name before transformers 5.24.
            kwargs: go to the LLM (`output_hidden_states`, `output_attentions`).

        Raises:
            ValueError: for shapes that do not match, ids outside the vocabulary, rows without a token, a query longer
                than its row, rows that a cache cannot hold side by side, or a cache of another class.
            FloatingPointError: for a query, read into a cache, behind which the LLM's output is not finite.
        """
        if kwargs.pop("inputs_embeds", None) is not None:  # None comes from PEFT
            raise ValueError("`inputs_embeds` cannot be given: the recursion reads `input_ids`.")
        if kwargs.pop("position_ids", None) is not None:
            raise ValueError("`position_ids` cannot be given: a row is one text, so packed data cannot be read.")
        cache = one_cache(cache, past_key_values)
        if cache is None and use_cache:
            cache = Phase15Cache(self.config)
        check_cache(cache)
        if cache is not None and labels is not None:
            raise ValueError("`labels` cannot be given with `cache` or `use_cache=True`.")
        seen_tokens, vocab_size = 0 if cache is None else cache.seen_tokens, self.config.text_config.vocab_size
        rows = compact(input_ids, attention_mask, labels, query_lengths, seen_tokens, vocab_size)
        kept = torch.arange(input_ids.shape[1], device=input_ids.device)
        kept = kept[-logits_to_keep:] if isinstance(logits_to_keep, int) else kept[logits_to_keep]
        logit_column = torch.full_like(rows.column[0], -1)  # where a column of the input stands in the logits
        logit_column[kept] = torch.arange(len(kept), device=input_ids.device)
        logit_column = logit_column[rows.column]  # (B, T), by place in the row

        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        predicts = (place >= rows.query_length[:, None] - 1) & (place < rows.length[:, None])
        targets = torch.full_like(rows.input_ids, -100)  # (B, T): the token that each place predicts
        if labels is not None:
            targets[:, :-1] = rows.labels[:, 1:]
        wanted = targets != -100 if skip_logits and labels is not None else (targets != -100) | (logit_column >= 0)
        row, place = (predicts & wanted).nonzero(as_tuple=True)  # (P,) each: the predictions to be made
        if not len(row) and labels is not None:
            raise ValueError("`labels` hold no target after any row's query, so there is nothing to predict.")
        if not len(row):  # all columns kept are padding or inside a query: any prediction does, as none is kept
            row, place = row.new_zeros(1), rows.length[:1] - 1

        if cache is None:
            hidden_states, soft_prompt, chunk, outputs = self._unroll(rows, row, place, bptt_chunks, **kwargs)
        else:
            hidden_states, outputs = self._continue(rows, cache, row, place, **kwargs)
            soft_prompt = cache.soft_prompt.embeds
            cache.seen_tokens += input_ids.shape[1]

        loss, logits, last_hidden_state, chunk_losses, chunk_tokens = None, None, None, None, None
        if labels is not None or not skip_logits:
            predictions = self.get_output_embeddings()(hidden_states)  # (P, V)
        if labels is not None:
            targets = targets[row, place]
            losses = F.cross_entropy(predictions.float(), targets, ignore_index=-100, reduction="none")
            counts = (targets != -100).long()
            loss = losses.sum() / (counts.sum() if num_items_in_batch is None else num_items_in_batch)
            num_chunks = int(chunk.max()) + 1
            chunk_losses = losses.new_zeros(num_chunks).index_add_(0, chunk, losses.detach())
            chunk_tokens = counts.new_zeros(num_chunks).index_add_(0, chunk, counts)

        column = logit_column[row, place]
        is_kept = column >= 0

        def in_columns(values: torch.Tensor) -> torch.Tensor:
            columns = values.new_zeros(len(input_ids), len(kept), values.shape[-1])
            columns[row[is_kept], column[is_kept]] = values[is_kept]
            return columns

        if not skip_logits:
            logits = in_columns(predictions)
        if not skip_logits or labels is None:
            last_hidden_state = in_columns(hidden_states)
        return Phase15CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            cache=cache,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            last_hidden_state=last_hidden_state,
            soft_prompt=soft_prompt,
            chunk_losses=chunk_losses,
            chunk_tokens=chunk_tokens,
        )

    def _unroll(self, rows: Rows, row: torch.Tensor, place: torch.Tensor, bptt_chunks: int | None, **kwargs):
        """
        The training form: all steps of the recursion, then one call of the LLM over the chunks that hold one of the
        predictions asked for, each given by its row and its place in the row.

        Returns:
            the hidden states of the predictions `(num_predictions, hidden_size)`, each row's last soft prompt
            `(batch_size, num_soft_tokens, hidden_size)`, the predictions' chunk indices, and the LLM's output.
        """
        chunk_length = self.config.chunk_length
        answer_place = place - rows.query_length[row] + 1  # of the predicted token
        chunk, offset = answer_place // chunk_length, answer_place % chunk_length  # (P,) each
        num_rows, num_chunks = len(rows.length), int(chunk.max()) + 1

        answer = rows.query_length[:, None] + torch.arange(num_chunks * chunk_length, device=row.device)
        answer = rows.input_ids.gather(1, answer.clamp(max=rows.input_ids.shape[1] - 1))
        chunks = self.get_input_embeddings()(answer).unflatten(1, (num_chunks, chunk_length))  # (B, C, K, d)
        num_full = (rows.length - rows.query_length) // chunk_length

        # one call for all segments: FSDP gathers the embeddings at each, and all processes must do so equally often
        query = self.get_input_embeddings()(rows.input_ids[:, : int(rows.query_length.max())])
        soft_prompts = [self.read(self.empty_soft_prompt(num_rows, like=query), query, rows.query_length)]
        for index in range(num_chunks - 1):
            soft_prompt = soft_prompts[-1]
            if bptt_chunks and (index + 1) % bptt_chunks == 0:
                soft_prompt = soft_prompt._replace(embeds=soft_prompt.embeds.detach())
            token_length = (index < num_full) * chunk_length  # only a full chunk is read
            soft_prompts.append(self.step(soft_prompt, chunks[:, index], token_length))
        embeds, length = (torch.stack(states, dim=1) for states in zip(*soft_prompts, strict=True))  # (B, C, …)

        needed = torch.zeros(num_rows, num_chunks, dtype=torch.bool, device=row.device)
        needed[row, chunk] = True
        batch_index = (needed.flatten().cumsum(0) - 1).view_as(needed)[row, chunk]  # of each prediction's chunk
        hidden_states, outputs = self.predict(
            SoftPrompt(embeds[needed], length[needed]), chunks[needed][:, :-1], **kwargs
        )
        last = torch.zeros_like(num_full).scatter_reduce(0, row, chunk, "amax")
        return hidden_states[batch_index, offset], embeds[torch.arange(num_rows), last], chunk, outputs

    def _continue(self, rows: Rows, cache: Phase15Cache, row: torch.Tensor, place: torch.Tensor, **kwargs):
        """
        The cached form: reads a message if there is one, then feeds answer tokens to the open chunk.

        Returns:
            the hidden states of the predictions `(num_predictions, hidden_size)` and the LLM's last output.
        """
        chunk_length = self.config.chunk_length
        answer_length = rows.length - rows.query_length
        has_query = rows.query_length > 0
        if (answer_length != answer_length[0]).any() or (has_query != has_query[0]).any():
            raise ValueError(
                "In a cache the chunks of all rows open and close together, but the rows have queries of "
                f"{rows.query_length.tolist()} tokens and {answer_length.tolist()} tokens after them; give "
                "`query_lengths` that leave equally many, or call forward without a cache."
            )
        states = []
        if has_query[0]:
            states.append(self._open_chunk(cache, self._read_message(rows, cache), **kwargs))
            if not torch.isfinite(states[0][0]).all():  # asked once a message
                raise FloatingPointError(
                    "The LLM's output behind the query is not finite. The weights are damaged, or too large for "
                    f"{self.dtype}: load the model with another `dtype`."
                )
        answer = rows.query_length[:, None] + torch.arange(int(answer_length[0]), device=row.device)
        answer = self.get_input_embeddings()(rows.input_ids.gather(1, answer))  # (B, A, d)
        while answer.shape[1]:
            room = chunk_length - cache.chunk.shape[1]
            tokens, answer = answer[:, :room], answer[:, room:]
            is_full = tokens.shape[1] == room
            if heard := tokens.shape[1] - is_full:  # the last token of a chunk predicts nothing inside it
                states.append(self._hear(cache, tokens[:, :heard], **kwargs))
            cache.chunk = torch.cat([cache.chunk, tokens], dim=1)
            if is_full:
                soft_prompt = self.step(cache.soft_prompt, cache.chunk, torch.full_like(rows.length, chunk_length))
                states.append(self._open_chunk(cache, soft_prompt, **kwargs))
        hidden_states = torch.cat([hidden_states for hidden_states, _ in states], dim=1)  # (B, predictions, d)
        first_place = rows.length - hidden_states.shape[1]
        return hidden_states[row, place - first_place[row]], states[-1][1]

    def _read_message(self, rows: Rows, cache: Phase15Cache) -> SoftPrompt:
        """What becomes of the cache's soft prompt when each row's query is read; it closes the open chunk."""
        soft_prompt = cache.soft_prompt or self.empty_soft_prompt(len(rows.length))
        if cache.chunk is not None and cache.chunk.shape[1]:
            soft_prompt = self.step(soft_prompt, cache.chunk, torch.full_like(rows.length, cache.chunk.shape[1]))
        query = rows.input_ids[:, : int(rows.query_length.max())]
        return self.read(soft_prompt, query, rows.query_length)

    def _hear(self, cache: Phase15Cache, tokens: torch.Tensor, **kwargs):
        """Calls the LLM on more tokens of the open chunk; returns as `predict`."""
        return self.predict(cache.soft_prompt, tokens, cache.llm_cache, cache.chunk.shape[1], **kwargs)

    def _open_chunk(self, cache: Phase15Cache, soft_prompt: SoftPrompt, **kwargs):
        """Puts a new soft prompt into the cache and calls the LLM on it; returns as `predict`."""
        cache.open_chunk(soft_prompt)
        return self._hear(cache, cache.chunk, **kwargs)

    # generation: the library's own loop

    @torch.no_grad()
    def generate(
        self,
        inputs: torch.Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        *args,
        compile: bool | None = None,
        **kwargs,
    ):
        r"""
        Generates as [`~transformers.GenerationMixin.generate`] does, with all its arguments, at constant memory: the
        prompt is read into the soft prompt as the query, and the soft prompt is stepped after each chunk.

        Args:
            inputs (`torch.LongTensor` of shape `(batch_size, sequence_length)`):
                Prompts, padded on the left (an `attention_mask` tells) if their lengths differ.
            cache (`Phase15Cache`, *optional*):
                Cache of an earlier call, which `return_dict_in_generate=True` returned; `inputs` are then the whole
                conversation, and what the cache has not seen is read as the next message. `past_key_values` is the
                same.
            compile (`bool`, *optional*):
                Greedy search and sampling on static buffers with compiled steps, on CUDA as CUDA graphs: by default
                on CUDA where nothing forbids it. The first call compiles, which takes about a minute. True insists
                on it, on a CPU too (`torch.compile` needs a C++ compiler there); False refuses it.

        Raises:
            ValueError: for assisted decoding, contrastive search, paged or other caches, and chunked prefill; for rows
                that end in padding; for `compile=True` with something that forbids it, which is named.
        """

        sources = [kwargs, *(vars(config) for config in (generation_config, self.generation_config) if config)]

        def setting(name):
            return next((source[name] for source in sources if source.get(name) is not None), None)

        for name, (mode, reason) in UNSUPPORTED_GENERATION.items():
            if setting(name):
                raise ValueError(f"Phase15 does not support {mode} (`{name}`): {reason}.")
        if compile and (setting("num_beams") or 1) > 1:
            raise ValueError("`compile=True` cannot be honoured with beam search.")
        kwargs["compile"] = False if compile is None and setting("disable_compile") else compile
        input_ids = kwargs.get("input_ids") if inputs is None else inputs
        num_columns = 1 if input_ids is None else input_ids.shape[-1]  # the library starts from a BOS token
        cache = pop_cache(kwargs)
        check_cache(cache)
        if cache is not None and num_columns <= cache.seen_tokens:
            raise ValueError(
                f"`inputs` has {num_columns} columns, but the cache has already seen {cache.seen_tokens}; give the "
                "whole conversation, old tokens first."
            )
        mask = kwargs.get("attention_mask")
        if mask is not None and (bad := mask.any(dim=1) & (mask[:, -1] == 0)).any():
            raise ValueError(
                f"Row {int(bad.nonzero()[0])} of `attention_mask` ends in padding, but the next token is read off the "
                "last column: pad `inputs` on the left, and in a conversation give every row a message or none."
            )
        if cache is None and setting("use_cache") is not False:
            cache = Phase15Cache(self.config)
        if cache is None:
            kwargs["prompt_length"] = num_columns
        else:
            kwargs[CACHE_NAME] = cache
        return give_both_cache_names(super().generate(inputs, generation_config, *args, **kwargs))

    def _sample(
        self,
        input_ids: torch.LongTensor,
        logits_processor,
        stopping_criteria,
        generation_config: GenerationConfig,
        synced_gpus: bool = False,
        streamer=None,
        compile: bool | None = None,
        **model_kwargs,
    ):
        """Greedy search and sampling: the library's loop, or the fast path of decoding_phase15.py."""
        parts = (logits_processor, stopping_criteria, generation_config)
        cache = model_kwargs.get(CACHE_NAME)
        num_new = None if cache is None or not cache.seen_tokens else input_ids.shape[1] - cache.seen_tokens
        output = None
        if is_compiled(compile, self, *parts, synced_gpus, num_new, model_kwargs):
            model_inputs = self.prepare_inputs_for_generation(
                input_ids, next_sequence_length=num_new, is_first_iteration=True, **model_kwargs
            )
            mask, query_lengths = model_inputs.get("attention_mask"), model_inputs["query_lengths"]
            ids, vocab_size = model_inputs["input_ids"], self.config.text_config.vocab_size
            rows = compact(ids, mask, None, query_lengths, cache.seen_tokens, vocab_size)
            soft_prompt = self._read_message(rows, cache)
            output = decode(self, soft_prompt, cache, input_ids, *parts, streamer, insist=bool(compile))
        if output is None:
            output = super()._sample(input_ids, *parts, synced_gpus=synced_gpus, streamer=streamer, **model_kwargs)
        return output

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        attention_mask: torch.Tensor | None = None,
        query_lengths: torch.LongTensor | None = None,
        prompt_length: int | None = None,
        is_first_iteration: bool = False,
        compile: bool | None = None,
        **kwargs,
    ) -> dict:
        """As the library's; besides, says which tokens are the query: the prompt, read once if there is a cache."""
        cache = pop_cache(kwargs)
        model_inputs = super().prepare_inputs_for_generation(
            input_ids,
            attention_mask=attention_mask,
            is_first_iteration=is_first_iteration,
            **{CACHE_NAME: cache},
            **kwargs,
        )
        input_ids = model_inputs["input_ids"]
        if cache is None:
            query_columns = slice(prompt_length)
        elif not is_first_iteration or (cache.seen_tokens and input_ids.shape[1] == 1):
            return model_inputs  # one more token of the answer
        else:
            query_columns = slice(-input_ids.shape[1], None)
        if query_lengths is None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            query_lengths = mask[:, query_columns].sum(dim=1)
        return {**model_inputs, "query_lengths": query_lengths}

    def init_continuous_batching(self, *args, **kwargs):
        raise ValueError(f"Phase15 does not support paged and continuous batching: {_ONE_CACHE}.")

    generate_batch = init_continuous_batching


def compact(
    input_ids: torch.LongTensor,
    attention_mask: torch.Tensor | None,
    labels: torch.LongTensor | None,
    query_lengths: torch.LongTensor | None,
    seen_tokens: int,
    vocab_size: int,
) -> Rows:
    """Checks the arguments of [`Phase15ForCausalLM.forward`] and left-aligns the rows; see there."""
    if input_ids is None or input_ids.ndim != 2:
        shape = None if input_ids is None else tuple(input_ids.shape)
        raise ValueError(f"`input_ids` must have shape (batch_size, sequence_length), not {shape}.")
    if input_ids.is_floating_point():
        raise ValueError(f"`input_ids` must hold integers, not {input_ids.dtype}.")
    batch_size, num_columns = input_ids.shape
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if mask.shape not in ((batch_size, num_columns), (batch_size, seen_tokens + num_columns)):
        raise ValueError(f"`attention_mask` has shape {tuple(mask.shape)}, but `input_ids` {tuple(input_ids.shape)}.")
    mask = mask[:, -num_columns:].bool()
    column = mask.long().argsort(dim=1, descending=True, stable=True)  # (B, T)
    length = mask.sum(dim=1)
    if labels is not None:
        if labels.shape != input_ids.shape:
            raise ValueError(f"`labels` has shape {tuple(labels.shape)}, but `input_ids` {tuple(input_ids.shape)}.")
        labels = labels.masked_fill(~mask, -100)
    if query_lengths is not None:
        query_length = torch.as_tensor(query_lengths, device=input_ids.device).expand(batch_size)
    elif labels is not None:
        query_length = query_lengths_of(labels, mask)
    else:
        query_length = torch.full_like(length, 0 if seen_tokens else 1)
    shortest = 0 if seen_tokens else 1
    bad = (length < 1) | (query_length < shortest) | (query_length > length)
    unknown = (input_ids < 0) | (input_ids >= vocab_size)  # (B, T)
    if labels is not None:
        unknown |= (labels != -100) & ((labels < 0) | (labels >= vocab_size))
    bad |= unknown.any(dim=1)
    if bad.any():  # the only question to the device
        if unknown.any():
            index, place = unknown.nonzero()[0].tolist()
            ids = [int(values[index, place]) for values in (input_ids, labels) if values is not None]
            raise ValueError(
                f"Row {index} holds {', with the label '.join(map(str, ids))}, at place {place}, but ids must be from "
                f"0 to {vocab_size - 1}, the vocabulary's last, at padding too."
            )
        index = int(bad.nonzero()[0])
        raise ValueError(
            f"Row {index} has {length[index]} tokens and a query of {query_length[index]}; a row needs at least one "
            f"token, and its query {shortest} to all of them."
        )
    labels = None if labels is None else labels.gather(1, column)
    return Rows(input_ids.gather(1, column), column, length, query_length, labels)


def check_cache(cache: Cache | None):
    """Raises a ValueError for a cache of another class, or of another copy of this file."""
    if cache is not None and not isinstance(cache, Phase15Cache):
        raise ValueError(
            f"`cache` (or `past_key_values`) must be a Phase15Cache of {Phase15Cache.__module__}, not a "
            f"{type(cache).__name__} of {type(cache).__module__}."
        )


def query_lengths_of(labels: torch.LongTensor, attention_mask: torch.Tensor | None) -> torch.LongTensor:
    """How many tokens of each row come before its first label: all of them, if it has none, and one at least."""
    mask = torch.ones_like(labels) if attention_mask is None else attention_mask.long()
    is_target = (labels != -100) & mask.bool()
    before = (mask.cumsum(dim=1) - mask).gather(1, is_target.long().argmax(dim=1, keepdim=True)).squeeze(1)  # (B,)
    return torch.where(is_target.any(dim=1), before.clamp(min=1), mask.sum(dim=1))


def load_whole(load: Callable, name: str | os.PathLike, *args, **kwargs) -> tuple[PreTrainedModel, dict]:
    """
    `load`, a `from_pretrained`, and its loading info. The library would only warn of weights that are not in the file,
    and go on with random ones.
    """
    may_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
    try:
        model, info = load(name, *args, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs)
    except Exception as error:
        if type(error).__name__ != "SafetensorError":  # whose package is none that this file may need
            raise
        files = list(Path(name).glob("*.safetensors"))
        file = files[0] if len(files) == 1 else f"{name}: its weights"
        raise ValueError(f"{file} cannot be read: {error}") from error
    wrong = {
        "missing": info["missing_keys"],
        "left over": info["unexpected_keys"],
        "of another shape": () if may_mismatch else {key for key, *_ in info["mismatched_keys"]},
    }
    if found := [f"{sorted(keys)[0]} is {what}" for what, keys in wrong.items() if keys]:
        number = sum(map(len, wrong.values()))
        raise ValueError(
            f"{name}: {number} of the weights do not fit the model that config.json describes: {', '.join(found)}."
        )
    return model, info


def check_base(llm: PreTrainedModel):
    """Raises a ValueError that names a base which cannot be given a soft prompt."""
    arguments = inspect.signature(llm.base_model.forward).parameters
    missing = [name for name in ("inputs_embeds", "position_ids", CACHE_NAME) if name not in arguments]
    if missing:
        raise ValueError(f"{type(llm).__name__} cannot be a base of Phase15: it takes no {', '.join(missing)}.")
    with torch.no_grad():
        tokens = torch.arange(8, device=llm.get_input_embeddings().weight.device)[None]
        hidden_states = llm.base_model(inputs_embeds=llm.get_input_embeddings()(tokens)).last_hidden_state
        logits = llm(tokens).logits
        if not torch.isfinite(logits).all():
            raise ValueError(
                f"{type(llm).__name__} cannot be a base of Phase15: its logits are not finite. Its weights are "
                f"damaged, or too large for {llm.dtype}."
            )
        if not torch.equal(llm.get_output_embeddings()(hidden_states), logits):
            raise ValueError(
                f"{type(llm).__name__} cannot be a base of Phase15: its logits are more than its output embeddings "
                "applied to the hidden states of its input embeddings."
            )


_ROLLBACK = "candidate tokens would have to be rolled back, and a step of the recursion cannot be undone"
_ONE_CACHE = "the state of the recursion is a Phase15Cache, whose rows open and close their chunks together"
UNSUPPORTED_GENERATION = {
    "assistant_model": ("assisted decoding", _ROLLBACK),
    "prompt_lookup_num_tokens": ("assisted decoding", _ROLLBACK),
    "assistant_early_exit": ("assisted decoding", _ROLLBACK),
    "use_mtp": ("assisted decoding", _ROLLBACK),
    "penalty_alpha": ("contrastive search", _ROLLBACK),
    "cache_implementation": ("other caches, paged and continuous batching among them", _ONE_CACHE),
    "prefill_chunk_size": ("chunked prefill", "a prompt is read `max_query_length` tokens at a time already"),
}

Phase15ForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = [
    "HyperNetwork",
    "Phase15Cache",
    "Phase15CausalLMOutputWithPast",
    "Phase15ForCausalLM",
    "Phase15PreTrainedModel",
    "SoftPrompt",
    "carry",
]
