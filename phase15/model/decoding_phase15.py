# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
The fast path of `generate`: greedy search and sampling on static buffers. Each of its three steps can be compiled, and
recorded on CUDA as a CUDA graph.

    step      sp = step(sp, chunk)                          once per chunk
    prefill   the LLM on the N slots; picks the chunk's first token
    decode    the LLM on the newest token; picks the next   K - 1 times per chunk

Tokens are picked on the device. The host asks at the end of a chunk whether all rows have ended, in a long one every
16 tokens. Under greedy search the tokens are those of the library's own loop, which is the tests' reference. The rest
of the model can be understood without this file.
"""

import sys
import threading
from collections.abc import Callable
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch import nn
from transformers import Cache, DynamicCache, LogitsProcessorList
from transformers.generation import (
    EosTokenCriteria,
    GenerateDecoderOnlyOutput,
    MaxLengthCriteria,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging

from .batch_phase15 import add_query_lengths
from .compat_phase15 import CACHE_NAME


logger = logging.get_logger(__name__)

PROCESSORS = (
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    MinPLogitsWarper,
)  # each looks at the scores alone
CRITERIA = (MaxLengthCriteria, EosTokenCriteria)
ASKED_EVERY = 16  # tokens after which the host asks whether all rows have ended, and at the end of a chunk
AUTOMATIC_ON = ("cuda",)  # devices where compilation is the default
INDUCTOR = {"coordinate_descent_tuning": True}  # makes matrix-vector products memory-bound
MAX_DECODERS = 4  # per model: one for each batch size and way of sampling in use


class Phase15StaticCache(Cache):
    """
    Keys and values of [soft prompt ; chunk] in buffers that are written in place: slot i in column i, token j of the
    chunk in column N + j. Unused slots keep their columns; the attention mask hides them.

    Args:
        keys, values (`list[torch.Tensor]` of shape `(batch_size, num_key_value_heads, N + K, head_dim)`): by layer.
        columns (`torch.LongTensor` of shape `(num_tokens,)`): where the keys and values of a call go.
        width (`int`): how many columns a call sees.
    """

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], columns: torch.LongTensor, width: int):
        super().__init__(layers=[])
        self.keys, self.values, self.columns, self.width = keys, values, columns, width

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        keys, values = self.keys[layer_idx], self.values[layer_idx]
        keys.index_copy_(2, self.columns, key_states)
        values.index_copy_(2, self.columns, value_states)
        return keys[:, :, : self.width], values[:, :, : self.width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions and mask are always given


# the three steps as functions of the buffers: these are compiled


def call_llm(model, inputs_embeds, position_ids, visible: torch.BoolTensor, cache: Phase15StaticCache) -> torch.Tensor:
    """Last hidden states; `visible`: `(batch_size, 1, num_tokens, width)`, which columns each token sees."""
    dtype = inputs_embeds.dtype
    mask = torch.zeros((), dtype=dtype, device=visible.device).masked_fill(~visible, torch.finfo(dtype).min)
    outputs = model.llm.base_model(
        inputs_embeds=inputs_embeds,
        position_ids=position_ids,
        attention_mask=mask,
        use_cache=True,
        **{CACHE_NAME: cache},
    )
    return outputs.last_hidden_state


def prefill_chunk(model, soft_prompt, slot_cache: Phase15StaticCache) -> torch.Tensor:
    """Fills the slots' columns; returns the logits of the chunk's first token, `(batch_size, vocab_size)`."""
    embeds, length = soft_prompt
    batch_size, num_slots, hidden_size = embeds.shape
    slot = torch.arange(num_slots, device=embeds.device)
    visible = (slot <= slot[:, None]) & soft_prompt.mask[:, None, None, :]
    hidden_states = call_llm(model, embeds, slot.expand(batch_size, -1), visible, slot_cache)
    last_slot = (length - 1)[:, None, None].expand(-1, 1, hidden_size)
    return model.get_output_embeddings()(hidden_states.gather(1, last_slot)[:, 0])


def decode_token(model, soft_prompt, chunk: torch.LongTensor, chunk_cache: Phase15StaticCache) -> torch.Tensor:
    """Feeds the chunk's newest token; returns the logits of the next, `(batch_size, vocab_size)`."""
    embeds, length = soft_prompt
    offset = chunk_cache.columns - embeds.shape[1]  # (1,), of the newest token in the chunk
    is_filled = torch.arange(chunk.shape[1], device=chunk.device) <= offset
    visible = torch.cat([soft_prompt.mask, is_filled.expand(chunk.shape[0], -1)], dim=1)[:, None, None, :]
    tokens = model.get_input_embeddings()(chunk.index_select(1, offset))
    hidden_states = call_llm(model, tokens, length[:, None] + offset, visible, chunk_cache)
    return model.get_output_embeddings()(hidden_states[:, -1])


