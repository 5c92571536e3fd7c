# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""
Fixtures, the marks `integration`, `versions` and `cache_names`, and helpers for processes. pytest imports this file in
the process that only hands out the tests, too, so torch and transformers are imported where they are used.
"""

import os
import re
import socket
import time
from pathlib import Path

import pytest


os.environ["HF_HUB_OFFLINE"] = "1"  # nothing here may need the network
os.environ["OMP_NUM_THREADS"] = "1"  # tests run side by side, one on each core

# The files of the README's first test command. All others are marked `integration`.
QUICK = {
    "test_compat",
    "test_configuration",
    "test_errors",
    "test_losses",
    "test_examples",
    "test_facts",
    "test_generation",
    "test_hub_server",
    "test_modeling",
    "test_loading",
    "test_properties",
    "test_docstrings",
    "test_recursion",
    "test_records",
    "test_structure",
    "test_reliability",
    "test_tables",
    "test_recovery",
    "test_plots",
    "test_cards",
    "test_answers",
    "test_tokenizer",
    "test_batch",
    "test_conftest",
    "test_runs",
    "test_state",
}


ALL = "^test_"
# The tests whose result depends on the versions of libraries: our code calls, overrides or reads an API of theirs that
# has changed between releases, or may. CI runs them again under the lowest versions that requirements.txt allows. Each
# library has at least one path here: a model saved, and loaded in a fresh process; training, a stop, a resumed run;
# all modes of generation; adapters, quantised models and TRL; several processes; the readers of data sets; the Hub;
# the server, the page and lm-evaluation-harness. Tests of only our own code are left out: their results are the same
# under any versions with which these pass. Each entry: a file of tests, and a regular expression for their names.
VERSIONS = {
    # transformers: from_pretrained, save_pretrained and dynamic modules; configs; attention; offloading, of accelerate
    "test_compat": ALL,
    "test_configuration": ALL,
    "test_loading": ALL,
    "test_base": ALL,
    "test_hub": ALL,
    "test_modeling": ALL,
    "test_security": "no_code_of_a_folder|the_commands_run_their_own_code",
    # transformers: generate, its loop, processors, criteria, streamers and beams; torch.compile
    "test_generation": ALL,
    "test_chunk_length": "greedy_equals|saved_choice|sampling_and_beams",
    "test_decoding": "greedy_and_sampling|one_graph_each|compiles_the_steps|library",
    "test_continuous_batching": "library|generate_batch_gives|damaged_weights",
    # Trainer, accelerate, PEFT and torch.distributed: steps, checkpoints, resuming, streams, FSDP2
    "test_trainer": ALL,
    "test_train_sft": "a_stage_trains|compiled_layers|lora|a_stage_resumes|a_stream_resumes|killed_run|leaves_and_says"
    "|two_processes",
    "test_distributed": "fsdp2_trains|ddp_trains|sharded_checkpoints",
    "test_distillation": "a_step_is_that",
    "test_baselines": "what_a_baseline_leaves|a_baseline_resumes",
    "test_faults": "recognised|torn_checkpoint|pickled",
    # datasets and pyarrow; tokenizers and chat templates
    "test_records": ALL,
    "test_examples": ALL,
    # PEFT, TRL, torchao, bitsandbytes, pipelines
    "test_integrations": ALL,
    # huggingface_hub
    "test_hub_server": ALL,
    "test_push_to_hub": ALL,
    # lm_eval, matplotlib
    "test_eval_lm": "are_those_of|writes_results|chat_template",
    "test_eval_sft": "writes_and_prints",
    "test_recovery": ALL,
    # fastapi, uvicorn, openai, prometheus-client, gradio, playwright
    "test_openai_api": "is_that_of_generate|usage|log_probabilities|metrics",
    "test_serve": "is_what_generate_gives",
    "test_app": "streams_what_generate_gives|grows_beside_its_soft_prompt",
}
# transformers 5.24 renamed `past_key_values`. These tests pass or read a cache; CI runs them with 5.23, too.
CACHE_NAMES = {
    "test_compat": ALL,
    "test_generation": "without_a_cache|returned_cache|repeated_cache|greedy_equals|streamer|max_length",
}
MARKS = {"versions": VERSIONS, "cache_names": CACHE_NAMES}
# The files that take longest come first: CI runs each file on one core, and a long one at the end would leave the
# other core without work. Names only: one that is gone does no harm.
LONGEST = [
    "test_train_sft",
    "test_push_to_hub",
    "test_distributed",
    "test_bad_input",
    "test_faults",
    "test_benchmarks",
]


def marks_of(path: Path, test: str) -> list[str]:
    """Returns the marks that this file sets on a test, given the name of its function."""
    marks = [] if is_quick(path) else ["integration"]
    for mark, files in MARKS.items():
        pattern = files.get(path.stem)
        if pattern and re.search(pattern, test):
            marks.append(mark)
    return marks


def is_quick(path: Path) -> bool:
    return path.stem in QUICK


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Does not even import the other files for the README's first test command: that would take seconds."""
    left_out = "not integration" in config.option.markexpr and collection_path.match("test_*.py")
    return True if left_out and not is_quick(collection_path) else None


