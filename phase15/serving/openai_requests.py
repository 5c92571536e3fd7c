# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Parses requests of OpenAI's API. The field names are those of the `openai` package. A field is honoured, or has a value
without an effect, or is refused by name with status 400.
"""

from dataclasses import dataclass, field

import torch
from fastapi.responses import JSONResponse
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from transformers import GenerationConfig, LogitsProcessor, PreTrainedTokenizerBase

from phase15.model.requests_phase15 import TOP_LOGPROBS
from phase15.model.state_phase15 import encode_turn
from phase15.serving.arguments import Phase15ServerArguments


# Fields that are not OpenAI's, but that other servers have and clients send.
EXTENSIONS = {"top_k", "min_p", "repetition_penalty", "ignore_eos", "state"}
# Fields without an effect on the answer.
LABELS = {
    "user",
    "metadata",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_options",
    "prompt_cache_retention",
}
# Fields that are not supported, with the values, beside null, that have no effect.
NEUTRAL = {
    "response_format": [{"type": "text"}],
    "tools": [[]],
    "functions": [[]],
    "tool_choice": ["none", "auto"],
    "function_call": ["none", "auto"],
    "parallel_tool_calls": [True, False],
    "modalities": [["text"]],
    "reasoning_effort": ["none"],
    "service_tier": ["auto", "default"],
    "verbosity": ["medium"],
    "store": [False],
    "echo": [False],
    "suffix": [""],
    "best_of": [1],
}
# Fields that both kinds of requests have.
COMMON = {
    "model",
    "stream",
    "stream_options",
    "n",
    "stop",
    "seed",
    "max_tokens",
    "temperature",
    "top_p",
    "presence_penalty",
    "frequency_penalty",
    "logit_bias",
    "logprobs",
    *EXTENSIONS,
}
HONOURED = {
    "chat": {*COMMON, "messages", "max_completion_tokens", "top_logprobs"},
    "text": {*COMMON, "prompt"},
}
# `openai` declares `stream` apart from the other fields.
FIELDS = {
    "chat": {*chat_create_params.CompletionCreateParamsBase.__annotations__, "stream", *EXTENSIONS},
    "text": {*completion_create_params.CompletionCreateParamsBase.__annotations__, "stream", *EXTENSIONS},
}
ROLES = ("system", "developer", "user", "assistant")
STREAM_OPTIONS = ("continuous_usage_stats", "include_usage")


class ApiError(Exception):
    """
    An error in OpenAI's form.

    Args:
        message (`str`): what is wrong, and how to fix it.
        param (`str`, *optional*): field of the request.
        status (`int`): HTTP status.
        code (`str`, *optional*): OpenAI's name of the error.
        headers (`dict[str, str]`, *optional*): HTTP headers of the response.
    """

    def __init__(
        self,
        message: str,
        param: str | None = None,
        status: int = 400,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ):
        super().__init__(message)
        # A replica sends the arguments to the process that answers over HTTP, which raises the error again.
        self.arguments = {"message": message, "param": param, "status": status, "code": code, "headers": headers}
        self.status = status
        self.headers = headers
        error_type = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": error_type, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


@dataclass
class ParsedRequest:
    """
    The body of a request, parsed.

    Args:
        prompts (`list[list[int]]`): token ids of each prompt.
        state_id (`str`, *optional*): of what was read before the prompts.
        settings (`dict`): arguments of `generate`.
        stops (`list[str]`): stop strings.
        n (`int`): number of choices per prompt.
        seed (`int`, *optional*): seed of the first choice.
        num_logprobs (`int`, *optional*): number of most likely tokens whose log-probabilities are returned.
        presence_penalty, frequency_penalty (`float`): see [`TokenPenalties`].
        is_streamed (`bool`): send the answer in chunks.
        includes_usage (`bool`): end a stream with a chunk of usage statistics.
        repeats_usage (`bool`): send usage statistics in every chunk, an extension of other servers.
        ignores_eos (`bool`): generate past end tokens, an extension of other servers.
    """

    prompts: list[list[int]] = field(default_factory=list)
    state_id: str | None = None
    settings: dict = field(default_factory=dict)
    stops: list[str] = field(default_factory=list)
    n: int = 1
    seed: int | None = None
    num_logprobs: int | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    is_streamed: bool = False
    includes_usage: bool = False
    repeats_usage: bool = False
    ignores_eos: bool = False


class Fields:
    """Reads the fields of a JSON object. Each method checks type and range, and raises an [`ApiError`]."""

    def __init__(self, body: dict):
        self.body = body

    def integer(self, name: str, minimum: int, maximum: int) -> int | None:
        return self._number(name, int, "an integer", minimum, maximum)

    def number(self, name: str, minimum: float, maximum: float) -> float | None:
        value = self._number(name, (int, float), "a number", minimum, maximum)
        return None if value is None else float(value)  # transformers' warpers refuse integers

    def flag(self, name: str) -> bool:
        value = self.body.get(name)
        if value is not None and not isinstance(value, bool):
            raise ApiError(f"`{name}` is {value!r:.80}, but it must be true or false.", name)
        return bool(value)

    def _number(self, name: str, types: type | tuple, type_name: str, minimum: float, maximum: float):
        value = self.body.get(name)
        if value is None:
            return None
        # bool is a subclass of int
        if not isinstance(value, types) or isinstance(value, bool) or not minimum <= value <= maximum:
            message = f"`{name}` is {value!r:.80}, but it must be {type_name} from {minimum:,} to {maximum:,}."
            raise ApiError(message, name)
        return value


def parse_request(
    body: dict, kind: str, arguments: Phase15ServerArguments, generation_config: GenerationConfig, vocab_size: int
) -> ParsedRequest:
    """
    Parses all fields except the prompt, which needs a tokenizer.

    Args:
        body (`dict`): body of the request.
        kind (`str`): "chat" or "text".
        arguments (`Phase15ServerArguments`): limits of the server.
        generation_config (`GenerationConfig`): generation config of the model.
        vocab_size (`int`): token ids are below this number.

    Raises:
        ApiError: for an unknown or unsupported field, and for a value of the wrong type or out of range.
    """
    check_fields(body, kind)
    fields = Fields(body)
    is_streamed = fields.flag("stream")
    includes_usage, repeats_usage = parse_stream_options(body.get("stream_options"), is_streamed)
    return ParsedRequest(
        is_streamed=is_streamed,
        includes_usage=includes_usage,
        repeats_usage=repeats_usage,
        n=fields.integer("n", 1, arguments.num_lanes) or 1,
        seed=fields.integer("seed", -(2**63), 2**63 - 1),
        stops=parse_stops(body.get("stop")),
        presence_penalty=fields.number("presence_penalty", -2, 2) or 0.0,
        frequency_penalty=fields.number("frequency_penalty", -2, 2) or 0.0,
        num_logprobs=parse_num_logprobs(fields, kind),
        settings=parse_settings(fields, arguments, generation_config, vocab_size),
        ignores_eos=fields.flag("ignore_eos"),
        state_id=parse_state_id(body),
    )


def parse_state_id(body: dict) -> str | None:
    """Returns the id of a state that a request names."""
    state_id = body.get("state")
    if state_id is not None and not isinstance(state_id, str):
        raise ApiError(f"`state` is {state_id!r:.80}, but it must be the id of a state.", "state")
    return state_id


STATE_FIELDS = {"model", "input", "messages", "state"}


def parse_text(body: dict, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """
    Returns the token ids of the text in a request of /v1/states: `input`, a text or token ids, or `messages`, the next
    turns of a chat.

    Raises:
        ApiError: for an unknown field, and for a body without a text or with two.
    """
    for name in body:
        if name not in STATE_FIELDS:
            raise ApiError(f"`{name}` is not a field of this request.", name)
    if (body.get("input") is None) == (body.get("messages") is None):
        raise ApiError("give either `input`, a text or token ids, or `messages`.", "input")
    if body.get("messages") is not None:
        return tokenize_turns(parse_messages(body), tokenizer, body.get("state") is None, add_generation_prompt=False)
    text = body["input"]
    if isinstance(text, str) and text:
        # A text that goes on has no start token before it.
        return tokenizer(text, add_special_tokens=body.get("state") is None)["input_ids"]
    if is_token_ids(text) and text:
        return text
    raise ApiError(f"`input` is {text!r:.80}, but it must be a text or token ids, not empty.", "input")


def tokenize_turns(
    messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase, is_first: bool, add_generation_prompt: bool
) -> list[int]:
    """Returns the token ids of turns of a chat, without those of the turns before: see [`encode_turn`]."""
    try:
        return encode_turn(messages, tokenizer, is_first, add_generation_prompt)
    except ValueError as error:
        raise ApiError(str(error), "messages") from error


def check_fields(body: dict, kind: str):
    """Raises an [`ApiError`] for a field that is unknown or not supported."""
    for name, value in body.items():
        if name not in FIELDS[kind]:
            raise ApiError(f"`{name}` is not a field of this request.", name)
        if name in HONOURED[kind] or name in LABELS:
            continue
        if value is not None and value not in NEUTRAL.get(name, []):
            raise ApiError(f"`{name}` is not supported by this server: leave it out.", name)


def parse_settings(
    fields: Fields, arguments: Phase15ServerArguments, generation_config: GenerationConfig, vocab_size: int
) -> dict:
    """Returns arguments of `generate`. Omitted fields fall back to the model's generation config."""
    settings = {"max_new_tokens": parse_max_tokens(fields, arguments)}
    settings |= parse_sampling(fields, generation_config)
    repetition_penalty = fields.number("repetition_penalty", 0.01, 10)
    if repetition_penalty is not None:
        settings["repetition_penalty"] = repetition_penalty
    sequence_bias = parse_logit_bias(fields.body.get("logit_bias"), vocab_size)
    if sequence_bias:  # `generate` refuses an empty one
        settings["sequence_bias"] = sequence_bias
    return settings


