# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
The compiled path of `generate` against the transformers loop: run as it is, traced and replayed, and compiled; and its
sampler against the library's warpers.
"""

import copy
import functools
import gc
import pickle
import re
import weakref

import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from reference import BASES, CHUNK, SIZES, SLOTS, pad, randomise_alpha
from test_generation import LONG_PROMPTS, PROMPTS, generate
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria
from transformers.generation import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)
from transformers.generation.streamers import BaseStreamer

from phase15.model import decoding_phase15
from phase15.model.cache_phase15 import Phase15Cache
from phase15.model.decoding_phase15 import (
    Decoder,
    DecoderBuffers,
    LibraryDecoder,
    Phase15Decoder,
    Phase15Decoders,
    Sampler,
    Sampling,
    decode_token,
    draw_seed,
    prefill_chunk,
    sample_tokens,
    sampling_width,
    split_processors,
    step_soft_prompt,
)
from phase15.model.modeling_phase15 import Phase15ForCausalLM


LENGTHS = (1, CHUNK, CHUNK + 1, 3 * SLOTS)
SAMPLING_MODES = {
    "sample": {"do_sample": True, "top_k": 0},
    "warped": {"do_sample": True, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "sample-3": {"do_sample": True, "num_return_sequences": 3},
}
MODES = {"greedy": {}, **SAMPLING_MODES}


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


@pytest.fixture
def uncompiled(monkeypatch):
    """The compiled path without torch.compile."""
    monkeypatch.setattr(decoding_phase15, "compiled", lambda function: function)


@pytest.fixture(params=["eager", "replayed"])
def fast(request, uncompiled, monkeypatch):
    """The compiled path without torch.compile, as it is or as a CUDA graph would replay it."""
    replayed = Replayed()
    if request.param == "replayed":
        monkeypatch.setattr(Phase15Decoder, "run", lambda *args: replayed.run(*args))
    yield
    assert bool(replayed.replays) == (request.param == "replayed")


@pytest.fixture(params=[name for name in BASES if name != "llama"] + ["llama-eager"])
def model(request, bases) -> Phase15ForCausalLM:
    torch.manual_seed(3)  # with 2 and 4, the tied model says few different tokens
    kwargs = {"attn_implementation": "eager"} if request.param == "llama-eager" else {}
    return randomise_alpha(
        Phase15ForCausalLM.from_base(bases[request.param.removesuffix("-eager")], **SIZES, **kwargs)
    )


def generate_by_numbers(model, prompts, *, seed=0, chunk_length=CHUNK, **kwargs) -> torch.LongTensor:
    """
    The transformers loop and its warpers, where a token is drawn as the compiled path does, by the naive rule: a row's
    next number picks the first token at which the cumulated probabilities exceed the number.
    """
    numbers, step = [], 0

    def draw(probabilities, num_samples):
        nonlocal step
        if step == 0:
            for _ in probabilities:
                generator = torch.Generator().manual_seed(int(torch.randint(2**63 - 1, ())))
                numbers.append([])
                for _ in range(-(-kwargs["max_new_tokens"] // chunk_length)):
                    numbers[-1] += torch.rand(chunk_length, generator=generator).tolist()
        tokens = []
        for row, its_numbers in zip(probabilities.tolist(), numbers, strict=True):
            mass, tokens = 0.0, [*tokens, None]
            for token, probability in enumerate(row):
                mass += probability
                if probability and (tokens[-1] is None or mass - probability <= its_numbers[step] * sum(row)):
                    tokens[-1] = token
        step += 1
        return torch.tensor(tokens)[:, None]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", draw)
        return generate(model, prompts, seed=seed, compile=False, **kwargs)


# the same tokens as the transformers loop


def test_other_bases_and_attentions_give_the_same_tokens(model, fast):
    expected = generate(model, LONG_PROMPTS, max_new_tokens=45)
    assert torch.equal(generate(model, LONG_PROMPTS, max_new_tokens=45, compile=True), expected)
    assert len(set(expected.flatten().tolist())) > 10  # not a loop of a few tokens, which would hide errors


@pytest.mark.parametrize("mode", MODES)
def test_greedy_and_sampling_give_the_same_tokens(tiny, fast, mode):
    prompts = PROMPTS + LONG_PROMPTS  # slots that are full, and slots that are not
    for length in LENGTHS:
        settings = {"max_new_tokens": length, **MODES[mode]}
        reference = generate if mode == "greedy" else generate_by_numbers
        expected = reference(tiny, prompts, **settings)
        assert torch.equal(generate(tiny, prompts, compile=True, **settings), expected)


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


def test_the_cache_is_left_as_the_transformers_loop_leaves_it(tiny, fast):
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


def test_an_answer_goes_on_in_the_transformers_loop(tiny, fast, monkeypatch):
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
    (decoder,) = tiny.decoders.static.values()
    with torch.no_grad():
        tiny.llm.lm_head.weight.copy_(tiny.llm.lm_head.weight.flip(0))  # in place, as an optimizer writes
    assert torch.equal(generate(tiny, LONG_PROMPTS, **settings), generate(tiny, LONG_PROMPTS, max_new_tokens=12))
    assert list(tiny.decoders.static.values()) == [decoder]


def test_weights_that_moved_get_new_buffers(tiny, fast):
    settings = {"max_new_tokens": 12, "compile": True}
    before = generate(tiny, LONG_PROMPTS, **settings)
    tiny.llm.lm_head.weight = torch.nn.Parameter(tiny.llm.lm_head.weight.detach().flip(0))
    after = generate(tiny, LONG_PROMPTS, **settings)
    assert torch.equal(after, generate(tiny, LONG_PROMPTS, max_new_tokens=12)) and not torch.equal(after, before)
    assert len(tiny.decoders.static) == 2


def test_decoders_are_few_and_die_with_their_model(bases):
    model = Phase15ForCausalLM.from_base(bases["llama"], **SIZES)
    with torch.compiler.set_stance("force_eager"):
        for top_k in (1, 2, 4, 8, 16, 3, 5):  # as many widths as fit, one more, and two that are there again
            settings = {"do_sample": True, "top_k": top_k, "max_new_tokens": 6}
            assert torch.equal(
                generate(model, PROMPTS, compile=True, **settings), generate_by_numbers(model, PROMPTS, **settings)
            )
    assert len(model.decoders.static) == decoding_phase15.MAX_DECODERS
    buffers = weakref.ref(next(iter(model.decoders.static.values())).chunk)
    alive = weakref.ref(model)
    del model
    gc.collect()
    assert alive() is None and buffers() is None


def test_copies_of_a_model_start_without_decoders(tiny, uncompiled, tmp_path):
    before = tiny.state_dict().keys()
    expected = generate(tiny, LONG_PROMPTS, max_new_tokens=12, compile=True)
    decoders = tiny.decoders
    assert decoders is tiny.decoders and type(decoders) is Phase15Decoders and decoders.static
    tiny.save_pretrained(tmp_path)
    copies = [copy.deepcopy(tiny), pickle.loads(pickle.dumps(tiny)), Phase15ForCausalLM.from_pretrained(tmp_path)]
    for other in copies:
        assert not other.decoders.static and other.decoders is not decoders and other.state_dict().keys() == before
        assert torch.equal(generate(other, LONG_PROMPTS, max_new_tokens=12, compile=True), expected)
    assert tiny.decoders is decoders and len(decoders.static) == 1
    tiny.to(torch.bfloat16)
    tiny.float()  # the weights have moved, and the first decoder was recorded on others
    got = generate(tiny, LONG_PROMPTS, max_new_tokens=12, compile=True)
    assert torch.equal(got, generate(tiny, LONG_PROMPTS, max_new_tokens=12))


@pytest.mark.parametrize("kind", ["static", "library"])
def test_both_decoders_keep_the_protocol(tiny, kind):
    """The same tokens, columns and states, step by step."""
    sampler = Sampler(3, CHUNK, tiny.device)
    calls = []
    process = lambda scores: (calls.append(scores.shape), scores)[1]  # noqa: E731
    if kind == "static":
        buffers = DecoderBuffers.allocate(tiny, 3, CHUNK).first_rows(2)
        decoder = Phase15Decoder(buffers, sampler, 0, process, is_compiled=False)
    else:
        decoder = LibraryDecoder(tiny, 2, CHUNK, sampler, 0, process)
    assert isinstance(decoder, Decoder)
    generators = [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    sampler.draw([Sampling(1.0), Sampling(0.0)], generators)
    input_ids, attention_mask = pad(LONG_PROMPTS[:2])
    with torch.no_grad():
        soft_prompt = tiny.read_segments(tiny.empty_soft_prompt(2), input_ids.flip(1), attention_mask.sum(dim=1))
        decoder.start(soft_prompt)
        assert decoder.prepare(tiny) is None
        decoder.run("prefill", tiny)
        for index in range(CHUNK):
            assert int(decoder.column) - decoder.num_slots == index
            tokens = decoder.chunk[:, : index + 1]
            hidden_states, _ = tiny.predict(soft_prompt, tiny.get_input_embeddings()(tokens[:, :-1]))
            scores = tiny.get_output_embeddings()(hidden_states[:, -1])
            numbers = torch.stack([torch.rand(CHUNK, generator=torch.Generator().manual_seed(n)) for n in (3, 4)])
            settings = torch.tensor([Sampling(1.0), Sampling(0.0)])
            expected = sample_tokens(scores, settings, numbers[:, index : index + 1], 0)
            assert torch.equal(tokens[:, -1], expected)
            if index + 1 < CHUNK:
                decoder.run("decode", tiny)
        decoder.run("step", tiny)
        embeds = tiny.get_input_embeddings()(decoder.chunk)
        stepped = tiny.step(soft_prompt, embeds, torch.full((2,), CHUNK))
    for got, state in zip(decoder.soft_prompt, stepped, strict=True):
        torch.testing.assert_close(got, state)
    assert len(calls) == CHUNK


# sampling


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(0.7),
        Sampling(1.0, top_k=5),
        Sampling(1.5, top_p=0.6),
        Sampling(1.0, min_p=0.1),
        Sampling(0.8, top_k=20, top_p=0.9, min_p=0.02),
        Sampling(1.0, top_k=1),
        Sampling(1.0, top_p=1e-6),
    ],
)
def test_every_number_draws_the_token_of_the_librarys_distribution(sampling):
    """The share of evenly spaced numbers that draw a token is its probability after the library's warpers."""
    torch.manual_seed(0)
    logits = torch.linspace(0, -6, 50)[torch.randperm(50)][None]  # tokens on both sides of every bound
    scores = TemperatureLogitsWarper(sampling.temperature)(None, logits)
    if sampling.top_k:
        scores = TopKLogitsWarper(sampling.top_k)(None, scores)
    if sampling.top_p < 1:
        scores = TopPLogitsWarper(sampling.top_p)(None, scores)
    if sampling.min_p:
        scores = MinPLogitsWarper(sampling.min_p)(None, scores)
    number = 20_000
    uniform = torch.linspace(0, 1 - 2**-24, number)[:, None]
    greedy = Sampling()
    for samplings in ([sampling], [sampling, greedy]):
        width = sampling_width(samplings, 50)
        settings = torch.tensor([sampling]).expand(number, -1)
        drawn = sample_tokens(logits.expand(number, -1), settings, uniform, width)
        share = torch.bincount(drawn, minlength=50) / number
        torch.testing.assert_close(share, scores.softmax(dim=-1)[0], atol=2 / number, rtol=0)
    assert sampling_width([greedy], 50) is None


