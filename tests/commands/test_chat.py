# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""`phase15 chat`: its answers are those of `generate` on the conversation so far."""

import io

import pytest
import torch

from phase15.commands.chat import main
from phase15.model.modeling_phase15 import Phase15ForCausalLM


@pytest.fixture(scope="module")
def folder(chatter, chat_tokenizer, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("chatter"))
    chatter.save_pretrained(folder)
    chat_tokenizer.save_pretrained(folder)
    return folder


def expected_answers(model, tokenizer, questions: list[str], **settings) -> list[str]:
    conversation = []
    for question in questions:
        conversation.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(conversation, add_generation_prompt=True, return_dict=True)["input_ids"]
        output = model.generate(torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)).long(), **settings)
        text = tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        conversation.append({"role": "assistant", "content": text})
    return [turn["content"] for turn in conversation if turn["role"] == "assistant"]


def talk(monkeypatch, capsys, text: str, *argv: str) -> str:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))
    main(list(argv))
    return capsys.readouterr().out


@pytest.mark.parametrize("end", ["", "/quit\nnever asked\n"])
def test_answers_follow_the_conversation(end, folder, chatter, chat_tokenizer, monkeypatch, capsys):
    questions = ["Why is the sky blue?", "And the sea?"]
    settings = {"max_new_tokens": 20, "do_sample": False}
    expected = expected_answers(chatter, chat_tokenizer, questions, **settings)
    text = "".join(f"{question}\n" for question in questions)
    said = talk(monkeypatch, capsys, f"\n{text}{end}", "--model_dir", folder, "--max_new_tokens", "20")
    assert expected[0] and said == "".join(f"{answer}\n" for answer in expected)
    assert expected_answers(chatter, chat_tokenizer, questions[1:], **settings)[0] != expected[1]


def test_a_temperature_samples(folder, chatter, chat_tokenizer, monkeypatch, capsys):
    question = "Why is the sky blue?"
    settings = {"max_new_tokens": 20, "do_sample": True, "temperature": 1.5}
    torch.manual_seed(3)
    expected = expected_answers(chatter, chat_tokenizer, [question], **settings)
    flags = ["--model_dir", folder, "--max_new_tokens", "20", "--temperature", "1.5"]
    monkeypatch.setattr(Phase15ForCausalLM, "eval", lambda self: torch.manual_seed(3) and self)
    assert talk(monkeypatch, capsys, question, *flags) == f"{expected[0]}\n"


def test_ctrl_c_stops_an_answer_and_keeps_it(folder, chatter, chat_tokenizer, monkeypatch, capsys):
    """The next question is asked after the part that was printed."""
    generate = Phase15ForCausalLM.generate
    asked = []

    def interrupted(self, input_ids, streamer, **kwargs):
        asked.append(chat_tokenizer.decode(input_ids[0]))
        if len(asked) > 1:
            return generate(self, input_ids, streamer=streamer, **kwargs)
        streamer.put(input_ids[0])
        for token in chat_tokenizer("Blue light scatters most.")["input_ids"]:
            streamer.put(torch.tensor([token]))
        raise KeyboardInterrupt

    monkeypatch.setattr(Phase15ForCausalLM, "generate", interrupted)
    said = talk(monkeypatch, capsys, "Why?\nWhere?\n", "--model_dir", folder, "--max_new_tokens", "5")
    assert said.startswith("Blue light scatters most.\n") and said.count("\n") == 2
    assert "Blue light scatters most." in asked[1] and "Why?" in asked[1] and "Where?" in asked[1]


def test_a_wrong_folder_ends_in_one_line(bases, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder, word in ((bases["llama"], "is not a Phase15 model"), ("outputs/quickstart", "train")):
        with pytest.raises(SystemExit, match=f"^phase15 chat: .*{word}"):
            main(["--model_dir", folder])
