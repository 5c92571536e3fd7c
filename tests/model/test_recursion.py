# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""The two parts of a step: carry, and Δ of the HyperNetwork."""

import copy

import pytest
import torch
import torch.nn.functional as F
from reference import (
    CHUNK,
    LLM_SIZES,
    QUERY,
    SINKS,
    SIZES,
    SLOTS,
    as_soft_prompt,
    random_ids,
    randomise_alpha,
    reference_carry,
    reference_step,
)
from torch.testing import assert_close

from phase15.model.configuration_phase15 import Phase15Config
from phase15.model.modeling_phase15 import Phase15ForCausalLM
from phase15.model.recursion_phase15 import SoftPrompt, carry


@pytest.mark.parametrize("num_slots, num_sinks", [(24, 2), (5, 4), (3, 1), (2, 1)])
def test_carry_equals_a_python_list(num_slots, num_sinks):
    """Streams of single numbers, through every fill level, with no, some and more new tokens than there are slots."""
    generator = torch.Generator().manual_seed(0)
    streams, counter = [[] for _ in range(6)], 0
    state = SoftPrompt(torch.zeros(6, num_slots, 1), torch.zeros(6, dtype=torch.long))
    for _ in range(25):
        lengths = torch.randint(0, int(torch.randint(1, 2 * num_slots, (), generator=generator)) + 1, (6,))
        tokens = torch.full((6, int(lengths.max()) + 2, 1), -1e9)  # what is not a token must not matter
        for row, length in enumerate(lengths.tolist()):
            new = [float(number) for number in range(counter + 1, counter + length + 1)]
            tokens[row, :length, 0] = torch.tensor(new)
            streams[row] = reference_carry(streams[row], new, num_slots, num_sinks)
            counter += length
        state = carry(state, tokens, lengths, num_sinks)
        assert state.length.tolist() == [len(stream) for stream in streams]
        for row, stream in enumerate(streams):
            assert state.embeds[row, :, 0].tolist() == stream + [0.0] * (num_slots - len(stream))
            assert state.mask[row].tolist() == [True] * len(stream) + [False] * (num_slots - len(stream))


def test_carry_holds_sinks_and_newest():
    state = SoftPrompt(torch.zeros(1, 5, 1), torch.zeros(1, dtype=torch.long))
    for token in range(1, 10):
        state = carry(state, torch.full((1, 1, 1), float(token)), torch.ones(1, dtype=torch.long), num_sinks=2)
    assert state.embeds[0, :, 0].tolist() == [1, 2, 7, 8, 9]


def test_delta_is_exactly_zero_before_training_and_not_after(bases):
    model = Phase15ForCausalLM.from_base(bases["llama"], **SIZES)
    query, length = random_ids(2, QUERY), torch.tensor([QUERY, 3])
    untrained = model.read_segments(model.empty_soft_prompt(2), query, length)
    embeds = model.get_input_embeddings()(query)
    assert torch.equal(untrained.embeds[0, :QUERY], embeds[0]) and torch.equal(untrained.embeds[1, :3], embeds[1, :3])
    trained = randomise_alpha(model).read_segments(model.empty_soft_prompt(2), query, length)
    assert ((trained.embeds - untrained.embeds).abs().sum(dim=-1) > 0).equal(trained.mask)  # and none in unused slots


