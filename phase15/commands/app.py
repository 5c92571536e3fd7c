# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
A chat with a Phase15 model in the browser, which shows the recursion while the answer grows. A text can be read first:
all questions then start from its state, which can be saved and loaded.

    phase15 app                                  outputs/quickstart, trained first if it is not there
    phase15 app --model_dir DIR_OR_HUB_ID        any Phase15 model; its code is run: read it before
    PHASE15_MODEL=HUB_ID phase15 app             the same, as in a Space
    phase15 app --port 8080                      or GRADIO_SERVER_PORT
    phase15 app --help                           every flag, with the limits for one visitor

A Hub Space needs only this file of the repository, as it is given a model.
"""

from __future__ import annotations

import argparse
import html
import importlib.util
import json
import math
import os
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, NamedTuple


if TYPE_CHECKING:  # these take seconds to import: each function imports what it uses, so that `--help` is fast
    import gradio as gr
    import torch
    from matplotlib.figure import Figure
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from phase15.model.state_phase15 import Phase15State


MAX_CHARACTERS = 100_000  # of a conversation: 40 pages, some 100 steps of reading; the model itself has no limit
MAX_WAITING = 16  # questions, beside those that are being answered
NUM_LANES = 8  # questions that are answered at once
MAX_READ_TOKENS = 200_000  # of a text to read: a novel; the model itself has no limit
BYTES_PER_TOKEN = 8  # of UTF-8, on average: English has 4 to 5
HEADER_BYTES = 65_536  # upper bound for the metadata of a saved state
PROGRESS_SECONDS = 0.2  # between two updates of the progress line
DELETE_CACHE = (3600, 86_400)  # every hour, files of visitors that are older than a day; all files at the end
QUICKSTART = Path("outputs", "quickstart")
TRAIN = [sys.executable, "-m", "phase15", "train"]
COLUMNS = 32  # steps in the table; the picture has them all
INVISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"})
FONTS = ["system-ui", "sans-serif"]  # no font is fetched from anywhere
CSS = """
#chat .message-markdown-disabled { white-space: pre-wrap; }
#slots { direction: rtl; overflow: auto !important; max-height: max(320px, 100vh - 440px); }  /* rtl: newest in view */
#slots .html-container { padding: 0; }
#slots table { min-width: 100%; direction: ltr; border-spacing: 1px; font: 12px/1.55 ui-monospace, monospace; }
#slots th { position: sticky; left: 0; z-index: 1; padding: 0 8px; background: var(--background-fill-primary);
    color: var(--body-text-color-subdued); font-weight: 400; text-align: right; white-space: nowrap; }
#slots thead th { top: 0; z-index: 2; text-align: left; }
#slots thead th:first-child { z-index: 3; }
#slots td { max-width: 9em; padding: 0 6px; overflow: hidden; text-overflow: ellipsis; white-space: nowrap;
    background: rgb(230 85 13 / calc(var(--d) * 75%)); }
#slots td.moved { font-weight: 700; outline: 2px solid var(--body-text-color); outline-offset: -2px; }
#slots tbody th { width: 1%; }
#slots .last-sink > * { border-bottom: 2px solid var(--body-text-color); }
"""
HEADING = "### Inside the soft prompt"
LEGEND = (
    "Below: the vocabulary token nearest to each slot, by cosine. The deeper the colour, the more Δ wrote there. "
    "**Framed bold**: the nearest token before Δ was another one. Hover for numbers."
)


def parse_args(argv: list[str] | None, program: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_dir", default=os.environ.get("PHASE15_MODEL"), help="folder or Hub id")
    parser.add_argument("--port", type=int, help="default: GRADIO_SERVER_PORT, or the first that is free from 7860")
    parser.add_argument(
        "--max_characters", type=int, default=MAX_CHARACTERS, help="of a conversation; default: %(default)s"
    )
    parser.add_argument(
        "--max_waiting",
        type=int,
        default=MAX_WAITING,
        help="questions, beside those being answered; default: %(default)s",
    )
    parser.add_argument(
        "--num_lanes", type=int, default=NUM_LANES, help="questions that are answered at once; default: %(default)s"
    )
    parser.add_argument(
        "--max_read_tokens",
        type=int,
        default=MAX_READ_TOKENS,
        help="tokens of a text to read; default: %(default)s",
    )
    return parser.parse_args(argv)


class Step(NamedTuple):
    """One step of the recursion, or a state. The lists have an entry for each slot in use."""

    name: str  # sp_c for the soft prompt of chunk c, "read i" if a long query takes several steps, or "state"
    seen: int  # tokens that have entered the soft prompt
    tokens: list[int]  # nearest to carry + Δ
    cosines: list[float]  # between carry + Δ and the nearest token
    carried: list[int]  # nearest to carry
    shares: list[float]  # ‖Δ‖ / ‖carry + Δ‖; empty for a state, whose file does not hold them


def model_code(model: PreTrainedModel, name: str) -> ModuleType:
    """Returns another file of the model's own code: a Space has no package `phase15`."""
    package = type(model).__module__.rpartition(".")[0]
    return importlib.import_module(f"{package}.{name}")


