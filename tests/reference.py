# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Tiny random models, and the design's equations written naively: one row, one vector, one chunk at a time."""

import contextlib
import io
import json
import sys
import threading

import torch
import torch.nn.functional as F
from transformers import LlamaConfig, MistralConfig, Qwen2Config

from phase15.hub.runs import LOAD_AND_ANSWER
from phase15.model.modeling_phase15 import Phase15ForCausalLM
from phase15.model.recursion_phase15 import SoftPrompt


VOCAB, SLOTS, SINKS, CHUNK, QUERY = 60, 24, 2, 4, 7
SIZES = {
    "num_soft_tokens": SLOTS,
    "num_sink_tokens": SINKS,
    "chunk_length": CHUNK,
    "max_query_length": QUERY,
    "hypernet_hidden_size": 32,
    "hypernet_num_hidden_layers": 2,
    "hypernet_num_attention_heads": 4,
    "hypernet_intermediate_size": 48,
    "hypernet_slot_gate": True,
    "hypernet_reads_layers": 1,
}
LLM_SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "initializer_range": 0.2,  # large enough for outputs that depend on the whole context
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": None,
}
BASES = {
    "llama": LlamaConfig(**LLM_SIZES),
    "llama-tied": LlamaConfig(**LLM_SIZES, tie_word_embeddings=True),
    "mistral": MistralConfig(**LLM_SIZES, sliding_window=SLOTS + CHUNK),  # the smallest that is allowed
    "qwen2": Qwen2Config(**LLM_SIZES),
}


def randomise_alpha(model: Phase15ForCausalLM) -> Phase15ForCausalLM:
    """Makes Δ large: α starts at zero, and so does Δ."""
    with torch.no_grad():
        model.hypernet.alpha.normal_(generator=torch.Generator().manual_seed(0))
    return model


def aligned(model: torch.nn.Module) -> torch.nn.Module:
    """
    Lays the weights anew in memory. Loaded ones are where their file has them, and the last bits of a matrix product
    depend on that alignment: what is compared bit for bit must be laid alike.
    """
    for weight in model.parameters():
        if type(weight.data) is torch.Tensor and weight.is_floating_point():  # not the quantised
            weight.data = weight.data.clone()
    return model


ANSWERING = threading.Lock()  # the code reads sys.argv and prints


def answer_here(folder, query: list[int], max_new_tokens: int, no_delta: bool = False) -> list[int]:
    """`answer_in_new_process` in this process, because a new one takes seconds to import."""
    with ANSWERING:
        return _answer_here(folder, query, max_new_tokens, no_delta)


def _answer_here(folder, query: list[int], max_new_tokens: int, no_delta: bool) -> list[int]:
    before, sys.argv = sys.argv, ["-c", str(folder), json.dumps(query), str(max_new_tokens), str(int(no_delta))]
    try:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(LOAD_AND_ANSWER, {})
    finally:
        sys.argv = before
    return json.loads(said.getvalue())


PROMPTS = ["Hello", "Why is the sky blue?", "a", "What is the function os.path.join for?"]
ENDING = "Tell me a story."


def answer_ids(model, tokenizer, prompt: str | list[int], length: int = 150, **kwargs) -> list[int]:
    """What `generate` answers, greedily, to a chat's user or, given ids, to a text."""
    if isinstance(prompt, str):
        chat = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    ids = torch.tensor([prompt])
    kwargs = {"attention_mask": torch.ones_like(ids), "do_sample": False, "max_new_tokens": length} | kwargs
    return model.generate(ids, **kwargs)[0, len(prompt) :].tolist()


def random_ids(*shape: int, seed: int = 0) -> torch.LongTensor:
    return torch.randint(3, VOCAB, shape, generator=torch.Generator().manual_seed(seed))


