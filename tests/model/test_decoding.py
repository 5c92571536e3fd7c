# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The fast path of `generate` against the library's own loop: run as it is, traced and replayed, and compiled."""

import copy
import functools
import gc
import re
import weakref

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from reference import BASES, CHUNK, SIZES, SLOTS, randomise_alpha
from test_generation import LONG_PROMPTS, PROMPTS, generate
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from phase15.model import decoding_phase15
from phase15.model.cache_phase15 import Phase15Cache
from phase15.model.decoding_phase15 import Phase15Decoder, decode_token, prefill_chunk, step_soft_prompt
from phase15.model.modeling_phase15 import Phase15ForCausalLM


LENGTHS = (1, CHUNK, CHUNK + 1, 3 * SLOTS)
MODES = {
    "greedy": {},
    "sample": {"do_sample": True, "top_k": 0},
    "warped": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "sample-3": {"do_sample": True, "num_return_sequences": 3},
}


class Replayed:
    """
    What a CUDA graph does, on a CPU: `Phase15Decoder` traces each step once, with whatever Python decided then, and
    replays the trace. Tracing fails where the host would wait for a tensor's value.
    """

    def __init__(self):
        self.traces, self.replays = {}, 0

    def run(self, decoder: Phase15Decoder, name: str, model):
        if (id(decoder), name) not in self.traces:
            state = (*decoder.soft_prompt, decoder.finished, decoder.chunk, decoder.column)
            began, random_state = [tensor.clone() for tensor in state], torch.get_rng_state()
            self.traces[id(decoder), name] = decoder, make_fx(lambda: getattr(decoder, name)(model) or decoder.chunk)()
            for tensor, value in zip(state, began, strict=True):
                tensor.copy_(value)
            torch.set_rng_state(random_state)
        self.replays += 1
        self.traces[id(decoder), name][1]()


@pytest.fixture(params=["eager", "replayed"])
def fast(request, monkeypatch):
    """The fast path without torch.compile, as it is or as a CUDA graph would replay it."""
    replayed = Replayed()
    if request.param == "replayed":
        monkeypatch.setattr(Phase15Decoder, "run", lambda *args: replayed.run(*args))
    monkeypatch.setattr(decoding_phase15, "compiled", lambda function: function)
    yield
    assert bool(replayed.replays) == (request.param == "replayed")


@pytest.fixture(params=[name for name in BASES if name != "llama"] + ["llama-eager"])
def model(request, bases) -> Phase15ForCausalLM:
    torch.manual_seed(3)  # with 2 and 4, the tied model says few different tokens
    kwargs = {"attn_implementation": "eager"} if request.param == "llama-eager" else {}
    return randomise_alpha(
        Phase15ForCausalLM.from_base(bases[request.param.removesuffix("-eager")], **SIZES, **kwargs)
    )


# the same tokens as the library's loop


def test_other_bases_and_attentions_give_the_same_tokens(model, fast):
    expected = generate(model, LONG_PROMPTS, max_new_tokens=45)
    assert torch.equal(generate(model, LONG_PROMPTS, max_new_tokens=45, compile=True), expected)
    assert len(set(expected.flatten().tolist())) > 10  # not a loop of a few tokens, which would hide errors


@pytest.mark.parametrize("mode", MODES)
def test_greedy_and_sampling_give_the_same_tokens(tiny, fast, mode):
    prompts = PROMPTS + LONG_PROMPTS  # slots that are full, and slots that are not
    for length in LENGTHS:
        expected = generate(tiny, prompts, max_new_tokens=length, **MODES[mode])
        assert torch.equal(generate(tiny, prompts, max_new_tokens=length, compile=True, **MODES[mode]), expected)


@pytest.mark.parametrize("ends_at", [0, CHUNK - 1, CHUNK, CHUNK + 2])
def test_rows_that_end_give_the_same_tokens(tiny, fast, ends_at):
    """Every row ends at or before `ends_at`, some of them earlier."""
    free = generate(tiny, LONG_PROMPTS, max_new_tokens=22)
    for eos in (int(free[0, ends_at]), free[:, ends_at].tolist()):
        settings = {"max_new_tokens": 22, "eos_token_id": eos, "pad_token_id": 4}
        expected = generate(tiny, LONG_PROMPTS, **settings)
        for _ in range(2):  # the second time on buffers in which all rows have ended
            assert torch.equal(generate(tiny, LONG_PROMPTS, compile=True, **settings), expected)
    assert expected.shape[1] <= ends_at + 1


