# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Continuous batching: many answers at once, each in a lane of the batch. The state of an answer is one soft prompt,
whatever its length, so a lane never grows, and at a chunk boundary any row of the decoder can hold any lane.

    processor = Phase15ContinuousBatchProcessor(model, max_batch_size=16)
    processor.submit(request)         from any thread
    while processor.advance():        one chunk of every lane
        ...

At each boundary finished requests leave and waiting ones get their lanes; every lane with an unread prompt reads one
segment of it; then one chunk is decoded in all lanes whose prompt has been read, by a decoder of decoding_phase15.py.
The greedy tokens of a request are those of `generate` on the request by itself.

`Phase15ContinuousBatchingManager` advances a processor in a thread, and `Phase15ContinuousBatchingMixin` gives a model
the library's methods for both: `generate_batch`, `init_continuous_batching` and `continuous_batching_context_manager`.
The rest of the model can be understood without this file.
"""

import threading
import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from transformers import GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus
from transformers.utils import logging

from .cache_phase15 import KeptConversations
from .decoding_phase15 import (
    SYNC_INTERVAL,
    Decoder,
    DecoderBuffers,
    LibraryDecoder,
    Phase15Decoder,
    Sampler,
    check_compile,
    compiles_by_default,
    sampling_width,
    unsupported_model,
)
from .recursion_phase15 import carry
from .requests_phase15 import TOP_LOGPROBS, Phase15Request, make_request
from .state_phase15 import Phase15State


logger = logging.get_logger(__name__)

MAX_BATCH_SIZE = 16  # the default
NOT_FINITE = -1  # in place of a token whose logits are not finite


class LaneCounts(NamedTuple):
    """Numbers of tokens since a processor was made."""

    prompt_tokens: int = 0  # of prompts that got a lane
    kept_tokens: int = 0  # of those, the ones that a stored soft prompt had read
    generated_tokens: int = 0


class Lane:
    """
    The state of a request at a chunk boundary.

    Args:
        request (`Phase15Request`): what is answered.
        soft_prompt (`SoftPrompt` of one row): has read the first `num_read` tokens of the prompt.

    Attributes:
        chunk (`torch.LongTensor` of shape `(1, chunk_length)`, *optional*): decoded, and not stepped over.
        ids (`torch.LongTensor` of shape `(1, num_tokens)`, *optional*): prompt and answer, for the library's
            processors and criteria.
        generator (`torch.Generator`): of the request's seed.
    """

    def __init__(self, request: Phase15Request, soft_prompt, num_read: int = 0):
        self.request = request
        self.soft_prompt = soft_prompt
        self.num_read = num_read
        self.chunk: torch.LongTensor | None = None
        self.ids: torch.LongTensor | None = None
        self.generator = torch.Generator().manual_seed(request.seed)

    @property
    def is_reading(self) -> bool:
        return self.num_read < len(self.request.prompt_ids)

    @property
    def is_finished(self) -> bool:
        return self.request.finish_reason is not None

    def append_token(self, token: int, logprobs: list[float]):
        """
        Appends a token to the answer, and ends the request if it was the last.

        Args:
            token (`int`): its id, or `NOT_FINITE`.
            logprobs (`list[float]`): its log-probability, then those of the most likely tokens, then their ids; empty
                if no request needs them.
        """
        request = self.request
        if token == NOT_FINITE:
            message = "the LLM's output is not finite. The weights are damaged, or too large for their dtype."
            raise FloatingPointError(message)
        if request.num_logprobs is not None:
            num_likely = len(logprobs) // 2
            likely_logprobs = logprobs[1 : 1 + num_likely]
            likely_ids = [int(number) for number in logprobs[1 + num_likely :]]
            top_logprobs = list(zip(likely_ids, likely_logprobs, strict=True))
            request.logprobs.append(logprobs[0])
            request.top_logprobs.append(top_logprobs[: request.num_logprobs])
        request.generated_tokens.append(token)  # last: another thread may read the request
        if self.ids is not None:
            self.ids = torch.cat([self.ids, self.ids.new_tensor([[token]])], dim=1)
        if request.on_token is not None:
            request.on_token(request)
        if token in request.eos_token_ids or self._meets_criterion():
            request.finish("stop")
        elif len(request.generated_tokens) >= request.max_new_tokens:
            request.finish("length")

    def _meets_criterion(self) -> bool:
        for criterion in self.request.criteria:
            if torch.as_tensor(criterion(self.ids, None)).all():  # a criterion of lm_eval returns a bool
                return True
        return False

    @contextmanager
    def isolate_errors(self) -> Iterator[None]:
        """Ends only this request if one of its own functions fails."""
        try:
            yield
        except Exception as error:  # any that others' code raises
            self.request.finish("error", error)


class Phase15ContinuousBatchProcessor:
    """
    Answers requests in the lanes of one batch. `submit` can be called from any thread, `advance` from one. On CUDA the
    processor is valid until the model's weights move.

    Args:
        model (`Phase15ForCausalLM`): in evaluation mode.
        max_batch_size (`int`, defaults to 16): maximum number of answers at once. Buffers are allocated for all of
            them.
        compile (`bool`, *optional*): as in `generate`: compiled steps, on CUDA as CUDA graphs.
        max_kept_conversations (`int`, defaults to 0): maximum number of soft prompts that are stored while prompts
            are read ([`KeptConversations`]). A prompt that begins with the tokens of one starts from it.
        chunk_length (`int`, *optional*): tokens of a chunk of every answer; by default as in `generate`.

    Attributes:
        waiting (`deque[Phase15Request]`): requests without a lane.
        lanes (`list[Lane]`): requests with one.
        counts (`LaneCounts`): numbers of tokens so far.
        conversations (`KeptConversations`): stored soft prompts.

    Raises:
        ValueError: for `compile=True` with a model that forbids it, a batch size below 1, or too long a chunk.
    """

    def __init__(
        self,
        model,
        max_batch_size: int = MAX_BATCH_SIZE,
        compile: bool | None = None,
        max_kept_conversations: int = 0,
        chunk_length: int | None = None,
    ):
        if max_batch_size < 1:
            raise ValueError(f"`max_batch_size` is {max_batch_size}, but it must be at least 1.")
        reason = unsupported_model(model)
        check_compile(compile, reason)
        self.model = model
        self.max_batch_size = max_batch_size
        self.insists = compile is True
        self.is_static = reason is None
        self.is_compiled = self.is_static and (compiles_by_default(model) if compile is None else compile)
        self.conversations = KeptConversations(max_kept_conversations, model.config.max_query_length)
        self.waiting: deque[Phase15Request] = deque()
        self.lanes: list[Lane] = []
        self.counts = LaneCounts()
        self.chunk_length = model.config.resolve_chunk_length(chunk_length, model.generation_config)
        self._sampler = Sampler(max_batch_size, self.chunk_length, model.device)
        self._is_not_finite = torch.zeros(max_batch_size, dtype=torch.bool, device=model.device)
        self._logits: torch.Tensor | None = None  # of the newest tokens, if a lane needs log-probabilities
        self._buffers: DecoderBuffers | None = None
        self._decoders: dict[tuple, Decoder] = {}
        self._decoding: list[Lane] = []  # the lanes in the decoder's first rows

    @property
    def num_lanes(self) -> int:
        """The name of `max_batch_size` before 0.7, for one version."""
        return self.max_batch_size

    @property
    def kept(self) -> KeptConversations:
        """The name of `conversations` before 0.7, for one version."""
        return self.conversations

    @property
    def has_requests(self) -> bool:
        """`True` if a request waits or has a lane."""
        return bool(self.lanes or self.waiting)

    def submit(self, request: Phase15Request):
        """Puts a request into the queue. In the order of the calls, each gets a lane at a boundary."""
        self.check(request)
        self.waiting.append(request)

    def check(self, request: Phase15Request):
        """Raises a ValueError for a request that names another chunk length."""
        length = request.chunk_length
        if length not in (None, self.chunk_length):
            raise ValueError(
                f"`chunk_length` is {length}, but this batch decodes chunks of {self.chunk_length} tokens."
            )

    def request(self, prompt_ids: list[int], *args, **kwargs) -> Phase15Request:
        """Makes a request: see [`make_request`]. It still has to be submitted."""
        return make_request(self.model, prompt_ids, *args, **kwargs)

    def cancel(self):
        """Ends all requests. Their lanes are free at the next boundary."""
        for request in [*list(self.waiting), *(lane.request for lane in list(self.lanes))]:
            request.finish("cancelled")

    def abort(self, error: Exception):
        """Ends all requests with an error, and frees their lanes at once."""
        while self.waiting:
            self.waiting.popleft().finish("error", error)
        for lane in self.lanes:
            lane.request.finish("error", error)
        self.lanes.clear()

    @torch.no_grad()
    def advance(self) -> bool:
        """
        Passes one boundary and decodes one chunk.

        Returns:
            `bool`: `True` while a request waits or has a lane.
        """
        self._release_finished()
        self._step_chunks([lane for lane in self.lanes if lane.chunk is not None])
        self._admit_waiting()
        self._read_prompts([lane for lane in self.lanes if lane.is_reading])
        self._decode_chunk([lane for lane in self.lanes if not (lane.is_reading or lane.request.reads_only)])
        self._release_finished()
        return self.has_requests

    def _release_finished(self):
        self.lanes = [lane for lane in self.lanes if not lane.is_finished]

    def _step_chunks(self, lanes: list[Lane]):
        """Steps over the chunks that were decoded last."""
        if not lanes:
            return
        decoder = self._start_decoder(lanes)
        chunks = [lane.chunk for lane in lanes]
        decoder.chunk.copy_(torch.cat(pad_rows(chunks, len(decoder.chunk))))
        decoder.run("step", self.model)
        for lane, row in zip(lanes, split_rows(decoder.soft_prompt), strict=False):
            self._report_step(lane, lane.chunk, row)
            lane.soft_prompt = row
            lane.chunk = None

    def _admit_waiting(self):
        """Gives lanes to the requests that have waited longest."""
        while self.waiting and len(self.lanes) < self.max_batch_size:
            request = self.waiting.popleft()
            if request.finish_reason is not None:  # its client has left
                continue
            request.started = time.perf_counter()
            soft_prompt, num_read = self.conversations.get(request.prompt_ids, request.salt)
            if soft_prompt is None and request.state is not None:
                soft_prompt = request.state.soft_prompt
            if soft_prompt is None:
                # embeddings, not their weight: an offloaded weight is only there during its module's call
                token = torch.zeros(1, 1, dtype=torch.long, device=self.model.device)
                soft_prompt = self.model.empty_soft_prompt(1, self.model.get_input_embeddings()(token))
            request.num_kept_tokens = num_read
            self._count(prompt_tokens=len(request.prompt_ids), kept_tokens=num_read)
            lane = Lane(request, soft_prompt, num_read)
            self.lanes.append(lane)
            self._finish_reading(lane)

    def _read_prompts(self, lanes: list[Lane]):
        """Reads one segment of each prompt."""
        if not lanes:
            return
        size = self.model.config.max_query_length
        device = self.model.device
        segments = [lane.request.prompt_ids[lane.num_read : lane.num_read + size] for lane in lanes]
        longest = max(len(segment) for segment in segments)
        ids = torch.tensor([segment + [0] * (longest - len(segment)) for segment in segments], device=device)
        length = torch.tensor([len(segment) for segment in segments], device=device)
        soft_prompt = self.model.read_segments(stack_soft_prompts(lanes), ids, length)
        for index, row in enumerate(split_rows(soft_prompt)):
            lane = lanes[index]
            num_new = len(segments[index])
            self._report_step(lane, ids[index : index + 1, :num_new], row)
            lane.soft_prompt = row
            lane.num_read += num_new
            prompt_ids = lane.request.prompt_ids
            if num_new == size and self.conversations.is_kept(lane.num_read, len(prompt_ids)):
                self.conversations.put(prompt_ids[: lane.num_read], row, lane.request.salt)
            self._finish_reading(lane)

    def _finish_reading(self, lane: Lane):
        """Ends a request that needs only the soft prompt after its prompt."""
        if lane.request.reads_only and not lane.is_reading:
            lane.request.soft_prompt = lane.soft_prompt
            lane.request.finish("stop")

    def _report_step(self, lane: Lane, ids: torch.LongTensor, stepped):
        """Calls the `on_step` of a request, if it has one, with the step over `ids`, of shape `(1, num_tokens)`."""
        if lane.request.on_step is None:
            return
        num_tokens = ids.shape[1]
        tokens = self.model.get_input_embeddings()(ids)
        length = torch.full((1,), num_tokens, device=ids.device)
        carried = carry(lane.soft_prompt, tokens, length, self.model.config.num_sink_tokens)
        with lane.isolate_errors():
            lane.request.on_step(carried, stepped, num_tokens)

    def _decode_chunk(self, lanes: list[Lane]):
        """Decodes one chunk of each answer, or less if all answers end before."""
        if not lanes:
            return
        requests = [lane.request for lane in lanes]
        samplings = [request.sampling for request in requests]
        width = sampling_width(samplings, self.model.config.text_config.vocab_size)
        is_custom = any(request.processors or request.num_logprobs is not None for request in requests)
        self._decoding = lanes
        decoder = self._start_decoder(lanes, width, is_custom)
        self._is_not_finite.zero_()
        if width is not None:
            self._sampler.draw(samplings, [lane.generator for lane in lanes])
        for lane in lanes:
            if lane.ids is None and (lane.request.processors or lane.request.criteria):
                lane.ids = torch.tensor([lane.request.prompt_ids], device=self.model.device)
        collects_every_token = any(request.needs_every_token for request in requests)
        num_remaining = max(request.max_new_tokens - len(request.generated_tokens) for request in requests)
        num_tokens = min(self.chunk_length, num_remaining)
        num_collected = 0
        for num_decoded in range(1, num_tokens + 1):
            decoder.run("prefill" if num_decoded == 1 else "decode", self.model)
            if collects_every_token or num_decoded % SYNC_INTERVAL == 0 or num_decoded == num_tokens:
                self._collect_tokens(lanes, decoder.chunk[:, num_collected:num_decoded])
                num_collected = num_decoded
                if all(lane.is_finished for lane in lanes):
                    break
        for lane, chunk in zip(lanes, decoder.chunk.clone().split(1), strict=False):
            lane.chunk = chunk

    def _collect_tokens(self, lanes: list[Lane], tokens: torch.LongTensor):
        """Brings new columns of the chunk to the host, in one transfer, and appends their tokens to the answers."""
        num_lanes = len(lanes)
        num_columns = tokens.shape[1]
        tokens = tokens[:num_lanes]  # the other rows of the decoder are padding
        numbers = torch.where(self._is_not_finite[:num_lanes, None], NOT_FINITE, tokens)
        if any(lane.request.num_logprobs is not None for lane in lanes):  # then there is one column
            logprobs = self._logits[:num_lanes].double().log_softmax(dim=-1)
            best, order = logprobs.topk(min(TOP_LOGPROBS, logprobs.shape[-1]))
            numbers = torch.cat([numbers.double(), logprobs.gather(1, tokens), best, order.double()], dim=1)
        num_generated = 0
        for lane, row in zip(lanes, numbers.tolist(), strict=True):
            for token in row[:num_columns]:
                if not lane.is_finished:
                    num_generated += 1
                    with lane.isolate_errors():
                        lane.append_token(int(token), row[num_columns:])
        self._count(generated_tokens=num_generated)

    def _count(self, **new: int):
        totals = {name: getattr(self.counts, name) + number for name, number in new.items()}
        self.counts = self.counts._replace(**totals)

    def _start_decoder(self, lanes: list[Lane], width: int | None = None, is_custom: bool = False) -> Decoder:
        """
        Returns a decoder that holds the soft prompts of the lanes in its first rows.

        Args:
            width (`int`, *optional*): see [`sampling_width`].
            is_custom (`bool`): a lane has processors of the library, or needs log-probabilities.
        """
        num_rows = len(lanes)
        if self.is_compiled:  # few shapes; the rows after the lanes repeat the first
            num_rows = min(1 << (num_rows - 1).bit_length(), self.max_batch_size)
        key = (num_rows, width, is_custom)
        if key not in self._decoders:
            self._decoders[key] = self._make_decoder(num_rows, width, is_custom)
        decoder = self._decoders[key]
        decoder.start(stack_soft_prompts(pad_rows(lanes, num_rows)))
        if self.is_compiled and not is_custom:  # the processors of the library run on the host: they are not recorded
            if not self.model.decoders.prepare(decoder, self.model, self.insists):
                self.is_compiled = False
                self._decoders.clear()
                return self._start_decoder(lanes, width, is_custom)
        return decoder

    def _make_decoder(self, num_rows: int, width: int | None, is_custom: bool) -> Decoder:
        process = partial(self._process_logits, is_custom=is_custom)
        if not self.is_static:
            return LibraryDecoder(self.model, num_rows, self.chunk_length, self._sampler, width, process)
        if self._buffers is None:
            self._buffers = DecoderBuffers.allocate(self.model, self.max_batch_size, self.chunk_length)
        buffers = self._buffers.first_rows(num_rows)
        return Phase15Decoder(buffers, self._sampler, width, process, is_compiled=self.is_compiled)

    def _process_logits(self, logits: torch.Tensor, is_custom: bool) -> torch.Tensor:
        """Marks rows that are not finite. With `is_custom`, keeps the logits and runs the library's processors."""
        self._is_not_finite[: len(logits)] |= ~logits.sum(dim=-1).isfinite()
        if not is_custom:
            return logits
        self._logits = logits
        scores = logits.clone()
        for row, lane in enumerate(self._decoding):
            if lane.request.processors and not lane.is_finished:
                with lane.isolate_errors():
                    scores[row] = lane.request.processors(lane.ids, logits[row : row + 1])[0]
        return scores


