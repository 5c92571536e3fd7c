# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Between the event loop of a server and the thread of its lanes: [`LaneWorker`] advances the lanes and limits the
waiting queue, [`Call`] awaits the answers to one API call, and [`Metrics`] counts for /metrics.
"""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from transformers import PreTrainedTokenizerBase

from phase15.model.continuous_batching_phase15 import (
    LaneCounts,
    Phase15ContinuousBatchingManager,
    Phase15ContinuousBatchProcessor,
)
from phase15.model.requests_phase15 import Phase15Request
from phase15.serving.states import StateStore
from phase15.serving.text_stream import Choice, Piece, TextStream


RATE_SECONDS = 10.0  # period of the tokens per second in /metrics
FIRST_TOKEN_BUCKETS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100, 300]  # seconds


class LanesBusyError(Exception):
    """The waiting queue is full."""


class StoppingError(Exception):
    """The server stopped before the answer was finished."""


class Metrics:
    """
    Metrics of a server, in the types of the Prometheus client.

    Args:
        lanes (`Phase15ContinuousBatchProcessor`): lanes of the server.
        store (`StateStore`, *optional*): its states.
    """

    def __init__(self, lanes: Phase15ContinuousBatchProcessor, store: StateStore | None = None):
        self.registry = CollectorRegistry()
        self.requests = self._counter("phase15_requests", "Finished answers, by finish reason.", ["reason"])
        self.prompt_tokens = self._counter("phase15_prompt_tokens", "Tokens of the prompts that got a lane.")
        self.kept_tokens = self._counter("phase15_kept_tokens", "Prompt tokens read by a kept conversation.")
        self.tokens = self._counter("phase15_generated_tokens", "Generated tokens.")
        self.first_token = Histogram(
            "phase15_first_token_seconds",
            "Seconds from a request to its first token.",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self._gauge("phase15_lanes", "Number of lanes.", lambda: lanes.num_lanes)
        self._gauge(
            "phase15_lanes_in_use",
            "Lanes with an unfinished answer.",
            lambda: num_active(lane.request for lane in lanes.lanes),
        )
        self._gauge("phase15_requests_waiting", "Requests without a lane.", lambda: num_active(lanes.waiting))
        self._gauge("phase15_kept_conversations", "Kept conversations.", lambda: len(lanes.kept.states))
        if store is not None:
            self._gauge("phase15_states", "States in memory.", lambda: len(store.states))
            self._gauge("phase15_state_bytes", "Bytes of the states in memory.", lambda: store.num_bytes)
        self._gauge("phase15_tokens_per_second", f"Mean of the last {RATE_SECONDS:.0f} seconds.", self.rate)
        self.recent: deque[tuple[float, int]] = deque()  # time and number of tokens of each call of `advance`

    def _counter(self, name: str, description: str, labels: Iterable[str] = ()) -> Counter:
        return Counter(name, description, labels, registry=self.registry)

    def _gauge(self, name: str, description: str, value: Callable[[], float]):
        Gauge(name, description, registry=self.registry).set_function(value)

    def count(self, before: LaneCounts, after: LaneCounts):
        """Adds the difference between the counts of the lanes before and after one call of `advance`."""
        num_generated = after.generated_tokens - before.generated_tokens
        self.prompt_tokens.inc(after.prompt_tokens - before.prompt_tokens)
        self.kept_tokens.inc(after.kept_tokens - before.kept_tokens)
        self.tokens.inc(num_generated)
        self.recent.append((time.monotonic(), num_generated))
        period_start = time.monotonic() - RATE_SECONDS
        while self.recent[0][0] < period_start:
            self.recent.popleft()

    def rate(self) -> float:
        """Returns the tokens per second of the last `RATE_SECONDS`."""
        period_start = time.monotonic() - RATE_SECONDS
        recent = list(self.recent)  # a copy, since the thread of the lanes appends
        return sum(number for moment, number in recent if moment >= period_start) / RATE_SECONDS


def num_active(requests: Iterable[Phase15Request]) -> int:
    """Returns the number of unfinished requests."""
    requests = list(requests)  # a copy, since the thread of the lanes adds and removes requests
    return sum(request.finish_reason is None for request in requests)


class LaneWorker(Phase15ContinuousBatchingManager):
    """
    Thread that advances lanes, with metrics and a waiting queue of limited length.

    Args:
        lanes (`Phase15ContinuousBatchProcessor`): lanes of the served model.
        max_waiting (`int`): maximum number of requests that wait for a lane.
        store (`StateStore`, *optional*): states of the server, for its metrics.
    """

    def __init__(self, lanes: Phase15ContinuousBatchProcessor, max_waiting: int, store: StateStore | None = None):
        super().__init__(lanes)
        self.max_waiting = max_waiting
        self.metrics = Metrics(lanes, store)
        self.active: list[Phase15Request] = []

    def submit(self, requests: list[Phase15Request]):
        """
        Puts either all requests into the queue, or none.

        Raises:
            LanesBusyError: if more than `max_waiting` requests would wait.
        """
        for request in requests:
            self.lanes.check(request)
        with self.condition:
            self.active = [request for request in self.active if request.finish_reason is None]
            if len(self.active) + len(requests) > self.max_waiting + self.lanes.num_lanes:
                raise LanesBusyError
            self.active += requests
            super().submit(requests)

    def stop(self):
        """Cancels unfinished requests, and waits for the current chunk."""
        super().stop(hard_stop=True)

    def advance(self):
        before = self.lanes.counts
        try:
            super().advance()
        finally:
            self.metrics.count(before, self.lanes.counts)


class Call:
    """
    The answers to one API call. Must be created in the event loop that reads them.

    Args:
        worker (`LaneWorker`): thread that answers the requests.
        requests (`list[Phase15Request]`): one request for each choice.
        tokenizer (`PreTrainedTokenizerBase`): tokenizer of the served model.
        stops (`list[str]`): stop strings.
        is_streamed (`bool`): wake the reader after each token, not only at the end of an answer.
    """

    def __init__(
        self,
        worker: LaneWorker,
        requests: list[Phase15Request],
        tokenizer: PreTrainedTokenizerBase,
        stops: list[str],
        is_streamed: bool,
    ):
        self.worker = worker
        self.start_time = time.perf_counter()
        self.choices = [Choice(index, request, TextStream(tokenizer, stops)) for index, request in enumerate(requests)]
        self.news = asyncio.Event()
        self.loop = asyncio.get_running_loop()
        for request in requests:
            request.on_finish = self._on_finish
            if is_streamed or stops:  # a stop string must be found while the lane generates
                request.on_token = self._wake
        worker.submit(requests)

    def _wake(self, request: Phase15Request):
        """Wakes the reader, from the thread of the lanes."""
        with suppress(RuntimeError):  # the loop is closed, so nobody reads the answer
            self.loop.call_soon_threadsafe(self.news.set)

    def _on_finish(self, request: Phase15Request):
        self.worker.metrics.requests.labels(request.finish_reason).inc()
        self._wake(request)

    async def pieces(self) -> AsyncIterator[Piece]:
        """
        Yields the pieces of all choices, until the last choice is finished.

        Raises:
            Exception: the error of a request that failed.
            StoppingError: if the server stops.
        """
        active = list(self.choices)
        try:
            while active:
                await self.news.wait()
                self.news.clear()
                for choice in list(active):  # a copy, since finished choices are removed
                    is_first = choice.num_taken == 0
                    piece = choice.take()
                    if piece is None:
                        continue
                    if choice.request.error is not None:
                        raise choice.request.error
                    if piece.finish_reason == "cancelled":
                        raise StoppingError
                    if is_first and choice.num_taken:
                        self.worker.metrics.first_token.observe(time.perf_counter() - self.start_time)
                    if piece.finish_reason is not None:
                        active.remove(choice)
                    yield piece
        finally:
            self.cancel()

    def cancel(self):
        """Ends unfinished requests. Their lanes are free at the next chunk boundary."""
        for choice in self.choices:
            choice.request.finish("cancelled")

    @property
    def num_tokens(self) -> int:
        """Returns the number of tokens read from all choices."""
        return sum(choice.num_taken for choice in self.choices)


__all__ = ["Call", "LaneWorker", "LanesBusyError", "StoppingError"]
