# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
OpenAI's API over lanes: /v1/chat/completions, /v1/completions and /v1/models, beside /health and /metrics.

[`build_app`] has the HTTP side, [`Server`] the model, and [`Answer`] turns the pieces of a call into OpenAI's types.
"""

import asyncio
import hmac
import json
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

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
from phase15.model.continuous_batching_phase15 import Phase15ContinuousBatchProcessor
from phase15.model.modeling_phase15 import Phase15ForCausalLM
from phase15.model.requests_phase15 import Phase15Request, make_reading_request, request_of
from phase15.model.state_phase15 import Phase15State
from phase15.serving.arguments import Phase15ServerArguments
from phase15.serving.openai_requests import (
    ApiError,
    ParsedRequest,
    TokenPenalties,
    parse_messages,
    parse_request,
    parse_state_id,
    parse_text,
    tokenize_chat,
    tokenize_prompts,
    tokenize_turns,
)
from phase15.serving.states import StateStore, StoredConversations, salt_of_key, state_name
from phase15.serving.text_stream import Piece
from phase15.serving.worker import Call, LanesBusyError, LaneWorker, StoppingError


logger = logging.get_logger("transformers.phase15.serve")


class Server:
    """
    Answers requests with one model.

    Args:
        model (`Phase15ForCausalLM`): the served model, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        arguments (`Phase15ServerArguments`): name of the model, lanes and limits.
    """

    def __init__(
        self, model: Phase15ForCausalLM, tokenizer: PreTrainedTokenizerBase, arguments: Phase15ServerArguments
    ):
        self.model = model
        self.tokenizer = tokenizer
        self.arguments = arguments
        self.keys = arguments.read_keys()
        # The first call can change a tokenizer's state (truncation, padding). Later calls run in several threads.
        tokenizer("")
        lanes = Phase15ContinuousBatchProcessor(
            model,
            max_batch_size=arguments.num_lanes,
            compile=arguments.compile,
            max_kept_conversations=arguments.max_kept_conversations,
            chunk_length=arguments.chunk_length,
        )
        folder = None if arguments.state_dir is None else Path(arguments.state_dir)
        states_folder = None if folder is None else folder / "states"
        self.store = StateStore(model, states_folder, arguments.max_state_bytes)
        self.prefixes: StateStore | None = None  # apart, so that prompts do not remove what clients have made
        if folder is not None:
            self.prefixes = StateStore(model, folder / "prefixes", arguments.max_state_bytes)
            lanes.conversations = StoredConversations(lanes, self.prefixes)
        self.worker = LaneWorker(lanes, arguments.max_waiting, self.store)

    @classmethod
    def load(cls, arguments: Phase15ServerArguments) -> "Server":
        """Loads the model, and logs the memory of its lanes."""
        device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"`device` is {device!r}: {str(error).splitlines()[0]}") from error
        arguments.read_keys()  # a missing key is an error before the weights are read, which takes long
        model, tokenizer = load_served(arguments.name, arguments.dtype, arguments.revision, arguments.chunk_length)
        server = cls(model.to(device).eval(), tokenizer, arguments)
        server.log_memory()
        return server

    def log_memory(self):
        """Logs the memory of a lane and of a kept conversation."""
        config = self.model.config
        text_config = config.text_config
        itemsize = self.model.dtype.itemsize
        head_dim = getattr(text_config, "head_dim", None)
        if head_dim is None:
            head_dim = text_config.hidden_size // text_config.num_attention_heads
        # keys and values of one position, in all layers
        position_bytes = 2 * text_config.num_hidden_layers * text_config.num_key_value_heads * head_dim * itemsize
        soft_prompt_bytes = config.num_soft_tokens * text_config.hidden_size * itemsize
        chunk_length = self.worker.lanes.chunk_length
        lane_bytes = soft_prompt_bytes + (config.num_soft_tokens + chunk_length) * position_bytes
        logger.warning(
            f"{self.arguments.name} on {self.model.device}: {self.arguments.num_lanes} lanes of "
            f"{lane_bytes / 2**20:,.1f} MB, chunks of {chunk_length} tokens, and up to "
            f"{self.arguments.max_kept_conversations} kept conversations of {soft_prompt_bytes / 2**20:,.2f} MB, "
            f"at any length. States: up to {self.arguments.max_state_bytes / 2**20:,.0f} MB in "
            f"{self.arguments.state_dir or 'memory'}."
        )

    async def start(self):
        self.worker.start()

    async def stop(self):
        await run_in_threadpool(self.worker.stop)
        await run_in_threadpool(self.store.flush)
        if self.prefixes is not None:
            await run_in_threadpool(self.prefixes.flush)

    def is_alive(self) -> bool:
        return self.worker.thread.is_alive()

    def metrics(self) -> bytes:
        """Returns the metrics in Prometheus' text format."""
        return generate_latest(self.worker.metrics.registry)

    async def open(self, body: dict, kind: str, salt: bytes = b"") -> "Answer":
        """
        Puts the requests of an API call into the queue, and returns their answer.

        Args:
            body (`dict`): body of the HTTP request.
            kind (`str`): "chat" or "text".
            salt (`bytes`): of the client's key: see [`salt_of_key`].

        Raises:
            ApiError: if the request cannot be honoured, or the waiting queue is full.
        """
        check_model(body, self.arguments.name)
        parsed, requests = await run_in_threadpool(self.prepare, body, kind, salt)
        try:
            call = Call(self.worker, requests, self.tokenizer, parsed.stops, parsed.is_streamed)
        except LanesBusyError:
            raise busy_error(self.arguments) from None
        return Answer(kind, parsed, call, self.tokenizer, self.arguments.name)

    async def read_state(self, body: dict, salt: bytes = b"") -> dict:
        """
        Reads the text of a request of POST /v1/states in a lane, stores the state, and returns its description.

        Raises:
            ApiError: if the request cannot be honoured, or the waiting queue is full.
        """
        check_model(body, self.arguments.name)
        request, before = await run_in_threadpool(self.prepare_reading, body, salt)
        try:
            call = Call(self.worker, [request], self.tokenizer, [], is_streamed=False)
        except LanesBusyError:
            raise busy_error(self.arguments) from None
        async for _ in call.pieces():
            pass
        # The time in the id survives a restart with it.
        state_id = f"state-{int(time.time()):x}-{secrets.token_urlsafe(24)}"
        state = await run_in_threadpool(self.keep_state, state_id, request, before, salt)
        return self.describe_state(state_id, state)

    def prepare_reading(self, body: dict, salt: bytes) -> tuple[Phase15Request, Phase15State | None]:
        """Returns a request that reads the text of a body, and the state before it."""
        before = self.find_state(parse_state_id(body), salt)
        ids = parse_text(body, self.tokenizer)
        name = "input" if body.get("messages") is None else "messages"
        if len(ids) > self.arguments.max_state_tokens:
            maximum = self.arguments.max_state_tokens
            message = f"the text has {len(ids):,} tokens, but this server reads {maximum:,} at most."
            raise ApiError(message, name, code="context_length_exceeded")
        try:
            return make_reading_request(self.model, ids, state=before, salt=salt, name=name), before
        except ValueError as error:
            raise ApiError(str(error), name) from error

    def keep_state(
        self, state_id: str, request: Phase15Request, before: Phase15State | None, salt: bytes
    ) -> Phase15State:
        chunk_length = self.worker.lanes.chunk_length
        state = self.model.model.make_state(request.soft_prompt, [request.prompt_ids], before, chunk_length)
        self.store.put(state_name(state_id, salt), state)
        self.store.flush()  # a client that knows the id may ask another server, or this one after a restart
        return state

    def describe_state(self, state_id: str, state: Phase15State) -> dict:
        return {
            "id": state_id,
            "object": "state",
            "created": int(state_id.split("-")[1], 16),
            "model": self.arguments.name,
            "num_tokens": int(state.num_tokens[0]),
            "bytes": state.nbytes,
        }

    async def get_state(self, state_id: str, salt: bytes = b"") -> dict:
        """Returns the description of a state. Raises an ApiError if there is none."""
        state = await run_in_threadpool(self.find_state, state_id, salt)
        return self.describe_state(state_id, state)

    async def delete_state(self, state_id: str, salt: bytes = b"") -> dict:
        """Removes a state. Raises an ApiError if there is none."""
        if not await run_in_threadpool(self.store.delete, state_name(state_id, salt)):
            raise unknown_state(state_id)
        return {"id": state_id, "object": "state.deleted", "deleted": True}

    def find_state(self, state_id: str | None, salt: bytes) -> Phase15State | None:
        """Returns the state that a client has made; None for no id."""
        if state_id is None:
            return None
        state = self.store.get(state_name(state_id, salt))
        if state is None:
            raise unknown_state(state_id)
        return state

    def prepare(self, body: dict, kind: str, salt: bytes = b"") -> tuple[ParsedRequest, list[Phase15Request]]:
        """Parses a body. Returns the parsed request, and a request to the lanes for each choice of each prompt."""
        vocab_size = self.model.config.text_config.vocab_size
        parsed = parse_request(body, kind, self.arguments, self.model.generation_config, vocab_size)
        if kind == "chat":
            param = "messages"
            messages = parse_messages(body)
            if parsed.state_id is None:
                parsed.prompts = [tokenize_chat(messages, self.tokenizer)]
            else:
                parsed.prompts = [tokenize_turns(messages, self.tokenizer, False, add_generation_prompt=True)]
        else:
            param = "prompt"
            parsed.prompts = tokenize_prompts(body, self.tokenizer)
        max_tokens = self.arguments.max_prompt_tokens
        for prompt in parsed.prompts:
            if len(prompt) > max_tokens:
                message = f"the prompt has {len(prompt):,} tokens, but this server reads {max_tokens:,} at most."
                raise ApiError(message, param, code="context_length_exceeded")
        num_choices = len(parsed.prompts) * parsed.n
        max_choices = self.arguments.num_lanes + self.arguments.max_waiting
        if num_choices > max_choices:
            message = f"the request has {num_choices:,} choices, but this server takes {max_choices:,} at most."
            raise ApiError(message, param)
        state = self.find_state(parsed.state_id, salt)
        requests = []
        for prompt in parsed.prompts:
            for index in range(parsed.n):
                requests.append(self.make_request(parsed, prompt, index, state, salt))
        return parsed, requests

    def make_request(
        self, parsed: ParsedRequest, prompt: list[int], index: int, state: Phase15State | None, salt: bytes
    ) -> Phase15Request:
        """Returns the request to the lanes for one choice of a prompt. Choices have different seeds."""
        settings = dict(parsed.settings)
        if parsed.presence_penalty or parsed.frequency_penalty:
            penalties = TokenPenalties(len(prompt), parsed.presence_penalty, parsed.frequency_penalty)
            settings["logits_processor"] = LogitsProcessorList([penalties])
        seed = None
        if parsed.seed is not None:
            seed = (parsed.seed + index) % 2**63  # torch's generators take no negative seed
        try:
            request = request_of(
                self.model,
                prompt,
                seed=seed,
                num_logprobs=parsed.num_logprobs,
                name="prompt",
                state=state,
                salt=salt,
                pad_token_id=0,  # lanes pad nothing; without it `generate` warns at each request
                **settings,
            )
        except ValueError as error:
            raise ApiError(str(error)) from error
        if parsed.ignores_eos:
            request.eos_token_ids = frozenset()
        return request


