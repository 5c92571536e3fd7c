# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Answers as text for many clients at once: a thread that advances the lanes, and their tokens in an event loop."""

from transformers import PreTrainedTokenizerBase


BROKEN_CHARACTER = "�"  # of bytes that the next tokens may complete


class TextStream:
    """
    The text of an answer, token by token. What may be the beginning of a stop string, or of a character, is held back.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): of the served model.
        stops (`list[str]`): the text ends before the first of them.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: list[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.ids: list[int] = []
        self.begin = self.end = 0  # ids from `end` on are no text yet; those from `begin` on are decoded with them
        self.text, self.num_given = "", 0
        self.is_stopped = False

    def add(self, token: int) -> str:
        """One more token; returns the text that is sure."""
        self.ids.append(token)
        new = self._decode_new()
        if new and not new.endswith(BROKEN_CHARACTER):
            self.text += new
            self.begin, self.end = self.end, len(self.ids)
        return self._give(hold=True)

    def close(self) -> str:
        """The rest, when the answer has ended."""
        if not self.is_stopped:
            self.text += self._decode_new()
            self.end = len(self.ids)
        return self._give(hold=False)

    def _decode_new(self) -> str:
        decode = lambda ids: self.tokenizer.decode(  # noqa: E731
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        return decode(self.ids[self.begin :])[len(decode(self.ids[self.begin : self.end])) :]

    def _give(self, hold: bool) -> str:
        end = len(self.text)
        found = [at for stop in self.stops if (at := self.text.find(stop, self.num_given)) >= 0]
        if found:
            self.is_stopped, end = True, min(found)
            self.text = self.text[:end]
        elif hold:
            end -= max((overlap(self.text[self.num_given :], stop) for stop in self.stops), default=0)
        piece, self.num_given = self.text[self.num_given : end], end
        return piece


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of a text are the beginning of `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


__all__ = ["TextStream"]