def test_an_end_token_stops_at_the_end_of_its_chunk(tiny, fast, monkeypatch):
    """Not after 4000 tokens, and without having asked before."""
    names, run = [], Phase15Decoder.run
    monkeypatch.setattr(Phase15Decoder, "run", lambda self, name, model: (names.append(name), run(self, name, model)))
    free = generate(tiny, [LONG_PROMPTS[0]], max_new_tokens=22)[0]
    generate(tiny, [LONG_PROMPTS[0]], max_new_tokens=4000, eos_token_id=int(free[CHUNK + 1]), compile=True)
    whole = ["prefill"] + ["decode"] * (CHUNK - 1)
    assert names in ([*whole, "step", *whole], whole)


def test_the_cache_is_left_as_the_librarys_loop_leaves_it(tiny, fast):
    for length in (1, 3, CHUNK, CHUNK + 1, 20):
        settings = {"max_new_tokens": length, "return_dict_in_generate": True}
        expected = generate(tiny, LONG_PROMPTS, **settings)
        got = generate(tiny, LONG_PROMPTS, compile=True, **settings)
        assert torch.equal(got.sequences, expected.sequences)
        generate(tiny, PROMPTS, compile=True, **settings)  # another call on the same buffers
        caches = got.past_key_values, expected.past_key_values
        for a, b in zip(*(vars(cache.llm_cache)["layers"] for cache in caches), strict=True):
            torch.testing.assert_close(a.keys, b.keys, atol=1e-5, rtol=1e-4)
            torch.testing.assert_close(a.values, b.values, atol=1e-5, rtol=1e-4)
        for a, b in zip(*((*cache.soft_prompt, cache.chunk) for cache in caches), strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
        assert caches[0].seen_tokens == caches[1].seen_tokens


def talk(model, new_tokens: torch.Tensor, **kwargs):
    first = generate(model, [LONG_PROMPTS[0]], max_new_tokens=6, return_dict_in_generate=True, **kwargs)
    ids = torch.cat([first.sequences, new_tokens[None]], dim=1)
    again = {"past_key_values": first.past_key_values, "attention_mask": torch.ones_like(ids), "pad_token_id": 0}
    return model.generate(ids, max_new_tokens=11, **again, **kwargs)


def test_a_conversation_goes_on(tiny, fast):
    assert torch.equal(talk(tiny, PROMPTS[0], compile=True), talk(tiny, PROMPTS[0]))


def test_an_answer_goes_on_in_the_librarys_loop(tiny, fast, monkeypatch):
    expected = talk(tiny, PROMPTS[0][:0])
    with pytest.raises(ValueError, match="cannot be honoured with a cache that has seen all but one token"):
        talk(tiny, PROMPTS[0][:0], compile=True)
    monkeypatch.setattr(decoding_phase15, "AUTOMATIC_ON", ("cpu",))
    assert torch.equal(talk(tiny, PROMPTS[0][:0]), expected)


class Collector(BaseStreamer):
    def __init__(self):
        self.pieces, self.ended = [], False

    def put(self, value):
        self.pieces.append(value.flatten().tolist())

    def end(self):
        self.ended = True


def test_a_streamer_gets_every_token_and_nothing_after_the_end(tiny, fast):
    free = generate(tiny, [LONG_PROMPTS[0]], max_new_tokens=22)[0]
    ends = [{"eos_token_id": int(token)} for token in free[:CHUNK]]  # at each position of a chunk
    for kwargs in ({}, *ends):
        ours, librarys = Collector(), Collector()
        generate(tiny, [LONG_PROMPTS[0]], max_new_tokens=22, streamer=librarys, **kwargs)
        generate(tiny, [LONG_PROMPTS[0]], max_new_tokens=22, streamer=ours, compile=True, **kwargs)
        assert ours.pieces == librarys.pieces and ours.ended


# decoders


def test_buffers_are_kept_and_serve_changed_weights(tiny, fast):
    settings = {"max_new_tokens": 12, "compile": True}
    generate(tiny, LONG_PROMPTS, **settings)
    (decoder,) = decoding_phase15._DECODERS[tiny].values()
    with torch.no_grad():
        tiny.llm.lm_head.weight.copy_(tiny.llm.lm_head.weight.flip(0))  # in place, as an optimizer writes
    assert torch.equal(generate(tiny, LONG_PROMPTS, **settings), generate(tiny, LONG_PROMPTS, max_new_tokens=12))
    assert list(decoding_phase15._DECODERS[tiny].values()) == [decoder]


def test_weights_that_moved_get_new_buffers(tiny, fast):
    settings = {"max_new_tokens": 12, "compile": True}
    before = generate(tiny, LONG_PROMPTS, **settings)
    tiny.llm.lm_head.weight = torch.nn.Parameter(tiny.llm.lm_head.weight.detach().flip(0))
    after = generate(tiny, LONG_PROMPTS, **settings)
    assert torch.equal(after, generate(tiny, LONG_PROMPTS, max_new_tokens=12)) and not torch.equal(after, before)
    assert len(decoding_phase15._DECODERS[tiny]) == 2


def test_decoders_are_few_and_die_with_their_model(bases):
    model = Phase15ForCausalLM.from_base(bases["llama"], **SIZES)
    with torch.compiler.set_stance("force_eager"):
        for top_k in range(1, 8):
            settings = {"do_sample": True, "top_k": top_k, "compile": True}
            expected = generate(model, PROMPTS, max_new_tokens=6, **settings | {"compile": False})
            assert torch.equal(generate(model, PROMPTS, max_new_tokens=6, **settings), expected)
    assert len(decoding_phase15._DECODERS[model]) == decoding_phase15.MAX_DECODERS
    copy.deepcopy(model)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None


# what is compiled


def test_the_steps_are_one_graph_each(tiny):
    """No break, so that torch.compile fuses all of it, and one compilation serves any number of steps."""
    decoder = Phase15Decoder(tiny, 2, lambda scores: scores.argmax(dim=-1), None, None)
    decoder.start(tiny.empty_soft_prompt(2)._replace(length=torch.tensor([3, SLOTS])))
    counter = CompileCounter()
    for function, args in (
        (prefill_chunk, (decoder.slot_cache,)),
        (decode_token, (decoder.chunk, decoder.chunk_cache)),
        (step_soft_prompt, (decoder.chunk,)),
    ):
        counter.clear()
        compiled = torch.compile(function, backend=counter, fullgraph=True)
        with torch.no_grad():
            for column in range(SLOTS, SLOTS + CHUNK - 1):
                decoder.column.fill_(column)
                expected = function(tiny, decoder.soft_prompt, *args)
                torch.testing.assert_close(compiled(tiny, decoder.soft_prompt, *args), expected)
        assert counter.frame_count == 1


def test_generate_compiles_the_steps_once(tiny, monkeypatch):
    """For two answers, without inductor, whose first use takes a minute (`python -m benchmarks decode`)."""
    counter = CompileCounterWithBackend("aot_eager")
    monkeypatch.setattr(decoding_phase15, "_COMPILED", {})
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=counter))
    monkeypatch.setattr(decoding_phase15, "INDUCTOR", None)
    for prompts in (LONG_PROMPTS, PROMPTS):
        expected = generate(tiny, prompts, max_new_tokens=3 * SLOTS)
        assert torch.equal(generate(tiny, prompts, max_new_tokens=3 * SLOTS, compile=True), expected)
    assert counter.frame_count == 3


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("mode", MODES)
def test_on_cuda_graphs_give_the_same_tokens(tiny, mode):
    tiny.cuda()
    prompts = [prompt.cuda() for prompt in LONG_PROMPTS]
    for length in LENGTHS:
        expected = generate(tiny, prompts, max_new_tokens=length, compile=False, **MODES[mode])
        assert torch.equal(generate(tiny, prompts, max_new_tokens=length, **MODES[mode]), expected)
    (decoder,) = decoding_phase15._DECODERS[tiny].values()
    assert set(decoder.graphs) == {"step", "prefill", "decode"}


