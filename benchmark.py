# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Speed and memory of Phase15 beside its rivals, in one process, with random weights at a named shape.

    python benchmark.py decode --shape tinyllama    ms per token, against the base under transformers' `generate`
    python benchmark.py long --shape tinyllama      the same, as the answer grows: a table and a curve
    python benchmark.py train --shape tinyllama     a step, against chunk by chunk and full-context fine-tuning
    python benchmark.py load --shape smollm2        `from_pretrained`, against the bare base

Every variant runs once uncounted, then all take turns; figures are medians over the rounds. Ceilings are measured on
the spot: bytes/s of a large copy, FLOP/s of a large matrix product. The last line is JSON; with --json, the only one.
"""

import argparse
import copy
import gc
import json
import math
import os
import platform
import statistics
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, CompileConfig, DynamicCache, LlamaConfig
from transformers.generation.streamers import BaseStreamer
from transformers.utils import logging

import decoding_phase15
from compat_phase15 import CACHE_NAME
from configuration_phase15 import TINYLLAMA, Phase15Config
from modeling_phase15 import Phase15Cache, Phase15ForCausalLM
from train_sft import compile_layers


SMOLLM2 = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
TINY = {
    "vocab_size": 1024,
    "hidden_size": 64,
    "intermediate_size": 176,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
}
SHAPES = {
    "tinyllama": (TINYLLAMA, {}),
    "smollm2": (SMOLLM2, {}),
    "tiny": (TINY, {"hypernet_hidden_size": 64, "hypernet_intermediate_size": 256, "hypernet_num_attention_heads": 4}),
}
BASE, PLAIN, COMPILED = "base", "phase15, library's loop", "phase15, compiled"
BASE_COMPILED = "base, static cache, compiled"


# what is measured with


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(function: Callable) -> float:
    """Seconds of one call, without garbage collection, as `timeit` measures."""
    gc.collect()
    gc.disable()
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    elapsed = time.perf_counter() - start
    gc.enable()
    return elapsed


def rounds(variants: dict[str, Callable], repeats: int) -> dict[str, list[float]]:
    """Seconds of each variant, taking turns, after one call each that does not count."""
    for function in variants.values():
        function()
    seconds = {name: [] for name in variants}
    for index in range(repeats):
        for name in sorted(variants, reverse=bool(index % 2)):
            seconds[name].append(timed(variants[name]))
    return seconds


def peak_memory(function: Callable) -> int | None:
    """Most bytes allocated on the GPU during a call, over what was there before; not measured on a CPU."""
    if not torch.cuda.is_available():
        return None
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    function()
    return torch.cuda.max_memory_allocated() - before


def ceilings(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Bytes/s read and written by a large copy, FLOP/s of a large matrix product."""
    is_cuda = device.type == "cuda"
    source = torch.empty(2**30 if is_cuda else 2**27, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    size = 8192 if is_cuda else 1536
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    copy = statistics.median(rounds({"copy": lambda: target.copy_(source)}, 5)["copy"])
    product = statistics.median(rounds({"product": lambda: left @ right}, 5)["product"])
    return {"bytes_per_second": 2 * source.numel() / copy, "flop_per_second": 2 * size**3 / product}


def commit() -> str:
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty", "--exclude", "*"],
            cwd=Path(__file__).parent,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown: not a git repository"


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


# the models


def make_models(args: argparse.Namespace) -> tuple[Phase15ForCausalLM, torch.nn.Module]:
    """A Phase15 model whose Δ is not zero, and the base inside it."""
    text_config, config = SHAPES[args.shape]
    torch.manual_seed(0)
    text_config = LlamaConfig(**text_config, bos_token_id=1, eos_token_id=None)
    with torch.device(args.device):
        model = Phase15ForCausalLM(Phase15Config(text_config=text_config, **config)).to(args.dtype).eval()
        torch.nn.init.normal_(model.hypernet.alpha)
    return model, model.llm


def read_parameters(module: torch.nn.Module) -> int:
    """Parameters that a pass reads: all but the table of input embeddings, of which it reads single rows."""
    table = module.get_input_embeddings().weight
    tied = module.get_output_embeddings().weight is table
    return sum(parameter.numel() for parameter in module.parameters()) - (0 if tied else table.numel())


def hypernet_parameters(model: Phase15ForCausalLM) -> int:
    return sum(parameter.numel() for parameter in model.hypernet.parameters())


def state_bytes(cache) -> int:
    """Of everything that a cache carries from token to token."""
    if isinstance(cache, Phase15Cache):
        own = (*cache.soft_prompt, cache.chunk)
        return sum(tensor.nbytes for tensor in own) + state_bytes(cache.llm_cache)
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)