class Recorder:
    """
    Collects the steps of the recursion in one answer. It is the `on_step` of the request.

    Args:
        query_length (`int`): number of tokens of the query. The step that reads the last one computes sp_0.
        embeddings (`torch.Tensor` of shape `(vocab_size, hidden_size)`): embeddings of the tokenizer's tokens.
        nearest_tokens (`Callable`): the function of state_phase15.py.
        num_read (`int`, defaults to 0): number of tokens that the state has read before the query.
    """

    def __init__(self, query_length: int, embeddings: torch.Tensor, nearest_tokens: Callable, num_read: int = 0):
        self.query_length = query_length
        self.embeddings = embeddings
        self.nearest_tokens = nearest_tokens
        self.num_read = num_read
        self.raw: list[tuple] = []  # arguments of `__call__`
        self.steps: list[Step] = []

    def __call__(self, carried: tuple, stepped: tuple, num_tokens: int):
        """
        Stores a step. The thread of the lanes calls this method, and all other answers wait for it, so `read` does the
        work.

        Args:
            carried (`SoftPrompt`): soft prompt of one row after carry.
            stepped (`SoftPrompt`): the same row after carry and Δ.
            num_tokens (`int`): number of tokens that entered.
        """
        self.raw.append((carried, stepped, num_tokens))

    def read(self) -> list[Step]:
        """Returns all steps so far."""
        import torch

        for carried, stepped, num_tokens in self.raw[len(self.steps) :]:
            length = int(carried.length[0])
            before = carried.embeds[0, :length].float()
            after = stepped.embeds[0, :length].float()
            # one matrix product with the whole vocabulary for both
            tokens, cosines = self.nearest_tokens(torch.cat([after, before]), self.embeddings)
            tokens = tokens.tolist()
            cosines = cosines[:length].tolist()
            shares = (after - before).norm(dim=1) / after.norm(dim=1).clamp(min=1e-12)
            seen = num_tokens
            seen += self.steps[-1].seen if self.steps else self.num_read
            query_end = self.num_read + self.query_length
            if seen >= query_end:
                chunk = sum(step.seen >= query_end for step in self.steps)
                name = f"sp_{chunk}"
            else:
                name = f"read {len(self.steps) + 1}"
            step = Step(name, seen, tokens[:length], cosines, tokens[length:], shares.tolist())
            self.steps.append(step)
        return list(self.steps)


def encode_text(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, text: str, state: Phase15State | None
) -> list[int]:
    """Returns the token ids of a text to read: the first turn of a chat, or the next user turn after a state."""
    if tokenizer.chat_template:
        encode_turn = model_code(model, "state_phase15").encode_turn
        return encode_turn([{"role": "user", "content": text}], tokenizer, is_first=state is None)
    return encode_plain(tokenizer, text, state)


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, str]], state: Phase15State | None
) -> list[int]:
    """Returns the token ids of a conversation, up to the beginning of its next answer. It may go on from a state."""
    if not tokenizer.chat_template:
        return encode_plain(tokenizer, "\n".join(turn["content"] for turn in conversation), state)
    if state is None:
        inputs = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)
        return inputs["input_ids"]
    return state.next_turn(conversation, tokenizer)["input_ids"][0].tolist()