def test_delta_is_the_gated_overwrite_of_the_design(tiny):
    """With α → ∞ and the gate open the slots hold O y and what they point at; with it closed, what was carried."""
    net = tiny.hypernet
    old, tokens = as_soft_prompt(list(torch.randn(SLOTS - 5, 32)), 32), torch.randn(1, QUERY, 32)
    length = torch.tensor([QUERY - 1])
    carried = carry(old, tokens, length, 2)
    stream = torch.cat([old.embeds[0, : SLOTS - 5], tokens[0, : QUERY - 1]])
    seen, written = {}, []
    net.memory_norm.register_forward_hook(lambda module, arguments, output: seen.update(memory=output[0]))
    net.norm.register_forward_hook(lambda module, arguments, output: seen.update(y=output[0]))
    net.output_proj.register_forward_hook(lambda module, arguments, output: written.append(output[0]))
    with torch.no_grad():
        net.alpha.fill_(50.0)
        net.pointer_q_proj.weight.mul_(100)  # far from a mean of everything
        for gate in (1e4, -1e4):
            hook = net.gate_proj.register_forward_hook(lambda m, a, output, gate=gate: output * 0 + gate)
            stepped = tiny.step(old, tokens, length)
            hook.remove()
            if gate < 0:
                assert_close(stepped.embeds, carried.embeds)
                continue
            real = [*range(SLOTS - 5), *range(SLOTS, SLOTS + QUERY - 1)]  # not the slots and tokens that are none
            keys = net.pointer_k_proj(seen["memory"][real])
            for slot in range(SLOTS):
                query = net.pointer_q_proj(seen["y"][slot])
                weights = torch.softmax(keys @ query / len(query) ** 0.5, dim=0)
                expected = written[0][slot] * net.embedding_scale + (weights[:, None] * stream).sum(dim=0)
                assert_close(stepped.embeds[0, slot], expected, atol=1e-4, rtol=1e-4)
            assert weights.max() > 2 / len(weights)


def test_alpha_learns_although_it_starts_at_zero(bases):
    """The gradient of |α| at zero is that of α, not none, as `abs()` would have it."""
    model, ids, gradients = Phase15ForCausalLM.from_base(bases["llama"], **SIZES), random_ids(2, 20), []
    for model.hypernet.signed_alpha in (False, True):
        gradients += torch.autograd.grad(model(ids, labels=ids).loss, model.hypernet.alpha)
    assert gradients[0].all() and torch.equal(*gradients)


@torch.no_grad()
@pytest.mark.parametrize("signed", [False, True])
def test_what_is_carried_does_not_grow(signed, bases):
    """
    A step gives means of carried vectors and embeddings, plus a share of O y: so no slot is longer than the longest
    embedding and all of O y together. Where the sign of α counts, it is.
    """
    model = randomise_alpha(Phase15ForCausalLM.from_base(bases["llama"], **SIZES, hypernet_signed_alpha=signed))
    net, added, query = model.hypernet, [], random_ids(1, 400)
    assert (net.alpha < -0.1).any() and (net.alpha > 0.1).any()
    net.output_proj.register_forward_hook(lambda module, arguments, output: added.append(output.abs().max()))
    slots = model.read_segments(model.empty_soft_prompt(1), query, torch.tensor([400])).embeds
    limit = model.get_input_embeddings()(query).abs().max() + net.embedding_scale * sum(added)
    assert len(added) == 58 and (slots.abs().max() > limit).item() is signed


def test_the_slot_gate_is_shared_by_all_channels(tiny):
    """g·y alone: where it says so a slot keeps what was carried, in every channel, and elsewhere it is overwritten."""
    net = tiny.hypernet
    old, tokens = as_soft_prompt(list(torch.randn(SLOTS, 32)), 32), torch.randn(1, QUERY, 32)
    length, says = torch.tensor([QUERY]), torch.where(torch.arange(SLOTS) % 3 == 0, 1e4, -1e4)[None, :, None]
    net.slot_gate_proj.register_forward_hook(lambda module, arguments, output: output * 0 + says)
    with torch.no_grad():
        changed = tiny.step(old, tokens, length).embeds != carry(old, tokens, length, 2).embeds
    assert changed[0, ::3].all() and not changed[0, 1::3].any() and not changed[0, 2::3].any()


