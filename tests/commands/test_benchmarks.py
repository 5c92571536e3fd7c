# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""python -m benchmarks at the tiny shape: its report and tables, and that variants compute what they are named for."""

import argparse
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from reference import CHUNK, QUERY, random_ids
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from phase15.commands.benchmarks import __main__ as benchmark
from phase15.commands.benchmarks import decode as decode_benchmark
from phase15.commands.benchmarks import harness, measuring
from phase15.commands.benchmarks import state as state_benchmark
from phase15.commands.benchmarks import train as train_benchmark
from phase15.commands.benchmarks.serve import Job, count_flops
from phase15.model import decoding_phase15


ROOT = Path(__file__).parents[2]


def parse(argv: list[str]) -> argparse.Namespace:
    return measuring.resolve(benchmark.parse_args(argv))


def report_of(*argv: str, capsys) -> tuple[dict, str]:
    measuring.measure(parse([*argv, "--shape", "tiny", "--no-compile"]))
    *text, last = capsys.readouterr().out.splitlines()
    report = json.loads(last)
    assert report["settings"]["shape"] == "tiny" and report["benchmark"] == argv[0]
    assert report["commit"] and report["versions"].keys() == {"torch", "transformers"}
    return report, "\n".join(text)


def test_decode(capsys):
    argv = ("decode", "--rounds", "1", "--new_tokens", "20", "--prompt_length", "40", "--batch_sizes", "1", "3")
    report, text = report_of(*argv, capsys=capsys)
    assert list(report["results"]) == ["batch_1", "batch_3"]
    for name, rows in report["results"].items():
        assert list(rows) == ["base", "phase15"] and name.replace("_", " ") in text
        for row in rows.values():
            rate = report["ceilings"]["bytes_per_second"] * row["share_of_copy"]
            assert rate == pytest.approx(1e9 * row["gb_per_second"])
            assert row["tokens_per_second"] == pytest.approx(1e3 * int(name[-1]) / row["ms_per_token"])
    assert "not measured" in text or torch.cuda.is_available()  # memory on a CPU


def test_state(capsys):
    argv = ("state", "--rounds", "2", "--lengths", "40", "300", "--max_prefill", "100")
    report, text = report_of(*argv, capsys=capsys)
    assert list(report["results"]) == ["40_tokens", "300_tokens"] and "not measured" in text
    short, long = report["results"].values()
    models = ["phase15", "phase15_small", "phase15_small_reads_layers"]
    assert list(short) == list(long) == [*models, "base", "base_reads_again"]
    for name in (*models, "base"):
        least, most = short[name]["read_speedup_range"]
        assert least <= short[name]["read_speedup"] <= most and short[name]["seconds_of_a_question"] > 0
        assert long[name]["read_speedup"] is None and long[name]["question_speedup"] is None
    for name in models:
        assert long[name]["seconds_to_read"] > 0 and long[name]["seconds_of_a_question"] > 0
        assert short[name]["bytes"] == long[name]["bytes"]  # whatever the length
    assert short["base"]["read_speedup"] == short["base"]["question_speedup"] == 1
    assert short["base_reads_again"]["seconds_of_a_question"] > 0 and short["base_reads_again"]["bytes"] == 0
    assert long["base"]["seconds_to_read"] is None and long["base_reads_again"]["seconds_of_a_question"] is None
    position = 4 * 2 * 2 * 2 * 16  # float32, keys and values, layers, heads of keys, their width
    assert short["base"]["bytes"] == 40 * position and long["base"]["bytes"] == 300 * position


def test_a_speedup_is_that_of_a_round():
    seconds = {"base": [4.0, 18.0, 6.0], "phase15": [2.0, 3.0, 2.0]}
    assert state_benchmark.speedups(seconds, "phase15") == [2.0, 6.0, 3.0]
    assert state_benchmark.speedups({"phase15": [2.0]}, "phase15") is None  # the base was not measured


def test_other_work_counts_only_with_several_threads():
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        assert state_benchmark.choose_clock(torch.device("cpu")) is time.process_time
        assert state_benchmark.choose_clock(torch.device("cuda")) is time.perf_counter
        torch.set_num_threads(2)
        assert state_benchmark.choose_clock(torch.device("cpu")) is time.perf_counter
    finally:
        torch.set_num_threads(threads)


