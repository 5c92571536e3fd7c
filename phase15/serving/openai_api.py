# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
OpenAI's API over lanes: /v1/chat/completions, /v1/completions, /v1/models, and /health and /metrics.
"""

import asyncio
import hmac
import json
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import torch
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from fastapi.sse import EventSourceResponse, format_sse_event
from openai.types import Completion, CompletionChoice, CompletionUsage, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk, chat_completion, chat_completion_chunk
from openai.types.chat.chat_completion_token_logprob import ChatCompletionTokenLogprob
from openai.types.completion_choice import Logprobs
from openai.types.completion_usage import PromptTokensDetails
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from transformers import LogitsProcessorList, PreTrainedTokenizerBase
from transformers.utils import logging

from phase15.loading import load_served
from phase15.model.continuous_batching_phase15 import Phase15Lanes
from phase15.model.modeling_phase15 import Phase15ForCausalLM
from phase15.model.requests_phase15 import Phase15Request, request_of
from phase15.serving.arguments import Phase15ServerArguments
from phase15.serving.openai_requests import ApiError, Asked, asked_of, chat_ids, messages_of, prompts_of
from phase15.serving.worker import Call, LanesBusyError, LaneWorker, Piece, StoppingError, TokenPenalties


logger = logging.get_logger("transformers.phase15.serve")


class Server:
    """
    The answers of one model.

    Args:
        model (`Phase15ForCausalLM`), tokenizer (`PreTrainedTokenizerBase`): the served model.
        arguments (`Phase15ServerArguments`): its name, lanes and limits.
    """

    def __init__(
        self, model: Phase15ForCausalLM, tokenizer: PreTrainedTokenizerBase, arguments: Phase15ServerArguments
    ):
        self.model, self.tokenizer, self.arguments, self.key = model, tokenizer, arguments, arguments.read_key()
        tokenizer("")  # may change the tokenizer's state, once; then threads can share it
        settings = arguments.num_lanes, arguments.compile, arguments.max_kept_conversations, arguments.chunk_length
        lanes = Phase15Lanes(model, *settings)
        self.worker = LaneWorker(lanes, arguments.max_waiting)

    @classmethod
    def load(cls, arguments: Phase15ServerArguments) -> "Server":
        """Loads the model, and says in the log what its lanes take."""
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"`device` is {device!r}: {str(error).splitlines()[0]}") from error
        arguments.read_key()  # refuse a missing one before the weights are read
        model, tokenizer = load_served(arguments.name, arguments.dtype, arguments.revision, arguments.chunk_length)
        server = cls(model.to(device).eval(), tokenizer, arguments)
        num_slots, text = model.config.num_soft_tokens, model.config.text_config
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        column = 2 * text.num_hidden_layers * text.num_key_value_heads * head_dim
        kept = num_slots * text.hidden_size * model.dtype.itemsize
        length = server.worker.lanes.chunk_length
        lane = kept + (num_slots + length) * column * model.dtype.itemsize
        logger.warning(
            f"{arguments.name} on {device}: {arguments.num_lanes} lanes of {lane / 2**20:,.1f} MB, chunks of {length} "
            f"tokens, and up to {arguments.max_kept_conversations} kept conversations of "
            f"{kept / 2**20:,.2f} MB, at any length."
        )
        return server

    async def start(self):
        self.worker.start()

    async def stop(self):
        await run_in_threadpool(self.worker.stop)

    def is_alive(self) -> bool:
        return self.worker.thread.is_alive()

    def metrics(self) -> bytes:
        """In Prometheus' text format."""
        return generate_latest(self.worker.metrics.registry)

    async def open(self, body: dict, kind: str) -> "Answer":
        """
        Asks for the answers to the body of a request; `kind` is "chat" or "text".

        Raises:
            ApiError: for what cannot be honoured, and when too many requests wait.
        """
        check_model(body, self.arguments.name)
        asked, requests = await run_in_threadpool(self.prepare, body, kind)
        try:
            call = Call(self.worker, requests, self.tokenizer, asked.stops, asked.is_streamed)
        except LanesBusyError:
            raise busy(self.arguments) from None
        return Answer(kind, asked, call, self.tokenizer, self.arguments.name)

    def prepare(self, body: dict, kind: str) -> tuple[Asked, list[Phase15Request]]:
        """The requests that a body asks for, one for each choice of each prompt."""
        vocab_size = self.model.config.text_config.vocab_size
        asked = asked_of(body, kind, self.arguments, self.model.generation_config, vocab_size)
        if kind == "chat":
            asked.prompts = [chat_ids(messages_of(body), self.tokenizer)]
        else:
            asked.prompts = prompts_of(body, self.tokenizer)
        param, most = ("messages" if kind == "chat" else "prompt"), self.arguments.max_prompt_tokens
        for prompt in asked.prompts:
            if len(prompt) > most:
                reason = f"the prompt has {len(prompt):,} tokens, but this server reads {most:,} at most."
                raise ApiError(reason, param, code="context_length_exceeded")
        number = len(asked.prompts) * asked.n
        if number > self.arguments.num_lanes + self.arguments.max_waiting:
            raise ApiError(f"{number} answers are asked for at once: ask for fewer.", param)
        return asked, [self.request(asked, prompt, index) for prompt in asked.prompts for index in range(asked.n)]

    def request(self, asked: Asked, prompt: list[int], index: int) -> Phase15Request:
        """One choice of the answer to a prompt."""
        settings = dict(asked.settings)
        if any(asked.penalties):
            settings["logits_processor"] = LogitsProcessorList([TokenPenalties(len(prompt), *asked.penalties)])
        try:
            request = request_of(
                self.model,
                prompt,
                seed=None if asked.seed is None else (asked.seed + index) % 2**63,
                num_logprobs=asked.num_logprobs,
                name="prompt",
                pad_token_id=0,
                **settings,
            )
        except ValueError as error:
            raise ApiError(str(error)) from error
        if asked.ignores_end:
            request.eos_token_ids = frozenset()
        return request


