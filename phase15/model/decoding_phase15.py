# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Decoding of one chunk at a time, for `generate` and for continuous batching.

A decoder has three steps. `Phase15Decoder` runs them on static buffers, where each can be compiled, and recorded on
CUDA as a CUDA graph. `LibraryDecoder` runs them for models that static buffers cannot take.

    step      sp = step(sp, chunk)                          once per chunk
    prefill   the LLM on the N slots; picks the chunk's first token
    decode    the LLM on the newest token; picks the next   K - 1 times per chunk

Tokens are picked on the device, by one sampler. The host draws the uniform numbers of a chunk before the chunk, and
checks at its end whether all rows have ended, in a long chunk every 16 tokens. Greedy tokens are those of the
transformers loop, which is the tests' reference. The rest of the model can be understood without this file.
"""

import sys
import threading
from collections.abc import Callable
from typing import NamedTuple

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

# the fields of `Sampling`, as the library's classes, in the order in which the library applies them
SAMPLING_WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
SUPPORTED_CRITERIA = (MaxLengthCriteria, EosTokenCriteria)
SYNC_INTERVAL = 16  # tokens between two checks of the host whether all rows have ended; it also checks after a chunk
AUTOMATIC_ON = ("cuda",)  # devices where compilation is the default
INDUCTOR = {"coordinate_descent_tuning": True}  # makes matrix-vector products memory-bound
MAX_DECODERS = 4  # per model: one for each batch size, chunk length and kind of sampling in use


# sampling


class Sampling(NamedTuple):
    """Sampling settings of one row. Temperature 0 is greedy search."""

    temperature: float = 0.0
    top_k: int = 0  # 0: any number of tokens
    top_p: float = 1.0
    min_p: float = 0.0


def split_processors(processors: LogitsProcessorList, do_sample: bool) -> tuple[Sampling, LogitsProcessorList]:
    """
    Splits the library's processors into sampling settings and the processors that run before sampling.

    Only warpers at the end of the list, in the order of `SAMPLING_WARPERS`, become settings. In any other order they
    give another distribution, so they stay processors.
    """
    start = len(processors)
    possible = SAMPLING_WARPERS
    while start > 0:
        warper = processors[start - 1]
        if type(warper) not in possible or getattr(warper, "min_tokens_to_keep", 1) != 1:
            break
        possible = possible[: possible.index(type(warper))]
        start -= 1
    sampling = Sampling()
    if do_sample:
        sampling = Sampling(temperature=1.0)
        for warper in processors[start:]:
            name = Sampling._fields[SAMPLING_WARPERS.index(type(warper))]
            sampling = sampling._replace(**{name: getattr(warper, name)})
    return sampling, LogitsProcessorList(processors[:start])


def sampling_width(samplings: list[Sampling], vocab_size: int) -> int | None:
    """
    Returns how many of the most likely tokens [`sample_tokens`] must sort for these rows: 0 if no row uses top-k or
    top-p, and `None` if all rows are greedy. Rounded up to a power of two, so that few values occur.
    """
    sampled = [sampling for sampling in samplings if sampling.temperature]
    if not sampled:
        return None
    if not any(sampling.top_k or sampling.top_p < 1 for sampling in sampled):
        return 0
    largest = max(sampling.top_k or vocab_size for sampling in sampled)
    return min(1 << (int(largest) - 1).bit_length(), vocab_size)


def sample_tokens(scores: torch.Tensor, settings: torch.Tensor, uniform: torch.Tensor, width: int) -> torch.LongTensor:
    """
    Draws a token in each row from the distribution that the library's warpers leave: temperature, top-k, top-p, min-p,
    in this order. A row's token depends only on its own scores, settings and number.

    Args:
        scores (`torch.Tensor` of shape `(batch_size, vocab_size)`): in float32.
        settings (`torch.Tensor` of shape `(batch_size, 4)`): a [`Sampling`] in each row.
        uniform (`torch.Tensor` of shape `(batch_size, 1)`): from 0 to 1, the point of the cumulated probabilities
            whose token is drawn.
        width (`int`): number of the most likely tokens to sort, at least every row's top-k; 0 if no row uses top-k or
            top-p, which need sorting.

    Returns:
        `torch.LongTensor` of shape `(batch_size,)`: the tokens.
    """
    temperature, top_k, top_p, min_p = settings[..., None].unbind(dim=1)  # (B, 1) each
    greedy = scores.argmax(dim=-1)
    scores = scores / temperature.where(temperature > 0, 1)
    if width:
        if width < scores.shape[1]:
            best, order = scores.topk(width)
        else:
            best, order = scores.sort(dim=-1, descending=True)
        rank = torch.arange(width, device=scores.device)
        is_beyond_top_k = (rank >= top_k) & (top_k > 0)
        sorted_probabilities = best.masked_fill(is_beyond_top_k, -torch.inf).softmax(dim=-1)
        mass_above = sorted_probabilities.cumsum(dim=-1) - sorted_probabilities  # of more likely tokens
        sorted_probabilities = sorted_probabilities.where((mass_above < top_p) | (rank == 0), 0)
        probabilities = torch.zeros_like(scores).scatter(1, order, sorted_probabilities)
    else:
        probabilities = scores.softmax(dim=-1)
    probabilities = probabilities.where(probabilities >= min_p * probabilities.amax(dim=-1, keepdim=True), 0)
    # cumulated in the vocabulary's order, so that a number draws the same token at any width
    mass = probabilities.cumsum(dim=-1)
    total = mass[:, -1:]
    # below the total, or rounding could draw a token after the last possible one
    target = (uniform * total).clamp(max=torch.nextafter(total, torch.zeros_like(total)))
    drawn = (mass <= target).sum(dim=-1)
    return drawn.where(temperature[:, 0] > 0, greedy)


def draw_seed() -> int:
    """Draws the seed of one answer from torch's default generator, which `torch.manual_seed` sets."""
    return int(torch.randint(2**63 - 1, ()))