def test_the_base_reads_a_text_once_or_with_every_question():
    """All variants share one LLM, whose inputs are counted; the kept cache is the same after a question."""
    lengths = []
    args = parse(["state", "--shape", "tiny", "--no-compile", "--rounds", "1", "--lengths", "40"])
    models = state_benchmark.make_readers(args)
    llm = models["phase15"].llm
    assert all(model.llm is llm and model.hypernet.alpha.abs().min() > 0 for model in models.values())
    assert models["phase15_small_reads_layers"].config.hypernet_reads_layers == 2
    llm.register_forward_pre_hook(
        lambda module, positional, inputs: lengths.append(inputs["input_ids"].shape[1]), with_kwargs=True
    )
    ids = random_ids(1, 40)
    question = random_ids(1, state_benchmark.QUESTION_LENGTH)
    cache = state_benchmark.prefill(llm, ids)
    assert lengths == [40] and cache.get_seq_length() == 40
    for _ in range(2):  # the cache is copied, so the second question starts from it, too
        lengths.clear()
        state_benchmark.ask_base(llm, cache, torch.cat([ids, question], dim=1))
        assert lengths == [state_benchmark.QUESTION_LENGTH] + [1] * (state_benchmark.ANSWER_LENGTH - 1)
    lengths.clear()
    state_benchmark.ask_base_again(llm, torch.cat([ids, question], dim=1))
    assert lengths[0] == 40 + state_benchmark.QUESTION_LENGTH and len(lengths) == state_benchmark.ANSWER_LENGTH


def test_the_base_is_compiled_on_a_cpu_too(bases, monkeypatch):
    """Otherwise `python -m benchmarks decode --compile` would time a base in eager mode."""
    base = AutoModelForCausalLM.from_pretrained(bases["llama"])
    calls = []

    def get_compiled_call(self, config):
        calls.append(config)
        return self.__call__

    monkeypatch.setattr(type(base), "get_compiled_call", get_compiled_call)
    config = decode_benchmark.compile_everywhere()
    base.generate(random_ids(1, 5), max_new_tokens=3, cache_implementation="static", compile_config=config)
    assert calls == [config]


def test_json_prints_only_json(capsys):
    _, text = report_of("decode", "--json", "--rounds", "1", "--new_tokens", "4", capsys=capsys)
    assert not text


def test_long(capsys, tmp_path):
    picture = tmp_path / "folder" / "long.png"
    report, text = report_of("long", "--new_tokens", "600", "--picture", str(picture), capsys=capsys)
    assert report["lengths"] == [256, 512] and picture.read_bytes().startswith(b"\x89PNG")
    base = report["results"]["base"]
    ours = report["results"]["phase15"]
    assert ours["growth"]["state_mb"] == 1
    head_bytes = 4 * 2 * 2 * 2 * 16  # float32, keys and values, layers, heads of keys, their width
    # after 256 answers the last token is in no cache
    assert base["256"]["state_mb"] == (256 + 256 - 1) * head_bytes / 2**20
    assert base["growth"]["state_mb"] == pytest.approx((256 + 512 - 1) / (256 + 256 - 1))
    assert "\nbase\n" in text and re.search(r"\nphase15; .* from token: (\d+|not measured)\n", text)


def test_train(capsys):
    argv = ("train", "--rounds", "1", "--batch_sizes", "2", "--prompt_length", "20", "--new_tokens", "40")
    report, text = report_of(*argv, capsys=capsys)
    rows = report["results"]["batch_2"]
    assert list(rows) == ["phase15", "phase15_chunk_by_chunk", "base_full_context"]
    assert all(f"| {harness.LABELS[name]} |" in text for name in rows)
    assert rows["phase15"]["loss"] == pytest.approx(rows["phase15_chunk_by_chunk"]["loss"], rel=1e-5)
    assert rows["phase15"]["loss"] != pytest.approx(rows["base_full_context"]["loss"], rel=1e-6)
    ours = rows["phase15"]
    assert ours["answer_tokens_per_second"] == pytest.approx(2 * 40 / (ours["ms_per_step"] / 1e3))


def test_train_a_frozen_llm(capsys):
    argv = ("train", "--stage", "hypernet", "--rounds", "1", "--batch_sizes", "1", "--new_tokens", "20")
    report, _ = report_of(*argv, "--gradient_checkpointing", capsys=capsys)
    assert list(report["results"]["batch_1"]) == ["phase15", "phase15_chunk_by_chunk"]