def parse_max_tokens(fields: Fields, arguments: Phase15ServerArguments) -> int:
    """Returns the maximum length of the answer, in tokens. The field has two names."""
    max_tokens = fields.integer("max_tokens", 1, 2**31)
    max_completion_tokens = fields.integer("max_completion_tokens", 1, 2**31)
    if max_tokens is None and max_completion_tokens is None:
        return min(arguments.default_tokens, arguments.max_tokens)
    if max_tokens is None:
        name = "max_completion_tokens"
        limit = max_completion_tokens
    else:
        name = "max_tokens"
        limit = max_tokens
    if max_completion_tokens not in (None, limit):
        raise ApiError("`max_tokens` and `max_completion_tokens` differ: give one of them.", "max_tokens")
    if limit > arguments.max_tokens:
        message = f"`{name}` is {limit:,}, but this server generates {arguments.max_tokens:,} tokens at most."
        raise ApiError(message, name)
    return limit


def parse_sampling(fields: Fields, generation_config: GenerationConfig) -> dict:
    """Returns the sampling arguments of `generate`, none if the request has none."""
    sampling = {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.integer("top_k", -1, 2**31),
        "min_p": fields.number("min_p", 0, 1),
    }
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if not sampling:
        return {}
    if sampling.get("temperature") == 0:
        return {"do_sample": False}
    if sampling.get("top_k") == -1:
        sampling["top_k"] = 0  # other servers turn top-k off with -1, transformers with 0
    if sampling.get("top_p") == 0:
        # OpenAI's 0 means the most likely token. transformers refuses the value.
        sampling["top_p"] = 1.0
        sampling["top_k"] = 1
    # OpenAI's defaults have no effect. Those of transformers do: its top_k is 50.
    settings = {"do_sample": True}
    for name, neutral in {"temperature": 1.0, "top_p": 1.0, "top_k": 0}.items():
        if getattr(generation_config, name) is None:
            settings[name] = neutral
    return settings | sampling