class Sampler:
    """
    Picks the next token of each row, by the row's own settings and random numbers.

    An answer has a seed, and a generator on the CPU made of it. Before each chunk the host draws `chunk_length`
    uniform numbers from the generator of each row and copies them into a static buffer. So picking a token needs no
    host sync and can be replayed by a CUDA graph, and the other rows do not change a row's tokens.

    Args:
        num_rows (`int`): maximum number of rows.
        chunk_length (`int`): tokens of a chunk.
        device (`torch.device`): of the logits.
    """

    def __init__(self, num_rows: int, chunk_length: int, device: torch.device):
        self.settings = torch.zeros(num_rows, len(Sampling._fields), device=device)
        self.uniform = torch.zeros(num_rows, chunk_length, device=device)

    def draw(self, samplings: list[Sampling], generators: list[torch.Generator]):
        """Sets the settings and the numbers of the next chunk for the first rows."""
        chunk_length = self.uniform.shape[1]
        numbers = [torch.rand(chunk_length, generator=generator, dtype=torch.float32) for generator in generators]
        self.uniform[: len(numbers)].copy_(torch.stack(numbers))
        self.settings[: len(numbers)].copy_(torch.tensor(samplings, dtype=torch.float32))

    def pick(self, scores: torch.Tensor, offset: torch.LongTensor, width: int | None) -> torch.LongTensor:
        """
        Returns the token of each row, of shape `(batch_size,)`.

        Args:
            scores (`torch.Tensor` of shape `(batch_size, vocab_size)`): in float32.
            offset (`torch.LongTensor` of shape `(1,)`): index of the token in the chunk.
            width (`int`, *optional*): see [`sampling_width`].
        """
        if width is None:
            return scores.argmax(dim=-1)
        num_rows = len(scores)
        uniform = self.uniform[:num_rows].index_select(1, offset)
        return sample_tokens(scores, self.settings[:num_rows], uniform, width)


# static buffers