def encode_plain(tokenizer: PreTrainedTokenizerBase, text: str, state: Phase15State | None) -> list[int]:
    """Returns the token ids of a text for a tokenizer without a chat template. After a state it is the next line."""
    if state is None:
        return tokenizer(text)["input_ids"]
    return tokenizer("\n" + text, add_special_tokens=False)["input_ids"]


def read(lanes, ids: list[int], state: Phase15State | None = None) -> Iterator[tuple[int, Phase15State | None]]:
    """
    Reads a text into a state. The lanes read it like a prompt, one segment at each boundary, so other answers go on.
    Closing the iterator frees the lane.

    Args:
        lanes (`Phase15ContinuousBatchingManager`): from `init_continuous_batching`, started.
        ids (`list[int]`): token ids of the text.
        state (`Phase15State`, *optional*): what was read before. It is not changed.

    Yields:
        `tuple[int, Phase15State | None]`: after each segment the number of tokens read, and None; at the end the state
        on the CPU, too.
    """
    model = lanes.processor.model
    request = model_code(model, "requests_phase15").make_reading_request(model, ids, state=state)
    segments = queue.SimpleQueue()  # numbers of tokens, from the thread of the lanes
    request.on_step = lambda _, __, num_tokens: segments.put(num_tokens)
    request.on_finish = lambda _: segments.put(None)
    lanes.submit([request])
    num_read = 0
    try:
        for num_tokens in iter(segments.get, None):
            num_read += num_tokens
            yield num_read, None
        if request.error is not None:
            raise request.error
    finally:
        request.finish("cancelled")
    state = model.model.make_state(request.soft_prompt, [ids], state, lanes.processor.chunk_length)
    yield num_read, state.to("cpu")  # the device's memory is for answers


def state_step(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, state: Phase15State) -> Step:
    """Returns the tokens nearest to the slots of a state, as a step without Δ."""
    embeddings = model.get_input_embeddings().weight[: len(tokenizer)]
    length = int(state.soft_prompt.length[0])
    slots = state.soft_prompt.embeds[0, :length].to(embeddings.device)
    tokens, cosines = model_code(model, "state_phase15").nearest_tokens(slots, embeddings)
    return Step("state", int(state.num_tokens[0]), tokens.tolist(), cosines.tolist(), tokens.tolist(), [])


def reply(
    lanes,
    tokenizer: PreTrainedTokenizerBase,
    conversation: list[dict[str, str]],
    temperature: float = 0.0,
    max_new_tokens: int = 256,
    state: Phase15State | None = None,
) -> Iterator[tuple[str, list[Step]]]:
    """
    Answers a conversation. Closing the iterator frees the lane.

    Args:
        lanes (`Phase15ContinuousBatchingManager`): from `init_continuous_batching`, started.
        tokenizer (`PreTrainedTokenizerBase`): tokenizer of the model.
        conversation (`list[dict[str, str]]`): messages, the last one of the user.
        temperature (`float`): of sampling. 0 is greedy search.
        max_new_tokens (`int`): maximum length of the answer, in tokens.
        state (`Phase15State`, *optional*): what was read before the conversation. It is not changed.

    Yields:
        `tuple[str, list[Step]]`: the text so far and the steps so far.
    """
    import torch
    from transformers import TextIteratorStreamer

    model = lanes.processor.model
    ids = encode_conversation(tokenizer, conversation, state)
    if temperature:
        sampling = {"do_sample": True, "temperature": float(temperature)}
    else:
        sampling = {"do_sample": False}
    embeddings = model.get_input_embeddings().weight[: len(tokenizer)]
    num_read = 0 if state is None else int(state.num_tokens[0])
    recorder = Recorder(len(ids), embeddings, model_code(model, "state_phase15").nearest_tokens, num_read)
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    request = lanes.processor.request(ids, max_new_tokens=max_new_tokens, state=state, **sampling)
    request.on_token = lambda request: streamer.put(torch.tensor(request.generated_tokens[-1:]))
    request.on_finish = lambda _: streamer.end()
    request.on_step = recorder
    lanes.submit([request])
    text = ""
    try:
        for piece in streamer:
            text += piece
            yield text, recorder.read()
        if request.error is not None:
            raise request.error
    finally:
        request.finish("cancelled")