def step_soft_prompt(model, soft_prompt, chunk: torch.LongTensor):
    """Steps over a full chunk; returns a plain tuple, since torch 2.11 cannot return a `SoftPrompt` from a graph."""
    length = torch.full_like(soft_prompt.length, chunk.shape[1])
    return tuple(model.step(soft_prompt, model.get_input_embeddings()(chunk), length))


class Phase15Decoder:
    """
    The buffers of one batch size and way of picking tokens, and the steps on them.

    On CUDA the steps are recorded once and then replayed. They read the weights at fixed addresses, so a decoder is
    valid until the weights move (see `decoder_of`).

    Args:
        model (`Phase15ForCausalLM`): not kept, so that decoders do not keep it alive.
        batch_size (`int`): rows.
        pick (`Callable`): float32 logits of shape `(batch_size, vocab_size)` to token ids `(batch_size,)`.
        eos_token_id (`torch.LongTensor` of shape `(num_tokens,)`, *optional*): the tokens that end a row.
        pad_token_id (`torch.LongTensor` of shape `()`, *optional*): the token that fills ended rows.
        chunk_length (`int`, *optional*): tokens of a chunk; by default the config's, or that of `within`.
        within (`Phase15Decoder`, *optional*): a decoder of as many rows or more, whose buffers this one shares.
        is_compiled (`bool`): compile the steps, and record them on CUDA.
    """

    def __init__(
        self,
        model,
        batch_size: int,
        pick: Callable,
        eos_token_id=None,
        pad_token_id=None,
        chunk_length: int | None = None,
        within: "Phase15Decoder | None" = None,
        is_compiled: bool = True,
    ):
        self.pick, self.eos_token_id, self.pad_token_id = pick, eos_token_id, pad_token_id
        self.is_compiled = is_compiled
        if within is None:
            self.soft_prompt = model.empty_soft_prompt(batch_size)
            embeds, config = self.soft_prompt.embeds, model.config.text_config
            chunk_length = chunk_length or model.config.chunk_length
            self.chunk = torch.zeros(batch_size, chunk_length, dtype=torch.long, device=embeds.device)
            head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            num_columns = embeds.shape[1] + self.chunk.shape[1]
            shape = (batch_size, config.num_key_value_heads, num_columns, head_dim)
            keys, values = ([embeds.new_zeros(shape) for _ in range(config.num_hidden_layers)] for _ in range(2))
        else:
            self.soft_prompt = within.soft_prompt._make(buffer[:batch_size] for buffer in within.soft_prompt)
            self.chunk = within.chunk[:batch_size]
            keys, values = (
                [buffer[:batch_size] for buffer in buffers]
                for buffers in (within.chunk_cache.keys, within.chunk_cache.values)
            )
        device, self.num_slots = self.chunk.device, self.soft_prompt.embeds.shape[1]
        self.finished = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.slot_cache = Phase15StaticCache(keys, values, torch.arange(self.num_slots, device=device), self.num_slots)
        # the column of the chunk's newest token
        self.column = torch.full((1,), self.num_slots, device=device)
        self.chunk_cache = Phase15StaticCache(keys, values, self.column, self.num_slots + self.chunk.shape[1])
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self.lock = threading.Lock()  # the buffers serve one call at a time

    def start(self, soft_prompt):
        """Begins an answer behind a soft prompt. Steps that are not compiled leave out slots that no row uses."""
        for buffer, value in zip(self.soft_prompt, soft_prompt, strict=True):
            buffer.copy_(value)
        self.finished.zero_()
        if not self.is_compiled:
            used = int(soft_prompt.length.max())
            self.slot_cache.columns, self.slot_cache.width = torch.arange(used, device=self.chunk.device), used

    def step(self, model):
        stepped = self._compiled(step_soft_prompt)(model, self.soft_prompt, self.chunk)
        for buffer, value in zip(self.soft_prompt, stepped, strict=True):
            buffer.copy_(value)

    def prefill(self, model):
        slots = self.soft_prompt._replace(embeds=self.soft_prompt.embeds[:, : self.slot_cache.width])
        logits = self._compiled(prefill_chunk)(model, slots, self.slot_cache)
        self.column.fill_(self.num_slots)
        self._write(logits)

    def decode(self, model):
        logits = self._compiled(decode_token)(model, self.soft_prompt, self.chunk, self.chunk_cache)
        self.column.add_(1)
        self._write(logits)

    def _compiled(self, function: Callable) -> Callable:
        return compiled(function) if self.is_compiled else function

    def _write(self, logits: torch.Tensor):
        tokens = self.pick(logits.float())
        if self.eos_token_id is not None:
            tokens = torch.where(self.finished, self.pad_token_id, tokens)
            self.finished |= (tokens[:, None] == self.eos_token_id).any(dim=1)
        self.chunk.index_copy_(1, self.column - self.num_slots, tokens[:, None])

    def run(self, name: str, model):
        """Runs `step`, `prefill` or `decode`, or replays its graph."""
        if self.graphs:
            self.graphs[name].replay()
        else:
            getattr(self, name)(model)

    def prepare(self, model):
        """On CUDA records the steps as graphs, and then restores the state that `start` set."""
        if self.graphs or not self.is_compiled or self.chunk.device.type != "cuda":
            return
        device = self.chunk.device
        began = [state.clone() for state in (*self.soft_prompt, self.finished)]
        random_state = torch.cuda.get_rng_state(device)
        stream, pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        names = ("step", "prefill", "decode") if self.chunk.shape[1] > 1 else ("step", "prefill")
        graphs = {}
        with torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # allocation and tuning of the first calls must not be recorded
                for _ in range(3):
                    for name in names:
                        getattr(self, name)(model)
            torch.cuda.current_stream().wait_stream(stream)
            for name in names:
                graphs[name] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[name], pool=pool, stream=stream, capture_error_mode="thread_local"):
                    getattr(self, name)(model)
        torch.cuda.set_rng_state(random_state, device)
        for state, value in zip((*self.soft_prompt, self.finished), began, strict=True):
            state.copy_(value)
        self.graphs = graphs


