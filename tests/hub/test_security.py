# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""Code that travels with a model, and texts of others that must stay texts in a model card."""

import ast
import copy
import re
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt
from reference import SIZES
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModel, AutoModelForCausalLM

from phase15 import loading
from phase15.commands import push as push_to_hub
from phase15.commands import push_run
from phase15.evaluation import losses, tables
from phase15.hub import cards, runs
from phase15.model.modeling_phase15 import Phase15ForCausalLM
from phase15.training import arguments
from phase15.training.models import make_model


ROOT = Path(__file__).parents[2]
CODE = {path.name for path in (ROOT / "phase15" / "model").glob("*_phase15.py")}


# the code of a saved folder


@pytest.fixture
def folder(tiny, tmp_path, monkeypatch) -> Path:
    """A saved model each of whose code files says that it was run."""
    tiny.save_pretrained(tmp_path / "model")
    assert {path.name for path in tmp_path.rglob("*.py")} == CODE
    for name in CODE:
        path = tmp_path / "model" / name
        spy = f"\nfrom pathlib import Path\nPath({str(tmp_path / 'ran')!r}).touch()\n"
        path.write_text(path.read_text() + spy)
    for mapping in (CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING):  # where serve.py and eval_lm.py put the code here
        monkeypatch.setattr(mapping, "_extra_content", {})
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    # an earlier test's module cache would come before this one, which is made only when code is loaded
    paths = [path for path in sys.path if not Path(path, "transformers_modules").is_dir()]
    monkeypatch.setattr(sys, "path", paths)
    monkeypatch.syspath_prepend(tmp_path / "modules")
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        monkeypatch.delitem(sys.modules, name)  # an earlier test's package looks for modules in its own folder
    monkeypatch.setattr("sys.stdin", open("/dev/null"))
    yield tmp_path / "model"
    for name in [name for name in sys.modules if name.partition(".")[0] == "transformers_modules"]:
        del sys.modules[name]  # a later test in this process would look for its modules in this test's folder


@pytest.mark.parametrize("answer", [{}, {"trust_remote_code": False}], ids=["unsaid", "no"])
@pytest.mark.parametrize("auto_class", [AutoConfig, AutoModel, AutoModelForCausalLM], ids=lambda c: c.__name__)
def test_no_code_of_a_folder_is_run_unless_it_is_trusted(folder, auto_class, answer):
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        auto_class.from_pretrained(folder, **answer)
    assert {path.name for path in folder.parent.iterdir()} == {"model"}  # neither run nor copied to where it would be


def train(folder: Path):
    make_model(arguments.Phase15ModelArguments(model_name_or_path=str(folder)), None)


def evaluate(folder: Path):
    loading.load_any(str(folder))


@pytest.mark.parametrize("load", [train, evaluate, loading.load_phase15], ids=["train_sft", "eval_sft", "push_to_hub"])
def test_the_commands_run_their_own_code_and_none_of_the_folder(folder, chat_tokenizer, load):
    chat_tokenizer.save_pretrained(folder)
    load(folder)
    assert not (folder.parent / "ran").exists()


def test_the_code_of_a_folder_says_when_it_is_run(folder):
    AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert (folder.parent / "ran").exists()


LIBRARIES = {"torch", "transformers", "safetensors", *(Path(name).stem for name in CODE)}
FORBIDDEN = set(  # of the standard library: other code, other processes, other machines
    "asyncio builtins code codeop ctypes dbm ftplib http imaplib importlib marshal mmap multiprocessing pickle "
    "nntplib pkgutil poplib pty runpy shelve shutil signal smtplib socket socketserver ssl subprocess tempfile "
    "telnetlib urllib webbrowser xmlrpc zipimport".split()
)
ATTRIBUTES = {"os": {"path", "PathLike", "fsync"}, "sys": {"maxsize"}}  # all that may be used of them
NAMES = {"eval", "exec", "open", "input", "breakpoint", "globals", "__import__", "__builtins__"}
DANGERS = {"torch.load", "torch.hub", "torch.package", "torch.jit", "torch.classes", "torch.ops", "torch.distributed"}
DANGERS |= {"torch.utils.cpp_extension", "torch.multiprocessing", "torch.serialization"}


def findings(source: str) -> list[str]:
    """What a file that others run on trust may not hold."""
    found = []
    for node in ast.walk(ast.parse(source)):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules = [f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names]
        for module in modules:
            top, _, rest = module.partition(".")
            known = top in LIBRARIES or (not getattr(node, "level", 0) and top in sys.stdlib_module_names - FORBIDDEN)
            if not known or (rest and top in ATTRIBUTES and rest.split(".")[0] not in ATTRIBUTES[top]):
                found.append(module)
        text = ast.unparse(node) if isinstance(node, ast.Attribute) else ""
        top, _, rest = text.partition(".")
        found += [name for name in [text, *modules] if any(f"{name}.".startswith(f"{danger}.") for danger in DANGERS)]
        if top in ATTRIBUTES and rest.split(".")[0] not in ATTRIBUTES[top]:
            found.append(text)
        if isinstance(node, ast.Name) and node.id in NAMES:
            found.append(node.id)
    return found