def test_load(capsys):
    report, text = report_of("load", "--rounds", "2", capsys=capsys)
    assert report["results"]["base"]["ratio_to_base"] == 1 and "| phase15 |" in text


def test_lengths_of_a_chunk_beside_the_cards(capsys):
    argv = ("decode", "--rounds", "1", "--new_tokens", "20", "--prompt_length", "40", "--chunk_lengths", "32", "16")
    report, text = report_of(*argv, capsys=capsys)
    rows = report["results"]["batch_1"]
    assert list(rows) == ["base", "phase15", "phase15_k32"] and "| phase15, K = 32 |" in text
    position = 2 * 2 * 2 * 16  # keys and values, layers, heads of keys, their width
    hidden_size = 64
    for name, length in (("phase15", 16), ("phase15_k32", 32)):
        assert rows[name]["state_mb"] == 4 * ((128 + length) * position + 128 * hidden_size) / 2**20
    assert rows["base"]["state_mb"] == 4 * (40 + 20 - 1) * position / 2**20
    with pytest.raises(SystemExit):
        benchmark.parse_args(["decode", "--chunk_lengths", "0"])
    with pytest.raises(ValueError, match="a chunk of 1"):
        parse(["decode", "--compile", "--chunk_lengths", "1", "2", "3", "4"])


@pytest.mark.parametrize(
    "argv",
    [
        "train --chunk_lengths 64",
        "decode --stage hypernet",
        "decode --turns 3",
        "load --batch_sizes 1",
        "decode --lengths 40",
        "state --new_tokens 4",
        "serve --rounds 2",
    ],
)
def test_a_flag_of_another_kind_is_refused(argv, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_args(argv.split())
    assert f"argument {argv.split()[1]}: {argv.split()[0]} has none, only" in capsys.readouterr().err


def test_the_steps_of_a_chunk_add_up(monkeypatch):
    """The steps run without a compiler, which would take a minute. A step's time is divided by the chunk's tokens."""
    monkeypatch.setattr(decoding_phase15, "compiled", lambda function: function)
    monkeypatch.setattr(decode_benchmark, "CALLS", 1)  # more make the times steadier, which nothing here asks for
    args = parse(["decode", "--shape", "tiny", "--no-compile", "--rounds", "1", "--chunk_lengths", "8"])
    model, _ = harness.make_models(args)
    prompt = random_ids(1, 300)
    for length in (8, 16):
        options = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 2 * length, "pad_token_id": 0}
        model.generate(prompt, compile=True, chunk_length=length, **options)
    run = decoding_phase15.Phase15Decoder.run
    calls = []

    def record(self, name, model):
        calls.append((self.chunk.shape[1], name))
        return run(self, name, model)

    monkeypatch.setattr(decoding_phase15.Phase15Decoder, "run", record)
    rows = {"phase15_compiled": {"ms_per_token": 1.0}, "phase15_k8_compiled": {"ms_per_token": 2.0}}
    table = decode_benchmark.time_steps(args, model, rows, 1)
    assert list(table) == ["K = 8, ms per token", "K = 16, ms per token"]
    assert set(calls) == {(length, name) for length in (8, 16) for name in ("prefill", "step", "decode")}
    for row in table.values():
        assert row["sum"] == pytest.approx(row["slots_prefill"] + row["hypernetwork"] + row["token_steps"])
        assert min(row.values()) > 0
    assert table["K = 8, ms per token"]["measured"] == 2.0


@pytest.mark.extra
def test_int8_beside_float32(capsys):
    pytest.importorskip("torchao", reason="requirements-extra.txt")
    argv = ("decode", "--rounds", "1", "--new_tokens", "4", "--prompt_length", "8", "--int8")
    report, text = report_of(*argv, capsys=capsys)
    assert list(report["results"]["batch_1"]) == ["base", "phase15", "base_int8", "phase15_int8"]
    assert "| phase15, int8 weights |" in text


