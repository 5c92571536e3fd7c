# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Answers as text for many clients at once: a thread that advances the lanes, and their tokens in an event loop."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable
from contextlib import suppress
from typing import NamedTuple

import torch
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from transformers import LogitsProcessor, PreTrainedTokenizerBase

from phase15.model.continuous_batching_phase15 import LaneCounts, Phase15Lanes, Phase15LaneThread
from phase15.model.requests_phase15 import Phase15Request
from phase15.serving.text_stream import TextStream


RATE_SECONDS = 10.0  # over which tokens per second are counted


class LanesBusyError(Exception):
    """As many requests wait as may."""


class StoppingError(Exception):
    """The server stops, and did not wait for this answer."""


class Metrics:
    """What /metrics shows, in Prometheus' own types."""

    def __init__(self, lanes: Phase15Lanes):
        self.registry = CollectorRegistry()
        here = {"registry": self.registry}
        self.requests = Counter("phase15_requests", "Answers that ended, by how.", ["reason"], **here)
        self.prompt_tokens = Counter("phase15_prompt_tokens", "Tokens of the queries that got a lane.", **here)
        self.kept_tokens = Counter("phase15_kept_tokens", "Those that a kept conversation had read.", **here)
        self.tokens = Counter("phase15_generated_tokens", "Tokens said.", **here)
        buckets = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]
        self.first_token = Histogram(
            "phase15_first_token_seconds", "From a request to its first token.", buckets=buckets, **here
        )
        for name, about, value in (
            ("phase15_lanes", "Lanes that there are.", lambda: lanes.num_lanes),
            (
                "phase15_lanes_in_use",
                "Lanes with an answer under way.",
                lambda: num_going_on(lane.request for lane in lanes.lanes),
            ),
            ("phase15_requests_waiting", "Requests without a lane.", lambda: num_going_on(lanes.waiting)),
            ("phase15_kept_conversations", "Soft prompts kept after their answers.", lambda: len(lanes.kept.states)),
            ("phase15_tokens_per_second", f"Over the last {RATE_SECONDS:.0f} seconds.", self.rate),
        ):
            Gauge(name, about, **here).set_function(value)
        self.times: deque[tuple[float, int]] = deque()

    def count(self, before: LaneCounts, after: LaneCounts):
        """What one call of `advance` has done."""
        new = LaneCounts(*(b - a for a, b in zip(before, after, strict=True)))
        self.prompt_tokens.inc(new.prompt_tokens)
        self.kept_tokens.inc(new.kept_tokens)
        self.tokens.inc(new.generated_tokens)
        self.times.append((time.monotonic(), new.generated_tokens))
        self.forget()

    def rate(self) -> float:
        self.forget()
        return sum(number for _, number in list(self.times)) / RATE_SECONDS

    def forget(self):
        before = time.monotonic() - RATE_SECONDS
        while self.times and self.times[0][0] < before:
            self.times.popleft()


def num_going_on(requests: Iterable[Phase15Request]) -> int:
    return sum(request.finish_reason is None for request in list(requests))


class LaneWorker(Phase15LaneThread):
    """
    A thread that advances lanes, counts what they do, and lets no more requests wait than may.

    Args:
        lanes (`Phase15Lanes`): of the served model.
        max_waiting (`int`): requests that may wait for a lane.
    """

    def __init__(self, lanes: Phase15Lanes, max_waiting: int):
        super().__init__(lanes)
        self.max_waiting, self.metrics = max_waiting, Metrics(lanes)
        self.going_on: list[Phase15Request] = []

    def submit(self, requests: list[Phase15Request]):
        """
        Puts all of the requests into the queue, or none.

        Raises:
            LanesBusyError: if more would wait than may.
        """
        for request in requests:
            self.lanes.check(request)
        with self.news:
            self.going_on = [request for request in self.going_on if request.finish_reason is None]
            if len(self.going_on) + len(requests) > self.max_waiting + self.lanes.num_lanes:
                raise LanesBusyError
            self.going_on += requests
            super().submit(requests)

    def advance(self):
        before = self.lanes.counts
        try:
            super().advance()
        finally:
            self.metrics.count(before, self.lanes.counts)


