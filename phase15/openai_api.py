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

from lanes_phase15 import Phase15Lanes
from modeling_phase15 import Phase15ForCausalLM
from phase15.openai_requests import ApiError, Asked, asked_of, chat_ids, messages_of, prompts_of
from phase15.serving import (
    Call,
    LanesBusyError,
    LaneWorker,
    Phase15ServerArguments,
    Piece,
    StoppingError,
    TokenPenalties,
)
from requests_phase15 import request_of


class Server:
    """
    The answers of one model.

    Args:
        model (`Phase15ForCausalLM`), tokenizer (`PreTrainedTokenizerBase`): the served model.
        name (`str`): of the model, in requests and answers.
        arguments (`Phase15ServerArguments`): lanes and limits.
    """

    def __init__(
        self,
        model: Phase15ForCausalLM,
        tokenizer: PreTrainedTokenizerBase,
        name: str,
        arguments: Phase15ServerArguments,
    ):
        self.model, self.tokenizer, self.name, self.arguments = model, tokenizer, name, arguments
        lanes = Phase15Lanes(model, arguments.num_lanes, arguments.compile, arguments.max_kept_conversations)
        self.worker = LaneWorker(lanes, arguments.max_waiting)
        self.created = int(time.time())

    async def call(self, body: dict, kind: str) -> tuple[Asked, Call]:
        """
        Asks for the answers to the body of a request.

        Raises:
            ApiError: for what cannot be honoured, and when too many requests wait.
        """
        if body.get("model") not in (None, self.name):
            raise ApiError(
                f"the model {body['model']!r:.80} does not exist; this server has {self.name!r}.",
                "model",
                404,
                "model_not_found",
            )
        asked, requests = await run_in_threadpool(self.prepare, body, kind)
        try:
            return asked, Call(self.worker, requests, self.tokenizer, asked.stops, asked.is_streamed)
        except LanesBusyError:
            message = f"{self.arguments.max_waiting} requests wait already: try again later."
            headers = {"Retry-After": str(self.arguments.retry_after)}
            raise ApiError(message, status=429, code="rate_limit_exceeded", **headers) from None

    def prepare(self, body: dict, kind: str) -> tuple[Asked, list]:
        """The requests that a body asks for, one for each choice of each prompt."""
        vocab_size = self.model.config.text_config.vocab_size
        asked = asked_of(body, kind, self.arguments, self.model.generation_config, vocab_size)
        if kind == "chat":
            asked.prompts = [chat_ids(messages_of(body), self.tokenizer)]
        else:
            asked.prompts = prompts_of(body, self.tokenizer)
        param, most = ("messages" if kind == "chat" else "prompt"), self.arguments.max_prompt_tokens
        requests = []
        for prompt in asked.prompts:
            if len(prompt) > most:
                reason = f"the prompt has {len(prompt):,} tokens, but this server reads {most:,} at most."
                raise ApiError(reason, param, code="context_length_exceeded")
            settings = dict(asked.settings)
            if any(asked.penalties):
                settings["logits_processor"] = LogitsProcessorList([TokenPenalties(len(prompt), *asked.penalties)])
            for index in range(asked.n):
                seed = None if asked.seed is None else (asked.seed + index) % 2**63
                try:
                    requests.append(
                        request_of(
                            self.model,
                            prompt,
                            seed=seed,
                            num_logprobs=asked.num_logprobs,
                            name=param,
                            pad_token_id=0,
                            **settings,
                        )
                    )
                except ValueError as error:
                    raise ApiError(str(error)) from error
                if asked.ignores_end:
                    requests[-1].eos_token_ids = frozenset()
        if len(requests) > self.arguments.num_lanes + self.arguments.max_waiting:
            raise ApiError(f"{len(requests)} answers are asked for at once: ask for fewer.", param)
        return asked, requests

    def usage(self, asked: Asked, call: Call) -> CompletionUsage:
        # each prompt counts once, whatever `n`
        prompt_tokens = sum(map(len, asked.prompts))
        kept = sum(choice.request.num_kept_tokens for choice in call.choices[:: asked.n])
        return CompletionUsage(
            prompt_tokens=prompt_tokens,
            completion_tokens=call.num_tokens,
            total_tokens=prompt_tokens + call.num_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=kept),
        )

    def token_text(self, token: int) -> str:
        return self.tokenizer.decode([token], clean_up_tokenization_spaces=False)

    def token_logprob(self, token: int, logprob: float) -> dict:
        text = self.token_text(token)
        return {"token": text, "bytes": list(text.encode()), "logprob": logprob}

    def chat_logprobs(self, asked: Asked, pieces: list[Piece]) -> dict | None:
        """`ChoiceLogprobs` of a choice's pieces."""
        if asked.num_logprobs is None:
            return None
        content = []
        for piece in pieces:
            for token, logprob, likeliest in zip(piece.tokens, piece.logprobs, piece.top_logprobs, strict=True):
                top = [self.token_logprob(*pair) for pair in likeliest]
                content.append(ChatCompletionTokenLogprob(**self.token_logprob(token, logprob), top_logprobs=top))
        return {"content": content, "refusal": None}

    def text_logprobs(self, asked: Asked, pieces: list[Piece], offset: int = 0) -> Logprobs | None:
        if asked.num_logprobs is None:
            return None
        tokens = [self.token_text(token) for piece in pieces for token in piece.tokens]
        offsets = [offset + sum(map(len, tokens[:index])) for index in range(len(tokens))]
        likeliest = [pairs for piece in pieces for pairs in piece.top_logprobs]
        return Logprobs(
            tokens=tokens,
            token_logprobs=[logprob for piece in pieces for logprob in piece.logprobs],
            top_logprobs=[{self.token_text(token): logprob for token, logprob in pairs} for pairs in likeliest],
            text_offset=offsets,
        )

    async def whole(self, kind: str, asked: Asked, call: Call) -> ChatCompletion | Completion:
        """The answer to a request without `stream`."""
        pieces: list[list[Piece]] = [[] for _ in call.choices]
        async for piece in call.pieces():
            pieces[piece.index].append(piece)
        choices = []
        for index, parts in enumerate(pieces):
            text, reason = "".join(part.text for part in parts), parts[-1].finish_reason
            if kind == "chat":
                choices.append(
                    chat_completion.Choice(
                        index=index,
                        message={"role": "assistant", "content": text, "refusal": None},
                        logprobs=self.chat_logprobs(asked, parts),
                        finish_reason=reason,
                    )
                )
            else:
                logprobs = self.text_logprobs(asked, parts)
                choices.append(CompletionChoice(index=index, text=text, logprobs=logprobs, finish_reason=reason))
        made = ChatCompletion if kind == "chat" else Completion
        return made(choices=choices, usage=self.usage(asked, call), **self.head(kind, "chat.completion"))

    def head(self, kind: str, name: str) -> dict:
        prefix, name = ("chatcmpl", name) if kind == "chat" else ("cmpl", "text_completion")
        return {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": name,
            "created": int(time.time()),
            "model": self.name,
        }

    async def stream(self, kind: str, asked: Asked, call: Call) -> AsyncIterator[bytes]:
        """Server-sent events of a request with `stream`."""
        head, lengths = self.head(kind, "chat.completion.chunk"), [0] * len(call.choices)
        made = ChatCompletionChunk if kind == "chat" else Completion
        no_usage = {"usage": None} if asked.includes_usage else {}

        def event(choices: list, **more) -> bytes:
            return format_sse_event(data_str=made(choices=choices, **head, **more).model_dump_json(exclude_unset=True))

        try:
            if kind == "chat":
                for choice in call.choices:
                    delta = {"role": "assistant", "content": ""}
                    yield event([chat_chunk(choice.index, delta, None, None)], **no_usage)
            async for piece in call.pieces():
                if kind == "chat":
                    delta = {"content": piece.text} if piece.text or piece.tokens else {}
                    choice = chat_chunk(piece.index, delta, self.chat_logprobs(asked, [piece]), piece.finish_reason)
                else:
                    choice = CompletionChoice.model_construct(
                        index=piece.index,
                        text=piece.text,
                        logprobs=self.text_logprobs(asked, [piece], lengths[piece.index]),
                        finish_reason=piece.finish_reason,
                    )
                    lengths[piece.index] += len(piece.text)
                if piece.text or piece.finish_reason or asked.num_logprobs is not None:
                    yield event([choice], **no_usage)
            if asked.includes_usage:
                yield event([], usage=self.usage(asked, call))
        except Exception as error:  # the status has been sent already
            yield format_sse_event(data_str=json.dumps(error_of(error).body))
        yield format_sse_event(data_str="[DONE]")


