# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
What a request of OpenAI's API asks for. The names of its fields are those of the `openai` package. A field is
honoured, or has the value that asks for nothing, or is refused by name with status 400.
"""

from dataclasses import dataclass, field

from fastapi.responses import JSONResponse
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params
from transformers import GenerationConfig, PreTrainedTokenizerBase

from phase15.model.requests_phase15 import TOP_LOGPROBS
from phase15.serving.arguments import Phase15ServerArguments


# Fields that other servers have added to OpenAI's, and that their clients send.
ADDED = {"top_k", "min_p", "repetition_penalty", "ignore_eos"}
# Fields that say nothing about the answer.
LABELS = {"user", "metadata", "safety_identifier", "prompt_cache_key", "prompt_cache_options"}
LABELS |= {"prompt_cache_retention"}
# Fields that are not honoured, with the values beside null that ask for nothing.
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
HONOURED = {
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
    *ADDED,
}
FIELDS = {
    kind: {"stream", *params.CompletionCreateParamsBase.__annotations__}
    for kind, params in (("chat", chat_create_params), ("text", completion_create_params))
}
OF_KIND = {"chat": {"messages", "max_completion_tokens", "top_logprobs"}, "text": {"prompt"}}
ROLES = ("system", "developer", "user", "assistant")


class ApiError(Exception):
    """An error in OpenAI's form."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None, **headers):
        super().__init__(message)
        self.arguments = {"message": message, "param": param, "status": status, "code": code, **headers}
        self.status, self.headers = status, headers
        kind = "invalid_request_error" if status < 500 else "server_error"
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


@dataclass
class Asked:
    """What the body of a request asks for."""

    prompts: list[list[int]] = field(default_factory=list)
    settings: dict = field(default_factory=dict)  # of `generate`
    stops: list[str] = field(default_factory=list)
    n: int = 1
    seed: int | None = None
    num_logprobs: int | None = None
    penalties: tuple[float, float] = (0.0, 0.0)
    is_streamed: bool = False
    includes_usage: bool = False
    repeats_usage: bool = False  # in every chunk, as other servers offer
    ignores_end: bool = False


class Fields:
    """The fields of a request, one by one, each with the type and the bounds that it must have."""

    def __init__(self, body: dict):
        self.body = body

    def number(self, name: str, least: float, most: float, whole: bool = False):
        value = self.body.get(name)
        kinds = int if whole else (int, float)
        if value is None:
            return None
        if not isinstance(value, kinds) or isinstance(value, bool) or not least <= value <= most:
            kind = "an integer" if whole else "a number"
            raise ApiError(f"`{name}` is {value!r:.80}, but it must be {kind} from {least:,} to {most:,}.", name)
        return value if whole else float(value)  # the library takes no integers there

    def flag(self, name: str) -> bool:
        value = self.body.get(name)
        if value not in (None, True, False) or isinstance(value, int) and not isinstance(value, bool):
            raise ApiError(f"`{name}` is {value!r:.80}, but it must be true or false.", name)
        return bool(value)


def asked_of(
    body: dict, kind: str, arguments: Phase15ServerArguments, generation_config: GenerationConfig, vocab_size: int
) -> Asked:
    """All that a body asks for but the prompt; `kind` is "chat" or "text"."""
    known = HONOURED | OF_KIND[kind]
    for name, value in body.items():
        if name not in FIELDS[kind] | ADDED:
            raise ApiError(f"`{name}` is no field of this request.", name)
        if name in known | LABELS or value is None or value in NEUTRAL.get(name, []):
            continue
        raise ApiError(f"`{name}` is not supported by this server: leave it out.", name)
    fields, asked = Fields(body), Asked()
    asked.is_streamed = fields.flag("stream")
    asked.includes_usage, asked.repeats_usage = usage_of(body.get("stream_options"), asked.is_streamed)
    asked.n = fields.number("n", 1, arguments.num_lanes, whole=True) or 1
    asked.seed = fields.number("seed", -(2**63), 2**63 - 1, whole=True)
    asked.stops = stops_of(body.get("stop"))
    asked.penalties = tuple(fields.number(f"{name}_penalty", -2, 2) or 0.0 for name in ("presence", "frequency"))
    asked.num_logprobs = logprobs_of(fields, kind)
    asked.settings = settings_of(fields, arguments, generation_config, vocab_size)
    asked.ignores_end = fields.flag("ignore_eos")
    return asked


def settings_of(
    fields: Fields, arguments: Phase15ServerArguments, generation_config: GenerationConfig, vocab_size: int
) -> dict:
    """The settings of `generate`. What is left out is as the model's generation config says."""
    limits = {name: fields.number(name, 1, 2**31, whole=True) for name in ("max_tokens", "max_completion_tokens")}
    given = {limit for limit in limits.values() if limit is not None}
    if len(given) > 1:
        raise ApiError("`max_tokens` and `max_completion_tokens` differ: give one of them.", "max_tokens")
    longest = given.pop() if given else min(arguments.default_tokens, arguments.max_tokens)
    if longest > arguments.max_tokens:
        name = next(name for name, limit in limits.items() if limit)
        raise ApiError(f"`{name}` is {longest:,}, but this server says {arguments.max_tokens:,} tokens at most.", name)
    settings = {"max_new_tokens": longest}
    sampling = {
        "temperature": fields.number("temperature", 0, 2),
        "top_p": fields.number("top_p", 0, 1),
        "top_k": fields.number("top_k", -1, 2**31, whole=True),
        "min_p": fields.number("min_p", 0, 1),
    }
    sampling = {name: value for name, value in sampling.items() if value is not None}
    if sampling:
        settings["do_sample"] = sampling.get("temperature") != 0
    if settings.get("do_sample"):
        if sampling.get("top_k") == -1:
            sampling["top_k"] = 0  # other servers' word for any number of tokens
        if sampling.get("top_p") == 0:
            sampling["top_p"], sampling["top_k"] = 1.0, 1  # the likeliest alone
        neutral = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}  # where the library's own defaults are others
        settings |= {name: value for name, value in neutral.items() if getattr(generation_config, name) is None}
        settings |= sampling
    if (penalty := fields.number("repetition_penalty", 0.01, 10)) is not None:
        settings["repetition_penalty"] = float(penalty)
    bias = fields.body.get("logit_bias")
    if bias is not None:
        settings["sequence_bias"] = bias_of(bias, vocab_size)
    return {name: value for name, value in settings.items() if value != {}}