class Answer:
    """
    The answer to one request, as OpenAI's types.

    Args:
        kind (`str`): "chat" or "text".
        asked (`Asked`): what the request asked for.
        call (`Call`): its choices.
        tokenizer (`PreTrainedTokenizerBase`), name (`str`): of the served model.
    """

    def __init__(self, kind: str, asked: Asked, call: Call, tokenizer: PreTrainedTokenizerBase, name: str):
        self.asked, self.call, self.tokenizer = asked, call, tokenizer
        self.is_chat, self.is_streamed = kind == "chat", asked.is_streamed
        self.head = {
            "id": f"{'chatcmpl' if self.is_chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": name,
        }
        if self.is_chat:
            self.head["object"] = "chat.completion.chunk" if self.is_streamed else "chat.completion"

    def cancel(self):
        """Frees the lanes at the next boundary."""
        self.call.cancel()

    async def events(self) -> AsyncIterator[str]:
        """JSON: the chunks of a streamed answer, or the whole answer."""
        if not self.is_streamed:
            yield (await self.whole()).model_dump_json(exclude_unset=True)
            return
        made, usage = ChatCompletionChunk if self.is_chat else Completion, {}
        async for choice in self.chunks():
            if self.asked.includes_usage:
                usage = {"usage": self.usage() if self.asked.repeats_usage else None}
            yield made(choices=[choice], **self.head, **usage).model_dump_json(exclude_unset=True)
        if self.asked.includes_usage:
            yield made(choices=[], **self.head, usage=self.usage()).model_dump_json(exclude_unset=True)

    async def whole(self) -> ChatCompletion | Completion:
        pieces: list[list[Piece]] = [[] for _ in self.call.choices]
        async for piece in self.call.pieces():
            pieces[piece.index].append(piece)
        choices = []
        for index, parts in enumerate(pieces):
            text, reason = "".join(part.text for part in parts), parts[-1].finish_reason
            if self.is_chat:
                choice = chat_completion.Choice(
                    index=index,
                    message={"role": "assistant", "content": text, "refusal": None},
                    logprobs=self.chat_logprobs(parts),
                    finish_reason=reason,
                )
            else:
                logprobs = self.text_logprobs(parts, 0)
                choice = CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason)
            choices.append(choice)
        made = ChatCompletion if self.is_chat else Completion
        return made(choices=choices, usage=self.usage(), **self.head)

    async def chunks(self) -> AsyncIterator[chat_completion_chunk.Choice | CompletionChoice]:
        lengths = [0] * len(self.call.choices)
        if self.is_chat:
            for choice in self.call.choices:
                yield chat_chunk(choice.index, {"role": "assistant", "content": ""}, None, None)
        async for piece in self.call.pieces():
            if not (piece.text or piece.finish_reason) and self.asked.num_logprobs is None:
                continue  # what was said is held back
            if self.is_chat:
                delta = {"content": piece.text} if piece.text or piece.tokens else {}
                yield chat_chunk(piece.index, delta, self.chat_logprobs([piece]), piece.finish_reason)
            else:
                yield CompletionChoice.model_construct(  # its finish_reason may not be null, but in a stream it is
                    index=piece.index,
                    text=piece.text,
                    logprobs=self.text_logprobs([piece], lengths[piece.index]),
                    finish_reason=piece.finish_reason,
                )
                lengths[piece.index] += len(piece.text)

    def usage(self) -> CompletionUsage:
        prompt_tokens = sum(map(len, self.asked.prompts))  # each prompt counts once, whatever `n`
        kept = sum(choice.request.num_kept_tokens for choice in self.call.choices[:: self.asked.n])
        return CompletionUsage(
            prompt_tokens=prompt_tokens,
            completion_tokens=self.call.num_tokens,
            total_tokens=prompt_tokens + self.call.num_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=kept),
        )

    def token_text(self, token: int) -> str:
        return self.tokenizer.decode([token], clean_up_tokenization_spaces=False)

    def token_logprob(self, token: int, logprob: float) -> dict:
        text = self.token_text(token)
        return {"token": text, "bytes": list(text.encode()), "logprob": logprob}

    def chat_logprobs(self, pieces: list[Piece]) -> dict | None:
        """`ChoiceLogprobs` of a choice's pieces."""
        if self.asked.num_logprobs is None:
            return None
        content = []
        for piece in pieces:
            for token, logprob, likeliest in zip(piece.tokens, piece.logprobs, piece.top_logprobs, strict=True):
                top = [self.token_logprob(*pair) for pair in likeliest]
                content.append(ChatCompletionTokenLogprob(**self.token_logprob(token, logprob), top_logprobs=top))
        return {"content": content, "refusal": None}

    def text_logprobs(self, pieces: list[Piece], offset: int) -> Logprobs | None:
        """Of a choice's pieces, the first of which begins at character `offset` of the text."""
        if self.asked.num_logprobs is None:
            return None
        tokens = [self.token_text(token) for piece in pieces for token in piece.tokens]
        likeliest = [pairs for piece in pieces for pairs in piece.top_logprobs]
        return Logprobs(
            tokens=tokens,
            token_logprobs=[logprob for piece in pieces for logprob in piece.logprobs],
            top_logprobs=[{self.token_text(token): logprob for token, logprob in pairs} for pairs in likeliest],
            text_offset=[offset + sum(map(len, tokens[:index])) for index in range(len(tokens))],
        )