def picture(steps: list[Step], num_slots: int, num_sinks: int) -> Figure:
    """Draws a heat map of the share of Δ in every slot at every step."""
    import torch
    from matplotlib.figure import Figure

    shares = torch.full((num_slots, len(steps)), math.nan)
    for column, step in enumerate(steps):
        shares[: len(step.shares), column] = torch.tensor(step.shares)
    figure = Figure(figsize=(8, 2.4), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    image = axes.imshow(shares.numpy(), aspect="auto", interpolation="nearest", cmap="Oranges", vmin=0)
    axes.axhline(num_sinks - 0.5, color="black", linewidth=0.8)
    every = math.ceil(len(steps) / 12)
    axes.set_xticks(range(0, len(steps), every), [step.name for step in steps[::every]])
    axes.set(ylabel="slot (first: sinks)")
    figure.colorbar(image, label="‖Δ‖ / ‖slot‖", pad=0.01)
    return figure


def visible(text: str) -> str:
    """Returns the text of a token with a symbol in place of each invisible character."""
    text = text.translate(INVISIBLE)
    return "".join(character if character.isprintable() else "�" for character in text)


def table(steps: list[Step], tokenizer: PreTrainedTokenizerBase, num_slots: int, num_sinks: int) -> str:
    """Returns HTML with a row for each slot and a column for each of the last steps. A cell has the nearest token."""
    steps = steps[-COLUMNS:]
    texts = {}  # by token
    largest_share = 0
    for step in steps:
        largest_share = max([largest_share, *step.shares])
        for token in {*step.tokens, *step.carried} - texts.keys():
            texts[token] = html.escape(visible(tokenizer.decode([token])))

    def cell(step: Step, slot: int) -> str:
        if slot >= len(step.tokens):
            return "<td></td>"  # the slot is not in use yet
        token = step.tokens[slot]
        carried = step.carried[slot]
        title = f"cosine {step.cosines[slot]:.2f}"
        share = 0
        if step.shares:
            share = step.shares[slot]
            title += f", ‖Δ‖/‖slot‖ {share:.3f}"
        moved = ""
        if token != carried:
            title += f", carried {texts[carried]}"
            moved = ' class="moved"'
        depth = share / largest_share if largest_share else 0  # without Δ all shares are 0
        return f'<td{moved} style="--d:{depth:.2f}" title="{title}">{texts[token]}</td>'

    names = "".join(f"<th>{step.name}</th>" for step in steps)
    rows = []
    for slot in range(num_slots):
        sink = "sink " if slot < num_sinks else ""
        last_sink = ' class="last-sink"' if slot == num_sinks - 1 else ""
        cells = "".join(cell(step, slot) for step in steps)
        rows.append(f"<tr{last_sink}><th>{sink}{slot}</th>{cells}</tr>")
    return f"<table><thead><tr><th>slot</th>{names}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def max_text_bytes(max_read_tokens: int) -> int:
    """Returns the maximum size of a text to read, in bytes of UTF-8. It is checked before the text is tokenized."""
    return max_read_tokens * BYTES_PER_TOKEN


def max_upload_bytes(model: PreTrainedModel, max_read_tokens: int) -> int:
    """Returns the maximum size of an uploaded file: a text, or a state in float32."""
    num_numbers = model.config.num_soft_tokens * model.get_input_embeddings().weight.shape[1]
    return max(max_text_bytes(max_read_tokens), num_numbers * 4 + HEADER_BYTES)


def build_demo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    max_characters: int = MAX_CHARACTERS,
    max_waiting: int = MAX_WAITING,
    num_lanes: int = NUM_LANES,
    max_read_tokens: int = MAX_READ_TOKENS,
    opening: list[dict[str, str]] | None = None,
) -> gr.Blocks:
    """
    Builds the page: the chat on the left, the soft prompt on the right.

    Args:
        model (`PreTrainedModel`): a Phase15 model, in evaluation mode.
        tokenizer (`PreTrainedTokenizerBase`): its tokenizer.
        name (`str`): heading of the page.
        max_characters (`int`): maximum length of a conversation, in characters. Longer ones are a `gr.Error`.
        max_waiting (`int`): maximum number of questions that wait for a lane.
        num_lanes (`int`): maximum number of questions that are answered, and texts that are read, at once.
        max_read_tokens (`int`): maximum length of a text to read, in tokens. Longer ones are a `gr.Error`.
        opening (`list[dict[str, str]]`, *optional*): conversation that the page opens on, with the model's answer.
    """
    import gradio as gr

    num_slots = model.config.num_soft_tokens
    num_sinks = model.config.num_sink_tokens
    hidden_size = model.get_input_embeddings().weight.shape[1]
    kilobytes = num_slots * hidden_size * model.dtype.itemsize / 1024
    size = f"{num_slots} slots × {hidden_size} numbers: {kilobytes:,.0f} kB"
    lanes = model.init_continuous_batching(max_batch_size=num_lanes)
    lanes.start()

    def to_chat(message: dict[str, str]) -> dict:
        # The chat shows tags as HTML, so the text is escaped. It re-indents a plain string, but not a text part.
        return {"role": message["role"], "content": [{"type": "text", "text": html.escape(message["content"])}]}

    def from_chat(turn: dict) -> dict[str, str]:
        text = "".join(part["text"] for part in turn["content"])
        return {"role": turn["role"], "content": html.unescape(text)}

    def panel(steps: list[Step]) -> list:
        last = steps[-1]
        facts = f"{HEADING}: {last.name}\n{last.seen:,} tokens read into {size} at any length."
        heat_map = picture(steps, num_slots, num_sinks) if last.shares else None
        return [facts, heat_map, table(steps, tokenizer, num_slots, num_sinks)]

    def status(state: Phase15State | None) -> str:
        return "" if state is None else f"`{state!r}`"

    def refuse(message: str | Exception) -> gr.Error:
        return gr.Error(html.escape(str(message)), print_exception=False)  # the page shows it as HTML

    def show_state(state: Phase15State | None, path: Path | None = None) -> list:
        """Returns the outputs of a new state: a new chat starts from it, and `path` is its file."""
        save = gr.update(value=path, interactive=path is not None)
        first = [HEADING, None, ""] if state is None else panel([state_step(model, tokenizer, state)])
        return [state, status(state), save, [], *first]

    def offer_state(state: Phase15State) -> Iterator[list]:
        with tempfile.TemporaryDirectory() as folder:  # gradio copies the file at the yield
            path = Path(folder, "state.safetensors")
            state.save_pretrained(path)
            yield show_state(state, path)

    def read_input(text: str, file: str | None, state: Phase15State | None):
        if bool(text.strip()) == (file is not None):
            raise refuse("Paste a text or choose a file: one of them.")
        try:
            if file is not None:
                text = Path(file).read_text("utf-8-sig")
            num_bytes = len(text.encode())
            limit = max_text_bytes(max_read_tokens)
            if num_bytes > limit:
                raise ValueError(f"The text has {num_bytes:,} bytes, and this page reads {limit:,} at most.")
            ids = encode_text(model, tokenizer, text, state)
        except UnicodeError as error:
            raise refuse("The file is not a text in UTF-8.") from error
        except ValueError as error:
            raise refuse(error) from error
        if len(ids) > max_read_tokens:
            raise refuse(f"The text has {len(ids):,} tokens, and this page reads {max_read_tokens:,} at most.")
        shown_at = -math.inf
        new_state = None
        try:
            with closing(read(lanes, ids, state)) as steps:
                for num_read, state_after in steps:
                    new_state = state_after
                    if time.monotonic() - shown_at > PROGRESS_SECONDS:
                        shown_at = time.monotonic()
                        progress = f"{num_read:,} of {len(ids):,} tokens read"
                        yield [*[gr.skip()] * 3, progress, *[gr.skip()] * 5]
        except Exception as error:
            yield [*[gr.skip()] * 3, status(state), *[gr.skip()] * 5]  # the progress ends
            raise refuse(f"{type(error).__name__}: {error}") from error
        for outputs in offer_state(new_state):
            yield ["", None, *outputs]

    def load_file(file: str):
        try:
            state = model.load_state(file)
        except (ValueError, OSError) as error:
            raise refuse(str(error).replace(file, Path(file).name)) from error
        if state.batch_size != 1:
            raise refuse(f"{Path(file).name} holds {state.batch_size} rows, but the page shows one.")
        yield from offer_state(state.to("cpu"))

    def respond(
        message: str,
        history: list[dict],
        temperature: float,
        max_new_tokens: int,
        state: Phase15State | None = None,
    ):
        if not message.strip():
            yield [gr.skip()] * 5
            return
        history = [*history, to_chat({"role": "user", "content": message})]
        conversation = [from_chat(turn) for turn in history]
        length = sum(len(turn["content"]) for turn in conversation)
        if length > max_characters:
            raise gr.Error(
                f"The conversation would have {length:,} characters, and this page reads {max_characters:,} at most: "
                "ask something shorter, or reload the page to start anew.",
                print_exception=False,
            )
        yield "", history, *[gr.skip()] * 3
        num_shown = 0
        try:
            with closing(reply(lanes, tokenizer, conversation, temperature, max_new_tokens, state)) as answer:
                for text, steps in answer:
                    if len(steps) > num_shown:
                        outputs = panel(steps)
                    else:
                        outputs = [gr.skip()] * 3
                    num_shown = len(steps)
                    yield gr.skip(), [*history, to_chat({"role": "assistant", "content": text})], *outputs
        except Exception as error:
            raise gr.Error(html.escape(f"{type(error).__name__}: {error}")) from error

    first_history = []
    first_panel = [HEADING, None, ""]
    if opening:
        *_, (text, steps) = reply(lanes, tokenizer, opening)
        conversation = [*opening, {"role": "assistant", "content": text}]
        first_history = [to_chat(message) for message in conversation]
        first_panel = panel(steps)

    with gr.Blocks(title="Phase15", analytics_enabled=False, fill_width=True, delete_cache=DELETE_CACHE) as demo:
        state = gr.State(None)  # of one visitor
        gr.HTML(f"<h2>Phase15 · {html.escape(name)}</h2>")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                chat = gr.Chatbot(
                    first_history,
                    label="Chat",
                    elem_id="chat",
                    height="max(320px, 100vh - 290px)",
                    render_markdown=False,
                    buttons=[],
                )
                with gr.Row(equal_height=True):
                    box = gr.Textbox(show_label=False, placeholder="Ask something", submit_btn=True, scale=5)
                    stop = gr.Button("Stop", min_width=70)
                line = gr.Markdown("", elem_id="state")
                with gr.Accordion("Read a text first", open=False):
                    text = gr.Textbox(label="Text", lines=3, max_lines=8, placeholder="Paste a text")
                    file = gr.File(label="or a .txt or .md file", file_types=[".txt", ".md"], height=140)
                    with gr.Row():
                        start_reading = gr.Button("Read", variant="primary", min_width=110, size="sm")
                        save = gr.DownloadButton("Save state", interactive=False, min_width=110, size="sm")
                        load = gr.UploadButton("Load state", file_types=[".safetensors"], min_width=110, size="sm")
                        forget = gr.Button("Forget", min_width=110, size="sm")
                with gr.Accordion("Sampling", open=False):
                    temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: greedy)")
                    max_new_tokens = gr.Slider(16, 4096, 256, step=16, label="Most new tokens")
            with gr.Column(scale=3, min_width=480):
                facts = gr.Markdown(first_panel[0], elem_id="facts")
                plot = gr.Plot(first_panel[1], show_label=False, format="png", elem_id="picture")
                gr.Markdown(LEGEND)
                slots = gr.HTML(first_panel[2], elem_id="slots", apply_default_css=False)
        answering = box.submit(
            respond,
            inputs=[box, chat, temperature, max_new_tokens, state],
            outputs=[box, chat, facts, plot, slots],
            concurrency_limit=num_lanes,
            concurrency_id="lanes",
        )
        state_outputs = [state, line, save, chat, facts, plot, slots]
        # gradio's progress and its mark of an error would cover all outputs: the chat, the slots and the line
        quiet = {"show_progress": "hidden", "show_progress_on": [start_reading]}
        # These events cancel an answer that grows: it went on from another state than the new chat.
        reading = start_reading.click(
            read_input,
            inputs=[text, file, state],
            outputs=[text, file, *state_outputs],
            concurrency_limit=num_lanes,
            concurrency_id="lanes",
            cancels=[answering],
            **quiet,
        )
        others = [answering, reading]
        load.upload(load_file, inputs=[load], outputs=state_outputs, cancels=others, **quiet)
        forget.click(lambda: show_state(None), outputs=state_outputs, cancels=others, queue=False, **quiet)
        stop.click(status, inputs=[state], outputs=[line], cancels=others, queue=False, **quiet)
    return demo.queue(max_size=max_waiting)


