# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Chat with a Phase15 model in the terminal.

    phase15 chat                                  outputs/quickstart
    phase15 chat --model_dir DIR_OR_HUB_ID        any Phase15 model; none of its code is run
    echo "Hello!" | phase15 chat                  one question on each line
    phase15 chat --help                           every flag

/quit or Ctrl-D ends the chat. Ctrl-C stops an answer; what was printed of it stays in the conversation.
"""

import sys
from dataclasses import dataclass, field

from phase15.cli.arguments import check_dtype, check_least, parse_flags
from phase15.cli.errors import one_line_errors
from phase15.cli.files import QUICKSTART


@dataclass
class ChatArguments:
    model_dir: str = field(default=QUICKSTART, metadata={"help": "Folder or Hub id of a Phase15 model."})
    max_new_tokens: int = field(default=256, metadata={"help": "Maximum length of an answer, in tokens."})
    temperature: float = field(default=0.0, metadata={"help": "Sampling temperature; 0 is greedy search."})
    dtype: str = field(default="auto", metadata={"help": "Data type of the weights: auto, float32, bfloat16."})
    device: str | None = field(default=None, metadata={"help": "Where to compute; cuda if there is one, else cpu."})

    def __post_init__(self):
        check_least(self, {"max_new_tokens": 1, "temperature": 0})
        check_dtype(self.dtype)


def read_question() -> str | None:
    """Returns the next line that the user types or a pipe holds, or `None` at the end."""
    prompt = "> " if sys.stdin.isatty() else ""
    try:
        question = input(prompt).strip()
    except (EOFError, KeyboardInterrupt):
        return None
    return None if question == "/quit" else question


def chat(args: ChatArguments):
    # these imports take seconds: after `--help` and wrong flags
    import torch
    from transformers import TextStreamer

    from phase15.loading import load_served

    class KeepingStreamer(TextStreamer):
        """Prints an answer while it grows, and keeps its text."""

        text = ""

        def on_finalized_text(self, text: str, stream_end: bool = False):
            self.text += text
            super().on_finalized_text(text, stream_end)

    model, tokenizer = load_served(args.model_dir, args.dtype)
    model.to(args.device or ("cuda" if torch.cuda.is_available() else "cpu")).eval()
    sampling = {"do_sample": True, "temperature": args.temperature} if args.temperature else {"do_sample": False}
    conversation = []
    while True:
        question = read_question()
        if question is None:
            return
        if not question:
            continue
        conversation.append({"role": "user", "content": question})
        if tokenizer.chat_template:
            inputs = tokenizer.apply_chat_template(
                conversation, add_generation_prompt=True, return_dict=True, return_tensors="pt"
            )
        else:
            text = "\n".join(turn["content"] for turn in conversation)
            inputs = tokenizer(text, return_tensors="pt")
        streamer = KeepingStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
        try:
            model.generate(
                input_ids=inputs["input_ids"].to(model.device),
                attention_mask=inputs["attention_mask"].to(model.device),
                max_new_tokens=args.max_new_tokens,
                streamer=streamer,
                **sampling,
            )
        except KeyboardInterrupt:
            streamer.end()  # prints what the streamer held back, and a line break
        conversation.append({"role": "assistant", "content": streamer.text})


def main(argv: list[str] | None = None, program: str = "phase15 chat"):
    with one_line_errors(program):
        chat(parse_flags(ChatArguments, program, __doc__, argv))


__all__ = ["ChatArguments", "main"]