class Phase15StaticCache(Cache):
    """
    Keys and values of [soft prompt ; chunk] in buffers that are written in place: slot i in column i, token j of the
    chunk in column N + j. Unused slots keep their columns; the attention mask hides them.

    Args:
        keys, values (`list[torch.Tensor]` of shape `(batch_size, num_key_value_heads, N + K, head_dim)`): by layer.
        columns (`torch.LongTensor` of shape `(num_tokens,)`): columns that a call writes.
        width (`int`): number of columns that a call sees.
    """

    def __init__(self, keys: list[torch.Tensor], values: list[torch.Tensor], columns: torch.LongTensor, width: int):
        super().__init__(layers=[])
        self.keys = keys
        self.values = values
        self.columns = columns
        self.width = width

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args, **kwargs):
        keys = self.keys[layer_idx]
        values = self.values[layer_idx]
        keys.index_copy_(2, self.columns, key_states)
        values.index_copy_(2, self.columns, value_states)
        return keys[:, :, : self.width], values[:, :, : self.width]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0  # positions and mask are always given


# the three steps as functions of the buffers, which are compiled


def call_llm(model, inputs_embeds, position_ids, visible: torch.BoolTensor, cache: Phase15StaticCache) -> torch.Tensor:
    """
    Returns the last hidden states. `visible`, of shape `(batch_size, 1, num_tokens, width)`, marks the columns that
    each token sees.
    """
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
    # the last used slot predicts the first token; rows differ in how many slots they use
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