class Answer:
    """
    The answer to one API call, in OpenAI's types.

    Args:
        kind (`str`): "chat" or "text".
        parsed (`ParsedRequest`): the request.
        call (`Call`): its choices.
        tokenizer (`PreTrainedTokenizerBase`): tokenizer of the served model.
        name (`str`): name of the served model.
    """

    def __init__(self, kind: str, parsed: ParsedRequest, call: Call, tokenizer: PreTrainedTokenizerBase, name: str):
        self.parsed = parsed
        self.call = call
        self.tokenizer = tokenizer
        self.is_chat = kind == "chat"
        self.is_streamed = parsed.is_streamed
        if not self.is_chat:
            prefix = "cmpl"
            object_name = "text_completion"
        elif self.is_streamed:
            prefix = "chatcmpl"
            object_name = "chat.completion.chunk"
        else:
            prefix = "chatcmpl"
            object_name = "chat.completion"
        self.head = {
            "id": f"{prefix}-{uuid.uuid4().hex}",
            "object": object_name,
            "created": int(time.time()),
            "model": name,
        }

    def cancel(self):
        """Frees the lanes at the next chunk boundary."""
        self.call.cancel()

    async def events(self) -> AsyncIterator[str]:
        """Yields JSON: the chunks of a streamed answer, or the whole answer as one text."""
        if not self.is_streamed:
            answer = await self.whole()
            yield answer.model_dump_json(exclude_unset=True)
            return
        chunk_class = ChatCompletionChunk if self.is_chat else Completion
        usage = {}
        async for choice in self.chunks():
            if self.parsed.includes_usage:
                # OpenAI sends null with each chunk, and the statistics in one more at the end
                usage["usage"] = self.usage() if self.parsed.repeats_usage else None
            yield chunk_class(choices=[choice], **self.head, **usage).model_dump_json(exclude_unset=True)
        if self.parsed.includes_usage:
            yield chunk_class(choices=[], **self.head, usage=self.usage()).model_dump_json(exclude_unset=True)

    async def whole(self) -> ChatCompletion | Completion:
        """Returns the answer once all choices are finished."""
        pieces_of_choice: list[list[Piece]] = [[] for _ in self.call.choices]
        async for piece in self.call.pieces():
            pieces_of_choice[piece.index].append(piece)
        choices = [self.whole_choice(index, pieces) for index, pieces in enumerate(pieces_of_choice)]
        answer_class = ChatCompletion if self.is_chat else Completion
        return answer_class(choices=choices, usage=self.usage(), **self.head)

    def whole_choice(self, index: int, pieces: list[Piece]) -> chat_completion.Choice | CompletionChoice:
        text = "".join(piece.text for piece in pieces)
        finish_reason = pieces[-1].finish_reason
        if self.is_chat:
            return chat_completion.Choice(
                index=index,
                message={"role": "assistant", "content": text, "refusal": None},
                logprobs=self.chat_logprobs(pieces),
                finish_reason=finish_reason,
            )
        return CompletionChoice(
            index=index, text=text, logprobs=self.text_logprobs(pieces), finish_reason=finish_reason
        )

    async def chunks(self) -> AsyncIterator[chat_completion_chunk.Choice | CompletionChoice]:
        """Yields the choice of each chunk of a streamed answer."""
        text_lengths = [0] * len(self.call.choices)
        if self.is_chat:
            for choice in self.call.choices:
                role = {"role": "assistant", "content": ""}
                yield chat_completion_chunk.Choice(index=choice.index, delta=role, logprobs=None, finish_reason=None)
        async for piece in self.call.pieces():
            if not piece.text and not piece.finish_reason and self.parsed.num_logprobs is None:
                continue  # the stream holds the text of these tokens back
            if self.is_chat:
                yield chat_completion_chunk.Choice(
                    index=piece.index,
                    delta={"content": piece.text} if piece.text or piece.tokens else {},
                    logprobs=self.chat_logprobs([piece]),
                    finish_reason=piece.finish_reason,
                )
            else:
                # `model_construct` checks no types: the type's finish_reason must not be null, but in a stream it is
                yield CompletionChoice.model_construct(
                    index=piece.index,
                    text=piece.text,
                    logprobs=self.text_logprobs([piece], text_lengths[piece.index]),
                    finish_reason=piece.finish_reason,
                )
                text_lengths[piece.index] += len(piece.text)

    def usage(self) -> CompletionUsage:
        """Returns the usage statistics so far. Each prompt counts once, whatever `n`."""
        prompt_tokens = sum(len(prompt) for prompt in self.parsed.prompts)
        first_choices = self.call.choices[:: self.parsed.n]  # of each prompt
        cached_tokens = sum(choice.request.num_kept_tokens for choice in first_choices)
        completion_tokens = self.call.num_tokens
        return CompletionUsage(
            prompt_tokens=prompt_tokens,
            completion_tokens=completion_tokens,
            total_tokens=prompt_tokens + completion_tokens,
            prompt_tokens_details=PromptTokensDetails(cached_tokens=cached_tokens),
        )

    def token_text(self, token: int) -> str:
        return self.tokenizer.decode([token], clean_up_tokenization_spaces=False)

    def token_logprob(self, token: int, logprob: float) -> dict:
        text = self.token_text(token)
        return {"token": text, "bytes": list(text.encode()), "logprob": logprob}

    def chat_logprobs(self, pieces: list[Piece]) -> dict | None:
        """Returns the `ChoiceLogprobs` of pieces of one choice, or `None` if the request has no `logprobs`."""
        if self.parsed.num_logprobs is None:
            return None
        content = []
        for piece in pieces:
            for token, logprob, likeliest in zip(piece.tokens, piece.logprobs, piece.top_logprobs, strict=True):
                top_logprobs = [self.token_logprob(*pair) for pair in likeliest]
                entry = self.token_logprob(token, logprob)
                content.append(ChatCompletionTokenLogprob(**entry, top_logprobs=top_logprobs))
        return {"content": content, "refusal": None}

    def text_logprobs(self, pieces: list[Piece], offset: int = 0) -> Logprobs | None:
        """
        Returns the `Logprobs` of pieces of one choice, or `None` if the request has no `logprobs`. The first token
        begins at character `offset` of the answer.
        """
        if self.parsed.num_logprobs is None:
            return None
        logprobs = Logprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for piece in pieces:
            for token, logprob, likeliest in zip(piece.tokens, piece.logprobs, piece.top_logprobs, strict=True):
                text = self.token_text(token)
                logprobs.tokens.append(text)
                logprobs.token_logprobs.append(logprob)
                logprobs.top_logprobs.append({self.token_text(other): value for other, value in likeliest})
                logprobs.text_offset.append(offset)
                offset += len(text)
        return logprobs