def parse_stream_options(options, is_streamed: bool) -> tuple[bool, bool]:
    """Returns whether the end of a stream has the usage statistics, and whether every chunk has them."""
    if options is None:
        return False, False
    name = "stream_options"
    if not isinstance(options, dict) or not options.keys() <= {*STREAM_OPTIONS, "include_obfuscation"}:
        raise unsupported_stream_options(options)
    if options.get("include_obfuscation") not in (None, False):
        raise unsupported_stream_options(options)
    if not is_streamed:
        raise ApiError(f"`{name}` is for requests with `stream`.", name)
    fields = Fields(options)
    includes_usage = fields.flag("include_usage")
    repeats_usage = fields.flag("continuous_usage_stats")
    return includes_usage, includes_usage and repeats_usage


def unsupported_stream_options(options) -> ApiError:
    message = f"`stream_options` is {options!r:.80}, but it can hold only {' and '.join(STREAM_OPTIONS)}."
    return ApiError(message, "stream_options")


def parse_logit_bias(bias, vocab_size: int) -> dict[tuple[int], float]:
    """Returns the `sequence_bias` of `generate`: a number to add to the score of each token, by its id as a tuple."""
    if bias is None:
        return {}
    name = "logit_bias"
    if not isinstance(bias, dict):
        raise ApiError(f"`{name}` is {bias!r:.40}, but it must be an object of numbers by token id.", name)
    sequence_bias = {}
    for token, value in bias.items():
        if not token.isdecimal() or int(token) >= vocab_size:
            raise ApiError(f"`{name}` holds {token!r:.40}, but its keys must be token ids below {vocab_size}.", name)
        if not isinstance(value, int | float) or not -100 <= value <= 100:
            raise ApiError(f"`{name}` gives {value!r:.40}, but it must be from -100 to 100.", name)
        # OpenAI's -100 is a ban
        sequence_bias[(int(token),)] = float("-inf") if value == -100 else float(value)
    return sequence_bias


def parse_stops(stop) -> list[str]:
    if stop is None:
        return []
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise ApiError(f"`stop` is {stop!r:.80}, but it must be a text or a list of texts, none empty.", "stop")
    return stops


def parse_num_logprobs(fields: Fields, kind: str) -> int | None:
    if kind == "text":
        return fields.integer("logprobs", 0, TOP_LOGPROBS)
    top_logprobs = fields.integer("top_logprobs", 0, TOP_LOGPROBS)
    if fields.flag("logprobs"):
        return top_logprobs or 0
    if top_logprobs:
        raise ApiError("`top_logprobs` is for requests with `logprobs`.", "top_logprobs")
    return None