class LibraryDecoder:
    """
    The steps of a [`Phase15Decoder`] as `generate` runs them without static buffers, for models that these cannot
    take: offloaded or quantised weights, adapters, other attention.
    """

    num_slots = 0

    def __init__(self, model, batch_size: int, pick: Callable, chunk_length: int):
        self.pick = pick
        self.chunk = torch.zeros(batch_size, chunk_length, dtype=torch.long, device=model.device)
        self.column = torch.zeros(1, dtype=torch.long, device=model.device)

    def start(self, soft_prompt):
        self.soft_prompt = soft_prompt

    def run(self, name: str, model):
        getattr(self, name)(model)

    def step(self, model):
        length = torch.full_like(self.soft_prompt.length, self.chunk.shape[1])
        self.soft_prompt = model.step(self.soft_prompt, model.get_input_embeddings()(self.chunk), length)

    def prefill(self, model):
        self.llm_cache, self.column = DynamicCache(config=model.config.text_config), torch.zeros_like(self.column)
        self._write(model, self.chunk[:, :0])

    def decode(self, model):
        newest = int(self.column)
        self.column = self.column + 1
        self._write(model, self.chunk[:, newest : newest + 1], newest)

    def _write(self, model, tokens: torch.LongTensor, num_cached: int = 0):
        tokens = model.get_input_embeddings()(tokens)
        hidden_states, _ = model.predict(self.soft_prompt, tokens, self.llm_cache, num_cached)
        logits = model.get_output_embeddings()(hidden_states[:, -1])
        self.chunk[:, int(self.column)] = self.pick(logits.float())


def compiled(function: Callable) -> Callable:
    """`torch.compile`, once per function: all models and decoders share it, as weights and buffers are inputs."""
    if function not in _COMPILED:
        _COMPILED[function] = torch.compile(function, options=INDUCTOR)
    return _COMPILED[function]


_COMPILED: dict[Callable, Callable] = {}
_FAILED: WeakSet[nn.Module] = WeakSet()  # models whose steps could not be compiled
_DECODERS: WeakKeyDictionary[nn.Module, dict[tuple, Phase15Decoder]] = WeakKeyDictionary()