# when it is taken


@pytest.fixture
def decoders(monkeypatch) -> list:
    """Those that were started, new or kept."""
    started, start = [], Phase15Decoder.start
    monkeypatch.setattr(Phase15Decoder, "start", lambda self, *args: (started.append(self), start(self, *args))[1])
    return started


def test_on_a_cpu_only_when_asked(tiny, decoders):
    generate(tiny, PROMPTS, max_new_tokens=6)
    generate(tiny, PROMPTS, max_new_tokens=6, compile=False)
    assert not decoders
    with torch.compiler.set_stance("force_eager"):
        generate(tiny, PROMPTS, max_new_tokens=6, compile=True)
    assert len(decoders) == 1


def test_on_cuda_unless_something_forbids_it(tiny, decoders, monkeypatch):
    """The choice alone, as if this CPU were a GPU."""
    monkeypatch.setattr(decoding_phase15, "AUTOMATIC_ON", ("cpu",))
    monkeypatch.setattr(decoding_phase15, "compiled", lambda function: function)
    for kwargs, expected in (
        ({}, 1),
        ({"do_sample": True}, 1),
        ({"compile": False}, 0),
        ({"disable_compile": True}, 0),
        ({"repetition_penalty": 1.7}, 0),
    ):
        decoders.clear()
        generate(tiny, [PROMPTS[0]], max_new_tokens=2, **kwargs)
        assert len(decoders) == expected