class Piece(NamedTuple):
    """A part of an answer: text, the tokens since the last piece, and at the end why it ended."""

    index: int
    text: str
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    finish_reason: str | None


class Choice:
    """One of the answers to a call."""

    def __init__(self, index: int, request: Phase15Request, stream: TextStream):
        self.index, self.request, self.stream, self.num_taken = index, request, stream, 0

    def take(self) -> Piece | None:
        """What is new since the last piece, if there is something."""
        request, first, text = self.request, self.num_taken, ""
        reason = request.finish_reason  # read first: no token comes after it
        for token in request.generated_tokens[first:]:
            self.num_taken += 1
            text += self.stream.add(token)
            if self.stream.is_stopped:
                reason = "stop"
                request.finish(reason)
                break
        if reason is not None:
            text += self.stream.close()
        elif not text:
            return None if self.num_taken == first else self._piece(first, text, reason)
        return self._piece(first, text, reason)

    def _piece(self, first: int, text: str, reason: str | None) -> Piece:
        new = slice(first, self.num_taken)
        request = self.request
        return Piece(
            self.index, text, request.generated_tokens[new], request.logprobs[new], request.top_logprobs[new], reason
        )


class Call:
    """
    The answers to one call of the API. Made in the event loop that reads them.

    Args:
        worker (`LaneWorker`): answers the requests.
        requests (`list[Phase15Request]`): one for each choice.
        tokenizer (`PreTrainedTokenizerBase`): of the served model.
        stops (`list[str]`): end the text of each.
        is_streamed (`bool`): wake the reader at each token, not at the end alone.
    """

    def __init__(
        self,
        worker: LaneWorker,
        requests: list[Phase15Request],
        tokenizer: PreTrainedTokenizerBase,
        stops: list[str],
        is_streamed: bool,
    ):
        self.worker, self.begun = worker, time.perf_counter()
        self.choices = [Choice(index, request, TextStream(tokenizer, stops)) for index, request in enumerate(requests)]
        self.news, loop = asyncio.Event(), asyncio.get_running_loop()

        def wake(_):
            with suppress(RuntimeError):  # the loop has been closed, and nobody reads
                loop.call_soon_threadsafe(self.news.set)

        def finish(request):
            worker.metrics.requests.labels(request.finish_reason).inc()
            wake(request)

        for request in requests:
            request.on_finish = finish
            if is_streamed or stops:
                request.on_token = wake
        worker.submit(requests)

    async def pieces(self) -> AsyncIterator[Piece]:
        """
        All pieces of all choices, until the last has ended.

        Raises:
            Exception: that of a request that failed.
            StoppingError: when the server stops.
        """
        going_on, metrics = list(self.choices), self.worker.metrics
        try:
            while going_on:
                await self.news.wait()
                self.news.clear()
                for choice in list(going_on):
                    is_first = not choice.num_taken
                    piece = choice.take()
                    if piece is None:
                        continue
                    if choice.request.error is not None:
                        raise choice.request.error
                    if piece.finish_reason == "cancelled":
                        raise StoppingError
                    if is_first and choice.num_taken:
                        metrics.first_token.observe(time.perf_counter() - self.begun)
                    if piece.finish_reason is not None:
                        going_on.remove(choice)
                    yield piece
        finally:
            self.cancel()

    def cancel(self):
        """Frees the lanes of what has not ended at the next boundary."""
        for choice in self.choices:
            choice.request.finish("cancelled")

    @property
    def num_tokens(self) -> int:
        """Of all choices so far."""
        return sum(choice.num_taken for choice in self.choices)


class TokenPenalties(LogitsProcessor):
    """
    OpenAI's `presence_penalty` and `frequency_penalty`: subtracted from the score of each token of the answer so far,
    once, and as often as it was said.
    """

    def __init__(self, prompt_length: int, presence: float, frequency: float):
        self.prompt_length, self.presence, self.frequency = prompt_length, presence, frequency

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        said = input_ids[:, self.prompt_length :]
        counts = torch.zeros_like(scores).scatter_add(1, said, torch.ones_like(said, dtype=scores.dtype))
        return scores - self.presence * (counts > 0) - self.frequency * counts


__all__ = ["Call", "LaneWorker", "LanesBusyError", "Piece", "StoppingError", "TokenPenalties"]