def usage_of(options, is_streamed: bool) -> tuple[bool, bool]:
    """Whether the last chunk of a stream has the usage, and whether every chunk has."""
    if options is None:
        return False, False
    where, known = "stream_options", {"include_usage", "continuous_usage_stats"}
    unknown = set(options) - known if isinstance(options, dict) else {"it"}
    if unknown and not (unknown == {"include_obfuscation"} and options["include_obfuscation"] in (None, False)):
        message = f"`{where}` is {options!r:.80}, but it can hold {' and '.join(sorted(known))} alone."
        raise ApiError(message, where)
    if not is_streamed:
        raise ApiError(f"`{where}` is for requests with `stream`.", where)
    includes, repeats = (Fields(options).flag(name) for name in sorted(known, reverse=True))
    return includes, includes and repeats


def bias_of(bias, vocab_size: int) -> dict[tuple[int], float]:
    found = {}
    for token, value in bias.items() if isinstance(bias, dict) else [(bias, None)]:
        if not str(token).isdecimal() or int(token) >= vocab_size:
            raise ApiError(
                f"`logit_bias` holds {token!r:.40}, which is no token's id below {vocab_size}.", "logit_bias"
            )
        if not isinstance(value, int | float) or not -100 <= value <= 100:
            raise ApiError(f"`logit_bias` gives {value!r:.40}, but it must be from -100 to 100.", "logit_bias")
        # OpenAI's -100 is a ban
        found[(int(token),)] = float("-inf") if value == -100 else float(value)
    return found


def stops_of(stop) -> list[str]:
    stops = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not isinstance(stops, list) or not all(isinstance(text, str) and text for text in stops):
        raise ApiError(f"`stop` is {stop!r:.80}, but it must be a text or a list of texts, none empty.", "stop")
    return stops


def logprobs_of(fields: Fields, kind: str) -> int | None:
    if kind == "text":
        return fields.number("logprobs", 0, TOP_LOGPROBS, whole=True)
    most = fields.number("top_logprobs", 0, TOP_LOGPROBS, whole=True)
    if fields.flag("logprobs"):
        return most or 0
    if most:
        raise ApiError("`top_logprobs` is for requests with `logprobs`.", "top_logprobs")
    return None


def messages_of(body: dict) -> list[dict[str, str]]:
    """The messages, with contents as strings."""
    given = body.get("messages")
    if not isinstance(given, list) or not given:
        raise ApiError(f"`messages` is {given!r:.80}, but it must be a list of one message or more.", "messages")
    messages = []
    for index, message in enumerate(given):
        where = f"messages[{index}]"
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            role = message.get("role") if isinstance(message, dict) else message
            raise ApiError(f"`{where}.role` is {role!r:.80}, but it must be one of {', '.join(ROLES)}.", where)
        for name, value in message.items():
            if name not in ("role", "content") and value not in (None, [], {}, ""):
                raise ApiError(f"`{where}.{name}` is not supported by this server: leave it out.", f"{where}.{name}")
        messages.append({"role": message["role"], "content": content_of(message.get("content"), where)})
    return messages


def content_of(content, where: str) -> str:
    """A message's text, of a string or of text parts."""
    where = f"{where}.content"
    if isinstance(content, str):
        return content
    if not isinstance(content, list) or not content:
        raise ApiError(f"`{where}` is {content!r:.80}, but it must be a text or a list of text parts.", where)
    texts = []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else part
        if kind != "text":
            raise ApiError(f"`{where}[{number}]` is of type {kind!r:.40}, but this server reads text alone.", where)
        if not isinstance(part.get("text"), str):
            raise ApiError(f"`{where}[{number}].text` is {part.get('text')!r:.40}, but it must be a text.", where)
        texts.append(part["text"])
    return "".join(texts)


def chat_ids(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    if tokenizer.chat_template is None:
        raise ApiError("the model's tokenizer has no chat template: use /v1/completions.", "messages")
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    except Exception as error:  # templates can raise anything
        raise ApiError(f"the model's chat template refuses the messages: {error}", "messages") from error
    for index, message in enumerate(messages):
        if message["role"] != "assistant" and message["content"].strip() not in text:
            where = f"messages[{index}]"
            raise ApiError(f"the model's chat template does not render `{where}` ({message['role']}).", where)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def prompts_of(body: dict, tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """The token ids of a `prompt`: a text, token ids, or a list of either."""
    prompt = body.get("prompt")
    prompts = prompt if isinstance(prompt, list) and not all(type(item) is int for item in prompt) else [prompt]
    found = []
    for item in prompts:
        if isinstance(item, str) and item:
            found.append(tokenizer(item)["input_ids"])
        elif isinstance(item, list) and item and all(type(token) is int for token in item):
            found.append(item)
        else:
            message = f"`prompt` holds {item!r:.80}, but it must be a text, token ids, or a list of these, none empty."
            raise ApiError(message, "prompt")
    return found


__all__ = ["ApiError", "Asked", "asked_of", "chat_ids", "messages_of", "prompts_of"]