def stack_soft_prompts(lanes: list[Lane]):
    """Returns the soft prompts of the lanes as one batch."""
    states = zip(*(lane.soft_prompt for lane in lanes), strict=True)  # embeds of all lanes, then length of all lanes
    return lanes[0].soft_prompt._make(torch.cat(rows) for rows in states)


def split_rows(soft_prompt) -> list:
    """Returns each row of a soft prompt, in memory of its own."""
    states = [state.clone().split(1) for state in soft_prompt]
    return [soft_prompt._make(row) for row in zip(*states, strict=True)]


def pad_rows(rows: list, size: int) -> list:
    """Returns `size` rows: those given, and then copies of the first."""
    return rows + rows[:1] * (size - len(rows))


# requests by id, as the library's managers have them


@dataclass
class TrackedRequest:
    """A request with an id, whose state can be given as the library's `GenerationOutput`."""

    request_id: str
    request: Phase15Request
    timestamps: list[float] | None = None
    created_time: float = field(default_factory=time.perf_counter)

    def record_timestamp(self, request: Phase15Request):
        self.timestamps.append(time.perf_counter())

    def to_generation_output(self) -> GenerationOutput:
        request = self.request
        if request.finish_reason in ("stop", "length"):
            status = RequestStatus.FINISHED
        elif request.finish_reason is not None:
            status = RequestStatus.FAILED
        elif request.generated_tokens:
            status = RequestStatus.DECODING
        elif request.started > 0:
            status = RequestStatus.PREFILLING
        else:
            status = RequestStatus.PENDING
        error = None
        if status == RequestStatus.FAILED:
            error = request.finish_reason if request.error is None else str(request.error)
        return GenerationOutput(
            self.request_id,
            request.prompt_ids,
            generated_tokens=list(request.generated_tokens),
            logprobs=list(request.logprobs),
            error=error,
            status=status,
            created_time=self.created_time,
            lifespan=(request.started, request.finished),
            timestamps=None if self.timestamps is None else list(self.timestamps),
        )