def parse_messages(body: dict) -> list[dict[str, str]]:
    """Returns the messages of a chat, with their contents as strings."""
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise ApiError(f"`messages` is {messages!r:.80}, but it must be a list of one message or more.", "messages")
    return [parse_message(message, f"messages[{index}]") for index, message in enumerate(messages)]


def parse_message(message, name: str) -> dict[str, str]:
    """Returns role and content of a message. Errors call it `name`."""
    role = message.get("role") if isinstance(message, dict) else message
    if not isinstance(message, dict) or role not in ROLES:
        raise ApiError(f"`{name}.role` is {role!r:.80}, but it must be one of {', '.join(ROLES)}.", name)
    for key, value in message.items():
        # Clients send an answer back as they got it, with empty fields such as `tool_calls`.
        if key not in ("role", "content") and value not in (None, [], {}, ""):
            raise ApiError(f"`{name}.{key}` is not supported by this server: leave it out.", f"{name}.{key}")
    return {"role": role, "content": parse_content(message.get("content"), f"{name}.content")}


def parse_content(content, name: str) -> str:
    """Returns a content, a string or a list of text parts, as a string. Errors call it `name`."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ApiError(f"`{name}` is {content!r:.80}, but it must be a text or a list of text parts.", name)
    texts = []
    for index, part in enumerate(content):
        part_type = part.get("type") if isinstance(part, dict) else part
        if part_type != "text":
            message = f"`{name}[{index}]` is of type {part_type!r:.40}, but this server reads only text."
            raise ApiError(message, name)
        text = part.get("text")
        if not isinstance(text, str):
            raise ApiError(f"`{name}[{index}].text` is {text!r:.40}, but it must be a text.", name)
        texts.append(text)
    return "".join(texts)


def tokenize_chat(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Returns the token ids of a chat, up to the beginning of the answer."""
    if tokenizer.chat_template is None:
        raise ApiError("the model's tokenizer has no chat template: use /v1/completions.", "messages")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # a template can raise any error
        raise ApiError(f"the model's chat template refuses the messages: {error}", "messages") from error
    for index, message in enumerate(messages):
        # Templates drop messages in silence, many those of the system. Some cut the thoughts of the assistant.
        if message["role"] != "assistant" and message["content"].strip() not in text:
            name = f"messages[{index}]"
            raise ApiError(f"the model's chat template does not render `{name}` ({message['role']}).", name)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def tokenize_prompts(body: dict, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """Returns the token ids of each prompt. `prompt` is a text, a list of token ids, or a list of either."""
    prompt = body.get("prompt")
    is_first = body.get("state") is None  # a text that goes on has no start token before it
    if isinstance(prompt, list) and not is_token_ids(prompt):
        prompts = prompt
    else:
        prompts = [prompt]
    prompt_ids = []
    for item in prompts:
        if isinstance(item, str) and item:
            prompt_ids.append(tokenizer(item, add_special_tokens=is_first)["input_ids"])
        elif is_token_ids(item) and item:
            prompt_ids.append(item)
        else:
            message = f"`prompt` holds {item!r:.80}, but it must be a text, token ids, or a list of these, none empty."
            raise ApiError(message, "prompt")
    return prompt_ids


def is_token_ids(item) -> bool:
    # not isinstance: a bool is not a token id
    return isinstance(item, list) and all(type(token) is int for token in item)


class TokenPenalties(LogitsProcessor):
    """
    OpenAI's penalties of tokens that the answer already has. A token that occurs c times, c > 0, loses
    `presence_penalty + c * frequency_penalty` of its score. Tokens of the prompt do not count.
    """

    def __init__(self, prompt_length: int, presence_penalty: float, frequency_penalty: float):
        self.prompt_length = prompt_length
        self.presence_penalty = presence_penalty
        self.frequency_penalty = frequency_penalty

    def __call__(self, input_ids: torch.LongTensor, scores: torch.Tensor) -> torch.Tensor:
        answer_ids = input_ids[:, self.prompt_length :]
        # occurrences of every token of the vocabulary: a 1 added at each id of the answer
        ones = torch.ones_like(answer_ids, dtype=scores.dtype)
        counts = torch.zeros_like(scores).scatter_add(1, answer_ids, ones)  # (B, V)
        return scores - self.presence_penalty * (counts > 0) - self.frequency_penalty * counts


__all__ = [
    "ApiError",
    "ParsedRequest",
    "TokenPenalties",
    "parse_messages",
    "parse_request",
    "parse_state_id",
    "parse_text",
    "tokenize_chat",
    "tokenize_prompts",
    "tokenize_turns",
]