class DecoderBuffers(NamedTuple):
    """
    Static buffers of a decoder.

    soft_prompt (`SoftPrompt` of `batch_size` rows).
    chunk (`torch.LongTensor` of shape `(batch_size, chunk_length)`): token ids.
    keys, values (`list[torch.Tensor]`): see [`Phase15StaticCache`].
    """

    soft_prompt: NamedTuple
    chunk: torch.LongTensor
    keys: list[torch.Tensor]
    values: list[torch.Tensor]

    @classmethod
    def allocate(cls, model, batch_size: int, chunk_length: int) -> "DecoderBuffers":
        soft_prompt = model.empty_soft_prompt(batch_size)
        embeds = soft_prompt.embeds
        config = model.config.text_config
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        num_columns = embeds.shape[1] + chunk_length
        shape = (batch_size, config.num_key_value_heads, num_columns, head_dim)
        chunk = torch.zeros(batch_size, chunk_length, dtype=torch.long, device=embeds.device)
        keys = [embeds.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        values = [embeds.new_zeros(shape) for _ in range(config.num_hidden_layers)]
        return cls(soft_prompt, chunk, keys, values)

    def first_rows(self, num_rows: int) -> "DecoderBuffers":
        """Returns the first rows, in the same memory."""
        return DecoderBuffers(
            self.soft_prompt._make(state[:num_rows] for state in self.soft_prompt),
            self.chunk[:num_rows],
            [keys[:num_rows] for keys in self.keys],
            [values[:num_rows] for values in self.values],
        )


class Decoder:
    """
    Base class of decoders: the soft prompts of some rows, and a chunk of tokens that grows in all of them at once.

    `start` sets the soft prompts. Then `run` does one of three steps: "prefill" picks the chunk's first token,
    "decode" the next one, and "step" steps the soft prompts over the full chunk.

    Attributes:
        soft_prompt (`SoftPrompt`): of each row.
        chunk (`torch.LongTensor` of shape `(batch_size, chunk_length)`): token ids, valid up to the newest.
        num_slots (`int`): offset of `column`.
        column (`torch.LongTensor` of shape `(1,)`): `num_slots` + index of the chunk's newest token.

    Args:
        sampler (`Sampler`): picks the tokens; has at least as many rows.
        width (`int`, *optional*): see [`sampling_width`]; `None` for greedy search in all rows.
        process (`Callable`, *optional*): changes float32 logits of shape `(batch_size, vocab_size)` before sampling.
    """

    soft_prompt: NamedTuple
    chunk: torch.LongTensor
    num_slots: int
    column: torch.LongTensor

    def __init__(self, sampler: Sampler, width: int | None, process: Callable | None = None):
        self.sampler = sampler
        self.width = width
        self.process = process

    def pick(self, logits: torch.Tensor) -> torch.LongTensor:
        """Picks the token of each row for the chunk's newest column, given logits of any floating type."""
        scores = logits.float()
        if self.process is not None:
            scores = self.process(scores)
        return self.sampler.pick(scores, self.column - self.num_slots, self.width)

    def start(self, soft_prompt: NamedTuple):
        """Sets the soft prompts, for an empty chunk."""
        raise NotImplementedError

    def prepare(self, model):
        """Prepares the steps for replay. A decoder that records nothing has nothing to do."""

    def run(self, name: str, model):
        """Runs "step", "prefill" or "decode"."""
        getattr(self, name)(model)

    def step(self, model):
        """Steps the soft prompts over the full chunk."""
        raise NotImplementedError

    def prefill(self, model):
        """Feeds the soft prompts, and picks the first token of the chunk."""
        raise NotImplementedError

    def decode(self, model):
        """Feeds the newest token of the chunk, and picks the next."""
        raise NotImplementedError


class Phase15Decoder(Decoder):
    """
    A decoder on static buffers, for one batch size.

    On CUDA the steps are recorded once and then replayed. They read the weights at fixed addresses, so a decoder is
    valid until the weights move (see [`Phase15Decoders`]). It does not keep the model alive.

    Args:
        buffers (`DecoderBuffers`): of all rows; decoders that run one after the other may share them.
        sampler, width, process: see [`Decoder`].
        eos_token_id (`torch.LongTensor` of shape `(num_tokens,)`, *optional*): tokens that end a row.
        pad_token_id (`torch.LongTensor` of shape `()`, *optional*): the token that fills ended rows.
        is_compiled (`bool`): compile the steps, and record them on CUDA.
    """

    def __init__(
        self,
        buffers: DecoderBuffers,
        sampler: Sampler,
        width: int | None,
        process: Callable | None = None,
        eos_token_id: torch.LongTensor | None = None,
        pad_token_id: torch.LongTensor | None = None,
        is_compiled: bool = True,
    ):
        super().__init__(sampler, width, process)
        self.soft_prompt, self.chunk, keys, values = buffers
        self.eos_token_id = eos_token_id
        self.pad_token_id = pad_token_id
        self.is_compiled = is_compiled
        self.num_slots = self.soft_prompt.embeds.shape[1]
        batch_size, chunk_length = self.chunk.shape
        device = self.chunk.device
        self.finished = torch.zeros(batch_size, dtype=torch.bool, device=device)
        self.column = torch.full((1,), self.num_slots, device=device)
        self.slot_cache = Phase15StaticCache(keys, values, torch.arange(self.num_slots, device=device), self.num_slots)
        self.chunk_cache = Phase15StaticCache(keys, values, self.column, self.num_slots + chunk_length)
        self.graphs: dict[str, torch.cuda.CUDAGraph] = {}
        self.lock = threading.Lock()  # the buffers serve one call at a time

    def start(self, soft_prompt: NamedTuple):
        """Sets the soft prompts. Steps that are not compiled then leave out slots that no row uses."""
        for buffer, value in zip(self.soft_prompt, soft_prompt, strict=True):
            buffer.copy_(value)
        self.finished.zero_()
        if not self.is_compiled:
            num_used = int(soft_prompt.length.max())
            self.slot_cache.columns = torch.arange(num_used, device=self.chunk.device)
            self.slot_cache.width = num_used

    def step(self, model):
        stepped = self._function(step_soft_prompt, model)(model, self.soft_prompt, self.chunk)
        for buffer, value in zip(self.soft_prompt, stepped, strict=True):
            buffer.copy_(value)

    def prefill(self, model):
        slots = self.soft_prompt._replace(embeds=self.soft_prompt.embeds[:, : self.slot_cache.width])
        logits = self._function(prefill_chunk, model)(model, slots, self.slot_cache)
        self.column.fill_(self.num_slots)
        self._write(logits)

    def decode(self, model):
        logits = self._function(decode_token, model)(model, self.soft_prompt, self.chunk, self.chunk_cache)
        self.column.add_(1)
        self._write(logits)

    def _function(self, function: Callable, model) -> Callable:
        return model.decoders.compiled(function) if self.is_compiled else function

    def _write(self, logits: torch.Tensor):
        tokens = self.pick(logits)
        if self.eos_token_id is not None:
            tokens = torch.where(self.finished, self.pad_token_id, tokens)
            self.finished |= (tokens[:, None] == self.eos_token_id).any(dim=1)
        self.chunk.index_copy_(1, self.column - self.num_slots, tokens[:, None])

    def run(self, name: str, model):
        """Runs a step, or replays its graph."""
        if self.graphs:
            self.graphs[name].replay()
        else:
            super().run(name, model)

    def prepare(self, model):
        """On CUDA records the steps as graphs, and then restores the state that `start` set."""
        if self.graphs or not self.is_compiled or self.chunk.device.type != "cuda":
            return
        device = self.chunk.device
        state = (*self.soft_prompt, self.finished)
        before = [tensor.clone() for tensor in state]
        stream = torch.cuda.Stream(device)
        pool = torch.cuda.graph_pool_handle()
        names = ["step", "prefill"]
        if self.chunk.shape[1] > 1:
            names.append("decode")
        graphs = {}
        with torch.cuda.device(device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):  # allocation and tuning of the first calls must not be recorded
                for _ in range(3):
                    for name in names:
                        super().run(name, model)
            torch.cuda.current_stream().wait_stream(stream)
            for name in names:
                graphs[name] = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graphs[name], pool=pool, stream=stream, capture_error_mode="thread_local"):
                    super().run(name, model)
        for tensor, value in zip(state, before, strict=True):
            tensor.copy_(value)
        self.graphs = graphs