def chat_chunk(index: int, delta: dict, logprobs: dict | None, reason: str | None) -> chat_completion_chunk.Choice:
    return chat_completion_chunk.Choice(index=index, delta=delta, logprobs=logprobs, finish_reason=reason)


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
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise ApiError(f"the body is a JSON {type(found).__name__}, but it must be an object.")
    return found


async def cancel_without_client(request: Request, call: Call):
    """Frees the lanes of a client that leaves."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
    call.cancel()


def build_app(server: Server) -> FastAPI:
    """The ASGI application of a server. Its lanes run from startup to shutdown."""

    @asynccontextmanager
    async def lifespan(_):
        server.worker.start()
        yield
        await run_in_threadpool(server.worker.stop)

    app = FastAPI(title="Phase15", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    watching: set[asyncio.Task] = set()
    key = server.arguments.key()

    def check_key(request: Request):
        scheme = "Bearer "
        given = request.headers.get("authorization", "")
        if key and not hmac.compare_digest(given.encode(), (scheme + key).encode()):
            raise ApiError("the API key is missing or wrong.", status=401, code="invalid_api_key")

    async def answer(request: Request, kind: str) -> Response:
        check_key(request)
        body = await read_body(request, server.arguments.max_body_bytes)
        asked, call = await server.call(body, kind)
        watcher = asyncio.create_task(cancel_without_client(request, call))
        watching.add(watcher)  # the loop itself keeps no task alive
        watcher.add_done_callback(watching.discard)
        if asked.is_streamed:
            return EventSourceResponse(server.stream(kind, asked, call))
        try:
            completion = await server.whole(kind, asked, call)
        finally:
            watcher.cancel()
        return Response(completion.model_dump_json(exclude_unset=True), media_type="application/json")

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await answer(request, "chat")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, "text")

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        check_key(request)
        return JSONResponse({"object": "list", "data": [describe(server)]})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        check_key(request)
        if name != server.name:
            raise ApiError(f"the model {name!r:.80} does not exist.", "model", 404, "model_not_found")
        return JSONResponse(describe(server))

    @app.get("/health")
    async def health() -> Response:
        is_alive = server.worker.thread.is_alive()
        return JSONResponse({"status": "ok" if is_alive else "stopped"}, 200 if is_alive else 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        check_key(request)
        return Response(generate_latest(server.worker.metrics.registry), media_type=CONTENT_TYPE_LATEST)

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


def describe(server: Server) -> dict:
    return Model(id=server.name, created=server.created, object="model", owned_by="phase15").model_dump()