def decoder_bytes(model: Phase15ForCausalLM) -> int:
    """Of all buffers of the compiled path."""
    decoders = decoding_phase15._DECODERS[model].values()
    tensors = (
        (*d.soft_prompt, d.chunk, d.finished, d.column, *d.slot_cache.keys, *d.slot_cache.values) for d in decoders
    )
    return sum(tensor.nbytes for buffers in tensors for tensor in buffers)


@contextmanager
def quiet():
    """Without the library's advice, which is about single calls, and its progress bars."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield
    logging.enable_progress_bar()
    logging.set_verbosity(level)


# the benchmarks


def decode(args: argparse.Namespace) -> dict:
    """Whole calls of `generate`, prompt included."""
    model, base = make_models(args)
    limits = ceilings(args.device, args.dtype)
    results = {f"batch {size}": decode_batch(args, model, base, limits, size) for size in args.batch_sizes}
    return {"ceilings": limits, "results": results}


def compile_everywhere() -> CompileConfig:
    """Has the library compile a model on a CPU too; it compiles on GPUs alone unless told so."""
    config = CompileConfig()
    config._compile_all_devices = True
    return config


def decode_batch(args: argparse.Namespace, model, base, limits: dict[str, float], batch_size: int) -> dict[str, dict]:
    config = model.config
    prompt = torch.randint(5, config.text_config.vocab_size, (batch_size, args.prompt_length), device=args.device)
    options = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": args.new_tokens,
        "do_sample": args.sample,
        "pad_token_id": 0,
    }
    everywhere = compile_everywhere()
    variants = {
        BASE: lambda: base.generate(prompt, **options),
        PLAIN: lambda: model.generate(prompt, compile=False, **options),
    }
    if args.compile:
        variants[BASE_COMPILED] = lambda: base.generate(
            prompt, cache_implementation="static", compile_config=everywhere, **options
        )
        variants[COMPILED] = lambda: model.generate(prompt, compile=True, **options)
    medians = {name: statistics.median(times) for name, times in rounds(variants, args.rounds).items()}
    peaks = {name: peak_memory(function) for name, function in variants.items()}

    size = torch.finfo(args.dtype).bits // 8
    num_slots, chunk_length = config.num_soft_tokens, config.chunk_length
    head_dim = config.text_config.hidden_size // config.text_config.num_attention_heads
    position = 2 * config.text_config.num_hidden_layers * config.text_config.num_key_value_heads * head_dim
    context = args.prompt_length + args.new_tokens / 2
    weights, window = read_parameters(base), num_slots + chunk_length / 2
    read = {  # bytes per step of the whole batch: weights once, keys and values of every row
        True: size * (weights + hypernet_parameters(model) / chunk_length + batch_size * window * position),
        False: size * (weights + batch_size * context * position),
    }
    rows = {}
    for name, seconds in medians.items():
        step = seconds / args.new_tokens
        bandwidth = read[name in (PLAIN, COMPILED)] / step
        rows[name] = {
            "ms_per_token": 1e3 * step,
            "tokens_per_second": batch_size / step,
            "ratio_to_base": seconds / medians[BASE],
            "peak_mb": None if peaks[name] is None else peaks[name] / 2**20,
            "gb_per_second": bandwidth / 1e9,
            "share_of_copy": bandwidth / limits["bytes_per_second"],
        }
    if args.compile and not args.sample:
        same = variants[COMPILED]() == variants[PLAIN]()
        rows[COMPILED]["tokens_equal_to_the_librarys_loop"] = same[:, args.prompt_length :].float().mean().item()
        if args.dtype == torch.float32 and not same.all():
            raise SystemExit(f"benchmark.py: the compiled path gives other tokens than the library's loop: {rows}")
    return rows


class Clock(BaseStreamer):
    """Notes when each token came, and how large the state was at some of them."""

    def __init__(self, state: Callable[[], int] | None, lengths: list[int]):
        self.state, self.lengths = state, lengths
        self.times, self.states, self.allocated = [], {}, {}

    def put(self, value):
        synchronize()
        self.times.append(time.perf_counter())  # the first is the prompt's
        if (length := len(self.times) - 1) in self.lengths:
            self.states[length] = self.state()
            if torch.cuda.is_available():
                self.allocated[length] = torch.cuda.memory_allocated()

    def end(self):
        pass


def long(args: argparse.Namespace) -> dict:
    """One long answer of each; every token is waited for, so single tokens cost more than in `decode`."""
    model, base = make_models(args)
    lengths = [256 * 2**power for power in range(32) if 256 * 2**power <= args.new_tokens]
    if not lengths:
        raise SystemExit("benchmark.py: long needs --new_tokens of at least 256.")
    window = 128  # tokens that a figure is the mean of: whole chunks
    prompt = torch.randint(5, model.config.text_config.vocab_size, (1, args.prompt_length), device=args.device)
    options = {"attention_mask": torch.ones_like(prompt), "do_sample": False, "pad_token_id": 0}
    variants = {
        BASE: (base, DynamicCache, {}),
        PLAIN: (model, Phase15Cache, {"compile": False}),
        **({COMPILED: (model, Phase15Cache, {"compile": True})} if args.compile else {}),
    }
    rows, curves, ends = {}, {}, {}
    for candidate, _, kwargs in variants.values():
        candidate.generate(prompt, max_new_tokens=2 * window, **options, **kwargs)  # not counted
    clocks = {name: [] for name in variants}
    for index in range(args.rounds):
        for name in sorted(variants, reverse=bool(index % 2)):
            candidate, cache_class, kwargs = variants[name]
            cache = cache_class(config=candidate.config)
            state = partial(decoder_bytes, model) if name == COMPILED else partial(state_bytes, cache)
            clock = Clock(state, lengths)
            started = time.perf_counter()
            candidate.generate(
                prompt, max_new_tokens=lengths[-1], streamer=clock, **{CACHE_NAME: cache}, **options, **kwargs
            )
            clock.times[0] = started
            clocks[name].append(clock)
    for name, runs in clocks.items():
        ends[name] = [
            statistics.median(run.times[n] - run.times[0] for run in runs) for n in range(1, lengths[-1] + 1)
        ]
        curves[name] = [
            statistics.median((run.times[n] - run.times[n - window]) / window for run in runs)
            for n in range(window, lengths[-1] + 1, window)
        ]
        rows[name] = {
            str(length): {
                "ms_per_token": 1e3 * curves[name][length // window - 1],
                "state_mb": runs[-1].states[length] / 2**20,
                "allocated_mb": runs[-1].allocated[length] / 2**20 if runs[-1].allocated else None,
            }
            for length in lengths
        }
        first, last = rows[name][str(lengths[0])], rows[name][str(lengths[-1])]
        rows[name]["growth"] = {
            key: last[key] / first[key] for key in ("ms_per_token", "state_mb", "allocated_mb") if first[key]
        }
    for name in variants:
        pairs = enumerate(zip(ends[name], ends[BASE], strict=True), start=1)
        behind = [length for length, (ours, bases) in pairs if ours > bases]
        if name != BASE:  # from here on its whole answer was there before the base's
            ahead = max(behind, default=0) + 1
            rows[name]["faster_than_base_from_token"] = ahead if ahead <= len(ends[name]) else None
    picture = draw(curves, window, args)
    return {"lengths": lengths, "window": window, "results": rows, "picture": str(picture)}


def draw(curves: dict[str, list[float]], window: int, args: argparse.Namespace) -> Path:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for name, values in curves.items():
        axes.plot([window * (i + 1) for i in range(len(values))], [1e3 * value for value in values], label=name)
    axes.set(xlabel="tokens generated", ylabel=f"ms per token, mean of {window}", ylim=(0, None))
    axes.set_title(f"{args.shape}, {device_name(args.device)}, {commit()}", fontsize=9)
    axes.legend()
    args.picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(args.picture, dpi=120)
    return args.picture


def chunk_by_chunk(model: Phase15ForCausalLM, ids: torch.LongTensor, query_length: int) -> torch.Tensor:
    """The loss as the recursion is written down: the LLM is called once per chunk."""
    embed, chunk_length = model.get_input_embeddings(), model.config.chunk_length
    length = torch.full_like(ids[:, 0], query_length)
    soft_prompt, loss = model.read(model.empty_soft_prompt(len(ids)), ids[:, :query_length], length), 0
    chunks = ids[:, query_length:].split(chunk_length, dim=1)
    for before, chunk in zip([None, *chunks], chunks, strict=False):
        if before is not None:
            soft_prompt = model.step(soft_prompt, embed(before), torch.full_like(length, chunk_length))
        hidden_states, _ = model.predict(soft_prompt, embed(chunk[:, :-1]))
        logits = model.get_output_embeddings()(hidden_states)
        loss = loss + F.cross_entropy(logits.flatten(0, 1).float(), chunk.flatten(), reduction="sum")
    return loss / ids[:, query_length:].numel()


def train(args: argparse.Namespace) -> dict:
    """Steps of fine-tuning: forward, backward and AdamW, every row a query and an answer of full length."""
    model, base = make_models(args)
    model.train()
    limits = ceilings(args.device, args.dtype)
    if args.stage == "hypernet":
        base.requires_grad_(False)
    if args.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})  # the same weights
    compile_layers(compiled)
    results = {f"batch {size}": train_batch(args, model, base, compiled, limits, size) for size in args.batch_sizes}
    return {"ceilings": limits, "results": results}


def train_batch(args: argparse.Namespace, model, base, compiled, limits, batch_size: int) -> dict[str, dict]:
    config, query_length, answer_length = model.config, args.prompt_length, args.new_tokens
    ids = torch.randint(
        5, config.text_config.vocab_size, (batch_size, query_length + answer_length), device=args.device
    )
    labels = ids.clone()
    labels[:, :query_length] = -100
    losses = {
        "phase15": lambda: model(ids, labels=labels, skip_logits=True).loss,
        "phase15, chunk by chunk": lambda: chunk_by_chunk(model, ids, query_length),
        "base, full context": lambda: base(ids, labels=labels).loss,
    }
    if args.stage == "hypernet":
        del losses["base, full context"]  # frozen: there is nothing to train
    if args.compile:
        losses["phase15, compiled layers"] = lambda: compiled(ids, labels=labels, skip_logits=True).loss
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=0.0, fused=True)  # at rate 0, so that no variant moves the others

    def step(loss: Callable):
        loss().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    variants = {name: lambda loss=loss: step(loss) for name, loss in losses.items()}
    with torch.no_grad():
        values = {name: loss().item() for name, loss in losses.items()}
    medians = {name: statistics.median(times) for name, times in rounds(variants, args.rounds).items()}
    peaks = {name: peak_memory(function) for name, function in variants.items()}

    # 6 FLOP per parameter and token processed, nothing for recomputation; 4 where no weight gradient is made
    num_chunks = math.ceil(answer_length / config.chunk_length)
    layers, head = sum(p.numel() for p in base.model.layers.parameters()), base.lm_head.weight.numel()
    positions = num_chunks * (config.num_soft_tokens + config.chunk_length - 1)
    steps = math.ceil(query_length / config.max_query_length) + num_chunks - 1
    per_parameter = 4 if args.stage == "hypernet" else 6
    recursion = 6 * hypernet_parameters(model) * steps * config.num_soft_tokens
    flop = {
        True: batch_size * (per_parameter * (layers * positions + head * answer_length) + recursion),
        False: batch_size * 6 * (layers + head) * (query_length + answer_length),
    }
    rows = {}
    for name, seconds in medians.items():
        achieved = flop[name.startswith("phase15")] / seconds
        rows[name] = {
            "ms_per_step": 1e3 * seconds,
            "answer_tokens_per_second": batch_size * answer_length / seconds,
            "speedup_over_chunk_by_chunk": medians["phase15, chunk by chunk"] / seconds,
            "peak_mb": None if peaks[name] is None else peaks[name] / 2**20,
            "tflop_per_second": achieved / 1e12,
            "share_of_product": achieved / limits["flop_per_second"],
            "loss": values[name],
        }
    return rows


def load(args: argparse.Namespace) -> dict:
    """`from_pretrained` of saved folders, files in the page cache."""
    with tempfile.TemporaryDirectory() as work:
        if args.folders is None:
            model, base = make_models(args)
            folders = [os.path.join(work, name) for name in ("phase15", "base")]
            model.save_pretrained(folders[0])
            base.save_pretrained(folders[1])
            del model, base
        else:
            folders = args.folders
        variants = {
            name: lambda folder=folder: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
            for name, folder in zip(("phase15", "base"), folders, strict=True)
        }
        seconds = rounds(variants, args.rounds)
    return {
        "results": {
            name: {
                "median_ms": 1e3 * statistics.median(times),
                "fastest_ms": 1e3 * min(times),
                "ratio_to_base": statistics.median(times) / statistics.median(seconds["base"]),
            }
            for name, times in seconds.items()
        }
    }


# what is printed


def table(rows: dict[str, dict]) -> str:
    """Markdown; a row per variant."""
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = ["| |" + "|".join(f" {column.replace('_', ' ')} " for column in columns) + "|"]
    lines.append("|---|" + "---|" * len(columns))
    for name, row in rows.items():
        lines.append(f"| {name} |" + "|".join(f" {shown(row.get(column))} " for column in columns) + "|")
    return "\n".join(lines)


def shown(value) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return "not measured" if value is None else str(value)


def device(name: str) -> torch.device:
    """A device that is here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(str(error).partition("\n")[0]) from error
    return torch.device(name)


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cuda = torch.cuda.is_available()
    parser.add_argument("what", choices=["train", "decode", "long", "load"])
    parser.add_argument("--shape", choices=list(SHAPES), default="tinyllama" if cuda else "smollm2")
    parser.add_argument("--json", action="store_true", help="print the JSON line alone")
    parser.add_argument("--rounds", type=int, help="counted calls of each variant (default 5; load 30; long 1)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="rows (default: decode 1, on CUDA 1 64; train 8)")
    parser.add_argument("--prompt_length", type=int, default=256, help="tokens of the prompt or query")
    parser.add_argument("--new_tokens", type=int, help="tokens of the answer (default 256; long 8192)")
    parser.add_argument("--sample", action="store_true", help="decode: sampling instead of greedy search")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=cuda, help="the compiled variants")
    parser.add_argument("--stage", choices=["hypernet", "full"], default="full", help="train: what is trained")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="train: recompute the LLM's activations")
    parser.add_argument("--folders", nargs=2, metavar=("PHASE15", "BASE"), help="load: these, not random weights")
    parser.add_argument("--picture", type=Path, help="long: the curve (default outputs/long_SHAPE.png)")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16" if cuda else "float32")
    parser.add_argument("--device", type=device, default=torch.device("cuda" if cuda else "cpu"))
    args = parser.parse_args(argv)
    for name in ("rounds", "batch_sizes", "prompt_length", "new_tokens"):
        value = getattr(args, name)
        if value is not None and min(value if isinstance(value, list) else [value]) < 1:
            parser.error(f"argument --{name}: must be 1 or more, not {value}")
    for folder in args.folders or ():
        if not Path(folder, "config.json").is_file():
            parser.error(f"argument --folders: {folder} is no folder of a model, it has no config.json")
    args.dtype = getattr(torch, args.dtype)
    args.rounds = args.rounds or {"load": 30, "long": 1}.get(args.what, 5)
    args.new_tokens = args.new_tokens or (8192 if args.what == "long" else 256)
    if args.batch_sizes is None:
        args.batch_sizes = {"decode": [1, 64] if cuda else [1], "train": [8]}.get(args.what, [1])
    args.picture = args.picture or Path("outputs") / f"long_{args.shape}.png"
    return args