class LibraryDecoder(Decoder):
    """
    A decoder without static buffers, for models that these cannot take: offloaded or quantised weights, adapters,
    other attention.

    Args:
        model (`Phase15ForCausalLM`): not kept.
        batch_size (`int`), chunk_length (`int`): shape of a chunk.
        sampler, width, process: see [`Decoder`].
    """

    num_slots = 0

    def __init__(
        self,
        model,
        batch_size: int,
        chunk_length: int,
        sampler: Sampler,
        width: int | None,
        process: Callable | None = None,
    ):
        super().__init__(sampler, width, process)
        self.chunk = torch.zeros(batch_size, chunk_length, dtype=torch.long, device=model.device)
        self.column = torch.zeros(1, dtype=torch.long, device=model.device)

    def start(self, soft_prompt: NamedTuple):
        self.soft_prompt = soft_prompt

    def step(self, model):
        length = torch.full_like(self.soft_prompt.length, self.chunk.shape[1])
        self.soft_prompt = model.step(self.soft_prompt, model.get_input_embeddings()(self.chunk), length)

    def prefill(self, model):
        self.llm_cache = DynamicCache(config=model.config.text_config)
        self.column = torch.zeros_like(self.column)
        self._write(model, self.chunk[:, :0])

    def decode(self, model):
        newest = int(self.column)
        self.column = self.column + 1
        self._write(model, self.chunk[:, newest : newest + 1], newest)

    def _write(self, model, tokens: torch.LongTensor, num_cached: int = 0):
        tokens = model.get_input_embeddings()(tokens)
        hidden_states, _ = model.predict(self.soft_prompt, tokens, self.llm_cache, num_cached)
        logits = model.get_output_embeddings()(hidden_states[:, -1])
        self.chunk[:, int(self.column)] = self.pick(logits)


# what a model owns


def compiled(function: Callable) -> Callable:
    """Returns a step compiled by inductor. Weights and buffers are inputs, so that all decoders can share it."""
    return torch.compile(function, options=INDUCTOR)


