# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Chat with a Phase15 model, and watch the recursion while the answer grows. This file alone is also a Hub Space.

    python -m scripts.app                                  outputs/quickstart, trained first if it is not there
    python -m scripts.app --model_dir DIR_OR_HUB_ID        any Phase15 model; its code is run: read it before
    PHASE15_MODEL=HUB_ID python -m scripts.app             the same, as in a Space
    python -m scripts.app --port 8080                      or GRADIO_SERVER_PORT
    python -m scripts.app --help                           every flag, with the limits for one visitor

Needs no other file of this repository when it is given a model.
"""

import argparse
import html
import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import NamedTuple


MAX_CHARACTERS = 100_000  # of a conversation: 40 pages, some 100 steps of reading; the model itself has no limit
MAX_WAITING = 16  # questions, beside those that are being answered
NUM_LANES = 8  # questions that are answered at once


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
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
    return parser.parse_args(argv)


import gradio as gr
import torch
from matplotlib.figure import Figure
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextIteratorStreamer,
)
from transformers.utils import cached_file


HERE = Path(__file__).parents[2]
QUICKSTART = HERE / "outputs" / "quickstart"
COLUMNS = 32  # steps in the table; the picture has them all
INVISIBLE = str.maketrans({" ": "·", "\n": "⏎", "\t": "⇥", "\r": "␍"})
FONTS = ["system-ui", "sans-serif"]  # no font is fetched from anywhere
THEME = gr.themes.Default(primary_hue="orange", font=FONTS, font_mono=["ui-monospace", "monospace"])
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
#slots .last-sink > * { border-bottom: 2px solid var(--body-text-color); }
"""
HEADING = "### Inside the soft prompt"
LEGEND = (
    "Below: the vocabulary token nearest to each slot, by cosine; the deeper the colour, the more Δ wrote there. "
    "**Framed bold**: Δ turned it into another token than was carried. Hover for numbers."
)


class Step(NamedTuple):
    """One step of the recursion, as lists over the slots in use."""

    name: str  # the soft prompt it made: sp_c, or "read i" where a long query takes several steps
    seen: int  # tokens that have entered the soft prompt
    tokens: list[int]  # nearest to carry + Δ
    cosines: list[float]  # of carry + Δ and that token
    carried: list[int]  # nearest to carry
    shares: list[float]  # ‖Δ‖ / ‖carry + Δ‖