def chat_chunk(index: int, delta: dict, logprobs: dict | None, reason: str | None) -> chat_completion_chunk.Choice:
    return chat_completion_chunk.Choice(index=index, delta=delta, logprobs=logprobs, finish_reason=reason)


def check_model(body: dict, name: str):
    """Raises an ApiError for another model."""
    if body.get("model") not in (None, name):
        message = f"the model {body['model']!r:.80} does not exist; this server has {name!r}."
        raise ApiError(message, "model", 404, "model_not_found")


def busy(arguments: Phase15ServerArguments) -> ApiError:
    headers = {"Retry-After": str(arguments.retry_after)}
    message = f"{arguments.max_waiting} requests wait already: try again later."
    return ApiError(message, status=429, code="rate_limit_exceeded", **headers)


def error_of(error: Exception) -> ApiError:
    """Any error that ended an answer, in OpenAI's form."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, StoppingError):
        return ApiError("the server stops.", status=503, code="server_stopping")
    return ApiError(f"{type(error).__name__}: {error}", status=500)


async def read_body(request: Request, most: int) -> dict:
    """A request's JSON object, of no more bytes than allowed."""
    too_large = ApiError(f"the body has more than {most:,} bytes.", status=413)
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length) > most:
        raise too_large
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > most:
            raise too_large
    try:
        found = json.loads(body)
        json.dumps(found, ensure_ascii=False).encode()  # half of a surrogate pair is no text
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ApiError(f"the body is a JSON {type(found).__name__}, but it must be an object.")
    return found