class Phase15Decoders:
    """
    The decoders of one model and its compiled steps: buffers and graphs, never the state of an answer.

    The model owns this object as `model.decoders`: it is freed with the model. A copy or a pickle of the model starts
    with an empty one.

    Attributes:
        static (`dict[tuple, Phase15Decoder]`): the decoders of `generate`, by settings; at most `MAX_DECODERS`.
        has_failed (`bool`): the steps could not be compiled, so compilation is not tried again by default.
    """

    def __init__(self):
        self.static: dict[tuple, Phase15Decoder] = {}
        self.has_failed = False
        self._compiled_steps: dict[Callable, Callable] = {}

    def __reduce__(self):
        return type(self), ()  # graphs and compiled code can neither be copied nor pickled

    def compiled(self, function: Callable) -> Callable:
        """Returns a compiled step. Each is compiled once."""
        if function not in self._compiled_steps:
            self._compiled_steps[function] = compiled(function)
        return self._compiled_steps[function]

    def find(
        self, model, batch_size: int, chunk_length: int, width: int | None, eos_token_ids: tuple, pad_token_id: int
    ) -> Phase15Decoder:
        """
        Returns the decoder for these settings: a new one if there is none yet, or if the weights have moved.

        Args:
            width (`int`, *optional*): see [`sampling_width`].
            eos_token_ids (`tuple[int, ...]`): tokens that end a row, if any.
        """
        addresses = tuple((tensor.data_ptr(), tensor.dtype) for tensor in (*model.parameters(), *model.buffers()))
        key = (batch_size, chunk_length, width, eos_token_ids, pad_token_id, addresses)
        if key in self.static:
            return self.static[key]
        while len(self.static) >= MAX_DECODERS:
            oldest = next(iter(self.static))
            del self.static[oldest]
        device = model.device
        buffers = DecoderBuffers.allocate(model, batch_size, chunk_length)
        sampler = Sampler(batch_size, chunk_length, device)
        if eos_token_ids:
            eos_token_id = torch.tensor(eos_token_ids, device=device)
            pad_token_id = torch.tensor(pad_token_id, device=device)
            decoder = Phase15Decoder(buffers, sampler, width, eos_token_id=eos_token_id, pad_token_id=pad_token_id)
        else:
            decoder = Phase15Decoder(buffers, sampler, width)
        self.static[key] = decoder
        return decoder

    def prepare(self, decoder: Decoder, model, insists: bool) -> bool:
        """
        Prepares a decoder. Returns `False`, after a warning, if its steps cannot be compiled (no compiler, no memory);
        with `insists` the error is raised instead.
        """
        try:
            decoder.prepare(model)
        except RuntimeError as error:
            if insists:
                raise
            self.has_failed = True
            self.static.clear()
            reason = " ".join(str(error).split())[:500]
            logger.warning(f"Decoding continues without compilation, which failed: {reason}")
            return False
        return True


# when static buffers are used


def compiles_by_default(model) -> bool:
    """Returns `True` if the steps are compiled where the caller does not choose: on CUDA, unless it failed before."""
    return model.device.type in AUTOMATIC_ON and not model.decoders.has_failed


def check_compile(compile: bool | None, reason: str | None):
    """Raises a ValueError if the caller insists on compiled steps and there is a reason against them."""
    if compile and reason is not None:
        raise ValueError(f"`compile=True` cannot be honoured with {reason}.")


def unsupported_reason(
    model,
    processors: LogitsProcessorList,
    criteria: list,
    generation_config,
    synced_gpus: bool,
    num_new: int | None,
    model_kwargs: dict,
) -> str | None:
    """
    Returns one thing about a call of `generate` or its model that forbids static buffers, or `None`. `num_new` is the
    number of tokens that a used cache has not seen.
    """
    if model_kwargs.get(CACHE_NAME) is None:
        return "`use_cache=False`"
    if num_new == 1:  # the answer is continued: there is no message to read
        return "a cache that has seen all but one token"
    if model_kwargs.get("query_lengths") is not None:
        return "`query_lengths`"
    if synced_gpus:
        return "synchronised GPUs"
    for name in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if getattr(generation_config, name):
            return f"`{name}`"
    _, other_processors = split_processors(processors, generation_config.do_sample)
    for part in (*other_processors, *other_criteria(criteria)):
        return type(part).__name__
    return unsupported_model(model)