def load(model_dir: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Loads a model and its tokenizer. Refuses other kinds of models before their code is run."""
    import torch
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

    model_type = PreTrainedConfig.get_config_dict(model_dir)[0].get("model_type")
    if model_type != "phase15":
        raise ValueError(f"{model_dir} is not a Phase15 model: its config.json says {model_type!r}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model, info = AutoModelForCausalLM.from_pretrained(model_dir, trust_remote_code=True, output_loading_info=True)
    except SafetensorError as error:
        raise ValueError(f"{model_dir}: model.safetensors cannot be read: {error}") from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers only warns, and the model would answer with random weights
        raise ValueError(f"{model_dir}: {len(missing)} of the weights are missing: {missing[0]}.")
    if not hasattr(model, "load_state"):
        raise ValueError(
            f"{model_dir} holds code from before a model could read a text into a state: load the model with the code "
            "of this repository, and save it again with `save_pretrained`."
        )
    return model.to(device).eval(), AutoTokenizer.from_pretrained(model_dir, trust_remote_code=True)


def opening_chat(model_dir: str) -> list[dict[str, str]]:
    """
    Returns the conversation in results.json, where train_sft.py leaves the last one it had with the model. The model's
    answer is not part of it. Returns an empty list if there is none.
    """
    from transformers.utils import cached_file

    try:
        path = cached_file(model_dir, "results.json")
    except OSError:  # the model was not trained by train_sft.py
        return []
    problem = f"{model_dir}: results.json was not written by train_sft.py"
    try:
        chat = json.loads(Path(path).read_text("utf-8")).get("chat", [])
    except (ValueError, AttributeError) as error:  # it is not JSON, or not an object
        raise ValueError(f"{problem}: {error}") from error
    for turn in chat:
        if not isinstance(turn, dict) or not all(isinstance(value, str) for value in turn.values()):
            raise ValueError(f"{problem}: its `chat` is not a conversation.")
    return [{"role": turn.get("role", ""), "content": turn.get("content", "")} for turn in chat]


def train_quickstart():
    """Trains outputs/quickstart as README.md does, if it does not exist."""
    if (QUICKSTART / "config.json").is_file():
        return
    if importlib.util.find_spec("phase15") is None:  # in a Space
        raise ValueError("no model: give --model_dir, or set PHASE15_MODEL to a folder or a Hub id.")
    print(f"app.py: there is no {QUICKSTART}; training it, which takes 4 to 6 minutes on two cores", flush=True)
    status = subprocess.run(TRAIN).returncode
    if status:
        raise ValueError(f"the training of {QUICKSTART} ended with exit status {status}.")


def start(argv: list[str] | None, program: str = "phase15 app"):
    args = parse_args(argv, program)
    if not args.model_dir:
        train_quickstart()
    name = args.model_dir or str(QUICKSTART)
    model, tokenizer = load(name)
    limits = (args.max_characters, args.max_waiting, args.num_lanes, args.max_read_tokens)
    demo = build_demo(model, tokenizer, name, *limits, opening_chat(name))
    import gradio as gr

    theme = gr.themes.Default(primary_hue="orange", font=FONTS, font_mono=["ui-monospace", "monospace"])
    max_file_size = max_upload_bytes(model, args.max_read_tokens)
    demo.launch(server_port=args.port, theme=theme, css=CSS, ssr_mode=False, max_file_size=max_file_size)


def main(argv: list[str] | None = None, program: str = "phase15 app"):
    try:  # not phase15.cli.errors: a Space has only this file
        start(argv, program)
    except (ValueError, OSError) as error:
        raise SystemExit(f"{program}: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    main(program="app.py")