def is_compiled(compile: bool | None, model, *call) -> bool:
    """Whether a call of `generate` takes the fast path; `call` is that of `unsupported_reason`."""
    if compile is None:
        return model.device.type in AUTOMATIC_ON and model not in _FAILED and unsupported_reason(model, *call) is None
    if compile and (reason := unsupported_reason(model, *call)):
        raise ValueError(f"`compile=True` cannot be honoured with {reason}.")
    return compile


def unsupported_reason(
    model,
    processors: LogitsProcessorList,
    criteria: list,
    generation_config,
    synced_gpus: bool,
    num_new: int | None,
    model_kwargs: dict,
) -> str | None:
    """Names one thing that forbids the fast path, or None. `num_new`: tokens that a used cache has not seen."""
    reasons = {
        "`use_cache=False`": model_kwargs.get(CACHE_NAME) is None,
        "a cache that has seen all but one token": num_new == 1,  # the answer goes on: there is no message
        "`query_lengths`": model_kwargs.get("query_lengths") is not None,
        "synchronised GPUs": synced_gpus,
    }
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        reasons[f"`{name}`"] = getattr(generation_config, name)
    for part in (*processors, *criteria):
        reasons[type(part).__name__] = type(part) not in PROCESSORS + CRITERIA
    return next((reason for reason, applies in reasons.items() if applies), None) or unsupported_model(model)


def has_hooks(module: nn.Module) -> bool:
    """Returns whether somebody's hook would be skipped by a recorded graph; the head's own has nothing to do there."""
    pre_hooks = [hook for hook in module._forward_pre_hooks.values() if hook is not add_query_lengths]
    return bool(module._forward_hooks or pre_hooks or hasattr(module, "_hf_hook"))


def unsupported_model(model) -> str | None:
    """Names one thing about a model that forbids static buffers, or None."""
    rope = getattr(model.config.text_config, "rope_parameters", None) or {}
    modules, parameters = list(model.modules()), list(model.parameters())
    reasons = {
        "a model in training mode": model.training,
        "quantised weights": getattr(model, "is_quantized", False),
        "PEFT adapters that are not merged": any(type(m).__module__.startswith("peft.") for m in modules),
        "forward hooks": any(map(has_hooks, modules)),
        "weights on several devices": len({parameter.device for parameter in parameters}) > 1,
        "sharded weights": any(type(p) not in (nn.Parameter, torch.Tensor) for p in parameters),
        "autocast": torch.is_autocast_enabled(parameters[0].device.type),
        f"attention {(attention := model.llm.config._attn_implementation)!r}": attention not in ("sdpa", "eager"),
        f"RoPE of type {(kind := rope.get('rope_type', 'default'))!r}": kind in ("dynamic", "longrope"),
    }
    return next((reason for reason, applies in reasons.items() if applies), None)


def decoder_of(
    model, batch_size: int, chunk_length: int, processors: LogitsProcessorList, criteria: list, generation_config
):
    """The model's decoder for these settings; a new one if there is none, or if the weights have moved."""
    eos_token_id = next((c.eos_token_id for c in criteria if isinstance(c, EosTokenCriteria)), None)
    pad_token_id, do_sample = generation_config.pad_token_id, generation_config.do_sample
    if pad_token_id is None and eos_token_id is not None:  # as in the library
        pad_token_id = int(eos_token_id[0])
    key = (
        batch_size,
        chunk_length,
        do_sample,
        tuple((type(processor), *sorted(vars(processor).items())) for processor in processors),
        None if eos_token_id is None else (*eos_token_id.tolist(), pad_token_id),
        tuple((tensor.data_ptr(), tensor.dtype) for tensor in (*model.parameters(), *model.buffers())),
    )
    decoders = _DECODERS.setdefault(model, {})
    if key in decoders:
        return decoders[key]

    def pick(scores: torch.Tensor) -> torch.LongTensor:
        for processor in processors:
            scores = processor(None, scores)
        if not do_sample:
            return scores.argmax(dim=-1)
        probabilities = scores.softmax(dim=-1)  # an exponential race: torch.multinomial without its host sync
        return (probabilities / torch.empty_like(probabilities).exponential_()).argmax(dim=-1)

    while len(decoders) >= MAX_DECODERS:
        del decoders[next(iter(decoders))]
    if eos_token_id is not None:
        eos_token_id = eos_token_id.to(model.device)
        pad_token_id = torch.tensor(pad_token_id, device=model.device)
    decoders[key] = Phase15Decoder(model, batch_size, pick, eos_token_id, pad_token_id, chunk_length)
    return decoders[key]