def test_without_a_slot_gate(bases):
    """As in folders saved before 2026-11-27, whose config does not name it."""
    values = Phase15Config(**SIZES).to_dict()
    assert values.pop("hypernet_slot_gate") is True and Phase15Config.from_dict(values).hypernet_slot_gate is False
    model = randomise_alpha(Phase15ForCausalLM.from_base(bases["llama"], **SIZES | {"hypernet_slot_gate": False}))
    assert model.hypernet.slot_gate_proj is None
    slots, tokens = list(torch.randn(SLOTS, 32)), random_ids(1, QUERY)
    with torch.no_grad():
        stepped = model.step(
            as_soft_prompt(slots, 32), model.get_input_embeddings()(tokens), torch.tensor([QUERY])
        ).embeds[0]
        assert_close(stepped, torch.stack(reference_step(model, slots, tokens[0])), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("layers", [0, 2])
def test_other_numbers_of_layers_are_read(layers, bases):
    """
    Against the library's own hidden states, a segment at a time; all other tests read one layer. After the last layer
    the library gives its states behind the norm, so its input is taken there.
    """
    model = randomise_alpha(Phase15ForCausalLM.from_base(bases["llama"], **SIZES | {"hypernet_reads_layers": layers}))
    tokens, length, expected = model.get_input_embeddings()(random_ids(2, 2 * QUERY + 3)), torch.tensor([17, 4]), []
    model.llm.model.norm.register_forward_pre_hook(lambda module, arguments: expected.append(arguments[0]))
    with torch.no_grad():
        read = model.read_segments(model.empty_soft_prompt(2), tokens, length).embeds
        actual = model.model.first_layers(tokens, QUERY)
        for segment in tokens.split(QUERY, dim=1):
            model.llm.model(inputs_embeds=segment)
        if not layers:
            assert actual == [None] * 3 and not hasattr(model.hypernet, "hidden_proj")
            return
        assert [states.shape[1] for states in actual] == [QUERY, QUERY, 3]
        for states, of_library in zip(actual, expected, strict=True):
            assert_close(states, of_library, atol=1e-5, rtol=1e-5)
        model.hypernet.hidden_proj.weight.zero_()  # and what is read counts
        assert not torch.allclose(model.read_segments(model.empty_soft_prompt(2), tokens, length).embeds, read)


def test_a_layer_that_is_read_keeps_its_sliding_window(bases):
    """Mistral's, of 28 tokens, in a segment of 40: the last token does not see the first."""
    model = Phase15ForCausalLM.from_base(bases["mistral"], **SIZES | {"max_query_length": 40})
    tokens = torch.randn(1, 40, 32)
    with torch.no_grad():
        (states,) = model.model.first_layers(tokens, 40)
        for changed, seen in ((11, False), (12, True)):
            (others,) = model.model.first_layers(tokens + F.one_hot(torch.tensor(changed), 40)[:, None], 40)
            assert torch.equal(states[0, -1], others[0, -1]) is not seen


def test_the_layers_read_are_those_of_the_llm(tiny):
    """Not copies: counted once, in no file twice, and what happens to them happens to what is read."""
    assert not any("first_layers" in name for name in [*tiny.state_dict(), *dict(tiny.named_modules())])
    copied, tokens = copy.deepcopy(tiny), torch.randn(1, QUERY, 32)
    with torch.no_grad():
        (before,) = tiny.model.first_layers(tokens, QUERY)
        copied.llm.model.layers[0].mlp.up_proj.weight.mul_(2)
        assert torch.equal(tiny.model.first_layers(tokens, QUERY)[0], before)
        assert not torch.allclose(copied.model.first_layers(tokens, QUERY)[0], before)
        assert copied.bfloat16().model.first_layers(tokens.bfloat16(), QUERY)[0].dtype is torch.bfloat16


def test_hypernet_layers_equal_the_equations(tiny):
    """One row without padding, one head at a time."""
    net, seen = tiny.hypernet, []
    old, tokens, length = (
        as_soft_prompt(list(torch.randn(SLOTS, 32)), 32),
        torch.randn(1, QUERY, 32),
        torch.tensor([QUERY]),
    )
    carried = carry(old, tokens, length, SINKS)
    net.norm.register_forward_hook(lambda module, arguments, output: seen.append(arguments[0][0]))
    net(carried, old, tokens, length)

    def attend(attention, x, memory):
        heads = []
        for rows in torch.arange(32).split(8):
            q, k, v = (
                (attention.get_submodule(f"{name}_proj").weight[rows] @ x.T).T
                for name, x in zip("qkv", (x, memory, memory), strict=True)
            )
            heads.append(torch.softmax(q @ k.T / 8**0.5, dim=-1) @ v)
        return attention.o_proj(torch.cat(heads, dim=-1))

    unit = [embeds[0] / net.embedding_scale for embeds in (carried.embeds, old.embeds, tokens)]
    position = net.position_embeddings.weight
    slots, old_slots = (net.slot_proj(embeds) + position[:SLOTS] for embeds in unit[:2])
    memory = net.memory_norm(torch.cat([old_slots, net.token_proj(unit[2]) + position[:QUERY]]))
    for layer in net.layers:
        slots = slots + attend(layer.self_attn, layer.self_norm(slots), layer.self_norm(slots))
        slots = slots + attend(layer.cross_attn, layer.cross_norm(slots), memory)
        slots = slots + layer.down_proj(F.gelu(layer.up_proj(layer.mlp_norm(slots))))
    assert_close(seen[0], slots, atol=1e-5, rtol=1e-4)
    assert {module.eps for module in net.modules() if isinstance(module, torch.nn.RMSNorm)} == {1e-5}


def test_hypernet_sees_old_slots_and_new_tokens_and_no_padding(tiny):
    old = as_soft_prompt(list(torch.randn(SLOTS, 32)), 32)
    tokens, length = torch.randn(1, CHUNK + 2, 32), torch.tensor([CHUNK])
    carried = carry(old, tokens, length, 2)
    delta = tiny.hypernet(carried, old, tokens, length)

    def changed(old=old, tokens=tokens):
        return not torch.equal(delta, tiny.hypernet(carried, old, tokens, length))

    evicted = torch.zeros(1, SLOTS, 1).index_fill(1, torch.tensor([2]), 1.0)  # the oldest slot that is not a sink
    assert changed(old=old._replace(embeds=old.embeds + evicted))
    assert changed(tokens=tokens + F.one_hot(torch.tensor(CHUNK - 1), CHUNK + 2)[:, None])
    assert not changed(tokens=tokens + F.one_hot(torch.tensor(CHUNK), CHUNK + 2)[:, None])
    fresh = as_soft_prompt(list(torch.randn(3, 32)), 32)  # what stands in slots that are not used must not matter
    noisy = fresh._replace(embeds=fresh.embeds + torch.randn(1, SLOTS, 32) * ~fresh.mask[..., None])
    carried = carry(fresh, tokens, length, 2)
    deltas = [tiny.hypernet(carried, old, tokens, length) for old in (fresh, noisy)]
    assert torch.equal(*deltas)


def test_embedding_scale_is_the_bases(bases, tmp_path):
    model = Phase15ForCausalLM.from_base(bases["llama"], **SIZES)
    rms = model.get_input_embeddings().weight.square().mean().sqrt()
    assert_close(model.hypernet.embedding_scale, rms[None])
    model.hypernet.embedding_scale.mul_(3)
    model.save_pretrained(tmp_path)
    assert_close(Phase15ForCausalLM.from_pretrained(tmp_path).hypernet.embedding_scale, 3 * rms[None])


def test_a_new_model_starts_at_zero_and_the_embeddings_scale():
    model = Phase15ForCausalLM(Phase15Config(text_config=LLM_SIZES, **SIZES))
    assert not model.hypernet.alpha.any()
    assert_close(model.hypernet.embedding_scale, torch.tensor([LLM_SIZES["initializer_range"]]))
    position, std = model.hypernet.position_embeddings.weight, model.config.initializer_range * 32**0.5
    assert_close(position.std(), torch.tensor(std), rtol=0.1, atol=0.0)
    assert position.mean().abs() < 0.2 * std