def test_warpers_become_settings_only_in_the_librarys_order():
    class Other(LogitsProcessor):
        pass

    other, typical = Other(), TypicalLogitsWarper(0.9)
    warm, few, likely, above = (
        TemperatureLogitsWarper(0.5),
        TopKLogitsWarper(7),
        TopPLogitsWarper(0.8),
        MinPLogitsWarper(0.1),
    )
    plain = Sampling(1.0)
    for processors, sampling, rest in (
        ([], plain, []),
        ([warm, few, likely, above], Sampling(0.5, 7, 0.8, 0.1), []),
        ([other, warm, above], Sampling(0.5, min_p=0.1), [other]),
        ([likely, few], plain._replace(top_k=7), [likely]),
        ([warm, warm], plain._replace(temperature=0.5), [warm]),
        ([warm, typical], plain, [warm, typical]),
        ([few, TopPLogitsWarper(0.8, min_tokens_to_keep=2)], plain, None),
    ):
        got = split_processors(LogitsProcessorList(processors), do_sample=True)
        assert got == (sampling, processors if rest is None else rest) and type(got[1]) is LogitsProcessorList
        assert split_processors(LogitsProcessorList(processors), do_sample=False) == (Sampling(), got[1])


@pytest.mark.parametrize("mode", SAMPLING_MODES)
@pytest.mark.parametrize("chunk_length", [CHUNK, SLOTS])
def test_generate_and_generate_batch_sample_the_same_tokens_from_one_seed(tiny, uncompiled, mode, chunk_length):
    settings = {"max_new_tokens": 2 * SLOTS + 1, "chunk_length": chunk_length, **SAMPLING_MODES[mode]}
    for prompts in ([LONG_PROMPTS[0]], PROMPTS + LONG_PROMPTS):
        rows = generate(tiny, prompts, seed=5, compile=True, **settings).tolist()
        after = torch.rand(())
        torch.manual_seed(5)
        inputs = [prompt.tolist() for prompt in prompts]
        outputs = tiny.generate_batch(inputs, max_batch_size=4, compile=True, **settings)
        assert [output.generated_tokens for output in outputs.values()] == rows and torch.rand(()) == after
        assert len(set(map(tuple, rows))) == len(rows)
        assert generate(tiny, prompts, seed=6, compile=True, **settings).tolist() != rows