@pytest.mark.parametrize("name", sorted(CODE))
def test_the_imports_of_the_code_that_travels(name):
    assert findings((ROOT / "phase15" / "model" / name).read_text()) == []


def test_the_pages_name_each_file_that_travels():
    assert set(re.findall(r"\w+_phase15\.py", (ROOT / "docs" / "model.md").read_text("utf-8"))) == CODE
    tree = re.search(r"model/ +travels.*?data/", (ROOT / "README.md").read_text("utf-8"), re.S)[0]
    assert {f"{name}_phase15.py" for name in re.findall(r"\b(\w+)[,\n]", tree.partition(":\n")[2])} == CODE


@pytest.mark.parametrize(
    "source",
    """import requests | from numpy import load | import torchvision | from .other import x | import pickle
    import os.path, subprocess | from urllib.request import urlopen | import importlib | __import__('json')
    eval('1') | exec('1') | f = eval | open('x') | import torch; torch.load('x') | from torch import load
    import torch.hub | from torch import hub | from torch.hub import load | torch.hub.load('x', 'y') | os.system('x')
    from os import system | import os; os.remove('x') | sys.modules['x'] | torch.utils.cpp_extension.load_inline('x')
    """.replace("\n", "|").split("|"),
)
def test_what_may_not_travel_is_found_inside_functions_too(source):
    if source.strip():
        assert findings("def f():\n" + "".join(f"    {line.strip()}\n" for line in source.split(";")))


# the model card

HOSTILE = {
    "yaml": "x\n---\nlicense: evil\n- &a [*a]\n...\n--- !!python/object/apply:os.system [ls]\n{k: 'v\"",
    "table": "x | y \\| z \\\\| w |\n|---|---|\n| a | b |",
    "links": "[x](http://evil.test) ![x](http://evil.test/x.png) [y][z] <http://evil.test>\n\n[z]: http://evil.test",
    "addresses": "see https://evil.test/x?a=b and www.evil.test or me@evil.test, ping @admin :octocat:",
    "headings": "# x\n## y\n\nz\n===\n\n> q\n\n- l\n\n1. n\n\n***\n\n    code",
    "emphasis": "**x** __y__ *z* _w_ ~~v~~ $$m$$ \\(m\\) trailing\\",
    "fences": "x\n```\ny\n~~~\nz\n`````\n# w\n``````` `a` ``b``",
    "backticks": "`" * 40 + "\n" + "`" * 41,
    "html": '<script>alert(1)</script><img src=x onerror=alert(1)></details></td></table><!-- x --> <b class="y">',
    "html block": "\n\n<script>\n\nalert(1)\n\n</script>\n\n<!--\n\n",
    "entities": "&lt;script&gt; &#60;b&#62; &amp;",
    "jinja": "{{ 7 * 7 }} {% for x in y %} {# z #} {{ config }} ${x}",
    "control": "a\x00b\x1b[31mc\x07d\x7fe\x85f\u2028g",
    "bidi": "user\u202egnp.exe \u2066x\u2069 zero\u200bwidth\u200d\ufeff soft\u00adhyphen \U000e0041tag",
    "separators": "a\rb\r\nc\td",
    "empty": " ",
}
ARGUMENTS = {"model_dir": ".", "repo_id": "alice/tiny"}


def card_of(model, tokenizer, text: str, is_evaluated: bool) -> ModelCard:
    """The card of a run in which every text that can be somebody else's is `text`."""
    row = {"loss": 1.25, "loss_by_chunk": [1.25], "tokens_by_chunk": [8], "interval": [1.0, 1.5]}
    recovery = {"recovery": None, "interval": None, "gap": 0.0, "gap_interval": [0.0, 0.0]}
    recipe = {"dataset_name": text, "model_name_or_path": text, "output_dir": text, text: {text: [text]}}
    measured = {"validation": {"model": row, f"baseline_{text}": row}, "context_recovery": {text: recovery}}
    results = measured | {
        "records": {"training": 2, "validation": 1},
        "steps": 3,
        "train": {"epoch": 1.0, "train_runtime": 2.0, text: text},
        "processes": text,
        "device": text,
        "versions": {text: text, "torch": text},
        "sample": {"question": text, "answer": text},
    }
    evaluation = measured | {"dataset": text, "evaluated": text, "records": {"validation": 1}, "command": text}
    evaluation["exact_match"] = {"model": {"correct": 1, "records": 2, "share": 0.5}}
    model.config.text_config._name_or_path = text
    arguments = push_to_hub.PushArguments(**ARGUMENTS, license=text)
    run = runs.Run([recipe, recipe], results, evaluation if is_evaluated else {})
    return cards.model_card(arguments, run, model, tokenizer, list(push_run.PICTURES))