@pytest.mark.extra
def test_int8_weights_are_int8():
    torchao = pytest.importorskip("torchao", reason="requirements-extra.txt")
    model, base = harness.make_models(parse(["decode", "--shape", "tiny", "--no-compile"]))
    for name, candidate in decode_benchmark.quantise(model, base).items():
        layer = (candidate if name == "base_int8" else candidate.llm).model.layers[0]
        assert isinstance(layer.mlp.up_proj.weight, torchao.utils.TorchAOBaseTensor), name


def test_nothing_is_needed_but_torch_and_transformers():
    """Images for GPUs have little else."""
    code = """
import sys
for name in ("accelerate", "peft", "datasets", "trl", "matplotlib", "fastapi", "uvicorn", "openai", "torchao", "gguf"):
    sys.modules[name] = None  # importing it is an ImportError
from phase15.commands.benchmarks.__main__ import main
flags = ["--shape", "tiny", "--no-compile", "--rounds", "1"]
main(["train", *flags, "--new_tokens", "20"])
main(["decode", *flags, "--new_tokens", "4", "--prompt_length", "8"])
main(["load", *flags])
main(["state", *flags, "--lengths", "40"])
main(["long", *flags, "--new_tokens", "256"])
"""
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert run.returncode == 0 and "none, without matplotlib" in run.stdout, run.stderr


@pytest.mark.slow
@pytest.mark.extra
def test_serve(capsys):
    for package in ("fastapi", "prometheus_client", "openai"):
        pytest.importorskip(package, reason="requirements-extra.txt")
    argv = ("serve", "--clients", "1", "3", "--requests", "2", "--turns", "3", "--soak", "12", "--chunk_lengths", "8")
    argv = (*argv, "--rivals", "base_server")  # its continuous batching takes most of the memory that is free
    report, text = report_of(*argv, capsys=capsys)
    assert report["not_measured"] == {}, report["not_measured"]
    results = report["results"]
    assert list(results) == ["1_clients", "3_clients", "conversation", "many_requests", "order"]
    assert "| scripts.serve, K = 8 |" in text
    assert list(results["1_clients"]) == ["generate", "server", "base_server", "server_k8"]
    for kind in ("1_clients", "3_clients"):
        assert kind.replace("_", " ") in text
        for name, row in results[kind].items():
            assert row["tokens_per_second"] > 0 and row["first_token_ms"] <= row["first_token_ms_95"]
            assert (row.get("share_of_compute_limit") is not None) == name.startswith("server")
        assert 0 < results[kind]["server"]["share_of_compute_limit"] < 1
    assert results["1_clients"]["server"]["ratio_to_one_client"] == 1
    talk = results["conversation"]["server"]
    assert talk["ratio"] == pytest.approx(talk["turn_3_ms"] / talk["first_turn_ms"])
    assert results["many_requests"]["server"]["requests"] == 12


@pytest.mark.parametrize("chunk_length", [CHUNK, 2 * CHUNK])
def test_the_demand_of_a_workload_is_that_of_its_steps(tiny, chunk_length):
    """Counted while `generate` answers, less the slots and the last chunks that a workload's formula leaves out."""
    job = Job(random_ids(3 * QUERY).tolist(), 4 * CHUNK)
    model = tiny
    ids = torch.tensor([job.prompt])
    with FlopCounterMode(display=False) as counter:
        options = {"max_new_tokens": job.length, "pad_token_id": 0, "chunk_length": chunk_length}
        model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    demand = count_flops(model, [job], chunk_length)
    assert demand == pytest.approx(counter.get_total_flops(), rel=0.1)
    assert count_flops(model, [job, job], chunk_length) == 2 * demand


def test_the_naive_loss_is_the_models_own(tiny):
    """Also with gradients, and with a last chunk that is not full."""
    ids = random_ids(2, QUERY + 2 + 3 * CHUNK + 1)
    labels = ids.clone()
    labels[:, : QUERY + 2] = -100
    gradients = []
    for loss in (
        train_benchmark.chunk_by_chunk(tiny, ids, QUERY + 2),
        tiny(ids, labels=labels, skip_logits=True).loss,
    ):
        tiny.zero_grad()
        loss.backward()
        gradients.append([loss, *(parameter.grad.clone() for parameter in tiny.parameters())])
    torch.testing.assert_close(*gradients, atol=1e-5, rtol=1e-3)


def test_too_short_for_long(capsys):
    with pytest.raises(ValueError, match="--new_tokens of at least 256"):
        report_of("long", "--new_tokens", "255", capsys=capsys)