def main(args: argparse.Namespace) -> dict:
    with quiet():
        report = {"train": train, "decode": decode, "long": long, "load": load}[args.what](args)
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "picture", "folders")}
    settings |= {name: str(settings[name]).removeprefix("torch.") for name in ("dtype", "device")}
    report = {
        "benchmark": args.what,
        "commit": commit(),
        "device": device_name(args.device),
        "versions": {package: version(package) for package in ("torch", "transformers")},
        "settings": settings,
        **report,
    }
    if not args.json:
        print(f"{args.what}, {args.shape}, {settings['dtype']}, {report['device']}, commit {report['commit']}")
        if limits := report.get("ceilings"):
            rates = limits["bytes_per_second"] / 1e9, limits["flop_per_second"] / 1e12
            print("ceilings: a large copy {:.0f} GB/s, a large matrix product {:.2f} TFLOP/s".format(*rates))
        results = report["results"]
        if args.what == "load":
            results = {"": results}
        for name, rows in results.items():
            if args.what == "long":
                found = rows.get("faster_than_base_from_token", "")
                name += f"; whole answer faster than the base's from token: {shown(found)}" if found != "" else ""
                rows = {key: row for key, row in rows.items() if isinstance(row, dict)}
            print(f"\n{name}\n{table(rows)}")
        print()
    print(json.dumps(report))
    return report


if __name__ == "__main__":
    main(parse_args())
