# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""python -m benchmarks at the tiny shape: its report and tables, and that variants compute what they are named for."""

import json
import re

import pytest
import torch
from reference import CHUNK, QUERY, random_ids
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from benchmarks import __main__ as benchmark
from benchmarks import decode as decode_benchmark
from benchmarks import harness
from benchmarks import train as train_benchmark
from benchmarks.serve import Job, flops_of


def report_of(*argv: str, capsys) -> tuple[dict, str]:
    benchmark.main(benchmark.parse_args([*argv, "--shape", "tiny", "--no-compile"]))
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


def test_the_base_is_compiled_on_a_cpu_too(bases, monkeypatch):
    """Otherwise `python -m benchmarks decode --compile` would time a base in eager mode."""
    base, calls = AutoModelForCausalLM.from_pretrained(bases["llama"]), []
    monkeypatch.setattr(type(base), "get_compiled_call", lambda self, config: calls.append(config) or self.__call__)
    config = decode_benchmark.compile_everywhere()
    base.generate(random_ids(1, 5), max_new_tokens=3, cache_implementation="static", compile_config=config)
    assert calls == [config]


def test_json_alone(capsys):
    _, text = report_of("decode", "--json", "--rounds", "1", "--new_tokens", "4", capsys=capsys)
    assert not text


def test_long(capsys, tmp_path):
    picture = tmp_path / "folder" / "long.png"
    report, text = report_of("long", "--new_tokens", "600", "--picture", str(picture), capsys=capsys)
    assert report["lengths"] == [256, 512] and picture.read_bytes().startswith(b"\x89PNG")
    base, ours = (report["results"][name] for name in ("base", "phase15"))
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


@pytest.mark.slow
@pytest.mark.extra
def test_serve(capsys):
    for package in ("fastapi", "prometheus_client", "openai"):
        pytest.importorskip(package, reason="requirements-extra.txt")
    argv = ("serve", "--clients", "1", "3", "--requests", "2", "--turns", "3", "--soak", "12")
    argv = (*argv, "--rivals", "base_server")  # its continuous batching takes most of the memory that is free
    report, text = report_of(*argv, capsys=capsys)
    assert report["not_measured"] == {}, report["not_measured"]
    results = report["results"]
    assert list(results) == ["1_clients", "3_clients", "conversation", "many_requests", "order"]
    assert list(results["1_clients"]) == ["generate", "server", "base_server"]
    for kind in ("1_clients", "3_clients"):
        assert kind.replace("_", " ") in text
        for name, row in results[kind].items():
            assert row["tokens_per_second"] > 0 and row["first_token_ms"] <= row["first_token_ms_95"]
            assert (row.get("share_of_compute_limit") is not None) == (name == "server")
        assert 0 < results[kind]["server"]["share_of_compute_limit"] < 1
    assert results["1_clients"]["server"]["ratio_to_one_client"] == 1
    talk = results["conversation"]["server"]
    assert talk["ratio"] == pytest.approx(talk["turn_3_ms"] / talk["first_turn_ms"])
    assert results["many_requests"]["server"]["requests"] == 12


def test_the_demand_of_a_workload_is_that_of_its_steps(tiny):
    """Counted while `generate` answers, less the slots and the last chunks that a workload's formula leaves out."""
    (job,) = [Job(random_ids(3 * QUERY).tolist(), 4 * CHUNK)]
    model = tiny
    ids = torch.tensor([job.prompt])
    with FlopCounterMode(display=False) as counter:
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=job.length, pad_token_id=0)
    assert flops_of(model, [job]) == pytest.approx(counter.get_total_flops(), rel=0.1)
    assert flops_of(model, [job, job]) == 2 * flops_of(model, [job])


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