def nearest_tokens(slots: torch.Tensor, embeddings: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Args:
        slots (`torch.Tensor` of shape `(num_slots, hidden_size)`): any vectors.
        embeddings (`torch.Tensor` of shape `(vocab_size, hidden_size)`): the LLM's input embeddings.

    Returns:
        the token of the largest cosine for each slot, and that cosine, both of shape `(num_slots,)`.
    """
    slots, embeddings = slots.float(), embeddings.float()
    scores = slots @ embeddings.T / embeddings.norm(dim=1).clamp(min=1e-12)  # (N, V)
    best, token = scores.max(dim=1)
    return token, best / slots.norm(dim=1).clamp(min=1e-12)


class Recorder:
    """
    Collects the steps of the recursion in one answer.

    Args:
        query_length (`int`): tokens of the query; the step that reads the last of them makes sp_0.
        embeddings (`torch.Tensor` of shape `(vocab_size, hidden_size)`): of the tokens that the tokenizer knows.
    """

    def __init__(self, query_length: int, embeddings: torch.Tensor):
        self.query_length, self.embeddings = query_length, embeddings
        self.raw: list[tuple] = []  # of the lanes' thread, which others wait for
        self.steps: list[Step] = []

    def __call__(self, carried: tuple, stepped: tuple, num_tokens: int):
        """The lanes' thread gives soft prompts of one row."""
        self.raw.append((carried, stepped, num_tokens))

    def read(self) -> list[Step]:
        """All steps so far, worked out in the thread that reads them."""
        for carried, stepped, num_tokens in self.raw[len(self.steps) :]:
            length = int(carried.length[0])
            before, after = carried.embeds[0, :length].float(), stepped.embeds[0, :length].float()
            tokens, cosines = (x.tolist() for x in nearest_tokens(torch.cat([after, before]), self.embeddings))
            shares = ((after - before).norm(dim=1) / after.norm(dim=1).clamp(min=1e-12)).tolist()
            seen = num_tokens + (self.steps[-1].seen if self.steps else 0)
            chunk = sum(step.seen >= self.query_length for step in self.steps)
            name = f"sp_{chunk}" if seen >= self.query_length else f"read {len(self.steps) + 1}"
            self.steps.append(Step(name, seen, tokens[:length], cosines[:length], tokens[length:], shares))
        return list(self.steps)


def reply(
    lanes,
    tokenizer: PreTrainedTokenizerBase,
    conversation: list[dict[str, str]],
    temperature: float = 0.0,
    max_new_tokens: int = 256,
) -> Iterator[tuple[str, list[Step]]]:
    """
    Answers a conversation: the text so far and the steps so far, again and again. Closing the iterator frees the lane.
    Errors of the answer are raised here. `lanes` is a model's `init_continuous_batching()`, started.
    """
    if tokenizer.chat_template:
        ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
    else:
        ids = tokenizer("\n".join(turn["content"] for turn in conversation))["input_ids"]
    sampling = {"do_sample": True, "temperature": float(temperature)} if temperature else {"do_sample": False}
    streamer = TextIteratorStreamer(tokenizer, skip_special_tokens=True)
    request = lanes.lanes.request(ids, max_new_tokens=max_new_tokens, **sampling)
    request.on_token = lambda request: streamer.put(torch.tensor(request.generated_tokens[-1:]))
    request.on_finish = lambda _: streamer.end()
    request.on_step = recorder = Recorder(len(ids), lanes.lanes.model.get_input_embeddings().weight[: len(tokenizer)])
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
    """Heat map of the share of Δ in every slot at every step."""
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
    """A token's text with a sign for every character that cannot be seen."""
    return "".join(c if c.isprintable() else "�" for c in text.translate(INVISIBLE))


def table(steps: list[Step], tokenizer: PreTrainedTokenizerBase, num_slots: int, num_sinks: int) -> str:
    """HTML: a row for every slot, a column for each of the last steps, in it the token nearest to the slot."""
    steps = steps[-COLUMNS:]
    largest = max((share for step in steps for share in step.shares), default=0) or 1
    texts = {token: tokenizer.decode([token]) for step in steps for token in {*step.tokens, *step.carried}}
    texts = {token: html.escape(visible(text)) for token, text in texts.items()}

    def cell(step: Step, slot: int) -> str:
        if slot >= len(step.tokens):  # not used yet
            return "<td></td>"
        token, carried, share = step.tokens[slot], step.carried[slot], step.shares[slot]
        moved, was = (' class="moved"', f", carried {texts[carried]}") if token != carried else ("", "")
        title = f"cosine {step.cosines[slot]:.2f}, ‖Δ‖/‖slot‖ {share:.3f}{was}"
        return f'<td{moved} style="--d:{share / largest:.2f}" title="{title}">{texts[token]}</td>'

    rows = ["<tr><th>slot</th>" + "".join(f"<th>{step.name}</th>" for step in steps) + "</tr>"]
    for slot in range(num_slots):
        last_sink, sink = ' class="last-sink"' if slot == num_sinks - 1 else "", "sink " if slot < num_sinks else ""
        cells = "".join(cell(step, slot) for step in steps)
        rows.append(f"<tr{last_sink}><th>{sink}{slot}</th>{cells}</tr>")
    return f"<table><thead>{rows[0]}</thead><tbody>{''.join(rows[1:])}</tbody></table>"


def build_demo(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    max_characters: int = MAX_CHARACTERS,
    max_waiting: int = MAX_WAITING,
    num_lanes: int = NUM_LANES,
    opening: list[dict[str, str]] | None = None,
) -> gr.Blocks:
    """
    The page: chat on the left, the soft prompt on the right. It opens on the conversation `opening` with the model's
    answer. A conversation above the limit is a gr.Error.
    """
    config = model.config
    sizes = config.num_soft_tokens, config.num_sink_tokens
    width, number_size = model.get_input_embeddings().weight.shape[1], model.dtype.itemsize
    lanes = model.init_continuous_batching(max_batch_size=num_lanes)
    lanes.start()
    state = f"{sizes[0]} slots × {width} numbers: {sizes[0] * width * number_size / 1024:,.0f} kB"

    def turn(role: str, text: str) -> dict:
        # escaped, since the chat shows tags as HTML; a part of type text, since it re-indents a plain string
        return {"role": role, "content": [{"type": "text", "text": html.escape(text)}]}

    def said(turn: dict) -> dict[str, str]:
        return {"role": turn["role"], "content": html.unescape("".join(part["text"] for part in turn["content"]))}

    def panel(steps: list[Step]) -> list:
        last = steps[-1]
        facts = f"{HEADING}: {last.name}\n{last.seen:,} tokens read into {state} at any length."
        return [facts, picture(steps, *sizes), table(steps, tokenizer, *sizes)]

    def respond(message: str, history: list[dict], temperature: float, max_new_tokens: int):
        if not message.strip():
            yield [gr.skip()] * 5
            return
        history = [*history, turn("user", message)]
        conversation = [said(turn) for turn in history]
        if (length := sum(len(turn["content"]) for turn in conversation)) > max_characters:
            raise gr.Error(
                f"The conversation would have {length:,} characters, and this page reads {max_characters:,} at most: "
                "ask something shorter, or reload the page to start anew.",
                print_exception=False,
            )
        yield "", history, *[gr.skip()] * 3
        shown = 0
        try:
            with closing(reply(lanes, tokenizer, conversation, temperature, max_new_tokens)) as answer:
                for text, steps in answer:
                    is_new, shown = len(steps) > shown, len(steps)
                    shows = panel(steps) if is_new else [gr.skip()] * 3
                    yield gr.skip(), [*history, turn("assistant", text)], *shows
        except Exception as error:
            raise gr.Error(html.escape(f"{type(error).__name__}: {error}")) from error  # the page shows it as HTML

    first, shows = [], [HEADING, None, ""]
    if opening:
        *_, (text, steps) = reply(lanes, tokenizer, opening)
        whole = [*opening, {"role": "assistant", "content": text}]
        first, shows = [turn(said["role"], said["content"]) for said in whole], panel(steps)

    with gr.Blocks(title="Phase15", analytics_enabled=False, fill_width=True) as demo:
        gr.HTML(f"<h2>Phase15 · {html.escape(name)}</h2>")
        with gr.Row():
            with gr.Column(scale=2, min_width=320):
                height = "max(320px, 100vh - 240px)"
                look = {"elem_id": "chat", "height": height, "render_markdown": False, "buttons": []}
                chat = gr.Chatbot(first, label="Chat", **look)
                with gr.Row(equal_height=True):
                    box = gr.Textbox(show_label=False, placeholder="Ask something", submit_btn=True, scale=5)
                    stop = gr.Button("Stop", min_width=70)
                with gr.Accordion("Sampling", open=False):
                    temperature = gr.Slider(0, 2, 0, step=0.05, label="Temperature (0: greedy)")
                    max_new_tokens = gr.Slider(16, 4096, 256, step=16, label="Most new tokens")
            with gr.Column(scale=3, min_width=480):
                facts = gr.Markdown(shows[0], elem_id="facts")
                plot = gr.Plot(shows[1], show_label=False, format="png", elem_id="picture")
                gr.Markdown(LEGEND)
                slots = gr.HTML(shows[2], elem_id="slots", apply_default_css=False)
        event = box.submit(
            respond,
            inputs=[box, chat, temperature, max_new_tokens],
            outputs=[box, chat, facts, plot, slots],
            concurrency_limit=num_lanes,
        )
        stop.click(None, cancels=[event])
    return demo.queue(max_size=max_waiting)


def load(model_dir: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model and its tokenizer. Raises a ValueError before any code of another kind of model is run."""
    model_type = PreTrainedConfig.get_config_dict(model_dir)[0].get("model_type")
    if model_type != "phase15":
        raise ValueError(f"{model_dir} is not a Phase15 model: its config.json says {model_type!r}.")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        model, info = AutoModelForCausalLM.from_pretrained(model_dir, trust_remote_code=True, output_loading_info=True)
    except SafetensorError as error:
        raise ValueError(f"{model_dir}: model.safetensors cannot be read: {error}") from error
    if missing := sorted(info["missing_keys"]):  # the library would go on with random weights
        raise ValueError(f"{model_dir}: {len(missing)} of the weights are missing: {missing[0]}.")
    if not hasattr(model, "generation_chunk_length"):
        raise ValueError(
            f"{model_dir} holds code from before this page answered several visitors at once: load the model with the "
            "code of this repository, and save it again with `save_pretrained`."
        )
    return model.to(device).eval(), AutoTokenizer.from_pretrained(model_dir, trust_remote_code=True)


def opening_chat(model_dir: str) -> list[dict[str, str]]:
    """The conversation that train_sft.py asked the model in results.json, without the answer; empty without one."""
    try:
        chat = json.loads(Path(cached_file(model_dir, "results.json")).read_text("utf-8")).get("chat", [])
    except OSError:  # no such file
        return []
    except (ValueError, AttributeError) as error:
        raise ValueError(f"{model_dir}: results.json was not written by train_sft.py: {error}") from error
    if not all(isinstance(turn, dict) and {str} == {*map(type, turn.values())} for turn in chat):
        raise ValueError(f"{model_dir}: results.json was not written by train_sft.py: its `chat` is no conversation.")
    return [{"role": turn.get("role", ""), "content": turn.get("content", "")} for turn in chat]


def train_quickstart():
    """Makes outputs/quickstart as README.md does, if it is not there."""
    if (QUICKSTART / "config.json").is_file():
        return
    if not (HERE / "train_sft.py").is_file():
        raise ValueError("no model: give --model_dir, or set PHASE15_MODEL to a folder or a Hub id.")
    print(f"app.py: there is no {QUICKSTART}; training it, which takes 4 to 6 minutes on two cores", flush=True)
    if code := subprocess.run([sys.executable, "train_sft.py"], cwd=HERE).returncode:
        raise ValueError(f"the training of outputs/quickstart ended with exit status {code}.")


def main(argv: list[str]):
    args = parse_args(argv)
    if not args.model_dir:
        train_quickstart()
    name = args.model_dir or os.path.relpath(QUICKSTART)
    limits = args.max_characters, args.max_waiting, args.num_lanes
    demo = build_demo(*load(name), name, *limits, opening_chat(name))
    # no file is taken: the page has no use for any
    demo.launch(server_port=args.port, theme=THEME, css=CSS, ssr_mode=False, max_file_size=0)


def run_command():
    try:  # not phase15.errors: a Space has this file alone
        main(sys.argv[1:])
    except (ValueError, OSError) as error:
        raise SystemExit(f"app.py: {' '.join(str(error).split())}") from error


if __name__ == "__main__":
    run_command()