def test_a_seed_is_drawn_only_when_sampling(tiny, uncompiled):
    generate(tiny, PROMPTS, compile=True, max_new_tokens=9, seed=3)
    after = torch.rand(())
    torch.manual_seed(3)
    assert torch.rand(()) == after
    torch.manual_seed(3)
    assert 0 <= draw_seed() < 2**63 and draw_seed() != draw_seed()


# what is compiled


def test_the_steps_are_one_graph_each(tiny):
    """No break, so that torch.compile fuses all of it, and one compilation serves any number of steps."""
    decoder = Phase15Decoder(DecoderBuffers.allocate(tiny, 2, CHUNK), Sampler(2, CHUNK, tiny.device), None)
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
        settings = {"max_new_tokens": length, **MODES[mode]}
        if mode == "greedy":
            expected = generate(tiny, prompts, compile=False, **settings)
        else:
            torch.manual_seed(0)
            inputs = [prompt.tolist() for prompt in prompts]
            outputs = tiny.generate_batch(inputs, compile=False, pad_token_id=0, **settings)
            expected = torch.tensor([output.generated_tokens for output in outputs.values()]).cuda()
        assert torch.equal(generate(tiny, prompts, **settings), expected)
    (decoder,) = tiny.decoders.static.values()
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
    assert not tiny.decoders.static and tiny.decoders.has_failed
    tiny.generate_batch([LONG_PROMPTS[0].tolist()], max_new_tokens=5)
    assert len(tried) == len(warnings) == 1  # one warning for all ways of decoding
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