async def cancel_without_client(request: Request, answer: Answer):
    """Frees the lanes of a client that leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    answer.cancel()


async def stream(answer: Answer) -> AsyncIterator[bytes]:
    """Server-sent events of a streamed answer."""
    try:
        async for text in answer.events():
            yield format_sse_event(data_str=text)
    except Exception as error:  # the status has been sent already
        yield format_sse_event(data_str=json.dumps(error_of(error).body))
    yield format_sse_event(data_str="[DONE]")


def build_app(server: Server) -> FastAPI:
    """The ASGI application of a server, which starts and stops with it."""

    @asynccontextmanager
    async def lifespan(_):
        await server.start()
        yield
        await server.stop()

    app = FastAPI(title="Phase15", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    key, watching, name = server.key, set(), server.arguments.name
    model = Model(id=name, created=int(time.time()), object="model", owned_by="phase15").model_dump()

    def check_key(request: Request):
        given = request.headers.get("authorization", "")
        if key and not hmac.compare_digest(given.encode(), f"Bearer {key}".encode()):
            raise ApiError("the API key is missing or wrong.", status=401, code="invalid_api_key")

    async def respond(request: Request, kind: str) -> Response:
        check_key(request)
        body = await read_body(request, server.arguments.max_body_bytes)
        answer = await server.open(body, kind)
        watcher = asyncio.create_task(cancel_without_client(request, answer))
        watching.add(watcher)  # the loop itself keeps no task alive
        watcher.add_done_callback(watching.discard)
        if answer.is_streamed:
            return EventSourceResponse(stream(answer))
        try:
            (text,) = [text async for text in answer.events()]
        finally:
            watcher.cancel()
        return Response(text, media_type="application/json")

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await respond(request, "chat")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await respond(request, "text")

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        check_key(request)
        return JSONResponse({"object": "list", "data": [model]})

    @app.get("/v1/models/{model_id:path}")
    async def one_model(request: Request, model_id: str) -> Response:
        check_key(request)
        check_model({"model": model_id}, name)
        return JSONResponse(model)

    @app.get("/health")
    async def health() -> Response:
        is_alive = server.is_alive()
        return JSONResponse({"status": "ok" if is_alive else "stopped"}, 200 if is_alive else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        check_key(request)
        return Response(server.metrics(), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(HTTPException)
    async def not_served(_, error: HTTPException) -> Response:
        return ApiError(error.detail, status=error.status_code).response()

    @app.exception_handler(Exception)
    async def failed(_, error: Exception) -> Response:
        return error_of(error).response()

    for kind in (ApiError, StoppingError):
        app.add_exception_handler(kind, failed)
    # the client left before its request was whole: nobody reads this
    app.add_exception_handler(ClientDisconnect, lambda *_: Response(status_code=400))
    return app


__all__ = ["Server", "build_app", "busy", "error_of"]
