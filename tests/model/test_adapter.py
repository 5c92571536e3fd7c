# Copyright 2026 The Phase15 authors. Licensed under the Apache License, Version 2.0.
"""A HyperNetwork without its base: small, exact when both are put together, refused with another base."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import SIZES, random_ids, randomise_alpha
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from phase15.loading import load_model, load_strictly, resolve_source
from phase15.model import adapter_phase15
from phase15.model.adapter_phase15 import base_digest
from phase15.model.modeling_phase15 import Phase15ForCausalLM


IDS = random_ids(2, 30)


@pytest.fixture(params=["llama", "llama-tied"])
def trained(request, bases) -> Phase15ForCausalLM:
    torch.manual_seed(1)
    model = randomise_alpha(Phase15ForCausalLM.from_base(bases[request.param], **SIZES))
    model.generation_config.chunk_length = 3
    return model


@pytest.fixture
def folder(trained, tmp_path) -> Path:
    trained.save_hypernet(tmp_path / "adapter")
    return tmp_path / "adapter"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_both_put_together_are_the_model(trained, folder):
    expected = logits(trained)
    for load in (Phase15ForCausalLM, AutoModelForCausalLM, AutoModel):
        model, info = load.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
        assert not any(info.values()) and not model.training
        assert torch.equal(logits(model), expected)
        assert model.generation_config.chunk_length == 3
        assert model.config.base_digest is None  # it has its base
    assert json.loads((folder / "config.json").read_text())["base_digest"] == base_digest(trained.llm)


def test_a_folder_holds_nothing_of_the_base(trained, folder):
    weights = load_file(folder / "model.safetensors")
    assert {name.removeprefix("model.hypernet.") for name in weights} == trained.hypernet.state_dict().keys()
    config = json.loads((folder / "config.json").read_text())
    assert Path(config["base_model_name_or_path"]).is_dir() and config["base_revision"] is None
    size = sum(weight.nbytes for weight in trained.hypernet.state_dict().values())
    assert (folder / "model.safetensors").stat().st_size < size + 8000
    assert trained.saves_base and trained.config.base_digest is None  # the model in memory is as before


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16], ids=str)
def test_any_dtype(trained, folder, dtype):
    """The digest of the base is that of bfloat16, whatever it is loaded in. float16 would round twice: not checked."""
    model = Phase15ForCausalLM.from_pretrained(folder, dtype=dtype)
    assert model.llm.dtype == dtype
    assert model.hypernet.alpha.dtype == (torch.float32 if dtype == torch.float16 else dtype)
    assert torch.allclose(logits(model).float(), logits(trained), atol=0.5)


def test_the_base_is_found_elsewhere(trained, folder, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    shutil.copytree(trained.config.base_model_name_or_path, elsewhere)
    edit(folder, base_model_name_or_path="/gone/base")
    with pytest.raises(
        ValueError, match="/gone/base; that is not on this machine: name its place with `base=`"
    ) as error:
        Phase15ForCausalLM.from_pretrained(folder)
    assert "\n" not in str(error.value)
    for load in (Phase15ForCausalLM, AutoModelForCausalLM):
        model = load.from_pretrained(folder, base=elsewhere, trust_remote_code=True)
        assert torch.equal(logits(model), logits(trained))


def edit(folder: Path, **fields):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


def test_a_base_inside_the_folder_moves_with_it(bases, tmp_path):
    shutil.copytree(bases["llama"], tmp_path / "run" / "base")
    model = randomise_alpha(Phase15ForCausalLM.from_base(tmp_path / "run" / "base", **SIZES))
    model.save_hypernet(tmp_path / "run")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["base_model_name_or_path"] == "base"
    (tmp_path / "run").rename(tmp_path / "moved")
    moved = Phase15ForCausalLM.from_pretrained(tmp_path / "moved")
    assert torch.equal(logits(moved), logits(model))
    moved.save_hypernet(tmp_path / "elsewhere")  # from where the path is another
    assert torch.equal(logits(Phase15ForCausalLM.from_pretrained(tmp_path / "elsewhere")), logits(model))


def test_another_base_is_refused(trained, folder, tmp_path, bases):
    torch.manual_seed(7)
    AutoModelForCausalLM.from_config(trained.llm.config).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="are not those that the HyperNetwork was trained on .digest") as error:
        Phase15ForCausalLM.from_pretrained(folder, base=tmp_path / "other")
    assert "\n" not in str(error.value)
    model = Phase15ForCausalLM.from_pretrained(folder, base=tmp_path / "other", check_base=False)
    assert torch.equal(model.hypernet.alpha, trained.hypernet.alpha)
    assert not torch.equal(logits(model), logits(trained))
    model.save_hypernet(tmp_path / "on_the_other")  # which it names, and its digest
    assert torch.equal(logits(Phase15ForCausalLM.from_pretrained(tmp_path / "on_the_other")), logits(model))
    with pytest.raises(ValueError, match="`model_type` qwen2, but the HyperNetwork's LLM has llama"):
        Phase15ForCausalLM.from_pretrained(folder, base=bases["qwen2"], check_base=False)


def test_a_merged_folder_needs_no_base(trained, folder, tmp_path):
    model = Phase15ForCausalLM.from_pretrained(folder)
    model.merge(tmp_path / "merged")
    model.save_pretrained(tmp_path / "saved")
    for name in ("merged", "saved"):
        config = json.loads((tmp_path / name / "config.json").read_text())
        assert config["base_digest"] is None and config["base_model_name_or_path"] is None  # a path of this machine
        assert torch.equal(logits(Phase15ForCausalLM.from_pretrained(tmp_path / name)), logits(trained))
    with pytest.raises(ValueError, match="holds its base: only a HyperNetwork needs one"):
        Phase15ForCausalLM.from_pretrained(tmp_path / "merged", base=tmp_path)
    again = Phase15ForCausalLM.from_pretrained(folder)
    again.save_hypernet(tmp_path / "again")
    assert torch.equal(logits(Phase15ForCausalLM.from_pretrained(tmp_path / "again")), logits(trained))


def test_a_model_without_a_known_base_cannot_be_saved_without_it(trained, tmp_path):
    model = Phase15ForCausalLM(trained.config)
    model.config.base_model_name_or_path = None
    with pytest.raises(ValueError, match="nothing says where the base is"):
        model.save_hypernet(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists() and model.saves_base


def test_the_recorded_revision_of_the_base(trained, tmp_path, monkeypatch):
    """A base of the Hub is fetched at the commit that it had."""
    base = trained.config.base_model_name_or_path
    trained.config.base_model_name_or_path = "user/base"
    trained.config.base_revision = "a" * 40
    trained.save_hypernet(tmp_path / "adapter")
    cache = tmp_path / "cache" / "models--user--base"
    for name, revision in (("main", "a" * 40), ("v1", "b" * 40)):
        (cache / "snapshots" / revision).mkdir(parents=True)
        (cache / "snapshots" / revision / "config.json").write_text("{}")
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / name).write_text(revision)
    calls = []

    def load_base(name, **kwargs):
        calls.append((name, kwargs))
        return adapter_load(base, **{k: v for k, v in kwargs.items() if k != "revision"})

    adapter_load = adapter_phase15.load_base
    monkeypatch.setattr(adapter_phase15, "load_base", load_base)
    options = {"token": "secret", "revision": "main", "cache_dir": tmp_path / "cache"}
    model = Phase15ForCausalLM.from_pretrained(tmp_path / "adapter", **options)
    assert model.config.base_revision == "a" * 40
    ((name, kwargs),) = calls
    assert name == "user/base" and kwargs["revision"] == "a" * 40 and kwargs["token"] == "secret"
    assert adapter_phase15.describe_base("user/base", cache_dir=tmp_path / "cache", revision="v1") == {
        "base_model_name_or_path": "user/base",
        "base_revision": "b" * 40,
    }


def test_a_copy_of_a_base_keeps_the_id_of_the_hub(trained, folder):
    base = trained.config.base_model_name_or_path
    edit(folder, base_model_name_or_path="user/base", base_revision="a" * 40)
    model = Phase15ForCausalLM.from_pretrained(folder, base=base)
    assert (model.config.base_model_name_or_path, model.config.base_revision) == ("user/base", "a" * 40)
    model = Phase15ForCausalLM.from_pretrained(folder, base=base, check_base=False)
    assert (model.config.base_model_name_or_path, model.config.base_revision) == (base, None)


def test_a_part_of_a_repository_has_no_name(bases):
    parts = {"gguf_file": "x.gguf", "subfolder": "part"}
    for name, value in parts.items():
        described = adapter_phase15.describe_base("user/base", **{name: value})
        assert described == {"base_model_name_or_path": None, "base_revision": None}
        described = adapter_phase15.describe_base(bases["llama"], **{name: value})
        assert described["base_model_name_or_path"] == str(Path(bases["llama"], value))


def test_arguments_of_from_pretrained(trained, folder, tmp_path):
    """Fields of the config count, the base gets those of an LLM, and the weights are one file whatever is asked."""
    trained.merge(tmp_path / "whole")
    for name in (folder, tmp_path / "whole"):
        model = Phase15ForCausalLM.from_pretrained(name, chunk_length=5, attn_implementation="eager")
        assert model.config.chunk_length == 5 and model.llm.config._attn_implementation == "eager"
    trained.save_hypernet(tmp_path / "sharded", max_shard_size="1KB")
    assert torch.equal(logits(Phase15ForCausalLM.from_pretrained(tmp_path / "sharded")), logits(trained))


def test_the_damaged_file_is_named(trained, folder, tmp_path):
    base = shutil.copytree(trained.config.base_model_name_or_path, tmp_path / "base")
    for place, message in ((base, f"The weights of the base {base} cannot be read"), (folder, str(folder))):
        file = Path(place, "model.safetensors")
        file.write_bytes(file.read_bytes()[:-9])
        with pytest.raises(ValueError, match=message) as error:
            load_strictly(Phase15ForCausalLM.from_pretrained, folder, base=base)
        assert "\n" not in str(error.value)


def test_weights_without_a_digest_are_not_compared(trained, folder, monkeypatch):
    """As of a quantised base: one warning, and no folder without the base."""
    warnings = []
    monkeypatch.setattr(adapter_phase15.logger, "warning_once", warnings.append)
    monkeypatch.setattr(adapter_phase15, "base_digest", lambda llm: None)
    model = Phase15ForCausalLM.from_pretrained(folder)
    assert len(warnings) == 1 and "is not checked: its weights are quantised or offloaded" in warnings[0]
    with pytest.raises(ValueError, match="have no digest: save both"):
        model.save_hypernet(folder.parent / "again")
    assert not (folder.parent / "again").exists()


@pytest.mark.parametrize("damage", ["missing", "left over", "of another shape"])
def test_weights_of_the_hypernetwork_that_do_not_fit_are_refused(folder, damage):
    weights = load_file(folder / "model.safetensors")
    name = "model.hypernet.output_proj.weight"
    if damage == "missing":
        del weights[name]
    elif damage == "left over":
        weights[name + "s"] = weights[name].clone()
    else:
        weights[name] = weights[name][:-1].contiguous()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"output_proj.weights? is {damage}"):
        load_model(resolve_source(folder), "float32")
    with pytest.raises(ValueError, match="output_proj"):
        load_strictly(Phase15ForCausalLM.from_pretrained, folder)


ELSEWHERE = """
import sys, torch
from transformers import AutoModelForCausalLM

torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
torch.save(model(torch.load(sys.argv[2])).logits.detach(), sys.argv[3])
model.save_hypernet(sys.argv[4])
"""


def test_a_process_without_the_repository(trained, folder, tmp_path):
    torch.save(IDS, tmp_path / "ids.pt")
    names = [folder, tmp_path / "ids.pt", tmp_path / "logits.pt", tmp_path / "again"]
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "modules"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *map(str, names)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    assert torch.equal(torch.load(tmp_path / "logits.pt"), logits(trained))
    assert torch.equal(logits(Phase15ForCausalLM.from_pretrained(tmp_path / "again")), logits(trained))


def test_the_digest_of_a_base_follows_its_weights(trained):
    digest = base_digest(trained.llm)
    assert base_digest(trained.llm.to(torch.bfloat16)) == digest
    with torch.no_grad():
        trained.llm.base_model.layers[0].mlp.up_proj.weight[0, 0] += 1
    assert base_digest(trained.llm) != digest
