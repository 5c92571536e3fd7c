# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Many answers at once, each in a lane. The state of an answer is one soft prompt, whatever its length, so a lane never
grows, and at a chunk boundary any row of the decoder can hold any lane.

    lanes = Phase15Lanes(model, num_lanes=16)
    lanes.submit(request)         from any thread
    while lanes.advance():        one chunk of every lane
        ...

At each boundary finished requests leave and waiting ones get their lanes; every lane with an unread query reads one
segment of it; then all lanes with a read query say one chunk, on the buffers of decoding_phase15.py. The greedy tokens
of a request are those of `generate` on the request alone. The rest of the model can be understood without this file.
"""

import threading
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from transformers import GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.utils import logging

from .cache_phase15 import KeptConversations
from .decoding_phase15 import ASKED_EVERY, AUTOMATIC_ON, LibraryDecoder, Phase15Decoder, unsupported_model
from .recursion_phase15 import carry
from .requests_phase15 import TOP_LOGPROBS, Phase15Request, Sampling, request_of, sample_tokens, width_of


logger = logging.get_logger(__name__)

NUM_LANES = 16
BROKEN = -1  # in place of a token whose logits are not finite


class LaneCounts(NamedTuple):
    """What lanes have done since they were made."""

    prompt_tokens: int = 0  # of queries that got a lane
    kept_tokens: int = 0  # those that a kept conversation had read
    generated_tokens: int = 0


class Lane:
    """A request's state at a chunk boundary."""

    def __init__(self, request: Phase15Request, soft_prompt, num_read: int = 0, begun_from: bytes | None = None):
        self.request, self.soft_prompt, self.num_read = request, soft_prompt, num_read
        self.begun_from = begun_from  # the key of the kept conversation that it goes on from
        self.chunk: torch.LongTensor | None = None  # (1, K), said and not stepped over
        self.ids: torch.LongTensor | None = None  # (1, T), for the library's processors and criteria
        self.generator = torch.Generator().manual_seed(request.seed)
        self.kept: tuple[int, tuple] | None = None  # what is kept after the answer, and how many tokens that has read

    @property
    def is_reading(self) -> bool:
        return self.num_read < len(self.request.prompt_ids)

    def take(self, token: int, numbers: list[float]):
        """One more token; `numbers`: its log-probability, then those of the likeliest, then their ids."""
        request = self.request
        if token == BROKEN:
            message = "the LLM's output is not finite. The weights are damaged, or too large for their dtype."
            raise FloatingPointError(message)
        if request.num_logprobs is not None:
            likeliest = zip(map(int, numbers[1 + len(numbers) // 2 :]), numbers[1:], strict=False)
            request.logprobs.append(numbers[0])
            request.top_logprobs.append(list(likeliest)[: request.num_logprobs])
        request.generated_tokens.append(token)  # last: another thread may read the request
        if self.ids is not None:
            self.ids = torch.cat([self.ids, self.ids.new_tensor([[token]])], dim=1)
        if request.on_token is not None:
            request.on_token(request)
        stops = (torch.as_tensor(stop(self.ids, None)).all() for stop in request.criteria)  # lm_eval's give a bool
        if token in request.eos_token_ids or any(stops):
            request.finish("stop")
        elif len(request.generated_tokens) >= request.max_new_tokens:
            request.finish("length")

    @contextmanager
    def only_this(self) -> Iterator[None]:
        """An error of the request's own functions ends the request, and no other."""
        try:
            yield
        except Exception as error:  # any that others' code raises
            self.request.finish("error", error)


class Phase15Lanes:
    """
    Answers requests in lanes. `submit` can be called from any thread, `advance` from one. On CUDA the lanes are valid
    until the model's weights move.

    Args:
        model (`Phase15ForCausalLM`): in evaluation mode.
        num_lanes (`int`): the most answers at once. Buffers are allocated for so many.
        compile (`bool`, *optional*): as in `generate`: compiled steps, on CUDA as CUDA graphs.
        max_kept_conversations (`int`): how many soft prompts are kept after their answers. A query that begins with
            the tokens that one has read goes on from there. The least recently used go first.
        chunk_length (`int`, *optional*): tokens of a chunk of every answer; by default as in `generate`.

    Raises:
        ValueError: for `compile=True` with a model that forbids it, less than one lane, or too long a chunk.
    """

    def __init__(
        self,
        model,
        num_lanes: int = NUM_LANES,
        compile: bool | None = None,
        max_kept_conversations: int = 0,
        chunk_length: int | None = None,
    ):
        if num_lanes < 1:
            raise ValueError(f"`num_lanes` is {num_lanes}, but there must be one at least.")
        reason = unsupported_model(model)
        if compile and reason:
            raise ValueError(f"`compile=True` cannot be honoured with {reason}.")
        self.model, self.num_lanes, self.insists = model, num_lanes, bool(compile)
        self.is_static = reason is None
        self.is_compiled = self.is_static and (model.device.type in AUTOMATIC_ON if compile is None else compile)
        self.kept = KeptConversations(max_kept_conversations, model.config.max_query_length)
        self.waiting: deque[Phase15Request] = deque()
        self.lanes: list[Lane] = []
        self.counts = LaneCounts()
        if chunk_length is None:
            chunk_length = getattr(model.generation_config, "chunk_length", None)
        model.config.check_chunk_length(chunk_length)
        device, self.chunk_length = model.device, chunk_length or model.config.chunk_length
        self._settings = torch.zeros(num_lanes, len(Sampling._fields), device=device)
        self._uniform = torch.zeros(num_lanes, self.chunk_length, device=device)
        self._broken = torch.zeros(num_lanes, dtype=torch.bool, device=device)
        self._logits: torch.Tensor | None = None  # of the newest tokens, if a lane asks for log-probabilities
        self._buffers: Phase15Decoder | None = None
        self._decoders: dict[tuple, Phase15Decoder | LibraryDecoder] = {}
        self._speaking: list[Lane] = []

    def submit(self, request: Phase15Request):
        """Puts a request into the queue: in the order of calls, each gets a lane at a boundary."""
        self.check(request)
        self.waiting.append(request)

    def check(self, request: Phase15Request):
        if (asked := request.chunk_length) not in (None, self.chunk_length):
            raise ValueError(f"`chunk_length` is {asked}, but these lanes say chunks of {self.chunk_length} tokens.")

    def request(self, prompt_ids: list[int], *args, **kwargs) -> Phase15Request:
        """A request with the settings of a call of `generate`: see [`request_of`]. It still has to be submitted."""
        return request_of(self.model, prompt_ids, *args, **kwargs)

    def abort(self, error: Exception):
        """Ends every request that waits or is under way, with an error."""
        while self.waiting:
            self.waiting.popleft().finish("error", error)
        for lane in self.lanes:
            lane.request.finish("error", error)
        self.lanes.clear()

    @torch.no_grad()
    def advance(self) -> bool:
        """
        One boundary and one chunk.

        Returns:
            `bool`: whether a request waits or is under way.
        """
        self._leave()
        self._step([lane for lane in self.lanes if lane.chunk is not None])
        self._admit()
        self._read([lane for lane in self.lanes if lane.is_reading])
        self._speak([lane for lane in self.lanes if not lane.is_reading])
        self._leave()
        return bool(self.lanes or self.waiting)

    def _leave(self):
        for lane in self.lanes:
            if lane.request.finish_reason is not None and lane.kept is not None:
                num_read, soft_prompt = lane.kept
                self.kept.put(lane.request.prompt_ids[:num_read], soft_prompt, lane.begun_from)
        self.lanes = [lane for lane in self.lanes if lane.request.finish_reason is None]

    def _admit(self):
        while self.waiting and len(self.lanes) < self.num_lanes:
            request = self.waiting.popleft()
            if request.finish_reason is not None:  # its client has left
                continue
            request.started = time.perf_counter()
            soft_prompt, num_read, key = self.kept.get(request.prompt_ids)
            if soft_prompt is None:
                like = self.model.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.long, device=self.model.device))
                soft_prompt = self.model.empty_soft_prompt(1, like)
            request.num_kept_tokens = num_read
            self._count(prompt_tokens=len(request.prompt_ids), kept_tokens=num_read)
            self.lanes.append(Lane(request, soft_prompt, num_read, key))

    def _read(self, lanes: list[Lane]):
        """One segment of each query."""
        if not lanes:
            return
        size, device = self.model.config.max_query_length, self.model.device
        segments = [lane.request.prompt_ids[lane.num_read : lane.num_read + size] for lane in lanes]
        longest = max(map(len, segments))
        ids = torch.tensor([segment + [0] * (longest - len(segment)) for segment in segments], device=device)
        length = torch.tensor([len(segment) for segment in segments], device=device)
        soft_prompt = self.model.read(self._stack(lanes), ids, length)
        for index, (lane, segment, row) in enumerate(zip(lanes, segments, rows_of(soft_prompt), strict=True)):
            self._show(lane, ids[index : index + 1, : len(segment)], row)
            lane.soft_prompt, lane.num_read = row, lane.num_read + len(segment)
            if self.kept.size and len(segment) == size:
                lane.kept = lane.num_read, row

    def _step(self, lanes: list[Lane]):
        """The chunks that were said last."""
        if not lanes:
            return
        decoder = self._start(lanes)
        decoder.chunk.copy_(torch.cat(pad([lane.chunk for lane in lanes], len(decoder.chunk))))
        decoder.run("step", self.model)
        for lane, row in zip(lanes, rows_of(decoder.soft_prompt), strict=False):
            self._show(lane, lane.chunk, row)
            lane.soft_prompt, lane.chunk = row, None

    def _show(self, lane: Lane, ids: torch.LongTensor, stepped):
        """Gives a request that asks for it the step over `ids`, `(1, num_tokens)`."""
        if lane.request.on_step is not None:
            tokens, length = self.model.get_input_embeddings()(ids), torch.full((1,), ids.shape[1], device=ids.device)
            carried = carry(lane.soft_prompt, tokens, length, self.model.config.num_sink_tokens)
            with lane.only_this():
                lane.request.on_step(carried, stepped, ids.shape[1])

    def _speak(self, lanes: list[Lane]):
        """One chunk of each answer, or less where all end before."""
        if not lanes:
            return
        requests = [lane.request for lane in lanes]
        is_custom = any(request.processors or request.num_logprobs is not None for request in requests)
        self._speaking, width = lanes, width_of(requests, self.model.config.text_config.vocab_size)
        decoder = self._start(lanes, width, is_custom)
        self._broken.zero_()
        if width is not None:
            self._draw(lanes)
        for lane in lanes:
            if lane.ids is None and (lane.request.processors or lane.request.criteria):
                lane.ids = torch.tensor([lane.request.prompt_ids], device=self.model.device)
        at_once = not any(request.asks_every_token for request in requests)
        longest = max(request.max_new_tokens - len(request.generated_tokens) for request in requests)
        num_tokens, num_heard = min(self.chunk_length, longest), 0
        for column in range(num_tokens):
            decoder.run("decode" if column else "prefill", self.model)
            if not at_once or (column + 1) % ASKED_EVERY == 0 or column + 1 == num_tokens:
                self._hear(lanes, decoder, num_heard, column + 1)
                num_heard = column + 1
                if all(request.finish_reason is not None for request in requests):
                    break
        for lane, chunk in zip(lanes, decoder.chunk.clone().split(1), strict=False):
            lane.chunk = chunk

    def _hear(self, lanes: list[Lane], decoder, start: int, end: int):
        """Brings the tokens of some columns to the host, in one transfer."""
        tokens = torch.where(self._broken[: len(lanes), None], BROKEN, decoder.chunk[: len(lanes), start:end])
        if any(lane.request.num_logprobs is not None for lane in lanes):  # then there is one column
            scores = self._logits[: len(lanes)].double().log_softmax(dim=-1)
            best, order = scores.topk(min(TOP_LOGPROBS, scores.shape[-1]))
            chosen = scores.gather(1, decoder.chunk[: len(lanes), start:end])
            tokens = torch.cat([tokens.double(), chosen, best, order.double()], dim=1)
        width, number = end - start, 0
        for lane, row in zip(lanes, tokens.tolist(), strict=True):
            for token in row[:width]:
                if lane.request.finish_reason is None:
                    number += 1
                    with lane.only_this():
                        lane.take(int(token), row[width:])
        self._count(generated_tokens=number)

    def _count(self, **new: int):
        self.counts = self.counts._replace(**{name: getattr(self.counts, name) + n for name, n in new.items()})

    def _start(self, lanes: list[Lane], width: int | None = None, is_custom: bool = False):
        """A decoder that holds the lanes in its first rows. `width` and `is_custom` say how it picks."""
        size = len(lanes)
        if self.is_compiled:  # few shapes; the rows behind the lanes repeat the first
            size = min(1 << (size - 1).bit_length(), self.num_lanes)
        if (size, width, is_custom) not in self._decoders:
            self._decoders[size, width, is_custom] = self._new_decoder(size, width, is_custom)
        decoder = self._decoders[size, width, is_custom]
        decoder.start(self._stack(pad(lanes, size)))
        if self.is_compiled and not is_custom:
            try:
                decoder.prepare(self.model)
            except RuntimeError as error:
                if self.insists:
                    raise
                message = " ".join(str(error).split())[:500]
                logger.warning(f"Decoding goes on without compilation, which failed: {message}")
                self.is_compiled = False
                self._decoders.clear()
                return self._start(lanes, width, is_custom)
        return decoder

    def _new_decoder(self, size: int, width: int | None, is_custom: bool):
        def pick(logits: torch.Tensor) -> torch.LongTensor:
            self._broken[:size] |= ~logits.sum(dim=-1).isfinite()
            scores = self._process(logits) if is_custom else logits
            if width is None:
                return scores.argmax(dim=-1)
            uniform = self._uniform[:size].index_select(1, decoder.column - decoder.num_slots)
            return sample_tokens(scores, self._settings[:size], uniform, width)

        if not self.is_static:
            decoder = LibraryDecoder(self.model, size, pick, self.chunk_length)
        else:
            if self._buffers is None:
                self._buffers = Phase15Decoder(self.model, self.num_lanes, pick, chunk_length=self.chunk_length)
            decoder = Phase15Decoder(self.model, size, pick, within=self._buffers, is_compiled=self.is_compiled)
        return decoder

    def _process(self, logits: torch.Tensor) -> torch.Tensor:
        """Keeps the logits, and runs the library's processors on the rows that have some."""
        self._logits, scores = logits, logits.clone()
        for row, lane in enumerate(self._speaking):
            if lane.request.processors and lane.request.finish_reason is None:
                with lane.only_this():
                    scores[row] = lane.request.processors(lane.ids, logits[row : row + 1])[0]
        return scores

    def _draw(self, lanes: list[Lane]):
        """The lanes' settings and the next numbers of their seeds, for one chunk."""
        size = len(lanes)
        settings = torch.tensor([lane.request.sampling for lane in lanes], dtype=torch.float32)
        uniform = torch.stack([torch.rand(self.chunk_length, generator=lane.generator) for lane in lanes])
        self._settings[:size].copy_(settings)
        self._uniform[:size].copy_(uniform)

    @staticmethod
    def _stack(lanes: list[Lane]):
        states = zip(*(lane.soft_prompt for lane in lanes), strict=True)
        return lanes[0].soft_prompt._make(map(torch.cat, states))


class Phase15LaneThread:
    """
    A thread that advances lanes while there is something to do.

    Args:
        lanes (`Phase15Lanes`): no other thread may call `advance` on them.
    """

    def __init__(self, lanes: Phase15Lanes):
        self.lanes, self.news, self.is_stopping = lanes, threading.Condition(), False
        self.thread = threading.Thread(target=self._run, name="lanes", daemon=True)

    def start(self):
        self.thread.start()

    def stop(self):
        """Ends what is still under way, and waits for the chunk that is being said."""
        with self.news:
            self.is_stopping = True
            self.news.notify()
        for request in [*self.lanes.waiting, *(lane.request for lane in self.lanes.lanes)]:
            request.finish("cancelled")
        self.thread.join()

    def submit(self, requests: list[Phase15Request]):
        """Puts all of the requests into the queue, or none, from any thread."""
        for request in requests:
            self.lanes.check(request)
        with self.news:
            for request in requests:
                self.lanes.submit(request)
            self.news.notify()

    def advance(self):
        self.lanes.advance()

    def _run(self):
        while True:
            with self.news:
                while not (self.is_stopping or self.lanes.waiting or self.lanes.lanes):
                    self.news.wait()
                if self.is_stopping:
                    return
            try:
                self.advance()
            except Exception as error:  # out of memory, or a bug: the next requests may go well
                logger.exception("All answers under way are ended")
                self.lanes.abort(error)


def rows_of(soft_prompt) -> list:
    """Each row of a soft prompt, in memory of its own."""
    return [soft_prompt._make(row) for row in zip(*(state.clone().split(1) for state in soft_prompt), strict=True)]


def pad(rows: list, size: int) -> list:
    return rows + rows[:1] * (size - len(rows))


def generate_in_lanes(
    model,
    inputs: list[list[int]],
    generation_config: GenerationConfig | None,
    settings: dict,
    num_lanes: int,
    compile: bool | None,
    chunk_length: int | None,
    record_timestamps: bool,
    progress_bar: bool,
    return_logprobs: bool,
) -> dict[str, GenerationOutput]:
    """See `Phase15GenerationMixin.generate_batch`."""
    if chunk_length is None:
        chunk_length = getattr(generation_config, "chunk_length", None)
    settings["chunk_length"] = chunk_length
    given = {**vars(generation_config or model.generation_config), **settings}
    repeats, requests, outputs = given.get("num_return_sequences") or 1, {}, {}
    num_logprobs = 0 if return_logprobs else None
    for index, prompt_ids in enumerate(inputs):
        for child in range(repeats):
            name = f"req_{index}" + (f"__child#{child - 1}" if child else "")
            timestamps = [] if record_timestamps else None
            on_token = None if timestamps is None else lambda _, times=timestamps: times.append(time.perf_counter())
            request = request_of(
                model, prompt_ids, generation_config, None, num_logprobs, on_token, f"inputs[{index}]", **settings
            )
            requests[name] = request
            outputs[name] = GenerationOutput(name, request.prompt_ids, timestamps=timestamps)
    lanes = Phase15Lanes(model, min(num_lanes, max(len(requests), 1)), compile, chunk_length=chunk_length)
    for request in requests.values():
        lanes.submit(request)
    with logging.tqdm(total=len(requests), desc="Answering", unit="request", disable=not progress_bar) as bar:
        shown, goes_on = 0, bool(requests)
        while goes_on:
            goes_on = lanes.advance()
            num_finished = sum(request.finish_reason is not None for request in requests.values())
            bar.update(num_finished - shown)
            shown = num_finished
    for name, request in requests.items():
        if request.error is not None:
            raise request.error
        output = outputs[name]
        output.generated_tokens, output.logprobs = request.generated_tokens, request.logprobs
        output.status, output.lifespan = RequestStatus.FINISHED, (request.started, request.finished)
    return outputs


__all__ = ["NUM_LANES", "LaneCounts", "Phase15LaneThread", "Phase15Lanes", "generate_in_lanes"]