def track_requests(
    model,
    request_id: str,
    prompt_ids: list[int],
    generation_config: GenerationConfig | None,
    record_timestamps: bool = False,
    return_logprobs: bool = False,
    seed: int | None = None,
    **kwargs,
) -> list[TrackedRequest]:
    """
    Makes the requests of one prompt: `num_return_sequences` of them, the first with `request_id` and the others with
    the library's names, "{request_id}__child#0", …. `kwargs` are those of [`make_request`].
    """
    config = model.generation_config if generation_config is None else generation_config
    number = kwargs.get("num_return_sequences") or config.num_return_sequences or 1
    all_tracked = []
    for index in range(number):
        request = make_request(
            model,
            prompt_ids,
            generation_config,
            seed=None if seed is None else seed + index,
            num_logprobs=0 if return_logprobs else None,
            **kwargs,
        )
        child_id = request_id if index == 0 else f"{request_id}__child#{index - 1}"
        tracked = TrackedRequest(child_id, request)
        if record_timestamps:
            tracked.timestamps = []
            request.on_token = tracked.record_timestamp
        all_tracked.append(tracked)
    return all_tracked


class Phase15ContinuousBatchingManager:
    """
    Answers requests that come and go, in a thread of its own. The methods and results are those of the library's
    `ContinuousBatchingManager`, except that a cancelled request gives a result too.

    ```python
    >>> manager = model.init_continuous_batching(max_batch_size=16)
    >>> manager.start()
    >>> request_id = manager.add_request(prompt_ids, max_new_tokens=64)
    >>> manager.get_result(request_id).generated_tokens
    >>> manager.stop()
    ```

    A server that needs callbacks makes requests by itself, with `manager.processor.request(…)`, and hands them to
    `submit`. They give no results.

    Args:
        processor (`Phase15ContinuousBatchProcessor`): no other thread may call `advance` on it.
        generation_config (`GenerationConfig`, *optional*): of requests; by default the model's.
        return_logprobs (`bool`): return each token's log-probability, in nats.
    """

    def __init__(
        self,
        processor: Phase15ContinuousBatchProcessor,
        generation_config: GenerationConfig | None = None,
        return_logprobs: bool = False,
    ):
        self.processor = processor
        self.generation_config = generation_config
        self.return_logprobs = return_logprobs
        self.is_stopping = False
        self.is_cancelling = False
        self.condition = threading.Condition()  # notified of new requests, and of a stop
        self.thread = self._make_thread()
        self._is_open = False  # from `start` until the thread has delivered its last result
        self._results: deque[GenerationOutput] = deque()
        self._unfinished: dict[str, TrackedRequest] = {}
        self._results_condition = threading.Condition()  # guards the three above and the counter
        self._request_counter = 0

    @property
    def lanes(self) -> Phase15ContinuousBatchProcessor:
        """The name of `processor` before 0.7, for one version."""
        return self.processor

    # the thread

    def _make_thread(self) -> threading.Thread:
        return threading.Thread(target=self._run, name="continuous batching", daemon=True)

    def is_running(self) -> bool:
        """Returns `True` while the thread runs."""
        return self.thread.is_alive()

    def start(self):
        """Starts the thread. Requests that were added before are answered, too."""
        if self.is_running():
            logger.warning("The manager is already running.")
            return
        if self.thread.ident is not None:  # a thread can be started only once
            self.thread = self._make_thread()
        self.is_stopping = False
        self.is_cancelling = False
        self._is_open = True
        self.thread.start()

    def stop(self, block: bool = True, timeout: float | None = None, hard_stop: bool = False):
        """
        Stops the thread when all requests have finished.

        Args:
            block (`bool`): wait for the thread to end.
            timeout (`float`, *optional*): maximum time to wait, in seconds.
            hard_stop (`bool`): cancel the requests, and end after the current chunk.
        """
        with self.condition:
            self.is_stopping = True
            self.is_cancelling = self.is_cancelling or hard_stop
            self.condition.notify()
        if hard_stop:
            self.processor.cancel()
        if block:
            self.join(timeout)

    def join(self, timeout: float | None = None):
        """Waits for the thread to end, at most `timeout` seconds."""
        if self.thread.ident is not None:
            self.thread.join(timeout)
            if self.thread.is_alive():
                logger.warning(f"The manager's thread still runs after {timeout} seconds.")

    def advance(self):
        """Decodes one chunk; only the manager's thread calls this."""
        self.processor.advance()

    def _run(self):
        processor = self.processor
        while True:
            with self.condition:
                while not (self.is_stopping or processor.has_requests):
                    self.condition.wait()
                if self.is_cancelling or not processor.has_requests:
                    break
            try:
                self.advance()
            except Exception as error:  # out of memory, or a bug: the next requests may go well
                logger.exception("All unfinished requests are ended")
                processor.abort(error)
        processor.cancel()  # requests that came after `stop` had looked
        with self._results_condition:
            self._is_open = False
            self._results_condition.notify_all()

    # requests and results

    def submit(self, requests: list[Phase15Request]):
        """Puts all of the requests into the queue, or none, from any thread."""
        for request in requests:
            self.processor.check(request)
        with self.condition:
            for request in requests:
                self.processor.submit(request)
            self.condition.notify()

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        seed: int | None = None,
        **kwargs,
    ) -> str:
        """
        Adds a request, from any thread.

        Args:
            input_ids (`list[int]`): token ids of the prompt.
            request_id (`str`, *optional*): by default "req_0", "req_1", ….
            max_new_tokens, eos_token_id, kwargs: as for `generate`; they override the manager's generation config.
            streaming (`bool`): give a result after every token; the last result has the whole answer.
            record_timestamps (`bool`): record `time.perf_counter()` at each token.
            seed (`int`, *optional*): of sampling; by default drawn from torch's default generator.

        Returns:
            `str`: the id of the request. With `num_return_sequences` the others are "{id}__child#0", ….

        Raises:
            ValueError: for a prompt or settings that cannot be honoured, and for an id that is in use.
            RuntimeError: if the manager is stopping.
        """
        if self.is_stopping:
            raise RuntimeError("The manager is stopping: call `start` before adding requests.")
        if max_new_tokens is not None:
            kwargs["max_new_tokens"] = max_new_tokens
        if eos_token_id is not None:
            kwargs["eos_token_id"] = eos_token_id
        kwargs.setdefault("chunk_length", self.processor.chunk_length)
        with self._results_condition:
            if request_id is None:
                request_id = f"req_{self._request_counter}"
                self._request_counter += 1
        all_tracked = track_requests(
            self.processor.model,
            request_id,
            input_ids,
            self.generation_config,
            record_timestamps=record_timestamps,
            return_logprobs=self.return_logprobs,
            seed=seed,
            name="input_ids",
            **kwargs,
        )
        for tracked in all_tracked:
            self.processor.check(tracked.request)
        with self._results_condition:
            for tracked in all_tracked:
                if tracked.request_id in self._unfinished:
                    raise ValueError(f"`request_id` is {tracked.request_id!r}, which an unfinished request has.")
            for tracked in all_tracked:
                self._unfinished[tracked.request_id] = tracked
        for tracked in all_tracked:
            tracked.request.on_finish = partial(self._deliver, tracked)
            if streaming:
                tracked.request.on_token = partial(self._stream, tracked)
        self.submit([tracked.request for tracked in all_tracked])
        return request_id

    def add_requests(self, inputs: list[list[int]], max_new_tokens: int | None = None, **kwargs) -> list[str]:
        """Adds a request for each prompt, and returns their ids: see `add_request`."""
        return [self.add_request(input_ids, max_new_tokens=max_new_tokens, **kwargs) for input_ids in inputs]

    def cancel_request(self, request_id: str):
        """Ends an unfinished request. Its result has the tokens so far, and `status` FAILED."""
        with self._results_condition:
            tracked = self._unfinished.get(request_id)
        if tracked is not None:
            tracked.request.finish("cancelled")

    def _stream(self, tracked: TrackedRequest, request: Phase15Request):
        if tracked.timestamps is not None:
            tracked.record_timestamp(request)
        self._put_result(tracked.to_generation_output())

    def _deliver(self, tracked: TrackedRequest, request: Phase15Request):
        with self._results_condition:
            # two threads may end a request at once, and it has one final result
            if self._unfinished.pop(tracked.request_id, None) is not None:
                self._put_result(tracked.to_generation_output())

    def _put_result(self, result: GenerationOutput):
        with self._results_condition:
            self._results.append(result)
            self._results_condition.notify_all()

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> GenerationOutput | None:
        """
        Waits for a result and removes it from the queue.

        Args:
            request_id (`str`, *optional*): of the request whose result is returned; by default any.
            timeout (`float`, *optional*): maximum time to wait, in seconds.

        Returns:
            `GenerationOutput` or `None`: `None` if there is no result in time, if the manager does not run, or if no
            unfinished request has this id.
        """
        with self._results_condition:
            self._results_condition.wait_for(partial(self._is_decided, request_id), timeout)
            result = self._find_result(request_id)
            if result is not None:
                self._results.remove(result)
            return result

    def _find_result(self, request_id: str | None) -> GenerationOutput | None:
        for result in self._results:
            if request_id is None or result.request_id == request_id:
                return result
        return None

    def _is_decided(self, request_id: str | None) -> bool:
        """Returns `True` if there is a result, or if none can come."""
        is_known = request_id is None or request_id in self._unfinished
        return self._find_result(request_id) is not None or not self._is_open or not is_known

    def __iter__(self) -> Iterator[GenerationOutput]:
        """Yields results as they come, until the manager has stopped."""
        while True:
            result = self.get_result()
            if result is None:
                return
            yield result

    def request_id_iter(self, request_id: str) -> Iterator[GenerationOutput]:
        """Yields the results of one request, up to its last."""
        while True:
            result = self.get_result(request_id)
            if result is None:
                return
            yield result