def shape(markdown: str) -> tuple[list, list[str]]:
    """All that a parser makes of Markdown but its texts and code, and these."""
    shapes, texts = [], []

    def visit(tokens):
        for token in tokens:
            if token.type in ("text", "code_inline", "softbreak", "fence"):
                texts.append(token.content)
            if token.type not in ("text", "code_inline", "softbreak"):
                shapes.append((token.type, token.tag, token.info, token.attrs))
            visit(token.children or ())

    visit(MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(markdown))
    return shapes, texts


@pytest.fixture(scope="module")
def model(bases) -> Phase15ForCausalLM:
    return Phase15ForCausalLM.from_base(bases["llama"], **SIZES)


@pytest.mark.parametrize("is_evaluated", [True, False], ids=["evaluated", "trained"])
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_text_of_others_is_a_text_in_the_card(model, chat_tokenizer, text, is_evaluated):
    card = card_of(model, chat_tokenizer, text, is_evaluated)
    expected, _ = shape(card_of(model, chat_tokenizer, "words", is_evaluated).text)
    shapes, texts = shape(card.text)
    assert shapes == expected and {kind for kind, *_ in shapes}.isdisjoint({"html_inline", "html_block", "link_open"})
    harmless = card_of(model, chat_tokenizer, "words", is_evaluated).text
    recipes = r"(?ms)^(`{3,})yaml\n(.*?)\n\1$"
    fence, recipe = re.search(recipes, card.text).groups()
    assert yaml.safe_load(recipe)["output_dir"] == text and recipe.replace("\n", "").isprintable()
    rest, harmless = (re.sub(recipes, "", page) for page in (card.text, harmless))
    assert rest.count("|") == harmless.count("|") and rest.count("\n") == harmless.count("\n")
    assert rest.replace("\n", "").isprintable()
    shown = "".join(c if c.isprintable() else "�" for c in " ".join(text.split()).replace("|", "¦"))
    assert sum(shown in text for text in texts) >= 6
    plain = re.sub(r"(?s)(`+).*?(?<!`)\1(?!`)", "", rest)  # what a viewer may make a link of
    assert not re.search(r"evil\.test|@|:octocat:", plain)


def test_the_card_says_with_which_chunks_the_model_speaks(model, chat_tokenizer):
    trained, slots = model.config.chunk_length, model.config.num_soft_tokens
    arguments, run = push_to_hub.PushArguments(**ARGUMENTS), runs.Run([], {}, {})
    for chosen in (None, 2 * trained):
        speaker, spoken = copy.deepcopy(model), chosen or trained
        speaker.generation_config.chunk_length = chosen
        card = str(cards.model_card(arguments, run, speaker, chat_tokenizer, []))
        assert f"the current chunk of {spoken} tokens" in card and f"more than {slots + spoken - 1} positions" in card
        assert (f"| {spoken} tokens, {trained} in training, so" in card) == (chosen is not None)


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_the_metadata_of_a_card_are_what_was_given(model, chat_tokenizer, tmp_path, text):
    card_of(model, chat_tokenizer, text, True).save(tmp_path / "README.md")
    page = (tmp_path / "README.md").read_bytes().decode()
    metadata = yaml.safe_load(page.removeprefix("---\n").split("\n---\n")[0])
    expected = yaml.safe_load(str(card_of(model, chat_tokenizer, "words", True).data))

    def put(value):
        if isinstance(value, dict):
            return {key: put(item) for key, item in value.items()}
        if isinstance(value, list):
            return [put(item) for item in value]
        return value.replace("words", text) if isinstance(value, str) else value

    expected.pop("base_model"), expected.pop("base_model_relation"), expected.pop("datasets")  # no ids of the Hub's
    assert metadata == put(expected)
    assert ModelCard.load(tmp_path / "README.md").data.to_dict() == metadata


@pytest.mark.parametrize("name", ["a\nb: c", "---", "x/y/z", "<b>", "[x](y)", "../x", "a b", ""])
@pytest.mark.parametrize("flag", ["repo_id", "base_model", "datasets"])
def test_a_name_that_the_hub_cannot_have_is_refused(flag, name):
    value = [name] if flag == "datasets" else name
    with pytest.raises(ValueError, match="(?i)repo.id"):
        push_to_hub.PushArguments(**ARGUMENTS | {flag: value})


def test_words_stay_words_and_anything_else_is_code():
    words = "64 records of gsm8k_test.jsonl, from the last 9.5 %; the run held them out (Δ = 0, Intel Xeon @ 2 GHz)"
    rows = map(losses.display_label, losses.LABELS)
    for text in (words, "baseline: café-1", *rows):
        assert tables.cell(text) == text
    for text in ("http://evil.test", "www.evil.test", "me@evil.test", "@admin", ":octocat:", "_x_", "__x__"):
        assert tables.cell(text) == f"`{text}`"
    assert tables.cell(" a|`b``c \n") == "``` a¦`b``c ```"
    assert tables.cell("<b>") == "`<b>`" and tables.cell("") == ""