def has_hooks(module: nn.Module) -> bool:
    """Returns whether somebody's hook would be skipped by a recorded graph; the head's own has nothing to do there."""
    pre_hooks = [hook for hook in module._forward_pre_hooks.values() if hook is not add_query_lengths]
    return bool(module._forward_hooks or pre_hooks or hasattr(module, "_hf_hook"))


def unsupported_model(model) -> str | None:
    """Returns one thing about a model that forbids static buffers, or `None`."""
    if model.training:
        return "a model in training mode"
    if getattr(model, "is_quantized", False):
        return "quantised weights"
    modules = list(model.modules())
    if any(type(module).__module__.startswith("peft.") for module in modules):
        return "PEFT adapters that are not merged"
    if any(map(has_hooks, modules)):
        return "forward hooks"
    parameters = list(model.parameters())
    if len({parameter.device for parameter in parameters}) > 1:
        return "weights on several devices"
    if any(type(parameter) not in (nn.Parameter, torch.Tensor) for parameter in parameters):
        return "sharded weights"
    if torch.is_autocast_enabled(parameters[0].device.type):
        return "autocast"
    attention = model.llm.config._attn_implementation
    if attention not in ("sdpa", "eager"):
        return f"attention {attention!r}"
    rope = getattr(model.config.text_config, "rope_parameters", None) or {}
    rope_type = rope.get("rope_type", "default")
    if rope_type in ("dynamic", "longrope"):
        return f"RoPE of type {rope_type!r}"
    return None


# the answer of `generate`


def eos_tokens(criteria: list) -> tuple[int, ...]:
    """Returns the tokens that end an answer, of the library's stopping criteria."""
    tokens = []
    for criterion in criteria:
        if isinstance(criterion, EosTokenCriteria):
            tokens += criterion.eos_token_id.tolist()
    return tuple(tokens)


def max_new_tokens(criteria: list, prompt_length: int) -> int:
    """Returns the maximum length of an answer, of the library's stopping criteria; at least one token."""
    limits = [criterion.max_length for criterion in criteria if isinstance(criterion, MaxLengthCriteria)]
    return max(min(limits, default=sys.maxsize) - prompt_length, 1)


def other_criteria(criteria: list) -> list:
    """Returns the stopping criteria other than length and end tokens."""
    return [criterion for criterion in criteria if type(criterion) not in SUPPORTED_CRITERIA]


def generate_compiled(
    model,
    soft_prompt,
    cache,
    input_ids: torch.LongTensor,
    processors: LogitsProcessorList,
    criteria: list,
    generation_config,
    streamer=None,
    insists: bool = True,
) -> GenerateDecoderOnlyOutput | torch.LongTensor | None:
    """
    Generates an answer after a soft prompt, with the arguments and the result of the transformers sampling loop. When
    sampling, each row gets a seed of its own from [`draw_seed`], in the order of the rows.

    Args:
        soft_prompt (`SoftPrompt`): of the whole prompt.
        cache (`Phase15Cache`): gets the state that the transformers loop would leave in it.
        input_ids (`torch.LongTensor` of shape `(batch_size, sequence_length)`): the prompt.
        insists (`bool`): raise the error if the steps cannot be compiled; otherwise `None` is returned.
    """
    batch_size, prompt_length = input_ids.shape
    sampling, _ = split_processors(processors, generation_config.do_sample)
    width = sampling_width([sampling], model.config.text_config.vocab_size)
    eos_token_ids = eos_tokens(criteria)
    pad_token_id = generation_config.pad_token_id
    if pad_token_id is None and eos_token_ids:  # as in the library
        pad_token_id = eos_token_ids[0]
    decoder = model.decoders.find(model, batch_size, cache.chunk_length, width, eos_token_ids, pad_token_id)
    with decoder.lock:
        decoder.start(soft_prompt)
        if not model.decoders.prepare(decoder, model, insists):
            return None
        generators = []
        if width is not None:
            generators = [torch.Generator().manual_seed(draw_seed()) for _ in range(batch_size)]
        num_remaining = max_new_tokens(criteria, prompt_length)
        answer = decode_answer(decoder, model, num_remaining, [sampling] * batch_size, generators, streamer)
        fill_cache(cache, decoder, model, num_fed=(answer.shape[1] - 1) % decoder.chunk.shape[1])
    if streamer is not None:
        streamer.end()
    cache.seen_tokens = prompt_length + answer.shape[1] - 1  # the last token was not fed
    sequences = torch.cat([input_ids, answer], dim=1)
    if not generation_config.return_dict_in_generate:
        return sequences
    return GenerateDecoderOnlyOutput(sequences=sequences, **{CACHE_NAME: cache})


