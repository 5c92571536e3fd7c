"""
Describes a folder that an earlier commit saved: its JSON files, the names and shapes of its weights, and the tokens
that it generated. tests/model/test_compat.py makes the folder from this description, puts today's code files beside
the weights and expects the same tokens. A formula gives the values of the weights, so the repository keeps none.

    git worktree add OLD 5a7a497
    PYTHONPATH=OLD python tests/old_folder.py > tests/folder_5a7a497.json    # with transformers 5.23
"""

import json
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file


SIZES = {
    "num_soft_tokens": 24,
    "num_sink_tokens": 2,
    "chunk_length": 4,
    "max_query_length": 7,
    "hypernet_hidden_size": 32,
    "hypernet_num_hidden_layers": 2,
    "hypernet_num_attention_heads": 4,
    "hypernet_intermediate_size": 48,
}
LLM_SIZES = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 40,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
PROMPT = [[0, 0, 0, 9, 31, 7, 52, 18], [44, 3, 27, 15, 8, 50, 36, 21]]  # the first row is padded on the left
NEW_TOKENS = 40  # several steps of the recursion, past the window


def weights(shapes: dict[str, list[int]]) -> dict[str, torch.Tensor]:
    """Weights that look random: a sine of a quadratic phase, around 1 for norms and scales."""
    made = {}
    for index, (name, shape) in enumerate(sorted(shapes.items())):
        number = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).reshape(shape)
        wave = torch.sin(0.7 * (number + index + 1) ** 2)
        is_scale = name.endswith(("norm.weight", "embedding_scale"))
        made[name] = (1 + 0.1 * wave if is_scale else 0.35 * wave).float()
    return made


def main():
    from transformers import LlamaConfig

    from phase15.model.configuration_phase15 import Phase15Config
    from phase15.model.modeling_phase15 import Phase15ForCausalLM

    model = Phase15ForCausalLM(Phase15Config(text_config=LlamaConfig(**LLM_SIZES), **SIZES)).eval()
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        shapes = {name: list(weight.shape) for name, weight in load_file(Path(folder, "model.safetensors")).items()}
        files = {path.name: json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))}
    model.load_state_dict(weights(shapes), strict=True)
    ids = torch.tensor(PROMPT)
    output = model.generate(
        ids,
        attention_mask=(ids > 0).long(),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(output.logits).topk(2).values
    print("smallest gap between the best two logits:", (best[..., 0] - best[..., 1]).min().item(), file=sys.stderr)
    print(json.dumps({"files": files, "shapes": shapes, "tokens": output.sequences.tolist()}))


if __name__ == "__main__":
    main()