class Phase15ContinuousBatchingMixin:
    """
    The library's continuous batching, for a model with `generate`, `step`, `read` and `predict`. It overrides the
    methods that `GenerationMixin` has for paged attention, so it stands before it among the bases of a class.
    """

    def generate_batch(
        self,
        inputs: list[list[int]],
        generation_config: GenerationConfig | None = None,
        continuous_batching_config=None,
        record_timestamps: bool = False,
        progress_bar: bool = False,
        persistent_manager: bool = False,
        warmup: bool = True,
        max_batch_size: int = MAX_BATCH_SIZE,
        compile: bool | None = None,
        return_logprobs: bool = False,
        chunk_length: int | None = None,
        num_lanes: int | None = None,
        state: Phase15State | list[Phase15State] | None = None,
        **kwargs,
    ) -> dict[str, GenerationOutput]:
        r"""
        Overrides the library's continuous batching to decode chunks ([`Phase15ContinuousBatchProcessor`]): prompts of
        different lengths, without padding, and no answer waits for the longest. Its greedy tokens are those of
        `generate`.

        Args:
            inputs (`list[list[int]]`): token ids of the prompts.
            generation_config (`GenerationConfig`, *optional*): as for `generate`; `kwargs` (`max_new_tokens`,
                `do_sample`, …) override it.
            continuous_batching_config (`ContinuousBatchingConfig`, *optional*): `return_logprobs` and
                `max_requests_per_batch` are used; the other fields size pages, which this model does not have.
            record_timestamps (`bool`): record `time.perf_counter()` at each token.
            progress_bar (`bool`): show one.
            persistent_manager, warmup (`bool`): have no effect: nothing is kept, and the first steps warm up.
            max_batch_size (`int`, defaults to 16): maximum number of answers at once. Memory grows with it.
            compile (`bool`, *optional*), chunk_length (`int`, *optional*): as for `generate`.
            return_logprobs (`bool`): return each token's log-probability, in nats.
            num_lanes (`int`, *optional*): the name of `max_batch_size` before 0.7, for one version.
            state (`Phase15State` or `list[Phase15State]`, *optional*): what was read before the prompts: one state of
                one row for all of them, or one for each.

        Returns:
            `dict[str, GenerationOutput]`: by request, in the order of `inputs`: "req_0", "req_1", …; with
            `num_return_sequences` the others of a prompt follow it as "req_0__child#0", …. `generated_tokens` hold the
            end token. Sampling depends only on torch's random state, from which each request draws a seed in this
            order, as the rows of `generate(compile=True)` do.

        Raises:
            ValueError: for a prompt without tokens or with ids outside the vocabulary, by its index; for settings that
                cannot be honoured.
            FloatingPointError: for an LLM whose output is not finite.
        """
        if num_lanes is not None:
            warnings.warn("`num_lanes` is now `max_batch_size`.", FutureWarning, stacklevel=2)
            max_batch_size = num_lanes
        max_batch_size = configured(continuous_batching_config, "max_requests_per_batch", max_batch_size)
        return_logprobs = return_logprobs or configured(continuous_batching_config, "return_logprobs", False)
        chunk_length = self.config.resolve_chunk_length(chunk_length, generation_config, self.generation_config)
        states = state if isinstance(state, list) else [state] * len(inputs)
        if len(states) != len(inputs):
            raise ValueError(f"`state` has {len(states)} states, but there are {len(inputs)} `inputs`.")
        all_tracked = []
        for index, prompt_ids in enumerate(inputs):
            all_tracked += track_requests(
                self,
                f"req_{index}",
                prompt_ids,
                generation_config,
                record_timestamps=record_timestamps,
                return_logprobs=return_logprobs,
                name=f"inputs[{index}]",
                chunk_length=chunk_length,
                state=states[index],
                **kwargs,
            )
        max_batch_size = min(max_batch_size, max(len(all_tracked), 1))
        processor = Phase15ContinuousBatchProcessor(self, max_batch_size, compile, chunk_length=chunk_length)
        requests = [tracked.request for tracked in all_tracked]
        answer_all(processor, requests, progress_bar)
        for request in requests:
            if request.error is not None:
                raise request.error
        return {tracked.request_id: tracked.to_generation_output() for tracked in all_tracked}

    def init_continuous_batching(
        self,
        generation_config: GenerationConfig | None = None,
        continuous_batching_config=None,
        workload_hints=None,
        max_batch_size: int = MAX_BATCH_SIZE,
        compile: bool | None = None,
        max_kept_conversations: int = 0,
        chunk_length: int | None = None,
    ) -> Phase15ContinuousBatchingManager:
        """
        Overrides the library to return a manager that decodes chunks; `start` it.

        Args:
            generation_config (`GenerationConfig`, *optional*): of the requests; by default the model's.
            continuous_batching_config (`ContinuousBatchingConfig`, *optional*), max_batch_size (`int`): as for
                `generate_batch`.
            workload_hints: has no effect: the library sizes pages by it.
            compile, max_kept_conversations, chunk_length: see [`Phase15ContinuousBatchProcessor`].
        """
        max_batch_size = configured(continuous_batching_config, "max_requests_per_batch", max_batch_size)
        return_logprobs = configured(continuous_batching_config, "return_logprobs", False)
        chunk_length = self.config.resolve_chunk_length(chunk_length, generation_config, self.generation_config)
        processor = Phase15ContinuousBatchProcessor(
            self, max_batch_size, compile, max_kept_conversations, chunk_length
        )
        return Phase15ContinuousBatchingManager(processor, generation_config, return_logprobs)

    @contextmanager
    def continuous_batching_context_manager(
        self,
        generation_config: GenerationConfig | None = None,
        block: bool = True,
        timeout: float | None = None,
        continuous_batching_config=None,
        persistent_manager: bool = False,
        warmup: bool = True,
        workload_hints=None,
        **kwargs,
    ) -> Iterator[Phase15ContinuousBatchingManager]:
        """
        Overrides the library: a started manager, which is stopped at the end, when all requests have finished.

        Args:
            block, timeout: see [`Phase15ContinuousBatchingManager.stop`].
            persistent_manager, warmup (`bool`): have no effect, as in `generate_batch`.
            generation_config, continuous_batching_config, workload_hints, kwargs: see `init_continuous_batching`.
        """
        manager = self.init_continuous_batching(
            generation_config, continuous_batching_config, workload_hints, **kwargs
        )
        manager.start()
        try:
            yield manager
        finally:
            manager.stop(block, timeout)

    def open_lanes(
        self,
        num_lanes: int = MAX_BATCH_SIZE,
        compile: bool | None = None,
        max_kept_conversations: int = 0,
        chunk_length: int | None = None,
    ) -> "Phase15LaneThread":
        """The name of `init_continuous_batching` before 0.7, for one version."""
        warnings.warn("`open_lanes` is now `init_continuous_batching`.", FutureWarning, stacklevel=2)
        processor = Phase15ContinuousBatchProcessor(self, num_lanes, compile, max_kept_conversations, chunk_length)
        return Phase15LaneThread(processor)