def check_model(body: dict, name: str):
    """Raises an [`ApiError`] if the request names another model."""
    if body.get("model") not in (None, name):
        message = f"the model {body['model']!r:.80} does not exist; this server has {name!r}."
        raise ApiError(message, "model", 404, "model_not_found")


def unknown_state(state_id: str) -> ApiError:
    return ApiError(f"there is no state {state_id!r:.80} of this key.", "state", 404, "state_not_found")


def busy_error(arguments: Phase15ServerArguments) -> ApiError:
    return ApiError(
        f"{arguments.max_waiting} requests wait already: try again later.",
        status=429,
        code="rate_limit_exceeded",
        headers={"Retry-After": str(arguments.retry_after)},
    )


def to_api_error(error: Exception) -> ApiError:
    """Returns any error that ended an answer in OpenAI's form."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, StoppingError):
        return ApiError("the server stops.", status=503, code="server_stopping")
    return ApiError(f"{type(error).__name__}: {error}", status=500)


async def read_body(request: Request, max_bytes: int) -> dict:
    """Returns the JSON object in the body of a request."""
    too_large = ApiError(f"the body has more than {max_bytes:,} bytes.", status=413)
    content_length = request.headers.get("content-length", "0")
    if not content_length.isdecimal() or int(content_length) > max_bytes:
        raise too_large
    data = bytearray()
    async for part in request.stream():
        data += part
        if len(data) > max_bytes:  # a request in parts has no content-length
            raise too_large
    try:
        body = json.loads(data)
        json.dumps(body, ensure_ascii=False).encode()  # half of a surrogate pair could not be sent back
    except (ValueError, RecursionError) as error:
        raise ApiError(f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise ApiError(f"the body is a JSON {type(body).__name__}, but it must be an object.")
    return body


async def wait_for_disconnect(request: Request):
    message = await request.receive()
    while message["type"] != "http.disconnect":
        message = await request.receive()


async def cancel_on_disconnect(request: Request, answer: Answer):
    """Frees the lanes of a client that disconnects."""
    await wait_for_disconnect(request)
    answer.cancel()


async def stream(answer: Answer) -> AsyncIterator[bytes]:
    """Yields the server-sent events of a streamed answer."""
    try:
        async for text in answer.events():
            yield format_sse_event(data_str=text)
    except Exception as error:  # the status was sent before the answer, so an event has the error
        yield format_sse_event(data_str=json.dumps(to_api_error(error).body))
    yield format_sse_event(data_str="[DONE]")


def build_app(server: Server) -> FastAPI:
    """Returns the ASGI application of a server, which starts and stops with it."""

    @asynccontextmanager
    async def lifespan(_):
        await server.start()
        yield
        await server.stop()

    app = FastAPI(title="Phase15", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    name = server.arguments.name
    model = Model(id=name, created=int(time.time()), object="model", owned_by="phase15").model_dump()
    watchers = set()  # an event loop keeps only weak references to its tasks

    def check_key(request: Request) -> bytes:
        """Returns the salt of the client's key."""
        if not server.keys:
            return salt_of_key(None)
        authorization = request.headers.get("authorization", "").encode()
        # All keys are compared, so that the time does not tell which is near.
        matching = [key for key in server.keys if hmac.compare_digest(authorization, f"Bearer {key}".encode())]
        if not matching:
            raise ApiError("the API key is missing or wrong.", status=401, code="invalid_api_key")
        return salt_of_key(matching[0])

    async def respond(request: Request, kind: str) -> Response:
        salt = check_key(request)
        body = await read_body(request, server.arguments.max_body_bytes)
        answer = await server.open(body, kind, salt)
        watcher = asyncio.create_task(cancel_on_disconnect(request, answer))
        watchers.add(watcher)
        watcher.add_done_callback(watchers.discard)
        if answer.is_streamed:
            return EventSourceResponse(stream(answer))
        try:
            events = [event async for event in answer.events()]
        finally:
            watcher.cancel()
        return Response(events[0], media_type="application/json")  # an answer that is not streamed has one event

    @app.post("/v1/chat/completions")
    async def chat_completions(request: Request) -> Response:
        return await respond(request, "chat")

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await respond(request, "text")

    @app.post("/v1/states")
    async def make_state(request: Request) -> Response:
        salt = check_key(request)
        body = await read_body(request, server.arguments.max_body_bytes)
        reading = asyncio.create_task(server.read_state(body, salt))
        watcher = asyncio.create_task(wait_for_disconnect(request))
        try:
            await asyncio.wait({reading, watcher}, return_when=asyncio.FIRST_COMPLETED)
            if not reading.done():
                raise ClientDisconnect  # nobody would learn the id; the lane is free at the next chunk boundary
            return JSONResponse(reading.result())
        finally:
            watcher.cancel()
            reading.cancel()

    @app.get("/v1/states/{state_id}")
    async def get_state(request: Request, state_id: str) -> Response:
        return JSONResponse(await server.get_state(state_id, check_key(request)))

    @app.delete("/v1/states/{state_id}")
    async def delete_state(request: Request, state_id: str) -> Response:
        return JSONResponse(await server.delete_state(state_id, check_key(request)))

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
        if server.is_alive():
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "stopped"}, 503)

    @app.get("/metrics")
    async def metrics(request: Request) -> Response:
        check_key(request)
        return Response(server.metrics(), media_type=CONTENT_TYPE_LATEST)

    @app.exception_handler(HTTPException)
    async def unknown_path_or_method(_, error: HTTPException) -> Response:
        return ApiError(error.detail, status=error.status_code).response()

    # Starlette raises an error again after the handler of Exception, for the log. Those two are expected.
    @app.exception_handler(ApiError)
    @app.exception_handler(StoppingError)
    @app.exception_handler(Exception)
    async def failed(_, error: Exception) -> Response:
        return to_api_error(error).response()

    @app.exception_handler(ClientDisconnect)
    async def incomplete_request(_, error: ClientDisconnect) -> Response:
        return Response(status_code=400)  # nobody reads it: the client left before its request was complete

    return app


__all__ = ["Server", "build_app", "busy_error", "to_api_error"]