def pad(rows: list[torch.Tensor], side: str = "left", value: int = 5) -> tuple[torch.LongTensor, torch.LongTensor]:
    """Rows of different lengths as `input_ids` and `attention_mask`; the padding is an ordinary token's id."""
    width = max(len(row) for row in rows)
    before = {"left": lambda gap: gap, "right": lambda gap: 0, "both": lambda gap: gap // 2}[side]
    gaps = [(before(width - len(row)), width - len(row) - before(width - len(row))) for row in rows]
    ids = [F.pad(row, gap, value=value) for row, gap in zip(rows, gaps, strict=True)]
    mask = [F.pad(torch.ones_like(row), gap) for row, gap in zip(rows, gaps, strict=True)]
    return torch.stack(ids), torch.stack(mask)


# the reference: a list of vectors for the slots, and nothing of the model but its weights and its LLM


def reference_carry(slots: list, tokens: list, num_slots: int = SLOTS, num_sinks: int = SINKS) -> list:
    stream = [*slots, *tokens]
    return stream[:num_sinks] + stream[num_sinks:][-(num_slots - num_sinks) :]


def as_soft_prompt(slots: list[torch.Tensor], hidden_size: int, num_slots: int = SLOTS) -> SoftPrompt:
    unused = [torch.zeros(hidden_size)] * (num_slots - len(slots))
    return SoftPrompt(torch.stack([*slots, *unused])[None], torch.tensor([len(slots)]))


def reference_attention(attention, states: torch.Tensor, memory: torch.Tensor) -> torch.Tensor:
    query, key, value = attention.q_proj(states), attention.k_proj(memory), attention.v_proj(memory)
    heads, size = [], query.shape[1] // attention.num_heads
    for head in range(attention.num_heads):
        columns = slice(head * size, (head + 1) * size)
        scores = query[:, columns] @ key[:, columns].T / size**0.5
        heads.append(scores.softmax(dim=1) @ value[:, columns])
    return attention.o_proj(torch.cat(heads, dim=1))


def reference_delta(net, carried: torch.Tensor, old: torch.Tensor, tokens: torch.Tensor, read=None) -> torch.Tensor:
    """
    Δ = tanh|α| · σ(G y) · (O y + P(y, memory) − carry), of vectors of which none is padding; `read`: hidden states of
    the tokens.
    """
    position, scale = net.position_embeddings.weight, net.embedding_scale
    seen = torch.cat([old, tokens]) / scale
    new = net.token_proj(tokens / scale) + position[: len(tokens)]
    if read is not None:
        new = new + net.hidden_norm(read) @ net.hidden_proj.weight.T
    memory = net.memory_norm(torch.cat([net.slot_proj(old / scale) + position[: len(old)], new]))
    slots = net.slot_proj(carried / scale) + position[: len(carried)]
    for layer in net.layers:
        normed = layer.self_norm(slots)
        slots = slots + reference_attention(layer.self_attn, normed, normed)
        slots = slots + reference_attention(layer.cross_attn, layer.cross_norm(slots), memory)
        slots = slots + layer.down_proj(F.gelu(layer.up_proj(layer.mlp_norm(slots))))
    y = net.norm(slots)
    query, key = net.pointer_q_proj(y), net.pointer_k_proj(memory)
    pointed = (query @ key.T / key.shape[1] ** 0.5).softmax(dim=1) @ seen
    written = scale * (net.output_proj(y) + pointed)
    gate = net.gate_proj(y) if net.slot_gate_proj is None else net.gate_proj(y) + y @ net.slot_gate_proj.weight.T
    sign = torch.where((net.alpha < 0) & (not net.signed_alpha), -1, 1)  # abs() has no gradient at zero
    return (sign * net.alpha).tanh() * gate.sigmoid() * (written - carried)


def reference_first_layers(model, tokens: torch.Tensor) -> torch.Tensor | None:
    """What goes into the layer behind the first, or into the last norm, when the LLM reads the tokens alone."""
    if not model.config.hypernet_reads_layers:
        return None
    body, seen = model.llm.base_model, []
    behind = [*body.layers, body.norm][model.config.hypernet_reads_layers]
    hook = behind.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0][0]))
    body(inputs_embeds=tokens[None])
    hook.remove()
    return seen[0]


def reference_step(model, slots: list[torch.Tensor], ids: torch.LongTensor) -> list[torch.Tensor]:
    """step(sp, tokens) = carry(sp, E[tokens]) + Δ(sp, E[tokens])"""
    tokens = model.llm.get_input_embeddings()(ids)
    sizes = model.config.num_soft_tokens, model.config.num_sink_tokens
    carried = torch.stack(reference_carry(slots, list(tokens), *sizes))
    old = torch.stack(slots) if slots else tokens[:0]
    return list(carried + reference_delta(model.hypernet, carried, old, tokens, reference_first_layers(model, tokens)))


def reference_read(model, slots: list[torch.Tensor], query: torch.LongTensor) -> list[torch.Tensor]:
    for segment in query.split(model.config.max_query_length):
        slots = reference_step(model, slots, segment)
    return slots


def reference_predict(model, slots: list[torch.Tensor], ids: torch.LongTensor) -> torch.Tensor:
    """LLM([sp ; chunk]): scores of the token after sp and after each of `ids`, `(1 + len(ids), vocab_size)`."""
    embeds = torch.cat([torch.stack(slots), model.llm.get_input_embeddings()(ids)])
    return model.llm(inputs_embeds=embeds[None]).logits[0, len(slots) - 1 :]


def reference_logits(model, ids: torch.LongTensor, query_length: int = 1, bptt_chunks: int | None = None):
    """One row's logits `(len(ids), vocab_size)`, chunk after chunk; zeros inside the query. Also the last slots."""
    chunk_length, vocab_size = model.config.chunk_length, model.config.text_config.vocab_size
    slots = reference_read(model, [], ids[:query_length])
    logits, rest, num_chunks = [slots[0].new_zeros(query_length - 1, vocab_size)], ids[query_length:], 0
    while len(rest) >= chunk_length:
        chunk, rest, num_chunks = rest[:chunk_length], rest[chunk_length:], num_chunks + 1
        logits.append(reference_predict(model, slots, chunk[:-1]))
        if bptt_chunks and num_chunks % bptt_chunks == 0:
            slots = [slot.detach() for slot in slots]
        slots = reference_step(model, slots, chunk)
    return torch.cat([*logits, reference_predict(model, slots, rest)]), slots


def window_logits(base, ids: torch.LongTensor, query_length: int = 1) -> torch.Tensor:
    """The same for a base model under plain transformers, run on the token ids of explicit sinks + window + chunk."""
    logits = [torch.zeros(query_length - 1, VOCAB)]
    for start in range(int(query_length), len(ids) + 1, CHUNK):
        context = torch.tensor(reference_carry([], ids[:start].tolist()))
        scores = base(torch.cat([context, ids[start : start + CHUNK]])[None]).logits[0, len(context) - 1 :]
        logits.append(scores[:CHUNK])
    return torch.cat(logits)