def configured(continuous_batching_config, name: str, default):
    """Returns a field of a `ContinuousBatchingConfig`, or the default if there is no config or no value."""
    value = getattr(continuous_batching_config, name, None)
    return default if value is None else value


def answer_all(processor: Phase15ContinuousBatchProcessor, requests: list[Phase15Request], progress_bar: bool):
    """Submits requests and advances the processor until all have finished."""
    for request in requests:
        processor.submit(request)
    with logging.tqdm(total=len(requests), desc="Answering", unit="request", disable=not progress_bar) as bar:
        num_shown = 0
        is_unfinished = bool(requests)
        while is_unfinished:
            is_unfinished = processor.advance()
            num_finished = sum(request.finish_reason is not None for request in requests)
            bar.update(num_finished - num_shown)
            num_shown = num_finished


# names before 0.7, for one version

Phase15Lanes = Phase15ContinuousBatchProcessor
NUM_LANES = MAX_BATCH_SIZE


class Phase15LaneThread(Phase15ContinuousBatchingManager):
    """A manager whose `stop` is a hard stop."""

    @property
    def news(self) -> threading.Condition:
        return self.condition

    def stop(self):
        super().stop(hard_stop=True)


__all__ = [
    "MAX_BATCH_SIZE",
    "NUM_LANES",
    "LaneCounts",
    "Phase15ContinuousBatchProcessor",
    "Phase15ContinuousBatchingManager",
    "Phase15ContinuousBatchingMixin",
    "Phase15LaneThread",
    "Phase15Lanes",
]