def sample_compiled(
    model,
    soft_prompt,
    cache,
    input_ids: torch.LongTensor,
    processors: LogitsProcessorList,
    criteria: list,
    generation_config,
    streamer=None,
    insist: bool = True,
) -> GenerateDecoderOnlyOutput | torch.LongTensor | None:
    """
    Generates an answer behind a soft prompt, with the arguments and the result of the library's sampling loop. If the
    steps cannot be compiled (no compiler, no memory) it raises the error, or warns and returns None without `insist`.

    Args:
        soft_prompt (`SoftPrompt`): of the whole prompt.
        cache (`Phase15Cache`): gets the state that the library's loop would leave in it.
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): the prompt.
    """
    limit = next((c.max_length for c in criteria if isinstance(c, MaxLengthCriteria)), sys.maxsize)
    remaining = max(limit - input_ids.shape[1], 1)
    decoder = decoder_of(model, len(input_ids), cache.chunk_length, processors, criteria, generation_config)
    answer = []
    with decoder.lock:
        decoder.start(soft_prompt)
        try:
            decoder.prepare(model)
        except RuntimeError as error:
            if insist:
                raise
            _FAILED.add(model)
            _DECODERS.pop(model, None)
            logger.warning(f"Decoding goes on without compilation, which failed: {' '.join(str(error).split())[:500]}")
            return None
        while True:
            num_tokens = min(decoder.chunk.shape[1], remaining)
            for offset in range(num_tokens):
                decoder.run("decode" if offset else "prefill", model)
                if streamer is not None:
                    streamer.put(decoder.chunk[:, offset].cpu())
                asks = streamer is not None or (offset + 1) % ASKED_EVERY == 0 and decoder.eos_token_id is not None
                if asks and offset + 1 < num_tokens and decoder.finished.all():
                    num_tokens = offset + 1
                    break
            answer.append(decoder.chunk[:, :num_tokens].clone())
            remaining -= num_tokens
            if remaining == 0 or (decoder.eos_token_id is not None and decoder.finished.all()):
                break
            decoder.run("step", model)
        answer = torch.cat(answer, dim=1)
        if decoder.eos_token_id is not None:  # the rows may all have ended inside the last chunk
            ended = (answer[..., None] == decoder.eos_token_id).any(dim=-1).cumsum(dim=1).bool().all(dim=0)
            answer = answer[:, : answer.shape[1] - max(int(ended.sum()) - 1, 0)]
        fill_cache(cache, decoder, model, num_fed=(answer.shape[1] - 1) % decoder.chunk.shape[1])
    if streamer is not None:
        streamer.end()
    cache.seen_tokens = input_ids.shape[1] + answer.shape[1] - 1  # the last token was not fed
    sequences = torch.cat([input_ids, answer], dim=1)
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE_NAME: cache})


def fill_cache(cache, decoder: Phase15Decoder, model, num_fed: int):
    """Copies the decoder's state into a `Phase15Cache`, whose key-value cache has no column for unused slots."""
    cache.start_chunk(decoder.soft_prompt._replace(embeds=decoder.soft_prompt.embeds.clone()))
    cache.soft_prompt = cache.soft_prompt._replace(length=decoder.soft_prompt.length.clone())
    cache.chunk = model.get_input_embeddings()(decoder.chunk[:, :num_fed])
    used, num_slots = int(decoder.soft_prompt.length.max()), decoder.num_slots
    for layer, states in enumerate(zip(decoder.slot_cache.keys, decoder.slot_cache.values, strict=True)):
        cache.llm_cache.update(
            *(torch.cat([s[:, :, :used], s[:, :, num_slots : num_slots + num_fed]], dim=2) for s in states), layer
        )


__all__ = [
    "ASKED_EVERY",
    "AUTOMATIC_ON",
    "MAX_DECODERS",
    "PROCESSORS",
    "LibraryDecoder",
    "Phase15Decoder",
    "Phase15StaticCache",
    "is_compiled",
    "sample_compiled",
    "unsupported_model",
]