def decode_answer(
    decoder: Phase15Decoder, model, num_remaining: int, samplings: list, generators: list, streamer
) -> torch.LongTensor:
    """
    Decodes chunks until all rows have ended.

    Args:
        num_remaining (`int`): maximum number of tokens.
        samplings (`list[Sampling]`): of each row.
        generators (`list[torch.Generator]`): of each row; empty for greedy search.

    Returns:
        `torch.LongTensor` of shape `(batch_size, num_tokens)`: the answers, up to the end of the longest.
    """
    can_end = decoder.eos_token_id is not None
    chunks = []
    while True:
        if generators:
            decoder.sampler.draw(samplings, generators)
        num_tokens = min(decoder.chunk.shape[1], num_remaining)
        for offset in range(num_tokens):
            decoder.run("decode" if offset else "prefill", model)
            if streamer is not None:
                streamer.put(decoder.chunk[:, offset].cpu())
            is_sync = streamer is not None or (can_end and (offset + 1) % SYNC_INTERVAL == 0)
            if is_sync and offset + 1 < num_tokens and decoder.finished.all():
                num_tokens = offset + 1
                break
        chunks.append(decoder.chunk[:, :num_tokens].clone())
        num_remaining -= num_tokens
        if num_remaining == 0 or (can_end and decoder.finished.all()):
            break
        decoder.run("step", model)
    answer = torch.cat(chunks, dim=1)
    if can_end:  # all rows may have ended inside the last chunk: cut the columns after the first where they all have
        has_ended = (answer[..., None] == decoder.eos_token_id).any(dim=-1).cumsum(dim=1).bool().all(dim=0)
        num_after = max(int(has_ended.sum()) - 1, 0)
        answer = answer[:, : answer.shape[1] - num_after]
    return answer


def fill_cache(cache, decoder: Phase15Decoder, model, num_fed: int):
    """Copies the decoder's state into a `Phase15Cache`, whose key-value cache has no column for unused slots."""
    soft_prompt = decoder.soft_prompt._make(state.clone() for state in decoder.soft_prompt)
    cache.start_chunk(soft_prompt)
    cache.chunk = model.get_input_embeddings()(decoder.chunk[:, :num_fed])
    num_used = int(soft_prompt.length.max())
    num_slots = decoder.num_slots

    def used_columns(states: torch.Tensor) -> torch.Tensor:
        return torch.cat([states[:, :, :num_used], states[:, :, num_slots : num_slots + num_fed]], dim=2)

    static_cache = decoder.slot_cache
    for layer, (keys, values) in enumerate(zip(static_cache.keys, static_cache.values, strict=True)):
        cache.llm_cache.update(used_columns(keys), used_columns(values), layer)


__all__ = [
    "MAX_DECODERS",
    "SYNC_INTERVAL",
    "Decoder",
    "DecoderBuffers",
    "LibraryDecoder",
    "Phase15Decoder",
    "Phase15Decoders",
    "Phase15StaticCache",
    "Sampler",
    "Sampling",
    "check_compile",
    "compiles_by_default",
    "draw_seed",
    "eos_tokens",
    "generate_compiled",
    "max_new_tokens",
    "other_criteria",
    "sampling_width",
    "split_processors",
    "unsupported_model",
    "unsupported_reason",
]
