# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
The text of an answer while its tokens arrive: [`TextStream`] decodes tokens into text, [`Choice`] reads the new tokens
of a request and returns them as a [`Piece`].
"""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from phase15.model.requests_phase15 import Phase15Request


REPLACEMENT_CHARACTER = "�"  # decoders write it for bytes that the next tokens may complete


class TextStream:
    """
    Decodes an answer token by token. Holds back text that may become a stop string or an incomplete character.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): tokenizer of the served model.
        stops (`list[str]`): stop strings. The text ends before the first of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: list[str]):
        self.tokenizer = tokenizer
        self.stops = stops
        self.ids: list[int] = []
        self.prefix_offset = 0  # new ids are decoded together with those from here on, which have text already
        self.read_offset = 0  # ids from here on have no text yet
        self.text = ""
        self.num_returned = 0  # characters
        self.is_stopped = False

    def add(self, token: int) -> str:
        """Adds a token. Returns the new text that later tokens cannot change."""
        self.ids.append(token)
        new_text = self._decode_new()
        if new_text and not new_text.endswith(REPLACEMENT_CHARACTER):
            self.text += new_text
            self.prefix_offset = self.read_offset
            self.read_offset = len(self.ids)
        return self._next_text(is_last=False)

    def close(self) -> str:
        """Returns the rest of the text, at the end of the answer."""
        if not self.is_stopped:
            self.text += self._decode_new()
            self.read_offset = len(self.ids)
        return self._next_text(is_last=True)

    def _decode_new(self) -> str:
        # A tokenizer may drop a space before the first id that it decodes, so the new ids are decoded after those
        # before them.
        prefix = self._decode(self.ids[self.prefix_offset : self.read_offset])
        text = self._decode(self.ids[self.prefix_offset :])
        return text[len(prefix) :]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _next_text(self, is_last: bool) -> str:
        """Returns the text up to the first stop string. Before the end of the answer, holds back its beginning."""
        end = len(self.text)
        positions = [self.text.find(stop, self.num_returned) for stop in self.stops]
        positions = [position for position in positions if position >= 0]
        if positions:
            self.is_stopped = True
            end = min(positions)
            self.text = self.text[:end]
        elif not is_last:
            new_text = self.text[self.num_returned :]
            end -= max((overlap(new_text, stop) for stop in self.stops), default=0)
        next_text = self.text[self.num_returned : end]
        self.num_returned = end
        return next_text


def overlap(text: str, stop: str) -> int:
    """Returns the number of characters at the end of `text` with which `stop` begins."""
    longest = min(len(stop) - 1, len(text))
    for length in range(longest, 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


class Piece(NamedTuple):
    """Part of an answer: its text, the tokens since the last piece, and at the end the finish reason."""

    index: int  # of the choice
    text: str
    tokens: list[int]
    logprobs: list[float]
    top_logprobs: list[list[tuple[int, float]]]
    finish_reason: str | None


class Choice:
    """
    One of the answers to an API call.

    Args:
        index (`int`): index of the choice in the API's answer.
        request (`Phase15Request`): request in the lanes. Another thread appends its tokens.
        stream (`TextStream`): decodes the tokens.
    """

    def __init__(self, index: int, request: Phase15Request, stream: TextStream):
        self.index = index
        self.request = request
        self.stream = stream
        self.num_taken = 0  # tokens

    def take(self) -> Piece | None:
        """Returns the new tokens and their text, or `None` if there are none and the answer goes on."""
        request = self.request
        # The finish reason is read before the tokens: if it is set, no token is added after this line.
        finish_reason = request.finish_reason
        first = self.num_taken
        text = ""
        for token in request.generated_tokens[first:]:
            self.num_taken += 1
            text += self.stream.add(token)
            if self.stream.is_stopped:
                finish_reason = "stop"
                request.finish(finish_reason)
                break
        if finish_reason is not None:
            text += self.stream.close()
        elif self.num_taken == first:
            return None
        new = slice(first, self.num_taken)
        return Piece(
            index=self.index,
            text=text,
            tokens=request.generated_tokens[new],
            logprobs=request.logprobs[new],
            top_logprobs=request.top_logprobs[new],
            finish_reason=finish_reason,
        )


__all__ = ["Choice", "Piece", "TextStream"]