@pytest.hookimpl(tryfirst=True)  # before pytest deselects by marks
def pytest_collection_modifyitems(items: list[pytest.Item]):
    for item in items:
        for mark in marks_of(item.path, item.originalname):
            item.add_marker(mark)
    order = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))  # stable: the order of a file's tests stays


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> dict[str, str]:
    """Folders of tiny random base models, by name."""
    import torch
    from reference import BASES
    from transformers import AutoModelForCausalLM

    folders = {}
    for name, config in BASES.items():
        torch.manual_seed(0)
        folders[name] = str(tmp_path_factory.mktemp(name))
        AutoModelForCausalLM.from_config(config).save_pretrained(folders[name])
    return folders


@pytest.fixture(scope="session", params=["llama", "mistral", "qwen2"])
def pair(request, bases):
    """A base model, and an untrained Phase15 model made of it."""
    from reference import SIZES
    from transformers import AutoModelForCausalLM

    from phase15.model.modeling_phase15 import Phase15ForCausalLM

    base = AutoModelForCausalLM.from_pretrained(bases[request.param]).eval()
    return base, Phase15ForCausalLM.from_base(bases[request.param], **SIZES)


@pytest.fixture
def tiny(bases):
    """A Llama Phase15 model as training would leave it: Δ ≠ 0."""
    import torch
    from reference import SIZES, randomise_alpha

    from phase15.model.modeling_phase15 import Phase15ForCausalLM

    torch.manual_seed(1)
    return randomise_alpha(Phase15ForCausalLM.from_base(bases["llama"], **SIZES))


@pytest.fixture(scope="module")
def answers_here():
    """train_sft.py's answer at the end of a run comes from this process, because a new one takes seconds to import."""
    from reference import answer_here

    from phase15.commands import training_run as train_sft

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_sft, "answer_in_new_process", answer_here)
        yield


@pytest.fixture(scope="session")
def tokenizer():
    """One printable character per token id."""
    from reference import VOCAB
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.WordLevel({chr(65 + index): index for index in range(VOCAB)}, unk_token="A"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)


@pytest.fixture(scope="session")
def chat_tokenizer():
    """Bytes and a few merges, with a chat template and an end token."""
    from datasets import Dataset

    from phase15.data.tokenizer import train_tokenizer

    return train_tokenizer(Dataset.from_list([{"text": "Why is the sky blue? Blue light scatters most."}]), 270)


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    """A random model whose vocabulary is that of the data set `facts`, and its tokenizer."""
    import torch
    from reference import LLM_SIZES, SIZES, randomise_alpha
    from transformers import AutoModelForCausalLM, LlamaConfig

    from phase15.data.facts import fresh_chats
    from phase15.data.tokenizer import train_tokenizer
    from phase15.model.modeling_phase15 import Phase15ForCausalLM

    tokenizer = train_tokenizer([{"messages": chat.messages} for chat in fresh_chats(9, 50, 4)], 400)
    torch.manual_seed(0)
    folder = str(tmp_path_factory.mktemp("base"))
    AutoModelForCausalLM.from_config(LlamaConfig(**LLM_SIZES | {"vocab_size": len(tokenizer)})).save_pretrained(folder)
    return randomise_alpha(Phase15ForCausalLM.from_base(folder, **SIZES)), tokenizer


@pytest.fixture(scope="session")
def chatter(chat_tokenizer):
    """A random model with the chat tokenizer's vocabulary; the answer to `ENDING` holds its end token."""
    import torch
    from reference import ENDING, LLM_SIZES, PROMPTS, SIZES, answer_ids, randomise_alpha
    from transformers import LlamaConfig

    from phase15.model.configuration_phase15 import Phase15Config
    from phase15.model.modeling_phase15 import Phase15ForCausalLM

    torch.manual_seed(1)
    text_config = LlamaConfig(**LLM_SIZES | {"vocab_size": len(chat_tokenizer)})
    model = randomise_alpha(Phase15ForCausalLM(Phase15Config(text_config=text_config, **SIZES))).eval()
    model.generation_config.pad_token_id = chat_tokenizer.pad_token_id
    free, used = answer_ids(model, chat_tokenizer, ENDING)[20:], set()
    for prompt in PROMPTS:
        used |= set(answer_ids(model, chat_tokenizer, prompt))
    model.generation_config.eos_token_id = next(token for token in free if token not in used)
    return model


def listening(port: int) -> set[str]:
    """The addresses of this machine on which something listens at a port (Linux; IPv4 and IPv6)."""
    found = set()
    for name, family in (("tcp", socket.AF_INET), ("tcp6", socket.AF_INET6)):
        for line in Path(f"/proc/net/{name}").read_text().splitlines()[1:]:
            (address, its_port), state = line.split()[1].split(":"), line.split()[3]
            if int(its_port, 16) == port and state == "0A":
                words = [bytes.fromhex(address[i : i + 8])[::-1] for i in range(0, len(address), 8)]
                found.add(socket.inet_ntop(family, b"".join(words)))
    return found


def resident(pid: int) -> int:
    """Bytes of memory that a process has in use (Linux)."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_until_idle(process):
    """Returns when a process has stopped computing, and fails if it goes on for ten seconds (Linux)."""
    deadline = time.monotonic() + 10
    while True:
        before = cpu_seconds(process.pid)
        time.sleep(0.5)
        if cpu_seconds(process.pid) - before < 0.1:
            return
        assert time.monotonic() < deadline, "it is still at work"