def test_what_cannot_be_compiled_goes_on_without(tiny, monkeypatch):
    tried, warnings = [], []

    def fail(decoder, model):
        tried.append(decoder)
        raise RuntimeError("no C compiler\nwas found")

    monkeypatch.setattr(decoding_phase15, "AUTOMATIC_ON", ("cpu",))
    monkeypatch.setattr(decoding_phase15.logger, "warning", warnings.append)
    monkeypatch.setattr(Phase15Decoder, "prepare", fail)
    for _ in range(2):
        got = generate(tiny, LONG_PROMPTS, max_new_tokens=22)
        assert torch.equal(got, generate(tiny, LONG_PROMPTS, max_new_tokens=22, compile=False))
    assert len(tried) == len(warnings) == 1 and "no C compiler was found" in warnings[0]
    assert tiny not in decoding_phase15._DECODERS
    with pytest.raises(RuntimeError, match="no C compiler"):
        generate(tiny, LONG_PROMPTS, max_new_tokens=22, compile=True)


class Never(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.zeros(len(input_ids), dtype=torch.bool)


@pytest.mark.parametrize(
    "kwargs, reason",
    [
        ({"use_cache": False}, "`use_cache=False`"),
        ({"query_lengths": torch.tensor([3])}, "`query_lengths`"),
        ({"repetition_penalty": 1.7}, "RepetitionPenaltyLogitsProcessor"),
        ({"min_new_tokens": 2, "eos_token_id": 7}, "MinLengthLogitsProcessor"),
        ({"stopping_criteria": [Never()]}, "Never"),
        ({"num_beams": 2}, "beam search"),
        ({"num_beams": 2, "do_sample": True}, "beam search"),
        ({"return_dict_in_generate": True, "output_scores": True}, "`output_scores`"),
        ({"return_dict_in_generate": True, "output_logits": True}, "`output_logits`"),
        ({"return_dict_in_generate": True, "output_hidden_states": True}, "`output_hidden_states`"),
    ],
)
def test_arguments_that_forbid_it_are_named(tiny, kwargs, reason):
    with pytest.raises(ValueError, match=f"`compile=True` cannot be honoured with {re.escape(reason)}"):
        generate(tiny, [PROMPTS[0]], max_new_tokens=4, compile=True, **kwargs)


def test_models_that_forbid_it_are_named(tiny):
    from peft import LoraConfig, get_peft_model  # not there where benchmarks/gpu.sh runs the cases for CUDA

    def refused(reason):
        with pytest.raises(ValueError, match=f"`compile=True` cannot be honoured with {re.escape(reason)}"):
            generate(tiny, [PROMPTS[0]], max_new_tokens=4, compile=True)

    tiny.train()
    refused("a model in training mode")
    tiny.eval()
    hook = tiny.hypernet.register_forward_hook(lambda *args: None)
    refused("forward hooks")
    hook.remove()
    add_hook_to_module(tiny.hypernet, ModelHook())  # as accelerate's offloading does
    refused("forward hooks")
    remove_hook_from_module(tiny.hypernet)
    with torch.autocast("cpu", torch.bfloat16):
        refused("autocast")
    tiny.llm.set_attn_implementation("flex_attention")
    refused("attention 'flex_attention'")
    tiny.llm.set_attn_implementation("sdpa")
    tiny.config.text_config.rope_parameters["rope_type"] = "dynamic"
    refused("RoPE of type 'dynamic'")
    tiny.config.text_config.rope_parameters["rope_type"] = "default"
    lora = LoraConfig(task_type="CAUSAL_LM", target_modules=r".*llm\..*_proj", modules_to_save=["hypernet"])
    adapted = get_peft_model(tiny, lora).eval()
    refused("PEFT adapters that are not merged")
    merged = adapted.merge_and_unload().eval()
    with torch.compiler.set_stance("force_eager"):
        assert torch.equal(
            generate(merged, PROMPTS, max_new_tokens=9, compile=True), generate(merged, PROMPTS, max_new_tokens=9)
        )


def test_a_cache_that_the_caller_made_is_used(tiny, fast):
    cache = Phase15Cache(tiny.config)
    generate(tiny, [PROMPTS[0]], max_new_tokens=4, compile=True, past_key_values=cache)
    assert cache.seen_tokens == len(PROMPTS[0]) + 3
